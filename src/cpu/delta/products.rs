//! The products of states with what is read of them, and of the gradients of states with what is written to them.
//!
//! With both known the states are sums of outer products that fade, so every product is an additive sweep (see
//! [`crate::cpu::sweep`]), one for each [`Pair`] that is read and one that is written. Such a sum does not correct itself as
//! the delta rule does: a rounding stays. So each segment of tokens starts anew from states that the delta sweeps left.

use std::ops::Range;

use crate::cpu::backward::row_offset;
use crate::cpu::forward::{StateRows, gate, load_state};
use crate::cpu::gate_gradient::Pair;
use crate::cpu::plan::{Segments, Task, algorithm};
use crate::cpu::sweep::{Out, Sweep, run};
use crate::cpu::view::{View, Writer};
use crate::problem::{Inputs, Problem};

/// Tokens in a segment.
pub(super) const SEGMENT: usize = 64;

pub(super) struct Products<'a> {
    pub problem: &'a Problem,
    pub x: &'a Inputs<View<'a>>,
    pub segments: &'a Segments,
    /// The state before each segment and the gradient of the one after it, `[segments, HV, V, K]`.
    pub starts: &'a [f32],
    pub ends: &'a [f32],
    pub reads: &'a [Pair<'a>],
    pub writes: &'a [Pair<'a>],
    pub wanted_reads: [bool; 2],
    pub wanted_writes: [bool; 2],
    /// If the gradient of the gate is wanted, where goes what it starts from at the end of each segment: the product, summed
    /// over values, of the state before the last token's write and the gradient that comes from behind the segment. Then the
    /// gradients of keys are without each token's term with itself.
    pub at_ends: Option<Writer<'a>>,
}

impl<'a> Products<'a> {
    pub fn run(&self, task: &Task) {
        for (i, segment) in self.segments.of(task.sequence).enumerate() {
            for read in 0..self.reads.len() {
                if self.wanted_reads[read] {
                    self.run_reads(task, i, &segment, read);
                }
            }
            for write in 0..self.writes.len() {
                if self.wanted_writes[write] {
                    self.run_writes(task, i, &segment, write);
                }
            }
        }
        self.reads
            .iter()
            .zip(self.wanted_reads)
            .filter(|x| x.1)
            .for_each(|x| self.read_initial_state(x.0, task));
    }

    fn run_reads(&self, task: &Task, i: usize, segment: &Range<usize>, read: usize) {
        let mut before_last = vec![0.; self.problem.v_dim * task.cols.len()];
        let at_ends = self.at_ends.filter(|_| read == 0);
        for write in 0..self.writes.len() {
            let mut state = self.anchor(self.starts, task, i, write == 0);
            let mut sweep = self.forward(read, write, task);
            if at_ends.is_none() {
                self.run_within(read, task, &mut sweep, segment.clone(), &mut state);
                continue;
            }
            let last = segment.end - 1;
            self.run_within(read, task, &mut sweep, segment.start..last, &mut state);
            sweep.tokens = last..segment.end;
            let mut faded = state.clone();
            sweep.fade(&mut faded, 0);
            before_last.iter_mut().zip(&faded).for_each(|(x, s)| *x += s);
            self.run_within(read, task, &mut sweep, last..segment.end, &mut state);
        }
        if let Some(at_ends) = at_ends {
            let mut sum = vec![0.; task.cols.len()];
            let behind = self.anchor(self.ends, task, i, true);
            for (s, d) in before_last.chunks_exact(sum.len()).zip(behind.chunks_exact(sum.len())) {
                sum.iter_mut().zip(s).zip(d).for_each(|((sum, s), d)| *sum += s * d);
            }
            let at = self.segments.row(self.problem, task, i) + task.cols.start;
            // SAFETY: tasks differ in sequence, head or columns, so no two cover the same elements.
            unsafe { at_ends.store(at, &sum) };
        }
    }

    fn run_writes(&self, task: &Task, i: usize, segment: &Range<usize>, write: usize) {
        for read in 0..self.reads.len() {
            let mut grad = self.anchor(self.ends, task, i, read == 0);
            self.run_within(read, task, &mut self.reverse(read, write, task), segment.clone(), &mut grad);
        }
    }

    /// Runs those tokens of `range` that have what `read` reads; with a shift the last of a sequence has nothing.
    fn run_within(
        &self,
        read: usize,
        task: &Task,
        sweep: &mut Sweep,
        range: Range<usize>,
        state: &mut [f32],
    ) {
        let end = task.sequence.tokens.end.saturating_sub(self.reads[read].shift);
        sweep.tokens = range.start..range.end.min(end);
        if !sweep.tokens.is_empty() {
            run(algorithm(self.problem, task.sequence), sweep, state);
        }
    }

    /// What a shifted read of the first token reads is the initial state.
    fn read_initial_state(&self, read: &Pair<'a>, task: &Task) {
        let first = task.sequence.tokens.start;
        let Some(kv) = self.x.kv.filter(|_| read.shift > 0 && !task.sequence.tokens.is_empty()) else {
            return;
        };
        let mut value = vec![0.; self.problem.v_dim];
        read.value.rows(task.sequence.batch, task.head, 0).load(first, &mut value);
        let mut product = vec![0.; task.cols.len()];
        let state = load_state(Some(&kv.transposed()), task, self.problem.v_dim);
        for (row, v) in state.chunks_exact(product.len()).zip(value) {
            product.iter_mut().zip(row).for_each(|(p, s)| *p += s * v);
        }
        self.out(&Pair { shift: 0, ..*read }, task).store(first, &product);
    }

    /// The columns of a task of the state that segment `i` starts or ends with, where `is_there`, or zeros: sweeps that are
    /// added up start from it once.
    fn anchor(&self, states: &[f32], task: &Task, i: usize, is_there: bool) -> Vec<f32> {
        let (k, v) = (self.problem.k_dim, self.problem.v_dim);
        let mut state = vec![0.; v * task.cols.len()];
        if is_there {
            let from = &states[self.segments.row(self.problem, task, i) * v..];
            for (row, from) in state.chunks_exact_mut(task.cols.len()).zip(from.chunks_exact(k)) {
                row.copy_from_slice(&from[task.cols.clone()]);
            }
        }
        state
    }

    /// The state that a write makes, times what a read has for a value.
    fn forward(&self, read: usize, write: usize, task: &Task) -> Sweep<'a> {
        let (read, write) = (&self.reads[read], &self.writes[write]);
        let (b, h, kh) = self.place(task);
        Sweep {
            rows: self.problem.v_dim,
            cols: task.cols.len(),
            tokens: task.sequence.tokens.clone(),
            reverse: false,
            inclusive: read.sees_own && self.at_ends.is_none(),
            read: read.value.later(read.shift).rows(b, h, 0),
            read_scale: read.scale,
            write: write.value.rows(b, h, 0),
            write_scale: 1.,
            value: write.key.rows(b, kh, task.cols.start),
            gate: gate(self.problem, self.x, task, StateRows::Values),
            out: self.out(read, task),
        }
    }

    /// The gradient of the state that a read makes, times what a write has for a value.
    fn reverse(&self, read: usize, write: usize, task: &Task) -> Sweep<'a> {
        let forward = self.forward(read, write, task);
        let (read, write) = (&self.reads[read], &self.writes[write]);
        let (b, h, kh) = self.place(task);
        Sweep {
            reverse: true,
            read: write.value.rows(b, h, 0),
            read_scale: 1.,
            write: read.value.later(read.shift).rows(b, h, 0),
            write_scale: read.scale,
            value: read.key.later(read.shift).rows(b, kh, task.cols.start),
            out: self.out(write, task),
            ..forward
        }
    }

    /// Batch entry, value head and key head.
    fn place(&self, task: &Task) -> (usize, usize, usize) {
        (task.sequence.batch, task.head, self.problem.key_head(task.head))
    }

    /// Where the gradient of a pair's key goes, for the first token that it is read of.
    fn out(&self, pair: &Pair<'a>, task: &Task) -> Out<'a> {
        let Problem { v_heads, k_dim, .. } = *self.problem;
        let offset = row_offset(self.problem, task.sequence.batch, pair.shift, task.head, k_dim);
        // SAFETY: pairs have buffers of their own, and tasks differ in sequence, head or columns.
        unsafe { Out::new(pair.grad, offset + task.cols.start, v_heads * k_dim) }.adding()
    }
}
