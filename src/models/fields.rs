//! Reads the fields of a `config.json` one by one, with errors that name the field, what it was and what it must be.

use crate::nn::MAX_SIZE;
use candle_core::{Result, bail};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// The fields of a configuration. An absent one is filled in with its default as it is read, so that what is left in the
/// end holds all of them.
#[derive(Debug, Clone)]
pub(super) struct Fields {
    map: Map<String, Value>,
    /// The names that somebody has asked for.
    asked: RefCell<BTreeSet<String>>,
}

impl Fields {
    pub fn new(map: Map<String, Value>) -> Self {
        Self { map, asked: RefCell::default() }
    }

    /// The fields that nobody has asked for.
    pub fn unread(&self) -> Vec<String> {
        self.map.keys().filter(|name| !self.asked.borrow().contains(*name)).cloned().collect()
    }

    fn find(&self, name: &str) -> Option<&Value> {
        self.asked.borrow_mut().insert(name.into());
        self.map.get(name)
    }

    pub fn into_map(self) -> Map<String, Value> {
        self.map
    }

    /// A size: a whole number from 1 up.
    pub fn size(&mut self, name: &str, default: usize) -> Result<usize> {
        self.size_up_to(MAX_SIZE, name, default)
    }

    /// A size with a limit of its own.
    pub fn size_up_to(&mut self, limit: usize, name: &str, default: usize) -> Result<usize> {
        let value = self.value(name, default.into());
        match value.as_u64() {
            Some(size) if (1..=limit as u64).contains(&size) => Ok(size as usize),
            _ => bail!("field `{name}` is {value}, it must be a whole number from 1 to {limit}"),
        }
    }

    /// A size or null.
    pub fn optional_size(&mut self, name: &str, default: Option<usize>) -> Result<Option<usize>> {
        match self.value(name, default.into()) {
            Value::Null => Ok(None),
            _ => self.size(name, 1).map(Some),
        }
    }

    /// A finite number.
    pub fn number(&mut self, name: &str, default: f64) -> Result<f64> {
        match self.optional_number(name, Some(default))? {
            Some(number) => Ok(number),
            None => bail!("field `{name}` is null, it must be a number"),
        }
    }

    /// A finite number or null.
    pub fn optional_number(&mut self, name: &str, default: Option<f64>) -> Result<Option<f64>> {
        let value = self.value(name, default.into());
        match value.as_f64() {
            _ if value.is_null() => Ok(None),
            Some(number) if number.is_finite() => Ok(Some(number)),
            _ => bail!("field `{name}` is {value}, it must be a number"),
        }
    }

    /// A finite number above 0.
    pub fn positive(&mut self, name: &str, default: f64) -> Result<f64> {
        match self.number(name, default)? {
            number if number > 0. => Ok(number),
            number => bail!("field `{name}` is {number}, it must be above 0"),
        }
    }

    /// true or false; null is false, as it is to the Python that wrote the file.
    pub fn flag(&mut self, name: &str, default: bool) -> Result<bool> {
        match self.value(name, default.into()) {
            Value::Bool(flag) => Ok(*flag),
            Value::Null => Ok(false),
            value => bail!("field `{name}` is {value}, it must be true or false"),
        }
    }

    /// A string.
    pub fn text(&mut self, name: &str, default: &str) -> Result<String> {
        match self.optional_text(name, Some(default))? {
            Some(text) => Ok(text),
            None => bail!("field `{name}` is null, it must be a string"),
        }
    }

    /// A string or null.
    pub fn optional_text(&mut self, name: &str, default: Option<&str>) -> Result<Option<String>> {
        match self.value(name, default.into()) {
            Value::String(text) => Ok(Some(text.clone())),
            Value::Null => Ok(None),
            value => bail!("field `{name}` is {value}, it must be a string"),
        }
    }

    /// One of a few strings.
    pub fn choice(&mut self, name: &str, default: &str, allowed: &[&str]) -> Result<String> {
        let text = self.text(name, default)?;
        if !allowed.contains(&text.as_str()) {
            bail!("field `{name}` is \"{text}\", it must be one of {}", allowed.join(", "));
        }
        Ok(text)
    }

    /// A feature that is not there: only null will do.
    pub fn absent(&mut self, name: &str, what: &str) -> Result<()> {
        match self.value(name, Value::Null) {
            Value::Null => Ok(()),
            value => bail!("field `{name}` is {value}, it must be null: {what} are not supported"),
        }
    }

    /// Two numbers that may be infinite; `None` if they are absent, which they then stay: JSON has no infinity of its own.
    pub fn pair(&self, name: &str) -> Result<Option<[f64; 2]>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let number = |value: &Value| match value["__float__"].as_str() {
            Some("Infinity") => Some(f64::INFINITY),
            Some("-Infinity") => Some(f64::NEG_INFINITY),
            _ => value.as_f64(),
        };
        match value.as_array().map(Vec::as_slice) {
            Some([a, b]) if number(a).is_some() && number(b).is_some() => {
                Ok(number(a).zip(number(b)).map(Into::into))
            }
            _ => bail!("field `{name}` is {value}, it must be two numbers"),
        }
    }

    /// A field as it is, if it is there and not null.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.find(name).filter(|value| !value.is_null())
    }

    /// An object of fields, empty if it is absent or null.
    pub fn object(&self, name: &str) -> Result<Self> {
        match self.get(name) {
            None => Ok(Self::new(Map::new())),
            Some(Value::Object(map)) => Ok(Self::new(map.clone())),
            Some(value) => bail!("field `{name}` is {value}, it must be an object"),
        }
    }

    /// Stores a field, whatever it was.
    pub fn set(&mut self, name: &str, value: Value) {
        self.map.insert(name.into(), value);
    }

    /// Whether there is no field at all.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Whether the field is there.
    pub fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// Weights that have been packed by one of many tools: what is in the files is not what the fields say.
    pub fn refuse_quantized(&self) -> Result<()> {
        match self.get("quantization_config") {
            Some(value) => bail!(
                "field `quantization_config` is {value}, it must be null: checkpoints that are quantized are not supported"
            ),
            None => Ok(()),
        }
    }

    /// A field of early versions that asks for what is not here unless it has one value, or is not there.
    pub fn early_flag(&self, name: &str, allowed: bool, what: &str) -> Result<()> {
        match self.find(name) {
            Some(Value::Bool(flag)) if *flag != allowed => {
                bail!("field `{name}` is {flag}, it must be {allowed} or absent: {what} is not supported")
            }
            _ => Ok(()),
        }
    }

    /// A field that is not checked here, filled in with its default.
    pub fn value(&mut self, name: &str, default: Value) -> &Value {
        self.asked.get_mut().insert(name.into());
        self.map.entry(name).or_insert(default)
    }
}

/// Puts the name of a field in front of what is wrong with it.
pub(super) fn in_field<T>(name: &str, result: Result<T>) -> Result<T> {
    match result {
        Ok(value) => Ok(value),
        Err(error) => bail!("field `{name}` {error}"),
    }
}

/// What a layer has to say of its sizes, with the names that a file has for them: pairs of the layer's and the file's.
pub(super) fn by_fields<T>(names: &[(&str, &str)], checked: Result<T>) -> Result<T> {
    let message = match checked {
        Ok(value) => return Ok(value),
        Err(error) => error.to_string(),
    };
    let outside = |c: char| !c.is_alphanumeric() && c != '_';
    let mut said = String::new();
    for part in message.split_inclusive(outside) {
        let word = part.trim_end_matches(outside);
        match names.iter().find(|(own, _)| *own == word) {
            Some((_, field)) if said.is_empty() => said += &format!("field `{field}`"),
            Some((_, field)) => said += field,
            None => said += word,
        }
        said += &part[word.len()..];
    }
    bail!("{said}")
}
