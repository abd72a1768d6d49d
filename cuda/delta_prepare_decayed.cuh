// What is prepared for the chunked delta sweep where a decay has a number for each channel of a key.
#pragma once
#include "delta_prepare_faded.cuh"

namespace cla {

template <int R, bool REVERSE, int DTYPE>
struct DeltaPrepareDecayed : DeltaPrepareFaded<DeltaPrepareDecayed<R, REVERSE, DTYPE>, R, DTYPE, 2, 2> {
  using Base = DeltaPrepareFaded<DeltaPrepareDecayed, R, DTYPE, 2, 2>;
  using Keys = PreparedKeys<R>;
  using Base::s, Base::tid, Base::lane, Base::head, Base::at, Base::key, Base::decay, Base::factors, Base::prepared;
  using Base::column, Base::diagonal, Base::token, Base::load_row, Base::write_key, Base::SIDE, Base::GROUPS, Base::SYSTEM;
  using Base::P;
  using Fade = typename Base::Fade;
  using Operand = typename Base::Operand;
  using Block = typename Base::Block;

  CLA_DEVICE DeltaPrepareDecayed(const cla_delta_sweep &s, const SegmentOf &of, int64_t index, int head)
      : Base(s, of, index, head, Prepared::BYTES + Keys::BYTES) {}

  CLA_DEVICE Tile keys() const { return key(0); }
  CLA_DEVICE Tile queries() const { return key(1); }
  CLA_DEVICE static Fade reads() { return {true, false}; }
  CLA_DEVICE static Fade writes() { return {false, false}; }
  CLA_DEVICE Operand read(int matrix) const { return {matrix == P && !REVERSE ? queries() : keys(), reads()}; }
  CLA_DEVICE Operand written(int matrix) const { return {matrix == P && REVERSE ? queries() : keys(), writes()}; }
  CLA_DEVICE Tile triangle(int) const { return prepared(2); }
  // -A is L times -beta.
  CLA_DEVICE void scale(float (&x)[8], const Block &of) const {
    if (of.matrix != SYSTEM) return;
    CLA_UNROLL
    for (int e = 0; e < 8; e++) x[e] *= -factors()[Prepared::BETA + SIDE * of.j + column(e)];
  }

  CLA_DEVICE void load() const {
    this->fetch_key(0, s.of.k);
    this->fetch_key(1, s.of.q);
    copies_commit();
    // The decay between two tokens is that of the later one. In reverse the last one's is due at the end.
    this->load_decays(REVERSE ? 1 : 0);
    const Rows beta(s.of.beta, at.steps.batch, head);
    if (tid < CHUNK) factors()[Prepared::BETA + tid] = tid < at.count ? beta.load(at.token(tid), 0) : 0.f;
    copies_wait<0>();
    barrier();
  }
  CLA_DEVICE void write_keys() const {
    write_key(Keys::READS, keys(), reads(), 1.f);
    write_key(Keys::WRITES, keys(), writes(), 1.f);
    if (REVERSE) write_key(Keys::QUERIES, queries(), writes(), s.of.scale);
    else write_key(Keys::QUERIES, queries(), reads(), 1.f);
  }

  struct Carried {
    float k[2][GROUPS][4], q[2][REVERSE ? GROUPS : 1][4];
  };
  template <int COUNT> CLA_DEVICE void score(Carried &of, int t) const {
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
      if (quarter == i) diagonal(SYSTEM, t)[token(i) % SIDE] = l[i], diagonal(P, t)[token(i) % SIDE] = p[i];
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
    this->each_step_of_block([&](int t, auto count) { score<decltype(count)::value>(of, t); });
  }
};

template <int R, bool REVERSE, int DTYPE> CLA_KERNEL(128, 2) void delta_prepare_decayed_kernel(const CLA_CONSTANT cla_delta_sweep s) {
  const int64_t index = block_x() / s.of.heads;
  DeltaPrepareDecayed<R, REVERSE, DTYPE>(s, SegmentOf(s.anchors, s.of.sequences, index), index, block_x() % s.of.heads).run();
}

template <int R, bool REVERSE, int DTYPE> int32_t launch_delta_prepare_decayed(const cla_delta_sweep &s, void *stream) {
  using Kernel = DeltaPrepareDecayed<R, REVERSE, DTYPE>;
  return launch(delta_prepare_decayed_kernel<R, REVERSE, DTYPE>, Dims{s.anchors.all * s.of.heads, 1}, Kernel::THREADS, Kernel::SHARED,
                stream, s);
}

}  // namespace cla
