//! Measures how fast a model reads a prompt and writes, and the memory that takes. It needs no tokenizer.
//!
//! ```text
//! cargo run --release --example speed -- --model DIR --prompt-tokens 512 --new-tokens 32
//! ```

mod common;

use anyhow::{Result, ensure};
use candle_core::{D, Tensor};
use candle_linear_attn::models::Model;
use clap::Parser;
use common::runtime::{ComputeArgs, open_model, prepare_process};
use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

/// Reads a prompt of arbitrary tokens and goes on with the likeliest ones, some times over; prints medians.
#[derive(Parser, Debug)]
struct Args {
    /// Folder with config.json and model.safetensors.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    #[arg(long, default_value_t = 512)]
    prompt_tokens: usize,
    #[arg(long, default_value_t = 32)]
    new_tokens: usize,
    /// How often.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    #[command(flatten)]
    compute: ComputeArgs,
}

fn main() -> ExitCode {
    prepare_process();
    common::exit_code(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    for (name, count) in [("prompt", args.prompt_tokens), ("new", args.new_tokens)] {
        ensure!(count > 0, "--{name}-tokens is 0, must be at least 1");
    }
    ensure!(args.repeats > 0, "--repeats is 0, must be at least 1");
    let started = Instant::now();
    let model = open_model(&args.model, &args.compute)?;
    let loading = started.elapsed();
    let (mut prefill, mut decode) = (vec![], vec![]);
    for _ in 0..args.repeats {
        let (read, written) = once(&model, args)?;
        prefill.push(read);
        decode.extend(written);
    }
    let rate = |tokens: usize, times: Vec<Duration>| tokens as f64 / median(times).as_secs_f64();
    println!(
        "loading: {:.2} s; prompt: {:.1} tokens/s; decode: {:.2} tokens/s{}",
        loading.as_secs_f64(),
        rate(args.prompt_tokens, prefill),
        rate(1, decode),
        peak_memory().map_or(String::new(), |bytes| format!("; peak memory: {:.0} MB", bytes / 1e6)),
    );
    Ok(())
}

/// The time that the prompt takes, and that each further token takes.
fn once(model: &Model, args: &Args) -> Result<(Duration, Vec<Duration>)> {
    let vocab = model.config().vocab_size() as u32;
    let mut ids: Vec<u32> = (0..args.prompt_tokens as u32).map(|i| i.wrapping_mul(7919) % vocab).collect();
    let mut cache = model.new_cache();
    let mut times = vec![];
    for _ in 0..=args.new_tokens {
        let started = Instant::now();
        let input = Tensor::from_slice(&ids, (1, ids.len()), model.device())?;
        let hidden = model.hidden_states(&input, Some(&mut cache))?;
        let logits = model.logits(&hidden.narrow(1, ids.len() - 1, 1)?)?;
        ids = logits.argmax(D::Minus1)?.flatten_all()?.to_vec1()?;
        times.push(started.elapsed());
    }
    let prefill = times.remove(0);
    Ok((prefill, times))
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// The most memory that this process has had, in bytes, where there is a way to know.
fn peak_memory() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(1024. * line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()?)
}
