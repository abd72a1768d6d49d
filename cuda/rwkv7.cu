// What RWKV-7 does around its operator, forwards: a thread has four neighbouring channels of a token. Everything lies contiguously.
#include "vectors.cuh"

namespace cla {

constexpr int RWKV7_THREADS = CLA_RWKV7_THREADS;

template <bool WHOLE> CLA_DEVICE void load4_of(float (&x)[4], const cla_numbers &from, int64_t at) {
  load_numbers<4, WHOLE>(x, from, at, 4);
}

template <bool WHOLE> CLA_KERNEL(RWKV7_THREADS, 4) void token_mix_kernel(const CLA_CONSTANT cla_token_mix c) {
  const int64_t at = 4 * (block_x() * (int64_t)RWKV7_THREADS + thread_index()), all = c.batch * c.tokens * c.channels;
  if (at >= all) return;
  int64_t channel, token;
  const int64_t row = divided(at, c.channels, channel), batch = divided(row, c.tokens, token);
  float x[4], before[4] = {0.f, 0.f, 0.f, 0.f};
  load4_of<WHOLE>(x, c.x, at);
  if (token > 0) load4_of<WHOLE>(before, c.x, at - c.channels);
  else if (c.past.data) load4_of<WHOLE>(before, c.past, batch * c.channels + channel);
  for (int i = 0; i < c.mixes; i++) {
    float mix[4], y[4];
    load4_of<WHOLE>(mix, c.mix, (int64_t)i * c.channels + channel);
    CLA_UNROLL
    for (int e = 0; e < 4; e++) y[e] = x[e] + mix[e] * (before[e] - x[e]);
    store_four(c.out, c.x.dtype, i * all + at, y);
  }
  if (token + 1 == c.tokens) store_four(c.last, c.x.dtype, batch * c.channels + channel, x);
}

// Sums over the threads of a head, the same in each. All of a warp come here.
CLA_DEVICE float sum_of_head(float x, int width) {
  for (int lanes = width / 8; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
  return x;
}

template <bool WHOLE> CLA_KERNEL(RWKV7_THREADS, 4) void rwkv7_keys_kernel(const CLA_CONSTANT cla_rwkv7_keys c) {
  const int64_t at = 4 * (block_x() * (int64_t)RWKV7_THREADS + thread_index());
  const bool there = at < c.rows * c.channels;
  int64_t channel;
  divided(there ? at : 0, c.channels, channel);
  float k[4] = {0.f}, a[4] = {0.f}, of_kappa[4], of_a[4], bias[4] = {0.f};
  if (there) {
    load4_of<WHOLE>(k, c.k, at);
    load4_of<WHOLE>(a, c.a, at);
  }
  load4_of<WHOLE>(of_kappa, c.k_k, channel);
  load4_of<WHOLE>(of_a, c.k_a, channel);
  if (c.a_bias.data) load4_of<WHOLE>(bias, c.a_bias, channel);
  float squares = 0.f;
  CLA_UNROLL
  for (int e = 0; e < 4; e++) {
    of_kappa[e] *= k[e];
    squares += of_kappa[e] * of_kappa[e];
  }
  const float inverse = 1.f / sqrtf(sum_of_head(squares, c.width) + c.eps);
  if (!there) return;
  float key[4], remove[4], replace[4];
  CLA_UNROLL
  for (int e = 0; e < 4; e++) {
    const float rate = sigmoid(a[e] + bias[e]), kappa = of_kappa[e] * inverse;
    key[e] = k[e] * (1.f + (rate - 1.f) * of_a[e]);
    remove[e] = -kappa;
    replace[e] = kappa * rate;
  }
  store_four(c.key, c.k.dtype, at, key);
  store_four(c.remove, c.k.dtype, at, remove);
  store_four(c.replace, c.k.dtype, at, replace);
}

template <bool WHOLE> CLA_KERNEL(RWKV7_THREADS, 4) void rwkv7_output_kernel(const CLA_CONSTANT cla_rwkv7_output c) {
  const int64_t at = 4 * (block_x() * (int64_t)RWKV7_THREADS + thread_index());
  const bool there = at < c.rows * c.channels;
  int64_t channel;
  divided(there ? at : 0, c.channels, channel);
  float x[4] = {0.f}, r[4] = {0.f}, k[4] = {0.f}, v[4] = {0.f}, gate[4] = {0.f}, r_k[4], weight[4], bias[4];
  if (there) {
    load4_of<WHOLE>(x, c.x, at);
    load4_of<WHOLE>(r, c.r, at);
    load4_of<WHOLE>(k, c.k, at);
    load4_of<WHOLE>(v, c.v, at);
    load4_of<WHOLE>(gate, c.gate, at);
  }
  load4_of<WHOLE>(r_k, c.r_k, channel);
  load4_of<WHOLE>(weight, c.weight, channel);
  load4_of<WHOLE>(bias, c.bias, channel);
  const float mean = sum_of_head(x[0] + x[1] + x[2] + x[3], c.width) / (float)c.width;
  float squares = 0.f, bonus = 0.f;
  CLA_UNROLL
  for (int e = 0; e < 4; e++) {
    x[e] -= mean;
    squares += x[e] * x[e];
    bonus += r[e] * r_k[e] * k[e];
  }
  const float inverse = 1.f / sqrtf(sum_of_head(squares, c.width) / (float)c.width + c.eps);
  bonus = sum_of_head(bonus, c.width);
  if (!there) return;
  float y[4];
  CLA_UNROLL
  for (int e = 0; e < 4; e++) y[e] = (x[e] * inverse * weight[e] + bias[e] + bonus * v[e]) * gate[e];
  store_four(c.out, c.x.dtype, at, y);
}

// On the side of the launch.

template <class Kernel, class Call> int32_t launch_fours(Kernel whole, Kernel other, bool fits, int64_t elements, const Call &c, void *stream) {
  if (elements == 0) return 0;
  const int64_t each = 4 * RWKV7_THREADS;
  return launch(fits ? whole : other, {(elements + each - 1) / each, 1}, RWKV7_THREADS, 0, stream, c);
}

}  // namespace cla

extern "C" int32_t cla_mix_tokens(const cla_token_mix *call, void *stream) {
  using namespace cla;
  const bool fits = in_fours(call->x) && in_fours(call->past) && in_fours(call->mix);
  const int64_t elements = call->batch * call->tokens * call->channels;
  return launch_fours(token_mix_kernel<true>, token_mix_kernel<false>, fits, elements, *call, stream);
}

extern "C" int32_t cla_make_rwkv7_keys(const cla_rwkv7_keys *call, void *stream) {
  using namespace cla;
  const bool fits = in_fours(call->k) && in_fours(call->a) && in_fours(call->k_k) && in_fours(call->k_a) && in_fours(call->a_bias);
  return launch_fours(rwkv7_keys_kernel<true>, rwkv7_keys_kernel<false>, fits, call->rows * call->channels, *call, stream);
}

extern "C" int32_t cla_finish_rwkv7(const cla_rwkv7_output *call, void *stream) {
  using namespace cla;
  const bool fits = in_fours(call->x) && in_fours(call->r) && in_fours(call->k) && in_fours(call->v) && in_fours(call->gate) &&
                    in_fours(call->r_k) && in_fours(call->weight) && in_fours(call->bias);
  return launch_fours(rwkv7_output_kernel<true>, rwkv7_output_kernel<false>, fits, call->rows * call->channels, *call, stream);
}
