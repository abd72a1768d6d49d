//! The JSON files of a model folder that may be missing, but not broken.

use anyhow::{Context, Result, anyhow};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
};

/// The fields of such a file.
pub struct Fields {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl Fields {
    pub fn read(path: PathBuf) -> Result<Self> {
        let fields = match read_if_there(&path)? {
            Some(text) => serde_json::from_str(&text)
                .with_context(|| format!("{} is not a JSON object", path.display()))?,
            None => Map::new(),
        };
        Ok(Self { path, fields })
    }

    /// A field, unless it is missing or null. `what` says what it must be.
    pub fn get<T: DeserializeOwned>(&self, name: &str, what: &str) -> Result<Option<T>> {
        match self.fields.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => T::deserialize(value)
                .map(Some)
                .map_err(|_| anyhow!("{} is {value}, must be {what}", self.name_of(name))),
        }
    }

    /// How messages call a field.
    pub fn name_of(&self, field: &str) -> String {
        format!("{}: {field}", self.path.display())
    }

    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.fields.keys()
    }
}

pub fn read_if_there(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}
