// Rows as kernels bound by memory move them: several neighbours at a time, of a dtype that the compiler knows, so that all
// loads of a loop are under way before the first is looked at.
#pragma once
#include <type_traits>

#include "elements.cuh"
#include "layers.h"

namespace cla {

// How many numbers of a dtype are 16 bytes.
template <int DTYPE> constexpr int IN_16_BYTES = DTYPE == CLA_F32 ? 4 : 8;

// N neighbours as they lie in memory, 8 or 16 bytes. WHOLE: moved at once; otherwise one by one, whatever lies between them,
// and behind the end of a row there are zeros.
template <int DTYPE, int N, bool WHOLE> struct Vector {
  static constexpr int COUNT = N, SIZE = DTYPE == CLA_F32 ? 4 : 2, WORDS = N * SIZE / 4;
  static_assert(WORDS == 2 || WORDS == 4, "8 or 16 bytes");
  uint32_t words[WORDS];

  CLA_DEVICE void clear() {
    CLA_UNROLL
    for (int i = 0; i < WORDS; i++) words[i] = 0;
  }

  // Elements d and on of row t, which has `width`; d is one of them.
  CLA_DEVICE void load(const Rows &rows, int64_t t, int d, int width) {
    if (!WHOLE) {
      clear();
      CLA_UNROLL
      for (int i = 0; i < N; i++) {
        if (d + i >= width) continue;
        const int64_t at = t * rows.token + (d + i) * rows.element;
        if (DTYPE == CLA_F32) words[i] = ((const uint32_t *)rows.data)[at];
        else words[i / 2] |= (uint32_t)((const uint16_t *)rows.data)[at] << (16 * (i % 2));
      }
      return;
    }
    const unsigned char *from = rows.data + (t * rows.token + d) * SIZE;
    if constexpr (WORDS == 4) {
      const Vec4 v = load16(from);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else {
      const Vec2 v = *(const Vec2 *)from;
      words[0] = v.x, words[1] = v.y;
    }
  }

  CLA_DEVICE void store(const Rows &rows, int64_t t, int d, int width) const {
    if (!WHOLE) {
      CLA_UNROLL
      for (int i = 0; i < N; i++) {
        if (d + i >= width) continue;
        const int64_t at = t * rows.token + (d + i) * rows.element;
        if (DTYPE == CLA_F32) ((uint32_t *)rows.data)[at] = words[i];
        else ((uint16_t *)rows.data)[at] = (uint16_t)(words[i / 2] >> (16 * (i % 2)));
      }
      return;
    }
    unsigned char *to = rows.data + (t * rows.token + d) * SIZE;
    if constexpr (WORDS == 4) store16(to, {words[0], words[1], words[2], words[3]});
    else *(Vec2 *)to = {words[0], words[1]};
  }

  CLA_DEVICE float operator[](int i) const {
    if constexpr (DTYPE == CLA_F32) return bits_to_float(words[i]);
    if constexpr (DTYPE == CLA_BF16) return i % 2 ? high_bf16(words[i / 2]) : low_bf16(words[i / 2]);
    return from_f16((uint16_t)(words[i / 2] >> (16 * (i % 2))));
  }

  CLA_DEVICE void set(const float (&x)[N]) {
    CLA_UNROLL
    for (int i = 0; i < WORDS; i++) {
      if constexpr (DTYPE == CLA_F32) words[i] = float_to_bits(x[i]);
      else if constexpr (DTYPE == CLA_BF16) words[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
      else words[i] = to_f16(x[2 * i]) | (uint32_t)to_f16(x[2 * i + 1]) << 16;
    }
  }
};

// Numbers `at` and on, of any dtype, of which the first `there` exist and the others are zeros.
template <int N, bool WHOLE> CLA_DEVICE void load_numbers(float (&x)[N], const cla_numbers &from, int64_t at, int there) {
  if (WHOLE) {
    CLA_UNROLL
    for (int i = 0; i < N; i += 4) {
      float four[4];
      load_four(four, from.data, from.dtype, at + i);
      CLA_UNROLL
      for (int j = 0; j < 4; j++) x[i + j] = four[j];
    }
  } else {
    CLA_UNROLL
    for (int i = 0; i < N; i++) x[i] = i < there ? load_element(from.data, from.dtype, at + i) : 0.f;
  }
}

// On the side of the launch: whether they can be loaded four at a time.
inline bool in_fours(const cla_numbers &x) { return (uintptr_t)x.data % (x.dtype == CLA_F32 ? 16 : 8) == 0; }

// On the side of the launch: calls `f` with the dtype as a type.
template <class F> int32_t by_dtype(int32_t dtype, F f) {
  switch (dtype) {
    case CLA_F32: return f(std::integral_constant<int, CLA_F32>());
    case CLA_F16: return f(std::integral_constant<int, CLA_F16>());
    default: return f(std::integral_constant<int, CLA_BF16>());
  }
}

CLA_DEVICE float sigmoid(float x) { return reciprocal_fast(1.f + exp_fast(-x)); }
// The derivative of x sigmoid(x).
CLA_DEVICE float silu_slope(float x) {
  const float s = sigmoid(x);
  return s * (1.f + x * (1.f - s));
}

// A gate's function (enum cla_gate_kind) and its derivative.
CLA_DEVICE float gate_value(int kind, float x) {
  if (kind == CLA_UNGATED) return 1.f;
  return kind == CLA_GATE_SILU ? x * sigmoid(x) : sigmoid(x);
}
CLA_DEVICE float gate_slope(int kind, float x) {
  if (kind == CLA_GATE_SILU) return silu_slope(x);
  const float s = sigmoid(x);
  return s * (1.f - s);
}

// x / y for 0 <= x and 0 < y, and x % y in `rest`; in 32 bits if these are enough, which take a fifth of the time.
CLA_DEVICE int64_t divided(int64_t x, int64_t y, int64_t &rest) {
  if ((x | y) <= INT32_MAX) {
    const uint32_t quotient = (uint32_t)x / (uint32_t)y;
    rest = (uint32_t)x - quotient * (uint32_t)y;
    return quotient;
  }
  rest = x % y;
  return x / y;
}

// Where a row of B * tokens * heads begins in each tensor.
struct RowPlace {
  int64_t batch, token;
  int head;

  CLA_DEVICE RowPlace(int64_t row, int64_t rows, int64_t tokens, int64_t heads) : batch(0), token(row), head(0) {
    if (heads > 1) {
      int64_t rest;
      token = divided(row, heads, rest);
      head = (int)rest;
    }
    if (tokens * heads < rows) batch = divided(token, tokens, token);
  }
  CLA_DEVICE Rows of(const cla_tensor &x) const { return Rows(x, batch, head); }
};

}  // namespace cla
