//! Root-mean-square norms, alone and with a SiLU gate.

use super::{BLOCK, Held, fits, in_blocks, sigmoid, silu_slope, values, vectorized};
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
use crate::cuda::layers;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, DType, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in f32; in `dtype`. `weight` is `[n]`.
pub(crate) fn rms_norm(xs: &Tensor, weight: &Tensor, eps: f64, dtype: DType) -> Result<Tensor> {
    check_shapes(xs, weight)?;
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    if let Some((norm, inner)) = on_kernels(&[xs], weight, (Squares::Mean, eps), dtype) {
        return layers::norm(norm, &xs.to_dtype(inner)?, Some(weight), None)?.to_dtype(dtype);
    }
    let [xs, weight] = [xs, weight].map(|x| x.to_dtype(DType::F32));
    let (xs, weight) = (xs?, weight?);
    let ys = match fits(&[&xs, &weight]) {
        true => in_rows(&xs)?.apply_op2(&weight.contiguous()?, RmsNorm { eps: eps as f32 })?,
        false => composed(&xs, &weight, eps)?,
    };
    ys.to_dtype(dtype)
}

/// `xs + added`, of one shape and dtype, and its [`rms_norm`]. Without a graph one kernel on CUDA: with one, the results of an
/// operation that has two cost more than the sum.
pub(crate) fn rms_norm_of_sum(
    xs: &Tensor,
    added: &Tensor,
    weight: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    if xs.dims() == added.dims() && ![xs, added, weight].iter().any(|x| x.track_op()) {
        check_shapes(xs, weight)?;
        if let Some((norm, inner)) = on_kernels(&[xs, added], weight, (Squares::Mean, eps), xs.dtype())
            && inner == xs.dtype()
            && added.dtype() == inner
        {
            return layers::norm_of_sum(norm, xs, added, weight);
        }
    }
    let sum = (xs + added)?;
    let ys = rms_norm(&sum, weight, eps, sum.dtype())?;
    Ok((sum, ys))
}

/// `x / sqrt(sum(x^2) + eps)` over the last dimension, computed in f32; in the dtype of `xs`.
pub(crate) fn l2_norm(xs: &Tensor, eps: f64) -> Result<Tensor> {
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    if let Some((norm, _)) = on_kernels(&[xs], xs, (Squares::Sum, eps), xs.dtype()) {
        return layers::norm(norm, xs, None, None);
    }
    let n = xs.dims().last().copied().unwrap_or(0).max(1) as f64;
    // A root mean square is the root of a sum over n.
    let weight = Tensor::full((1. / n.sqrt()) as f32, n as usize, xs.device())?;
    rms_norm(xs, &weight, eps / n, xs.dtype())
}

/// What multiplies a norm, or the argument of [`gated`](crate::nn::gated), as a function of its gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// x * sigmoid(x)
    Silu,
    /// 1 / (1 + exp(-x))
    Sigmoid,
}

impl Gate {
    #[inline(always)]
    pub(super) fn value(self, x: f32) -> f32 {
        match self {
            Self::Silu => x * sigmoid(x),
            Self::Sigmoid => sigmoid(x),
        }
    }

    #[inline(always)]
    pub(super) fn slope(self, x: f32) -> f32 {
        match self {
            Self::Silu => silu_slope(x),
            Self::Sigmoid => sigmoid(x) * (1. - sigmoid(x)),
        }
    }

    pub(super) fn composed(self, xs: &Tensor) -> Result<Tensor> {
        match self {
            Self::Silu => xs.silu(),
            Self::Sigmoid => candle_nn::ops::sigmoid(xs),
        }
    }
}

/// [`rms_norm`] times a function of `gate`. `gate` has the elements of `xs` in the same order, in any shape, and gives the
/// result its shape.
pub(crate) fn rms_norm_gated(
    xs: &Tensor,
    weight: &Tensor,
    (gate, kind): (&Tensor, Gate),
    eps: f64,
    dtype: DType,
) -> Result<Tensor> {
    check_shapes(xs, weight)?;
    if gate.elem_count() != xs.elem_count() {
        bail!("rms_norm: gate is {:?}, it must have as many elements as xs, {:?}", gate.dims(), xs.dims());
    }
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    if let Some((norm, inner)) = on_kernels(&[xs, gate], weight, (Squares::Mean, eps), dtype) {
        let (xs, gate) = (xs.to_dtype(inner)?, gate.to_dtype(inner)?);
        return layers::norm(norm, &xs, Some(weight), Some((&gate, kind)))?.to_dtype(dtype);
    }
    let [xs, weight, gate] = [xs, weight, gate].map(|x| x.to_dtype(DType::F32));
    let (xs, weight, gate) = (xs?, weight?, gate?);
    let ys = match fits(&[&xs, &weight, &gate]) {
        true => {
            let op = RmsNormGated(RmsNorm { eps: eps as f32 }, kind);
            xs.contiguous()?.apply_op3(&weight.contiguous()?, &gate.contiguous()?, op)?
        }
        false => (composed(&xs, &weight, eps)?.reshape(gate.shape())? * kind.composed(&gate)?)?,
    };
    ys.to_dtype(dtype)
}

/// The norm that the kernels are to compute and the dtype to give them `tensors` in, the first of which is normalised, if
/// they take these and the weight. In 16 bits only where nothing is lost by that.
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
fn on_kernels(
    tensors: &[&Tensor],
    weight: &Tensor,
    (squares, eps): (Squares, f64),
    result: DType,
) -> Option<(layers::Norm, DType)> {
    let xs = tensors.first()?;
    let width = xs.dims().last().copied()?;
    let factor = match squares {
        Squares::Sum => 1.,
        Squares::Mean => 1. / width as f32,
    };
    let dtype = if tensors.iter().all(|x| x.dtype() == result) { result } else { DType::F32 };
    let norm = layers::Norm { width, centred: false, factor, eps: eps as f32 };
    let all: Vec<&Tensor> = tensors.iter().copied().chain([weight]).collect();
    (layers::takes(&all) && norm.fits(dtype)).then_some((norm, dtype))
}

/// What a norm makes of the squares of a row.
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
#[derive(Debug, Clone, Copy)]
enum Squares {
    Sum,
    Mean,
}

/// A multiple of the right size would be cut into rows that are none.
fn check_shapes(xs: &Tensor, weight: &Tensor) -> Result<()> {
    let n = weight.dims1()?;
    if n == 0 || xs.dims().last() != Some(&n) {
        bail!("rms_norm: xs is {:?}, its last dimension must be the norm's, {n}, and at least 1", xs.dims());
    }
    Ok(())
}

fn composed(xs: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let mean_square = xs.sqr()?.mean_keepdim(D::Minus1)?;
    xs.broadcast_div(&(mean_square + eps)?.sqrt()?)?.broadcast_mul(weight)
}

#[derive(Clone, Copy)]
struct RmsNorm {
    eps: f32,
}

impl RmsNorm {
    /// `1 / sqrt(mean(x^2) + eps)`
    #[inline(always)]
    fn inverse(&self, row: &[f32]) -> f32 {
        1. / (dot(row, row) / row.len() as f32 + self.eps).sqrt()
    }

    #[inline(always)]
    fn forward_row(&self, x: &[f32], weight: &[f32], y: &mut [f32]) {
        let inverse = self.inverse(x);
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = x * inverse * w;
        }
    }

    /// From `dx` = the gradient of y to that of x, in place, with `dweight` added to.
    #[inline(always)]
    fn backward_row(&self, x: &[f32], weight: &[f32], dx: &mut [f32], dweight: &mut [f32]) {
        let inverse = self.inverse(x);
        for i in 0..x.len() {
            dweight[i] += dx[i] * x[i] * inverse;
            dx[i] *= weight[i];
        }
        let mean = dot(x, dx) / x.len() as f32 * inverse * inverse;
        for (dx, x) in dx.iter_mut().zip(x) {
            *dx = inverse * (*dx - x * mean);
        }
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let weight = values(weight, weight_layout)?;
        let (n, runs) = (weight.len(), runs(xs, layout, weight.len())?);
        let block = runs.first().map_or(1, |run| run.len());
        let ys = in_blocks(layout.shape().elem_count(), block, |at, ys| {
            vectorized(
                #[inline(always)]
                || {
                    for (y, x) in ys.chunks_mut(n).zip(runs[at.start / block].chunks(n)) {
                        self.forward_row(x, weight, y);
                    }
                },
            );
        });
        Ok((CpuStorage::F32(ys), layout.shape().clone()))
    }

    fn bwd(
        &self,
        xs: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (shape, weight_shape) = (xs.shape(), weight.shape());
        let xs = xs.contiguous()?;
        let [xs, weight, dy] = [&Held::new(&xs), &Held::new(weight), &Held::new(&dy)];
        let [xs, weight, dy] = [xs.values()?, weight.values()?, dy.values()?];
        let (n, block) = (weight.len(), block_of_rows(weight.len()));
        let mut dx = dy.to_vec();
        let blocks = dx.par_chunks_mut(block).zip(xs.par_chunks(block));
        let dweights = blocks.map(|(dx, xs)| {
            let mut dweight = vec![0.; n];
            vectorized(
                #[inline(always)]
                || {
                    for (dx, x) in dx.chunks_mut(n).zip(xs.chunks(n)) {
                        self.backward_row(x, weight, dx, &mut dweight);
                    }
                },
            );
            dweight
        });
        let dweight = total(dweights.collect(), n);
        let dx = Tensor::from_vec(dx, shape, &Device::Cpu)?;
        Ok((Some(dx), Some(Tensor::from_vec(dweight, weight_shape, &Device::Cpu)?)))
    }
}

struct RmsNormGated(RmsNorm, Gate);

impl CustomOp3 for RmsNormGated {
    fn name(&self) -> &'static str {
        "rms_norm_gated"
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        gate: &CpuStorage,
        gate_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (xs, weight) = (values(xs, layout)?, values(weight, weight_layout)?);
        let gate = values(gate, gate_layout)?;
        let (n, block) = (weight.len(), block_of_rows(weight.len()));
        let ys = in_blocks(xs.len(), block, |at, ys| {
            let (xs, gate) = (&xs[at.clone()], &gate[at]);
            vectorized(
                #[inline(always)]
                || {
                    for ((y, x), gate) in ys.chunks_mut(n).zip(xs.chunks(n)).zip(gate.chunks(n)) {
                        self.0.forward_row(x, weight, y);
                        match self.1 {
                            Gate::Silu => multiply_gate(Gate::Silu, y, gate),
                            Gate::Sigmoid => multiply_gate(Gate::Sigmoid, y, gate),
                        }
                    }
                },
            );
        });
        Ok((CpuStorage::F32(ys), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        xs: &Tensor,
        weight: &Tensor,
        gate: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let shapes = [xs.shape(), weight.shape(), gate.shape()];
        let [xs, weight, gate, dy] = [&Held::new(xs), &Held::new(weight), &Held::new(gate), &Held::new(&dy)];
        let [xs, weight, gate, dy] = [xs.values()?, weight.values()?, gate.values()?, dy.values()?];
        let (n, block) = (weight.len(), block_of_rows(weight.len()));
        let (mut dx, mut dgate) = (vec![0.; xs.len()], vec![0.; xs.len()]);
        let inputs = xs.par_chunks(block).zip(gate.par_chunks(block)).zip(dy.par_chunks(block));
        let outputs = dx.par_chunks_mut(block).zip(dgate.par_chunks_mut(block));
        let dweights = outputs.zip(inputs).map(|((dx, dgate), ((xs, gate), dy))| {
            let mut dweight = vec![0.; n];
            vectorized(
                #[inline(always)]
                || {
                    for from in (0..xs.len()).step_by(n) {
                        let row = from..from + n;
                        let (x, gate, dy) = (&xs[row.clone()], &gate[row.clone()], &dy[row.clone()]);
                        let (dx, dgate) = (&mut dx[row.clone()], &mut dgate[row]);
                        self.0.forward_row(x, weight, dgate);
                        for (((dx, dgate), g), dy) in dx.iter_mut().zip(dgate).zip(gate).zip(dy) {
                            *dx = dy * self.1.value(*g);
                            *dgate *= dy * self.1.slope(*g);
                        }
                        self.0.backward_row(x, weight, dx, &mut dweight);
                    }
                },
            );
            dweight
        });
        let dweight = total(dweights.collect(), n);
        let tensor = |values, shape: &Shape| Tensor::from_vec(values, shape, &Device::Cpu).map(Some);
        Ok((tensor(dx, shapes[0])?, tensor(dweight, shapes[1])?, tensor(dgate, shapes[2])?))
    }
}

#[inline(always)]
fn multiply_gate(kind: Gate, y: &mut [f32], gate: &[f32]) {
    for (y, g) in y.iter_mut().zip(gate) {
        *y *= kind.value(*g);
    }
}

/// A tensor whose rows, along the last dimension, each lie in one piece.
fn in_rows(xs: &Tensor) -> Result<Tensor> {
    let (len, _) = pieces(xs.layout());
    if xs.dims().last().is_some_and(|n| len.is_multiple_of(*n)) { Ok(xs.clone()) } else { xs.contiguous() }
}

/// Whole rows of `n` that lie one behind the other, as many in each of the slices, except in the last.
fn runs<'a>(xs: &'a CpuStorage, layout: &Layout, n: usize) -> Result<Vec<&'a [f32]>> {
    let CpuStorage::F32(all) = xs else { bail!("an f32 tensor is needed") };
    let (len, starts) = pieces(layout);
    match starts.as_slice() {
        [start] => Ok(all[*start..start + len].chunks(block_of_rows(n)).collect()),
        _ => Ok(starts.into_iter().map(|start| &all[start..start + len]).collect()),
    }
}

/// How many elements lie one behind the other, and where all such pieces begin.
fn pieces(layout: &Layout) -> (usize, Vec<usize>) {
    let (mut len, mut starts) = (1, vec![layout.start_offset()]);
    let mut dims: Vec<_> = layout.dims().iter().copied().zip(layout.stride().iter().copied()).collect();
    while let Some((dim, _)) = dims.pop_if(|(dim, stride)| *dim == 1 || *stride == len) {
        len *= dim;
    }
    for (dim, stride) in dims {
        starts = starts.iter().flat_map(|start| (0..dim).map(move |i| start + i * stride)).collect();
    }
    (len, starts)
}

/// Elements that a thread takes at a time: whole rows of `n`.
fn block_of_rows(n: usize) -> usize {
    BLOCK.div_ceil(n) * n
}

fn total(parts: Vec<Vec<f32>>, n: usize) -> Vec<f32> {
    let mut sum = vec![0.; n];
    for part in parts {
        for (sum, part) in sum.iter_mut().zip(part) {
            *sum += part;
        }
    }
    sum
}

/// In eight running sums: one alone would wait for every addition, and round more.
#[inline(always)]
fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut sums = [0f32; 8];
    let (xs, ys) = (x.chunks_exact(8), y.chunks_exact(8));
    let rest: f32 = xs.remainder().iter().zip(ys.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in xs.zip(ys) {
        for i in 0..8 {
            sums[i] += x[i] * y[i];
        }
    }
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::fused::tests::agree;
    use DType::F32;

    /// With a small one the gradient of a single channel is all rounding: it is the difference of two numbers that differ
    /// by `eps / x^2` of themselves.
    const EPS: f64 = 1.;
    const SHAPES: [(&[usize], usize); 4] =
        [(&[1, 1], 1), (&[3, 5], 5), (&[2, 100, 3, 96], 96), (&[70, 301], 301)];

    #[test]
    fn shapes_that_do_not_fit_are_refused() -> Result<()> {
        let zeros = |dims: &[usize]| Tensor::zeros(dims, F32, &Device::Cpu);
        let (xs, weight) = (zeros(&[3, 4])?, zeros(&[4])?);
        for wrong in [&[2, 2][..], &[4, 3], &[8], &[3, 8], &[]] {
            let wrong = zeros(wrong)?;
            assert!(rms_norm(&wrong, &weight, EPS, F32).is_err(), "{wrong:?}");
            assert!(rms_norm(&xs, &wrong, EPS, F32).is_err(), "{wrong:?}");
            assert!(rms_norm_gated(&wrong, &weight, (&wrong, Gate::Silu), EPS, F32).is_err(), "{wrong:?}");
        }
        for gate in [&[2, 4][..], &[4], &[13], &[]] {
            assert!(rms_norm_gated(&xs, &weight, (&zeros(gate)?, Gate::Silu), EPS, F32).is_err(), "{gate:?}");
        }
        assert!(rms_norm(&zeros(&[3, 0])?, &zeros(&[0])?, EPS, F32).is_err());
        Ok(())
    }

    #[test]
    fn agrees_with_its_composition() -> Result<()> {
        for (shape, n) in SHAPES {
            agree(&[shape, &[n]], |x| rms_norm(&x[0], &x[1], EPS, F32), |x| composed(&x[0], &x[1], EPS))?;
        }
        Ok(())
    }

    /// Heads among others, rows among others, and rows that are not in one piece.
    #[test]
    fn strided_rows_agree_with_their_composition() -> Result<()> {
        let views: [fn(&Tensor) -> Result<Tensor>; 3] = [
            |x| x.narrow(2, 1, 3),
            |x| x.narrow(1, 2, 2)?.transpose(0, 1),
            |x| x.transpose(2, 3)?.narrow(2, 3, 4)?.narrow(3, 0, 8),
        ];
        for view in views {
            let (fused, plain) = (|x: &Tensor| view(x), |x: &Tensor| view(x)?.contiguous());
            agree(
                &[&[3, 5, 8, 8], &[8]],
                |x| rms_norm(&fused(&x[0])?, &x[1], EPS, F32),
                |x| composed(&plain(&x[0])?, &x[1], EPS),
            )?;
        }
        Ok(())
    }

    #[test]
    fn gated_agrees_with_its_composition() -> Result<()> {
        for ((shape, n), kind) in SHAPES.into_iter().flat_map(|s| [(s, Gate::Silu), (s, Gate::Sigmoid)]) {
            let gate = &[shape[0], shape[1..].iter().product()];
            agree(
                &[shape, &[n], gate],
                |x| rms_norm_gated(&x[0], &x[1], (&x[2], kind), EPS, F32),
                |x| composed(&x[0], &x[1], EPS)?.reshape(x[2].shape())? * kind.composed(&x[2])?,
            )?;
        }
        Ok(())
    }
}
