// Which chunked kernel a sweep takes, among those for one precision.
#pragma once
#include "chunked.cuh"

namespace cla {

struct Call {
  const cla_sweep &sweep;
  bool only_state;
  void *stream;
  int64_t *shared;  // not null: report the shared memory instead of launching
};

template <int R, int W, bool EXACT, int GATE> int32_t run_chunked(const Call &call) {
  using Kernel = Chunked<R, W, EXACT, GATE>;
  if (call.shared) {
    *call.shared = Kernel::SHARED;
    return 0;
  }
  const cla_sweep &s = call.sweep;
  Dims grid = {(int64_t)s.sequences * s.segments * s.heads, (s.cols + Kernel::COLUMNS - 1) / Kernel::COLUMNS};
  return launch(chunked_kernel<R, W, EXACT, GATE>, grid, Kernel::THREADS, Kernel::SHARED, call.stream, s,
                (int)call.only_state);
}

// Two warpgroups a block where the state has the columns for it and the machine the memory.
template <int R, bool EXACT, int GATE> int32_t choose_width(const Call &call) {
  if constexpr (!EXACT && R <= 128) {
    if (call.sweep.cols > 64 && Chunked<R, 2, EXACT, GATE>::SHARED <= call.sweep.shared_limit) {
      return run_chunked<R, 2, EXACT, GATE>(call);
    }
  }
  return run_chunked<R, 1, EXACT, GATE>(call);
}

template <bool EXACT, int GATE> int32_t choose_rows(const Call &call) {
  if (call.sweep.rows <= 64) return choose_width<64, EXACT, GATE>(call);
  if (call.sweep.rows <= 128) return choose_width<128, EXACT, GATE>(call);
  return choose_width<256, EXACT, GATE>(call);
}

// bf16 inputs; no decay or one for the whole state.
int32_t chunked_bf16(const Call &call);
// Everything.
int32_t chunked_exact(const Call &call);

}  // namespace cla
