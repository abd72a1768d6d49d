//! `minimax`: MiniMax-Text-01, lightning attention and softmax attention in turn, a mixture of experts in every block.

use crate::Mode;
use crate::models::fields::{Fields, by_fields};
use crate::models::hybrid::{self, LayerType};
use crate::models::registry::{Family, Parsed};
use crate::models::residual::Residual;
use crate::models::rope::{RopeDefaults, rope};
use crate::models::stack::{Block, Layers, Norm, Pass, Site, StackConfig, TRANSFORMERS};
use crate::nn::{
    Activation, Attention, AttentionConfig, ExpertNames, LightningAttention, LightningAttentionConfig, Mixer,
    MixtureOfExperts, MixtureOfExpertsConfig, RmsNorm, RouterConfig, SharedExpert,
};
use candle_core::{Result, Tensor, bail};
use candle_nn::VarBuilder;

pub(super) const FAMILY: Family = Family { model_type: "minimax", architecture: "MiniMaxForCausalLM", parse };

/// What a skip connection and what is beside it are multiplied by.
#[derive(Debug, Clone, Copy)]
struct Factors {
    alpha: f64,
    beta: f64,
}

struct MiniMaxConfig {
    hidden_size: usize,
    norm_eps: f64,
    layer_types: Vec<LayerType>,
    attention: AttentionConfig,
    lightning: LightningAttentionConfig,
    moe: MixtureOfExpertsConfig,
    /// Of lightning attention, of softmax attention, of the experts.
    factors: [Factors; 3],
}

fn parse(fields: &mut Fields) -> Result<Parsed> {
    fields.size("hidden_size", 4096)?;
    let stack = StackConfig::parse(fields, 32)?;
    let (hidden_size, initializer_range) = (stack.hidden_size, stack.initializer_range);
    let act = hybrid::hidden_act(fields)?;
    fields.absent("sliding_window", "sliding windows")?;
    // Of the algorithm, not of the result.
    fields.size("block_size", 256)?;
    let alternate = |layer: usize| if layer.is_multiple_of(2) { LayerType::Full } else { LayerType::Linear };
    let layer_types = hybrid::layer_types(fields, stack.num_layers, alternate)?;
    let attention = attention(fields, &stack)?;
    let lightning = LightningAttentionConfig {
        hidden_size,
        num_heads: attention.num_heads,
        head_dim: attention.head_dim,
        act,
        layer: (0, stack.num_layers),
        initializer_range,
    };
    by_fields(&hybrid::ATTENTION, lightning.check())?;
    let config = MiniMaxConfig {
        norm_eps: fields.positive("rms_norm_eps", 1e-5)?,
        moe: mixture(fields, &stack, act)?,
        factors: [factors(fields, "linear_attn")?, factors(fields, "full_attn")?, factors(fields, "mlp")?],
        hidden_size,
        layer_types,
        attention,
        lightning,
    };
    Ok(stack.with_layers(TRANSFORMERS, config))
}

fn attention(fields: &mut Fields, stack: &StackConfig) -> Result<AttentionConfig> {
    let num_heads = fields.size("num_attention_heads", 32)?;
    let head_dim = hybrid::head_dim(fields, None, stack.hidden_size, num_heads)?;
    let attention = AttentionConfig {
        hidden_size: stack.hidden_size,
        num_heads,
        num_kv_heads: fields.optional_size("num_key_value_heads", Some(8))?.unwrap_or(num_heads),
        head_dim,
        rotary: Some(rope(fields, head_dim, RopeDefaults { theta: 1e6, partial_rotary_factor: 1. })?),
        initializer_range: stack.initializer_range,
        ..Default::default()
    };
    by_fields(&hybrid::ATTENTION, attention.check())?;
    Ok(attention)
}

fn mixture(fields: &mut Fields, stack: &StackConfig, act: Activation) -> Result<MixtureOfExpertsConfig> {
    let num_experts = fields.size("num_local_experts", 8)?;
    let top_k = fields.size("num_experts_per_tok", 2)?;
    if top_k > num_experts {
        bail!(
            "field `num_experts_per_tok` is {top_k}, it must be at most num_local_experts, which is {num_experts}"
        );
    }
    // Noise of the training alone.
    fields.number("router_jitter_noise", 0.)?;
    Ok(MixtureOfExpertsConfig {
        hidden_size: stack.hidden_size,
        intermediate_size: fields.size("intermediate_size", 14336)?,
        router: RouterConfig::new(num_experts, top_k, true),
        shared: SharedExpert::None,
        names: ExpertNames::W,
        kind: act.into(),
        initializer_range: stack.initializer_range,
    })
}

fn factors(fields: &mut Fields, of: &str) -> Result<Factors> {
    // Written as the integer that it is to the authors.
    let mut factor = |name: String| {
        fields.value(&name, 1.into());
        fields.number(&name, 1.)
    };
    Ok(Factors { alpha: factor(format!("{of}_alpha_factor"))?, beta: factor(format!("{of}_beta_factor"))? })
}

impl Layers for MiniMaxConfig {
    fn block(&self, Site { layer, vb, .. }: Site) -> Result<Box<dyn Block>> {
        let [linear, full, mlp] = self.factors;
        let attn = vb.pp("self_attn");
        let (mixer, factors): (Box<dyn Mixer>, _) = match self.layer_types[layer] {
            LayerType::Full => (Box::new(Attention::new(&self.attention, attn)?), full),
            LayerType::Linear => {
                let layer = (layer, self.lightning.layer.1);
                let lightning = LightningAttentionConfig { layer, ..self.lightning.clone() };
                (Box::new(LightningAttention::new(&lightning, attn)?), linear)
            }
        };
        // The second is what transformers calls it in memory.
        let moe = hybrid::either(&vb, ["block_sparse_moe", "mlp"], "gate.weight");
        Ok(Box::new(MiniMaxBlock {
            input_norm: self.rms_norm(vb.pp("input_layernorm"))?,
            mixer,
            factors,
            post_norm: self.rms_norm(vb.pp("post_attention_layernorm"))?,
            moe: MixtureOfExperts::new(&self.moe, moe)?,
            moe_factors: mlp,
        }))
    }

    fn norm(&self, vb: VarBuilder) -> Result<Norm> {
        Ok(Box::new(self.rms_norm(vb)?))
    }
}

impl MiniMaxConfig {
    fn rms_norm(&self, vb: VarBuilder) -> Result<RmsNorm> {
        RmsNorm::new(self.hidden_size, self.norm_eps, true, vb)
    }
}

struct MiniMaxBlock {
    input_norm: RmsNorm,
    mixer: Box<dyn Mixer>,
    factors: Factors,
    post_norm: RmsNorm,
    moe: MixtureOfExperts,
    moe_factors: Factors,
}

impl Factors {
    fn join(&self, xs: &Tensor, ys: &Tensor) -> Result<Tensor> {
        (xs * self.alpha)? + (ys * self.beta)?
    }
}

/// The skip connections begin behind the norms.
impl Block for MiniMaxBlock {
    fn forward(&self, xs: &mut Residual, pass: &mut Pass) -> Result<()> {
        let ys = xs.normed(&self.input_norm)?;
        let ys = self.factors.join(&ys, &self.mixer.mix(&ys, pass.call()?)?)?;
        let ys = self.post_norm.forward(&ys)?;
        *xs = Residual::new(self.moe_factors.join(&ys, &self.moe.forward(&ys)?)?);
        Ok(())
    }

    fn set_mode(&mut self, mode: Mode) {
        self.mixer.set_mode(mode);
    }
}
