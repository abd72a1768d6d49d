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
//! (after appendix C of <https://arxiv.org/abs/2312.06635>, which has one segment). A token's term with itself is in q dq
//! and in k dk and cancels. Under strong decay it is all there is and what remained of the difference would be rounding,
//! so the sweeps leave it out, and it is added to dq and dk here. The same goes for what the last token writes to the final
//! state, which no decay has made small: the last segment starts from the state without it.

use std::iter::Sum;
use std::ops::AddAssign;

use candle_core::DType;
use pulp::Arch;

use super::Grads;
use super::backward::row_offset;
use super::plan::{Segments, Task, for_each, tasks};
use super::view::{Buffer, Rows, View};
use crate::problem::{Decay, Inputs, Problem, Role};

/// How many tokens ahead rows are fetched.
const AHEAD: usize = 3;

/// `dq` and `dk`, f32 and `[B, T, HV, K]`, come without each token's term with itself and leave with it. `at_ends` has
/// the sum over v for the end of each segment.
pub(super) fn gate_gradient(
    problem: &Problem,
    x: &Inputs<View>,
    grads: &Grads,
    segments: &Segments,
    (dq, dk): (&mut Buffer, &mut Buffer),
    at_ends: &mut Buffer,
) -> Buffer {
    let (k_dim, heads) = (problem.k_dim, problem.v_heads);
    let tasks = tasks(problem, k_dim, 1);
    let gate = x.g.unwrap_or(View::constant(&[0.]));
    let mut dg = Buffer::zeros(gate.dtype(), problem.shape(Role::G).iter().product());
    // One sum a sequence and head, for a decay that all tokens of a head share.
    let mut of_head = Buffer::zeros(DType::F32, tasks.len());
    let (dq_writer, dk_writer, at_ends) = (dq.writer(), dk.writer(), at_ends.writer());
    let (dg_writer, of_head_writer) = (dg.writer(), of_head.writer());
    let of_task = |task: &Task| {
        let (b, h) = (task.sequence.batch, task.head);
        let mut token = Token::new(problem, x, grads, &gate, task);
        let (mut row, mut of_all) = (vec![0.; k_dim], 0.);
        for (i, segment) in segments.of(task.sequence).enumerate().rev() {
            // SAFETY: every task has its own sequence and head, so no two touch the same elements, here and below.
            let at_end = unsafe { at_ends.row(segments.row(problem, task, i), k_dim) };
            let mut sum: Vec<f64> = at_end.iter().map(|&x| x.into()).collect();
            for t in segment.rev() {
                let at = row_offset(problem, b, t, h, k_dim);
                // SAFETY: as above.
                let (dq, dk) = unsafe { (dq_writer.row(at, k_dim), dk_writer.row(at, k_dim)) };
                token.load(t);
                if let Some(t) = t.checked_sub(AHEAD) {
                    let at = row_offset(problem, b, t, h, k_dim);
                    token.prefetch(t);
                    dq_writer.prefetch(at, k_dim);
                    dk_writer.prefetch(at, k_dim);
                }
                token.add_products(dq, dk, t + 1 == task.sequence.tokens.end, &mut sum);
                token.add_own(dq, dk);
                if problem.decay == Decay::Channel {
                    row.iter_mut().zip(&sum).for_each(|(y, x)| *y = *x as f32);
                    // SAFETY: as above.
                    unsafe { dg_writer.store(at, &row) };
                } else {
                    let of_token = total_of(sum.iter().copied());
                    of_all += of_token;
                    if problem.decay == Decay::Scalar {
                        // SAFETY: as above.
                        unsafe { dg_writer.store(row_offset(problem, b, t, h, 1), &[of_token as f32]) };
                    }
                }
            }
        }
        // SAFETY: as above.
        unsafe { of_head_writer.store(task.n * heads + h, &[of_all as f32]) };
    };
    for_each(problem, &tasks, |task| Arch::new().dispatch(|| of_task(task)));
    if let (Decay::Head, Buffer::F32(of_head)) = (problem.decay, of_head) {
        let mut sums = vec![0.; heads];
        for of_sequence in of_head.chunks_exact(heads) {
            sums.iter_mut().zip(of_sequence).for_each(|(sum, x)| *sum += x);
        }
        // SAFETY: nothing else writes by now.
        unsafe { dg.writer().store(0, &sums) };
    }
    dg
}

/// What is read of one token.
struct Token<'a> {
    scale: f32,
    rows: [Rows<'a>; 5],
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    grad_out: Vec<f32>,
    g: Vec<f32>,
}

impl<'a> Token<'a> {
    fn new(problem: &Problem, x: &Inputs<View<'a>>, grads: &Grads<'a>, gate: &View<'a>, task: &Task) -> Self {
        let (b, h, kh) = (task.sequence.batch, task.head, problem.key_head(task.head));
        let grad_out = grads.out.unwrap_or(View::constant(&[0.]));
        let gates = if problem.decay == Decay::Channel { problem.k_dim } else { 1 };
        Self {
            scale: problem.scale,
            rows: [
                x.q.rows(b, kh, 0),
                x.k.rows(b, kh, 0),
                x.v.rows(b, h, 0),
                grad_out.rows(b, h, 0),
                gate.rows(b, h, 0),
            ],
            q: vec![0.; problem.k_dim],
            k: vec![0.; problem.k_dim],
            v: vec![0.; problem.v_dim],
            grad_out: vec![0.; problem.v_dim],
            g: vec![0.; gates],
        }
    }

    #[inline(always)]
    fn load(&mut self, t: usize) {
        let into = [&mut self.q, &mut self.k, &mut self.v, &mut self.grad_out, &mut self.g];
        self.rows.iter().zip(into).for_each(|(rows, row)| rows.load(t, row));
    }

    #[inline(always)]
    fn prefetch(&self, t: usize) {
        let of = [&self.q, &self.k, &self.v, &self.grad_out, &self.g];
        self.rows.iter().zip(of).for_each(|(rows, row)| rows.prefetch(t, row.len()));
    }

    /// Takes the sum from the token behind to this one. Where the token forgets everything the sum is 0, and rounding
    /// must not say otherwise.
    #[inline(always)]
    fn add_products(&self, dq: &[f32], dk: &[f32], is_last: bool, sum: &mut [f64]) {
        let products = self.q.iter().zip(dq).zip(self.k.iter().zip(dk));
        let of_write = if is_last { 0. } else { 1. };
        for (sum, ((q, dq), (k, dk))) in sum.iter_mut().zip(products) {
            *sum += f64::from(q * dq) - of_write * f64::from(k * dk);
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
    }

    #[inline(always)]
    fn add_own(&self, dq: &mut [f32], dk: &mut [f32]) {
        let dot = total_of(self.v.iter().zip(&self.grad_out).map(|(v, d)| v * d));
        let own = self.scale * dot;
        dq.iter_mut().zip(&self.k).for_each(|(d, k)| *d += own * k);
        dk.iter_mut().zip(&self.q).for_each(|(d, q)| *d += own * q);
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
