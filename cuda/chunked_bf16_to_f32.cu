#include "chunked_launch.cuh"

namespace cla {

int32_t chunked_bf16_to_f32(const Call &call) { return copied<CLA_BF16, false>(call); }

}  // namespace cla
