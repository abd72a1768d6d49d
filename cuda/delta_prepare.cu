// What is prepared for the chunked delta sweep.
#include "delta_prepare.cuh"
#include "delta_prepare_decayed.cuh"
#include "delta_prepare_low_rank.cuh"

namespace cla {

template <int R, int DTYPE> CLA_KERNEL(128, R > 128 ? 3 : 5) void delta_prepare_kernel(cla_delta_sweep s) {
  const unsigned index = block_x() / s.of.heads;
  const SegmentOf segment(s.anchors, s.of.sequences, index);
  DeltaPrepare<R, DTYPE>(s, segment, index, (int)(block_x() - index * s.of.heads)).run();
}

template <int R, int DTYPE> int32_t launch_delta_prepare(const cla_delta_sweep &s, void *stream) {
  using Kernel = DeltaPrepare<R, DTYPE>;
  return launch(delta_prepare_kernel<R, DTYPE>, Dims{s.anchors.all * s.of.heads, 1}, Kernel::THREADS, Kernel::SHARED, stream, s);
}

}  // namespace cla

extern "C" int32_t cla_delta_prepare(const cla_delta_sweep *sweep, void *stream) {
  using namespace cla;
  const cla_delta_sweep &s = *sweep;
  if (s.of.k_dim > 128) return launch_delta_prepare<256, CLA_BF16>(s, stream);
  auto by_gate = [&](auto rows, auto dtype, auto reverse) {
    constexpr int R = decltype(rows)::value, DTYPE = decltype(dtype)::value;
    constexpr bool REVERSE = decltype(reverse)::value;
    if (s.of.low_rank) return launch_delta_prepare_low_rank<R, REVERSE, DTYPE>(s, stream);
    if (s.of.gate_kind == CLA_GATE_ROWS) return launch_delta_prepare_decayed<R, REVERSE, DTYPE>(s, stream);
    return launch_delta_prepare<R, DTYPE>(s, stream);
  };
  return by_rows(s.of.k_dim, [&](auto rows) {
    return by_16_bits(s.of.k.dtype, [&](auto dtype) {
      return s.reverse ? by_gate(rows, dtype, std::true_type()) : by_gate(rows, dtype, std::false_type());
    });
  });
}

extern "C" int64_t cla_delta_prepared_bytes(const cla_delta_sweep *sweep) {
  using namespace cla;
  return by_rows(sweep->of.k_dim, [&](auto rows) -> int64_t {
    constexpr int R = decltype(rows)::value;
    if (sweep->of.low_rank) return Prepared::BYTES + PreparedLowRank<R>::BYTES;
    if (sweep->of.gate_kind == CLA_GATE_ROWS) return Prepared::BYTES + PreparedKeys<R>::BYTES;
    return Prepared::BYTES + (sweep->of.k.dtype == CLA_F16 ? PreparedPlainKeys<R>::BYTES : 0);
  });
}
