// Checks the host's stand-in for a GPU against what PTX says of each instruction, and that kernel bugs do not pass. Exits
// with 0 if all holds. `selftest speed` measures the products of warps a second instead.
//
//     g++ -std=c++17 -O2 -pthread -DCLA_HOST selftest.cpp selftest_bugs.cpp runtime.cpp -o selftest && ./selftest
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <string>
#include <thread>
#include <vector>

#include "selftest.h"

using namespace cla;

int failures = 0;

void check(bool holds, const char *what) {
  if (holds) return;
  printf("FAILED: %s\n", what);
  failures++;
}

// ---- tensor cores ----

// Small multiples of 1/8: their products and sums are exact in f32.
static float entry(unsigned i) { return (float)((int)(i * 2654435761u >> 20) % 17 - 8) / 8.f; }

struct Product {
  uint16_t *a, *b;  // [16, 16] and [16, 8], rows by rows
  float *c;         // [16, 8]
};

// PTX, "Matrix Fragments for mma.m16n8k16": which element of A, B and C is the i-th of a lane.
static void a_place(int lane, int i, int &row, int &col) {
  row = lane / 4 + ((i < 2 || (i >= 4 && i < 6)) ? 0 : 8);
  col = lane % 4 * 2 + (i & 1) + (i >= 4 ? 8 : 0);
}
static void b_place(int lane, int i, int &row, int &col) {
  row = lane % 4 * 2 + (i & 1) + (i >= 2 ? 8 : 0);
  col = lane / 4;
}
static void c_place(int lane, int i, int &row, int &col) {
  row = lane / 4 + (i < 2 ? 0 : 8);
  col = lane % 4 * 2 + (i & 1);
}

template <bool F16> CLA_KERNEL(32, 1) static void product_of_fragments(Product p) {
  const int lane = (int)thread_index();
  uint16_t a[8], b[4];
  float c[4];
  int row, col;
  for (int i = 0; i < 8; i++) a_place(lane, i, row, col), a[i] = p.a[row * 16 + col];
  for (int i = 0; i < 4; i++) b_place(lane, i, row, col), b[i] = p.b[row * 8 + col];
  for (int i = 0; i < 4; i++) c_place(lane, i, row, col), c[i] = p.c[row * 8 + col];
  uint32_t packed[4];
  for (int i = 0; i < 4; i++) packed[i] = a[2 * i] | (uint32_t)a[2 * i + 1] << 16;
  const uint32_t b0 = b[0] | (uint32_t)b[1] << 16, b1 = b[2] | (uint32_t)b[3] << 16;
  F16 ? mma_f16(c, packed, b0, b1) : mma(c, packed, b0, b1);
  for (int i = 0; i < 4; i++) c_place(lane, i, row, col), p.c[row * 8 + col] = c[i];
}

// The same product with A and B in shared memory, each stored by rows or, if transposed, by columns.
template <bool A_TRANSPOSED, bool B_TRANSPOSED> static void product_of_tiles(Product p) {
  const int lane = (int)thread_index();
  uint16_t *a = (uint16_t *)shared_memory(), *b = a + 256;
  for (int i = lane; i < 256; i += 32) a[A_TRANSPOSED ? i % 16 * 16 + i / 16 : i] = p.a[i];
  // B as mma wants it, with the sum along a row of memory, is what B_TRANSPOSED stores: n by k.
  for (int i = lane; i < 128; i += 32) b[B_TRANSPOSED ? i % 8 * 16 + i / 8 : i] = p.b[i];
  barrier();
  uint32_t x[4], y[4];
  const int in = lane % 8, matrix = lane / 8;
  if (A_TRANSPOSED) {
    load_matrices_transposed(x, a + (in + matrix / 2 * 8) * 16 + matrix % 2 * 8);
  } else {
    load_matrices(x, a + (in + matrix % 2 * 8) * 16 + matrix / 2 * 8);
  }
  if (B_TRANSPOSED) {
    load_matrices(y, b + in * 16 + matrix % 2 * 8);
  } else {
    load_matrices_transposed(y, b + (in + matrix % 2 * 8) * 8);
  }
  float c[4];
  int row, col;
  for (int i = 0; i < 4; i++) c_place(lane, i, row, col), c[i] = p.c[row * 8 + col];
  mma(c, x, y[0], y[1]);
  for (int i = 0; i < 4; i++) c_place(lane, i, row, col), p.c[row * 8 + col] = c[i];
}

// Of bf16, or of f16 with more bits than those have; the sums have few enough to be exact.
static bool is_product(void (*kernel)(Product), bool f16 = false) {
  std::vector<uint16_t> a(256), b(128);
  std::vector<float> c(128), expected(128);
  auto number = [&](unsigned i) { return f16 ? to_f16(entry(i) + entry(3000 + i) / 64.f) : to_bf16(entry(i)); };
  auto value = [&](uint16_t x) { return f16 ? from_f16(x) : from_bf16(x); };
  for (unsigned i = 0; i < 256; i++) a[i] = number(i);
  for (unsigned i = 0; i < 128; i++) b[i] = number(1000 + i), expected[i] = c[i] = entry(2000 + i);
  for (int i = 0; i < 16; i++) {
    for (int j = 0; j < 8; j++) {
      for (int k = 0; k < 16; k++) expected[i * 8 + j] += value(a[i * 16 + k]) * value(b[k * 8 + j]);
    }
  }
  const Product p = {a.data(), b.data(), c.data()};
  return launch(kernel, {1, 1}, 32, 768, nullptr, p) == 0 && c == expected;
}

// ---- warps, blocks, grids ----

struct Exchange {
  float *xored, *from_five;
  int32_t *up;
};
static void exchange(Exchange e) {
  const int t = (int)thread_index();
  e.xored[t] = shuffle_xor((float)t, 5);
  e.up[t] = shuffle_up(t, 3);
  e.from_five[t] = shuffle((float)t, 5);
  // Lanes run ahead of each other between these; none may see another's later word.
  int32_t sum = t;
  for (int i = 0; i < 100; i++) sum = shuffle_xor(sum, 1 << i % 5) + shuffle_up(i, 0) - i;
  e.up[64 + t] = sum;
}

// Lanes hand numbers to each other in shared memory.
static void exchange_in_memory(int32_t *out) {
  int32_t *row = (int32_t *)shared_memory();
  const int t = (int)thread_index();
  int32_t x = t;
  for (int i = 0; i < 5; i++) {
    row[t] = x;
    warp_barrier();
    x = row[t ^ 1 << i] + 1;
    warp_barrier();
  }
  out[t] = x;
}

static void check_warp_barriers() {
  std::vector<int32_t> out(64);
  check(launch(exchange_in_memory, {1, 1}, 64, 256, nullptr, out.data()) == 0, "warps wait for their lanes");
  bool holds = true;
  for (int t = 0; t < 64; t++) holds &= out[t] == (t ^ 31) + 5;
  check(holds, "what lanes of a warp wrote before a barrier of theirs is seen after it");
}

static void check_shuffles() {
  std::vector<float> xored(64), five(64);
  std::vector<int32_t> up(128);
  check(launch(exchange, {1, 1}, 64, 0, nullptr, Exchange{xored.data(), five.data(), up.data()}) == 0, "shuffles run");
  bool holds = true;
  for (int t = 0; t < 64; t++) {
    int expected = t;
    for (int i = 0; i < 100; i++) expected ^= 1 << i % 5;
    holds &= xored[t] == (float)(t ^ 5) && five[t] == (float)(t / 32 * 32 + 5);
    holds &= up[t] == (t % 32 < 3 ? t : t - 3) && up[64 + t] == expected;
  }
  check(holds, "shuffles bring the words of the lanes that they name");
}

// Each block adds 1 to its own counter and to all threads' sum, in several rounds of shared memory.
static void rotate(int32_t *blocks, float *sum, int32_t *least) {
  int32_t *row = (int32_t *)shared_memory();
  const int t = (int)thread_index();
  int32_t x = t;
  for (int i = 0; i < 10; i++) {
    row[t] = x;
    barrier();
    x = row[(t + 1) % 96];
    barrier();
  }
  if (x == (t + 10) % 96) atomic_add(sum, 1.f);
  atomic_min(least, -(int)(block_x() + grid_x() * block_y()));
  if (t == 0) blocks[block_x() + grid_x() * block_y()] += 1 + (grid_y() != 3);
}

static void check_grids() {
  std::vector<int32_t> blocks(15);
  float sum = 0;
  int32_t least = 1000;
  check(launch(rotate, {5, 3}, 96, 96 * 4, nullptr, blocks.data(), &sum, &least) == 0, "a grid runs");
  check(blocks == std::vector<int32_t>(15, 1), "each block runs once");
  check(sum == 15 * 96 && least == -14, "barriers divide what threads write from what they read");
}

// Tests launch from several OS threads at once.
static void check_os_threads() {
  bool right[4] = {};
  std::vector<std::thread> threads;
  for (uint32_t i = 0; i < 4; i++) {
    threads.emplace_back([&right, i] {
      cla_host_order(i);
      std::vector<int32_t> blocks(15);
      float sum = 0;
      int32_t least = 0;
      right[i] = true;
      for (int times = 1; times <= 50; times++) {
        launch(rotate, {5, 3}, 96, 96 * 4, nullptr, blocks.data(), &sum, &least);
        right[i] &= blocks == std::vector<int32_t>(15, times) && sum == (float)(15 * 96 * times);
      }
    });
  }
  for (std::thread &thread : threads) thread.join();
  check(right[0] && right[1] && right[2] && right[3], "launches from several OS threads do not meet");
}

static void nothing() {}

static void check_limits() {
  check(launch(nothing, {0, 1}, 32, 0, nullptr) == 0, "an empty grid is no error");
  check(launch(nothing, {(int64_t)1 << 31, 1}, 32, 0, nullptr) == 9, "grid.x ends at 2^31 - 1");
  check(launch(nothing, {1, 65536}, 32, 0, nullptr) == 9, "grid.y ends at 65535");
  check(launch(nothing, {1, 1}, 1025, 0, nullptr) == 9, "a block has up to 1024 threads");
  check(launch(nothing, {1, 1}, 32, 232449, nullptr) == 1, "shared memory ends at 227 KB");
  check(launch(nothing, {1, 65535}, 1, 0, nullptr) == 0 && launch(nothing, {1, 1}, 1024, 232448, nullptr) == 0,
        "the limits themselves are allowed");
}

// Thread t takes what its neighbour below wrote, without a barrier: right only if that one ran first.
static void no_barrier(float *out) {
  float *row = (float *)shared_memory();
  const int t = (int)thread_index();
  row[t] = (float)t;
  out[t] = t == 0 ? 0.f : row[t - 1];
}
// The threads that saw nothing.
static std::vector<int> missed() {
  std::vector<float> out(64);
  launch(no_barrier, {1, 1}, 64, 64 * 4, nullptr, out.data());
  std::vector<int> threads;
  for (int t = 0; t < 64; t++) {
    if (isnan(out[(size_t)t])) threads.push_back(t);
  }
  return threads;
}
static std::vector<int> missed(uint32_t order) {
  cla_host_order(order);
  std::vector<int> threads = missed();
  cla_host_order(0);
  return threads;
}

static void check_orders() {
  check(missed(0).empty() && missed(1).size() == 63, "upwards and downwards");
  const std::vector<int> two = missed(2), seven = missed(7);
  check(!two.empty() && two == missed(2) && two != seven, "the seed makes the order");
  size_t from_environment = 0;
  setenv("CLA_HOST_ORDER", "1", 1);
  std::thread([&] { from_environment = missed().size(); }).join();
  unsetenv("CLA_HOST_ORDER");
  check(from_environment == 63, "an OS thread begins with the order of the environment");
}

// ---- copies ----

struct Copied {
  const uint32_t *from;
  uint32_t *to;  // [2 groups, 3 moments, 32 threads]
};
template <bool LOOK_EARLY> static void copy(Copied c) {
  const int t = (int)thread_index();
  uint32_t *shared = (uint32_t *)shared_memory() + 12 * t;
  uint32_t *out = c.to + t;
  shared[1] = shared[5] = shared[9] = 7;
  copy8_async(shared, c.from + 4 * t, true);
  copies_commit();
  copy16_async(shared + 4, c.from + 4 * t, t % 2 == 0);
  copies_commit();
  copy16_async(shared + 8, c.from + 4 * t, true);  // never committed
  if (LOOK_EARLY) out[0] = shared[1], out[96] = shared[5];
  copies_wait<1>();
  out[32] = shared[1];
  if (LOOK_EARLY) out[128] = shared[5];
  copies_wait<0>();
  out[64] = shared[1], out[160] = shared[5];
  if (LOOK_EARLY) out[192] = shared[9];
}

static void check_copies() {
  alignas(16) uint32_t from[128];
  for (unsigned i = 0; i < 128; i++) from[i] = 1000 + i;
  std::vector<uint32_t> to(224);
  check(launch(copy<false>, {1, 1}, 32, 32 * 48, nullptr, Copied{from, to.data()}) == 0, "copies run");
  bool landed = true, early = true;
  for (unsigned t = 0; t < 32; t++) {
    const uint32_t x = 1001 + 4 * t;
    landed &= to[32 + t] == x && to[64 + t] == x && to[160 + t] == (t % 2 ? 0 : x);
  }
  check(landed, "copies land, or zeros, when their group is waited for");
  if (CLA_ASAN) return;  // that is an error there, see below
  launch(copy<true>, {1, 1}, 32, 32 * 48, nullptr, Copied{from, to.data()});
  for (unsigned t = 0; t < 32; t++) {
    for (int at : {0, 96, 128, 192}) early &= to[at + t] == 0xffffffffu;
  }
  check(early, "copies do not land before their group is committed and waited for");
}

// ---- sub-tiles ----

// 2 sequences, 70 tokens, 3 heads, 72 columns of bf16.
constexpr int64_t SIZES[4] = {72, 70, 3, 2}, STRIDES[4] = {2, 3 * 72 * 2, 72 * 2, 70 * 3 * 72 * 2};
constexpr int64_t ELEMENTS = 72 * 3 * 70 * 2;
static int64_t element(int64_t column, int64_t token, int64_t head, int64_t sequence) {
  return ((sequence * 70 + token) * 3 + head) * 72 + column;
}
// Where the second kernel's sub-tile begins: beyond the last columns and before the first token.
constexpr int COLUMN = 64, TOKEN = -3, HEAD = 2, SEQUENCE = 1;

struct Moved {
  SubtileMap from, to;
  uint16_t *seen;  // [3 moments, 64 rows, 64 columns]
};
static void see(uint16_t *seen) {
  for (unsigned i = thread_index(); i < 4096; i += 64) {
    const unsigned row = i / 64, column = i % 64;
    const unsigned at = row * 128 + ((column / 8 ^ row % 8) << 4) + column % 8 * 2;
    memcpy(seen + i, shared_memory() + at, 2);
  }
}
template <bool LOOK_EARLY> static void move(Moved m) {
  CopyCount *count = (CopyCount *)(shared_memory() + 2 * 8192);
  if (thread_index() == 0) prepare_count(count);
  barrier();
  for (int time = 0; time < 2; time++) {
    if (thread_index() == 0) {
      expect_bytes(count, 2 * 8192);
      copy_subtile(shared_memory(), m.from, time ? COLUMN : 0, time ? TOKEN : 5, HEAD, SEQUENCE, count);
      if (LOOK_EARLY) see(m.seen + 2 * 4096);
      copy_subtile(shared_memory() + 8192, m.from, 0, 0, 0, 0, count);
    }
    wait_for_bytes(count, time);
    barrier();
    see(m.seen + time * 4096);
    if (thread_index() == 0) store_subtile(m.to, time ? COLUMN : 0, time ? TOKEN : 5, HEAD, SEQUENCE, shared_memory());
    // What is stored is read as late as it may be: the second time not at all as it was.
    if (time == 0 && thread_index() == 0) wait_for_stores();
    barrier();
  }
  if (thread_index() == 0) {
    memset(shared_memory(), 0x55, 8192);
    wait_for_stores();
  }
}

static void check_subtiles() {
  std::vector<uint16_t> from(ELEMENTS + 8), to(ELEMENTS + 8), seen(3 * 4096);
  auto aligned = [](std::vector<uint16_t> &x) { return (uint16_t *)(((uintptr_t)x.data() + 15) & ~(uintptr_t)15); };
  uint16_t *source = aligned(from), *target = aligned(to);
  for (int64_t i = 0; i < ELEMENTS; i++) source[i] = (uint16_t)(1 + i % 40000);
  Moved m = {{}, {}, seen.data()};
  check(describe_subtiles(m.from, source, SIZES, STRIDES) && describe_subtiles(m.to, target, SIZES, STRIDES), "maps");
  SubtileMap none;
  check(!describe_subtiles(none, target + 1, SIZES, STRIDES), "an odd address");
  check(!describe_subtiles(none, target, SIZES, {2, 3 * 72 * 2, 72 * 2 + 8, 70 * 3 * 72 * 2}), "an odd stride");
  std::fill(to.begin(), to.end(), 0);
  check(launch(move<false>, {1, 1}, 64, 2 * 8192 + 8, nullptr, m) == 0, "sub-tiles move");
  bool same = true, zeros = true, stored = true;
  for (int row = 0; row < 64; row++) {
    for (int column = 0; column < 64; column++) {
      same &= seen[row * 64 + column] == source[element(column, 5 + row, HEAD, SEQUENCE)];
      const int token = TOKEN + row;
      const bool inside = column < 8 && token >= 0;
      zeros &= seen[4096 + row * 64 + column] == (inside ? source[element(COLUMN + column, token, HEAD, SEQUENCE)] : 0);
    }
  }
  for (int64_t i = 0; i < ELEMENTS; i++) {
    const int64_t column = i % 72, head = i / 72 % 3, token = i / 216 % 70, sequence = i / 15120;
    const bool own = head == HEAD && sequence == SEQUENCE;
    const bool first = own && column < 64 && token >= 5 && token < 69, second = own && column >= 64 && token < 61;
    stored &= target[i] == (first ? source[i] : second ? 0x5555 : 0);
  }
  check(same, "a sub-tile lands, swizzled");
  check(zeros, "what lies outside of the tensor is zero");
  check(stored, "what is stored is read when that is waited for, and stays inside");
  if (CLA_ASAN) return;  // that is an error there
  launch(move<true>, {1, 1}, 64, 2 * 8192 + 8, nullptr, m);
  check(seen[2 * 4096] == 0xffff, "a sub-tile does not land before all bytes are waited for");
}

// ---- numbers ----

static float f16_value(unsigned bits) {
  const unsigned exponent = bits >> 10 & 31, fraction = bits & 1023;
  return exponent ? ldexpf(1.f + (float)fraction / 1024.f, (int)exponent - 15) : ldexpf((float)fraction, -24);
}

// From the value of each finite number of a format and that of the next: halfway goes to the even one.
template <class Value, class Round> static bool rounds_to_nearest_even(unsigned infinity, Value value, Round round) {
  bool holds = true;
  for (unsigned i = 0; i < infinity; i++) {
    const double low = value(i), next = i + 1 < infinity ? value(i + 1) : 2 * low - value(i - 1);
    const float half = (float)((low + next) / 2);
    for (unsigned sign : {0u, 0x8000u}) {
      const float s = sign ? -1.f : 1.f;
      holds &= round(s * (float)low) == (i | sign) && round(s * half) == ((i + (i & 1)) | sign);
      holds &= round(s * nextafterf(half, 0.f)) == (i | sign) && round(s * nextafterf(half, INFINITY)) == ((i + 1) | sign);
    }
  }
  return holds && round(INFINITY) == infinity && round(-INFINITY) == (infinity | 0x8000);
}

static void check_numbers() {
  bool same = true;
  for (unsigned i = 0; i < 0x7c00; i++) {
    same &= from_f16((uint16_t)i) == f16_value(i) && from_f16((uint16_t)(i | 0x8000)) == -f16_value(i);
  }
  check(same && from_f16(0x7c00) == INFINITY && from_f16(0xfc00) == -INFINITY && isnan(from_f16(0x7c01)), "f16 is read");
  check(rounds_to_nearest_even(0x7c00, f16_value, to_f16) && isnan(from_f16(to_f16(NAN))), "f16 is rounded to");
  auto bf16_value = [](unsigned i) { return from_bf16((uint16_t)i); };
  check(from_bf16(0x3fc0) == 1.5f && from_bf16(0xc049) == -3.140625f && from_bf16(1) == 0x1p-133f, "bf16 is read");
  check(rounds_to_nearest_even(0x7f80, bf16_value, to_bf16) && isnan(from_bf16(to_bf16(NAN))), "bf16 is rounded to");
  bool sums = true;
  for (unsigned i = 0; i < 0x7c00; i++) {
    const float x = f16_value(i), rounded = from_bf16(to_bf16(x));
    sums &= rounded + from_bf16(to_bf16(x - rounded)) == x;
  }
  check(sums, "f16 is the sum of two bf16");
  const uint32_t pair = pack_bf16(1.f, -2.f);
  check(pair == 0xc0003f80 && low_bf16(pair) == 1.f && high_bf16(pair) == -2.f, "the first of a pair is the low half");
  check(exp_fast(0.f) == 1.f && exp_fast(-INFINITY) == 0.f && fabsf(exp_fast(-3.f) - 0.049787068f) < 1e-8f, "exp_fast");
  check(isnan(low_bf16(0xffffffff)) && isnan(from_f16(0xffff)), "fresh shared memory is not a number");
}

// ---- speed ----

static void many_products(int count, float *out) {
  const unsigned t = thread_index();
  uint16_t *tile = (uint16_t *)shared_memory() + t / 32 * 256;
  for (unsigned i = t % 32; i < 256; i += 32) tile[i] = to_bf16(entry(i));
  barrier();
  float c[4] = {};
  uint32_t a[4];
  for (int i = 0; i < count; i++) {
    if (i % 4 == 0) load_matrices(a, tile + t % 16 * 16 + t / 16 % 2 * 8);
    mma(c, a, a[0], a[1]);
  }
  out[t] = c[0];
}

// Of this thread: what else the machine does is not counted.
static double seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void measure() {
  std::vector<float> out(128);
  const int count = 100000;
  for (uint32_t order : {0, 1, 2}) {
    cla_host_order(order);
    const double start = seconds();
    launch(many_products, {1, 1}, 128, 2048, nullptr, count, out.data());
    printf("order %u: %.0f thousand products a second, of four warps and with a load for every fourth\n", order,
           4e-3 * count / (seconds() - start));
  }
}

int main(int argc, char **argv) {
  setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
  if (argc > 1 && std::string(argv[1]) == "speed") return measure(), 0;
  for (uint32_t order : {0, 1, 2, 3, 4}) {
    cla_host_order(order);
    check(is_product(product_of_fragments<false>), "mma multiplies the fragments that PTX describes");
    check(is_product(product_of_fragments<true>, true), "mma_f16 does too");
    check(is_product(product_of_tiles<false, true>), "A by rows, B by columns");
    check(is_product(product_of_tiles<false, false>), "A by rows, B by rows");
    check(is_product(product_of_tiles<true, true>), "A by columns, B by columns");
    check(is_product(product_of_tiles<true, false>), "A by columns, B by rows");
    check_shuffles();
    check_warp_barriers();
    check_grids();
    check_copies();
    check_subtiles();
  }
  cla_host_order(0);
  check_os_threads();
  check_limits();
  check_numbers();
  check_orders();
  check_bugs();
  printf("%d failures\n", failures);
  return failures != 0;
}
