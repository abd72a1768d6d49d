// The rows that a chunked sweep reads, and their way into shared memory.
#pragma once
#include <type_traits>

#include "chunked_layout.cuh"
#include "elements.cuh"

namespace cla {

// What a sweep reads and writes, for a machine that moves sub-tiles by itself.
struct ChunkMaps {
  SubtileMap read, write, value, out;
};
struct NoMaps {};
template <class L> using Maps = std::conditional_t<L::AHEAD, ChunkMaps, NoMaps>;

template <class L> struct ChunkInputs {
  static constexpr int R = L::R, THREADS = L::THREADS, COLUMNS = L::COLUMNS, GATES = L::GATES, PITCH = L::PITCH;
  static constexpr bool SCALAR = L::SCALAR, BY_ROW = L::BY_ROW, BY_COLUMN = L::BY_COLUMN, VECTOR = L::VECTOR;

  const cla_sweep &s;
  const Maps<L> &maps;
  unsigned char *shared;
  Place place;
  Steps steps;
  Rows read, write, value, gate, out;
  int tid, lane, warp, group, row0, pair, first_column;
  int64_t begin, end;

  CLA_DEVICE ChunkInputs(const cla_sweep &s, const Maps<L> &maps)
      : s(s), maps(maps), shared(shared_memory()), place(block_x(), s.heads, s.segments),
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
  }

  // Of this block's columns, those that the state has.
  CLA_DEVICE int columns() const { return s.cols - first_column < COLUMNS ? s.cols - first_column : COLUMNS; }
  CLA_DEVICE int gates() const { return BY_ROW ? s.rows : columns(); }
  CLA_DEVICE bool last_segment() const { return end == steps.count; }
  CLA_DEVICE Tile key_tile(int stage, int which, int part) const {
    return {shared + ((stage % L::KEY_STAGES * 2 + which) * L::KEY_PARTS + part) * L::KEY};
  }
  CLA_DEVICE Tile read_tile(int stage, int part) const { return key_tile(stage, 0, part); }
  CLA_DEVICE Tile write_tile(int stage, int part) const { return key_tile(stage, 1, part); }
  CLA_DEVICE Tile value_tile(int stage, int part) const {
    return {shared + L::VALUES + (stage % L::VALUE_STAGES * L::VALUE_PARTS + part) * L::VALUE};
  }
  // What operands are still to be made of: READ, WRITE or VALUE, as a tile of 16-bit numbers or as rows of f32.
  static constexpr int READ = 0, WRITE = 1, VALUE = 2;
  CLA_DEVICE Tile raw_tile(int which) const {
    return {shared + (which == VALUE ? L::RAW_VALUES : L::RAW + which * L::RAW_KEY)};
  }
  CLA_DEVICE float *raw_row(int which, int row) const {
    return (float *)raw_tile(which).base + row * (which == VALUE ? COLUMNS : R);
  }
  CLA_DEVICE Tile raw_gates() const { return {shared + L::RAW_GATES}; }
  CLA_DEVICE Tile scores(int set, int part) const {
    return {shared + L::SCORES + (set % L::SCORE_SETS * 2 + part) * SUBTILE};
  }
  CLA_DEVICE Tile out_tile(int stage) const {
    return L::OUT_OF_READ ? read_tile(stage, 0) : Tile{shared + L::OUT + stage % L::OUT_SETS * L::VALUE};
  }
  // In rows of OUT_PITCH, or in sub-tiles of 32 columns.
  CLA_DEVICE float *wide_out(int row, int column) const {
    if (!L::SUBTILES_OUT) return (float *)(shared + L::OUT) + row * L::OUT_PITCH + column;
    const Tile subtile = {shared + L::OUT + column / 32 * SUBTILE};
    return (float *)subtile.piece(row, column % 32 / 4) + column % 4;
  }
  CLA_DEVICE float *factors() const { return (float *)(shared + L::FACTORS); }
  CLA_DEVICE float *decays() const { return (float *)(shared + L::DECAYS); }
  CLA_DEVICE float *totals() const { return (float *)(shared + L::TOTALS); }

  // ---- loading whole sub-tiles ----
  // Tiles then have rows in the order of the tokens, which is not that of the steps in a reverse sweep. By one thread.

  // The row of the t-th step of a chunk, and the other way round.
  CLA_DEVICE int row_of(int t) const { return L::AHEAD && s.reverse ? CHUNK - 1 - t : t; }
  CLA_DEVICE int64_t first_token(int64_t step) const { return steps.token(s.reverse ? step + CHUNK - 1 : step); }
  CLA_DEVICE CopyCount *key_count(int stage) const { return (CopyCount *)(shared + L::COUNTS) + stage % L::KEY_STAGES; }
  CLA_DEVICE CopyCount *value_count(int stage) const {
    return (CopyCount *)(shared + L::COUNTS) + L::KEY_STAGES + stage % L::VALUE_STAGES;
  }
  CLA_DEVICE void prepare_counts() {
    if (tid < L::KEY_STAGES + L::VALUE_STAGES) prepare_count(key_count(0) + tid);
  }
  template <int WIDTH>
  CLA_DEVICE void copy_tile(Tile to, const cla_tensor &from, const SubtileMap &map, int column, int64_t step,
                            CopyCount *count) {
    CLA_UNROLL
    for (int c = 0; c < WIDTH; c += 64) {
      copy_subtile(to.from_column(c).base, map, column + c, first_token(step), place.head / from.group, steps.batch, count);
    }
  }
  CLA_DEVICE void copy_keys(int n, int64_t step, bool reads) {
    if (step >= end) return;
    expect_bytes(key_count(n), (reads ? 2 : 1) * L::KEY);
    if (reads) copy_tile<R>(read_tile(n, 0), s.read, maps.read, 0, step, key_count(n));
    copy_tile<R>(write_tile(n, 0), s.write, maps.write, 0, step, key_count(n));
  }
  CLA_DEVICE void copy_values(int n, int64_t step) {
    if (step >= end) return;
    expect_bytes(value_count(n), L::VALUE);
    copy_tile<COLUMNS>(value_tile(n, 0), s.value, maps.value, first_column, step, value_count(n));
  }
  CLA_DEVICE void wait_for_keys(int n) const { wait_for_bytes(key_count(n), n / L::KEY_STAGES); }
  CLA_DEVICE void wait_for_values(int n) const { wait_for_bytes(value_count(n), n / L::VALUE_STAGES); }
  // By all threads: rows of steps that do not write hold anything until then. Their values may be infinite, so that they
  // are as much in the way as the keys.
  CLA_DEVICE void drop_rows(int n, int64_t step) {
    const int from = writing(step, count_at(step));
    for (int i = tid; i < (CHUNK - from) * (R + COLUMNS) / 8; i += THREADS) {
      const int row = row_of(from + i / ((R + COLUMNS) / 8)), piece = i % ((R + COLUMNS) / 8);
      store16(piece < R / 8 ? write_tile(n, 0).piece(row, piece) : value_tile(n, 0).piece(row, piece - R / 8), {0, 0, 0, 0});
    }
  }

  // ---- loading piece by piece ----

  // A thread's 16-byte pieces of the rows of a chunk: the same piece of every EVERY-th row, so that one address and one
  // stride lead to all of them, in memory and in a tile (EVERY is a multiple of 8, the period of the swizzle). Numbers of 4
  // bytes lie in rows there.
  template <int WIDTH, int SIZE> struct Pieces {
    static constexpr int PER_ROW = SIZE * WIDTH / 16, EVERY = THREADS / PER_ROW, EACH = CHUNK / EVERY;
    static constexpr int STRIDE = EVERY * (SIZE == 4 ? 4 * WIDTH : 128);  // bytes between EVERY rows in shared memory
    static_assert((SIZE == 4 || EVERY % 8 == 0) && EACH * EVERY == CHUNK, "pieces cover the chunk");
    unsigned char *data;  // of the step at hand
    int64_t stride;       // bytes between EVERY steps
    int row, column;

    CLA_DEVICE Pieces(const ChunkInputs &sweep, const Rows &rows)
        : row(sweep.tid / PER_ROW), column(sweep.tid % PER_ROW * (16 / SIZE)) {
      const int64_t step = sweep.s.reverse ? -SIZE * rows.token : SIZE * rows.token;
      stride = EVERY * step;
      data = rows.data + SIZE * column + sweep.steps.token(0) * rows.token * SIZE + (sweep.begin + row) * step;
    }
    CLA_DEVICE unsigned char *within(Tile tile) const {
      return SIZE == 4 ? tile.base + 4 * (row * WIDTH + column) : tile.piece(row, column / 8);
    }
    CLA_DEVICE void next_chunk() { data += EACH * stride; }
  };

  // Zeros for rows from `count` and columns from `width` on.
  template <int WIDTH> CLA_DEVICE void fetch(Tile to, Pieces<WIDTH, L::SIZE> &at, int count, int width) {
    unsigned char *into = at.within(to);
    CLA_UNROLL
    for (int i = 0; i < at.EACH; i++) {
      const bool valid = at.column < width && at.row + i * at.EVERY < count;
      copy16_async(into + i * at.STRIDE, at.data + i * at.stride, valid);
    }
    at.next_chunk();
  }
  CLA_DEVICE int count_at(int64_t step) const { return end - step < CHUNK ? (int)(end - step) : CHUNK; }
  // Of the chunk's steps up to `to`, those that write.
  CLA_DEVICE int writing(int64_t step, int to) const { return to > 0 && !steps.writes(s, step + to - 1) ? to - 1 : to; }
  struct Fetched {
    Pieces<R, L::SIZE> read, write;
    Pieces<COLUMNS, L::SIZE> value, out;
  };
  CLA_DEVICE void fetch_keys(Fetched &f, int stage, int64_t step) {
    if (step >= end) return;
    const int count = count_at(step);
    const Tile r = L::STAGED_KEYS ? raw_tile(READ) : read_tile(stage, 0);
    const Tile w = L::STAGED_KEYS ? raw_tile(WRITE) : write_tile(stage, 0);
    fetch(r, f.read, count, s.rows);
    fetch(w, f.write, writing(step, count), s.rows);
  }
  CLA_DEVICE void fetch_values(Fetched &f, int stage, int64_t step) {
    if (step >= end) return;
    fetch(L::STAGED_VALUES ? raw_tile(VALUE) : value_tile(stage, 0), f.value, count_at(step), columns());
  }

  // Whether gates are staged in 16 bits, as the inputs are, in a tile, or as rows of f32.
  CLA_DEVICE bool gates_in_tile() const { return L::SIZE == 2 && gate.dtype == L::IN; }
  CLA_DEVICE float *raw_gate_row(int row) const { return (float *)(shared + L::RAW_GATES) + row * GATES; }
  CLA_DEVICE void fetch_gates(int64_t step) {
    if (step >= end) return;
    gates_in_tile() ? fetch_gates_as<8>(step) : fetch_gates_as<4>(step);
  }
  // EACH: elements of a piece. A thread's are as in Pieces, but found anew for every chunk.
  template <int EACH> CLA_DEVICE void fetch_gates_as(int64_t step) {
    constexpr int PER_ROW = GATES / EACH, EVERY = THREADS / PER_ROW;
    constexpr bool TILE = EACH == 8;
    static_assert(!TILE || EVERY % 8 == 0, "the period of the swizzle");
    const int count = count_at(step);
    // The decay before a step of a reverse sweep is that of the step before.
    const int shift = s.reverse ? 1 : 0, first = step == 0 ? shift : 0;
    const int tid = opaque(this->tid), row = tid / PER_ROW, c = tid % PER_ROW * EACH;
    const int64_t bytes = gate.token * (16 / EACH), stride = EVERY * (s.reverse ? -bytes : bytes);
    const unsigned char *data = gate.data + steps.token(step + row - shift) * bytes + c * (16 / EACH);
    unsigned char *to = TILE ? raw_gates().piece(row, c / 8) : (unsigned char *)(raw_gate_row(row) + c);
    CLA_UNROLL
    for (int i = 0; i < CHUNK / EVERY; i++) {
      const int at = row + i * EVERY;
      copy16_async(to + i * EVERY * (TILE ? 128 : 4 * GATES), data + i * stride, c < gates() && at >= first && at < count);
    }
  }

  // Pieces of 8 elements that a thread loads before it looks at the first, so that the loads are under way together.
  static constexpr int BATCH = 4;

  // The rows of a chunk, 8 elements at a time, to `use(row, column, elements)`; zeros for rows outside from..to. `token_of`
  // is where a row comes from.
  template <int WIDTH, class Token, class Use>
  CLA_DEVICE void each8(const Rows &rows, int from, int to, int width, Token token_of, Use use) {
    const int tid = opaque(this->tid);
    const bool pieces = L::COPIED || rows.in_pieces(width);
    constexpr int EACH = CHUNK * WIDTH / 8 / THREADS, N = EACH < BATCH ? EACH : BATCH;
    static_assert(EACH % N == 0, "whole batches");
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
        if (valid && rows.dtype == CLA_F32 && c + 4 < width) high[i] = load16(p + 16);
      }
      CLA_UNROLL
      for (int i = 0; i < N; i++) {
        const int at = tid + (first + i) * THREADS, row = at / (WIDTH / 8), c = at % (WIDTH / 8) * 8;
        const bool valid = row >= from && row < to && c < width;
        float x[8];
        if (pieces) {
          unpack_eight(x, rows.dtype, low[i], high[i]);
        } else {
          CLA_UNROLL
          for (int k = 0; k < 8; k++) x[k] = valid && c + k < width ? rows.load(token_of(row), c + k) : 0.f;
        }
        use(row, c, x);
      }
    }
  }
};

}  // namespace cla
