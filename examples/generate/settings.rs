//! How tokens are chosen and what ends a text: by the command line, else by the model's `generation_config.json`.

use crate::{args::Args, fields::Fields};
use anyhow::{Result, bail};
use serde::Deserialize;
use std::{collections::HashSet, path::Path};

const FILE: &str = "generation_config.json";

const IDS: &str = "a token id or a list of them";

/// Tokens of a text, and of an answer, which may have been thought about for long.
const TEXT_TOKENS: usize = 400;
const ANSWER_TOKENS: usize = 4096;

/// Numbers that a text can be sampled with.
pub struct Range {
    contains: fn(f64) -> bool,
    what: &'static str,
}

pub const TEMPERATURE: Range =
    Range { contains: |x| x.is_finite() && x >= 0., what: "0 or a positive number" };
pub const TOP_P: Range = Range { contains: |x| x > 0. && x <= 1., what: "more than 0 and at most 1" };
pub const MIN_P: Range = Range { contains: |x| (0.0..=1.).contains(&x), what: "from 0 to 1" };
pub const REPEAT_PENALTY: Range =
    Range { contains: |x| (1e-3..=1e3).contains(&x), what: "from 0.001 to 1000" };

impl Range {
    pub fn check(&self, name: &str, value: Option<f64>) -> Result<()> {
        match value {
            Some(value) if !(self.contains)(value) => bail!("{name} is {value}, must be {}", self.what),
            _ => Ok(()),
        }
    }

    fn read(&self, file: &Fields, field: &str) -> Result<Option<f64>> {
        let value = file.get(field, self.what)?;
        self.check(&file.name_of(field), value)?;
        Ok(value)
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    pub temperature: f64,
    pub top_p: f64,
    pub top_k: Option<usize>,
    pub min_p: f64,
    pub repeat_penalty: f64,
    pub repeat_last_n: usize,
    pub seed: u64,
    pub max_new_tokens: usize,
    /// The tokens that end a text, if the file names any.
    pub ends: Option<HashSet<u32>>,
}

impl Settings {
    /// For the model in a folder. What neither the command line nor the file says is 0.8, 0.95, all, 0 and 1.
    pub fn new(args: &Args, folder: &Path) -> Result<Self> {
        let file = Fields::read(folder.join(FILE))?;
        let do_sample: Option<bool> = file.get("do_sample", "true or false")?;
        // Who says how to sample on the command line wants that, whatever the file says.
        let greedy = do_sample == Some(false) && !args.sample();
        let temperature = TEMPERATURE.read(&file, "temperature")?.filter(|_| !greedy);
        let top_k = file.get::<usize>("top_k", "a number of tokens, or 0 for all")?;
        let limit = file.get::<usize>("max_new_tokens", "a number of tokens")?;
        if limit == Some(0) {
            bail!("{} is 0, must be at least 1", file.name_of("max_new_tokens"));
        }
        let ends = match file.get("eos_token_id", IDS) {
            // What some tools write for none.
            Ok(Some(-1)) => None,
            _ => file.get::<Ids>("eos_token_id", IDS)?,
        };
        Ok(Self {
            temperature: args.temperature.or(temperature).unwrap_or(if greedy { 0. } else { 0.8 }),
            top_p: args.top_p.or(TOP_P.read(&file, "top_p")?).unwrap_or(0.95),
            top_k: args.top_k.or(top_k).filter(|k| *k > 0),
            min_p: args.min_p.or(MIN_P.read(&file, "min_p")?).unwrap_or(0.),
            repeat_penalty: args
                .repeat_penalty
                .or(REPEAT_PENALTY.read(&file, "repetition_penalty")?)
                .unwrap_or(1.),
            repeat_last_n: args.repeat_last_n,
            seed: args.seed,
            max_new_tokens: args.max_new_tokens.or(limit).unwrap_or(match args.chat {
                true => ANSWER_TOKENS,
                false => TEXT_TOKENS,
            }),
            ends: ends.map(|ends| match ends {
                Ids::One(id) => HashSet::from([id]),
                Ids::Many(ids) => ids.into_iter().collect(),
            }),
        })
    }
}

#[cfg(test)]
impl Settings {
    /// Every token by its probability, 30 of them, with no end.
    pub fn plain() -> Self {
        Self {
            temperature: 1.,
            top_p: 1.,
            top_k: None,
            min_p: 0.,
            repeat_penalty: 1.,
            repeat_last_n: 0,
            seed: 5,
            max_new_tokens: 30,
            ends: None,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Many(Vec<u32>),
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use serde_json::{Value, json};

    fn settings(arguments: &[&str], file: &str) -> Result<Settings> {
        let folder = tempfile::tempdir()?;
        std::fs::write(folder.path().join(FILE), file)?;
        Settings::new(&Args::parse_from([&["generate"], arguments].concat()), folder.path())
    }

    fn of(arguments: &[&str], file: Value) -> Settings {
        settings(arguments, &file.to_string()).unwrap()
    }

    #[test]
    fn the_file_says_what_the_command_line_does_not() {
        let file = json!({
            "do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.05,
            "repetition_penalty": 1.1, "eos_token_id": [7, 8], "max_new_tokens": 9, "pad_token_id": 3,
        });
        let found = of(&["--top-p", "0.5", "--min-p", "0.1"], file.clone());
        assert_eq!((found.temperature, found.top_p, found.top_k, found.min_p), (0.6, 0.5, Some(20), 0.1));
        assert_eq!((found.repeat_penalty, found.ends), (1.1, Some(HashSet::from([7, 8]))));
        assert_eq!(found.max_new_tokens, 9);
        let found = of(&["--temperature", "1", "--top-k", "3", "--repeat-penalty", "2", "-n", "1"], file);
        assert_eq!((found.temperature, found.top_p, found.top_k, found.min_p), (1., 0.9, Some(3), 0.05));
        assert_eq!((found.repeat_penalty, found.max_new_tokens), (2., 1));
    }

    #[test]
    fn without_a_file_or_a_field_there_are_defaults() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let missing = Settings::new(&Args::parse_from(["generate"]), folder.path())?;
        assert_eq!((missing.temperature, missing.top_p, missing.top_k, missing.min_p), (0.8, 0.95, None, 0.));
        assert_eq!((missing.repeat_penalty, missing.max_new_tokens, &missing.ends), (1., 400, &None));
        assert_eq!(of(&[], json!({"top_k": 0, "temperature": null, "eos_token_id": -1})), missing);
        assert_eq!(of(&["--chat"], json!({})).max_new_tokens, 4096);
        assert_eq!(of(&[], json!({"eos_token_id": 9})).ends, Some(HashSet::from([9])));
        Ok(())
    }

    #[test]
    fn a_model_that_does_not_sample_can_be_asked_to() {
        let file = json!({"do_sample": false, "temperature": 0.6});
        assert_eq!(of(&[], file.clone()).temperature, 0.);
        assert_eq!(of(&["--temperature", "0.3"], file.clone()).temperature, 0.3);
        assert_eq!(of(&["--top-k", "5"], file).temperature, 0.6);
        assert_eq!(of(&["--temperature", "0"], json!({"do_sample": true})).temperature, 0.);
    }

    #[test]
    fn what_cannot_be_is_refused_by_file_and_field() {
        for (file, message) in [
            (r#"{"top_p": 1.5}"#, "top_p is 1.5, must be more than 0 and at most 1"),
            (r#"{"temperature": -1}"#, "temperature is -1, must be 0 or a positive number"),
            (r#"{"temperature": "hot"}"#, r#"temperature is "hot", must be 0 or a positive number"#),
            (r#"{"top_k": -1}"#, "top_k is -1, must be a number of tokens, or 0 for all"),
            (r#"{"min_p": 2}"#, "min_p is 2, must be from 0 to 1"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty is 0, must be from 0.001 to 1000"),
            (r#"{"do_sample": "yes"}"#, r#"do_sample is "yes", must be true or false"#),
            (
                r#"{"eos_token_id": "</s>"}"#,
                r#"eos_token_id is "</s>", must be a token id or a list of them"#,
            ),
            (r#"{"eos_token_id": -2}"#, "eos_token_id is -2, must be a token id or a list of them"),
            (r#"{"eos_token_id": [1, -1]}"#, "eos_token_id is [1,-1], must be a token id or a list of them"),
            (r#"{"max_new_tokens": 0}"#, "max_new_tokens is 0, must be at least 1"),
            ("[]", "not a JSON object"),
            ("{", "not a JSON object"),
        ] {
            let found = format!("{:#}", settings(&[], file).unwrap_err());
            assert!(found.contains(FILE) && found.contains(message), "{file}: {found}");
        }
    }
}
