//! Memory and stream of a CUDA device, by way of Candle and cudarc.

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::result::device::get_mem_pool as mem_pool_of;
use candle_core::cuda_backend::cudarc::driver::result::mem_pool;
use candle_core::cuda_backend::cudarc::driver::sys::{CUdevice_attribute as Attribute, CUmemPool_attribute};
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Result, Storage, bail};

use super::route::Card;

/// To be kept until the kernel that uses the address is queued: then other streams learn what they have to wait for, where
/// cudarc keeps track of that. It does not for Candle's default, which is a stream for each thread.
pub(super) type Guard<'a> = SyncOnDrop<'a>;

/// See [`crate::keep_freed_memory`].
pub(crate) fn keep_freed_memory(device: &CudaDevice) -> Result<()> {
    let stream = device.cuda_stream();
    let context = stream.context();
    if !context.has_async_alloc() {
        return Ok(());
    }
    context.bind_to_thread().w()?;
    let mut most = u64::MAX;
    // SAFETY: the device is an open one, its pool lives as long as the process, and the attribute is a u64.
    unsafe {
        let pool = mem_pool_of(context.cu_device()).w()?;
        let release = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        mem_pool::set_attribute(pool, release, (&raw mut most).cast()).w()
    }
}

/// A device and the stream that Candle uses there.
pub(super) struct Machine {
    device: CudaDevice,
    stream: Arc<CudaStream>,
}

impl Machine {
    /// Makes the device current for this thread, as the CUDA runtime in the kernels' launches needs it.
    pub fn of(device: &Device) -> Result<Self> {
        let Device::Cuda(device) = device else { bail!("the tensors are on {device:?}, not on CUDA") };
        let stream = device.cuda_stream();
        stream.context().bind_to_thread().w()?;
        Ok(Self { device: device.clone(), stream })
    }

    pub fn card(&self) -> Result<Card> {
        let ask =
            |attribute| Ok::<_, candle_core::Error>(self.stream.context().attribute(attribute).w()? as usize);
        Ok(Card {
            multiprocessors: ask(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_memory: ask(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            major: ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            minor: ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        })
    }

    pub fn stream(&self) -> *mut c_void {
        self.stream.cu_stream().cast()
    }

    /// Memory that nobody has written to yet.
    pub fn allocate(&self, dtype: DType, len: usize) -> Result<Storage> {
        // No bytes at all might be no address at all, and that stands for a tensor that is not there.
        let len = len.max(1);
        // SAFETY: any bits are numbers, and the kernels write all of them before anyone reads one.
        let slice = unsafe {
            match dtype {
                DType::F32 => CudaStorageSlice::F32(self.device.alloc(len)?),
                DType::F16 => CudaStorageSlice::F16(self.device.alloc(len)?),
                DType::BF16 => CudaStorageSlice::BF16(self.device.alloc(len)?),
                _ => bail!("no kernel writes {dtype:?}"),
            }
        };
        Ok(Storage::Cuda(CudaStorage { slice, device: self.device.clone() }))
    }

    /// Where a storage begins, for kernels that read it.
    pub fn read<'a>(&'a self, storage: &'a Storage) -> Result<(*mut c_void, Guard<'a>)> {
        let Storage::Cuda(storage) = storage else {
            bail!("a tensor is not on the CUDA device of the others")
        };
        let (address, guard) = match &storage.slice {
            CudaStorageSlice::F32(x) => x.device_ptr(&self.stream),
            CudaStorageSlice::F16(x) => x.device_ptr(&self.stream),
            CudaStorageSlice::BF16(x) => x.device_ptr(&self.stream),
            CudaStorageSlice::U32(x) => x.device_ptr(&self.stream),
            _ => bail!("a tensor has a dtype that no kernel reads"),
        };
        Ok((address as *mut c_void, guard))
    }

    /// Where a storage begins, for kernels that write to it.
    pub fn write<'a>(&'a self, storage: &'a mut Storage) -> Result<(*mut c_void, Guard<'a>)> {
        let Storage::Cuda(storage) = storage else {
            bail!("a result is not on the CUDA device of the inputs")
        };
        let (address, guard) = match &mut storage.slice {
            CudaStorageSlice::F32(x) => x.device_ptr_mut(&self.stream),
            CudaStorageSlice::F16(x) => x.device_ptr_mut(&self.stream),
            CudaStorageSlice::BF16(x) => x.device_ptr_mut(&self.stream),
            _ => bail!("a result has a dtype that no kernel writes"),
        };
        Ok((address as *mut c_void, guard))
    }
}
