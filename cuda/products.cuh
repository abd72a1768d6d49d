// Products of tiles by the four warps of a warpgroup, each of which has 16 of the 64 rows of the result: `wgmma` where the
// machine has it, otherwise `mma` on the same tiles. Both leave the same numbers in the same registers: in acc[j] the
// columns 8 j + 2 (lane % 4) and the one after, of the rows lane / 4 and lane / 4 + 8 of the warp's 16.
//
// `wgmma` runs on while the warps do other things: products_fence before the first, products_commit after each group,
// products_wait before the results are looked at. Its tiles must be made visible by shared_fence and a barrier.
#pragma once
#include "platform.cuh"

namespace cla {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool HAS_WGMMA = true;
#else
constexpr bool HAS_WGMMA = false;
#endif

constexpr int CHUNK = CLA_CHUNK;
static_assert(CHUNK == 64, "tiles have 64 rows");
constexpr int SUBTILE = CHUNK * 128;

// bf16 [64, columns] in shared memory: sub-tiles of 64 columns, rows of 128 bytes whose 16-byte pieces are permuted so that
// the same piece of 8 rows falls in different banks (the 128-byte swizzle that wgmma knows). 1024-byte aligned.
struct Tile {
  unsigned char *base;

  CLA_DEVICE unsigned char *piece(int row, int piece) const {
    return base + (piece >> 3) * SUBTILE + row * 128 + (((piece & 7) ^ (row & 7)) << 4);
  }
  CLA_DEVICE uint16_t *element(int row, int column) const {
    return (uint16_t *)(piece(row, column >> 3)) + (column & 7);
  }
  CLA_DEVICE Tile from_column(int column) const { return {base + (column >> 6) * SUBTILE}; }
};

CLA_DEVICE int lane_index() { return thread_index() & 31; }

// The A operand, 16 rows from `row` and 16 columns from `column`.
CLA_DEVICE void load_a(uint32_t (&a)[4], Tile tile, int row, int column) {
  int l = lane_index();
  load_matrices(a, tile.piece(row + (l & 8) + (l & 7), column / 8 + (l >> 4)));
}
// The A operand from a tile that holds its transpose: 16 columns (of A) from tile row `row`.
CLA_DEVICE void load_a_transposed(uint32_t (&a)[4], Tile tile, int row, int column) {
  int l = lane_index();
  load_matrices_transposed(a, tile.piece(row + ((l >> 4) << 3) + (l & 7), column / 8 + ((l >> 3) & 1)));
}
// The B operand for 16 columns (of the product), which are tile rows from `row`; b[0..1] for the first 8, b[2..3] for the rest.
CLA_DEVICE void load_b(uint32_t (&b)[4], Tile tile, int row, int column) {
  int l = lane_index();
  load_matrices(b, tile.piece(row + ((l >> 4) << 3) + (l & 7), column / 8 + ((l >> 3) & 1)));
}
// The B operand for 16 columns (of the product), which are tile columns from `column`.
CLA_DEVICE void load_b_transposed(uint32_t (&b)[4], Tile tile, int row, int column) {
  int l = lane_index();
  load_matrices_transposed(b, tile.piece(row + (l & 8) + (l & 7), column / 8 + (l >> 4)));
}

CLA_DEVICE void mma16(float (&c0)[4], float (&c1)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma(c0, a, b[0], b[1]);
  mma(c1, a, b[2], b[3]);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
CLA_DEVICE void shared_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A matrix descriptor with the 128-byte swizzle; the offsets in bytes.
CLA_DEVICE uint64_t descriptor(const void *p, uint32_t leading, uint32_t stride) {
  return (uint64_t)((shared_address(p) & 0x3ffff) >> 4) | (uint64_t)(leading >> 4) << 16 |
         (uint64_t)(stride >> 4) << 32 | 1ull << 62;
}
// Rows of the operand are tile rows, `column` begins a step of 16 along the sum. Offsets are added to the descriptor of the
// tile: one addition each, since addresses stay under the field's 14 bits.
CLA_DEVICE uint64_t along_columns(Tile t, int row, int column) {
  return descriptor(t.base, 16, 1024) + (((column >> 6) * SUBTILE + row * 128 + (column & 63) * 2) >> 4);
}
// Rows of the operand are tile columns, `row` begins a step of 16 along the sum.
CLA_DEVICE uint64_t along_rows(Tile t, int row) { return descriptor(t.base, SUBTILE, 1024) + (row * 128 >> 4); }

template <int TRANSPOSE_A, int TRANSPOSE_B>
CLA_DEVICE void wgmma(float (&c)[4][4], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, 1, 1, 1, %18, %19;"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3])
      : "l"(a), "l"(b), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));
}
template <int TRANSPOSE_A, int TRANSPOSE_B>
CLA_DEVICE void wgmma(float (&c)[8][4], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, 1, %34, %35;"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
      : "l"(a), "l"(b), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));
}
template <int TRANSPOSE_B> CLA_DEVICE void wgmma(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, %37;"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(TRANSPOSE_B));
}
template <int TRANSPOSE_A, int TRANSPOSE_B>
CLA_DEVICE void wgmma(float (&c)[16][4], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, 1, 1, 1, %66, %67;"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3]), "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]), "+f"(c[8][3]), "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]), "+f"(c[10][0]), "+f"(c[10][1]), "+f"(c[10][2]), "+f"(c[10][3]), "+f"(c[11][0]), "+f"(c[11][1]), "+f"(c[11][2]), "+f"(c[11][3]), "+f"(c[12][0]), "+f"(c[12][1]), "+f"(c[12][2]), "+f"(c[12][3]), "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]), "+f"(c[13][3]), "+f"(c[14][0]), "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3]), "+f"(c[15][0]), "+f"(c[15][1]), "+f"(c[15][2]), "+f"(c[15][3])
      : "l"(a), "l"(b), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));
}
template <int TRANSPOSE_B> CLA_DEVICE void wgmma(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, %69;"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3]), "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]), "+f"(c[8][3]), "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]), "+f"(c[10][0]), "+f"(c[10][1]), "+f"(c[10][2]), "+f"(c[10][3]), "+f"(c[11][0]), "+f"(c[11][1]), "+f"(c[11][2]), "+f"(c[11][3]), "+f"(c[12][0]), "+f"(c[12][1]), "+f"(c[12][2]), "+f"(c[12][3]), "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]), "+f"(c[13][3]), "+f"(c[14][0]), "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3]), "+f"(c[15][0]), "+f"(c[15][1]), "+f"(c[15][2]), "+f"(c[15][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(TRANSPOSE_B));
}
#else
CLA_DEVICE void shared_fence() {}
#endif

template <bool WGMMA> CLA_DEVICE void products_fence() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if (WGMMA) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
template <bool WGMMA> CLA_DEVICE void products_commit() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if (WGMMA) asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until all but the last N groups are done.
template <bool WGMMA, int N> CLA_DEVICE void products_wait() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if (WGMMA) asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}

// acc[t, s] += a[t, :] . b[row + s, :] over `width` columns.
template <bool WGMMA, int N> CLA_DEVICE void add_rows_by_rows(float (&acc)[N / 8][4], Tile a, Tile b, int row, int width) {
  const int warp = (thread_index() >> 5) & 3;
  (void)warp;
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (WGMMA) {
    CLA_UNROLL
    for (int k = 0; k < width; k += 16) wgmma<0, 0>(acc, along_columns(a, 0, k), along_columns(b, row, k));
    return;
  }
#endif
  CLA_UNROLL_TWICE
  for (int k = 0; k < width; k += 16) {
    uint32_t x[4], y[4];
    load_a(x, a, 16 * warp, k);
    CLA_UNROLL
    for (int j = 0; j < N / 16; j++) {
      load_b(y, b, row + 16 * j, k);
      mma16(acc[2 * j], acc[2 * j + 1], x, y);
    }
  }
}

// acc[v, t] += sum_s a[s, v] b[t, s], where b is 0 for s > t, or, if time goes up the rows, for s < t. The columns of `a` begin
// at the warpgroup's first.
template <bool WGMMA> CLA_DEVICE void add_columns_by_rows(float (&acc)[8][4], Tile a, Tile b, bool upwards = false) {
  const int warp = (thread_index() >> 5) & 3;
  (void)warp;
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (WGMMA) {
    CLA_UNROLL
    for (int s = 0; s < CHUNK; s += 16) wgmma<1, 0>(acc, along_rows(a, s), along_columns(b, 0, s));
    return;
  }
#endif
  CLA_UNROLL
  for (int s = 0; s < CHUNK; s += 16) {
    uint32_t x[4], y[4];
    load_a_transposed(x, a, s, 16 * warp);
    CLA_UNROLL
    for (int j = 0; j < 4; j++) {
      if (upwards ? j > s / 16 : j < s / 16) continue;
      load_b(y, b, 16 * j, s);
      mma16(acc[2 * j], acc[2 * j + 1], x, y);
    }
  }
}

// acc[v, r] += sum_s a[s, v] b[s, r].
template <bool WGMMA, int N> CLA_DEVICE void add_columns_by_columns(float (&acc)[N / 8][4], Tile a, Tile b) {
  const int warp = (thread_index() >> 5) & 3;
  (void)warp;
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (WGMMA) {
    CLA_UNROLL
    for (int s = 0; s < CHUNK; s += 16) wgmma<1, 1>(acc, along_rows(a, s), along_rows(b, s));
    return;
  }
#endif
  CLA_UNROLL_TWICE
  for (int s = 0; s < CHUNK; s += 16) {
    uint32_t x[4], y[4];
    load_a_transposed(x, a, s, 16 * warp);
    CLA_UNROLL
    for (int j = 0; j < N / 16; j++) {
      load_b_transposed(y, b, s, 16 * j);
      mma16(acc[2 * j], acc[2 * j + 1], x, y);
    }
  }
}

// The same with A in registers, the sum of `parts`, one step of 16 of the sum: acc[v, r] += sum_i x[v, i] b[row + i, r].
template <bool WGMMA, int N, class... Parts>
CLA_DEVICE void add_parts_by_columns(float (&acc)[N / 8][4], Tile b, int row, const Parts &...parts) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (WGMMA) {
    (wgmma<1>(acc, parts, along_rows(b, row)), ...);
    return;
  }
#endif
  CLA_UNROLL
  for (int j = 0; j < N / 16; j++) {
    uint32_t y[4];
    load_b_transposed(y, b, row, 16 * j);
    (mma16(acc[2 * j], acc[2 * j + 1], parts, y), ...);
  }
}
// acc[v, t] += sum_i x[v, i] b[t, column + i], the same; for t from `first` on at least.
template <bool WGMMA, class... Parts>
CLA_DEVICE void add_parts_by_rows(float (&acc)[8][4], Tile b, int column, int first, const Parts &...parts) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (WGMMA) {
    (wgmma<0>(acc, parts, along_columns(b, 0, column)), ...);
    return;
  }
#endif
  CLA_UNROLL
  for (int j = first / 16; j < 4; j++) {
    uint32_t y[4];
    load_b(y, b, 16 * j, column);
    (mma16(acc[2 * j], acc[2 * j + 1], parts, y), ...);
  }
}

// The 16 columns from `column` of accumulated numbers as an A operand in bf16; `rest` is what the rounding left out.
template <int N> CLA_DEVICE void to_a(uint32_t (&a)[4], const float (&acc)[N / 8][4], int column) {
  const int j = column / 8;
  a[0] = pack_bf16(acc[j][0], acc[j][1]);
  a[1] = pack_bf16(acc[j][2], acc[j][3]);
  a[2] = pack_bf16(acc[j + 1][0], acc[j + 1][1]);
  a[3] = pack_bf16(acc[j + 1][2], acc[j + 1][3]);
}
CLA_DEVICE uint32_t pack_rest(uint32_t rounded, float low, float high) {
  return pack_bf16(low - low_bf16(rounded), high - high_bf16(rounded));
}
template <int N> CLA_DEVICE void to_a_rest(uint32_t (&rest)[4], const uint32_t (&a)[4], const float (&acc)[N / 8][4], int column) {
  const int j = column / 8;
  rest[0] = pack_rest(a[0], acc[j][0], acc[j][1]);
  rest[1] = pack_rest(a[1], acc[j][2], acc[j][3]);
  rest[2] = pack_rest(a[2], acc[j + 1][0], acc[j + 1][1]);
  rest[3] = pack_rest(a[3], acc[j + 1][2], acc[j + 1][3]);
}

// 2 N numbers in bf16 to `high`, and what that leaves out to `low`.
template <int N> CLA_DEVICE void split(uint32_t (&high)[N], uint32_t (&low)[N], const float (&x)[2 * N]) {
  CLA_UNROLL
  for (int i = 0; i < N; i++) {
    high[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
    low[i] = pack_rest(high[i], x[2 * i], x[2 * i + 1]);
  }
}
// The same into tiles: eight numbers, of a piece, and two.
CLA_DEVICE void store_parts(Tile high, Tile low, int row, int column, const float (&x)[8]) {
  uint32_t h[4], l[4];
  split(h, l, x);
  store16(high.piece(row, column / 8), {h[0], h[1], h[2], h[3]});
  store16(low.piece(row, column / 8), {l[0], l[1], l[2], l[3]});
}
CLA_DEVICE void store_parts(Tile high, Tile low, int row, int column, const float (&x)[2]) {
  uint32_t h[1], l[1];
  split(h, l, x);
  *(uint32_t *)high.element(row, column) = h[0];
  *(uint32_t *)low.element(row, column) = l[0];
}

// Two 8x8 matrices of packed bf16, each with the 8 rows below it, into the tile transposed: x[0] has lane / 4 -> column
// `column` + that, 2 (lane % 4) and the one after -> tile rows from `row`; x[1] is 8 columns on, x[2] and x[3] 8 rows on.
CLA_DEVICE void store_transposed(Tile to, int row, int column, const uint32_t (&x)[4]) {
  const int l = lane_index();
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const void *at = to.piece(row + ((l >> 4) << 3) + (l & 7), column / 8 + ((l >> 3) & 1));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(at)), "r"(x[0]),
               "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
#else
  // Lanes four apart hold neighbouring columns: they exchange halves, so that each has two columns of one row.
  const int odd = (l >> 2) & 1;
  CLA_UNROLL
  for (int i = 0; i < 4; i++) {
    const uint32_t other = shuffle_xor(x[i], 4);
    const uint32_t both = odd ? (other >> 16) | (x[i] & 0xffff0000u) : (x[i] & 0xffffu) | (other << 16);
    *(uint32_t *)to.element(row + 8 * (i >> 1) + 2 * (l & 3) + odd, column + 8 * (i & 1) + ((l >> 2) & ~1)) = both;
  }
#endif
}

}  // namespace cla
