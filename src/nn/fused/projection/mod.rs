//! `x W^T` for weights in any format, at the speed at which they can be read where there are few rows of `x`.
//!
//! Every element of the result is a sum in an order of its own, which depends neither on how many rows there are nor on
//! the number of threads: a sequence gets what it gets alone whatever else is computed in the same call.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod lanes;
mod stored;
mod tile;

pub(in crate::nn) use stored::{Block, Q4K, Q8_0, Stored};

use pulp::Arch;
use rayon::prelude::*;
use std::ops::Range;
use stored::Format;
use tile::{Columns, Task};

/// Multiplications from which on other threads are worth the time it takes to wake them.
const LEAST_PARALLEL: usize = 1 << 18;
/// Outputs that a thread takes at a time.
const BLOCK: usize = 64;
/// Rows of `x` that a thread takes at a time: they stay in L2 while they meet the outputs.
const ROWS: usize = 96;

/// `x` has so many rows, `weights` so many (`outputs`), of the same length; the result is `[rows, outputs]`.
pub(in crate::nn) fn project(x: &[f32], rows: usize, weights: Stored, outputs: usize) -> Vec<f32> {
    if rows == 0 || outputs == 0 {
        return vec![];
    }
    let k = weights.len() / outputs;
    assert!(x.len() == rows * k && weights.len() == outputs * k, "matrices that do not fit");
    match weights {
        Stored::F32(w) => project_as(x, rows, w, outputs),
        Stored::F16(w) => project_as(x, rows, w, outputs),
        Stored::BF16(w) => {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            if let Some(amx) = amx::Amx::get() {
                return amx.project(x, rows, w, outputs);
            }
            project_as(x, rows, w, outputs)
        }
        Stored::Q8_0(w) => project_as(x, rows, w, outputs),
        Stored::Q4K(w) => project_as(x, rows, w, outputs),
    }
}

fn project_as<F: Format>(x: &[f32], rows: usize, weights: F, outputs: usize) -> Vec<f32> {
    let k = x.len() / rows;
    let stride = k.next_multiple_of(F::GROUP);
    let padded;
    let x = if stride == k {
        x
    } else {
        padded = pad(x, k, stride);
        padded.as_slice()
    };
    let mut y = vec![0.; rows * outputs];
    let columns = Columns::new(&mut y, outputs);
    let run = |rows, outputs| Arch::new().dispatch(Task { x, rows, stride, k, weights, outputs, y: columns });
    let (row_blocks, output_blocks) = (rows.div_ceil(ROWS), outputs.div_ceil(BLOCK));
    if !is_worth_threads(rows * outputs * k) {
        (0..row_blocks).for_each(|b| run(block(b, ROWS, rows), 0..outputs));
    } else {
        (0..row_blocks * output_blocks).into_par_iter().for_each(|b| {
            run(block(b / output_blocks, ROWS, rows), block(b % output_blocks, BLOCK, outputs));
        });
    }
    y
}

fn is_worth_threads(multiplications: usize) -> bool {
    multiplications >= LEAST_PARALLEL && rayon::current_num_threads() > 1
}

fn block(index: usize, size: usize, end: usize) -> Range<usize> {
    index * size..end.min((index + 1) * size)
}

/// Rows of `k` elements with zeros behind them.
fn pad(x: &[f32], k: usize, stride: usize) -> Vec<f32> {
    let mut padded = vec![0.; x.len() / k * stride];
    padded
        .chunks_exact_mut(stride)
        .zip(x.chunks_exact(k))
        .for_each(|(to, from)| to[..k].copy_from_slice(from));
    padded
}

#[cfg(test)]
mod tests;
