//! Rotary position embedding, see `cla_rotary` in `cuda/layers.h`.

use candle_core::{Result, Shape, Storage, Tensor, bail};

use super::{ffi, only_gradient, only_result};
use crate::autograd::{self, Function};
use crate::cuda::machine::Machine;
use crate::cuda::memory::{Addresses, Buffer, Held};

/// The positions of tokens.
#[derive(Debug, Clone)]
pub(crate) enum Positions {
    /// From this one on in every batch entry.
    From(usize),
    /// `[B * T]`, u32.
    Each(Tensor),
}

/// By which angles channels are rotated.
#[derive(Debug, Clone)]
pub(crate) struct Rotation {
    /// `[half]`, f32: the angle from one position to the next.
    pub frequencies: Tensor,
    /// On cos and sin.
    pub factor: f64,
    pub positions: Positions,
}

/// `xs: [B, T, H, D]` with its first 2 * half channels rotated, in the same shape and dtype.
pub(crate) fn rotate(xs: &Tensor, rotation: &Rotation) -> Result<Tensor> {
    only_result(NAME, autograd::apply(Op(rotation.clone()), std::slice::from_ref(xs))?)
}

const NAME: &str = "rotary embedding";

struct Op(Rotation);

impl Op {
    fn run(&self, xs: &Tensor, backwards: bool) -> Result<Buffer> {
        let Rotation { frequencies, factor, positions } = &self.0;
        let (batch, tokens, heads, width) = xs.dims4()?;
        let half = frequencies.dims1()?;
        let (first, each) = match positions {
            Positions::From(first) => (*first, None),
            Positions::Each(each) => (0, Some(each)),
        };
        let Ok(first) = i64::try_from(first) else { bail!("{NAME}: {first} is no position") };
        if 2 * half > width
            || i32::try_from(width).is_err()
            || each.is_some_and(|each| each.elem_count() != batch * tokens)
        {
            bail!("{NAME}: {half} frequencies or the positions are not those of {:?}", xs.dims());
        }
        let machine = Machine::of(xs.device())?;
        let mut out = Buffer::new(&machine, xs.dtype(), xs.shape())?;
        if xs.elem_count() == 0 {
            return Ok(out);
        }
        let xs = if width == 1 || xs.stride()[3] == 1 { xs.clone() } else { xs.contiguous()? };
        let [held, frequencies] = [&xs, frequencies].map(Held::new);
        let each = each.map(Held::new);
        {
            let mut at = Addresses::new(&machine);
            let call = ffi::Rotary {
                x: at.tensor(Some(&held), heads)?,
                out: at.out(Some(&mut out))?,
                frequencies: at.numbers(Some(&frequencies))?,
                positions: at.numbers(each.as_ref())?,
                first,
                factor: *factor as f32,
                half: half as i32,
                width: width as i32,
                backwards: backwards.into(),
                batch: batch as i64,
                tokens: tokens as i64,
                heads: heads as i64,
            };
            // SAFETY: the addresses, strides and sizes are those of live tensors, as checked above; all are held until the
            // kernel is queued, and the stream orders whatever comes after.
            let code = unsafe { ffi::cla_rotate(&call, machine.stream()) };
            if code != 0 {
                bail!("{NAME}: the kernel could not be launched, CUDA error {code} ({:?})", xs.dims());
            }
        }
        Ok(out)
    }
}

impl Function for Op {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<(Storage, Shape)>> {
        Ok(vec![self.run(&inputs[0], false)?.into_result()])
    }

    fn backward(&self, _: &[Tensor], grads: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(self.run(only_gradient(NAME, grads)?, true)?.into_tensor())])
    }
}
