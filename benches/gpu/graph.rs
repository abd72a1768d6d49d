//! Graphs that measure Candle's part of a backward pass: each gradient it is given costs it zeros and a sum.

use anyhow::Result;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp3, Layout, Shape, Tensor, Var, bail};

/// A loss whose gradient with respect to `x` is `grad`.
pub fn with_gradient(x: &Tensor, grad: &Tensor) -> Result<Tensor> {
    Ok(x.apply_op1(Gradient(grad.clone()))?)
}

/// A function of three tensors, the first of which is its result, whose gradients cost nothing to compute.
pub fn free([q, k, v]: &[Var; 3]) -> Result<Tensor> {
    let gradients = [q, k, v].map(|x| x.as_detached_tensor());
    Ok(q.apply_op3(k, v, Free(gradients))?)
}

struct Gradient(Tensor);

impl CustomOp1 for Gradient {
    fn name(&self) -> &'static str {
        "gradient"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        bail!("this bench runs on a GPU")
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let first = layout.narrow(0, 0, 1)?;
        Ok((x.affine(&Layout::contiguous_with_offset((), first.start_offset()), 1., 0.)?, Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

struct Free([Tensor; 3]);

impl CustomOp3 for Free {
    fn name(&self) -> &'static str {
        "free"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        bail!("this bench runs on a GPU")
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        layout: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        Ok((x.affine(layout, 1., 0.)?, layout.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [q, k, v] = self.0.clone();
        Ok((Some(q), Some(k), Some(v)))
    }
}
