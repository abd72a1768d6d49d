// Launches of the gradients of the delta rules in matrix form.
#include "delta_chunk_gradients_decayed.cuh"
#include "delta_chunk_gradients_low_rank.cuh"
#include "delta_gradients.cuh"

namespace cla {

template <class Gradients> CLA_KERNEL(Gradients::THREADS, 1) void delta_chunk_gradients_kernel(const CLA_CONSTANT cla_delta_gradient c) {
  const int64_t index = block_x() / c.of.heads;
  Gradients(c, SegmentOf(c.starts, c.of.sequences, index), index, block_x() % c.of.heads).run();
}

template <class Gradients> struct Kind {
  using type = Gradients;
};

// Channels of keys, and of values, that a head has at most. The low-rank family has no more than it can have by itself: in parts
// it would be slower than token by token.
constexpr int most_in_chunks(bool low_rank) { return low_rank ? 64 : 128; }

// f(the Kind of gradients that a call takes), or NOT_IN_CHUNKS.
template <class F> int32_t with_gradients(const cla_delta_gradient &c, F f) {
  if (!in_16_bits(c.of, c.v, c.grad_out)) return NOT_IN_CHUNKS;
  auto fitting = [&](auto kind) { return decltype(kind)::type::SHARED > c.shared_limit ? NOT_IN_CHUNKS : f(kind); };
  const int most = most_in_chunks(c.of.low_rank);
  if (c.of.k_dim > most || c.of.v_dim > most) return NOT_IN_CHUNKS;
  const bool by_channel = c.of.gate_kind == CLA_GATE_ROWS;
  if (c.of.low_rank && !by_channel) return NOT_IN_CHUNKS;
  return by_16_bits(c.of.k.dtype, [&](auto dtype) {
    constexpr int DTYPE = decltype(dtype)::value;
    if (c.of.low_rank) return fitting(Kind<DeltaChunkGradientsLowRank<64, DTYPE>>());
    return by_rows(c.of.k_dim, [&](auto rows) {
      constexpr int R = decltype(rows)::value;
      return by_channel ? fitting(Kind<DeltaChunkGradientsDecayed<R, DTYPE>>())
                        : fitting(Kind<DeltaChunkGradients<R, 128, DTYPE>>());
    });
  });
}

int32_t delta_chunk_gradients(const cla_delta_gradient &c, void *stream) {
  return with_gradients(c, [&](auto kind) -> int32_t {
    using Gradients = typename decltype(kind)::type;
    const Dims grid = {c.starts.all * c.of.heads, 1};
    return launch(delta_chunk_gradients_kernel<Gradients>, grid, Gradients::THREADS, Gradients::SHARED, stream, c);
  });
}

}  // namespace cla

extern "C" void cla_delta_gradient_part(const cla_delta_gradient *call, int32_t *rows, int32_t *columns) {
  auto least = [](int32_t x, int32_t y) { return x < y ? x : y; };
  if (!call->of.low_rank) {
    const int most = cla::most_in_chunks(false);
    cla_delta_gradient part = *call;
    part.of.k_dim = *rows = least(call->of.k_dim, most);
    part.of.v_dim = *columns = least(call->of.v_dim, most);
    if (cla::with_gradients(part, [](auto) -> int32_t { return 0; }) == 0) return;
  }
  *rows = call->of.k_dim;
  *columns = least(call->of.v_dim, CLA_DELTA_GRADIENT_VALUES);
}
