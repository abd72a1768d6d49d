//! What a run leaves in its folder: the state to resume from, and the model in Hugging Face form.

use crate::{
    common::files::{read_metadata, write_atomically, write_safetensors},
    optimizer::AdamW,
};
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use candle_linear_attn::models::Config;
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, path::Path};
use tokenizers::Tokenizer;

/// Parameters, moments and the number of steps taken, in one file: they are never of different steps.
pub const STATE_FILE: &str = "training-state.safetensors";

/// Writes the state after `steps` steps of the run that `recipe` describes.
pub fn save(folder: &Path, steps: usize, recipe: &Map<String, Value>, optimizer: &AdamW) -> Result<()> {
    let metadata = BTreeMap::from([
        ("steps".to_owned(), steps.to_string()),
        ("recipe".to_owned(), serde_json::to_string(recipe)?),
    ]);
    write_safetensors(&folder.join(STATE_FILE), &optimizer.state(), &metadata)
}

/// Puts the saved state back and says how many steps were taken: 0 where there is none yet.
pub fn resume(folder: &Path, recipe: &Map<String, Value>, optimizer: &mut AdamW) -> Result<usize> {
    let file = folder.join(STATE_FILE);
    if !file.exists() {
        return Ok(0);
    }
    let unreadable = || format!("cannot resume from {}; delete it to start over", file.display());
    let metadata = read_metadata(&file).with_context(unreadable)?;
    let field = |name: &str| {
        metadata.get(name).with_context(|| format!("no {name} in its metadata")).with_context(unreadable)
    };
    let mut saved: Map<String, Value> = serde_json::from_str(field("recipe")?).with_context(unreadable)?;
    // What every run computed in before there was a choice.
    saved.entry("compute-dtype").or_insert(json!("f32"));
    refuse_differences(folder, &saved, recipe)?;
    let steps = field("steps")?.parse().with_context(unreadable)?;
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).with_context(unreadable)?;
    optimizer
        .restore(|name| match tensors.remove(name) {
            Some(tensor) => Ok(tensor),
            None => candle_core::bail!("tensor {name} is missing"),
        })
        .with_context(unreadable)?;
    Ok(steps)
}

fn refuse_differences(folder: &Path, saved: &Map<String, Value>, wanted: &Map<String, Value>) -> Result<()> {
    let absent = Value::Null;
    let mut names: Vec<&String> = saved.keys().chain(wanted.keys()).collect();
    names.sort();
    names.dedup();
    let differences: Vec<String> = names
        .into_iter()
        .map(|name| (name, saved.get(name).unwrap_or(&absent), wanted.get(name).unwrap_or(&absent)))
        .filter(|(_, was, is)| was != is)
        .map(|(name, was, is)| format!("{name} was {was}, is {is}"))
        .collect();
    if !differences.is_empty() {
        bail!(
            "{} holds a run with other settings: {}; give the same ones to resume it, or another --out",
            folder.display(),
            differences.join("; ")
        );
    }
    Ok(())
}

/// Writes the tokenizer and the three small JSON files that go with a model.
pub fn write_metadata(
    folder: &Path,
    config: &Config,
    dtype: DType,
    tokenizer: &Tokenizer,
    end_token: &str,
) -> Result<()> {
    let mut fields: Map<String, Value> = serde_json::from_str(&config.to_json())?;
    let torch_dtype = match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    };
    fields.insert("torch_dtype".into(), json!(torch_dtype));
    write_json(&folder.join("config.json"), &Value::Object(fields))?;
    write_json(
        &folder.join("tokenizer_config.json"),
        &json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end_token,
            "eos_token": end_token,
            "clean_up_tokenization_spaces": false,
        }),
    )?;
    write_json(
        &folder.join("generation_config.json"),
        &json!({
            "bos_token_id": config.bos_token_id(),
            "eos_token_id": config.eos_token_ids(),
            "do_sample": true,
            "temperature": 0.8,
        }),
    )?;
    let tokenizer =
        tokenizer.to_string(false).map_err(|e| anyhow::anyhow!("cannot write the tokenizer: {e}"))?;
    write_atomically(&folder.join("tokenizer.json"), tokenizer.as_bytes())
}

/// Writes `model.safetensors`.
pub fn write_model(folder: &Path, params: BTreeMap<String, Tensor>, dtype: DType) -> Result<()> {
    let tensors = params
        .into_iter()
        .map(|(name, tensor)| Ok((name, tensor.to_dtype(dtype)?)))
        .collect::<Result<Vec<_>>>()?;
    // Readers in Python refuse a file that does not say which framework it is for.
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    write_safetensors(&folder.join("model.safetensors"), &tensors, &metadata)
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    write_atomically(path, (serde_json::to_string_pretty(value)? + "\n").as_bytes())
}
