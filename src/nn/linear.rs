//! Projections, and the initialisation the checkpoints' authors use.

use crate::nn::weight::Weight;
use candle_core::{DType, Result, Tensor};
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
            Some(bias) => {
                let (wide, bias) = in_wider(&ys, bias)?;
                wide.broadcast_add(&bias)?.to_dtype(ys.dtype())
            }
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

/// Activations and a parameter that meets each token of them, in f32 if the parameter is and else in the dtype of `xs`: the
/// gradient of the parameter is a sum over the tokens, for which 16 bits are too few.
pub(crate) fn in_wider(xs: &Tensor, parameter: &Tensor) -> Result<(Tensor, Tensor)> {
    let dtype = if parameter.dtype() == DType::F32 { DType::F32 } else { xs.dtype() };
    Ok((xs.to_dtype(dtype)?, parameter.to_dtype(dtype)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    /// In bf16, 256 and 1 make 256.
    #[test]
    fn the_gradient_of_a_bias_is_summed_in_its_own_dtype() -> Result<()> {
        let bias = Var::zeros(3, DType::F32, &Device::Cpu)?;
        let weight = Tensor::ones((3, 2), DType::F32, &Device::Cpu)?;
        let linear = Linear::from_parts(weight, Some(bias.as_tensor().clone()))?;
        let ys = linear.forward(&Tensor::ones((1000, 2), DType::BF16, &Device::Cpu)?)?;
        assert_eq!(ys.dtype(), DType::BF16);
        let grads = ys.sum_all()?.backward()?;
        assert_eq!(grads.get(&bias).map(Tensor::to_vec1::<f32>).transpose()?, Some(vec![1000.; 3]));
        Ok(())
    }
}
