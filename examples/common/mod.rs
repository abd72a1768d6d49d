//! What the examples share: choosing a device, opening a model folder, text in and out, files that are never half written.

// Each example is a crate of its own that includes this module and uses a part of it.
#![allow(dead_code)]

pub mod files;
pub mod runtime;
pub mod text;

use std::process::ExitCode;

/// Turns the outcome of an example into an exit code, with the chain of causes on one line of stderr.
pub fn exit_code(outcome: anyhow::Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
