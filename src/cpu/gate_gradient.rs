//! The gradient of the log decay.
//!
//! It needs the states only at a few tokens. Every entry of a state or output that comes from the key of token r and is
//! read at token s has the factor `exp(g_{r+1} + ... + g_s)`, so that within a segment of tokens that ends with e
//!
//! ```text
//! dg_{e+1} = sum_v S_e * (decay_{e+1} dS_{e+1})
//! dg_t = dg_{t+1} + q_t * dq_t - k_t * dk_t
//! ```
//!
//! (after appendix C of <https://arxiv.org/abs/2312.06635>, which has one segment). Where a token reads or writes with more
//! keys than one, each [`Pair`] has its term. A token's term with itself is in q dq and in k dk and cancels. Under strong
//! decay it is all there is and what remained of the difference would be rounding, so the sweeps leave it out, and it is
//! added to dq and dk here. The same goes for what the last token writes to the final state, which no decay has made small:
//! the last segment starts from the state without it ([`Ends`]).

use std::iter::Sum;
use std::ops::AddAssign;

use candle_core::DType;
use pulp::Arch;

use super::backward::{row_offset, sum_groups};
use super::plan::{Segments, Task, for_each, tasks};
use super::view::{Buffer, Rows, View, Writer};
use crate::problem::{Decay, Problem, Role, Update};

/// How many tokens ahead rows are fetched.
const AHEAD: usize = 3;

/// Which segments' sums start without what their last token writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ends {
    OfSequence,
    OfEverySegment,
}

/// A key, and the value that the state has for it: what a token reads (the value is then the gradient of what was read), or
/// what it writes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pair<'a> {
    /// `[B, T, HV, V]`
    pub value: View<'a>,
    /// `[B, T, H, K]`
    pub key: View<'a>,
    /// Where the gradient of the key goes: f32, `[B, T, HV, K]`.
    pub grad: Writer<'a>,
    pub scale: f32,
    /// Of what is read, how many tokens before its own.
    pub shift: usize,
    /// Whether what is read has what the token wrote.
    pub sees_own: bool,
}

impl<'a> Pair<'a> {
    pub fn new(key: View<'a>, value: View<'a>, grad: Writer<'a>) -> Self {
        Self { value, key, grad, scale: 1., shift: 0, sees_own: true }
    }
}

/// The gradients of the keys of `reads` and `writes` come without each token's term with itself and leave with it. `at_ends`
/// has the sum over v for the end of each segment.
pub(super) fn gate_gradient(
    problem: &Problem,
    gate: &View,
    segments: &Segments,
    (reads, writes): (&[Pair], &[Pair]),
    at_ends: &mut Buffer,
    ends: Ends,
) -> Buffer {
    let (k_dim, heads) = (problem.k_dim, problem.v_heads);
    let tasks = tasks(problem, k_dim, 1);
    let shared = problem.update == Update::LowRank;
    let mut dg = match shared {
        true => Buffer::zeros(DType::F32, problem.batch * problem.tokens * heads * k_dim),
        false => Buffer::zeros(gate.dtype(), problem.shape(Role::G).iter().product()),
    };
    // One sum a sequence and head, for a decay that all tokens of a head share.
    let mut of_head = Buffer::zeros(DType::F32, tasks.len());
    let (dg_writer, of_head_writer, at_ends) = (dg.writer(), of_head.writer(), at_ends.writer());
    let of_task = |task: &Task| {
        let (b, h) = (task.sequence.batch, task.head);
        let mut token = Token::new(problem, gate, reads, writes, task);
        let (mut row, mut of_all) = (vec![0.; k_dim], 0.);
        for (i, segment) in segments.of(task.sequence).enumerate().rev() {
            // SAFETY: every task has its own sequence and head, so no two touch the same elements, here and below.
            let at_end = unsafe { at_ends.row(segments.row(problem, task, i), k_dim) };
            let mut sum: Vec<f64> = at_end.iter().map(|&x| x.into()).collect();
            let end = if ends == Ends::OfSequence { task.sequence.tokens.end } else { segment.end };
            for t in segment.rev() {
                token.load(t);
                if let Some(t) = t.checked_sub(AHEAD) {
                    token.prefetch(t);
                }
                // SAFETY: as above.
                unsafe { token.add_products(t, t + 1 == end, &mut sum) };
                let at = row_offset(problem, b, t, h, 1);
                if problem.decay == Decay::Channel {
                    row.iter_mut().zip(&sum).for_each(|(y, x)| *y = *x as f32);
                    // SAFETY: as above.
                    unsafe { dg_writer.store(at * k_dim, &row) };
                } else {
                    let of_token = total_of(sum.iter().copied());
                    of_all += of_token;
                    if problem.decay == Decay::Scalar {
                        // SAFETY: as above.
                        unsafe { dg_writer.store(at, &[of_token as f32]) };
                    }
                }
            }
        }
        // SAFETY: as above.
        unsafe { of_head_writer.store(task.n * heads + h, &[of_all as f32]) };
    };
    for_each(problem, &tasks, |task| Arch::new().dispatch(|| of_task(task)));
    match (problem.decay, of_head) {
        (Decay::Head, Buffer::F32(of_head)) => {
            let mut sums = vec![0.; heads];
            for of_sequence in of_head.chunks_exact(heads) {
                sums.iter_mut().zip(of_sequence).for_each(|(sum, x)| *sum += x);
            }
            // SAFETY: nothing else writes by now.
            unsafe { dg.writer().store(0, &sums) };
            dg
        }
        _ if shared => sum_groups(problem, dg, gate.dtype()),
        _ => dg,
    }
}

/// What is read of one token.
struct Token<'a> {
    problem: &'a Problem,
    batch: usize,
    head: usize,
    end: usize,
    gate: Rows<'a>,
    g: Vec<f32>,
    reads: Vec<Loaded<'a>>,
    writes: Vec<Loaded<'a>>,
}

/// The rows of a pair for one token, if the sequence has it.
struct Loaded<'a> {
    pair: Pair<'a>,
    rows: [Rows<'a>; 2],
    key: Vec<f32>,
    value: Vec<f32>,
    is_there: bool,
}

impl<'a> Token<'a> {
    fn new(
        problem: &'a Problem,
        gate: &View<'a>,
        reads: &[Pair<'a>],
        writes: &[Pair<'a>],
        task: &Task,
    ) -> Self {
        let (b, h, kh) = (task.sequence.batch, task.head, problem.key_head(task.head));
        let loaded = |pair: &Pair<'a>| Loaded {
            rows: [pair.key.rows(b, kh, 0), pair.value.rows(b, h, 0)],
            pair: *pair,
            key: vec![0.; problem.k_dim],
            value: vec![0.; problem.v_dim],
            is_there: false,
        };
        Self {
            problem,
            batch: b,
            head: h,
            end: task.sequence.tokens.end,
            gate: gate.rows(b, problem.gate_head(h), 0),
            g: vec![0.; if problem.decay == Decay::Channel { problem.k_dim } else { 1 }],
            reads: reads.iter().map(loaded).collect(),
            writes: writes.iter().map(loaded).collect(),
        }
    }

    #[inline(always)]
    fn load(&mut self, t: usize) {
        self.gate.load(t, &mut self.g);
        for Loaded { pair, rows, key, value, is_there } in self.reads.iter_mut().chain(&mut self.writes) {
            let t = t + pair.shift;
            *is_there = t < self.end;
            if *is_there {
                rows[0].load(t, key);
                rows[1].load(t, value);
            }
        }
    }

    #[inline(always)]
    fn prefetch(&self, t: usize) {
        self.gate.prefetch(t, self.g.len());
        for Loaded { pair, rows, key, value, .. } in self.reads.iter().chain(&self.writes) {
            let t = t + pair.shift;
            rows[0].prefetch(t, key.len());
            rows[1].prefetch(t, value.len());
            pair.grad.prefetch(row_offset(self.problem, self.batch, t, self.head, key.len()), key.len());
        }
    }

    /// Takes the sum from the token behind to token `t`, which is loaded, and adds the terms with itself to the gradients.
    /// Where the token forgets everything the sum is 0, and rounding must not say otherwise.
    ///
    /// # Safety
    ///
    /// No other thread touches the gradients of this head meanwhile.
    #[inline(always)]
    unsafe fn add_products(&self, t: usize, at_end: bool, sum: &mut [f64]) {
        let k = self.problem.k_dim;
        // SAFETY: the caller's promise; each pair has a buffer of its own, and no two rows are used at a time but of
        // different pairs.
        let grad = |x: &Loaded<'a>| unsafe {
            let t = t + x.pair.shift;
            x.pair.grad.row(row_offset(self.problem, self.batch, t, self.head, k), k)
        };
        for read in self.reads.iter().filter(|read| read.is_there) {
            for ((sum, x), d) in sum.iter_mut().zip(&read.key).zip(&*grad(read)) {
                *sum += f64::from(x * d);
            }
        }
        for write in self.writes.iter().filter(|_| !at_end) {
            for ((sum, x), d) in sum.iter_mut().zip(&write.key).zip(&*grad(write)) {
                *sum -= f64::from(x * d);
            }
        }
        match self.g[..] {
            [f32::NEG_INFINITY] => sum.fill(0.),
            [_] => {}
            _ => sum
                .iter_mut()
                .zip(&self.g)
                .filter(|(_, g)| **g == f32::NEG_INFINITY)
                .for_each(|(x, _)| *x = 0.),
        }
        for read in self.reads.iter().filter(|read| read.is_there && read.pair.sees_own) {
            for write in &self.writes {
                let dot = total_of(write.value.iter().zip(&read.value).map(|(v, d)| v * d));
                let own = read.pair.scale * dot;
                grad(read).iter_mut().zip(&write.key).for_each(|(d, k)| *d += own * k);
                grad(write).iter_mut().zip(&read.key).for_each(|(d, q)| *d += own * q);
            }
        }
    }
}

/// The sum of all terms, in several sums at a time: additions that wait for one another take longer than all the rest.
#[inline(always)]
fn total_of<T: Default + Copy + AddAssign + Sum>(terms: impl Iterator<Item = T>) -> T {
    let mut sums = [T::default(); 32];
    for (i, x) in terms.enumerate() {
        sums[i % 32] += x;
    }
    sums.into_iter().sum()
}
