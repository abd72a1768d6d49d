#include "chunked_launch.cuh"

namespace cla {

int32_t chunked_bf16(const Call &call) {
  return call.sweep.gate_kind == CLA_NO_GATE ? choose_rows<false, CLA_NO_GATE>(call)
                                             : choose_rows<false, CLA_GATE_SCALAR>(call);
}

}  // namespace cla
