#include "chunked_launch.cuh"

namespace cla {

int32_t chunked_bf16(const Call &call) { return copied<CLA_BF16, true>(call); }

}  // namespace cla
