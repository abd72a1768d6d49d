//! Root-mean-square normalisation ([Zhang and Sennrich, 2019](https://arxiv.org/abs/1910.07467)).

use crate::nn::fused::{self, Gate};
use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// `y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in f32.
///
/// candle-nn's fused `rms_norm` has no backward: a layer that used it would train without gradients below the norm.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Tensor,
    /// What is added to it.
    offset: f64,
    eps: f64,
}

impl RmsNorm {
    /// A norm over `size` channels. With `affine` it reads `weight` of shape `[size]`, 1 when fresh; without, it has no
    /// parameters.
    pub fn new(size: usize, eps: f64, affine: bool, vb: VarBuilder) -> Result<Self> {
        let weight = match affine {
            true => vb.get_with_hints(size, "weight", Init::Const(1.))?,
            false => Tensor::ones(size, DType::F32, vb.device())?,
        };
        Ok(Self { weight, offset: 0., eps })
    }

    /// A norm whose parameter `weight` is stored as its difference from 1, 0 when fresh.
    pub fn zero_centered(size: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        let norm = Self { weight: vb.get_with_hints(size, "weight", Init::Const(0.))?, offset: 1., eps };
        // One that is trained changes; any other is added up here and not in every call.
        if norm.weight.track_op() {
            return Ok(norm);
        }
        Ok(Self { weight: norm.weight_f32()?, offset: 0., eps })
    }

    fn weight_f32(&self) -> Result<Tensor> {
        let weight = self.weight.to_dtype(DType::F32)?;
        if self.offset == 0. { Ok(weight) } else { weight + self.offset }
    }

    /// `[.., size]` to the same shape and dtype.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.forward_f32(xs)?.to_dtype(xs.dtype())
    }

    /// [`forward`](Self::forward), left in f32 for whatever comes next.
    pub(crate) fn forward_f32(&self, xs: &Tensor) -> Result<Tensor> {
        fused::rms_norm(&xs.to_dtype(DType::F32)?, &self.weight_f32()?, self.eps)
    }

    /// The same times a function of `gate`, in f32 and in the shape of `gate`, which has the elements of `xs` in their order.
    pub(crate) fn forward_gated_f32(&self, xs: &Tensor, gate: &Tensor, kind: Gate) -> Result<Tensor> {
        let [xs, gate] = [xs, gate].map(|x| x.to_dtype(DType::F32));
        fused::rms_norm_gated(&xs?, &self.weight_f32()?, (&gate?, kind), self.eps)
    }
}

/// `y = x / sqrt(sum(x^2) + eps)` over the last dimension, computed in f32: what delta rules do to queries and keys.
pub(crate) fn l2_norm(xs: &Tensor, eps: f64) -> Result<Tensor> {
    let n = xs.dims().last().copied().unwrap_or(0).max(1) as f64;
    // A root mean square is the root of a sum over n.
    let weight = Tensor::full((1. / n.sqrt()) as f32, n as usize, xs.device())?;
    fused::rms_norm(&xs.to_dtype(DType::F32)?, &weight, eps / n)?.to_dtype(xs.dtype())
}

impl Module for RmsNorm {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.forward(xs)
    }
}
