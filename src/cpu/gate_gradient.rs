//! The gradient of the log decay; [`super::backward`] has the formula.

use candle_core::DType;

use super::Grads;
use super::backward::row_offset;
use super::plan::{Task, for_each, tasks};
use super::view::{Buffer, Rows, View};
use crate::problem::{Decay, Inputs, Problem, Role};

/// `dq` and `dk`, f32 and `[B, T, HV, K]`, come without each token's term with itself and leave with it. `tail`,
/// `[N, HV, K]`, is the part of the final state.
pub(super) fn gate_gradient(
    problem: &Problem,
    x: &Inputs<View>,
    grads: &Grads,
    (dq, dk): (&mut Buffer, &mut Buffer),
    tail: &mut Buffer,
) -> Buffer {
    let (k_dim, heads) = (problem.k_dim, problem.v_heads);
    let tasks = tasks(problem, k_dim, 1);
    let gate = x.g.unwrap_or(View::constant(&[0.]));
    let mut dg = Buffer::zeros(gate.dtype(), problem.shape(Role::G).iter().product());
    // One sum a sequence and head, for a decay that all tokens of a head share.
    let mut of_head = Buffer::zeros(DType::F32, tasks.len());
    let (dq, dk, tail) = (dq.writer(), dk.writer(), tail.writer());
    let (dg_writer, of_head_writer) = (dg.writer(), of_head.writer());
    for_each(problem, &tasks, |task| {
        let (b, h) = (task.sequence.batch, task.head);
        let mut token = Token::new(problem, x, grads, &gate, task);
        let at = task.n * heads + h;
        // SAFETY: every task has its own sequence and head, so no two touch the same elements, here and below.
        let mut sum: Vec<f64> = unsafe { tail.row(at * k_dim, k_dim) }
            .iter()
            .map(|&x| x.into())
            .collect();
        let (mut row, mut total) = (vec![0.; k_dim], 0.);
        for t in task.sequence.tokens.clone().rev() {
            let at = row_offset(problem, b, t, h, k_dim);
            // SAFETY: as above.
            let (dq, dk) = unsafe { (dq.row(at, k_dim), dk.row(at, k_dim)) };
            token.load(t);
            token.add_products(dq, dk, &mut sum);
            token.add_own(dq, dk);
            let of_token: f64 = sum.iter().sum();
            total += of_token;
            row.iter_mut().zip(&sum).for_each(|(y, x)| *y = *x as f32);
            // SAFETY: as above.
            unsafe {
                match problem.decay {
                    Decay::Channel => dg_writer.store(at, &row),
                    Decay::Scalar => {
                        dg_writer.store(row_offset(problem, b, t, h, 1), &[of_token as f32])
                    }
                    Decay::None | Decay::Head => {}
                }
            }
        }
        // SAFETY: as above.
        unsafe { of_head_writer.store(at, &[total as f32]) };
    });
    if let (Decay::Head, Buffer::F32(of_head)) = (problem.decay, of_head) {
        let mut sums = vec![0.; heads];
        for of_sequence in of_head.chunks_exact(heads) {
            sums.iter_mut()
                .zip(of_sequence)
                .for_each(|(sum, x)| *sum += x);
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
    fn new(
        problem: &Problem,
        x: &Inputs<View<'a>>,
        grads: &Grads<'a>,
        gate: &View<'a>,
        task: &Task,
    ) -> Self {
        let (b, h, kh) = (task.sequence.batch, task.head, problem.key_head(task.head));
        let grad_out = grads.out.unwrap_or(View::constant(&[0.]));
        let gates = if problem.decay == Decay::Channel {
            problem.k_dim
        } else {
            1
        };
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

    fn load(&mut self, t: usize) {
        let into = [
            &mut self.q,
            &mut self.k,
            &mut self.v,
            &mut self.grad_out,
            &mut self.g,
        ];
        self.rows
            .iter()
            .zip(into)
            .for_each(|(rows, row)| rows.load(t, row));
    }

    /// Adds `q * dq - k * dk`. Where the token forgets everything, later tokens say nothing about its decay or any
    /// before it: the sum starts anew.
    fn add_products(&self, dq: &[f32], dk: &[f32], sum: &mut [f64]) {
        for (i, sum) in sum.iter_mut().enumerate() {
            *sum += f64::from(self.q[i] * dq[i]) - f64::from(self.k[i] * dk[i]);
            if self.g[i % self.g.len()] == f32::NEG_INFINITY {
                *sum = 0.;
            }
        }
    }

    fn add_own(&self, dq: &mut [f32], dk: &mut [f32]) {
        let dot: f32 = self.v.iter().zip(&self.grad_out).map(|(v, d)| v * d).sum();
        let own = self.scale * dot;
        dq.iter_mut().zip(&self.k).for_each(|(d, k)| *d += own * k);
        dk.iter_mut().zip(&self.q).for_each(|(d, q)| *d += own * q);
    }
}
