#include "chunked_launch.cuh"

namespace cla {

int32_t chunked_any(const Call &call) {
  return by_gate(call, [&](auto gate) { return choose_any<decltype(gate)::value>(call); });
}

}  // namespace cla
