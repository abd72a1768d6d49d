//! Softmax attention as a layer, what hybrid models put between their layers of linear attention.

use crate::Mode;
use crate::nn::call::{Call, Mixer, public_methods};
use crate::nn::fused::Gate;
use crate::nn::heads::{MAX_SIZE, check_size};
use crate::nn::linear::Projections;
use crate::nn::softmax_attention::softmax_attention;
use crate::nn::{LayerCache, Linear, RmsNorm, RotaryConfig, RotaryEmbedding, fused};
use candle_core::{Result, Tensor, bail};
use candle_nn::VarBuilder;

/// The norm of queries and keys, if there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum QkRmsNorm {
    /// None.
    #[default]
    None,
    /// Each head by itself, with one weight for all heads.
    PerHead,
    /// Each head by itself, with a weight that is stored as its difference from 1.
    PerHeadZeroCentered,
    /// All heads together.
    AllHeads,
}

/// What an [`Attention`] layer is made from.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionConfig {
    /// Width of input and output. Default: 1024.
    pub hidden_size: usize,
    /// Query heads. Default: 8.
    pub num_heads: usize,
    /// Key-value heads, a divisor of `num_heads`. Default: 8.
    pub num_kv_heads: usize,
    /// Channels of a head. Default: 128.
    pub head_dim: usize,
    /// Whether the projections have biases. Default: no.
    pub bias: bool,
    /// The norm of queries and keys. Default: none.
    pub qk_norm: QkRmsNorm,
    /// Epsilon of that norm. Default: 1e-6.
    pub norm_eps: f64,
    /// Whether the output is gated, through a sigmoid, by a second half of each head's query projection. Default: no.
    pub output_gate: bool,
    /// The rotation of queries and keys, if there is one. Default: `None`.
    pub rotary: Option<RotaryConfig>,
    /// Deviation of fresh weights. Default: 0.02.
    pub initializer_range: f64,
}

impl Default for AttentionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 1024,
            num_heads: 8,
            num_kv_heads: 8,
            head_dim: 128,
            bias: false,
            qk_norm: QkRmsNorm::None,
            norm_eps: 1e-6,
            output_gate: false,
            rotary: None,
            initializer_range: 0.02,
        }
    }
}

impl AttentionConfig {
    /// Refuses sizes that make no layer, by the field's name.
    pub(crate) fn check(&self) -> Result<()> {
        let Self { hidden_size, num_heads, num_kv_heads, head_dim, .. } = *self;
        for (name, size) in [
            ("hidden_size", hidden_size),
            ("num_heads", num_heads),
            ("num_kv_heads", num_kv_heads),
            ("head_dim", head_dim),
        ] {
            check_size(name, size)?;
        }
        if !num_heads.is_multiple_of(num_kv_heads) {
            bail!("num_kv_heads is {num_kv_heads}, it must divide num_heads, which is {num_heads}");
        }
        if num_heads.checked_mul(2 * head_dim).is_none_or(|all| all > MAX_SIZE) {
            bail!("num_heads is {num_heads}: with heads of {head_dim} channels that is too wide");
        }
        if let Some(rotary) = &self.rotary {
            if rotary.head_dim != head_dim {
                bail!("rotary.head_dim is {}, it must be head_dim, which is {head_dim}", rotary.head_dim);
            }
            RotaryEmbedding::from_config(rotary)?;
        }
        Ok(())
    }
}

/// The norms of queries and keys.
#[derive(Debug, Clone)]
struct QkNorms {
    norms: [RmsNorm; 2],
    per_head: bool,
}

impl QkNorms {
    fn new(cfg: &AttentionConfig, vb: &VarBuilder) -> Result<Option<Self>> {
        let per_head = cfg.qk_norm != QkRmsNorm::AllHeads;
        let norm = |name: &str, heads: usize| {
            let (vb, size) = (vb.pp(name), if per_head { cfg.head_dim } else { heads * cfg.head_dim });
            match cfg.qk_norm {
                QkRmsNorm::PerHeadZeroCentered => RmsNorm::zero_centered(size, cfg.norm_eps, vb),
                _ => RmsNorm::new(size, cfg.norm_eps, true, vb),
            }
        };
        if cfg.qk_norm == QkRmsNorm::None {
            return Ok(None);
        }
        Ok(Some(Self {
            norms: [norm("q_norm", cfg.num_heads)?, norm("k_norm", cfg.num_kv_heads)?],
            per_head,
        }))
    }

    /// `[B, T, H, D]` to the same.
    fn forward(&self, index: usize, xs: &Tensor) -> Result<Tensor> {
        let norm = &self.norms[index];
        if self.per_head { norm.forward(xs) } else { norm.forward(&xs.flatten_from(2)?)?.reshape(xs.shape()) }
    }
}

/// Causal softmax attention with grouped heads.
///
/// Parameters: `q_proj`, `k_proj`, `v_proj`, `o_proj`, and `q_norm`, `k_norm` with a norm. With an output gate, `q_proj`
/// has for each head its query and then its gate. Its cache grows with the tokens.
#[derive(Debug, Clone)]
pub struct Attention {
    /// Of queries, keys and values.
    projections: Projections,
    o_proj: Linear,
    qk_norm: Option<QkNorms>,
    rotary: Option<RotaryEmbedding>,
    hidden_size: usize,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    output_gate: bool,
}

impl Attention {
    /// # Errors
    /// Sizes that do not divide, by the field's name; whatever `vb` has to say of a tensor.
    pub fn new(cfg: &AttentionConfig, vb: VarBuilder) -> Result<Self> {
        cfg.check()?;
        let AttentionConfig { hidden_size, num_heads, num_kv_heads, head_dim, output_gate, .. } = *cfg;
        let linear = |name: &str, inputs, outputs| {
            Linear::new(inputs, outputs, cfg.bias, cfg.initializer_range, vb.pp(name))
        };
        let gate = if output_gate { 2 } else { 1 };
        Ok(Self {
            projections: Projections::new(vec![
                linear("q_proj", hidden_size, num_heads * head_dim * gate)?,
                linear("k_proj", hidden_size, num_kv_heads * head_dim)?,
                linear("v_proj", hidden_size, num_kv_heads * head_dim)?,
            ])?,
            o_proj: linear("o_proj", num_heads * head_dim, hidden_size)?,
            qk_norm: QkNorms::new(cfg, &vb)?,
            rotary: cfg.rotary.as_ref().map(RotaryEmbedding::from_config).transpose()?,
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
            output_gate,
        })
    }

    /// Queries and, if there is one, the gate, both `[B, T, H, D]`, from what is projected to both.
    fn queries(&self, q: Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let (batch, tokens, _) = q.dims3()?;
        let q = q.reshape((batch, tokens, self.num_heads, ()))?;
        if !self.output_gate {
            return Ok((q, None));
        }
        let gate = q.narrow(3, self.head_dim, self.head_dim)?;
        Ok((q.narrow(3, 0, self.head_dim)?, Some(gate)))
    }
}

public_methods!(Attention);

impl Mixer for Attention {
    fn mix(&self, xs: &Tensor, call: Call) -> Result<Tensor> {
        let size = call.check(xs, self.hidden_size)?;
        call.check_key_values()?;
        let [q, k, v] = self.projections.forward(xs)?;
        let (mut q, gate) = self.queries(q)?;
        let heads = |x: Tensor| x.reshape((size.0, size.1, self.num_kv_heads, self.head_dim));
        let (mut k, v) = (heads(k)?, heads(v)?);
        if let Some(norms) = &self.qk_norm {
            (q, k) = (norms.forward(0, &q)?, norms.forward(1, &k)?);
        }
        if let Some(rotary) = &self.rotary {
            let positions = call.positions(size.0, size.1);
            [q, k] = rotary.rotate([&q, &k], &positions)?;
        }
        let scale = 1. / (self.head_dim as f64).sqrt();
        let (out, key_values) = softmax_attention([&q.contiguous()?, &k, &v], scale, &call)?;
        let out = match gate {
            Some(gate) => fused::gated(&out, (&gate, Gate::Sigmoid), xs.dtype())?,
            None => out,
        };
        call.finish_key_values(key_values, size);
        self.o_proj.forward(&out.flatten_from(2)?)
    }

    /// Softmax attention has one algorithm.
    fn set_mode(&mut self, _: Mode) {}
}
