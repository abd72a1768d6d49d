//! The command line, and which part of it a training run cannot be resumed without.

use crate::common::{
    runtime::{DTypeArg, ModeArg},
    text::END_OF_TEXT,
};
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use candle_linear_attn::models::{Config, SUPPORTED};
use clap::{Parser, ValueEnum};
use serde_json::{Map, Value, json};
use std::path::PathBuf;

/// Models of linear and softmax attention: heads of two kinds, experts, widths of their own.
const HYBRIDS: [&str; 6] = ["qwen3_5", "qwen3_5_text", "qwen3_next", "minimax", "olmo_hybrid", "kimi_linear"];

/// The trainer of the tokenizer makes room for all of it at once.
const MOST_VOCABULARY: usize = 1 << 20;
/// A thousand years: clocks go no further than they have to.
const MOST_MINUTES: f64 = 5e8;

/// Trains a linear-attention language model on text and writes it in Hugging Face form.
///
/// Texts in a data file are separated by a line `<|endoftext|>`. Killed at any moment and started again with the same
/// arguments, it goes on where it was.
#[derive(Parser, Debug)]
#[command(allow_negative_numbers = true)]
pub struct Args {
    /// Text to train on.
    #[arg(long, value_name = "TXT", required_unless_present = "eval_only")]
    pub data: Option<PathBuf>,
    /// Text to validate on, in bits per byte.
    #[arg(long, value_name = "TXT")]
    pub valid: Option<PathBuf>,
    /// Folder for the model, the training state, the log and the loss curve.
    #[arg(long, value_name = "DIR", required_unless_present = "eval_only")]
    pub out: Option<PathBuf>,
    /// Train nothing: print the bits per byte of the model in this folder on --valid.
    #[arg(long, value_name = "DIR", requires = "valid")]
    pub eval_only: Option<PathBuf>,

    /// Which model: gla, linear_attn, retnet, hgrn2, mamba2, delta_net, gated_deltanet, kda or rwkv7.
    #[arg(long, default_value = "gla")]
    pub model_type: String,
    /// A config.json to start from, instead of --model-type and the sizes.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model_type", "hidden_size", "layers", "heads"])]
    pub config: Option<PathBuf>,
    #[arg(long, default_value_t = 256)]
    pub hidden_size: usize,
    #[arg(long, default_value_t = 4)]
    pub layers: usize,
    #[arg(long, default_value_t = 4)]
    pub heads: usize,
    /// Share one matrix between the embedding and the output head.
    #[arg(long)]
    pub tie_embeddings: bool,
    /// Any other field of config.json, e.g. --set expand_k=1.0; the value is JSON.
    #[arg(long = "set", value_name = "FIELD=JSON")]
    pub fields: Vec<String>,

    /// A tokenizer.json to use; without it a byte-level BPE is trained on the data.
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Size of the BPE to train.
    #[arg(long, default_value_t = 4096)]
    pub vocab_size: usize,
    /// How much of the data the BPE is trained on.
    #[arg(long, default_value_t = 10_000_000)]
    pub bpe_bytes: usize,
    /// The token between texts. A loaded tokenizer must have it.
    #[arg(long, default_value = END_OF_TEXT)]
    pub end_token: String,

    #[arg(long, default_value_t = 2000)]
    pub steps: usize,
    /// Sequences in a batch.
    #[arg(long, default_value_t = 8)]
    pub batch_size: usize,
    /// Batches whose gradients are averaged for one step.
    #[arg(long, default_value_t = 1)]
    pub grad_accum: usize,
    /// Tokens in a sequence.
    #[arg(long, default_value_t = 256)]
    pub seq_len: usize,
    /// Peak learning rate, reached after --warmup steps.
    #[arg(long, default_value_t = 2e-3)]
    pub lr: f64,
    /// Learning rate at the last step; a tenth of --lr unless given.
    #[arg(long)]
    pub min_lr: Option<f64>,
    #[arg(long, default_value_t = 100)]
    pub warmup: usize,
    #[arg(long, default_value_t = 0.1)]
    pub weight_decay: f64,
    #[arg(long, default_value_t = 0.9)]
    pub beta1: f64,
    #[arg(long, default_value_t = 0.95)]
    pub beta2: f64,
    /// The norm of the gradient over all parameters is cut down to this.
    #[arg(long, default_value_t = 1.0)]
    pub clip: f64,
    /// Decides the initial parameters and the order of the data.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Validate, and write the model and the curve, every so many steps; 0: at the end only.
    #[arg(long, default_value_t = 200)]
    pub eval_every: usize,
    /// Write the training state every so many steps. More than 1 loses up to that many steps when killed.
    #[arg(long, default_value_t = 1)]
    pub save_every: usize,
    /// Stop after this time, in a state to go on from.
    #[arg(long)]
    pub max_minutes: Option<f64>,
    /// Number format of the written model.
    #[arg(long, value_enum, default_value = "bf16")]
    pub dtype: DTypeArg,
    /// Number format to compute the model and its gradients in; f32 on a CPU and bf16 on a GPU unless given. Parameters,
    /// their moments and the sums of their gradients are f32 in any case.
    #[arg(long, value_enum)]
    pub compute_dtype: Option<ComputeDType>,
    /// The algorithm of the operators.
    #[arg(long, value_enum, default_value = "auto")]
    pub mode: ModeArg,
    /// Stay on the CPU.
    #[arg(long)]
    pub cpu: bool,
}

/// `--compute-dtype`. Gradients would vanish in f16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ComputeDType {
    F32,
    Bf16,
}

impl ComputeDType {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        DType::from(self).as_str()
    }
}

impl From<ComputeDType> for DType {
    fn from(dtype: ComputeDType) -> Self {
        match dtype {
            ComputeDType::F32 => Self::F32,
            ComputeDType::Bf16 => Self::BF16,
        }
    }
}

impl Args {
    /// Refuses numbers that no run can be made of.
    pub fn validate(&self) -> Result<()> {
        for (name, value) in [
            ("steps", self.steps),
            ("batch-size", self.batch_size),
            ("grad-accum", self.grad_accum),
            ("seq-len", self.seq_len),
            ("save-every", self.save_every),
            ("bpe-bytes", self.bpe_bytes),
        ] {
            ensure!(value > 0, "--{name} is 0, must be at least 1");
        }
        let tokens = [self.steps, self.batch_size, self.grad_accum, self.seq_len];
        ensure!(
            tokens
                .into_iter()
                .try_fold(1u64, |all, part| all.checked_mul(part as u64))
                .is_some_and(|all| all < 1 << 62),
            "--steps times --batch-size times --grad-accum times --seq-len are more tokens than can be counted"
        );
        for (name, value) in [("lr", self.lr), ("clip", self.clip)] {
            ensure!(value.is_finite() && value > 0.0, "--{name} is {value}, must be a positive number");
        }
        for (name, value) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            ensure!((0.0..1.0).contains(&value), "--{name} is {value}, must be in [0, 1)");
        }
        for (name, value) in [("min-lr", self.min_lr()), ("weight-decay", self.weight_decay)] {
            ensure!(value.is_finite() && value >= 0.0, "--{name} is {value}, must be 0 or a positive number");
        }
        let (min_lr, lr) = (self.min_lr(), self.lr);
        ensure!(min_lr <= lr, "--min-lr is {min_lr}, must be at most --lr, {lr}");
        ensure!(
            (257..=MOST_VOCABULARY).contains(&self.vocab_size),
            "--vocab-size is {}, must be at least 257, a token for each byte and {}, and at most {MOST_VOCABULARY}",
            self.vocab_size,
            self.end_token
        );
        ensure!(!self.end_token.is_empty(), "--end-token is empty, must have at least one character");
        if let Some(minutes) = self.max_minutes {
            ensure!(
                minutes > 0.0 && minutes <= MOST_MINUTES,
                "--max-minutes is {minutes}, must be more than 0 and at most {MOST_MINUTES}"
            );
        }
        Ok(())
    }

    pub fn min_lr(&self) -> f64 {
        self.min_lr.unwrap_or(self.lr / 10.0)
    }

    /// A CPU is slower in 16 bits than in 32, a GPU many times faster.
    pub fn compute_dtype(&self, device: &Device) -> ComputeDType {
        self.compute_dtype.unwrap_or(if device.is_cpu() { ComputeDType::F32 } else { ComputeDType::Bf16 })
    }

    /// The model to train, for a vocabulary of `vocab_size` where `end_token` opens and closes a text.
    pub fn model_config(&self, vocab_size: usize, end_token: u32) -> Result<Config> {
        let mut fields = match &self.config {
            Some(file) => read_object(file)?,
            None => self.fields_from_sizes()?,
        };
        let set = self.fields.iter().map(|field| parse_field(field)).collect::<Result<Map<_, _>>>()?;
        fields.extend(set.clone());
        ensure!(
            !fields.contains_key("text_config"),
            "--config is that of a multimodal model, must be that of a model of text: its `text_config` alone"
        );
        // What is not a number of tokens is left for `Config` to refuse.
        let wanted = fields.get("vocab_size").map_or(Some(0), Value::as_u64);
        if let Some(wanted) = wanted {
            fields.insert("vocab_size".into(), json!(wanted.max(vocab_size as u64)));
        }
        fields.insert("bos_token_id".into(), json!(end_token));
        fields.insert("eos_token_id".into(), json!(end_token));
        let config = Config::from_json_str(&Value::Object(fields).to_string())?;
        if let Some(name) = config.unread_fields().iter().find(|name| set.contains_key(*name)) {
            bail!("--set {name}: a model of type {} has no such field", config.model_type());
        }
        Ok(config)
    }

    fn fields_from_sizes(&self) -> Result<Map<String, Value>> {
        ensure!(
            SUPPORTED.contains(&self.model_type.as_str()),
            "--model-type is {:?}, must be one of {}",
            self.model_type,
            SUPPORTED.join(", ")
        );
        ensure!(
            !HYBRIDS.contains(&self.model_type.as_str()),
            "--model-type is {:?}, which has more sizes than there are options: give its config.json as --config",
            self.model_type
        );
        let fields = json!({
            "model_type": self.model_type,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_heads": self.heads,
            "tie_word_embeddings": self.tie_embeddings,
        });
        let Value::Object(mut fields) = fields else { unreachable!("an object literal") };
        if let Some((name, width)) = self.head_width() {
            fields.insert(name.into(), json!(width.max(1)));
        }
        Ok(fields)
    }

    /// In some models the width of a head is not what the number of heads leaves it, but a field of its own. What the
    /// authors advise for it, all heads together: three quarters of the model's width for `gated_deltanet`, twice for
    /// `mamba2`, once for the others.
    fn head_width(&self) -> Option<(&'static str, usize)> {
        let heads = self.heads.max(1);
        match self.model_type.as_str() {
            "hgrn2" => Some(("expand_ratio", self.hidden_size / heads)),
            "mamba2" => Some(("head_dim", self.hidden_size.saturating_mul(2) / heads)),
            "gated_deltanet" => Some(("head_dim", self.hidden_size.saturating_mul(3) / 4 / heads)),
            "kda" | "rwkv7" => Some(("head_dim", self.hidden_size / heads)),
            _ => None,
        }
    }

    /// Everything that decides the parameters after a given step. A run is resumed only where all of it is the same.
    pub fn recipe(
        &self,
        config: &Config,
        compute: ComputeDType,
        tokenizer: u64,
        data: u64,
    ) -> Result<Map<String, Value>> {
        let mut recipe = Map::new();
        let model: Map<String, Value> = serde_json::from_str(&config.to_json())?;
        for (field, value) in model {
            recipe.insert(format!("config.{field}"), value);
        }
        for (name, value) in [
            ("tokenizer", json!(format!("{tokenizer:016x}"))),
            ("data", json!(format!("{data:016x}"))),
            ("steps", json!(self.steps)),
            ("batch-size", json!(self.batch_size)),
            ("grad-accum", json!(self.grad_accum)),
            ("seq-len", json!(self.seq_len)),
            ("lr", json!(self.lr)),
            ("min-lr", json!(self.min_lr())),
            ("warmup", json!(self.warmup)),
            ("weight-decay", json!(self.weight_decay)),
            ("beta1", json!(self.beta1)),
            ("beta2", json!(self.beta2)),
            ("clip", json!(self.clip)),
            ("seed", json!(self.seed)),
            ("compute-dtype", json!(compute.name())),
        ] {
            recipe.insert(name.into(), value);
        }
        Ok(recipe)
    }
}

fn read_object(file: &PathBuf) -> Result<Map<String, Value>> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("cannot read --config {}", file.display()))?;
    match serde_json::from_str(&text) {
        Ok(fields) => Ok(fields),
        // Python's infinities are not JSON, but `Config` knows them.
        Err(_) if Config::from_json_str(&text).is_ok() => {
            Ok(serde_json::from_str(&Config::from_json_str(&text)?.to_json())?)
        }
        Err(error) => Err(error).with_context(|| format!("--config {} is not a JSON object", file.display())),
    }
}

fn parse_field(assignment: &str) -> Result<(String, Value)> {
    let Some((name, value)) = assignment.split_once('=') else {
        bail!("--set is {assignment:?}, must be FIELD=JSON, e.g. expand_k=1.0");
    };
    let value = serde_json::from_str(value)
        .with_context(|| format!("--set {name}: {value:?} is not JSON (a string needs quotes)"))?;
    Ok((name.to_owned(), value))
}
