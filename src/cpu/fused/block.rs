//! A block of tokens: how many fit, the products of their decays, and their rows cut in tiles.

use std::ops::Range;

use pulp::Simd;

use super::lines::{Lines, copy, scaled};
use crate::cpu::exp::exp_in_place;
use crate::cpu::sweep::{Gate, Lane, Sweep, scale};

/// Tokens in a block, at most. Read, write, value and out of a block for one tile stay in L1.
pub(super) const BLOCK: usize = 32;
/// Where the decay within a block may go. Far from the ends of f32 on both sides: states and inputs have to fit as well.
pub(super) const RANGE: Range<f32> = 1e-12..1e12;
/// How many tokens ahead of being brought into tiles a row is fetched: long enough for memory to answer, and few enough
/// that the rows, which often share a place in the cache, leave room for one another.
const AHEAD: usize = 3;
/// What is brought into tiles.
const LANES: [Lane; 3] = [Lane::Read, Lane::Write, Lane::Value];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Along {
    Rows,
    Cols,
}

/// Factors that the packed state has not been given yet.
#[derive(Clone)]
pub(super) struct Due {
    pub rows: Vec<f32>,
    pub cols: Vec<f32>,
}

impl Due {
    /// Multiplies the factors into `tile`, whose place in the state is `rows` and `cols`.
    #[inline(always)]
    pub fn pay<'a>(&self, tile: impl Iterator<Item = &'a mut [f32]>, rows: Range<usize>, cols: Range<usize>) {
        let factors = &self.cols[cols];
        for (s, d) in tile.zip(&self.rows[rows]) {
            for (x, f) in s.iter_mut().zip(factors) {
                *x *= d * f;
            }
        }
    }
}

pub(super) struct Block {
    steps: Range<usize>,
    along: Along,
    /// Decays of a token: 0 without decay, 1, rows or cols.
    width: usize,
    /// `P_t` for each token of the block, and its inverse.
    product: Vec<f32>,
    inverse: Vec<f32>,
    due: Due,
    decay: Vec<f32>,
    /// `[row tile][token][row]`, padded with zeros to whole tiles. Rows are moved in pieces whose length the compiler
    /// knows.
    pub read: Lines,
    pub write: Lines,
    /// `[col tile][token][col]`
    pub value: Lines,
    row: Vec<f32>,
    scaled: Vec<f32>,
}

impl Block {
    pub fn new<S: Simd, const ROWS: usize>(sweep: &Sweep) -> Self {
        let width = sweep.gate_rows().map_or(0, |(_, width)| width);
        let along = if matches!(sweep.gate, Gate::Cols(_)) { Along::Cols } else { Along::Rows };
        let (rows, cols) = (sweep.rows.next_multiple_of(ROWS), sweep.cols.next_multiple_of(2 * S::F32_LANES));
        Self {
            steps: 0..0,
            along,
            width,
            product: vec![1.; BLOCK * width],
            inverse: vec![1.; BLOCK * width],
            due: Due { rows: vec![1.; sweep.rows], cols: vec![1.; sweep.cols] },
            decay: vec![0.; width],
            read: Lines::zeros(rows * BLOCK),
            write: Lines::zeros(rows * BLOCK),
            value: Lines::zeros(cols * BLOCK),
            row: vec![0.; rows.max(cols)],
            scaled: vec![0.; rows.max(cols)],
        }
    }

    pub fn steps(&self) -> Range<usize> {
        self.steps.clone()
    }

    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// What the state is owed before the first token.
    pub fn due(&self) -> &Due {
        &self.due
    }

    /// The same if there is a decay.
    pub fn due_if_any(&self) -> Option<&Due> {
        (self.width > 0).then_some(&self.due)
    }

    /// What the state is owed after the last token.
    pub fn due_after(&self) -> Due {
        let mut due = Due { rows: vec![1.; self.due.rows.len()], cols: vec![1.; self.due.cols.len()] };
        self.last_product(&mut due);
        due
    }

    fn last_product(&self, due: &mut Due) {
        due.rows.fill(1.);
        due.cols.fill(1.);
        let from = self.product.len().min(self.steps.len().saturating_sub(1) * self.width);
        scale(self.side(due), &self.product[from..][..self.width]);
    }

    fn side<'d>(&self, due: &'d mut Due) -> &'d mut [f32] {
        match self.along {
            Along::Rows => &mut due.rows,
            Along::Cols => &mut due.cols,
        }
    }

    /// The decay before step `i`, exponentiated. Returns whether there is one.
    #[inline(always)]
    fn load_decay(&mut self, sweep: &Sweep, i: usize) -> bool {
        let (Some((g, _)), Some(t)) = (sweep.gate_rows(), sweep.decay_before(i)) else {
            return false;
        };
        g.load(t, &mut self.decay);
        exp_in_place(&mut self.decay);
        true
    }

    /// Makes this the block after `before`, or the first: finds out how many tokens fit, perhaps none.
    #[inline(always)]
    pub fn plan(&mut self, sweep: &Sweep, before: Option<&Self>) {
        let first = before.map_or(0, |before| before.steps.end);
        let most = BLOCK.min(sweep.steps_to_stop(first));
        self.steps = first..first + most;
        if self.width == 0 {
            return;
        }
        if let Some(before) = before {
            before.last_product(&mut self.due);
        }
        if self.load_decay(sweep, first) {
            let due = match self.along {
                Along::Rows => &mut self.due.rows,
                Along::Cols => &mut self.due.cols,
            };
            scale(due, &self.decay);
        }
        let w = self.width;
        self.product[..w].fill(1.);
        self.inverse[..w].fill(1.);
        for i in 1..most {
            self.load_decay(sweep, first + i);
            let (before, now) = self.product.split_at_mut(i * w);
            let mut fits = true;
            for ((p, b), d) in now[..w].iter_mut().zip(&before[(i - 1) * w..]).zip(&self.decay) {
                *p = b * d;
                fits &= *p > RANGE.start && *p < RANGE.end;
            }
            if !fits {
                self.steps.end = first + i;
                return;
            }
            for (inverse, p) in self.inverse[i * w..].iter_mut().zip(&now[..w]) {
                *inverse = 1. / p;
            }
        }
    }

    /// The decays of token `i` since the block's first, if they scale the columns.
    pub fn product_of_cols(&self, i: usize) -> &[f32] {
        at(&self.product, i, self.width, self.along == Along::Cols)
    }

    /// How many rows there are to load.
    pub fn pieces(&self) -> usize {
        self.steps.len() * LANES.len()
    }

    #[inline(always)]
    pub fn load_all<S: Simd, const ROWS: usize>(&mut self, sweep: &Sweep) {
        for piece in 0..self.pieces() {
            self.load::<S, ROWS>(sweep, piece);
        }
    }

    /// Brings a row of one token into tiles, with its scale and decay, and has a later one fetched.
    #[inline(always)]
    pub fn load<S: Simd, const ROWS: usize>(&mut self, sweep: &Sweep, piece: usize) {
        let (i, lane) = (piece / LANES.len(), LANES[piece % LANES.len()]);
        let step = self.steps.start + i;
        sweep.prefetch(lane, step + AHEAD);
        let t = sweep.token(step);
        let (from, factor, products, tiles) = match lane {
            Lane::Write => (&sweep.write, sweep.write_scale, &self.inverse, &mut self.write),
            Lane::Read => (&sweep.read, sweep.read_scale, &self.product, &mut self.read),
            _ => {
                let row = sweep.value.read(t, &mut self.row[..sweep.cols]);
                let decay = at(&self.inverse, i, self.width, self.along == Along::Cols);
                let row = scaled(row, decay, &mut self.scaled);
                let width = 2 * S::F32_LANES;
                let tiles = self.value.chunks_exact_mut(width).skip(i).step_by(BLOCK);
                row.chunks(width).zip(tiles).for_each(|(x, tile)| copy::<S>(x, tile));
                return;
            }
        };
        let row = from.read(t, &mut self.row[..sweep.rows]);
        let row = scaled(row, at(products, i, self.width, self.along == Along::Rows), &mut self.scaled);
        let (pieces, rest) = row.as_chunks::<ROWS>();
        let mut tiles = tiles.as_chunks_mut::<ROWS>().0[i..].iter_mut().step_by(BLOCK);
        for (x, tile) in pieces.iter().zip(&mut tiles) {
            *tile = x.map(|x| x * factor);
        }
        for (x, y) in rest.iter().zip(tiles.flatten()) {
            *y = x * factor;
        }
    }
}

/// The products of token `i` if they are asked for.
#[inline(always)]
fn at(products: &[f32], i: usize, width: usize, wanted: bool) -> &[f32] {
    if wanted { &products[i * width..][..width] } else { &[] }
}
