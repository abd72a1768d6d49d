//! A sweep in one pass over the state a token: while a slice of columns of the state is updated with one token, what the
//! next one reads is summed up from it. The slice stays in L1 while a block of tokens goes by, the sums stay in registers.
//!
//! The state is kept divided by the decay up to now, `S = P S'`: reads are multiplied by P and writes divided by it, which
//! are small vectors, and the state itself is left alone. Where P would leave [`RANGE`] it is multiplied into the state,
//! exactly, and starts from 1 again, so nothing overflows however strong the decay.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use super::sweep::{DeltaSweep, Factors, Step};
use crate::cpu::sweep::scale;

/// Tokens in a block, at most. Their rows, and values and results for a slice of columns, stay in L1 and L2.
const BLOCK: usize = 32;
/// Where P may go. Far from the ends of f32 on both sides: states and inputs have to fit as well.
const RANGE: Range<f32> = 1e-12..1e12;
/// Rows are padded to a multiple of this, so that a kernel may take several at a time.
const ROWS: usize = 4;

pub(super) fn run(sweep: &DeltaSweep, state: &mut [f32]) {
    Arch::new().dispatch(Fused { sweep, state });
}

struct Fused<'s, 'a> {
    sweep: &'s DeltaSweep<'a>,
    state: &'s mut [f32],
}

impl WithSimd for Fused<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // For each vector of a slice a register holds what is written, the value, and the sums of both reads.
        if S::REGISTER_COUNT >= 32 {
            sweep_in_blocks::<S, 4>(simd, self.sweep, self.state);
        } else {
            sweep_in_blocks::<S, 2>(simd, self.sweep, self.state);
        }
    }
}

#[inline(always)]
fn sweep_in_blocks<S: Simd, const VECTORS: usize>(simd: S, sweep: &DeltaSweep, state: &mut [f32]) {
    let tokens = sweep.tokens.len();
    if tokens == 0 {
        return;
    }
    let mut block = Block::new(sweep);
    let mut slices = Slices::new(sweep, VECTORS * S::F32_LANES);
    slices.pack_state(state);
    block.load(sweep, 0, 0);
    slices.read_first::<S>(simd, &block);
    let mut done = 0;
    while done < tokens {
        let n = BLOCK.min(tokens - done);
        for i in 1..=n.min(tokens - done - 1) {
            block.load(sweep, done + i, i);
        }
        slices.load_values(sweep, done, n);
        slices.update::<S, VECTORS>(simd, sweep, &block, done..done + n);
        slices.store(sweep, done, n);
        block.leave(n);
        done += n;
    }
    slices.unpack_state(state, &block.product);
}

/// The rows of a block of tokens and of the one after it, a token after the other.
struct Block {
    rows: usize,
    step: Step,
    r1: Vec<f32>,
    r2: Vec<f32>,
    x1: Vec<f32>,
    x2: Vec<f32>,
    factors: Vec<Factors>,
    /// For a token that P is multiplied into the state for: P before it, and its decay.
    due: Vec<Option<[Vec<f32>; 2]>>,
    /// P: nothing for 1, one number for all rows, or one for each.
    product: Vec<f32>,
    next: Vec<f32>,
}

impl Block {
    fn new(sweep: &DeltaSweep) -> Self {
        let rows = sweep.rows.next_multiple_of(ROWS);
        let vectors = || vec![0.; rows * (BLOCK + 1)];
        Self {
            rows,
            step: Step::new(sweep),
            r1: vectors(),
            r2: vectors(),
            x1: vectors(),
            x2: vectors(),
            factors: vec![Factors::default(); BLOCK + 1],
            due: vec![None; BLOCK + 1],
            product: vec![1.; sweep.width()],
            next: vec![1.; sweep.width()],
        }
    }

    /// Loads step `i` of the sweep as token `at` of the block. Steps are loaded in order.
    #[inline(always)]
    fn load(&mut self, sweep: &DeltaSweep, i: usize, at: usize) {
        let step = &mut self.step;
        step.load(sweep, sweep.token(i));
        scale(&mut step.r1, &self.product);
        scale(&mut step.r2, &self.product);
        let mut fits = true;
        for ((next, p), d) in self.next.iter_mut().zip(&self.product).zip(&step.decay) {
            *next = p * d;
            fits &= RANGE.contains(next);
        }
        self.due[at] = None;
        if fits {
            self.product.copy_from_slice(&self.next);
            self.next.iter_mut().for_each(|p| *p = 1. / *p);
            scale(&mut step.x2, &self.next);
            if sweep.writes_value() {
                scale(&mut step.x1, &self.next);
            }
        } else {
            self.due[at] = Some([self.product.clone(), step.decay.clone()]);
            self.product.fill(1.);
        }
        self.factors[at] = step.factors;
        let vectors = [&mut self.r1, &mut self.r2, &mut self.x1, &mut self.x2];
        for (x, row) in vectors.into_iter().zip([&step.r1, &step.r2, &step.x1, &step.x2]) {
            x[at * self.rows..][..sweep.rows].copy_from_slice(row);
        }
    }

    /// Makes the token after the first `n` the first.
    fn leave(&mut self, n: usize) {
        for x in [&mut self.r1, &mut self.r2, &mut self.x1, &mut self.x2] {
            x.copy_within(n * self.rows..(n + 1) * self.rows, 0);
        }
        self.factors[0] = self.factors[n];
        self.due[0] = self.due[n].take();
    }

    /// The rows of token `at`.
    #[inline(always)]
    fn row<'x>(&self, x: &'x [f32], at: usize) -> &'x [f32] {
        &x[at * self.rows..][..self.rows]
    }
}

/// The state, and values and results of a block of tokens, in slices of columns, padded with zeros to whole slices.
struct Slices {
    rows: usize,
    cols: usize,
    width: usize,
    /// `[slice][row][col]`
    state: Vec<f32>,
    /// `[slice][token][col]`
    value: Vec<f32>,
    inner: Vec<f32>,
    out: Vec<f32>,
    /// What the next token reads: `[slice][col]`.
    w: Vec<f32>,
    y: Vec<f32>,
    row: Vec<f32>,
}

impl Slices {
    fn new(sweep: &DeltaSweep, width: usize) -> Self {
        let (rows, count) = (sweep.rows.next_multiple_of(ROWS), sweep.cols.div_ceil(width));
        let of_block = || vec![0.; count * BLOCK * width];
        Self {
            rows,
            cols: sweep.cols,
            width,
            state: vec![0.; count * rows * width],
            value: of_block(),
            inner: of_block(),
            out: of_block(),
            w: vec![0.; count * width],
            y: vec![0.; count * width],
            row: vec![0.; count * width],
        }
    }

    fn pack_state(&mut self, state: &[f32]) {
        for (r, row) in state.chunks_exact(self.cols).enumerate() {
            for (c, x) in row.chunks(self.width).enumerate() {
                self.state[(c * self.rows + r) * self.width..][..x.len()].copy_from_slice(x);
            }
        }
    }

    fn unpack_state(&self, state: &mut [f32], product: &[f32]) {
        for (r, row) in state.chunks_exact_mut(self.cols).enumerate() {
            for (c, x) in row.chunks_mut(self.width).enumerate() {
                x.copy_from_slice(&self.state[(c * self.rows + r) * self.width..][..x.len()]);
            }
            scale(row, of_row(product, r));
        }
    }

    /// What the first token reads.
    #[inline(always)]
    fn read_first<S: Simd>(&mut self, simd: S, block: &Block) {
        for (c, state) in self.state.chunks_exact(self.rows * self.width).enumerate() {
            let sums = c * self.width..(c + 1) * self.width;
            for (sums, by) in [(&mut self.w[sums.clone()], &block.r1), (&mut self.y[sums], &block.r2)] {
                let (sums, _) = S::as_mut_simd_f32s(sums);
                for (row, by) in state.chunks_exact(self.width).zip(by) {
                    let by = simd.splat_f32s(*by);
                    for (sum, s) in sums.iter_mut().zip(S::as_simd_f32s(row).0) {
                        *sum = simd.mul_add_e_f32s(by, *s, *sum);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn load_values(&mut self, sweep: &DeltaSweep, first: usize, n: usize) {
        for i in 0..n {
            sweep.value.load(sweep.token(first + i), &mut self.row[..self.cols]);
            for (c, x) in self.row.chunks_exact(self.width).enumerate() {
                self.value[(c * BLOCK + i) * self.width..][..self.width].copy_from_slice(x);
            }
        }
    }

    #[inline(always)]
    fn store(&mut self, sweep: &DeltaSweep, first: usize, n: usize) {
        for (out, rows) in [(&sweep.inner, &self.inner), (&sweep.out, &self.out)] {
            let Some(out) = out else { continue };
            for i in 0..n {
                for (c, x) in self.row.chunks_exact_mut(self.width).enumerate() {
                    x.copy_from_slice(&rows[(c * BLOCK + i) * self.width..][..self.width]);
                }
                out.store(sweep.token(first + i), &self.row[..self.cols]);
            }
        }
    }

    /// Runs the tokens of `steps` over all slices, and meanwhile has the next ones fetched.
    #[inline(always)]
    fn update<S: Simd, const VECTORS: usize>(
        &mut self,
        simd: S,
        sweep: &DeltaSweep,
        block: &Block,
        steps: Range<usize>,
    ) {
        let (rows, width) = (self.rows, self.width);
        for c in 0..self.state.len() / (rows * width) {
            let state = &mut self.state[c * rows * width..][..rows * width];
            let sums = c * width..(c + 1) * width;
            let used = (self.cols - c * width).min(width).div_ceil(S::F32_LANES);
            for i in 0..steps.len() {
                if c == 0 {
                    sweep.prefetch(steps.end + i);
                    sweep.out.inspect(|out| out.prefetch(sweep.token(steps.start + i), self.cols));
                }
                if let Some(due) = &block.due[i] {
                    pay(state, width, due);
                }
                let at = (c * BLOCK + i) * width..(c * BLOCK + i + 1) * width;
                // The last token of all has none after it: what is read then is not used.
                let token = Token {
                    factors: block.factors[i],
                    x1: block.row(&block.x1, i),
                    x2: block.row(&block.x2, i),
                    r1: block.row(&block.r1, i + 1),
                    r2: block.row(&block.r2, i + 1),
                    value: &self.value[at.clone()],
                    inner: &mut self.inner[at.clone()],
                    out: &mut self.out[at],
                    w: &mut self.w[sums.clone()],
                    y: &mut self.y[sums.clone()],
                };
                let (value, out) = (sweep.writes_value(), sweep.out.is_some());
                match (used, VECTORS) {
                    (1, _) => token.run_as::<S, VECTORS, 1, 4>(simd, state, value, out),
                    (2, _) | (_, 2) => token.run_as::<S, VECTORS, 2, 2>(simd, state, value, out),
                    _ => token.run_as::<S, VECTORS, 4, 1>(simd, state, value, out),
                }
            }
        }
    }
}

#[inline(always)]
fn of_row(factors: &[f32], row: usize) -> &[f32] {
    if factors.len() > 1 { &factors[row..=row] } else { factors }
}

/// Multiplies a slice of the state by factors that its rows are due, one after the other: their product may be too small
/// for an f32 where the product with the state is not.
#[inline(always)]
fn pay(state: &mut [f32], width: usize, due: &[Vec<f32>; 2]) {
    let rows = due[0].len().max(1);
    for (r, row) in state.chunks_exact_mut(width).enumerate() {
        if rows == 1 || r < rows {
            scale(row, of_row(&due[0], r));
            scale(row, of_row(&due[1], r));
        }
    }
}

/// One token on one slice of the state.
struct Token<'x> {
    factors: Factors,
    x1: &'x [f32],
    x2: &'x [f32],
    /// What the next token reads with.
    r1: &'x [f32],
    r2: &'x [f32],
    value: &'x [f32],
    inner: &'x mut [f32],
    out: &'x mut [f32],
    /// What this token reads; then what the next one does.
    w: &'x mut [f32],
    y: &'x mut [f32],
}

impl Token<'_> {
    #[inline(always)]
    fn run_as<S: Simd, const VECTORS: usize, const USED: usize, const UNROLL: usize>(
        self,
        simd: S,
        state: &mut [f32],
        writes_value: bool,
        has_out: bool,
    ) {
        match (writes_value, has_out) {
            (false, false) => self.run::<S, VECTORS, USED, UNROLL, false, false>(simd, state),
            (false, true) => self.run::<S, VECTORS, USED, UNROLL, false, true>(simd, state),
            (true, false) => self.run::<S, VECTORS, USED, UNROLL, true, false>(simd, state),
            (true, true) => self.run::<S, VECTORS, USED, UNROLL, true, true>(simd, state),
        }
    }

    /// Of the `VECTORS` vectors in a row `USED` are used. `UNROLL` rows have sums of their own: a sum has to wait for itself,
    /// and few vectors would leave the arithmetic units waiting too.
    #[inline(always)]
    fn run<
        S: Simd,
        const VECTORS: usize,
        const USED: usize,
        const UNROLL: usize,
        const VALUE: bool,
        const OUT: bool,
    >(
        self,
        simd: S,
        state: &mut [f32],
    ) {
        let zero = simd.splat_f32s(0.);
        let (mut v, mut c) = ([zero; USED], [zero; USED]);
        let (w, y) = (S::as_mut_simd_f32s(self.w).0, S::as_mut_simd_f32s(self.y).0);
        let (inner, out) = (S::as_mut_simd_f32s(self.inner).0, S::as_mut_simd_f32s(self.out).0);
        let value = S::as_simd_f32s(self.value).0;
        let Factors { ev, ew, f, hv, hc } = self.factors;
        let [ev, ew, f, hv, hc] = [ev, ew, f, hv, hc].map(|x| simd.splat_f32s(x));
        for j in 0..USED {
            v[j] = value[j];
            let m = simd.mul_add_e_f32s(ev, v[j], simd.mul_f32s(ew, w[j]));
            c[j] = simd.mul_f32s(f, m);
            inner[j] = m;
            if OUT {
                out[j] = simd.mul_add_e_f32s(hv, v[j], simd.mul_add_e_f32s(hc, c[j], y[j]));
            }
        }
        let (mut sum_w, mut sum_y) = ([[zero; USED]; UNROLL], [[zero; USED]; UNROLL]);
        let (state, _) = S::as_mut_simd_f32s(state);
        let rows = state.chunks_exact_mut(UNROLL * VECTORS);
        let writes = self.x1.chunks_exact(UNROLL).zip(self.x2.chunks_exact(UNROLL));
        let reads = self.r1.chunks_exact(UNROLL).zip(self.r2.chunks_exact(UNROLL));
        for ((rows, (x1, x2)), (r1, r2)) in rows.zip(writes).zip(reads) {
            for u in 0..UNROLL {
                let row = &mut rows[u * VECTORS..(u + 1) * VECTORS];
                let [x1, x2, r1, r2] = [x1[u], x2[u], r1[u], r2[u]].map(|x| simd.splat_f32s(x));
                for j in 0..USED {
                    let mut s = simd.mul_add_e_f32s(x2, c[j], row[j]);
                    if VALUE {
                        s = simd.mul_add_e_f32s(x1, v[j], s);
                    }
                    sum_w[u][j] = simd.mul_add_e_f32s(r1, s, sum_w[u][j]);
                    if OUT {
                        sum_y[u][j] = simd.mul_add_e_f32s(r2, s, sum_y[u][j]);
                    }
                    row[j] = s;
                }
            }
        }
        for j in 0..USED {
            w[j] = sum_w.iter().fold(zero, |sum, x| simd.add_f32s(sum, x[j]));
            if OUT {
                y[j] = sum_y.iter().fold(zero, |sum, x| simd.add_f32s(sum, x[j]));
            }
        }
    }
}
