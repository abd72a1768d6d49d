//! `log(sigmoid(x))`.

use super::{BLOCK, Held, fits, in_blocks, sigmoid, values};
use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// `log(sigmoid(x))`, any shape, f32.
pub(crate) fn log_sigmoid(xs: &Tensor) -> Result<Tensor> {
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
