// Which kernel a sweep token by token takes.
#pragma once
#include "elements.cuh"

namespace cla {

// Tokens of a sequence, on average, up to which a sweep waits for its states.
constexpr int64_t FEW_TOKENS = 4;

// Without `ends`.
int32_t sweep_few_tokens(const cla_sweep &sweep, void *stream);

}  // namespace cla
