//! Layer norm: `(x - mean) / sqrt(variance + eps)`, then a weight and a bias.

use super::{BLOCK, Held, fits, values, vectorized};
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
use crate::cuda::layers;
use candle_core::{CpuStorage, CustomOp1, D, DType, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// A layer norm of every `width` numbers of the last dimension by themselves, computed in f32; in `dtype`. `weight` and `bias` have
/// a number for each of all.
pub(crate) fn layer_norm(
    xs: &Tensor,
    (weight, bias): (&Tensor, Option<&Tensor>),
    width: usize,
    eps: f64,
    dtype: DType,
) -> Result<Tensor> {
    let last = xs.dims().last().copied().unwrap_or(0);
    let parameters = [Some(weight), bias].into_iter().flatten().all(|x| x.dims() == [last]);
    if width == 0 || last == 0 || !last.is_multiple_of(width) || !parameters {
        bail!(
            "layer_norm: xs is {:?}, its last dimension must be a multiple of {width}, at least 1, and the norm's, {:?}",
            xs.dims(),
            weight.dims()
        );
    }
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    if last == width
        && let Some((norm, inner)) = on_kernels(&[Some(xs), Some(weight), bias], width, eps, dtype)
    {
        return layers::layer_norm(norm, &xs.to_dtype(inner)?, Some(weight), bias)?.to_dtype(dtype);
    }
    let f32 = |x: &Tensor| x.to_dtype(DType::F32);
    let ys = standardize(&f32(xs)?, width, eps)?.broadcast_mul(&f32(weight)?)?;
    match bias {
        Some(bias) => ys.broadcast_add(&f32(bias)?)?.to_dtype(dtype),
        None => ys.to_dtype(dtype),
    }
}

/// `(x - mean) / sqrt(variance + eps)`, f32.
fn standardize(xs: &Tensor, width: usize, eps: f64) -> Result<Tensor> {
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    if let Some((norm, _)) = on_kernels(&[Some(xs)], width, eps, DType::F32) {
        let rows = xs.reshape(((), width))?;
        return layers::layer_norm(norm, &rows, None, None)?.reshape(xs.shape());
    }
    match fits(&[xs]) {
        true => xs.contiguous()?.apply_op1(Standardize { width, eps: eps as f32 }),
        false => composed(xs, width, eps),
    }
}

/// The norm that the kernels are to compute and the dtype to give them the first of `tensors` in, if they take these.
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
fn on_kernels(
    tensors: &[Option<&Tensor>],
    width: usize,
    eps: f64,
    result: DType,
) -> Option<(layers::Norm, DType)> {
    let all: Vec<&Tensor> = tensors.iter().copied().flatten().collect();
    let dtype = if all.first()?.dtype() == result { result } else { DType::F32 };
    let norm = layers::Norm { width, centred: true, factor: 1. / width as f32, eps: eps as f32 };
    (layers::takes(&all) && norm.fits(dtype)).then_some((norm, dtype))
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
        let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu);
        for (dims, width, weight) in
            [(&[2, 5][..], 3, 5), (&[2, 0], 1, 0), (&[], 1, 1), (&[2, 4], 0, 4), (&[2, 4], 2, 2)]
        {
            let norm = layer_norm(&zeros(dims)?, (&zeros(&[weight])?, None), width, 1e-5, DType::F32);
            assert!(norm.is_err(), "{dims:?} {width}");
        }
        Ok(())
    }
}
