//! Kimi delta attention ([Kimi Team, 2025](https://arxiv.org/abs/2510.26692)).

use crate::nn::call::{Call, Mixer, public_methods};
use crate::nn::decay::{Decay, DecayRange};
use crate::nn::delta::{DeltaHeads, L2_EPS, beta_factor};
use crate::nn::fused::{self, Pointwise};
use crate::nn::output_norm::{OutputGate, OutputNorm};
use crate::nn::qkv::{ConvShape, Projected, Qkv};
use crate::nn::short_conv::check_conv_size;
use crate::nn::{Activation, LayerCache, Linear, RmsNorm};
use crate::{Mode, Output, kda};
use candle_core::{D, Result, Shape, Tensor, bail};
use candle_nn::VarBuilder;

/// What the parameters of a [`KimiDeltaAttention`] layer are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KdaLayout {
    /// As flash-linear-attention has them: `f_proj.0`, `f_proj.1`, `g_proj.0` and `g_proj.1`, which has a bias.
    #[default]
    Fla,
    /// As Kimi Linear has them: `f_a_proj`, `f_b_proj`, `g_a_proj` and `g_b_proj`, which has none, and `A_log` of shape
    /// `[1, 1, heads, 1]`.
    KimiLinear,
}

/// What a [`KimiDeltaAttention`] layer is made from. The defaults are flash-linear-attention's.
#[derive(Debug, Clone, PartialEq)]
pub struct KimiDeltaAttentionConfig {
    /// Width of input and output. Default: 2048.
    pub hidden_size: usize,
    /// Key channels of a head. Default: 128.
    pub head_dim: usize,
    /// Value channels of a head, as a multiple of `head_dim`. Default: 1.
    pub expand_v: f64,
    /// Heads. Default: 16.
    pub num_heads: usize,
    /// Value heads, a multiple of `num_heads`; `None` means as many. Default: `None`.
    pub num_v_heads: Option<usize>,
    /// A short convolution behind each of q, k and v. Default: yes.
    pub use_short_conv: bool,
    /// Its width. Default: 4.
    pub conv_size: usize,
    /// Whether it has a bias. Default: no.
    pub conv_bias: bool,
    /// Beta up to 2 instead of 1. Default: no.
    pub allow_neg_eigval: bool,
    /// What the gates' logarithms stay above; below 0. `None` means that they may go anywhere. Default: `None`.
    pub lower_bound: Option<f64>,
    /// What the parameters are called. Default: as in flash-linear-attention.
    pub layout: KdaLayout,
    /// Epsilon of the output norm. Default: 1e-5.
    pub norm_eps: f64,
    /// Deviation of fresh weights. Default: 0.02.
    pub initializer_range: f64,
}

impl Default for KimiDeltaAttentionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 2048,
            head_dim: 128,
            expand_v: 1.,
            num_heads: 16,
            num_v_heads: None,
            use_short_conv: true,
            conv_size: 4,
            conv_bias: false,
            allow_neg_eigval: false,
            lower_bound: None,
            layout: KdaLayout::Fla,
            norm_eps: 1e-5,
            initializer_range: 0.02,
        }
    }
}

impl KimiDeltaAttentionConfig {
    /// The sizes, or an error that names the field that is wrong.
    pub(crate) fn check(&self) -> Result<DeltaHeads> {
        check_conv_size(self.conv_size)?;
        if let Some(bound) = self.lower_bound.filter(|bound| !(bound.is_finite() && *bound < 0.)) {
            bail!("lower_bound is {bound}, it must be a finite number below 0");
        }
        let heads = (self.num_heads, self.num_v_heads);
        DeltaHeads::new(self.hidden_size, heads, (self.head_dim, self.expand_v))
    }
}

/// [`kda`] on normalised queries and keys, then a norm and a sigmoid gate on each head.
///
/// `g = -exp(A_log) * softplus(f_proj(x) + dt_bias)` for each channel of each value head or, with a lower bound,
/// `g = lower_bound * sigmoid(exp(A_log) * (f_proj(x) + dt_bias))`. Parameters: `q_proj`, `k_proj`, `v_proj`, `f_proj.0`,
/// `f_proj.1`, `b_proj`, `g_proj.0`, `g_proj.1`, `A_log`, `dt_bias`, `o_norm`, `o_proj`, and `q_conv1d`, `k_conv1d`,
/// `v_conv1d` with short convolutions.
#[derive(Debug, Clone)]
pub struct KimiDeltaAttention {
    heads: DeltaHeads,
    qkv: Qkv,
    /// From the few channels that the input is projected to for it.
    f_up: Linear,
    decay: Decay,
    lower_bound: Option<f64>,
    beta_factor: f64,
    output_norm: OutputNorm,
    o_proj: Linear,
    mode: Mode,
}

impl KimiDeltaAttention {
    /// # Errors
    /// Sizes that do not divide, by the field's name; whatever `vb` has to say of a tensor.
    pub fn new(cfg: &KimiDeltaAttentionConfig, vb: VarBuilder) -> Result<Self> {
        let heads = cfg.check()?;
        let DeltaHeads { hidden_size: hidden, num_v_heads, head_k_dim, head_v_dim, .. } = heads;
        let stdev = cfg.initializer_range;
        let conv = cfg.use_short_conv.then_some(ConvShape { width: cfg.conv_size, bias: cfg.conv_bias });
        let fla = cfg.layout == KdaLayout::Fla;
        let low_rank = |name: &str, outputs, bias| -> Result<[Linear; 2]> {
            let [down, up] = match cfg.layout {
                KdaLayout::Fla => ["proj.0", "proj.1"],
                KdaLayout::KimiLinear => ["a_proj", "b_proj"],
            };
            let vb = |part: &str| vb.pp(format!("{name}_{part}"));
            Ok([
                Linear::new(hidden, head_v_dim, false, stdev, vb(down))?,
                Linear::new(head_v_dim, outputs, bias, stdev, vb(up))?,
            ])
        };
        let heads_shape: Shape = if fla { num_v_heads.into() } else { (1, 1, num_v_heads, 1).into() };
        let range = match cfg.lower_bound {
            Some(_) => DecayRange { a: [1., 1.], ..Default::default() },
            None => DecayRange::default(),
        };
        let norm = RmsNorm::new(head_v_dim, cfg.norm_eps, true, vb.pp("o_norm"))?;
        let [g_down, g_up] = low_rank("g", heads.value_dim(), fla)?;
        let [f_down, f_up] = low_rank("f", num_v_heads * head_k_dim, false)?;
        let b_proj = Linear::new(hidden, num_v_heads, false, stdev, vb.pp("b_proj"))?;
        let gate = OutputGate { up: Some(g_up), act: Activation::Sigmoid };
        Ok(Self {
            qkv: heads.qkv(conv, true, stdev, &vb, [g_down, f_down, b_proj])?,
            f_up,
            decay: Decay::shaped(heads_shape, num_v_heads * head_k_dim, range, &vb)?,
            lower_bound: cfg.lower_bound,
            beta_factor: beta_factor(cfg.allow_neg_eigval),
            output_norm: OutputNorm::from_parts(norm, Some(gate)),
            o_proj: Linear::new(heads.value_dim(), hidden, false, stdev, vb.pp("o_proj"))?,
            heads,
            mode: Mode::Auto,
        })
    }

    /// The logarithms of the decays, `[B, T, HV, K]`, and the betas, `[B, T, HV]`, both f32.
    fn gates(&self, f: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
        let (batch, tokens, _) = b.dims3()?;
        let shape = (batch, tokens, self.heads.num_v_heads, self.heads.head_k_dim);
        let f = self.f_up.forward(f)?;
        let Some(bound) = self.lower_bound else {
            let (g, beta) = self.decay.log_decay_and_beta(&f, (self.beta_factor, b))?;
            return Ok((g.reshape(shape)?, beta));
        };
        let rate = self.decay.rate()?.unsqueeze(D::Minus1)?;
        let f = self.decay.biased(&f)?.reshape(shape)?.broadcast_mul(&rate)?;
        let sigmoid = |factor, xs: &Tensor| fused::scaled(factor, Pointwise::Sigmoid, xs, None);
        Ok((sigmoid(bound, &f)?, sigmoid(self.beta_factor, b)?))
    }
}

public_methods!(KimiDeltaAttention);

impl Mixer for KimiDeltaAttention {
    fn mix(&self, xs: &Tensor, call: Call) -> Result<Tensor> {
        let size = call.check(xs, self.heads.hidden_size)?;
        let Projected { q, k, v, conv, beside, .. } = self.qkv.forward(xs, &call)?.normed(L2_EPS)?;
        let ([f, b], gate) = beside.split()?;
        let (g, beta) = self.gates(&f, &b)?;
        let Output { out, state } = kda(&q, &k, &v, &g, &beta, &call.options(self.mode))?;
        call.finish(state, conv, size);
        self.o_proj.forward(&self.output_norm.forward(&out, gate, xs.dtype())?)
    }

    fn set_mode(&mut self, mode: Mode) {
        self.mode = mode;
    }
}
