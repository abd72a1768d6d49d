//! What layers do around an operator, short convolutions, norms, gates, decays and rotation, and in its place, softmax
//! attention. `cuda/layers.h` says what the kernels compute.

mod attention;
mod ffi;
mod gated;
mod norm;
mod pointwise;
mod rotary;
mod rows;
mod rwkv7;
mod short_conv;
mod sums;

use candle_core::{DType, Result, Tensor, bail};

use super::ffi::Dtype;
use super::memory::{Addresses, Held};

pub(crate) use attention::softmax_attention;
pub(crate) use gated::gated;
pub(crate) use norm::{Norm, layer_norm, norm, norm_of_sum};
pub(crate) use pointwise::Application;
pub(crate) use rotary::{Positions, Rotation, rotate};
pub(crate) use rwkv7::{Rwkv7Keys, Rwkv7Output, mix_tokens, rwkv7_keys, rwkv7_output};
pub(crate) use short_conv::{last_rows, short_conv, short_conv_and_last, takes_width};

/// The most blocks of a launch.
const MOST_BLOCKS: usize = i32::MAX as usize;

/// Whether all are where, and what, the kernels can work on.
pub(crate) fn takes(tensors: &[&Tensor]) -> bool {
    let Some(first) = tensors.first() else { return false };
    let fits = |x: &&Tensor| {
        x.device().same_device(first.device()) && matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16)
    };
    super::takes(first.device()) && tensors.iter().all(fits)
}

/// Whether all of them fit, and the pointwise kernels take the last dimension of the first as the columns of its rows.
pub(crate) fn takes_pointwise(tensors: &[&Tensor]) -> bool {
    let columns = tensors.first().and_then(|x| x.dims().last());
    takes(tensors) && columns.is_some_and(|&columns| columns <= ffi::POINTWISE_COLUMNS)
}

/// How many threads are beside one another in rows of `width`, of which each has `each`.
fn pointwise_team(width: usize, each: usize) -> usize {
    width.div_ceil(each).next_power_of_two().min(32)
}

/// The only result of a function.
fn only_result(name: &str, mut results: Vec<Tensor>) -> Result<Tensor> {
    match results.pop() {
        Some(result) => Ok(result),
        None => bail!("{name}: no result"),
    }
}

/// The elements of a contiguous tensor, or none.
fn numbers<'a>(at: &mut Addresses<'a>, x: Option<&'a Held<'a>>) -> Result<ffi::Numbers> {
    let dtype = x.map_or(Ok(Dtype::F32), |x| Dtype::try_from(x.dtype()))?;
    Ok(ffi::Numbers { data: at.numbers(x)?, dtype })
}

/// The gradient that an operation with one result is given.
fn only_gradient<'a>(name: &str, grads: &'a [Option<Tensor>]) -> Result<&'a Tensor> {
    match grads {
        [Some(grad)] => Ok(grad),
        _ => bail!("{name}: a gradient is missing"),
    }
}
