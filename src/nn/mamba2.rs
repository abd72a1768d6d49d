//! Mamba-2 ([Dao and Gu, 2024](https://arxiv.org/abs/2405.21060)).

use crate::nn::call::{Call, Mixer, public_methods};
use crate::nn::decay::{Decay, DecayRange, check_range};
use crate::nn::fused::{self, Gate};
use crate::nn::heads::{MAX_SIZE, check_size};
use crate::nn::short_conv::check_conv_size;
use crate::nn::{Activation, LayerCache, Linear, ShortConvolution};
use crate::{Mode, Output, simple_gla};
use candle_core::{D, DType, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};

/// What a [`Mamba2`] layer is made from. The defaults are flash-linear-attention's.
#[derive(Debug, Clone, PartialEq)]
pub struct Mamba2Config {
    /// Width of input and output. Default: 2048.
    pub hidden_size: usize,
    /// Width of all heads together, as a multiple of `hidden_size`. Default: 2.
    pub expand: f64,
    /// Width of a head, a divisor of that. Default: 64.
    pub head_dim: usize,
    /// Channels of B and C, what are keys and queries elsewhere. Default: 128.
    pub state_size: usize,
    /// How many different B and C there are; heads next to each other share them. Default: 1.
    pub n_groups: usize,
    /// Width of the short convolution. Default: 4.
    pub conv_kernel: usize,
    /// Whether it has a bias. Default: yes.
    pub use_conv_bias: bool,
    /// Fresh weights of the convolution spread like numbers that are even within this of 0; `None` means as other
    /// weights. Default: `None`.
    pub conv_init: Option<f64>,
    /// The function behind the convolution. Default: SiLU.
    pub hidden_act: Activation,
    /// Whether there is a norm at the end, one for each group. Default: yes.
    pub rmsnorm: bool,
    /// Whether the norm comes before the gate. Default: no.
    pub norm_before_gate: bool,
    /// Epsilon of the norm. Default: 1e-5.
    pub norm_eps: f64,
    /// Whether D is one number a channel, not one a head. Default: no.
    pub d_has_hdim: bool,
    /// The least and the largest time step. Default: 0 and infinity.
    pub dt_limit: [f64; 2],
    /// Whether the projections have biases. Default: no.
    pub use_bias: bool,
    /// Where A is when fresh. Default: 1 to 16.
    pub a_init_range: [f64; 2],
    /// Where time steps are when fresh. Default: 0.001 to 0.1.
    pub dt_init_range: [f64; 2],
    /// Deviation of fresh weights. Default: 0.02.
    pub initializer_range: f64,
    /// Deviation of the fresh output projection. Default: 0.02.
    pub out_proj_range: f64,
}

impl Default for Mamba2Config {
    fn default() -> Self {
        Self {
            hidden_size: 2048,
            expand: 2.,
            head_dim: 64,
            state_size: 128,
            n_groups: 1,
            conv_kernel: 4,
            use_conv_bias: true,
            conv_init: None,
            hidden_act: Activation::Silu,
            rmsnorm: true,
            norm_before_gate: false,
            norm_eps: 1e-5,
            d_has_hdim: false,
            dt_limit: [0., f64::INFINITY],
            use_bias: false,
            a_init_range: [1., 16.],
            dt_init_range: [1e-3, 0.1],
            initializer_range: 0.02,
            out_proj_range: 0.02,
        }
    }
}

/// The sizes, checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    hidden: usize,
    /// Of all heads.
    inner: usize,
    pub heads: usize,
    groups: usize,
    state: usize,
}

impl Sizes {
    /// Channels of x, B and C together, which is what the convolution is over.
    fn conv(&self) -> usize {
        self.inner + 2 * self.groups * self.state
    }
}

impl Mamba2Config {
    /// The sizes, or an error that names the field that is wrong.
    pub(crate) fn check(&self) -> Result<Sizes> {
        for (name, size) in [
            ("hidden_size", self.hidden_size),
            ("head_dim", self.head_dim),
            ("state_size", self.state_size),
            ("n_groups", self.n_groups),
        ] {
            check_size(name, size)?;
        }
        let width = self.hidden_size as f64 * self.expand;
        if !(1. ..=MAX_SIZE as f64).contains(&width) {
            bail!(
                "expand is {}: hidden_size * expand is {width}, it must be from 1 to {MAX_SIZE}",
                self.expand
            );
        }
        // Rounded down, as the authors do.
        let inner = width as usize;
        if !inner.is_multiple_of(self.head_dim) {
            bail!("head_dim is {}, it must divide hidden_size * expand, which is {inner}", self.head_dim);
        }
        let heads = inner / self.head_dim;
        if !heads.is_multiple_of(self.n_groups) {
            bail!("n_groups is {}, it must divide the number of heads, which is {heads}", self.n_groups);
        }
        check_conv_size(self.conv_kernel)?;
        let [least, most] = self.dt_limit;
        if !(least >= 0. && least <= most) {
            bail!(
                "dt_limit is [{least}, {most}], it must be two numbers from 0 up, the second not below the first"
            );
        }
        check_range("A_init_range", self.a_init_range)?;
        check_range("the range of dt_min and dt_max", self.dt_init_range)?;
        let (hidden, groups, state) = (self.hidden_size, self.n_groups, self.state_size);
        Ok(Sizes { hidden, inner, heads, groups, state })
    }
}

/// A selective state space: [`simple_gla`] with queries C, keys B and values `dt * x`, whose decay is
/// `g = -exp(A_log) * dt` with the time step `dt = softplus(dt + dt_bias)`, and `D * x` added to the output.
///
/// Parameters: `in_proj` (gate, x, B, C and dt), `conv1d` (over x, B and C), `A_log`, `D`, `dt_bias`, `norm`, `out_proj`.
#[derive(Debug, Clone)]
pub struct Mamba2 {
    sizes: Sizes,
    in_proj: Linear,
    conv: ShortConvolution,
    activation: Activation,
    decay: Decay,
    d: Tensor,
    dt_limit: [f64; 2],
    norm: Option<GatedNorm>,
    out_proj: Linear,
    mode: Mode,
}

/// The norm at the end, with the gate in front of it or behind.
#[derive(Debug, Clone)]
struct GatedNorm {
    weight: Tensor,
    eps: f64,
    groups: usize,
    before_gate: bool,
}

impl GatedNorm {
    /// `ys` and `gate`: `[B, T, inner]`, f32.
    fn forward(&self, ys: &Tensor, gate: &Tensor) -> Result<Tensor> {
        let weight = self.weight.to_dtype(DType::F32)?;
        if self.before_gate && self.groups == 1 {
            return fused::rms_norm_gated(ys, &weight, (gate, Gate::Silu), self.eps, DType::F32);
        }
        if self.before_gate {
            return fused::gated(&self.normalize(ys, &weight)?, (gate, Gate::Silu), DType::F32);
        }
        self.normalize(&fused::gated(ys, (gate, Gate::Silu), DType::F32)?, &weight)
    }

    /// Each group by itself; the weight is one number a channel of all of them.
    fn normalize(&self, ys: &Tensor, weight: &Tensor) -> Result<Tensor> {
        if self.groups == 1 {
            return fused::rms_norm(ys, weight, self.eps, DType::F32);
        }
        let (batch, tokens, inner) = ys.dims3()?;
        let ys = ys.reshape((batch, tokens, self.groups, inner / self.groups))?;
        let ones = Tensor::ones(inner / self.groups, DType::F32, ys.device())?;
        fused::rms_norm(&ys, &ones, self.eps, DType::F32)?.flatten_from(2)?.broadcast_mul(weight)
    }
}

impl Mamba2 {
    /// # Errors
    /// Sizes that do not divide, by the field's name; whatever `vb` has to say of a tensor.
    pub fn new(cfg: &Mamba2Config, vb: VarBuilder) -> Result<Self> {
        let sizes = cfg.check()?;
        let Sizes { hidden, inner, heads, groups, .. } = sizes;
        let stdev = cfg.initializer_range;
        let range = DecayRange { a: cfg.a_init_range, dt: cfg.dt_init_range };
        let norm = match cfg.rmsnorm {
            true => Some(GatedNorm {
                weight: vb.pp("norm").get_with_hints(inner, "weight", Init::Const(1.))?,
                eps: cfg.norm_eps,
                groups,
                before_gate: cfg.norm_before_gate,
            }),
            false => None,
        };
        // Even within a bound is as wide as normal with bound / sqrt(3).
        let conv_stdev = cfg.conv_init.map_or(stdev, |bound| bound.abs() / 3f64.sqrt());
        let (projected, conv) = (inner + sizes.conv() + heads, sizes.conv());
        let conv =
            ShortConvolution::new(conv, cfg.conv_kernel, cfg.use_conv_bias, conv_stdev, vb.pp("conv1d"))?;
        Ok(Self {
            in_proj: Linear::new(hidden, projected, cfg.use_bias, stdev, vb.pp("in_proj"))?,
            conv: conv.with_silu(cfg.hidden_act == Activation::Silu),
            activation: cfg.hidden_act,
            decay: Decay::new(heads, heads, range, &vb)?,
            d: vb.get_with_hints(if cfg.d_has_hdim { inner } else { heads }, "D", Init::Const(1.))?,
            dt_limit: cfg.dt_limit,
            norm,
            out_proj: Linear::new(inner, hidden, cfg.use_bias, cfg.out_proj_range, vb.pp("out_proj"))?,
            sizes,
            mode: Mode::Auto,
        })
    }

    /// The time step of every token and head, `[B, T, heads]`, f32.
    fn time_step(&self, dt: &Tensor) -> Result<Tensor> {
        let dt = self.decay.time_step(dt)?;
        let [least, most] = self.dt_limit;
        let dt = if least > 0. { dt.maximum(least)? } else { dt };
        if most.is_finite() { dt.minimum(most) } else { Ok(dt) }
    }

    /// `D * x` of `x: [B, T, heads, head_dim]`, f32.
    fn skip(&self, x: &Tensor) -> Result<Tensor> {
        let d = self.d.to_dtype(DType::F32)?;
        x.to_dtype(DType::F32)?.broadcast_mul(&d.reshape((self.sizes.heads, ()))?)
    }

    fn gate(&self, ys: &Tensor, gate: &Tensor) -> Result<Tensor> {
        let gate = gate.to_dtype(DType::F32)?;
        match &self.norm {
            Some(norm) => norm.forward(ys, &gate),
            None => ys * self.activation.forward_f32(&gate)?,
        }
    }
}

public_methods!(Mamba2);

impl Mixer for Mamba2 {
    fn mix(&self, xs: &Tensor, call: Call) -> Result<Tensor> {
        let Sizes { hidden, inner, heads, groups, state } = self.sizes;
        let size @ (batch, tokens) = call.check(xs, hidden)?;
        let projected = self.in_proj.forward(xs)?;
        let part = |from, len| projected.narrow(D::Minus1, from, len);
        let (gate, dt) = (part(0, inner)?, part(inner + self.sizes.conv(), heads)?);
        let xbc = part(inner, self.sizes.conv())?;
        let (mut xbc, past) = self.conv.run(&xbc, call.past(0, 1)?, call.cu_seqlens())?;
        if self.activation != Activation::Silu {
            xbc = self.activation.forward(&xbc)?;
        }
        let part =
            |from, len, heads| xbc.narrow(D::Minus1, from, len)?.reshape((batch, tokens, heads, len / heads));
        let x = part(0, inner, heads)?;
        let (b, c) =
            (part(inner, groups * state, groups)?, part(inner + groups * state, groups * state, groups)?);
        let dt = self.time_step(&dt)?;
        let g = dt.broadcast_mul(&self.decay.rate()?.neg()?)?;
        let v = x.to_dtype(DType::F32)?.broadcast_mul(&dt.unsqueeze(D::Minus1)?)?.to_dtype(xs.dtype())?;
        let options = call.options(self.mode).with_scale(1.);
        let Output { out, state } = simple_gla(&c, &b, &v, &g, &options)?;
        call.finish(state, vec![past], size);
        let ys = (out.to_dtype(DType::F32)? + self.skip(&x)?)?.flatten_from(2)?;
        self.out_proj.forward(&self.gate(&ys, &gate)?.to_dtype(xs.dtype())?)
    }

    fn set_mode(&mut self, mode: Mode) {
        self.mode = mode;
    }
}
