//! Graphs that measure Candle's part of a backward pass: each gradient it is given costs it zeros and a sum.

use anyhow::Result;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Shape, Tensor, Var, bail};

use crate::given::Given;

/// A loss whose gradient with respect to `x` is `grad`.
pub fn with_gradient(x: &Tensor, grad: &Tensor) -> Result<Tensor> {
    Ok(x.apply_op1(Gradient(grad.clone()))?)
}

/// A function of three tensors, the last of which is its result, whose gradients cost nothing to compute.
pub fn free([q, k, v]: [&Var; 3]) -> Result<Tensor> {
    let gradients = [v, k, q].map(|x| x.as_detached_tensor());
    Ok(v.apply_op3(k, q, Given(gradients))?)
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
