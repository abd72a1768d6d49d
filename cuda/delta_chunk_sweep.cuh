// What the kernels have in common that go over the segments of a delta sweep: a block has one sequence and head, or a span of it,
// and 64 columns of the state a warpgroup, or a warpgroup half of their rows, in f32 registers from the first segment to the last.
//
// As in the chunked sweep of the additive families, warpgroups hold X^T, and all that they compute has columns of the state as
// rows: what one product accumulates is, as the sum of two bf16, the A operand of the next in the same registers. So products
// that wait for one another need no shared memory between them and no barrier.
#pragma once
#include "delta_chunk.cuh"

namespace cla {

// By MOVING threads rows of DTYPE, of 16 bits, come to shared memory and go from there. With SHARED_COLUMNS warpgroups have the
// same columns, and each R rows of its own: a state of more rows than a warpgroup has registers for.
template <int R, int W, bool REVERSE, int MOVING, bool SHARED_COLUMNS = false, int DTYPE = CLA_BF16> struct DeltaChunkSweep {
  static constexpr int COLUMNS = SHARED_COLUMNS ? 64 : 64 * W, STEPS = CHUNK / 16, KEY = R * 128;
  static constexpr bool WGMMA = HAS_WGMMA;

  const cla_delta_sweep &s;
  unsigned char *shared;
  int tid, warp, group, row0, pair, head, first_column, width;  // tid: among those that move rows; width: columns of the state
  int segments, begin, end;  // begin and end: of the block's, in the order of the sweep
  int64_t first_segment;
  Steps steps;
  float state[R / 8][4];

  CLA_DEVICE DeltaChunkSweep(const cla_delta_sweep &s)
      : s(s), shared(shared_memory()), steps(s.of.cu_seqlens, s.of.tokens, sequence(s), REVERSE) {
    tid = thread_index() % MOVING;
    warp = (tid >> 5) & 3;
    group = thread_index() >> 7;
    row0 = (tid & 31) >> 2;
    pair = (tid & 3) * 2;
    head = index(s) % s.of.heads;
    first_column = (block_x() % tiles(s) - (identity(s) ? tiles(s.of.v_dim) : 0)) * COLUMNS;
    const int left = (identity(s) ? s.of.k_dim : s.of.v_dim) - first_column;
    width = left < COLUMNS ? left : COLUMNS;
    segments = (int)((steps.count + CHUNK - 1) / CHUNK);
    const int64_t before = span(s) * s.spans.length;
    begin = before < segments ? (int)before : segments;
    end = segments - begin < s.spans.length ? segments : begin + (int)s.spans.length;
    first_segment = segment_index(s.anchors, sequence(s), 0);
  }

  // Whether what spans make of a state is to be found, by blocks that are told of no states.
  CLA_ANYWHERE static bool finds_changes(const cla_delta_sweep &s) { return s.spans.count > 1 && !s.spans.starts; }
  CLA_ANYWHERE static unsigned tiles(int columns) { return (columns + COLUMNS - 1) / COLUMNS; }
  // Blocks that share a state, and a sequence.
  CLA_ANYWHERE static unsigned tiles(const cla_delta_sweep &s) {
    return tiles(s.of.v_dim) + (finds_changes(s) ? tiles(s.of.k_dim) : 0);
  }
  CLA_ANYWHERE static int spans(const cla_delta_sweep &s) { return s.spans.count - finds_changes(s); }
  // The block's head of a span of a sequence, by all three, and which they are.
  CLA_DEVICE static unsigned index(const cla_delta_sweep &s) { return block_x() / tiles(s); }
  CLA_DEVICE static unsigned span(const cla_delta_sweep &s) { return index(s) / s.of.heads % spans(s); }
  CLA_DEVICE static int64_t sequence(const cla_delta_sweep &s) { return index(s) / s.of.heads / spans(s); }
  // Whether columns are those that began as the identity's.
  CLA_DEVICE static bool identity(const cla_delta_sweep &s) { return block_x() % tiles(s) >= tiles(s.of.v_dim); }
  CLA_DEVICE int columns() const { return width; }
  CLA_DEVICE int segment(int i) const { return REVERSE ? segments - 1 - i : i; }
  // The steps before the first segment: in reverse a segment that is cut short comes first.
  CLA_DEVICE int64_t first_step() const {
    return REVERSE && begin > 0 ? steps.count - (int64_t)(segments - begin) * CHUNK : (int64_t)begin * CHUNK;
  }
  // A sequence is cut from its first token on, either way.
  CLA_DEVICE int count_at(int i) const {
    const int64_t left = steps.count - (int64_t)segment(i) * CHUNK;
    return left < CHUNK ? (int)left : CHUNK;
  }
  // The rows of a tensor whose columns are those of the state, from the block's first on.
  CLA_DEVICE Rows of_columns(const cla_tensor &x) const { return Rows(x, steps.batch, head).from_column(first_column); }
  // There are none where columns began as the identity's.
  CLA_DEVICE Rows of_values() const {
    Rows rows = of_columns(s.value);
    if (identity(s)) rows.data = nullptr, rows.token = 0;
    return rows;
  }
  // The first of the warpgroup's columns within the block, and of its rows.
  CLA_DEVICE int group_column() const { return SHARED_COLUMNS ? 0 : 64 * group; }
  CLA_DEVICE int group_row() const { return SHARED_COLUMNS ? R * group : 0; }
  // The thread's columns of the state within the block, h = 0 or 1.
  CLA_DEVICE int column(int h) const { return group_column() + 16 * warp + row0 + 8 * h; }

  CLA_DEVICE int64_t prepared_index(int i) const { return (first_segment + segment(i)) * s.of.heads + head; }

  // ---- the state ----

  // f(element, where it lies in memory from `first` on) for those that the state has. Addresses are found whether they are
  // used or not: that is less than to branch.
  template <class F> CLA_DEVICE void each_of_state(float *first, int64_t row, int64_t col, F f) {
    float *at = first + (group_row() + pair) * row + column(0) * col;
    const bool inside[2] = {column(0) < columns(), column(1) < columns()};
    CLA_UNROLL
    for (int j = 0; j < R / 8; j++, at += 8 * row) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) {
        float *x = at + (e & 1 ? row : 0) + (e >> 1 ? 8 * col : 0);
        if (inside[e >> 1] && group_row() + 8 * j + pair + (e & 1) < s.of.k_dim) f(state[j][e], x);
      }
    }
  }
  CLA_DEVICE void load_state(const float *from, int64_t row, int64_t col) {
    each_of_state(const_cast<float *>(from), row, col, [](float &x, const float *at) { x = *at; });
  }
  CLA_DEVICE void store_state(float *to, int64_t row, int64_t col) {
    each_of_state(to, row, col, [](float x, float *at) { *at = x; });
  }
  CLA_DEVICE void load_state() {
    zero(state);
    if (identity(s)) {
      CLA_UNROLL
      for (int j = 0; j < R / 8; j++) {
        CLA_UNROLL
        for (int e = 0; e < 4; e++) {
          state[j][e] = group_row() + 8 * j + pair + (e & 1) == first_column + column(e >> 1) ? 1.f : 0.f;
        }
      }
    } else if (s.spans.starts) {
      load_state(s.spans.starts + ((int64_t)index(s) * s.of.v_dim + first_column) * s.of.k_dim, 1, s.of.k_dim);
    } else if (s.first.data) {
      load_state(s.first.data + sequence(s) * s.first.sequence + head * s.first.head + first_column * s.first.col, s.first.row,
                 s.first.col);
    }
  }
  // The state as an anchor of the i-th segment.
  CLA_DEVICE void keep(int i) {
    if (!s.anchors.data) return;
    const int64_t size = (int64_t)s.of.k_dim * s.of.v_dim;
    store_state(s.anchors.data + prepared_index(i) * size + first_column, s.of.v_dim, 1);
  }
  CLA_DEVICE void store_last() {
    if (finds_changes(s)) {
      const int64_t before = (int64_t)index(s) * (s.of.v_dim + s.of.k_dim) + (identity(s) ? s.of.v_dim : 0);
      store_state(s.spans.changes + (before + first_column) * s.of.k_dim, 1, s.of.k_dim);
    } else if (s.last.data && end == segments && (begin < end || span(s) == 0)) {
      store_state(s.last.data + sequence(s) * s.last.sequence + head * s.last.head + first_column * s.last.col, s.last.row,
                  s.last.col);
    }
  }

  // ---- rows and what is prepared ----

  // A thread's 16-byte pieces of the rows of a segment: the same piece of every EVERY-th row, so that one address and one
  // stride lead to all of them, in memory and in a tile.
  template <int WIDTH> struct Pieces {
    static constexpr int PER_ROW = WIDTH / 8, EVERY = MOVING / PER_ROW, EACH = CHUNK / EVERY;
    static_assert(EVERY % 8 == 0 && EVERY * EACH == CHUNK, "pieces cover the rows, a multiple of the swizzle's period apart");
    unsigned char *data;  // of the segment at hand
    int64_t row_bytes;    // to the next step
    int tid, width;

    CLA_DEVICE Pieces(const DeltaChunkSweep &sweep, const Rows &rows, int width) : tid(sweep.tid), width(width) {
      row_bytes = (REVERSE ? -2 : 2) * rows.token;
      data = rows.data + 16 * piece() + sweep.steps.token(sweep.first_step()) * rows.token * 2 + row() * row_bytes;
    }
    CLA_DEVICE int row() const { return tid / PER_ROW; }
    CLA_DEVICE int piece() const { return tid % PER_ROW; }
    CLA_DEVICE bool inside() const { return 8 * piece() < width; }
    CLA_DEVICE void next(int count) { data += count * row_bytes; }
    // Zeros for rows from `count` on.
    CLA_DEVICE void fetch(Tile to, int count) {
      unsigned char *into = to.piece(row(), piece());
      CLA_UNROLL
      for (int n = 0; n < EACH; n++) {
        copy16_async(into + n * EVERY * 128, data + n * EVERY * row_bytes, inside() && row() + n * EVERY < count);
      }
      next(count);
    }
    CLA_DEVICE void store(Tile from, int count) {
      const unsigned char *x = from.piece(row(), piece());
      CLA_UNROLL
      for (int n = 0; n < EACH; n++) {
        if (inside() && row() + n * EVERY < count) {
          store16_streaming(data + n * EVERY * row_bytes, load16(x + n * EVERY * 128));
        }
      }
      next(count);
    }
  };
  template <int BYTES> CLA_DEVICE void copy(unsigned char *to, const unsigned char *from) const {
    constexpr int WHOLE = BYTES / (16 * MOVING) * (16 * MOVING);
    to += 16 * tid, from += 16 * tid;
    CLA_UNROLL
    for (int at = 0; at < WHOLE; at += 16 * MOVING) copy16_async(to + at, from + at, true);
    if (16 * tid < BYTES - WHOLE) copy16_async(to + WHOLE, from + WHOLE, true);
  }
  // f(offset, whether it is in a block on the diagonal or below) for this thread's pieces of tiles that are triangles.
  template <int BYTES, class F> CLA_DEVICE void each_prepared_piece(F f) const {
    const int piece = (tid % 8) ^ (tid / 8 % 8), row = tid / 8;
    CLA_UNROLL
    for (int at = 0; at < BYTES; at += 16 * MOVING) {
      f(at + 16 * tid, piece / 2 <= (at % SUBTILE / 128 + row) / 16);
    }
  }
  // Zeros where `to` has what is not copied.
  template <int BYTES> CLA_DEVICE void clear_unused(unsigned char *to) const {
    each_prepared_piece<BYTES>([&](int at, bool used) {
      if (!used) store16(to + at, {0, 0, 0, 0});
    });
  }
  // BYTES of tiles that are triangles.
  template <int BYTES> CLA_DEVICE void copy_triangles(unsigned char *to, const unsigned char *from) const {
    each_prepared_piece<BYTES>([&](int at, bool used) {
      if (used) copy16_async(to + at, from + at, true);
    });
  }
  // Rows that lie otherwise, out of the way of the loop over segments.
  CLA_COLD static void fetch_values_apart(const cla_delta_sweep &s, Tile to, int i) {
    const DeltaChunkSweep sweep(s);
    const SegmentSteps at(sweep.steps, sweep.segment(i));
    TileRows<COLUMNS, MOVING>::fetch(to, sweep.of_values(), at, sweep.columns(), sweep.tid);
  }
  CLA_COLD static void flush_apart(const cla_delta_sweep &s, Tile from, int i) {
    const DeltaChunkSweep sweep(s);
    const SegmentSteps at(sweep.steps, sweep.segment(i));
    const Rows out = sweep.of_columns(s.out);
    for (int n = sweep.tid; n < at.count * COLUMNS; n += MOVING) {
      const int row = n / COLUMNS, c = n % COLUMNS;
      if (c < sweep.columns()) ((uint16_t *)out.row(at.token(row)))[c] = *from.element(row, c);
    }
  }

  static Dims grid(const cla_delta_sweep &s) { return {(int64_t)s.of.sequences * spans(s) * s.of.heads * tiles(s), 1}; }

  // ---- numbers ----

  // As numbers that the compiler has to write down here, not while products are under way.
  template <int N> CLA_DEVICE static void zero(float (&x)[N][4]) {
    CLA_UNROLL
    for (int j = 0; j < N; j++) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) x[j][e] = opaque(0.f);
    }
  }
  // f(two numbers, of neighbouring steps and one column of the state; factors of these steps) for all that is accumulated.
  template <class F> CLA_DEVICE void each_pair(float (&acc)[8][4], const float *factors, F f) const {
    CLA_UNROLL
    for (int j = 0; j < 8; j++) {
      const float x = factors[8 * j + pair], y = factors[8 * j + pair + 1];
      f(acc[j][0], acc[j][1], x, y);
      f(acc[j][2], acc[j][3], x, y);
    }
  }
  CLA_DEVICE void scale(float (&acc)[8][4], const float *factors) const {
    each_pair(acc, factors, [](float &a, float &b, float x, float y) { a *= x, b *= y; });
  }
  // f(a number, what is in its place in the values) for all that is accumulated.
  template <class F> CLA_DEVICE void with_values(float (&acc)[8][4], Tile values, F f) const {
    CLA_UNROLL
    for (int step = 0; step < STEPS; step++) {
      uint32_t v[4];
      load_a_transposed(v, values, 16 * step, 16 * warp);
      CLA_UNROLL
      for (int i = 0; i < 4; i++) {
        float(&at)[4] = acc[2 * step + (i >> 1)];
        float two[2];
        unpack_pair<DTYPE>(two, v[i]);
        f(at[2 * (i & 1)], two[0]), f(at[2 * (i & 1) + 1], two[1]);
      }
    }
  }

  // Accumulated numbers as A operands, in two parts.
  template <int COUNT> struct Operand {
    uint32_t high[COUNT][4], rest[COUNT][4];

    CLA_DEVICE void pack(const float (&acc)[2 * COUNT][4]) {
      CLA_UNROLL
      for (int k = 0; k < COUNT; k++) {
        to_a<16 * COUNT>(high[k], acc, 16 * k);
        to_a_rest<16 * COUNT>(rest[k], high[k], acc, 16 * k);
      }
    }
  };
  // Values in f16.
  CLA_DEVICE void load_values(Operand<STEPS> &a, Tile values) const {
    CLA_UNROLL
    for (int k = 0; k < STEPS; k++) {
      uint32_t v[4];
      load_a_transposed(v, values, 16 * k, 16 * warp);
      CLA_UNROLL
      for (int i = 0; i < 4; i++) split_half(a.high[k][i], a.rest[k][i], v[i]);
    }
  }
  // acc += A b^T for keys in one part or two.
  template <bool IN_PARTS, int COUNT> CLA_DEVICE static void add_by_rows(float (&acc)[8][4], const Operand<COUNT> &a, Tile b) {
    CLA_UNROLL
    for (int k = 0; k < COUNT; k++) {
      add_parts_by_rows<WGMMA>(acc, b, 16 * k, 0, a.high[k], a.rest[k]);
      if (IN_PARTS) add_parts_by_rows<WGMMA>(acc, {b.base + KEY}, 16 * k, 0, a.high[k]);
    }
  }
  // acc += A b^T, b in two parts and zero above its diagonal.
  CLA_DEVICE static void add_by_triangle(float (&acc)[8][4], const Operand<STEPS> &a, Tile b) {
    CLA_UNROLL
    for (int k = 0; k < STEPS; k++) {
      add_parts_by_rows<WGMMA>(acc, b, 16 * k, 16 * k, a.high[k], a.rest[k]);
      add_parts_by_rows<WGMMA>(acc, {b.base + SUBTILE}, 16 * k, 16 * k, a.high[k]);
    }
  }
  // X += A b for keys.
  template <bool IN_PARTS> CLA_DEVICE void add_to_state(const Operand<STEPS> &a, Tile b) {
    CLA_UNROLL
    for (int k = 0; k < STEPS; k++) {
      add_parts_by_columns<WGMMA, R>(state, b, 16 * k, a.high[k], a.rest[k]);
      if (IN_PARTS) add_parts_by_columns<WGMMA, R>(state, {b.base + KEY}, 16 * k, a.high[k]);
    }
  }
  template <bool BY_CHANNEL> CLA_DEVICE void fade_state(const float *whole) {
    CLA_UNROLL
    for (int j = 0; j < R / 8; j++) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) state[j][e] *= whole[BY_CHANNEL ? 8 * j + pair + (e & 1) : 0];
    }
  }

  // ---- results ----

  CLA_DEVICE void store_inner(int i, const float (&acc)[8][4]) const {
    const Rows inner = of_columns(s.inner);
    const SegmentSteps at(steps, segment(i));
    const int64_t row = REVERSE ? -inner.token : inner.token;
    float *to = (float *)inner.row(at.first) + pair * row + column(0);
    const bool inside[2] = {column(0) < columns(), column(1) < columns()};
    CLA_UNROLL
    for (int j = 0; j < 8; j++, to += 8 * row) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) {
        float *x = to + (e & 1 ? row : 0) + 8 * (e >> 1);
        if (inside[e >> 1] && 8 * j + pair + (e & 1) < at.count) *x = acc[j][e];
      }
    }
  }
  // The transpose of a result into the tile that it waits in.
  CLA_DEVICE void wait_with(Tile tile, const float (&acc)[8][4], float factor) const {
    const Tile to = tile.from_column(group_column());
    CLA_UNROLL
    for (int j = 0; j < 8; j += 2) {
      uint32_t x[4];
      CLA_UNROLL
      for (int n = 0; n < 4; n++) {
        const float(&from)[4] = acc[j + (n >> 1)];
        x[n] = pack_pair<DTYPE>(factor * from[2 * (n & 1)], factor * from[2 * (n & 1) + 1]);
      }
      store_transposed(to, 8 * j, 16 * warp, x);
    }
  }
};

}  // namespace cla
