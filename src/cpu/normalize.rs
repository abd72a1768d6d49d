//! Normalised linear attention: `o_t / (scale * q_t . z_t + eps)`, where `z_t` sums up the keys.
//!
//! `z` is a state with one column whose values are all 1. So the normaliser is one more column of v and of the state, and
//! what is left to do here is the division and its gradient.

use candle_core::DType;
use rayon::prelude::*;

use super::backward::backward as solve_backward;
use super::forward::forward as solve_forward;
use super::view::{Buffer, View};
use super::{Grads, Role};
use crate::problem::{Inputs, Problem};

const EPS: f32 = 1e-10;

/// The output, in the problem's dtype, and the final kv and z if they are asked for.
pub(super) fn forward(problem: &Problem, x: &Inputs<View>) -> Vec<Buffer> {
    let wide = Wide::new(problem);
    let (v, kv) = (wide.values(x), x.kv.map(|kv| wide.states(Some(&kv), x.z.as_ref())));
    let mut solved = solve_forward(&wide.problem, &wide.inputs(x, &v, kv.as_deref())).into_iter();
    let mut out = Buffer::zeros(problem.dtype, v.len() / (problem.v_dim + 1) * problem.v_dim);
    let writer = out.writer();
    if let Some(Buffer::F32(mut sums)) = solved.next() {
        sums.par_chunks_exact_mut(problem.v_dim + 1).enumerate().for_each(|(i, row)| {
            let (row, z) = row.split_at_mut(problem.v_dim);
            let z = z[0] + EPS;
            row.iter_mut().for_each(|x| *x /= z);
            // SAFETY: every row is written once.
            unsafe { writer.store(i * problem.v_dim, row) };
        });
    }
    let mut results = vec![out];
    if let Some(Buffer::F32(states)) = solved.next() {
        let (kv, z) = wide.split(&states);
        results.extend([Buffer::F32(kv), Buffer::F32(z)]);
    }
    results
}

/// The gradients.
pub(super) fn backward(
    problem: &Problem,
    x: &Inputs<View>,
    grads: &Grads,
    wants: &dyn Fn(Role) -> bool,
) -> Vec<(Role, Buffer)> {
    let wide = Wide::new(problem);
    let (v, kv) = (wide.values(x), x.kv.map(|kv| wide.states(Some(&kv), x.z.as_ref())));
    let inputs = wide.inputs(x, &v, kv.as_deref());
    let grad_out = grads.out.map(|grad| wide.grad_out(&inputs, &grad));
    let has_state_grad = grads.kv.is_some() || grads.z.is_some();
    let grad_kv = has_state_grad.then(|| wide.states(grads.kv.as_ref(), grads.z.as_ref()));
    let wide_grads = Grads {
        out: grad_out.as_ref().map(|x| View::of_slice(x, wide.value_shape())),
        kv: grad_kv.as_ref().map(|x| wide.state_view(x)),
        z: None,
    };
    let wants_wide = |role| wants(role) || (role == Role::Kv && wants(Role::Z));
    let found = solve_backward(&wide.problem, &inputs, &wide_grads, &wants_wide);
    let mut split = Vec::with_capacity(found.len() + 1);
    for (role, grad) in found {
        match (role, grad) {
            (Role::V, Buffer::F32(dv)) => {
                split.push((Role::V, Buffer::F32(wide.split(&dv).0).cast(problem.dtype)));
            }
            (Role::Kv, Buffer::F32(states)) => {
                let (kv, z) = wide.split(&states);
                split.extend([(Role::Kv, Buffer::F32(kv)), (Role::Z, Buffer::F32(z))]);
            }
            (role, grad) => split.push((role, grad.cast(problem.dtype))),
        }
    }
    split
}

/// The problem with the normaliser as one more column.
struct Wide<'a> {
    narrow: &'a Problem,
    problem: Problem,
}

impl<'a> Wide<'a> {
    fn new(narrow: &'a Problem) -> Self {
        let problem =
            Problem { normalize: false, v_dim: narrow.v_dim + 1, dtype: DType::F32, ..narrow.clone() };
        Self { narrow, problem }
    }

    fn value_shape(&self) -> [usize; 4] {
        let p = &self.problem;
        [p.batch, p.tokens, p.v_heads, p.v_dim]
    }

    fn inputs<'x>(&self, x: &Inputs<View<'x>>, v: &'x [f32], kv: Option<&'x [f32]>) -> Inputs<View<'x>> {
        let v = View::of_slice(v, self.value_shape());
        Inputs { v, kv: kv.map(|kv| self.state_view(kv)), z: None, ..x.clone() }
    }

    fn state_view<'x>(&self, states: &'x [f32]) -> View<'x> {
        let p = &self.problem;
        View::of_states(states, [p.v_heads, p.k_dim, p.v_dim])
    }

    /// Fills `[B, T, HV, V + 1]` a row at a time.
    fn rows(&self, fill: impl Fn(usize, usize, usize, &mut [f32]) + Sync) -> Vec<f32> {
        let [b, t, h, d] = self.value_shape();
        let mut rows = vec![0.; b * t * h * d];
        rows.par_chunks_exact_mut(d)
            .enumerate()
            .for_each(|(i, row)| fill(i / (t * h), i / h % t, i % h, row));
        rows
    }

    /// v and a 1.
    fn values(&self, x: &Inputs<View>) -> Vec<f32> {
        self.rows(|b, t, h, row| {
            x.v.rows(b, h, 0).load(t, &mut row[..self.narrow.v_dim]);
            row[self.narrow.v_dim] = 1.;
        })
    }

    /// With `o = n / z`: `dn = do / z` and `dz = -(do . n) / z^2`. n and z are computed again: an output in 16 bits
    /// would round the gradient of z, which is f32.
    fn grad_out(&self, inputs: &Inputs<View>, grad: &View) -> Vec<f32> {
        let problem = Problem { final_state: false, ..self.problem.clone() };
        let Some(Buffer::F32(mut sums)) = solve_forward(&problem, inputs).into_iter().next() else {
            return vec![];
        };
        let (tokens, heads) = (problem.tokens, problem.v_heads);
        sums.par_chunks_exact_mut(problem.v_dim).enumerate().for_each(|(i, row)| {
            let (row, last) = row.split_at_mut(self.narrow.v_dim);
            let z = last[0] + EPS;
            let mut d = vec![0.; row.len()];
            grad.rows(i / (tokens * heads), i % heads, 0).load(i / heads % tokens, &mut d);
            let dot: f32 = row.iter().zip(&d).map(|(n, d)| n / z * d).sum();
            last[0] = -dot / z;
            row.iter_mut().zip(&d).for_each(|(y, d)| *y = d / z);
        });
        sums
    }

    /// kv with z as its last column; what is missing is 0.
    fn states(&self, kv: Option<&View>, z: Option<&View>) -> Vec<f32> {
        let (p, v) = (&self.problem, self.narrow.v_dim);
        let mut states = vec![0.; p.sequences.len() * p.v_heads * p.k_dim * p.v_dim];
        for (i, row) in states.chunks_exact_mut(p.v_dim).enumerate() {
            let (n, h, k) = (i / (p.v_heads * p.k_dim), i / p.k_dim % p.v_heads, i % p.k_dim);
            let (row, last) = row.split_at_mut(v);
            kv.inspect(|kv| kv.rows(n, h, 0).load(k, row));
            z.inspect(|z| z.rows(n, h, 0).load(k, last));
        }
        states
    }

    fn split(&self, states: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let rows = || states.chunks_exact(self.problem.v_dim);
        let v = self.narrow.v_dim;
        (rows().flat_map(|row| &row[..v]).copied().collect(), rows().map(|row| row[v]).collect())
    }
}
