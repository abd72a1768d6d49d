//! The weights of up to 32 outputs.

use super::tiles::{self, DEPTH, PIECES, SIDE, Sums, Weights};
use half::bf16;
use std::ops::Range;

/// Outputs of a panel.
pub(super) const OUTPUTS: usize = 2 * SIDE;

/// Rows of weights, which tiles are read from; what is left of rows that are not whole tiles is copied to zeros.
pub(super) struct Panel<'a> {
    weights: &'a [bf16],
    k: usize,
    rest: Vec<[bf16; DEPTH]>,
}

impl<'a> Panel<'a> {
    /// Rows of `k` elements, from one to [`OUTPUTS`].
    pub fn new(weights: &'a [bf16], k: usize) -> Self {
        let mut rest = vec![[bf16::ZERO; DEPTH]; if k.is_multiple_of(DEPTH) { 0 } else { OUTPUTS }];
        for (to, row) in rest.iter_mut().zip(weights.chunks_exact(k)) {
            let row = &row[k / DEPTH * DEPTH..];
            to[..row.len()].copy_from_slice(row);
        }
        Self { weights, k, rest }
    }

    /// Adds the products with a group of up to 16 rows of `x`, packed.
    ///
    /// # Safety
    /// The process may use AMX.
    pub unsafe fn add_products(&self, ahead: *const bf16, x: &[u32], width: usize, sums: &mut [Sums; 2]) {
        for (weights, steps) in self.parts(ahead) {
            // SAFETY: the caller's promise, and weights for as many steps.
            unsafe { tiles::add_products(weights, steps_of(x, width, &steps), width, steps.len(), sums) };
        }
    }

    /// The same with two groups of 16 rows.
    ///
    /// # Safety
    /// The process may use AMX.
    pub unsafe fn add_products_twice(&self, ahead: *const bf16, x: [&[u32]; 2], sums: &mut [Sums; 4]) {
        for (weights, steps) in self.parts(ahead) {
            let x = x.map(|x| steps_of(x, SIDE, &steps));
            // SAFETY: the caller's promise, and weights for as many steps.
            unsafe { tiles::add_products_twice(weights, x, steps.len(), sums) };
        }
    }

    /// Whole tiles and the rest, and which steps of `x` they meet.
    fn parts(&self, ahead: *const bf16) -> impl Iterator<Item = (Weights, Range<usize>)> {
        let (whole, all) = (self.k / DEPTH, self.k.div_ceil(DEPTH));
        let parts = [(self.weights, self.k, 0..whole), (self.rest.as_flattened(), DEPTH, whole..all)];
        let parts = parts.into_iter().filter(|(.., steps)| !steps.is_empty());
        parts.map(move |(rows, stride, steps)| (self.tiles(ahead, rows, stride), steps))
    }

    fn tiles(&self, ahead: *const bf16, rows: &[bf16], stride: usize) -> Weights {
        let outputs = self.weights.len() / self.k;
        let first = outputs.min(SIDE);
        // Where there is no second group, the first again, for sums that nobody asks for.
        let (skipped, second) = if outputs > SIDE { (SIDE, outputs - SIDE) } else { (0, first) };
        Weights {
            ahead,
            from: [rows.as_ptr(), rows[skipped * stride..].as_ptr()],
            stride,
            outputs: [first, second],
        }
    }
}

fn steps_of<'a>(x: &'a [u32], width: usize, steps: &Range<usize>) -> &'a [u32] {
    let step = PIECES * SIDE * width;
    &x[steps.start * step..steps.end * step]
}
