// What is prepared for a chunked delta sweep where a decay has a number for each channel of a key: the decay is then not a factor
// of L and P but within their sums,
//
//     L_ts = sum_r k_tr k_sr exp(g_{s+1,r} + ... + g_tr)        and so in P
//
// Where t and s are of different blocks of 16, a step between them divides the decay in two factors, one for either operand of a
// product, neither more than what decays are: the middle of the segment, or of its half. Operands have three parts, as those of
// T do. Within a block no step does that for all pairs: one of the factors would leave the range of numbers. There a lane carries
// k_s along, from step s on, and lets it fade with every step, in f32 on ordinary cores. No two sums of logarithms are subtracted.
//
// Here is what families have in common: KEYS of them in shared memory, their decays, and the MATRICES of what is read of what is
// written, the first of them the system's, the second P. A family says which keys those are of and what else they are times:
//
//     load(), write_keys(), score_block()       into shared memory, to memory, and what is within blocks into `diagonal`
//     read(matrix), written(matrix)             keys and how they fade
//     scale(x, block), triangle(matrix)         a block but for its products, and where all but the first go, in two parts
#pragma once
#include "delta_prepare.cuh"

namespace cla {

template <class Family, int R, int DTYPE, int KEYS, int MATRICES> struct DeltaPrepareFaded : DeltaPrepare<R> {
  using Base = DeltaPrepare<R>;
  using Base::s, Base::shared, Base::tid, Base::warp, Base::lane, Base::row0, Base::pair, Base::head, Base::at, Base::to;
  using Base::factors, Base::block, Base::row, Base::column, Base::THREADS, Base::KEY, Base::SIDE;
  enum { SYSTEM, P };
  static constexpr int PITCH = R + 8, BLOCKS = CHUNK / SIDE, PAIRS = R / 2, EVERY = THREADS / PAIRS;
  static constexpr int K = Base::SHARED, DECAYS = K + KEYS * KEY, DIAGONAL = DECAYS + 4 * (CHUNK + 1) * PITCH;
  static constexpr int SHARED = DIAGONAL + MATRICES * 4 * CHUNK * SIDE;
  static_assert(4 * CHUNK * PITCH <= Base::FACTORS, "what is left has room where L and P will be");

  CLA_DEVICE DeltaPrepareFaded(const cla_delta_sweep &s, const SegmentOf &of, int64_t index, int head, int bytes)
      : Base(s, of, index, head) {
    to = s.prepared + (index * s.of.heads + head) * bytes;
  }

  CLA_DEVICE Tile key(int which) const { return {shared + K + which * KEY}; }
  // What each step leaves of what was before it; later, of what was before its block. And what is due at the end.
  CLA_DEVICE float *decay(int row) const { return (float *)(shared + DECAYS) + row * PITCH; }
  CLA_DEVICE float *last() const { return decay(CHUNK); }
  CLA_DEVICE const float *whole(int block) const { return decay(block * SIDE + SIDE - 1); }
  // What is left of each step at the end of its block.
  CLA_DEVICE float *left(int row) const { return (float *)shared + row * PITCH; }

  // Of a step and those of its block.
  CLA_DEVICE float *diagonal(int matrix, int t) const { return (float *)(shared + DIAGONAL) + (matrix * CHUNK + t) * SIDE; }

  // ---- loading ----

  CLA_DEVICE void fetch_key(int which, const cla_tensor &from) const {
    TileRows<R, THREADS>::fetch(key(which), Rows(from, at.steps.batch, head), at, s.of.k_dim, tid);
  }
  // Of each step the decay of the token that is so many steps before.
  CLA_DEVICE void load_decays(int before) const {
    const Rows gate(s.of.gate, at.steps.batch, head);
    cla::load_decays<R, THREADS>(gate, at, before, s.of.k_dim, tid, [this](int step) { return decay(step); });
    if (tid < R) last()[tid] = before && tid < s.of.k_dim ? exp_fast(gate.load(at.token(at.count - 1), tid)) : 1.f;
  }

  // ---- keys with their decays ----

  CLA_DEVICE static void load_pair(float (&x)[2], Tile tile, int row, int column) {
    unpack_pair<DTYPE>(x, *(const uint32_t *)tile.element(row, column));
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
  // How a key is faded: one that is read with the decays since the start of its block, one that is written with those to its
  // end. Its own decay is one of the former and not one of the latter, unless its steps are off by one.
  struct Fade {
    bool reads, off;
  };
  CLA_DEVICE const float *factor(const Fade &how, int t) const {
    if (!how.off) return how.reads ? decay(t) : left(t);
    if (t % SIDE != 0) return how.reads ? decay(t - 1) : left(t - 1);
    return how.reads ? left(SIDE - 1) : whole(t / SIDE);  // the former has nothing behind it: ones
  }

  // A key with all decays before its steps, or with all behind them, times `scale`.
  CLA_DEVICE void write_key(int of, Tile from, const Fade &how, float scale) const {
    const int channel = tid % PAIRS * 2;
    float x = scale, y = scale;
    if (!how.reads) x *= last()[channel], y *= last()[channel + 1];
    CLA_NO_UNROLL
    for (int i = 0; i < BLOCKS; i++) {
      const int block = how.reads ? i : BLOCKS - 1 - i;
      CLA_UNROLL
      for (int i = 0; i < SIDE / EVERY; i++) {
        const int t = block * SIDE + tid / PAIRS + i * EVERY;
        const float *by = factor(how, t) + channel;
        float key[2];
        load_pair(key, from, t, channel);
        write_pair(of, t, channel, x * by[0] * key[0], y * by[1] * key[1]);
      }
      x *= whole(block)[channel], y *= whole(block)[channel + 1];
    }
  }
  CLA_DEVICE void write_whole() const {
    if (tid >= R) return;
    float x = last()[tid];
    CLA_UNROLL
    for (int block = 0; block < BLOCKS; block++) x *= whole(block)[tid];
    factors()[Prepared::WHOLE_BY_CHANNEL + tid] = x;
  }

  // ---- within blocks, one a warp ----
  // A lane carries keys of two tokens, one of either half of the block, four channels of sixteen.

  static constexpr int GROUPS = R / 16;
  CLA_DEVICE int token(int i) const { return SIDE * warp + 8 * i + lane % 8; }
  // Four neighbours of a row of a tile.
  CLA_DEVICE static void load_row(float (&x)[4], Tile tile, int row, int column) {
    unpack_four<DTYPE>(x, *(const Vec2 *)tile.element(row, column));
  }
  // score(the steps of the first half, whose tokens start; those of the second, by type, where others start)
  template <class Score> CLA_DEVICE void each_step_of_block(Score score) const {
    const int first = SIDE * warp, second = first + SIDE / 2;
    CLA_NO_UNROLL
    for (int t = first; t < second; t++) score(t, std::integral_constant<int, 1>());
    CLA_NO_UNROLL
    for (int t = second; t < first + SIDE; t++) score(t, std::integral_constant<int, 2>());
  }

  // ---- between blocks ----

  struct Operand {
    Tile key;
    Fade how;
  };
  // Sixteen channels of a block's steps, times their decays, and times `more` if there is that, in three parts.
  CLA_DEVICE void load(Parts &parts, const Operand &of, int block, const float *more, int d) const {
    float x[8];
    CLA_UNROLL
    for (int i = 0; i < 4; i++) {
      const int t = SIDE * block + row0 + 8 * (i & 1), channel = 16 * d + pair + 8 * (i >> 1);
      const float *by = factor(of.how, t) + channel;
      float key[2];
      load_pair(key, of.key, t, channel);
      x[2 * i] = by[0] * key[0], x[2 * i + 1] = by[1] * key[1];
      if (more) x[2 * i] *= more[channel], x[2 * i + 1] *= more[channel + 1];
    }
    parts.split(x);
  }
  // A block of a matrix: of the steps of block i with those of block j before it, or its own.
  struct Block {
    int matrix, i, j;
  };
  // Each warp has as many of those between blocks: of all matrices one across the middle, of half of them one within a half.
  static constexpr int OWN = MATRICES + MATRICES / 2;
  CLA_DEVICE Block own_block(int which) const {
    const int i = (warp & 1) * 2 + 1;
    if (which < MATRICES) return {which, 2 + warp / 2, warp % 2};
    return {warp / 2 * (MATRICES / 2) + which - MATRICES, i, i - 1};
  }
  // All but the system's are transposed.
  CLA_DEVICE void multiply(float (&c)[8], const Block &of) const {
    const Operand read = family().read(of.matrix), written = family().written(of.matrix);
    // Halves meet in the middle: their outer blocks have the inner ones between.
    const bool halves = of.i / 2 != of.j / 2;
    const float *behind = halves && of.j == 0 ? whole(1) : nullptr, *before = halves && of.i == 3 ? whole(2) : nullptr;
    CLA_UNROLL
    for (int e = 0; e < 8; e++) c[e] = 0.f;
    CLA_NO_UNROLL
    for (int d = 0; d < R / 16; d++) {
      Parts earlier, later;
      load(earlier, written, of.j, behind, d);
      load(later, read, of.i, before, d);
      if (of.matrix == SYSTEM) add_product(c, later, earlier.transposed());
      else add_product(c, earlier, later.transposed());
    }
  }
  CLA_DEVICE void store(float (&x)[8], const Block &of) const {
    family().scale(x, of);
    if (of.matrix == SYSTEM) {
      Parts parts;
      parts.split(x);
      parts.transposed().store(block(of.i - of.j, of.j));
      return;
    }
    const Tile to = family().triangle(of.matrix);
    uint32_t high[4], low[4];
    split(high, low, x);
    store_transposed(to, SIDE * of.i, SIDE * of.j, high);
    store_transposed({to.base + SUBTILE}, SIDE * of.i, SIDE * of.j, low);
  }

  CLA_DEVICE void run() {
    family().load();
    family().score_block();
    barrier();
    multiply_decays();
    barrier();
    family().write_keys();
    write_whole();
    float c[OWN][8], x[8];
    CLA_UNROLL
    for (int i = 0; i < OWN; i++) multiply(c[i], own_block(i));
    barrier();
    CLA_UNROLL
    for (int i = 0; i < OWN; i++) store(c[i], own_block(i));
    CLA_UNROLL
    for (int m = P; m < MATRICES; m++) {
      CLA_UNROLL
      for (int e = 0; e < 8; e++) x[e] = row(e) <= column(e) ? diagonal(m, SIDE * warp + column(e))[row(e)] : 0.f;
      store(x, {m, warp, warp});
    }
    CLA_UNROLL
    for (int e = 0; e < 8; e++) x[e] = column(e) < row(e) ? diagonal(SYSTEM, SIDE * warp + row(e))[column(e)] : 0.f;
    family().scale(x, {SYSTEM, warp, warp});
    Parts parts;
    this->invert(parts, x);
    this->finish(parts);
    // Those that there is no place for beside T and P.
    CLA_UNROLL
    for (int m = P + 1; m < MATRICES; m++) {
      Base::template write<THREADS>(to + Prepared::BYTES + (m - P - 1) * 2 * SUBTILE, family().triangle(m).base, tid);
    }
  }

 private:
  CLA_DEVICE const Family &family() const { return *static_cast<const Family *>(this); }
};

}  // namespace cla
