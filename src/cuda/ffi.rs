//! The kernels' C interface, `cuda/cla.h`, which says what everything here means. All unsafe calls go through this file's
//! names.

use std::ffi::c_void;

/// Steps in a chunk.
pub(super) const CHUNK: usize = 64;
/// The most rows of a state in a sweep token by token and in one in chunks.
pub(super) const RECURRENT_ROWS: usize = 256;
pub(super) const CHUNKED_ROWS: usize = 128;

#[derive(Debug, Clone, Copy)]
#[repr(i32)]
pub(super) enum Dtype {
    F32 = 0,
    F16 = 1,
    BF16 = 2,
}

/// What a decay scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Gate {
    None = 0,
    Scalar = 1,
    Rows = 2,
    Cols = 3,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Tensor {
    pub data: *mut c_void,
    pub batch: i64,
    pub token: i64,
    pub head: i64,
    pub element: i64,
    pub group: i32,
    pub dtype: Dtype,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct States {
    pub data: *mut f32,
    pub sequence: i64,
    pub head: i64,
    pub row: i64,
    pub col: i64,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Sweep {
    pub read: Tensor,
    pub write: Tensor,
    pub value: Tensor,
    pub gate: Tensor,
    pub out: Tensor,
    pub first: States,
    pub last: States,
    pub out_scale: f32,
    pub first_scale: f32,
    pub last_scale: f32,
    pub rows: i32,
    pub cols: i32,
    pub heads: i32,
    pub gate_kind: Gate,
    pub writes: i32,
    pub reverse: i32,
    pub inclusive: i32,
    pub cu_seqlens: *const u32,
    pub sequences: i32,
    pub tokens: i64,
    pub segment: i64,
    pub segments: i32,
    pub starts: *mut f32,
    pub totals: *mut f32,
    pub ends: *mut f32,
    pub ends_rows: i32,
    pub shared_limit: i64,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct MiddleSums {
    pub data: *const f32,
    pub out: *mut c_void,
    pub dtype: Dtype,
    pub outer: i64,
    pub count: i64,
    pub inner: i64,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct GateGradient {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub grad_out: Tensor,
    pub gate: Tensor,
    pub dq: *mut f32,
    pub dk: *mut f32,
    pub dq_out: Tensor,
    pub dk_out: Tensor,
    pub after: *const f32,
    pub anchored: i32,
    pub partial: *mut f32,
    pub terms: *mut f32,
    pub dg: Tensor,
    pub scale: f32,
    pub k_dim: i32,
    pub v_dim: i32,
    pub heads: i32,
    pub summed: i32,
    pub cu_seqlens: *const u32,
    pub sequences: i32,
    pub batch: i64,
    pub tokens: i64,
    pub segment: i64,
    pub segments: i32,
}

unsafe extern "C" {
    pub(super) fn cla_sweep_recurrent(sweep: *const Sweep, stream: *mut c_void) -> i32;
    pub(super) fn cla_sweep_chunked(sweep: *const Sweep, stream: *mut c_void) -> i32;
    pub(super) fn cla_segment_states(sweep: *const Sweep, stream: *mut c_void) -> i32;
    pub(super) fn cla_scan_segments(sweep: *const Sweep, stream: *mut c_void) -> i32;
    pub(super) fn cla_chunked_shared_memory(sweep: *const Sweep) -> i64;
    pub(super) fn cla_sum_middle(call: *const MiddleSums, stream: *mut c_void) -> i32;
    pub(super) fn cla_gate_gradients(call: *const GateGradient, stream: *mut c_void) -> i32;
}
