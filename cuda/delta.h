// What Rust and the kernels of the delta families say to each other. `src/cuda/delta/ffi.rs` has the same structs.
//
// In these a token writes what depends on what the state has for its key. With reads from the state before it fades, a token
// of a *delta sweep*, forwards or backwards, is
//
//     m     = ev value + ew X^T r1          what is written in its place
//     c     = f m
//     out   = X^T r2 + hv value + hc c
//     X     = D X + x1 value^T + x2 c^T
//
// where X is K x V, in f32, D = exp(gate) scales its rows, and s is the scale:
//
//     family, direction   value  r1   m     c        x2   x1     r2     out
//     delta, forward      v      D k  v - w beta m   k    -      s D q  o
//     delta, reverse      do     k    du    -beta m  D k  s D q  -      dv = -c
//     low rank, forward   v      a    w     m        b    k      s D q  o
//     low rank, reverse   do     b    dw    m        a    s D q  k      dv
//
// A reverse sweep begins with the gradient of the final state and ends with that of the initial one. Two sweeps, one in
// either direction, leave all that cla_delta_gradients needs.
#pragma once
#include "cla.h"

#ifdef __cplusplus
extern "C" {
#endif

// Tokens in a segment: the gradients of keys begin anew in each, from states that the sweeps leave. As sums of what was
// written, which are known by then, the states would not correct their roundings as the delta rule does.
#define CLA_DELTA_SEGMENT 64

// A state for each segment of each sequence and value head, [segments, HV, K, V] in f32, contiguous.
typedef struct {
  float *data;  // null: not wanted
  // Sequence n has the segments cu_segments[n] .. cu_segments[n + 1], or, if cu_segments (on the device) is null, n * each
  // and up.
  const uint32_t *cu_segments;
  int64_t each, all;
} cla_delta_states;

// A sweep over few states has few blocks. Divided in time, each sequence is `count` spans of `length` segments (the last ones
// fewer, or none), and a block sweeps one. Of the state X before it a span makes A X + B, whatever X is: A and B are found first,
// by sweeps that begin with the identity, without values, and with zeros; then the states before all spans.
typedef struct {
  int32_t count;  // 1: not divided
  int64_t length;
  float *changes;  // [sequences, count - 1, heads, V + K, K], contiguous: B and A, transposed
  float *starts;   // [sequences, count, heads, V, K], contiguous: states, transposed
} cla_delta_spans;

// What a problem of these families is, whichever kernels work on it.
typedef struct {
  cla_tensor q, k, gate, a, b;   // a and b are null but in the low-rank family
  cla_tensor beta;               // D is 1; null in the low-rank family
  float scale;
  int32_t k_dim, v_dim, heads;   // heads: value heads
  int32_t gate_kind;             // enum cla_gate; never columns
  int32_t low_rank;
  // As in cla_sweep.
  const uint32_t *cu_seqlens;
  int32_t sequences;
  int64_t tokens;
} cla_delta_problem;

typedef struct {
  cla_delta_problem of;
  cla_tensor value;
  cla_tensor inner, out;  // m and out
  cla_states first, last;
  // Forwards the state before each segment. In reverse the gradient of the state after each, as far as it comes from behind
  // the decay of the token that follows, or, after a last token, is given.
  cla_delta_states anchors;
  int32_t reverse;
  // Chunked sweeps only: cla_delta_prepared_bytes for each segment and head, which are all that `anchors` counts, whether it
  // has data or not. Blocks have 64 or 128 columns of the state, and at most so many bytes of dynamic shared memory.
  int32_t columns;
  int64_t shared_limit;
  unsigned char *prepared;
  cla_delta_spans spans;
} cla_delta_sweep;

// Token by token, K up to 256 and any V.
int32_t cla_delta_recurrent(const cla_delta_sweep *sweep, void *stream);

// A segment at a time, in matrix form, on tensor cores: bf16 or f16, K up to 128, or in bf16 256 with a decay by token or none.
// What does not depend on the state is prepared for all segments first, by cla_delta_prepare.
int64_t cla_delta_prepared_bytes(const cla_delta_sweep *sweep);
int32_t cla_delta_prepare(const cla_delta_sweep *sweep, void *stream);
int32_t cla_delta_chunked(const cla_delta_sweep *sweep, void *stream);
// Between the two where time is divided: what spans make of states, and the states that they start from.
int32_t cla_delta_changes(const cla_delta_sweep *sweep, void *stream);
int32_t cla_delta_starts(const cla_delta_sweep *sweep, void *stream);
// The shared memory, in bytes, that these need for a block of so many columns: more than the limit if nothing fits it; -1 if they
// do not take the sweep.
int64_t cla_delta_shared_memory(const cla_delta_sweep *sweep);

// The gradients of all that has a number for each channel of a key, of gates and of beta. With G the gradient of the state
// after a token, S~ the state that faded, u what delta writes, and sums over V,
//
//     delta       dq = s S do    dk = G u + S~ dw      dbeta = m . du       u = beta m, dw = -beta du
//     low rank    dq = s S do    dk = G v              db = G w             da_t = S_{t-1} dw_t
//     both        dg_t = sum over tokens from t to the end of the segment of (reads . their gradients) - (writes . theirs)
//                        + sum_v S (what comes from behind the segment)
//
// where a token's read of its own write, which is in both and cancels, takes no part in dg: under strong decay the difference
// would be rounding.
typedef struct {
  cla_delta_problem of;
  cla_tensor v, grad_out;
  cla_tensor written, of_written;  // m of the two sweeps, f32
  cla_delta_states starts, ends;   // their anchors
  // Rows and columns that these have in memory. A call may have some of both, from where its tensors and states begin, as if
  // they were all: channels of keys do not see one another, and all gradients here are sums over V, of which it leaves its part.
  int32_t state_rows, state_columns;
  // [B, T, HV, K], and dbeta [B, T, HV, 1]; null: not wanted. dg is [B, T, HV, K] or, for a decay by token, f32
  // [B, T, HV, slices of CLA_DELTA_COLUMNS channels], to be summed up.
  cla_tensor dq, dk, da, db, dg, dbeta;
  int64_t shared_limit;  // dynamic shared memory that a block may have, in bytes; 0: token by token
} cla_delta_gradient;

#define CLA_DELTA_COLUMNS 32

// V up to CLA_DELTA_GRADIENT_VALUES and any K.
#define CLA_DELTA_GRADIENT_VALUES 256
int32_t cla_delta_gradients(const cla_delta_gradient *call, void *stream);
// Rows and columns that a call had best have at a time: as many as the kernels in matrix form take, or others if these take none.
void cla_delta_gradient_part(const cla_delta_gradient *call, int32_t *rows, int32_t *columns);

#ifdef __cplusplus
}
#endif
