//! Writes a text with a linear-attention model, or talks with one.
//!
//! ```text
//! cargo run --release --example generate
//! cargo run --release --example generate -- --prompt "The little robot" --temperature 0.6
//! cargo run --release --example generate -- --model-id fla-hub/gla-1.3B-100B --prompt "Linear attention"
//! cargo run --release --example generate -- --model-id Qwen/Qwen3.5-0.8B --chat --quantize q8_0
//! ```

mod args;
#[path = "../common/mod.rs"]
mod common;
mod conversation;
mod fields;
mod generator;
mod reader;
mod sampler;
mod settings;
mod template;
mod thinking;

use anyhow::{Context, Result};
use args::{Args, Switch};
use clap::Parser;
use common::{
    runtime::{check_folder, open_model, prepare_process},
    text::{TextStream, encode_prompt, load_tokenizer},
};
use conversation::Conversation;
use generator::{End, Generator};
use settings::Settings;
use std::{
    io::{ErrorKind, IsTerminal, Write},
    path::Path,
    process::ExitCode,
    time::Instant,
};
use template::ChatTemplate;
use tokenizers::Tokenizer;

fn main() -> ExitCode {
    prepare_process();
    common::exit_code(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    args.validate()?;
    let folder = args.model_folder()?;
    check_folder(&folder)?;
    // The small files first: a folder that lacks one of them is no use however well its weights load.
    let tokenizer = load_tokenizer(&folder.join("tokenizer.json"))?;
    match args.chat {
        true => chat(args, &folder, &tokenizer),
        false => write(args, &folder, &tokenizer),
    }
}

fn write(args: &Args, folder: &Path, tokenizer: &Tokenizer) -> Result<()> {
    let prompt = args.prompt()?;
    let settings = Settings::new(args, folder)?;
    let model = open_model(folder, &args.compute)?;
    let mut generator = Generator::new(&model, settings);
    let mut ids = encode_prompt(tokenizer, &prompt)?;
    let prompt_tokens = ids.len();
    let started = Instant::now();
    let logits = generator.reader.read(&ids)?;
    let prompt_time = started.elapsed();
    let mut stream = TextStream::after(tokenizer, &ids, true)?;
    if show(&prompt)? {
        generator.write(logits, &mut ids, |id| show(&stream.push(id)?))?;
        show("\n")?;
    }
    eprintln!("{}", generator.report(prompt_tokens, prompt_time));
    Ok(())
}

fn chat(args: &Args, folder: &Path, tokenizer: &Tokenizer) -> Result<()> {
    let mut template = ChatTemplate::load(folder)?;
    if let Some(thinking) = args.thinking {
        // What Qwen's templates call it, and what others do.
        for name in ["enable_thinking", "thinking"] {
            template.set(name, thinking == Switch::On);
        }
    }
    let settings = Settings::new(args, folder)?;
    let model = open_model(folder, &args.compute)?;
    let generator = Generator::new(&model, settings);
    let mut conversation = Conversation::new(generator, tokenizer, template, args.system.as_deref());
    while let Some(line) = next_line()? {
        match line.trim() {
            "" => continue,
            "/exit" => break,
            "/reset" => conversation.reset(),
            _ => {
                let end = conversation.say(&line, args.hide_thinking, show)?;
                if !show("\n")? || end == End::Unwanted {
                    break;
                }
                if end == End::Limit {
                    eprintln!("(cut off by --max-new-tokens)");
                }
            }
        }
    }
    let Conversation { generator, prompt_tokens, prompt_time, .. } = conversation;
    eprintln!("{}", generator.report(prompt_tokens, prompt_time));
    Ok(())
}

/// The next line of stdin, if there is one.
fn next_line() -> Result<Option<String>> {
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        eprint!("> ");
    }
    let mut line = String::new();
    if std::io::stdin().read_line(&mut line).context("cannot read a message from stdin")? == 0 {
        if interactive {
            eprintln!();
        }
        return Ok(None);
    }
    line.truncate(line.trim_end_matches(['\n', '\r']).len());
    Ok(Some(line))
}

/// False if whoever reads has had enough.
fn show(text: &str) -> Result<bool> {
    let mut stdout = std::io::stdout();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error.into()),
    }
}
