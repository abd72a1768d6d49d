#include "chunked_launch.cuh"

namespace cla {

int32_t chunked_f32(const Call &call) { return copied<CLA_F32, false>(call); }

}  // namespace cla
