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
  // As a B operand, of the transpose.
  CLA_DEVICE void store(unsigned char *to) const {
    CLA_UNROLL
    for (int part = 0; part < 3; part++) store16(to + 512 * part, {x[part][0], x[part][2], x[part][1], x[part][3]});
  }
  CLA_DEVICE void load(const unsigned char *from) {
    CLA_UNROLL
    for (int part = 0; part < 3; part++) {
      const Vec4 v = load16(from + 512 * part);
      x[part][0] = v.x, x[part][1] = v.y, x[part][2] = v.z, x[part][3] = v.w;
    }
  }
};

// c += a b of 16 x 16, small terms first; what is left out is 2^-26 of it.
CLA_DEVICE void add_product(float (&c)[8], const Parts &a, const Parts &b) {
  float left[4] = {c[0], c[1], c[2], c[3]}, right[4] = {c[4], c[5], c[6], c[7]};
  CLA_UNROLL
  for (int both = 2; both >= 0; both--) {
    CLA_UNROLL
    for (int i = 0; i <= both; i++) mma16(left, right, a.x[i], b.x[both - i]);
  }
  CLA_UNROLL
  for (int i = 0; i < 4; i++) c[i] = left[i], c[4 + i] = right[i];
}

template <int R> struct DeltaPrepare {
  static constexpr int THREADS = 128, SIDE = 16, PITCH = 20;
  // The tiles of k and q make room for those of T and P.
  static constexpr int TILES = 4 * SUBTILE, KEY = R * 128;
  static_assert(2 * KEY <= TILES, "both fit");
  // Blocks below the diagonal, and on it but for the first, in parts; a block for each warp in f32; sums of gates.
  static constexpr int BLOCK = 3 * 512, BLOCKS = TILES, OWN = BLOCKS + 9 * BLOCK, SUMS = OWN + 4 * (4 * SIDE * PITCH);
  static constexpr int FACTORS = SUMS + 2 * 4 * CHUNK, SHARED = FACTORS + 1024;

  const cla_delta_sweep &s;
  unsigned char *shared;
  int tid, lane, warp, row0, pair, head;
  SegmentSteps at;
  unsigned char *to;

  CLA_DEVICE DeltaPrepare(const cla_delta_sweep &s, const SegmentOf &of, int64_t index, int head)
      : s(s), shared(shared_memory()), head(head), at(s.of, of.sequence, of.segment, s.reverse) {
    tid = thread_index();
    lane = tid & 31;
    warp = tid >> 5;
    row0 = lane >> 2;
    pair = (lane & 3) * 2;
    to = s.prepared + (index * s.of.heads + head) * Prepared::BYTES;
  }

  CLA_DEVICE Tile tile(int which) const { return {shared + which * KEY}; }
  CLA_DEVICE Tile prepared(int which) const { return {shared + which * SUBTILE}; }
  // Row i, column j <= i; i > 0. This lane's part.
  CLA_DEVICE unsigned char *block(int i, int j) const {
    return shared + BLOCKS + (i * (i + 1) / 2 + j - 1) * BLOCK + 16 * lane;
  }
  CLA_DEVICE float *own(int warp) const { return (float *)(shared + OWN) + warp * (SIDE * PITCH); }
  // The gates of a block of 16 tokens up to and with one of them, and after it.
  CLA_DEVICE float *before() const { return (float *)(shared + SUMS); }
  CLA_DEVICE float *after() const { return before() + CHUNK; }
  CLA_DEVICE float *factors() const { return (float *)(shared + FACTORS); }
  // The place in a block of the e-th of a lane's numbers.
  CLA_DEVICE int row(int e) const { return row0 + 8 * (e / 2 % 2); }
  CLA_DEVICE int column(int e) const { return 8 * (e / 4) + pair + e % 2; }

  // The sum of the gates of the blocks behind `from` and before `to`.
  CLA_DEVICE float between(int from, int to) const {
    float sum = 0.f;
    CLA_UNROLL
    for (int i = 0; i < CHUNK / SIDE; i++) {
      if (i > from && i < to) sum += before()[SIDE * i + SIDE - 1];
    }
    return sum;
  }

  CLA_DEVICE void load() {
    const Rows q(s.of.q, at.steps.batch, head), k(s.of.k, at.steps.batch, head);
    fetch_tile<R, THREADS>(tile(0), k, at, s.of.k_dim, tid);
    fetch_tile<R, THREADS>(tile(1), q, at, s.of.k_dim, tid);
    copies_commit();
    float last = 1.f;
    if (tid < CHUNK) {
      const Rows gate(s.of.gate, at.steps.batch, head), beta(s.of.beta, at.steps.batch, head);
      const bool gated = s.of.gate_kind != CLA_NO_GATE;
      // The decay between two tokens is that of the later one. In reverse the last one's is due at the end.
      const int row = s.reverse ? tid - 1 : tid;
      const float due = gated && row >= 0 && tid < at.count ? gate.load(at.token(row), 0) : 0.f;
      if (gated && s.reverse) last = exp_fast(gate.load(at.token(at.count - 1), 0));
      factors()[Prepared::BETA + tid] = tid < at.count ? beta.load(at.token(tid), 0) : 0.f;
      sum_gates(due);
    }
    copies_wait<0>();
    barrier();
    if (tid < CHUNK) {
      const int block = tid / SIDE;
      factors()[Prepared::FROM_START + tid] = exp_fast(between(-1, block) + before()[tid]);
      factors()[Prepared::TO_END + tid] = last * exp_fast(after()[tid] + between(block, CHUNK / SIDE));
      if (tid == 0) factors()[Prepared::WHOLE] = last * exp_fast(between(-1, CHUNK / SIDE));
    }
  }

  // A lane has the gate of one token. Logarithms are summed up from one token to another: a difference of two sums would be
  // one of large numbers, or of infinities. From block to block there are three sums, added up where they are needed.
  CLA_DEVICE void sum_gates(float due) {
    const int from = tid % SIDE;
    float until = 0.f, since = 0.f;
    CLA_UNROLL
    for (int t = 0; t < SIDE; t++) {
      const float gate = shuffle(due, (lane & SIDE) + t);
      if (t <= from) until += gate;
      else since += gate;
      own(tid / SIDE)[t * PITCH + from] = exp_fast(since);
    }
    before()[tid] = until;
    after()[tid] = since;
  }

  // The blocks of K K^T and P up to the diagonal in the rows of this warp.
  CLA_DEVICE void multiply(float (&l)[4][8], float (&p)[4][8]) {
    float c[4][4][4];
    CLA_UNROLL
    for (int j = 0; j < 4; j++) {
      CLA_UNROLL
      for (int e = 0; e < 16; e++) c[j][e / 4][e % 4] = 0.f;
    }
    const Tile k = tile(0), rows = tile(s.reverse ? 0 : 1), columns = tile(s.reverse ? 1 : 0);
    CLA_UNROLL_TWICE
    for (int d = 0; d < R; d += 16) {
      uint32_t a[4], b[4], x[4], y[4];
      load_a(a, k, 16 * warp, d);
      load_a(x, rows, 16 * warp, d);
      CLA_UNROLL
      for (int j = 0; j < 4; j++) {
        if (j > warp) continue;
        load_b(b, k, 16 * j, d);
        load_b(y, columns, 16 * j, d);
        mma16(c[j][0], c[j][1], a, b);
        mma16(c[j][2], c[j][3], x, y);
      }
    }
    CLA_UNROLL
    for (int j = 0; j < 4; j++) {
      CLA_UNROLL
      for (int e = 0; e < 8; e++) l[j][e] = c[j][e / 4][e % 4], p[j][e] = c[j][2 + e / 4][e % 4];
    }
    barrier();  // the tiles have been read
  }

  // Lets L and P fade. -A goes to blocks, but that on the diagonal becomes l[0].
  CLA_DEVICE void fade(float (&l)[4][8], float (&p)[4][8]) {
    const float *beta = factors() + Prepared::BETA;
    float own_block[8];
    CLA_UNROLL
    for (int j = 0; j < 4; j++) {
      if (j > warp) continue;
      const float sum = between(j, warp);
      CLA_UNROLL
      for (int e = 0; e < 8; e++) {
        const int from = 16 * j + column(e);
        const float left = j == warp ? own(warp)[row(e) * PITCH + column(e)]
                                     : exp_fast(after()[from] + sum + before()[16 * warp + row(e)]);
        l[j][e] *= -left * beta[from];
        p[j][e] = j < warp || column(e) <= row(e) ? left * p[j][e] : 0.f;
        own_block[e] = l[j][e];  // the last of them
      }
      if (j == warp) continue;
      Parts parts;
      parts.split(l[j]);
      parts.store(block(warp, j));
    }
    CLA_UNROLL
    for (int e = 0; e < 8; e++) l[0][e] = own_block[e];
  }

  // The block on the diagonal from -A, which has it: a lane has a column, as a row of the transpose, which stays in memory.
  CLA_DEVICE void invert(const float (&minus)[8]) {
    float *own = this->own(warp);
    warp_barrier();  // what fades has been read
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
      for (int t = 0; t < SIDE; t++) own[lane * PITCH + t] = x[t];
    }
    warp_barrier();
    if (warp == 0) return;
    float inverse[8];
    CLA_UNROLL
    for (int e = 0; e < 8; e++) inverse[e] = own[column(e) * PITCH + row(e)];
    Parts parts;
    parts.split(inverse);
    parts.store(block(warp, warp));
  }

  CLA_DEVICE void store_scores(const float (&p)[4][8]) {
    CLA_UNROLL
    for (int j = 0; j < 4; j++) {
      if (j > warp) continue;
      CLA_UNROLL
      for (int e = 0; e < 8; e += 2) {
        const float x[2] = {p[j][e], p[j][e + 1]};
        store_parts(prepared(2), prepared(3), 16 * warp + row(e), 16 * j + column(e), x);
      }
    }
  }

  // Columns of T, as rows of its transpose.
  CLA_DEVICE void solve() {
    float t[8], sums[3][8];
    CLA_UNROLL
    for (int e = 0; e < 8; e++) {
      t[e] = own(warp)[row(e) * PITCH + column(e)];
      sums[0][e] = sums[1][e] = sums[2][e] = 0.f;
    }
    Parts parts, other;
    parts.split(t);
    store(warp, parts);
    CLA_UNROLL
    for (int j = 0; j < 3; j++) {
      if (j < warp) continue;
      CLA_UNROLL
      for (int i = j + 1; i < 4; i++) {
        other.load(block(i, j));
        add_product(sums[i - 1], parts, other);
      }
      parts.split(sums[j]);
      other.load(block(j + 1, j + 1));
      CLA_UNROLL
      for (int e = 0; e < 8; e++) t[e] = 0.f;
      add_product(t, parts, other);
      parts.split(t);
      store(j + 1, parts);
    }
  }
  CLA_DEVICE void store(int i, const Parts &parts) {
    store_transposed(prepared(0), 16 * i, 16 * warp, parts.x[0]);
    store_transposed(prepared(1), 16 * i, 16 * warp, parts.x[1]);
  }

  // Above the diagonal blocks nothing was stored.
  CLA_DEVICE void write() {
    constexpr int ROWS = THREADS / 8;
    static_assert(ROWS == SIDE, "a block's rows at once");
    const int piece = tid % 8 ^ tid / 8 % 8;
    CLA_UNROLL
    for (int i = 0; i < 4 * CHUNK / ROWS; i++) {
      const int at = 16 * (i * THREADS + tid);
      store16(to + at, piece / 2 <= i % 4 ? load16(shared + at) : Vec4{0, 0, 0, 0});
    }
    const int at = 16 * tid;
    if (at < 4 * (3 * CHUNK + 4)) store16(to + Prepared::FACTORS + at, load16(shared + FACTORS + at));
  }

  CLA_DEVICE void run() {
    float l[4][8], p[4][8];
    load();
    multiply(l, p);
    fade(l, p);
    invert(l[0]);
    barrier();
    store_scores(p);
    solve();
    barrier();
    write();
  }
};

}  // namespace cla
