// What blocks leave of a sum over tokens, added up in an order that is always the same.
#include "vectors.cuh"

namespace cla {

constexpr int COLUMN_THREADS = 512, COLUMN_WARPS = COLUMN_THREADS / 32;
// Rows whose loads are under way at once.
constexpr int COLUMN_AHEAD = 4;

// A block has 32 columns, each warp every COLUMN_WARPS-th row.
CLA_KERNEL(COLUMN_THREADS, 2) void column_sums_kernel(cla_sums c) {
  const int warp = (int)thread_index() / 32, lane = (int)thread_index() % 32;
  const int64_t column = block_x() * (int64_t)32 + lane;
  float *shared = (float *)shared_memory();
  float sum = 0.f;
  for (int64_t row = warp; row < c.rows; row += COLUMN_WARPS * COLUMN_AHEAD) {
    float x[COLUMN_AHEAD];
    CLA_UNROLL
    for (int i = 0; i < COLUMN_AHEAD; i++) {
      const int64_t at = row + i * COLUMN_WARPS;
      x[i] = at < c.rows && column < c.columns ? c.data[at * c.stride + column] : 0.f;
    }
    CLA_UNROLL
    for (int i = 0; i < COLUMN_AHEAD; i++) sum += x[i];
  }
  shared[thread_index()] = sum;
  barrier();
  if (warp != 0 || column >= c.columns) return;
  for (int w = 1; w < COLUMN_WARPS; w++) sum += shared[w * 32 + lane];
  store_element(c.out, c.dtype, column / c.inner * c.outer_stride + column % c.inner * c.inner_stride, sum);
}

}  // namespace cla

extern "C" int32_t cla_column_sums(const cla_sums *call, void *stream) {
  using namespace cla;
  const int64_t blocks = (call->columns + 31) / 32;
  return launch(column_sums_kernel, {blocks, 1}, COLUMN_THREADS, COLUMN_THREADS * sizeof(float), stream, *call);
}
