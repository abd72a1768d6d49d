//! The CPU backend: [`forward`](fn@forward) and [`backward`](fn@backward) describe a problem as sweeps, which run in
//! parallel over sequences, heads and slices of columns.

mod backward;
mod chunk;
mod delta;
pub(crate) mod exp;
mod footprint;
mod forward;
mod fused;
mod gate_gradient;
mod normalize;
mod plan;
mod recurrent;
mod sweep;
mod view;

use candle_core::{CpuStorage, Layout, Result, Storage, StorageRef, Tensor, bail};

use crate::problem::{Decay, Inputs, Problem, Role, Update};
use view::{Buffer, View};

/// The results of `problem`, in the order of [`Problem::outputs`].
pub(crate) fn forward(problem: &Problem, inputs: &Inputs<Tensor>) -> Result<Vec<CpuStorage>> {
    footprint::check(problem, footprint::forward(problem))?;
    let held = inputs.map(|x| Ok(Held(x.storage_and_layout())))?;
    let views = views(problem, &held)?;
    let results = match (problem.update, problem.normalize) {
        (Update::Additive, true) => normalize::forward(problem, &views),
        (Update::Additive, false) => forward::forward(problem, &views),
        (Update::Delta | Update::LowRank, _) => delta::forward(problem, &views),
    };
    Ok(results.into_iter().map(Buffer::into_storage).collect())
}

/// The gradients of the inputs that are wanted, and perhaps of others.
pub(crate) fn backward(
    problem: &Problem,
    inputs: &Inputs<Tensor>,
    grads: &[Option<Tensor>],
    wants: &dyn Fn(Role) -> bool,
) -> Result<Vec<(Role, CpuStorage)>> {
    footprint::check(problem, footprint::backward(problem, wants))?;
    let held = inputs.map(|x| Ok(Held(x.storage_and_layout())))?;
    let inputs = views(problem, &held)?;
    let roles = problem.outputs().iter().zip(grads);
    let held: Vec<_> =
        roles.filter_map(|(role, x)| Some((*role, Held(x.as_ref()?.storage_and_layout())))).collect();
    let mut grads = Grads { out: None, kv: None, z: None };
    for (role, x) in &held {
        let view = Some(x.view(*role, problem)?);
        match role {
            Role::Kv => grads.kv = view,
            Role::Z => grads.z = view,
            _ => grads.out = view,
        }
    }
    let found = match (problem.update, problem.normalize) {
        (Update::Additive, true) => normalize::backward(problem, &inputs, &grads, wants),
        (Update::Additive, false) => backward::backward(problem, &inputs, &grads, wants),
        (Update::Delta | Update::LowRank, _) => delta::backward(problem, &inputs, &grads, wants),
    };
    Ok(found.into_iter().map(|(role, x)| (role, x.into_storage())).collect())
}

/// The gradients of the results, where there are any.
struct Grads<'a> {
    out: Option<View<'a>>,
    kv: Option<View<'a>>,
    z: Option<View<'a>>,
}

/// A tensor, open for reading.
struct Held<'a>((StorageRef<'a>, &'a Layout));

impl Held<'_> {
    fn view(&self, role: Role, problem: &Problem) -> Result<View<'_>> {
        // Which of [B, T, H, D] each dimension is. A state is read a key row at a time: N is its B, K its T.
        let axes: &[usize] = match (role, problem.decay) {
            (Role::Kv, _) => &[0, 2, 1, 3],
            (Role::Z, _) => &[0, 2, 1],
            (Role::G, Decay::Head) => &[2],
            (Role::Beta, _) | (Role::G, Decay::Scalar) => &[0, 1, 2],
            _ => &[0, 1, 2, 3],
        };
        match &*self.0.0 {
            Storage::Cpu(storage) => View::new(storage, self.0.1, axes),
            _ => bail!("{}: {role:?} is not on the CPU", problem.name),
        }
    }
}

fn views<'a>(problem: &Problem, held: &'a Inputs<Held<'a>>) -> Result<Inputs<View<'a>>> {
    Ok(Inputs {
        q: held.q.view(Role::Q, problem)?,
        k: held.k.view(Role::K, problem)?,
        v: held.v.view(Role::V, problem)?,
        g: held.g.as_ref().map(|x| x.view(Role::G, problem)).transpose()?,
        beta: held.beta.as_ref().map(|x| x.view(Role::Beta, problem)).transpose()?,
        a: held.a.as_ref().map(|x| x.view(Role::A, problem)).transpose()?,
        b: held.b.as_ref().map(|x| x.view(Role::B, problem)).transpose()?,
        kv: held.kv.as_ref().map(|x| x.view(Role::Kv, problem)).transpose()?,
        z: held.z.as_ref().map(|x| x.view(Role::Z, problem)).transpose()?,
    })
}
