//! The end of a gated layer: normalise each head, then gate it.

use crate::nn::heads::Heads;
use crate::nn::{Activation, Linear, RmsNorm};
use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

/// `rms_norm(o) * gate_fn(g_proj(x))` for each head, computed in f32; without a gate, the norm alone.
#[derive(Debug, Clone)]
pub(crate) struct OutputNorm {
    norm: RmsNorm,
    gate: Option<(Linear, Activation)>,
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

impl OutputNorm {
    pub fn new(cfg: &OutputNormConfig, heads: &Heads, vb: &VarBuilder) -> Result<Self> {
        // The authors' fused kernel does norm and swish gate together, and its weight has a name of its own.
        let fused = cfg.fuse_norm && cfg.gate_fn == Some(Activation::Silu);
        let name = if fused { "g_norm_swish_gate" } else { "g_norm" };
        let norm = RmsNorm::new(
            heads.head_v_dim,
            cfg.norm_eps,
            cfg.elementwise_affine,
            vb.pp(name),
        )?;
        let gate = match cfg.gate_fn {
            Some(gate_fn) => {
                let vb = vb.pp("g_proj");
                let proj = Linear::new(heads.hidden_size, heads.value_dim(), false, cfg.stdev, vb)?;
                Some((proj, gate_fn))
            }
            None => None,
        };
        Ok(Self { norm, gate })
    }

    /// `out: [B, T, H, V]` and the layer's input `xs: [B, T, hidden_size]` to `[B, T, H * V]`.
    pub fn forward(&self, out: &Tensor, xs: &Tensor) -> Result<Tensor> {
        let mut ys = self.norm.forward_f32(out)?.flatten_from(2)?;
        if let Some((proj, gate_fn)) = &self.gate {
            let gate = proj.forward(xs)?.to_dtype(DType::F32)?;
            ys = (ys * gate_fn.forward_f32(&gate)?)?;
        }
        ys.to_dtype(xs.dtype())
    }
}
