//! RWKV-7 ([Peng et al., 2025](https://arxiv.org/abs/2503.14456)): channel mixing.

use crate::nn::call::{Call, forward_methods};
use crate::nn::heads::check_size;
use crate::nn::token_shift::TokenShift;
use crate::nn::{Activation, LayerCache, Linear};
use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// What an [`Rwkv7FeedForward`] layer is made from.
#[derive(Debug, Clone, PartialEq)]
pub struct Rwkv7FeedForwardConfig {
    /// Width of input and output.
    pub hidden_size: usize,
    /// Width in between.
    pub intermediate_size: usize,
    /// The function in between; the authors' is the square of ReLU.
    pub hidden_act: Activation,
    /// The number of this layer, and how many there are, which decides where fresh parameters are.
    pub layer: (usize, usize),
}

impl Rwkv7FeedForwardConfig {
    /// The width of a layer that is `hidden_ratio` times as wide in between, a multiple of 32.
    pub fn intermediate_size(hidden_size: usize, hidden_ratio: f64) -> usize {
        ((hidden_size as f64 * hidden_ratio) as usize).div_ceil(32).max(1).saturating_mul(32)
    }
}

/// `value(act(key(x + x_k * (x_{t-1} - x))))`.
///
/// Parameters: `x_k`, `key`, `value`.
#[derive(Debug, Clone)]
pub struct Rwkv7FeedForward {
    hidden_size: usize,
    shift: TokenShift,
    key: Linear,
    value: Linear,
    activation: Activation,
}

impl Rwkv7FeedForward {
    /// # Errors
    /// A size that is 0 or too large, by the field's name; whatever `vb` has to say of a tensor.
    pub fn new(cfg: &Rwkv7FeedForwardConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, inner) = (cfg.hidden_size, cfg.intermediate_size);
        for (name, size) in [("hidden_size", hidden), ("intermediate_size", inner)] {
            check_size(name, size)?;
        }
        let (layer, layers) = cfg.layer;
        let power = (1. - layer as f64 / layers.max(layer + 1) as f64).powi(4);
        let x_k = Init::Uniform { lo: 0., up: 2. * power / (1. + power) };
        let x_k = vb.get_with_hints(hidden, "x_k", x_k)?;
        Ok(Self {
            hidden_size: hidden,
            shift: TokenShift::new(hidden, vec![x_k], &vb)?,
            key: Linear::new(hidden, inner, false, 1. / (inner as f64).sqrt(), vb.pp("key"))?,
            // The layer says nothing at first.
            value: Linear::new(inner, hidden, false, 0., vb.pp("value"))?,
            activation: cfg.hidden_act,
        })
    }
}

forward_methods!(Rwkv7FeedForward);

impl Rwkv7FeedForward {
    pub(crate) fn mix(&self, xs: &Tensor, call: Call) -> Result<Tensor> {
        let size = call.check(xs, self.hidden_size)?;
        let ([xk], past) = self.shift.forward(xs, &call)?;
        call.finish(None, vec![past], size);
        let inner = self.key.forward(&xk)?;
        self.value.forward(&self.activation.forward(&inner)?)
    }
}
