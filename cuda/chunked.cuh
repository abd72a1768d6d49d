// A sweep in chunks of 64 steps on tensor cores, with the state in registers from the first chunk to the last.
//
// Within a chunk, with G_t the sum of the log decays since its start and C its last step,
//
//     P_ts  = read_t . write_s exp(G_t - G_s)       for s <= t (s < t in an exclusive sweep), else 0
//     out_t = exp(G_t) X^T read_t + sum_s P_ts value_s
//     X     = exp(G_C) X + sum_s exp(G_C - G_s) write_s value_s^T
//
// (Yang et al., 2023, https://arxiv.org/abs/2312.06635). A block has one sequence (or segment of one), one head and 64 W
// columns of the state: W warpgroups with 64 columns each. They hold X^T, so that what they accumulate is already the A
// operand of X^T read^T and nothing is transposed anywhere.
#pragma once
#include "chunked_outputs.cuh"

namespace cla {

template <class L> struct Chunked : ChunkOutputs<L> {
  using Base = ChunkOutputs<L>;
  using Base::s, Base::shared, Base::place, Base::steps, Base::read, Base::write, Base::value, Base::gate, Base::out;
  using Base::tid, Base::warp, Base::group, Base::row0, Base::pair, Base::first_column, Base::begin, Base::end;
  using Base::columns, Base::gates, Base::last_segment, Base::read_tile, Base::write_tile;
  using Base::value_tile, Base::scores, Base::count_at, Base::column, Base::waits, Base::finish, Base::flush;
  using Base::fetch_keys, Base::fetch_values, Base::fetch_gates, Base::sums, Base::sums_rest, Base::from_start;
  using Base::split_chunk, Base::to_end, Base::whole, Base::total, Base::gate_pair, Base::sum_gates, Base::start_factor, Base::end_factor;
  using Base::total_of;
  using Base::copy_keys, Base::copy_values, Base::wait_for_keys, Base::wait_for_values, Base::drop_rows;
  using Base::prepare_counts, Base::row_of, Base::store_tile, Base::store_rows;
  using Base::limit, Base::decay_chunk, Base::take_back_decay, Base::count_decay, Base::fill_part;
  using Fetched = typename Base::Fetched;
  static constexpr int R = L::R, THREADS = L::THREADS, COLUMNS = L::COLUMNS, GATES = L::GATES;
  static constexpr bool SCALAR = L::SCALAR, BY_ROW = L::BY_ROW, BY_COLUMN = L::BY_COLUMN, VECTOR = L::VECTOR;
  static constexpr bool WGMMA = HAS_WGMMA;

  float state[R / 8][4];

  CLA_DEVICE Chunked(const cla_sweep &s, const Maps<L> &maps) : Base(s, maps) {}

  // ---- the state ----

  CLA_DEVICE int state_row(int j, int e) const { return 8 * j + pair + (e & 1); }

  // f(element, where it lies in memory from `first` on, its row and column) for those that the state has. Addresses are found
  // whether they are used or not: that is less than to branch, and all loads are under way together.
  template <class F> CLA_DEVICE void each_state(float *first, int64_t row, int64_t col, F f) {
    float *at = first + pair * row + column(0) * col;
    const bool inside[2] = {column(0) < columns(), column(1) < columns()};
    CLA_UNROLL
    for (int j = 0; j < R / 8; j++, at += 8 * row) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) {
        float *x = at + (e & 1 ? row : 0) + (e >> 1 ? 8 * col : 0);
        if (inside[e >> 1] && state_row(j, e) < s.rows) f(state[j][e], x, state_row(j, e), column(e >> 1));
      }
    }
  }

  template <int N> CLA_DEVICE static void zero(float (&x)[N][4]) {
    CLA_UNROLL
    for (int j = 0; j < N; j++) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) x[j][e] = 0.f;
    }
  }

  CLA_DEVICE float *segment_state() const {
    return s.starts + place.index(s.heads, s.segments) * s.rows * (int64_t)s.cols + first_column;
  }

  // What the sweep begins with; copies of rows had better be under way by then.
  CLA_DEVICE void load_state(bool only_state) {
    zero(state);
    if (only_state) return;
    auto load = [](float &x, const float *at, int, int) { x = *at; };
    if (s.segment) {
      each_state(segment_state(), s.cols, 1, load);
    } else if (s.first.data) {
      float *from = s.first.data + place.sequence * s.first.sequence + place.head * s.first.head;
      each_state(from + first_column * s.first.col, s.first.row, s.first.col, load);
      CLA_UNROLL
      for (int j = 0; j < R / 8; j++) {
        CLA_UNROLL
        for (int e = 0; e < 4; e++) state[j][e] *= s.first_scale;
      }
    }
  }

  CLA_DEVICE void store_state() {
    if (!s.last.data || !last_segment()) return;
    float *to = s.last.data + place.sequence * s.last.sequence + place.head * s.last.head;
    float whole = s.last_scale;
    if (SCALAR) whole *= exp_fast(steps.decay_after(gate, 0));
    each_state(to + first_column * s.last.col, s.last.row, s.last.col, [&](float x, float *at, int r, int c) {
      *at = VECTOR ? whole * x * exp_fast(steps.decay_after(gate, BY_ROW ? r : c)) : whole * x;
    });
  }

  CLA_DEVICE void store_segment() {
    each_state(segment_state(), s.cols, 1, [](float x, float *at, int, int) { *at = x; });
    if (SCALAR && block_y() == 0 && tid == 0) s.totals[place.index(s.heads, s.segments)] = total();
    if (VECTOR && (BY_COLUMN || block_y() == 0)) {
      int width = BY_ROW ? s.rows : s.cols;
      float *totals = s.totals + place.index(s.heads, s.segments) * width + (BY_COLUMN ? first_column : 0);
      for (int c = tid; c < gates(); c += THREADS) totals[c] = total_of()[c] * end_factor()[c];
    }
  }

  // Beyond the state's rows and columns the factors are 1.
  CLA_DEVICE void scale_state(const float *factor) {
    CLA_UNROLL
    for (int j = 0; j < R / 8; j++) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) state[j][e] *= factor[BY_ROW ? state_row(j, e) : column(e >> 1)];
    }
  }

  // ---- one chunk ----

  static constexpr int SCORE_COLUMNS = CHUNK / L::W;

  CLA_DEVICE void store_scores(const float (&p)[SCORE_COLUMNS / 8][4], int set) {
    const float *sum = sums(set), *rest = sums_rest(set);
    const int row = 16 * warp + row0;
    float of_row[2], of_rest[2];
    CLA_UNROLL
    for (int h = 0; h < 2; h++) {
      if (SCALAR) of_row[h] = sum[row + 8 * h], of_rest[h] = rest[row + 8 * h];
    }
    CLA_UNROLL
    for (int j = 0; j < SCORE_COLUMNS / 8; j++) {
      const int first = SCORE_COLUMNS * group + 8 * j + pair;
      float of_column[2], of_column_rest[2];
      CLA_UNROLL
      for (int i = 0; i < 2; i++) {
        if (SCALAR) of_column[i] = sum[first + i], of_column_rest[i] = rest[first + i];
      }
      CLA_UNROLL
      for (int h = 0; h < 2; h++) {
        const int at_row = row + 8 * h, t = row_of(at_row), seen = t + (s.inclusive ? 1 : 0);
        float x[2];
        CLA_UNROLL
        for (int i = 0; i < 2; i++) {
          const int at = row_of(first + i);
          x[i] = at < seen ? p[j][2 * h + i] : 0.f;
          if (SCALAR && at < t) x[i] *= exp2_fast((of_row[h] - of_column[i]) + (of_rest[h] - of_column_rest[i]));
        }
        store_parts(scores(set, 0), scores(set, 1), at_row, first, x);
      }
    }
  }

  CLA_DEVICE void add_scores(float (&p)[SCORE_COLUMNS / 8][4], int stage) {
    const Tile r = read_tile(stage, 0), w = write_tile(stage, 0);
    add_rows_by_rows<WGMMA, SCORE_COLUMNS>(p, r, w, SCORE_COLUMNS * group, R);
    if constexpr (L::KEY_PARTS == 2) {
      add_rows_by_rows<WGMMA, SCORE_COLUMNS>(p, read_tile(stage, 1), w, SCORE_COLUMNS * group, R);
      add_rows_by_rows<WGMMA, SCORE_COLUMNS>(p, r, write_tile(stage, 1), SCORE_COLUMNS * group, R);
    }
  }
  CLA_DEVICE void add_scored_values(float (&acc)[8][4], int stage, int set) {
    const Tile v = own_values(stage, 0);
    const bool upwards = L::AHEAD && s.reverse;
    add_columns_by_rows<WGMMA>(acc, v, scores(set, 0), upwards);
    if (L::VALUE_PARTS == 2) add_columns_by_rows<WGMMA>(acc, own_values(stage, 1), scores(set, 0), upwards);
    add_columns_by_rows<WGMMA>(acc, v, scores(set, 1), upwards);
  }
  CLA_DEVICE void decay_from_start(float (&acc)[8][4], int set) const {
    CLA_UNROLL
    for (int j = 0; j < 8; j++) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) acc[j][e] *= from_start(set)[8 * j + pair + (e & 1)];
    }
  }

  // The state as A operands. Where the machine reads them while the warps go on, as many as there are registers for are held
  // at a time; otherwise each is packed as it is needed.
  static constexpr int STATE_STEPS = R / 16;
  static constexpr int HELD = !WGMMA ? 1 : R < 128 || L::AHEAD ? STATE_STEPS : L::W == 1 ? 2 : 4;
  struct StateOperand {
    uint32_t high[HELD][4], rest[HELD][4];
  };
  CLA_DEVICE void pack_step(StateOperand &a, int held, int step) const {
    to_a<R>(a.high[held], state, 16 * step);
    to_a_rest<R>(a.rest[held], a.high[held], state, 16 * step);
  }
  CLA_DEVICE void pack_state(StateOperand &a, int first) const {
    CLA_UNROLL
    for (int k = 0; k < HELD; k++) pack_step(a, k, first + k);
  }
  // The first are packed already.
  CLA_DEVICE void add_state_times_read(float (&acc)[8][4], StateOperand &a, int stage) {
    CLA_UNROLL
    for (int first = 0; first < STATE_STEPS; first += HELD) {
      if (first > 0) {
        products_commit<WGMMA>();
        products_wait<WGMMA, 0>();
        pack_state(a, first);
        products_fence<WGMMA>();
      }
      CLA_UNROLL
      for (int k = 0; k < HELD; k++) {
        const int at = 16 * (first + k);
        add_parts_by_rows<WGMMA>(acc, read_tile(stage, 0), at, 0, a.high[k], a.rest[k]);
        if (L::KEY_PARTS == 2) add_parts_by_rows<WGMMA>(acc, read_tile(stage, 1), at, 0, a.high[k]);
      }
    }
  }

  // The warpgroup's columns of the values.
  CLA_DEVICE Tile own_values(int stage, int part) const { return value_tile(stage, part).from_column(64 * group); }

  // The state's decay over the chunk, and its writes.
  CLA_DEVICE void update_state(int stage, int set) {
    const Tile v = own_values(stage, 0), w = write_tile(stage, 0);
    if constexpr (SCALAR) {
      if (tid == 0) total() *= whole(set);
      CLA_UNROLL
      for (int j = 0; j < R / 8; j++) {
        CLA_UNROLL
        for (int e = 0; e < 4; e++) state[j][e] *= whole(set);
      }
      uint32_t a[4][4], rest[4][4];
      CLA_UNROLL
      for (int k = 0; k < 4; k++) {
        uint32_t y[4], y_rest[4];
        load_a_transposed(y, v, 16 * k, 16 * warp);
        if (L::VALUE_PARTS == 2) load_a_transposed(y_rest, own_values(stage, 1), 16 * k, 16 * warp);
        CLA_UNROLL
        for (int i = 0; i < 4; i++) {
          const float *f = to_end(set) + 16 * k + pair + 8 * (i >> 1);
          float low = low_bf16(y[i]), high = high_bf16(y[i]);
          if (L::VALUE_PARTS == 2) low += low_bf16(y_rest[i]), high += high_bf16(y_rest[i]);
          low *= f[0], high *= f[1];
          a[k][i] = pack_bf16(low, high);
          rest[k][i] = pack_rest(a[k][i], low, high);
        }
      }
      products_fence<WGMMA>();
      CLA_UNROLL
      for (int k = 0; k < 4; k++) {
        add_parts_by_columns<WGMMA, R>(state, w, 16 * k, a[k], rest[k]);
        if (L::KEY_PARTS == 2) add_parts_by_columns<WGMMA, R>(state, write_tile(stage, 1), 16 * k, a[k]);
      }
    } else {
      products_fence<WGMMA>();
      add_columns_by_columns<WGMMA, R>(state, v, w);
      if (L::VALUE_PARTS == 2) add_columns_by_columns<WGMMA, R>(state, own_values(stage, 1), w);
      if (L::KEY_PARTS == 2) add_columns_by_columns<WGMMA, R>(state, v, write_tile(stage, 1));
    }
    products_commit<WGMMA>();
  }

  // Queues what a chunk reads of the state, and stores its scores; `meanwhile` runs while these products do.
  template <class F> CLA_DEVICE void start_reading(float (&acc)[8][4], int stage, int set, F meanwhile) {
    float p[SCORE_COLUMNS / 8][4];
    zero(p);
    zero(acc);
    StateOperand a;
    pack_state(a, 0);
    products_fence<WGMMA>();
    add_scores(p, stage);
    products_commit<WGMMA>();
    add_state_times_read(acc, a, stage);
    products_commit<WGMMA>();
    meanwhile();
    products_wait<WGMMA, 1>();
    store_scores(p, set);
  }

  // Steps from..to of the chunk at `step`, whose tiles are in `stage`; `meanwhile` runs while
  // the first products do.
  template <class F> CLA_DEVICE void solve(int stage, int set, int64_t step, int from, int to, bool only_state, F meanwhile) {
    if (VECTOR) scale_state(start_factor());
    if (only_state || !out.data) {
      update_state(stage, set);
      meanwhile();
      products_wait<WGMMA, 0>();
      return;
    }
    float acc[8][4];
    start_reading(acc, stage, set, meanwhile);
    // Outputs may be written once all have read.
    if (L::OUT_OF_READ) products_wait<WGMMA, 0>();
    shared_fence();
    barrier();
    if (SCALAR) {
      products_wait<WGMMA, 0>();
      decay_from_start(acc, set);
    }
    products_fence<WGMMA>();
    add_scored_values(acc, stage, set);
    products_commit<WGMMA>();
    update_state(stage, set);
    products_wait<WGMMA, 1>();
    finish(acc, stage, step, from, to);
    products_wait<WGMMA, 0>();
  }

  // ---- the sweep ----

  CLA_DEVICE void run(bool only_state) {
    if (SCALAR && tid == 0) total() = 1.f;
    if (VECTOR) {
      for (int c = tid; c < GATES; c += THREADS) total_of()[c] = end_factor()[c] = 1.f;
      if (tid == 0) limit() = CHUNK;
    }
    const bool results = !only_state && out.data;
    if constexpr (L::COMPACT) results ? run_compact<true>(only_state) : run_compact<false>(only_state);
    else if constexpr (L::AHEAD) results ? run_ahead<true>(only_state) : run_ahead<false>(only_state);
    else if constexpr (L::COPIED) run_staged(only_state);
    else run_filled(only_state);
    if (only_state || VECTOR) barrier();
    if (VECTOR) scale_state(end_factor());
    only_state ? store_segment() : store_state();
  }

  // Chunks that are copied to shared memory ahead of their turn, the scores of each computed in its predecessor's: the tensor
  // cores have work while a state is packed and scores are stored. One thread asks for all copies, and for outputs to go out.
  template <bool RESULTS> CLA_DEVICE void run_ahead(bool only_state) {
    if (begin >= end) return load_state(only_state);
    typename Base::Pair gates_ahead = {0.f, 0.f};
    // Each warp sums up the gates of one of as many chunks as there are warps, two chunks before the first of them is due.
    constexpr int WARPS = THREADS / 32;
    const int own = tid / 32;
    if (SCALAR) {
      if (own < 2) sum_gates(own, gate_pair(begin + own * CHUNK));
      gates_ahead = gate_pair(begin + (2 + own) * CHUNK);
    }
    prepare_counts();
    barrier();
    if (tid == 0) {
      copy_keys(0, begin, RESULTS);
      copy_keys(1, begin + CHUNK, RESULTS);
      copy_values(0, begin);
    }
    load_state(only_state);
    wait_for_keys(0);
    float p[SCORE_COLUMNS / 8][4], acc[8][4];
    if (RESULTS) {
      zero(p);
      products_fence<WGMMA>();
      add_scores(p, 0);
      products_commit<WGMMA>();
      products_wait<WGMMA, 0>();
      store_scores(p, 0);
    }
    int n = 0;
    int64_t step = begin;
    for (; step < end; step += CHUNK, n++) {
      if (RESULTS && L::OUT_SETS == 2 && tid == 0) wait_for_stores();
      const bool more = step + CHUNK < end;
      if (more) wait_for_keys(n + 1);
      wait_for_values(n);
      if (!more) drop_rows(n, step);
      shared_fence();
      barrier();
      if (tid == 0) {
        copy_keys(n + 2, step + 2 * CHUNK, RESULTS);
        copy_values(n + 1, step + CHUNK);
        if (RESULTS && n > 0) store_tile(n - 1, step - CHUNK);
      }
      if (RESULTS) {
        // A part of the state is packed while the product of the one before runs.
        StateOperand a;
        zero(acc);
        CLA_UNROLL
        for (int k = 0; k < STATE_STEPS; k++) {
          const int held = k % HELD;
          pack_step(a, held, k);
          products_fence<WGMMA>();
          add_parts_by_rows<WGMMA>(acc, read_tile(n, 0), 16 * k, 0, a.high[held], a.rest[held]);
        }
        products_commit<WGMMA>();
        if (SCALAR) {
          products_wait<WGMMA, 0>();
          decay_from_start(acc, n);
        }
        zero(p);
        products_fence<WGMMA>();
        // Behind the last chunk its own again, for nobody.
        add_scores(p, more ? n + 1 : n);
        products_commit<WGMMA>();
        add_scored_values(acc, n, n);
        products_commit<WGMMA>();
      }
      update_state(n, n);
      if (SCALAR && n % WARPS == 0) {
        sum_gates(n + 2 + own, gates_ahead);
        gates_ahead = gate_pair(step + (2 + WARPS + own) * CHUNK);
      }
      if (RESULTS) {
        products_wait<WGMMA, 2>();
        store_scores(p, n + 1);
        if (L::OUT_SETS == 1) {
          if (tid == 0) wait_for_stores();
          barrier();
        }
        products_wait<WGMMA, 1>();
        finish(acc, n, step, 0, count_at(step));
      }
      products_wait<WGMMA, 0>();
    }
    if (RESULTS) {
      if (tid == 0) wait_for_stores();
      barrier();
      store_rows(n - 1, step - CHUNK);
    }
  }

  // Chunks that are copied to shared memory ahead of their turn.
  CLA_DEVICE void run_staged(bool only_state) {
    load_state(only_state);
    if (SCALAR && tid < 32 && begin < end) sum_gates(0, gate_pair(begin));
    Fetched f = {{*this, read}, {*this, write}, {*this, value}, {*this, out}};
    fetch_chunk(f, 0, begin);
    int stage = 0;
    for (int64_t step = begin; step < end; step += CHUNK, stage ^= 1) {
      copies_wait<0>();
      shared_fence();
      barrier();
      const int count = count_at(step);
      bool whole = true;
      // What waits lies where this chunk's decays or operands go.
      if (L::STAGED && waits) flush(f.out, stage ^ 1, step - CHUNK);
      if constexpr (L::STAGED) {
        if constexpr (VECTOR) decay_chunk();
        else split_chunk();
        shared_fence();
        barrier();
      }
      if constexpr (L::STAGED && VECTOR) {
        whole = limit() != 0;
        if (whole && only_state) count_decay();
        if (!whole) {
          barrier();
          take_back_decay();
        }
      }
      if (whole) fetch_chunk(f, stage ^ 1, step + CHUNK);
      int from = 0;
      do {
        const int to = whole ? count : Base::fill_part_apart(s, step, from, count);
        solve(stage, stage, step, from, to, only_state, [&] {
          if (!L::STAGED && waits) flush(f.out, stage ^ 1, step - CHUNK);
          if (SCALAR && tid < 32 && step + CHUNK < end) sum_gates(stage ^ 1, gate_pair(step + CHUNK));
        });
        if (!whole && waits) {
          barrier();
          flush(f.out, stage, step, from, to);
        }
        from = to;
      } while (VECTOR && from < count);
      if (!whole) fetch_chunk(f, stage ^ 1, step + CHUNK);
    }
    if (waits) flush_last(f, stage ^ 1, begin + (end - begin - 1) / CHUNK * CHUNK);
  }

  // Chunks whose keys are copied to shared memory ahead of their turn, and whose values while their first products run.
  template <bool RESULTS> CLA_DEVICE void run_compact(bool only_state) {
    if (begin >= end) return load_state(only_state);
    if (SCALAR && tid < 32) sum_gates(0, gate_pair(begin));
    Fetched f = {{*this, read}, {*this, write}, {*this, value}, {*this, out}};
    fetch_keys(f, 0, begin);
    copies_commit();
    load_state(only_state);
    int stage = 0;
    int64_t step = begin;
    for (; step < end; step += CHUNK, stage ^= 1) {
      copies_wait<0>();
      shared_fence();
      barrier();
      // Where outputs lie where keys go, a thread's pieces of either are the same: it has read its own before it copies.
      if (waits) flush(f.out, stage ^ 1, step - CHUNK);
      fetch_values(f, 0, step);
      copies_commit();
      fetch_keys(f, stage ^ 1, step + CHUNK);
      copies_commit();
      float acc[8][4];
      if (RESULTS) {
        start_reading(acc, stage, stage, [] {});
        products_wait<WGMMA, 0>();
        if (SCALAR) decay_from_start(acc, stage);
      }
      if (SCALAR && tid < 32 && step + CHUNK < end) sum_gates(stage ^ 1, gate_pair(step + CHUNK));
      copies_wait<1>();
      shared_fence();
      barrier();
      products_fence<WGMMA>();
      if (RESULTS) add_scored_values(acc, stage, stage);
      products_commit<WGMMA>();
      update_state(stage, stage);
      products_wait<WGMMA, 1>();
      if (RESULTS) finish(acc, stage, step, 0, count_at(step));
      products_wait<WGMMA, 0>();
    }
    if (waits) flush_last(f, stage ^ 1, step - CHUNK);
  }

  // What waits of the last chunk.
  CLA_DEVICE void flush_last(Fetched &f, int stage, int64_t step) {
    barrier();
    flush(f.out, stage, step);
  }

  // Chunks whose operands are made from the inputs on the spot.
  CLA_DEVICE void run_filled(bool only_state) {
    load_state(only_state);
    int set = 0;
    for (int64_t step = begin; step < end; step += CHUNK, set ^= 1) {
      const int count = count_at(step);
      int from = 0;
      do {
        if (SCALAR && tid < 32) sum_gates(set, gate_pair(step));
        const int to = fill_part(step, from, count);
        solve(0, set, step, from, to, only_state, [] {});
        from = to;
      } while (VECTOR && from < count);
    }
  }

  CLA_DEVICE void fetch_chunk(Fetched &f, int stage, int64_t step) {
    fetch_keys(f, stage, step);
    fetch_values(f, stage, step);
    if constexpr (L::STAGED && VECTOR) fetch_gates(step);
    copies_commit();
  }
};

template <class L>
CLA_KERNEL(L::THREADS, L::W == 1 ? 2 : 1)
void chunked_kernel(const CLA_CONSTANT cla_sweep s, const CLA_CONSTANT Maps<L> maps, int only_state) {
  Chunked<L> sweep(s, maps);
  if (sweep.begin >= sweep.end && sweep.place.segment > 0) return;
  sweep.run(only_state);
}

}  // namespace cla
