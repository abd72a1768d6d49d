#include "chunked_launch.cuh"

namespace cla {

int32_t chunked_f16_to_f32(const Call &call) { return copied<CLA_F16, false>(call); }

}  // namespace cla
