//! Projections without the traps: 16-bit weights on a CPU, and the initialisation the checkpoints' authors use.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// A normal distribution around 0, what every projection and embedding starts from.
pub(crate) fn normal(stdev: f64) -> Init {
    Init::Randn { mean: 0., stdev }
}

/// `y = x W^T (+ b)` with `W` of shape `[outputs, inputs]`.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// Reads `weight` and, if asked for, `bias`. A fresh weight is normal with the given deviation, a fresh bias 0.
    pub fn new(
        inputs: usize,
        outputs: usize,
        bias: bool,
        stdev: f64,
        vb: VarBuilder,
    ) -> Result<Self> {
        let weight = vb.get_with_hints((outputs, inputs), "weight", normal(stdev))?;
        let bias = match bias {
            true => Some(vb.get_with_hints(outputs, "bias", Init::Const(0.))?),
            false => None,
        };
        Self::from_parts(weight, bias)
    }

    /// A layer from tensors at hand.
    pub fn from_parts(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        Ok(Self {
            weight: resident(weight)?,
            bias,
        })
    }

    /// `[.., inputs]` to `[.., outputs]`, in the dtype of `xs`.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let ys = project(xs, &self.weight)?;
        match &self.bias {
            Some(bias) => ys.broadcast_add(bias),
            None => Ok(ys),
        }
    }
}

/// The form in which a weight is kept for [`project`]. Candle has no bf16 matrix product on a CPU; widening a weight at
/// every call would cost more than the product of a single token, so a frozen one is widened once (exactly). A weight
/// that is being trained stays what it is: a copy would not follow its updates.
pub(crate) fn resident(weight: Tensor) -> Result<Tensor> {
    if weight.track_op() {
        return Ok(weight);
    }
    let dtype = product_dtype(&weight);
    weight.to_dtype(dtype)
}

/// `xs W^T` for `xs` of shape `[.., inputs]` and `W` of shape `[outputs, inputs]`, in the dtype of `xs`.
pub(crate) fn project(xs: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let inputs = xs.dim(D::Minus1)?;
    let mut dims = xs.dims().to_vec();
    let rows = dims[..dims.len() - 1].iter().product::<usize>();
    if let Some(last) = dims.last_mut() {
        *last = weight.dim(0)?;
    }
    let dtype = product_dtype(xs);
    let weight = weight.to_dtype(dtype)?.t()?;
    let ys = xs
        .reshape((rows, inputs))?
        .to_dtype(dtype)?
        .matmul(&weight)?;
    ys.to_dtype(xs.dtype())?.reshape(dims)
}

fn product_dtype(tensor: &Tensor) -> DType {
    match tensor.dtype() {
        DType::BF16 if tensor.device().is_cpu() => DType::F32,
        dtype => dtype,
    }
}
