//! The gated feed-forward layer ([Shazeer, 2020](https://arxiv.org/abs/2002.05202)).

use crate::nn::fused::Gate;
use crate::nn::heads::check_size;
use crate::nn::linear::Projections;
use crate::nn::{Activation, Linear, NormGate, fused};
use candle_core::{DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// The exponent of [`GluKind::PowLu`], which no configuration changes.
const POWER: f64 = 3.;

/// How the gate acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GluKind {
    /// `silu(gate) * up`
    #[default]
    Swish,
    /// `gate^(3 / (sqrt(gate) + 1)) * sigmoid(gate) * up` where the gate is above 0, as `Swish` elsewhere.
    PowLu,
    /// `activation(gate) * up`
    Of(Activation),
}

impl From<Activation> for GluKind {
    fn from(activation: Activation) -> Self {
        if activation == Activation::Silu { Self::Swish } else { Self::Of(activation) }
    }
}

/// What a [`GatedMlp`] is made from.
#[derive(Debug, Clone, PartialEq)]
pub struct GatedMlpConfig {
    /// Width of input and output.
    pub hidden_size: usize,
    /// Width in between.
    pub intermediate_size: usize,
    /// How the gate acts.
    pub kind: GluKind,
    /// Deviation of fresh weights.
    pub initializer_range: f64,
}

impl GatedMlpConfig {
    /// The width of a layer that has about `hidden_ratio * hidden_size^2` parameters, a multiple of 256.
    pub fn intermediate_size(hidden_size: usize, hidden_ratio: f64) -> usize {
        let exact = (hidden_size as f64 * hidden_ratio * 2. / 3.) as usize;
        exact.div_ceil(256).max(1).saturating_mul(256)
    }
}

/// What the projections are called.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MlpNames {
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
}

impl Default for MlpNames {
    fn default() -> Self {
        Self { gate: "gate_proj", up: "up_proj", down: "down_proj" }
    }
}

/// `down_proj(glu(gate_proj(x), up_proj(x)))`, no biases.
#[derive(Debug, Clone)]
pub struct GatedMlp {
    /// Of the gate and up.
    projections: Projections,
    down_proj: Linear,
    kind: GluKind,
}

impl GatedMlp {
    /// Reads `gate_proj.weight` and `up_proj.weight`, `[intermediate, hidden]`, and `down_proj.weight`,
    /// `[hidden, intermediate]`. Checkpoints from before February 2025 have gate and up as one tensor,
    /// `gate_proj.weight [2 * intermediate, hidden]`, gate first: that is recognised.
    pub fn new(cfg: &GatedMlpConfig, vb: VarBuilder) -> Result<Self> {
        Self::with_names(cfg, MlpNames::default(), vb)
    }

    /// The same with projections of other names.
    pub(crate) fn with_names(cfg: &GatedMlpConfig, names: MlpNames, vb: VarBuilder) -> Result<Self> {
        let (hidden, inner) = (cfg.hidden_size, cfg.intermediate_size);
        for (name, size) in [("hidden_size", hidden), ("intermediate_size", inner)] {
            check_size(name, size)?;
        }
        let linear = |inputs, outputs, name: &str| {
            Linear::new(inputs, outputs, false, cfg.initializer_range, vb.pp(name))
        };
        let (gate_proj, up_proj) = match fused_gate_and_up(hidden, inner, &vb)? {
            Some(pair) => pair,
            None => (linear(hidden, inner, names.gate)?, linear(hidden, inner, names.up)?),
        };
        Self::from_parts([gate_proj, up_proj, linear(inner, hidden, names.down)?], cfg.kind)
    }

    /// From the projections of the gate, up and down.
    pub(crate) fn from_parts([gate, up, down_proj]: [Linear; 3], kind: GluKind) -> Result<Self> {
        Ok(Self { projections: Projections::new(vec![gate, up])?, down_proj, kind })
    }

    /// `[.., hidden]` to the same shape and dtype.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let [gate, up] = self.projections.forward(xs)?;
        let product = |gate: Tensor| (gate * up.to_dtype(DType::F32)?)?.to_dtype(xs.dtype());
        let ys = match self.kind {
            GluKind::Swish => fused::gated(&up, (&gate, Gate::Silu), xs.dtype())?,
            GluKind::PowLu => product(powlu(&gate.to_dtype(DType::F32)?)?)?,
            GluKind::Of(activation) => product(activation.forward_f32(&gate)?)?,
        };
        self.down_proj.forward(&ys)
    }
}

/// `y = f(gate) * xs` for two tensors of one shape and dtype, computed in f32: SwiGLU with [`NormGate::Silu`]. One operation
/// with a gradient; to the same shape and dtype.
pub fn gated(xs: &Tensor, gate: &Tensor, kind: NormGate) -> Result<Tensor> {
    fused::gated(xs, (gate, kind), xs.dtype())
}

/// The two projections of the old layout, if that is what there is. A fresh model has neither tensor yet and gets the
/// layout of today.
fn fused_gate_and_up(hidden: usize, inner: usize, vb: &VarBuilder) -> Result<Option<(Linear, Linear)>> {
    let (gate, up) = (vb.pp("gate_proj"), vb.pp("up_proj"));
    if up.contains_tensor("weight") || !gate.contains_tensor("weight") {
        return Ok(None);
    }
    // Through `get` for its errors: only a tensor twice as tall is the old layout, any other means `up_proj` is missing.
    if gate.get_unchecked("weight")?.dims() != [2 * inner, hidden] {
        return Ok(None);
    }
    let both = gate.get_with_hints((2 * inner, hidden), "weight", Init::Const(0.))?;
    let half = |start| Linear::from_parts(both.narrow(0, start, inner)?.contiguous()?, None);
    Ok(Some((half(0)?, half(inner)?)))
}

fn powlu(gate: &Tensor) -> Result<Tensor> {
    let zeros = gate.zeros_like()?;
    let above = gate.gt(&zeros)?;
    // The other lanes take log(1) = 0, so that no NaN reaches the gradient.
    let base = above.where_cond(gate, &gate.ones_like()?)?;
    let exponent = ((base.sqrt()? + 1.)?.recip()? * POWER)?;
    let power = (exponent * base.log()?)?.exp()?;
    above.where_cond(&power, gate)? * candle_nn::ops::sigmoid(gate)?
}
