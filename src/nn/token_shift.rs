//! The token before: how RWKV lets neighbours see each other.

#[cfg(any(feature = "cuda", feature = "cuda-host"))]
use crate::cuda::layers;
use crate::nn::call::Call;
use crate::nn::linear::in_wider;
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
use crate::nn::linear::on_gpu;
use crate::nn::{ShortConvOptions, short_conv};
use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

/// `x_t + mix (x_{t-1} - x_t)` for one `mix` or several, each with a number for each channel.
#[derive(Debug, Clone)]
pub(crate) struct TokenShift {
    mixes: Vec<Tensor>,
    /// All of them, `[n, channels]`, on a GPU and unless they are trained.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    joined: Option<Tensor>,
    /// `x_{t-1} - x_t` is a short convolution whose taps are 1 and -1.
    taps: Tensor,
}

impl TokenShift {
    /// For rows of `channels`, where the parameters of `vb` are.
    pub fn new(channels: usize, mixes: Vec<Tensor>, vb: &VarBuilder) -> Result<Self> {
        let taps = Tensor::new(&[[[1f32, -1.]]], vb.device())?;
        let taps = taps.broadcast_as((channels, 1, 2))?.contiguous()?.to_dtype(DType::F32)?;
        Ok(Self {
            #[cfg(any(feature = "cuda", feature = "cuda-host"))]
            joined: joined(channels, &mixes)?,
            mixes,
            taps,
        })
    }

    /// `[B, T, channels]` to the same for each of N mixes, and what to remember of it.
    pub fn forward<const N: usize>(&self, xs: &Tensor, call: &Call) -> Result<([Tensor; N], Tensor)> {
        let (mixed, last) = self.all(xs, call)?;
        let mixed = mixed.try_into().map_err(|_| candle_core::Error::msg("as many results as mixes"))?;
        Ok((mixed, last))
    }

    fn all(&self, xs: &Tensor, call: &Call) -> Result<(Vec<Tensor>, Tensor)> {
        let past = call.past(0, 1)?;
        #[cfg(any(feature = "cuda", feature = "cuda-host"))]
        if let (Some(joined), None) = (&self.joined, call.cu_seqlens())
            && let Some((mixed, last)) = layers::mix_tokens(xs, past, joined)?
        {
            return Ok(((0..self.mixes.len()).map(|i| mixed.get(i)).collect::<Result<_>>()?, last));
        }
        let opts = ShortConvOptions { silu: false, past, cu_seqlens: call.cu_seqlens() };
        let (delta, last) = short_conv(xs, &self.taps, None, &opts)?;
        Ok((self.mixes.iter().map(|mix| mixed(xs, &delta, mix)).collect::<Result<_>>()?, last))
    }
}

#[cfg(any(feature = "cuda", feature = "cuda-host"))]
fn joined(channels: usize, mixes: &[Tensor]) -> Result<Option<Tensor>> {
    if !mixes.iter().all(|mix| on_gpu(mix) && !mix.track_op()) {
        return Ok(None);
    }
    let rows = mixes.iter().map(|mix| mix.reshape(channels)).collect::<Result<Vec<_>>>()?;
    Tensor::stack(&rows, 0).map(Some)
}

/// `xs + mix * delta`, in the dtype of `xs`.
fn mixed(xs: &Tensor, delta: &Tensor, mix: &Tensor) -> Result<Tensor> {
    let (delta, mix) = in_wider(delta, mix)?;
    (xs.to_dtype(delta.dtype())? + delta.broadcast_mul(&mix)?)?.to_dtype(xs.dtype())
}
