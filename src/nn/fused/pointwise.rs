//! Functions of one number, and the decays that are made of one.

use super::{BLOCK, Held, fits, in_blocks, sigmoid, values};
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
use crate::cuda::layers::{self, Application};
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pointwise {
    /// 1 / (1 + exp(-x))
    Sigmoid,
    /// log(sigmoid(x))
    LogSigmoid,
    /// log(1 + exp(x))
    Softplus,
}

/// `f(xs)` of any shape and float dtype, f32.
pub(crate) fn pointwise(f: Pointwise, xs: &Tensor) -> Result<Tensor> {
    scaled(1., f, xs, None)
}

/// `factor * f(xs + bias)` for `xs: [.., n]` and `bias: [n]` of any float dtype, f32.
pub(crate) fn scaled(factor: f64, f: Pointwise, xs: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if let Some(bias) = bias.filter(|bias| xs.dims().last().copied() != bias.dims1().ok()) {
        bail!("bias: shape is {:?}, that of xs {:?}", bias.dims(), xs.dims());
    }
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    if layers::takes_pointwise(&[Some(xs), bias].into_iter().flatten().collect::<Vec<_>>()) {
        return Application { f, factor: factor as f32, xs, bias, log_rate: None }.run();
    }
    let mut xs = xs.to_dtype(DType::F32)?;
    if let Some(bias) = bias {
        xs = xs.broadcast_add(&bias.to_dtype(DType::F32)?)?;
    }
    let ys = match f {
        Pointwise::Sigmoid => candle_nn::ops::sigmoid(&xs),
        Pointwise::LogSigmoid => log_sigmoid(&xs),
        Pointwise::Softplus => log_sigmoid(&xs.neg()?)?.neg(),
    }?;
    if factor == 1. { Ok(ys) } else { ys * factor }
}

/// [`decay`] of `xs`, and `factor` times the sigmoid of `others`, both in f32. Without a graph one kernel on CUDA.
pub(crate) fn decay_and_sigmoid(
    (xs, bias, a_log): (&Tensor, &Tensor, &Tensor),
    (factor, others): (f64, &Tensor),
) -> Result<(Tensor, Tensor)> {
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    if xs.dtype() == others.dtype()
        && (xs.elem_count() == 0) == (others.elem_count() == 0)
        && layers::takes_pointwise(&[xs, bias, a_log])
        && layers::takes_pointwise(&[others, xs])
        && ![xs, bias, a_log, others].iter().any(|x| x.track_op())
    {
        let a_log = a_log.flatten_all()?;
        check_decay(xs, bias.dims1()?, a_log.elem_count())?;
        let decay =
            Application { f: Pointwise::Softplus, factor: 1., xs, bias: Some(bias), log_rate: Some(&a_log) };
        let sigmoid = Application {
            f: Pointwise::Sigmoid,
            factor: factor as f32,
            xs: others,
            bias: None,
            log_rate: None,
        };
        let [g, ys] = decay.run_beside(sigmoid)?;
        return Ok((g, ys));
    }
    Ok((decay(xs, bias, Some(a_log))?, scaled(factor, Pointwise::Sigmoid, others, None)?))
}

fn check_decay(xs: &Tensor, n: usize, heads: usize) -> Result<()> {
    if n == 0 || xs.dims().last() != Some(&n) || heads == 0 || !n.is_multiple_of(heads) {
        bail!("decay: xs is {:?}, its last dimension must be {n}, a multiple of {heads} heads", xs.dims());
    }
    Ok(())
}

/// `-exp(a_log) * softplus(xs + bias)` for `xs: [.., n]`, f32; without an `a_log`, `softplus(xs + bias)`. `bias` is `[n]`;
/// `a_log` has any shape, and a number for each of n columns or for as many neighbours as divide n.
pub(crate) fn decay(xs: &Tensor, bias: &Tensor, a_log: Option<&Tensor>) -> Result<Tensor> {
    let n = bias.dims1()?;
    let a_log = a_log.map(Tensor::flatten_all).transpose()?;
    let heads = a_log.as_ref().map_or(n, Tensor::elem_count);
    check_decay(xs, n, heads)?;
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    if layers::takes_pointwise(&[xs, bias, a_log.as_ref().unwrap_or(bias)]) {
        let (f, log_rate) = (Pointwise::Softplus, a_log.as_ref());
        return Application { f, factor: 1., xs, bias: Some(bias), log_rate }.run();
    }
    let steps = scaled(1., Pointwise::Softplus, xs, Some(bias))?;
    let Some(a_log) = a_log else { return Ok(steps) };
    let rates = a_log.to_dtype(DType::F32)?.exp()?.neg()?.unsqueeze(1)?.broadcast_as((heads, n / heads))?;
    steps.broadcast_mul(&rates.reshape(n)?)
}

/// `log(sigmoid(x))`, any shape, f32.
fn log_sigmoid(xs: &Tensor) -> Result<Tensor> {
    match fits(&[xs]) {
        true => xs.contiguous()?.apply_op1(LogSigmoid),
        false => composed(xs),
    }
}

/// `min(x, 0) - log(1 + exp(-|x|))`, which neither overflows nor loses small values. `x - relu(x)` rather than a
/// minimum: Candle's derivatives at 0 (1 for relu, 1 for abs) then add up to the right one, 1/2.
fn composed(xs: &Tensor) -> Result<Tensor> {
    let below = (xs - xs.relu()?)?;
    below - (xs.abs()?.neg()?.exp()? + 1.)?.log()?
}

struct LogSigmoid;

impl CustomOp1 for LogSigmoid {
    fn name(&self) -> &'static str {
        "log_sigmoid"
    }

    fn cpu_fwd(&self, xs: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let xs = values(xs, layout)?;
        let ys = in_blocks(xs.len(), BLOCK, |at, ys| {
            for (y, x) in ys.iter_mut().zip(&xs[at]) {
                *y = x.min(0.) - (-x.abs()).exp().ln_1p();
            }
        });
        Ok((CpuStorage::F32(ys), layout.shape().clone()))
    }

    fn bwd(&self, xs: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let shape = xs.shape();
        let [xs, dy] = [&Held::new(xs), &Held::new(&dy)];
        let [xs, dy] = [xs.values()?, dy.values()?];
        let mut dx = vec![0.; xs.len()];
        dx.par_chunks_mut(BLOCK).zip(xs.par_chunks(BLOCK)).zip(dy.par_chunks(BLOCK)).for_each(
            |((dx, xs), dy)| {
                for ((dx, x), dy) in dx.iter_mut().zip(xs).zip(dy) {
                    *dx = dy * sigmoid(-x);
                }
            },
        );
        Tensor::from_vec(dx, shape, &Device::Cpu).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::fused::tests::agree;

    #[test]
    fn agrees_with_its_composition() -> Result<()> {
        for shape in [&[1, 1][..], &[3, 5], &[2, 100, 200]] {
            agree(&[shape], |x| log_sigmoid(&x[0]), |x| composed(&x[0]))?;
        }
        Ok(())
    }
}
