//! The one computation that every forward and backward pass is made of.
//!
//! A sweep goes over the tokens of one sequence and one head, forwards or backwards, with a state of `rows x cols`:
//!
//! ```text
//! state = decay * state
//! state = state + write_t value_t^T
//! out_t = state^T read_t               (before the write, if the sweep is exclusive)
//! ```
//!
//! The forward pass of an additive operator is the sweep with q, k, v as read, write and value. Its gradients are three
//! more (see [`super::backward`]). The three modes are three ways to run a sweep.

use std::ops::Range;

use super::exp::exp_in_place;
use super::view::{Rows, Writer};
use super::{chunk, fused, recurrent};

/// The decay of a sweep: logarithms, and what they scale.
#[derive(Debug, Clone, Copy)]
pub(super) enum Gate<'a> {
    None,
    /// One number a token.
    Scalar(Rows<'a>),
    /// One for each row of the state.
    Rows(Rows<'a>),
    /// One for each column of the state.
    Cols(Rows<'a>),
}

impl Gate<'_> {
    /// Multiplies a state with `cols` columns by a decay.
    pub fn fade(&self, state: &mut [f32], cols: usize, decay: &[f32]) {
        for (r, row) in state.chunks_exact_mut(cols).enumerate() {
            match self {
                Gate::None => {}
                Gate::Scalar(_) | Gate::Cols(_) => scale(row, decay),
                Gate::Rows(_) => scale(row, &decay[r..=r]),
            }
        }
    }
}

/// `x *= factors`, where one factor stands for all and none for 1.
#[inline(always)]
pub(super) fn scale(x: &mut [f32], factors: &[f32]) {
    match factors {
        [] => {}
        [f] => x.iter_mut().for_each(|x| *x *= f),
        _ => x.iter_mut().zip(factors).for_each(|(x, f)| *x *= f),
    }
}

/// Where the rows of the result go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Out<'a> {
    writer: Writer<'a>,
    offset: usize,
    stride: usize,
    adds: bool,
}

impl<'a> Out<'a> {
    /// Token `t` goes to the elements from `offset + t * stride` on.
    ///
    /// # Safety
    ///
    /// As long as this is used, no other thread touches the elements that its rows cover.
    pub unsafe fn new(writer: Writer<'a>, offset: usize, stride: usize) -> Self {
        Self { writer, offset, stride, adds: false }
    }

    /// Adds to what is there, which is f32.
    pub fn adding(self) -> Self {
        Self { adds: true, ..self }
    }

    /// Says that `len` elements of token `t` will be stored soon.
    #[inline(always)]
    pub fn prefetch(&self, t: usize, len: usize) {
        self.writer.prefetch(self.offset + t * self.stride, len);
    }

    #[inline(always)]
    pub fn store(&self, t: usize, row: &[f32]) {
        let at = self.offset + t * self.stride;
        // SAFETY: what `new` was promised.
        unsafe {
            match self.adds {
                true => self.writer.row(at, row.len()).iter_mut().zip(row).for_each(|(y, x)| *y += x),
                false => self.writer.store(at, row),
            }
        }
    }

    /// The first `len` elements of token `t` themselves, if they are f32 and to be replaced.
    ///
    /// # Safety
    ///
    /// One row of a token at a time, and nothing is stored there meanwhile.
    #[inline(always)]
    pub unsafe fn row(&self, t: usize, len: usize) -> Option<&'a mut [f32]> {
        // SAFETY: what `new` was promised, and what is promised here.
        (self.writer.is_f32() && !self.adds)
            .then(|| unsafe { self.writer.row(self.offset + t * self.stride, len) })
    }
}

/// What a sweep reads or writes a row of for each token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lane {
    Read,
    Write,
    Value,
    Gate,
    Out,
}

#[derive(Debug)]
pub(super) struct Sweep<'a> {
    pub rows: usize,
    pub cols: usize,
    pub tokens: Range<usize>,
    /// From the last token to the first. The decay between two tokens is that of the later one either way, so a reverse
    /// sweep applies each token's decay after its write.
    pub reverse: bool,
    /// Whether a token's read sees its own write.
    pub inclusive: bool,
    pub read: Rows<'a>,
    pub read_scale: f32,
    pub write: Rows<'a>,
    pub write_scale: f32,
    pub value: Rows<'a>,
    pub gate: Gate<'a>,
    pub out: Out<'a>,
}

impl<'a> Sweep<'a> {
    /// The token of step `i`.
    #[inline(always)]
    pub fn token(&self, i: usize) -> usize {
        if self.reverse { self.tokens.end - 1 - i } else { self.tokens.start + i }
    }

    /// The token whose decay is due before step `i`, for `i` up to the number of tokens: what is due then comes after
    /// the last.
    #[inline(always)]
    pub fn decay_before(&self, i: usize) -> Option<usize> {
        match self.reverse {
            false => (i < self.tokens.len()).then(|| self.token(i)),
            true => i.checked_sub(1).map(|i| self.token(i)),
        }
    }

    /// How many steps there are from `i` to where a segment of tokens ends, or the sweep.
    #[inline(always)]
    pub fn steps_to_stop(&self, i: usize) -> usize {
        let left = self.tokens.len() - i;
        match self.reverse {
            false => left.min(SEGMENT - i % SEGMENT),
            true => left.min((left + SEGMENT - 1) % SEGMENT + 1),
        }
    }

    /// Whether a segment ends before step `i`.
    #[inline(always)]
    pub fn stops_at(&self, i: usize) -> bool {
        let left = self.tokens.len() - i;
        left == 0 || if self.reverse { left } else { i }.is_multiple_of(SEGMENT)
    }

    /// The decay due before step `i`, if there is one.
    pub fn load_decay(&self, i: usize) -> Option<Vec<f32>> {
        let ((g, width), t) = (self.gate_rows()?, self.decay_before(i)?);
        let mut decay = vec![0.; width];
        g.load(t, &mut decay);
        exp_in_place(&mut decay);
        Some(decay)
    }

    /// Applies the decay due before step `i` to the state.
    pub fn fade(&self, state: &mut [f32], i: usize) {
        if let Some(decay) = self.load_decay(i) {
            self.gate.fade(state, self.cols, &decay);
        }
    }

    /// Asks for a row of step `i`, if there is such a one.
    #[inline(always)]
    pub fn prefetch(&self, lane: Lane, i: usize) {
        if i < self.tokens.len() {
            let t = self.token(i);
            match lane {
                Lane::Read => self.read.prefetch(t, self.rows),
                Lane::Write => self.write.prefetch(t, self.rows),
                Lane::Value => self.value.prefetch(t, self.cols),
                Lane::Out => self.out.prefetch(t, self.cols),
                Lane::Gate => {
                    if let Some((g, width)) = self.gate_rows() {
                        g.prefetch(t, width);
                    }
                }
            }
        }
    }

    /// The logarithms to exponentiate and how many there are; `None` without decay.
    pub fn gate_rows(&self) -> Option<(Rows<'a>, usize)> {
        match self.gate {
            Gate::None => None,
            Gate::Scalar(g) => Some((g, 1)),
            Gate::Rows(g) => Some((g, self.rows)),
            Gate::Cols(g) => Some((g, self.cols)),
        }
    }
}

/// How a sweep is run: [`crate::Mode`] without `Auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Algorithm {
    Recurrent,
    Chunk,
    FusedChunk,
}

/// Runs `sweep` from `state` (`rows x cols`, row-major) and leaves the last state there.
pub(super) fn run(algorithm: Algorithm, sweep: &Sweep, state: &mut [f32]) {
    assert_eq!(state.len(), sweep.rows * sweep.cols, "a state that is not rows x cols");
    match algorithm {
        Algorithm::Recurrent => recurrent::run(sweep, state),
        Algorithm::Chunk => chunk::run(sweep, state),
        Algorithm::FusedChunk => fused::run(sweep, state, None),
    }
}

/// Tokens between two stops of [`run_with_stops`], counted from the first token of the sweep.
pub(super) const SEGMENT: usize = 32;

/// What is shown the state at a stop.
pub(super) type AtStop<'f> = dyn FnMut(&[f32]) + 'f;

/// As [`run`], and shows `at_stop` the state at the end of every segment of tokens that the sweep comes through.
pub(super) fn run_with_stops(algorithm: Algorithm, sweep: &Sweep, state: &mut [f32], at_stop: &mut AtStop) {
    if algorithm == Algorithm::FusedChunk {
        return fused::run(sweep, state, Some(at_stop));
    }
    let mut done = 0;
    while done < sweep.tokens.len() {
        let n = sweep.steps_to_stop(done);
        let tokens = match sweep.reverse {
            false => sweep.token(done)..sweep.token(done) + n,
            true => sweep.token(done) + 1 - n..sweep.token(done) + 1,
        };
        run(algorithm, &Sweep { tokens, ..*sweep }, state);
        at_stop(state);
        done += n;
    }
}
