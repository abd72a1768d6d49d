// What Rust and the kernels say to each other. `src/cuda/ffi.rs` has the same structs.
//
// Every kernel is a part of a *sweep* over the tokens of a sequence and head, forwards or backwards, with a state X of
// rows x cols in f32:
//
//     X = decay X + write_t value_t^T        (no write at all if `writes` is 0)
//     out_t = out_scale X^T read_t           (without token t's own write, if the sweep is exclusive)
//
// An exclusive sweep ends without its last step's own write, too: that is what it leaves in `last`.
//
// The forward pass of an additive operator is one sweep; its gradients are three. A factor on the writes is not applied
// to them: X is the state divided by it, see `first_scale` and `last_scale`.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum cla_dtype { CLA_F32 = 0, CLA_F16 = 1, CLA_BF16 = 2 };

// What a decay scales: nothing, the whole state, its rows or its columns. All decays are natural logarithms.
enum cla_gate { CLA_NO_GATE = 0, CLA_GATE_SCALAR = 1, CLA_GATE_ROWS = 2, CLA_GATE_COLS = 3 };

// A tensor [B, T, H, D]; strides in elements. Value head h reads its head h / group.
typedef struct {
  void *data;  // null: it is zero everywhere (as an input) or not wanted (as an output)
  int64_t batch, token, head, element;
  int32_t group;
  int32_t dtype;  // enum cla_dtype
} cla_tensor;

// States [N, HV, rows, cols] in f32, each way round: strides in elements.
typedef struct {
  float *data;  // null: zero (initial) or not wanted (final)
  int64_t sequence, head, row, col;
} cla_states;

typedef struct {
  cla_tensor read, write, value, gate, out;  // gate: D is 1, rows or cols; out may be f32 whatever the inputs are
  cla_states first, last;                    // the state before the first step and after the last
  // X begins as first_scale * first, and last_scale * X is what is stored in `last`.
  float out_scale, first_scale, last_scale;
  int32_t rows, cols, heads;  // heads: value heads
  int32_t gate_kind;          // enum cla_gate
  int32_t writes, reverse, inclusive;
  // Sequence n has the tokens cu_seqlens[n] .. cu_seqlens[n + 1] of batch entry 0, or, if cu_seqlens (on the device) is
  // null, all `tokens` tokens of batch entry n.
  const uint32_t *cu_seqlens;
  int32_t sequences;
  int64_t tokens;
  // Chunked sweeps only: steps are cut in segments of `segment` steps (a multiple of CLA_CHUNK), solved in parallel;
  // 0: one segment a sequence. `segments` is how many the longest sequence has. `starts` [N, segments, HV, rows, cols]
  // has X at the start of each segment, `totals` [N, segments, HV, D of gate] the product of its decays.
  int64_t segment;
  int32_t segments;
  float *starts, *totals;
  // Recurrent sweeps only: if not null, the faded state at the last token of each segment of `segment` tokens, counted from
  // the first token whichever way the sweep goes, before that token's write and times last_scale. As `starts`, but for the
  // rows that a state has there: `ends` begins with the first of this sweep's.
  float *ends;
  int32_t ends_rows;
  int64_t shared_limit;  // dynamic shared memory that a block may have, in bytes
} cla_sweep;

#define CLA_CHUNK 64

// All return 0 or a cudaError_t; they only queue work on `stream`.

// Token by token. Up to CLA_RECURRENT_ROWS rows and any cols.
#define CLA_RECURRENT_ROWS 256
int32_t cla_sweep_recurrent(const cla_sweep *sweep, void *stream);

// In chunks of CLA_CHUNK steps, on tensor cores. Up to CLA_CHUNKED_ROWS rows and any cols. With segments: needs `starts`, which
// the next two fill.
#define CLA_CHUNKED_ROWS 128
int32_t cla_sweep_chunked(const cla_sweep *sweep, void *stream);
// What each segment adds to a zero state, into `starts`, and its decay, into `totals`.
int32_t cla_segment_states(const cla_sweep *sweep, void *stream);
// Turns what segments add into the states that they start from.
int32_t cla_scan_segments(const cla_sweep *sweep, void *stream);
// The dynamic shared memory, in bytes, of the kernel that cla_sweep_chunked would launch; -1 if none fits `shared_limit`.
int64_t cla_chunked_shared_memory(const cla_sweep *sweep);

// The sums over the middle dimension of [outer, count, inner] in f32, to [outer, inner] in any dtype; both contiguous.
typedef struct {
  const float *data;
  void *out;
  int32_t dtype;  // enum cla_dtype
  int64_t outer, count, inner;
} cla_middle_sums;

int32_t cla_sum_middle(const cla_middle_sums *call, void *stream);

// The gradient of the log decay from dq and dk [B, T, HV, K], f32, contiguous, computed by exclusive sweeps:
//
//     sum_t = sum_{t+1} + q_t dq_t - k_t dk_t        from the last token back
//     sum_T = after + q_T dq_T                       the last token of a sequence, or of a segment if they are `anchored`
//     dg_t = sum_t, or its sum over K
//
// where a decay of -inf sets the sum to 0. dq_out and dk_out are dq and dk with each token's term with itself, own_t k_t and
// own_t q_t with own_t = scale v_t . do_t.
typedef struct {
  cla_tensor q, k, v, grad_out, gate;
  float *dq, *dk;
  cla_tensor dq_out, dk_out;  // no data: they take the place of dq and dk
  // [N, HV, K] or, with `summed`, [N, HV]: sum over V (and K) of the final state without the last token's write times the
  // gradient of the final state; null: 0. With the write, the two k_T dk_T would cancel, and leave rounding where the
  // decay is strong. `anchored`: [N, segments, HV, K] or [N, segments, HV], the same at the end of each segment, so that no
  // sum is longer than that.
  const float *after;
  int32_t anchored;
  float *partial;  // scratch, [2, N, segments, HV, K] or, with `summed`, [2, N, segments, HV]
  float *terms;    // [B, T, HV, K] or, with `summed`, [B, T, HV]; contiguous
  cla_tensor dg;   // no data: it takes the place of the terms
  float scale;
  int32_t k_dim, v_dim, heads, summed;
  const uint32_t *cu_seqlens;
  int32_t sequences;
  int64_t batch, tokens;
  int64_t segment;   // tokens that one thread sums up, > 0
  int32_t segments;  // of the longest sequence
} cla_gate_gradient;

int32_t cla_gate_gradients(const cla_gate_gradient *call, void *stream);

#ifdef __cplusplus
}
#endif
