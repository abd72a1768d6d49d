//! The backward pass of the delta families: no state is kept, neither from the forward pass nor for a token.
//!
//! A forward [`DeltaSweep`](super::sweep::DeltaSweep) computes again what every token wrote, a reverse one the gradient
//! of that, which has all that dv and dbeta need. With G the gradient of the state after a token,
//!
//! ```text
//! delta       u = beta (v - w)   du = G^T k        dw = -beta du
//!             dv = beta du       dbeta = du . (v - w)
//!             dq = scale S do    dk = G u + S~ dw
//! low rank    w = S_{t-1}^T a    dw = G^T b        dv = G^T k
//!             dq = scale S do    da = S_{t-1} dw   dk = G v        db = G w
//! ```
//!
//! Now S is a sum of outer products that are known, and so is G: every product with them is an additive sweep (see
//! [`crate::cpu::sweep`]), one for each pair of a [`Pair`] that is read and one that is written. Beside the gradients this
//! takes memory for two numbers in f32 for each element of v and up to four for each of k, and, while the gradient of a gate
//! is computed, T x V for each thread.

use std::ops::Range;

use candle_core::DType;
use rayon::prelude::*;

use super::Sweeps;
use crate::cpu::Grads;
use crate::cpu::backward::{row_offset, sum_groups};
use crate::cpu::forward::{StateRows, gate, load_state};
use crate::cpu::gate_gradient::{Pair, gate_gradient};
use crate::cpu::plan::{Segments, Task, algorithm, for_each, narrow_tasks, tasks};
use crate::cpu::sweep::{Out, Sweep, run};
use crate::cpu::view::{Buffer, View, Writer};
use crate::problem::{Inputs, Problem, Role, Update};

pub(in crate::cpu) fn backward(
    problem: &Problem,
    x: &Inputs<View>,
    grads: &Grads,
    wants: &dyn Fn(Role) -> bool,
) -> Vec<(Role, Buffer)> {
    let low_rank = problem.update == Update::LowRank;
    let keys = [Role::Q, Role::K, Role::G, Role::A, Role::B].into_iter().any(wants);
    let values = problem.batch * problem.tokens * problem.v_heads * problem.v_dim;
    let inner = |wanted: bool| Buffer::zeros(DType::F32, if wanted { values } else { 0 });
    let (mut written, mut of_written) = (inner(keys || wants(Role::Beta)), inner(true));
    let mut dv = Buffer::zeros(problem.dtype, values);
    let states = problem.sequences.len() * problem.v_heads * problem.k_dim * problem.v_dim;
    let mut dkv = Buffer::zeros(DType::F32, if wants(Role::Kv) { states } else { 0 });
    let zero = View::constant(&[0.]);
    let grad_out = grads.out.unwrap_or(zero);
    if keys || wants(Role::Beta) {
        let (value, initial, inner) = (x.v, x.kv.as_ref(), Some(written.writer()));
        Sweeps { problem, x, reverse: false, value, initial, inner, out: None, last: None }.run();
    }
    Sweeps {
        problem,
        x,
        reverse: true,
        value: grad_out,
        initial: grads.kv.as_ref(),
        inner: Some(of_written.writer()),
        out: low_rank.then(|| dv.writer()),
        last: wants(Role::Kv).then(|| dkv.writer()),
    }
    .run();
    let mut found = vec![];
    let (mut written, mut of_written) = (written.into_f32(), of_written.into_f32());
    if let (false, Some(beta)) = (low_rank, x.beta) {
        found.push((Role::Beta, apply_beta(problem, &beta, &mut written, &mut of_written, &mut dv)));
    }
    found.extend([(Role::V, dv), (Role::Kv, dkv)]);
    if keys {
        let shape = [problem.batch, problem.tokens, problem.v_heads, problem.v_dim];
        let (written, of_written) = (View::of_slice(&written, shape), View::of_slice(&of_written, shape));
        found.extend(key_gradients(problem, x, grads, wants, [grad_out, written, of_written]));
    }
    found
}

/// With `v - w` and du comes u, dw and dv; returns the gradient of beta.
fn apply_beta(
    problem: &Problem,
    beta: &View,
    written: &mut [f32],
    of_written: &mut [f32],
    dv: &mut Buffer,
) -> Buffer {
    let (tokens, heads, v) = (problem.tokens, problem.v_heads, problem.v_dim);
    let mut dbeta = Buffer::zeros(beta.dtype(), of_written.len() / v);
    let (dv, dbeta_writer) = (dv.writer(), dbeta.writer());
    // Without what was written there is no gradient but that of v to compute.
    let none = &mut vec![0.; if written.is_empty() { of_written.len() } else { 0 }][..];
    let written = if written.is_empty() { none } else { written };
    written.par_chunks_exact_mut(v).zip(of_written.par_chunks_exact_mut(v)).enumerate().for_each(
        |(row, (written, of_written))| {
            let mut by = [0.];
            beta.rows(row / heads / tokens, row % heads, 0).load(row / heads % tokens, &mut by);
            let of_beta: f32 = written.iter().zip(&*of_written).map(|(x, d)| x * d).sum();
            written.iter_mut().chain(of_written.iter_mut()).for_each(|x| *x *= by[0]);
            // SAFETY: every row is written once.
            unsafe {
                dbeta_writer.store(row, &[of_beta]);
                dv.store(row * v, of_written);
            }
            of_written.iter_mut().for_each(|x| *x = -*x);
        },
    );
    dbeta
}

/// The gradients of all inputs that have a number for each channel of a key, and of gates.
fn key_gradients(
    problem: &Problem,
    x: &Inputs<View>,
    grads: &Grads,
    wants: &dyn Fn(Role) -> bool,
    [grad_out, written, of_written]: [View; 3],
) -> Vec<(Role, Buffer)> {
    let gate = x.g.filter(|_| wants(Role::G));
    let len = problem.batch * problem.tokens * problem.v_heads * problem.k_dim;
    let buffer = |role| Buffer::zeros(DType::F32, if wants(role) || gate.is_some() { len } else { 0 });
    let low_rank = x.a.zip(x.b);
    let read_role = if low_rank.is_some() { Role::A } else { Role::K };
    let (mut dq, mut of_read, mut of_k) = (buffer(Role::Q), buffer(read_role), buffer(Role::K));
    let mut of_b = if low_rank.is_some() { buffer(Role::B) } else { Buffer::zeros(DType::F32, 0) };
    let query = Pair { scale: problem.scale, ..Pair::new(x.q, grad_out, dq.writer()) };
    let (reads, writes) = match low_rank {
        None => (
            [query, Pair { sees_own: false, ..Pair::new(x.k, of_written, of_read.writer()) }],
            vec![Pair::new(x.k, written, of_k.writer())],
        ),
        Some((a, b)) => (
            // S_{t-1} before it fades is the state after token t - 1.
            [query, Pair { shift: 1, ..Pair::new(a, of_written, of_read.writer()) }],
            vec![Pair::new(x.k, x.v, of_k.writer()), Pair::new(b, written, of_b.writer())],
        ),
    };
    let segments = Segments::new(problem);
    let ends = if gate.is_some() { segments.count() * problem.v_heads * problem.k_dim } else { 0 };
    let mut at_ends = Buffer::zeros(DType::F32, ends);
    let products = Products {
        problem,
        x,
        of_final: grads.kv,
        segments: &segments,
        with_own: gate.is_none(),
        reads: &reads,
        writes: &writes,
        at_ends: at_ends.writer(),
    };
    match gate {
        Some(_) => {
            let tasks = narrow_tasks(problem, problem.k_dim);
            for_each(problem, &tasks, |task| products.run_with_ends(task));
        }
        None => {
            let tasks = tasks(problem, problem.k_dim, rayon::current_num_threads());
            let mut jobs = vec![];
            let read_roles = [Role::Q, read_role].into_iter().zip(0..);
            let write_roles = [Role::K, Role::B].into_iter().zip(0..writes.len());
            jobs.extend(read_roles.filter(|(role, _)| wants(*role)).map(|(_, i)| Job::Read(i)));
            jobs.extend(write_roles.filter(|(role, _)| wants(*role)).map(|(_, i)| Job::Write(i)));
            let jobs: Vec<_> =
                jobs.into_iter().flat_map(|job| tasks.iter().map(move |task| (job, task))).collect();
            for_each(problem, &jobs, |(job, task)| products.run(*job, task));
        }
    }
    let mut found = vec![];
    if let Some(g) = gate {
        found.push((Role::G, gate_gradient(problem, &g, &segments, (&reads, &writes), &mut at_ends)));
    }
    let dtype = |x: Option<View>| x.map_or(problem.dtype, |x| x.dtype());
    found.push((Role::Q, sum_groups(problem, dq, problem.dtype)));
    if low_rank.is_some() {
        found.push((Role::A, sum_groups(problem, of_read, dtype(x.a))));
        found.push((Role::B, sum_groups(problem, of_b, dtype(x.b))));
        found.push((Role::K, sum_groups(problem, of_k, problem.dtype)));
    } else {
        let mut dk = of_k.into_f32();
        dk.iter_mut().zip(of_read.into_f32()).for_each(|(x, y)| *x += y);
        found.push((Role::K, sum_groups(problem, Buffer::F32(dk), problem.dtype)));
    }
    found
}

/// Sweeps that write to one gradient.
#[derive(Debug, Clone, Copy)]
enum Job {
    Read(usize),
    Write(usize),
}

/// The products of states with what is read, and of their gradients with what is written.
struct Products<'a> {
    problem: &'a Problem,
    x: &'a Inputs<View<'a>>,
    of_final: Option<View<'a>>,
    segments: &'a Segments,
    /// Whether the results have a token's term with itself.
    with_own: bool,
    reads: &'a [Pair<'a>],
    writes: &'a [Pair<'a>],
    at_ends: Writer<'a>,
}

impl<'a> Products<'a> {
    fn run(&self, job: Job, task: &Task) {
        let whole = &task.sequence.tokens;
        match job {
            Job::Read(i) => {
                self.read_initial_state(&self.reads[i], task);
                for j in 0..self.writes.len() {
                    let mut state = self.first_state(j, task);
                    self.run_within(i, task, &mut self.forward(i, j, task), whole, &mut state);
                }
            }
            Job::Write(j) => {
                for i in 0..self.reads.len() {
                    let mut grad = self.last_gradient(i, task);
                    self.run_within(i, task, &mut self.reverse(i, j, task), whole, &mut grad);
                }
            }
        }
    }

    /// All gradients, and at the end of each segment of tokens what [`gate_gradient`] starts from: the product, summed over
    /// values, of the state before the last token's write and the gradient that comes from behind the segment.
    fn run_with_ends(&self, task: &Task) {
        for i in 1..self.reads.len() {
            self.run(Job::Read(i), task);
        }
        for j in 1..self.writes.len() {
            self.run(Job::Write(j), task);
        }
        let segments: Vec<_> = self.segments.of(task.sequence).collect();
        let size = self.problem.v_dim * task.cols.len();
        let mut states = vec![0.; segments.len() * size];
        for j in 0..self.writes.len() {
            let (mut sweep, mut state) = (self.forward(0, j, task), self.first_state(j, task));
            for (segment, at_end) in segments.iter().zip(states.chunks_exact_mut(size)) {
                let last = segment.end - 1;
                self.run_within(0, task, &mut sweep, &(segment.start..last), &mut state);
                let mut before = state.clone();
                sweep.tokens = last..segment.end;
                sweep.fade(&mut before, 0);
                at_end.iter_mut().zip(&before).for_each(|(x, s)| *x += s);
                self.run_within(0, task, &mut sweep, &(last..segment.end), &mut state);
            }
        }
        let mut of_states: Vec<_> = (0..self.reads.len()).map(|i| self.last_gradient(i, task)).collect();
        for (i, (segment, state)) in segments.iter().zip(states.chunks_exact(size)).enumerate().rev() {
            let mut sum = vec![0.; task.cols.len()];
            for (r, s) in state.chunks_exact(sum.len()).enumerate() {
                let row = r * sum.len()..(r + 1) * sum.len();
                for (c, (sum, s)) in sum.iter_mut().zip(s).enumerate() {
                    *sum += s * of_states.iter().map(|grad| grad[row.start + c]).sum::<f32>();
                }
            }
            let at = self.segments.row(self.problem, task, i) + task.cols.start;
            // SAFETY: tasks differ in sequence, head or columns, so no two cover the same elements.
            unsafe { self.at_ends.store(at, &sum) };
            for (read, grad) in of_states.iter_mut().enumerate() {
                self.run_within(read, task, &mut self.reverse(read, 0, task), segment, grad);
            }
        }
    }

    /// Runs those tokens of `range` that have what read `i` reads. With a shift the last one has nothing: there is no state
    /// behind it that would be asked for, and its gradient has nothing to fade yet.
    fn run_within(&self, i: usize, task: &Task, sweep: &mut Sweep, range: &Range<usize>, state: &mut [f32]) {
        let end = task.sequence.tokens.end.saturating_sub(self.reads[i].shift);
        sweep.tokens = range.start..range.end.min(end);
        if !sweep.tokens.is_empty() {
            run(algorithm(self.problem), sweep, state);
        }
    }

    /// What the first token reads before it writes is the initial state.
    fn read_initial_state(&self, read: &Pair, task: &Task) {
        let first = task.sequence.tokens.start;
        if read.shift == 0 || self.x.kv.is_none() || task.sequence.tokens.is_empty() {
            return;
        }
        let mut value = vec![0.; self.problem.v_dim];
        read.value.rows(task.sequence.batch, task.head, 0).load(first, &mut value);
        let state = self.first_state(0, task);
        let mut product = vec![0.; task.cols.len()];
        for (row, v) in state.chunks_exact(product.len()).zip(value) {
            product.iter_mut().zip(row).for_each(|(p, s)| *p += s * v);
        }
        self.out(&Pair { shift: 0, ..*read }, task).store(first, &product);
    }

    /// The state, as far as write `j` makes it: its transpose, a row for each value.
    fn first_state(&self, j: usize, task: &Task) -> Vec<f32> {
        load_state(self.x.kv.filter(|_| j == 0).map(View::transposed).as_ref(), task, self.problem.v_dim)
    }

    /// The gradient of the state, as far as read `i` makes it.
    fn last_gradient(&self, i: usize, task: &Task) -> Vec<f32> {
        load_state(self.of_final.filter(|_| i == 0).map(View::transposed).as_ref(), task, self.problem.v_dim)
    }

    /// The state that write `j` makes, times what read `i` has for a value.
    fn forward(&self, i: usize, j: usize, task: &Task) -> Sweep<'a> {
        let (read, write) = (&self.reads[i], &self.writes[j]);
        let (b, h, kh) = self.place(task);
        Sweep {
            rows: self.problem.v_dim,
            cols: task.cols.len(),
            tokens: task.sequence.tokens.clone(),
            reverse: false,
            inclusive: read.sees_own && self.with_own,
            read: read.value.later(read.shift).rows(b, h, 0),
            read_scale: read.scale,
            write: write.value.rows(b, h, 0),
            write_scale: 1.,
            value: write.key.rows(b, kh, task.cols.start),
            gate: gate(self.problem, self.x, task, StateRows::Values),
            out: self.out(read, task),
        }
    }

    /// The gradient of the state that read `i` makes, times what write `j` has for a value.
    fn reverse(&self, i: usize, j: usize, task: &Task) -> Sweep<'a> {
        let (read, write) = (&self.reads[i], &self.writes[j]);
        let (b, h, kh) = self.place(task);
        Sweep {
            reverse: true,
            read: write.value.rows(b, h, 0),
            read_scale: 1.,
            write: read.value.later(read.shift).rows(b, h, 0),
            write_scale: read.scale,
            value: read.key.later(read.shift).rows(b, kh, task.cols.start),
            out: self.out(write, task),
            ..self.forward(i, j, task)
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
        // SAFETY: jobs write to buffers of their own, and the tasks of one differ in sequence, head or columns.
        unsafe { Out::new(pair.grad, offset + task.cols.start, v_heads * k_dim) }.adding()
    }
}
