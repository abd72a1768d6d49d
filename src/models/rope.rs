//! The fields of rotary embeddings, in today's form and in that of earlier versions of transformers.

use crate::models::fields::Fields;
use crate::nn::{RotaryConfig, RotaryEmbedding, RotaryScaling};
use candle_core::{Result, bail};
use serde_json::Value;

/// What a model takes where its file does not say.
pub(super) struct RopeDefaults {
    pub theta: f64,
    pub partial_rotary_factor: f64,
}

/// Reads `rope_parameters`, or `rope_scaling`, `rope_theta` and `partial_rotary_factor`, for heads of `head_dim` channels.
pub(super) fn rope(fields: &Fields, head_dim: usize, defaults: RopeDefaults) -> Result<RotaryConfig> {
    match read(fields, head_dim, defaults) {
        Ok(rotary) => Ok(rotary),
        Err(error) => bail!("field `rope_parameters`: {error}"),
    }
}

fn read(fields: &Fields, head_dim: usize, defaults: RopeDefaults) -> Result<RotaryConfig> {
    let mut rope = parameters(fields)?;
    let mut number = |name: &str, default: f64| -> Result<f64> {
        // Within the object, then beside it, as earlier versions have it.
        if let Some(outer) = fields.get(name) {
            rope.value(name, outer.clone());
        }
        rope.positive(name, default)
    };
    let base = number("rope_theta", defaults.theta)?;
    let factor = number("partial_rotary_factor", defaults.partial_rotary_factor)?;
    let rotary_dim = (head_dim as f64 * factor) as usize;
    if rotary_dim == 0 || rotary_dim > head_dim || !rotary_dim.is_multiple_of(2) {
        bail!(
            "field `partial_rotary_factor` is {factor}: {rotary_dim} of {head_dim} channels of a head would be rotated, it must be an even number of them"
        );
    }
    let scaling = scaling(fields, &mut rope)?;
    let rotary = RotaryConfig { head_dim, rotary_dim, base, scaling };
    RotaryEmbedding::from_config(&rotary)?;
    Ok(rotary)
}

/// Whether a field is there, within the object or beside it, and null.
pub(super) fn is_null(fields: &Fields, name: &str) -> Result<bool> {
    let rope = parameters(fields)?;
    let there = if rope.has(name) { &rope } else { fields };
    Ok(there.has(name) && there.get(name).is_none())
}

/// The object that says it, which may lie under the kind of layer that it is for.
fn parameters(fields: &Fields) -> Result<Fields> {
    let scaling = fields.object("rope_scaling")?;
    let rope = if scaling.is_empty() { fields.object("rope_parameters")? } else { scaling };
    if rope.has("full_attention") { rope.object("full_attention") } else { Ok(rope) }
}

fn scaling(fields: &Fields, rope: &mut Fields) -> Result<RotaryScaling> {
    if let Some(old) = rope.get("type").cloned() {
        rope.value("rope_type", old);
    }
    let kind = rope.choice("rope_type", "default", &["default", "linear", "llama3", "yarn"])?;
    let required = |name: &str| match rope.get(name) {
        Some(_) => rope.clone().positive(name, 1.),
        None => bail!("field `{name}` is missing, rope_type \"{kind}\" needs it"),
    };
    match kind.as_str() {
        "linear" => Ok(RotaryScaling::Linear { factor: required("factor")? }),
        "llama3" => Ok(RotaryScaling::Llama3 {
            factor: required("factor")?,
            low_freq_factor: required("low_freq_factor")?,
            high_freq_factor: required("high_freq_factor")?,
            original_len: original_len(fields, rope)?,
        }),
        "yarn" => yarn(fields, rope),
        _ => Ok(RotaryScaling::None),
    }
}

/// How long the sequences of the first training were.
fn original_len(fields: &Fields, rope: &Fields) -> Result<f64> {
    const NAME: &str = "original_max_position_embeddings";
    let found = [fields.get(NAME), rope.get(NAME), fields.get("max_position_embeddings")];
    match found.into_iter().flatten().next().map(Value::as_f64) {
        Some(Some(len)) if len >= 1. => Ok(len),
        _ => bail!("field `{NAME}` is missing or no number above 0, the scaling needs it"),
    }
}

fn yarn(fields: &Fields, rope: &mut Fields) -> Result<RotaryScaling> {
    let original_len = original_len(fields, rope)?;
    let max = fields.get("max_position_embeddings").and_then(Value::as_f64);
    let factor = match rope.optional_number("factor", None)? {
        Some(factor) => factor,
        None => max.unwrap_or(original_len) / original_len,
    };
    let scale = |m: f64| if factor <= 1. { 1. } else { 0.1 * m * factor.ln() + 1. };
    // 0 is no number to Python.
    let mut given =
        |name: &str| Ok::<_, candle_core::Error>(rope.optional_number(name, None)?.filter(|x| *x != 0.));
    let attention_factor = match (given("attention_factor")?, given("mscale")?, given("mscale_all_dim")?) {
        (Some(factor), ..) => factor,
        (None, Some(mscale), Some(all)) => scale(mscale) / scale(all),
        _ => scale(1.),
    };
    Ok(RotaryScaling::Yarn {
        factor,
        beta_fast: given("beta_fast")?.unwrap_or(32.),
        beta_slow: given("beta_slow")?.unwrap_or(1.),
        original_len,
        attention_factor,
        truncate: rope.flag("truncate", true)?,
    })
}
