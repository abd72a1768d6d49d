// The chunked delta sweep: a block goes over the segments of one sequence and head with 16 or 32 columns of the state, in f32
// registers from the first segment to the last. See delta_chunk.cuh for the equations.
//
// Everything is transposed: columns of the state are the rows of all products, so that what four warps accumulate is, packed
// as the sum of two bf16, the A operand of the next product, and goes from warp to warp through shared memory as it lies in
// registers. What follows from segment to segment is three products that wait for one another:
//
//     solving warps     X^T K^T          -> barrier -> m^T = (...) T^T -> barrier -> X^T = ... + c^T K -> barrier
//     reading warps     X^T Q^T, P dO    -> barrier -> copies          -> barrier -> O^T = ... + c^T P^T
//
// so four warps do these and four others all that does not have to wait, at the same time.
#include "delta_chunk.cuh"

namespace cla {

template <int R, int M> struct DeltaChunkLayout {
  static constexpr int COLUMNS = 16 * M, VALUE_PITCH = COLUMNS + 8;  // in elements: rows begin at different banks
  // A stage has what is read of one segment.
  static constexpr int KEY = R * 128, K = 0, Q = KEY, PREPARED = 2 * KEY, VALUE = PREPARED + Prepared::BYTES;
  static constexpr int STAGE = (VALUE + 2 * CHUNK * VALUE_PITCH + 1023) / 1024 * 1024;
  // A operands, [steps of 16, M, 2 parts], 512 bytes each: of the state, of the system's right side, of c, of what is
  // written (c, and dO in reverse, faded to the end of the segment).
  static constexpr int OPERAND = 512, OF_STATE = 2 * STAGE, OF_RIGHT = OF_STATE + R / 16 * M * 2 * OPERAND;
  static constexpr int OF_C = OF_RIGHT + 4 * M * 2 * OPERAND, OF_WRITE = OF_C + 4 * M * 2 * OPERAND;
  static constexpr int OF_GRAD = OF_WRITE + 4 * M * 2 * OPERAND;
  // P dO, as it is accumulated: in reverse, where no one asks for c alone.
  static constexpr int SEEN = OF_C, SHARED = OF_GRAD + 4 * M * 2 * OPERAND;
};

template <int R, int M, bool REVERSE> struct DeltaChunked {
  using L = DeltaChunkLayout<R, M>;
  static constexpr int THREADS = 256, COLUMNS = L::COLUMNS, OWN = R / 4, N = OWN / 8;  // of the state, channels of a warp

  const cla_delta_sweep &s;
  unsigned char *shared;
  int tid, lane, warp, row0, pair, head, first_column;
  bool solves;
  int64_t sequence, segments;
  Rows q, k, value, inner, out;
  float state[M][N][4];

  CLA_DEVICE DeltaChunked(const cla_delta_sweep &s, int tiles, const Place &place)
      : s(s), shared(shared_memory()), head(place.head), first_column(block_x() % tiles * COLUMNS), sequence(place.sequence),
        q(s.of.q, batch(s, sequence), head), k(s.of.k, batch(s, sequence), head), value(s.value, batch(s, sequence), head),
        inner(s.inner, batch(s, sequence), head), out(s.out, batch(s, sequence), head) {
    tid = thread_index();
    lane = tid & 31;
    warp = (tid >> 5) & 3;
    solves = tid < 128;
    row0 = lane >> 2;
    pair = (lane & 3) * 2;
    segments = (Steps(s.of.cu_seqlens, s.of.tokens, sequence, REVERSE).count + CHUNK - 1) / CHUNK;
    if (value.data) value.data += first_column * value.element * value.size();
  }

  CLA_DEVICE static int64_t batch(const cla_delta_sweep &s, int64_t sequence) { return s.of.cu_seqlens ? 0 : sequence; }
  CLA_DEVICE int columns() const { return s.of.v_dim - first_column < COLUMNS ? s.of.v_dim - first_column : COLUMNS; }
  CLA_DEVICE int64_t segment(int64_t i) const { return REVERSE ? segments - 1 - i : i; }
  CLA_DEVICE unsigned char *stage(int64_t i) const { return shared + (i & 1) * L::STAGE; }
  CLA_DEVICE static Tile tile(unsigned char *stage, int at) { return {stage + at}; }
  CLA_DEVICE static uint16_t *value_row(unsigned char *stage, int row) {
    return (uint16_t *)(stage + L::VALUE) + row * L::VALUE_PITCH;
  }
  CLA_DEVICE static const float *factors(unsigned char *stage, int which) {
    return (const float *)(stage + L::PREPARED + Prepared::FACTORS) + which;
  }

  // ---- operands on their way from warp to warp ----

  CLA_DEVICE unsigned char *operand(int of, int step, int m, int part) const {
    return shared + of + ((step * M + m) * 2 + part) * L::OPERAND + lane * 16;
  }
  // Numbers accumulated for 16 columns of an operand.
  CLA_DEVICE void give(int of, int step, int m, const float (&acc)[2][4]) const {
    uint32_t high[4], rest[4];
    to_a<16>(high, acc, 0);
    to_a_rest<16>(rest, high, acc, 0);
    store16(operand(of, step, m, 0), {high[0], high[1], high[2], high[3]});
    store16(operand(of, step, m, 1), {rest[0], rest[1], rest[2], rest[3]});
  }
  CLA_DEVICE void take(uint32_t (&a)[4], int of, int step, int m, int part) const {
    const Vec4 x = load16(operand(of, step, m, part));
    a[0] = x.x, a[1] = x.y, a[2] = x.z, a[3] = x.w;
  }
  // acc += A b^T for rows 16 warp and on of tiles, b in one part or two, over `steps` steps.
  CLA_DEVICE void add_by_rows(float (&acc)[M][2][4], int of, int steps, Tile b, bool two) const {
    CLA_UNROLL_TWICE
    for (int step = 0; step < steps; step++) {
      uint32_t x[4], y[4], y_rest[4];
      load_b(y, b, 16 * warp, 16 * step);
      if (two) load_b(y_rest, {b.base + SUBTILE}, 16 * warp, 16 * step);
      CLA_UNROLL
      for (int m = 0; m < M; m++) {
        take(x, of, step, m, 0);
        mma16(acc[m][0], acc[m][1], x, y);
        if (two) mma16(acc[m][0], acc[m][1], x, y_rest);
        take(x, of, step, m, 1);
        mma16(acc[m][0], acc[m][1], x, y);
      }
    }
  }
  CLA_DEVICE static void zero(float (&acc)[M][2][4]) {
    CLA_UNROLL
    for (int m = 0; m < M; m++) {
      CLA_UNROLL
      for (int e = 0; e < 8; e++) acc[m][e / 4][e % 4] = 0.f;
    }
  }
  // f(number, step of the segment, column of the block) for what a warp accumulates for its 16 steps.
  template <class F> CLA_DEVICE void each(float (&acc)[M][2][4], F f) const {
    CLA_UNROLL
    for (int m = 0; m < M; m++) {
      CLA_UNROLL
      for (int e = 0; e < 8; e++) {
        f(acc[m][e / 4][e % 4], 16 * warp + 8 * (e / 4) + pair + (e & 1), 16 * m + row0 + 8 * (e / 2 % 2));
      }
    }
  }

  // ---- the state ----

  template <class F> CLA_DEVICE void each_of_state(F f) {
    CLA_UNROLL
    for (int m = 0; m < M; m++) {
      CLA_UNROLL
      for (int n = 0; n < N; n++) {
        CLA_UNROLL
        for (int e = 0; e < 4; e++) {
          const int r = OWN * warp + 8 * n + pair + (e & 1), c = 16 * m + row0 + 8 * (e >> 1);
          if (r < s.of.k_dim && c < columns()) f(state[m][n][e], r, c);
        }
      }
    }
  }
  CLA_DEVICE void load_state() {
    CLA_UNROLL
    for (int m = 0; m < M; m++) {
      CLA_UNROLL
      for (int n = 0; n < N; n++) {
        CLA_UNROLL
        for (int e = 0; e < 4; e++) state[m][n][e] = 0.f;
      }
    }
    if (!s.first.data) return;
    const float *from = s.first.data + sequence * s.first.sequence + head * s.first.head + first_column * s.first.col;
    each_of_state([&](float &x, int r, int c) { x = from[r * s.first.row + c * s.first.col]; });
  }
  CLA_DEVICE void store_state(float *to, int64_t row, int64_t column) {
    each_of_state([&](float &x, int r, int c) { to[r * row + c * column] = x; });
  }
  CLA_DEVICE void give_state() const {
    CLA_UNROLL
    for (int m = 0; m < M; m++) {
      CLA_UNROLL
      for (int n = 0; n < N; n += 2) {
        float two[2][4];
        CLA_UNROLL
        for (int e = 0; e < 8; e++) two[e / 4][e % 4] = state[m][n + e / 4][e % 4];
        give(L::OF_STATE, (OWN * warp + 8 * n) / 16, m, two);
      }
    }
  }
  // state += A b for the operand A over the segment's steps and the warp's channels of b.
  CLA_DEVICE void add_to_state(int of, Tile b) {
    CLA_UNROLL_TWICE
    for (int step = 0; step < 4; step++) {
      uint32_t x[M][2][4], y[4];
      CLA_UNROLL
      for (int m = 0; m < M; m++) {
        take(x[m][0], of, step, m, 0);
        take(x[m][1], of, step, m, 1);
      }
      CLA_UNROLL
      for (int n = 0; n < N; n += 2) {
        load_b_transposed(y, b, 16 * step, OWN * warp + 8 * n);
        CLA_UNROLL
        for (int m = 0; m < M; m++) {
          mma16(state[m][n], state[m][n + 1], x[m][0], y);
          mma16(state[m][n], state[m][n + 1], x[m][1], y);
        }
      }
    }
  }

  // ---- loading, by the reading warps ----

  CLA_DEVICE void fetch(int64_t i) const {
    if (i < segments) {
      const int tid = this->tid - 128;
      const SegmentSteps at(s.of, sequence, segment(i), REVERSE);
      unsigned char *to = stage(i);
      fetch_tile<R, 128>(tile(to, L::K), k, at, s.of.k_dim, tid);
      if (REVERSE || out.data) fetch_tile<R, 128>(tile(to, L::Q), q, at, s.of.k_dim, tid);
      fetch_rows<COLUMNS, 128, 2 * L::VALUE_PITCH>([=](int row, int c) { return (unsigned char *)(value_row(to, row) + c); },
                                                   value, at, columns(), tid);
      const unsigned char *from =
          s.prepared + (segment_index(s.anchors, sequence, segment(i)) * s.of.heads + head) * Prepared::BYTES;
      CLA_UNROLL
      for (int at = 0; at < Prepared::BYTES; at += 16 * 128) {
        if (at + 16 * tid < Prepared::BYTES) copy16_async(to + L::PREPARED + at + 16 * tid, from + at + 16 * tid, true);
      }
    }
    copies_commit();
  }

  // ---- one segment ----

  // To the step that the state is read at.
  CLA_DEVICE void fade(float (&acc)[M][2][4], unsigned char *of) const {
    if (REVERSE && !solves) return;
    const float *left = factors(of, Prepared::FROM_START);
    each(acc, [&](float &x, int t, int) { x *= left[t]; });
  }

  // The right side of the system, from what the state has for its steps.
  CLA_DEVICE void give_right(float (&acc)[M][2][4], unsigned char *of) const {
    if (!REVERSE) each(acc, [&](float &x, int t, int c) { x = from_bf16(value_row(of, t)[c]) - x; });
    CLA_UNROLL
    for (int m = 0; m < M; m++) {
      CLA_UNROLL
      for (int n = 0; n < 2; n++) {
        if (!REVERSE) continue;
        float seen[4];
        load4(seen, (const float *)operand(L::SEEN, warp, m, n));
        CLA_UNROLL
        for (int e = 0; e < 4; e++) acc[m][n][e] += s.of.scale * seen[e];
      }
      give(L::OF_RIGHT, warp, m, acc[m]);
    }
  }

  // Solves it, for the warp's steps; what is written goes to the other warps.
  CLA_DEVICE void solve(unsigned char *of, const SegmentSteps &at) {
    float acc[M][2][4];
    zero(acc);
    add_by_rows(acc, L::OF_RIGHT, warp + 1, tile(of, L::PREPARED + Prepared::T), true);
    const float *beta = factors(of, Prepared::BETA), *left = factors(of, Prepared::TO_END);
    if (inner.data) store(inner, at, acc, 1.f);
    each(acc, [&](float &x, int t, int) { x *= REVERSE ? -beta[t] : beta[t]; });
    CLA_UNROLL
    for (int m = 0; m < M; m++) {
      if (!REVERSE) give(L::OF_C, warp, m, acc[m]);
    }
    if (REVERSE && out.data) store(out, at, acc, -1.f);
    each(acc, [&](float &x, int t, int) { x *= left[t]; });
    CLA_UNROLL
    for (int m = 0; m < M; m++) give(L::OF_WRITE, warp, m, acc[m]);
  }

  // A result, whose rows are contiguous.
  CLA_DEVICE void store(const Rows &to, const SegmentSteps &at, const float (&acc)[M][2][4], float factor) const {
    CLA_UNROLL
    for (int i = 0; i < 4; i++) {
      const int t = 16 * warp + 8 * (i >> 1) + pair + (i & 1);
      if (t >= at.count) continue;
      unsigned char *row = to.row(at.token(t));
      CLA_UNROLL
      for (int j = 0; j < 2 * M; j++) {
        const int c = 8 * j + row0;
        if (c < columns()) {
          store_element(row, to.dtype, first_column + c, factor * acc[j >> 1][i >> 1][2 * (j & 1) + (i & 1)]);
        }
      }
    }
  }

  CLA_DEVICE void update_state(unsigned char *of) {
    const float whole = *factors(of, Prepared::WHOLE);
    CLA_UNROLL
    for (int m = 0; m < M; m++) {
      CLA_UNROLL
      for (int n = 0; n < N; n++) {
        CLA_UNROLL
        for (int e = 0; e < 4; e++) state[m][n][e] *= whole;
      }
    }
    add_to_state(L::OF_WRITE, tile(of, L::K));
    if (REVERSE) add_to_state(L::OF_GRAD, tile(of, L::Q));
    give_state();
  }

  // In reverse: P dO for the system, with dO as A operands.
  CLA_DEVICE void see_grad(float (&acc)[M][2][4], unsigned char *of) const {
    const Tile p = tile(of, L::PREPARED + Prepared::P);
    for (int step = 0; step <= warp; step++) {
      uint32_t x[4], y[4], y_rest[4];
      load_b(y, p, 16 * warp, 16 * step);
      load_b(y_rest, {p.base + SUBTILE}, 16 * warp, 16 * step);
      CLA_UNROLL
      for (int m = 0; m < M; m++) {
        const int row = 16 * step + ((lane >> 4) << 3) + (lane & 7);
        load_matrices_transposed(x, value_row(of, row) + 16 * m + ((lane >> 3) & 1) * 8);
        mma16(acc[m][0], acc[m][1], x, y);
        mma16(acc[m][0], acc[m][1], x, y_rest);
      }
    }
    CLA_UNROLL
    for (int m = 0; m < M; m++) {
      CLA_UNROLL
      for (int n = 0; n < 2; n++) store4((float *)operand(L::SEEN, warp, m, n), acc[m][n]);
    }
  }
  // And dO, faded to the end of the segment.
  CLA_DEVICE void give_grad(unsigned char *of) const {
    const float *left = factors(of, Prepared::TO_END);
    float x[M][2][4];
    each(x, [&](float &y, int t, int c) { y = s.of.scale * left[t] * from_bf16(value_row(of, t)[c]); });
    CLA_UNROLL
    for (int m = 0; m < M; m++) give(L::OF_GRAD, warp, m, x[m]);
  }

  // ---- the sweep ----

  CLA_DEVICE void keep(int64_t i) {
    if (!s.anchors.data) return;
    float *to = anchor_of(s.anchors, sequence, segment(i), head, s.of.heads, (int64_t)s.of.k_dim * s.of.v_dim);
    store_state(to + first_column, s.of.v_dim, 1);
  }

  CLA_DEVICE void run() {
    if (solves) {
      load_state();
      give_state();
    } else {
      fetch(0);
    }
    CLA_NO_UNROLL
    for (int64_t i = 0; i < segments; i++) {
      unsigned char *of = stage(i);
      const SegmentSteps at(s.of, sequence, segment(i), REVERSE);
      float acc[M][2][4];
      zero(acc);
      if (!solves) copies_wait<0>();
      barrier();
      if (solves) {
        keep(i);
        add_by_rows(acc, L::OF_STATE, R / 16, tile(of, L::K), false);
      } else if (REVERSE) {
        see_grad(acc, of);
      } else if (out.data) {
        add_by_rows(acc, L::OF_STATE, R / 16, tile(of, L::Q), false);
      }
      fade(acc, of);
      if (REVERSE) barrier();
      if (solves) give_right(acc, of);
      else if (REVERSE) give_grad(of);
      barrier();
      // The reading warps have nothing else to do meanwhile.
      if (solves) solve(of, at);
      else fetch(i + 1);
      barrier();
      if (solves) {
        update_state(of);
      } else if (!REVERSE && out.data) {
        add_by_rows(acc, L::OF_C, warp + 1, tile(of, L::PREPARED + Prepared::P), true);
        store(out, at, acc, s.of.scale);
      }
    }
    if (!solves || !s.last.data) return;
    store_state(s.last.data + sequence * s.last.sequence + head * s.last.head + first_column * s.last.col, s.last.row,
                s.last.col);
  }
};

template <int R, int M, bool REVERSE> CLA_KERNEL(256, 1) void delta_chunked_kernel(cla_delta_sweep s) {
  const int tiles = (s.of.v_dim + 16 * M - 1) / (16 * M);
  DeltaChunked<R, M, REVERSE>(s, tiles, Place(block_x() / tiles, s.of.heads, 1)).run();
}

template <int R, int M, bool REVERSE> int32_t launch_delta_chunked(const cla_delta_sweep &s, void *stream) {
  const int64_t tiles = (s.of.v_dim + 16 * M - 1) / (16 * M);
  const Dims grid = {(int64_t)s.of.sequences * s.of.heads * tiles, 1};
  return launch(delta_chunked_kernel<R, M, REVERSE>, grid, 256, DeltaChunkLayout<R, M>::SHARED, stream, s);
}

template <int R, int M> int32_t either_way(const cla_delta_sweep &s, void *stream) {
  return s.reverse ? launch_delta_chunked<R, M, true>(s, stream) : launch_delta_chunked<R, M, false>(s, stream);
}

}  // namespace cla

extern "C" int32_t cla_delta_chunked(const cla_delta_sweep *sweep, void *stream) {
  using namespace cla;
  const cla_delta_sweep &s = *sweep;
  if (s.of.k_dim <= 64) return s.columns <= 16 ? either_way<64, 1>(s, stream) : either_way<64, 2>(s, stream);
  return s.columns <= 16 ? either_way<128, 1>(s, stream) : either_way<128, 2>(s, stream);
}

extern "C" int64_t cla_delta_shared_memory(const cla_delta_sweep *sweep) {
  using namespace cla;
  const cla_delta_sweep &s = *sweep;
  auto bf16 = [](const cla_tensor &x) { return !x.data || x.dtype == CLA_BF16; };
  if (s.of.low_rank || s.of.gate_kind > CLA_GATE_SCALAR || s.of.k_dim > 128) return -1;
  if (!bf16(s.of.q) || !bf16(s.of.k) || !bf16(s.value)) return -1;
  if (s.of.k_dim <= 64) return s.columns <= 16 ? DeltaChunkLayout<64, 1>::SHARED : DeltaChunkLayout<64, 2>::SHARED;
  return s.columns <= 16 ? DeltaChunkLayout<128, 1>::SHARED : DeltaChunkLayout<128, 2>::SHARED;
}
