#include "chunked_launch.cuh"

namespace cla {

template <> int32_t chunked_narrow<false>(const Call &call) {
  return by_gate(call, [&](auto gate) { return choose_narrow<false, decltype(gate)::value>(call); });
}

}  // namespace cla
