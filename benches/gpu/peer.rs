//! flash-linear-attention on the same shapes, if there is a Python that has it.

use std::collections::HashMap;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::Line;

const SCRIPT: &str = include_str!("fla.py");

/// Milliseconds; `None` where it refuses.
#[derive(Deserialize)]
pub struct Times {
    label: String,
    pub forward: Option<f64>,
    pub both: Option<f64>,
}

/// Its times of the lines that it has an operator for, by their labels. What it refuses goes to stderr.
pub fn times<'a>(lines: impl Iterator<Item = &'a Line>) -> Result<HashMap<String, Times>> {
    let lines: Vec<_> = lines.map(|line| (line.label(), line.op.name(), line.shape)).collect();
    let mut python = Command::new("python3");
    python.args(["-c", SCRIPT, &serde_json::to_string(&lines)?]).stderr(Stdio::inherit());
    let done = python.output().context("python3 cannot be started")?;
    ensure!(done.status.success(), "fla.py failed: it needs torch, triton and fla, and a GPU");
    let found = String::from_utf8(done.stdout)?;
    found
        .lines()
        .map(|line| {
            let times: Times = serde_json::from_str(line)?;
            Ok((times.label.clone(), times))
        })
        .collect()
}
