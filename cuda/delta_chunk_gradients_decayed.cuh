// The gradients in matrix form where a decay has a number for each channel of a key. It is no factor of A and B then, which are
// plain products, but of the terms they are summed with,
//
//     (A K)_tc = sum_s A_ts K_sc exp(g_{s+1,c} + ... + g_tc)
//
// and no two operands of a product give that for every gate. Between two blocks of steps they do: keys fade to the start of the
// later block, in f32 and step by step, and what their product gives fades on from there. So a sum goes from block to block and
// is faded between them, and within a block of 16 from step to step, on ordinary cores. All factors are at most what decays are.
#pragma once
#include "delta_chunk_gradients.cuh"

namespace cla {

template <int R> struct DeltaChunkGradientsDecayed : DeltaChunkGradients<R> {
  using Base = DeltaChunkGradients<R>;
  using Base::c, Base::shared, Base::tid, Base::lane, Base::rows, Base::row0, Base::pair, Base::at, Base::tile, Base::numbers;
  using Base::rows_of, Base::channel, Base::each, Base::add, Base::key_pair, Base::store, Base::fetch_key;
  using Base::THREADS, Base::TILES, Base::KEY, Base::GRAD_OUT, Base::U, Base::STATE, Base::A, Base::B, Base::K, Base::Q;
  using Base::BETA;
  static constexpr int BLOCK = 16, BLOCKS = CHUNK / BLOCK, PITCH = R + 8;
  // Where values were read, when all are: decays, and faded keys in two parts. Later, in place of the state: faded q and k, for
  // which the gradient behind makes room, and then what the gate's gradient is summed up from.
  static constexpr int DECAYS = U, KEYS = GRAD_OUT, KEYS_REST = Q, QUERIES = STATE, LATER_KEYS = STATE + 2 * KEY, TERMS = STATE;
  // By channel: what a block leaves, sums of a block, and the product of the state with the gradient behind.
  static constexpr int WHOLE = Base::SHARED, FIRST = WHOLE + 4 * BLOCKS * R, BEHIND = FIRST + 4 * BLOCKS * R;
  static constexpr int SHARED = BEHIND + 4 * R;
  static_assert(4 * CHUNK * R <= 2 * Base::VALUE && 4 * KEY <= 2 * Base::STATE_PART, "decays and keys have room");
  static_assert(4 * CHUNK * PITCH <= 2 * Base::STATE_PART && BLOCKS * R / 2 <= THREADS, "terms and channels have room");

  CLA_DEVICE DeltaChunkGradientsDecayed(const cla_delta_gradient &c, const SegmentOf &of, int64_t index, int head)
      : Base(c, of, index, head) {}

  CLA_DEVICE float *floats(int at) const { return (float *)(shared + at); }
  CLA_DEVICE float *decay(int t) const { return floats(DECAYS) + t * R; }
  CLA_DEVICE float *whole(int block) const { return floats(WHOLE) + block * R; }
  CLA_DEVICE int block() const { return rows / BLOCK; }

  // ---- decays, and keys with them, by all threads ----

  CLA_DEVICE void load_decays() const {
    constexpr int EVERY = THREADS / R, BATCH = 16;
    const Rows gate = rows_of(c.of.gate);
    const int channel = tid % R;
    CLA_NO_UNROLL
    for (int first = tid / R; first < CHUNK; first += BATCH * EVERY) {
      float x[BATCH];
      CLA_UNROLL
      for (int i = 0; i < BATCH; i++) {
        const int row = first + i * EVERY;
        x[i] = row < at.count && channel < c.of.k_dim ? gate.load(at.token(row), channel) : 0.f;
      }
      CLA_UNROLL
      for (int i = 0; i < BATCH; i++) decay(first + i * EVERY)[channel] = exp_fast(x[i]);
    }
  }
  // Two channels of a block's steps each.
  CLA_DEVICE int own_block() const { return tid / (R / 2); }
  CLA_DEVICE int own_pair() const { return tid % (R / 2) * 2; }
  CLA_DEVICE void multiply_decays() const {
    if (own_block() >= BLOCKS) return;
    float x[2] = {1.f, 1.f};
    CLA_UNROLL
    for (int i = 0; i < BLOCK; i++) {
      const float *of = decay(own_block() * BLOCK + i) + own_pair();
      x[0] *= of[0], x[1] *= of[1];
    }
    whole(own_block())[own_pair()] = x[0];
    whole(own_block())[own_pair() + 1] = x[1];
  }
  CLA_DEVICE void store_faded(Tile high, Tile rest, int slot, int key, int t, const float (&left)[2]) const {
    const uint32_t of_key = *(const uint32_t *)tile(key).element(t, own_pair());
    const float x[2] = {left[0] * low_bf16(of_key), left[1] * high_bf16(of_key)};
    store_parts(high, rest, slot * BLOCK + t % BLOCK, own_pair(), x);
  }
  // Keys of each block but the last with the decays to its end, and in its place those of the first with the decays to the end
  // of the second.
  CLA_DEVICE void fade_keys() const {
    const int slot = own_block(), of = slot == BLOCKS - 1 ? 0 : slot;
    if (slot >= BLOCKS) return;
    float left[2] = {1.f, 1.f};
    if (slot != of) left[0] = whole(1)[own_pair()], left[1] = whole(1)[own_pair() + 1];
    CLA_UNROLL
    for (int t = of * BLOCK + BLOCK - 1; t >= of * BLOCK; t--) {
      store_faded(tile(KEYS), tile(KEYS_REST), slot, K, t, left);
      left[0] *= decay(t)[own_pair()], left[1] *= decay(t)[own_pair() + 1];
    }
  }
  // q and k of each block but the first with the decays from its start on, and in its place those of the last with the decays
  // from the start of the third.
  CLA_DEVICE void fade_later() const {
    const int slot = own_block(), of = slot == 0 ? BLOCKS - 1 : slot;
    if (slot >= BLOCKS) return;
    float left[2] = {1.f, 1.f};
    if (slot != of) left[0] = whole(2)[own_pair()], left[1] = whole(2)[own_pair() + 1];
    CLA_UNROLL
    for (int t = of * BLOCK; t < of * BLOCK + BLOCK; t++) {
      left[0] *= decay(t)[own_pair()], left[1] *= decay(t)[own_pair() + 1];
      store_faded(tile(QUERIES), tile(QUERIES, 1, KEY), slot, Q, t, left);
      store_faded(tile(LATER_KEYS), tile(LATER_KEYS, 1, KEY), slot, K, t, left);
    }
  }

  // ---- sums over steps, by the warp that has them ----

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
  // acc += 16 columns of scores, or rows of them transposed, from `from`, by the faded keys in a slot.
  template <bool TRANSPOSED> CLA_DEVICE void add_block(float (&acc)[TILES][4], int scores, int from, Tile keys, Tile rest, int slot) const {
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
      uint32_t key[4], of_rest[4];
      load_b_transposed(key, keys, slot * BLOCK, channel() + 8 * j);
      load_b_transposed(of_rest, rest, slot * BLOCK, channel() + 8 * j);
      mma16(acc[j], acc[j + 1], high, key);
      mma16(acc[j], acc[j + 1], high, of_rest);
      mma16(acc[j], acc[j + 1], low, key);
    }
  }
  // What earlier blocks add to what acc has from before the segment, all of it faded to the start of the warp's block.
  CLA_DEVICE void add_earlier(float (&acc)[TILES][4], int scores) const {
    const Tile keys = tile(KEYS), rest = tile(KEYS_REST);
    if (block() >= 2) {
      fade_by(acc, whole(0));
      fade_by(acc, whole(1));
      add_block<false>(acc, scores, 0, keys, rest, 3);
      add_block<false>(acc, scores, BLOCK, keys, rest, 1);
    }
    if (block() % 2 == 1) {
      fade_by(acc, whole(block() - 1));
      add_block<false>(acc, scores, (block() - 1) * BLOCK, keys, rest, block() - 1);
    }
  }
  // The same of later blocks, faded back to the end of the warp's. `first` only fades.
  CLA_DEVICE void add_later(float (&acc)[TILES][4], float (&first)[TILES][4]) const {
    auto fade = [&](int block) {
      fade_by(acc, whole(block));
      fade_by(first, whole(block));
    };
    auto add = [&](int from, int slot) {
      add_block<true>(acc, A, from, tile(QUERIES), tile(QUERIES, 1, KEY), slot);
      add_block<true>(acc, B, from, tile(LATER_KEYS), tile(LATER_KEYS, 1, KEY), slot);
    };
    if (block() < 2) {
      fade(3);
      fade(2);
      add(2 * BLOCK, 2);
      add(3 * BLOCK, 0);
    }
    if (block() % 2 == 0) {
      fade(block() + 1);
      add((block() + 1) * BLOCK, block() + 1);
    }
  }
  CLA_DEVICE float score(int which, int t, int s) const {
    return from_bf16(*tile(which).element(t, s)) + from_bf16(*tile(which, 1, SUBTILE).element(t, s));
  }
  // Within the block, from its start on: x = exp(g_0) x, then x = exp(g_{s+1}) (x + A_ts K_s) for each step s before t.
  CLA_DEVICE void add_own_earlier(float (&of_q)[TILES][4], float (&of_k)[TILES][4]) const {
    fade_by(of_q, decay(rows));
    fade_by(of_k, decay(rows));
    CLA_NO_UNROLL
    for (int s = 0; s + 1 < BLOCK; s++) {
      CLA_UNROLL
      for (int h = 0; h < 2; h++) {
        const int t = row0 + 8 * h;
        if (t <= s) continue;
        const float a = score(A, rows + t, rows + s), b = score(B, rows + t, rows + s);
        CLA_UNROLL
        for (int j = 0; j < TILES; j++) {
          const float *left = of_channels(decay(rows + s + 1), j);
          const uint32_t key = key_pair(K, rows + s, j);
          const float k[2] = {low_bf16(key), high_bf16(key)};
          CLA_UNROLL
          for (int i = 0; i < 2; i++) {
            float &q = of_q[j][2 * h + i], &r = of_k[j][2 * h + i];
            q = left[i] * (q + a * k[i]);
            r = left[i] * (r + b * k[i]);
          }
        }
      }
    }
  }
  // Within the block, back from its end: x = exp(g_t) (x + A_ts Q_t + B_ts K_t) for each step t after s.
  CLA_DEVICE void add_own_later(float (&acc)[TILES][4], float (&first)[TILES][4]) const {
    CLA_NO_UNROLL
    for (int t = BLOCK - 1; t > 0; t--) {
      CLA_UNROLL
      for (int h = 0; h < 2; h++) {
        const int s = row0 + 8 * h;
        if (t <= s) continue;
        const float a = score(A, rows + t, rows + s), b = score(B, rows + t, rows + s);
        CLA_UNROLL
        for (int j = 0; j < TILES; j++) {
          const float *left = of_channels(decay(rows + t), j);
          const uint32_t query = key_pair(Q, rows + t, j), key = key_pair(K, rows + t, j);
          const float q[2] = {low_bf16(query), high_bf16(query)}, k[2] = {low_bf16(key), high_bf16(key)};
          CLA_UNROLL
          for (int i = 0; i < 2; i++) {
            float &x = acc[j][2 * h + i];
            x = left[i] * (x + a * q[i] + b * k[i]);
            first[j][2 * h + i] *= left[i];
          }
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
        const uint32_t key = key_pair(which, rows + row0 + 8 * h, j);
        f(j, 2 * h, acc[j][2 * h] * low_bf16(key));
        f(j, 2 * h + 1, acc[j][2 * h + 1] * high_bf16(key));
      }
    }
  }
  CLA_DEVICE bool has_next(int e) const { return rows + row0 + 8 * (e >> 1) + 1 < at.count; }
  // What stands behind the segment has from each of its writes: sums over the warp's rows.
  CLA_DEVICE void give_first(const float (&first)[TILES][4]) const {
    float sum[TILES][2];
    CLA_UNROLL
    for (int j = 0; j < TILES; j++) sum[j][0] = sum[j][1] = 0.f;
    each_with_key(first, K, [&](int j, int e, float x) { sum[j][e & 1] += has_next(e) ? x : 0.f; });
    CLA_UNROLL
    for (int j = 0; j < TILES; j++) {
      CLA_UNROLL
      for (int i = 0; i < 2; i++) {
        float x = sum[j][i];
        x += shuffle_xor(x, 4);
        x += shuffle_xor(x, 8);
        x += shuffle_xor(x, 16);
        if (row0 == 0) floats(FIRST)[block() * R + channel() + 8 * j + pair + i] = x;
      }
    }
  }
  CLA_DEVICE void give_terms(const float (&terms)[TILES][4]) const {
    CLA_UNROLL
    for (int j = 0; j < TILES; j++) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) {
        floats(TERMS)[(rows + row0 + 8 * (e >> 1)) * PITCH + channel() + 8 * j + pair + (e & 1)] = terms[j][e];
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
      sum += (double)floats(FIRST)[block * R + tid];
    }
    sum += (double)(left * floats(BEHIND)[tid]);
    CLA_UNROLL_EIGHT
    for (int t = at.count - 1; t >= 0; t--) {
      sum = decay(t)[tid] == 0.f ? 0. : sum + (double)floats(TERMS)[t * PITCH + tid];
      dg.store(at.token(t), tid, (float)sum);
    }
  }

  CLA_DEVICE void run() const {
    this->load();
    this->find_scores([](int, int) { return 1.f; });
    float of_q[TILES][4], of_k[TILES][4], terms[TILES][4], first[TILES][4];
    this->multiply_reads(of_q, of_k, [&](int step) { return this->state_at(step); });
    each(of_q, [&](float &x, int, int) { x *= c.of.scale; });
    each(of_k, [&](float &x, int t, int) { x *= -numbers(BETA)[t]; });
    barrier();
    load_decays();
    barrier();
    multiply_decays();
    barrier();
    fade_keys();
    barrier();
    add_earlier(of_q, A);
    add_earlier(of_k, B);
    add_own_earlier(of_q, of_k);
    barrier();
    fetch_key(Q, c.of.q);
    this->template split_state<true>(c.ends, [&](int row, float x) {
      CLA_UNROLL
      for (int d = 1; d < Base::V / 8; d *= 2) x += shuffle_xor(x, d);
      if (tid % (Base::V / 8) == 0) floats(BEHIND)[row] = x;
    });
    copies_wait<0>();
    barrier();
    each_with_key(of_q, Q, [&](int j, int e, float x) { terms[j][e] = x; });
    each_with_key(of_k, K, [&](int j, int e, float x) { terms[j][e] += x; });
    store(c.dq, of_q, K);
    this->multiply_writes(of_q);
    CLA_UNROLL
    for (int j = 0; j < TILES; j++) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) first[j][e] = of_q[j][e];
    }
    barrier();
    fade_later();
    barrier();
    add_later(of_q, first);
    add_own_later(of_q, first);
    // What the last token wrote is not in what the sums begin with.
    each_with_key(of_q, K, [&](int j, int e, float x) { terms[j][e] -= has_next(e) ? x : 0.f; });
    add(of_q, of_k);
    store(c.dk, of_q, Q);
    this->store_beta();
    if (!c.dg.data) return;
    give_first(first);
    barrier();
    give_terms(terms);
    barrier();
    store_gate();
  }
};

}  // namespace cla
