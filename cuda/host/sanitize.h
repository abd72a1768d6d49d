// What AddressSanitizer must be told: which shared memory a kernel may touch, and that the stack changes.
#pragma once

#if defined(__SANITIZE_ADDRESS__)
#define CLA_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CLA_ASAN 1
#endif
#endif
#ifndef CLA_ASAN
#define CLA_ASAN 0
#endif

#include <stddef.h>
#if CLA_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cla::host {

inline void forbid([[maybe_unused]] void *p, [[maybe_unused]] size_t bytes) {
#if CLA_ASAN
  __asan_poison_memory_region(p, bytes);
#endif
}
inline void allow([[maybe_unused]] void *p, [[maybe_unused]] size_t bytes) {
#if CLA_ASAN
  __asan_unpoison_memory_region(p, bytes);
#endif
}

}  // namespace cla::host
