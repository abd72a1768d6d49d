//! The backward pass of the delta families: no state is kept from the forward pass, and none for a token.
//!
//! A forward [`DeltaSweep`] computes again what every token wrote, a reverse one the gradient of that, which has all that dv
//! and dbeta need. With G the gradient of the state after a token,
//!
//! ```text
//! delta       u = beta (v - w)   du = G^T k        dw = -beta du
//!             dv = beta du       dbeta = du . (v - w)
//!             dq = scale S do    dk = G u + S~ dw
//! low rank    w = S_{t-1}^T a    dw = G^T b        dv = G^T k
//!             dq = scale S do    da = S_{t-1} dw   dk = G v        db = G w
//! ```
//!
//! Now S is a sum of outer products that are known, and so is G: [`super::products`] has the products with them.
//!
//! Memory: two numbers in f32 for each element of v, up to four for each of k, and two states for each [`SEGMENT`] tokens,
//! which are as much as `2 K / SEGMENT` times v.

use candle_core::DType;
use rayon::prelude::*;

use super::products::{Products, SEGMENT};
use super::sweep::{DeltaSweep, Step, run};
use super::{Sweeps, store_state};
use crate::cpu::Grads;
use crate::cpu::backward::sum_groups;
use crate::cpu::forward::load_state;
use crate::cpu::gate_gradient::{Ends, Pair, gate_gradient};
use crate::cpu::plan::{Segments, Task, algorithm, for_each, tasks};
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
    let forward = keys || wants(Role::Beta);
    let segments = Segments::new(problem, SEGMENT);
    let state = problem.v_heads * problem.k_dim * problem.v_dim;
    let values = problem.batch * problem.tokens * problem.v_heads * problem.v_dim;
    let buffer = |wanted: bool, len: usize| Buffer::zeros(DType::F32, if wanted { len } else { 0 });
    let (mut written, mut of_written) = (buffer(forward, values), buffer(true, values));
    let [mut starts, mut ends] = [(); 2].map(|()| buffer(keys, segments.count() * state));
    let mut dv = Buffer::zeros(problem.dtype, values);
    let mut dkv = buffer(wants(Role::Kv), problem.sequences.len() * state);
    let grad_out = grads.out.unwrap_or(View::constant(&[0.]));
    let sweeps = Sweeps { problem, x, reverse: false, value: x.v, inner: None, out: None };
    if forward {
        let sweeps = Sweeps { inner: Some(written.writer()), ..sweeps };
        let anchors = keys.then(|| starts.writer());
        run_in_segments(&sweeps, &segments, x.kv.as_ref(), anchors, None);
    }
    let out = low_rank.then(|| dv.writer());
    let sweeps = Sweeps { reverse: true, value: grad_out, inner: Some(of_written.writer()), out, ..sweeps };
    let anchors = keys.then(|| ends.writer());
    let last = wants(Role::Kv).then(|| dkv.writer());
    run_in_segments(&sweeps, &segments, grads.kv.as_ref(), anchors, last);

    let (mut written, mut of_written) = (written.into_f32(), of_written.into_f32());
    let mut found = vec![];
    if let (false, Some(beta)) = (low_rank, x.beta) {
        found.push((Role::Beta, apply_beta(problem, &beta, &mut written, &mut of_written, &mut dv)));
    }
    found.extend([(Role::V, dv), (Role::Kv, dkv)]);
    if keys {
        let shape = [problem.batch, problem.tokens, problem.v_heads, problem.v_dim];
        let values = [grad_out, View::of_slice(&written, shape), View::of_slice(&of_written, shape)];
        let anchors = [&starts.into_f32()[..], &ends.into_f32()];
        found.extend(key_gradients(problem, x, wants, &segments, values, anchors));
    }
    found
}

/// Runs sweeps and keeps, at the end of each segment that they come to first, the state there: going forward the one before
/// the segment, in reverse the gradient of the one after it, as far as it comes from behind its decay.
fn run_in_segments(
    sweeps: &Sweeps,
    segments: &Segments,
    initial: Option<&View>,
    anchors: Option<Writer>,
    last: Option<Writer>,
) {
    let problem = sweeps.problem;
    let tasks = tasks(problem, problem.v_dim, rayon::current_num_threads());
    for_each(problem, &tasks, |task| {
        let algorithm = algorithm(problem, task.sequence);
        let mut state = load_state(initial, task, problem.k_dim);
        let mut sweep = sweeps.sweep(task);
        let Some(anchors) = anchors else {
            run(algorithm, &sweep, &mut state);
            last.inspect(|last| store_state(problem, last, task, &state));
            return;
        };
        let mut all: Vec<_> = segments.of(task.sequence).enumerate().collect();
        if sweep.reverse {
            all.reverse();
        }
        let early = sweep.reverse && problem.update == Update::LowRank;
        for (at, (i, segment)) in all.iter().enumerate() {
            if !early || at == 0 {
                store_transposed(problem, segments, &anchors, task, *i, &state);
            }
            sweep.tokens = segment.clone();
            if early && let Some((next, _)) = all.get(at + 1) {
                // Reads from before a token fades are not behind its decay: what they make of the gradient is left out.
                sweep.tokens.start += 1;
                run(algorithm, &sweep, &mut state);
                let faded = faded_with_value(&sweep, segment.start, &state);
                store_transposed(problem, segments, &anchors, task, *next, &faded);
                sweep.tokens = segment.start..segment.start + 1;
            }
            run(algorithm, &sweep, &mut state);
        }
        last.inspect(|last| store_state(problem, last, task, &state));
    });
}

/// The state after token `t` but for what it writes of what it reads.
fn faded_with_value(sweep: &DeltaSweep, t: usize, state: &[f32]) -> Vec<f32> {
    let mut step = Step::new(sweep);
    step.load(sweep, t);
    let mut value = vec![0.; sweep.cols];
    sweep.value.load(t, &mut value);
    let mut faded = state.to_vec();
    for (r, row) in faded.chunks_exact_mut(sweep.cols).enumerate() {
        let decay = step.decay_of(r);
        row.iter_mut().zip(&value).for_each(|(s, v)| *s = decay * *s + step.x1[r] * v);
    }
    faded
}

/// Keeps a state as `[V, K]`, as the products go over it.
fn store_transposed(
    problem: &Problem,
    segments: &Segments,
    anchors: &Writer,
    task: &Task,
    segment: usize,
    state: &[f32],
) {
    let (k, cols) = (problem.k_dim, task.cols.len());
    let mut row = vec![0.; k];
    for c in 0..cols {
        row.iter_mut().zip(state[c..].iter().step_by(cols)).for_each(|(x, s)| *x = *s);
        let at = segments.row(problem, task, segment) * problem.v_dim + (task.cols.start + c) * k;
        // SAFETY: tasks differ in sequence, head or columns, so no two cover the same elements.
        unsafe { anchors.store(at, &row) };
    }
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
    let scale = |row: usize, x: &mut [f32], sign: f32| {
        let mut by = [0.];
        beta.rows(row / heads / tokens, row % heads, 0).load(row / heads % tokens, &mut by);
        x.iter_mut().for_each(|x| *x *= sign * by[0]);
    };
    // Nothing was written where only the gradient of v is wanted.
    written.par_chunks_exact_mut(v).zip(of_written.par_chunks_exact(v)).enumerate().for_each(
        |(row, (written, of_written))| {
            let of_beta: f32 = written.iter().zip(of_written).map(|(x, d)| x * d).sum();
            // SAFETY: every row is written once.
            unsafe { dbeta_writer.store(row, &[of_beta]) };
            scale(row, written, 1.);
        },
    );
    of_written.par_chunks_exact_mut(v).enumerate().for_each(|(row, of_written)| {
        scale(row, of_written, 1.);
        // SAFETY: as above.
        unsafe { dv.store(row * v, of_written) };
        of_written.iter_mut().for_each(|x| *x = -*x);
    });
    dbeta
}

/// The gradients of all inputs that have a number for each channel of a key, and of gates.
fn key_gradients(
    problem: &Problem,
    x: &Inputs<View>,
    wants: &dyn Fn(Role) -> bool,
    segments: &Segments,
    [grad_out, written, of_written]: [View; 3],
    [starts, ends]: [&[f32]; 2],
) -> Vec<(Role, Buffer)> {
    let gate = x.g.filter(|_| wants(Role::G));
    let low_rank = x.a.zip(x.b);
    let len = problem.batch * problem.tokens * problem.v_heads * problem.k_dim;
    let buffer = |wanted| Buffer::zeros(DType::F32, if wanted || gate.is_some() { len } else { 0 });
    let wanted_reads = [wants(Role::Q), wants(if low_rank.is_some() { Role::A } else { Role::K })];
    let wanted_writes = [wants(Role::K), wants(Role::B)];
    let [mut dq, mut of_read] = wanted_reads.map(buffer);
    let mut of_k = buffer(wants(Role::K));
    let mut of_b = if low_rank.is_some() { buffer(wants(Role::B)) } else { Buffer::zeros(DType::F32, 0) };
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
    let at_ends_len = if gate.is_some() { segments.count() * problem.v_heads * problem.k_dim } else { 0 };
    let mut at_ends = Buffer::zeros(DType::F32, at_ends_len);
    let products = Products {
        problem,
        x,
        segments,
        starts,
        ends,
        reads: &reads,
        writes: &writes,
        wanted_reads: wanted_reads.map(|wanted| wanted || gate.is_some()),
        wanted_writes: wanted_writes.map(|wanted| wanted || gate.is_some()),
        at_ends: gate.map(|_| at_ends.writer()),
    };
    let tasks = tasks(problem, problem.k_dim, rayon::current_num_threads());
    for_each(problem, &tasks, |task| products.run(task));
    let mut found = vec![];
    if let Some(g) = gate {
        found.push((
            Role::G,
            gate_gradient(problem, &g, segments, (&reads, &writes), &mut at_ends, Ends::OfEverySegment),
        ));
    }
    let sum = |grad, x: View| sum_groups(problem, grad, x.dtype());
    found.push((Role::Q, sum(dq, x.q)));
    if let Some((a, b)) = low_rank {
        found.extend([(Role::A, sum(of_read, a)), (Role::B, sum(of_b, b)), (Role::K, sum(of_k, x.k))]);
    } else {
        let mut dk = of_k.into_f32();
        dk.iter_mut().zip(of_read.into_f32()).for_each(|(x, y)| *x += y);
        found.push((Role::K, sum(Buffer::F32(dk), x.k)));
    }
    found
}
