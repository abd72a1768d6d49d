//! The matrix product of a projection.

use super::product::{Matrix, product};
use super::projection::{Stored, project};
use super::{Held, fits, values};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, Device, Layout, Result, Shape, Storage, Tensor, bail};

/// `xs W^T` in one operation, whatever the shapes: `xs` of shape `[.., inputs]`, `weight` `[outputs, inputs]`, the result
/// of shape `dims`, which has to have the right number of elements. Of one dtype that the device has a matrix product for;
/// on a CPU the weight may have 16 bits where `xs` is f32.
///
/// With Candle's operations the reshapes around the product and the transposition of the weight would each cost passes
/// over memory in the backward.
pub(crate) fn linear(xs: &Tensor, weight: &Tensor, dims: &[usize]) -> Result<Tensor> {
    if xs.device().is_metal() {
        return composed(xs, weight, dims);
    }
    let product = Linear { dims: dims.into() };
    xs.contiguous()?.apply_op2(&weight.contiguous()?, product)
}

fn composed(xs: &Tensor, weight: &Tensor, dims: &[usize]) -> Result<Tensor> {
    xs.reshape(((), weight.dim(1)?))?.matmul(&weight.t()?)?.reshape(dims)
}

struct Linear {
    dims: Shape,
}

impl Linear {
    fn forward<S: BackendStorage>(&self, x: &S, xl: &Layout, w: &S, wl: &Layout) -> Result<(S, Shape)> {
        let (outputs, inputs) = wl.shape().dims2()?;
        let rows = rows(xl.shape(), wl.shape(), &self.dims)?;
        let left = Layout::contiguous_with_offset((rows, inputs), xl.start_offset());
        let right = Layout::new((inputs, outputs).into(), vec![1, inputs], wl.start_offset());
        Ok((x.matmul(w, (1, rows, outputs, inputs), &left, &right)?, self.dims.clone()))
    }
}

/// How many rows `xs` has, if it fits a weight and a result of these shapes.
pub(super) fn rows(xs: &Shape, weight: &Shape, result: &Shape) -> Result<usize> {
    let (outputs, inputs) = weight.dims2()?;
    let rows = xs.elem_count() / inputs.max(1);
    if xs.dims().last() != Some(&inputs) || result.elem_count() != rows * outputs {
        bail!("linear: an input of shape {xs:?} and a weight of {weight:?} do not give {result:?}");
    }
    Ok(rows)
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let CpuStorage::F32(_) = x else {
            return self.forward(x, xl, w, wl);
        };
        let ((outputs, inputs), rows) = (wl.shape().dims2()?, rows(xl.shape(), wl.shape(), &self.dims)?);
        let from = wl.start_offset();
        let weight = from..from + outputs * inputs;
        let weight = match w {
            CpuStorage::F32(w) => Stored::F32(&w[weight]),
            CpuStorage::F16(w) => Stored::F16(&w[weight]),
            CpuStorage::BF16(w) => Stored::BF16(&w[weight]),
            _ => bail!("linear: the weight is {:?}, it must be F32, F16 or BF16", w.dtype()),
        };
        Ok((CpuStorage::F32(project(values(x, xl)?, rows, weight, outputs)), self.dims.clone()))
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        xl: &Layout,
        w: &CudaStorage,
        wl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.forward(x, xl, w, wl)
    }

    fn bwd(
        &self,
        xs: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (outputs, inputs) = weight.dims2()?;
        let rows = rows(xs.shape(), weight.shape(), &self.dims)?;
        let dy = dy.contiguous()?.reshape((rows, outputs))?;
        let dx = match xs.track_op() {
            true => Some(input_gradient(&dy, &weight.detach().to_dtype(xs.dtype())?)?.reshape(xs.shape())?),
            false => None,
        };
        let dweight = match weight.track_op() {
            true => {
                Some(weight_gradient(&dy, &xs.detach().reshape((rows, inputs))?)?.to_dtype(weight.dtype())?)
            }
            false => None,
        };
        Ok((dx, dweight))
    }
}

/// `dy W` for `dy` of shape `[rows, outputs]`.
pub(super) fn input_gradient(dy: &Tensor, weight: &Tensor) -> Result<Tensor> {
    multiplied(dy, weight, |dy, weight| (dy, weight), || dy.matmul(weight))
}

fn weight_gradient(dy: &Tensor, xs: &Tensor) -> Result<Tensor> {
    multiplied(dy, xs, |dy, xs| (dy.transposed(), xs), || dy.t()?.matmul(xs))
}

/// The product of two matrices where it is ours to compute, another way elsewhere.
fn multiplied(
    a: &Tensor,
    b: &Tensor,
    arranged: impl for<'a> Fn(Matrix<'a>, Matrix<'a>) -> (Matrix<'a>, Matrix<'a>),
    elsewhere: impl Fn() -> Result<Tensor>,
) -> Result<Tensor> {
    if !fits(&[a, b]) {
        return elsewhere();
    }
    let (a_held, b_held) = (Held::new(a), Held::new(b));
    let matrix = |values, of: &Tensor| Matrix::new(values, of.dim(0)?, of.dim(1)?);
    let (a, b) = arranged(matrix(a_held.values()?, a)?, matrix(b_held.values()?, b)?);
    let shape = (a.rows(), b.cols());
    Tensor::from_vec(product(a, b), shape, &Device::Cpu)
}

/// The products of two batches of matrices, `[B, M, K]` and `[B, K, N]`, which need not be contiguous.
///
/// Candle's own reads a file at each call to learn how many cores there are.
pub(crate) fn batched_product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let ((batch, rows, inner), (_, _, cols)) = (a.dims3()?, b.dims3()?);
    if !fits(&[a, b]) || a.track_op() || b.track_op() || b.dims() != [batch, inner, cols] {
        return a.matmul(b);
    }
    let held = [a, b].map(|x| x.storage_and_layout());
    let matrix = |i: usize, entry: usize| {
        let (storage, layout) = &held[i];
        let Storage::Cpu(CpuStorage::F32(all)) = &**storage else {
            bail!("a tensor in f32 on a CPU is needed")
        };
        let (dims, strides) = (layout.dims(), layout.stride());
        let from = (layout.start_offset() + entry * strides[0]).min(all.len());
        Matrix::strided(&all[from..], [dims[1], dims[2]], [strides[1], strides[2]])
    };
    let mut products = Vec::with_capacity(batch * rows * cols);
    for entry in 0..batch {
        products.extend(product(matrix(0, entry)?, matrix(1, entry)?));
    }
    Tensor::from_vec(products, (batch, rows, cols), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::fused::tests::agree;
    use candle_core::DType;

    #[test]
    fn agrees_with_its_composition() -> Result<()> {
        for (shape, outputs, dims) in
            [(&[1, 1][..], 1, &[1, 1][..]), (&[7, 5], 3, &[7, 3]), (&[2, 9, 16], 24, &[2, 9, 4, 6])]
        {
            let inputs = shape[shape.len() - 1];
            let shapes = [shape, &[outputs, inputs]];
            agree(&shapes, |x| linear(&x[0], &x[1], dims), |x| composed(&x[0], &x[1], dims))?;
        }
        Ok(())
    }

    /// Rounded to 16 bits inside: both know the same weights, and the input's gradient goes through them.
    #[test]
    fn frozen_weights_of_16_bits_agree_with_what_they_are_in_f32() -> Result<()> {
        let weight = Tensor::randn(0f32, 1., (11, 70), &Device::Cpu)?;
        for dtype in [DType::BF16, DType::F16] {
            let narrow = weight.to_dtype(dtype)?;
            let wide = narrow.to_dtype(DType::F32)?;
            let dims = [3, 5, 11];
            agree(&[&[3, 5, 70]], |x| linear(&x[0], &narrow, &dims), |x| composed(&x[0], &wide, &dims))?;
        }
        Ok(())
    }

    #[test]
    fn batches_of_parts_of_matrices_are_multiplied() -> Result<()> {
        let random = |dims: &[usize]| Tensor::randn(0f32, 1., dims, &Device::Cpu);
        let a = random(&[3, 9, 7])?.narrow(1, 2, 4)?.narrow(2, 1, 5)?;
        let b = random(&[3, 6, 8])?.transpose(1, 2)?.narrow(1, 3, 5)?;
        let expected = a.contiguous()?.matmul(&b.contiguous()?)?;
        let error = (batched_product(&a, &b)? - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(error < 1e-5, "{error:e}");
        assert!(batched_product(&a, &a).is_err());
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() -> Result<()> {
        let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu);
        assert!(linear(&zeros(&[2, 3])?, &zeros(&[4, 5])?, &[2, 4]).is_err());
        assert!(linear(&zeros(&[2, 3])?, &zeros(&[4, 3])?, &[2, 5]).is_err());
        Ok(())
    }
}
