//! `kimi_linear`: Kimi Linear, delta attention with a decay a channel, latent softmax attention, experts in most blocks.

use crate::models::block::{FeedForward, PreNormBlock, gated_mlp};
use crate::models::fields::{Fields, by_fields};
use crate::models::hybrid::{self, LayerType};
use crate::models::registry::{Family, Parsed};
use crate::models::stack::{Block, Layers, Norm, Site, StackConfig, TRANSFORMERS};
use crate::nn::{
    ExpertNames, GatedMlpConfig, GluKind, KdaLayout, KimiDeltaAttention, KimiDeltaAttentionConfig,
    LatentAttention, LatentAttentionConfig, Mixer, MixtureOfExperts, MixtureOfExpertsConfig, RmsNorm,
    RouterConfig, RouterScore, SharedExpert,
};
use candle_core::{Result, bail};
use candle_nn::VarBuilder;
use serde_json::{Value, json};

pub(super) const FAMILY: Family =
    Family { model_type: "kimi_linear", architecture: "KimiLinearForCausalLM", parse };

struct KimiConfig {
    hidden_size: usize,
    norm_eps: f64,
    layer_types: Vec<LayerType>,
    /// Which blocks have experts.
    sparse: Vec<bool>,
    latent: LatentAttentionConfig,
    delta: KimiDeltaAttentionConfig,
    mlp: GatedMlpConfig,
    moe: Option<MixtureOfExpertsConfig>,
}

fn parse(fields: &mut Fields) -> Result<Parsed> {
    fields.value("bos_token_id", 163584.into());
    fields.value("eos_token_id", 163586.into());
    fields.size("vocab_size", 163840)?;
    fields.size("hidden_size", 2304)?;
    let stack = StackConfig::parse(fields, 27)?;
    let norm_eps = fields.positive("rms_norm_eps", 1e-5)?;
    fields.choice("hidden_act", "silu", &["silu", "swish"])?;
    let within = fields.object("linear_attn_config")?;
    let layer_types = layer_types(fields, &within, stack.num_layers)?;
    let sparse = sparse_layers(fields, stack.num_layers)?;
    let moe = if sparse.contains(&true) { Some(mixture(fields, &stack)?) } else { None };
    let config = KimiConfig {
        norm_eps,
        layer_types,
        sparse,
        latent: latent(fields, &stack)?,
        delta: delta(fields, within, &stack, norm_eps)?,
        mlp: GatedMlpConfig {
            hidden_size: stack.hidden_size,
            intermediate_size: fields.size("intermediate_size", 9216)?,
            kind: GluKind::Swish,
            initializer_range: stack.initializer_range,
        },
        moe,
        hidden_size: stack.hidden_size,
    };
    Ok(stack.with_layers(TRANSFORMERS, config))
}

/// `layer_types` or, in the authors' files, lists of layers that are counted from 1.
fn layer_types(fields: &mut Fields, within: &Fields, layers: usize) -> Result<Vec<LayerType>> {
    let listed = |name: &str| -> Result<Option<Vec<usize>>> {
        let Some(value) = within.get(name) else { return Ok(None) };
        let numbers = value.as_array().map(|numbers| numbers.iter().map(Value::as_u64).collect::<Vec<_>>());
        match numbers.and_then(|numbers| numbers.into_iter().collect::<Option<Vec<_>>>()) {
            Some(numbers) if numbers.iter().all(|n| (1..=layers as u64).contains(n)) => {
                Ok(Some(numbers.into_iter().map(|n| n as usize - 1).collect()))
            }
            _ => bail!(
                "field `linear_attn_config.{name}` is {value}, it must be a list of numbers from 1 to {layers}"
            ),
        }
    };
    let (full, linear) = (listed("full_attn_layers")?, listed("kda_layers")?);
    if let (Some(full), Some(linear), None) = (&full, &linear, fields.get("layer_types")) {
        let mut known = vec![None; layers];
        full.iter().for_each(|layer| known[*layer] = Some(LayerType::Full));
        linear.iter().for_each(|layer| known[*layer] = Some(LayerType::Linear));
        if let Some(layer) = known.iter().position(Option::is_none) {
            bail!(
                "field `linear_attn_config` has layer {} in neither full_attn_layers nor kda_layers",
                layer + 1
            );
        }
        return hybrid::layer_types(fields, layers, |layer| known[layer].unwrap_or(LayerType::Linear));
    }
    let usual =
        |layer: usize| if layer > 0 && layer.is_multiple_of(4) { LayerType::Full } else { LayerType::Linear };
    hybrid::layer_types(fields, layers, usual)
}

/// `mlp_layer_types` or, in the authors' files, how many blocks have none and of how many others one has experts.
fn sparse_layers(fields: &mut Fields, layers: usize) -> Result<Vec<bool>> {
    if let Some(value) = fields.get("mlp_layer_types") {
        let kind = |value: &Value| match value.as_str() {
            Some("sparse") => Some(true),
            Some("dense") => Some(false),
            _ => None,
        };
        let kinds = value.as_array().and_then(|kinds| kinds.iter().map(kind).collect::<Option<Vec<_>>>());
        return match kinds {
            Some(kinds) if kinds.len() == layers => Ok(kinds),
            _ => bail!("field `mlp_layer_types` is {value}, it must be {layers} of dense, sparse"),
        };
    }
    // What is not a list of kinds may have no experts at all.
    if fields.get("num_experts").and_then(Value::as_u64) == Some(0) {
        return Ok(vec![false; layers]);
    }
    let Some(first) = fields.value("first_k_dense_replace", json!(1)).as_u64() else {
        bail!("field `first_k_dense_replace` must be a whole number from 0")
    };
    let every = fields.size("moe_layer_freq", 1)?;
    Ok((0..layers).map(|layer| layer as u64 >= first && layer.is_multiple_of(every)).collect())
}

/// A field that transformers and the authors call by different names: the one that the file has.
fn alias(fields: &mut Fields, name: &'static str, others: &[&'static str]) -> &'static str {
    let other = others.iter().find_map(|other| Some((*other, fields.get(other)?.clone())));
    match other {
        Some((other, value)) if fields.get(name).is_none() => {
            fields.set(name, value);
            other
        }
        _ => name,
    }
}

fn mixture(fields: &mut Fields, stack: &StackConfig) -> Result<MixtureOfExpertsConfig> {
    alias(fields, "num_shared_experts", &["n_shared_experts"]);
    alias(fields, "moe_renormalize", &["norm_topk_prob"]);
    let names = [
        ("num_experts", alias(fields, "num_experts", &["num_local_experts", "n_routed_experts"])),
        ("top_k", alias(fields, "num_experts_per_token", &["num_experts_per_tok"])),
        ("groups", alias(fields, "num_expert_group", &["n_group"])),
        ("top_groups", "topk_group"),
        ("scale", "routed_scaling_factor"),
    ];
    let num_experts = fields.size("num_experts", 256)?;
    let top_k = fields.size("num_experts_per_token", 8)?;
    let groups = fields.size("num_expert_group", 1)?;
    let top_groups = fields.size("topk_group", 1)?;
    // The authors' other ways to choose: without groups, and by them, which is the same where there is one.
    if !fields.flag("use_grouped_topk", true)? && groups > 1 {
        bail!("field `use_grouped_topk` is false, it must be true with {groups} groups of experts");
    }
    let score =
        match fields.choice("moe_router_activation_func", "sigmoid", &["sigmoid", "softmax"])?.as_str() {
            "softmax" => RouterScore::Softmax,
            _ => RouterScore::Sigmoid,
        };
    let width = fields.size("moe_intermediate_size", 1024)?;
    let shared = match fields.value("num_shared_experts", json!(1)) {
        Value::Null => SharedExpert::None,
        value if value.as_u64() == Some(0) => SharedExpert::None,
        _ => match width.checked_mul(fields.size("num_shared_experts", 1)?) {
            Some(all) => SharedExpert::Plain(all),
            None => bail!("field `num_shared_experts` is too large"),
        },
    };
    let router = RouterConfig {
        score,
        correction_bias: true,
        groups,
        top_groups,
        scale: fields.number("routed_scaling_factor", 2.446)?,
        ..RouterConfig::new(num_experts, top_k, fields.flag("moe_renormalize", true)?)
    };
    by_fields(&names, router.check())?;
    Ok(MixtureOfExpertsConfig {
        hidden_size: stack.hidden_size,
        intermediate_size: width,
        router,
        shared,
        names: ExpertNames::W,
        kind: GluKind::Swish,
        initializer_range: stack.initializer_range,
    })
}

fn latent(fields: &mut Fields, stack: &StackConfig) -> Result<LatentAttentionConfig> {
    let num_heads = fields.size("num_attention_heads", 32)?;
    match fields.optional_size("num_key_value_heads", Some(num_heads))? {
        Some(heads) if heads != num_heads => bail!(
            "field `num_key_value_heads` is {heads}, it must be num_attention_heads, which is {num_heads}, or null"
        ),
        _ => {}
    }
    if !fields.flag("mla_use_nope", true)? {
        bail!("field `mla_use_nope` is false, it must be true: rotated latent attention is not supported");
    }
    let latent = LatentAttentionConfig {
        hidden_size: stack.hidden_size,
        num_heads,
        q_lora_rank: fields.optional_size("q_lora_rank", None)?,
        kv_lora_rank: fields.size("kv_lora_rank", 512)?,
        qk_nope_head_dim: fields.size("qk_nope_head_dim", 128)?,
        qk_rope_head_dim: fields.size("qk_rope_head_dim", 64)?,
        v_head_dim: fields.size("v_head_dim", 128)?,
        bias: fields.flag("attention_bias", false)?,
        initializer_range: stack.initializer_range,
    };
    by_fields(&hybrid::ATTENTION, latent.check())?;
    Ok(latent)
}

/// What the authors' files have in an object of its own comes first.
fn delta(
    fields: &mut Fields,
    mut within: Fields,
    stack: &StackConfig,
    norm_eps: f64,
) -> Result<KimiDeltaAttentionConfig> {
    let mut size = |inner: &str, name: &str, default: usize| match within.get(inner) {
        Some(_) => match within.size(inner, default) {
            Ok(size) => Ok(size),
            Err(error) => bail!("field `linear_attn_config`: {error}"),
        },
        None => fields.size(name, default),
    };
    let delta = KimiDeltaAttentionConfig {
        hidden_size: stack.hidden_size,
        head_dim: size("head_dim", "linear_head_dim", 128)?,
        num_heads: size("num_heads", "linear_num_heads", 32)?,
        conv_size: size("short_conv_kernel_size", "linear_conv_kernel_dim", 4)?,
        layout: KdaLayout::KimiLinear,
        norm_eps,
        initializer_range: stack.initializer_range,
        ..Default::default()
    };
    let own = |inner, name| if within.get(inner).is_some() { inner } else { name };
    let names = [
        ("head_dim", own("head_dim", "linear_head_dim")),
        ("num_heads", own("num_heads", "linear_num_heads")),
        ("conv_size", own("short_conv_kernel_size", "linear_conv_kernel_dim")),
    ];
    by_fields(&names, delta.check())?;
    Ok(delta)
}

impl Layers for KimiConfig {
    fn block(&self, Site { layer, vb, .. }: Site) -> Result<Box<dyn Block>> {
        let attn = vb.pp("self_attn");
        let mixer: Box<dyn Mixer> = match self.layer_types[layer] {
            LayerType::Full => Box::new(LatentAttention::new(&self.latent, attn)?),
            LayerType::Linear => Box::new(KimiDeltaAttention::new(&self.delta, attn)?),
        };
        Ok(Box::new(PreNormBlock {
            mixer_norm: self.rms_norm(vb.pp("input_layernorm"))?,
            mixer,
            feed_forward_norm: self.rms_norm(vb.pp("post_attention_layernorm"))?,
            feed_forward: self.feed_forward(self.sparse[layer], &vb)?,
        }))
    }

    fn norm(&self, vb: VarBuilder) -> Result<Norm> {
        Ok(Box::new(self.rms_norm(vb)?))
    }
}

impl KimiConfig {
    fn rms_norm(&self, vb: VarBuilder) -> Result<RmsNorm> {
        RmsNorm::new(self.hidden_size, self.norm_eps, true, vb)
    }

    /// The authors call a block's MLP `mlp` and its experts `block_sparse_moe`; others call both by one of the names.
    fn feed_forward(&self, sparse: bool, vb: &VarBuilder) -> Result<FeedForward> {
        match &self.moe {
            Some(moe) if sparse => {
                let vb = hybrid::either(vb, ["block_sparse_moe", "mlp"], "gate.weight");
                Ok(Box::new(MixtureOfExperts::new(moe, vb)?))
            }
            _ => gated_mlp(&self.mlp, hybrid::either(vb, ["mlp", "block_sparse_moe"], "gate_proj.weight")),
        }
    }
}
