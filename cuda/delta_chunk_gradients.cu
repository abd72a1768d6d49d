// Launches of the gradients of the delta rules in matrix form.
#include "delta_chunk_gradients_decayed.cuh"
#include "delta_chunk_gradients_low_rank.cuh"
#include "delta_gradients.cuh"

namespace cla {

template <class Gradients> CLA_KERNEL(256, 1) void delta_chunk_gradients_kernel(const CLA_CONSTANT cla_delta_gradient c) {
  const int64_t index = block_x() / c.of.heads;
  Gradients(c, SegmentOf(c.starts, c.of.sequences, index), index, block_x() % c.of.heads).run();
}

template <class Gradients> int32_t launch_chunk_gradients(const cla_delta_gradient &c, void *stream) {
  if (Gradients::SHARED > c.shared_limit) return NOT_IN_CHUNKS;
  const Dims grid = {c.starts.all * c.of.heads, 1};
  return launch(delta_chunk_gradients_kernel<Gradients>, grid, Gradients::THREADS, Gradients::SHARED, stream, c);
}
template <int R> int32_t launch_chunk_gradients_of(const cla_delta_gradient &c, void *stream) {
  return c.of.gate_kind == CLA_GATE_ROWS ? launch_chunk_gradients<DeltaChunkGradientsDecayed<R>>(c, stream)
                                         : launch_chunk_gradients<DeltaChunkGradients<R, 128>>(c, stream);
}

int32_t delta_chunk_gradients(const cla_delta_gradient &c, void *stream) {
  for (const cla_tensor &x : {c.of.q, c.of.k, c.of.a, c.of.b, c.v, c.grad_out}) {
    if (x.data && x.dtype != CLA_BF16) return NOT_IN_CHUNKS;
  }
  if (c.of.low_rank) {
    const bool fits = c.of.k_dim <= 64 && c.of.v_dim <= 64 && c.of.gate_kind == CLA_GATE_ROWS;
    return fits ? launch_chunk_gradients<DeltaChunkGradientsLowRank<64>>(c, stream) : NOT_IN_CHUNKS;
  }
  if (c.of.k_dim > 128 || c.of.v_dim > 128) return NOT_IN_CHUNKS;
  return c.of.k_dim <= 64 ? launch_chunk_gradients_of<64>(c, stream) : launch_chunk_gradients_of<128>(c, stream);
}

}  // namespace cla
