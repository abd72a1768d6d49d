//! Writes a text with a linear-attention model.
//!
//! ```text
//! cargo run --release --example generate
//! cargo run --release --example generate -- --prompt "The little robot" --temperature 0.6
//! cargo run --release --example generate -- --model-id fla-hub/gla-1.3B-100B --prompt "Linear attention"
//! ```

mod args;
#[path = "../common/mod.rs"]
mod common;
mod sampler;

use anyhow::{Result, ensure};
use args::Args;
use candle_core::{DType, Tensor};
use candle_linear_attn::models::{Cache, Model};
use clap::Parser;
use common::{
    runtime::{open_model, prepare_process},
    text::{TextStream, encode_prompt, load_tokenizer},
};
use sampler::Sampler;
use std::{
    collections::HashSet,
    io::{ErrorKind, Write},
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

/// A prompt is read in pieces of so many tokens: what a piece needs besides the state grows with its length.
const PIECE: usize = 2048;

fn main() -> ExitCode {
    prepare_process();
    common::exit_code(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    args.validate()?;
    let prompt = args.prompt()?;
    let folder = args.model_folder()?;
    // The tokenizer first: it is small, and a folder that lacks it is no use however well its weights load.
    let tokenizer = load_tokenizer(&folder.join("tokenizer.json"))?;
    let model = open_model(&folder, &args.compute)?;
    let ids = encode_prompt(&tokenizer, &prompt)?;
    check_prompt(&model, &ids)?;

    let mut stream = TextStream::after(&tokenizer, &ids)?;
    let mut generator = Generator {
        ends: end_tokens(&model, &folder),
        sampler: Sampler::new(args),
        cache: model.new_cache(),
        model: &model,
        limit: args.max_new_tokens,
        report: Report { prompt_tokens: ids.len(), ..Report::default() },
    };
    let mut stdout = std::io::stdout();
    let mut show = |text: &str| -> Result<bool> {
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Ok(()) => Ok(true),
            // Whoever reads has had enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
            Err(error) => Err(error.into()),
        }
    };
    if show(&prompt)? {
        generator.run(ids, |id| show(&stream.push(id)?))?;
        show("\n")?;
    }
    eprintln!("{}", generator.report);
    Ok(())
}

fn check_prompt(model: &Model, ids: &[u32]) -> Result<()> {
    ensure!(!ids.is_empty(), "the prompt has no tokens");
    let vocab = model.config().vocab_size();
    let highest = ids.iter().copied().max().unwrap_or(0);
    ensure!(
        (highest as usize) < vocab,
        "the tokenizer gives token {highest}, the model knows {vocab}: they do not belong together"
    );
    Ok(())
}

/// What ends a text, by config.json and by generation_config.json: chat models name more tokens in the latter.
fn end_tokens(model: &Model, folder: &Path) -> HashSet<u32> {
    let mut ends: HashSet<u32> = model.config().eos_token_ids().into_iter().collect();
    let generation = std::fs::read_to_string(folder.join("generation_config.json"))
        .ok()
        .and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
    if let Some(generation) = generation {
        let ids = match &generation["eos_token_id"] {
            serde_json::Value::Array(ids) => ids.clone(),
            id => vec![id.clone()],
        };
        ends.extend(ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()));
    }
    ends
}

struct Generator<'a> {
    model: &'a Model,
    cache: Cache,
    sampler: Sampler,
    ends: HashSet<u32>,
    limit: usize,
    report: Report,
}

impl Generator<'_> {
    /// Goes on from `ids` until the text ends, the limit is reached or `show` returns false.
    fn run(&mut self, mut ids: Vec<u32>, mut show: impl FnMut(u32) -> Result<bool>) -> Result<()> {
        let started = Instant::now();
        let mut logits = self.read(&ids)?;
        self.report.prompt_time = started.elapsed();
        let started = Instant::now();
        for count in 1..=self.limit {
            let id = self.sampler.next(&logits, &ids)?;
            self.report.new_tokens = count;
            self.report.decode_time = started.elapsed();
            if self.ends.contains(&id) || !show(id)? {
                break;
            }
            ids.push(id);
            if count < self.limit {
                logits = self.read(&[id])?;
            }
        }
        Ok(())
    }

    /// Logits `[vocab]` f32 after the last of `ids`. The others need no logits, so they do not go through the head.
    fn read(&mut self, ids: &[u32]) -> Result<Tensor> {
        let mut last = None;
        for piece in ids.chunks(PIECE) {
            let input = Tensor::from_slice(piece, (1, piece.len()), self.model.device())?;
            let hidden = self.model.hidden_states(&input, Some(&mut self.cache))?;
            last = Some(hidden.narrow(1, piece.len() - 1, 1)?);
            self.report.peak_state = self.report.peak_state.max(self.cache.bytes());
        }
        let Some(last) = last else {
            anyhow::bail!("the prompt has no tokens");
        };
        let logits = self.model.logits(&last)?.flatten_all()?.to_dtype(DType::F32)?;
        Ok(logits.to_device(&candle_core::Device::Cpu)?)
    }
}

/// How fast it went.
#[derive(Debug, Default)]
struct Report {
    prompt_tokens: usize,
    prompt_time: Duration,
    new_tokens: usize,
    decode_time: Duration,
    peak_state: usize,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        // The first new token comes out of the prompt's last position; decoding is what each further one takes.
        let decoded = self.new_tokens.saturating_sub(1);
        let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
        write!(
            f,
            "prompt: {} tokens, {:.1} tokens/s; decode: {} tokens, {:.1} tokens/s; peak state: {:.1} KiB",
            self.prompt_tokens,
            rate(self.prompt_tokens, self.prompt_time),
            decoded,
            rate(decoded, self.decode_time),
            self.peak_state as f64 / 1024.0,
        )
    }
}
