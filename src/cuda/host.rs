//! The CPU in the place of a CUDA device, for the kernels that are compiled for it.

use std::cell::Cell;
use std::ffi::c_void;
use std::marker::PhantomData;

use candle_core::{CpuStorage, DType, Device, Result, Storage, bail};
use half::{bf16, f16};

use super::route::Card;

pub(super) type Guard<'a> = PhantomData<&'a Storage>;

/// What the kernels are told they run on: an H200, by its numbers.
const H200: Card = Card { multiprocessors: 132, shared_memory: 227 * 1024, major: 9, minor: 0 };

thread_local! {
    static CARD: Cell<Option<Card>> = const { Cell::new(None) };
}

/// Whether this thread's tensors on the CPU are for the kernels.
pub(crate) fn on() -> bool {
    CARD.get().is_some()
}

/// Test equipment: the CUDA kernels on CPU tensors.
pub mod cuda_host {
    use super::{CARD, Card, H200};

    unsafe extern "C" {
        fn cla_host_order(seed: u32);
    }

    /// Runs `f`, whose operators on CPU tensors go to the CUDA kernels that were compiled for the host.
    pub fn run<R>(f: impl FnOnce() -> R) -> R {
        on(H200, f)
    }

    /// As [`run`], on a GPU with so many multiprocessors and so much shared memory for a block.
    pub fn run_on<R>(multiprocessors: usize, shared_memory: usize, f: impl FnOnce() -> R) -> R {
        on(Card { multiprocessors, shared_memory, ..H200 }, f)
    }

    /// In which order the threads of a block take turns; 0 is the order of their numbers.
    pub fn order(seed: u32) {
        // SAFETY: it takes any number and stores it.
        unsafe { cla_host_order(seed) }
    }

    fn on<R>(card: Card, f: impl FnOnce() -> R) -> R {
        /// Puts back what was there, after a panic too.
        struct Restore(Option<Card>);
        impl Drop for Restore {
            fn drop(&mut self) {
                CARD.set(self.0);
            }
        }
        let _restore = Restore(CARD.replace(Some(card)));
        f()
    }
}

pub(super) struct Machine;

impl Machine {
    pub fn of(device: &Device) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self),
            _ => bail!("the tensors are on {device:?}, the kernels for the host need them on the CPU"),
        }
    }

    pub fn card(&self) -> Result<Card> {
        Ok(CARD.get().unwrap_or(H200))
    }

    pub fn stream(&self) -> *mut c_void {
        std::ptr::null_mut()
    }

    /// Memory that holds NaN, so that what a kernel forgets to write shows.
    pub fn allocate(&self, dtype: DType, len: usize) -> Result<Storage> {
        Ok(Storage::Cpu(match dtype {
            DType::F32 => CpuStorage::F32(vec![f32::NAN; len]),
            DType::F16 => CpuStorage::F16(vec![f16::NAN; len]),
            DType::BF16 => CpuStorage::BF16(vec![bf16::NAN; len]),
            _ => bail!("no kernel writes {dtype:?}"),
        }))
    }

    pub fn read<'a>(&'a self, storage: &'a Storage) -> Result<(*mut c_void, Guard<'a>)> {
        let Storage::Cpu(storage) = storage else { bail!("a tensor is not on the CPU as the others are") };
        let address: *const c_void = match storage {
            CpuStorage::F32(x) => x.as_ptr().cast(),
            CpuStorage::F16(x) => x.as_ptr().cast(),
            CpuStorage::BF16(x) => x.as_ptr().cast(),
            CpuStorage::U32(x) => x.as_ptr().cast(),
            _ => bail!("a tensor has a dtype that no kernel reads"),
        };
        Ok((address.cast_mut(), PhantomData))
    }

    pub fn write<'a>(&'a self, storage: &'a mut Storage) -> Result<(*mut c_void, Guard<'a>)> {
        let Storage::Cpu(storage) = storage else { bail!("a result is not on the CPU as the inputs are") };
        let address: *mut c_void = match storage {
            CpuStorage::F32(x) => x.as_mut_ptr().cast(),
            CpuStorage::F16(x) => x.as_mut_ptr().cast(),
            CpuStorage::BF16(x) => x.as_mut_ptr().cast(),
            _ => bail!("a result has a dtype that no kernel writes"),
        };
        Ok((address, PhantomData))
    }
}
