//! Pointwise functions by the names that configurations use.

use crate::nn::fused::{Pointwise, pointwise};
use candle_core::{DType, Result, Tensor, bail};

/// A pointwise function. All are computed in f32 and have a gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x
    Identity,
    /// max(x, 0)
    Relu,
    /// max(x, 0)^2
    SquaredRelu,
    /// elu(x) + 1: x + 1 above 0, exp(x) below
    EluPlusOne,
    /// 1 / (1 + exp(-x))
    Sigmoid,
    /// log(sigmoid(x))
    LogSigmoid,
    /// tanh(x)
    Tanh,
    /// x * sigmoid(x), also called swish
    Silu,
    /// x * Phi(x), with the error function
    Gelu,
    /// the tanh approximation of GELU
    GeluTanh,
    /// x * sigmoid(1.702 x)
    QuickGelu,
    /// x * tanh(log(1 + exp(x)))
    Mish,
}

/// What flash-linear-attention's layers call their activations; its `gelu` is the tanh approximation.
const FLA: &[(&str, Activation)] = &[
    ("relu", Activation::Relu),
    ("sigmoid", Activation::Sigmoid),
    ("logsigmoid", Activation::LogSigmoid),
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("sqrelu", Activation::SquaredRelu),
    ("gelu", Activation::GeluTanh),
];

/// What transformers calls them; its `gelu` is exact.
const TRANSFORMERS: &[(&str, Activation)] = &[
    ("gelu", Activation::Gelu),
    ("gelu_python", Activation::Gelu),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_fast", Activation::GeluTanh),
    ("gelu_accurate", Activation::GeluTanh),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("gelu_python_tanh", Activation::GeluTanh),
    ("linear", Activation::Identity),
    ("mish", Activation::Mish),
    ("quick_gelu", Activation::QuickGelu),
    ("relu", Activation::Relu),
    ("relu2", Activation::SquaredRelu),
    ("sigmoid", Activation::Sigmoid),
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("tanh", Activation::Tanh),
];

impl Activation {
    /// The activation that flash-linear-attention's own layers mean by `name` (used by `gla`).
    pub fn from_fla(name: &str) -> Result<Self> {
        lookup(FLA, name)
    }

    /// The activation that transformers means by `name` (used by `retnet`).
    pub fn from_transformers(name: &str) -> Result<Self> {
        lookup(TRANSFORMERS, name)
    }

    /// Any shape and float dtype to the same.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        if *self == Self::Identity {
            return Ok(xs.clone());
        }
        self.forward_f32(xs)?.to_dtype(xs.dtype())
    }

    /// Any shape and float dtype, to f32.
    pub(crate) fn forward_f32(&self, xs: &Tensor) -> Result<Tensor> {
        let wide = || xs.to_dtype(DType::F32);
        match self {
            Self::Identity => wide(),
            Self::Relu => wide()?.relu(),
            Self::SquaredRelu => wide()?.relu()?.sqr(),
            Self::EluPlusOne => elu_plus_one(&wide()?),
            Self::Sigmoid => pointwise(Pointwise::Sigmoid, xs),
            Self::LogSigmoid => pointwise(Pointwise::LogSigmoid, xs),
            Self::Tanh => wide()?.tanh(),
            Self::Silu => wide()?.silu(),
            Self::Gelu => wide()?.gelu_erf(),
            Self::GeluTanh => wide()?.gelu(),
            Self::QuickGelu => {
                let xs = wide()?;
                &xs * pointwise(Pointwise::Sigmoid, &(&xs * 1.702)?)?
            }
            Self::Mish => wide()? * pointwise(Pointwise::Softplus, xs)?.tanh()?,
        }
    }
}

fn lookup(names: &[(&str, Activation)], name: &str) -> Result<Activation> {
    match names.iter().find(|(known, _)| *known == name) {
        Some((_, activation)) => Ok(*activation),
        None => {
            let known: Vec<_> = names.iter().map(|(known, _)| *known).collect();
            bail!("is \"{name}\", it must be one of {}", known.join(", "))
        }
    }
}

/// Without the cancellation of `(exp(x) - 1) + 1`, which leaves a small feature with few right digits.
fn elu_plus_one(xs: &Tensor) -> Result<Tensor> {
    let zeros = xs.zeros_like()?;
    xs.ge(&zeros)?.where_cond(&(xs + 1.)?, &xs.minimum(&zeros)?.exp()?)
}
