//! flash-linear-attention on the same shapes, if there is a Python that has it.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::Shape;

const SCRIPT: &str = include_str!("fla.py");

/// Prints its table: what `fla.py` says of the lines that contain `only`.
pub fn print(shapes: &[Shape], only: &str) -> Result<()> {
    let shapes = serde_json::to_string(shapes)?;
    let status = Command::new("python3").args(["-c", SCRIPT, &shapes, only]).status();
    ensure!(status.context("python3 cannot be started")?.success(), "fla.py failed");
    Ok(())
}
