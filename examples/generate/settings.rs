//! How tokens are chosen and what ends a text: by the command line, else by the model's `generation_config.json`.

use crate::{args::Args, template::read_json};
use anyhow::{Result, ensure};
use candle_linear_attn::models::Config;
use serde_json::Value;
use std::{collections::HashSet, path::Path};

/// What `generation_config.json` is called.
const FILE: &str = "generation_config.json";

#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    pub temperature: f64,
    pub top_p: f64,
    pub top_k: Option<usize>,
    pub repeat_penalty: f32,
    pub repeat_last_n: usize,
    pub seed: u64,
    pub max_new_tokens: usize,
    /// The tokens that end a text.
    pub ends: HashSet<u32>,
}

impl Settings {
    pub fn new(args: &Args, config: &Config, folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let file = read_json(&path)?;
        let settings = Self::merged(args, &file, config.eos_token_ids());
        settings.check(&path)?;
        Ok(settings)
    }

    fn merged(args: &Args, file: &Value, ends: Vec<u32>) -> Self {
        let number = |name: &str| file[name].as_f64();
        // What is said on the command line is meant, whatever the file says of sampling as a whole.
        let greedy = file["do_sample"] == false;
        let stored_temperature = if greedy { Some(0.) } else { number("temperature") };
        let mut all_ends: HashSet<u32> = ends.into_iter().collect();
        let more = match &file["eos_token_id"] {
            Value::Array(ids) => ids.as_slice(),
            id => std::slice::from_ref(id),
        };
        // Chat models name more tokens here than in config.json.
        all_ends.extend(more.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()));
        let stored_top_k = file["top_k"].as_u64().map(|k| k as usize);
        Self {
            temperature: args.temperature.or(stored_temperature).unwrap_or(0.8),
            top_p: args.top_p.or(number("top_p")).unwrap_or(0.95),
            // There, 0 means all of them.
            top_k: args.top_k.or(stored_top_k).filter(|k| *k > 0),
            repeat_penalty: args
                .repeat_penalty
                .or(number("repetition_penalty").map(|penalty| penalty as f32))
                .unwrap_or(1.),
            repeat_last_n: args.repeat_last_n,
            seed: args.seed,
            max_new_tokens: args.max_new_tokens,
            ends: all_ends,
        }
    }

    /// The command line has been checked already.
    fn check(&self, path: &Path) -> Result<()> {
        let path = path.display();
        let Self { temperature, top_p, repeat_penalty, .. } = self;
        ensure!(
            temperature.is_finite() && *temperature >= 0.,
            "{path}: temperature is {temperature}, must be 0 or a positive number"
        );
        ensure!(*top_p > 0. && *top_p <= 1., "{path}: top_p is {top_p}, must be more than 0 and at most 1");
        ensure!(
            (1e-3..=1e3).contains(repeat_penalty),
            "{path}: repetition_penalty is {repeat_penalty}, must be from 0.001 to 1000"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use serde_json::json;

    fn merged(arguments: &[&str], file: Value) -> Settings {
        Settings::merged(&Args::parse_from([&["generate"], arguments].concat()), &file, vec![2])
    }

    #[test]
    fn the_file_says_what_the_command_line_does_not() {
        let file = json!({
            "do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1,
            "eos_token_id": [7, 8],
        });
        let settings = merged(&["--top-p", "0.5"], file);
        assert_eq!((settings.temperature, settings.top_p, settings.top_k), (0.6, 0.5, Some(20)));
        assert_eq!((settings.repeat_penalty, settings.ends), (1.1, HashSet::from([2, 7, 8])));
        let settings = merged(&[], Value::Null);
        assert_eq!((settings.temperature, settings.top_p, settings.top_k), (0.8, 0.95, None));
        assert_eq!(merged(&[], json!({"top_k": 0, "eos_token_id": 9})).ends, HashSet::from([2, 9]));
    }

    #[test]
    fn a_model_that_does_not_sample_can_be_asked_to() {
        let file = json!({"do_sample": false, "temperature": 0.6});
        assert_eq!(merged(&[], file.clone()).temperature, 0.);
        assert_eq!(merged(&["--temperature", "0.3"], file).temperature, 0.3);
    }

    #[test]
    fn numbers_that_no_text_can_be_sampled_with_are_refused_by_file_and_name() {
        let settings = merged(&[], json!({"top_p": 1.5}));
        let message = settings.check(Path::new("m/generation_config.json")).unwrap_err().to_string();
        assert_eq!(message, "m/generation_config.json: top_p is 1.5, must be more than 0 and at most 1");
    }
}
