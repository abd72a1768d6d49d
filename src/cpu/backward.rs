//! The backward pass of the additive operators: three sweeps, and no state is kept from the forward pass or for a token.
//!
//! With `dS` the gradient of the state,
//!
//! ```text
//! dq_t = scale * S_t do_t                         forward over S^T, from the initial state
//! dS_t = decay_{t+1} dS_{t+1} + scale * q_t do_t^T  backward, from the final state's gradient
//! dk_t = dS_t v_t                                 over dS^T
//! dv_t = dS_t^T k_t                               over dS; what is left at the end is the initial state's gradient
//! ```
//!
//! [`super::gate_gradient`] has the gradient of the log decay, which follows from dq and dk.

use std::ops::Range;

use candle_core::DType;
use pulp::Arch;
use rayon::prelude::*;

use super::Grads;
use super::forward::{StateRows, gate, load_state};
use super::gate_gradient::{Ends, Pair, gate_gradient};
use super::plan::{Segments, Task, algorithm, for_each, tasks};
use super::sweep::{Algorithm, Out, SEGMENT, Sweep, run, run_with_stops};
use super::view::{Buffer, View, Writer};
use crate::problem::{Inputs, Problem, Role};

pub(super) fn backward(
    problem: &Problem,
    x: &Inputs<View>,
    grads: &Grads,
    wants: &dyn Fn(Role) -> bool,
) -> Vec<(Role, Buffer)> {
    let gate = wants(Role::G) && x.g.is_some();
    let groups = problem.v_heads / problem.k_heads;
    let key_dtype = if gate || groups > 1 { DType::F32 } else { problem.dtype };
    let rows = problem.batch * problem.tokens * problem.v_heads;
    let states = problem.sequences.len() * problem.v_heads;
    let buffer = |dtype, wanted: bool, len: usize| Buffer::zeros(dtype, if wanted { len } else { 0 });
    let (want_q, want_k) = (wants(Role::Q), wants(Role::K));
    let want_v = wants(Role::V) || wants(Role::Kv);
    let mut dq = buffer(key_dtype, want_q || gate, rows * problem.k_dim);
    let mut dk = buffer(key_dtype, want_k || gate, rows * problem.k_dim);
    let mut dv = buffer(problem.dtype, want_v, rows * problem.v_dim);
    let mut dkv = buffer(DType::F32, wants(Role::Kv), states * problem.k_dim * problem.v_dim);
    let segments = Segments::new(problem, SEGMENT);
    let mut at_ends = buffer(DType::F32, gate, segments.count() * problem.v_heads * problem.k_dim);

    let sweeps = Sweeps {
        problem,
        x,
        grads,
        segments: &segments,
        with_own: !gate,
        dq: dq.writer(),
        dk: dk.writer(),
        dv: dv.writer(),
        dkv: wants(Role::Kv).then(|| dkv.writer()),
        at_ends: at_ends.writer(),
    };
    let threads = rayon::current_num_threads();
    let key_tasks = tasks(problem, problem.k_dim, threads);
    let value_tasks = tasks(problem, problem.v_dim, threads);
    let all = [
        (Job::Query, want_q && !gate, &key_tasks),
        (Job::Key, want_k && !gate, &key_tasks),
        (Job::QueryAndKey, gate, &key_tasks),
        (Job::Value, want_v, &value_tasks),
    ];
    let jobs: Vec<_> = all
        .into_iter()
        .filter(|(_, wanted, _)| *wanted)
        .flat_map(|(job, _, tasks)| tasks.iter().map(move |task| (job, task)))
        .collect();
    for_each(problem, &jobs, |(job, task)| sweeps.run(*job, task));

    let mut found = vec![(Role::V, dv), (Role::Kv, dkv)];
    if let Some(g) = x.g.filter(|_| gate) {
        let grad_out = grads.out.unwrap_or(View::constant(&[0.]));
        let read = Pair { scale: problem.scale, ..Pair::new(x.q, grad_out, dq.writer()) };
        let write = Pair::new(x.k, x.v, dk.writer());
        let dg = gate_gradient(problem, &g, &segments, (&[read], &[write]), &mut at_ends, Ends::OfSequence);
        found.push((Role::G, dg));
    }
    found.push((Role::Q, sum_groups(problem, dq, problem.dtype)));
    found.push((Role::K, sum_groups(problem, dk, problem.dtype)));
    found
}

/// Sweeps that run one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Job {
    Query,
    Key,
    QueryAndKey,
    Value,
}

struct Sweeps<'a> {
    problem: &'a Problem,
    x: &'a Inputs<View<'a>>,
    grads: &'a Grads<'a>,
    segments: &'a Segments,
    /// Whether dq and dk have a token's term with itself.
    with_own: bool,
    dq: Writer<'a>,
    dk: Writer<'a>,
    dv: Writer<'a>,
    dkv: Option<Writer<'a>>,
    at_ends: Writer<'a>,
}

impl<'a> Sweeps<'a> {
    fn run(&self, job: Job, task: &Task) {
        let algorithm = algorithm(self.problem, task.sequence);
        match job {
            Job::Query => run(algorithm, &self.query(task), &mut self.query_state(task)),
            Job::Key => run(algorithm, &self.key(task), &mut self.key_state(task)),
            Job::QueryAndKey => self.run_query_and_key(algorithm, task),
            Job::Value => {
                let mut state = load_state(self.grads.kv.as_ref(), task, self.problem.k_dim);
                run(algorithm, &self.value(task), &mut state);
                self.store_initial_state(task, &state);
            }
        }
    }

    /// dq and dk, and at the end of each segment of tokens what [`gate_gradient`] starts from: the product, summed over
    /// values, of the state there and the gradient that comes from behind. At the end of the sequence that is the state
    /// before the last token's write.
    fn run_query_and_key(&self, algorithm: Algorithm, task: &Task) {
        let Range { start, end } = task.sequence.tokens;
        if start == end {
            return;
        }
        let mut state = self.query_state(task);
        let before_last = (self.segments.of(task.sequence).len() - 1) * state.len();
        let mut at_ends = Vec::with_capacity(before_last + state.len());
        let query = Sweep { tokens: start..end - 1, ..self.query(task) };
        run_with_stops(algorithm, &query, &mut state, &mut |state| at_ends.extend_from_slice(state));
        at_ends.truncate(before_last);
        at_ends.extend_from_slice(&state);
        let query = Sweep { tokens: end - 1..end, ..query };
        query.fade(&mut at_ends[before_last..], 0);
        run(algorithm, &query, &mut state);

        let mut grad = self.key_state(task);
        let mut at_ends = at_ends.chunks_exact(grad.len()).enumerate();
        let mut store = |grad: &[f32]| {
            let Some((i, state)) = at_ends.next_back() else { return };
            let sum = sum_of_products(state, grad, task.cols.len());
            let at = self.segments.row(self.problem, task, i) + task.cols.start;
            // SAFETY: tasks differ in sequence, head or columns, so no two cover the same elements.
            unsafe { self.at_ends.store(at, &sum) };
        };
        // What comes from behind the last segment is the gradient that the sweep begins with.
        store(&grad);
        run_with_stops(algorithm, &self.key(task), &mut grad, &mut store);
    }

    fn query_state(&self, task: &Task) -> Vec<f32> {
        load_state(self.x.kv.map(View::transposed).as_ref(), task, self.problem.v_dim)
    }

    fn key_state(&self, task: &Task) -> Vec<f32> {
        load_state(self.grads.kv.map(View::transposed).as_ref(), task, self.problem.v_dim)
    }

    fn query(&self, task: &Task) -> Sweep<'a> {
        let (b, h, kh) = self.place(task);
        Sweep {
            reverse: false,
            read: self.grad_out().rows(b, h, 0),
            read_scale: self.problem.scale,
            write: self.x.v.rows(b, h, 0),
            write_scale: 1.,
            value: self.x.k.rows(b, kh, task.cols.start),
            out: self.out(task, self.dq, self.problem.k_dim),
            ..self.key(task)
        }
    }

    fn key(&self, task: &Task) -> Sweep<'a> {
        let (b, h, kh) = self.place(task);
        Sweep {
            rows: self.problem.v_dim,
            cols: task.cols.len(),
            tokens: task.sequence.tokens.clone(),
            reverse: true,
            inclusive: self.with_own,
            read: self.x.v.rows(b, h, 0),
            read_scale: 1.,
            write: self.grad_out().rows(b, h, 0),
            write_scale: self.problem.scale,
            value: self.x.q.rows(b, kh, task.cols.start),
            gate: gate(self.problem, self.x, task, StateRows::Values),
            out: self.out(task, self.dk, self.problem.k_dim),
        }
    }

    fn value(&self, task: &Task) -> Sweep<'a> {
        let (b, h, kh) = self.place(task);
        Sweep {
            rows: self.problem.k_dim,
            cols: task.cols.len(),
            tokens: task.sequence.tokens.clone(),
            reverse: true,
            inclusive: true,
            read: self.x.k.rows(b, kh, 0),
            read_scale: 1.,
            write: self.x.q.rows(b, kh, 0),
            write_scale: self.problem.scale,
            value: self.grad_out().rows(b, h, task.cols.start),
            gate: gate(self.problem, self.x, task, StateRows::Keys),
            out: self.out(task, self.dv, self.problem.v_dim),
        }
    }

    /// Batch entry, value head and key head.
    fn place(&self, task: &Task) -> (usize, usize, usize) {
        (task.sequence.batch, task.head, self.problem.key_head(task.head))
    }

    fn grad_out(&self) -> View<'a> {
        self.grads.out.unwrap_or(View::constant(&[0.]))
    }

    fn out(&self, task: &Task, writer: Writer<'a>, dim: usize) -> Out<'a> {
        let offset = row_offset(self.problem, task.sequence.batch, 0, task.head, dim) + task.cols.start;
        // SAFETY: sweeps write to buffers of their own, and the tasks of one differ in sequence, head or columns.
        unsafe { Out::new(writer, offset, self.problem.v_heads * dim) }
    }

    fn store_initial_state(&self, task: &Task, grad: &[f32]) {
        let Some(dkv) = self.dkv else { return };
        let (k, v) = (self.problem.k_dim, self.problem.v_dim);
        for (r, row) in grad.chunks_exact(task.cols.len()).enumerate() {
            let at = ((task.n * self.problem.v_heads + task.head) * k + r) * v + task.cols.start;
            // SAFETY: tasks differ in sequence, head or columns, so no two cover the same elements.
            unsafe { dkv.store(at, row) };
        }
    }
}

/// `a * b` summed over rows.
fn sum_of_products(a: &[f32], b: &[f32], cols: usize) -> Vec<f32> {
    let mut sum = vec![0.; cols];
    Arch::new().dispatch(|| {
        for (a, b) in a.chunks_exact(cols).zip(b.chunks_exact(cols)) {
            sum.iter_mut().zip(a).zip(b).for_each(|((sum, a), b)| *sum += a * b);
        }
    });
    sum
}

/// Where the row of a token and value head begins in `[B, T, HV, dim]`.
pub(super) fn row_offset(problem: &Problem, batch: usize, token: usize, head: usize, dim: usize) -> usize {
    ((batch * problem.tokens + token) * problem.v_heads + head) * dim
}

/// Adds up, in f32, the gradients of a key head over the value heads that read it: `[B, T, HV, K]` to `[B, T, H, K]`.
pub(super) fn sum_groups(problem: &Problem, grad: Buffer, dtype: DType) -> Buffer {
    let Buffer::F32(grad) = grad else { return grad };
    let (k, groups) = (problem.k_dim, problem.v_heads / problem.k_heads);
    if groups == 1 && dtype == DType::F32 {
        return Buffer::F32(grad);
    }
    let mut sums = Buffer::zeros(dtype, grad.len() / groups);
    let writer = sums.writer();
    grad.par_chunks_exact(groups * k).enumerate().for_each(|(row, grads)| {
        let mut sum = vec![0.; k];
        for grad in grads.chunks_exact(k) {
            sum.iter_mut().zip(grad).for_each(|(s, g)| *s += g);
        }
        // SAFETY: every row is written once.
        unsafe { writer.store(row * k, &sum) };
    });
    sums
}
