//! Lightning attention ([Qin et al., 2024](https://arxiv.org/abs/2401.04658)) as MiniMax has it.

use crate::nn::call::{Call, Mixer, public_methods};
use crate::nn::fused::Gate;
use crate::nn::heads::{MAX_SIZE, check_size};
use crate::nn::{Activation, LayerCache, Linear, RmsNorm};
use crate::{Mode, Output, retention};
use candle_core::{Result, Tensor, bail};
use candle_nn::VarBuilder;

/// Epsilon of the output norm, which no configuration changes.
const NORM_EPS: f64 = 1e-6;

/// What a [`LightningAttention`] layer is made from.
#[derive(Debug, Clone, PartialEq)]
pub struct LightningAttentionConfig {
    /// Width of input and output. Default: 4096.
    pub hidden_size: usize,
    /// Heads. Default: 32.
    pub num_heads: usize,
    /// Channels of a head. Default: 128.
    pub head_dim: usize,
    /// The function on q, k and v. Default: SiLU.
    pub act: Activation,
    /// The number of the layer, and how many there are: decays are slower in later layers. Default: the first of 32.
    pub layer: (usize, usize),
    /// Deviation of fresh weights. Default: 0.02.
    pub initializer_range: f64,
}

impl Default for LightningAttentionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 4096,
            num_heads: 32,
            head_dim: 128,
            act: Activation::Silu,
            layer: (0, 32),
            initializer_range: 0.02,
        }
    }
}

impl LightningAttentionConfig {
    /// Refuses sizes that make no layer, by the field's name.
    pub(crate) fn check(&self) -> Result<()> {
        let Self { hidden_size, num_heads, head_dim, layer: (layer, layers), .. } = *self;
        for (name, size) in [("hidden_size", hidden_size), ("num_heads", num_heads), ("head_dim", head_dim)] {
            check_size(name, size)?;
        }
        if num_heads.checked_mul(3 * head_dim).is_none_or(|all| all > MAX_SIZE) {
            bail!("num_heads is {num_heads}: with heads of {head_dim} channels that is too wide");
        }
        if layer >= layers {
            bail!("layer is {layer}, it must be below the number of layers, {layers}");
        }
        Ok(())
    }

    /// Each head forgets at a rate of its own, a geometric sequence that ends with 2^-8 in head H; the last layer hardly
    /// forgets.
    fn log_decay(&self) -> Vec<f32> {
        let (layer, layers) = (self.layer.0 as f64, self.layer.1 as f64);
        let depth = 1. - layer / (layers - 1. + 1e-5) + 1e-5;
        let rate = |head: usize| (-8. * (head + 1) as f64 / self.num_heads as f64).exp2();
        (0..self.num_heads).map(|head| (-rate(head) * depth) as f32).collect()
    }
}

/// [`retention`] with scale 1 on activated q, k and v, then a norm over all heads and a sigmoid gate.
///
/// Parameters: `qkv_proj`, which has for each head its q, k and v, `output_gate`, `norm`, `out_proj`. Checkpoints have the
/// decays too, which follow from the sizes.
#[derive(Debug, Clone)]
pub struct LightningAttention {
    qkv_proj: Linear,
    output_gate: Linear,
    norm: RmsNorm,
    out_proj: Linear,
    log_decay: Tensor,
    act: Activation,
    hidden_size: usize,
    num_heads: usize,
    head_dim: usize,
    mode: Mode,
}

impl LightningAttention {
    /// # Errors
    /// A size that is 0 or too large, by the field's name; whatever `vb` has to say of a tensor.
    pub fn new(cfg: &LightningAttentionConfig, vb: VarBuilder) -> Result<Self> {
        cfg.check()?;
        let LightningAttentionConfig { hidden_size, num_heads, head_dim, act, .. } = *cfg;
        let inner = num_heads * head_dim;
        let linear = |name: &str, inputs, outputs| {
            Linear::new(inputs, outputs, false, cfg.initializer_range, vb.pp(name))
        };
        Ok(Self {
            qkv_proj: linear("qkv_proj", hidden_size, 3 * inner)?,
            output_gate: linear("output_gate", hidden_size, inner)?,
            norm: RmsNorm::new(inner, NORM_EPS, true, vb.pp("norm"))?,
            out_proj: linear("out_proj", inner, hidden_size)?,
            log_decay: Tensor::from_vec(cfg.log_decay(), num_heads, vb.device())?,
            act,
            hidden_size,
            num_heads,
            head_dim,
            mode: Mode::Auto,
        })
    }
}

public_methods!(LightningAttention);

impl Mixer for LightningAttention {
    fn mix(&self, xs: &Tensor, call: Call) -> Result<Tensor> {
        let size = call.check(xs, self.hidden_size)?;
        call.past(0, 0)?;
        let qkv = self.act.forward(&self.qkv_proj.forward_heads(xs, self.num_heads)?)?;
        let part = |i: usize| qkv.narrow(3, i * self.head_dim, self.head_dim);
        let options = call.options(self.mode).with_scale(1.);
        let Output { out, state } = retention(&part(0)?, &part(1)?, &part(2)?, &self.log_decay, &options)?;
        call.finish(state, vec![], size);
        let gate = self.output_gate.forward(xs)?;
        let out = self.norm.forward_gated_to(&out.flatten_from(2)?, (&gate, Gate::Sigmoid), xs.dtype())?;
        self.out_proj.forward(&out)
    }

    fn set_mode(&mut self, mode: Mode) {
        self.mode = mode;
    }
}
