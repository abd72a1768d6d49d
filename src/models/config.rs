//! `config.json`: read, checked, written.

use crate::models::fields::Fields;
use crate::models::registry::{self, Family, Parsed};
use candle_core::{Result, bail};
use serde_json::{Map, Value, json};
use std::path::Path;

/// The configuration of a model: what `config.json` says, checked, with the defaults of flash-linear-attention for what
/// it does not say.
///
/// ```
/// use candle_linear_attn::models::Config;
/// # fn main() -> candle_core::Result<()> {
/// let config = Config::from_json_str(r#"{"model_type": "gla", "hidden_size": 128, "vocab_size": 512}"#)?;
/// assert_eq!(config.num_layers(), 24);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Config {
    family: &'static Family,
    fields: Map<String, Value>,
    unread: Vec<String>,
    parsed: Parsed,
    bos_token_id: Option<u32>,
    eos_token_ids: Vec<u32>,
}

impl Config {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// Text that is not a JSON object, a `model_type` not in [`SUPPORTED`](crate::models::SUPPORTED), a field of the
    /// wrong type or out of range, sizes that do not divide: by the name of the field.
    pub fn from_json_str(text: &str) -> Result<Self> {
        let map = match serde_json::from_str(text).or_else(|error| from_python(text).ok_or(error)) {
            Ok(Value::Object(map)) => map,
            Ok(value) => bail!("a configuration must be a JSON object, this is {value}"),
            Err(error) => bail!("not valid JSON: {error}"),
        };
        let mut fields = Fields::new(map);
        let family = match fields.get("model_type") {
            Some(Value::String(model_type)) => registry::family(model_type)?,
            Some(value) => bail!("field `model_type` is {value}, it must be a string"),
            None => {
                bail!("field `model_type` is missing, it must be one of {}", registry::SUPPORTED.join(", "))
            }
        };
        fields.refuse_quantized()?;
        let parsed = (family.parse)(&mut fields)?;
        let bos_token_id =
            token_ids("bos_token_id", fields.value("bos_token_id", json!(1)))?.first().copied();
        let eos_token_ids = token_ids("eos_token_id", fields.value("eos_token_id", json!(2)))?;
        fields.value("pad_token_id", Value::Null);
        fields.value("architectures", json!([family.architecture]));
        let unread = fields.unread();
        Ok(Self { family, fields: fields.into_map(), unread, parsed, bos_token_id, eos_token_ids })
    }

    /// Reads a `config.json`.
    ///
    /// # Errors
    /// Those of [`from_json_str`](Self::from_json_str), behind the path; a file that cannot be read.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) => bail!("{}: cannot be read: {error}", path.display()),
        };
        match Self::from_json_str(&text) {
            Ok(config) => Ok(config),
            Err(error) => bail!("{}: {error}", path.display()),
        }
    }

    /// The text of a `config.json` with every field, those included that were defaults. flash-linear-attention loads it.
    pub fn to_json(&self) -> String {
        // A map of plain values cannot fail to print.
        format!("{:#}\n", Value::Object(self.fields.clone()))
    }

    /// The kind of model, one of [`SUPPORTED`](crate::models::SUPPORTED).
    pub fn model_type(&self) -> &'static str {
        self.family.model_type
    }

    /// Number of tokens.
    pub fn vocab_size(&self) -> usize {
        self.parsed.vocab_size
    }

    /// Width of the residual stream.
    pub fn hidden_size(&self) -> usize {
        self.parsed.hidden_size
    }

    /// Number of blocks.
    pub fn num_layers(&self) -> usize {
        self.parsed.num_layers
    }

    /// The token that begins a text, if there is one.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.bos_token_id
    }

    /// The tokens that end a text, possibly none.
    pub fn eos_token_ids(&self) -> Vec<u32> {
        self.eos_token_ids.clone()
    }

    /// Fields of the text that say nothing about a model of this kind: of other programs, or misspelt.
    pub fn unread_fields(&self) -> &[String] {
        &self.unread
    }

    pub(super) fn parsed(&self) -> &Parsed {
        &self.parsed
    }
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Config").field(&self.fields).finish()
    }
}

/// Python writes infinities and NaN as words that JSON does not have. They become what transformers writes today:
/// `{"__float__": "Infinity"}`.
fn from_python(text: &str) -> Option<Value> {
    let mut json = String::with_capacity(text.len());
    // Every other part is the inside of a string, but for a quote behind a backslash.
    let mut inside = false;
    let mut rest = text;
    while let Some(at) = rest.find(['"', '\\']) {
        let (part, from) = rest.split_at(at);
        let marked = if from.starts_with('\\') {
            from.char_indices().nth(2).map_or(from.len(), |(at, _)| at)
        } else {
            1
        };
        json += &if inside { part.to_string() } else { mark_words(part) };
        json += &from[..marked];
        inside ^= marked == 1 && from.starts_with('"');
        rest = &from[marked..];
    }
    json += &mark_words(rest);
    serde_json::from_str(&json).ok()
}

fn mark_words(part: &str) -> String {
    let infinities = part.replace("Infinity", r#"{"__float__": "Infinity"}"#);
    let negative = infinities.replace(r#"-{"__float__": "Infinity"}"#, r#"{"__float__": "-Infinity"}"#);
    negative.replace("NaN", r#"{"__float__": "NaN"}"#)
}

/// A token id, a list of them, or null. Some tools write -1 for "none".
fn token_ids(name: &str, value: &Value) -> Result<Vec<u32>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = match value {
        Value::Null => Some(vec![]),
        Value::Array(values) => values.iter().map(id).collect(),
        value if value.as_i64() == Some(-1) => Some(vec![]),
        value => id(value).map(|id| vec![id]),
    };
    match ids {
        Some(ids) => Ok(ids),
        None => {
            bail!("field `{name}` is {value}, it must be a token id, a list of token ids or null")
        }
    }
}
