#include "chunked_launch.cuh"

namespace cla {

int32_t chunked_f16(const Call &call) { return copied<CLA_F16, true>(call); }

}  // namespace cla
