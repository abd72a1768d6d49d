//! Solves a [`Problem`] on the device its tensors are on, and puts it in Candle's graph.

use candle_core::backend::BackendDevice;
use candle_core::{CpuStorage, Device, Result, Shape, Storage, Tensor};

use crate::autograd::{self, Function};
use crate::cpu;
use crate::options::{Output, State};
use crate::problem::{Inputs, Problem, Role};

/// Computes what `problem` asks for, differentiably.
pub(crate) fn solve(problem: Problem, inputs: Inputs<Tensor>) -> Result<Output> {
    let (roles, inputs): (Vec<_>, Vec<_>) = inputs.list().into_iter().unzip();
    let mut results = autograd::apply(Operator { problem, roles }, &inputs)?.into_iter();
    let (out, kv, z) = (results.next(), results.next(), results.next());
    match out {
        Some(out) => Ok(Output { out, state: kv.map(|kv| State { kv, z }) }),
        None => candle_core::bail!("the operator has no result"),
    }
}

struct Operator {
    problem: Problem,
    /// What each input is.
    roles: Vec<Role>,
}

impl Operator {
    /// The inputs where the CPU can read them. A device without kernels of ours computes there: its tensors are copied.
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
        let results = cpu::forward(&self.problem, &self.on_cpu(inputs)?)?;
        let shapes = self.problem.outputs().iter().map(|&role| Shape::from(self.problem.shape(role)));
        results
            .into_iter()
            .zip(shapes)
            .map(|(s, shape)| Ok((to_device(s, inputs[0].device())?, shape)))
            .collect()
    }

    fn backward(
        &self,
        inputs: &[Tensor],
        grads: &[Option<Tensor>],
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let cpu = |x: &Tensor| x.to_device(&Device::Cpu);
        let grads = grads.iter().map(|g| g.as_ref().map(cpu).transpose()).collect::<Result<Vec<_>>>()?;
        let wants = |role| self.roles.iter().zip(wanted).any(|(r, w)| *r == role && *w);
        let mut found = cpu::backward(&self.problem, &self.on_cpu(inputs)?, &grads, &wants)?;
        let device = inputs[0].device();
        let take = |(&role, &wanted): (&Role, &bool)| {
            let at = found.iter().position(|(r, _)| *r == role).filter(|_| wanted);
            let Some(at) = at else { return Ok(None) };
            let storage = to_device(found.swap_remove(at).1, device)?;
            let op = candle_core::op::BackpropOp::none();
            Ok(Some(Tensor::from_storage(storage, self.problem.shape(role), op, false)))
        };
        self.roles.iter().zip(wanted).map(take).collect()
    }
}

fn to_device(storage: CpuStorage, device: &Device) -> Result<Storage> {
    Ok(match device {
        Device::Cpu => Storage::Cpu(storage),
        Device::Cuda(device) => Storage::Cuda(device.storage_from_cpu_storage_owned(storage)?),
        Device::Metal(device) => Storage::Metal(device.storage_from_cpu_storage_owned(storage)?),
    })
}
