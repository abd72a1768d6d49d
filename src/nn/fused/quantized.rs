//! The matrix product of a projection whose weights are quantized.

use super::linear::{input_gradient, rows};
use super::projection::{Block, Q4K, Q8_0, Stored, project};
use super::values;
use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{CpuStorage, CustomOp1, Device, Layout, Module, Result, Shape, Tensor, bail};
use std::sync::Arc;

/// `xs W^T` for `xs` in f32 and a weight in blocks of q8_0 or q4_k, as [`linear`](super::linear).
///
/// Candle's own product rounds every row of `xs` to eight bits on a CPU; here it stays what it is.
pub(crate) fn quantized_linear(xs: &Tensor, weight: &Arc<QTensor>, dims: &[usize]) -> Result<Tensor> {
    if !xs.device().is_cpu() {
        return QMatMul::from_arc(weight.clone())?.forward(xs)?.reshape(dims);
    }
    xs.contiguous()?.apply_op1(Quantized { weight: weight.clone(), dims: dims.into() })
}

struct Quantized {
    weight: Arc<QTensor>,
    dims: Shape,
}

impl CustomOp1 for Quantized {
    fn name(&self) -> &'static str {
        "quantized linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (outputs, _) = self.weight.shape().dims2()?;
        let rows = rows(xl.shape(), self.weight.shape(), &self.dims)?;
        let data = self.weight.data()?;
        let stored = match self.weight.dtype() {
            GgmlDType::Q8_0 => Stored::Q8_0(data.as_chunks().0),
            GgmlDType::Q4K => Stored::Q4K(data.as_chunks().0),
            dtype => bail!("quantized linear: the weight is {dtype:?}, it must be q8_0 or q4_k"),
        };
        Ok((CpuStorage::F32(project(values(x, xl)?, rows, stored, outputs)), self.dims.clone()))
    }

    fn bwd(&self, xs: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (outputs, _) = self.weight.shape().dims2()?;
        let dy = dy.contiguous()?.reshape(((), outputs))?;
        let weight = self.weight.dequantize(&Device::Cpu)?;
        Ok(Some(input_gradient(&dy, &weight)?.reshape(xs.shape())?))
    }
}

/// Whether rows of so many elements are whole blocks.
pub(crate) fn divides(dtype: GgmlDType, inputs: usize) -> bool {
    let block = match dtype {
        GgmlDType::Q8_0 => Q8_0::LEN,
        GgmlDType::Q4K => Q4K::LEN,
        _ => return false,
    };
    inputs > 0 && inputs.is_multiple_of(block)
}
