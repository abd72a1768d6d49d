//! The log of a run: a CSV file with a row for each step.

use crate::common::files::write_atomically;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::{
    fs::{File, OpenOptions},
    path::Path,
};

/// One step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    /// Counted from 1.
    pub step: usize,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Nats a token, before the step.
    pub loss: f32,
    pub lr: f64,
    /// Before clipping.
    pub grad_norm: f32,
    pub tokens_per_s: f64,
    /// Bits per byte after the step, where it was measured.
    pub valid_bpb: Option<f64>,
}

pub struct Log {
    writer: csv::Writer<File>,
    rows: Vec<Row>,
}

impl Log {
    /// Opens the log in `folder` after `steps` steps. Rows of later steps are cut: they were written before a state that
    /// never was, and those steps are taken again.
    pub fn open(folder: &Path, steps: usize) -> Result<Self> {
        let path = folder.join("log.csv");
        let mut rows = Vec::new();
        if path.exists() {
            let mut reader =
                csv::Reader::from_path(&path).with_context(|| format!("cannot read {}", path.display()))?;
            // A row that does not parse was being written when the process was killed.
            rows.extend(reader.deserialize::<Row>().map_while(Result::ok));
            rows.retain(|row| row.step <= steps);
        }
        let mut kept = csv::Writer::from_writer(Vec::new());
        if rows.is_empty() {
            kept.write_record(["step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "valid_bpb"])?;
        }
        for row in &rows {
            kept.serialize(row)?;
        }
        write_atomically(&path, &kept.into_inner().context("cannot write the log")?)?;
        let file = OpenOptions::new().append(true).open(&path)?;
        let writer = csv::WriterBuilder::new().has_headers(false).from_writer(file);
        Ok(Self { writer, rows })
    }

    pub fn push(&mut self, row: Row) -> Result<()> {
        self.writer.serialize(&row)?;
        self.writer.flush()?;
        self.rows.push(row);
        Ok(())
    }

    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// The lowest bits per byte so far.
    pub fn best(&self) -> Option<f64> {
        self.rows.iter().filter_map(|row| row.valid_bpb).min_by(f64::total_cmp)
    }
}
