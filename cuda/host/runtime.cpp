// What kernels call: what lanes hand to each other, what is computed for a warp, and launches.
#include "runner.h"

namespace cla::host {

__thread Here here;
__thread Runner *runner;

namespace {

uint32_t order_from_environment() {
  const char *order = getenv("CLA_HOST_ORDER");
  return order ? (uint32_t)strtoul(order, nullptr, 10) : 0;
}
thread_local uint32_t chosen_order = order_from_environment();

typedef float Eight __attribute__((vector_size(32), may_alias));
typedef uint32_t EightWords __attribute__((vector_size(32)));

// c += a b, by outer products.
inline __attribute__((always_inline)) void multiply_lanes(Warp &warp) {
  Eight b[16];
  for (int half = 0; half < 2; half++) {
    for (int pair = 0; pair < 4; pair++) {
      EightWords words;
      for (int n = 0; n < 8; n++) words[n] = warp.b[half][4 * n + pair];
      b[8 * half + 2 * pair] = (Eight)(words << 16);
      b[8 * half + 2 * pair + 1] = (Eight)(words & 0xffff0000u);
    }
  }
  for (int upper_or_lower = 0; upper_or_lower < 2; upper_or_lower++) {
    for (int row = 0; row < 8; row++) {
      Eight sum = {};
      for (int half = 0; half < 2; half++) {
        const uint32_t *a = &warp.a[2 * half + upper_or_lower][4 * row];
        for (int pair = 0; pair < 4; pair++) {
          sum += low_bf16(a[pair]) * b[8 * half + 2 * pair];
          sum += high_bf16(a[pair]) * b[8 * half + 2 * pair + 1];
        }
      }
      *(Eight *)warp.c[upper_or_lower][4 * row] += sum;
    }
  }
}

#if defined(__x86_64__)
// Without fused multiply-add, so that every x86-64 computes the same.
__attribute__((target("avx2"))) void multiply_avx2(Warp &warp) { multiply_lanes(warp); }

void multiply(Warp &warp) {
  static const bool avx2 = __builtin_cpu_supports("avx2");
  if (avx2) return multiply_avx2(warp);
  multiply_lanes(warp);
}
#else
void multiply(Warp &warp) { multiply_lanes(warp); }
#endif

}  // namespace

void fatal(const Site &site, const char *message) {
  fprintf(stderr, "cuda/host: kernel bug in block (%u, %u), thread %u: %s (%s:%d): %s\n", here.block_x, here.block_y,
          here.thread, site.what, site.file, site.line, message);
  abort();
}

uint32_t shuffle(uint32_t x, unsigned from, const Site &site) {
  Warp &warp = runner->warp();
  uint32_t *words = warp.words[warp.collectives & 1];
  words[lane()] = x;
  runner->meet(warp, site);
  return words[from];
}

void load_matrices(uint32_t (&r)[4], const void *row, bool transposed, const Site &site) {
  runner->check_shared(row, site);
  Warp &warp = runner->warp();
  uint32_t(*rows)[4] = warp.rows[warp.collectives & 1];
  const unsigned l = lane();
  memcpy(rows[l], row, 16);
  runner->meet(warp, site);
  for (int matrix = 0; matrix < 4; matrix++) {
    const uint32_t(*m)[4] = rows + 8 * matrix;
    if (transposed) {
      const unsigned column = l / 4, shift = column % 2 * 16;
      const uint32_t first = m[l % 4 * 2][column / 2] >> shift, second = m[l % 4 * 2 + 1][column / 2] >> shift;
      r[matrix] = (first & 0xffff) | second << 16;
    } else {
      r[matrix] = m[l / 4][l % 4];
    }
  }
}

void copies_wait(int64_t groups) { runner->land(runner->thread(), groups); }

int32_t run(Dims grid, int threads, int64_t shared_bytes, void (*kernel)(const void *), const void *arguments) {
  static thread_local std::unique_ptr<Runner> owned;
  if (grid.x <= 0 || grid.y <= 0) return 0;
  if (grid.x > INT32_MAX || grid.y > 65535 || threads < 1 || threads > (int)MOST_THREADS) return INVALID_CONFIGURATION;
  if (shared_bytes < 0 || shared_bytes > MOST_SHARED) return INVALID_VALUE;
  if (!owned) owned = std::make_unique<Runner>();
  runner = owned.get();
  return runner->run(grid, threads, shared_bytes, kernel, arguments, chosen_order);
}

}  // namespace cla::host

namespace cla {

using namespace host;

void barrier(const char *file, int line) { runner->barrier({"barrier", file, line}); }
void meet(int which) { runner->barrier({"meet", "meeting", which}); }

static void copy_async(void *shared, const void *global, size_t size, bool valid, const Site &site) {
  runner->check_shared(shared, site, size);
  check_alignment(global, site, size);
  Thread &thread = runner->thread();
  Copy copy = {thread.groups, (unsigned char *)shared, size, {}};
  if (valid) memcpy(copy.bytes, global, size);
  memset(shared, 0xff, size);
  forbid(shared, size);
  thread.copies.push_back(copy);
}
void copy16_async(void *shared, const void *global, bool valid, const char *file, int line) {
  copy_async(shared, global, 16, valid, {"copy16_async", file, line});
}
void copy8_async(void *shared, const void *global, bool valid, const char *file, int line) {
  copy_async(shared, global, 8, valid, {"copy8_async", file, line});
}

void copies_commit() { runner->thread().groups++; }

void prepare_count(CopyCount *count) { *count = {0, 0}; }
void expect_bytes(CopyCount *count, int bytes, const char *file, int line) {
  runner->expect_bytes(count, bytes, {"expect_bytes", file, line});
}
void wait_for_bytes(CopyCount *count, int time, const char *file, int line) {
  runner->wait_for_bytes(count, time, {"wait_for_bytes", file, line});
}
void copy_subtile(void *to, const SubtileMap &map, int column, int64_t token, int head, int64_t sequence, CopyCount *count,
                  const char *file, int line) {
  runner->copy_subtile(map, column, token, head, sequence, count, to, {"copy_subtile", file, line});
}
void store_subtile(const SubtileMap &map, int column, int64_t token, int head, int64_t sequence, const void *from,
                   const char *file, int line) {
  runner->check_shared(from, {"store_subtile", file, line}, SUBTILE_BYTES);
  runner->thread().stores.push_back({&map, column, head, token, sequence, (const unsigned char *)from});
}
void wait_for_stores() { runner->wait_for_stores(runner->thread()); }

void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char *file, int line) {
  Warp &warp = runner->warp();
  const unsigned l = lane();
  for (int i = 0; i < 4; i++) warp.a[i][l] = a[i];
  warp.b[0][l] = b0;
  warp.b[1][l] = b1;
  float *upper = warp.c[0][l], *lower = warp.c[1][l];
  memcpy(upper, c, 8);
  memcpy(lower, c + 2, 8);
  if (runner->meet(warp, {"mma", file, line})) multiply(warp);
  memcpy(c, upper, 8);
  memcpy(c + 2, lower, 8);
}

}  // namespace cla

extern "C" void cla_host_order(uint32_t seed) { cla::host::chosen_order = seed; }
