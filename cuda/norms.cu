// RMS norm, with a gate behind it or without, l2norm and layer norm. A row is shared by as many threads as it has vectors of 16 bytes,
// up to a warp; longer rows by up to a block, each thread with up to CLA_NORM_HELD vectors in registers. So a row is read
// once. In the backward pass a team goes over several rows and keeps its part of the weight's gradient in registers.
#include "vectors.cuh"

namespace cla {

constexpr int NORM_THREADS = CLA_NORM_THREADS, NORM_WARPS = NORM_THREADS / 32;

// Sums over the threads of a team, the same in each. All of the block come here.
template <int COUNT> CLA_DEVICE void sums_of_team(float (&x)[COUNT], int team, float *shared) {
  CLA_UNROLL
  for (int i = 0; i < COUNT; i++) {
    for (int lanes = (team < 32 ? team : 32) / 2; lanes > 0; lanes /= 2) x[i] += shuffle_xor(x[i], lanes);
  }
  if (team <= 32) return;
  const int warp = (int)thread_index() / 32, warps = team / 32, first = warp / warps * warps;
  CLA_UNROLL
  for (int i = 0; i < COUNT; i++) {
    if (thread_index() % 32 == 0) shared[i * NORM_WARPS + warp] = x[i];
  }
  barrier();
  CLA_UNROLL
  for (int i = 0; i < COUNT; i++) {
    x[i] = 0.f;
    for (int w = 0; w < warps; w++) x[i] += shared[i * NORM_WARPS + first + w];
  }
  barrier();
}

template <int N, bool WHOLE> CLA_DEVICE void load_weight(float (&weight)[N], const cla_norm &c, int d) {
  if (c.weight.data) return load_numbers<N, WHOLE>(weight, c.weight, d, c.width - d);
  CLA_UNROLL
  for (int i = 0; i < N; i++) weight[i] = 1.f;
}

// The mean of a row, of which a thread has these vectors; behind its end there are zeros.
template <class V, int HELD>
CLA_DEVICE float mean_of_team(const V (&x)[HELD], const cla_norm &c, int team, float *shared) {
  float sum[1] = {0.f};
  CLA_UNROLL
  for (int k = 0; k < HELD; k++) {
    CLA_UNROLL
    for (int i = 0; i < V::COUNT; i++) sum[0] += x[k][i];
  }
  sums_of_team(sum, team, shared);
  return sum[0] * c.factor;
}

template <int DTYPE, int HELD, bool WHOLE, bool CENTRED>
CLA_KERNEL(NORM_THREADS, HELD == 1 ? 5 : 3) void norm_kernel(cla_norm c) {
  constexpr int N = IN_16_BYTES<DTYPE>;
  using V = Vector<DTYPE, N, WHOLE>;
  const int thread = (int)thread_index(), team = 1 << c.team_bits, lane = thread & (team - 1);
  const int64_t row = block_x() * (int64_t)(NORM_THREADS >> c.team_bits) + (thread >> c.team_bits);
  const bool there = row < c.rows;
  const RowPlace place(there ? row : 0, c.rows, c.tokens, c.heads);
  const bool adds = c.added.data;
  const Rows rows = place.of(c.x), others = place.of(adds ? c.added : c.gate), out = place.of(c.out);
  V x[HELD], gate[HELD];  // or what is added
  CLA_UNROLL
  for (int k = 0; k < HELD; k++) {
    const int d = (lane + k * team) * N;
    x[k].clear();
    gate[k].clear();
    if (!there || d >= c.width) continue;
    x[k].load(rows, place.token, d, c.width);
    if (others.data) gate[k].load(others, place.token, d, c.width);
  }
  if (adds) {
    CLA_UNROLL
    for (int k = 0; k < HELD; k++) {
      const int d = (lane + k * team) * N;
      float sum[N];
      CLA_UNROLL
      for (int i = 0; i < N; i++) sum[i] = x[k][i] + gate[k][i];
      x[k].set(sum);
      if (there && d < c.width) x[k].store(place.of(c.sum), place.token, d, c.width);
    }
  }
  const float mean = CENTRED ? mean_of_team(x, c, team, (float *)shared_memory()) : 0.f;
  float sum[1] = {0.f};
  CLA_UNROLL
  for (int k = 0; k < HELD; k++) {
    CLA_UNROLL
    for (int i = 0; i < N; i++) {
      // Zeros behind the end of a row have no part in this.
      if (CENTRED && (lane + k * team) * N + i >= c.width) continue;
      sum[0] += (x[k][i] - mean) * (x[k][i] - mean);
    }
  }
  sums_of_team(sum, team, (float *)shared_memory());
  const float inverse = 1.f / sqrtf(sum[0] * c.factor + c.eps);
  CLA_UNROLL
  for (int k = 0; k < HELD; k++) {
    const int d = (lane + k * team) * N;
    if (!there || d >= c.width) continue;
    float y[N];
    load_weight<N, WHOLE>(y, c, d);
    CLA_UNROLL
    for (int i = 0; i < N; i++) y[i] = (x[k][i] - mean) * inverse * y[i] * gate_value(c.gate_kind, gate[k][i]);
    if (CENTRED && c.bias.data) {
      float bias[N];
      load_numbers<N, WHOLE>(bias, c.bias, d, c.width - d);
      CLA_UNROLL
      for (int i = 0; i < N; i++) y[i] += bias[i];
    }
    V v;
    v.set(y);
    v.store(out, place.token, d, c.width);
  }
}

template <int DTYPE, int HELD, bool WHOLE, bool CENTRED>
CLA_KERNEL(NORM_THREADS, HELD > 1 ? 1 : WHOLE ? 3 : 2) void norm_backward_kernel(cla_norm c) {
  constexpr int N = IN_16_BYTES<DTYPE>;
  using V = Vector<DTYPE, N, WHOLE>;
  const int thread = (int)thread_index(), team = 1 << c.team_bits, lane = thread & (team - 1);
  const int teams = NORM_THREADS >> c.team_bits;
  float *shared = (float *)shared_memory();
  constexpr int PARAMETERS = CENTRED ? 2 : 1;
  float of_parameters[PARAMETERS][HELD][N];
  CLA_UNROLL
  for (int p = 0; p < PARAMETERS; p++) {
    CLA_UNROLL
    for (int k = 0; k < HELD; k++) {
      CLA_UNROLL
      for (int i = 0; i < N; i++) of_parameters[p][k][i] = 0.f;
    }
  }
  for (int64_t first = block_x() * (int64_t)teams; first < c.rows; first += grid_x() * (int64_t)teams) {
    const int64_t row = first + (thread >> c.team_bits);
    const bool there = row < c.rows;
    const RowPlace place(there ? row : 0, c.rows, c.tokens, c.heads);
    const Rows rows = place.of(c.x), gates = place.of(c.gate), grads = place.of(c.grad_out);
    const Rows dx = place.of(c.dx), dgate = place.of(c.dgate);
    V x[HELD], gate[HELD], dy[HELD];
    CLA_UNROLL
    for (int k = 0; k < HELD; k++) {
      const int d = (lane + k * team) * N;
      x[k].clear();
      gate[k].clear();
      dy[k].clear();
      if (!there || d >= c.width) continue;
      x[k].load(rows, place.token, d, c.width);
      dy[k].load(grads, place.token, d, c.width);
      if (gates.data) gate[k].load(gates, place.token, d, c.width);
    }
    const float mean = CENTRED ? mean_of_team(x, c, team, shared) : 0.f;
    // x . x, x . the gradient of the row before the weight, and the sum of that
    float sum[PARAMETERS + 1] = {0.f};
    CLA_UNROLL
    for (int k = 0; k < HELD; k++) {
      const int d = (lane + k * team) * N;
      if (!there || d >= c.width) continue;
      float weight[N];
      load_weight<N, WHOLE>(weight, c, d);
      CLA_UNROLL
      for (int i = 0; i < N; i++) {
        if (CENTRED && d + i >= c.width) continue;
        const float grad = dy[k][i] * gate_value(c.gate_kind, gate[k][i]) * weight[i];
        sum[0] += (x[k][i] - mean) * (x[k][i] - mean);
        sum[1] += (x[k][i] - mean) * grad;
        if constexpr (CENTRED) sum[2] += grad;
      }
    }
    sums_of_team(sum, team, shared);
    const float inverse = 1.f / sqrtf(sum[0] * c.factor + c.eps);
    const float slope = sum[1] * c.factor * inverse * inverse;
    float level = 0.f;
    if constexpr (CENTRED) level = sum[2] * c.factor;
    CLA_UNROLL
    for (int k = 0; k < HELD; k++) {
      const int d = (lane + k * team) * N;
      if (!there || d >= c.width) continue;
      float weight[N], of_x[N];
      load_weight<N, WHOLE>(weight, c, d);
      CLA_UNROLL
      for (int i = 0; i < N; i++) {
        const float grad = dy[k][i] * gate_value(c.gate_kind, gate[k][i]);
        of_x[i] = inverse * (grad * weight[i] - level - (x[k][i] - mean) * slope);
        of_parameters[0][k][i] += grad * ((x[k][i] - mean) * inverse);
        if constexpr (CENTRED) of_parameters[1][k][i] += grad;
      }
      V v;
      v.set(of_x);
      v.store(dx, place.token, d, c.width);
      if (!gates.data) continue;
      float of_gate[N];
      CLA_UNROLL
      for (int i = 0; i < N; i++) {
        of_gate[i] = dy[k][i] * (x[k][i] * inverse * weight[i]) * gate_slope(c.gate_kind, gate[k][i]);
      }
      v.set(of_gate);
      v.store(dgate, place.token, d, c.width);
    }
  }
  if (!c.partial) return;
  // Over the teams of the block, in their order.
  const int columns = team * N;
  CLA_UNROLL
  for (int p = 0; p < PARAMETERS; p++) {
    CLA_UNROLL
    for (int k = 0; k < HELD; k++) {
      if (k * columns >= c.width) continue;
      barrier();
      CLA_UNROLL
      for (int i = 0; i < N; i++) shared[thread * N + i] = of_parameters[p][k][i];
      barrier();
      for (int i = thread; i < columns && k * columns + i < c.width; i += NORM_THREADS) {
        float sum = 0.f;
        for (int j = 0; j < teams; j++) sum += shared[j * columns + i];
        c.partial[(block_x() * (int64_t)PARAMETERS + p) * c.width + k * columns + i] = sum;
      }
    }
  }
}

// On the side of the launch.

template <int DTYPE, int HELD, bool WHOLE, bool CENTRED> int32_t launch_norm(const cla_norm &c, bool backward, void *stream) {
  constexpr int64_t sums = 2 * NORM_WARPS * sizeof(float), weights = NORM_THREADS * IN_16_BYTES<DTYPE> * sizeof(float);
  const int64_t teams = NORM_THREADS >> c.team_bits;
  if (c.rows == 0) return 0;
  if (backward) {
    return launch(norm_backward_kernel<DTYPE, HELD, WHOLE, CENTRED>, {c.blocks, 1}, NORM_THREADS, weights, stream, c);
  }
  return launch(norm_kernel<DTYPE, HELD, WHOLE, CENTRED>, {(c.rows + teams - 1) / teams, 1}, NORM_THREADS, sums, stream, c);
}

template <int DTYPE> int32_t dispatch_norm(const cla_norm &c, bool backward, void *stream) {
  constexpr int N = IN_16_BYTES<DTYPE>;
  auto fits = [&](const cla_tensor &x) { return !x.data || in_pieces(x, c.width); };
  const bool whole = fits(c.x) && fits(c.gate) && fits(c.added) && fits(c.sum) && fits(c.out) && fits(c.grad_out) &&
                     fits(c.dx) && fits(c.dgate) && in_fours(c.weight) && in_fours(c.bias);
  const bool one = N << c.team_bits >= c.width;
  auto with = [&](auto held, auto whole, auto centred) {
    return launch_norm<DTYPE, decltype(held)::value, decltype(whole)::value, decltype(centred)::value>(c, backward, stream);
  };
  auto of = [&](auto whole, auto centred) {
    return one ? with(std::integral_constant<int, 1>(), whole, centred)
               : with(std::integral_constant<int, CLA_NORM_HELD>(), whole, centred);
  };
  using Yes = std::true_type;
  using No = std::false_type;
  if (c.centred) return whole ? of(Yes(), Yes()) : of(No(), Yes());
  return whole ? of(Yes(), No()) : of(No(), No());
}

inline int32_t dispatch_norm(const cla_norm &c, bool backward, void *stream) {
  return by_dtype(c.x.dtype, [&](auto dtype) { return dispatch_norm<decltype(dtype)::value>(c, backward, stream); });
}

}  // namespace cla

extern "C" int32_t cla_norm_forward(const cla_norm *call, void *stream) { return cla::dispatch_norm(*call, false, stream); }

extern "C" int32_t cla_norm_backward(const cla_norm *call, void *stream) { return cla::dispatch_norm(*call, true, stream); }
