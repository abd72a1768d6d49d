//! The CUDA backend: [`forward`](fn@forward) and [`backward`](fn@backward) describe a problem as sweeps, for which the
//! kernels in `cuda/` are queued on the stream of Candle's device; [`layers`] does the same for what layers do around an
//! operator. Nothing here waits for the device.

mod backward;
mod delta;
mod ffi;
mod forward;
pub(crate) mod layers;
#[cfg_attr(feature = "cuda-host", path = "host.rs")]
#[cfg_attr(not(feature = "cuda-host"), path = "gpu.rs")]
mod machine;
mod memory;
mod normalize;
mod route;
mod sweep;

use candle_core::{Device, Result, Storage, Tensor};

use crate::problem::{Inputs, Problem, Role, Update};
#[cfg(feature = "cuda-host")]
pub use machine::cuda_host;
#[cfg(not(feature = "cuda-host"))]
pub(crate) use machine::keep_freed_memory;
use sweep::Pass;

/// Whether the kernels are for tensors on `device`.
pub(crate) fn takes(device: &Device) -> bool {
    #[cfg(feature = "cuda-host")]
    return device.is_cpu() && machine::on();
    #[cfg(not(feature = "cuda-host"))]
    device.is_cuda()
}

/// The results of `problem`, in the order of [`Problem::outputs`].
pub(crate) fn forward(problem: &Problem, inputs: &Inputs<Tensor>) -> Result<Vec<Storage>> {
    if problem.normalize {
        return normalize::forward(problem, inputs);
    }
    let pass = Pass::new(problem, &inputs.q)?;
    let (out, states) = match problem.update {
        Update::Additive => forward::forward(&pass, inputs, problem.dtype)?,
        Update::Delta | Update::LowRank => delta::forward(&pass, inputs)?,
    };
    Ok(std::iter::once(out).chain(states).map(|x| x.into_storage()).collect())
}

/// The gradients of the inputs that are wanted, and perhaps of others, from those of the results.
pub(crate) fn backward(
    problem: &Problem,
    inputs: &Inputs<Tensor>,
    grads: &[Option<Tensor>],
    wants: &dyn Fn(Role) -> bool,
) -> Result<Vec<(Role, Tensor)>> {
    let grad = |i: usize| grads.get(i).cloned().flatten();
    let [out, kv, z] = [grad(0), grad(1), grad(2)];
    if problem.normalize {
        return normalize::backward(problem, inputs, [out, kv, z], wants);
    }
    let pass = Pass::new(problem, &inputs.q)?;
    let grads = backward::Grads { out, kv };
    match problem.update {
        Update::Additive => backward::backward(&pass, inputs, &grads, wants, problem.dtype),
        Update::Delta | Update::LowRank => delta::backward(&pass, inputs, &grads, wants),
    }
}
