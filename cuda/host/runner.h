// The machine: blocks one after the other, threads as fibers, warps and barriers as sets of lanes.
#pragma once
#include <stdio.h>
#include <stdlib.h>

#include <memory>
#include <numeric>
#include <vector>

#include "fiber.h"
#include "platform.h"

namespace cla::host {

constexpr int32_t INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONFIGURATION = 9;  // of cudaError_t
constexpr int64_t MOST_SHARED = 227 * 1024;                                         // of an H100 or H200
constexpr unsigned MOST_THREADS = 1024, WARP = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;

struct Copy {
  int64_t group;
  unsigned char *to;
  size_t size;
  unsigned char bytes[16];
};

constexpr int SUBTILE_ROWS = 64, SUBTILE_PIECES = 8, SUBTILE_BYTES = SUBTILE_ROWS * SUBTILE_PIECES * 16;
// Where a piece of a row lies in a sub-tile.
inline size_t place_in_subtile(int row, int piece) { return row * 128 + ((piece ^ row % 8) << 4); }

struct SubtileCopy {
  CopyCount *count;
  unsigned char *to;
  unsigned char bytes[SUBTILE_BYTES];
};

struct SubtileStore {
  const SubtileMap *map;
  int column, head;
  int64_t token, sequence;
  const unsigned char *from;
};

struct Thread : Fiber {
  std::vector<SubtileStore> stores;  // that nobody has waited for
  std::vector<Copy> copies;  // in the order in which they were asked for
  size_t landed = 0;         // as many of them have
  int64_t groups = 0;        // committed
};

struct Warp {
  unsigned first;  // thread
  uint32_t lanes, ready, waiting, returned;
  uint32_t counting;  // lanes that wait for bytes
  // Warps take part in one collective after the other. A lane can be one ahead of another that has yet to fetch its
  // results, never two: hence two sets of what lanes hand to each other.
  unsigned collectives;
  Site site;
  uint32_t words[2][WARP];
  alignas(16) uint32_t rows[2][WARP][4];
  // Register by register, which makes a[i] and b[i] rows of 8 bf16 (of A, and of B's transpose) and c[i] rows of 8 floats.
  // A lane reads only its own part of c, and writes it again only after that.
  alignas(32) uint32_t a[4][WARP], b[2][WARP];
  alignas(32) float c[2][WARP][2];
};

// The same text may be at two addresses, in code from two files.
inline bool same_text(const char *a, const char *b) { return a == b || strcmp(a, b) == 0; }
inline bool same(const Site &a, const Site &b) {
  if (a.line == b.line && a.what == b.what && a.file == b.file) return true;
  return a.line == b.line && same_text(a.what, b.what) && same_text(a.file, b.file);
}

class Order {
 public:
  void begin(uint32_t seed) {
    kind = seed;
    state = seed * 0x9e3779b97f4a7c15u | 1;
  }
  bool random() const { return kind >= 2; }
  unsigned pick(uint32_t set) {
    if (kind == 0) return __builtin_ctz(set);
    if (kind == 1) return 31 - __builtin_clz(set);
    const unsigned from = next() & 31;
    const uint32_t turned = set >> from | set << (-from & 31);
    return (__builtin_ctz(turned) + from) & 31;
  }
  // Calls `f` with each number below `count`.
  template <class F> void each(int64_t count, F f) {
    int64_t at = 0, step = 1;
    if (kind == 1) at = count - 1, step = count - 1;
    if (random()) {
      at = (int64_t)(next() % (uint64_t)count);
      step = 1 + (int64_t)(next() % (uint64_t)count);
      while (std::gcd(step, count) != 1) step++;
    }
    for (int64_t i = 0; i < count; i++, at = (at + step) % count) f(at);
  }

 private:
  uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state >> 16;
  }
  uint32_t kind = 0;
  uint64_t state = 1;
};

class Runner;
extern __thread Runner *runner;  // of this OS thread

// What one OS thread needs to run kernels; kept from one launch to the next.
class Runner {
 public:
  Runner() : threads(new Thread[MOST_THREADS]) {
    region = (unsigned char *)aligned_alloc(1024, MARGIN + MOST_SHARED + MARGIN);
  }
  ~Runner() {
    allow(region, MARGIN + MOST_SHARED + MARGIN);
    free(region);
  }

  int32_t run(Dims grid, int count, int64_t bytes, void (*function)(const void *), const void *with, uint32_t seed) {
    if (!region) return OUT_OF_MEMORY;
    if (running) fatal({"launch", "a kernel", 0}, "a kernel cannot launch another");
    running = true;
    thread_count = (unsigned)count;
    shared_bytes = (size_t)bytes;
    kernel = function;
    arguments = with;
    order.begin(seed);
    bool room = true;
    order.each(grid.x * grid.y, [&](int64_t block) {
      if (!room) return;
      here = {0, (unsigned)(block % grid.x), (unsigned)(block / grid.x), (unsigned)grid.x, (unsigned)grid.y,
              region + MARGIN};
      room = run_block();
    });
    here = {};
    running = false;
    return room ? 0 : OUT_OF_MEMORY;
  }

  void barrier(const Site &site) {
    const unsigned index = here.thread;
    if (arrived == 0) {
      barrier_site = site;
    } else if (!same(barrier_site, site)) {
      disagree(site, barrier_site, "threads of the block are at another");
    }
    if (++arrived < thread_count) return go_on(threads[index], false);
    arrived = 0;
    for (unsigned w = 0; w * WARP < thread_count; w++) make_ready(warps[w], warps[w].lanes);
    take(*current, index % WARP);
  }

  // Waits until all lanes of the warp have come here. The last of them returns first, and gets true.
  bool meet(Warp &warp, const Site &site) {
    const unsigned index = here.thread;
    if (warp.waiting == 0) {
      warp.site = site;
    } else if (!same(warp.site, site)) {
      disagree(site, warp.site, "lanes of the warp are at another");
    }
    warp.waiting |= 1u << index % WARP;
    if (warp.waiting != ALL_LANES) {
      go_on(threads[index], false);
      return false;
    }
    warp.waiting = 0;
    warp.collectives++;
    make_ready(warp, ALL_LANES);
    take(warp, index % WARP);
    return true;
  }

  Warp &warp() { return *current; }
  Thread &thread() { return threads[here.thread]; }

  void expect_bytes(CopyCount *count, int bytes, const Site &site) {
    if (count->missing != 0) fatal(site, "not all that was expected before has been asked for");
    count->missing = bytes;
  }

  void copy_subtile(const SubtileMap &map, int column, int64_t token, int head, int64_t sequence, CopyCount *count, void *to,
                    const Site &site) {
    check_shared(to, site, SUBTILE_BYTES);
    if ((uintptr_t)to % 1024) fatal(site, "a sub-tile must begin at a multiple of 1024");
    if (count->missing < SUBTILE_BYTES) fatal(site, "more is copied than is expected");
    subtiles.push_back({count, (unsigned char *)to, {}});
    for (int row = 0; row < SUBTILE_ROWS; row++) {
      for (int i = 0; i < SUBTILE_PIECES; i++) {
        const unsigned char *piece = map.piece(column, token, head, sequence, row, i);
        if (piece) memcpy(subtiles.back().bytes + place_in_subtile(row, i), piece, 16);
      }
    }
    memset(to, 0xff, SUBTILE_BYTES);
    forbid(to, SUBTILE_BYTES);
    count->missing -= SUBTILE_BYTES;
    count_if_complete(count);
  }

  void wait_for_bytes(CopyCount *count, int time, const Site &site) {
    const unsigned index = here.thread;
    while (count->times <= time) {
      count_site = site;
      current->counting |= 1u << index % WARP;
      go_on(threads[index], false);
    }
    if (count->times > time + 1) fatal(site, "the time after the one that is waited for is over too");
    for (size_t i = 0; i < subtiles.size();) {
      SubtileCopy &copy = subtiles[i];
      if (copy.count != count) {
        i++;
        continue;
      }
      allow(copy.to, SUBTILE_BYTES);
      memcpy(copy.to, copy.bytes, SUBTILE_BYTES);
      if (i + 1 < subtiles.size()) copy = subtiles.back();
      subtiles.pop_back();
    }
  }

  void wait_for_stores(Thread &thread) {
    for (const SubtileStore &store : thread.stores) {
      for (int row = 0; row < SUBTILE_ROWS; row++) {
        for (int i = 0; i < SUBTILE_PIECES; i++) {
          unsigned char *piece = store.map->piece(store.column, store.token, store.head, store.sequence, row, i);
          if (piece) memcpy(piece, store.from + place_in_subtile(row, i), 16);
        }
      }
    }
    thread.stores.clear();
  }

  void check_shared(const void *p, const Site &site, size_t bytes = 16) const {
    check_alignment(p, site, bytes < 16 ? bytes : 16);
    const size_t offset = (size_t)((const unsigned char *)p - here.shared);
    if (offset >= shared_bytes || shared_bytes - offset < bytes) {
      fatal(site, "the address is outside of the block's shared memory");
    }
  }

  void land(Thread &thread, int64_t groups_left) {
    while (thread.landed < thread.copies.size()) {
      const Copy &copy = thread.copies[thread.landed];
      if (copy.group + groups_left >= thread.groups) return;
      allow(copy.to, copy.size);
      memcpy(copy.to, copy.bytes, copy.size);
      thread.landed++;
    }
    thread.copies.clear();
    thread.landed = 0;
  }

 private:
  static constexpr size_t MARGIN = 1024;
  static constexpr unsigned char MARK = 0xc5;

  static void thread_main() { runner->run_thread(); }
  void run_thread() {
    Fiber::entered(first ? &main : nullptr);
    first = false;
    kernel(arguments);
    const unsigned index = here.thread;
    if (!threads[index].stores.empty()) {
      fatal({"store_subtile", "a kernel", 0}, "a thread returns before what it stores has been read");
    }
    current->returned |= 1u << index % WARP;
    returned++;
    if (returned < thread_count) {
      go_on(threads[index], true);
    } else {
      threads[index].switch_to(main, true);
    }
  }

  bool run_block() {
    for (unsigned i = 0; i < thread_count; i++) {
      if (!threads[i].prepare(i, thread_main)) return false;
      threads[i].copies.clear();
      threads[i].landed = 0;
      threads[i].groups = 0;
      threads[i].stores.clear();
    }
    subtiles.clear();
    arrived = returned = runnable = 0;
    for (unsigned w = 0; w * WARP < thread_count; w++) {
      const unsigned lanes = thread_count - w * WARP;
      warps[w].first = w * WARP;
      warps[w].lanes = lanes < WARP ? (1u << lanes) - 1 : ALL_LANES;
      warps[w].ready = warps[w].waiting = warps[w].counting = warps[w].returned = warps[w].collectives = 0;
      make_ready(warps[w], warps[w].lanes);
    }
    unsigned char *shared = here.shared;
    memset(shared - MARGIN, MARK, MARGIN);
    memset(shared, 0xff, shared_bytes);
    memset(shared + shared_bytes, MARK, MARGIN);
    forbid(shared - MARGIN, MARGIN);
    forbid(shared + shared_bytes, MARGIN);
    first = true;
    current = &warps[order.pick(runnable)];
    here.thread = next();
    main.switch_to(threads[here.thread]);
    // Some of it may be forbidden by a copy that nobody waited for: a GPU lets that one be.
    allow(shared - MARGIN, MARGIN + shared_bytes + MARGIN);
    check_margins(shared);
    return true;
  }

  void check_margins(const unsigned char *shared) const {
    for (size_t i = 1; i <= MARGIN; i++) {
      if (shared[-(ptrdiff_t)i] != MARK) report_margin(-(long)i);
      if (shared[shared_bytes + i - 1] != MARK) report_margin((long)(shared_bytes + i - 1));
    }
  }
  [[noreturn]] void report_margin(long offset) const {
    fprintf(stderr,
            "cuda/host: kernel bug in block (%u, %u): it wrote outside of its shared memory, at byte %ld of %zu\n",
            here.block_x, here.block_y, offset, shared_bytes);
    abort();
  }

  void count_if_complete(CopyCount *count) {
    if (count->missing != 0) return;
    count->times++;
    // Those who wait for something else will find that and wait again.
    for (unsigned w = 0; w * WARP < thread_count; w++) {
      if (warps[w].counting) make_ready(warps[w], warps[w].counting);
      warps[w].counting = 0;
    }
  }

  void make_ready(Warp &warp, uint32_t lanes) {
    warp.ready |= lanes;
    runnable |= 1u << warp.first / WARP;
  }
  void take(Warp &warp, unsigned lane) {
    warp.ready &= ~(1u << lane);
    if (warp.ready == 0) runnable &= ~(1u << warp.first / WARP);
  }

  // In a regular order a warp runs until it meets a barrier; in a random one any warp may be next.
  unsigned next() {
    if (order.random() || current->ready == 0) {
      if (runnable == 0) stuck();
      current = &warps[order.pick(runnable)];
    }
    const unsigned lane = order.pick(current->ready);
    take(*current, lane);
    return current->first + lane;
  }
  void go_on(Thread &from, bool done) {
    const unsigned index = next();
    here.thread = index;
    from.switch_to(threads[index], done);
  }

  [[noreturn]] void disagree(const Site &site, const Site &other, const char *message) const {
    fprintf(stderr, "cuda/host: kernel bug in block (%u, %u): thread %u is at %s (%s:%d), but %s: %s (%s:%d)\n",
            here.block_x, here.block_y, here.thread, site.what, site.file, site.line, message, other.what, other.file,
            other.line);
    abort();
  }

  // Where a thread waits, or null if it has returned.
  const Site *waits_at(unsigned index) const {
    const Warp &warp = warps[index / WARP];
    const uint32_t lane = 1u << index % WARP;
    if (warp.returned & lane) return nullptr;
    if (warp.counting & lane) return &count_site;
    return warp.waiting & lane ? &warp.site : &barrier_site;
  }
  [[noreturn]] void stuck() const {
    fprintf(stderr, "cuda/host: kernel bug in block (%u, %u): threads wait for others that will not come\n", here.block_x,
            here.block_y);
    for (unsigned from = 0, to; from < thread_count; from = to) {
      const Site *site = waits_at(from);
      for (to = from + 1; to < thread_count; to++) {
        const Site *other = waits_at(to);
        if (!site != !other || (site && !same(*site, *other))) break;
      }
      fprintf(stderr, "  threads %u..%u: ", from, to - 1);
      if (site) {
        fprintf(stderr, "at %s (%s:%d)\n", site->what, site->file, site->line);
      } else {
        fprintf(stderr, "returned\n");
      }
    }
    if (thread_count % WARP) fprintf(stderr, "  (the last warp has only %u lanes)\n", thread_count % WARP);
    abort();
  }

  Fiber main;
  std::unique_ptr<Thread[]> threads;
  Warp warps[MOST_THREADS / WARP];
  Order order;
  unsigned char *region;  // shared memory, a margin on both sides
  size_t shared_bytes = 0;
  unsigned thread_count = 0, arrived = 0, returned = 0;
  Warp *current = nullptr;  // of the thread that runs now
  uint32_t runnable = 0;  // warps that have lanes that are ready
  Site barrier_site = {}, count_site = {};
  std::vector<SubtileCopy> subtiles;  // that nobody has waited for
  void (*kernel)(const void *) = nullptr;
  const void *arguments = nullptr;
  bool running = false, first = false;
};

}  // namespace cla::host
