//! Root-mean-square normalisation ([Zhang and Sennrich, 2019](https://arxiv.org/abs/1910.07467)).

use candle_core::{D, DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// `y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in f32.
///
/// candle-nn's fused `rms_norm` has no backward: a layer that used it would train without gradients below the norm.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Option<Tensor>,
    eps: f64,
}

impl RmsNorm {
    /// A norm over `size` channels. With `affine` it reads `weight` of shape `[size]`, 1 when fresh; without, it has no
    /// parameters.
    pub fn new(size: usize, eps: f64, affine: bool, vb: VarBuilder) -> Result<Self> {
        let weight = match affine {
            true => Some(vb.get_with_hints(size, "weight", Init::Const(1.))?),
            false => None,
        };
        Ok(Self { weight, eps })
    }

    /// `[.., size]` to the same shape and dtype.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.forward_f32(xs)?.to_dtype(xs.dtype())
    }

    /// The same, left in f32 for whatever comes next.
    pub(crate) fn forward_f32(&self, xs: &Tensor) -> Result<Tensor> {
        let xs = xs.to_dtype(DType::F32)?;
        let mean_square = xs.sqr()?.mean_keepdim(D::Minus1)?;
        let ys = xs.broadcast_div(&(mean_square + self.eps)?.sqrt()?)?;
        match &self.weight {
            Some(weight) => ys.broadcast_mul(&weight.to_dtype(DType::F32)?),
            None => Ok(ys),
        }
    }
}
