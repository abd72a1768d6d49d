// What the kernels that go token by token are made of: a tile of a state in registers, and how the vectors of a few tokens come
// to shared memory.
#pragma once
#include <type_traits>

#include "elements.cuh"

namespace cla {

constexpr int TILE_WARPS = 8, TILE_THREADS = 32 * TILE_WARPS;

// 64 columns of a state, 8 a warp with all their rows: what is read of the state is a sum over lanes of one warp, and warps
// wait for one another only when tokens come. A thread has EACH rows of two columns, in runs of up to four, so that numbers of
// theirs are in one piece of shared memory.
template <int ROWS_> struct StateTile {
  static constexpr int ROWS = ROWS_, OF_WARP = 8, COLUMNS = TILE_WARPS * OF_WARP, WIDTH = 2;
  static constexpr int COLUMN_GROUPS = OF_WARP / WIDTH, ROW_GROUPS = 32 / COLUMN_GROUPS, EACH = ROWS / ROW_GROUPS;
  static constexpr int RUN = EACH < 4 ? EACH : 4;

  float x[EACH][WIDTH];
  int column, first_row;  // of this block's columns, and of the rows

  CLA_DEVICE StateTile() {
    const int lane = thread_index() % 32;
    column = thread_index() / 32 * OF_WARP + lane % COLUMN_GROUPS * WIDTH;
    first_row = lane / COLUMN_GROUPS * RUN;
  }
  CLA_DEVICE static int warp() { return thread_index() / 32; }
  CLA_DEVICE static int lane() { return thread_index() % 32; }
  CLA_DEVICE int row(int i) const { return i / RUN * (ROW_GROUPS * RUN) + first_row + i % RUN; }

  template <class F> CLA_DEVICE void each(F f) {
    CLA_UNROLL
    for (int i = 0; i < EACH; i++) {
      CLA_UNROLL
      for (int c = 0; c < WIDTH; c++) f(i, c);
    }
  }
  CLA_DEVICE void zero() {
    each([&](int i, int c) { x[i][c] = 0.f; });
  }

  // `rows x columns` at `from`, 8 or 16 bytes at a time where that can be, all loads under way at once.
  CLA_DEVICE void load(const float *from, int64_t row_stride, int64_t column_stride, int rows, int columns) {
    zero();
    if (in_pairs(from, row_stride, column_stride, columns)) {
      if (column >= columns) return;
      CLA_UNROLL
      for (int i = 0; i < EACH; i++) {
        if (row(i) >= rows) continue;
        const Vec2 v = *(const Vec2 *)pair(from, row_stride, i);
        x[i][0] = bits_to_float(v.x), x[i][1] = bits_to_float(v.y);
      }
    } else if (RUN == 4 && row_stride == 1 && column_stride % 4 == 0 && rows % 4 == 0 && ((uintptr_t)from & 15) == 0) {
      CLA_UNROLL
      for (int i = 0; i < EACH; i += RUN) {
        CLA_UNROLL
        for (int c = 0; c < WIDTH; c++) {
          if (row(i) >= rows || column + c >= columns) continue;
          float v[4];
          load4(v, from + row(i) + (column + c) * column_stride);
          CLA_UNROLL
          for (int j = 0; j < RUN; j++) x[i + j][c] = v[j];
        }
      }
    } else {
      each([&](int i, int c) {
        if (row(i) < rows && column + c < columns) x[i][c] = from[row(i) * row_stride + (column + c) * column_stride];
      });
    }
  }
  // The tile times a factor.
  CLA_DEVICE void store(float *to, int64_t row_stride, int64_t column_stride, int rows, int columns, float scale = 1.f) {
    if (in_pairs(to, row_stride, column_stride, columns)) {
      if (column >= columns) return;
      CLA_UNROLL
      for (int i = 0; i < EACH; i++) {
        if (row(i) >= rows) continue;
        *(Vec2 *)pair(to, row_stride, i) = {float_to_bits(scale * x[i][0]), float_to_bits(scale * x[i][1])};
      }
    } else {
      each([&](int i, int c) {
        if (row(i) < rows && column + c < columns) to[row(i) * row_stride + (column + c) * column_stride] = scale * x[i][c];
      });
    }
  }
  // Whether a thread's two numbers of a row lie side by side, and rows not so far apart that 32 bits would not tell.
  CLA_DEVICE static bool in_pairs(const float *at, int64_t row_stride, int64_t column_stride, int columns) {
    return column_stride == 1 && row_stride % 2 == 0 && row_stride >= 0 && row_stride < (1 << 28) && columns % 2 == 0 &&
           ((uintptr_t)at & 7) == 0;
  }
  template <class T> CLA_DEVICE T *pair(T *at, int64_t row_stride, int i) const {
    const uint64_t stride = 4 * (uint32_t)row_stride;
    return (T *)((uintptr_t)at + 4 * column + first_row * stride + (i / RUN * (ROW_GROUPS * RUN) + i % RUN) * stride);
  }

  // f(i, number of the thread's row i), of a vector in shared memory.
  template <class F> CLA_DEVICE void by_row(const float *from, F f) const {
    CLA_UNROLL
    for (int i = 0; i < EACH; i += RUN) {
      float run[4];
      if (RUN == 4) load4(run, from + row(i));
      CLA_UNROLL
      for (int j = 0; j < RUN; j++) f(i + j, RUN == 4 ? run[j] : from[row(i + j)]);
    }
  }
  // The numbers of the thread's columns.
  CLA_DEVICE void by_column(const float *from, float (&y)[WIDTH]) const {
    const Vec2 v = *(const Vec2 *)(from + column);
    y[0] = bits_to_float(v.x), y[1] = bits_to_float(v.y);
  }
  // x *= by_row
  CLA_DEVICE void scale_rows(const float *from) {
    by_row(from, [&](int i, float r) { x[i][0] *= r, x[i][1] *= r; });
  }
  CLA_DEVICE void scale_columns(const float (&y)[WIDTH]) {
    each([&](int i, int c) { x[i][c] *= y[c]; });
  }
  // x += by_row by_column^T
  CLA_DEVICE void add(const float *from, const float (&y)[WIDTH]) {
    by_row(from, [&](int i, float r) { x[i][0] += r * y[0], x[i][1] += r * y[1]; });
  }

  // x^T by_row, of the column that the lane has then: `own_column`. Lanes whose numbers differ in bits 8 and 16 have the same.
  CLA_DEVICE float read(const float *from) const {
    float sum[WIDTH] = {0.f, 0.f};
    by_row(from, [&](int i, float r) { sum[0] += r * x[i][0], sum[1] += r * x[i][1]; });
    return total(sum);
  }
  // The same of two at once: of the other one for lanes that say so by `is_other`.
  CLA_DEVICE float read_two(const float *from, const float *other) const {
    float one[WIDTH] = {0.f, 0.f}, two[WIDTH] = {0.f, 0.f};
    by_row(from, [&](int i, float r) { one[0] += r * x[i][0], one[1] += r * x[i][1]; });
    by_row(other, [&](int i, float r) { two[0] += r * x[i][0], two[1] += r * x[i][1]; });
    const int next = 2 * COLUMN_GROUPS;
    const bool of_other = is_other();
    float all[2];
    CLA_UNROLL
    for (int c = 0; c < WIDTH; c++) all[c] = (of_other ? two[c] : one[c]) + shuffle_xor(of_other ? one[c] : two[c], next);
    float sum = (second() ? all[1] : all[0]) + shuffle_xor(second() ? all[0] : all[1], COLUMN_GROUPS);
    CLA_UNROLL
    for (int d = 2 * next; d < 32; d *= 2) sum += shuffle_xor(sum, d);
    return sum;
  }
  CLA_DEVICE static bool is_other() { return thread_index() & (2 * COLUMN_GROUPS); }
  // The sums over a warp's rows.
  CLA_DEVICE float total(const float (&sum)[WIDTH]) const {
    float all = (second() ? sum[1] : sum[0]) + shuffle_xor(second() ? sum[0] : sum[1], COLUMN_GROUPS);
    CLA_UNROLL
    for (int d = 2 * COLUMN_GROUPS; d < 32; d *= 2) all += shuffle_xor(all, d);
    return all;
  }
  CLA_DEVICE static bool second() { return thread_index() & COLUMN_GROUPS; }
  CLA_DEVICE int own_column() const { return column + second(); }
  // One of four sets of lanes that have all columns of a warp.
  CLA_DEVICE static bool is_set(int which) { return thread_index() % 32 / OF_WARP == (unsigned)which; }
  // What the lanes of a warp have of their own columns, of the thread's.
  CLA_DEVICE void spread(float own, float (&y)[WIDTH]) const {
    const float other = shuffle_xor(own, COLUMN_GROUPS);
    y[0] = second() ? other : own, y[1] = second() ? own : other;
  }
};

// A vector that each token of a sequence and head has, as a warp brings it to shared memory in f32: four neighbours a lane, 128
// floats a time. `copied`: it comes as it lies in memory, while the warp does something else (see `can_be_copied`).
struct TokenVector {
  const unsigned char *data;

  CLA_DEVICE TokenVector(const cla_tensor &x, int64_t batch, int head) : data(Rows(x, batch, head).data) {}

  // Elements `from` and on, of `width`, with zeros up to N behind them.
  template <int N> CLA_DEVICE void fetch(const cla_tensor &x, bool copied, int64_t t, int from, int width, float *to) const {
    CLA_UNROLL
    for (int d = 4 * (thread_index() % 32); d < N; d += 128) {
      const bool there = from + d < width;
      if (!copied) {
        place_elements(x, t, from + d, width, to + d);
      } else if (x.dtype == CLA_F32) {
        copy16_async(to + d, (const float *)data + (there ? t * x.token + from + d : 0), there);
      } else {
        copy8_async(to + d, (const uint16_t *)data + (there ? t * x.token + from + d : 0), there);
      }
    }
  }
  CLA_DEVICE void place_elements(const cla_tensor &x, int64_t t, int d, int width, float *to) const {
    CLA_NO_UNROLL
    for (int i = 0; i < 4; i++) {
      to[i] = data && d + i < width ? load_element(data, x.dtype, t * x.token + (d + i) * x.element) : 0.f;
    }
  }
  // When what has been copied is there: each lane its own, as f of it.
  template <int N, class F> CLA_DEVICE static void convert(const cla_tensor &x, bool copied, float *to, F f) {
    CLA_UNROLL
    for (int d = 4 * (thread_index() % 32); d < N; d += 128) {
      float v[4];
      if (copied && x.dtype != CLA_F32) {
        load_four(v, to + d, x.dtype, 0);
      } else {
        load4(v, to + d);
      }
      CLA_UNROLL
      for (int j = 0; j < 4; j++) v[j] = f(v[j]);
      store4(to + d, v);
    }
  }
  template <int N> CLA_DEVICE static void convert(const cla_tensor &x, bool copied, float *to) {
    if (copied && x.dtype != CLA_F32) convert<N>(x, copied, to, [](float v) { return v; });
  }
};
// On the side of the launch: whether rows of `width` consist of four neighbours, 8 or 16 bytes, one after another.
inline bool can_be_copied(const cla_tensor &x, int width) { return in_groups(x, width, 4); }

// Tokens in groups, as they come to shared memory, one a warp: those at EACH n and on, in the order of the sweep.
template <int EACH> struct TokenGroups {
  int64_t tokens;
  int count;
  bool reverse;

  CLA_DEVICE TokenGroups(int64_t tokens, bool reverse)
      : tokens(tokens), count((int)((tokens + EACH - 1) / EACH)), reverse(reverse) {}
  CLA_DEVICE int64_t start(int group) const { return (int64_t)EACH * (reverse ? count - 1 - group : group); }
  CLA_DEVICE int size(int group) const {
    const int64_t rest = tokens - start(group);
    return rest < EACH ? (int)rest : EACH;
  }
  // The place in the sequence of a group's i-th.
  CLA_DEVICE int64_t place(int group, int i) const { return start(group) + (reverse ? size(group) - 1 - i : i); }
};

// The sequence and head of a block of a tile.
CLA_DEVICE Place place_of(unsigned block, unsigned heads) {
  Place place(0, 1, 1);
  place.sequence = block / heads, place.head = (int)(block % heads);
  return place;
}

// For each group, in order: `fetch` asks for its tokens while the group before is solved, `place` makes them what `solve`
// needs, token by token if the warp has columns (`solves`), and `finish` is called when all warps have solved the group. `begin`
// is called when the first tokens are on their way.
template <class Groups, class Begin, class Fetch, class Place, class Solve, class Finish>
CLA_DEVICE void for_groups(const Groups &groups, bool solves, Begin begin, Fetch fetch, Place place, Solve solve,
                           Finish finish) {
  if (groups.count == 0) return begin();
  auto next = fetch(0);
  begin();
  place(0, next);
  CLA_NO_UNROLL
  for (int group = 0; group < groups.count; group++) {
    const bool more = group + 1 < groups.count;
    barrier();
    if (group > 0) finish(group - 1);
    // Where the tokens go that are asked for, this warp alone may still have looked.
    warp_barrier();
    if (more) next = fetch(group + 1);
    const int size = solves ? groups.size(group) : 0;
    CLA_NO_UNROLL
    for (int i = 0; i < size; i++) solve(group, i);
    if (more) place(group + 1, next);
  }
  barrier();
  finish(groups.count - 1);
}

// Calls `launch` with the rows of a tile that has room for so many, as a type.
template <class Launch> int32_t by_rows(int rows, Launch launch) {
  if (rows <= 16) return launch(std::integral_constant<int, 16>());
  if (rows <= 32) return launch(std::integral_constant<int, 32>());
  if (rows <= 64) return launch(std::integral_constant<int, 64>());
  if (rows <= 128) return launch(std::integral_constant<int, 128>());
  return launch(std::integral_constant<int, 256>());
}

}  // namespace cla
