#include "chunked_launch.cuh"

namespace cla {

template <> int32_t chunked_narrow<false>(const Call &call) {
  switch (call.sweep.gate_kind) {
    case CLA_NO_GATE: return choose_narrow<false, CLA_NO_GATE>(call);
    case CLA_GATE_SCALAR: return choose_narrow<false, CLA_GATE_SCALAR>(call);
    case CLA_GATE_ROWS: return choose_narrow<false, CLA_GATE_ROWS>(call);
    default: return choose_narrow<false, CLA_GATE_COLS>(call);
  }
}

}  // namespace cla
