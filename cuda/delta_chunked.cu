// The chunked delta sweep in bf16, and which kernels a sweep takes.
#include "delta_chunked_f16.cuh"

namespace cla {

// Calls `f` with the layout that a sweep in bf16 takes.
template <class F> auto with_bf16_layout(const cla_delta_sweep &s, F f) {
  auto by_gate = [&](auto rows, auto groups) {
    constexpr int R = decltype(rows)::value, W = decltype(groups)::value;
    if (s.of.gate_kind == CLA_GATE_ROWS) return f(DeltaChunkLayout<R, W, true, true>());
    using Ahead = DeltaChunkLayout<R, W, false, true>;
    if constexpr (W == 1) {
      if (Ahead::SHARED > s.shared_limit) return f(DeltaChunkLayout<R, W, false, false>());
    }
    return f(Ahead());
  };
  auto by_columns = [&](auto rows) {
    return s.columns <= 64 ? by_gate(rows, std::integral_constant<int, 1>()) : by_gate(rows, std::integral_constant<int, 2>());
  };
  if (s.of.k_dim > 128) return f(DeltaChunkLayout<128, 2, false, false, true>());
  return by_rows(s.of.k_dim, [&](auto rows) {
    return s.of.low_rank ? f(LowRankLayout<decltype(rows)::value, CLA_BF16>()) : by_columns(rows);
  });
}

// The states before spans, one after another: a thread has one row and EACH columns of a state. What a span makes of them is a
// product in f32.
template <int ROWS_> struct SpanStarts {
  static constexpr int ROWS = ROWS_, EACH = 8, COLUMNS = 16, THREADS = ROWS * COLUMNS / EACH;
  static constexpr int AHEAD = 32;  // loads under way
};
template <class L> CLA_KERNEL(L::THREADS, 1) void delta_starts_kernel(const CLA_CONSTANT cla_delta_sweep s) {
  const int row = thread_index() % L::ROWS, own = thread_index() / L::ROWS * L::EACH, column = block_y() * L::COLUMNS + own;
  const int head = block_x() % s.of.heads, k_dim = s.of.k_dim, v_dim = s.of.v_dim;
  const int64_t sequence = block_x() / s.of.heads;
  float(*state)[L::COLUMNS] = (float(*)[L::COLUMNS])shared_memory();  // [ROWS][COLUMNS]
  const bool used = row < k_dim;
  auto has = [&](int c) { return used && column + c < v_dim; };
  float x[L::EACH];
  CLA_UNROLL
  for (int c = 0; c < L::EACH; c++) {
    x[c] = 0.f;
    if (s.first.data && has(c)) {
      x[c] = s.first.data[sequence * s.first.sequence + head * s.first.head + row * s.first.row + (column + c) * s.first.col];
    }
  }
  CLA_NO_UNROLL
  for (int span = 0; span < s.spans.count; span++) {
    float *start = s.spans.starts + ((sequence * s.spans.count + span) * s.of.heads + head) * v_dim * k_dim;
    CLA_UNROLL
    for (int c = 0; c < L::EACH; c++) {
      if (has(c)) start[(column + c) * k_dim + row] = x[c];
    }
    if (span + 1 == s.spans.count) break;
    CLA_UNROLL
    for (int c = 0; c < L::EACH; c += 4) store4(&state[row][own + c], {x[c], x[c + 1], x[c + 2], x[c + 3]});
    barrier();
    const float *added = s.spans.changes + ((sequence * (s.spans.count - 1) + span) * s.of.heads + head) * (v_dim + k_dim) * k_dim;
    const float *factors = added + v_dim * k_dim + row;
    CLA_UNROLL
    for (int c = 0; c < L::EACH; c++) x[c] = has(c) ? added[(column + c) * k_dim + row] : 0.f;
    CLA_NO_UNROLL
    for (int first = 0; first < k_dim; first += L::AHEAD) {
      float factor[L::AHEAD];
      CLA_UNROLL
      for (int j = 0; j < L::AHEAD; j++) factor[j] = used && first + j < k_dim ? factors[(first + j) * k_dim] : 0.f;
      CLA_UNROLL
      for (int j = 0; j < L::AHEAD; j++) {
        CLA_UNROLL
        for (int c = 0; c < L::EACH; c += 4) {
          float of_state[4];
          load4(of_state, &state[first + j][own + c]);
          CLA_UNROLL
          for (int n = 0; n < 4; n++) x[c + n] += factor[j] * of_state[n];
        }
      }
    }
    barrier();
  }
}

}  // namespace cla

extern "C" int32_t cla_delta_chunked(const cla_delta_sweep *sweep, void *stream) {
  if (sweep->of.k.dtype == CLA_F16) return cla::delta_chunked_f16(*sweep, stream);
  return cla::with_bf16_layout(*sweep, [&](auto layout) { return cla::launch_delta_chunked(layout, *sweep, stream); });
}

extern "C" int32_t cla_delta_changes(const cla_delta_sweep *sweep, void *stream) {
  cla_delta_sweep s = *sweep;
  s.inner.data = s.out.data = nullptr;
  s.first.data = s.last.data = s.anchors.data = s.spans.starts = nullptr;
  return cla_delta_chunked(&s, stream);
}

extern "C" int32_t cla_delta_starts(const cla_delta_sweep *sweep, void *stream) {
  using namespace cla;
  const cla_delta_problem &of = sweep->of;
  auto run = [&](auto layout) {
    using L = decltype(layout);
    const Dims grid = {(int64_t)of.sequences * of.heads, (of.v_dim + L::COLUMNS - 1) / L::COLUMNS};
    return launch(delta_starts_kernel<L>, grid, L::THREADS, L::ROWS * L::COLUMNS * sizeof(float), stream, *sweep);
  };
  return of.k_dim <= 128 ? run(SpanStarts<128>()) : run(SpanStarts<256>());
}

extern "C" int64_t cla_delta_shared_memory(const cla_delta_sweep *sweep) {
  using namespace cla;
  const cla_delta_sweep &s = *sweep;
  const bool f16 = s.of.k.dtype == CLA_F16, by_channel = s.of.low_rank || s.of.gate_kind == CLA_GATE_ROWS;
  if (!in_16_bits(s.of, s.value, s.out) || s.of.k_dim > (f16 || by_channel ? 128 : 256)) return -1;
  if (s.columns > 64 && (f16 || s.of.low_rank || s.of.k_dim > 128)) return -1;
  auto shared = [](auto layout) -> int64_t { return decltype(layout)::SHARED; };
  return f16 ? with_f16_layout(s, shared) : with_bf16_layout(s, shared);
}
