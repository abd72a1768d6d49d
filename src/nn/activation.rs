//! Pointwise functions by the names that configurations use.

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
        self.forward_f32(&xs.to_dtype(DType::F32)?)?
            .to_dtype(xs.dtype())
    }

    pub(crate) fn forward_f32(&self, xs: &Tensor) -> Result<Tensor> {
        match self {
            Self::Identity => Ok(xs.clone()),
            Self::Relu => xs.relu(),
            Self::SquaredRelu => xs.relu()?.sqr(),
            Self::EluPlusOne => elu_plus_one(xs),
            Self::Sigmoid => candle_nn::ops::sigmoid(xs),
            Self::LogSigmoid => log_sigmoid(xs),
            Self::Tanh => xs.tanh(),
            Self::Silu => xs.silu(),
            Self::Gelu => xs.gelu_erf(),
            Self::GeluTanh => xs.gelu(),
            Self::QuickGelu => xs * candle_nn::ops::sigmoid(&(xs * 1.702)?)?,
            // log(1 + exp(x)) = -log_sigmoid(-x)
            Self::Mish => xs * log_sigmoid(&xs.neg()?)?.neg()?.tanh()?,
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
    xs.ge(&zeros)?
        .where_cond(&(xs + 1.)?, &xs.minimum(&zeros)?.exp()?)
}

/// `min(x, 0) - log(1 + exp(-|x|))`, which neither overflows nor loses small values. `x - relu(x)` rather than a minimum:
/// Candle's derivatives at 0 (1 for relu, 1 for abs) then add up to the right one, 1/2.
fn log_sigmoid(xs: &Tensor) -> Result<Tensor> {
    let below = (xs - xs.relu()?)?;
    below - (xs.abs()?.neg()?.exp()? + 1.)?.log()?
}
