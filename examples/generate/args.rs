//! The command line.

use crate::{
    common::runtime::ComputeArgs,
    settings::{MIN_P, REPEAT_PENALTY, TEMPERATURE, TOP_P},
};
use anyhow::{Context, Result, bail, ensure};
use candle_linear_attn::models::hub;
use clap::{Parser, ValueEnum};
use std::{
    io::Read,
    path::{Path, PathBuf},
};

const DEFAULT_PROMPT: &str = "Once upon a time, there was a little girl named Lily.";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    On,
    Off,
}

/// Writes a text with a linear-attention model: without arguments, a story by the model that comes with this repository.
#[derive(Parser, Debug)]
#[command(allow_negative_numbers = true)]
pub struct Args {
    /// Folder with config.json, model.safetensors and tokenizer.json.
    #[arg(long, value_name = "DIR", conflicts_with = "model_id")]
    model: Option<PathBuf>,
    /// A model on the Hugging Face Hub, e.g. fla-hub/gla-1.3B-100B; downloaded once.
    #[arg(long, value_name = "ID")]
    model_id: Option<String>,
    /// Branch, tag or commit of --model-id.
    #[arg(long)]
    revision: Option<String>,
    /// Text to go on from; "-" reads it from stdin.
    #[arg(long, default_value = DEFAULT_PROMPT)]
    prompt: String,
    /// Talk with the model by the chat template of its folder: every line of stdin is a message; /reset begins a new
    /// conversation, /exit or the end of input ends.
    #[arg(long, conflicts_with = "prompt")]
    pub chat: bool,
    /// What --chat tells the model before all else.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,
    /// Ask the template of --chat for answers with or without thinking; as the template has it unless given.
    #[arg(long, value_enum, requires = "chat")]
    pub thinking: Option<Switch>,
    /// Do not show what --chat has the model think before it answers.
    #[arg(long, requires = "chat")]
    pub hide_thinking: bool,
    /// Below 1 the likely tokens become likelier; 0 always takes the likeliest. This and the next four are as the
    /// folder's generation_config.json says unless given, else 0.8, 0.95, all, 0 and 1.
    #[arg(long)]
    pub temperature: Option<f64>,
    /// Choose among the likeliest tokens that together have this probability.
    #[arg(long)]
    pub top_p: Option<f64>,
    /// Choose among this many of the likeliest tokens.
    #[arg(long)]
    pub top_k: Option<usize>,
    /// Choose among tokens that have at least this part of the likeliest one's probability.
    #[arg(long)]
    pub min_p: Option<f64>,
    /// Above 1, makes tokens of the last --repeat-last-n less likely.
    #[arg(long)]
    pub repeat_penalty: Option<f64>,
    #[arg(long, default_value_t = 64)]
    pub repeat_last_n: usize,
    /// The same seed writes the same text.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Stop after this many tokens if the text has not ended; as generation_config.json says unless given, else 400, and
    /// 4096 for an answer of --chat.
    #[arg(short = 'n', long)]
    pub max_new_tokens: Option<usize>,
    #[command(flatten)]
    pub compute: ComputeArgs,
}

impl Args {
    /// Refuses numbers that no text can be sampled with.
    pub fn validate(&self) -> Result<()> {
        TEMPERATURE.check("--temperature", self.temperature)?;
        TOP_P.check("--top-p", self.top_p)?;
        MIN_P.check("--min-p", self.min_p)?;
        REPEAT_PENALTY.check("--repeat-penalty", self.repeat_penalty)?;
        ensure!(self.top_k != Some(0), "--top-k is 0, must be at least 1");
        ensure!(
            self.revision.is_none() || self.model_id.is_some(),
            "--revision belongs to --model-id, which is not given"
        );
        ensure!(self.max_new_tokens != Some(0), "--max-new-tokens is 0, must be at least 1");
        Ok(())
    }

    /// Whether it is said how to sample.
    pub fn sample(&self) -> bool {
        let numbers = [self.temperature, self.top_p, self.min_p];
        numbers.iter().any(Option::is_some) || self.top_k.is_some()
    }

    pub fn prompt(&self) -> Result<String> {
        let prompt = if self.prompt == "-" {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("cannot read the prompt from stdin")?;
            // The newline that ends a piped line is not the user's.
            text.trim_end_matches(['\n', '\r']).to_owned()
        } else {
            self.prompt.clone()
        };
        ensure!(!prompt.is_empty(), "--prompt is empty, must have at least one character");
        Ok(prompt)
    }

    /// Where the model is, after a download if need be.
    pub fn model_folder(&self) -> Result<PathBuf> {
        if let Some(id) = &self.model_id {
            return Ok(hub::fetch(id, self.revision.as_deref())?);
        }
        if let Some(folder) = &self.model {
            return Ok(folder.clone());
        }
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets");
        if !folder.join("model.safetensors").is_file() {
            bail!(
                "the bundled checkpoint is not in {}: packages of the crate leave it out. Pass the assets folder of the \
                 project's repository as --model, or name a model on the Hub with --model-id",
                folder.display(),
            );
        }
        Ok(folder)
    }
}
