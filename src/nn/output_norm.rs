//! The end of a layer: normalise each head, then gate it.

use crate::nn::fused::Gate;
use crate::nn::heads::Heads;
use crate::nn::{Activation, Linear, RmsNorm};
use candle_core::{DType, Result, Tensor, bail};
use candle_nn::VarBuilder;

/// `rms_norm(o) * gate_fn(gate)` for each head, computed in f32; without a gate, the norm alone.
#[derive(Debug, Clone)]
pub(crate) struct OutputNorm {
    norm: RmsNorm,
    gate: Option<OutputGate>,
}

/// What an [`OutputNorm`] is made from.
pub(crate) struct OutputNormConfig {
    /// The function on the gate, if there is one.
    pub gate_fn: Option<Activation>,
    pub elementwise_affine: bool,
    pub norm_eps: f64,
    pub fuse_norm: bool,
    pub stdev: f64,
}

/// What makes a gate of what the layer's input was projected to.
#[derive(Debug, Clone)]
pub(crate) struct OutputGate {
    /// From a few channels to all, if the first projection was to a few.
    pub up: Option<Linear>,
    pub act: Activation,
}

impl OutputNorm {
    /// A norm named `g_norm`, or as its authors name it, and the projection `g_proj` that a gate is made of.
    pub fn new(cfg: &OutputNormConfig, heads: &Heads, vb: &VarBuilder) -> Result<(Self, Option<Linear>)> {
        // The authors' fused kernel does norm and swish gate together, and its weight has a name of its own.
        let fused = cfg.fuse_norm && cfg.gate_fn == Some(Activation::Silu);
        let name = if fused { "g_norm_swish_gate" } else { "g_norm" };
        let norm = RmsNorm::new(heads.head_v_dim, cfg.norm_eps, cfg.elementwise_affine, vb.pp(name))?;
        let Some(act) = cfg.gate_fn else { return Ok((Self { norm, gate: None }, None)) };
        let proj = Linear::new(heads.hidden_size, heads.value_dim(), false, cfg.stdev, vb.pp("g_proj"))?;
        Ok((Self { norm, gate: Some(OutputGate { up: None, act }) }, Some(proj)))
    }

    /// From its parts.
    pub fn from_parts(norm: RmsNorm, gate: Option<OutputGate>) -> Self {
        Self { norm, gate }
    }

    /// `out: [B, T, H, V]`, and what the layer's input was projected to for a gate, to `[B, T, H * V]` in `dtype`.
    pub fn forward(&self, out: &Tensor, projected: Option<Tensor>, dtype: DType) -> Result<Tensor> {
        let (gate, projected) = match (&self.gate, projected) {
            (None, None) => return self.norm.forward_to(out, dtype)?.flatten_from(2),
            (Some(gate), Some(projected)) => (gate, projected),
            _ => bail!("an output gate and its projection come together"),
        };
        let projected = match &gate.up {
            Some(up) => up.forward(&projected)?,
            None => projected,
        };
        match gate.act {
            Activation::Silu => self.norm.forward_gated_to(out, (&projected, Gate::Silu), dtype),
            Activation::Sigmoid => self.norm.forward_gated_to(out, (&projected, Gate::Sigmoid), dtype),
            act => {
                let gate = act.forward_f32(&projected)?;
                (self.norm.forward_to(out, DType::F32)?.flatten_from(2)? * gate)?.to_dtype(dtype)
            }
        }
    }
}
