//! flash-linear-attention on the same shapes, if there is a Python that has it.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::Line;

const SCRIPT: &str = include_str!("fla.py");

/// Milliseconds; `None` where it has no such operator, or refuses, and says so on stderr.
#[derive(Default, Deserialize)]
pub struct Times {
    pub forward: Option<f64>,
    /// Forward and backward.
    pub both: Option<f64>,
}

/// Its times of a line, from a process of its own: what it tunes takes minutes, and what has been measured should not wait for
/// the rest.
pub fn times(line: &Line) -> Result<Times> {
    let mut python = Command::new("python3");
    python.args(["-c", SCRIPT, line.op.name(), &serde_json::to_string(&line.shape)?, line.dtype.as_str()]);
    let done = python.stderr(Stdio::inherit()).output().context("python3 cannot be started")?;
    ensure!(done.status.success(), "fla.py failed: it needs torch, triton and fla, and a GPU");
    serde_json::from_slice(&done.stdout).context("fla.py printed something else than its times")
}
