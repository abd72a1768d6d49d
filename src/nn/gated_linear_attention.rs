//! Gated linear attention ([Yang et al., 2023](https://arxiv.org/abs/2312.06635)).

use crate::nn::call::{Call, Mixer, public_methods};
use crate::nn::fused::{self, Pointwise};
use crate::nn::heads::Heads;
use crate::nn::output_norm::{OutputNorm, OutputNormConfig};
use crate::nn::qkv::{ConvShape, Projected, Qkv, Silu};
use crate::nn::short_conv::check_conv_size;
use crate::nn::{Activation, LayerCache, Linear};
use crate::{Mode, Output, gla};
use candle_core::{Result, Tensor, bail};
use candle_nn::VarBuilder;

/// What a [`GatedLinearAttention`] layer is made from. The defaults are flash-linear-attention's.
#[derive(Debug, Clone, PartialEq)]
pub struct GatedLinearAttentionConfig {
    /// Width of input and output. Default: 1024.
    pub hidden_size: usize,
    /// Width of all query heads together, as a multiple of `hidden_size`. Default: 0.5.
    pub expand_k: f64,
    /// Width of all output heads together, as a multiple of `hidden_size`. Default: 1.
    pub expand_v: f64,
    /// Heads. Default: 4.
    pub num_heads: usize,
    /// Key-value heads, a divisor of `num_heads`; `None` means as many. Default: `None`.
    pub num_kv_heads: Option<usize>,
    /// A function on queries and keys. Default: `None`.
    pub feature_map: Option<Activation>,
    /// A short convolution behind each of q, k and v. Default: no.
    pub use_short_conv: bool,
    /// Its width. Default: 4.
    pub conv_size: usize,
    /// Whether it has a bias. Default: no.
    pub conv_bias: bool,
    /// Whether the output is gated by a projection of the input. Default: yes.
    pub use_output_gate: bool,
    /// The function on that gate. Default: SiLU.
    pub gate_fn: Activation,
    /// Whether the output norm has a weight. Default: yes.
    pub elementwise_affine: bool,
    /// Epsilon of the output norm. Default: 1e-5.
    pub norm_eps: f64,
    /// What the logarithms of the gates are divided by. Default: 16.
    pub gate_logit_normalizer: f64,
    /// Inner width of the two projections that make the gates. Default: 16.
    pub gate_low_rank_dim: usize,
    /// The least value of a gate's logarithm. Default: `None`.
    pub clamp_min: Option<f64>,
    /// Names the norm's weight `g_norm_swish_gate` when there is a SiLU gate, `g_norm` otherwise: a matter of the
    /// checkpoint's layout, not of the result. Default: yes.
    pub fuse_norm: bool,
    /// Deviation of fresh weights. Default: 0.02.
    pub initializer_range: f64,
}

impl Default for GatedLinearAttentionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 1024,
            expand_k: 0.5,
            expand_v: 1.,
            num_heads: 4,
            num_kv_heads: None,
            feature_map: None,
            use_short_conv: false,
            conv_size: 4,
            conv_bias: false,
            use_output_gate: true,
            gate_fn: Activation::Silu,
            elementwise_affine: true,
            norm_eps: 1e-5,
            gate_logit_normalizer: 16.,
            gate_low_rank_dim: 16,
            clamp_min: None,
            fuse_norm: true,
            initializer_range: 0.02,
        }
    }
}

impl GatedLinearAttentionConfig {
    /// The sizes, or an error that names the field that is wrong.
    pub(crate) fn check(&self) -> Result<Heads> {
        if self.gate_low_rank_dim == 0 {
            bail!("gate_low_rank_dim is 0, it must be at least 1");
        }
        if !self.gate_logit_normalizer.is_normal() {
            bail!("gate_logit_normalizer is {}, it must be finite and not 0", self.gate_logit_normalizer);
        }
        check_conv_size(self.conv_size)?;
        Heads::new(self.hidden_size, self.expand_k, self.expand_v, self.num_heads, self.num_kv_heads)
    }
}

/// Gated linear attention: a decay for each key channel, learned from the input.
///
/// `g = log_sigmoid(gk_proj(x)) / gate_logit_normalizer`, then [`gla`], then a norm and a gate on each head.
/// Parameters: `q_proj`, `k_proj`, `v_proj`, `gk_proj.0`, `gk_proj.1`, `g_proj`, `o_proj`, `g_norm_swish_gate` or
/// `g_norm`, and `q_conv1d`, `k_conv1d`, `v_conv1d` with short convolutions.
#[derive(Debug, Clone)]
pub struct GatedLinearAttention {
    heads: Heads,
    qkv: Qkv,
    feature_map: Option<Activation>,
    /// From the few channels that the input is projected to for the decay.
    gk_up: Linear,
    gate_logit_normalizer: f64,
    clamp_min: Option<f64>,
    output_norm: OutputNorm,
    o_proj: Linear,
    mode: Mode,
}

impl GatedLinearAttention {
    /// # Errors
    /// Sizes that do not divide, by the field's name; whatever `vb` has to say of a tensor.
    pub fn new(cfg: &GatedLinearAttentionConfig, vb: VarBuilder) -> Result<Self> {
        let heads = cfg.check()?;
        let stdev = cfg.initializer_range;
        let conv = cfg.use_short_conv.then_some(ConvShape { width: cfg.conv_size, bias: cfg.conv_bias });
        let output_norm = OutputNormConfig {
            gate_fn: cfg.use_output_gate.then_some(cfg.gate_fn),
            elementwise_affine: cfg.elementwise_affine,
            norm_eps: cfg.norm_eps,
            fuse_norm: cfg.fuse_norm,
            stdev,
        };
        let (rank, gates) = (cfg.gate_low_rank_dim, heads.num_kv_heads * heads.head_k_dim);
        let (output_norm, gate_proj) = OutputNorm::new(&output_norm, &heads, &vb)?;
        let gk_down = Linear::new(heads.hidden_size, rank, false, stdev, vb.pp("gk_proj.0"))?;
        let beside = gate_proj.into_iter().chain([gk_down]);
        Ok(Self {
            qkv: Qkv::new(&(&heads).into(), conv, Silu::WithConvolution, stdev, &vb, beside)?,
            feature_map: cfg.feature_map,
            gk_up: Linear::new(rank, gates, true, stdev, vb.pp("gk_proj.1"))?,
            gate_logit_normalizer: cfg.gate_logit_normalizer,
            clamp_min: cfg.clamp_min,
            output_norm,
            o_proj: Linear::new(heads.value_dim(), heads.hidden_size, false, stdev, vb.pp("o_proj"))?,
            heads,
            mode: Mode::Auto,
        })
    }

    /// The logarithms of the decays, `[B, T, num_kv_heads, K]`, f32: they add up over the whole sequence, where 16 bits
    /// would not do.
    fn gates(&self, gk: &Tensor) -> Result<Tensor> {
        let (batch, tokens, _) = gk.dims3()?;
        let factor = self.gate_logit_normalizer.recip();
        let (logits, bias) = self.gk_up.forward_and_bias(gk)?;
        let mut g = fused::scaled(factor, Pointwise::LogSigmoid, &logits, bias)?;
        if let Some(least) = self.clamp_min {
            g = g.maximum(least)?;
        }
        g.reshape((batch, tokens, self.heads.num_kv_heads, self.heads.head_k_dim))
    }
}

public_methods!(GatedLinearAttention);

impl Mixer for GatedLinearAttention {
    fn mix(&self, xs: &Tensor, call: Call) -> Result<Tensor> {
        let size = call.check(xs, self.heads.hidden_size)?;
        let projected = self.qkv.forward(xs, &call)?;
        let Projected { q, k, v, conv, beside, .. } = projected.mapped(self.feature_map)?;
        let ([gk], gate) = beside.split()?;
        let [k, v, g] =
            [self.heads.repeat(&k)?, self.heads.repeat(&v)?, self.heads.repeat(&self.gates(&gk)?)?];
        let Output { out, state } = gla(&q, &k, &v, &g, &call.options(self.mode))?;
        call.finish(state, conv, size);
        self.o_proj.forward(&self.output_norm.forward(&out, gate, xs.dtype())?)
    }

    fn set_mode(&mut self, mode: Mode) {
        self.mode = mode;
    }
}
