//! The forward pass of the additive operators: one sweep.

use super::plan::{Task, algorithm, for_each, tasks};
use super::sweep::{Gate, Out, Sweep, run};
use super::view::{Buffer, View};
use crate::problem::{Decay, Inputs, Problem};
use candle_core::DType;

/// The output, in the problem's dtype, and the final states if they are asked for.
pub(super) fn forward(problem: &Problem, x: &Inputs<View>) -> Vec<Buffer> {
    let (hv, k, v) = (problem.v_heads, problem.k_dim, problem.v_dim);
    let mut out = Buffer::zeros(problem.dtype, problem.batch * problem.tokens * hv * v);
    let mut kv = problem.final_state.then(|| Buffer::zeros(DType::F32, problem.sequences.len() * hv * k * v));
    let (out_writer, kv_writer) = (out.writer(), kv.as_mut().map(Buffer::writer));
    let tasks = tasks(problem, v, rayon::current_num_threads());
    for_each(problem, &tasks, |task| {
        let Task { n, sequence, head, cols } = task;
        let (b, kh) = (sequence.batch, problem.key_head(*head));
        let offset = (b * problem.tokens * hv + head) * v + cols.start;
        let sweep = Sweep {
            rows: k,
            cols: cols.len(),
            tokens: sequence.tokens.clone(),
            reverse: false,
            inclusive: true,
            read: x.q.rows(b, kh, 0),
            read_scale: problem.scale,
            write: x.k.rows(b, kh, 0),
            write_scale: 1.,
            value: x.v.rows(b, *head, cols.start),
            gate: gate(problem, x, task, StateRows::Keys),
            // SAFETY: tasks differ in sequence, head or columns, so no two cover the same elements.
            out: unsafe { Out::new(out_writer, offset, hv * v) },
        };
        let mut state = load_state(x.kv.as_ref(), task, k);
        run(algorithm(problem, sequence), &sweep, &mut state);
        if let Some(writer) = kv_writer {
            for (r, row) in state.chunks_exact(cols.len()).enumerate() {
                // SAFETY: as for `out`.
                unsafe { writer.store(((n * hv + head) * k + r) * v + cols.start, row) };
            }
        }
    });
    std::iter::once(out).chain(kv).collect()
}

/// Which way round a sweep holds the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StateRows {
    /// `K x V`
    Keys,
    /// `V x K`
    Values,
}

/// The decay as a sweep of `task` applies it.
pub(super) fn gate<'a>(problem: &Problem, x: &Inputs<View<'a>>, task: &Task, rows: StateRows) -> Gate<'a> {
    let (Some(g), b, h) = (&x.g, task.sequence.batch, task.head) else {
        return Gate::None;
    };
    match (problem.decay, rows) {
        (Decay::None, _) => Gate::None,
        (Decay::Head | Decay::Scalar, _) => Gate::Scalar(g.rows(b, h, 0)),
        (Decay::Channel, StateRows::Keys) => Gate::Rows(g.rows(b, problem.gate_head(h), 0)),
        (Decay::Channel, StateRows::Values) => Gate::Cols(g.rows(b, problem.gate_head(h), task.cols.start)),
    }
}

/// `rows` rows of a state at the columns of `task`, or zeros.
pub(super) fn load_state(states: Option<&View>, task: &Task, rows: usize) -> Vec<f32> {
    let mut state = vec![0.; rows * task.cols.len()];
    load_state_into(states, task, &mut state);
    state
}

/// The same into a state of zeros.
pub(super) fn load_state_into(states: Option<&View>, task: &Task, state: &mut [f32]) {
    let Some(states) = states else { return };
    let from = states.rows(task.n, task.head, task.cols.start);
    for (r, row) in state.chunks_exact_mut(task.cols.len()).enumerate() {
        from.load(r, row);
    }
}
