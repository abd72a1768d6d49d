//! Writes the logits of a model for given token ids, to check a port or a change against.
//!
//! ```text
//! cargo run --release --example logits -- --model DIR --tokens 5,17,3 --split 2 --output logits.safetensors
//! ```

mod common;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_linear_attn::models::Model;
use clap::Parser;
use common::{
    files::write_safetensors,
    runtime::{ComputeArgs, open_model, prepare_process},
};
use std::{collections::BTreeMap, path::PathBuf, process::ExitCode};

/// Computes the logits of a model for a sequence of token ids and writes them as `logits`, [T, vocab] f32.
#[derive(Parser, Debug)]
struct Args {
    /// Folder with config.json and model.safetensors.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Token ids, e.g. 5,17,3.
    #[arg(long, value_delimiter = ',', required = true)]
    tokens: Vec<u32>,
    /// Process so many tokens as one piece and the rest one at a time from the cache; all as one piece unless given.
    #[arg(long, value_name = "S")]
    split: Option<usize>,
    /// The safetensors file to write.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    compute: ComputeArgs,
}

fn main() -> ExitCode {
    prepare_process();
    common::exit_code(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let len = args.tokens.len();
    let split = args.split.unwrap_or(len);
    ensure!(split <= len, "--split is {split}, must be at most the number of tokens, {len}");
    let model = open_model(&args.model, &args.compute)?;
    let vocab = model.config().vocab_size();
    if let Some(id) = args.tokens.iter().find(|&&id| id as usize >= vocab) {
        anyhow::bail!("--tokens has {id}, must be less than the vocabulary size, {vocab}");
    }
    let logits = logits(&model, &args.tokens, split)?;
    let metadata = BTreeMap::from([("split".to_owned(), split.to_string())]);
    // A file name alone has an empty parent, which is no folder to rename in.
    let output = std::path::absolute(&args.output)?;
    write_safetensors(&output, &[("logits".to_owned(), logits)], &metadata)
        .with_context(|| format!("cannot write --output {}", args.output.display()))
}

/// `[T, vocab]` f32 on the CPU.
fn logits(model: &Model, tokens: &[u32], split: usize) -> Result<Tensor> {
    let mut cache = model.new_cache();
    let mut forward = |piece: &[u32]| -> Result<Tensor> {
        let ids = Tensor::from_slice(piece, (1, piece.len()), model.device())?;
        let logits = model.forward(&ids, Some(&mut cache))?.squeeze(0)?;
        Ok(logits.to_dtype(DType::F32)?.to_device(&Device::Cpu)?)
    };
    let (first, rest) = tokens.split_at(split);
    let mut pieces = Vec::with_capacity(1 + rest.len());
    if !first.is_empty() {
        pieces.push(forward(first)?);
    }
    for id in rest {
        pieces.push(forward(std::slice::from_ref(id))?);
    }
    Ok(Tensor::cat(&pieces, 0)?)
}
