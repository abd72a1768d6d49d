// What the gradients in matrix form have in common where a decay has a number for each channel of a key. It is no factor of
// scores then, which are plain products, but of the terms they are summed with,
//
//     (A K)_tc = sum_s A_ts K_sc exp(g_{s+1,c} + ... + g_tc)
//
// and no two operands of a product give that for every gate. Between two blocks of steps they do: keys fade to the start of the
// later block, in f32 and step by step, and what their product gives fades on from there. So a sum goes from block to block and
// is faded between them, and within a block of 16 from step to step, on ordinary cores. All factors are at most what decays are.
#pragma once
#include "delta_chunk_gradients.cuh"

namespace cla {

// At: where decays are in shared memory, CHUNK x R floats, and by channel what a block leaves (WHOLE), BLOCKS x R, sums of what
// stands behind the segment (FIRST), the same, the product of the state with the gradient behind (BEHIND), and terms (TERMS).
template <int R, int V, int DTYPE, class At> struct DeltaChunkGradientsFaded : DeltaChunkGradients<R, V, DTYPE> {
  using Base = DeltaChunkGradients<R, V, DTYPE>;
  using Base::c, Base::shared, Base::tid, Base::rows, Base::row0, Base::pair, Base::at, Base::tile, Base::rows_of;
  using Base::channel, Base::key_pair, Base::THREADS, Base::TILES;
  static constexpr int BLOCK = 16, BLOCKS = CHUNK / BLOCK, PITCH = R + 8;
  static_assert(BLOCKS * R / 2 <= THREADS, "threads have the channels of all blocks");

  CLA_DEVICE DeltaChunkGradientsFaded(const cla_delta_gradient &c, const SegmentOf &of, int64_t index, int head)
      : Base(c, of, index, head) {}

  CLA_DEVICE float *floats(int at) const { return (float *)(shared + at); }
  CLA_DEVICE float *decay(int t) const { return floats(At::DECAYS) + t * R; }
  CLA_DEVICE float *whole(int block) const { return floats(At::WHOLE) + block * R; }
  CLA_DEVICE int block() const { return rows / BLOCK; }

  // ---- decays, and keys with them, by all threads ----

  CLA_DEVICE void load_decays() const {
    cla::load_decays<R, THREADS>(rows_of(c.of.gate), at, 0, c.of.k_dim, tid, [this](int step) { return decay(step); });
  }
  // Two channels of a block's steps each.
  CLA_DEVICE int own_block() const { return tid / (R / 2); }
  CLA_DEVICE int own_pair() const { return tid % (R / 2) * 2; }
  CLA_DEVICE void multiply_decays() const {
    if (own_block() >= BLOCKS) return;
    float x[2] = {1.f, 1.f};
    CLA_UNROLL_TWICE
    for (int i = 0; i < BLOCK; i++) {
      const float *of = decay(own_block() * BLOCK + i) + own_pair();
      x[0] *= of[0], x[1] *= of[1];
    }
    whole(own_block())[own_pair()] = x[0];
    whole(own_block())[own_pair() + 1] = x[1];
  }
  // A key with decays, in two parts.
  struct Faded {
    Tile high, rest;
  };
  CLA_DEVICE void store_faded(const Faded &to, int slot, int key, int t, const float (&left)[2]) const {
    float x[2];
    unpack_pair<DTYPE>(x, *(const uint32_t *)tile(key).element(t, own_pair()));
    x[0] *= left[0], x[1] *= left[1];
    store_parts(to.high, to.rest, slot * BLOCK + t % BLOCK, own_pair(), x);
  }
  // A key of each block but the last with the decays to its end.
  CLA_DEVICE void fade_earlier(const Faded &to, int key) const {
    const int slot = own_block();
    if (slot >= BLOCKS - 1) return;
    float left[2] = {1.f, 1.f};
    CLA_UNROLL_TWICE
    for (int t = slot * BLOCK + BLOCK - 1; t >= slot * BLOCK; t--) {
      store_faded(to, slot, key, t, left);
      left[0] *= decay(t)[own_pair()], left[1] *= decay(t)[own_pair() + 1];
    }
  }
  // A key of each block but the first with the decays from its start on.
  CLA_DEVICE void fade_later(const Faded &to, int key) const {
    const int slot = own_block();
    if (slot == 0 || slot >= BLOCKS) return;
    float left[2] = {1.f, 1.f};
    CLA_UNROLL_TWICE
    for (int t = slot * BLOCK; t < slot * BLOCK + BLOCK; t++) {
      left[0] *= decay(t)[own_pair()], left[1] *= decay(t)[own_pair() + 1];
      store_faded(to, slot, key, t, left);
    }
  }

  // ---- sums over steps, by the warp that has them: M of them, each of N keys with scores for each ----

  template <int M> CLA_DEVICE static void copy(float (&to)[M][TILES][4], const float (&from)[M][TILES][4]) {
    CLA_UNROLL
    for (int m = 0; m < M; m++) {
      CLA_UNROLL
      for (int i = 0; i < 4 * TILES; i++) to[m][i / 4][i % 4] = from[m][i / 4][i % 4];
    }
  }
  // Two numbers of shared memory for the thread's channels of a tile.
  CLA_DEVICE const float *of_channels(const float *row, int j) const { return row + channel() + 8 * j + pair; }
  CLA_DEVICE void fade_by(float (&acc)[TILES][4], const float *row) const {
    CLA_UNROLL
    for (int j = 0; j < TILES; j++) {
      const float *of = of_channels(row, j);
      const float x = of[0], y = of[1];
      acc[j][0] *= x, acc[j][1] *= y, acc[j][2] *= x, acc[j][3] *= y;
    }
  }
  template <int M> CLA_DEVICE void fade_by(float (&acc)[M][TILES][4], const float *row) const {
    CLA_UNROLL
    for (int m = 0; m < M; m++) fade_by(acc[m], row);
  }
  // acc += 16 columns of scores, or rows of them transposed, from `from`, by the faded keys in a slot.
  template <bool TRANSPOSED>
  CLA_DEVICE void add_block(float (&acc)[TILES][4], int scores, int from, const Faded &keys, int slot) const {
    uint32_t high[4], low[4];
    if (TRANSPOSED) {
      load_a_transposed(high, tile(scores), from, rows);
      load_a_transposed(low, tile(scores, 1, SUBTILE), from, rows);
    } else {
      load_a(high, tile(scores), rows, from);
      load_a(low, tile(scores, 1, SUBTILE), rows, from);
    }
    CLA_UNROLL
    for (int j = 0; j < TILES; j += 2) {
      uint32_t key[4], rest[4];
      load_b_transposed(key, keys.high, slot * BLOCK, channel() + 8 * j);
      load_b_transposed(rest, keys.rest, slot * BLOCK, channel() + 8 * j);
      mma16(acc[j], acc[j + 1], high, key);
      mma16(acc[j], acc[j + 1], high, rest);
      mma16(acc[j], acc[j + 1], low, key);
    }
  }
  template <bool TRANSPOSED, int M, int N>
  CLA_DEVICE void add_blocks(float (&acc)[M][TILES][4], const int (&scores)[M][N], int from, const Faded (&keys)[N],
                             int slot) const {
    CLA_UNROLL
    for (int m = 0; m < M; m++) {
      CLA_UNROLL
      for (int n = 0; n < N; n++) add_block<TRANSPOSED>(acc[m], scores[m][n], from, keys[n], slot);
    }
  }
  // What earlier blocks add to what acc has from before the segment, all of it faded to the start of the warp's block.
  template <int M, int N>
  CLA_DEVICE void add_earlier(float (&acc)[M][TILES][4], const int (&scores)[M][N], const Faded (&keys)[N]) const {
    CLA_NO_UNROLL
    for (int from = 0; from < block(); from++) {
      fade_by(acc, whole(from));
      add_blocks<false>(acc, scores, from * BLOCK, keys, from);
    }
  }
  // The same of later blocks, faded back to the end of the warp's. `first` only fades.
  template <int M, int N>
  CLA_DEVICE void add_later(float (&acc)[M][TILES][4], float (&first)[M][TILES][4], const int (&scores)[M][N],
                            const Faded (&keys)[N]) const {
    CLA_NO_UNROLL
    for (int from = BLOCKS - 1; from > block(); from--) {
      fade_by(acc, whole(from));
      fade_by(first, whole(from));
      add_blocks<true>(acc, scores, from * BLOCK, keys, from);
    }
  }
  // The thread's two channels of a tile and of step t or s, by h: acc = decay (acc + the scores times the keys' step).
  template <int M, int N>
  CLA_DEVICE void add_step(float (&acc)[M][TILES][4], const float (&scores)[M][N], const float (&keys)[N][2], const float *left,
                           int j, int h) const {
    CLA_UNROLL
    for (int m = 0; m < M; m++) {
      CLA_UNROLL
      for (int i = 0; i < 2; i++) {
        float x = acc[m][j][2 * h + i];
        CLA_UNROLL
        for (int n = 0; n < N; n++) x += scores[m][n] * keys[n][i];
        acc[m][j][2 * h + i] = left[i] * x;
      }
    }
  }
  template <int N> CLA_DEVICE void load_keys(float (&x)[N][2], const int (&keys)[N], int step, int j) const {
    CLA_UNROLL
    for (int n = 0; n < N; n++) key_pair(x[n], keys[n], step, j);
  }
  template <int M, int N> CLA_DEVICE void load_scores(float (&x)[M][N], const int (&scores)[M][N], int t, int s) const {
    CLA_UNROLL
    for (int m = 0; m < M; m++) {
      CLA_UNROLL
      for (int n = 0; n < N; n++) {
        x[m][n] = from_bf16(*tile(scores[m][n]).element(t, s)) + from_bf16(*tile(scores[m][n], 1, SUBTILE).element(t, s));
      }
    }
  }
  // Within the block, from its start on: x = exp(g_0) x, then x = exp(g_{s+1}) (x + A_ts K_s) for each step s before t.
  template <int M, int N>
  CLA_DEVICE void add_own_earlier(float (&acc)[M][TILES][4], const int (&scores)[M][N], const int (&keys)[N]) const {
    fade_by(acc, decay(rows));
    CLA_NO_UNROLL
    for (int s = rows; s + 1 < rows + BLOCK; s++) {
      CLA_UNROLL
      for (int h = 0; h < 2; h++) {
        const int t = rows + row0 + 8 * h;
        if (t <= s) continue;
        float of[M][N], key[N][2];
        load_scores(of, scores, t, s);
        CLA_UNROLL
        for (int j = 0; j < TILES; j++) {
          load_keys(key, keys, s, j);
          add_step(acc, of, key, of_channels(decay(s + 1), j), j, h);
        }
      }
    }
  }
  // Within the block, back from its end: x = exp(g_t) (x + A_ts Q_t) for each step t after s.
  template <int M, int N>
  CLA_DEVICE void add_own_later(float (&acc)[M][TILES][4], float (&first)[M][TILES][4], const int (&scores)[M][N],
                                const int (&keys)[N]) const {
    CLA_NO_UNROLL
    for (int t = rows + BLOCK - 1; t > rows; t--) {
      CLA_UNROLL
      for (int h = 0; h < 2; h++) {
        const int s = rows + row0 + 8 * h;
        if (t <= s) continue;
        float of[M][N], key[N][2];
        load_scores(of, scores, t, s);
        CLA_UNROLL
        for (int j = 0; j < TILES; j++) {
          const float *left = of_channels(decay(t), j);
          load_keys(key, keys, t, j);
          add_step(acc, of, key, left, j, h);
          CLA_UNROLL
          for (int m = 0; m < M; m++) first[m][j][2 * h] *= left[0], first[m][j][2 * h + 1] *= left[1];
        }
      }
    }
  }

  // ---- the gradient of the gate ----

  // f(number, that of the key's at its step and channel)
  template <class F> CLA_DEVICE void each_with_key(const float (&acc)[TILES][4], int which, F f) const {
    CLA_UNROLL
    for (int j = 0; j < TILES; j++) {
      CLA_UNROLL
      for (int h = 0; h < 2; h++) {
        float key[2];
        key_pair(key, which, rows + row0 + 8 * h, j);
        f(j, 2 * h, acc[j][2 * h] * key[0]);
        f(j, 2 * h + 1, acc[j][2 * h + 1] * key[1]);
      }
    }
  }
  // Whether the step of the e-th number has another behind it in the segment.
  CLA_DEVICE bool has_next(int e) const { return rows + row0 + 8 * (e >> 1) + 1 < at.count; }
  // What stands behind the segment has from each of its writes, `first` by key: sums over the warp's rows.
  template <int M> CLA_DEVICE void give_first(const float (&first)[M][TILES][4], const int (&keys)[M]) const {
    float sum[TILES][2];
    CLA_UNROLL
    for (int j = 0; j < TILES; j++) sum[j][0] = sum[j][1] = 0.f;
    CLA_UNROLL
    for (int m = 0; m < M; m++) {
      each_with_key(first[m], keys[m], [&](int j, int e, float x) { sum[j][e & 1] += has_next(e) ? x : 0.f; });
    }
    CLA_UNROLL
    for (int j = 0; j < TILES; j++) {
      CLA_UNROLL
      for (int i = 0; i < 2; i++) {
        float x = sum[j][i];
        x += shuffle_xor(x, 4);
        x += shuffle_xor(x, 8);
        x += shuffle_xor(x, 16);
        if (row0 == 0) floats(At::FIRST)[block() * R + channel() + 8 * j + pair + i] = x;
      }
    }
  }
  CLA_DEVICE void give_terms(const float (&terms)[TILES][4]) const {
    CLA_UNROLL
    for (int j = 0; j < TILES; j++) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) {
        floats(At::TERMS)[(rows + row0 + 8 * (e >> 1)) * PITCH + channel() + 8 * j + pair + (e & 1)] = terms[j][e];
      }
    }
  }
  // By the thread of a channel: sums of terms from each step to the end of the segment, with what stands behind it.
  CLA_DEVICE void store_gate() const {
    if (tid >= c.of.k_dim) return;
    const Rows dg = rows_of(c.dg);
    float left = 1.f;
    double sum = 0.;
    CLA_UNROLL
    for (int block = 0; block < BLOCKS; block++) {
      left *= whole(block)[tid];
      sum += (double)floats(At::FIRST)[block * R + tid];
    }
    sum += (double)(left * floats(At::BEHIND)[tid]);
    CLA_UNROLL_EIGHT
    for (int t = at.count - 1; t >= 0; t--) {
      sum = decay(t)[tid] == 0.f ? 0. : sum + (double)floats(At::TERMS)[t * PITCH + tid];
      dg.store(at.token(t), tid, (float)sum);
    }
  }
  // The gradient behind, in place of the state, and their product.
  CLA_DEVICE void load_behind() const {
    this->template split_state<true>(c.ends, [&](int row, float x) {
      CLA_UNROLL
      for (int d = 1; d < V / 8; d *= 2) x += shuffle_xor(x, d);
      if (tid % (V / 8) == 0) floats(At::BEHIND)[row] = x;
    });
  }
  template <int M>
  CLA_DEVICE void finish_gate(const float (&terms)[TILES][4], const float (&first)[M][TILES][4], const int (&keys)[M]) const {
    if (!c.dg.data) return;
    give_first(first, keys);
    barrier();
    give_terms(terms);
    barrier();
    store_gate();
  }
};

}  // namespace cla
