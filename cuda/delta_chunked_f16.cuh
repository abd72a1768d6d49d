// Which kernels a chunked delta sweep in f16 takes: up to 128 rows of the state, 64 columns a block.
#pragma once
#include "delta_chunked.cuh"
#include "delta_chunked_low_rank.cuh"

namespace cla {

template <class F> auto with_f16_layout(const cla_delta_sweep &s, F f) {
  return by_rows(s.of.k_dim, [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    if (s.of.low_rank) return f(LowRankLayout<R, CLA_F16>());
    return s.of.gate_kind == CLA_GATE_ROWS ? f(DeltaChunkLayout<R, 1, true, true, false, CLA_F16>())
                                           : f(DeltaChunkLayout<R, 1, false, true, false, CLA_F16>());
  });
}

int32_t delta_chunked_f16(const cla_delta_sweep &s, void *stream);

}  // namespace cla
