// Sums of what several parts of a state, or several heads, have found each for itself: many sums of few terms. Few sums of many are
// column_sums.cu's.
#include "elements.cuh"

namespace cla {

constexpr int MIDDLE_THREADS = 256;

// A thread has EACH neighbours of the result.
template <int EACH> CLA_KERNEL(MIDDLE_THREADS, 4) void sum_middle_kernel(cla_middle_sums c) {
  const int64_t at = (block_x() * (int64_t)MIDDLE_THREADS + thread_index()) * EACH;
  if (at >= c.outer * c.inner) return;
  const float *from = c.data + at / c.inner * c.count * c.inner + at % c.inner;
  float sum[EACH] = {};
  for (int64_t i = 0; i < c.count; i++, from += c.inner) {
    float x[EACH];
    if constexpr (EACH == 4) load4(x, from);
    else x[0] = *from;
    CLA_UNROLL
    for (int e = 0; e < EACH; e++) sum[e] += x[e];
  }
  if constexpr (EACH == 4) store_four(c.out, c.dtype, at, sum);
  else store_element(c.out, c.dtype, at, sum[0]);
}

template <int EACH> int32_t launch_sum_middle(const cla_middle_sums &c, void *stream) {
  const int64_t blocks = (c.outer * c.inner / EACH + MIDDLE_THREADS - 1) / MIDDLE_THREADS;
  return launch(sum_middle_kernel<EACH>, {blocks, 1}, MIDDLE_THREADS, 0, stream, c);
}

}  // namespace cla

extern "C" int32_t cla_sum_middle(const cla_middle_sums *call, void *stream) {
  const bool in_fours = call->inner % 4 == 0 && (((uintptr_t)call->data | (uintptr_t)call->out) & 15) == 0;
  return in_fours ? cla::launch_sum_middle<4>(*call, stream) : cla::launch_sum_middle<1>(*call, stream);
}
