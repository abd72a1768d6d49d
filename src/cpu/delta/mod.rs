//! The delta families: forward one [`DeltaSweep`]. Backward two of them, after which what every token wrote is known and
//! the rest is additive (see [`backward`](mod@backward)).

mod backward;
mod chunk;
mod fused;
mod products;
mod recurrent;
mod sweep;

use super::forward::load_state_into;
use super::plan::{Task, algorithm, for_each, tasks};
use super::sweep::Out;
use super::view::{Buffer, Room, View, Writer};
use crate::problem::{Decay, Inputs, Problem};
use sweep::{DeltaSweep, Family, run};

pub(super) use backward::backward;

/// The output, in the problem's dtype, and the final states if they are asked for.
pub(super) fn forward(problem: &Problem, x: &Inputs<View>) -> Vec<Buffer> {
    let (hv, k, v) = (problem.v_heads, problem.k_dim, problem.v_dim);
    let mut out = Buffer::zeros(problem.dtype, problem.batch * problem.tokens * hv * v);
    let states = problem.sequences.len() * hv;
    let mut kv = problem.final_state.then(|| Room::new(states * k * v));
    let last = kv.as_mut().map(Room::writer);
    let sweeps = Sweeps { problem, x, reverse: false, value: x.v, inner: None, out: Some(out.writer()) };
    let tasks = tasks(problem, v, rayon::current_num_threads());
    for_each(problem, &tasks, |task| {
        let mut own = vec![];
        let state = match last {
            // A whole state grows where it is to be: copying it takes as long as a token.
            // SAFETY: tasks differ in sequence or head, so no two cover the same elements.
            Some(last) if task.cols.len() == v => unsafe {
                last.fresh_row((task.n * hv + task.head) * k * v, k * v)
            },
            _ => {
                own.resize(k * task.cols.len(), 0.);
                &mut own
            }
        };
        load_state_into(x.kv.as_ref(), task, state);
        run(algorithm(problem, task.sequence), &sweeps.sweep(task), state);
        if let (Some(last), false) = (last, own.is_empty()) {
            store_state(problem, &last, task, &own);
        }
    });
    // SAFETY: the tasks are those of all states, and each has written its own.
    let kv = kv.map(|kv| unsafe { kv.filled(states * k * v) });
    std::iter::once(out).chain(kv).collect()
}

fn store_state(problem: &Problem, states: &Writer, task: &Task, state: &[f32]) {
    let (hv, k, v) = (problem.v_heads, problem.k_dim, problem.v_dim);
    for (r, row) in state.chunks_exact(task.cols.len()).enumerate() {
        // SAFETY: tasks differ in sequence, head or columns, so no two cover the same elements.
        unsafe { states.store(((task.n * hv + task.head) * k + r) * v + task.cols.start, row) };
    }
}

/// The delta sweeps of a problem in one direction.
#[derive(Clone, Copy)]
struct Sweeps<'p, 'a> {
    problem: &'p Problem,
    x: &'p Inputs<View<'a>>,
    reverse: bool,
    value: View<'a>,
    inner: Option<Writer<'a>>,
    out: Option<Writer<'a>>,
}

impl<'a> Sweeps<'_, 'a> {
    fn sweep(&self, task: &Task) -> DeltaSweep<'a> {
        let (problem, x) = (self.problem, self.x);
        let (b, h, kh) = (task.sequence.batch, task.head, problem.key_head(task.head));
        let stride = problem.v_heads * problem.v_dim;
        let offset = b * problem.tokens * stride + h * problem.v_dim + task.cols.start;
        // SAFETY: tasks differ in sequence, head or columns, so no two cover the same elements.
        let out = |writer: Option<_>| writer.map(|writer| unsafe { Out::new(writer, offset, stride) });
        let gate = x.g.map(|g| g.rows(b, problem.gate_head(h), 0));
        let width = if problem.decay == Decay::Channel { problem.k_dim } else { 1 };
        let zero = View::constant(&[0.]);
        DeltaSweep {
            family: match (x.a, x.b) {
                (Some(low), Some(rank)) => Family::LowRank { a: low.rows(b, kh, 0), b: rank.rows(b, kh, 0) },
                _ => Family::Delta { beta: x.beta.unwrap_or(zero).rows(b, h, 0) },
            },
            rows: problem.k_dim,
            cols: task.cols.len(),
            tokens: task.sequence.tokens.clone(),
            reverse: self.reverse,
            q: x.q.rows(b, kh, 0),
            k: x.k.rows(b, kh, 0),
            value: self.value.rows(b, h, task.cols.start),
            gate: gate.map(|g| (g, width)),
            scale: problem.scale,
            inner: out(self.inner),
            out: out(self.out),
        }
    }
}
