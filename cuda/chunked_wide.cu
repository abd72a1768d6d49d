#include "chunked_launch.cuh"

namespace cla {

int32_t chunked_wide(const Call &call) {
  return by_gate(call, [&](auto gate) { return choose_wide<decltype(gate)::value>(call); });
}

}  // namespace cla
