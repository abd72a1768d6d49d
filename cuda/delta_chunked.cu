// The chunked delta sweep: a block goes over the segments of one sequence and head with 64 columns of the state a warpgroup,
// in f32 registers from the first segment to the last. See delta_chunk.cuh for the equations.
//
// As in the chunked sweep of the additive families, warpgroups hold X^T, and all that they compute has columns of the state as
// rows: what one product accumulates is, as the sum of two bf16, the A operand of the next in the same registers. So the three
// products of a segment that wait for one another, X^T K^T, the right side times T^T and the state's update, need no shared
// memory between them and no barrier; outputs are computed beside them.
#include "delta_chunk.cuh"

namespace cla {

template <int R, int W, bool BY_CHANNEL> struct DeltaChunkLayout {
  static constexpr int COLUMNS = 64 * W;
  static constexpr int KEY = R * 128, VALUES = W * SUBTILE;
  // Keys that a decay by channel has been multiplied into are too many for a second stage: what is read of the state and what
  // is written to it are each loaded when those of the segment before have been used.
  static constexpr int DECAYED = BY_CHANNEL ? PreparedKeys<R>::BYTES : 0;
  // A stage has all else that is read of one segment.
  static constexpr int K = 0, Q = KEY, VALUE = BY_CHANNEL ? 0 : 2 * KEY, PREPARED = VALUE + VALUES;
  static constexpr int STAGES = DECAYED, STAGE = PREPARED + Prepared::BYTES;
  // Results wait for the next segment in one of two tiles, so that whole rows go out and nobody waits for them.
  static constexpr int OUT = STAGES + 2 * STAGE, SHARED = OUT + 2 * VALUES;
};

// What a sweep leaves beside its final state: the output, or m, or, in reverse, both. That it is known to the compiler keeps
// branches out from between products that are under way.
enum class Leaves { OUTPUT, WRITTEN, BOTH_IN_REVERSE };

template <int R, int W, bool BY_CHANNEL, Leaves LEAVES> struct DeltaChunked {
  using L = DeltaChunkLayout<R, W, BY_CHANNEL>;
  using Keys = PreparedKeys<R>;
  static constexpr bool REVERSE = LEAVES == Leaves::BOTH_IN_REVERSE, OUTPUT = LEAVES == Leaves::OUTPUT;
  static constexpr int COLUMNS = L::COLUMNS, STEPS = CHUNK / 16;
  // One warpgroup that solves has another beside it that moves rows in and out: there are registers for two. Sweeps that
  // leave states have more to store than to compute, and gain nothing.
  static constexpr bool APART = W == 1 && OUTPUT;
  static constexpr int MOVING = APART ? 128 : 128 * W, THREADS = 128 * W + (APART ? MOVING : 0);
  static constexpr bool WGMMA = HAS_WGMMA;

  const cla_delta_sweep &s;
  unsigned char *shared;
  int tid, warp, group, row0, pair, head, first_column;  // tid: among those that move rows
  int64_t sequence, segments, first_segment;
  Steps steps;
  float state[R / 8][4];

  CLA_DEVICE DeltaChunked(const cla_delta_sweep &s)
      : s(s), shared(shared_memory()), steps(s.of.cu_seqlens, s.of.tokens, block_x() / tiles(s) / s.of.heads, REVERSE) {
    tid = thread_index() % MOVING;
    warp = (tid >> 5) & 3;
    group = thread_index() >> 7;
    row0 = (tid & 31) >> 2;
    pair = (tid & 3) * 2;
    head = block_x() / tiles(s) % s.of.heads;
    sequence = block_x() / tiles(s) / s.of.heads;
    first_column = block_x() % tiles(s) * COLUMNS;
    segments = (steps.count + CHUNK - 1) / CHUNK;
    first_segment = segment_index(s.anchors, sequence, 0);
  }

  // Blocks that share a state.
  CLA_DEVICE static unsigned tiles(const cla_delta_sweep &s) { return (s.of.v_dim + COLUMNS - 1) / COLUMNS; }
  CLA_DEVICE int columns() const { return s.of.v_dim - first_column < COLUMNS ? s.of.v_dim - first_column : COLUMNS; }
  CLA_DEVICE int64_t segment(int64_t i) const { return REVERSE ? segments - 1 - i : i; }
  // A sequence is cut from its first token on, either way.
  CLA_DEVICE int count_at(int64_t i) const {
    const int64_t left = steps.count - segment(i) * CHUNK;
    return left < CHUNK ? (int)left : CHUNK;
  }
  // The rows of a tensor whose columns are those of the state, from the block's first on.
  CLA_DEVICE Rows of_columns(const cla_tensor &x) const {
    Rows rows(x, steps.batch, head);
    if (rows.data) rows.data += first_column * rows.element * rows.size();
    return rows;
  }
  // The thread's columns of the state within the block, h = 0 or 1.
  CLA_DEVICE int column(int h) const { return 64 * group + 16 * warp + row0 + 8 * h; }

  CLA_DEVICE unsigned char *stage(int64_t i) const { return shared + L::STAGES + (i & 1) * L::STAGE; }
  CLA_DEVICE static Tile tile(unsigned char *stage, int at) { return {stage + at}; }
  CLA_DEVICE static Tile prepared(unsigned char *stage, int which) { return {stage + L::PREPARED + which}; }
  // What is read of the state, written to it, and which of these q is.
  CLA_DEVICE Tile reads(unsigned char *stage) const { return {BY_CHANNEL ? shared + Keys::READS : stage + L::K}; }
  CLA_DEVICE Tile writes(unsigned char *stage) const { return {BY_CHANNEL ? shared + Keys::WRITES : stage + L::K}; }
  CLA_DEVICE Tile queries(unsigned char *stage) const { return {BY_CHANNEL ? shared + Keys::QUERIES : stage + L::Q}; }
  CLA_DEVICE Tile own_values(unsigned char *stage) const { return tile(stage, L::VALUE).from_column(64 * group); }
  CLA_DEVICE Tile out_tile(int64_t i) const { return {shared + L::OUT + (i & 1) * L::VALUES}; }
  CLA_DEVICE static const float *factors(unsigned char *stage, int which) {
    return (const float *)(stage + L::PREPARED + Prepared::FACTORS) + which;
  }

  // ---- the state ----

  // f(element, where it lies in memory from `first` on) for those that the state has. Addresses are found whether they are
  // used or not: that is less than to branch.
  template <class F> CLA_DEVICE void each_of_state(float *first, int64_t row, int64_t col, F f) {
    float *at = first + pair * row + column(0) * col;
    const bool inside[2] = {column(0) < columns(), column(1) < columns()};
    CLA_UNROLL
    for (int j = 0; j < R / 8; j++, at += 8 * row) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) {
        float *x = at + (e & 1 ? row : 0) + (e >> 1 ? 8 * col : 0);
        if (inside[e >> 1] && 8 * j + pair + (e & 1) < s.of.k_dim) f(state[j][e], x);
      }
    }
  }
  CLA_DEVICE void load_state() {
    zero(state);
    if (!s.first.data) return;
    float *from = s.first.data + sequence * s.first.sequence + head * s.first.head + first_column * s.first.col;
    each_of_state(from, s.first.row, s.first.col, [](float &x, const float *at) { x = *at; });
  }
  CLA_DEVICE void store_state(float *to, int64_t row, int64_t col) {
    each_of_state(to, row, col, [](float x, float *at) { *at = x; });
  }
  CLA_DEVICE void keep(int64_t i) {
    if (!s.anchors.data) return;
    const int64_t size = (int64_t)s.of.k_dim * s.of.v_dim;
    store_state(s.anchors.data + ((first_segment + segment(i)) * s.of.heads + head) * size + first_column, s.of.v_dim, 1);
  }

  // ---- loading ----

  // A thread's 16-byte pieces of the rows of a segment: the same piece of every EVERY-th row, so that one address and one
  // stride lead to all of them, in memory and in a tile.
  template <int WIDTH> struct Pieces {
    static constexpr int PER_ROW = WIDTH / 8, EVERY = MOVING / PER_ROW, EACH = CHUNK / EVERY;
    static_assert(EVERY % 8 == 0 && EVERY * EACH == CHUNK, "pieces cover the rows, a multiple of the swizzle's period apart");
    unsigned char *data;  // of the segment at hand
    int64_t row_bytes;    // to the next step
    int tid, width;

    CLA_DEVICE Pieces(const DeltaChunked &sweep, const Rows &rows, int width) : tid(sweep.tid), width(width) {
      row_bytes = (REVERSE ? -2 : 2) * rows.token;
      data = rows.data + 16 * piece() + sweep.steps.token(0) * rows.token * 2 + row() * row_bytes;
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
  struct Moved {
    Pieces<R> k, q;
    Pieces<COLUMNS> value, out;
    bool in_pieces;

    CLA_DEVICE Moved(const DeltaChunked &sweep)
        : Moved(sweep, Rows(sweep.s.of.k, sweep.steps.batch, sweep.head), Rows(sweep.s.of.q, sweep.steps.batch, sweep.head),
                sweep.of_columns(sweep.s.value), sweep.of_columns(sweep.s.out)) {}
    CLA_DEVICE Moved(const DeltaChunked &sweep, const Rows &k, const Rows &q, const Rows &value, const Rows &out)
        : k(sweep, k, sweep.s.of.k_dim), q(sweep, q, sweep.s.of.k_dim), value(sweep, value, value.data ? sweep.columns() : 0),
          out(sweep, out, sweep.columns()) {
      const int width = sweep.s.of.k_dim, columns = sweep.columns();
      auto whole = [](const Rows &x, int width) { return !x.data || x.in_pieces(width); };
      in_pieces = whole(value, columns) && whole(out, columns);
      if (!BY_CHANNEL) in_pieces = in_pieces && k.in_pieces(width) && q.in_pieces(width);
    }
  };

  static constexpr int64_t PREPARED_BYTES = Prepared::BYTES + L::DECAYED;
  CLA_DEVICE int64_t prepared_index(int64_t i) const { return (first_segment + segment(i)) * s.of.heads + head; }
  template <int BYTES> CLA_DEVICE void copy(unsigned char *to, const unsigned char *from) const {
    constexpr int WHOLE = BYTES / (16 * MOVING) * (16 * MOVING);
    to += 16 * tid, from += 16 * tid;
    CLA_UNROLL
    for (int at = 0; at < WHOLE; at += 16 * MOVING) copy16_async(to + at, from + at, true);
    if (16 * tid < BYTES - WHOLE) copy16_async(to + WHOLE, from + WHOLE, true);
  }
  // f(offset, whether it is in a block on the diagonal or below) for this thread's pieces of T and P. Others are zero from the
  // beginning on.
  template <class F> CLA_DEVICE void each_prepared_piece(F f) const {
    const int piece = (tid % 8) ^ (tid / 8 % 8), row = tid / 8;
    CLA_UNROLL
    for (int at = 0; at < Prepared::FACTORS; at += 16 * MOVING) {
      f(at + 16 * tid, piece / 2 <= (at % SUBTILE / 128 + row) / 16);
    }
  }
  CLA_DEVICE void clear_prepared() const {
    each_prepared_piece([&](int at, bool used) {
      if (used) return;
      store16(stage(0) + L::PREPARED + at, {0, 0, 0, 0});
      store16(stage(1) + L::PREPARED + at, {0, 0, 0, 0});
    });
  }
  CLA_DEVICE void copy_prepared(unsigned char *to, const unsigned char *from) const {
    each_prepared_piece([&](int at, bool used) {
      if (used) copy16_async(to + at, from + at, true);
    });
    constexpr int AT = Prepared::FACTORS;
    if (16 * tid < Prepared::BYTES - AT) copy16_async(to + AT + 16 * tid, from + AT + 16 * tid, true);
  }

  // A stage.
  CLA_DEVICE void fetch(Moved &of, int64_t i) const {
    if (i < segments) {
      unsigned char *to = stage(i);
      const int count = count_at(i);
      if (of.in_pieces) {
        if (!BY_CHANNEL) of.k.fetch(tile(to, L::K), count);
        if (!BY_CHANNEL && LEAVES != Leaves::WRITTEN) of.q.fetch(tile(to, L::Q), count);
        of.value.fetch(tile(to, L::VALUE), count);
      } else {
        fetch_apart(s, i);
      }
      copy_prepared(to + L::PREPARED, s.prepared + prepared_index(i) * PREPARED_BYTES);
    }
    copies_commit();
  }
  // Decayed keys that are read, q among them but in reverse, and those that are written.
  CLA_DEVICE void fetch_reads(int64_t i) const {
    if (i < segments) {
      const unsigned char *from = s.prepared + prepared_index(i) * PREPARED_BYTES + Prepared::BYTES;
      copy<Keys::EACH>(shared + Keys::READS, from + Keys::READS);
      if (OUTPUT) copy<Keys::EACH>(shared + Keys::QUERIES, from + Keys::QUERIES);
    }
    copies_commit();
  }
  CLA_DEVICE void fetch_writes(int64_t i) const {
    const unsigned char *from = s.prepared + prepared_index(i) * PREPARED_BYTES + Prepared::BYTES;
    copy<Keys::EACH>(shared + Keys::WRITES, from + Keys::WRITES);
    if (REVERSE) copy<Keys::EACH>(shared + Keys::QUERIES, from + Keys::QUERIES);
    copies_commit();
  }
  // Rows that lie otherwise, out of the way of the loop over segments.
  CLA_COLD static void fetch_apart(const cla_delta_sweep &s, int64_t i) {
    const DeltaChunked sweep(s);
    const SegmentSteps at(s.of, sweep.sequence, sweep.segment(i), REVERSE);
    unsigned char *to = sweep.stage(i);
    const Rows k(s.of.k, sweep.steps.batch, sweep.head), q(s.of.q, sweep.steps.batch, sweep.head);
    if (!BY_CHANNEL) {
      fetch_tile<R, MOVING>(tile(to, L::K), k, at, s.of.k_dim, sweep.tid);
      fetch_tile<R, MOVING>(tile(to, L::Q), q, at, s.of.k_dim, sweep.tid);
    }
    fetch_tile<COLUMNS, MOVING>(tile(to, L::VALUE), sweep.of_columns(s.value), at, sweep.columns(), sweep.tid);
  }

  // ---- one segment ----

  // All threads meet before a segment, when what is read of it has come and the one before is done; where keys are decayed,
  // once more, when what is read of the state has been read and what is written to it has come; and at the end.
  enum Meeting { FIRST, SECOND, LAST };
  struct Nothing {
    CLA_DEVICE Nothing(const DeltaChunked &) {}
  };
  // What solving threads have of what is moved.
  using Company = std::conditional_t<APART, Nothing, Moved>;

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
  template <class F> CLA_DEVICE void with_values(float (&acc)[8][4], unsigned char *of, F f) const {
    CLA_UNROLL
    for (int step = 0; step < STEPS; step++) {
      uint32_t v[4];
      load_a_transposed(v, own_values(of), 16 * step, 16 * warp);
      CLA_UNROLL
      for (int i = 0; i < 4; i++) {
        float(&at)[4] = acc[2 * step + (i >> 1)];
        f(at[2 * (i & 1)], low_bf16(v[i])), f(at[2 * (i & 1) + 1], high_bf16(v[i]));
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
  // acc += A b^T for keys.
  template <int COUNT> CLA_DEVICE static void add_by_rows(float (&acc)[8][4], const Operand<COUNT> &a, Tile b) {
    CLA_UNROLL
    for (int k = 0; k < COUNT; k++) {
      add_parts_by_rows<WGMMA>(acc, a.high[k], a.rest[k], b, 16 * k);
      if (BY_CHANNEL) add_part_by_rows<WGMMA>(acc, a.high[k], {b.base + L::KEY}, 16 * k);
    }
  }
  // acc += A b^T, b in two parts and zero above its diagonal.
  CLA_DEVICE static void add_by_triangle(float (&acc)[8][4], const Operand<STEPS> &a, Tile b) {
    CLA_UNROLL
    for (int k = 0; k < STEPS; k++) add_parts_by_triangle<WGMMA>(acc, a.high[k], a.rest[k], b, {b.base + SUBTILE}, 16 * k);
  }
  // X += A b
  CLA_DEVICE void add_to_state(const Operand<STEPS> &a, Tile b) {
    CLA_UNROLL
    for (int k = 0; k < STEPS; k++) {
      add_parts_by_columns<WGMMA, R>(state, a.high[k], a.rest[k], b, 16 * k);
      if (BY_CHANNEL) add_part_by_columns<WGMMA, R>(state, a.high[k], {b.base + L::KEY}, 16 * k);
    }
  }
  CLA_DEVICE void fade_state(unsigned char *of) {
    const float *whole = factors(of, BY_CHANNEL ? Prepared::WHOLE_BY_CHANNEL : Prepared::WHOLE);
    CLA_UNROLL
    for (int j = 0; j < R / 8; j++) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) state[j][e] *= whole[BY_CHANNEL ? 8 * j + pair + (e & 1) : 0];
    }
  }

  CLA_DEVICE void solve(int64_t i, Company &company) {
    unsigned char *of = stage(i);
    const Tile p = prepared(of, Prepared::P);
    const float *from_start = factors(of, Prepared::FROM_START), *to_end = factors(of, Prepared::TO_END);
    // The right side of the system, then m, then what is written; and what P says.
    float acc[8][4], result[8][4];
    zero(acc);
    zero(result);
    {
      Operand<R / 16> x;
      x.pack(state);
      products_fence<WGMMA>();
      if (REVERSE) {
        add_columns_by_rows<WGMMA>(result, own_values(of), p);
        add_columns_by_rows<WGMMA>(result, own_values(of), {p.base + SUBTILE});
      }
      add_by_rows(acc, x, reads(of));
      products_commit<WGMMA>();
      if (OUTPUT) add_by_rows(result, x, queries(of));
      products_commit<WGMMA>();
      products_wait<WGMMA, 1>();
      if (!BY_CHANNEL) scale(acc, from_start);
      if (!REVERSE) with_values(acc, of, [](float &x, float v) { x = v - x; });
      products_wait<WGMMA, 0>();
    }
    if (OUTPUT && !BY_CHANNEL) scale(result, from_start);
    if (REVERSE) {
      CLA_UNROLL
      for (int j = 0; j < 8; j++) {
        CLA_UNROLL
        for (int e = 0; e < 4; e++) acc[j][e] += s.of.scale * result[j][e];
      }
    }
    Operand<STEPS> a;
    a.pack(acc);
    zero(acc);
    products_fence<WGMMA>();
    add_by_triangle(acc, a, prepared(of, Prepared::T));
    products_commit<WGMMA>();
    fade_state(of);
    products_wait<WGMMA, 0>();
    if (BY_CHANNEL) arrive<SECOND>(company, i);

    if (!OUTPUT && s.inner.data) store_inner(i, acc);
    scale(acc, factors(of, Prepared::BETA));
    if (REVERSE) {
      if (s.out.data) wait_with(i, acc, 1.f);
      each_pair(acc, to_end, [](float &a, float &b, float x, float y) {
        a *= BY_CHANNEL ? -1.f : -x, b *= BY_CHANNEL ? -1.f : -y;
      });
      a.pack(acc);
      products_fence<WGMMA>();
      add_to_state(a, writes(of));
      products_commit<WGMMA>();
      // The gradients of outputs, with q: one of them has been faded to the end of the segment, and scaled.
      if (BY_CHANNEL) {
        add_columns_by_columns<WGMMA, R>(state, own_values(of), queries(of));
        add_columns_by_columns<WGMMA, R>(state, own_values(of), {queries(of).base + L::KEY});
      } else {
        with_values(result, of, [&](float &x, float v) { x = s.of.scale * v; });
        scale(result, to_end);
        Operand<STEPS> g;
        g.pack(result);
        products_fence<WGMMA>();
        add_to_state(g, queries(of));
      }
      products_commit<WGMMA>();
      products_wait<WGMMA, 0>();
    } else {
      Operand<STEPS> c;
      if (OUTPUT || BY_CHANNEL) c.pack(acc);
      if (!BY_CHANNEL) {
        scale(acc, to_end);
        a.pack(acc);
      }
      products_fence<WGMMA>();
      add_to_state(BY_CHANNEL ? c : a, writes(of));
      products_commit<WGMMA>();
      if (OUTPUT) add_by_triangle(result, c, p);
      products_commit<WGMMA>();
      products_wait<WGMMA, 0>();
      if (OUTPUT) wait_with(i, result, s.of.scale);
    }
  }

  // ---- results ----

  CLA_DEVICE void store_inner(int64_t i, const float (&acc)[8][4]) const {
    const Rows inner = of_columns(s.inner);
    const SegmentSteps at(s.of, sequence, segment(i), REVERSE);
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
  CLA_DEVICE void wait_with(int64_t i, const float (&acc)[8][4], float factor) const {
    const Tile to = out_tile(i).from_column(64 * group);
    CLA_UNROLL
    for (int j = 0; j < 8; j += 2) {
      uint32_t x[4];
      CLA_UNROLL
      for (int n = 0; n < 4; n++) {
        const float(&from)[4] = acc[j + (n >> 1)];
        x[n] = pack_bf16(factor * from[2 * (n & 1)], factor * from[2 * (n & 1) + 1]);
      }
      store_transposed(to, 8 * j, 16 * warp, x);
    }
  }
  CLA_DEVICE void flush(Moved &of, int64_t i) const {
    if (of.in_pieces) of.out.store(out_tile(i), count_at(i));
    else flush_apart(s, i);
  }
  CLA_COLD static void flush_apart(const cla_delta_sweep &s, int64_t i) {
    const DeltaChunked sweep(s);
    const SegmentSteps at(s.of, sweep.sequence, sweep.segment(i), REVERSE);
    const Rows out = sweep.of_columns(s.out);
    for (int n = sweep.tid; n < at.count * COLUMNS; n += MOVING) {
      const int row = n / COLUMNS, c = n % COLUMNS;
      if (c < sweep.columns()) out.store(at.token(row), c, from_bf16(*sweep.out_tile(i).element(row, c)));
    }
  }

  // ---- the sweep ----

  CLA_DEVICE void start(Moved &of) {
    clear_prepared();
    fetch(of, 0);
    if (BY_CHANNEL) fetch_reads(0);
  }
  template <Meeting WHICH> CLA_DEVICE void meet_moving(Moved &of, int64_t i) {
    copies_wait<WHICH == SECOND ? 1 : 0>();
    shared_fence();
    meet(WHICH);
    if (WHICH == SECOND) return fetch_reads(i + 1);
    if (WHICH == FIRST) {
      if (BY_CHANNEL) fetch_writes(i);
      fetch(of, i + 1);
    }
    if (s.out.data && i > 0) flush(of, i - 1);
  }
  // As one that solves.
  template <Meeting WHICH> CLA_DEVICE void arrive(Company &of, int64_t i) {
    if constexpr (APART) meet(WHICH);
    else meet_moving<WHICH>(of, i);
  }

  CLA_DEVICE void move() {
    Moved of(*this);
    start(of);
    CLA_NO_UNROLL
    for (int64_t i = 0; i < segments; i++) {
      meet_moving<FIRST>(of, i);
      if (BY_CHANNEL) meet_moving<SECOND>(of, i);
    }
    meet_moving<LAST>(of, segments);
  }
  CLA_DEVICE void solve() {
    Company of(*this);
    if constexpr (!APART) start(of);
    load_state();
    CLA_NO_UNROLL
    for (int64_t i = 0; i < segments; i++) {
      arrive<FIRST>(of, i);
      if (!OUTPUT) keep(i);
      solve(i, of);
    }
    arrive<LAST>(of, segments);
    if (!s.last.data) return;
    store_state(s.last.data + sequence * s.last.sequence + head * s.last.head + first_column * s.last.col, s.last.row,
                s.last.col);
  }

  CLA_DEVICE void run() {
    if (APART && group == W) move();
    else solve();
  }
};

template <int R, int W, bool BY_CHANNEL, Leaves LEAVES>
CLA_KERNEL((DeltaChunked<R, W, BY_CHANNEL, LEAVES>::THREADS), 1)
void delta_chunked_kernel(const CLA_CONSTANT cla_delta_sweep s) {
  DeltaChunked<R, W, BY_CHANNEL, LEAVES>(s).run();
}

template <int R, int W, bool BY_CHANNEL, Leaves LEAVES> int32_t launch_delta_chunked(const cla_delta_sweep &s, void *stream) {
  using Kernel = DeltaChunked<R, W, BY_CHANNEL, LEAVES>;
  const int64_t tiles = (s.of.v_dim + Kernel::COLUMNS - 1) / Kernel::COLUMNS;
  const Dims grid = {(int64_t)s.of.sequences * s.of.heads * tiles, 1};
  return launch(delta_chunked_kernel<R, W, BY_CHANNEL, LEAVES>, grid, Kernel::THREADS, Kernel::L::SHARED, stream, s);
}
template <int R, int W, bool BY_CHANNEL>
int32_t launch_delta_chunked(DeltaChunkLayout<R, W, BY_CHANNEL>, const cla_delta_sweep &s, void *stream) {
  if (s.reverse) return launch_delta_chunked<R, W, BY_CHANNEL, Leaves::BOTH_IN_REVERSE>(s, stream);
  return s.out.data ? launch_delta_chunked<R, W, BY_CHANNEL, Leaves::OUTPUT>(s, stream)
                    : launch_delta_chunked<R, W, BY_CHANNEL, Leaves::WRITTEN>(s, stream);
}

// Calls `f` with the layout that a sweep takes.
template <class F> auto with_layout(const cla_delta_sweep &s, F f) {
  auto by_gate = [&](auto rows, auto groups) {
    constexpr int R = decltype(rows)::value, W = decltype(groups)::value;
    return s.of.gate_kind == CLA_GATE_ROWS ? f(DeltaChunkLayout<R, W, true>()) : f(DeltaChunkLayout<R, W, false>());
  };
  auto by_columns = [&](auto rows) {
    return s.columns <= 64 ? by_gate(rows, std::integral_constant<int, 1>()) : by_gate(rows, std::integral_constant<int, 2>());
  };
  return s.of.k_dim <= 64 ? by_columns(std::integral_constant<int, 64>()) : by_columns(std::integral_constant<int, 128>());
}

}  // namespace cla

extern "C" int32_t cla_delta_chunked(const cla_delta_sweep *sweep, void *stream) {
  return cla::with_layout(*sweep, [&](auto layout) { return cla::launch_delta_chunked(layout, *sweep, stream); });
}

extern "C" int64_t cla_delta_shared_memory(const cla_delta_sweep *sweep) {
  using namespace cla;
  const cla_delta_sweep &s = *sweep;
  auto bf16 = [](const cla_tensor &x) { return !x.data || x.dtype == CLA_BF16; };
  if (s.of.low_rank || s.of.k_dim > 128) return -1;
  if (!bf16(s.of.q) || !bf16(s.of.k) || !bf16(s.value) || !bf16(s.out)) return -1;
  return with_layout(s, [](auto layout) -> int64_t { return decltype(layout)::SHARED; });
}
