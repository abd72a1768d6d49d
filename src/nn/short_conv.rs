//! The short causal convolution that some layers put behind their projections.

use crate::nn::normal;
use candle_core::{DType, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};

/// A depthwise causal convolution along the tokens, followed by SiLU:
/// `y_t = silu(sum_i w_i * x_{t - W + 1 + i} + bias)` in each channel, computed in f32.
#[derive(Debug, Clone)]
pub struct ShortConvolution {
    /// `[channels, 1, W]`, as a depthwise `Conv1d` stores it.
    weight: Tensor,
    bias: Option<Tensor>,
    channels: usize,
    width: usize,
}

impl ShortConvolution {
    /// Reads `weight` of shape `[channels, 1, width]` and, if asked for, `bias` of shape `[channels]`. A fresh weight is
    /// normal with deviation `stdev`, a fresh bias 0.
    pub fn new(
        channels: usize,
        width: usize,
        bias: bool,
        stdev: f64,
        vb: VarBuilder,
    ) -> Result<Self> {
        check_conv_size(width)?;
        let weight = vb.get_with_hints((channels, 1, width), "weight", normal(stdev))?;
        let bias = match bias {
            true => Some(vb.get_with_hints(channels, "bias", Init::Const(0.))?),
            false => None,
        };
        Ok(Self {
            weight,
            bias,
            channels,
            width,
        })
    }

    /// `xs: [B, T, channels]` to the same shape and dtype, and the last `width - 1` inputs, `[B, width - 1, channels]`.
    /// Given back as `past`, they continue the sequence; without them the inputs before the first are 0.
    pub fn forward(&self, xs: &Tensor, past: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        let (batch, tokens, channels) = xs.dims3()?;
        if channels != self.channels {
            bail!(
                "xs: {channels} channels, the convolution has {}",
                self.channels
            );
        }
        let past_shape = (batch, self.width - 1, channels);
        let past = match past {
            Some(past) if past.dims3()? == past_shape => past.to_dtype(xs.dtype())?,
            Some(past) => bail!(
                "past: shape is {:?}, it must be {past_shape:?}",
                past.dims()
            ),
            None => Tensor::zeros(past_shape, xs.dtype(), xs.device())?,
        };
        let padded = match self.width {
            1 => xs.clone(),
            _ => Tensor::cat(&[&past, xs], 1)?,
        };
        // One row a tap, so that a tap is a contiguous vector over the channels.
        let taps = self
            .weight
            .to_dtype(DType::F32)?
            .squeeze(1)?
            .t()?
            .contiguous()?;
        let wide = padded.to_dtype(DType::F32)?;
        let mut ys = wide.narrow(1, 0, tokens)?.broadcast_mul(&taps.get(0)?)?;
        for tap in 1..self.width {
            ys = (ys
                + wide
                    .narrow(1, tap, tokens)?
                    .broadcast_mul(&taps.get(tap)?)?)?;
        }
        if let Some(bias) = &self.bias {
            ys = ys.broadcast_add(&bias.to_dtype(DType::F32)?)?;
        }
        let past = padded.narrow(1, tokens, self.width - 1)?.contiguous()?;
        Ok((ys.silu()?.to_dtype(xs.dtype())?, past))
    }
}

pub(crate) fn check_conv_size(width: usize) -> Result<()> {
    match width {
        1..=1024 => Ok(()),
        _ => bail!("conv_size is {width}, it must be from 1 to 1024"),
    }
}
