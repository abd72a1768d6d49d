// The chunked sweep and its division into segments of time.
#include "chunked_launch.cuh"

namespace cla {

// The kernels that copy their inputs to shared memory as they are, if those have one dtype and lie well and the kernel fits,
// else those that take everything.
static int32_t chunked(const Call &call) {
  const cla_sweep &s = call.sweep;
  const int32_t dtype = s.read.dtype;
  auto input = [&](const cla_tensor &x, int width) { return x.dtype == dtype && in_pieces(x, width); };
  auto or_f32 = [&](const cla_tensor &x, int width) {
    return (x.dtype == dtype || x.dtype == CLA_F32) && in_pieces(x, width);
  };
  const bool gates = s.gate_kind == CLA_GATE_ROWS   ? or_f32(s.gate, s.rows)
                     : s.gate_kind == CLA_GATE_COLS ? or_f32(s.gate, s.cols)
                                                    : true;
  int32_t code = NONE_FITS;
  if (gates && input(s.read, s.rows) && input(s.write, s.rows) && input(s.value, s.cols) &&
      (!s.out.data || or_f32(s.out, s.cols))) {
    const bool to_f32 = s.out.data && s.out.dtype == CLA_F32;
    if (dtype == CLA_BF16) code = to_f32 ? chunked_bf16_to_f32(call) : chunked_bf16(call);
    else if (dtype == CLA_F16) code = to_f32 ? chunked_f16_to_f32(call) : chunked_f16(call);
    else code = chunked_f32(call);
  }
  return code == NONE_FITS ? chunked_any(call) : code;
}

// One element of the states of a sequence and head: what each segment adds becomes the state that it starts from.
CLA_KERNEL(256, 1) void scan_kernel(cla_sweep s) {
  const int64_t sequence = block_x() / s.heads, at = block_y() * 256ll + thread_index();
  const int head = block_x() % s.heads;
  const int64_t size = (int64_t)s.rows * s.cols;
  if (at >= size) return;
  const int row = (int)(at / s.cols), col = (int)(at % s.cols);
  const Steps steps(s.cu_seqlens, s.tokens, sequence, s.reverse);
  const int64_t count = steps.count == 0 ? 1 : (steps.count + s.segment - 1) / s.segment;
  const int width = s.gate_kind == CLA_GATE_ROWS ? s.rows : s.gate_kind == CLA_GATE_COLS ? s.cols : 1;
  const int channel = s.gate_kind == CLA_GATE_ROWS ? row : s.gate_kind == CLA_GATE_COLS ? col : 0;
  float x = 0.f;
  if (s.first.data) {
    x = s.first_scale * s.first.data[sequence * s.first.sequence + head * s.first.head + row * s.first.row + col * s.first.col];
  }
  for (int64_t i = 0; i < count; i++) {
    const int64_t index = (sequence * s.segments + i) * s.heads + head;
    float *state = s.starts + index * size + at;
    const float added = *state, decay = s.gate_kind == CLA_NO_GATE ? 1.f : s.totals[index * width + channel];
    *state = x;
    x = decay * x + added;
  }
}

}  // namespace cla

extern "C" int32_t cla_sweep_chunked(const cla_sweep *sweep, void *stream) {
  return cla::chunked({*sweep, false, stream, nullptr});
}

extern "C" int32_t cla_segment_states(const cla_sweep *sweep, void *stream) {
  return cla::chunked({*sweep, true, stream, nullptr});
}

extern "C" int32_t cla_scan_segments(const cla_sweep *sweep, void *stream) {
  cla::Dims grid = {(int64_t)sweep->sequences * sweep->heads, ((int64_t)sweep->rows * sweep->cols + 255) / 256};
  return cla::launch(cla::scan_kernel, grid, 256, 0, stream, *sweep);
}

extern "C" int64_t cla_chunked_shared_memory(const cla_sweep *sweep) {
  int64_t bytes = -1;
  cla::chunked({*sweep, false, nullptr, &bytes});
  return bytes;
}
