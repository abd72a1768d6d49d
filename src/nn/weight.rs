//! The large matrices of a model, projections and embeddings: kept as they are stored, or quantized.

use crate::nn::fused::{self, divides};
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use rayon::prelude::*;
use std::borrow::Cow;
use std::cell::Cell;
use std::sync::Arc;

/// How the large matrices of a model are quantized when it is loaded.
///
/// A matrix whose rows are not whole blocks takes the next format down this list that fits: `Q4K` (blocks of 256
/// elements, 4.5 bits each), `Q8_0` (32 elements, 8.5 bits each), as stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// Eight bits and a scale for every 32 elements.
    Q8_0,
    /// Four bits, with a scale and a minimum for every 32 elements in blocks of 256.
    Q4K,
}

impl Quantization {
    fn for_rows_of(self, inputs: usize) -> Option<GgmlDType> {
        let formats = match self {
            Self::Q8_0 => &[GgmlDType::Q8_0][..],
            Self::Q4K => &[GgmlDType::Q4K, GgmlDType::Q8_0],
        };
        formats.iter().copied().find(|format| divides(*format, inputs))
    }
}

/// What becomes of the large matrices of a model while it is built.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Keeping {
    /// 16 bits stay 16 bits where parameters are asked for in f32. All else would be read as it is asked for.
    pub stored: bool,
    pub quantize: Option<Quantization>,
}

thread_local! {
    // Not arguments: they would have to go through the constructor of every layer, in which a `VarBuilder` is all that
    // says where parameters come from and in which form.
    static KEEPING: Cell<Keeping> = const { Cell::new(Keeping { stored: false, quantize: None }) };
    static READING: Cell<bool> = const { Cell::new(false) };
}

/// Sets a cell, and sets it back at the end, an early one too.
struct Scope<T: Copy + 'static>(&'static std::thread::LocalKey<Cell<T>>, T);

impl<T: Copy> Scope<T> {
    fn new(cell: &'static std::thread::LocalKey<Cell<T>>, value: T) -> Self {
        Self(cell, cell.replace(value))
    }
}

impl<T: Copy> Drop for Scope<T> {
    fn drop(&mut self) {
        self.0.set(self.1);
    }
}

/// Builds something whose large matrices are kept in this way.
pub(crate) fn keeping<R>(keeping: Keeping, build: impl FnOnce() -> R) -> R {
    let _scope = Scope::new(&KEEPING, keeping);
    build()
}

/// Reads large matrices, to be made a [`Weight`] of.
pub(crate) fn as_stored<R>(read: impl FnOnce() -> R) -> R {
    let _scope = Scope::new(&READING, true);
    read()
}

/// The dtype in which a checkpoint gives a tensor that it stores in another than is asked for.
pub(crate) fn read_dtype(stored: DType, asked: DType) -> DType {
    let narrow = matches!(stored, DType::F16 | DType::BF16);
    if narrow && asked == DType::F32 && READING.get() && KEEPING.get().stored { stored } else { asked }
}

/// A matrix `[outputs, inputs]`, or `[tokens, width]`.
#[derive(Debug, Clone)]
pub(crate) enum Weight {
    Dense(Tensor),
    Quantized(Arc<QTensor>),
}

impl Weight {
    /// A parameter by its name.
    pub fn get(vb: &VarBuilder, shape: (usize, usize), name: &str, init: Init) -> Result<Self> {
        Self::new(as_stored(|| vb.get_with_hints(shape, name, init))?)
    }

    /// A matrix at hand. One that is being trained stays what it is: nothing else would follow its updates.
    pub fn new(tensor: Tensor) -> Result<Self> {
        let format = match (KEEPING.get().quantize, tensor.dims()) {
            (Some(quantization), [_, inputs]) if !tensor.track_op() => quantization.for_rows_of(*inputs),
            _ => None,
        };
        match format {
            Some(format) => Ok(Self::Quantized(Arc::new(quantized(&tensor, format)?))),
            None => Ok(Self::Dense(tensor)),
        }
    }

    /// Number of rows.
    pub fn outputs(&self) -> Result<usize> {
        match self {
            Self::Dense(tensor) => tensor.dim(0),
            Self::Quantized(tensor) => Ok(tensor.shape().dims2()?.0),
        }
    }

    /// `xs W^T` of shape `dims`, in the dtype of `xs`. Sums are in f32 on a CPU, which has no other product there.
    pub fn project_to(&self, xs: &Tensor, dims: &[usize]) -> Result<Tensor> {
        let dtype = if xs.device().is_cpu() { DType::F32 } else { xs.dtype() };
        match self {
            Self::Quantized(weight) => fused::quantized_linear(&xs.to_dtype(DType::F32)?, weight, dims),
            // The product reads these 16 bits itself. It has no gradient for them.
            Self::Dense(weight) if dtype == DType::F32 && is_frozen_half(weight) => {
                fused::linear(&xs.to_dtype(dtype)?, weight, dims)
            }
            Self::Dense(weight) => fused::linear(&xs.to_dtype(dtype)?, &weight.to_dtype(dtype)?, dims),
        }?
        .to_dtype(xs.dtype())
    }

    /// The rows of these tokens, `[tokens, width]`.
    pub fn rows(&self, tokens: &Tensor, dtype: DType) -> Result<Tensor> {
        match self {
            Self::Dense(table) => table.index_select(tokens, 0)?.to_dtype(dtype),
            Self::Quantized(table) => table.embedding(tokens)?.to_dtype(dtype),
        }
    }
}

fn is_frozen_half(weight: &Tensor) -> bool {
    matches!(weight.dtype(), DType::F16 | DType::BF16) && weight.device().is_cpu() && !weight.track_op()
}

/// Rows that are widened at a time.
const PANEL: usize = 1024;

/// A panel of rows at a time, on as many threads as there are: widened as a whole, the head of a small model would be
/// larger than all the rest of it.
fn quantized(tensor: &Tensor, format: GgmlDType) -> Result<QTensor> {
    let (rows, inputs) = tensor.dims2()?;
    let panel = |from: usize| -> Result<Vec<u8>> {
        let panel = tensor.narrow(0, from, PANEL.min(rows - from))?.to_device(&Device::Cpu)?;
        Ok(QTensor::quantize(&panel, format)?.data()?.into_owned())
    };
    let starts: Vec<usize> = (0..rows).step_by(PANEL).collect();
    let panels: Vec<Vec<u8>> = starts.into_par_iter().map(panel).collect::<Result<_>>()?;
    let storage = QStorage::from_data(Cow::Owned(panels.concat()), tensor.device(), format)?;
    QTensor::new(storage, (rows, inputs))
}
