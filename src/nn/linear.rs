//! Projections, and the initialisation the checkpoints' authors use.

use crate::nn::weight::Weight;
use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// A normal distribution around 0, what every projection and embedding starts from.
pub(crate) fn normal(stdev: f64) -> Init {
    Init::Randn { mean: 0., stdev }
}

/// `y = x W^T (+ b)` with `W` of shape `[outputs, inputs]`.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

impl Linear {
    /// Reads `weight` and, if asked for, `bias`. A fresh weight is normal with the given deviation, a fresh bias 0.
    pub fn new(inputs: usize, outputs: usize, bias: bool, stdev: f64, vb: VarBuilder) -> Result<Self> {
        let weight = Weight::get(&vb, (outputs, inputs), "weight", normal(stdev))?;
        let bias = match bias {
            true => Some(vb.get_with_hints(outputs, "bias", Init::Const(0.))?),
            false => None,
        };
        Ok(Self { weight, bias })
    }

    /// A layer from tensors at hand.
    pub fn from_parts(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        Ok(Self { weight: Weight::new(weight)?, bias })
    }

    /// `[.., inputs]` to `[.., outputs]`, in the dtype of `xs`.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let ys = project(xs, &self.weight)?;
        match &self.bias {
            Some(bias) => ys.broadcast_add(&bias.to_dtype(ys.dtype())?),
            None => Ok(ys),
        }
    }

    /// `[B, T, inputs]` to `[B, T, heads, outputs / heads]`, for a layer without a bias.
    pub fn forward_heads(&self, xs: &Tensor, heads: usize) -> Result<Tensor> {
        let (batch, tokens, _) = xs.dims3()?;
        self.weight.project_to(xs, &[batch, tokens, heads, self.weight.outputs()? / heads])
    }
}

/// `xs W^T` for `xs` of shape `[.., inputs]` and `W` of shape `[outputs, inputs]`, in the dtype of `xs`.
pub(crate) fn project(xs: &Tensor, weight: &Weight) -> Result<Tensor> {
    let mut dims = xs.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = weight.outputs()?;
    }
    weight.project_to(xs, &dims)
}
