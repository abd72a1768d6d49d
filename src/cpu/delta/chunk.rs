//! A sweep in matrix form (the WY or UT transform). What the tokens of a chunk read depends on what those before them
//! write, by a triangular system: with W0 what the state before the chunk has for the reads and A the products of reads with
//! the writes before them, faded from the one to the other,
//!
//! ```text
//! w = W0 + A1 value + A2 c        c = f (ev value + ew w)
//! ```
//!
//! It is solved by substitution, in f32, a sub-block at a time: no inverse, so nothing depends on the length of keys or on
//! beta. The first pass goes from chunk to chunk, solves and writes the state before each to memory; then the results of
//! all chunks are computed in parallel.
//!
//! Decays enter as running products (see [`crate::cpu::chunk`]).

use rayon::prelude::*;

use super::sweep::{DeltaSweep, Factors, Step, dot};
use crate::cpu::chunk::{Matrix, Write, matmul, sub_blocks};
use crate::cpu::sweep::scale;

/// Tokens in a chunk, at most.
const CHUNK: usize = 64;

/// Tokens in a chunk. What a chunk erases of a state is a difference here, of what was there and what is taken away. As many
/// tokens as there are rows can erase nearly all of it and would leave rounding; half as many leave enough in other
/// directions for that not to count.
fn length(sweep: &DeltaSweep) -> usize {
    (sweep.rows / 2).clamp(1, CHUNK)
}

pub(super) fn run(sweep: &DeltaSweep, state: &mut [f32]) {
    let length = length(sweep);
    let chunks = sweep.tokens.len().div_ceil(length);
    let has_out = sweep.out.is_some();
    let mut states = vec![0.; if has_out { chunks * state.len() } else { 0 }];
    let mut written = vec![0.; sweep.tokens.len() * sweep.cols];
    for (c, written) in written.chunks_mut(length * sweep.cols).enumerate() {
        if has_out {
            states[c * state.len()..][..state.len()].copy_from_slice(state);
        }
        Chunk::load(sweep, c).solve(sweep, c, state, written);
    }
    if let Some(out) = &sweep.out {
        let chunks = states.par_chunks_exact(state.len()).zip(written.par_chunks(length * sweep.cols));
        chunks.enumerate().for_each(|(c, (state, written))| {
            let rows = Chunk::load(sweep, c).results(state, written);
            for (i, row) in rows.chunks_exact(sweep.cols).enumerate() {
                out.store(sweep.token(c * length + i), row);
            }
        });
    }
}

/// One chunk of tokens as matrices, a token a row.
struct Chunk {
    len: usize,
    rows: usize,
    cols: usize,
    r1: Vec<f32>,
    r2: Vec<f32>,
    /// Empty where a token does not write its value.
    x1: Vec<f32>,
    x2: Vec<f32>,
    value: Vec<f32>,
    /// The decay of each token, which is after its reads and before its writes; `width` numbers each.
    decay: Vec<f32>,
    width: usize,
    factors: Vec<Factors>,
}

impl Chunk {
    fn load(sweep: &DeltaSweep, c: usize) -> Self {
        let length = length(sweep);
        let steps = c * length..sweep.tokens.len().min((c + 1) * length);
        let (n, width) = (steps.len(), sweep.width());
        let matrix = || Vec::with_capacity(n * sweep.rows);
        let mut chunk = Self {
            len: n,
            rows: sweep.rows,
            cols: sweep.cols,
            r1: matrix(),
            r2: matrix(),
            x1: Vec::new(),
            x2: matrix(),
            value: vec![0.; n * sweep.cols],
            decay: Vec::with_capacity(n * width),
            width,
            factors: Vec::with_capacity(n),
        };
        let mut step = Step::new(sweep);
        for (i, value) in steps.zip(chunk.value.chunks_exact_mut(sweep.cols)) {
            step.load(sweep, sweep.token(i));
            sweep.value.load(sweep.token(i), value);
            chunk.r1.extend_from_slice(&step.r1);
            chunk.r2.extend_from_slice(&step.r2);
            chunk.x2.extend_from_slice(&step.x2);
            chunk.decay.extend_from_slice(&step.decay);
            chunk.factors.push(step.factors);
            if sweep.writes_value() {
                chunk.x1.extend_from_slice(&step.x1);
            }
        }
        chunk
    }

    /// Solves for what the tokens write, which goes to `written`, and takes the state from before the chunk to its end.
    fn solve(&self, sweep: &DeltaSweep, c: usize, state: &mut [f32], written: &mut [f32]) {
        let (n, rows, cols, length) = (self.len, self.rows, self.cols, length(sweep));
        let mut w = self.read_before(&self.r1, state);
        let (a2, x2) = self.scores(&self.r1, &self.x2);
        let with_value = (!self.x1.is_empty()).then(|| self.scores(&self.r1, &self.x1));
        if let Some((a1, _)) = &with_value {
            self.add_earlier(a1, &self.value, &mut w);
        }
        for block in sub_blocks(n) {
            if block.start > 0 {
                let (before, w) =
                    (&written[..block.start * cols], &mut w[block.start * cols..block.end * cols]);
                matmul(
                    self.block(&a2, block.start, block.len()),
                    Matrix::new(before, block.start, cols),
                    w,
                    Write::Add,
                );
            }
            for i in block.clone() {
                let (before, now) = written.split_at_mut(i * cols);
                let w = &mut w[i * cols..][..cols];
                for j in block.start..i {
                    add(w, a2[i * n + j], &before[j * cols..][..cols]);
                }
                let mut y = vec![0.; cols];
                self.factors[i].combine(&self.value[i * cols..][..cols], w, &mut y, &mut now[..cols]);
                sweep.inner.inspect(|inner| inner.store(sweep.token(c * length + i), w));
            }
        }
        let mut product = self.ones();
        self.decay_rows().for_each(|decay| scale(&mut product, decay));
        for (r, row) in state.chunks_exact_mut(cols).enumerate() {
            scale(row, if self.width > 1 { &product[r..=r] } else { &product });
        }
        matmul(Matrix::transposed(&x2, n, rows), Matrix::new(written, n, cols), state, Write::Add);
        if let Some((_, x1)) = &with_value {
            matmul(Matrix::transposed(x1, n, rows), Matrix::new(&self.value, n, cols), state, Write::Add);
        }
    }

    /// The results of all tokens.
    fn results(&self, state: &[f32], written: &[f32]) -> Vec<f32> {
        let mut y = self.read_before(&self.r2, state);
        self.add_earlier(&self.scores(&self.r2, &self.x2).0, written, &mut y);
        if !self.x1.is_empty() {
            self.add_earlier(&self.scores(&self.r2, &self.x1).0, &self.value, &mut y);
        }
        for (i, y) in y.chunks_exact_mut(self.cols).enumerate() {
            let own = i * self.cols..(i + 1) * self.cols;
            add(y, self.factors[i].hc, &written[own.clone()]);
            if !self.x1.is_empty() {
                add(y, self.factors[i].hv, &self.value[own]);
            }
        }
        y
    }

    /// What the state before the chunk has for `reads`.
    fn read_before(&self, reads: &[f32], state: &[f32]) -> Vec<f32> {
        let (n, rows, cols) = (self.len, self.rows, self.cols);
        let (mut reads, mut product) = (reads.to_vec(), self.ones());
        for (i, read) in reads.chunks_exact_mut(rows).enumerate() {
            scale(read, &product);
            scale(&mut product, self.decay_row(i));
        }
        let mut out = vec![0.; n * cols];
        matmul(Matrix::new(&reads, n, rows), Matrix::new(state, rows, cols), &mut out, Write::Set);
        out
    }

    /// The product of each read with each write before it, `n x n`, and the writes faded to the end of the chunk.
    fn scores(&self, reads: &[f32], writes: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (n, rows) = (self.len, self.rows);
        let mut a = vec![0.; n * n];
        let (mut since_block, mut writes) = (reads.to_vec(), writes.to_vec());
        for block in sub_blocks(n) {
            let (start, mut product) = (block.start, self.ones());
            for i in block.clone() {
                scale(&mut since_block[i * rows..][..rows], &product);
                scale(&mut product, self.decay_row(i));
            }
            if start > 0 {
                let mut off = vec![0.; block.len() * start];
                let reads = Matrix::new(&since_block[start * rows..block.end * rows], block.len(), rows);
                let earlier = Matrix::transposed(&writes[..start * rows], start, rows);
                matmul(reads, earlier, &mut off, Write::Set);
                for (i, off) in block.clone().zip(off.chunks_exact(start)) {
                    a[i * n..][..start].copy_from_slice(off);
                }
            }
            for j in block.clone() {
                let x = &mut writes[j * rows..][..rows];
                for i in j + 1..block.end {
                    a[i * n + j] = dot(&reads[i * rows..][..rows], x);
                    scale(x, self.decay_row(i));
                }
            }
            writes[..start * rows].chunks_exact_mut(rows).for_each(|x| scale(x, &product));
        }
        (a, writes)
    }

    /// `out += a x`, reading `a` under its diagonal only: a zero above it times a value that is not finite would let a token
    /// see a later one.
    fn add_earlier(&self, a: &[f32], x: &[f32], out: &mut [f32]) {
        let (n, cols) = (self.len, self.cols);
        for block in sub_blocks(n) {
            let start = block.start;
            if start > 0 {
                let out = &mut out[start * cols..block.end * cols];
                let x = Matrix::new(&x[..start * cols], start, cols);
                matmul(self.block(a, start, block.len()), x, out, Write::Add);
            }
            for i in block {
                for j in start..i {
                    add(&mut out[i * cols..][..cols], a[i * n + j], &x[j * cols..][..cols]);
                }
            }
        }
    }

    /// The rows of `a` that belong to a sub-block, with the columns before it.
    fn block<'a>(&self, a: &'a [f32], start: usize, rows: usize) -> Matrix<'a> {
        Matrix { data: &a[start * self.len..], rows, cols: start, strides: (self.len, 1) }
    }

    fn decay_row(&self, i: usize) -> &[f32] {
        &self.decay[i * self.width..][..self.width]
    }

    fn decay_rows(&self) -> impl Iterator<Item = &[f32]> {
        (0..self.len).map(|i| self.decay_row(i))
    }

    fn ones(&self) -> Vec<f32> {
        vec![1.; self.width]
    }
}

/// `y += a x`
fn add(y: &mut [f32], a: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}
