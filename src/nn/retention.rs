//! Multi-scale retention ([Sun et al., 2023](https://arxiv.org/abs/2307.08621)).

use crate::nn::call::{Call, Mixer, public_methods};
use crate::nn::heads::Heads;
use crate::nn::output_norm::{OutputNorm, OutputNormConfig};
use crate::nn::qkv::{ConvShape, Projected, Qkv, Silu};
use crate::nn::short_conv::check_conv_size;
use crate::nn::{Activation, LayerCache, Linear, RotaryEmbedding};
use crate::{Mode, Output, retention};
use candle_core::{Result, Tensor, bail};
use candle_nn::VarBuilder;

/// The base of the rotary frequencies, which no configuration changes.
const ROTARY_BASE: f64 = 10000.;

/// What a [`MultiScaleRetention`] layer is made from. The defaults are flash-linear-attention's.
#[derive(Debug, Clone, PartialEq)]
pub struct MultiScaleRetentionConfig {
    /// Width of input and output. Default: 1024.
    pub hidden_size: usize,
    /// Width of all query heads together, as a multiple of `hidden_size`. Default: 1.
    pub expand_k: f64,
    /// Width of all output heads together, as a multiple of `hidden_size`. Default: 2.
    pub expand_v: f64,
    /// Heads. Default: 8.
    pub num_heads: usize,
    /// Key-value heads, a divisor of `num_heads`; `None` means as many. Default: `None`.
    pub num_kv_heads: Option<usize>,
    /// A function on queries and keys, before the rotation. Default: `None`.
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
    /// Names the norm's weight `g_norm_swish_gate` when there is a SiLU gate, `g_norm` otherwise: a matter of the
    /// checkpoint's layout, not of the result. Default: yes.
    pub fuse_norm: bool,
    /// Deviation of fresh weights. Default: 0.02.
    pub initializer_range: f64,
}

impl Default for MultiScaleRetentionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 1024,
            expand_k: 1.,
            expand_v: 2.,
            num_heads: 8,
            num_kv_heads: None,
            feature_map: None,
            use_short_conv: false,
            conv_size: 4,
            conv_bias: false,
            use_output_gate: true,
            gate_fn: Activation::Silu,
            elementwise_affine: true,
            norm_eps: 1e-5,
            fuse_norm: true,
            initializer_range: 0.02,
        }
    }
}

impl MultiScaleRetentionConfig {
    /// The sizes, or an error that names the field that is wrong.
    pub(crate) fn check(&self) -> Result<Heads> {
        check_conv_size(self.conv_size)?;
        let heads =
            Heads::new(self.hidden_size, self.expand_k, self.expand_v, self.num_heads, self.num_kv_heads)?;
        if !heads.head_k_dim.is_multiple_of(2) {
            bail!(
                "expand_k is {} and num_heads {}: a head has {} key channels, it must have an even number to be rotated",
                self.expand_k,
                self.num_heads,
                heads.head_k_dim
            );
        }
        Ok(heads)
    }
}

/// Retention: rotated queries and keys, a constant decay `1 - 2^(-5-h)` in head h, a norm and a gate on each head.
///
/// Parameters: `q_proj`, `k_proj`, `v_proj`, `g_proj`, `o_proj`, `g_norm_swish_gate` or `g_norm`, and `q_conv1d`,
/// `k_conv1d`, `v_conv1d` with short convolutions.
#[derive(Debug, Clone)]
pub struct MultiScaleRetention {
    heads: Heads,
    qkv: Qkv,
    feature_map: Option<Activation>,
    rotary: RotaryEmbedding,
    log_decay: Tensor,
    output_norm: OutputNorm,
    o_proj: Linear,
    mode: Mode,
}

impl MultiScaleRetention {
    /// # Errors
    /// Sizes that do not divide, by the field's name; a head with an odd number of key channels; whatever `vb` has to
    /// say of a tensor.
    pub fn new(cfg: &MultiScaleRetentionConfig, vb: VarBuilder) -> Result<Self> {
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
        // ln_1p keeps the decay of the later heads, where 1 - 2^(-5-h) rounds to 1.
        let log_decay = |head| (-(-5. - head as f64).exp2()).ln_1p() as f32;
        let log_decay: Vec<f32> = (0..heads.num_heads).map(log_decay).collect();
        let (output_norm, gate_proj) = OutputNorm::new(&output_norm, &heads, &vb)?;
        Ok(Self {
            qkv: Qkv::new(&(&heads).into(), conv, Silu::WithConvolution, stdev, &vb, gate_proj)?,
            feature_map: cfg.feature_map,
            rotary: RotaryEmbedding::new(heads.head_k_dim, ROTARY_BASE)?,
            log_decay: Tensor::from_vec(log_decay, heads.num_heads, vb.device())?,
            output_norm,
            o_proj: Linear::new(heads.value_dim(), heads.hidden_size, false, stdev, vb.pp("o_proj"))?,
            heads,
            mode: Mode::Auto,
        })
    }
}

public_methods!(MultiScaleRetention);

impl Mixer for MultiScaleRetention {
    fn mix(&self, xs: &Tensor, call: Call) -> Result<Tensor> {
        let size = call.check(xs, self.heads.hidden_size)?;
        let projected = self.qkv.forward(xs, &call)?;
        let Projected { q, k, v, conv, beside, .. } = projected.mapped(self.feature_map)?;
        let ([], gate) = beside.split()?;
        let positions = call.positions(size.0, size.1);
        let [q, k] = self.rotary.rotate([&q, &k], &positions)?;
        let k = self.heads.repeat(&k)?;
        let v = self.heads.repeat(&v)?;
        let Output { out, state } = retention(&q, &k, &v, &self.log_decay, &call.options(self.mode))?;
        call.finish(state, conv, size);
        self.o_proj.forward(&self.output_norm.forward(&out, gate, xs.dtype())?)
    }

    fn set_mode(&mut self, mode: Mode) {
        self.mode = mode;
    }
}
