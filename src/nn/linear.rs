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

    /// `x W^T` and the bias that is still to be added to it, for a function that does that on its way.
    pub fn forward_and_bias(&self, xs: &Tensor) -> Result<(Tensor, Option<&Tensor>)> {
        Ok((project(xs, &self.weight)?, self.bias.as_ref()))
    }

    /// `[.., inputs]` to `[.., outputs]`, in the dtype of `xs`.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let (ys, bias) = self.forward_and_bias(xs)?;
        match bias {
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
/// On a GPU their weights lie in one matrix, and a few tokens take one product with it: unless some are trained or quantized, of
/// different dtypes, or have a bias.
#[derive(Debug, Clone)]
pub(crate) struct Projections {
    each: Vec<Linear>,
    /// Where the outputs of each begin among those of all.
    starts: Vec<usize>,
    whole: Option<Weight>,
}

impl Projections {
    pub fn new(mut each: Vec<Linear>) -> Result<Self> {
        let (mut starts, mut end) = (Vec::with_capacity(each.len()), 0);
        for linear in &each {
            starts.push(end);
            end += linear.weight.outputs()?;
        }
        let whole = joined(&each)?;
        if let Some(whole) = &whole {
            for (linear, start) in each.iter_mut().zip(&starts) {
                linear.weight = Weight::Dense(whole.narrow(0, *start, linear.weight.outputs()?)?);
            }
        }
        Ok(Self { each, starts, whole: whole.map(Weight::Dense) })
    }

    /// `[.., inputs]` to `[.., outputs]` of each of N projections.
    pub fn forward<const N: usize>(&self, xs: &Tensor) -> Result<[Tensor; N]> {
        let projected = self.project(xs)?;
        let found = (0..self.each.len()).map(|i| projected.get(i)).collect::<Result<Vec<_>>>()?;
        found.try_into().map_err(|_| Error::msg("as many results as projections"))
    }

    /// Whether a few tokens may take one product.
    pub fn are_joined(&self) -> bool {
        self.whole.is_some()
    }

    /// What they make of `xs: [.., inputs]`, at once or one by one.
    pub fn project<'a>(&'a self, xs: &'a Tensor) -> Result<Projected<'a>> {
        let tokens: usize = xs.dims().iter().rev().skip(1).product();
        let whole = self.whole.as_ref().filter(|_| tokens <= FEW);
        Ok(Projected { of: self, xs, whole: whole.map(|whole| project(xs, whole)).transpose()? })
    }
}

/// The results of [`Projections`].
pub(crate) struct Projected<'a> {
    of: &'a Projections,
    xs: &'a Tensor,
    /// All of them side by side, if one product has made them.
    whole: Option<Tensor>,
}

impl Projected<'_> {
    /// Of projection `i`, `[.., outputs]`.
    pub fn get(&self, i: usize) -> Result<Tensor> {
        let linear = &self.of.each[i];
        match &self.whole {
            Some(ys) => ys.narrow(D::Minus1, self.of.starts[i], linear.weight.outputs()?),
            None => linear.forward(self.xs),
        }
    }

    /// Of projection `i` of `[B, T, inputs]`, `[B, T, heads, width]`.
    pub fn heads(&self, i: usize, [heads, width]: [usize; 2]) -> Result<Tensor> {
        match &self.whole {
            Some(ys) => heads_from(ys, self.of.starts[i], heads, width),
            None => self.of.each[i].forward_heads(self.xs, heads),
        }
    }

    /// Of the first projections, which have so many outputs together, side by side, if they are.
    pub fn first(&self, outputs: usize) -> Result<Option<Tensor>> {
        self.whole.as_ref().map(|ys| ys.narrow(D::Minus1, 0, outputs)).transpose()
    }
}

/// Outputs of a joined matrix are a multiple of this, so that each token's begin where kernels can move 16 bytes.
const WHOLE: usize = 8;

/// All weights, one below the other, if they are to be one matrix.
fn joined(each: &[Linear]) -> Result<Option<Tensor>> {
    let mut weights = Vec::with_capacity(each.len() + 1);
    for linear in each {
        match (&linear.weight, &linear.bias) {
            (Weight::Dense(weight), None) if on_gpu(weight) && !weight.track_op() => weights.push(weight),
            _ => return Ok(None),
        }
    }
    let Some(first) = weights.first().copied() else { return Ok(None) };
    let inputs = first.dim(1)?;
    if weights.iter().any(|weight| weight.dtype() != first.dtype() || weight.dim(1).ok() != Some(inputs)) {
        return Ok(None);
    }
    let outputs = weights.iter().map(|weight| weight.dim(0)).sum::<Result<usize>>()?;
    let padding = outputs.next_multiple_of(WHOLE) - outputs;
    let zeros = match padding {
        0 => None,
        _ => Some(Tensor::zeros((padding, inputs), first.dtype(), first.device())?),
    };
    weights.extend(&zeros);
    Tensor::cat(&weights, 0).map(Some)
}

pub(crate) fn on_gpu(weight: &Tensor) -> bool {
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
