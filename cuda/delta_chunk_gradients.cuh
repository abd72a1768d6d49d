// The gradients of keys, of a gate by token and of beta (see delta.h) in matrix form, all segments at once, on tensor cores.
// With the steps of a segment as rows, M and U what the two sweeps left, S the state before the segment, E the gradient from
// behind it, and
//
//     D_ts = exp(g_{s+1} + ... + g_t) for s < t, else 0       from = exp(g_0 + ... + g_t)     left = exp(g_{t+1} + ...)
//     A    = s (dO (beta M)^T) . D                            B    = -beta (U (beta M)^T) . D
//
// the products of delta_gradients.cu are
//
//     reads by q   dQ = s from dO S^T + A K
//     reads by k   R  = -beta from U S^T + B K
//     writes       W  = beta left M E^T + A^T Q + B^T K       dK = W + R
//
// each without a token's term with itself, own = s beta (dO . M), which dQ and dK get at the end.
#pragma once
#include "delta_chunk.cuh"

namespace cla {

// R: channels of keys, V: of values, padded. Warps have 16 steps each, and one of PARTS of the channels, or of the steps that are
// read: a block has a multiprocessor to itself, and where few warps wait for what they load nobody computes. DTYPE: bf16 or f16.
template <int R, int V, int DTYPE = CLA_BF16> struct DeltaChunkGradients {
  static constexpr int PARTS = 4, THREADS = 128 * PARTS, VALUE = V * 128, KEY = R * 128;
  // do, then M, U and the state or the gradient behind, each as the sum of two parts, then A and B, the same.
  static constexpr int GRAD_OUT = 0, M = VALUE, U = M + 2 * VALUE, STATE = U + 2 * VALUE, STATE_PART = R / 64 * VALUE;
  static constexpr int A = STATE + 2 * STATE_PART, B = A + 2 * SUBTILE, K = B + 2 * SUBTILE, Q = K + KEY;
  static constexpr int FADES = Q + KEY, NUMBERS = FADES + GateSums::BYTES;
  // Of each step: its gate, beta, from, left, own, dbeta; then sums of parts of a row: of dg, and of what W has from E.
  static constexpr int GATE = 0, BETA = CHUNK, FROM = 2 * CHUNK, LEFT = 3 * CHUNK, OWN = 4 * CHUNK, DBETA = 5 * CHUNK;
  static constexpr int SUMS = 6 * CHUNK, FIRST = SUMS + PARTS * CHUNK, BEHIND = FIRST + PARTS * CHUNK;
  static constexpr int WHOLE = BEHIND + THREADS / 32, SHARED = NUMBERS + 4 * (WHOLE + 1);
  static constexpr int OWN_CHANNELS = R / PARTS, TILES = OWN_CHANNELS / 8, COLUMNS = CHUNK / PARTS;

  const cla_delta_gradient &c;
  unsigned char *shared;
  int tid, lane, rows, part, row0, pair, head, v_steps;
  int64_t segment;
  SegmentSteps at;

  CLA_DEVICE DeltaChunkGradients(const cla_delta_gradient &c, const SegmentOf &of, int64_t index, int head)
      : c(c), shared(shared_memory()), head(head), segment(index), at(c.of, of.sequence, of.segment, false) {
    tid = thread_index();
    lane = tid & 31;
    rows = 16 * ((tid >> 5) & 3);
    part = tid >> 7;
    row0 = lane >> 2;
    pair = (lane & 3) * 2;
    v_steps = (c.of.v_dim + 15) / 16;
  }

  CLA_DEVICE Tile tile(int which, int part = 0, int size = 0) const { return {shared + which + part * size}; }
  CLA_DEVICE float *numbers(int which) const { return (float *)(shared + NUMBERS) + which; }
  CLA_DEVICE GateSums fades() const { return {(float *)(shared + FADES)}; }
  CLA_DEVICE Rows rows_of(const cla_tensor &x) const { return Rows(x, at.steps.batch, head); }
  // The first of the warp's channels, in the tiles of the state: which, and the row there.
  CLA_DEVICE int channel() const { return part * OWN_CHANNELS; }
  CLA_DEVICE Tile state_tile(int part, int channel) const {
    return {shared + STATE + part * STATE_PART + channel / 64 * VALUE};
  }

  // ---- loading ----

  // Up to eight numbers from `from` on, zeros behind them. What sweeps leave is contiguous: rows of whole pieces are aligned.
  CLA_DEVICE void load8(float (&x)[8], const float *from, int count) const {
    float first[4] = {0.f, 0.f, 0.f, 0.f}, second[4] = {0.f, 0.f, 0.f, 0.f};
    if ((c.of.v_dim | c.state_columns) % 8 == 0) {
      if (count > 0) {
        load4(first, from);
        load4(second, from + 4);
      }
    } else {
      CLA_UNROLL
      for (int i = 0; i < 4; i++) {
        if (i < count) first[i] = from[i];
        if (4 + i < count) second[i] = from[4 + i];
      }
    }
    CLA_UNROLL
    for (int i = 0; i < 4; i++) x[i] = first[i], x[4 + i] = second[i];
  }
  // A thread has the same piece of every EVERY-th row.
  static constexpr int EVERY = THREADS / (V / 8);
  CLA_DEVICE int own_row() const { return tid / (V / 8); }
  CLA_DEVICE int own_column() const { return tid % (V / 8) * 8; }

  // A thread's pieces of M or U, on their way from memory, and into tiles.
  static constexpr int OF_STEPS = CHUNK / EVERY, OF_STATE = R / EVERY;
  CLA_DEVICE void load_steps(float (&x)[OF_STEPS][8], const cla_tensor &tensor, const SegmentSteps &at) const {
    const Rows rows = rows_of(tensor);
    const float *from = (const float *)rows.row(at.token(own_row())) + own_column();
    const int left = c.of.v_dim - own_column();
    CLA_UNROLL
    for (int i = 0; i < OF_STEPS; i++) {
      load8(x[i], from + i * EVERY * rows.token, own_row() + i * EVERY < at.count ? left : 0);
    }
  }
  CLA_DEVICE void keep_steps(int to, const float (&x)[OF_STEPS][8]) const {
    CLA_UNROLL
    for (int i = 0; i < OF_STEPS; i++) {
      store_parts(tile(to), tile(to, 1, VALUE), own_row() + i * EVERY, own_column(), x[i]);
    }
  }
  // The same of a state of K x V, the operand of products over values, for rows from `first` on.
  template <int N> CLA_DEVICE void load_state(float (&x)[N][8], const cla_delta_states &states, int first) const {
    const int64_t size = (int64_t)c.state_rows * c.state_columns;
    const float *from = states.data + (segment * c.of.heads + head) * size + own_row() * (int64_t)c.state_columns + own_column();
    const int left = c.of.v_dim - own_column();
    CLA_UNROLL
    for (int i = 0; i < N; i++) {
      const int row = first + i * EVERY;
      load8(x[i], from + row * c.state_columns, own_row() + row < c.of.k_dim ? left : 0);
    }
  }
  // Of each piece, take(channel, its product with what was there) before, if MULTIPLY.
  template <bool MULTIPLY, int N, class Take> CLA_DEVICE void keep_state(const float (&x)[N][8], int first, Take take) const {
    CLA_UNROLL
    for (int i = 0; i < N; i++) {
      const int row = own_row() + first + i * EVERY;
      const Tile high = state_tile(0, row), low = state_tile(1, row);
      if (MULTIPLY) {
        const Vec4 h = load16(high.piece(row % 64, own_column() / 8)), l = load16(low.piece(row % 64, own_column() / 8));
        const uint32_t of_high[4] = {h.x, h.y, h.z, h.w}, of_low[4] = {l.x, l.y, l.z, l.w};
        float sum = 0.f;
        CLA_UNROLL
        for (int j = 0; j < 4; j++) {
          sum += (low_bf16(of_high[j]) + low_bf16(of_low[j])) * x[i][2 * j];
          sum += (high_bf16(of_high[j]) + high_bf16(of_low[j])) * x[i][2 * j + 1];
        }
        take(row, sum);
      }
      store_parts(high, low, row % 64, own_column(), x[i]);
    }
  }
  // Both at once, for those that have no registers to spare meanwhile.
  CLA_DEVICE void split_steps(int to, const cla_tensor &tensor, const SegmentSteps &at) const {
    float x[OF_STEPS][8];
    load_steps(x, tensor, at);
    keep_steps(to, x);
  }
  template <bool MULTIPLY, class Take> CLA_DEVICE void split_state(const cla_delta_states &states, Take take) const {
    constexpr int AT_ONCE = OF_STATE < 4 ? OF_STATE : 4;  // loads under way before the first is used
    CLA_NO_UNROLL
    for (int first = 0; first < R; first += AT_ONCE * EVERY) {
      float x[AT_ONCE][8];
      load_state(x, states, first);
      keep_state<MULTIPLY>(x, first, take);
    }
  }
  CLA_DEVICE void fetch_key(int to, const cla_tensor &from) const {
    TileRows<R, THREADS>::fetch(tile(to), rows_of(from), at, c.of.k_dim, tid);
    copies_commit();
  }

  CLA_DEVICE void fetch() const {
    TileRows<V, THREADS>::fetch(tile(GRAD_OUT), rows_of(c.grad_out), at, c.of.v_dim, tid);
    fetch_key(K, c.of.k);
    if (tid < CHUNK) {
      numbers(BETA)[tid] = tid < at.count ? rows_of(c.of.beta).load(at.token(tid), 0) : 0.f;
    }
  }
  // All that is read at first, waited for.
  CLA_DEVICE void load() const {
    fetch();
    split_steps(M, c.written, at);
    split_steps(U, c.of_written, at);
    split_state<false>(c.starts, [](int, float) {});
    copies_wait<0>();
    barrier();
  }
  CLA_DEVICE void fade() const {
    if (tid < CHUNK) {
      const bool valid = tid < at.count && c.of.gate_kind != CLA_NO_GATE;
      numbers(GATE)[tid] = valid ? rows_of(c.of.gate).load(at.token(tid), 0) : 0.f;
    }
    if (tid < CHUNK) fades().sum(tid, numbers(GATE)[tid]);
    barrier();
    if (tid < CHUNK) {
      numbers(FROM)[tid] = exp2_fast(fades().from_start(tid));
      numbers(LEFT)[tid] = exp2_fast(fades().to_end(tid));
      if (tid == 0) *numbers(WHOLE) = exp2_fast(fades().all());
    }
  }

  // ---- products ----

  // Operands of an input, which has as many parts in bf16: f16 is the sum of two.
  static constexpr int INPUT = DTYPE == CLA_F16 ? 2 : 1;
  CLA_DEVICE static void split_input(uint32_t (&x)[INPUT][4]) {
    if constexpr (INPUT == 2) {
      CLA_UNROLL
      for (int i = 0; i < 4; i++) split_half(x[0][i], x[1][i], x[0][i]);
    }
  }

  // acc += (a + rest) b^T for one step of 16 of the sum and 8 N rows of b, which `load` loads, in two parts: load(high, low, row).
  template <int N, class Load>
  CLA_DEVICE static void multiply(float (&acc)[N][4], const uint32_t (&a)[4], const uint32_t (&rest)[4], Load load) {
    CLA_UNROLL
    for (int j = 0; j < N; j += 2) {
      uint32_t high[4], low[4];
      load(high, low, 8 * j);
      mma16(acc[j], acc[j + 1], a, high);
      mma16(acc[j], acc[j + 1], a, low);
      mma16(acc[j], acc[j + 1], rest, high);
    }
  }
  // The same, and of_one += one b^T for an input.
  template <int N, int ONE, class Load>
  CLA_DEVICE static void multiply_two(float (&of_one)[N][4], const uint32_t (&one)[ONE][4], float (&acc)[N][4],
                                      const uint32_t (&a)[4], const uint32_t (&rest)[4], Load load) {
    CLA_UNROLL
    for (int j = 0; j < N; j += 2) {
      uint32_t high[4], low[4];
      load(high, low, 8 * j);
      mma16(of_one[j], of_one[j + 1], one[0], high);
      mma16(acc[j], acc[j + 1], a, high);
      mma16(of_one[j], of_one[j + 1], one[0], low);
      if constexpr (ONE == 2) mma16(of_one[j], of_one[j + 1], one[1], high);
      mma16(acc[j], acc[j + 1], rest, high);
      mma16(acc[j], acc[j + 1], a, low);
    }
  }
  template <int N> CLA_DEVICE static void zero(float (&x)[N][4]) {
    CLA_UNROLL
    for (int j = 0; j < N; j++) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) x[j][e] = 0.f;
    }
  }
  template <int N> CLA_DEVICE static void add(float (&to)[N][4], const float (&x)[N][4]) {
    CLA_UNROLL
    for (int j = 0; j < N; j++) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) to[j][e] += x[j][e];
    }
  }
  // f(number, step, channel or column from the warp's first)
  template <int N, class F> CLA_DEVICE void each(float (&acc)[N][4], F f) const {
    CLA_UNROLL
    for (int j = 0; j < N; j++) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) f(acc[j][e], rows + row0 + 8 * (e >> 1), 8 * j + pair + (e & 1));
    }
  }

  // dO b^T and U b^T over so many steps of 16 values, for the rows of the warp and those of b that load(step) gives `multiply`.
  template <int N, class Load>
  CLA_DEVICE void multiply_reads(float (&of_out)[N][4], float (&of_u)[N][4], int steps, Load load) const {
    zero(of_out);
    zero(of_u);
    CLA_NO_UNROLL
    for (int step = 0; step < steps; step++) {
      uint32_t out[INPUT][4], u[4], u_rest[4];
      load_a(out[0], tile(GRAD_OUT), rows, 16 * step);
      split_input(out);
      load_a(u, tile(U), rows, 16 * step);
      load_a(u_rest, tile(U, 1, VALUE), rows, 16 * step);
      multiply_two(of_out, out, of_u, u, u_rest, load(step));
    }
  }

  // The warp's part of a row block of scores, each the sum of two.
  template <int N> CLA_DEVICE void store_scores(int to, const float (&x)[N][4]) const {
    CLA_UNROLL
    for (int j = 0; j < N; j++) {
      CLA_UNROLL
      for (int h = 0; h < 2; h++) {
        const float two[2] = {x[j][2 * h], x[j][2 * h + 1]};
        store_parts(tile(to), tile(to, 1, SUBTILE), rows + row0 + 8 * h, part * 8 * N + 8 * j + pair, two);
      }
    }
  }
  // A warp whose steps all come before those of its columns has no scores.
  CLA_DEVICE int steps_of_scores() const { return part * COLUMNS <= rows ? v_steps : 0; }
  // A and B, with what fade(later step, earlier step) leaves.
  template <class Fade> CLA_DEVICE void find_scores(Fade fade) const {
    const int first = part * COLUMNS;
    float a[COLUMNS / 8][4], b[COLUMNS / 8][4];
    multiply_reads(a, b, steps_of_scores(), [&](int step) {
      return [this, first, step](uint32_t(&high)[4], uint32_t(&low)[4], int row) {
        load_b(high, tile(M), first + row, 16 * step);
        load_b(low, tile(M, 1, VALUE), first + row, 16 * step);
      };
    });
    const float *beta = numbers(BETA);
    each(a, [&](float &x, int t, int at) {
      const int s = first + at;
      if (s == t) numbers(OWN)[t] = c.of.scale * beta[t] * x;
      x = s < t ? c.of.scale * beta[s] * fade(t, s) * x : 0.f;
    });
    each(b, [&](float &x, int t, int at) {
      const int s = first + at;
      if (s == t) numbers(DBETA)[t] = x;
      x = s < t ? -beta[t] * beta[s] * fade(t, s) * x : 0.f;
    });
    store_scores(A, a);
    store_scores(B, b);
  }

  // acc += x y, or x^T y, of a triangle of scores and the rows of a key.
  template <bool TRANSPOSED> CLA_DEVICE void add_scored(float (&acc)[TILES][4], int x, int y) const {
    const int of_rows = rows / 16, from = TRANSPOSED ? of_rows : 0, to = TRANSPOSED ? CHUNK / 16 : of_rows + 1;
    CLA_NO_UNROLL
    for (int step = from; step < to; step++) {
      uint32_t high[4], low[4];
      if (TRANSPOSED) {
        load_a_transposed(high, tile(x), 16 * step, rows);
        load_a_transposed(low, tile(x, 1, SUBTILE), 16 * step, rows);
      } else {
        load_a(high, tile(x), rows, 16 * step);
        load_a(low, tile(x, 1, SUBTILE), rows, 16 * step);
      }
      CLA_UNROLL
      for (int j = 0; j < TILES; j += 2) {
        uint32_t of_key[INPUT][4];
        load_b_transposed(of_key[0], tile(y), 16 * step, channel() + 8 * j);
        split_input(of_key);
        mma16(acc[j], acc[j + 1], high, of_key[0]);
        mma16(acc[j], acc[j + 1], low, of_key[0]);
        if constexpr (INPUT == 2) mma16(acc[j], acc[j + 1], high, of_key[1]);
      }
    }
  }

  // The state, or the gradient behind, for the warp's channels.
  CLA_DEVICE auto state_at(int step) const {
    return [this, step](uint32_t(&high)[4], uint32_t(&low)[4], int j) {
      const int at = channel() + j;
      load_b(high, state_tile(0, at), at % 64, 16 * step);
      load_b(low, state_tile(1, at), at % 64, 16 * step);
    };
  }
  CLA_DEVICE void read(float (&of_q)[TILES][4], float (&of_k)[TILES][4]) const {
    multiply_reads(of_q, of_k, v_steps, [&](int step) { return state_at(step); });
    const float *from = numbers(FROM), *beta = numbers(BETA);
    each(of_q, [&](float &x, int t, int) { x *= c.of.scale * from[t]; });
    each(of_k, [&](float &x, int t, int) { x *= -beta[t] * from[t]; });
    add_scored<false>(of_q, A, K);
    add_scored<false>(of_k, B, K);
  }
  // beta M E^T
  CLA_DEVICE void multiply_writes(float (&acc)[TILES][4]) const {
    zero(acc);
    CLA_NO_UNROLL
    for (int step = 0; step < v_steps; step++) {
      uint32_t m[4], rest[4];
      load_a(m, tile(M), rows, 16 * step);
      load_a(rest, tile(M, 1, VALUE), rows, 16 * step);
      multiply(acc, m, rest, state_at(step));
    }
    each(acc, [&](float &x, int t, int) { x *= numbers(BETA)[t]; });
  }
  CLA_DEVICE void write(float (&acc)[TILES][4], float (&first)[2]) const {
    multiply_writes(acc);
    const float *left = numbers(LEFT);
    each(acc, [&](float &x, int t, int) { x *= left[t]; });
    add_products(first, acc, K, 1.f);
    add_scored<true>(acc, A, Q);
    add_scored<true>(acc, B, K);
  }

  // Of the thread's two rows: sum += factor (acc . y)
  CLA_DEVICE void add_products(float (&sum)[2], const float (&acc)[TILES][4], int y, float factor) const {
    CLA_UNROLL
    for (int j = 0; j < TILES; j++) {
      CLA_UNROLL
      for (int h = 0; h < 2; h++) {
        float of_key[2];
        key_pair(of_key, y, rows + row0 + 8 * h, j);
        sum[h] += factor * (acc[j][2 * h] * of_key[0] + acc[j][2 * h + 1] * of_key[1]);
      }
    }
  }
  CLA_DEVICE void key_pair(float (&x)[2], int which, int row, int j) const {
    unpack_pair<DTYPE>(x, *(const uint32_t *)tile(which).element(row, channel() + 8 * j + pair));
  }
  // Of a row, from the four lanes that have it.
  CLA_DEVICE void give_sums(const float (&sum)[2], int to) const {
    CLA_UNROLL
    for (int h = 0; h < 2; h++) {
      float x = sum[h];
      x += shuffle_xor(x, 1);
      x += shuffle_xor(x, 2);
      if (pair == 0) numbers(to)[part * CHUNK + rows + row0 + 8 * h] = x;
    }
  }

  // What steps read of what they write: acc += own times the other key.
  CLA_DEVICE void add_own(float (&acc)[TILES][4], const float *own, int other) const {
    CLA_UNROLL
    for (int h = 0; h < 2; h++) {
      const int row = rows + row0 + 8 * h;
      const float x = own[row];
      CLA_UNROLL
      for (int j = 0; j < TILES; j++) {
        float key[2];
        key_pair(key, other, row, j);
        acc[j][2 * h] += x * key[0];
        acc[j][2 * h + 1] += x * key[1];
      }
    }
  }
  CLA_DEVICE void store(const cla_tensor &tensor, const float (&acc)[TILES][4], const SegmentSteps &steps) const {
    if (!tensor.data) return;
    const Rows to = rows_of(tensor);
    // A result is contiguous: pairs lie well where all channels of a key are an even number, which these may be a part of.
    if (to.dtype == CLA_F32) {
      each_pair(to, acc, steps, [](unsigned char *at, float x, float y) { *(Vec2 *)at = {float_to_bits(x), float_to_bits(y)}; },
                [](unsigned char *at, float x) { *(float *)at = x; });
    } else {
      each_pair(to, acc, steps, [](unsigned char *at, float x, float y) { *(uint32_t *)at = pack_pair<DTYPE>(x, y); },
                [](unsigned char *at, float x) { *(uint16_t *)at = (uint16_t)pack_pair<DTYPE>(x, 0.f); });
    }
  }
  // pair(address, two neighbours), or one(address, number) for either, of all that is accumulated.
  template <class Pair, class One>
  CLA_DEVICE void each_pair(const Rows &to, const float (&acc)[TILES][4], const SegmentSteps &steps, Pair of_two, One of_one) const {
    const bool pairs = c.state_rows % 2 == 0;
    const int left = c.of.k_dim - channel() - pair;
    CLA_UNROLL
    for (int h = 0; h < 2; h++) {
      const int row = rows + row0 + 8 * h;
      if (row >= steps.count) continue;
      unsigned char *at = to.row(steps.token(row)) + (channel() + pair) * to.size();
      CLA_UNROLL
      for (int j = 0; j < TILES; j++) {
        const float x = acc[j][2 * h], y = acc[j][2 * h + 1];
        unsigned char *p = at + 8 * j * to.size();
        if (pairs) {
          if (8 * j < left) of_two(p, x, y);
        } else {
          if (8 * j < left) of_one(p, x);
          if (8 * j + 1 < left) of_one(p + to.size(), y);
        }
      }
    }
  }

  // ---- the gradients of a step's numbers ----

  // By the first warp: sums of SUMS from each step to the end of the segment, with what stands behind it. A lane has two steps,
  // the first lane the last two. What a step makes of the sum behind it is 0 if it forgot, else one more term.
  CLA_DEVICE void store_gate() const {
    double term[2], behind = lane < THREADS / 32 ? (double)(numbers(WHOLE)[0] * numbers(BEHIND)[lane]) : 0.;
    bool forgot[2];
    CLA_UNROLL
    for (int i = 0; i < 2; i++) {
      const int t = step_of_lane(i);
      term[i] = sum_of_parts(SUMS, t);
      forgot[i] = exp_fast(numbers(GATE)[t]) == 0.f;
      if (t + 1 < at.count) behind += sum_of_parts(FIRST, t);
    }
    behind = sum_of_lanes(behind);
    auto then = [](double sum, bool forgot, double term) { return forgot ? 0. : sum + term; };
    double sum = then(then(0., forgot[0], term[0]), forgot[1], term[1]);
    int cut = forgot[0] || forgot[1];
    CLA_UNROLL
    for (int d = 1; d < 32; d *= 2) {
      const double later = shuffle_up(sum, d);
      const int later_cut = shuffle_up(cut, d);
      if (lane >= d && !cut) sum += later, cut = later_cut;
    }
    const double all = cut ? sum : sum + behind, later = shuffle_up(all, 1);
    sum = lane == 0 ? behind : later;
    const Rows dg = rows_of(c.dg);
    CLA_UNROLL
    for (int i = 0; i < 2; i++) {
      const int t = step_of_lane(i);
      sum = then(sum, forgot[i], term[i]);
      if (t >= at.count) continue;
      for (int slice = 0; slice < (c.of.k_dim + CLA_DELTA_COLUMNS - 1) / CLA_DELTA_COLUMNS; slice++) {
        dg.store(at.token(t), slice, slice == 0 ? (float)sum : 0.f);
      }
    }
  }
  CLA_DEVICE double sum_of_parts(int which, int t) const {
    double sum = 0.;
    CLA_UNROLL
    for (int i = 0; i < PARTS; i++) sum += (double)numbers(which)[i * CHUNK + t];
    return sum;
  }
  CLA_DEVICE int step_of_lane(int i) const { return CHUNK - 1 - 2 * lane - i; }

  // By the second half of the threads.
  CLA_DEVICE void store_beta() const {
    const int row = tid - THREADS / 2;
    if (c.dbeta.data && row >= 0 && row < at.count) rows_of(c.dbeta).store(at.token(row), 0, numbers(DBETA)[row]);
  }

  // States are on their way while what needs them least is computed: the first for scores, the gradient behind for reads.
  CLA_DEVICE void run() const {
    float state[OF_STATE][8];
    fetch();
    fetch_key(Q, c.of.q);
    {
      float m[OF_STEPS][8], u[OF_STEPS][8];
      load_steps(m, c.written, at);
      load_steps(u, c.of_written, at);
      load_state(state, c.starts, 0);
      keep_steps(M, m);
      keep_steps(U, u);
    }
    fade();
    copies_wait<0>();
    barrier();
    find_scores([&](int t, int s) { return exp2_fast(fades().between(t, s)); });
    keep_state<false>(state, 0, [](int, float) {});
    barrier();
    load_state(state, c.ends, 0);
    float of_q[TILES][4], of_k[TILES][4], sum[2] = {0.f, 0.f}, first[2] = {0.f, 0.f};
    read(of_q, of_k);
    add_products(sum, of_q, Q, 1.f);
    add_products(sum, of_k, K, 1.f);
    add_own(of_q, numbers(OWN), K);
    store(c.dq, of_q, at);
    barrier();
    float behind = 0.f;
    keep_state<true>(state, 0, [&](int, float x) { behind += x; });
    behind = sum_of_lanes(behind);
    if (lane == 0) numbers(BEHIND)[tid >> 5] = behind;
    barrier();
    write(of_q, first);
    float of_writes[2] = {0.f, 0.f};
    add_products(of_writes, of_q, K, -1.f);
    CLA_UNROLL
    for (int h = 0; h < 2; h++) {
      // What the last token wrote is not in what the sums begin with.
      if (rows + row0 + 8 * h + 1 < at.count) sum[h] += of_writes[h];
    }
    give_sums(sum, SUMS);
    give_sums(first, FIRST);
    add(of_q, of_k);
    add_own(of_q, numbers(OWN), Q);
    store(c.dk, of_q, at);
    barrier();
    if (c.dg.data && tid < 32) store_gate();
    store_beta();
  }
};

}  // namespace cla
