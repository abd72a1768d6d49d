// The chunked delta sweep in f16.
#include "delta_chunked_f16.cuh"

namespace cla {

int32_t delta_chunked_f16(const cla_delta_sweep &s, void *stream) {
  return with_f16_layout(s, [&](auto layout) { return launch_delta_chunked(layout, s, stream); });
}

}  // namespace cla
