//! `qwen3_5` and `qwen3_5_text`: Qwen3.5, by itself or as the text part of its multimodal repositories.

use crate::models::block::gated_mlp;
use crate::models::fields::Fields;
use crate::models::qwen::{QwenConfig, QwenDefaults};
use crate::models::registry::{Family, Parsed};
use crate::models::stack::{Names, TRANSFORMERS};
use crate::nn::Packing;
use candle_core::{Result, bail};
use serde_json::Value;

/// The whole repository, of which vision and the prediction of several tokens are left out.
pub(super) const FAMILY: Family = Family {
    model_type: "qwen3_5",
    architecture: "Qwen3_5ForConditionalGeneration",
    parse: parse_multimodal,
};

/// The text part.
pub(super) const TEXT: Family =
    Family { model_type: "qwen3_5_text", architecture: "Qwen3_5ForCausalLM", parse: parse_text };

const WITHIN: &str = "model.language_model";

fn parse_multimodal(fields: &mut Fields) -> Result<Parsed> {
    text_within(fields, |text| parse(text, Names { model: &[WITHIN, "model"], ..TRANSFORMERS }))
}

fn parse_text(fields: &mut Fields) -> Result<Parsed> {
    parse(fields, Names { model: &["model", WITHIN], ..TRANSFORMERS })
}

fn parse(fields: &mut Fields, names: Names) -> Result<Parsed> {
    let defaults = QwenDefaults {
        vocab_size: 248320,
        hidden_size: 4096,
        intermediate_size: 12288,
        num_layers: 32,
        num_kv_heads: 4,
    };
    let config = QwenConfig::parse(fields, Packing::ByKind, defaults)?;
    let mlp = config.mlp.clone();
    Ok(config.with_feed_forward(names, move |_, vb| gated_mlp(&mlp, vb)))
}

/// Reads the fields in `text_config`, and takes from it what the whole is asked for.
fn text_within(fields: &mut Fields, parse: impl Fn(&mut Fields) -> Result<Parsed>) -> Result<Parsed> {
    let mut text = fields.object("text_config")?;
    if text.is_empty() {
        bail!("field `text_config` is missing, it must be an object with the fields of the text model");
    }
    text.refuse_quantized()?;
    // The outer one decides, where there is one.
    if let Some(tied) = fields.get("tie_word_embeddings").cloned() {
        text.set("tie_word_embeddings", tied);
    }
    let parsed = match parse(&mut text) {
        Ok(parsed) => parsed,
        Err(error) => bail!("field `text_config`: {error}"),
    };
    for name in ["bos_token_id", "eos_token_id", "tie_word_embeddings"] {
        let inner = text.get(name).cloned().unwrap_or(Value::Null);
        fields.value(name, inner);
    }
    fields.set("text_config", Value::Object(text.into_map()));
    Ok(parsed)
}
