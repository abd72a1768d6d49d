//! `(x - mean) / sqrt(variance + eps)`, what a layer norm does before its weight.

use super::{BLOCK, Held, fits, values, vectorized};
use candle_core::{CpuStorage, CustomOp1, D, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// Every `width` numbers of the last dimension by themselves, f32.
pub(crate) fn standardize(xs: &Tensor, width: usize, eps: f64) -> Result<Tensor> {
    let last = xs.dims().last().copied().unwrap_or(0);
    if width == 0 || last == 0 || !last.is_multiple_of(width) {
        bail!(
            "layer_norm: xs is {:?}, its last dimension must be a multiple of {width}, and at least 1",
            xs.dims()
        );
    }
    match fits(&[xs]) {
        true => xs.contiguous()?.apply_op1(Standardize { width, eps: eps as f32 }),
        false => composed(xs, width, eps),
    }
}

fn composed(xs: &Tensor, width: usize, eps: f64) -> Result<Tensor> {
    let rows = xs.reshape(((), width))?;
    let centred = rows.broadcast_sub(&rows.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    centred.broadcast_div(&(variance + eps)?.sqrt()?)?.reshape(xs.shape())
}

struct Standardize {
    width: usize,
    eps: f32,
}

impl Standardize {
    /// Numbers that a thread takes at a time: whole rows.
    fn block(&self) -> usize {
        BLOCK.div_ceil(self.width) * self.width
    }

    /// Leaves `(x - mean) / deviation` in y and returns `1 / deviation`.
    #[inline(always)]
    fn row(&self, x: &[f32], y: &mut [f32]) -> f32 {
        let n = x.len() as f32;
        let mean = sum(x) / n;
        y.iter_mut().zip(x).for_each(|(y, x)| *y = x - mean);
        let inverse = 1. / (dot(y, y) / n + self.eps).sqrt();
        y.iter_mut().for_each(|y| *y *= inverse);
        inverse
    }
}

/// In eight running sums: one alone would wait for every addition, and round more.
#[inline(always)]
fn dot(x: &[f32], y: &[f32]) -> f32 {
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<8>(), y.as_chunks::<8>());
    let mut sums = [0f32; 8];
    for (x, y) in x.iter().zip(y) {
        for i in 0..8 {
            sums[i] += x[i] * y[i];
        }
    }
    sums.iter().sum::<f32>() + x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum::<f32>()
}

#[inline(always)]
fn sum(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<8>();
    let mut sums = [0f32; 8];
    for x in chunks {
        for i in 0..8 {
            sums[i] += x[i];
        }
    }
    sums.iter().sum::<f32>() + rest.iter().sum::<f32>()
}

impl CustomOp1 for Standardize {
    fn name(&self) -> &'static str {
        "standardize"
    }

    fn cpu_fwd(&self, xs: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let xs = values(xs, layout)?;
        let mut ys = vec![0.; xs.len()];
        ys.par_chunks_mut(self.block()).zip(xs.par_chunks(self.block())).for_each(|(ys, xs)| {
            vectorized(
                #[inline(always)]
                || {
                    for (y, x) in ys.chunks_exact_mut(self.width).zip(xs.chunks_exact(self.width)) {
                        self.row(x, y);
                    }
                },
            );
        });
        Ok((CpuStorage::F32(ys), layout.shape().clone()))
    }

    fn bwd(&self, xs: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let shape = xs.shape();
        let [xs, dy] = [&Held::new(xs), &Held::new(&dy)];
        let [xs, dy] = [xs.values()?, dy.values()?];
        let (block, n) = (self.block(), self.width as f32);
        let mut dx = vec![0.; xs.len()];
        let blocks = dx.par_chunks_mut(block).zip(xs.par_chunks(block)).zip(dy.par_chunks(block));
        blocks.for_each(|((dx, xs), dy)| {
            vectorized(
                #[inline(always)]
                || {
                    let rows = xs.chunks_exact(self.width).zip(dy.chunks_exact(self.width));
                    for (dx, (x, dy)) in dx.chunks_exact_mut(self.width).zip(rows) {
                        let inverse = self.row(x, dx);
                        let (mean, slope) = (sum(dy) / n, dot(dx, dy) / n);
                        for (dx, dy) in dx.iter_mut().zip(dy) {
                            *dx = inverse * (dy - mean - *dx * slope);
                        }
                    }
                },
            );
        });
        Tensor::from_vec(dx, shape, &Device::Cpu).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::fused::tests::agree;

    /// With a small one the gradient of a few channels is all rounding: most of it cancels.
    const EPS: f64 = 1.;

    #[test]
    fn agrees_with_its_composition() -> Result<()> {
        for (shape, width) in [(&[1, 3][..], 3), (&[3, 10], 5), (&[2, 100, 96], 32), (&[70, 301], 301)] {
            agree(&[shape], |x| standardize(&x[0], width, EPS), |x| composed(&x[0], width, EPS))?;
        }
        Ok(())
    }

    #[test]
    fn rows_that_do_not_fit_are_refused() -> Result<()> {
        let zeros = |dims: &[usize]| Tensor::zeros(dims, candle_core::DType::F32, &Device::Cpu);
        for (dims, width) in [(&[2, 5][..], 3), (&[2, 0], 1), (&[], 1), (&[2, 4], 0)] {
            assert!(standardize(&zeros(dims)?, width, 1e-5).is_err(), "{dims:?} {width}");
        }
        Ok(())
    }
}
