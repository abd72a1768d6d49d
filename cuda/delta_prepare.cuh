// What a chunked delta sweep needs of each segment that does not depend on the state: see delta_chunk.cuh.
//
// With A = L diag(beta), in blocks of 16 tokens, T has below its diagonal
//
//     T_ij = -T_ii sum_k A_ik T_kj    over j <= k < i        T_ii = (1 + A_ii)^-1
//
// A warp has the rows of a block of A and P, inverts its block on the diagonal by substitution in f32, and then has the
// columns of a block of T, which no other warp needs. Those wait for one another, so they stay in registers, transposed: what
// `mma` gives is what it takes as the left operand of the next product. Products are of numbers in three parts of bf16,
// together the 24 bits of an f32: the system amplifies what would be rounded off.
#pragma once
#include "delta_chunk.cuh"

namespace cla {

// Eight numbers of a lane in three parts, in the order of an A operand.
struct Parts {
  uint32_t x[3][4];

  CLA_DEVICE void split(const float (&from)[8]) {
    CLA_UNROLL
    for (int i = 0; i < 4; i++) {
      float low = from[2 * i], high = from[2 * i + 1];
      CLA_UNROLL
      for (int part = 0; part < 3; part++) {
        x[part][i] = pack_bf16(low, high);
        low -= low_bf16(x[part][i]);
        high -= high_bf16(x[part][i]);
      }
    }
  }
  // As a B operand.
  CLA_DEVICE Parts transposed() const {
    Parts of;
    CLA_UNROLL
    for (int part = 0; part < 3; part++) {
      of.x[part][0] = x[part][0], of.x[part][1] = x[part][2], of.x[part][2] = x[part][1], of.x[part][3] = x[part][3];
    }
    return of;
  }
  CLA_DEVICE void store(unsigned char *to) const {
    CLA_UNROLL
    for (int part = 0; part < 3; part++) store16(to + 512 * part, {x[part][0], x[part][1], x[part][2], x[part][3]});
  }
  CLA_DEVICE void load(const unsigned char *from) {
    CLA_UNROLL
    for (int part = 0; part < 3; part++) {
      const Vec4 v = load16(from + 512 * part);
      x[part][0] = v.x, x[part][1] = v.y, x[part][2] = v.z, x[part][3] = v.w;
    }
  }
};

// c += a b of 16 x 16; what is left out is 2^-26 of it. Two sums, so that fewer products wait for one another.
CLA_DEVICE void add_product(float (&c)[8], const Parts &a, const Parts &b) {
  float large[2][4] = {{c[0], c[1], c[2], c[3]}, {c[4], c[5], c[6], c[7]}}, small[2][4] = {};
  CLA_UNROLL
  for (int i = 0; i < 3; i++) {
    mma16(small[0], small[1], a.x[i], b.x[2 - i]);
    if (i < 2) mma16(large[0], large[1], a.x[i], b.x[1 - i]);
    else mma16(large[0], large[1], a.x[0], b.x[0]);
  }
  CLA_UNROLL
  for (int e = 0; e < 8; e++) c[e] = large[e / 4][e % 4] + small[e / 4][e % 4];
}

// c += a b^T for inputs, b as an A operand.
template <int DTYPE> CLA_DEVICE void mma_transposed(float (&c)[2][4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  if constexpr (DTYPE == CLA_F16) {
    mma_f16(c[0], a, b[0], b[2]);
    mma_f16(c[1], a, b[1], b[3]);
  } else {
    mma(c[0], a, b[0], b[2]);
    mma(c[1], a, b[1], b[3]);
  }
}

// In f16 k and q are prepared for the sweep as well.
template <int R, int DTYPE = CLA_BF16> struct DeltaPrepare {
  static constexpr int THREADS = 128, SIDE = 16, PITCH = 20;
  // Tiles of k and q make room for blocks of A and of the diagonal of T, and for P; the blocks for T.
  static constexpr int KEY = R * 128, TILES = 2 * KEY > 4 * SUBTILE ? 2 * KEY : 4 * SUBTILE, BLOCK = 3 * 512;
  static_assert(10 * BLOCK <= 2 * SUBTILE && 4 * SIDE * PITCH <= BLOCK, "they fit");
  static constexpr int SUMS = TILES, FACTORS = SUMS + GateSums::BYTES, FACTORS_BYTES = 4 * (3 * CHUNK + 4);
  static constexpr int SHARED = FACTORS + FACTORS_BYTES;
  static constexpr int BYTES = Prepared::BYTES + (DTYPE == CLA_F16 ? PreparedPlainKeys<R>::BYTES : 0);

  const cla_delta_sweep &s;
  unsigned char *shared;
  int tid, lane, warp, row0, pair, head;
  SegmentSteps at;
  unsigned char *to;

  CLA_DEVICE DeltaPrepare(const cla_delta_sweep &s, const SegmentOf &of, int64_t index, int head)
      : s(s), shared(shared_memory()), head(head), at(s.of, of.sequence, of.segment, s.reverse) {
    tid = thread_index();
    lane = tid & 31;
    warp = shuffle(tid >> 5, 0);
    row0 = lane >> 2;
    pair = (lane & 3) * 2;
    to = s.prepared + (index * s.of.heads + head) * BYTES;
  }

  // Of k (0) or q (1).
  CLA_DEVICE Tile tile(int which) const { return {shared + which * KEY}; }
  CLA_DEVICE Tile prepared(int which) const { return {shared + which * SUBTILE}; }
  // Of T on the diagonal, or of -A as far below it as `below` says, in block column j: this lane's part.
  CLA_DEVICE unsigned char *block(int below, int j) const {
    return shared + (below * (9 - below) / 2 + j) * BLOCK + 16 * lane;
  }
  // On the diagonal, in f32, before it is in parts.
  CLA_DEVICE float *own() const { return (float *)(shared + warp * BLOCK); }
  CLA_DEVICE GateSums sums() const { return {(float *)(shared + SUMS)}; }
  CLA_DEVICE float *factors() const { return (float *)(shared + FACTORS); }
  // The place in a block of the e-th of a lane's numbers.
  CLA_DEVICE int row(int e) const { return row0 + 8 * (e / 2 % 2); }
  CLA_DEVICE int column(int e) const { return 8 * (e / 4) + pair + e % 2; }

  CLA_DEVICE void load_keys() const {
    constexpr int AT_ONCE = R < 128 ? R : 128;
    const Rows q(s.of.q, at.steps.batch, head), k(s.of.k, at.steps.batch, head);
    CLA_UNROLL
    for (int c = 0; c < R; c += AT_ONCE) {
      TileRows<AT_ONCE, THREADS>::fetch(tile(0).from_column(c), k.from_column(c), at, s.of.k_dim - c, tid);
      TileRows<AT_ONCE, THREADS>::fetch(tile(1).from_column(c), q.from_column(c), at, s.of.k_dim - c, tid);
    }
    copies_commit();
  }
  CLA_DEVICE void load() {
    load_keys();
    const Rows gate(s.of.gate, at.steps.batch, head);
    const bool gated = s.of.gate_kind != CLA_NO_GATE;
    const int token = tid % CHUNK;
    float last = 1.f;
    if (tid < CHUNK) {
      // The decay between two tokens is that of the later one. In reverse the last one's is due at the end.
      const int row = s.reverse ? tid - 1 : tid;
      sums().sum(tid, gated && row >= 0 && tid < at.count ? gate.load(at.token(row), 0) : 0.f);
    } else {
      const Rows beta(s.of.beta, at.steps.batch, head);
      factors()[Prepared::BETA + token] = token < at.count ? beta.load(at.token(token), 0) : 0.f;
      if (gated && s.reverse) last = exp_fast(gate.load(at.token(at.count - 1), 0));
    }
    copies_wait<0>();
    barrier();
    if (tid < CHUNK) {
      factors()[Prepared::FROM_START + token] = exp2_fast(sums().from_start(token));
    } else {
      factors()[Prepared::TO_END + token] = last * exp2_fast(sums().to_end(token));
      if (token == 0) factors()[Prepared::WHOLE] = last * exp2_fast(sums().all());
    }
  }

  // In two parts, each as it lies here.
  CLA_DEVICE void write_keys() const {
    CLA_UNROLL
    for (int which = 0; which < 2; which++) {
      const unsigned char *from = tile(which).base + 16 * tid;
      unsigned char *high = to + Prepared::BYTES + (which == 0 ? PreparedPlainKeys<R>::K : PreparedPlainKeys<R>::Q) + 16 * tid;
      CLA_UNROLL
      for (int i = 0; i < KEY; i += 16 * THREADS) {
        const Vec4 x = load16(from + i);
        Vec4 h, rest;
        split_half(h.x, rest.x, x.x), split_half(h.y, rest.y, x.y), split_half(h.z, rest.z, x.z), split_half(h.w, rest.w, x.w);
        store16(high + i, h);
        store16(high + KEY + i, rest);
      }
    }
  }

  // What is left in block i of what block j writes.
  template <bool TRANSPOSED, bool DIAGONAL> CLA_DEVICE void fades(float (&left)[8], int i, int j) const {
    const int apart = row0 ^ pair, near = apart < 2 ? 0 : apart < 4 ? 1 : 2, blocks = (i ^ j) < 2 ? 4 : 5;
    CLA_UNROLL
    for (int e = 0; e < 8; e++) {
      const int earlier = TRANSPOSED ? row(e) : column(e), later = TRANSPOSED ? column(e) : row(e);
      const int level = !DIAGONAL ? blocks : e / 4 == e / 2 % 2 ? near : 3;
      const float sum = sums().between(SIDE * i + later, SIDE * j + earlier, level);
      left[e] = DIAGONAL && earlier == later ? 1.f : exp2_fast(sum);
    }
  }

  // l[n] = block warp - n of this warp's of K K^T, p[n] = block i - n of block row i of the scores, transposed, where i is two
  // on from the warp. Where there is none, another is computed: that is less than to ask.
  template <bool REVERSE> CLA_DEVICE void multiply(float (&l)[4][2][4], float (&p)[4][2][4]) {
    CLA_UNROLL
    for (int n = 0; n < 4; n++) {
      CLA_UNROLL
      for (int e = 0; e < 8; e++) l[n][e / 4][e % 4] = p[n][e / 4][e % 4] = 0.f;
    }
    // Where operands begin; 16 channels on, a piece's place differs in two bits.
    const int first = (int)(tile(0).piece(lane & 15, lane >> 4) - shared);
    CLA_UNROLL_TWICE
    for (int d = 0; d < R / 16; d++) {
      const unsigned char *from = shared + (first ^ (d % 4 * 32)) + d / 4 * SUBTILE;
      auto load = [&](uint32_t (&x)[4], int which, int n) {
        load_matrices(x, from + which * KEY + ((warp - n) & 3) * SIDE * 128);
      };
      uint32_t k[4][4], q[4];
      CLA_UNROLL
      for (int n = 0; n < 4; n++) load(k[n], 0, n);
      if (!REVERSE) load(q, 1, 2);
      CLA_UNROLL
      for (int n = 0; n < 4; n++) {
        mma_transposed<DTYPE>(l[n], k[0], k[n]);
        if (REVERSE) load(q, 1, n + 2);
        mma_transposed<DTYPE>(p[n], REVERSE ? q : k[(n + 2) & 3], REVERSE ? k[2] : q);
      }
    }
    barrier();  // the tiles have been read
  }

  // Block i - N of block row i of P, from its transpose.
  template <int N> CLA_DEVICE void store_scores(const float (&c)[4][2][4], int i) {
    if (N > i) return;
    float x[8];
    fades<true, N == 0>(x, i, i - N);
    CLA_UNROLL
    for (int e = 0; e < 8; e++) x[e] = N > 0 || row(e) <= column(e) ? x[e] * c[N][e / 4][e % 4] : 0.f;
    uint32_t high[4], low[4];
    split(high, low, x);
    store_transposed(prepared(2), SIDE * i, SIDE * (i - N), high);
    store_transposed(prepared(3), SIDE * i, SIDE * (i - N), low);
  }

  // Block warp - N of this warp's of -A.
  template <int N> CLA_DEVICE void fade(float (&x)[8], const float (&c)[4][2][4]) {
    const float *beta = factors() + Prepared::BETA + SIDE * (warp - N);
    fades<false, N == 0>(x, warp, warp - N);
    CLA_UNROLL
    for (int e = 0; e < 8; e++) x[e] *= -beta[column(e)] * c[N][e / 4][e % 4];
  }
  template <int N> CLA_DEVICE void store_block(const float (&c)[4][2][4]) {
    if (N > warp) return;
    float x[8];
    fade<N>(x, c);
    Parts parts;
    parts.split(x);
    parts.transposed().store(block(N, warp - N));
  }

  // The block on the diagonal of T from that of -A, transposed into `result`. A lane has a column.
  CLA_DEVICE void invert(Parts &result, const float (&minus)[8]) {
    float *own = this->own();
    CLA_UNROLL
    for (int e = 0; e < 8; e++) own[column(e) * PITCH + row(e)] = minus[e];
    warp_barrier();
    float x[SIDE];
    CLA_UNROLL
    for (int t = 0; t < SIDE; t++) x[t] = t == lane % SIDE ? 1.f : 0.f;
    CLA_UNROLL
    for (int from = 0; from < SIDE - 1; from++) {
      CLA_UNROLL
      for (int t = (from + 1) / 4 * 4; t < SIDE; t += 4) {
        float m[4];
        load4(m, own + from * PITCH + t);
        CLA_UNROLL
        for (int i = 0; i < 4; i++) {
          if (t + i > from) x[t + i] += m[i] * x[from];
        }
      }
    }
    warp_barrier();
    if (lane < SIDE) {
      CLA_UNROLL
      for (int t = 0; t < SIDE; t += 4) store4(own + lane * PITCH + t, {x[t], x[t + 1], x[t + 2], x[t + 3]});
    }
    warp_barrier();
    float inverse[8], transposed[8];
    CLA_UNROLL
    for (int e = 0; e < 8; e++) {
      inverse[e] = own[column(e) * PITCH + row(e)];
      transposed[e] = own[row(e) * PITCH + column(e)];
    }
    warp_barrier();
    result.split(inverse);
    result.transposed().store(block(0, warp));
    result.split(transposed);
  }

  // This warp's block column of T, transposed, from the diagonal down. `found` has the two larger parts.
  CLA_DEVICE void solve(uint32_t (&found)[4][2][4], Parts &parts) {
    float sums[4][8];
    CLA_UNROLL
    for (int n = 0; n < 4; n++) {
      CLA_UNROLL
      for (int e = 0; e < 8; e++) sums[n][e] = 0.f;
    }
    CLA_UNROLL
    for (int n = 0; n < 4; n++) {
      if (n + warp > 3) continue;
      Parts other;
      if (n > 0) {
        parts.split(sums[n]);
        other.load(block(0, warp + n));
        float t[8] = {};
        add_product(t, parts, other);
        parts.split(t);
      }
      CLA_UNROLL
      for (int e = 0; e < 8; e++) found[n][e / 4][e % 4] = parts.x[e / 4][e % 4];
      CLA_UNROLL
      for (int i = n + 1; i < 4; i++) {
        if (i + warp > 3) continue;
        other.load(block(i - n, warp + n));
        add_product(sums[i], parts, other);
      }
    }
  }

  // Two tiles, by BY threads. What is above the blocks on the diagonal is zero, and no one reads it.
  template <int BY> CLA_DEVICE static void write(unsigned char *to, const unsigned char *from, int thread) {
    constexpr int ROWS = BY / 8;
    const int piece = (thread % 8) ^ (thread / 8 % 8);
    CLA_UNROLL
    for (int i = 0; i < 2 * CHUNK / ROWS; i++) {
      const int at = 16 * (thread + i * BY);
      if (piece / 2 <= i * ROWS % CHUNK / SIDE) store16(to + at, load16(from + at));
    }
  }

  CLA_DEVICE void run() {
    float l[4][2][4], p[4][2][4];
    load();
    if (DTYPE == CLA_F16) write_keys();
    // Who has much of P has little of A.
    const int i = (warp + 2) & 3;
    if (s.reverse) multiply<true>(l, p);
    else multiply<false>(l, p);
    store_scores<3>(p, i);
    store_scores<2>(p, i);
    store_scores<1>(p, i);
    store_scores<0>(p, i);
    store_block<3>(l);
    store_block<2>(l);
    store_block<1>(l);
    float minus[8];
    fade<0>(minus, l);
    Parts parts;
    invert(parts, minus);
    finish(parts);
  }

  // What is left to do where all blocks are there, and `parts` is the one on the diagonal of T.
  CLA_DEVICE void finish(Parts &parts) {
    barrier();
    uint32_t found[4][2][4];
    solve(found, parts);
    // These had less to solve.
    if (warp >= 2) write<64>(to + Prepared::P, prepared(2).base, tid - 64);
    barrier();
    CLA_UNROLL
    for (int n = 0; n < 4; n++) {
      if (n + warp > 3) continue;
      store_transposed(prepared(0), SIDE * (warp + n), SIDE * warp, found[n][0]);
      store_transposed(prepared(1), SIDE * (warp + n), SIDE * warp, found[n][1]);
    }
    barrier();
    write<THREADS>(to + Prepared::T, prepared(0).base, tid);
    const int at = 16 * tid;
    if (at < FACTORS_BYTES) store16(to + Prepared::FACTORS + at, load16(shared + FACTORS + at));
  }
};

}  // namespace cla
