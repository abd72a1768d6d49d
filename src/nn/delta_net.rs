//! DeltaNet ([Yang et al., 2024](https://arxiv.org/abs/2406.06484)).

use crate::nn::call::{Call, Mixer, public_methods};
use crate::nn::delta::{L2_EPS, beta_factor};
use crate::nn::fused::{self, Pointwise};
use crate::nn::heads::Heads;
use crate::nn::output_norm::{OutputGate, OutputNorm};
use crate::nn::qkv::{ConvShape, Projected, Qkv, Silu};
use crate::nn::rms_norm::l2_norm;
use crate::nn::short_conv::check_conv_size;
use crate::nn::{Activation, LayerCache, Linear, RmsNorm};
use crate::{Mode, Output, delta_rule};
use candle_core::{D, DType, Result, Tensor, bail};
use candle_nn::VarBuilder;

/// How a [`DeltaNet`] normalises queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum QkNorm {
    /// By the root of the sum of squares.
    #[default]
    L2,
    /// By the sum of absolute values.
    Sum,
}

impl QkNorm {
    /// The kind that a configuration calls `name`.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "l2" => Ok(Self::L2),
            "sum" => Ok(Self::Sum),
            _ => bail!("is \"{name}\", it must be one of l2, sum"),
        }
    }

    fn forward(self, xs: &Tensor) -> Result<Tensor> {
        if self == Self::L2 {
            return l2_norm(xs, L2_EPS);
        }
        let wide = xs.to_dtype(DType::F32)?;
        let sum = wide.abs()?.sum_keepdim(D::Minus1)?.maximum(1e-6)?;
        wide.broadcast_div(&sum)?.to_dtype(xs.dtype())
    }
}

/// What a [`DeltaNet`] layer is made from. The defaults are flash-linear-attention's.
#[derive(Debug, Clone, PartialEq)]
pub struct DeltaNetConfig {
    /// Width of input and output. Default: 1024.
    pub hidden_size: usize,
    /// Width of all query heads together, as a multiple of `hidden_size`. Default: 1.
    pub expand_k: f64,
    /// Width of all output heads together, as a multiple of `hidden_size`. Default: 1.
    pub expand_v: f64,
    /// Heads. Default: 4.
    pub num_heads: usize,
    /// Whether beta is learned from the input; without, it is 1. Default: yes.
    pub use_beta: bool,
    /// Whether the output is gated by a projection of the input, through SiLU. Default: no.
    pub use_gate: bool,
    /// A short convolution behind each of q, k and v. Default: yes.
    pub use_short_conv: bool,
    /// Its width. Default: 4.
    pub conv_size: usize,
    /// Whether it has a bias. Default: no.
    pub conv_bias: bool,
    /// Beta up to 2 instead of 1. Default: no.
    pub allow_neg_eigval: bool,
    /// The function on queries and keys. Default: SiLU.
    pub qk_activation: Activation,
    /// Their norm. Default: L2.
    pub qk_norm: QkNorm,
    /// Epsilon of the output norm. Default: 1e-5.
    pub norm_eps: f64,
    /// Deviation of fresh weights. Default: 0.02.
    pub initializer_range: f64,
}

impl Default for DeltaNetConfig {
    fn default() -> Self {
        Self {
            hidden_size: 1024,
            expand_k: 1.,
            expand_v: 1.,
            num_heads: 4,
            use_beta: true,
            use_gate: false,
            use_short_conv: true,
            conv_size: 4,
            conv_bias: false,
            allow_neg_eigval: false,
            qk_activation: Activation::Silu,
            qk_norm: QkNorm::L2,
            norm_eps: 1e-5,
            initializer_range: 0.02,
        }
    }
}

impl DeltaNetConfig {
    /// The sizes, or an error that names the field that is wrong.
    pub(crate) fn check(&self) -> Result<Heads> {
        check_conv_size(self.conv_size)?;
        Heads::new(self.hidden_size, self.expand_k, self.expand_v, self.num_heads, None)
    }
}

/// [`delta_rule`] on normalised queries and keys, then a norm on each head.
///
/// Parameters: `q_proj`, `k_proj`, `v_proj`, `b_proj`, `o_norm`, `o_proj`, `g_proj` with a gate, and `q_conv1d`,
/// `k_conv1d`, `v_conv1d` with short convolutions.
#[derive(Debug, Clone)]
pub struct DeltaNet {
    heads: Heads,
    qkv: Qkv,
    qk_activation: Activation,
    qk_norm: QkNorm,
    /// Whether beta is learned; where it is not, it is the largest.
    learns_beta: bool,
    beta_factor: f64,
    output_norm: OutputNorm,
    o_proj: Linear,
    mode: Mode,
}

impl DeltaNet {
    /// # Errors
    /// Sizes that do not divide, by the field's name; whatever `vb` has to say of a tensor.
    pub fn new(cfg: &DeltaNetConfig, vb: VarBuilder) -> Result<Self> {
        let heads = cfg.check()?;
        let (hidden, stdev) = (heads.hidden_size, cfg.initializer_range);
        let conv = cfg.use_short_conv.then_some(ConvShape { width: cfg.conv_size, bias: cfg.conv_bias });
        let silu = cfg.qk_activation == Activation::Silu;
        let linear = |name: &str, outputs| Linear::new(hidden, outputs, false, stdev, vb.pp(name));
        let gate_proj = cfg.use_gate.then(|| linear("g_proj", heads.value_dim())).transpose()?;
        let b_proj = cfg.use_beta.then(|| linear("b_proj", heads.num_heads)).transpose()?;
        let beside = gate_proj.into_iter().chain(b_proj);
        let gate = cfg.use_gate.then_some(OutputGate { up: None, act: Activation::Silu });
        let norm = RmsNorm::new(heads.head_v_dim, cfg.norm_eps, true, vb.pp("o_norm"))?;
        Ok(Self {
            qkv: Qkv::new(&(&heads).into(), conv, Silu::Of([silu, silu, true]), stdev, &vb, beside)?,
            // What is SiLU is done by the projections.
            qk_activation: if silu { Activation::Identity } else { cfg.qk_activation },
            qk_norm: cfg.qk_norm,
            learns_beta: cfg.use_beta,
            beta_factor: beta_factor(cfg.allow_neg_eigval),
            output_norm: OutputNorm::from_parts(norm, gate),
            o_proj: Linear::new(heads.value_dim(), hidden, false, stdev, vb.pp("o_proj"))?,
            heads,
            mode: Mode::Auto,
        })
    }
}

public_methods!(DeltaNet);

impl Mixer for DeltaNet {
    fn mix(&self, xs: &Tensor, call: Call) -> Result<Tensor> {
        let size = call.check(xs, self.heads.hidden_size)?;
        let Projected { q, k, v, conv, beside, .. } = self.qkv.forward(xs, &call)?;
        let mapped = |x: &Tensor| self.qk_norm.forward(&self.qk_activation.forward(x)?);
        let (beta, gate) = if self.learns_beta {
            let ([b], gate) = beside.split()?;
            (fused::scaled(self.beta_factor, Pointwise::Sigmoid, &b, None)?, gate)
        } else {
            let ([], gate) = beside.split()?;
            let shape = (size.0, size.1, self.heads.num_heads);
            (Tensor::full(self.beta_factor as f32, shape, xs.device())?, gate)
        };
        let options = call.options(self.mode);
        let Output { out, state } = delta_rule(&mapped(&q)?, &mapped(&k)?, &v, &beta, &options)?;
        call.finish(state, conv, size);
        self.o_proj.forward(&self.output_norm.forward(&out, gate, xs.dtype())?)
    }

    fn set_mode(&mut self, mode: Mode) {
        self.mode = mode;
    }
}
