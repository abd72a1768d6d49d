//! Norms of rows, see `cla_norm` in `cuda/layers.h`.

use candle_core::{DType, Result, Shape, Storage, Tensor, bail};

use super::rows::SharedRows;
use super::sums::Columns;
use super::{MOST_BLOCKS, ffi, numbers, only_gradient};
use crate::autograd::{self, Function};
use crate::cuda::machine::Machine;
use crate::cuda::memory::{Addresses, Buffer, Held, NO_TENSOR};
use crate::nn::fused::Gate;

/// Blocks of the backward pass for each multiprocessor, where there are rows for so many: each leaves a row of the weight's
/// gradient to be added up.
const BLOCKS: usize = 6;

/// Which norm, of rows of `width` elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Norm {
    pub width: usize,
    /// Of the sum of squares: `1 / width` for its mean.
    pub factor: f32,
    pub eps: f32,
}

impl Norm {
    /// The threads that share a row: one for each vector of 16 bytes up to a warp, then as few warps as can hold it.
    fn team(&self, dtype: DType) -> usize {
        let vectors = self.width.div_ceil(16 / dtype.size_in_bytes());
        if vectors <= 32 {
            return vectors.next_power_of_two();
        }
        vectors.div_ceil(ffi::NORM_HELD).next_power_of_two().max(32)
    }

    /// Whether a block can hold a row.
    pub fn fits(&self, dtype: DType) -> bool {
        self.width > 0 && self.team(dtype) <= ffi::NORM_THREADS
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
    let op = Op { norm, weight: weight.is_some(), gate: gate.map(|(_, kind)| kind) };
    let inputs = [Some(xs), weight.as_ref(), gate.map(|(gate, _)| gate)];
    let inputs: Vec<Tensor> = inputs.into_iter().flatten().cloned().collect();
    match autograd::apply(op, &inputs)?.pop() {
        Some(ys) => Ok(ys),
        None => bail!("{NAME}: no result"),
    }
}

const NAME: &str = "rms_norm";

struct Op {
    norm: Norm,
    weight: bool,
    gate: Option<Gate>,
}

/// What a pass reads.
struct Given<'a> {
    x: &'a Tensor,
    weight: Option<&'a Tensor>,
    gate: Option<&'a Tensor>,
}

/// What the backward pass reads and writes besides.
struct Gradients<'a> {
    grad_out: &'a Tensor,
    dx: &'a mut Buffer,
    dgate: Option<&'a mut Buffer>,
    partial: Option<&'a mut Buffer>,
}

enum Pass<'a> {
    Forward { out: &'a mut Buffer },
    Backward(Gradients<'a>),
}

impl Op {
    fn given<'a>(&self, inputs: &'a [Tensor]) -> Given<'a> {
        let mut rest = inputs[1..].iter();
        let weight = self.weight.then(|| rest.next()).flatten();
        Given { x: &inputs[0], weight, gate: self.gate.and_then(|_| rest.next()) }
    }

    /// Blocks of a pass over so many rows.
    fn blocks(&self, machine: &Machine, dtype: DType, rows: usize) -> Result<usize> {
        let teams = ffi::NORM_THREADS / self.norm.team(dtype);
        Ok(rows.div_ceil(teams).min(BLOCKS * machine.card()?.multiprocessors))
    }

    fn run(&self, machine: &Machine, given: &Given, pass: Pass) -> Result<()> {
        let (width, dtype) = (self.norm.width, given.x.dtype());
        let grad_out = match &pass {
            Pass::Forward { .. } => None,
            Pass::Backward(of) => Some(of.grad_out),
        };
        let read: Vec<&Tensor> = [Some(given.x), given.gate, grad_out].into_iter().flatten().collect();
        let shared = SharedRows::new(&read, width)?;
        let rows = shared.rows();
        if rows == 0 {
            return Ok(());
        }
        let team = self.norm.team(dtype);
        let blocks = self.blocks(machine, dtype, rows)?;
        if rows.div_ceil(ffi::NORM_THREADS / team) > MOST_BLOCKS {
            bail!("{NAME}: {rows} rows of {width} are more blocks than a launch takes, {MOST_BLOCKS}");
        }
        let held: Vec<Held> = shared.tensors.iter().map(Held::new).collect();
        let weight = given.weight.map(Held::new);
        let mut at = Addresses::new(machine);
        let mut next = 0..read.len();
        let mut input = |at: &mut Addresses<'_>, there: bool| match next.next().filter(|_| there) {
            Some(i) => at.strided(held.get(i), shared.strides(i)),
            None => Ok(NO_TENSOR),
        };
        let _ = (&mut input, &mut at, &weight, blocks, dtype, pass);
        todo!()
    }
}
