//! Running the examples as a user does, and small texts to run them on.

// Each test file is a crate of its own that includes this module and uses a part of it.
#![allow(dead_code)]

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

/// A command for an example. `cargo test` builds the examples next to the tests; `cargo test --test NAME` does not.
pub fn example(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let profile = test.ancestors().nth(2).unwrap();
    let path = profile.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    assert!(path.is_file(), "{} is missing: cargo build --examples", path.display());
    let mut command = Command::new(path);
    // The answer must not depend on whether a GPU is there, nor a test on the tests beside it.
    command.arg("--cpu").env("RAYON_NUM_THREADS", "1").stdin(Stdio::null());
    command
}

/// Runs to the end, which must be a good one, and gives stdout.
pub fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}\n{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs to the end, which must be a bad one, and gives stderr.
pub fn fail(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(!output.status.success(), "{command:?} was expected to fail");
    let message = stderr(&output);
    assert!(!message.contains("panicked"), "{message}");
    message
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Stories with enough pattern in them that a tiny model gets better in a few steps.
pub fn write_stories(file: &Path, count: usize) {
    let who = ["cat", "dog", "bird", "fox", "bear"];
    let what = ["a ball", "a hat", "some cake", "the moon", "an old key", "a café", "snow ❄"];
    let stories = (0..count).map(|i| {
        let (a, b, c) = (who[i % 5], who[i / 5 % 5], what[i / 3 % 7]);
        format!("Once upon a time, a little {a} saw {c}.\nThe {b} said, \"I like {c} too!\" They were happy.\n<|endoftext|>\n")
    });
    std::fs::write(file, stories.collect::<String>()).unwrap();
}

/// A command that trains a very small model on `folder/train.txt`, written if need be, into `folder/NAME`.
pub fn train_tiny(folder: &Path, name: &str, arguments: &[&str]) -> (Command, PathBuf) {
    let data = folder.join("train.txt");
    if !data.exists() {
        write_stories(&data, 200);
    }
    let out = folder.join(name);
    let mut command = example("train");
    command.arg("--data").arg(&data).arg("--out").arg(&out);
    for (option, value) in [
        ("--hidden-size", "32"),
        ("--layers", "2"),
        ("--heads", "2"),
        ("--vocab-size", "300"),
        ("--batch-size", "4"),
        ("--seq-len", "32"),
        ("--warmup", "3"),
        ("--lr", "0.01"),
    ] {
        if !arguments.contains(&option) {
            command.args([option, value]);
        }
    }
    command.args(arguments);
    (command, out)
}
