//! Multi-head latent attention ([DeepSeek-AI, 2024](https://arxiv.org/abs/2405.04434)), without rotation.

use crate::Mode;
use crate::nn::call::{Call, Mixer, public_methods};
use crate::nn::heads::{MAX_SIZE, check_size};
use crate::nn::softmax_attention::softmax_attention;
use crate::nn::{LayerCache, Linear, RmsNorm};
use candle_core::{D, Result, Tensor, bail};
use candle_nn::VarBuilder;

/// Epsilon of the norms in between, which no configuration changes.
const LATENT_EPS: f64 = 1e-6;

/// What a [`LatentAttention`] layer is made from. The defaults are those of Kimi Linear.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentAttentionConfig {
    /// Width of input and output. Default: 2304.
    pub hidden_size: usize,
    /// Heads. Default: 32.
    pub num_heads: usize,
    /// Channels that queries go through; `None` means a single projection. Default: `None`.
    pub q_lora_rank: Option<usize>,
    /// Channels that keys and values go through. Default: 512.
    pub kv_lora_rank: usize,
    /// Key channels that each head has to itself. Default: 128.
    pub qk_nope_head_dim: usize,
    /// Key channels that all heads share. Default: 64.
    pub qk_rope_head_dim: usize,
    /// Value channels of a head. Default: 128.
    pub v_head_dim: usize,
    /// Whether the projections from and to the residual stream have biases. Default: no.
    pub bias: bool,
    /// Deviation of fresh weights. Default: 0.02.
    pub initializer_range: f64,
}

impl Default for LatentAttentionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 2304,
            num_heads: 32,
            q_lora_rank: None,
            kv_lora_rank: 512,
            qk_nope_head_dim: 128,
            qk_rope_head_dim: 64,
            v_head_dim: 128,
            bias: false,
            initializer_range: 0.02,
        }
    }
}

impl LatentAttentionConfig {
    fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Refuses sizes that make no layer, by the field's name.
    pub(crate) fn check(&self) -> Result<()> {
        for (name, size) in [
            ("hidden_size", self.hidden_size),
            ("num_heads", self.num_heads),
            ("q_lora_rank", self.q_lora_rank.unwrap_or(1)),
            ("kv_lora_rank", self.kv_lora_rank),
            ("qk_nope_head_dim", self.qk_nope_head_dim),
            ("qk_rope_head_dim", self.qk_rope_head_dim),
            ("v_head_dim", self.v_head_dim),
        ] {
            check_size(name, size)?;
        }
        let width = self.qk_head_dim() + self.v_head_dim;
        if self.num_heads.checked_mul(width).is_none_or(|all| all > MAX_SIZE) {
            bail!("num_heads is {}: with heads of {width} channels that is too wide", self.num_heads);
        }
        Ok(())
    }
}

/// What makes the queries.
#[derive(Debug, Clone)]
enum Queries {
    Direct(Linear),
    LowRank(Linear, RmsNorm, Linear),
}

impl Queries {
    fn new(cfg: &LatentAttentionConfig, vb: &VarBuilder) -> Result<Self> {
        let (hidden, width) = (cfg.hidden_size, cfg.num_heads * cfg.qk_head_dim());
        let linear = |name: &str, inputs, outputs, bias| {
            Linear::new(inputs, outputs, bias, cfg.initializer_range, vb.pp(name))
        };
        Ok(match cfg.q_lora_rank {
            None => Self::Direct(linear("q_proj", hidden, width, false)?),
            Some(rank) => Self::LowRank(
                linear("q_a_proj", hidden, rank, cfg.bias)?,
                RmsNorm::new(rank, LATENT_EPS, true, vb.pp("q_a_layernorm"))?,
                linear("q_b_proj", rank, width, false)?,
            ),
        })
    }

    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        match self {
            Self::Direct(linear) => linear.forward(xs),
            Self::LowRank(down, norm, up) => up.forward(&norm.forward(&down.forward(xs)?)?),
        }
    }
}

/// Causal softmax attention whose keys and values are made of a few channels for all heads. A part of each key is the
/// same in all heads; nothing is rotated.
///
/// Parameters: `q_proj` or, with a rank, `q_a_proj`, `q_a_layernorm`, `q_b_proj`; `kv_a_proj_with_mqa`, `kv_a_layernorm`,
/// `kv_b_proj`, `o_proj`. The cache holds whole keys and values, and grows with the tokens.
#[derive(Debug, Clone)]
pub struct LatentAttention {
    cfg: LatentAttentionConfig,
    queries: Queries,
    kv_a_proj: Linear,
    kv_a_norm: RmsNorm,
    kv_b_proj: Linear,
    o_proj: Linear,
}

impl LatentAttention {
    /// # Errors
    /// A size that is 0 or too large, by the field's name; whatever `vb` has to say of a tensor.
    pub fn new(cfg: &LatentAttentionConfig, vb: VarBuilder) -> Result<Self> {
        cfg.check()?;
        let (hidden, rank, heads) = (cfg.hidden_size, cfg.kv_lora_rank, cfg.num_heads);
        let linear = |name: &str, inputs, outputs, bias| {
            Linear::new(inputs, outputs, bias, cfg.initializer_range, vb.pp(name))
        };
        let expanded = heads * (cfg.qk_nope_head_dim + cfg.v_head_dim);
        Ok(Self {
            queries: Queries::new(cfg, &vb)?,
            kv_a_proj: linear("kv_a_proj_with_mqa", hidden, rank + cfg.qk_rope_head_dim, cfg.bias)?,
            kv_a_norm: RmsNorm::new(rank, LATENT_EPS, true, vb.pp("kv_a_layernorm"))?,
            kv_b_proj: linear("kv_b_proj", rank, expanded, false)?,
            o_proj: linear("o_proj", heads * cfg.v_head_dim, hidden, cfg.bias)?,
            cfg: cfg.clone(),
        })
    }

    /// `k [B, T, H, nope + rope]` and `v [B, T, H, V]`.
    fn keys_and_values(&self, xs: &Tensor) -> Result<(Tensor, Tensor)> {
        let LatentAttentionConfig {
            num_heads: heads,
            kv_lora_rank: rank,
            qk_nope_head_dim: nope,
            qk_rope_head_dim: rope,
            v_head_dim,
            ..
        } = self.cfg;
        let (batch, tokens, _) = xs.dims3()?;
        let latent = self.kv_a_proj.forward(xs)?;
        let shared = latent.narrow(D::Minus1, rank, rope)?.unsqueeze(2)?;
        let own = self.kv_a_norm.forward(&latent.narrow(D::Minus1, 0, rank)?.contiguous()?)?;
        let own = self.kv_b_proj.forward(&own)?.reshape((batch, tokens, heads, nope + v_head_dim))?;
        let shared = shared.broadcast_as((batch, tokens, heads, rope))?;
        let k = Tensor::cat(&[&own.narrow(3, 0, nope)?, &shared], 3)?;
        Ok((k, own.narrow(3, nope, v_head_dim)?.contiguous()?))
    }
}

public_methods!(LatentAttention);

impl Mixer for LatentAttention {
    fn mix(&self, xs: &Tensor, call: Call) -> Result<Tensor> {
        let size = call.check(xs, self.cfg.hidden_size)?;
        call.check_key_values()?;
        let q = self.queries.forward(xs)?.reshape((size.0, size.1, self.cfg.num_heads, ()))?;
        let (k, v) = self.keys_and_values(xs)?;
        let scale = 1. / (self.cfg.qk_head_dim() as f64).sqrt();
        let (out, key_values) = softmax_attention([&q, &k, &v], scale, &call)?;
        call.finish_key_values(key_values, size);
        self.o_proj.forward(&out.flatten_from(2)?)
    }

    /// Softmax attention has one algorithm.
    fn set_mode(&mut self, _: Mode) {}
}
