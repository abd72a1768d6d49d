//! Bits per byte of a text.

use crate::{data::TokenStream, loss::token_nll, workers::Workers};
use anyhow::{Result, ensure};
use candle_core::Tensor;
use candle_linear_attn::models::Model;
use std::f64::consts::LN_2;

/// Texts that are read side by side.
const ROWS: usize = 16;

/// The bits that `model` needs for the texts of `stream` and the ends of them, for each byte of text.
///
/// The stream is cut at ends of texts into rows of about the same length. A row is read in windows of `seq_len` tokens with
/// the state carried from one to the next, so the model has all the context it would have in use. `workers` read rows of
/// their own.
pub fn bits_per_byte(
    model: &Model,
    stream: &TokenStream,
    end_token: u32,
    seq_len: usize,
    workers: &Workers,
) -> Result<f64> {
    ensure!(stream.text_bytes > 0, "there is no text to validate on");
    let rows = split_at_ends(&stream.tokens, end_token);
    let shares: Vec<_> = rows.chunks(rows.len().div_ceil(workers.count())).collect();
    let nats = workers.map(shares.len(), |i| rows_nats(model, shares[i], seq_len))?;
    Ok(nats.iter().sum::<f64>() / LN_2 / stream.text_bytes as f64)
}

fn rows_nats(model: &Model, rows: &[&[u32]], seq_len: usize) -> Result<f64> {
    let longest = rows.iter().map(|row| row.len() - 1).max().unwrap_or(0);
    let mut cache = model.new_cache();
    let mut nats = 0.0;
    for start in (0..longest).step_by(seq_len) {
        let window = Window::new(rows, start, seq_len.min(longest - start));
        nats += window_nats(model, &window, &mut cache)?;
    }
    Ok(nats)
}

fn window_nats(model: &Model, window: &Window, cache: &mut candle_linear_attn::models::Cache) -> Result<f64> {
    let (rows, len) = (window.rows, window.inputs.len() / window.rows);
    let device = model.device();
    let inputs = Tensor::from_slice(&window.inputs, (rows, len), device)?;
    let targets = Tensor::from_slice(&window.targets, rows * len, device)?;
    let weights = Tensor::from_slice(&window.weights, rows * len, device)?;
    let logits = model.logits(&model.hidden_states(&inputs, Some(cache))?)?;
    let logits = logits.flatten_to(1)?.to_dtype(candle_core::DType::F32)?;
    let nll = (token_nll(&logits, &targets)? * weights)?.sum_all()?;
    Ok(f64::from(nll.to_scalar::<f32>()?))
}

/// Every row begins with an end token and ends with the one that begins the next row, so each token but the first of the
/// stream is predicted once.
fn split_at_ends(tokens: &[u32], end_token: u32) -> Vec<&[u32]> {
    let mut rows = Vec::new();
    let mut start = 0;
    for row in 1..=ROWS {
        let from = (row * (tokens.len() - 1) / ROWS).max(start + 1);
        let Some(ahead) = tokens.get(from..).and_then(|t| t.iter().position(|&t| t == end_token)) else {
            break;
        };
        rows.push(&tokens[start..=from + ahead]);
        start = from + ahead;
    }
    rows
}

/// The same stretch of all rows; rows that are over are filled up with tokens of weight 0.
struct Window {
    rows: usize,
    inputs: Vec<u32>,
    targets: Vec<u32>,
    weights: Vec<f32>,
}

impl Window {
    fn new(rows: &[&[u32]], start: usize, len: usize) -> Self {
        let positions = || rows.iter().flat_map(|row| (start..start + len).map(move |i| (row, i)));
        Self {
            rows: rows.len(),
            inputs: positions().map(|(row, i)| row.get(i).copied().unwrap_or(0)).collect(),
            targets: positions().map(|(row, i)| row.get(i + 1).copied().unwrap_or(0)).collect(),
            weights: positions().map(|(row, i)| f32::from(u8::from(i + 1 < row.len()))).collect(),
        }
    }
}
