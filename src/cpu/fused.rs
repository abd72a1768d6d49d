//! A sweep in blocks of tokens, with a tile of the state held in registers while the tokens of a block go by.
//!
//! Within a block the state is kept divided by the decay since the block's first token: if `P_t` is that product, then
//! `S_t = P_t S'_t` and `S'_t = S'_{t-1} + (write_t / P_t) value_t^T`. Scaling the small vectors instead of the state
//! leaves two multiply-adds for each element of the state and token, the least that the recurrence needs. A block ends
//! where `P_t` would leave [`RANGE`], so nothing overflows however strong the decay; the first token's own decay is
//! applied to the state itself, exactly.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use super::exp::exp_in_place;
use super::sweep::{Gate, Sweep, scale};

/// Tokens in a block, at most. Read, write, value and out of a block for one tile stay in L1.
const BLOCK: usize = 32;
/// Where the decay within a block may go. Far from the ends of f32 on both sides: states and inputs have to fit as well.
const RANGE: Range<f32> = 1e-12..1e12;

pub(super) fn run(sweep: &Sweep, state: &mut [f32]) {
    Arch::new().dispatch(Fused { sweep, state });
}

struct Fused<'s, 'a> {
    sweep: &'s Sweep<'a>,
    state: &'s mut [f32],
}

impl WithSimd for Fused<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // A tile is ROWS x 2 vectors: with two accumulators, two values and a broadcast it fills the register file.
        if S::REGISTER_COUNT >= 32 {
            sweep_in_blocks::<S, 8>(simd, self.sweep, self.state);
        } else {
            sweep_in_blocks::<S, 4>(simd, self.sweep, self.state);
        }
    }
}

#[inline(always)]
fn sweep_in_blocks<S: Simd, const ROWS: usize>(simd: S, sweep: &Sweep, state: &mut [f32]) {
    let mut tiles = Tiles::new::<S, ROWS>(sweep);
    tiles.pack_state(state);
    let mut decay = BlockDecay::new(sweep);
    let mut done = 0;
    while done < sweep.tokens.len() {
        let n = decay.next_block(sweep, done);
        tiles.load::<S, ROWS>(sweep, done, n, &decay);
        if sweep.inclusive {
            tiles.update::<S, ROWS, true>(simd, sweep, done..done + n, decay.due());
        } else {
            tiles.update::<S, ROWS, false>(simd, sweep, done..done + n, decay.due());
        }
        tiles.store::<S>(sweep, done, n, &decay);
        decay.leave_block(n);
        done += n;
    }
    decay.finish(sweep);
    tiles.unpack_state(state, &decay.due);
}

/// The products of decays in a block and what the state is still owed.
struct BlockDecay {
    along: Along,
    /// Decays of a token: 0 without decay, 1, rows or cols.
    width: usize,
    /// `P_t` for each token of the block, and its inverse.
    product: Vec<f32>,
    inverse: Vec<f32>,
    /// Factors that the packed state has not been given yet.
    due: Due,
    next: Vec<f32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Along {
    Rows,
    Cols,
}

struct Due {
    rows: Vec<f32>,
    cols: Vec<f32>,
}

impl Due {
    /// Multiplies the factors into `tile`, whose place in the state is `rows` and `cols`.
    #[inline(always)]
    fn pay<'a>(&self, tile: impl Iterator<Item = &'a mut [f32]>, rows: Range<usize>, cols: Range<usize>) {
        let factors = &self.cols[cols];
        for (s, d) in tile.zip(&self.rows[rows]) {
            for (x, f) in s.iter_mut().zip(factors) {
                *x *= d * f;
            }
        }
    }
}

impl BlockDecay {
    fn new(sweep: &Sweep) -> Self {
        let width = sweep.gate_rows().map_or(0, |(_, width)| width);
        let along = if matches!(sweep.gate, Gate::Cols(_)) { Along::Cols } else { Along::Rows };
        Self {
            along,
            width,
            product: vec![1.; BLOCK * width],
            inverse: vec![1.; BLOCK * width],
            due: Due { rows: vec![1.; sweep.rows], cols: vec![1.; sweep.cols] },
            next: vec![0.; width],
        }
    }

    /// The decay before step `i`, exponentiated, in `next`. Returns whether there is one.
    #[inline(always)]
    fn load_next(&mut self, sweep: &Sweep, i: usize) -> bool {
        let (Some((g, _)), Some(t)) = (sweep.gate_rows(), sweep.decay_before(i)) else {
            return false;
        };
        g.load(t, &mut self.next);
        exp_in_place(&mut self.next);
        true
    }

    /// What the state is owed; nothing without decay.
    fn due(&self) -> Option<&Due> {
        (self.width > 0).then_some(&self.due)
    }

    /// Multiplies `next` into what the state is owed.
    #[inline(always)]
    fn owe_next(&mut self) {
        let due = match self.along {
            Along::Rows => &mut self.due.rows,
            Along::Cols => &mut self.due.cols,
        };
        scale(due, &self.next);
    }

    /// How many tokens, from step `first` on, fit in a block; computes their products.
    #[inline(always)]
    fn next_block(&mut self, sweep: &Sweep, first: usize) -> usize {
        let most = BLOCK.min(sweep.tokens.len() - first);
        if self.width == 0 {
            return most;
        }
        if self.load_next(sweep, first) {
            self.owe_next();
        }
        let w = self.width;
        self.product[..w].fill(1.);
        self.inverse[..w].fill(1.);
        for i in 1..most {
            self.load_next(sweep, first + i);
            let (before, now) = self.product.split_at_mut(i * w);
            let mut fits = true;
            for ((p, b), d) in now[..w].iter_mut().zip(&before[(i - 1) * w..]).zip(&self.next) {
                *p = b * d;
                fits &= *p > RANGE.start && *p < RANGE.end;
            }
            if !fits {
                return i;
            }
            for (inverse, p) in self.inverse[i * w..].iter_mut().zip(&now[..w]) {
                *inverse = 1. / p;
            }
        }
        most
    }

    /// After a block the state is owed its last product.
    #[inline(always)]
    fn leave_block(&mut self, n: usize) {
        self.due.rows.fill(1.);
        self.due.cols.fill(1.);
        if self.width > 0 {
            let last = (n - 1) * self.width;
            self.next.copy_from_slice(&self.product[last..last + self.width]);
            self.owe_next();
        }
    }

    #[inline(always)]
    fn finish(&mut self, sweep: &Sweep) {
        if self.load_next(sweep, sweep.tokens.len()) {
            self.owe_next();
        }
    }

    /// The product (or its inverse) at token `i` of the block, if it scales this side.
    #[inline(always)]
    fn at<'a>(&self, products: &'a [f32], i: usize, along: Along) -> &'a [f32] {
        if self.along == along { &products[i * self.width..][..self.width] } else { &[] }
    }
}

/// The state and one block of tokens, cut in tiles and padded with zeros to whole tiles. Everything that the inner loop
/// reads is contiguous for a tile.
struct Tiles {
    rows: usize,
    cols: usize,
    /// Rows and columns of a tile, and how many tiles there are of each.
    tile: (usize, usize),
    grid: (usize, usize),
    /// `[col tile][row][col]`
    state: Vec<f32>,
    /// `[row tile][token][row]`. Rows are moved in pieces whose length the compiler knows: a call of `memcpy` for each
    /// would cost as much as the arithmetic.
    read: Vec<f32>,
    write: Vec<f32>,
    /// `[col tile][token][col]`
    value: Vec<f32>,
    out: Vec<f32>,
    row: Vec<f32>,
    col: Vec<f32>,
}

impl Tiles {
    fn new<S: Simd, const ROWS: usize>(sweep: &Sweep) -> Self {
        let tile = (ROWS, 2 * S::F32_LANES);
        let grid = (sweep.rows.div_ceil(tile.0), sweep.cols.div_ceil(tile.1));
        Self {
            rows: sweep.rows,
            cols: sweep.cols,
            tile,
            grid,
            state: vec![0.; grid.0 * tile.0 * grid.1 * tile.1],
            read: vec![0.; grid.0 * tile.0 * BLOCK],
            write: vec![0.; grid.0 * tile.0 * BLOCK],
            value: vec![0.; grid.1 * tile.1 * BLOCK],
            out: vec![0.; grid.1 * tile.1 * BLOCK],
            row: vec![0.; grid.0 * tile.0],
            col: vec![0.; grid.1 * tile.1],
        }
    }

    fn pack_state(&mut self, state: &[f32]) {
        for (r, row) in state.chunks_exact(self.cols).enumerate() {
            for (c, x) in row.chunks(self.tile.1).enumerate() {
                let at = (c * self.grid.0 * self.tile.0 + r) * self.tile.1;
                self.state[at..at + x.len()].copy_from_slice(x);
            }
        }
    }

    fn unpack_state(&self, state: &mut [f32], due: &Due) {
        for (r, row) in state.chunks_exact_mut(self.cols).enumerate() {
            for (c, x) in row.chunks_mut(self.tile.1).enumerate() {
                let at = (c * self.grid.0 * self.tile.0 + r) * self.tile.1;
                x.copy_from_slice(&self.state[at..at + x.len()]);
            }
            scale(row, &due.cols);
            scale(row, &due.rows[r..=r]);
        }
    }

    #[inline(always)]
    fn load<S: Simd, const ROWS: usize>(
        &mut self,
        sweep: &Sweep,
        first: usize,
        n: usize,
        decay: &BlockDecay,
    ) {
        let (rows, cols) = (self.rows, self.cols);
        for i in 0..n {
            let t = sweep.token(first + i);
            for (lane, factor, products, tiles) in [
                (&sweep.read, sweep.read_scale, &decay.product, &mut self.read),
                (&sweep.write, sweep.write_scale, &decay.inverse, &mut self.write),
            ] {
                let row = &mut self.row[..rows];
                lane.load(t, row);
                scale(row, decay.at(products, i, Along::Rows));
                let (tiles, _) = tiles.as_chunks_mut::<ROWS>();
                for (x, tile) in
                    self.row.as_chunks::<ROWS>().0.iter().zip(tiles[i..].iter_mut().step_by(BLOCK))
                {
                    *tile = x.map(|x| x * factor);
                }
            }
            let col = &mut self.col[..cols];
            sweep.value.load(t, col);
            scale(col, decay.at(&decay.inverse, i, Along::Cols));
            let (tiles, _) = S::as_mut_simd_f32s(&mut self.value);
            for (c, x) in S::as_simd_f32s(&self.col).0.chunks_exact(2).enumerate() {
                let at = (c * BLOCK + i) * 2;
                (tiles[at], tiles[at + 1]) = (x[0], x[1]);
            }
        }
    }

    #[inline(always)]
    fn store<S: Simd>(&mut self, sweep: &Sweep, first: usize, n: usize, decay: &BlockDecay) {
        for i in 0..n {
            let (col, out) = (S::as_mut_simd_f32s(&mut self.col).0, S::as_simd_f32s(&self.out).0);
            for (c, x) in col.chunks_exact_mut(2).enumerate() {
                let at = (c * BLOCK + i) * 2;
                (x[0], x[1]) = (out[at], out[at + 1]);
            }
            let col = &mut self.col[..self.cols];
            scale(col, decay.at(&decay.product, i, Along::Cols));
            sweep.out.store(sweep.token(first + i), col);
        }
    }

    /// Runs the tokens of `steps` over all tiles, and meanwhile has the next ones fetched.
    #[inline(always)]
    fn update<S: Simd, const ROWS: usize, const INCLUSIVE: bool>(
        &mut self,
        simd: S,
        sweep: &Sweep,
        steps: Range<usize>,
        due: Option<&Due>,
    ) {
        let (rows, cols) = self.tile;
        let n = steps.len();
        let tiles = self.grid.0 * self.grid.1;
        let mut fetched = 0;
        for c in 0..self.grid.1 {
            let at = c * BLOCK * cols;
            let (value, out) = (&self.value[at..at + n * cols], &mut self.out[at..at + n * cols]);
            out.fill(0.);
            let state = &mut self.state[c * self.grid.0 * rows * cols..][..self.grid.0 * rows * cols];
            let width = cols.min(self.cols - c * cols);
            for (r, state) in state.chunks_exact_mut(rows * cols).enumerate() {
                let height = rows.min(self.rows - r * rows);
                if let Some(due) = due {
                    due.pay(
                        state.chunks_exact_mut(cols),
                        r * rows..r * rows + height,
                        c * cols..c * cols + width,
                    );
                }
                while fetched * tiles < (c * self.grid.0 + r + 1) * n {
                    sweep.prefetch(steps.end + fetched);
                    sweep.out.prefetch(sweep.token(steps.start + fetched), sweep.cols);
                    fetched += 1;
                }
                let at = r * BLOCK * rows;
                let (read, write) = (&self.read[at..at + n * rows], &self.write[at..at + n * rows]);
                if width <= S::F32_LANES {
                    tile::<S, ROWS, 1, INCLUSIVE>(simd, read, write, value, out, state);
                } else {
                    tile::<S, ROWS, 2, INCLUSIVE>(simd, read, write, value, out, state);
                }
            }
        }
    }
}

/// All tokens of a block on one tile of the state: `ROWS` rows of two vectors, of which the first `VECTORS` are used.
#[inline(always)]
fn tile<S: Simd, const ROWS: usize, const VECTORS: usize, const INCLUSIVE: bool>(
    simd: S,
    read: &[f32],
    write: &[f32],
    value: &[f32],
    out: &mut [f32],
    state: &mut [f32],
) {
    let (state, _) = S::as_mut_simd_f32s(state);
    let mut s = [[simd.splat_f32s(0.); VECTORS]; ROWS];
    for (s, x) in s.iter_mut().zip(state.chunks_exact(2)) {
        s.copy_from_slice(&x[..VECTORS]);
    }
    let (value, _) = S::as_simd_f32s(value);
    let (out, _) = S::as_mut_simd_f32s(out);
    let tokens = read.chunks_exact(ROWS).zip(write.chunks_exact(ROWS));
    for (((q, w), v), o) in tokens.zip(value.chunks_exact(2)).zip(out.chunks_exact_mut(2)) {
        let mut acc = [simd.splat_f32s(0.); VECTORS];
        acc.copy_from_slice(&o[..VECTORS]);
        for r in 0..ROWS {
            let (q, w) = (simd.splat_f32s(q[r]), simd.splat_f32s(w[r]));
            for j in 0..VECTORS {
                if !INCLUSIVE {
                    acc[j] = simd.mul_add_e_f32s(q, s[r][j], acc[j]);
                }
                s[r][j] = simd.mul_add_e_f32s(w, v[j], s[r][j]);
                if INCLUSIVE {
                    acc[j] = simd.mul_add_e_f32s(q, s[r][j], acc[j]);
                }
            }
        }
        o[..VECTORS].copy_from_slice(&acc);
    }
    for (s, x) in s.iter().zip(state.chunks_exact_mut(2)) {
        x[..VECTORS].copy_from_slice(s);
    }
}
