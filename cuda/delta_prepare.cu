// What a chunked delta sweep needs of each segment that does not depend on the state: see delta_chunk.cuh.
#include "delta_chunk.cuh"

namespace cla {

template <int R> struct DeltaPrepare {
  static constexpr int THREADS = 128, PITCH = 72, SYSTEM_PITCH = 68;
  // The tiles of k and q make room for those of T and P.
  static constexpr int TILES = 4 * SUBTILE, KEY = R * 128;
  static_assert(2 * KEY <= TILES, "both fit");
  static constexpr int FADES = TILES, SYSTEM = FADES + 4 * CHUNK * PITCH, GATES = SYSTEM + 4 * CHUNK * SYSTEM_PITCH;
  static constexpr int FACTORS = GATES + 4 * CHUNK, SHARED = FACTORS + 1024;

  const cla_delta_sweep &s;
  unsigned char *shared;
  int tid, lane, warp, row0, pair, head;
  SegmentSteps at;
  Rows gate;
  unsigned char *to;

  CLA_DEVICE DeltaPrepare(const cla_delta_sweep &s, const SegmentOf &of, int64_t index, int head)
      : s(s), shared(shared_memory()), head(head), at(s.of, of.sequence, of.segment, s.reverse), gate(s.of.gate, at.steps.batch, head) {
    tid = thread_index();
    lane = tid & 31;
    warp = tid >> 5;
    row0 = lane >> 2;
    pair = (lane & 3) * 2;
    to = s.prepared + (index * s.of.heads + head) * Prepared::BYTES;
  }

  CLA_DEVICE Tile tile(int which) const { return {shared + which * KEY}; }
  CLA_DEVICE Tile prepared(int which) const { return {shared + which * SUBTILE}; }
  // Of what is written at one step, what is left at a later one.
  CLA_DEVICE float *fades(int row) const { return (float *)(shared + FADES) + row * PITCH; }
  CLA_DEVICE float *system(int row) const { return (float *)(shared + SYSTEM) + row * SYSTEM_PITCH; }
  CLA_DEVICE float *gates() const { return (float *)(shared + GATES); }
  CLA_DEVICE float *factors() const { return (float *)(shared + FACTORS); }

  CLA_DEVICE void load() {
    const Rows q(s.of.q, at.steps.batch, head), k(s.of.k, at.steps.batch, head), beta(s.of.beta, at.steps.batch, head);
    fetch_tile<R, THREADS>(tile(0), k, at, s.of.k_dim, tid);
    fetch_tile<R, THREADS>(tile(1), q, at, s.of.k_dim, tid);
    copies_commit();
    if (tid < CHUNK) {
      // The decay between two tokens is that of the later one. In reverse the last one's is due at the end.
      const int row = s.reverse ? tid - 1 : tid;
      const bool fades = s.of.gate_kind != CLA_NO_GATE && row >= 0 && tid < at.count;
      gates()[tid] = fades ? gate.load(at.token(row), 0) : 0.f;
      factors()[Prepared::BETA + tid] = tid < at.count ? beta.load(at.token(tid), 0) : 0.f;
    }
    copies_wait<0>();
    barrier();
  }

  CLA_DEVICE void sum_gates() {
    const float last = s.reverse && s.of.gate_kind != CLA_NO_GATE ? exp_fast(gate.load(at.token(at.count - 1), 0)) : 1.f;
    each_fade<THREADS>(gates(), tid, [&](int t, int from, float left) {
      if (from < 0) factors()[Prepared::FROM_START + t] = left;
      else fades(t)[from] = left;
      if (t == CHUNK - 1) factors()[from < 0 ? Prepared::WHOLE : Prepared::TO_END + from] = last * left;
    });
  }

  // The lower triangles of K K^T and P.
  CLA_DEVICE void multiply() {
    float l[4][2][4], p[4][2][4];
    CLA_UNROLL
    for (int j = 0; j < 4; j++) {
      CLA_UNROLL
      for (int e = 0; e < 8; e++) l[j][e / 4][e % 4] = p[j][e / 4][e % 4] = 0.f;
    }
    const Tile k = tile(0), rows = tile(s.reverse ? 0 : 1), columns = tile(s.reverse ? 1 : 0);
    CLA_UNROLL_TWICE
    for (int c = 0; c < R; c += 16) {
      uint32_t a[4], b[4], x[4], y[4];
      load_a(a, k, 16 * warp, c);
      load_a(x, rows, 16 * warp, c);
      CLA_UNROLL
      for (int j = 0; j < 4; j++) {
        if (j > warp) continue;
        load_b(b, k, 16 * j, c);
        load_b(y, columns, 16 * j, c);
        mma16(l[j][0], l[j][1], a, b);
        mma16(p[j][0], p[j][1], x, y);
      }
    }
    barrier();  // the tiles have been read
    CLA_UNROLL
    for (int j = 0; j < 4; j++) {
      CLA_UNROLL
      for (int e = 0; e < 8; e += 2) {
        // e / 4: 8 columns on; e / 2 % 2: 8 rows on.
        const int t = 16 * warp + row0 + 8 * (e / 2 % 2), first = 16 * j + 8 * (e / 4) + pair;
        float x[2], y[2];
        CLA_UNROLL
        for (int i = 0; i < 2; i++) {
          const int at = first + i;
          const float left = at <= t ? fades(t)[at] : 0.f;
          x[i] = at <= t ? left * p[j][e / 4][e % 4 + i] : 0.f;
          y[i] = at < t ? left * l[j][e / 4][e % 4 + i] * factors()[Prepared::BETA + at] : 0.f;
        }
        store_parts(prepared(2), prepared(3), t, first, x);
        system(t)[first] = y[0];
        system(t)[first + 1] = y[1];
      }
    }
    barrier();
  }

  // A thread has a column of T.
  CLA_DEVICE void invert() {
    if (tid >= CHUNK) return;
    float x[CHUNK];
    CLA_UNROLL
    for (int t = 0; t < CHUNK; t++) {
      float sum[4] = {t == tid ? 1.f : 0.f, 0.f, 0.f, 0.f};
      CLA_UNROLL
      for (int k = 0; k < t; k += 4) {
        float row[4];
        load4(row, system(t) + k);
        CLA_UNROLL
        for (int i = 0; i < 4; i++) {
          if (k + i < t) sum[i] -= row[i] * x[k + i];
        }
      }
      x[t] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
    CLA_UNROLL
    for (int t = 0; t < CHUNK; t++) {
      const uint16_t high = to_bf16(x[t]);
      *prepared(0).element(t, tid) = high;
      *prepared(1).element(t, tid) = to_bf16(x[t] - from_bf16(high));
    }
  }

  CLA_DEVICE void run() {
    load();
    sum_gates();
    barrier();
    multiply();
    invert();
    barrier();
    for (int i = 16 * tid; i < Prepared::FACTORS; i += 16 * THREADS) store16(to + i, load16(shared + i));
    for (int i = 16 * tid; i < 4 * (3 * CHUNK + 4); i += 16 * THREADS) {
      store16(to + Prepared::FACTORS + i, load16(shared + FACTORS + i));
    }
  }
};

template <int R> CLA_KERNEL(128, 3) void delta_prepare_kernel(cla_delta_sweep s) {
  const int64_t index = block_x() / s.of.heads;
  DeltaPrepare<R>(s, SegmentOf(s.anchors, s.of.sequences, index), index, block_x() % s.of.heads).run();
}

template <int R> int32_t launch_delta_prepare(const cla_delta_sweep &s, void *stream) {
  using Kernel = DeltaPrepare<R>;
  return launch(delta_prepare_kernel<R>, Dims{s.anchors.all * s.of.heads, 1}, Kernel::THREADS, Kernel::SHARED, stream, s);
}

}  // namespace cla

extern "C" int32_t cla_delta_prepare(const cla_delta_sweep *sweep, void *stream) {
  return sweep->of.k_dim <= 64 ? cla::launch_delta_prepare<64>(*sweep, stream) : cla::launch_delta_prepare<128>(*sweep, stream);
}
