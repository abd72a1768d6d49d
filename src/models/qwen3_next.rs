//! `qwen3_next`: Qwen3-Next, with a mixture of experts in most blocks.

use crate::models::block::{FeedForward, gated_mlp};
use crate::models::fields::Fields;
use crate::models::qwen::{QwenConfig, QwenDefaults};
use crate::models::registry::{Family, Parsed};
use crate::models::stack::TRANSFORMERS;
use crate::nn::{ExpertNames, MixtureOfExperts, MixtureOfExpertsConfig, Packing, RouterConfig, SharedExpert};
use candle_core::{Result, bail};
use serde_json::{Value, json};

pub(super) const FAMILY: Family =
    Family { model_type: "qwen3_next", architecture: "Qwen3NextForCausalLM", parse };

fn parse(fields: &mut Fields) -> Result<Parsed> {
    let defaults = QwenDefaults {
        vocab_size: 151936,
        hidden_size: 2048,
        intermediate_size: 5632,
        num_layers: 48,
        num_kv_heads: 2,
    };
    let config = QwenConfig::parse(fields, Packing::ByHead, defaults)?;
    let moe = mixture(fields, &config)?;
    let sparse = sparse_layers(fields, config.layer_types.len())?;
    let mlp = config.mlp.clone();
    Ok(config.with_feed_forward(TRANSFORMERS, move |layer, vb| match &moe {
        Some(moe) if sparse[layer] => Ok(Box::new(MixtureOfExperts::new(moe, vb)?) as FeedForward),
        _ => gated_mlp(&mlp, vb),
    }))
}

/// `None` if there are no experts.
fn mixture(fields: &mut Fields, config: &QwenConfig) -> Result<Option<MixtureOfExpertsConfig>> {
    if fields.value("num_experts", json!(512)).as_u64() == Some(0) {
        return Ok(None);
    }
    let num_experts = fields.size("num_experts", 512)?;
    let top_k = fields.size("num_experts_per_tok", 10)?;
    if top_k > num_experts {
        bail!(
            "field `num_experts_per_tok` is {top_k}, it must be at most num_experts, which is {num_experts}"
        );
    }
    Ok(Some(MixtureOfExpertsConfig {
        hidden_size: config.mlp.hidden_size,
        intermediate_size: fields.size("moe_intermediate_size", 512)?,
        router: RouterConfig::new(num_experts, top_k, fields.flag("norm_topk_prob", true)?),
        shared: SharedExpert::Gated(fields.size("shared_expert_intermediate_size", 512)?),
        names: ExpertNames::Proj,
        kind: config.mlp.kind,
        initializer_range: config.mlp.initializer_range,
    }))
}

/// Which blocks have experts: one of so many, and none of those that are named.
fn sparse_layers(fields: &mut Fields, layers: usize) -> Result<Vec<bool>> {
    let step = fields.size("decoder_sparse_step", 1)?;
    let dense: Vec<Option<u64>> = match fields.value("mlp_only_layers", json!([])) {
        Value::Null => vec![],
        Value::Array(numbers) => numbers.iter().map(Value::as_u64).collect(),
        value => bail!("field `mlp_only_layers` is {value}, it must be a list of layer numbers"),
    };
    if dense.contains(&None) {
        bail!("field `mlp_only_layers` must hold layer numbers alone");
    }
    let sparse = |layer: usize| (layer + 1).is_multiple_of(step) && !dense.contains(&Some(layer as u64));
    Ok((0..layers).map(sparse).collect())
}
