//! The sweep that the delta families are made of, and what one token does in it.
//!
//! Unlike in an additive sweep, what a token writes depends on what the state has for it. In both directions of time, for
//! both families, a token is
//!
//! ```text
//! m   = ev value + ew state^T r1          what is written in its place
//! c   = f m
//! out = state^T r2 + hv value + hc c
//! state = D state + x1 value^T + x2 c^T
//! ```
//!
//! with reads from the state before it fades, so that D is the same either way. Columns of the state do not see each
//! other. With `s` the scale,
//!
//! | | value | r1 | m | c | x2 | x1 | r2 | out |
//! | --- | --- | --- | --- | --- | --- | --- | --- | --- |
//! | delta, forward | v | D k | v - w | beta m = u | k | | s D q | o |
//! | delta, reverse | do | k | du | -beta m | D k | s D q | | |
//! | low rank, forward | v | a | w | m | b | k | s D q | o |
//! | low rank, reverse | do | b | dw | m | a | s D q | k | dv |
//!
//! The reverse sweep starts from the gradient of the final state and leaves that of the initial state.

use std::ops::Range;

use crate::cpu::exp::exp_in_place;
use crate::cpu::sweep::{Algorithm, Out, scale};
use crate::cpu::view::Rows;

/// Which line of the table a sweep is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Family<'a> {
    Delta { beta: Rows<'a> },
    LowRank { a: Rows<'a>, b: Rows<'a> },
}

#[derive(Debug)]
pub(super) struct DeltaSweep<'a> {
    pub family: Family<'a>,
    pub rows: usize,
    pub cols: usize,
    pub tokens: Range<usize>,
    pub reverse: bool,
    pub q: Rows<'a>,
    pub k: Rows<'a>,
    pub value: Rows<'a>,
    /// Logarithms of the decay, and how many a token has: 0, 1 or one for each row.
    pub gate: Option<(Rows<'a>, usize)>,
    pub scale: f32,
    /// Where m goes, if it is wanted.
    pub inner: Option<Out<'a>>,
    pub out: Option<Out<'a>>,
}

impl DeltaSweep<'_> {
    /// The token of step `i`.
    #[inline(always)]
    pub fn token(&self, i: usize) -> usize {
        if self.reverse { self.tokens.end - 1 - i } else { self.tokens.start + i }
    }

    /// Whether a token writes its value as well.
    #[inline(always)]
    pub fn writes_value(&self) -> bool {
        self.reverse || matches!(self.family, Family::LowRank { .. })
    }

    /// How many decays a token has.
    pub fn width(&self) -> usize {
        self.gate.map_or(0, |(_, width)| width)
    }

    /// Asks for what step `i`, if there is such a one, reads.
    #[inline(always)]
    pub fn prefetch(&self, i: usize) {
        if i < self.tokens.len() {
            let t = self.token(i);
            self.q.prefetch(t, self.rows);
            self.k.prefetch(t, self.rows);
            self.value.prefetch(t, self.cols);
            if let Some((g, width)) = self.gate {
                g.prefetch(t, width);
            }
            match self.family {
                Family::Delta { .. } => {}
                Family::LowRank { a, b } => {
                    a.prefetch(t, self.rows);
                    b.prefetch(t, self.rows);
                }
            }
        }
    }
}

/// The vectors over rows of one token.
#[derive(Debug, Clone)]
pub(super) struct Step {
    /// Nothing for 1, one number for all rows, or one for each.
    pub decay: Vec<f32>,
    pub r1: Vec<f32>,
    pub r2: Vec<f32>,
    pub x1: Vec<f32>,
    pub x2: Vec<f32>,
    pub factors: Factors,
}

/// The numbers of one token.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Factors {
    pub ev: f32,
    pub ew: f32,
    pub f: f32,
    pub hv: f32,
    pub hc: f32,
}

impl Step {
    pub fn new(sweep: &DeltaSweep) -> Self {
        let row = || vec![0.; sweep.rows];
        let decay = vec![0.; sweep.width()];
        Self { decay, r1: row(), r2: row(), x1: row(), x2: row(), factors: Factors::default() }
    }

    /// Fills in the vectors and numbers of token `t`.
    #[inline(always)]
    pub fn load(&mut self, sweep: &DeltaSweep, t: usize) {
        if let Some((g, _)) = sweep.gate {
            g.load(t, &mut self.decay);
            exp_in_place(&mut self.decay);
        }
        match (sweep.family, sweep.reverse) {
            (Family::Delta { beta }, false) => {
                sweep.k.load(t, &mut self.x2);
                self.r1.copy_from_slice(&self.x2);
                scale(&mut self.r1, &self.decay);
                sweep.q.load(t, &mut self.r2);
                let hc = sweep.scale * dot(&self.r2, &self.x2);
                self.scale_query(sweep.scale, false);
                self.factors = Factors { ev: 1., ew: -1., f: number(&beta, t), hv: 0., hc };
            }
            (Family::Delta { beta }, true) => {
                sweep.k.load(t, &mut self.r1);
                self.x2.copy_from_slice(&self.r1);
                scale(&mut self.x2, &self.decay);
                sweep.q.load(t, &mut self.x1);
                let ev = sweep.scale * dot(&self.x1, &self.r1);
                self.scale_query(sweep.scale, true);
                self.factors = Factors { ev, ew: 1., f: -number(&beta, t), hv: 0., hc: 0. };
            }
            (Family::LowRank { a, b }, false) => {
                a.load(t, &mut self.r1);
                b.load(t, &mut self.x2);
                sweep.k.load(t, &mut self.x1);
                sweep.q.load(t, &mut self.r2);
                let [hv, hc] = [&self.x1, &self.x2].map(|x| sweep.scale * dot(&self.r2, x));
                self.scale_query(sweep.scale, false);
                self.factors = Factors { ev: 0., ew: 1., f: 1., hv, hc };
            }
            (Family::LowRank { a, b }, true) => {
                a.load(t, &mut self.x2);
                b.load(t, &mut self.r1);
                sweep.k.load(t, &mut self.r2);
                sweep.q.load(t, &mut self.x1);
                let [ev, hv] = [&self.r1, &self.r2].map(|r| sweep.scale * dot(&self.x1, r));
                self.scale_query(sweep.scale, true);
                self.factors = Factors { ev, ew: 1., f: 1., hv, hc: 0. };
            }
        }
    }

    /// The decay of row `r`.
    #[inline(always)]
    pub fn decay_of(&self, r: usize) -> f32 {
        match *self.decay {
            [] => 1.,
            [all] => all,
            _ => self.decay[r],
        }
    }

    /// Takes what was loaded as q to `s D q`.
    #[inline(always)]
    fn scale_query(&mut self, by: f32, reverse: bool) {
        let q = if reverse { &mut self.x1 } else { &mut self.r2 };
        scale(q, &[by]);
        scale(q, &self.decay);
    }
}

impl Factors {
    /// Replaces `w`, what r1 reads, by m, and `y`, what r2 reads, by the result; `c` is what the token writes.
    #[inline(always)]
    pub fn combine(&self, value: &[f32], w: &mut [f32], y: &mut [f32], c: &mut [f32]) {
        let Self { ev, ew, f, hv, hc } = *self;
        for (((v, w), y), c) in value.iter().zip(w).zip(y).zip(c) {
            *w = ev * v + ew * *w;
            *c = f * *w;
            *y += hv * v + hc * *c;
        }
    }
}

#[inline(always)]
fn number(rows: &Rows, t: usize) -> f32 {
    let mut one = [0.];
    rows.load(t, &mut one);
    one[0]
}

/// In as many sums as a vector has lanes: one sum alone cannot be vector code.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.; 16];
    let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..16 {
            sums[i] += a[i] * b[i];
        }
    }
    let tail: f32 = a_tail.iter().zip(b_tail).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + tail
}

/// Runs `sweep` from `state` (`rows x cols`, row-major) and leaves the last state there.
pub(super) fn run(algorithm: Algorithm, sweep: &DeltaSweep, state: &mut [f32]) {
    assert_eq!(state.len(), sweep.rows * sweep.cols, "a state that is not rows x cols");
    match algorithm {
        Algorithm::Recurrent => super::recurrent::run(sweep, state),
        Algorithm::Chunk => super::chunk::run(sweep, state),
        Algorithm::FusedChunk => super::fused::run(sweep, state),
    }
}
