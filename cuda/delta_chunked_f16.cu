// The chunked delta sweep in f16.
#include "delta_chunked.cuh"

namespace cla {

int32_t delta_chunked_f16(const cla_delta_sweep &s, void *stream) {
  return s.of.k_dim <= 64 ? launch_delta_chunked(HalfLayout<64>(), s, stream) : launch_delta_chunked(HalfLayout<128>(), s, stream);
}

}  // namespace cla
