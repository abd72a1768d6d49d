//! The C interface of the delta families' kernels, `cuda/delta.h`, which says what everything here means.

use std::ffi::c_void;

use crate::cuda::ffi::{Gate, States, Tensor};

/// Tokens in a segment.
pub(super) const SEGMENT: usize = 64;
/// Columns of a state that a block of threads has, token by token.
pub(super) const COLUMNS: usize = 32;

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct SegmentStates {
    pub data: *mut f32,
    pub cu_segments: *const u32,
    pub each: i64,
    pub all: i64,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Spans {
    pub count: i32,
    pub length: i64,
    pub changes: *mut f32,
    pub starts: *mut f32,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Problem {
    pub q: Tensor,
    pub k: Tensor,
    pub gate: Tensor,
    pub a: Tensor,
    pub b: Tensor,
    pub beta: Tensor,
    pub scale: f32,
    pub k_dim: i32,
    pub v_dim: i32,
    pub heads: i32,
    pub gate_kind: Gate,
    pub low_rank: i32,
    pub cu_seqlens: *const u32,
    pub sequences: i32,
    pub tokens: i64,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Sweep {
    pub of: Problem,
    pub value: Tensor,
    pub inner: Tensor,
    pub out: Tensor,
    pub first: States,
    pub last: States,
    pub anchors: SegmentStates,
    pub reverse: i32,
    pub columns: i32,
    pub shared_limit: i64,
    pub prepared: *mut u8,
    pub spans: Spans,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Gradient {
    pub of: Problem,
    pub v: Tensor,
    pub grad_out: Tensor,
    pub written: Tensor,
    pub of_written: Tensor,
    pub starts: SegmentStates,
    pub ends: SegmentStates,
    pub state_rows: i32,
    pub state_columns: i32,
    pub dq: Tensor,
    pub dk: Tensor,
    pub da: Tensor,
    pub db: Tensor,
    pub dg: Tensor,
    pub dbeta: Tensor,
    pub shared_limit: i64,
}

unsafe extern "C" {
    pub(super) fn cla_delta_recurrent(sweep: *const Sweep, stream: *mut c_void) -> i32;
    pub(super) fn cla_delta_prepare(sweep: *const Sweep, stream: *mut c_void) -> i32;
    pub(super) fn cla_delta_chunked(sweep: *const Sweep, stream: *mut c_void) -> i32;
    pub(super) fn cla_delta_changes(sweep: *const Sweep, stream: *mut c_void) -> i32;
    pub(super) fn cla_delta_starts(sweep: *const Sweep, stream: *mut c_void) -> i32;
    pub(super) fn cla_delta_prepared_bytes(sweep: *const Sweep) -> i64;
    pub(super) fn cla_delta_shared_memory(sweep: *const Sweep) -> i64;
    pub(super) fn cla_delta_gradients(call: *const Gradient, stream: *mut c_void) -> i32;
    pub(super) fn cla_delta_gradient_part(call: *const Gradient, rows: *mut i32, columns: *mut i32);
}
