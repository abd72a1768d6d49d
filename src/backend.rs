//! Solves a [`Problem`] on the device its tensors are on, and puts it in Candle's graph.

use candle_core::backend::BackendDevice;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, Device, Result, Shape, Storage, Tensor};

use crate::autograd::{self, Function};
use crate::cpu;
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
use crate::cuda;
use crate::options::{Output, State};
use crate::problem::{Inputs, Problem, Role};

/// Computes what `problem` asks for, differentiably.
pub(crate) fn solve(problem: Problem, inputs: Inputs<Tensor>) -> Result<Output> {
    let backend = Backend::of(inputs.q.device());
    let (roles, inputs): (Vec<_>, Vec<_>) = inputs.list().into_iter().unzip();
    let mut results = autograd::apply(Operator { problem, roles, backend }, &inputs)?.into_iter();
    let (out, kv, z) = (results.next(), results.next(), results.next());
    match out {
        Some(out) => Ok(Output { out, state: kv.map(|kv| State { kv, z }) }),
        None => candle_core::bail!("the operator has no result"),
    }
}

/// Keeps memory of a CUDA device that has been freed for the next tensor there, until the process ends.
///
/// Candle allocates from CUDA's memory pool, which by default gives all that is free back to the driver whenever the host
/// waits for the device, as once a step of training; to get it again takes as long as kernels do that use it. What other
/// processes can have of the device is less by what this one keeps. On any other device there is nothing to keep.
///
/// # Errors
///
/// If the driver refuses.
pub fn keep_freed_memory(device: &Device) -> Result<()> {
    match device {
        #[cfg(all(feature = "cuda", not(feature = "cuda-host")))]
        Device::Cuda(device) => cuda::keep_freed_memory(device),
        _ => Ok(()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backend {
    /// Also for a device without kernels of ours: tensors are copied to the CPU and back.
    Cpu,
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    Cuda,
}

impl Backend {
    fn of(device: &Device) -> Self {
        match device {
            #[cfg(any(feature = "cuda", feature = "cuda-host"))]
            device if cuda::takes(device) => Self::Cuda,
            _ => Self::Cpu,
        }
    }
}

struct Operator {
    problem: Problem,
    /// What each input is.
    roles: Vec<Role>,
    /// Backward is solved where forward was.
    backend: Backend,
}

impl Operator {
    fn forward_on_cpu(&self, inputs: &[Tensor]) -> Result<Vec<Storage>> {
        let results = cpu::forward(&self.problem, &self.on_cpu(inputs)?)?;
        results.into_iter().map(|s| to_device(s, inputs[0].device())).collect()
    }

    fn backward_on_cpu(
        &self,
        inputs: &[Tensor],
        grads: &[Option<Tensor>],
        wants: &dyn Fn(Role) -> bool,
    ) -> Result<Vec<(Role, Tensor)>> {
        let cpu = |x: &Tensor| x.to_device(&Device::Cpu);
        let grads = grads.iter().map(|g| g.as_ref().map(cpu).transpose()).collect::<Result<Vec<_>>>()?;
        let found = cpu::backward(&self.problem, &self.on_cpu(inputs)?, &grads, wants)?;
        let tensor = |(role, storage)| {
            let storage = to_device(storage, inputs[0].device())?;
            Ok((role, Tensor::from_storage(storage, self.problem.shape(role), BackpropOp::none(), false)))
        };
        found.into_iter().filter(|(role, _)| wants(*role)).map(tensor).collect()
    }

    fn on_cpu(&self, inputs: &[Tensor]) -> Result<Inputs<Tensor>> {
        let inputs: Vec<_> = inputs.iter().map(|x| x.to_device(&Device::Cpu)).collect::<Result<_>>()?;
        Inputs::from_list(&self.roles, &inputs)
    }
}

impl Function for Operator {
    fn name(&self) -> &'static str {
        self.problem.name
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<(Storage, Shape)>> {
        let results = match self.backend {
            Backend::Cpu => self.forward_on_cpu(inputs)?,
            #[cfg(any(feature = "cuda", feature = "cuda-host"))]
            Backend::Cuda => cuda::forward(&self.problem, &Inputs::from_list(&self.roles, inputs)?)?,
        };
        let shapes = self.problem.outputs().iter().map(|&role| Shape::from(self.problem.shape(role)));
        Ok(results.into_iter().zip(shapes).collect())
    }

    fn backward(
        &self,
        inputs: &[Tensor],
        grads: &[Option<Tensor>],
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let wants = |role| self.roles.iter().zip(wanted).any(|(r, w)| *r == role && *w);
        let mut found = match self.backend {
            Backend::Cpu => self.backward_on_cpu(inputs, grads, &wants)?,
            #[cfg(any(feature = "cuda", feature = "cuda-host"))]
            Backend::Cuda => {
                cuda::backward(&self.problem, &Inputs::from_list(&self.roles, inputs)?, grads, &wants)?
            }
        };
        let take = |(&role, &wanted): (&Role, &bool)| {
            let at = found.iter().position(|(r, _)| *r == role).filter(|_| wanted)?;
            Some(found.swap_remove(at).1)
        };
        Ok(self.roles.iter().zip(wanted).map(take).collect())
    }
}

fn to_device(storage: CpuStorage, device: &Device) -> Result<Storage> {
    Ok(match device {
        Device::Cpu => Storage::Cpu(storage),
        Device::Cuda(device) => Storage::Cuda(device.storage_from_cpu_storage_owned(storage)?),
        Device::Metal(device) => Storage::Metal(device.storage_from_cpu_storage_owned(storage)?),
    })
}
