// Tensors element by element, whatever their dtype, and where the steps of a sweep lie.
#pragma once
#include "platform.cuh"

namespace cla {

CLA_DEVICE float bits_to_float(uint32_t x) {
  union {
    uint32_t u;
    float f;
  } b = {x};
  return b.f;
}
CLA_DEVICE uint32_t float_to_bits(float x) {
  union {
    float f;
    uint32_t u;
  } b = {x};
  return b.u;
}

CLA_DEVICE float load_element(const void *data, int32_t dtype, int64_t at) {
  if (dtype == CLA_F32) return ((const float *)data)[at];
  uint16_t bits = ((const uint16_t *)data)[at];
  return dtype == CLA_BF16 ? from_bf16(bits) : from_f16(bits);
}

CLA_DEVICE void store_element(void *data, int32_t dtype, int64_t at, float x) {
  if (dtype == CLA_F32) {
    ((float *)data)[at] = x;
  } else {
    ((uint16_t *)data)[at] = dtype == CLA_BF16 ? to_bf16(x) : to_f16(x);
  }
}

struct alignas(8) Vec2 {
  uint32_t x, y;
};

// Two neighbours of a dtype of 16 bits.
template <int DTYPE> CLA_DEVICE void unpack_pair(float (&x)[2], uint32_t pair) {
  x[0] = DTYPE == CLA_F16 ? from_f16((uint16_t)pair) : low_bf16(pair);
  x[1] = DTYPE == CLA_F16 ? from_f16((uint16_t)(pair >> 16)) : high_bf16(pair);
}
template <int DTYPE> CLA_DEVICE void unpack_four(float (&x)[4], const Vec2 &four) {
  float low[2], high[2];
  unpack_pair<DTYPE>(low, four.x);
  unpack_pair<DTYPE>(high, four.y);
  x[0] = low[0], x[1] = low[1], x[2] = high[0], x[3] = high[1];
}
template <int DTYPE> CLA_DEVICE uint32_t pack_pair(float low, float high) {
  return DTYPE == CLA_F16 ? pack_f16(low, high) : pack_bf16(low, high);
}

// Four numbers in 16 bytes.
CLA_DEVICE void load4(float (&x)[4], const float *from) {
  const Vec4 v = load16(from);
  x[0] = bits_to_float(v.x), x[1] = bits_to_float(v.y), x[2] = bits_to_float(v.z), x[3] = bits_to_float(v.w);
}
CLA_DEVICE void store4(float *to, const float (&x)[4]) {
  store16(to, {float_to_bits(x[0]), float_to_bits(x[1]), float_to_bits(x[2]), float_to_bits(x[3])});
}

// Four neighbours of any dtype, moved at once.
struct alignas(8) Halves {
  uint16_t x[4];
};
CLA_DEVICE void load_four(float (&x)[4], const void *data, int32_t dtype, int64_t at) {
  if (dtype == CLA_F32) return load4(x, (const float *)data + at);
  const Halves v = *(const Halves *)((const uint16_t *)data + at);
  CLA_UNROLL
  for (int i = 0; i < 4; i++) x[i] = dtype == CLA_BF16 ? from_bf16(v.x[i]) : from_f16(v.x[i]);
}
CLA_DEVICE void store_four(void *data, int32_t dtype, int64_t at, const float (&x)[4]) {
  if (dtype == CLA_F32) return store4((float *)data + at, x);
  Halves v;
  CLA_UNROLL
  for (int i = 0; i < 4; i++) v.x[i] = dtype == CLA_BF16 ? to_bf16(x[i]) : to_f16(x[i]);
  *(Halves *)((uint16_t *)data + at) = v;
}

// Over the lanes of a warp.
template <class T> CLA_DEVICE T sum_of_lanes(T x) {
  CLA_UNROLL
  for (int d = 16; d > 0; d /= 2) x += shuffle_xor(x, d);
  return x;
}

// Which of `count` runs has `at`, where run n goes from ends[n] up to ends[n + 1].
CLA_DEVICE int32_t run_of(const uint32_t *ends, int32_t count, int64_t at) {
  int32_t below = 0, to = count;  // ends[below] <= at < ends[to]
  while (to - below > 1) {
    const int32_t middle = below + (to - below) / 2;
    if (ends[middle] <= at) below = middle;
    else to = middle;
  }
  return below;
}

// On the side of the launch: whether all rows of a tensor, of `width`, can be moved `each` elements at a time.
inline bool in_groups(const cla_tensor &x, int width, int each) {
  auto whole = [&](int64_t n) { return n % each == 0; };
  const uintptr_t bytes = each * (x.dtype == CLA_F32 ? 4 : 2);
  return x.data && x.element == 1 && whole(width) && whole(x.batch) && whole(x.token) && whole(x.head) &&
         (uintptr_t)x.data % bytes == 0;
}
inline bool in_pieces(const cla_tensor &x, int width) { return in_groups(x, width, x.dtype == CLA_F32 ? 4 : 8); }

// The rows of a tensor for one batch entry and value head.
struct Rows {
  unsigned char *data;
  int64_t token, element;
  int32_t dtype;

  CLA_DEVICE Rows(const cla_tensor &x, int64_t batch, int head)
      : data((unsigned char *)x.data), token(x.token), element(x.element), dtype(x.dtype) {
    if (data) data += (batch * x.batch + (x.group == 1 ? head : head / x.group) * x.head) * size();
  }
  CLA_DEVICE int size() const { return dtype == CLA_F32 ? 4 : 2; }
  CLA_DEVICE float load(int64_t t, int d) const {
    return data ? load_element(data, dtype, t * token + d * element) : 0.f;
  }
  CLA_DEVICE void store(int64_t t, int d, float x) const { store_element(data, dtype, t * token + d * element, x); }
  CLA_DEVICE unsigned char *row(int64_t t) const { return data + t * token * size(); }
  CLA_DEVICE Rows from_column(int column) const {
    Rows rows = *this;
    if (data) rows.data += column * element * size();
    return rows;
  }
  // Whether rows of `width` can be moved 16 bytes at a time.
  CLA_DEVICE bool in_pieces(int width) const {
    const int rest = dtype == CLA_F32 ? 3 : 7;  // a mask: a GPU divides by thirty instructions
    return data && element == 1 && ((width | token) & rest) == 0 && ((uintptr_t)data & 15) == 0;
  }
};

// Eight neighbours, as they lie in 16 bytes, or, in f32, 32.
CLA_DEVICE void unpack_eight(float (&x)[8], int32_t dtype, const Vec4 &low, const Vec4 &high) {
  if (dtype == CLA_F32) {
    const uint32_t bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    CLA_UNROLL
    for (int k = 0; k < 8; k++) x[k] = bits_to_float(bits[k]);
  } else {
    const uint32_t bits[4] = {low.x, low.y, low.z, low.w};
    const bool bf16 = dtype == CLA_BF16;
    CLA_UNROLL
    for (int k = 0; k < 4; k++) {
      x[2 * k] = bf16 ? low_bf16(bits[k]) : from_f16((uint16_t)bits[k]);
      x[2 * k + 1] = bf16 ? high_bf16(bits[k]) : from_f16((uint16_t)(bits[k] >> 16));
    }
  }
}

// The tokens of one sequence in the order in which a sweep takes them.
struct Steps {
  int64_t batch, start, count;
  bool reverse;

  CLA_DEVICE Steps(const uint32_t *cu_seqlens, int64_t tokens, int64_t sequence, bool reverse) : reverse(reverse) {
    batch = cu_seqlens ? 0 : sequence;
    start = cu_seqlens ? cu_seqlens[sequence] : 0;
    count = cu_seqlens ? cu_seqlens[sequence + 1] - start : tokens;
  }
  CLA_DEVICE int64_t token(int64_t step) const { return reverse ? start + count - 1 - step : start + step; }
  // An exclusive sweep has no use for what its last step writes.
  CLA_DEVICE bool writes(const cla_sweep &s, int64_t step) const { return s.inclusive || step + 1 < count; }
  // The log decay that is due before a step. Between two tokens it is that of the later one, whichever comes first.
  CLA_DEVICE float decay_before(const Rows &gate, int64_t step, int d) const {
    if (reverse) return step == 0 ? 0.f : gate.load(token(step - 1), d);
    return gate.load(token(step), d);
  }
  // What is due after the last step.
  CLA_DEVICE float decay_after(const Rows &gate, int d) const {
    return reverse && count > 0 ? gate.load(token(count - 1), d) : 0.f;
  }
};

// A segment of the steps and the value head that a block works on, from the index of the block.
struct Place {
  int64_t sequence, segment;
  int head;

  CLA_DEVICE Place(int64_t index, int32_t heads, int32_t segments) {
    head = (int)(index % heads);
    segment = index / heads % segments;
    sequence = index / heads / segments;
  }
  CLA_DEVICE int64_t index(int32_t heads, int32_t segments) const { return (sequence * segments + segment) * heads + head; }
};

}  // namespace cla
