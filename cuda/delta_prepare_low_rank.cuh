// What is prepared for the chunked sweep of the low-rank family: see PreparedLowRank in delta_chunk.cuh.
//
// Decays are those of the tokens themselves, in the order of the sweep. What r1 reads, and in reverse r2, is read before the
// state fades, so that the token's own decay is missing; in reverse what x1 writes fades with it, but not for the token itself.
#pragma once
#include "delta_prepare_faded.cuh"

namespace cla {

template <int R, bool REVERSE, int DTYPE>
struct DeltaPrepareLowRank : DeltaPrepareFaded<DeltaPrepareLowRank<R, REVERSE, DTYPE>, R, DTYPE, 4, 4> {
  using Base = DeltaPrepareFaded<DeltaPrepareLowRank, R, DTYPE, 4, 4>;
  using Keys = PreparedLowRank<R>;
  using Base::s, Base::shared, Base::lane, Base::key, Base::decay, Base::prepared, Base::diagonal, Base::token, Base::load_row;
  using Base::write_key, Base::SIDE, Base::GROUPS, Base::SYSTEM, Base::P;
  using Operand = typename Base::Operand;
  using Block = typename Base::Block;
  enum Key { R1, R2, X1, X2 };
  // The system and P are what is read of m, by m and by the output; L and N what is read of the value.
  enum Matrix { L = P + 1, N, MATRICES };
  static constexpr int TRIANGLES = Base::K;  // L and N, when keys and decays are not needed any more
  static_assert(TRIANGLES + 4 * SUBTILE <= Base::DIAGONAL && Keys::L == 0 && Keys::N == 2 * SUBTILE, "they fit, and follow P");

  CLA_DEVICE DeltaPrepareLowRank(const cla_delta_sweep &s, const SegmentOf &of, int64_t index, int head)
      : Base(s, of, index, head, Prepared::BYTES + Keys::BYTES) {}

  CLA_DEVICE static typename Base::Fade fade(int which) {
    return {which == R1 || which == R2, which == R1 || (REVERSE && which != X2)};
  }
  CLA_DEVICE Operand operand(int which) const { return {key(which), fade(which)}; }
  CLA_DEVICE Operand read(int matrix) const { return operand(matrix == SYSTEM || matrix == L ? R1 : R2); }
  CLA_DEVICE static bool of_value(int matrix) { return matrix == L || matrix == N; }
  CLA_DEVICE Operand written(int matrix) const { return operand(of_value(matrix) ? X1 : X2); }
  CLA_DEVICE Tile triangle(int matrix) const {
    return matrix == P ? prepared(2) : Tile{shared + TRIANGLES + (matrix == L ? 0 : 2 * SUBTILE)};
  }
  // What a value is multiplied by has the scale in reverse; forwards outputs have it.
  CLA_DEVICE float value_scale() const { return REVERSE ? s.of.scale : 1.f; }
  CLA_DEVICE void scale(float (&x)[8], const Block &of) const {
    if (!of_value(of.matrix)) return;
    CLA_UNROLL
    for (int e = 0; e < 8; e++) x[e] *= value_scale();
  }

  CLA_DEVICE void load() const {
    this->fetch_key(R1, REVERSE ? s.of.b : s.of.a);
    this->fetch_key(R2, REVERSE ? s.of.k : s.of.q);
    this->fetch_key(X1, REVERSE ? s.of.q : s.of.k);
    this->fetch_key(X2, REVERSE ? s.of.a : s.of.b);
    copies_commit();
    this->load_decays(0);
    copies_wait<0>();
    barrier();
  }
  CLA_DEVICE void write_keys() const {
    write_key(Keys::R1, key(R1), fade(R1), 1.f);
    write_key(Keys::R2, key(R2), fade(R2), 1.f);
    write_key(Keys::X1, key(X1), fade(X1), value_scale());
    write_key(Keys::X2, key(X2), fade(X2), 1.f);
  }

  struct Carried {
    float x1[2][GROUPS][4], x2[2][GROUPS][4];
  };
  template <int COUNT> CLA_DEVICE void score(Carried &of, int t) const {
    const int quarter = lane / 8;
    float sum[2][MATRICES] = {};
    CLA_UNROLL
    for (int m = 0; m < GROUPS; m++) {
      const int channel = 16 * m + 4 * quarter;
      float left[4], r1[4], r2[4], x1[4], x2[4];
      load4(left, decay(t) + channel);
      load_row(r1, key(R1), t, channel);
      load_row(r2, key(R2), t, channel);
      load_row(x1, key(X1), t, channel);
      load_row(x2, key(X2), t, channel);
      CLA_UNROLL
      for (int i = 0; i < COUNT; i++) {
        const bool starts = i == COUNT - 1 && t == token(i);
        CLA_UNROLL
        for (int c = 0; c < 4; c++) {
          float &y1 = of.x1[i][m][c], &y2 = of.x2[i][m][c];
          if (REVERSE && starts) y1 = x1[c];
          sum[i][SYSTEM] += r1[c] * y2;
          sum[i][L] += r1[c] * y1;
          if (REVERSE) sum[i][P] += r2[c] * y2, sum[i][N] += r2[c] * y1;
          y1 = !REVERSE && starts ? x1[c] : y1 * left[c];
          y2 = starts ? x2[c] : y2 * left[c];
          if (!REVERSE) sum[i][P] += r2[c] * y2, sum[i][N] += r2[c] * y1;
        }
      }
    }
    CLA_UNROLL
    for (int i = 0; i < COUNT; i++) {
      CLA_UNROLL
      for (int m = 0; m < MATRICES; m++) {
        CLA_UNROLL
        for (int d = 8; d < 32; d *= 2) sum[i][m] += shuffle_xor(sum[i][m], d);
        if (quarter == i) diagonal(m, t)[token(i) % SIDE] = sum[i][m];
      }
    }
  }
  CLA_DEVICE void score_block() const {
    Carried of;
    CLA_UNROLL
    for (int i = 0; i < 2; i++) {
      CLA_UNROLL
      for (int m = 0; m < GROUPS; m++) {
        CLA_UNROLL
        for (int c = 0; c < 4; c++) of.x1[i][m][c] = of.x2[i][m][c] = 0.f;
      }
    }
    this->each_step_of_block([&](int t, auto count) { score<decltype(count)::value>(of, t); });
  }
};

template <int R, bool REVERSE, int DTYPE>
CLA_KERNEL(128, R > 64 ? 1 : 2) void delta_prepare_low_rank_kernel(const CLA_CONSTANT cla_delta_sweep s) {
  const int64_t index = block_x() / s.of.heads;
  DeltaPrepareLowRank<R, REVERSE, DTYPE>(s, SegmentOf(s.anchors, s.of.sequences, index), index, block_x() % s.of.heads).run();
}

template <int R, bool REVERSE, int DTYPE> int32_t launch_delta_prepare_low_rank(const cla_delta_sweep &s, void *stream) {
  using Kernel = DeltaPrepareLowRank<R, REVERSE, DTYPE>;
  return launch(delta_prepare_low_rank_kernel<R, REVERSE, DTYPE>, Dims{s.anchors.all * s.of.heads, 1}, Kernel::THREADS, Kernel::SHARED,
                stream, s);
}

}  // namespace cla
