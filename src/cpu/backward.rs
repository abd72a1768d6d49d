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
//! The gradient of the log decay needs no state of its own: adding up the decays before t, an entry of S_t or of o_t
//! grows with every logarithm up to its token and falls with every one up to the key's, hence
//!
//! ```text
//! dg_t = sum_{s >= t} (q_s * dq_s - k_s * dk_s) + sum_v S_T * dS_T
//! ```
//!
//! (equation 6 in the appendix of <https://arxiv.org/abs/2312.06635>). A token's term with itself is in both products and
//! cancels. Under strong decay it is all there is, and what would remain of the difference is rounding, so the sweeps
//! leave it out and it is added to dq and dk afterwards.

use candle_core::DType;
use rayon::prelude::*;

use super::Grads;
use super::forward::{StateRows, gate, load_state};
use super::gate_gradient::gate_gradient;
use super::plan::{Task, algorithm, for_each, tasks};
use super::sweep::{Out, Sweep, run};
use super::view::{Buffer, View, Writer};
use crate::problem::{Inputs, Problem, Role};

/// The three sweeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    Q,
    K,
    V,
}

pub(super) fn backward(
    problem: &Problem,
    x: &Inputs<View>,
    grads: &Grads,
    wants: &dyn Fn(Role) -> bool,
) -> Vec<(Role, Buffer)> {
    let gate = wants(Role::G) && x.g.is_some();
    let groups = problem.v_heads / problem.k_heads;
    let key_dtype = if gate || groups > 1 {
        DType::F32
    } else {
        problem.dtype
    };
    let rows = problem.batch * problem.tokens * problem.v_heads;
    let key_rows =
        |wanted: bool| Buffer::zeros(key_dtype, if wanted { rows * problem.k_dim } else { 0 });
    let (want_q, want_k) = (wants(Role::Q) || gate, wants(Role::K) || gate);
    let want_v = wants(Role::V) || wants(Role::Kv);
    let (mut dq, mut dk) = (key_rows(want_q), key_rows(want_k));
    let mut dv = Buffer::zeros(problem.dtype, if want_v { rows * problem.v_dim } else { 0 });
    let states = problem.sequences.len() * problem.v_heads;
    let mut dkv = Buffer::zeros(
        DType::F32,
        if wants(Role::Kv) {
            states * problem.k_dim * problem.v_dim
        } else {
            0
        },
    );
    // sum_v S_T * dS_T
    let mut tail = Buffer::zeros(DType::F32, if gate { states * problem.k_dim } else { 0 });

    let sweeps = Sweeps {
        problem,
        x,
        grads,
        with_own: !gate,
        dq: dq.writer(),
        dk: dk.writer(),
        dv: dv.writer(),
        dkv: wants(Role::Kv).then(|| dkv.writer()),
        tail: gate.then(|| tail.writer()),
    };
    let all = [(Of::Q, want_q), (Of::K, want_k), (Of::V, want_v)];
    let threads = rayon::current_num_threads();
    let jobs: Vec<(Of, Task)> = all
        .into_iter()
        .filter(|(_, wanted)| *wanted)
        .flat_map(|(of, _)| {
            let cols = if of == Of::V {
                problem.v_dim
            } else {
                problem.k_dim
            };
            tasks(problem, cols, threads)
                .into_iter()
                .map(move |task| (of, task))
        })
        .collect();
    for_each(problem, &jobs, |(of, task)| sweeps.run(*of, task));

    let mut found = vec![(Role::V, dv), (Role::Kv, dkv)];
    if gate {
        found.push((
            Role::G,
            gate_gradient(problem, x, grads, (&mut dq, &mut dk), &mut tail),
        ));
    }
    found.push((Role::Q, sum_groups(problem, dq)));
    found.push((Role::K, sum_groups(problem, dk)));
    found
}

struct Sweeps<'a> {
    problem: &'a Problem,
    x: &'a Inputs<View<'a>>,
    grads: &'a Grads<'a>,
    /// Whether dq and dk have a token's term with itself.
    with_own: bool,
    dq: Writer<'a>,
    dk: Writer<'a>,
    dv: Writer<'a>,
    dkv: Option<Writer<'a>>,
    tail: Option<Writer<'a>>,
}

impl Sweeps<'_> {
    fn run(&self, of: Of, task: &Task) {
        let Self { problem, x, .. } = self;
        let (b, h, kh) = (task.sequence.batch, task.head, problem.key_head(task.head));
        let cols = task.cols.len();
        let from = task.cols.start;
        let grad_out = self.grads.out.unwrap_or(View::constant(&[0.]));
        let (read, write, value, rows) = match of {
            Of::Q => (
                grad_out.rows(b, h, 0),
                x.v.rows(b, h, 0),
                x.k.rows(b, kh, from),
                problem.v_dim,
            ),
            Of::K => (
                x.v.rows(b, h, 0),
                grad_out.rows(b, h, 0),
                x.q.rows(b, kh, from),
                problem.v_dim,
            ),
            Of::V => (
                x.k.rows(b, kh, 0),
                x.q.rows(b, kh, 0),
                grad_out.rows(b, h, from),
                problem.k_dim,
            ),
        };
        let (writer, dim) = match of {
            Of::Q => (self.dq, problem.k_dim),
            Of::K => (self.dk, problem.k_dim),
            Of::V => (self.dv, problem.v_dim),
        };
        let offset = row_offset(problem, b, 0, h, dim) + from;
        let orientation = if of == Of::V {
            StateRows::Keys
        } else {
            StateRows::Values
        };
        let sweep = Sweep {
            rows,
            cols,
            tokens: task.sequence.tokens.clone(),
            reverse: of != Of::Q,
            inclusive: of == Of::V || self.with_own,
            read,
            read_scale: if of == Of::Q { problem.scale } else { 1. },
            write,
            write_scale: if of == Of::Q { 1. } else { problem.scale },
            value,
            gate: gate(problem, x, task, orientation),
            // SAFETY: sweeps write to buffers of their own, and the tasks of one differ in sequence, head or columns.
            out: unsafe { Out::new(writer, offset, problem.v_heads * dim) },
        };
        let initial = match of {
            Of::Q => x.kv.map(View::transposed),
            Of::K => self.grads.kv.map(View::transposed),
            Of::V => self.grads.kv,
        };
        let mut state = load_state(initial.as_ref(), task, rows);
        run(algorithm(problem), &sweep, &mut state);
        match of {
            Of::Q => self.store_tail(task, &state),
            Of::K => {}
            Of::V => self.store_initial_state(task, &state),
        }
    }

    /// The final state's part in the gradient of every decay before it.
    fn store_tail(&self, task: &Task, last: &[f32]) {
        let (Some(tail), Some(grad)) = (self.tail, self.grads.kv) else {
            return;
        };
        let grad = load_state(Some(&grad.transposed()), task, self.problem.v_dim);
        let mut sum = vec![0.; task.cols.len()];
        for (s, d) in last
            .chunks_exact(sum.len())
            .zip(grad.chunks_exact(sum.len()))
        {
            sum.iter_mut()
                .zip(s)
                .zip(d)
                .for_each(|((sum, s), d)| *sum += s * d);
        }
        let at = (task.n * self.problem.v_heads + task.head) * self.problem.k_dim + task.cols.start;
        // SAFETY: tasks differ in sequence, head or columns, so no two cover the same elements.
        unsafe { tail.store(at, &sum) };
    }

    fn store_initial_state(&self, task: &Task, grad: &[f32]) {
        let Some(dkv) = self.dkv else { return };
        let (k, v) = (self.problem.k_dim, self.problem.v_dim);
        for (r, row) in grad.chunks_exact(task.cols.len()).enumerate() {
            let at = ((task.n * self.problem.v_heads + task.head) * k + r) * v + task.cols.start;
            // SAFETY: as for the tail.
            unsafe { dkv.store(at, row) };
        }
    }
}

/// Where the row of a token and value head begins in `[B, T, HV, dim]`.
pub(super) fn row_offset(
    problem: &Problem,
    batch: usize,
    token: usize,
    head: usize,
    dim: usize,
) -> usize {
    ((batch * problem.tokens + token) * problem.v_heads + head) * dim
}

/// Adds up, in f32, the gradients of a key head over the value heads that read it: `[B, T, HV, K]` to `[B, T, H, K]`.
fn sum_groups(problem: &Problem, grad: Buffer) -> Buffer {
    let Buffer::F32(grad) = grad else { return grad };
    let (k, groups) = (problem.k_dim, problem.v_heads / problem.k_heads);
    if groups == 1 && problem.dtype == DType::F32 {
        return Buffer::F32(grad);
    }
    let mut sums = Buffer::zeros(problem.dtype, grad.len() / groups);
    let writer = sums.writer();
    grad.par_chunks_exact(groups * k)
        .enumerate()
        .for_each(|(row, grads)| {
            let mut sum = vec![0.; k];
            for grad in grads.chunks_exact(k) {
                sum.iter_mut().zip(grad).for_each(|(s, g)| *s += g);
            }
            // SAFETY: every row is written once.
            unsafe { writer.store(row * k, &sum) };
        });
    sums
}
