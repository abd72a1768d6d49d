// What Rust and the kernels for the parts of a layer around its operator say to each other. `src/cuda/layers/ffi.rs` has
// the same structs. All of these kernels are bound by memory: they read each number once and write each once.
#pragma once
#include "cla.h"

#ifdef __cplusplus
extern "C" {
#endif

// Numbers that lie one after the other; null: as each struct says.
typedef struct {
  const void *data;
  int32_t dtype;  // enum cla_dtype
} cla_numbers;

// The depthwise causal convolution with W taps, of rows of C channels:
//
//     z_t = bias + sum_i weight_i x_{t - W + 1 + i}        y_t = z_t, or z_t sigmoid(z_t) with `silu`
//
// x, past, out, grad_out, dx and dpast are of one dtype; the number of heads is not looked at, nor their stride.
typedef struct {
  cla_tensor x, out;         // [B, T, C]
  cla_tensor past;           // [N, W - 1, C]: what was before each sequence; null: zeros
  // [N, W - 1, C]: what cla_short_conv_cache leaves for the next call, and cla_short_conv_forward of sequences with tokens; null:
  // not wanted
  cla_tensor last;
  cla_tensor grad_out, dx;   // [B, T, C]
  cla_tensor dpast;          // [N, W - 1, C]; null: not wanted
  cla_numbers weight, bias;  // [C, W] and [C]; no bias: zeros
  // [B, groups of CLA_CONV_PIECES pieces, W + 1, C]: what each adds to the gradients of the weight, tap by tap, and of the
  // bias; null: not wanted.
  float *partial;
  int32_t channels, width, silu;  // W up to CLA_MOST_TAPS
  // As in cla_sweep; N is B if cu_seqlens is null.
  const uint32_t *cu_seqlens;
  int32_t sequences;
  int64_t batch, tokens;
  int64_t piece;  // tokens that a warp goes over, > 0
} cla_short_conv;

#define CLA_MOST_TAPS 8
// Threads beside one another, each with its channels: 16 bytes of them, in the backward pass CLA_CONV_BACKWARD_CHANNELS.
#define CLA_CONV_LANES 32
#define CLA_CONV_BACKWARD_CHANNELS 4
// Neighbouring pieces of the tokens that a block has, one a warp.
#define CLA_CONV_PIECES 4

int32_t cla_short_conv_forward(const cla_short_conv *call, void *stream);
// dx and dpast, and `partial` for cla_column_sums.
int32_t cla_short_conv_backward(const cla_short_conv *call, void *stream);
int32_t cla_short_conv_cache(const cla_short_conv *call, void *stream);

enum cla_gate_kind { CLA_UNGATED = 0, CLA_GATE_SILU = 1, CLA_GATE_SIGMOID = 2 };

// Norms of rows of n numbers, with a weight or without, and a gate behind or none:
//
//     y = x / sqrt(factor sum(x^2) + eps) weight f(gate)        factor: 1 / n for RMS norm, 1 for l2norm
//
// and `centred`, without a gate, layer norm, which takes the mean from x before:
//
//     y = (x - mean) / sqrt(factor sum((x - mean)^2) + eps) weight + bias        factor: 1 / n
//
// All but weight and bias are of one dtype. Forwards and without a gate x may be a sum that is still to be made: `added` is then added
// to it, rounded, and the sum goes to `sum` as well.
typedef struct {
  cla_tensor x, gate, out;         // [B, T, H, n]
  cla_tensor added, sum;           // [B, T, H, n]; null: nothing is added
  cla_tensor grad_out, dx, dgate;  // [B, T, H, n]; dgate is written if there is a gate
  cla_numbers weight;              // [n]; null: 1
  cla_numbers bias;                // [n]; null: 0
  // [blocks, n], and `centred` [blocks, 2, n]: what each block adds to the gradients of weight and bias; null: not wanted
  float *partial;
  int32_t centred;
  float factor, eps;
  int32_t gate_kind;  // enum cla_gate_kind
  int32_t width;      // n, up to what CLA_NORM_HELD vectors of 16 bytes in each of CLA_NORM_THREADS threads hold
  int32_t team_bits;  // 2^team_bits threads share a row
  int32_t blocks;     // of the backward pass
  int64_t rows, tokens, heads;
} cla_norm;

#define CLA_NORM_THREADS 256
#define CLA_NORM_HELD 4

int32_t cla_norm_forward(const cla_norm *call, void *stream);
// dx, dgate, and `partial` for cla_column_sums.
int32_t cla_norm_backward(const cla_norm *call, void *stream);

// One number with its gate, in one dtype:
//
//     y = x f(gate)
typedef struct {
  cla_tensor x, gate, out;         // [B, T, H, width]
  cla_tensor grad_out, dx, dgate;  // [B, T, H, width]
  int32_t gate_kind;               // enum cla_gate_kind, not CLA_UNGATED
  int32_t width;                   // up to CLA_POINTWISE_COLUMNS
  int32_t team_bits;               // 2^team_bits threads are beside one another in a row, up to a warp
  int64_t rows, tokens, heads;
} cla_gated;

#define CLA_POINTWISE_THREADS 256
// A warp has at least 128 columns, and a launch 65535 times these.
#define CLA_POINTWISE_COLUMNS (65535 * 128)

int32_t cla_gated_forward(const cla_gated *call, void *stream);
// dx and dgate.
int32_t cla_gated_backward(const cla_gated *call, void *stream);

enum cla_function { CLA_SIGMOID = 0, CLA_LOG_SIGMOID = 1, CLA_SOFTPLUS = 2 };

// A function of one number, in f32 whatever x is:
//
//     y = factor rate f(x + bias)        rate: -exp(log_rate), or 1 without a log_rate
typedef struct {
  cla_tensor x, dx;          // [B, T, H, width], of one dtype
  cla_tensor out, grad_out;  // [B, T, H, width], f32
  cla_numbers bias;          // [width]; null: 0
  cla_numbers log_rate;      // [width / per_rate], each for per_rate neighbours
  float *partial;            // [blocks, 2, width]: what each block adds to the gradients of bias and log_rate; null: not wanted
  float factor;
  int32_t function;          // enum cla_function
  int32_t width, team_bits;  // as in cla_gated
  int32_t per_rate;
  int64_t blocks;  // beside one another in the rows, each with several
  int64_t rows, tokens, heads;
} cla_pointwise;

// Columns that a thread has of a function of one number.
#define CLA_COLUMNS_OF_THREAD 4

int32_t cla_pointwise_forward(const cla_pointwise *call, void *stream);
// Two of them in one launch, of numbers of one dtype.
int32_t cla_pointwise_forward_pair(const cla_pointwise *first, const cla_pointwise *second, void *stream);
// dx, and `partial` for cla_column_sums.
int32_t cla_pointwise_backward(const cla_pointwise *call, void *stream);

// Rotates the first two `half` channels of each head against each other, and copies the others:
//
//     [x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin]        angle of channel i: position frequencies_i
//
// x and out are of one dtype, elements of a head neighbours in both.
typedef struct {
  cla_tensor x, out;           // [B, T, H, width]
  const float *frequencies;    // [half]
  const uint32_t *positions;   // [B, T]; null: first + t in each batch entry
  int64_t first;
  float factor;                // on cos and sin
  int32_t half, width;
  int32_t backwards;           // by the negative angle
  int64_t batch, tokens, heads;
} cla_rotary;

#define CLA_ROTARY_THREADS 128
// Heads that a thread rotates by one angle.
#define CLA_ROTARY_HEADS 4

int32_t cla_rotate(const cla_rotary *call, void *stream);

// RWKV-7 around its operator, of tokens with C channels, a multiple of 4. Tensors are contiguous; those with tokens are of one dtype.

// What each token has of the one before it, mixed n times:
//
//     out_i,t = x_t + mix_i (x_{t-1} - x_t)
typedef struct {
  cla_numbers x;     // [B, T, C]
  cla_numbers past;  // [B, 1, C]: what was before the first; null: zeros
  cla_numbers mix;   // [n, C]
  void *out;         // [n, B, T, C]
  void *last;        // [B, 1, C]: the last x
  int64_t batch, tokens;
  int32_t channels, mixes;
} cla_token_mix;

int32_t cla_mix_tokens(const cla_token_mix *call, void *stream);

// Keys in heads of `width` channels, 4 times a power of two up to 128:
//
//     rate = sigmoid(a + a_bias)        kappa = l2norm(k k_k)
//     key = k (1 + (rate - 1) k_a)      remove = -kappa      replace = kappa rate
typedef struct {
  cla_numbers k, a;              // [rows, C]
  cla_numbers k_k, k_a, a_bias;  // [C]; no a_bias: zeros
  void *key, *remove, *replace;  // [rows, C]
  int64_t rows;
  int32_t channels, width;
  float eps;
} cla_rwkv7_keys;

int32_t cla_make_rwkv7_keys(const cla_rwkv7_keys *call, void *stream);

// The end of a layer, in such heads:
//
//     out = (layer_norm(x) weight + bias + (sum over the head of r r_k k) v) gate
typedef struct {
  cla_numbers x, r, k, v, gate;  // [rows, C]
  cla_numbers r_k, weight, bias;  // [C]
  void *out;                      // [rows, C]
  int64_t rows;
  int32_t channels, width;
  float eps;
} cla_rwkv7_output;

int32_t cla_finish_rwkv7(const cla_rwkv7_output *call, void *stream);

#define CLA_RWKV7_THREADS 256

// Adds up `rows` rows of f32 that are `stride` apart. The sum of column j goes to element
// j / inner * outer_stride + j % inner * inner_stride of `out`.
typedef struct {
  const float *data;
  int64_t rows, stride, columns;
  void *out;
  int32_t dtype;
  int64_t inner, outer_stride, inner_stride;
} cla_sums;

int32_t cla_column_sums(const cla_sums *call, void *stream);

// Causal softmax attention of one sequence, bf16. Its queries are those of the last T of S tokens, and query t sees the keys
// up to S - T + t. Head h reads key-value head h / (heads / kv_heads):
//
//     out_t = sum_s softmax_s(scale q_t . k_s) v_s
//
// with scores and sums in f32. Batches have one entry here, and `token` is the stride along T or S.
typedef struct {
  cla_tensor q, k, v, out;  // [T, H, K], [S, HKV, K], [S, HKV, V], [T, H, V]; K and V up to 256
  float scale;
  int32_t k_dim, v_dim, heads, kv_heads;
  int64_t tokens, keys;
  // Parts of the keys, each with blocks of its own. More than one leave [splits, T, H, V + 2] in `partial`, which is contiguous:
  // sums with weights relative to the part's largest score, that score times scale and log2(e), and the sum of the weights.
  int32_t splits;
  float *partial;
  int64_t shared_limit;  // dynamic shared memory that a block may have, in bytes
} cla_attention;

int32_t cla_softmax_attention(const cla_attention *call, void *stream);
// Queries times heads of a block, all of one key-value head; 0 if no kernel takes the call.
int32_t cla_softmax_attention_rows(const cla_attention *call);
// Keys that a block has in shared memory at a time.
#define CLA_ATTENTION_KEYS 64

#ifdef __cplusplus
}
#endif
