//! The token before: how RWKV lets neighbours see each other.

use crate::nn::call::Call;
use crate::nn::linear::in_wider;
use crate::nn::{ShortConvOptions, short_conv};
use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

/// `x_{t-1} - x_t`, a short convolution whose taps are 1 and -1.
#[derive(Debug, Clone)]
pub(crate) struct TokenShift {
    taps: Tensor,
}

impl TokenShift {
    /// For rows of `channels`, where the parameters of `vb` are.
    pub fn new(channels: usize, vb: &VarBuilder) -> Result<Self> {
        let taps = Tensor::new(&[[[1f32, -1.]]], vb.device())?;
        Ok(Self { taps: taps.broadcast_as((channels, 1, 2))?.contiguous()?.to_dtype(DType::F32)? })
    }

    /// `[B, T, channels]` to the same, and what to remember of it.
    pub fn forward(&self, xs: &Tensor, call: &Call) -> Result<(Tensor, Tensor)> {
        let opts = ShortConvOptions { silu: false, past: call.past(0, 1)?, cu_seqlens: call.cu_seqlens() };
        short_conv(xs, &self.taps, None, &opts)
    }
}

/// `xs + mix * delta`, with a `mix` for each channel; in the dtype of `xs`.
pub(crate) fn mixed(xs: &Tensor, delta: &Tensor, mix: &Tensor) -> Result<Tensor> {
    let (delta, mix) = in_wider(delta, mix)?;
    (xs.to_dtype(delta.dtype())? + delta.broadcast_mul(&mix)?)?.to_dtype(xs.dtype())
}
