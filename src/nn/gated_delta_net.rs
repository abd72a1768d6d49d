//! Gated DeltaNet ([Yang et al., 2024](https://arxiv.org/abs/2412.06464)).

use crate::nn::call::{Call, Mixer, public_methods};
use crate::nn::decay::{Decay, DecayRange};
use crate::nn::delta::{DeltaHeads, L2_EPS, beta_factor};
use crate::nn::output_norm::{OutputGate, OutputNorm};
use crate::nn::qkv::{ConvShape, Projected, Qkv};
use crate::nn::short_conv::check_conv_size;
use crate::nn::{Activation, LayerCache, Linear, RmsNorm};
use crate::{Mode, Output, gated_delta_rule};
use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

/// What a [`GatedDeltaNet`] layer is made from. The defaults are flash-linear-attention's.
#[derive(Debug, Clone, PartialEq)]
pub struct GatedDeltaNetConfig {
    /// Width of input and output. Default: 2048.
    pub hidden_size: usize,
    /// Key channels of a head. Default: 256.
    pub head_dim: usize,
    /// Value channels of a head, as a multiple of `head_dim`. Default: 2.
    pub expand_v: f64,
    /// Heads. Default: 6.
    pub num_heads: usize,
    /// Value heads, a multiple of `num_heads`; `None` means as many. Default: `None`.
    pub num_v_heads: Option<usize>,
    /// Whether the output is gated by a projection of the input. Default: yes.
    pub use_gate: bool,
    /// The function on that gate. Default: SiLU.
    pub gate_fn: Activation,
    /// A short convolution behind each of q, k and v. Default: yes.
    pub use_short_conv: bool,
    /// Its width. Default: 4.
    pub conv_size: usize,
    /// The function behind it. Default: SiLU.
    pub conv_act: Activation,
    /// Whether it has a bias. Default: no.
    pub conv_bias: bool,
    /// Beta up to 2 instead of 1. Default: no.
    pub allow_neg_eigval: bool,
    /// Epsilon of the output norm. Default: 1e-5.
    pub norm_eps: f64,
    /// Deviation of fresh weights. Default: 0.02.
    pub initializer_range: f64,
}

impl Default for GatedDeltaNetConfig {
    fn default() -> Self {
        Self {
            hidden_size: 2048,
            head_dim: 256,
            expand_v: 2.,
            num_heads: 6,
            num_v_heads: None,
            use_gate: true,
            gate_fn: Activation::Silu,
            use_short_conv: true,
            conv_size: 4,
            conv_act: Activation::Silu,
            conv_bias: false,
            allow_neg_eigval: false,
            norm_eps: 1e-5,
            initializer_range: 0.02,
        }
    }
}

impl GatedDeltaNetConfig {
    /// The sizes, or an error that names the field that is wrong.
    pub(crate) fn check(&self) -> Result<DeltaHeads> {
        check_conv_size(self.conv_size)?;
        let heads = (self.num_heads, self.num_v_heads);
        DeltaHeads::new(self.hidden_size, heads, (self.head_dim, self.expand_v))
    }
}

/// [`gated_delta_rule`] on normalised queries and keys, then a norm and a gate on each head.
///
/// `g = -exp(A_log) * softplus(a_proj(x) + dt_bias)` for each value head. Parameters: `q_proj`, `k_proj`, `v_proj`,
/// `a_proj`, `b_proj`, `g_proj`, `A_log`, `dt_bias`, `o_norm`, `o_proj`, and `q_conv1d`, `k_conv1d`, `v_conv1d` with short
/// convolutions. Early checkpoints have a `D` too, which no layer has ever used.
#[derive(Debug, Clone)]
pub struct GatedDeltaNet {
    heads: DeltaHeads,
    qkv: Qkv,
    /// What follows the projections, if it is not a part of them.
    act: Option<Activation>,
    decay: Decay,
    beta_factor: f64,
    output_norm: OutputNorm,
    o_proj: Linear,
    mode: Mode,
}

impl GatedDeltaNet {
    /// # Errors
    /// Sizes that do not divide, by the field's name; whatever `vb` has to say of a tensor.
    pub fn new(cfg: &GatedDeltaNetConfig, vb: VarBuilder) -> Result<Self> {
        let heads = cfg.check()?;
        let (hidden, v_heads, stdev) = (heads.hidden_size, heads.num_v_heads, cfg.initializer_range);
        let conv = cfg.use_short_conv.then_some(ConvShape { width: cfg.conv_size, bias: cfg.conv_bias });
        let silu = cfg.conv_act == Activation::Silu;
        let linear = |name: &str, outputs| Linear::new(hidden, outputs, false, stdev, vb.pp(name));
        let gate_proj = cfg.use_gate.then(|| linear("g_proj", heads.value_dim())).transpose()?;
        let others = [linear("a_proj", v_heads)?, linear("b_proj", v_heads)?];
        let gate = cfg.use_gate.then_some(OutputGate { up: None, act: cfg.gate_fn });
        let norm = RmsNorm::new(heads.head_v_dim, cfg.norm_eps, true, vb.pp("o_norm"))?;
        Ok(Self {
            qkv: heads.qkv(conv, silu, stdev, &vb, gate_proj.into_iter().chain(others))?,
            act: (!silu).then_some(cfg.conv_act),
            decay: Decay::new(v_heads, v_heads, DecayRange::default(), &vb)?,
            beta_factor: beta_factor(cfg.allow_neg_eigval),
            output_norm: OutputNorm::from_parts(norm, gate),
            o_proj: Linear::new(heads.value_dim(), hidden, false, stdev, vb.pp("o_proj"))?,
            heads,
            mode: Mode::Auto,
        })
    }
}

public_methods!(GatedDeltaNet);

impl Mixer for GatedDeltaNet {
    fn mix(&self, xs: &Tensor, call: Call) -> Result<Tensor> {
        let size = call.check(xs, self.heads.hidden_size)?;
        let projected = self.qkv.forward(xs, &call)?.activated(self.act)?;
        let Projected { q, k, v, conv, beside, .. } = projected.normed(L2_EPS)?;
        let ([a, b], gate) = beside.split()?;
        let (g, beta) = self.decay.log_decay_and_beta(&a, (self.beta_factor, &b))?;
        let Output { out, state } = gated_delta_rule(&q, &k, &v, &g, &beta, &call.options(self.mode))?;
        call.finish(state, conv, size);
        self.o_proj.forward(&self.output_norm.forward(&out, gate, xs.dtype())?)
    }

    fn set_mode(&mut self, mode: Mode) {
        self.mode = mode;
    }
}
