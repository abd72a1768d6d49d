// Which chunked kernel a sweep takes: the first of a list that the machine has the shared memory for.
#pragma once
#include <type_traits>

#include "chunked.cuh"

namespace cla {

struct Call {
  const cla_sweep &sweep;
  bool only_state;
  void *stream;
  int64_t *shared;  // not null: report the shared memory instead of launching
};

// Not launched: no kernel of the list fits.
constexpr int32_t NONE_FITS = -1;
// The most shared memory that a block has on any machine.
constexpr int MOST_SHARED = 227 * 1024;

// A tensor of `width` columns as sub-tiles; false where the machine cannot copy them.
inline bool describe(SubtileMap &map, const cla_tensor &x, int width, const cla_sweep &s) {
  const int64_t each = x.dtype == CLA_F32 ? 4 : 2;
  // With cu_seqlens the tokens of all sequences are those of one batch entry; `tokens` counts them.
  return describe_subtiles(map, x.data, {width, s.tokens, s.heads / x.group, s.cu_seqlens ? 1 : s.sequences},
                           {each, each * x.token, each * x.head, each * x.batch});
}
inline bool describe(ChunkMaps &maps, const cla_sweep &s, bool only_state) {
  maps = {};
  return s.writes && describe(maps.read, s.read, s.rows, s) && describe(maps.write, s.write, s.rows, s) &&
         describe(maps.value, s.value, s.cols, s) && (only_state || !s.out.data || describe(maps.out, s.out, s.cols, s));
}

template <class Layout> int32_t run_chunked(const Call &call) {
  const cla_sweep &s = call.sweep;
  if (Layout::SHARED > s.shared_limit) return NONE_FITS;
  if (call.shared) {
    *call.shared = Layout::SHARED;
    return 0;
  }
  Maps<Layout> maps;
  if constexpr (Layout::AHEAD) {
    if (!describe(maps, s, call.only_state)) return NONE_FITS;
  }
  const Dims grid = {(int64_t)s.sequences * s.segments * s.heads, (s.cols + Layout::COLUMNS - 1) / Layout::COLUMNS};
  return launch(chunked_kernel<Layout>, grid, Layout::THREADS, Layout::SHARED, call.stream, s, maps, (int)call.only_state);
}

// So many warpgroups a block, if the machine has the memory for it.
template <int R, int W, int IN, bool SMALL_OUT, int GATE> int32_t run_copied(const Call &call) {
  using Whole = ChunkLayout<R, W, false, IN, SMALL_OUT, GATE>;
  int32_t code = NONE_FITS;
  if constexpr (Whole::SHARED <= MOST_SHARED && (Whole::AHEAD || !Whole::FOR_AHEAD)) code = run_chunked<Whole>(call);
  if constexpr (IN == CLA_BF16 && (GATE == CLA_NO_GATE || GATE == CLA_GATE_SCALAR)) {
    if (code == NONE_FITS) return run_chunked<ChunkLayout<R, W, true, IN, SMALL_OUT, GATE>>(call);
  }
  return code;
}

// Two warpgroups where the state has the columns for it and the machine the memory.
template <int R, int IN, bool SMALL_OUT, int GATE> int32_t choose_width(const Call &call) {
  if (call.sweep.cols > 64) {
    const int32_t code = run_copied<R, 2, IN, SMALL_OUT, GATE>(call);
    if (code != NONE_FITS) return code;
  }
  return run_copied<R, 1, IN, SMALL_OUT, GATE>(call);
}

template <int IN, bool SMALL_OUT, int GATE> int32_t choose_rows(const Call &call) {
  if (call.sweep.rows <= 64) return choose_width<64, IN, SMALL_OUT, GATE>(call);
  return choose_width<128, IN, SMALL_OUT, GATE>(call);
}

template <int GATE> int32_t choose_any(const Call &call) {
  if (call.sweep.rows <= 64) return run_chunked<ChunkLayout<64, 1, false, ANY_DTYPE, false, GATE>>(call);
  return run_chunked<ChunkLayout<128, 1, false, ANY_DTYPE, false, GATE>>(call);
}

// Calls `choose` with the kind of the call's gate as a type.
template <class Choose> int32_t by_gate(const Call &call, Choose choose) {
  switch (call.sweep.gate_kind) {
    case CLA_NO_GATE: return choose(std::integral_constant<int, CLA_NO_GATE>());
    case CLA_GATE_SCALAR: return choose(std::integral_constant<int, CLA_GATE_SCALAR>());
    case CLA_GATE_ROWS: return choose(std::integral_constant<int, CLA_GATE_ROWS>());
    default: return choose(std::integral_constant<int, CLA_GATE_COLS>());
  }
}

// Inputs of one dtype, and results in the same or in f32.
template <int IN, bool SMALL_OUT> int32_t copied(const Call &call) {
  return by_gate(call, [&](auto gate) { return choose_rows<IN, SMALL_OUT, decltype(gate)::value>(call); });
}
// Each in a file of its own, to be compiled at the same time.
int32_t chunked_bf16(const Call &call);
int32_t chunked_bf16_to_f32(const Call &call);
int32_t chunked_f16(const Call &call);
int32_t chunked_f16_to_f32(const Call &call);
int32_t chunked_f32(const Call &call);
// Everything.
int32_t chunked_any(const Call &call);

}  // namespace cla
