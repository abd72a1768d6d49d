// Which kernels the gradients of the delta families take.
#pragma once
#include "delta.h"

namespace cla {

constexpr int32_t NOT_IN_CHUNKS = -1;

// In matrix form, where the problem and the machine allow it; otherwise NOT_IN_CHUNKS, and nothing is launched.
int32_t delta_chunk_gradients(const cla_delta_gradient &call, void *stream);

}  // namespace cla
