//! Handing a storage to the op that stands for it in the graph.

use std::sync::Mutex;

use candle_core::{CpuStorage, CudaStorage, MetalStorage, Result, Shape, Storage, bail};

/// A result that was computed before its op was made; making the op takes it.
pub(super) struct Slot(Mutex<Option<(Storage, Shape)>>);

impl Slot {
    pub fn new(result: (Storage, Shape)) -> Self {
        Self(Mutex::new(Some(result)))
    }

    pub fn take<S>(&self, name: &str, on: impl Fn(Storage) -> Option<S>) -> Result<(S, Shape)> {
        let Some((storage, shape)) = super::lock(&self.0).take() else { bail!("{name}: its op ran twice") };
        match on(storage) {
            Some(storage) => Ok((storage, shape)),
            None => bail!("{name}: the result is on another device than the inputs"),
        }
    }
}

pub(super) fn cpu(storage: Storage) -> Option<CpuStorage> {
    if let Storage::Cpu(s) = storage { Some(s) } else { None }
}

pub(super) fn cuda(storage: Storage) -> Option<CudaStorage> {
    if let Storage::Cuda(s) = storage { Some(s) } else { None }
}

pub(super) fn metal(storage: Storage) -> Option<MetalStorage> {
    if let Storage::Metal(s) = storage { Some(s) } else { None }
}
