//! Layer normalisation ([Ba et al., 2016](https://arxiv.org/abs/1607.06450)), of a whole row or of parts of it.

use crate::nn::fused;
use crate::nn::rms_norm::check_eps;
use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// `y = (x - mean) / sqrt(variance + eps) * weight + bias` over groups of the last dimension, computed in f32.
///
/// candle-nn's fused `layer_norm` has no backward: a layer that used it would train without gradients below the norm.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Option<Tensor>,
    groups: usize,
    eps: f64,
}

impl LayerNorm {
    /// A norm over `size` channels. Reads `weight` of shape `[size]`, 1 when fresh, and, if asked for, `bias`, 0 when fresh.
    ///
    /// # Errors
    /// An `eps` that is not 0 or a positive number; whatever `vb` has to say of a tensor.
    pub fn new(size: usize, eps: f64, bias: bool, vb: VarBuilder) -> Result<Self> {
        Self::grouped(size, 1, eps, bias, 1., vb)
    }

    /// A norm over each of `groups` parts of the channels, with `weight` where it begins when fresh.
    pub(crate) fn grouped(
        size: usize,
        groups: usize,
        eps: f64,
        bias: bool,
        weight: f64,
        vb: VarBuilder,
    ) -> Result<Self> {
        check_eps(eps)?;
        let bias = match bias {
            true => Some(vb.get_with_hints(size, "bias", Init::Const(0.))?),
            false => None,
        };
        let weight = vb.get_with_hints(size, "weight", Init::Const(weight))?;
        Ok(Self { weight, bias, groups, eps })
    }

    /// Weight, bias and epsilon.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    pub(crate) fn parts(&self) -> (&Tensor, Option<&Tensor>, f64) {
        (&self.weight, self.bias.as_ref(), self.eps)
    }

    /// `[.., size]` to the same shape and dtype.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.forward_to(xs, xs.dtype())
    }

    /// [`forward`](Self::forward), in the dtype that comes next.
    pub(crate) fn forward_to(&self, xs: &Tensor, dtype: DType) -> Result<Tensor> {
        let width = self.weight.dim(0)? / self.groups;
        fused::layer_norm(xs, (&self.weight, self.bias.as_ref()), width, self.eps, dtype)
    }
}

impl Module for LayerNorm {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.forward(xs)
    }
}
