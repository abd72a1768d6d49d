// 32 columns of a state in the registers of a block of 128 threads, and what the kernels that go token by token do with them.
#pragma once
#include <type_traits>

#include "delta.h"
#include "elements.cuh"

namespace cla {

// A thread has EACH rows of four columns. Its rows come in runs of up to four, so that numbers of theirs are in one piece of
// shared memory.
template <int EACH> struct DeltaState {
  static constexpr int COLUMNS = 32, COLUMN_GROUPS = 8, ROW_GROUPS = 16, THREADS = COLUMN_GROUPS * ROW_GROUPS;
  static constexpr int ROWS = ROW_GROUPS * EACH, RUN = EACH < 4 ? EACH : 4, WARPS = THREADS / 32;
  static_assert(COLUMNS == CLA_DELTA_COLUMNS, "as the interface says");

  float x[EACH][4];
  int column, first_row;  // of this block's columns, and of the rows

  CLA_DEVICE DeltaState() {
    column = thread_index() % COLUMN_GROUPS * 4;
    first_row = thread_index() / COLUMN_GROUPS * RUN;
  }
  CLA_DEVICE int row(int i) const { return i / RUN * (ROW_GROUPS * RUN) + first_row + i % RUN; }

  // f(element, row, column of the block) for those that the state has.
  template <class F> CLA_DEVICE void each(int rows, int columns, F f) {
    CLA_UNROLL
    for (int i = 0; i < EACH; i++) {
      CLA_UNROLL
      for (int c = 0; c < 4; c++) {
        if (row(i) < rows && column + c < columns) f(x[i][c], row(i), column + c);
      }
    }
  }
  CLA_DEVICE void zero() {
    CLA_UNROLL
    for (int i = 0; i < EACH; i++) {
      CLA_UNROLL
      for (int c = 0; c < 4; c++) x[i][c] = 0.f;
    }
  }

  // `rows x columns` at `from`, 16 bytes at a time where that can be, all loads under way at once.
  CLA_DEVICE void load(const float *from, int64_t row_stride, int64_t column_stride, int rows, int columns) {
    const bool aligned = ((uintptr_t)from & 15) == 0;
    if (aligned && column_stride == 1 && row_stride % 4 == 0 && columns % 4 == 0) {
      CLA_UNROLL
      for (int i = 0; i < EACH; i++) {
        x[i][0] = x[i][1] = x[i][2] = x[i][3] = 0.f;
        if (row(i) < rows && column < columns) load4(x[i], from + row(i) * row_stride + column);
      }
    } else if (RUN == 4 && aligned && row_stride == 1 && column_stride % 4 == 0 && rows % 4 == 0) {
      CLA_UNROLL
      for (int i = 0; i < EACH; i += RUN) {
        CLA_UNROLL
        for (int c = 0; c < 4; c++) {
          float v[4] = {0.f, 0.f, 0.f, 0.f};
          if (row(i) < rows && column + c < columns) load4(v, from + row(i) + (column + c) * column_stride);
          CLA_UNROLL
          for (int j = 0; j < RUN; j++) x[i + j][c] = v[j];
        }
      }
    } else {
      zero();
      each(rows, columns, [&](float &e, int r, int c) { e = from[r * row_stride + c * column_stride]; });
    }
  }
  CLA_DEVICE void store(float *to, int64_t row_stride, int64_t column_stride, int rows, int columns) {
    if (column_stride == 1 && row_stride % 4 == 0 && columns % 4 == 0 && ((uintptr_t)to & 15) == 0) {
      CLA_UNROLL
      for (int i = 0; i < EACH; i++) {
        if (row(i) < rows && column < columns) store4(to + row(i) * row_stride + column, x[i]);
      }
    } else {
      each(rows, columns, [&](float &e, int r, int c) { to[r * row_stride + c * column_stride] = e; });
    }
  }

  // The numbers of the thread's rows, of a vector in shared memory.
  CLA_DEVICE void rows_of(const float *from, float (&by_row)[EACH]) const {
    CLA_UNROLL
    for (int i = 0; i < EACH; i += RUN) {
      float run[4];
      if (RUN == 4) load4(run, from + row(i));
      CLA_UNROLL
      for (int j = 0; j < RUN; j++) by_row[i + j] = RUN == 4 ? run[j] : from[row(i + j)];
    }
  }
  // x *= by_row
  CLA_DEVICE void scale_rows(const float *by_row) {
    float r[EACH];
    rows_of(by_row, r);
    CLA_UNROLL
    for (int i = 0; i < EACH; i++) {
      CLA_UNROLL
      for (int c = 0; c < 4; c++) x[i][c] *= r[i];
    }
  }
  CLA_DEVICE void scale_columns(const float (&by_column)[4]) {
    CLA_UNROLL
    for (int i = 0; i < EACH; i++) {
      CLA_UNROLL
      for (int c = 0; c < 4; c++) x[i][c] *= by_column[c];
    }
  }
  // x += by_row by_column^T
  CLA_DEVICE void add(const float *by_row, const float (&by_column)[4]) {
    float r[EACH];
    rows_of(by_row, r);
    CLA_UNROLL
    for (int i = 0; i < EACH; i++) {
      CLA_UNROLL
      for (int c = 0; c < 4; c++) x[i][c] += r[i] * by_column[c];
    }
  }
  // sum += x^T by_row over the thread's rows.
  CLA_DEVICE void read(const float *by_row, float (&sum)[4]) const {
    float r[EACH];
    rows_of(by_row, r);
    CLA_UNROLL
    for (int i = 0; i < EACH; i++) {
      CLA_UNROLL
      for (int c = 0; c < 4; c++) sum[c] += r[i] * x[i][c];
    }
  }
  // Sums over the rows of a warp, into [COLUMNS] of this warp's.
  CLA_DEVICE void sum_of_warp(float (&sum)[4], float *to) const {
    CLA_UNROLL
    for (int c = 0; c < 4; c++) {
      sum[c] += shuffle_xor(sum[c], 8);
      sum[c] += shuffle_xor(sum[c], 16);
    }
    if ((thread_index() & 31) < COLUMN_GROUPS) store4(to + column, sum);
  }
};

// The segment `at` of all, as one of a sequence.
struct SegmentOf {
  int64_t sequence, segment;

  CLA_DEVICE SegmentOf(const cla_delta_states &s, int32_t sequences, int64_t at) {
    if (const uint32_t *first = s.cu_segments) {
      sequence = run_of(first, sequences, at);
      segment = at - first[sequence];
    } else {
      sequence = at / s.each, segment = at % s.each;
    }
  }
};
CLA_DEVICE int64_t segment_index(const cla_delta_states &s, int64_t sequence, int64_t at) {
  return (s.cu_segments ? s.cu_segments[sequence] : sequence * s.each) + at;
}

// The state of segment `at` (of its sequence), for one head.
CLA_DEVICE float *anchor_of(const cla_delta_states &s, int64_t sequence, int64_t at, int head, int heads, int64_t size) {
  return s.data + (segment_index(s, sequence, at) * heads + head) * size;
}

// Calls `launch` with the rows that a thread has of a state with so many, and the family, as types.
template <class Launch> int32_t by_rows(int rows, int32_t low_rank, Launch launch) {
  auto of_family = [&](auto each) { return low_rank ? launch(each, std::true_type()) : launch(each, std::false_type()); };
  if (rows <= 16) return of_family(std::integral_constant<int, 1>());
  if (rows <= 32) return of_family(std::integral_constant<int, 2>());
  if (rows <= 64) return of_family(std::integral_constant<int, 4>());
  if (rows <= 128) return of_family(std::integral_constant<int, 8>());
  return of_family(std::integral_constant<int, 16>());
}

}  // namespace cla
