#include "chunked_launch.cuh"

namespace cla {

int32_t chunked_wide(const Call &call) {
  switch (call.sweep.gate_kind) {
    case CLA_NO_GATE: return choose_wide<CLA_NO_GATE>(call);
    case CLA_GATE_SCALAR: return choose_wide<CLA_GATE_SCALAR>(call);
    case CLA_GATE_ROWS: return choose_wide<CLA_GATE_ROWS>(call);
    default: return choose_wide<CLA_GATE_COLS>(call);
  }
}

}  // namespace cla
