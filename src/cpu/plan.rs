//! How a problem is cut into tasks and which algorithm runs them: plain functions of its sizes.

use std::ops::Range;

use rayon::prelude::*;

use super::sweep::Algorithm;
use crate::options::Mode;
use crate::problem::{Problem, Sequence};

/// Columns that a task has at least: a full tile of two AVX-512 vectors.
const LEAST_COLUMNS: usize = 32;
/// Multiply-adds under which handing a problem to other threads costs more than it saves.
const LEAST_PARALLEL: usize = 200_000;
/// Tokens up to which a sweep in blocks does not pay for packing its state.
const SHORT: usize = 4;

/// One sequence, one value head, and some of the columns of the state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Task<'a> {
    /// The index of the sequence, which is that of its state.
    pub n: usize,
    pub sequence: &'a Sequence,
    pub head: usize,
    pub cols: Range<usize>,
}

/// All tasks of a sweep over states with `cols` columns, in as many slices as keep `threads` busy.
pub(super) fn tasks(problem: &Problem, cols: usize, threads: usize) -> Vec<Task<'_>> {
    let wanted = threads.div_ceil((problem.sequences.len() * problem.v_heads).max(1));
    let width = cols.div_ceil(wanted).next_multiple_of(LEAST_COLUMNS);
    let whole = problem.sequences.len() * problem.v_heads;
    let mut tasks = Vec::with_capacity(whole * cols.div_ceil(width));
    for (n, sequence) in problem.sequences.iter().enumerate() {
        for head in 0..problem.v_heads {
            for from in (0..cols).step_by(width) {
                tasks.push(Task { n, sequence, head, cols: from..cols.min(from + width) });
            }
        }
    }
    tasks
}

/// The sequences cut in segments of tokens, at whose ends the gradient of the decay is computed from the states: sums
/// over more tokens would lose digits, and every end costs a product of two states.
pub(super) struct Segments {
    /// For each sequence, how many segments are before its own; then the number of all.
    first: Vec<usize>,
    length: usize,
}

impl Segments {
    /// Segments of `length` tokens.
    pub fn new(problem: &Problem, length: usize) -> Self {
        let mut first = vec![0];
        for sequence in &problem.sequences {
            first.push(first[first.len() - 1] + sequence.tokens.len().div_ceil(length));
        }
        Self { first, length }
    }

    pub fn count(&self) -> usize {
        self.first[self.first.len() - 1]
    }

    /// The segments of a sequence, in order.
    pub fn of(
        &self,
        sequence: &Sequence,
    ) -> impl DoubleEndedIterator<Item = Range<usize>> + ExactSizeIterator + use<> {
        let Range { start, end } = sequence.tokens;
        let length = self.length;
        (0..(end - start).div_ceil(length))
            .map(move |i| start + i * length..end.min(start + (i + 1) * length))
    }

    /// Where the row of segment `i` of the task's sequence begins in `[segments, HV, K]`.
    pub fn row(&self, problem: &Problem, task: &Task, i: usize) -> usize {
        ((self.first[task.n] + i) * problem.v_heads + task.head) * problem.k_dim
    }
}

/// The algorithm for a sequence: it depends on no other, so that each gets what it gets alone, to the bit.
pub(super) fn algorithm(problem: &Problem, sequence: &Sequence) -> Algorithm {
    match problem.mode {
        Mode::Recurrent => Algorithm::Recurrent,
        Mode::Chunk => Algorithm::Chunk,
        Mode::FusedChunk => Algorithm::FusedChunk,
        Mode::Auto if sequence.tokens.len() <= SHORT => Algorithm::Recurrent,
        Mode::Auto => Algorithm::FusedChunk,
    }
}

/// Runs `task` on each of `tasks`, on all threads if there is enough to do.
pub(super) fn for_each<T: Sync>(problem: &Problem, tasks: &[T], task: impl Fn(&T) + Send + Sync) {
    let sizes = [problem.batch, problem.tokens, problem.v_heads, problem.k_dim, problem.v_dim];
    let work = sizes.into_iter().fold(1usize, usize::saturating_mul);
    if work < LEAST_PARALLEL {
        tasks.iter().for_each(task);
    } else {
        // Sequences differ in length: one task at a time goes to whoever is free.
        tasks.par_iter().with_max_len(1).for_each(task);
    }
}
