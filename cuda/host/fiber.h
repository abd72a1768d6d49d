// Fibers: stacks that a kernel's threads run on, and the switch from one to another. On x86-64 and AArch64 it is a dozen
// instructions; ucontext, which asks the system to save the signal mask each time, serves elsewhere.
#pragma once
#include <stdint.h>
#include <sys/mman.h>

#include "sanitize.h"

#if defined(CLA_HOST_UCONTEXT) || !(defined(__x86_64__) || defined(__aarch64__))
#define CLA_SWITCH_IN_ASSEMBLY 0
#include <ucontext.h>
#else
#define CLA_SWITCH_IN_ASSEMBLY 1
// Saves what a callee must preserve on the stack, leaves the stack pointer in *from, takes up `to`. The modes of the
// floating-point unit are not switched: kernels have no way to change them.
extern "C" void cla_host_switch(void **from, void *to) __asm__("cla_host_switch");
#endif

#if CLA_SWITCH_IN_ASSEMBLY && defined(__x86_64__)
__asm__(
    ".text\n"
    ".p2align 4\n"
    "cla_host_switch:\n"
    "  pushq %rbp\n"
    "  pushq %rbx\n"
    "  pushq %r12\n"
    "  pushq %r13\n"
    "  pushq %r14\n"
    "  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n"
    "  popq %r14\n"
    "  popq %r13\n"
    "  popq %r12\n"
    "  popq %rbx\n"
    "  popq %rbp\n"
    "  ret\n");
#elif CLA_SWITCH_IN_ASSEMBLY
__asm__(
    ".text\n"
    ".p2align 4\n"
    "cla_host_switch:\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n"
    "  stp x21, x22, [sp, #16]\n"
    "  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n"
    "  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n"
    "  stp d10, d11, [sp, #112]\n"
    "  stp d12, d13, [sp, #128]\n"
    "  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n"
    "  str x9, [x0]\n"
    "  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n"
    "  ldp x21, x22, [sp, #16]\n"
    "  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n"
    "  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n"
    "  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n"
    "  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  ret\n");
#endif

namespace cla::host {

class Fiber {
 public:
  // The fiber of whoever creates it: it is switched from before it is switched to.
  Fiber() = default;
  Fiber(const Fiber &) = delete;
  Fiber &operator=(const Fiber &) = delete;
  ~Fiber() {
    if (!base) return;
    // Whatever is mapped here next must not find marks of frames.
    allow(base + GUARD, STACK);
    munmap(base, GUARD + STACK);
  }

  // Makes the fiber one that will run `entry` on a stack of its own. False if there is no memory for it. `index` shifts
  // the stack's top: at equal offsets, the stacks of a warp would compete for a few lines of the cache.
  bool prepare(unsigned index, void (*entry)()) {
    if (!base) {
      void *p = mmap(nullptr, GUARD + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (p == MAP_FAILED) return false;
      if (mprotect(p, GUARD, PROT_NONE) != 0) {
        munmap(p, GUARD + STACK);
        return false;
      }
      base = (unsigned char *)p;
      bottom = base + GUARD;
      size = STACK - index * 1088 % 16384;
    }
    // The last entry was left without a return, so its frames are still marked.
    allow((void *)bottom, size);
#if CLA_SWITCH_IN_ASSEMBLY
    void **top = (void **)((unsigned char *)bottom + size);
#if defined(__x86_64__)
    // Six registers, where `ret` goes, and the return address that `entry` would have, which ends a backtrace.
    for (int i = 1; i <= 8; i++) top[-i] = nullptr;
    top[-2] = (void *)entry;
    pointer = top - 8;
#else
    for (int i = 1; i <= 20; i++) top[-i] = nullptr;
    top[-20 + 11] = (void *)entry;
    pointer = top - 20;
#endif
#else
    getcontext(&context);
    context.uc_stack.ss_sp = (void *)bottom;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
#endif
    return true;
  }

  // Runs `to` until something switches back here; `done` if nothing will.
  void switch_to(Fiber &to, [[maybe_unused]] bool done = false) {
#if CLA_ASAN
    __sanitizer_start_switch_fiber(done ? nullptr : &fake_stack, to.bottom, to.size);
#endif
#if CLA_SWITCH_IN_ASSEMBLY
    cla_host_switch(&pointer, to.pointer);
#else
    swapcontext(&context, &to.context);
#endif
#if CLA_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // To be called first in an entry; if `creator` is not null, it is whose switch began this one.
  static void entered([[maybe_unused]] Fiber *creator) {
#if CLA_ASAN
    const void *bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (creator) creator->bottom = bottom, creator->size = size;
#endif
  }

 private:
  // Enough for AddressSanitizer's frames and reports; pages are only taken when they are touched.
  static constexpr size_t STACK = 256 * 1024, GUARD = 65536;

#if CLA_SWITCH_IN_ASSEMBLY
  void *pointer = nullptr;
#else
  ucontext_t context = {};
#endif
  unsigned char *base = nullptr;
  const void *bottom = nullptr;
  size_t size = 0;
  [[maybe_unused]] void *fake_stack = nullptr;
};

}  // namespace cla::host
