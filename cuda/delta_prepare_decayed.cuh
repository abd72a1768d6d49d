// What is prepared for the chunked delta sweep where a decay has a number for each channel of a key: the decay is then not a
// factor of L and P but within their sums,
//
//     L_ts = sum_r k_tr k_sr exp(g_{s+1,r} + ... + g_tr)        and so in P
//
// which no two operands of a product give for every gate: relative to a step between s and t one of them leaves the range of
// numbers. So a lane carries k_s along, from step s on, and lets it fade with every step: all factors are at most what they
// are, and no two sums of logarithms are subtracted. That is f32 on ordinary cores, 12 operations for four channels of two
// tokens. What the state is read and written with is decayed in one product a step, too.
#pragma once
#include "delta_prepare.cuh"

namespace cla {

template <int R, bool REVERSE> struct DeltaPrepareDecayed : DeltaPrepare<R> {
  using Base = DeltaPrepare<R>;
  using Keys = PreparedKeys<R>;
  using Base::s, Base::shared, Base::tid, Base::lane, Base::warp, Base::head, Base::at, Base::to, Base::factors;
  using Base::prepared, Base::block, Base::row, Base::column, Base::THREADS, Base::KEY, Base::SIDE;
  // L lies where T and blocks of A will.
  static constexpr int K = Base::SHARED, Q = K + KEY, DECAYS = Q + KEY, PITCH = R + 4;
  static constexpr int SHARED = DECAYS + 4 * (CHUNK + 1) * PITCH;

  CLA_DEVICE DeltaPrepareDecayed(const cla_delta_sweep &s, const SegmentOf &of, int64_t index, int head)
      : Base(s, of, index, head) {
    to = s.prepared + (index * s.of.heads + head) * (Prepared::BYTES + Keys::BYTES);
  }

  CLA_DEVICE Tile keys() const { return {shared + K}; }
  CLA_DEVICE Tile queries() const { return {shared + Q}; }
  // What each step leaves of what was before it, and, in reverse, what the last token's own decay leaves at the end.
  CLA_DEVICE float *decay(int row) const { return (float *)(shared + DECAYS) + row * PITCH; }
  CLA_DEVICE float *last() const { return decay(CHUNK); }
  CLA_DEVICE float *lower(int t, int from) const { return (float *)shared + t * CHUNK + (from ^ (t & 7) * 8); }

  CLA_DEVICE void load() {
    fetch_tile<R, THREADS>(keys(), Rows(s.of.k, at.steps.batch, head), at, s.of.k_dim, tid);
    fetch_tile<R, THREADS>(queries(), Rows(s.of.q, at.steps.batch, head), at, s.of.k_dim, tid);
    copies_commit();
    const Rows gate(s.of.gate, at.steps.batch, head), beta(s.of.beta, at.steps.batch, head);
    constexpr int EVERY = THREADS / R, BATCH = 16;
    const int channel = tid % R, width = s.of.k_dim;
    // The decay between two tokens is that of the later one. In reverse the last one's is due at the end.
    CLA_NO_UNROLL
    for (int first = tid / R; first < CHUNK; first += BATCH * EVERY) {
      float due[BATCH];
      CLA_UNROLL
      for (int i = 0; i < BATCH; i++) {
        const int row = first + i * EVERY - (REVERSE ? 1 : 0);
        const bool valid = row >= 0 && row + (REVERSE ? 1 : 0) < at.count && channel < width;
        due[i] = valid ? gate.load(at.token(row), channel) : 0.f;
      }
      CLA_UNROLL
      for (int i = 0; i < BATCH; i++) decay(first + i * EVERY)[channel] = exp_fast(due[i]);
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
  // Keys with all decays up to them, by one half of the threads, and with all after them, by the other.
  CLA_DEVICE void write_keys() {
    const int channel = tid % (R / 2) * 2, part = tid / (R / 2);
    float x = 1.f, y = 1.f;
    if (part == 0) {
      CLA_UNROLL_EIGHT
      for (int t = 0; t < CHUNK; t++) {
        x *= decay(t)[channel], y *= decay(t)[channel + 1];
        const uint32_t k = *(uint32_t *)keys().element(t, channel), q = *(uint32_t *)queries().element(t, channel);
        write_pair(Keys::READS, t, channel, x * low_bf16(k), y * high_bf16(k));
        if (!REVERSE) write_pair(Keys::QUERIES, t, channel, x * low_bf16(q), y * high_bf16(q));
      }
      factors()[Prepared::WHOLE_BY_CHANNEL + channel] = x * last()[channel];
      factors()[Prepared::WHOLE_BY_CHANNEL + channel + 1] = y * last()[channel + 1];
    } else if (part == 1) {
      x = last()[channel], y = last()[channel + 1];
      CLA_UNROLL_EIGHT
      for (int t = CHUNK - 1; t >= 0; t--) {
        const uint32_t k = *(uint32_t *)keys().element(t, channel), q = *(uint32_t *)queries().element(t, channel);
        write_pair(Keys::WRITES, t, channel, x * low_bf16(k), y * high_bf16(k));
        if (REVERSE) write_pair(Keys::QUERIES, t, channel, s.of.scale * x * low_bf16(q), s.of.scale * y * high_bf16(q));
        x *= decay(t)[channel], y *= decay(t)[channel + 1];
      }
    }
  }

  // Four neighbours of a row of a tile.
  CLA_DEVICE static void load_row(float (&x)[4], Tile tile, int row, int column) {
    const Halves v = *(const Halves *)tile.element(row, column);
    CLA_UNROLL
    for (int i = 0; i < 4; i++) x[i] = from_bf16(v.x[i]);
  }

  // A lane carries two tokens, one of the first half and one of the second, so that all warps have as much to do, and four
  // channels of sixteen.
  static constexpr int GROUPS = R / 16;
  struct Carried {
    float k[2][GROUPS][4], q[2][REVERSE ? GROUPS : 1][4];
  };
  enum Phase { FIRST_STARTS, FIRST, SECOND_STARTS, BOTH };
  CLA_DEVICE int token(int i) const { return (i ? CHUNK - 8 - 8 * warp : 8 * warp) + lane % 8; }
  template <Phase PHASE> CLA_DEVICE void score(Carried &of, int t) {
    constexpr int COUNT = PHASE < SECOND_STARTS ? 1 : 2;
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
        const bool starts = PHASE == (i ? SECOND_STARTS : FIRST_STARTS) && t == token(i);
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
      if (quarter == i) keep_scores(t, token(i), t == token(i) ? 0.f : l[i], p[i]);
    }
  }
  CLA_DEVICE void keep_scores(int t, int from, float l, float p) const {
    *lower(t, from) = l;
    const uint16_t high = to_bf16(p);
    *prepared(2).element(t, from) = high;
    *prepared(3).element(t, from) = to_bf16(p - from_bf16(high));
  }
  template <Phase PHASE> CLA_DEVICE void score(Carried &of, int from, int to) {
    CLA_NO_UNROLL
    for (int t = from; t < to; t++) score<PHASE>(of, t);
  }
  CLA_DEVICE void scores() {
    Carried of;
    CLA_UNROLL
    for (int i = 0; i < 2; i++) {
      CLA_UNROLL
      for (int m = 0; m < GROUPS; m++) {
        CLA_UNROLL
        for (int c = 0; c < 4; c++) of.k[i][m][c] = of.q[i][REVERSE ? m : 0][c] = 0.f;
      }
    }
    const int first = 8 * warp, second = CHUNK - 8 - first;
    score<FIRST_STARTS>(of, first, first + 8);
    score<FIRST>(of, first + 8, second);
    score<SECOND_STARTS>(of, second, second + 8);
    score<BOTH>(of, second + 8, CHUNK);
    // What no one writes of a block on the diagonal.
    const int t = SIDE * warp + lane / 4, from = SIDE * warp + 8 + lane % 4 * 2;
    keep_scores(t, from, 0.f, 0.f);
    keep_scores(t, from + 1, 0.f, 0.f);
  }

  // -A in the rows of this warp; blocks take the place of L.
  CLA_DEVICE void take_blocks(float (&own)[8]) {
    const float *beta = factors() + Prepared::BETA;
    float l[4][8];
    CLA_UNROLL
    for (int j = 0; j < 4; j++) {
      if (j > warp) continue;
      CLA_UNROLL
      for (int e = 0; e < 8; e++) {
        const int from = SIDE * j + column(e);
        l[j][e] = -beta[from] * *lower(SIDE * warp + row(e), from);
        own[e] = l[j][e];  // the last of them
      }
    }
    barrier();
    CLA_UNROLL
    for (int j = 0; j < 3; j++) {
      if (j >= warp) continue;
      Parts parts;
      parts.split(l[j]);
      parts.store(block(warp - j, j));
    }
  }

  CLA_DEVICE void run() {
    load();
    write_keys();
    scores();
    barrier();
    float own[8];
    take_blocks(own);
    Parts parts;
    this->invert(parts, own);
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
