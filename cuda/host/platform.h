// The machine of `platform.cuh`, played by the host so that tests run the kernels where there is no GPU: a block at a
// time, a fiber a thread, and results that depend on nothing but the kernel and the order that cla_host_order sets.
//
// It is stricter than a GPU. What it can see to be wrong ends the process (abort), with a message that says where in the
// kernel each thread is; what it cannot see it makes visible, as NaN:
//  - shared memory is 0xff bytes, NaN in every format, until it is written;
//  - what copy16_async and copy8_async copy lands when a copies_wait covers its group, and no sooner: until then its target is 0xff; a
//    sub-tile that is copied likewise, and one that is stored is read only when its store is waited for;
//  - a thread runs alone as far as it can, so that a missing barrier shows under one order or another.
// Under AddressSanitizer, reading what is still being copied is an error too, as is every access outside of shared memory.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <tuple>
#include <utility>

#define CLA_DEVICE inline
#define CLA_ANYWHERE inline
#define CLA_COLD inline
#define CLA_CONSTANT
#define CLA_KERNEL(threads, blocks_per_sm)
#define CLA_UNROLL
#define CLA_UNROLL_TWICE
#define CLA_UNROLL_EIGHT
#define CLA_NO_UNROLL

// The order in which threads and blocks of later launches from this OS thread run: 0 upwards (as at the start, unless the
// environment variable CLA_HOST_ORDER says otherwise), 1 downwards, from 2 pseudo-random with this seed.
extern "C" void cla_host_order(uint32_t seed);

// Where in a kernel a call stands; the caller leaves it out.
#define CLA_HOST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace cla {

struct alignas(16) Vec4 {
  uint32_t x, y, z, w;
};

struct Dims {
  int64_t x, y;
};

namespace host {

// Of the thread that runs now.
struct Here {
  unsigned thread, block_x, block_y, grid_x, grid_y;
  unsigned char *shared;
};
extern __thread Here here;

struct Site {
  const char *what, *file;
  int line;
};

[[noreturn]] void fatal(const Site &site, const char *message);
uint32_t shuffle(uint32_t x, unsigned from, const Site &site);
void load_matrices(uint32_t (&r)[4], const void *row, bool transposed, const Site &site);
void copies_wait(int64_t groups);
int32_t run(Dims grid, int threads, int64_t shared_bytes, void (*kernel)(const void *), const void *arguments);

template <class To, class From> To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

// What lane `from` has of numbers of 4 or 8 bytes, a word at a time.
template <class T> T shuffle_words(T x, unsigned from, const Site &site) {
  constexpr int WORDS = sizeof(T) / 4;
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a size that a GPU shuffles");
  uint32_t words[WORDS];
  memcpy(words, &x, sizeof x);
  for (uint32_t &word : words) word = shuffle(word, from, site);
  memcpy(&x, words, sizeof x);
  return x;
}

inline unsigned lane() { return here.thread & 31; }
inline void check_alignment(const void *p, const Site &site, size_t to = 16) {
  if ((uintptr_t)p % to) fatal(site, to == 16 ? "the address is not a multiple of 16" : "the address is not a multiple of 8");
}

}  // namespace host

inline int opaque(int x) { return x; }
inline float opaque(float x) { return x; }
inline unsigned thread_index() { return host::here.thread; }
inline unsigned block_x() { return host::here.block_x; }
inline unsigned block_y() { return host::here.block_y; }
inline unsigned grid_x() { return host::here.grid_x; }
inline unsigned grid_y() { return host::here.grid_y; }
inline unsigned char *shared_memory() { return host::here.shared; }

void barrier(CLA_HOST_SITE);
void meet(int which);
inline void warp_barrier(CLA_HOST_SITE) { host::shuffle(0, host::lane(), {"warp_barrier", file, line}); }

// Lanes that do not exist give the caller's own value, as on a GPU.
template <class T> T shuffle(T x, int from, CLA_HOST_SITE) {
  return host::shuffle_words(x, (unsigned)from & 31, {"shuffle", file, line});
}
template <class T> T shuffle_xor(T x, int mask, CLA_HOST_SITE) {
  const unsigned lane = host::lane(), from = lane ^ (unsigned)mask;
  return host::shuffle_words(x, from < 32 ? from : lane, {"shuffle_xor", file, line});
}
template <class T> T shuffle_up(T x, int delta, CLA_HOST_SITE) {
  const unsigned lane = host::lane(), from = lane - (unsigned)delta;
  return host::shuffle_words(x, from < 32 ? from : lane, {"shuffle_up", file, line});
}

void copy16_async(void *shared, const void *global, bool valid, CLA_HOST_SITE);
void copy8_async(void *shared, const void *global, bool valid, CLA_HOST_SITE);
void copies_commit();
template <int N> void copies_wait() {
  static_assert(N >= 0, "a number of groups");
  host::copies_wait(N);
}

constexpr bool HAS_SUBTILE_COPIES = true;

struct SubtileMap {
  unsigned char *data;
  int64_t sizes[4], strides[4];

  // The 16 bytes of a row of a sub-tile, where its first column and token are; null if they lie outside.
  unsigned char *piece(int column, int64_t token, int head, int64_t sequence, int row, int piece) const {
    const int64_t c = column + piece * 16 / strides[0], t = token + row;
    if (c < 0 || c >= sizes[0] || t < 0 || t >= sizes[1] || head >= sizes[2] || sequence >= sizes[3]) return nullptr;
    return data + c * strides[0] + t * strides[1] + head * strides[2] + sequence * strides[3];
  }
};
inline bool describe_subtiles(SubtileMap &map, void *data, const int64_t (&sizes)[4], const int64_t (&strides)[4]) {
  map.data = (unsigned char *)data;
  for (int i = 0; i < 4; i++) {
    map.sizes[i] = sizes[i];
    map.strides[i] = strides[i];
    // What a GPU demands. A piece is all inside or all outside.
    if (sizes[i] < 1 || sizes[i] > INT32_MAX || strides[i] < 0) return false;
    if (i > 0 && sizes[i] > 1 && (strides[i] % 16 || strides[i] >= (int64_t)1 << 40)) return false;
  }
  return (uintptr_t)data % 16 == 0 && sizes[0] * strides[0] % 16 == 0;
}

struct CopyCount {
  int32_t times, missing;  // how often all bytes have been asked for, and how many are still expected
};
void prepare_count(CopyCount *count);
void expect_bytes(CopyCount *count, int bytes, CLA_HOST_SITE);
void wait_for_bytes(CopyCount *count, int time, CLA_HOST_SITE);
void copy_subtile(void *to, const SubtileMap &map, int column, int64_t token, int head, int64_t sequence, CopyCount *count,
                  CLA_HOST_SITE);
void store_subtile(const SubtileMap &map, int column, int64_t token, int head, int64_t sequence, const void *from,
                   CLA_HOST_SITE);
void wait_for_stores();

inline void load_matrices(uint32_t (&r)[4], const void *row, CLA_HOST_SITE) {
  host::load_matrices(r, row, false, {"load_matrices", file, line});
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void *row, CLA_HOST_SITE) {
  host::load_matrices(r, row, true, {"load_matrices_transposed", file, line});
}
// In f32: the sum of the 16 products, then c. A GPU's sum differs in the last bits, and from one generation to the next.
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, CLA_HOST_SITE);

inline float from_bf16(uint16_t x) { return host::same_bits<float>((uint32_t)x << 16); }
inline uint16_t to_bf16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = host::same_bits<uint32_t>(x);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint32_t pack_bf16(float low, float high) { return to_bf16(low) | (uint32_t)to_bf16(high) << 16; }
inline float low_bf16(uint32_t x) { return host::same_bits<float>(x << 16); }
inline float high_bf16(uint32_t x) { return host::same_bits<float>(x & 0xffff0000u); }

inline float from_f16(uint16_t x) {
  const uint32_t sign = (uint32_t)(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 0x3ff;
  if (exponent == 31) return host::same_bits<float>(sign | 0x7f800000 | fraction << 13);
  if (exponent != 0) return host::same_bits<float>(sign | (exponent + 112) << 23 | fraction << 13);
  const float size = (float)fraction * 0x1p-24f;
  return sign ? -size : size;
}
inline uint16_t to_f16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = host::same_bits<uint32_t>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and more round to infinity
  if (size >= 0x38800000) {
    return (uint16_t)(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
  }
  // Subnormal: the sum has units of 2^-24, and f32's addition rounds to them, to nearest even.
  const float shifted = host::same_bits<float>(size) + 0.5f;
  return (uint16_t)(sign | (host::same_bits<uint32_t>(shifted) - 0x3f000000));
}
inline uint32_t pack_f16(float low, float high) { return to_f16(low) | (uint32_t)to_f16(high) << 16; }

// The same of f16, each of which is the sum of two bf16.
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, CLA_HOST_SITE) {
  auto part = [](uint32_t pair, bool rest) {
    const float low = from_f16((uint16_t)pair), high = from_f16((uint16_t)(pair >> 16));
    const uint32_t rounded = pack_bf16(low, high);
    return rest ? pack_bf16(low - low_bf16(rounded), high - high_bf16(rounded)) : rounded;
  };
  for (bool of_a : {true, false}) {
    const uint32_t x[4] = {part(a[0], of_a), part(a[1], of_a), part(a[2], of_a), part(a[3], of_a)};
    for (bool of_b : {true, false}) mma(c, x, part(b0, of_b), part(b1, of_b), file, line);
  }
}

inline float exp2_fast(float x) { return exp2f(x); }
inline float exp_fast(float x) { return expf(x); }
inline float larger(float x, float y) { return x != x || x > y ? x : y; }
inline int highest_bit(unsigned x) { return 31 - __builtin_clz(x); }
inline float reciprocal_fast(float x) { return 1.f / x; }

inline Vec4 load16(const void *p, CLA_HOST_SITE) {
  host::check_alignment(p, {"load16", file, line});
  return *(const Vec4 *)p;
}
inline void store16(void *p, Vec4 x, CLA_HOST_SITE) {
  host::check_alignment(p, {"store16", file, line});
  *(Vec4 *)p = x;
}
inline void store16_streaming(void *p, Vec4 x, CLA_HOST_SITE) {
  host::check_alignment(p, {"store16_streaming", file, line});
  *(Vec4 *)p = x;
}

// A launch runs on one OS thread, so these need not be atomic.
inline float atomic_add(float *p, float x) {
  const float before = *p;
  *p = before + x;
  return before;
}
inline int atomic_min(int *p, int x) {
  const int before = *p;
  *p = x < before ? x : before;
  return before;
}

// Runs the whole grid before it returns. The errors are those that a GPU gives: cudaErrorInvalidValue and
// cudaErrorInvalidConfiguration, and cudaErrorMemoryAllocation where there is no room for stacks.
template <class... Parameters, class... Given>
int32_t launch(void (*kernel)(Parameters...), Dims grid, int threads, int64_t shared_bytes, void *, Given... given) {
  static_assert(sizeof...(Parameters) == sizeof...(Given), "an argument for each parameter");
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "what fits the parameters of a kernel");
  // The parameters are by value: each thread gets its own.
  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call = {kernel, {static_cast<Parameters>(given)...}};
  auto one_thread = [](const void *p) { std::apply(((const Call *)p)->first, ((const Call *)p)->second); };
  return host::run(grid, threads, shared_bytes, one_thread, &call);
}

}  // namespace cla
