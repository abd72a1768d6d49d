//! The operators.
use crate::{Options, Output};
use candle_core::{Result, Tensor};

/// Linear attention.
pub fn linear_attn(_q: &Tensor, _k: &Tensor, _v: &Tensor, _opts: &Options) -> Result<Output> {
    candle_core::bail!("being written")
}
/// Retention.
pub fn retention(
    _q: &Tensor,
    _k: &Tensor,
    _v: &Tensor,
    _log_decay: &Tensor,
    _opts: &Options,
) -> Result<Output> {
    candle_core::bail!("being written")
}
/// Scalar gates.
pub fn simple_gla(
    _q: &Tensor,
    _k: &Tensor,
    _v: &Tensor,
    _g: &Tensor,
    _opts: &Options,
) -> Result<Output> {
    candle_core::bail!("being written")
}
/// Per-channel gates.
pub fn gla(_q: &Tensor, _k: &Tensor, _v: &Tensor, _g: &Tensor, _opts: &Options) -> Result<Output> {
    candle_core::bail!("being written")
}
