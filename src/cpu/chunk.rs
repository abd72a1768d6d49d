//! A sweep in matrix form: the state before each chunk is written to memory in a first pass, then all chunks are solved
//! in parallel.
//!
//! Decays enter as running products, never as exponentials of differences: products of numbers under 1 cannot overflow
//! and a decay of 0 is just 0. Where the decay differs by channel, a chunk is cut in sub-blocks. Against earlier
//! sub-blocks the products run from the boundary between them; within one they are carried from token to token.

use std::ops::Range;

use gemm::{Parallelism, gemm};
use rayon::prelude::*;

use super::sweep::{Gate, Sweep, scale};

const CHUNK: usize = 64;
const SUB_BLOCK: usize = 16;

pub(super) fn run(sweep: &Sweep, state: &mut [f32]) {
    let chunks = sweep.tokens.len().div_ceil(CHUNK);
    let mut states = vec![0.; chunks * state.len()];
    for (c, before) in states.chunks_exact_mut(state.len()).enumerate() {
        before.copy_from_slice(state);
        let mut chunk = Chunk::load(sweep, c);
        chunk.fade_to_end(state);
        let (w, v) = (&chunk.write, &chunk.value);
        let (rows, cols, n) = (sweep.rows, sweep.cols, chunk.len);
        matmul(Matrix::transposed(w, n, rows), Matrix::new(v, n, cols), state, Write::Add);
    }
    states.par_chunks_exact(state.len()).enumerate().for_each(|(c, state)| {
        let mut chunk = Chunk::load(sweep, c);
        let out = chunk.solve(state, sweep.inclusive);
        for (i, row) in out.chunks_exact(sweep.cols).enumerate() {
            sweep.out.store(sweep.token(c * CHUNK + i), row);
        }
    });
    sweep.fade(state, sweep.tokens.len());
}

/// One chunk of tokens as f32 matrices, a token a row.
struct Chunk<'a> {
    gate: Gate<'a>,
    len: usize,
    rows: usize,
    cols: usize,
    read: Vec<f32>,
    write: Vec<f32>,
    value: Vec<f32>,
    /// The decay before each token; empty without decay.
    decay: Vec<Vec<f32>>,
}

impl<'a> Chunk<'a> {
    fn load(sweep: &Sweep<'a>, c: usize) -> Self {
        let steps = c * CHUNK..sweep.tokens.len().min((c + 1) * CHUNK);
        let load = |rows: super::view::Rows, width: usize, by: f32| {
            let mut x = vec![0.; steps.len() * width];
            for (i, row) in x.chunks_exact_mut(width).enumerate() {
                rows.load(sweep.token(steps.start + i), row);
                scale(row, &[by]);
            }
            x
        };
        let decay = sweep.gate_rows().map_or(vec![], |(_, width)| {
            steps.clone().map(|i| sweep.load_decay(i).unwrap_or_else(|| vec![1.; width])).collect()
        });
        Self {
            gate: sweep.gate,
            len: steps.len(),
            rows: sweep.rows,
            cols: sweep.cols,
            read: load(sweep.read, sweep.rows, sweep.read_scale),
            write: load(sweep.write, sweep.rows, sweep.write_scale),
            value: load(sweep.value, sweep.cols, 1.),
            decay,
        }
    }

    /// What the decay acts on among the chunk's vectors: the values if it is by column, else the writes.
    fn faded(&mut self) -> (&mut Vec<f32>, usize) {
        match self.gate {
            Gate::Cols(_) => (&mut self.value, self.cols),
            _ => (&mut self.write, self.rows),
        }
    }

    /// Brings the writes (or values) and the state from before the chunk to its end.
    fn fade_to_end(&mut self, state: &mut [f32]) {
        let decay = std::mem::take(&mut self.decay);
        let Some(width) = decay.first().map(Vec::len) else {
            return;
        };
        let mut after = vec![1.; width];
        let (x, x_width) = self.faded();
        for (row, d) in x.chunks_exact_mut(x_width).zip(&decay).rev() {
            scale(row, &after);
            scale(&mut after, d);
        }
        self.gate.fade(state, self.cols, &after);
    }

    /// The results of all tokens.
    fn solve(&mut self, state: &[f32], inclusive: bool) -> Vec<f32> {
        match self.gate {
            Gate::None => self.solve_plain(state, inclusive),
            Gate::Scalar(_) | Gate::Rows(_) => self.solve_by_rows(state, inclusive),
            Gate::Cols(_) => self.solve_by_cols(state, inclusive),
        }
    }

    fn solve_plain(&self, state: &[f32], inclusive: bool) -> Vec<f32> {
        let (n, rows, cols) = (self.len, self.rows, self.cols);
        let mut a = vec![0.; n * n];
        let read = Matrix::new(&self.read, n, rows);
        matmul(read, Matrix::transposed(&self.write, n, rows), &mut a, Write::Set);
        for i in 0..n {
            a[i * n + i + usize::from(inclusive)..(i + 1) * n].fill(0.);
        }
        let mut out = vec![0.; n * cols];
        matmul(read, Matrix::new(state, rows, cols), &mut out, Write::Set);
        self.add_lower_triangle(&a, &mut out);
        out
    }

    fn solve_by_rows(&mut self, state: &[f32], inclusive: bool) -> Vec<f32> {
        let (n, rows, cols) = (self.len, self.rows, self.cols);
        let mut a = vec![0.; n * n];
        // The reads times the products since the start of the chunk, and of the sub-block.
        let (mut since_chunk, mut since_block) = (self.read.clone(), self.read.clone());
        let mut product = self.ones();
        for block in sub_blocks(n) {
            let mut p = self.ones();
            for i in block.clone() {
                scale(&mut p, &self.decay[i]);
                scale(&mut product, &self.decay[i]);
                scale(&mut since_block[i * rows..][..rows], &p);
                scale(&mut since_chunk[i * rows..][..rows], &product);
            }
            let earlier = block.start;
            if earlier > 0 {
                let mut off = vec![0.; block.len() * earlier];
                let read = Matrix::new(&since_block[earlier * rows..block.end * rows], block.len(), rows);
                let write = Matrix::transposed(&self.write[..earlier * rows], earlier, rows);
                matmul(read, write, &mut off, Write::Set);
                for (i, off) in block.clone().zip(off.chunks_exact(earlier)) {
                    a[i * n..][..earlier].copy_from_slice(off);
                }
            }
            for j in block.clone() {
                let x = &mut self.write[j * rows..][..rows];
                for i in j..block.end {
                    if i > j {
                        scale(x, &self.decay[i]);
                    }
                    if i > j || inclusive {
                        a[i * n + j] =
                            self.read[i * rows..][..rows].iter().zip(&*x).map(|(q, w)| q * w).sum();
                    }
                }
            }
            self.write[..earlier * rows].chunks_exact_mut(rows).for_each(|x| scale(x, &p));
        }
        let mut out = vec![0.; n * cols];
        matmul(Matrix::new(&since_chunk, n, rows), Matrix::new(state, rows, cols), &mut out, Write::Set);
        self.add_lower_triangle(&a, &mut out);
        out
    }

    fn solve_by_cols(&mut self, state: &[f32], inclusive: bool) -> Vec<f32> {
        let (n, rows, cols) = (self.len, self.rows, self.cols);
        let mut a = vec![0.; n * n];
        let read = Matrix::new(&self.read, n, rows);
        matmul(read, Matrix::transposed(&self.write, n, rows), &mut a, Write::Set);
        let mut out = vec![0.; n * cols];
        matmul(read, Matrix::new(state, rows, cols), &mut out, Write::Set);
        let mut product = self.ones();
        for block in sub_blocks(n) {
            let mut p = self.ones();
            let earlier = block.start;
            let mut off = vec![0.; block.len() * cols];
            if earlier > 0 {
                let scores =
                    Matrix { data: &a[earlier * n..], rows: block.len(), cols: earlier, strides: (n, 1) };
                let value = Matrix::new(&self.value[..earlier * cols], earlier, cols);
                matmul(scores, value, &mut off, Write::Set);
            }
            for (i, off) in block.clone().zip(off.chunks_exact_mut(cols)) {
                scale(&mut p, &self.decay[i]);
                scale(&mut product, &self.decay[i]);
                scale(off, &p);
                let row = &mut out[i * cols..][..cols];
                scale(row, &product);
                row.iter_mut().zip(off).for_each(|(o, x)| *o += *x);
            }
            for j in block.clone() {
                let x = &mut self.value[j * cols..][..cols];
                for i in j..block.end {
                    if i > j {
                        scale(x, &self.decay[i]);
                    }
                    if i > j || inclusive {
                        let a = a[i * n + j];
                        out[i * cols..][..cols].iter_mut().zip(&*x).for_each(|(o, x)| *o += a * x);
                    }
                }
            }
            self.value[..earlier * cols].chunks_exact_mut(cols).for_each(|x| scale(x, &p));
        }
        out
    }

    /// `out += a value`, reading `a` on and under its diagonal only: a zero above it times a value that is not finite
    /// would let a token see a later one.
    fn add_lower_triangle(&self, a: &[f32], out: &mut [f32]) {
        let (n, cols) = (self.len, self.cols);
        for block in sub_blocks(n) {
            let out = &mut out[block.start * cols..block.end * cols];
            if block.start > 0 {
                let data = &a[block.start * n..];
                let a = Matrix { data, rows: block.len(), cols: block.start, strides: (n, 1) };
                matmul(a, Matrix::new(&self.value[..block.start * cols], block.start, cols), out, Write::Add);
            }
            for (i, out) in block.clone().zip(out.chunks_exact_mut(cols)) {
                for j in block.start..=i {
                    let (a, value) = (a[i * n + j], &self.value[j * cols..][..cols]);
                    out.iter_mut().zip(value).for_each(|(o, v)| *o += a * v);
                }
            }
        }
    }

    fn ones(&self) -> Vec<f32> {
        vec![1.; self.decay.first().map_or(0, Vec::len)]
    }
}

pub(super) fn sub_blocks(n: usize) -> impl Iterator<Item = Range<usize>> {
    (0..n).step_by(SUB_BLOCK).map(move |start| start..n.min(start + SUB_BLOCK))
}

#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub data: &'a [f32],
    pub rows: usize,
    pub cols: usize,
    /// From row to row, from column to column.
    pub strides: (usize, usize),
}

impl<'a> Matrix<'a> {
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self { data, rows, cols, strides: (cols, 1) }
    }

    /// The transpose of a `rows x cols` matrix.
    pub fn transposed(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self { data, rows: cols, cols: rows, strides: (1, cols) }
    }

    fn last(&self) -> usize {
        (self.rows - 1) * self.strides.0 + (self.cols - 1) * self.strides.1
    }
}

pub(super) enum Write {
    Set,
    Add,
}

/// `c = a b` or `c += a b`, with `c` row-major.
pub(super) fn matmul(a: Matrix, b: Matrix, c: &mut [f32], write: Write) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    assert!(m > 0 && k > 0 && n > 0, "an empty matrix");
    assert!(b.rows == k && c.len() == m * n && a.last() < a.data.len() && b.last() < b.data.len());
    let (add, alpha) = match write {
        Write::Set => (false, 0.),
        Write::Add => (true, 1.),
    };
    let stride = |s: usize| s as isize;
    // SAFETY: the assertions above keep every element inside its slice, and `c` is borrowed exclusively.
    unsafe {
        gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            stride(n),
            add,
            a.data.as_ptr(),
            stride(a.strides.1),
            stride(a.strides.0),
            b.data.as_ptr(),
            stride(b.strides.1),
            stride(b.strides.0),
            alpha,
            1.,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
