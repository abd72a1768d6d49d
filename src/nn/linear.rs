//! Projections, and the initialisation the checkpoints' authors use.

use crate::nn::heads::heads_from;
use crate::nn::weight::Weight;
use candle_core::{D, DType, Error, Result, Tensor};
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

/// The most tokens that take one product for all projections: there its start is what it costs, and not to copy the results, whose
/// rows do not lie one after the other, more than that saves.
const FEW: usize = 16;

/// Projections of one input.
///
/// On a GPU, unless they are trained or quantized, their weights lie in one matrix, and a few tokens take one product with it.
#[derive(Debug, Clone)]
pub(crate) struct Projections<const N: usize> {
    each: [Linear; N],
    whole: Option<Weight>,
}

impl<const N: usize> Projections<N> {
    pub fn new(mut each: [Linear; N]) -> Result<Self> {
        let Some(whole) = joined(&each)? else { return Ok(Self { each, whole: None }) };
        let mut start = 0;
        for linear in &mut each {
            let outputs = linear.weight.outputs()?;
            linear.weight = Weight::Dense(whole.narrow(0, start, outputs)?);
            start += outputs;
        }
        Ok(Self { each, whole: Some(Weight::Dense(whole)) })
    }

    /// `[.., inputs]` to `[.., outputs]` of each.
    pub fn forward(&self, xs: &Tensor) -> Result<[Tensor; N]> {
        match self.at_once(xs)? {
            Some(ys) => self.each_with(|linear, start| ys.narrow(D::Minus1, start, linear.weight.outputs()?)),
            None => self.each_with(|linear, _| linear.forward(xs)),
        }
    }

    /// `[B, T, inputs]` to `[B, T, heads, width]` of each, given as `[heads, width]`.
    pub fn forward_heads(&self, xs: &Tensor, shapes: [[usize; 2]; N]) -> Result<[Tensor; N]> {
        let whole = self.at_once(xs)?;
        let mut shapes = shapes.into_iter();
        self.each_with(|linear, start| {
            let [heads, width] = shapes.next().unwrap_or_default();
            match &whole {
                Some(ys) => heads_from(ys, start, heads, width),
                None => linear.forward_heads(xs, heads),
            }
        })
    }

    /// The results side by side, if one product makes them all.
    fn at_once(&self, xs: &Tensor) -> Result<Option<Tensor>> {
        let tokens: usize = xs.dims().iter().rev().skip(1).product();
        let whole = self.whole.as_ref().filter(|_| tokens <= FEW);
        whole.map(|whole| project(xs, whole)).transpose()
    }

    /// What `f` makes of each projection and of where its outputs begin among those of all.
    fn each_with(&self, mut f: impl FnMut(&Linear, usize) -> Result<Tensor>) -> Result<[Tensor; N]> {
        let mut start = 0;
        let mut found = Vec::with_capacity(N);
        for linear in &self.each {
            found.push(f(linear, start)?);
            start += linear.weight.outputs()?;
        }
        found.try_into().map_err(|_| Error::msg("as many results as projections"))
    }
}

/// All weights, one below the other, if they are to be one matrix.
fn joined(each: &[Linear]) -> Result<Option<Tensor>> {
    let mut weights = Vec::with_capacity(each.len());
    for linear in each {
        match (&linear.weight, &linear.bias) {
            (Weight::Dense(weight), None) if on_gpu(weight) && !weight.track_op() => weights.push(weight),
            _ => return Ok(None),
        }
    }
    let first = weights.first().map(|first| (first.dtype(), first.dim(1).ok()));
    let alike = |weight: &&Tensor| Some((weight.dtype(), weight.dim(1).ok())) == first;
    if weights.iter().all(alike) { Tensor::cat(&weights, 0).map(Some) } else { Ok(None) }
}

fn on_gpu(weight: &Tensor) -> bool {
    #[cfg(feature = "cuda-host")]
    if crate::cuda::takes(weight.device()) {
        return true;
    }
    !weight.device().is_cpu()
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
