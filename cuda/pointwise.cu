// Functions of one number and of two, forward and backward, as rows of columns: threads beside one another have neighbouring
// vectors of a row, up to a warp of them, and the blocks of a row's next columns follow in y.
#include "vectors.cuh"

namespace cla {

constexpr int POINTWISE_THREADS = CLA_POINTWISE_THREADS;

CLA_DEVICE int64_t first_row(int team_bits, int64_t block) {
  return block * (POINTWISE_THREADS >> team_bits) + (thread_index() >> team_bits);
}
CLA_DEVICE int64_t first_row(int team_bits) { return first_row(team_bits, block_x()); }
template <int N> CLA_DEVICE int first_column(int team_bits) {
  return (int)((block_y() << team_bits) + (thread_index() & ((1u << team_bits) - 1))) * N;
}

template <int DTYPE, bool WHOLE> CLA_KERNEL(POINTWISE_THREADS, 4) void gated_kernel(cla_gated c) {
  constexpr int N = IN_16_BYTES<DTYPE>;
  const int64_t row = first_row(c.team_bits);
  const int d = first_column<N>(c.team_bits);
  if (row >= c.rows || d >= c.width) return;
  const RowPlace place(row, c.rows, c.tokens, c.heads);
  Vector<DTYPE, N, WHOLE> x, gate;
  x.load(place.of(c.x), place.token, d, c.width);
  gate.load(place.of(c.gate), place.token, d, c.width);
  float y[N];
  CLA_UNROLL
  for (int i = 0; i < N; i++) y[i] = x[i] * gate_value(c.gate_kind, gate[i]);
  x.set(y);
  x.store(place.of(c.out), place.token, d, c.width);
}

template <int DTYPE, bool WHOLE> CLA_KERNEL(POINTWISE_THREADS, 4) void gated_backward_kernel(cla_gated c) {
  constexpr int N = IN_16_BYTES<DTYPE>;
  const int64_t row = first_row(c.team_bits);
  const int d = first_column<N>(c.team_bits);
  if (row >= c.rows || d >= c.width) return;
  const RowPlace place(row, c.rows, c.tokens, c.heads);
  Vector<DTYPE, N, WHOLE> x, gate, dy;
  x.load(place.of(c.x), place.token, d, c.width);
  gate.load(place.of(c.gate), place.token, d, c.width);
  dy.load(place.of(c.grad_out), place.token, d, c.width);
  float dx[N], dgate[N];
  CLA_UNROLL
  for (int i = 0; i < N; i++) {
    dx[i] = dy[i] * gate_value(c.gate_kind, gate[i]);
    dgate[i] = dy[i] * x[i] * gate_slope(c.gate_kind, gate[i]);
  }
  x.set(dx);
  x.store(place.of(c.dx), place.token, d, c.width);
  gate.set(dgate);
  gate.store(place.of(c.dgate), place.token, d, c.width);
}

// log(1 + exp(x)), which neither overflows nor loses small values.
CLA_DEVICE float softplus(float x) { return fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))); }

CLA_DEVICE float function_value(int function, float x) {
  switch (function) {
    case CLA_SIGMOID: return sigmoid(x);
    case CLA_LOG_SIGMOID: return -softplus(-x);
    default: return softplus(x);
  }
}
CLA_DEVICE float function_slope(int function, float x) {
  const float s = sigmoid(function == CLA_LOG_SIGMOID ? -x : x);
  return function == CLA_SIGMOID ? s * (1.f - s) : s;
}

// What the columns of a thread have in common in all rows.
template <bool WHOLE> struct Columns {
  static constexpr int N = CLA_COLUMNS_OF_THREAD;
  float bias[N], factor[N];

  CLA_DEVICE Columns(const cla_pointwise &c, int d) {
    CLA_UNROLL
    for (int i = 0; i < N; i++) bias[i] = 0.f, factor[i] = c.factor;
    if (c.bias.data) load_numbers<N, WHOLE>(bias, c.bias, d, c.width - d);
    if (!c.log_rate.data) return;
    CLA_UNROLL
    for (int i = 0; i < N; i++) {
      if (d + i < c.width) factor[i] *= -expf(load_element(c.log_rate.data, c.log_rate.dtype, (d + i) / c.per_rate));
    }
  }
};

template <int DTYPE, bool WHOLE> CLA_DEVICE void pointwise_rows(const cla_pointwise &c, int64_t block) {
  constexpr int N = CLA_COLUMNS_OF_THREAD;
  const int d = first_column<N>(c.team_bits);
  if (d >= c.width) return;
  const Columns<WHOLE> columns(c, d);
  for (int64_t row = first_row(c.team_bits, block); row < c.rows; row += c.blocks * (POINTWISE_THREADS >> c.team_bits)) {
    const RowPlace place(row, c.rows, c.tokens, c.heads);
    Vector<DTYPE, N, WHOLE> x;
    x.load(place.of(c.x), place.token, d, c.width);
    float y[N];
    CLA_UNROLL
    for (int i = 0; i < N; i++) y[i] = columns.factor[i] * function_value(c.function, x[i] + columns.bias[i]);
    Vector<CLA_F32, N, WHOLE> v;
    v.set(y);
    v.store(place.of(c.out), place.token, d, c.width);
  }
}

template <int DTYPE, bool WHOLE> CLA_KERNEL(POINTWISE_THREADS, 4) void pointwise_kernel(cla_pointwise c) {
  pointwise_rows<DTYPE, WHOLE>(c, block_x());
}

// The blocks of the second come behind those of the first.
template <int DTYPE, bool WHOLE>
CLA_KERNEL(POINTWISE_THREADS, 4) void pointwise_pair_kernel(const CLA_CONSTANT cla_pointwise first, const CLA_CONSTANT cla_pointwise second) {
  const int64_t block = block_x();
  block < first.blocks ? pointwise_rows<DTYPE, WHOLE>(first, block) : pointwise_rows<DTYPE, WHOLE>(second, block - first.blocks);
}

template <int DTYPE, bool WHOLE> CLA_KERNEL(POINTWISE_THREADS, 4) void pointwise_backward_kernel(cla_pointwise c) {
  constexpr int N = CLA_COLUMNS_OF_THREAD;
  const int d = first_column<N>(c.team_bits), thread = (int)thread_index();
  const int teams = POINTWISE_THREADS >> c.team_bits;
  const Columns<WHOLE> columns(c, d < c.width ? d : 0);
  float sums[2][N];  // to the gradients of bias and log_rate
  CLA_UNROLL
  for (int i = 0; i < N; i++) sums[0][i] = sums[1][i] = 0.f;
  for (int64_t row = first_row(c.team_bits); row < c.rows && d < c.width; row += c.blocks * teams) {
    const RowPlace place(row, c.rows, c.tokens, c.heads);
    Vector<DTYPE, N, WHOLE> x;
    Vector<CLA_F32, N, WHOLE> dy;
    x.load(place.of(c.x), place.token, d, c.width);
    dy.load(place.of(c.grad_out), place.token, d, c.width);
    float dx[N];
    CLA_UNROLL
    for (int i = 0; i < N; i++) {
      const float z = x[i] + columns.bias[i], grad = dy[i] * columns.factor[i];
      dx[i] = grad * function_slope(c.function, z);
      sums[0][i] += dx[i];
      if (c.partial) sums[1][i] += grad * function_value(c.function, z);
    }
    x.set(dx);
    x.store(place.of(c.dx), place.token, d, c.width);
  }
  if (!c.partial) return;
  // Over the teams of the block, in their order.
  float *shared = (float *)shared_memory();
  const int count = N << c.team_bits, first = (int)block_y() * count;
  CLA_UNROLL
  for (int k = 0; k < 2; k++) {
    barrier();
    CLA_UNROLL
    for (int i = 0; i < N; i++) shared[thread * N + i] = sums[k][i];
    barrier();
    if (thread >= count || first + thread >= c.width) continue;
    float sum = 0.f;
    for (int j = 0; j < teams; j++) sum += shared[j * count + thread];
    c.partial[(block_x() * (int64_t)2 + k) * c.width + first + thread] = sum;
  }
}

// On the side of the launch.

// Blocks beside one another in the columns.
inline int64_t column_blocks(int width, int columns, int team_bits) {
  const int64_t own = (int64_t)columns << team_bits;
  return (width + own - 1) / own;
}

inline int32_t dispatch_gated(const cla_gated &c, bool backward, void *stream) {
  return by_dtype(c.x.dtype, [&](auto dtype) {
    constexpr int DTYPE = decltype(dtype)::value;
    auto fits = [&](const cla_tensor &x) { return !x.data || in_pieces(x, c.width); };
    const bool whole = fits(c.x) && fits(c.gate) && fits(c.out) && fits(c.grad_out) && fits(c.dx) && fits(c.dgate);
    auto kernel = backward ? (whole ? gated_backward_kernel<DTYPE, true> : gated_backward_kernel<DTYPE, false>)
                           : (whole ? gated_kernel<DTYPE, true> : gated_kernel<DTYPE, false>);
    const int64_t teams = POINTWISE_THREADS >> c.team_bits;
    const Dims grid = {(c.rows + teams - 1) / teams, column_blocks(c.width, IN_16_BYTES<DTYPE>, c.team_bits)};
    return launch(kernel, grid, POINTWISE_THREADS, 0, stream, c);
  });
}

inline bool can_be_whole(const cla_pointwise &c) {
  auto fits = [&](const cla_tensor &x) { return !x.data || in_groups(x, c.width, CLA_COLUMNS_OF_THREAD); };
  return fits(c.x) && fits(c.dx) && fits(c.out) && fits(c.grad_out) && in_fours(c.bias);
}

inline int32_t dispatch_pointwise(const cla_pointwise &c, bool backward, void *stream) {
  return by_dtype(c.x.dtype, [&](auto dtype) {
    constexpr int DTYPE = decltype(dtype)::value, N = CLA_COLUMNS_OF_THREAD;
    const bool whole = can_be_whole(c);
    auto kernel = backward ? (whole ? pointwise_backward_kernel<DTYPE, true> : pointwise_backward_kernel<DTYPE, false>)
                           : (whole ? pointwise_kernel<DTYPE, true> : pointwise_kernel<DTYPE, false>);
    const int64_t shared = c.partial ? POINTWISE_THREADS * N * sizeof(float) : 0;
    return launch(kernel, {c.blocks, column_blocks(c.width, N, c.team_bits)}, POINTWISE_THREADS, shared, stream, c);
  });
}

inline int32_t dispatch_pair(const cla_pointwise &first, const cla_pointwise &second, void *stream) {
  return by_dtype(first.x.dtype, [&](auto dtype) {
    constexpr int DTYPE = decltype(dtype)::value;
    const bool whole = can_be_whole(first) && can_be_whole(second);
    auto kernel = whole ? pointwise_pair_kernel<DTYPE, true> : pointwise_pair_kernel<DTYPE, false>;
    auto beside = [](const cla_pointwise &c) { return column_blocks(c.width, CLA_COLUMNS_OF_THREAD, c.team_bits); };
    const int64_t most = beside(first) > beside(second) ? beside(first) : beside(second);
    return launch(kernel, {first.blocks + second.blocks, most}, POINTWISE_THREADS, 0, stream, first, second);
  });
}

}  // namespace cla

extern "C" int32_t cla_gated_forward(const cla_gated *call, void *stream) { return cla::dispatch_gated(*call, false, stream); }

extern "C" int32_t cla_gated_backward(const cla_gated *call, void *stream) { return cla::dispatch_gated(*call, true, stream); }

extern "C" int32_t cla_pointwise_forward(const cla_pointwise *call, void *stream) {
  return cla::dispatch_pointwise(*call, false, stream);
}

extern "C" int32_t cla_pointwise_forward_pair(const cla_pointwise *first, const cla_pointwise *second, void *stream) {
  return cla::dispatch_pair(*first, *second, stream);
}

extern "C" int32_t cla_pointwise_backward(const cla_pointwise *call, void *stream) {
  return cla::dispatch_pointwise(*call, true, stream);
}
