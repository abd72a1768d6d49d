//! Trains a linear-attention language model from a text file.
//!
//! ```text
//! cargo run --release --example train -- --data train.txt --valid valid.txt --out run
//! cargo run --release --example generate -- --model run
//! ```

mod args;
mod bpe;
mod chart;
mod checkpoint;
#[path = "../common/mod.rs"]
mod common;
mod data;
mod evaluate;
mod log;
mod loss;
mod optimizer;
mod params;
mod progress;
mod trainer;
mod workers;

use anyhow::{Context, Result};
use args::Args;
use clap::Parser;
use common::{
    runtime::{ComputeArgs, DTypeArg, device, open_model, prepare_process},
    text::load_tokenizer,
};
use data::{Texts, TokenStream};
use std::{path::Path, process::ExitCode};
use workers::Workers;

fn main() -> ExitCode {
    prepare_process();
    common::exit_code(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    args.validate()?;
    match &args.eval_only {
        Some(folder) => evaluate(args, folder),
        None => trainer::train(args),
    }
}

fn evaluate(args: &Args, folder: &Path) -> Result<()> {
    let valid = args.valid.as_deref().context("--eval-only needs --valid")?;
    let device = device(args.cpu)?;
    // In f32 whatever the weights are stored in: the figure is then the weights' and not the arithmetic's.
    let compute = ComputeArgs { dtype: Some(DTypeArg::F32), quantize: None, mode: args.mode, cpu: args.cpu };
    let model = open_model(folder, &compute)?;
    let tokenizer = load_tokenizer(&folder.join("tokenizer.json"))?;
    let end_token = tokenizer
        .token_to_id(&args.end_token)
        .with_context(|| format!("the tokenizer has no token {:?}", args.end_token))?;
    let stream = TokenStream::encode(&Texts::read(valid)?, &tokenizer, end_token)?;
    let workers = Workers::new(&device)?;
    let bits = evaluate::bits_per_byte(&model, &stream, end_token, args.seq_len, &workers)?;
    println!("{bits:.4} bits per byte over {} bytes", stream.text_bytes);
    Ok(())
}
