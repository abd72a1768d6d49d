//! The matrix product of a projection.

use super::product::{Matrix, product, product_of};
use super::{Held, fits, values};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, Device, Layout, Result, Shape, Tensor, bail};

/// `xs W^T` in one operation, whatever the shapes: `xs` of shape `[.., inputs]`, `weight` `[outputs, inputs]`, the result
/// of shape `dims`, which has to have the right number of elements. Any dtype that the device has a matrix product for.
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
        let rows = self.rows(xl.shape(), wl.shape())?;
        let left = Layout::contiguous_with_offset((rows, inputs), xl.start_offset());
        let right = Layout::new((inputs, outputs).into(), vec![1, inputs], wl.start_offset());
        Ok((x.matmul(w, (1, rows, outputs, inputs), &left, &right)?, self.dims.clone()))
    }

    fn rows(&self, xs: &Shape, weight: &Shape) -> Result<usize> {
        let (outputs, inputs) = weight.dims2()?;
        let rows = xs.elem_count() / inputs.max(1);
        if xs.dims().last() != Some(&inputs) || self.dims.elem_count() != rows * outputs {
            bail!("linear: an input of shape {xs:?} and a weight of {weight:?} do not give {:?}", self.dims);
        }
        Ok(rows)
    }
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
        let (CpuStorage::F32(_), CpuStorage::F32(_)) = (x, w) else {
            return self.forward(x, xl, w, wl);
        };
        let ((outputs, inputs), rows) = (wl.shape().dims2()?, self.rows(xl.shape(), wl.shape())?);
        let xs = Matrix::new(values(x, xl)?, rows, inputs)?;
        let weight = Matrix::new(values(w, wl)?, outputs, inputs)?;
        let tokens = match xl.dims() {
            [_, tokens, _, ..] => *tokens,
            _ => rows,
        };
        Ok((CpuStorage::F32(product_of(tokens, xs, weight.transposed())), self.dims.clone()))
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
        let rows = self.rows(xs.shape(), weight.shape())?;
        let dy = dy.contiguous()?.reshape((rows, outputs))?;
        if fits(&[xs, weight, &dy]) {
            let held = [&Held::new(xs), &Held::new(weight), &Held::new(&dy)];
            let [x, w, d] = [held[0].values()?, held[1].values()?, held[2].values()?];
            let (x, w) = (Matrix::new(x, rows, inputs)?, Matrix::new(w, outputs, inputs)?);
            let d = Matrix::new(d, rows, outputs)?;
            let gradient = |of: &Tensor, a: Matrix, b: Matrix| match of.track_op() {
                true => Tensor::from_vec(product(a, b), of.shape(), &Device::Cpu).map(Some),
                false => Ok(None),
            };
            return Ok((gradient(xs, d, w)?, gradient(weight, d.transposed(), x)?));
        }
        let dx = match xs.track_op() {
            true => Some(dy.matmul(&weight.detach())?.reshape(xs.shape())?),
            false => None,
        };
        let dweight = match weight.track_op() {
            true => Some(dy.t()?.matmul(&xs.detach().reshape((rows, inputs))?)?),
            false => None,
        };
        Ok((dx, dweight))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::fused::tests::agree;

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

    #[test]
    fn shapes_that_do_not_fit_are_refused() -> Result<()> {
        let zeros = |dims: &[usize]| Tensor::zeros(dims, candle_core::DType::F32, &candle_core::Device::Cpu);
        assert!(linear(&zeros(&[2, 3])?, &zeros(&[4, 5])?, &[2, 4]).is_err());
        assert!(linear(&zeros(&[2, 3])?, &zeros(&[4, 3])?, &[2, 5]).is_err());
        Ok(())
    }
}
