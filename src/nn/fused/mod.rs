//! The parts of a layer as single operations with a gradient.
//!
//! Composed of Candle's operations, a norm or a gate is five to ten passes over memory forward and three times as many
//! backward: more than half of the time of a training step on a CPU. Here each is one pass forward and one backward.
//! On CUDA, convolutions, RMS norms, gates and pointwise functions are kernels (`cuda/short_conv.cu`, `cuda/norms.cu`,
//! `cuda/pointwise.cu`). On other devices, and for what the kernels do not take, the composition takes their place; both are
//! held against each other below.
//!
//! Sums are taken in an order that does not depend on the number of threads, so that training can be repeated bit by bit.

mod gated;
mod layer_norm;
mod linear;
mod pointwise;
mod product;
mod projection;
mod quantized;
mod rms_norm;
mod short_conv;

pub(crate) use gated::gated;
pub(crate) use layer_norm::layer_norm;
pub(crate) use linear::{batched_product, linear};
pub(crate) use pointwise::{Pointwise, decay, decay_and_sigmoid, pointwise, scaled};
pub(crate) use quantized::{divides, quantized_linear};
pub use rms_norm::Gate;
pub(crate) use rms_norm::{l2_norm, rms_norm, rms_norm_gated, rms_norm_of_sum};
pub(crate) use short_conv::{ShortConv, short_conv_and_last};

use crate::cpu::exp::exp;
use candle_core::{CpuStorage, DType, Layout, Result, Storage, StorageRef, Tensor, bail};
use pulp::Arch;
use rayon::prelude::*;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Elements that a thread takes at a time.
const BLOCK: usize = 1 << 14;

/// So many elements, which `fill` sets: a block of them at a time, in other threads too if there are more.
fn in_blocks(len: usize, block: usize, fill: impl Fn(Range<usize>, &mut [f32]) + Sync) -> Vec<f32> {
    let blocks: Vec<_> = (0..len).step_by(block.max(1)).map(|from| from..len.min(from + block)).collect();
    in_pieces(blocks.iter().map(|range| range.len()), |i, elements| fill(blocks[i].clone(), elements))
}

/// Elements in pieces of these lengths, each of which `fill` sets, given its number. They are 0 before that, and it is the
/// thread which sets them that makes them so: one pass over new memory by one thread would take as long as some of the
/// operations here.
fn in_pieces(lens: impl Iterator<Item = usize> + Clone, fill: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let len = lens.clone().sum();
    let mut elements = Vec::with_capacity(len);
    let mut rest = &mut elements.spare_capacity_mut()[..len];
    let mut pieces = Vec::new();
    for len in lens {
        let (piece, others) = rest.split_at_mut(len);
        pieces.push(piece);
        rest = others;
    }
    let run = |(i, piece): (usize, &mut [MaybeUninit<f32>])| {
        piece.fill(MaybeUninit::new(0.));
        // SAFETY: all have just been set.
        fill(i, unsafe { &mut *(piece as *mut [MaybeUninit<f32>] as *mut [f32]) });
    };
    match pieces.len() {
        // Not worth waking other threads for.
        0..=1 => pieces.into_iter().enumerate().for_each(run),
        _ => pieces.into_par_iter().enumerate().for_each(run),
    }
    // SAFETY: the pieces were all of them, and all have been set.
    unsafe { elements.set_len(len) };
    elements
}

/// Whether all are where, and what, the operations here can work on.
fn fits(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|tensor| tensor.device().is_cpu() && tensor.dtype() == DType::F32)
}

/// The elements of a contiguous f32 tensor.
fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(all), Some((from, to))) => Ok(&all[from..to]),
        _ => bail!("a contiguous f32 tensor is needed, this has layout {layout:?}"),
    }
}

/// A contiguous f32 tensor on a CPU, held while its elements are read.
struct Held<'a>(StorageRef<'a>, &'a Layout);

impl<'a> Held<'a> {
    fn new(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self(storage, layout)
    }

    fn values(&self) -> Result<&[f32]> {
        match &*self.0 {
            Storage::Cpu(storage) => values(storage, self.1),
            _ => bail!("a tensor on a CPU is needed"),
        }
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1. / (1. + exp(-x))
}

/// The derivative of `x * sigmoid(x)`.
#[inline(always)]
fn silu_slope(x: f32) -> f32 {
    let s = sigmoid(x);
    s * (1. + x * (1. - s))
}

/// Runs a loop that has been compiled for the vector units there are: `#[inline(always)]`, or the compiler may make it a
/// function of its own, which knows nothing of them.
#[inline(always)]
fn vectorized<R>(body: impl FnOnce() -> R) -> R {
    Arch::new().dispatch(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};
    use rand::{Rng, SeedableRng, rngs::StdRng};

    /// Values and all gradients of an operation and of the composition it stands for.
    pub(super) fn agree(
        shapes: &[&[usize]],
        fused: impl Fn(&[Tensor]) -> Result<Tensor>,
        composed: impl Fn(&[Tensor]) -> Result<Tensor>,
    ) -> Result<()> {
        let mut rng = StdRng::seed_from_u64(7);
        let mut random = |shape: &[usize]| {
            let values = (0..shape.iter().product()).map(|_| rng.random_range(-3f32..3.)).collect();
            Tensor::from_vec(values, shape, &Device::Cpu)
        };
        let vars: Vec<Var> =
            shapes.iter().map(|shape| Var::from_tensor(&random(shape)?)).collect::<Result<_>>()?;
        let args: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let (y, expected) = (fused(&args)?, composed(&args)?);
        close(&y, &expected)?;
        // Through a transposition, so that the gradient is not contiguous.
        let weights = random(expected.t()?.dims())?;
        let gradients = |y: &Tensor| (y.t()? * &weights)?.sum_all()?.backward();
        let (found, expected) = (gradients(&y)?, gradients(&expected)?);
        for var in &vars {
            let (Some(found), Some(expected)) = (found.get(var), expected.get(var)) else {
                panic!("an argument of shape {:?} has no gradient", var.dims())
            };
            close(found, expected)?;
        }
        Ok(())
    }

    fn close(x: &Tensor, expected: &Tensor) -> Result<()> {
        assert_eq!(x.dims(), expected.dims());
        let norm = |x: &Tensor| x.sqr()?.sum_all()?.to_scalar::<f32>();
        let error = (norm(&(x - expected)?)? / norm(expected)?).sqrt();
        assert!(error < 1e-5, "relative error {error:e}");
        Ok(())
    }
}
