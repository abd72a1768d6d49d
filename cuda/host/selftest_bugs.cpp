// Kernels with bugs, each of which must end its process with a message.
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>

#include "selftest.h"

using namespace cla;

static void one_returns() {
  if (thread_index() == 40) return;
  barrier();
}
static void half_a_warp() {
  if (thread_index() % 32 < 16) shuffle_xor(1.f, 1);
}
static void half_at_barrier() {
  if (thread_index() % 32 < 16) shuffle_xor(1.f, 1);
  else barrier();
}
static void two_collectives() {
  float c[4] = {};
  const uint32_t a[4] = {};
  if (thread_index() < 7) shuffle_xor(1.f, 1);
  else mma(c, a, 0, 0);
}
static void two_barriers() {
  if (thread_index() < 32) barrier();
  else
    barrier();
}
static void odd_target() { copy16_async(shared_memory() + 4, shared_memory(), true); }
static void odd_source() { copy16_async(shared_memory(), shared_memory() + 4, true); }
static void odd_half() { copy8_async(shared_memory() + 4, shared_memory(), true); }
static void odd_row() {
  uint32_t r[4];
  load_matrices(r, shared_memory() + 8 * (thread_index() == 9));
}
static void outer_row() {
  uint32_t r[4];
  load_matrices(r, shared_memory() + 16 * thread_index());
}
static void odd_load() { load16(shared_memory() + 12); }
static void odd_store() { store16(shared_memory() + 2, {}); }
static void before_shared() { *((volatile unsigned char *)shared_memory() - 1) = 0; }
static void beyond_shared() { *((volatile unsigned char *)shared_memory() + 100) = 0; }
static void look_early() {
  alignas(16) static const uint32_t from[4] = {1, 2, 3, 4};
  volatile uint32_t *to = (uint32_t *)shared_memory();
  copy16_async((void *)to, from, true);
  copies_commit();
  (void)to[0];
}

static SubtileMap a_map() {
  alignas(16) static unsigned char tensor[128];
  SubtileMap map;
  check(describe_subtiles(map, tensor, {64, 1, 1, 1}, {2, 128, 128, 128}), "a map");
  return map;
}
static CopyCount *counting(int bytes) {
  CopyCount *count = (CopyCount *)(shared_memory() + 2 * 8192);
  if (thread_index() == 0) {
    prepare_count(count);
    expect_bytes(count, bytes);
  }
  barrier();
  return count;
}
static void too_few_bytes() {
  CopyCount *count = counting(2 * 8192);
  if (thread_index() == 0) copy_subtile(shared_memory(), a_map(), 0, 0, 0, 0, count);
  wait_for_bytes(count, 0);
}
static void too_many_bytes() {
  CopyCount *count = counting(8192);
  for (int i = 0; i < 2 && thread_index() == 0; i++) copy_subtile(shared_memory(), a_map(), 0, 0, 0, 0, count);
}
static void odd_subtile() { copy_subtile(shared_memory() + 512, a_map(), 0, 0, 0, 0, counting(8192)); }
static void outer_subtile() { copy_subtile(shared_memory() + 2 * 8192, a_map(), 0, 0, 0, 0, counting(8192)); }
static void late_wait() {
  CopyCount *count = counting(8192);
  for (int i = 0; i < 2 && thread_index() == 0; i++) {
    if (i > 0) expect_bytes(count, 8192);
    copy_subtile(shared_memory() + 8192 * i, a_map(), 0, 0, 0, 0, count);
  }
  barrier();
  wait_for_bytes(count, 0);
}
static void store_nobody_waits_for() { store_subtile(a_map(), 0, 0, 0, 0, shared_memory()); }

// Runs a kernel in a child, which must end itself and say `words`.
static void check_aborts(void (*kernel)(), int threads, const char *words, int64_t shared_bytes = 100) {
  int pipes[2];
  if (pipe(pipes) != 0) return check(false, "pipe");
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(pipes[1], 2);
    launch(kernel, {1, 1}, threads, shared_bytes, nullptr);
    _exit(0);
  }
  close(pipes[1]);
  std::string said;
  char buffer[4096];
  for (ssize_t n; (n = read(pipes[0], buffer, sizeof buffer)) > 0;) said.append(buffer, (size_t)n);
  close(pipes[0]);
  int status = 0;
  waitpid(child, &status, 0);
  const bool ended = child > 0 && !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  if (ended && said.find(words) != std::string::npos) return;
  printf("FAILED: a kernel bug should have said \"%s\", said \"%s\"\n", words, said.c_str());
  failures++;
}

void check_bugs() {
  for (uint32_t order : {0, 1, 2}) {
    cla_host_order(order);
    check_aborts(one_returns, 64, "threads wait for others that will not come\n  threads 0..39: at barrier (");
    check_aborts(one_returns, 64, "\n  threads 40..40: returned\n  threads 41..63: at barrier (");
    check_aborts(half_a_warp, 64, "  threads 0..15: at shuffle_xor (");
    check_aborts(half_at_barrier, 32, "  threads 16..31: at barrier (");
    check_aborts(two_collectives, 32, "lanes of the warp are at another: ");
    check_aborts(two_barriers, 64, "threads of the block are at another: barrier (");
  }
  constexpr int64_t SUBTILES = 2 * 8192 + 8;
  for (uint32_t order : {0, 1, 2}) {
    cla_host_order(order);
    check_aborts(too_few_bytes, 64, "  threads 0..63: at wait_for_bytes (", SUBTILES);
  }
  cla_host_order(0);
  check_aborts(too_many_bytes, 32, "more is copied than is expected", SUBTILES);
  check_aborts(odd_subtile, 1, "a sub-tile must begin at a multiple of 1024", SUBTILES);
  check_aborts(outer_subtile, 1, "outside of the block's shared memory", SUBTILES);
  check_aborts(late_wait, 32, "the time after the one that is waited for is over too", SUBTILES);
  check_aborts(store_nobody_waits_for, 1, "a thread returns before what it stores has been read", SUBTILES);
  check_aborts([] { shuffle(1, 0); }, 40, "the last warp has only 8 lanes");
  check_aborts(odd_target, 32, "copy16_async");
  check_aborts(odd_half, 32, "copy8_async");
  check_aborts(odd_source, 32, "the address is not a multiple of 16");
  check_aborts(odd_row, 32, "thread 9: load_matrices");
  check_aborts(outer_row, 32, "thread 6: load_matrices");  // 16 * 6 + 16 > 100
  check_aborts(odd_load, 32, "load16");
  check_aborts(odd_store, 32, "store16");
  check_aborts(before_shared, 32, CLA_ASAN ? "use-after-poison" : "outside of its shared memory, at byte -1 of 100");
  check_aborts(beyond_shared, 32, CLA_ASAN ? "use-after-poison" : "outside of its shared memory, at byte 100 of 100");
  if (CLA_ASAN) check_aborts(look_early, 32, "use-after-poison");
}
