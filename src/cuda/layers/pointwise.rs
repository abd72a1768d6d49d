//! Functions of one number, see `cla_pointwise` in `cuda/layers.h`.

use candle_core::{DType, Result, Shape, Storage, Tensor, bail};

use super::rows::SharedRows;
use super::{ffi, numbers, only_gradient, only_result, pointwise_team, sums};
use crate::autograd::{self, Function};
use crate::cuda::machine::Machine;
use crate::cuda::memory::{Addresses, Buffer, Held, NO_TENSOR};
use crate::nn::fused::Pointwise;

/// Blocks for each multiprocessor, where there are rows for so many: each loads what its columns have in common.
const BLOCKS: usize = 8;

/// `factor * rate * f(xs + bias)` in f32, in the shape of `xs: [.., width]`. `bias` is `[width]`; the rate is `-exp(log_rate)` for a
/// `log_rate: [n]` where n divides the width, or 1 without one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Application<'a> {
    pub f: Pointwise,
    pub factor: f32,
    pub xs: &'a Tensor,
    pub bias: Option<&'a Tensor>,
    pub log_rate: Option<&'a Tensor>,
}

impl Application<'_> {
    pub fn run(self) -> Result<Tensor> {
        let (op, inputs) = self.parts()?;
        only_result(op.name(), autograd::apply(op, &inputs)?)
    }

    /// This and another by one kernel, neither with a graph, of `xs` of one dtype.
    pub fn run_beside(self, other: Self) -> Result<[Tensor; 2]> {
        let machine = Machine::of(self.xs.device())?;
        let new = |xs: &Tensor| Buffer::new(&machine, DType::F32, xs.shape());
        let (mut out, mut other_out) = (new(self.xs)?, new(other.xs)?);
        let (pass, other_pass) = (Pass::Forward { out: &mut out }, Pass::Forward { out: &mut other_out });
        let (grid, other_grid) = (Grid::new(&machine, self.xs)?, Grid::new(&machine, other.xs)?);
        let ((op, inputs), (other_op, other_inputs)) = (self.parts()?, other.parts()?);
        op.with_call(&machine, &inputs, grid, pass, |call| {
            other_op.with_call(&machine, &other_inputs, other_grid, other_pass, |other_call| {
                // SAFETY: as in `Op::run`, for both.
                let code = unsafe { ffi::cla_pointwise_forward_pair(call, other_call, machine.stream()) };
                op.check(code, call)
            })
        })?;
        Ok([out.into_tensor(), other_out.into_tensor()])
    }

    /// The operation and its inputs.
    fn parts(self) -> Result<(Op, Vec<Tensor>)> {
        let Self { f, factor, xs, bias, log_rate } = self;
        let mut inputs = vec![xs.clone()];
        for x in [bias, log_rate].into_iter().flatten() {
            inputs.push(x.contiguous()?);
        }
        Ok((Op { f, factor, bias: bias.is_some(), log_rate: log_rate.is_some() }, inputs))
    }
}

impl From<Pointwise> for ffi::Function {
    fn from(f: Pointwise) -> Self {
        match f {
            Pointwise::Sigmoid => Self::Sigmoid,
            Pointwise::LogSigmoid => Self::LogSigmoid,
            Pointwise::Softplus => Self::Softplus,
        }
    }
}

struct Op {
    f: Pointwise,
    factor: f32,
    bias: bool,
    log_rate: bool,
}

struct Gradients<'a> {
    grad_out: &'a Tensor,
    dx: &'a mut Buffer,
    /// `[blocks, 2 * width]`
    partial: Option<&'a mut Buffer>,
}

enum Pass<'a> {
    Forward { out: &'a mut Buffer },
    Backward(Gradients<'a>),
}

fn width(x: &Tensor) -> usize {
    x.dims().last().copied().unwrap_or(1)
}

/// How the threads of a launch share rows and columns.
struct Grid {
    team: usize,
    blocks: usize,
}

impl Grid {
    fn new(machine: &Machine, x: &Tensor) -> Result<Self> {
        let width = width(x).max(1);
        let team = pointwise_team(width, ffi::COLUMNS_OF_THREAD);
        let rows = x.elem_count() / width;
        let beside = width.div_ceil(ffi::COLUMNS_OF_THREAD * team);
        let most = (BLOCKS * machine.card()?.multiprocessors).div_ceil(beside);
        Ok(Self { team, blocks: rows.div_ceil(ffi::POINTWISE_THREADS / team).min(most) })
    }
}

impl Op {
    /// Bias and log rate.
    fn columns<'a>(&self, inputs: &'a [Tensor]) -> [Option<&'a Tensor>; 2] {
        let mut rest = inputs[1..].iter();
        [self.bias, self.log_rate].map(|there| if there { rest.next() } else { None })
    }

    fn run(&self, machine: &Machine, inputs: &[Tensor], grid: Grid, pass: Pass) -> Result<()> {
        let backward = matches!(pass, Pass::Backward(_));
        self.with_call(machine, inputs, grid, pass, |call| {
            // SAFETY: the addresses, strides and sizes are those of live tensors with the same rows, as `Application`'s caller
            // checks and `SharedRows` sees to; all are held until the kernel is queued, and the stream orders whatever comes
            // after.
            let code = unsafe {
                match backward {
                    true => ffi::cla_pointwise_backward(call, machine.stream()),
                    false => ffi::cla_pointwise_forward(call, machine.stream()),
                }
            };
            self.check(code, call)
        })
    }

    fn check(&self, code: i32, call: &ffi::Pointwise) -> Result<()> {
        if code != 0 {
            let (name, rows, width) = (self.name(), call.rows, call.width);
            bail!("{name}: the kernel could not be launched, CUDA error {code} ({rows} rows of {width})");
        }
        Ok(())
    }

    /// Hands `launch` what a kernel is to be told, unless there is nothing to do.
    fn with_call(
        &self,
        machine: &Machine,
        inputs: &[Tensor],
        grid: Grid,
        pass: Pass,
        launch: impl FnOnce(&ffi::Pointwise) -> Result<()>,
    ) -> Result<()> {
        let (x, [bias, log_rate]) = (&inputs[0], self.columns(inputs));
        let width = width(x);
        let (out, grad_out, dx, partial) = match pass {
            Pass::Forward { out } => (Some(out), None, None, None),
            Pass::Backward(Gradients { grad_out, dx, partial }) => (None, Some(grad_out), Some(dx), partial),
        };
        let read: Vec<&Tensor> = [Some(x), grad_out].into_iter().flatten().collect();
        let shared = SharedRows::new(&read, width)?;
        let rows = shared.rows();
        if rows == 0 || width == 0 {
            return Ok(());
        }
        let held: Vec<Held> = shared.tensors.iter().map(Held::new).collect();
        let per_rate = log_rate.map_or(1, |x| width / x.elem_count().max(1));
        let [bias, log_rate] = [bias, log_rate].map(|x| x.map(Held::new));
        let mut at = Addresses::new(machine);
        let [_, tokens, heads] = shared.sizes;
        launch(&ffi::Pointwise {
            x: at.strided(held.first(), shared.strides(0))?,
            dx: at.out_strided(dx, shared.contiguous())?,
            out: at.out_strided(out, shared.contiguous())?,
            grad_out: match held.get(1) {
                Some(grad_out) => at.strided(Some(grad_out), shared.strides(1))?,
                None => NO_TENSOR,
            },
            bias: numbers(&mut at, bias.as_ref())?,
            log_rate: numbers(&mut at, log_rate.as_ref())?,
            partial: at.out_numbers(partial)?,
            factor: self.factor,
            function: self.f.into(),
            width: width as i32,
            team_bits: grid.team.ilog2() as i32,
            per_rate: per_rate as i32,
            blocks: grid.blocks as i64,
            rows: rows as i64,
            tokens: tokens as i64,
            heads: heads as i64,
        })
    }
}

impl Function for Op {
    fn name(&self) -> &'static str {
        match self.f {
            Pointwise::Sigmoid => "sigmoid",
            Pointwise::LogSigmoid => "log_sigmoid",
            Pointwise::Softplus => "softplus",
        }
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<(Storage, Shape)>> {
        let x = &inputs[0];
        let machine = Machine::of(x.device())?;
        let mut out = Buffer::new(&machine, DType::F32, x.shape())?;
        self.run(&machine, inputs, Grid::new(&machine, x)?, Pass::Forward { out: &mut out })?;
        Ok(vec![out.into_result()])
    }

    fn backward(
        &self,
        inputs: &[Tensor],
        grads: &[Option<Tensor>],
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let (x, [bias, log_rate]) = (&inputs[0], self.columns(inputs));
        let (machine, width) = (Machine::of(x.device())?, width(x));
        let grid = Grid::new(&machine, x)?;
        let mut dx = Buffer::new(&machine, x.dtype(), x.shape())?;
        let mut partial = match wanted[1..].contains(&true) {
            true => Some(Buffer::new(&machine, DType::F32, (grid.blocks, 2 * width))?),
            false => None,
        };
        let grad_out = only_gradient(self.name(), grads)?;
        let of = Gradients { grad_out, dx: &mut dx, partial: partial.as_mut() };
        self.run(&machine, inputs, grid, Pass::Backward(of))?;
        let partial = partial.map(Buffer::into_tensor);
        // Of what begins at column `from` of what the blocks left.
        let sums = |from: usize, dtype: DType| match &partial {
            None => Ok(None),
            Some(of) => {
                let sums = sums::Columns { of, from, columns: width };
                sums.sums(self.name(), &machine, dtype, &[width]).map(|x| Some(x.into_tensor()))
            }
        };
        let mut found = vec![wanted[0].then(|| dx.into_tensor())];
        let mut wanted = wanted[1..].iter();
        let mut is_wanted = || wanted.next() == Some(&true);
        if let Some(bias) = bias {
            found.push(if is_wanted() { sums(0, bias.dtype())? } else { None });
        }
        if let Some(log_rate) = log_rate {
            let sums = if is_wanted() { sums(width, DType::F32)? } else { None };
            // Over the neighbours that share one.
            let sum = |x: Tensor| x.reshape((log_rate.elem_count(), ()))?.sum(1)?.to_dtype(log_rate.dtype());
            found.push(sums.map(sum).transpose()?);
        }
        Ok(found)
    }
}
