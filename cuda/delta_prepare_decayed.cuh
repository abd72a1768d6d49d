// What is prepared for the chunked delta sweep where a decay has a number for each channel of a key: the decay is then not a
// factor of L and P but within their sums,
//
//     L_ts = sum_r k_tr k_sr exp(g_{s+1,r} + ... + g_tr)        and so in P
//
// Where t and s are of different blocks of 16, a step between them divides the decay in two factors, one for either operand of a
// product, neither more than what decays are: the middle of the segment, or of its half. Operands have three parts, as those of
// T do. Within a block no step does that for all pairs: one of the factors would leave the range of numbers. There a lane carries
// k_s along, from step s on, and lets it fade with every step, in f32 on ordinary cores. No two sums of logarithms are subtracted.
#pragma once
#include "delta_prepare.cuh"

namespace cla {

template <int R, bool REVERSE> struct DeltaPrepareDecayed : DeltaPrepare<R> {
  using Base = DeltaPrepare<R>;
  using Keys = PreparedKeys<R>;
  using Base::s, Base::shared, Base::tid, Base::lane, Base::warp, Base::row0, Base::pair, Base::head, Base::at, Base::to;
  using Base::factors, Base::prepared, Base::block, Base::row, Base::column, Base::THREADS, Base::KEY, Base::SIDE;
  static constexpr int PITCH = R + 8, BLOCKS = CHUNK / SIDE, PAIRS = R / 2, EVERY = THREADS / PAIRS;
  static constexpr int K = Base::SHARED, Q = K + KEY, DECAYS = Q + KEY, DIAGONAL = DECAYS + 4 * (CHUNK + 1) * PITCH;
  static constexpr int SHARED = DIAGONAL + 2 * 4 * CHUNK * SIDE;
  static_assert(4 * CHUNK * PITCH <= Base::FACTORS, "what is left has room where L and P will be");

  CLA_DEVICE DeltaPrepareDecayed(const cla_delta_sweep &s, const SegmentOf &of, int64_t index, int head)
      : Base(s, of, index, head) {
    to = s.prepared + (index * s.of.heads + head) * (Prepared::BYTES + Keys::BYTES);
  }

  CLA_DEVICE Tile keys() const { return {shared + K}; }
  CLA_DEVICE Tile queries() const { return {shared + Q}; }
  // What each step leaves of what was before it; later, of what was before its block. And, in reverse, what the last token's own
  // decay leaves at the end.
  CLA_DEVICE float *decay(int row) const { return (float *)(shared + DECAYS) + row * PITCH; }
  CLA_DEVICE float *last() const { return decay(CHUNK); }
  CLA_DEVICE const float *whole(int block) const { return decay(block * SIDE + SIDE - 1); }
  // What is left of each step at the end of its block.
  CLA_DEVICE float *left(int row) const { return (float *)shared + row * PITCH; }
  // L, or P, of a step and those of its block.
  CLA_DEVICE float *diagonal(bool of_p, int t) const { return (float *)(shared + DIAGONAL) + ((of_p ? CHUNK : 0) + t) * SIDE; }

  CLA_DEVICE void load() {
    fetch_tile<R, THREADS>(keys(), Rows(s.of.k, at.steps.batch, head), at, s.of.k_dim, tid);
    fetch_tile<R, THREADS>(queries(), Rows(s.of.q, at.steps.batch, head), at, s.of.k_dim, tid);
    copies_commit();
    const Rows gate(s.of.gate, at.steps.batch, head), beta(s.of.beta, at.steps.batch, head);
    constexpr int ROWS = THREADS / R, BATCH = 16;
    const int channel = tid % R, width = s.of.k_dim;
    // The decay between two tokens is that of the later one. In reverse the last one's is due at the end.
    CLA_NO_UNROLL
    for (int first = tid / R; first < CHUNK; first += BATCH * ROWS) {
      float due[BATCH];
      CLA_UNROLL
      for (int i = 0; i < BATCH; i++) {
        const int row = first + i * ROWS - (REVERSE ? 1 : 0);
        const bool valid = row >= 0 && row + (REVERSE ? 1 : 0) < at.count && channel < width;
        due[i] = valid ? gate.load(at.token(row), channel) : 0.f;
      }
      CLA_UNROLL
      for (int i = 0; i < BATCH; i++) decay(first + i * ROWS)[channel] = exp_fast(due[i]);
    }
    if (tid < R) last()[tid] = REVERSE && tid < width ? exp_fast(gate.load(at.token(at.count - 1), tid)) : 1.f;
    if (tid < CHUNK) factors()[Prepared::BETA + tid] = tid < at.count ? beta.load(at.token(tid), 0) : 0.f;
    copies_wait<0>();
    barrier();
  }

  // Two channels of a step, in two parts, to the tiles at `of`.
  CLA_DEVICE void write_pair(int of, int t, int channel, float x, float y) const {
    const Tile high = {to + Prepared::BYTES + of}, rest = {high.base + KEY};
    const uint32_t rounded = pack_bf16(x, y);
    *(uint32_t *)high.element(t, channel) = rounded;
    *(uint32_t *)rest.element(t, channel) = pack_rest(rounded, x, y);
  }
  // From what each step leaves to what each leaves of the start of its block, and of each at its end.
  CLA_DEVICE void multiply_decays() const {
    const int channel = tid % PAIRS * 2;
    for (int block = tid / PAIRS; block < BLOCKS; block += EVERY) {
      float x = 1.f, y = 1.f;
      CLA_UNROLL
      for (int t = block * SIDE + SIDE - 1; t >= block * SIDE; t--) {
        left(t)[channel] = x, left(t)[channel + 1] = y;
        x *= decay(t)[channel], y *= decay(t)[channel + 1];
      }
      x = y = 1.f;
      CLA_UNROLL
      for (int t = block * SIDE; t < block * SIDE + SIDE; t++) {
        x *= decay(t)[channel], y *= decay(t)[channel + 1];
        decay(t)[channel] = x, decay(t)[channel + 1] = y;
      }
    }
  }
  // A thread's channels of the steps of a block, times x and y and what `table` has, to one of the keys.
  CLA_DEVICE void write_block(int of, Tile from, const float *table, int block, float x, float y) const {
    const int channel = tid % PAIRS * 2;
    CLA_UNROLL
    for (int i = 0; i < SIDE / EVERY; i++) {
      const int t = block * SIDE + tid / PAIRS + i * EVERY;
      const float *factor = table + t * PITCH + channel;
      const uint32_t key = *(uint32_t *)from.element(t, channel);
      write_pair(of, t, channel, x * factor[0] * low_bf16(key), y * factor[1] * high_bf16(key));
    }
  }
  // Keys with all decays up to them, and with all after them.
  CLA_DEVICE void write_keys() const {
    const int channel = tid % PAIRS * 2;
    float x = 1.f, y = 1.f;
    CLA_NO_UNROLL
    for (int block = 0; block < BLOCKS; block++) {
      write_block(Keys::READS, keys(), decay(0), block, x, y);
      if (!REVERSE) write_block(Keys::QUERIES, queries(), decay(0), block, x, y);
      x *= whole(block)[channel], y *= whole(block)[channel + 1];
    }
    if (tid < PAIRS) {
      factors()[Prepared::WHOLE_BY_CHANNEL + channel] = x * last()[channel];
      factors()[Prepared::WHOLE_BY_CHANNEL + channel + 1] = y * last()[channel + 1];
    }
    x = last()[channel], y = last()[channel + 1];
    CLA_NO_UNROLL
    for (int block = BLOCKS - 1; block >= 0; block--) {
      write_block(Keys::WRITES, keys(), left(0), block, x, y);
      if (REVERSE) write_block(Keys::QUERIES, queries(), left(0), block, s.of.scale * x, s.of.scale * y);
      x *= whole(block)[channel], y *= whole(block)[channel + 1];
    }
  }

  // ---- within blocks, one a warp ----

  // Four neighbours of a row of a tile.
  CLA_DEVICE static void load_row(float (&x)[4], Tile tile, int row, int column) {
    const Halves v = *(const Halves *)tile.element(row, column);
    CLA_UNROLL
    for (int i = 0; i < 4; i++) x[i] = from_bf16(v.x[i]);
  }

  // A lane carries two tokens, one of either half of the block, and four channels of sixteen.
  static constexpr int GROUPS = R / 16;
  struct Carried {
    float k[2][GROUPS][4], q[2][REVERSE ? GROUPS : 1][4];
  };
  CLA_DEVICE int token(int i) const { return SIDE * warp + 8 * i + lane % 8; }
  template <bool SECOND> CLA_DEVICE void score(Carried &of, int t) const {
    constexpr int COUNT = SECOND ? 2 : 1;
    const int quarter = lane / 8;
    float l[2] = {0.f, 0.f}, p[2] = {0.f, 0.f};
    CLA_UNROLL
    for (int m = 0; m < GROUPS; m++) {
      const int channel = 16 * m + 4 * quarter;
      float left[4], k[4], q[4];
      load4(left, decay(t) + channel);
      load_row(k, keys(), t, channel);
      load_row(q, queries(), t, channel);
      CLA_UNROLL
      for (int i = 0; i < COUNT; i++) {
        const bool starts = i == COUNT - 1 && t == token(i);
        CLA_UNROLL
        for (int c = 0; c < 4; c++) {
          float &carried = of.k[i][m][c];
          carried = starts ? k[c] : carried * left[c];
          l[i] += k[c] * carried;
          if (REVERSE) {
            float &query = of.q[i][m][c];
            query = starts ? q[c] : query * left[c];
            p[i] += k[c] * query;
          } else {
            p[i] += q[c] * carried;
          }
        }
      }
    }
    CLA_UNROLL
    for (int i = 0; i < COUNT; i++) {
      CLA_UNROLL
      for (int d = 8; d < 32; d *= 2) l[i] += shuffle_xor(l[i], d), p[i] += shuffle_xor(p[i], d);
      if (quarter == i) diagonal(false, t)[token(i) % SIDE] = l[i], diagonal(true, t)[token(i) % SIDE] = p[i];
    }
  }
  CLA_DEVICE void score_block() const {
    Carried of;
    CLA_UNROLL
    for (int i = 0; i < 2; i++) {
      CLA_UNROLL
      for (int m = 0; m < GROUPS; m++) {
        CLA_UNROLL
        for (int c = 0; c < 4; c++) of.k[i][m][c] = of.q[i][REVERSE ? m : 0][c] = 0.f;
      }
    }
    const int first = SIDE * warp, second = first + SIDE / 2;
    CLA_NO_UNROLL
    for (int t = first; t < second; t++) score<false>(of, t);
    CLA_NO_UNROLL
    for (int t = second; t < first + SIDE; t++) score<true>(of, t);
  }

  // ---- between blocks ----

  // A block of L, or of P: of the steps of block i with those of block j before it.
  struct Block {
    bool of_p;
    int i, j;
  };
  // Each warp has three of the twelve.
  CLA_DEVICE Block own_block(int which) const {
    const int i = (warp & 1) * 2 + 1;
    return which < 2 ? Block{which == 1, 2 + warp / 2, warp % 2} : Block{warp >= 2, i, i - 1};
  }

  // Sixteen channels of a block's steps, times what `table` has, and times `more` if there is that.
  CLA_DEVICE void fade(Parts &parts, Tile key, const float *table, int block, const float *more, int d) const {
    float x[8];
    CLA_UNROLL
    for (int i = 0; i < 4; i++) {
      const int t = SIDE * block + row0 + 8 * (i & 1), channel = 16 * d + pair + 8 * (i >> 1);
      const float *factor = table + t * PITCH + channel;
      const uint32_t of_key = *(uint32_t *)key.element(t, channel);
      x[2 * i] = factor[0] * low_bf16(of_key), x[2 * i + 1] = factor[1] * high_bf16(of_key);
      if (more) x[2 * i] *= more[channel], x[2 * i + 1] *= more[channel + 1];
    }
    parts.split(x);
  }
  // L, or P transposed.
  CLA_DEVICE void multiply(float (&c)[8], const Block &of) const {
    const Tile earlier_key = of.of_p && REVERSE ? queries() : keys(), later_key = of.of_p && !REVERSE ? queries() : keys();
    // Halves meet in the middle: their outer blocks have the inner ones between.
    const bool halves = of.i / 2 != of.j / 2;
    const float *behind = halves && of.j == 0 ? whole(1) : nullptr, *before = halves && of.i == 3 ? whole(2) : nullptr;
    CLA_UNROLL
    for (int e = 0; e < 8; e++) c[e] = 0.f;
    CLA_NO_UNROLL
    for (int d = 0; d < R / 16; d++) {
      Parts earlier, later;
      fade(earlier, earlier_key, left(0), of.j, behind, d);
      fade(later, later_key, decay(0), of.i, before, d);
      if (of.of_p) add_product(c, earlier, later.transposed());
      else add_product(c, later, earlier.transposed());
    }
  }
  CLA_DEVICE void store_scores(float (&x)[8], int i, int j) const {
    uint32_t high[4], low[4];
    split(high, low, x);
    store_transposed(prepared(2), SIDE * i, SIDE * j, high);
    store_transposed(prepared(3), SIDE * i, SIDE * j, low);
  }
  CLA_DEVICE void multiply_beta(float (&x)[8], int j) const {
    CLA_UNROLL
    for (int e = 0; e < 8; e++) x[e] *= -factors()[Prepared::BETA + SIDE * j + column(e)];
  }
  CLA_DEVICE void store(float (&c)[8], const Block &of) const {
    if (of.of_p) {
      store_scores(c, of.i, of.j);
      return;
    }
    multiply_beta(c, of.j);
    Parts parts;
    parts.split(c);
    parts.transposed().store(block(of.i - of.j, of.j));
  }

  CLA_DEVICE void run() {
    load();
    score_block();
    barrier();
    multiply_decays();
    barrier();
    write_keys();
    float c[3][8];
    CLA_UNROLL
    for (int i = 0; i < 3; i++) multiply(c[i], own_block(i));
    barrier();
    CLA_UNROLL
    for (int i = 0; i < 3; i++) store(c[i], own_block(i));
    float l[8], p[8];
    CLA_UNROLL
    for (int e = 0; e < 8; e++) {
      l[e] = column(e) < row(e) ? diagonal(false, SIDE * warp + row(e))[column(e)] : 0.f;
      p[e] = row(e) <= column(e) ? diagonal(true, SIDE * warp + column(e))[row(e)] : 0.f;
    }
    store_scores(p, warp, warp);
    multiply_beta(l, warp);
    Parts parts;
    this->invert(parts, l);
    this->finish(parts);
  }
};

template <int R, bool REVERSE> CLA_KERNEL(128, 2) void delta_prepare_decayed_kernel(const CLA_CONSTANT cla_delta_sweep s) {
  const int64_t index = block_x() / s.of.heads;
  DeltaPrepareDecayed<R, REVERSE>(s, SegmentOf(s.anchors, s.of.sequences, index), index, block_x() % s.of.heads).run();
}

template <int R, bool REVERSE> int32_t launch_delta_prepare_decayed(const cla_delta_sweep &s, void *stream) {
  using Kernel = DeltaPrepareDecayed<R, REVERSE>;
  return launch(delta_prepare_decayed_kernel<R, REVERSE>, Dims{s.anchors.all * s.of.heads, 1}, Kernel::THREADS, Kernel::SHARED,
                stream, s);
}

}  // namespace cla
