#include "chunked_launch.cuh"

namespace cla {

template <> int32_t chunked_narrow<true>(const Call &call) {
  return by_gate(call, [&](auto gate) { return choose_narrow<true, decltype(gate)::value>(call); });
}

}  // namespace cla
