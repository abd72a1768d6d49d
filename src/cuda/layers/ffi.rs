//! The C interface of the kernels for parts of a layer, `cuda/layers.h`, which says what everything here means.

use std::ffi::c_void;

use crate::cuda::ffi::{Dtype, Tensor};

/// The most taps of a convolution.
pub(super) const MOST_TAPS: usize = 8;
/// Threads beside one another in a convolution, and the channels that each has in the backward pass.
pub(super) const CONV_LANES: usize = 32;
pub(super) const CONV_BACKWARD_CHANNELS: usize = 4;
/// Pieces that a block has.
pub(super) const CONV_PIECES: usize = 4;
/// Threads in a block of a norm, and the vectors of 16 bytes that each has at most.
pub(super) const NORM_THREADS: usize = 256;
pub(super) const NORM_HELD: usize = 4;
/// Threads in a block of a pointwise function, the columns that each has of one with a single argument, and the most of a row.
pub(super) const POINTWISE_THREADS: usize = 256;
pub(super) const COLUMNS_OF_THREAD: usize = 4;
pub(super) const POINTWISE_COLUMNS: usize = 65535 * 128;
/// Threads in a block of what RWKV-7 does around its operator.
pub(super) const RWKV7_THREADS: usize = 256;

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Numbers {
    pub data: *const c_void,
    pub dtype: Dtype,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct ShortConv {
    pub x: Tensor,
    pub out: Tensor,
    pub past: Tensor,
    pub last: Tensor,
    pub grad_out: Tensor,
    pub dx: Tensor,
    pub dpast: Tensor,
    pub weight: Numbers,
    pub bias: Numbers,
    pub partial: *mut f32,
    pub channels: i32,
    pub width: i32,
    pub silu: i32,
    pub cu_seqlens: *const u32,
    pub sequences: i32,
    pub batch: i64,
    pub tokens: i64,
    pub piece: i64,
}

#[derive(Debug, Clone, Copy)]
#[repr(i32)]
pub(super) enum Function {
    Sigmoid = 0,
    LogSigmoid = 1,
    Softplus = 2,
}

#[derive(Debug, Clone, Copy)]
#[repr(i32)]
pub(super) enum Gate {
    None = 0,
    Silu = 1,
    Sigmoid = 2,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Norm {
    pub x: Tensor,
    pub gate: Tensor,
    pub out: Tensor,
    pub added: Tensor,
    pub sum: Tensor,
    pub grad_out: Tensor,
    pub dx: Tensor,
    pub dgate: Tensor,
    pub weight: Numbers,
    pub bias: Numbers,
    pub partial: *mut f32,
    pub centred: i32,
    pub factor: f32,
    pub eps: f32,
    pub gate_kind: Gate,
    pub width: i32,
    pub team_bits: i32,
    pub blocks: i32,
    pub rows: i64,
    pub tokens: i64,
    pub heads: i64,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Gated {
    pub x: Tensor,
    pub gate: Tensor,
    pub out: Tensor,
    pub grad_out: Tensor,
    pub dx: Tensor,
    pub dgate: Tensor,
    pub gate_kind: Gate,
    pub width: i32,
    pub team_bits: i32,
    pub rows: i64,
    pub tokens: i64,
    pub heads: i64,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Pointwise {
    pub x: Tensor,
    pub dx: Tensor,
    pub out: Tensor,
    pub grad_out: Tensor,
    pub bias: Numbers,
    pub log_rate: Numbers,
    pub partial: *mut f32,
    pub factor: f32,
    pub function: Function,
    pub width: i32,
    pub team_bits: i32,
    pub per_rate: i32,
    pub blocks: i64,
    pub rows: i64,
    pub tokens: i64,
    pub heads: i64,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Rotary {
    pub x: Tensor,
    pub out: Tensor,
    pub frequencies: *const f32,
    pub positions: *const u32,
    pub first: i64,
    pub factor: f32,
    pub half: i32,
    pub width: i32,
    pub backwards: i32,
    pub batch: i64,
    pub tokens: i64,
    pub heads: i64,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Sums {
    pub data: *const f32,
    pub rows: i64,
    pub stride: i64,
    pub columns: i64,
    pub out: *mut c_void,
    pub dtype: Dtype,
    pub inner: i64,
    pub outer_stride: i64,
    pub inner_stride: i64,
}

/// Keys that a block of attention has at a time.
pub(super) const ATTENTION_KEYS: usize = 64;

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Attention {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub out: Tensor,
    pub scale: f32,
    pub k_dim: i32,
    pub v_dim: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub tokens: i64,
    pub keys: i64,
    pub splits: i32,
    pub partial: *mut f32,
    pub shared_limit: i64,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct TokenMix {
    pub x: Numbers,
    pub past: Numbers,
    pub mix: Numbers,
    pub out: *mut c_void,
    pub last: *mut c_void,
    pub batch: i64,
    pub tokens: i64,
    pub channels: i32,
    pub mixes: i32,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Rwkv7Keys {
    pub k: Numbers,
    pub a: Numbers,
    pub k_k: Numbers,
    pub k_a: Numbers,
    pub a_bias: Numbers,
    pub key: *mut c_void,
    pub remove: *mut c_void,
    pub replace: *mut c_void,
    pub rows: i64,
    pub channels: i32,
    pub width: i32,
    pub eps: f32,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Rwkv7Output {
    pub x: Numbers,
    pub r: Numbers,
    pub k: Numbers,
    pub v: Numbers,
    pub gate: Numbers,
    pub r_k: Numbers,
    pub weight: Numbers,
    pub bias: Numbers,
    pub out: *mut c_void,
    pub rows: i64,
    pub channels: i32,
    pub width: i32,
    pub eps: f32,
}

unsafe extern "C" {
    pub(super) fn cla_short_conv_forward(call: *const ShortConv, stream: *mut c_void) -> i32;
    pub(super) fn cla_short_conv_backward(call: *const ShortConv, stream: *mut c_void) -> i32;
    pub(super) fn cla_short_conv_cache(call: *const ShortConv, stream: *mut c_void) -> i32;
    pub(super) fn cla_norm_forward(call: *const Norm, stream: *mut c_void) -> i32;
    pub(super) fn cla_norm_backward(call: *const Norm, stream: *mut c_void) -> i32;
    pub(super) fn cla_softmax_attention(call: *const Attention, stream: *mut c_void) -> i32;
    pub(super) fn cla_softmax_attention_rows(call: *const Attention) -> i32;
    pub(super) fn cla_gated_forward(call: *const Gated, stream: *mut c_void) -> i32;
    pub(super) fn cla_gated_backward(call: *const Gated, stream: *mut c_void) -> i32;
    pub(super) fn cla_pointwise_forward(call: *const Pointwise, stream: *mut c_void) -> i32;
    pub(super) fn cla_pointwise_forward_pair(
        first: *const Pointwise,
        second: *const Pointwise,
        stream: *mut c_void,
    ) -> i32;
    pub(super) fn cla_pointwise_backward(call: *const Pointwise, stream: *mut c_void) -> i32;
    pub(super) fn cla_mix_tokens(call: *const TokenMix, stream: *mut c_void) -> i32;
    pub(super) fn cla_make_rwkv7_keys(call: *const Rwkv7Keys, stream: *mut c_void) -> i32;
    pub(super) fn cla_finish_rwkv7(call: *const Rwkv7Output, stream: *mut c_void) -> i32;
    pub(super) fn cla_rotate(call: *const Rotary, stream: *mut c_void) -> i32;
    pub(super) fn cla_column_sums(call: *const Sums, stream: *mut c_void) -> i32;
}
