//! The end of a layer: normalise each head, then gate it.

use crate::nn::fused::Gate;
use crate::nn::heads::Heads;
use crate::nn::{Activation, Linear, RmsNorm};
use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

/// `rms_norm(o) * gate_fn(gate)` for each head, computed in f32; without a gate, the norm alone.
#[derive(Debug, Clone)]
pub(crate) struct OutputNorm {
    norm: RmsNorm,
    gate: Option<(Projection, Activation)>,
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

/// What makes a gate of the layer's input.
#[derive(Debug, Clone)]
pub(crate) enum Projection {
    Full(Linear),
    /// Through a few channels in between.
    LowRank([Linear; 2]),
}

impl Projection {
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        match self {
            Self::Full(linear) => linear.forward(xs),
            Self::LowRank([down, up]) => up.forward(&down.forward(xs)?),
        }
    }
}

impl OutputNorm {
    /// A norm named `g_norm`, or as its authors name it, and a gate made by `g_proj`.
    pub fn new(cfg: &OutputNormConfig, heads: &Heads, vb: &VarBuilder) -> Result<Self> {
        // The authors' fused kernel does norm and swish gate together, and its weight has a name of its own.
        let fused = cfg.fuse_norm && cfg.gate_fn == Some(Activation::Silu);
        let name = if fused { "g_norm_swish_gate" } else { "g_norm" };
        let norm = RmsNorm::new(heads.head_v_dim, cfg.norm_eps, cfg.elementwise_affine, vb.pp(name))?;
        let gate = match cfg.gate_fn {
            Some(gate_fn) => {
                let vb = vb.pp("g_proj");
                let proj = Linear::new(heads.hidden_size, heads.value_dim(), false, cfg.stdev, vb)?;
                Some((Projection::Full(proj), gate_fn))
            }
            None => None,
        };
        Ok(Self { norm, gate })
    }

    /// From its parts.
    pub fn from_parts(norm: RmsNorm, gate: Option<(Projection, Activation)>) -> Self {
        Self { norm, gate }
    }

    /// `out: [B, T, H, V]` and the layer's input `xs: [B, T, hidden_size]` to `[B, T, H * V]`.
    pub fn forward(&self, out: &Tensor, xs: &Tensor) -> Result<Tensor> {
        let Some((proj, gate_fn)) = &self.gate else {
            return self.norm.forward_to(out, xs.dtype())?.flatten_from(2);
        };
        let gate = proj.forward(xs)?;
        match gate_fn {
            Activation::Silu => self.norm.forward_gated_to(out, (&gate, Gate::Silu), xs.dtype()),
            Activation::Sigmoid => self.norm.forward_gated_to(out, (&gate, Gate::Sigmoid), xs.dtype()),
            _ => {
                let gate = gate_fn.forward_f32(&gate)?;
                (self.norm.forward_to(out, DType::F32)?.flatten_from(2)? * gate)?.to_dtype(xs.dtype())
            }
        }
    }
}
