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
#include "elements.cuh"
#include "chunked_layout.cuh"

namespace cla {

// How far the decay along rows or columns may go, in natural logarithms, within the steps that are solved at once: each
// factor is taken relative to a step in the middle and must stay far from the ends of f32 and bf16.
constexpr float DECAY_RANGE = 40.f;
// exp of it is 0 in f32. A stronger decay, -inf too, is taken for this one, which leaves the sums finite.
constexpr float STRONGEST_DECAY = -110.f;

template <int ROWS, int W, bool NARROW, bool BF16_OUT, int GATE> struct Chunked {
  using L = ChunkLayout<ROWS, W, NARROW, BF16_OUT, GATE>;
  static constexpr int R = ROWS, THREADS = L::THREADS, COLUMNS = L::COLUMNS, GATES = L::GATES, PITCH = L::PITCH;
  static constexpr bool SCALAR = L::SCALAR, BY_ROW = L::BY_ROW, BY_COLUMN = L::BY_COLUMN, VECTOR = L::VECTOR;
  static constexpr bool WGMMA = HAS_WGMMA && ROWS <= 128;

  const cla_sweep &s;
  unsigned char *shared;
  Place place;
  Steps steps;
  Rows read, write, value, gate, out;
  int tid, lane, warp, group, row0, pair, first_column;
  int64_t begin, end;
  bool in_pieces[3], gate_in_pieces, out_in_pieces;
  bool out_waits;  // a chunk of it, in shared memory
  float state[R / 8][4];

  CLA_DEVICE Chunked(const cla_sweep &s)
      : s(s), shared(shared_memory()), place(block_x(), s.heads, s.segments),
        steps(s.cu_seqlens, s.tokens, place.sequence, s.reverse), read(s.read, steps.batch, place.head),
        write(s.write, steps.batch, place.head), value(s.value, steps.batch, place.head),
        gate(s.gate, steps.batch, place.head), out(s.out, steps.batch, place.head) {
    tid = thread_index();
    lane = tid & 31;
    warp = (tid >> 5) & 3;
    group = tid >> 7;
    row0 = lane >> 2;
    pair = (lane & 3) * 2;
    first_column = block_y() * COLUMNS;
    begin = s.segment ? place.segment * s.segment : 0;
    end = steps.count;
    if (s.segment && begin + s.segment < end) end = begin + s.segment;
    if (!s.writes) write.data = nullptr;
    value.data += value.data ? first_column * value.element * value.size() : 0;
    out.data += out.data ? first_column * out.element * out.size() : 0;
    if (BY_COLUMN) gate.data += first_column * gate.element * gate.size();
    in_pieces[0] = read.in_pieces(s.rows);
    in_pieces[1] = write.in_pieces(s.rows);
    in_pieces[2] = value.in_pieces(columns());
    gate_in_pieces = VECTOR && gate.in_pieces(gates());
    out_in_pieces = (L::WIDE_OUT ? out.dtype == CLA_F32 : BF16_OUT && out.dtype == CLA_BF16) && out.in_pieces(columns());
    out_waits = false;
  }

  // Of this block's columns, those that the state has.
  CLA_DEVICE int columns() const { return s.cols - first_column < COLUMNS ? s.cols - first_column : COLUMNS; }
  CLA_DEVICE int gates() const { return BY_ROW ? s.rows : columns(); }
  CLA_DEVICE bool last_segment() const { return end == steps.count; }
  CLA_DEVICE Tile key_tile(int stage, int which, int part) const {
    return {shared + ((stage % L::KEY_STAGES * L::KEY_PARTS + part) * 2 + which) * L::KEY};
  }
  CLA_DEVICE Tile read_tile(int stage, int part) const { return key_tile(stage, 0, part); }
  CLA_DEVICE Tile write_tile(int stage, int part) const { return key_tile(stage, 1, part); }
  CLA_DEVICE Tile value_tile(int stage, int part) const {
    return {shared + L::VALUES + (stage % L::VALUE_STAGES * L::VALUE_PARTS + part) * L::VALUE};
  }
  // Of what is still to be decayed: read and write, or the value.
  CLA_DEVICE Tile raw_tile(int which) const { return {shared + L::RAW + which * L::KEY}; }
  CLA_DEVICE Tile raw_gates() const { return {shared + L::RAW_GATES}; }
  CLA_DEVICE Tile scores(int part) const { return {shared + L::SCORES + part * SUBTILE}; }
  CLA_DEVICE Tile out_tile() const { return {shared + L::OUT}; }
  CLA_DEVICE float *wide_out() const { return (float *)(shared + L::OUT); }
  CLA_DEVICE float *factors() const { return (float *)(shared + L::FACTORS); }
  CLA_DEVICE float *decays() const { return (float *)(shared + L::DECAYS); }
  CLA_DEVICE float *totals() const { return (float *)(shared + L::TOTALS); }

  // ---- the state ----

  // The thread's columns of the state (rows of its transpose) within the block, h = 0 or 1.
  CLA_DEVICE int column(int h) const { return 64 * group + 16 * warp + row0 + 8 * h; }
  CLA_DEVICE int state_row(int j, int e) const { return 8 * j + pair + (e & 1); }

  template <class F> CLA_DEVICE void each_state(F f) {
    CLA_UNROLL
    for (int j = 0; j < R / 8; j++) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) {
        int r = state_row(j, e), c = column(e >> 1);
        if (r < s.rows && c < columns()) f(state[j][e], r, c);
      }
    }
  }

  CLA_DEVICE void zero_state() {
    CLA_UNROLL
    for (int j = 0; j < R / 8; j++) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) state[j][e] = 0.f;
    }
  }

  CLA_DEVICE float *segment_state() const {
    return s.starts + place.index(s.heads, s.segments) * s.rows * (int64_t)s.cols + first_column;
  }

  CLA_DEVICE void load_state() {
    zero_state();
    if (s.segment) {
      const float *from = segment_state();
      each_state([&](float &x, int r, int c) { x = from[(int64_t)r * s.cols + c]; });
    } else if (s.first.data) {
      const float *from = s.first.data + place.sequence * s.first.sequence + place.head * s.first.head;
      each_state([&](float &x, int r, int c) { x = s.first_scale * from[r * s.first.row + (first_column + c) * s.first.col]; });
    }
  }

  CLA_DEVICE void store_state() {
    if (!s.last.data || !last_segment()) return;
    float *to = s.last.data + place.sequence * s.last.sequence + place.head * s.last.head;
    float whole = s.last_scale;
    if (SCALAR) whole *= exp_fast(steps.decay_after(gate, 0));
    each_state([&](float &x, int r, int c) {
      float y = whole * x;
      if (VECTOR) y *= exp_fast(steps.decay_after(gate, BY_ROW ? r : c));
      to[r * s.last.row + (first_column + c) * s.last.col] = y;
    });
  }

  CLA_DEVICE void store_segment() {
    float *to = segment_state();
    each_state([&](float &x, int r, int c) { to[(int64_t)r * s.cols + c] = x; });
    if (SCALAR && block_y() == 0 && tid == 0) s.totals[place.index(s.heads, s.segments)] = total();
    if (VECTOR && (BY_COLUMN || block_y() == 0)) {
      int width = BY_ROW ? s.rows : s.cols;
      float *totals = s.totals + place.index(s.heads, s.segments) * width + (BY_COLUMN ? first_column : 0);
      for (int c = tid; c < gates(); c += THREADS) totals[c] = total_of()[c];
    }
  }

  // ---- loading ----

  // 2 N elements in bf16 to `high`, and what that leaves out to `low`.
  template <int N> CLA_DEVICE static void split(uint32_t (&high)[N], uint32_t (&low)[N], const float (&x)[2 * N]) {
    CLA_UNROLL
    for (int i = 0; i < N; i++) {
      high[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
      low[i] = pack_rest(high[i], x[2 * i], x[2 * i + 1]);
    }
  }
  // One or two parts.
  CLA_DEVICE static void store8(Tile high, Tile low, bool both, int row, int c, const float (&x)[8]) {
    uint32_t h[4], l[4];
    split(h, l, x);
    store16(high.piece(row, c / 8), {h[0], h[1], h[2], h[3]});
    if (both) store16(low.piece(row, c / 8), {l[0], l[1], l[2], l[3]});
  }

  // A thread's 16-byte pieces of the rows of a chunk: the same piece of every EVERY-th row, so that one address and one
  // stride lead to all of them, in memory and in a tile (EVERY is a multiple of 8, the period of the swizzle).
  template <int WIDTH> struct Pieces {
    static constexpr int PART = WIDTH < THREADS ? WIDTH : THREADS, PARTS = WIDTH / PART;  // columns at a time
    static constexpr int EACH = CHUNK * PART / 8 / THREADS, EVERY = THREADS * 8 / PART;
    static_assert(EVERY % 8 == 0 && EACH * EVERY == CHUNK && PARTS * PART == WIDTH, "pieces cover the chunk");
    unsigned char *data;  // of the step at hand
    int64_t stride;       // bytes between EVERY steps
    int row, column;

    CLA_DEVICE Pieces(const Chunked &sweep, const Rows &rows)
        : row(sweep.tid / (PART / 8)), column(sweep.tid % (PART / 8) * 8) {
      const int64_t step = sweep.s.reverse ? -2 * rows.token : 2 * rows.token;
      stride = EVERY * step;
      data = rows.data + 2 * column + sweep.steps.token(0) * rows.token * 2 + (sweep.begin + row) * step;
    }
    CLA_DEVICE void next_chunk() { data += EACH * stride; }
  };

  template <int WIDTH>
  CLA_DEVICE void fetch(Tile to, Pieces<WIDTH> &at, const Rows &rows, int64_t step, int count, int width, bool pieces) {
    CLA_UNROLL
    for (int part = 0; part < at.PARTS; part++) {
      const int column = at.column + part * at.PART;
      if (pieces) {
        unsigned char *into = to.piece(at.row, column / 8);
        CLA_UNROLL
        for (int i = 0; i < at.EACH; i++) {
          const bool valid = column < width && at.row + i * at.EVERY < count;
          copy16_async(into + i * at.EVERY * 128, at.data + part * at.PART * 2 + i * at.stride, valid);
        }
      } else {
        for (int i = 0; i < at.EACH; i++) {
          const int row = at.row + i * at.EVERY;
          const bool valid = row < count;
          float x[8];
          CLA_UNROLL
          for (int k = 0; k < 8; k++) x[k] = valid && column + k < width ? rows.load(steps.token(step + row), column + k) : 0.f;
          store8(to, to, false, row, column, x);
        }
      }
    }
    at.next_chunk();
  }
  CLA_DEVICE int count_at(int64_t step) const { return end - step < CHUNK ? (int)(end - step) : CHUNK; }
  // Of the chunk's steps up to `to`, those that write.
  CLA_DEVICE int writing(int64_t step, int to) const { return to > 0 && !steps.writes(s, step + to - 1) ? to - 1 : to; }
  struct Fetched {
    Pieces<R> read, write;
    Pieces<COLUMNS> value, out;
  };
  CLA_DEVICE void fetch_chunk(Fetched &f, int stage, int64_t step) {
    if (step < end) {
      const int count = count_at(step);
      const Tile r = BY_ROW ? raw_tile(0) : read_tile(stage, 0), w = BY_ROW ? raw_tile(1) : write_tile(stage, 0);
      fetch(r, f.read, read, step, count, s.rows, in_pieces[0]);
      fetch(w, f.write, write, step, writing(step, count), s.rows, in_pieces[1]);
      fetch(BY_COLUMN ? raw_tile(0) : value_tile(stage, 0), f.value, value, step, count, columns(), in_pieces[2]);
      if constexpr (L::STAGED_DECAY) fetch_gates(step, count);
    }
    copies_commit();
  }

  // Whether gates are staged in bf16, in a tile, or as rows of f32.
  CLA_DEVICE bool gates_in_tile() const { return gate_in_pieces && gate.dtype == CLA_BF16; }
  CLA_DEVICE float *raw_gate_row(int row) const { return (float *)(shared + L::RAW_GATES) + row * GATES; }
  CLA_DEVICE void fetch_gates(int64_t step, int count) {
    // The decay before a step of a reverse sweep is that of the step before.
    const int shift = s.reverse ? 1 : 0, first = step == 0 ? shift : 0;
    const int tid = opaque(this->tid);
    const bool copied = gate_in_pieces && gate.dtype != CLA_F16, tile = gates_in_tile();
    const int each = tile ? 8 : 4, pieces = GATES / each;
    CLA_NO_UNROLL
    for (int at = tid; at < CHUNK * pieces; at += THREADS) {
      const int row = at / pieces, c = at % pieces * each;
      const bool valid = row >= first && row < count && c < gates();
      const int64_t token = valid ? steps.token(step + row - shift) : 0;
      if (copied) {
        void *to = tile ? (void *)raw_gates().piece(row, c / 8) : (void *)(raw_gate_row(row) + c);
        copy16_async(to, gate.data + (valid ? token * gate.token + c : 0) * gate.size(), valid);
      } else {
        CLA_UNROLL
        for (int k = 0; k < 4; k++) raw_gate_row(row)[c + k] = valid && c + k < gates() ? gate.load(token, c + k) : 0.f;
      }
    }
  }

  // Pieces of 8 elements that a thread loads before it looks at the first, so that the loads are under way together.
  static constexpr int BATCH = 4;

  // The rows of a chunk, 8 elements at a time, to `use(row, column, elements)`; zeros for rows outside from..to. `token_of`
  // is where a row comes from.
  template <int WIDTH, class Token, class Use>
  CLA_DEVICE void each8(const Rows &rows, int from, int to, int width, bool pieces, Token token_of, Use use) {
    const int tid = opaque(this->tid);
    constexpr int EACH = CHUNK * WIDTH / 8 / THREADS, N = EACH < BATCH ? EACH : BATCH;
    static_assert(EACH % N == 0, "whole batches");
    const bool wide = rows.dtype == CLA_F32, bf16 = rows.dtype == CLA_BF16;
    CLA_NO_UNROLL
    for (int first = 0; first < EACH; first += N) {
      Vec4 low[N], high[N];
      CLA_UNROLL
      for (int i = 0; i < N; i++) {
        const int at = tid + (first + i) * THREADS, row = at / (WIDTH / 8), c = at % (WIDTH / 8) * 8;
        const bool valid = pieces && row >= from && row < to && c < width;
        const unsigned char *p = rows.data + (valid ? (token_of(row) * rows.token + c) * rows.size() : 0);
        low[i] = high[i] = Vec4{0, 0, 0, 0};
        if (valid) low[i] = load16(p);
        if (valid && wide && c + 4 < width) high[i] = load16(p + 16);
      }
      CLA_UNROLL
      for (int i = 0; i < N; i++) {
        const int at = tid + (first + i) * THREADS, row = at / (WIDTH / 8), c = at % (WIDTH / 8) * 8;
        const bool valid = row >= from && row < to && c < width;
        float x[8];
        if (!pieces) {
          CLA_UNROLL
          for (int k = 0; k < 8; k++) x[k] = valid && c + k < width ? rows.load(token_of(row), c + k) : 0.f;
        } else if (wide) {
          const uint32_t bits[8] = {low[i].x, low[i].y, low[i].z, low[i].w, high[i].x, high[i].y, high[i].z, high[i].w};
          CLA_UNROLL
          for (int k = 0; k < 8; k++) x[k] = bits_to_float(bits[k]);
        } else {
          const uint32_t bits[4] = {low[i].x, low[i].y, low[i].z, low[i].w};
          CLA_UNROLL
          for (int k = 0; k < 4; k++) {
            x[2 * k] = bf16 ? low_bf16(bits[k]) : from_f16((uint16_t)bits[k]);
            x[2 * k + 1] = bf16 ? high_bf16(bits[k]) : from_f16((uint16_t)(bits[k] >> 16));
          }
        }
        use(row, c, x);
      }
    }
  }

  // Steps from..to of the chunk into the parts of a tile, zeros in its other rows. SIGN: the decay since the anchor is
  // multiplied (1) or divided (-1) into the elements.
  template <int WIDTH, int SIGN>
  CLA_DEVICE void fill(Tile high, Tile low, const Rows &rows, int64_t step, int from, int to, int width, bool pieces) {
    each8<WIDTH>(rows, from, to, width, pieces, [&](int row) { return steps.token(step + row); },
                 [&](int row, int c, float(&x)[8]) {
                   if (SIGN != 0 && row >= from && row < to && c < width) {
                     CLA_UNROLL
                     for (int k = 0; k < 8; k++) {
                       x[k] *= exp_fast(SIGN * (decays()[row * PITCH + c + k] - anchor()[c + k]));
                     }
                   }
                   store8(high, low, true, row, c, x);
                 });
  }
  // What is copied is there already, all of it: it multiplies zeros outside of from..to.
  CLA_DEVICE void fill_chunk(int64_t step, int from, int to) {
    if constexpr (L::KEY_PARTS == 2) {
      fill<R, BY_ROW ? 1 : 0>(read_tile(0, 0), read_tile(0, 1), read, step, from, to, s.rows, in_pieces[0]);
      fill<R, BY_ROW ? -1 : 0>(write_tile(0, 0), write_tile(0, 1), write, step, from, writing(step, to), s.rows, in_pieces[1]);
    }
    if constexpr (L::VALUE_PARTS == 2) {
      fill<COLUMNS, BY_COLUMN ? -1 : 0>(value_tile(0, 0), value_tile(0, 1), value, step, from, to, columns(), in_pieces[2]);
    }
  }

  // ---- one decay for the whole state ----
  // Two sets of factors, for even and odd chunks, so that one can be written while the other is still read.

  CLA_DEVICE float *sums(int set) const { return factors() + set * (4 * CHUNK + 4); }         // G_t
  CLA_DEVICE float *sums_rest(int set) const { return sums(set) + CHUNK; }                     // and what f32 left of it
  CLA_DEVICE float *from_start(int set) const { return sums(set) + 2 * CHUNK; }                // exp(G_t)
  CLA_DEVICE float *to_end(int set) const { return sums(set) + 3 * CHUNK; }                    // exp(G_C - G_t)
  CLA_DEVICE float &whole(int set) const { return sums(set)[4 * CHUNK]; }                      // exp(G_C)
  CLA_DEVICE float &total() const { return sums(0)[4 * CHUNK + 1]; }                           // exp of all of them

  struct Pair {
    float x, y;
  };
  CLA_DEVICE Pair gate_pair(int64_t step) const {
    Pair g = {0.f, 0.f};
    if (step + 2 * lane < end) g.x = steps.decay_before(gate, step + 2 * lane, 0);
    if (step + 2 * lane + 1 < end) g.y = steps.decay_before(gate, step + 2 * lane + 1, 0);
    return g;
  }
  CLA_DEVICE static double shuffle_up_double(double x, int delta) {
    union {
      double d;
      uint32_t u[2];
    } b = {x};
    b.u[0] = shuffle_up(b.u[0], delta);
    b.u[1] = shuffle_up(b.u[1], delta);
    return b.d;
  }
  CLA_DEVICE static double shuffle_double(double x, int from) {
    union {
      double d;
      uint32_t u[2];
    } b = {x};
    b.u[0] = shuffle(b.u[0], from);
    b.u[1] = shuffle(b.u[1], from);
    return b.d;
  }
  // By the first warp. The sums reach thousands where decay is strong and their differences matter: double, then two f32.
  CLA_DEVICE void sum_gates(int set, Pair g) {
    double x = g.x < STRONGEST_DECAY ? STRONGEST_DECAY : g.x, y = g.y < STRONGEST_DECAY ? STRONGEST_DECAY : g.y;
    double sum = x + y;
    CLA_UNROLL
    for (int d = 1; d < 32; d *= 2) {
      double before = shuffle_up_double(sum, d);
      if (lane >= d) sum += before;
    }
    double all = shuffle_double(sum, 31);
    double at[2] = {sum - y, sum};
    CLA_UNROLL
    for (int i = 0; i < 2; i++) {
      int t = 2 * lane + i;
      sums(set)[t] = (float)at[i];
      sums_rest(set)[t] = (float)(at[i] - (float)at[i]);
      from_start(set)[t] = exp_fast((float)at[i]);
      to_end(set)[t] = exp_fast((float)(all - at[i]));
    }
    if (lane == 0) {
      whole(set) = exp_fast((float)all);
      total() *= whole(set);
    }
  }

  // ---- a decay for each row or column ----

  CLA_DEVICE float *start_factor() const { return factors(); }             // exp of what is due up to the anchor
  CLA_DEVICE float *end_factor() const { return factors() + GATES; }       // exp of what follows it
  CLA_DEVICE float *anchor() const { return factors() + 2 * GATES; }       // G at the step in the middle
  CLA_DEVICE float *total_of() const { return factors() + 3 * GATES; }     // exp of all since the segment's start
  CLA_DEVICE int &limit() const { return *(int *)(factors() + 4 * GATES); }

  // Sums the decays of the chunk's steps from `from` on, until they leave the range. Returns where that is.
  CLA_DEVICE int sum_vector_gates(int64_t step, int from, int count) {
    // The decay before a step of a reverse sweep is that of the step before.
    const int tid = opaque(this->tid);
    const int shift = s.reverse ? 1 : 0, first = step == 0 && from < shift ? shift : from;
    each8<GATES>(gate, first, count, gates(), gate_in_pieces, [&](int row) { return steps.token(step + row - shift); },
                 [&](int row, int c, float(&x)[8]) {
                   CLA_UNROLL
                   for (int k = 0; k < 8; k++) decays()[row * PITCH + c + k] = x[k];
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
      float at = decays()[middle * PITCH + c], last = decays()[(to - 1) * PITCH + c];
      anchor()[c] = at;
      start_factor()[c] = exp_fast(start_factor()[c] + at);
      end_factor()[c] = exp_fast(last - at);
      total_of()[c] *= start_factor()[c] * end_factor()[c];
    }
    barrier();
    if (tid == 0) limit() = CHUNK;
    return to;
  }

  // ---- the same from what is staged ----
  // Each thread has 4 channels of successive steps, whose decays it sums up in registers.

  static constexpr int STEP_GROUPS = THREADS * 4 / GATES, STEPS_EACH = CHUNK / STEP_GROUPS;
  struct Four {
    float x[4];
  };
  struct Two {
    uint32_t x[2];
  };
  CLA_DEVICE Two &four_of(Tile tile, int row, int c) const { return *(Two *)tile.element(row, c); }
  CLA_DEVICE Four staged_gates(int row, int c) const {
    if (!gates_in_tile()) return *(const Four *)(raw_gate_row(row) + c);
    const Two two = four_of(raw_gates(), row, c);
    return {{low_bf16(two.x[0]), high_bf16(two.x[0]), low_bf16(two.x[1]), high_bf16(two.x[1])}};
  }
  CLA_DEVICE void decay_staged(Tile from, Tile high, Tile low, int row, int c, const float (&decay)[4], float sign) const {
    const Two two = four_of(from, row, c);
    float x[4] = {low_bf16(two.x[0]), high_bf16(two.x[0]), low_bf16(two.x[1]), high_bf16(two.x[1])};
    CLA_UNROLL
    for (int k = 0; k < 4; k++) x[k] *= exp_fast(sign * decay[k]);
    Two h, l;
    split(h.x, l.x, x);
    four_of(high, row, c) = h;
    four_of(low, row, c) = l;
  }

  CLA_DEVICE void add_gates(float (&sum)[4], int row, int c) const {
    const Four g = staged_gates(row, c);
    CLA_UNROLL
    for (int k = 0; k < 4; k++) sum[k] += g.x[k] < STRONGEST_DECAY ? STRONGEST_DECAY : g.x[k];
  }

  // Makes the operands of a whole chunk. Where its decay leaves the range `limit` becomes 0, and they are no use.
  CLA_DEVICE void decay_chunk() {
    const int tid = opaque(this->tid);
    const int c = tid % (GATES / 4) * 4, of = tid / (GATES / 4), first = of * STEPS_EACH;
    float own[4] = {0.f, 0.f, 0.f, 0.f};
    CLA_UNROLL_TWICE
    for (int i = 0; i < STEPS_EACH; i++) add_gates(own, first + i, c);
    *(Four *)(totals() + of * GATES + c) = {{own[0], own[1], own[2], own[3]}};
    barrier();
    float sum[4] = {0.f, 0.f, 0.f, 0.f}, middle[4] = {0.f, 0.f, 0.f, 0.f}, all[4] = {0.f, 0.f, 0.f, 0.f};
    CLA_UNROLL_TWICE
    for (int i = 0; i < STEP_GROUPS; i++) {
      const Four t = *(const Four *)(totals() + i * GATES + c);
      CLA_UNROLL
      for (int k = 0; k < 4; k++) {
        all[k] += t.x[k];
        if (i < STEP_GROUPS / 2) middle[k] += t.x[k];
        if (i < of) sum[k] += t.x[k];
      }
    }
    CLA_UNROLL
    for (int k = 0; k < 4; k++) {
      sum[k] -= middle[k];
      if (of != 0) continue;
      start_factor()[c + k] = exp_fast(middle[k]);
      end_factor()[c + k] = exp_fast(all[k] - middle[k]);
      anchor()[c + k] = 0.f;  // the sums below are relative to it already
    }
    bool inside = true;
    CLA_UNROLL_TWICE
    for (int i = 0; i < STEPS_EACH; i++) {
      const int row = first + i;
      add_gates(sum, row, c);
      CLA_UNROLL
      for (int k = 0; k < 4; k++) inside = inside && sum[k] <= DECAY_RANGE && sum[k] >= -DECAY_RANGE;
      if constexpr (BY_ROW) {
        decay_staged(raw_tile(0), read_tile(0, 0), read_tile(0, 1), row, c, sum, 1.f);
        decay_staged(raw_tile(1), write_tile(0, 0), write_tile(0, 1), row, c, sum, -1.f);
      } else {
        decay_staged(raw_tile(0), value_tile(0, 0), value_tile(0, 1), row, c, sum, -1.f);
        *(Four *)(decays() + row * PITCH + c) = {{sum[0], sum[1], sum[2], sum[3]}};
      }
    }
    if (!inside) limit() = 0;
  }
  CLA_DEVICE void count_decay() {
    for (int c = tid; c < GATES; c += THREADS) total_of()[c] *= start_factor()[c] * end_factor()[c];
  }

  CLA_DEVICE void scale_state(const float *factor) {
    each_state([&](float &x, int r, int c) { x *= factor[BY_ROW ? r : c]; });
  }

  // ---- one chunk ----

  static constexpr int SCORE_COLUMNS = CHUNK / W;

  CLA_DEVICE void store_scores(const float (&p)[SCORE_COLUMNS / 8][4], int set) {
    CLA_UNROLL
    for (int j = 0; j < SCORE_COLUMNS / 8; j++) {
      CLA_UNROLL
      for (int h = 0; h < 2; h++) {
        const int t = 16 * warp + row0 + 8 * h, first = SCORE_COLUMNS * group + 8 * j + pair;
        const int seen = t + (s.inclusive ? 1 : 0);
        float x[2];
        CLA_UNROLL
        for (int i = 0; i < 2; i++) {
          const int at = first + i;
          x[i] = at < seen ? p[j][2 * h + i] : 0.f;
          if (SCALAR && at < t) {
            x[i] *= exp_fast((sums(set)[t] - sums(set)[at]) + (sums_rest(set)[t] - sums_rest(set)[at]));
          }
        }
        uint32_t high = pack_bf16(x[0], x[1]);
        *(uint32_t *)scores(0).element(t, first) = high;
        *(uint32_t *)scores(1).element(t, first) = pack_rest(high, x[0], x[1]);
      }
    }
  }

  // The state as A operands. Where the machine reads them while the warps go on, as many as there are registers for are held
  // at a time; otherwise each is packed as it is needed.
  static constexpr int STATE_STEPS = R / 16;
  static constexpr bool TIGHT = L::KEY_PARTS == 2 || L::VALUE_PARTS == 2 || SCALAR;
  static constexpr int HELD = !WGMMA ? 1 : R < 128 ? STATE_STEPS : W == 1 ? 2 : TIGHT ? 4 : STATE_STEPS;
  struct StateOperand {
    uint32_t high[HELD][4], rest[HELD][4];
  };
  CLA_DEVICE void pack_state(StateOperand &a, int first) const {
    CLA_UNROLL
    for (int k = 0; k < HELD; k++) {
      to_a<R>(a.high[k], state, 16 * (first + k));
      to_a_rest<R>(a.rest[k], a.high[k], state, 16 * (first + k));
    }
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
        add_registers_by_rows<WGMMA>(acc, a.high[k], read_tile(stage, 0), at);
        add_registers_by_rows<WGMMA>(acc, a.rest[k], read_tile(stage, 0), at);
        if (L::KEY_PARTS == 2) add_registers_by_rows<WGMMA>(acc, a.high[k], read_tile(stage, 1), at);
      }
    }
  }

  // The warpgroup's columns of the values.
  CLA_DEVICE Tile own_values(int stage, int part) const { return value_tile(stage, part).from_column(64 * group); }

  // The state's decay over the chunk, and its writes.
  CLA_DEVICE void update_state(int stage, int set) {
    const Tile v = own_values(stage, 0), w = write_tile(stage, 0);
    if constexpr (SCALAR) {
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
        add_registers_by_columns<WGMMA, R>(state, a[k], w, 16 * k);
        add_registers_by_columns<WGMMA, R>(state, rest[k], w, 16 * k);
        if (L::KEY_PARTS == 2) add_registers_by_columns<WGMMA, R>(state, a[k], write_tile(stage, 1), 16 * k);
      }
    } else {
      products_fence<WGMMA>();
      add_columns_by_columns<WGMMA, R>(state, v, w);
      if (L::VALUE_PARTS == 2) add_columns_by_columns<WGMMA, R>(state, own_values(stage, 1), w);
      if (L::KEY_PARTS == 2) add_columns_by_columns<WGMMA, R>(state, v, write_tile(stage, 1));
    }
  }

  // Steps from..to of the chunk at `step`, whose tiles are in `stage`; `meanwhile` runs while
  // the first products do.
  template <class F> CLA_DEVICE void solve(int stage, int set, int64_t step, int from, int to, bool only_state, F meanwhile) {
    if (VECTOR) scale_state(start_factor());
    if (only_state || !out.data) {
      update_state(stage, set);
      products_commit<WGMMA>();
      meanwhile();
      products_wait<WGMMA, 0>();
      if (VECTOR) scale_state(end_factor());
      return;
    }
    float p[SCORE_COLUMNS / 8][4], acc[8][4];
    CLA_UNROLL
    for (int e = 0; e < 4; e++) {
      CLA_UNROLL
      for (int j = 0; j < SCORE_COLUMNS / 8; j++) p[j][e] = 0.f;
      CLA_UNROLL
      for (int j = 0; j < 8; j++) acc[j][e] = 0.f;
    }
    const Tile r = read_tile(stage, 0), w = write_tile(stage, 0), v = own_values(stage, 0);
    StateOperand a;
    pack_state(a, 0);
    products_fence<WGMMA>();
    add_rows_by_rows<WGMMA, SCORE_COLUMNS>(p, r, w, SCORE_COLUMNS * group, R);
    if constexpr (L::KEY_PARTS == 2) {
      add_rows_by_rows<WGMMA, SCORE_COLUMNS>(p, read_tile(stage, 1), w, SCORE_COLUMNS * group, R);
      add_rows_by_rows<WGMMA, SCORE_COLUMNS>(p, r, write_tile(stage, 1), SCORE_COLUMNS * group, R);
    }
    products_commit<WGMMA>();
    add_state_times_read(acc, a, stage);
    products_commit<WGMMA>();
    meanwhile();
    products_wait<WGMMA, 1>();
    store_scores(p, set);
    shared_fence();
    barrier();
    if (SCALAR) {
      products_wait<WGMMA, 0>();
      CLA_UNROLL
      for (int j = 0; j < 8; j++) {
        CLA_UNROLL
        for (int e = 0; e < 4; e++) acc[j][e] *= from_start(set)[8 * j + pair + (e & 1)];
      }
    }
    products_fence<WGMMA>();
    add_columns_by_rows<WGMMA>(acc, v, scores(0));
    if (L::VALUE_PARTS == 2) add_columns_by_rows<WGMMA>(acc, own_values(stage, 1), scores(0));
    add_columns_by_rows<WGMMA>(acc, v, scores(1));
    products_commit<WGMMA>();
    update_state(stage, set);
    products_commit<WGMMA>();
    products_wait<WGMMA, 1>();
    finish(acc, step, from, to);
    products_wait<WGMMA, 0>();
    if (VECTOR) scale_state(end_factor());
  }

  // ---- the result ----

  // Output for all steps of a chunk waits in shared memory if it can; that of a part of one goes out at once.
  CLA_DEVICE void finish(float (&acc)[8][4], int64_t step, int from, int to) {
    out_waits = out_in_pieces && from == 0 && to == count_at(step);
    CLA_UNROLL
    for (int j = 0; j < 8; j++) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) {
        const int t = 8 * j + pair + (e & 1), c = column(e >> 1);
        acc[j][e] *= s.out_scale;
        if (BY_COLUMN && t >= from && t < to && c < columns()) {
          acc[j][e] *= exp_fast(decays()[t * PITCH + c] - anchor()[c]);
        }
        if (L::WIDE_OUT && out_waits) {
          wide_out()[t * L::OUT_PITCH + c] = acc[j][e];
        } else if (!out_waits && t >= from && t < to && c < columns()) {
          out.store(steps.token(step + t), c, acc[j][e]);
        }
      }
    }
    if (BF16_OUT && out_waits) stage_out(acc);
  }

  // The transpose of acc into the output tile: whole rows of it go to memory later, in full lines.
  CLA_DEVICE void stage_out(const float (&acc)[8][4]) {
    const Tile to = out_tile().from_column(64 * group);
    CLA_UNROLL
    for (int j = 0; j < 8; j += 2) {
      const uint32_t x[4] = {pack_bf16(acc[j][0], acc[j][1]), pack_bf16(acc[j][2], acc[j][3]),
                             pack_bf16(acc[j + 1][0], acc[j + 1][1]), pack_bf16(acc[j + 1][2], acc[j + 1][3])};
      store_transposed(to, 8 * j, 16 * warp, x);
    }
  }
  CLA_DEVICE void flush(Pieces<COLUMNS> &at, int64_t step) {
    const int count = count_at(step);
    if (L::WIDE_OUT && out_waits) {
      constexpr int PER_ROW = COLUMNS / 4, EVERY = THREADS / PER_ROW;
      const int tid = opaque(this->tid);
      const int first = tid / PER_ROW, c = tid % PER_ROW * 4;
      const int64_t stride = (s.reverse ? -4 : 4) * out.token;
      unsigned char *to = out.data + steps.token(0) * out.token * 4 + (step + first) * stride + 4 * c;
      CLA_UNROLL
      for (int i = 0; i < CHUNK / EVERY; i++) {
        const int row = first + i * EVERY;
        if (row < count && c < columns()) store16_streaming(to + i * EVERY * stride, load16(wide_out() + row * L::OUT_PITCH + c));
      }
    } else if (out_waits) {
      static_assert(Pieces<COLUMNS>::PARTS == 1, "a block has no more columns than threads");
      const unsigned char *from = out_tile().piece(at.row, at.column / 8);
      CLA_UNROLL
      for (int i = 0; i < at.EACH; i++) {
        if (at.column < columns() && at.row + i * at.EVERY < count) {
          store16_streaming(at.data + i * at.stride, load16(from + i * at.EVERY * 128));
        }
      }
    }
    out_waits = false;
    at.next_chunk();
  }

  // ---- the sweep ----

  CLA_DEVICE void run(bool only_state) {
    only_state ? zero_state() : load_state();
    if (SCALAR && tid == 0) total() = 1.f;
    if (VECTOR) {
      for (int c = tid; c < GATES; c += THREADS) total_of()[c] = 1.f;
      if (tid == 0) limit() = CHUNK;
    }
    NARROW ? run_staged(only_state) : run_filled(only_state);
    if (only_state) {
      barrier();
      store_segment();
    } else {
      store_state();
    }
  }

  // Chunks that are copied to shared memory ahead of their turn.
  CLA_DEVICE void run_staged(bool only_state) {
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
      if constexpr (L::STAGED_DECAY) {
        // What waits lies where this chunk's decays go.
        if (step > begin) flush(f.out, step - CHUNK);
        decay_chunk();
        shared_fence();
        barrier();
        whole = limit() != 0;
        if (whole && only_state) count_decay();
        if (!whole) begin_parts();
      }
      if (whole) fetch_chunk(f, stage ^ 1, step + CHUNK);
      int from = 0;
      do {
        const int to = whole ? count : fill_part(step, from, count);
        solve(stage, stage, step, from, to, only_state, [&] {
          if (!L::STAGED_DECAY && step > begin) flush(f.out, step - CHUNK);
          if (SCALAR && tid < 32 && step + CHUNK < end) sum_gates(stage ^ 1, gate_pair(step + CHUNK));
        });
        from = to;
      } while (VECTOR && from < count);
      if (!whole) fetch_chunk(f, stage ^ 1, step + CHUNK);
    }
    if (!only_state && out.data && begin < end) {
      barrier();
      flush(f.out, begin + (end - begin - 1) / CHUNK * CHUNK);
    }
  }

  // Chunks whose operands are made from the inputs on the spot.
  CLA_DEVICE void run_filled(bool only_state) {
    int set = 0;
    for (int64_t step = begin; step < end; step += CHUNK, set ^= 1) {
      const int count = count_at(step);
      if (VECTOR) begin_parts();
      int from = 0;
      do {
        if (SCALAR && tid < 32) sum_gates(set, gate_pair(step));
        const int to = fill_part(step, from, count);
        solve(0, set, step, from, to, only_state, [] {});
        from = to;
      } while (VECTOR && from < count);
    }
  }

  // Parts of a chunk: each goes on as long as the decay stays in its range.
  CLA_DEVICE void begin_parts() {
    barrier();
    if (tid == 0) limit() = CHUNK;
  }
  CLA_DEVICE int fill_part(int64_t step, int from, int count) {
    barrier();
    const int to = VECTOR ? sum_vector_gates(step, from, count) : count;
    fill_chunk(step, from, to);
    shared_fence();
    barrier();
    return to;
  }
};

template <int R, int W, bool NARROW, bool BF16_OUT, int GATE>
CLA_KERNEL(128 * W, W == 1 ? 2 : 1) void chunked_kernel(cla_sweep s, int only_state) {
  Chunked<R, W, NARROW, BF16_OUT, GATE> sweep(s);
  if (sweep.begin >= sweep.end && sweep.place.segment > 0) return;
  sweep.run(only_state);
}

}  // namespace cla
