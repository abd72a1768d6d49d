//! Normalised linear attention: `o_t / (scale * q_t . z_t + eps)`, where `z_t` sums up the keys.
//!
//! `z` is a state with one column whose values are all 1, so the numerator and the normaliser are two problems for the
//! same kernels; the division and its gradient are left to Candle.

use candle_core::backend::BackendStorage;
use candle_core::op::Div;
use candle_core::{D, DType, Layout, Result, Shape, Storage, Tensor, bail};

use super::backward::{Grads, backward as solve_backward};
use super::forward::forward as solve_forward;
use super::memory::Buffer;
use super::sweep::Pass;
use crate::problem::{Inputs, Problem, Role};

const EPS: f64 = 1e-10;

/// The output and the final kv and z if they are asked for.
pub(super) fn forward(problem: &Problem, x: &Inputs<Tensor>) -> Result<Vec<Storage>> {
    let parts = Parts::new(problem, x)?;
    let pass = parts.numerator_pass()?;
    let (sums, kv) = solve_forward(&pass, &parts.numerator, DType::F32)?;
    let (z, last_z) = solve_forward(&parts.normalizer_pass()?, &parts.normalizer, DType::F32)?;
    let out = Shape::from(problem.shape(Role::V));
    let out = match (sums.into_storage(), z.into_storage()) {
        // A GPU refuses to launch Candle's operations on nothing.
        _ if out.elem_count() == 0 => Buffer::new(&pass.machine, problem.dtype, out)?.into_storage(),
        (Storage::Cpu(sums), Storage::Cpu(z)) => Storage::Cpu(divide(&sums, &z, &out, problem.dtype)?),
        (Storage::Cuda(sums), Storage::Cuda(z)) => Storage::Cuda(divide(&sums, &z, &out, problem.dtype)?),
        _ => bail!("{}: the results are on different devices", problem.name),
    };
    let states = kv.into_iter().chain(last_z).map(|x| x.into_storage());
    Ok(std::iter::once(out).chain(states).collect())
}

fn divide<S: BackendStorage>(sums: &S, z: &S, shape: &Shape, dtype: DType) -> Result<S> {
    let whole = Layout::contiguous(shape);
    let mut of_z = shape.dims().to_vec();
    of_z.pop();
    of_z.push(1);
    let of_z = Layout::contiguous(of_z);
    let quotient = sums.binary_impl::<Div>(&z.affine(&of_z, 1., EPS)?, &whole, &of_z.broadcast_as(shape)?)?;
    quotient.to_dtype(&whole, dtype)
}

/// The gradients of the inputs that are wanted, given those of o, kv and z.
pub(super) fn backward(
    problem: &Problem,
    x: &Inputs<Tensor>,
    [out, kv, z]: [Option<Tensor>; 3],
    wants: &dyn Fn(Role) -> bool,
) -> Result<Vec<(Role, Tensor)>> {
    let parts = Parts::new(problem, x)?;
    let numerator_pass = parts.numerator_pass()?;
    let normalizer_pass = parts.normalizer_pass()?;
    let (d_sums, d_z) = match out {
        Some(grad) if grad.elem_count() > 0 => {
            // With `o = n / z`: `dn = do / z` and `dz = -(dn . n) / z`.
            let sums = solve_forward(&numerator_pass, &parts.numerator, DType::F32)?.0.into_tensor();
            let z = solve_forward(&normalizer_pass, &parts.normalizer, DType::F32)?.0.into_tensor();
            let z = z.affine(1., EPS)?;
            let d_sums = grad.to_dtype(DType::F32)?.broadcast_div(&z)?;
            let d_z = ((&d_sums * sums)?.sum_keepdim(D::Minus1)?.neg()? / z)?;
            (Some(d_sums), Some(d_z))
        }
        _ => (None, None),
    };
    let z = z.map(|z| z.unsqueeze(D::Minus1)).transpose()?;
    let of_normalizer = |role| match role {
        Role::Kv => wants(Role::Z),
        Role::Q | Role::K => wants(role),
        _ => false,
    };
    let numerator = Grads { out: d_sums, kv };
    let numerator = solve_backward(&numerator_pass, &parts.numerator, &numerator, wants, DType::F32)?;
    let normalizer = Grads { out: d_z, kv: z };
    let normalizer =
        solve_backward(&normalizer_pass, &parts.normalizer, &normalizer, &of_normalizer, DType::F32)?;

    let mut found = Vec::new();
    for (role, grad) in normalizer {
        match role {
            Role::Kv => found.push((Role::Z, grad.squeeze(D::Minus1)?)),
            _ => found.push((role, grad)),
        }
    }
    for (role, grad) in numerator {
        let other = found.iter().position(|(r, _)| *r == role).map(|at| found.swap_remove(at).1);
        let grad = match other {
            Some(other) => (grad + other)?,
            None => grad,
        };
        let dtype = if role == Role::Kv { DType::F32 } else { problem.dtype };
        found.push((role, grad.to_dtype(dtype)?));
    }
    Ok(found)
}

/// The two problems.
struct Parts {
    numerator: Inputs<Tensor>,
    normalizer: Inputs<Tensor>,
    problems: [Problem; 2],
}

impl Parts {
    fn new(problem: &Problem, x: &Inputs<Tensor>) -> Result<Self> {
        let p = Problem { normalize: false, ..problem.clone() };
        let ones = Tensor::ones((1, 1, 1, 1), p.dtype, x.q.device())?;
        let ones = ones.broadcast_as((p.batch, p.tokens, p.v_heads, 1))?;
        let z = x.z.as_ref().map(|z| z.unsqueeze(D::Minus1)).transpose()?;
        Ok(Self {
            numerator: Inputs { z: None, ..x.clone() },
            normalizer: Inputs { v: ones, kv: z, z: None, ..x.clone() },
            problems: [p.clone(), Problem { v_dim: 1, ..p }],
        })
    }

    fn numerator_pass(&self) -> Result<Pass<'_>> {
        Pass::new(&self.problems[0], &self.numerator.q)
    }

    fn normalizer_pass(&self) -> Result<Pass<'_>> {
        Pass::new(&self.problems[1], &self.numerator.q)
    }
}
