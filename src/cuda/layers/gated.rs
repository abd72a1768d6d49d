//! A number and its gate, see `cla_gated` in `cuda/layers.h`.

use candle_core::{Result, Shape, Storage, Tensor, bail};

use super::rows::SharedRows;
use super::{ffi, only_gradient, only_result, pointwise_team};
use crate::autograd::{self, Function};
use crate::cuda::machine::Machine;
use crate::cuda::memory::{Addresses, Buffer, Held, NO_TENSOR};
use crate::nn::fused::Gate;

/// `xs * f(gate)` for tensors of one shape and dtype, which the result has too.
pub(crate) fn gated(xs: &Tensor, (gate, kind): (&Tensor, Gate)) -> Result<Tensor> {
    only_result(NAME, autograd::apply(Op(kind), &[xs.clone(), gate.clone()])?)
}

const NAME: &str = "gated";

impl From<Gate> for ffi::Gate {
    fn from(gate: Gate) -> Self {
        match gate {
            Gate::Silu => Self::Silu,
            Gate::Sigmoid => Self::Sigmoid,
        }
    }
}

struct Op(Gate);

struct Gradients<'a> {
    grad_out: &'a Tensor,
    dx: &'a mut Buffer,
    dgate: &'a mut Buffer,
}

enum Pass<'a> {
    Forward { out: &'a mut Buffer },
    Backward(Gradients<'a>),
}

impl Op {
    fn run(&self, machine: &Machine, [x, gate]: [&Tensor; 2], pass: Pass) -> Result<()> {
        let width = x.dims().last().copied().unwrap_or(1);
        let (out, grad_out, dx, dgate) = match pass {
            Pass::Forward { out } => (Some(out), None, None, None),
            Pass::Backward(Gradients { grad_out, dx, dgate }) => {
                (None, Some(grad_out), Some(dx), Some(dgate))
            }
        };
        let backward = grad_out.is_some();
        let read: Vec<&Tensor> = [Some(x), Some(gate), grad_out].into_iter().flatten().collect();
        let shared = SharedRows::new(&read, width)?;
        let rows = shared.rows();
        if rows == 0 || width == 0 {
            return Ok(());
        }
        let team = pointwise_team(width, 16 / x.dtype().size_in_bytes());
        let held: Vec<Held> = shared.tensors.iter().map(Held::new).collect();
        let mut at = Addresses::new(machine);
        let mut found = [NO_TENSOR; 3];
        for (i, x) in held.iter().enumerate() {
            found[i] = at.strided(Some(x), shared.strides(i))?;
        }
        let [x, gate, grad_out] = found;
        let [_, tokens, heads] = shared.sizes;
        let call = ffi::Gated {
            x,
            gate,
            out: at.out_strided(out, shared.contiguous())?,
            grad_out,
            dx: at.out_strided(dx, shared.contiguous())?,
            dgate: at.out_strided(dgate, shared.contiguous())?,
            gate_kind: self.0.into(),
            width: width as i32,
            team_bits: team.ilog2() as i32,
            rows: rows as i64,
            tokens: tokens as i64,
            heads: heads as i64,
        };
        // SAFETY: the addresses, strides and sizes are those of live tensors with the same rows, as `gated`'s caller checks and
        // `SharedRows` sees to; all are held until the kernel is queued, and the stream orders whatever comes after.
        let code = unsafe {
            match backward {
                true => ffi::cla_gated_backward(&call, machine.stream()),
                false => ffi::cla_gated_forward(&call, machine.stream()),
            }
        };
        if code != 0 {
            bail!("{NAME}: the kernel could not be launched, CUDA error {code} ({rows} rows of {width})");
        }
        Ok(())
    }
}

impl Function for Op {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<(Storage, Shape)>> {
        let [x, gate] = [&inputs[0], &inputs[1]];
        let machine = Machine::of(x.device())?;
        let mut out = Buffer::new(&machine, x.dtype(), x.shape())?;
        self.run(&machine, [x, gate], Pass::Forward { out: &mut out })?;
        Ok(vec![out.into_result()])
    }

    fn backward(
        &self,
        inputs: &[Tensor],
        grads: &[Option<Tensor>],
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let [x, gate] = [&inputs[0], &inputs[1]];
        let machine = Machine::of(x.device())?;
        let new = || Buffer::new(&machine, x.dtype(), x.shape());
        let (mut dx, mut dgate) = (new()?, new()?);
        let of = Gradients { grad_out: only_gradient(NAME, grads)?, dx: &mut dx, dgate: &mut dgate };
        self.run(&machine, [x, gate], Pass::Backward(of))?;
        let found = [dx, dgate].into_iter().zip(wanted);
        Ok(found.map(|(grad, wanted)| wanted.then(|| grad.into_tensor())).collect())
    }
}
