// Decays within a chunk: their sums, and operands that have them multiplied in.
#pragma once
#include "chunked_inputs.cuh"

namespace cla {

// Sums of log decays are in binary logarithms: a factor, and what divides by it, is then one instruction.
constexpr double LOG2_E = 1.4426950408889634;
// How far the decay along rows or columns may go, as such a sum, within the steps that are solved at once: e^40. Each
// factor is taken relative to a step in the middle and must stay far from the ends of f32 and bf16.
constexpr float DECAY_RANGE = (float)(40 * LOG2_E);
// exp of it is 0 in f32. A stronger gate, -inf too, is taken for this one, which leaves the sums finite.
constexpr float STRONGEST_DECAY = -110.f;

template <class L> struct ChunkGates : ChunkInputs<L> {
  using Base = ChunkInputs<L>;
  using Base::s, Base::steps, Base::read, Base::write, Base::value, Base::gate, Base::tid, Base::lane, Base::warp;
  using Base::end, Base::columns, Base::gates, Base::read_tile;
  using Base::write_tile, Base::value_tile, Base::raw_tile, Base::raw_row, Base::raw_gates, Base::raw_gate_row;
  using Base::gates_in_tile, Base::READ, Base::WRITE, Base::VALUE;
  using Base::factors, Base::decays, Base::totals, Base::writing;
  static constexpr int R = L::R, THREADS = L::THREADS, COLUMNS = L::COLUMNS, GATES = L::GATES, PITCH = L::PITCH;
  static constexpr bool SCALAR = L::SCALAR, BY_ROW = L::BY_ROW, BY_COLUMN = L::BY_COLUMN, VECTOR = L::VECTOR;

  CLA_DEVICE ChunkGates(const cla_sweep &s, const Maps<L> &maps) : Base(s, maps) {}

  // ---- one decay for the whole state ----
  // A chunk's are in one of several sets, in the order of the rows of its tiles.

  CLA_DEVICE float *sums(int set) const { return factors() + set % L::FACTOR_SETS * (4 * CHUNK + 4); }  // G_t log2(e)
  CLA_DEVICE float *sums_rest(int set) const { return sums(set) + CHUNK; }                     // and what f32 left of it
  CLA_DEVICE float *from_start(int set) const { return sums(set) + 2 * CHUNK; }                // exp(G_t)
  CLA_DEVICE float *to_end(int set) const { return sums(set) + 3 * CHUNK; }                    // exp(G_C - G_t)
  CLA_DEVICE float &whole(int set) const { return sums(set)[4 * CHUNK]; }                      // exp(G_C)
  CLA_DEVICE float &total() const { return sums(0)[4 * CHUNK + 1]; }                           // exp of all chunks' so far

  struct Pair {
    float x, y;
  };
  CLA_DEVICE Pair gate_pair(int64_t step) const {
    Pair g = {0.f, 0.f};
    if (step + 2 * lane < end) g.x = steps.decay_before(gate, step + 2 * lane, 0);
    if (step + 2 * lane + 1 < end) g.y = steps.decay_before(gate, step + 2 * lane + 1, 0);
    return g;
  }
  // By one warp. The sums reach thousands where decay is strong and their differences matter: double, then two f32.
  CLA_DEVICE void sum_gates(int set, Pair g) {
    const double x = LOG2_E * larger(g.x, STRONGEST_DECAY), y = LOG2_E * larger(g.y, STRONGEST_DECAY);
    double sum = x + y;
    CLA_UNROLL
    for (int d = 1; d < 32; d *= 2) {
      double before = shuffle_up(sum, d);
      if (lane >= d) sum += before;
    }
    double all = shuffle(sum, 31);
    double at[2] = {sum - y, sum};
    CLA_UNROLL
    for (int i = 0; i < 2; i++) {
      const int t = this->row_of(2 * lane + i);
      sums(set)[t] = (float)at[i];
      sums_rest(set)[t] = (float)(at[i] - (float)at[i]);
      from_start(set)[t] = exp2_fast((float)at[i]);
      to_end(set)[t] = exp2_fast((float)(all - at[i]));
    }
    if (lane == 0) whole(set) = exp2_fast((float)all);
  }

  // ---- a decay for each row or column ----

  // The state is decayed from anchor to anchor, and up to its end after the last.

  CLA_DEVICE float *start_factor() const { return factors(); }             // exp of what is due up to it, from the last
  CLA_DEVICE float *end_factor() const { return factors() + GATES; }       // exp of what follows it
  CLA_DEVICE float *anchor() const { return factors() + 2 * GATES; }       // G at the step in the middle
  CLA_DEVICE float *total_of() const { return factors() + 3 * GATES; }     // exp of all from the segment's start to the anchor
  CLA_DEVICE int &limit() const { return *(int *)(factors() + 4 * GATES); }
  CLA_DEVICE float *last_end_factor() const { return factors() + 4 * GATES + 4; }  // of the chunk before, where it is staged

  // Sums the decays of the chunk's steps from `from` on, until they leave the range. Returns where that is.
  CLA_DEVICE int sum_vector_gates(int64_t step, int from, int count) {
    // The decay before a step of a reverse sweep is that of the step before.
    const int tid = opaque(this->tid);
    const int shift = s.reverse ? 1 : 0, first = step == 0 && from < shift ? shift : from;
    this->template each8<GATES>(gate, first, count, gates(), [&](int row) { return steps.token(step + row - shift); },
                 [&](int row, int c, float(&x)[8]) {
                   CLA_UNROLL
                   for (int k = 0; k < 8; k++) decays()[row * PITCH + c + k] = (float)LOG2_E * x[k];
                 });
    barrier();
    for (int c = tid; c < GATES; c += THREADS) {
      float *decay = decays() + c;
      start_factor()[c] = decay[from * PITCH];
      decay[from * PITCH] = 0.f;
      float sum = 0.f, least = 0.f, most = 0.f;
      int t = from + 1;
      while (t < count) {
        float next[8];
        CLA_UNROLL
        for (int i = 0; i < 8; i++) next[i] = t + i < count ? decay[(t + i) * PITCH] : 0.f;
        bool stop = false;
        CLA_UNROLL
        for (int i = 0; i < 8; i++) {
          if (stop || t + i >= count) continue;
          sum += next[i];
          least = sum < least ? sum : least;
          most = sum > most ? sum : most;
          if (!(most - least <= DECAY_RANGE)) {
            stop = true;
            atomic_min(&limit(), t + i);
          } else {
            decay[(t + i) * PITCH] = sum;
          }
        }
        if (stop) break;
        t += 8;
      }
    }
    if (tid == 0) atomic_min(&limit(), count);
    barrier();
    const int to = limit(), middle = (from + to) / 2;
    for (int c = tid; c < GATES; c += THREADS) {
      const float at = decays()[middle * PITCH + c], last = decays()[(to - 1) * PITCH + c];
      anchor()[c] = at;
      start_factor()[c] = end_factor()[c] * exp2_fast(start_factor()[c] + at);
      end_factor()[c] = exp2_fast(last - at);
      total_of()[c] *= start_factor()[c];
    }
    barrier();
    if (tid == 0) limit() = CHUNK;
    return to;
  }

  // ---- operands from what is staged ----

  CLA_DEVICE Vec2 &four_at(Tile tile, int at) const { return *(Vec2 *)(tile.base + at); }

  // As they are, in two parts: a thread has the same 8 columns of several rows.
  template <int WIDTH> CLA_DEVICE void split_staged(int which, Tile high, Tile low) const {
    const int tid = opaque(this->tid);
    CLA_UNROLL
    for (int i = 0; i < CHUNK * WIDTH / 8 / THREADS; i++) {
      const int row = tid / (WIDTH / 8) + i * (8 * THREADS / WIDTH), c = tid % (WIDTH / 8) * 8;
      Vec4 first, second = {0, 0, 0, 0};
      if constexpr (L::IN == CLA_F32) first = load16(raw_row(which, row) + c), second = load16(raw_row(which, row) + c + 4);
      else first = load16(raw_tile(which).piece(row, c / 8));
      float x[8];
      unpack_eight(x, L::IN, first, second);
      store_parts(high, low, row, c, x);
    }
  }
  // Makes the operands of a whole chunk, without a decay in them.
  CLA_DEVICE void split_chunk() const {
    split_staged<COLUMNS>(VALUE, value_tile(0, 0), value_tile(0, 1));
    split_staged<R>(WRITE, write_tile(0, 0), write_tile(0, 1));
    // Outputs that lay there have gone out.
    if (L::OUT_OF_READ) barrier();
    split_staged<R>(READ, read_tile(0, 0), read_tile(0, 1));
  }

  // With a decay for each row or column, a thread has 4 channels of successive steps, and sums their decays up in registers.

  static constexpr int STEP_GROUPS = THREADS * 4 / GATES, STEPS_EACH = CHUNK / STEP_GROUPS;
  // Where in a tile the i-th of a thread's steps is, from where the first is: those are aligned in blocks of 8 rows, within
  // which the swizzle is an exclusive or.
  static_assert(STEPS_EACH % 8 == 0 || 8 % STEPS_EACH == 0, "a thread's steps are part of a block of 8 rows or some of them");
  CLA_DEVICE static int step_in_tile(int first, int i) { return (first ^ (i & 7) << 4) + i * 128; }
  CLA_DEVICE void staged_gates(float (&g)[4], int at, int row, int c) const {
    if (gates_in_tile()) unpack_four<L::IN>(g, four_at(raw_gates(), at));
    else load4(g, raw_gate_row(row) + c);
  }
  CLA_DEVICE void decay_staged(int which, Tile high, Tile low, int at, int row, int c, const float (&decay)[4],
                               float sign) const {
    float x[4];
    if constexpr (L::IN == CLA_F32) load4(x, raw_row(which, row) + c);
    else unpack_four<L::IN>(x, four_at(raw_tile(which), at));
    CLA_UNROLL
    for (int k = 0; k < 4; k++) x[k] *= exp2_fast(sign * decay[k]);
    uint32_t h[2], l[2];
    split(h, l, x);
    four_at(high, at) = {h[0], h[1]};
    four_at(low, at) = {l[0], l[1]};
  }

  // Between the steps of a chunk the gate of the first is of no account, and a strong one would take bits from all sums: it
  // goes to the factor of the state before, and sums find a zero.
  CLA_DEVICE void take_first_gate(int at, int c) const {
    float g[4];
    staged_gates(g, at, 0, c);
    CLA_UNROLL
    for (int k = 0; k < 4; k++) g[k] = exp2_fast((float)LOG2_E * larger(g[k], STRONGEST_DECAY));
    store4(start_factor() + c, g);
    if (gates_in_tile()) four_at(raw_gates(), at) = {0, 0};
    else store4(raw_gate_row(0) + c, {0.f, 0.f, 0.f, 0.f});
  }
  CLA_DEVICE void add_gates(float (&sum)[4], int at, int row, int c) const {
    float g[4];
    staged_gates(g, at, row, c);
    CLA_UNROLL
    for (int k = 0; k < 4; k++) sum[k] += (float)LOG2_E * larger(g[k], STRONGEST_DECAY);
  }

  // Makes the operands of a whole chunk, with their decay. Where it leaves the range `limit` becomes 0, and they are no use.
  CLA_DEVICE void decay_chunk() {
    const int tid = opaque(this->tid);
    const int c = tid % (GATES / 4) * 4, of = tid / (GATES / 4), first = of * STEPS_EACH;
    const int begins = (int)((unsigned char *)raw_gates().element(first, c) - raw_gates().base);
    if (of == 0) take_first_gate(begins, c);
    float own[4] = {0.f, 0.f, 0.f, 0.f};
    CLA_UNROLL_TWICE
    for (int i = 0; i < STEPS_EACH; i++) add_gates(own, step_in_tile(begins, i), first + i, c);
    store4(totals() + of * GATES + c, own);
    barrier();
    float sum[4] = {0.f, 0.f, 0.f, 0.f}, middle[4] = {0.f, 0.f, 0.f, 0.f}, all[4] = {0.f, 0.f, 0.f, 0.f};
    CLA_UNROLL_TWICE
    for (int i = 0; i < STEP_GROUPS; i++) {
      float t[4];
      load4(t, totals() + i * GATES + c);
      CLA_UNROLL
      for (int k = 0; k < 4; k++) {
        all[k] += t[k];
        if (i < STEP_GROUPS / 2) middle[k] += t[k];
        if (i < of) sum[k] += t[k];
      }
    }
    CLA_UNROLL
    for (int k = 0; k < 4; k++) sum[k] -= middle[k];
    if (of == 0) {
      float last[4], start[4], after[4];
      load4(last, end_factor() + c);
      load4(start, start_factor() + c);
      CLA_UNROLL
      for (int k = 0; k < 4; k++) start[k] *= last[k] * exp2_fast(middle[k]), after[k] = exp2_fast(all[k] - middle[k]);
      store4(last_end_factor() + c, last);
      store4(start_factor() + c, start);
      store4(end_factor() + c, after);
      // The sums below are relative to it already.
      if (BY_COLUMN) store4(anchor() + c, {0.f, 0.f, 0.f, 0.f});
    }
    float most = 0.f;
    CLA_UNROLL_TWICE
    for (int i = 0; i < STEPS_EACH; i++) {
      const int row = first + i, at = step_in_tile(begins, i);
      add_gates(sum, at, row, c);
      CLA_UNROLL
      for (int k = 0; k < 4; k++) most = larger(most, fabsf(sum[k]));
      if constexpr (BY_ROW) {
        decay_staged(READ, read_tile(0, 0), read_tile(0, 1), at, row, c, sum, 1.f);
        decay_staged(WRITE, write_tile(0, 0), write_tile(0, 1), at, row, c, sum, -1.f);
      } else {
        decay_staged(VALUE, value_tile(0, 0), value_tile(0, 1), at, row, c, sum, -1.f);
        store4(decays() + row * PITCH + c, sum);
      }
    }
    if (!(most <= DECAY_RANGE)) limit() = 0;
    if constexpr (BY_ROW && L::STAGED_VALUES) split_staged<COLUMNS>(VALUE, value_tile(0, 0), value_tile(0, 1));
    if constexpr (BY_COLUMN && L::STAGED_KEYS) {
      split_staged<R>(READ, read_tile(0, 0), read_tile(0, 1));
      split_staged<R>(WRITE, write_tile(0, 0), write_tile(0, 1));
    }
  }
  // After a chunk whose decay left the range.
  CLA_DEVICE void take_back_decay() {
    for (int c = tid; c < GATES; c += THREADS) end_factor()[c] = last_end_factor()[c];
    if (tid == 0) limit() = CHUNK;
  }
  CLA_DEVICE void count_decay() {
    for (int c = tid; c < GATES; c += THREADS) total_of()[c] *= start_factor()[c];
  }

  // Steps from..to of the chunk into the parts of a tile, zeros in its other rows. SIGN: the decay since the anchor is
  // multiplied (1) or divided (-1) into the elements.
  template <int WIDTH, int SIGN>
  CLA_DEVICE void fill(Tile high, Tile low, const Rows &rows, int64_t step, int from, int to, int width) {
    this->template each8<WIDTH>(rows, from, to, width, [&](int row) { return steps.token(step + row); },
                 [&](int row, int c, float(&x)[8]) {
                   if (SIGN != 0 && row >= from && row < to && c < width) {
                     CLA_UNROLL
                     for (int k = 0; k < 8; k++) {
                       x[k] *= exp2_fast(SIGN * (decays()[row * PITCH + c + k] - anchor()[c + k]));
                     }
                   }
                   store_parts(high, low, row, c, x);
                 });
  }
  // What is copied is there already, all of it: it multiplies zeros outside of from..to.
  CLA_DEVICE void fill_chunk(int64_t step, int from, int to) {
    if constexpr (L::KEY_PARTS == 2) {
      fill<R, BY_ROW ? 1 : 0>(read_tile(0, 0), read_tile(0, 1), read, step, from, to, s.rows);
      fill<R, BY_ROW ? -1 : 0>(write_tile(0, 0), write_tile(0, 1), write, step, from, writing(step, to), s.rows);
    }
    if constexpr (L::VALUE_PARTS == 2) {
      fill<COLUMNS, BY_COLUMN ? -1 : 0>(value_tile(0, 0), value_tile(0, 1), value, step, from, to, columns());
    }
  }

  // The operands of a part of a chunk, which goes on as long as the decay stays in its range. Returns where it ends.
  CLA_DEVICE int fill_part(int64_t step, int from, int count) {
    barrier();
    const int to = VECTOR ? sum_vector_gates(step, from, count) : count;
    fill_chunk(step, from, to);
    shared_fence();
    barrier();
    return to;
  }
  // The same out of the way of the loop over chunks, which has no use for it unless a gate forgets nearly everything: its
  // instructions would not fit their cache.
  CLA_COLD static int fill_part_apart(const cla_sweep &s, int64_t step, int from, int count) {
    const Maps<L> none = {};
    return ChunkGates(s, none).fill_part(step, from, count);
  }
};

}  // namespace cla
