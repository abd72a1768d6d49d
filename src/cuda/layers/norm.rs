//! Norms of rows, see `cla_norm` in `cuda/layers.h`.

use candle_core::{DType, Result, Shape, Storage, Tensor, bail};

use super::rows::SharedRows;
use super::sums::Columns;
use super::{MOST_BLOCKS, ffi, numbers, only_gradient, only_result};
use crate::autograd::{self, Function};
use crate::cuda::machine::Machine;
use crate::cuda::memory::{Addresses, Buffer, Held, NO_TENSOR};
use crate::nn::fused::Gate;

/// Blocks of the backward pass for each multiprocessor, where there are rows for so many: each leaves a row of the weight's
/// gradient to be added up.
const BLOCKS: usize = 6;
/// Rows for which blocks of one or two each are not more than a GPU runs at once.
const FEW: usize = 256;

/// Which norm, of rows of `width` elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Norm {
    pub width: usize,
    /// Whether the mean is taken off first.
    pub centred: bool,
    /// Of the sum of squares: `1 / width` for its mean.
    pub factor: f32,
    pub eps: f32,
}

impl Norm {
    /// The threads that share one of so many rows: one for each vector of 16 bytes up to a warp, then as few warps as can hold it,
    /// or as many as there are vectors for, where there are few rows to wait for.
    fn team(&self, dtype: DType, rows: usize) -> usize {
        let vectors = self.width.div_ceil(16 / dtype.size_in_bytes());
        if vectors <= 32 {
            return vectors.next_power_of_two();
        }
        let least = vectors.div_ceil(ffi::NORM_HELD).next_power_of_two().max(32);
        if rows > FEW { least } else { vectors.next_power_of_two().min(ffi::NORM_THREADS).max(least) }
    }

    /// Whether a block can hold a row.
    pub fn fits(&self, dtype: DType) -> bool {
        self.width > 0 && self.team(dtype, usize::MAX) <= ffi::NORM_THREADS
    }
}

/// `x / sqrt(factor * sum(x^2) + eps) * weight * f(gate)`, in the dtype of `xs` and the shape of the gate, or of `xs`.
/// `xs` and the gate are of one dtype; the weight is `[width]`.
pub(crate) fn norm(
    norm: Norm,
    xs: &Tensor,
    weight: Option<&Tensor>,
    gate: Option<(&Tensor, Gate)>,
) -> Result<Tensor> {
    let weight = weight.map(Tensor::contiguous).transpose()?;
    let op = Op { norm, weight: weight.is_some(), bias: false, gate: gate.map(|(_, kind)| kind) };
    let inputs = [Some(xs), weight.as_ref(), gate.map(|(gate, _)| gate)];
    let inputs: Vec<Tensor> = inputs.into_iter().flatten().cloned().collect();
    only_result(op.name(), autograd::apply(op, &inputs)?)
}

/// `(x - mean) / sqrt(factor * sum((x - mean)^2) + eps) * weight + bias`, of a norm that is centred, in the dtype and shape of `xs`.
/// Weight and bias are `[width]`.
pub(crate) fn layer_norm(
    norm: Norm,
    xs: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let [weight, bias] = [weight, bias].map(|x| x.map(Tensor::contiguous).transpose());
    let (weight, bias) = (weight?, bias?);
    let op = Op { norm, weight: weight.is_some(), bias: bias.is_some(), gate: None };
    let inputs: Vec<Tensor> = [Some(xs.clone()), weight, bias].into_iter().flatten().collect();
    only_result(op.name(), autograd::apply(op, &inputs)?)
}

/// `xs + added`, and its [`norm`], neither with a graph. All but the weight are of one dtype.
pub(crate) fn norm_of_sum(
    norm: Norm,
    xs: &Tensor,
    added: &Tensor,
    weight: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let machine = Machine::of(xs.device())?;
    let new = || Buffer::new(&machine, xs.dtype(), xs.shape());
    let (mut sum, mut out) = (new()?, new()?);
    let weight = weight.contiguous()?;
    let given = Given { x: xs, added: Some(added), weight: Some(&weight), bias: None, gate: None };
    let op = Op { norm, weight: true, bias: false, gate: None };
    op.run(&machine, &given, Pass::Forward { out: &mut out, sum: Some(&mut sum) })?;
    Ok((sum.into_tensor(), out.into_tensor()))
}

struct Op {
    norm: Norm,
    weight: bool,
    bias: bool,
    gate: Option<Gate>,
}

/// What both passes read.
struct Given<'a> {
    x: &'a Tensor,
    /// To x, in the forward pass.
    added: Option<&'a Tensor>,
    weight: Option<&'a Tensor>,
    bias: Option<&'a Tensor>,
    gate: Option<&'a Tensor>,
}

enum Pass<'a> {
    Forward { out: &'a mut Buffer, sum: Option<&'a mut Buffer> },
    Backward(Gradients<'a>),
}

struct Gradients<'a> {
    grad_out: &'a Tensor,
    dx: &'a mut Buffer,
    dgate: Option<&'a mut Buffer>,
    /// `[blocks, width]`, or twice that for a norm that is centred.
    partial: Option<&'a mut Buffer>,
}

impl Op {
    fn given<'a>(&self, inputs: &'a [Tensor]) -> Given<'a> {
        let mut rest = inputs[1..].iter();
        let weight = if self.weight { rest.next() } else { None };
        let bias = if self.bias { rest.next() } else { None };
        Given { x: &inputs[0], added: None, weight, bias, gate: rest.next() }
    }

    /// Blocks of the backward pass over `xs`.
    fn blocks(&self, machine: &Machine, xs: &Tensor) -> Result<usize> {
        let rows = xs.elem_count() / self.norm.width;
        let teams = ffi::NORM_THREADS / self.norm.team(xs.dtype(), rows);
        Ok(rows.div_ceil(teams).min(BLOCKS * machine.card()?.multiprocessors))
    }

    fn run(&self, machine: &Machine, given: &Given, pass: Pass) -> Result<()> {
        let width = self.norm.width;
        let (out, sum, of) = match pass {
            Pass::Forward { out, sum } => (Some(out), sum, None),
            Pass::Backward(of) => (None, None, Some(of)),
        };
        let backward = of.is_some();
        let (grad_out, dx, dgate, partial) = match of {
            Some(Gradients { grad_out, dx, dgate, partial }) => (Some(grad_out), Some(dx), dgate, partial),
            None => (None, None, None, None),
        };
        let read = [Some(given.x), given.gate, given.added, grad_out];
        let shared = SharedRows::new(&read.into_iter().flatten().collect::<Vec<_>>(), width)?;
        let rows = shared.rows();
        let team = self.norm.team(given.x.dtype(), rows);
        if rows == 0 {
            return Ok(());
        }
        if rows.div_ceil(ffi::NORM_THREADS / team) > MOST_BLOCKS {
            let name = self.name();
            bail!("{name}: {rows} rows of {width} are more blocks than a launch takes, {MOST_BLOCKS}");
        }
        let held: Vec<Held> = shared.tensors.iter().map(Held::new).collect();
        let [weight, bias] = [given.weight, given.bias].map(|x| x.map(Held::new));
        let mut at = Addresses::new(machine);
        let mut found = Vec::with_capacity(held.len());
        for (i, x) in held.iter().enumerate() {
            found.push(at.strided(Some(x), shared.strides(i))?);
        }
        let mut found = found.into_iter();
        let mut input = |x: Option<&Tensor>| x.and_then(|_| found.next()).unwrap_or(NO_TENSOR);
        let [_, tokens, heads] = shared.sizes;
        let call = ffi::Norm {
            x: input(read[0]),
            gate: input(read[1]),
            added: input(read[2]),
            grad_out: input(read[3]),
            out: at.out_strided(out, shared.contiguous())?,
            sum: at.out_strided(sum, shared.contiguous())?,
            dx: at.out_strided(dx, shared.contiguous())?,
            dgate: at.out_strided(dgate, shared.contiguous())?,
            weight: numbers(&mut at, weight.as_ref())?,
            bias: numbers(&mut at, bias.as_ref())?,
            partial: at.out_numbers(partial)?,
            centred: self.norm.centred.into(),
            factor: self.norm.factor,
            eps: self.norm.eps,
            gate_kind: self.gate.map_or(ffi::Gate::None, ffi::Gate::from),
            width: width as i32,
            team_bits: team.ilog2() as i32,
            blocks: self.blocks(machine, given.x)? as i32,
            rows: rows as i64,
            tokens: tokens as i64,
            heads: heads as i64,
        };
        // SAFETY: the addresses, strides and sizes are those of live tensors with the same rows, as `norm`'s caller checks and
        // `SharedRows` sees to; all are held until the kernel is queued, and the stream orders whatever comes after.
        let code = unsafe {
            match backward {
                true => ffi::cla_norm_backward(&call, machine.stream()),
                false => ffi::cla_norm_forward(&call, machine.stream()),
            }
        };
        if code != 0 {
            let name = self.name();
            bail!("{name}: the kernel could not be launched, CUDA error {code} ({rows} rows of {width})");
        }
        Ok(())
    }
}

impl Function for Op {
    fn name(&self) -> &'static str {
        if self.norm.centred { "layer_norm" } else { "rms_norm" }
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<(Storage, Shape)>> {
        let given = self.given(inputs);
        let machine = Machine::of(given.x.device())?;
        let mut out = Buffer::new(&machine, given.x.dtype(), given.gate.unwrap_or(given.x).shape())?;
        self.run(&machine, &given, Pass::Forward { out: &mut out, sum: None })?;
        Ok(vec![out.into_result()])
    }

    fn backward(
        &self,
        inputs: &[Tensor],
        grads: &[Option<Tensor>],
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let grad_out = only_gradient(self.name(), grads)?;
        let given = self.given(inputs);
        let machine = Machine::of(given.x.device())?;
        let like = |x: &Tensor| Buffer::new(&machine, x.dtype(), x.shape());
        let mut dx = like(given.x)?;
        let mut dgate = given.gate.map(like).transpose()?;
        let width = self.norm.width;
        let parameters = usize::from(self.weight) + usize::from(self.bias);
        let mut partial = match wanted[1..1 + parameters].contains(&true) {
            true => {
                let blocks = self.blocks(&machine, given.x)?;
                let columns = if self.norm.centred { 2 * width } else { width };
                Some(Buffer::new(&machine, DType::F32, (blocks, columns))?)
            }
            false => None,
        };
        let of = Gradients { grad_out, dx: &mut dx, dgate: dgate.as_mut(), partial: partial.as_mut() };
        self.run(&machine, &given, Pass::Backward(of))?;
        let partial = partial.map(Buffer::into_tensor);
        // Of what begins at column `from` of what the blocks left.
        let sums = |from: usize, parameter: &Tensor| {
            let Some(of) = &partial else { return Ok(None) };
            let columns = Columns { of, from, columns: width };
            columns.sums(self.name(), &machine, parameter.dtype(), parameter.dims()).map(Some)
        };
        let mut found = vec![Some(dx)];
        if let Some(weight) = given.weight {
            found.push(sums(0, weight)?);
        }
        if let Some(bias) = given.bias {
            found.push(sums(width, bias)?);
        }
        found.extend(given.gate.map(|_| dgate));
        let found = found.into_iter().zip(wanted);
        Ok(found.map(|(grad, wanted)| grad.filter(|_| *wanted).map(Buffer::into_tensor)).collect())
    }
}
