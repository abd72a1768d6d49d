//! Gated DeltaNet with its projections in one tensor or two, the form that Qwen3-Next and its successors have.

use crate::nn::call::{Call, Mixer, public_methods};
use crate::nn::decay::{Decay, DecayRange};
use crate::nn::delta::{DeltaHeads, L2_EPS};
use crate::nn::fused::Gate;
use crate::nn::heads::heads_from;
use crate::nn::linear::Projections;
use crate::nn::rms_norm::l2_norm;
use crate::nn::short_conv::check_conv_size;
use crate::nn::{Activation, LayerCache, Linear, RmsNorm, ShortConvolution};
use crate::{Mode, Output, gated_delta_rule};
use candle_core::{D, Result, Tensor};
use candle_nn::VarBuilder;

/// What lies together in the projections of a [`PackedGatedDeltaNet`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Packing {
    /// `in_proj_qkv` has all of q, then k, then v; `in_proj_z`, `in_proj_b` and `in_proj_a` are by themselves.
    #[default]
    ByKind,
    /// `in_proj_qkvz` has for each key head its q, its k, the v of its value heads and their z; `in_proj_ba` likewise.
    ByHead,
}

/// What a [`PackedGatedDeltaNet`] is made from. The defaults are those of Qwen3-Next.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedGatedDeltaNetConfig {
    /// Width of input and output. Default: 2048.
    pub hidden_size: usize,
    /// Heads of queries and keys. Default: 16.
    pub num_k_heads: usize,
    /// Heads of values, a multiple of `num_k_heads`. Default: 32.
    pub num_v_heads: usize,
    /// Channels of a head of queries or keys. Default: 128.
    pub head_k_dim: usize,
    /// Channels of a head of values. Default: 128.
    pub head_v_dim: usize,
    /// Width of the short convolution over q, k and v. Default: 4.
    pub conv_size: usize,
    /// The function behind it. Default: SiLU.
    pub conv_act: Activation,
    /// How the projections lie. Default: by kind.
    pub packing: Packing,
    /// Epsilon of the output norm. Default: 1e-6.
    pub norm_eps: f64,
    /// Deviation of fresh weights. Default: 0.02.
    pub initializer_range: f64,
}

impl Default for PackedGatedDeltaNetConfig {
    fn default() -> Self {
        Self {
            hidden_size: 2048,
            num_k_heads: 16,
            num_v_heads: 32,
            head_k_dim: 128,
            head_v_dim: 128,
            conv_size: 4,
            conv_act: Activation::Silu,
            packing: Packing::ByKind,
            norm_eps: 1e-6,
            initializer_range: 0.02,
        }
    }
}

impl PackedGatedDeltaNetConfig {
    /// The sizes, or an error that names the field that is wrong.
    pub(crate) fn check(&self) -> Result<DeltaHeads> {
        check_conv_size(self.conv_size)?;
        let heads = (self.num_k_heads, Some(self.num_v_heads));
        let ratio = self.head_v_dim as f64 / self.head_k_dim.max(1) as f64;
        DeltaHeads::new(self.hidden_size, heads, (self.head_k_dim, ratio))
    }
}

#[derive(Debug, Clone)]
enum PackedProjections {
    /// qkv, z, b and a
    ByKind(Projections),
    ByHead {
        qkvz: Linear,
        ba: Linear,
    },
}

/// What they make of the input: q, k and v side by side, the gate, and what beta and decay are made of.
struct Projected {
    qkv: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
}

impl PackedProjections {
    fn new(heads: &DeltaHeads, cfg: &PackedGatedDeltaNetConfig, vb: &VarBuilder) -> Result<Self> {
        let linear = |name: &str, outputs| {
            Linear::new(heads.hidden_size, outputs, false, cfg.initializer_range, vb.pp(name))
        };
        let (qkv, z) = (conv_dim(heads), heads.value_dim());
        Ok(match cfg.packing {
            Packing::ByKind => Self::ByKind(Projections::new(vec![
                linear("in_proj_qkv", qkv)?,
                linear("in_proj_z", z)?,
                linear("in_proj_b", heads.num_v_heads)?,
                linear("in_proj_a", heads.num_v_heads)?,
            ])?),
            Packing::ByHead => Self::ByHead {
                qkvz: linear("in_proj_qkvz", qkv + z)?,
                ba: linear("in_proj_ba", 2 * heads.num_v_heads)?,
            },
        })
    }

    fn forward(&self, heads: &DeltaHeads, xs: &Tensor) -> Result<Projected> {
        match self {
            Self::ByKind(projections) => {
                let [qkv, z, b, a] = projections.forward(xs)?;
                Ok(Projected { qkv, z, b, a })
            }
            Self::ByHead { qkvz, ba } => {
                let group = heads.num_v_heads / heads.num_heads;
                let (k, v) = (heads.head_k_dim, group * heads.head_v_dim);
                let qkvz = qkvz.forward_heads(xs, heads.num_heads)?;
                let ba = ba.forward_heads(xs, heads.num_heads)?;
                let part = |x: &Tensor, start, len| x.narrow(3, start, len)?.flatten_from(2);
                let [q, k, v] = [(0, k), (k, k), (2 * k, v)].map(|(start, len)| part(&qkvz, start, len));
                Ok(Projected {
                    qkv: Tensor::cat(&[q?, k?, v?], D::Minus1)?,
                    z: part(
                        &qkvz,
                        2 * heads.head_k_dim + group * heads.head_v_dim,
                        group * heads.head_v_dim,
                    )?,
                    b: part(&ba, 0, group)?,
                    a: part(&ba, group, group)?,
                })
            }
        }
    }
}

fn conv_dim(heads: &DeltaHeads) -> usize {
    2 * heads.num_heads * heads.head_k_dim + heads.value_dim()
}

/// [`gated_delta_rule`] on normalised queries and keys behind one short convolution, then a norm and a SiLU gate on each
/// head.
///
/// `g = -exp(A_log) * softplus(a + dt_bias)` and `beta = sigmoid(b)` for each value head. Parameters: the projections as
/// [`Packing`] says, `conv1d`, `A_log`, `dt_bias`, `norm`, `out_proj`.
#[derive(Debug, Clone)]
pub struct PackedGatedDeltaNet {
    heads: DeltaHeads,
    projections: PackedProjections,
    conv: ShortConvolution,
    /// What follows the convolution, if it is not a part of it.
    conv_act: Option<Activation>,
    decay: Decay,
    norm: RmsNorm,
    out_proj: Linear,
    mode: Mode,
}

impl PackedGatedDeltaNet {
    /// # Errors
    /// Sizes that do not divide, by the field's name; whatever `vb` has to say of a tensor.
    pub fn new(cfg: &PackedGatedDeltaNetConfig, vb: VarBuilder) -> Result<Self> {
        let heads = cfg.check()?;
        let (v_heads, stdev) = (heads.num_v_heads, cfg.initializer_range);
        let conv = ShortConvolution::new(conv_dim(&heads), cfg.conv_size, false, stdev, vb.pp("conv1d"))?;
        let silu = cfg.conv_act == Activation::Silu;
        let range = DecayRange { a: [0.01, 16.], ..Default::default() };
        Ok(Self {
            projections: PackedProjections::new(&heads, cfg, &vb)?,
            conv: conv.with_silu(silu),
            conv_act: (!silu).then_some(cfg.conv_act),
            decay: Decay::new(v_heads, v_heads, range, &vb)?,
            norm: RmsNorm::new(heads.head_v_dim, cfg.norm_eps, true, vb.pp("norm"))?,
            out_proj: Linear::new(heads.value_dim(), heads.hidden_size, false, stdev, vb.pp("out_proj"))?,
            heads,
            mode: Mode::Auto,
        })
    }

    /// q, k and v, each `[B, T, heads, channels]`, of what the convolution makes.
    fn split(&self, qkv: &Tensor) -> Result<[Tensor; 3]> {
        let DeltaHeads { num_heads, num_v_heads, head_k_dim, head_v_dim, .. } = self.heads;
        // One norm for both: a launch less on a GPU.
        let qk = l2_norm(&heads_from(qkv, 0, 2 * num_heads, head_k_dim)?, L2_EPS)?;
        Ok([
            qk.narrow(2, 0, num_heads)?,
            qk.narrow(2, num_heads, num_heads)?,
            heads_from(qkv, 2 * num_heads * head_k_dim, num_v_heads, head_v_dim)?,
        ])
    }
}

public_methods!(PackedGatedDeltaNet);

impl Mixer for PackedGatedDeltaNet {
    fn mix(&self, xs: &Tensor, call: Call) -> Result<Tensor> {
        let size = call.check(xs, self.heads.hidden_size)?;
        let Projected { qkv, z, b, a } = self.projections.forward(&self.heads, xs)?;
        let (mut qkv, past) = self.conv.run(&qkv, call.past(0, 1)?, call.cu_seqlens())?;
        if let Some(act) = self.conv_act {
            qkv = act.forward(&qkv)?;
        }
        let [q, k, v] = self.split(&qkv)?;
        let (g, beta) = self.decay.log_decay_and_beta(&a, (1., &b))?;
        let Output { out, state } = gated_delta_rule(&q, &k, &v, &g, &beta, &call.options(self.mode))?;
        call.finish(state, vec![past], size);
        self.out_proj.forward(&self.norm.forward_gated_to(&out, (&z, Gate::Silu), xs.dtype())?)
    }

    fn set_mode(&mut self, mode: Mode) {
        self.mode = mode;
    }
}
