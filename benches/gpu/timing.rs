//! Time on the GPU, between events.

use std::sync::Arc;

use anyhow::{Result, bail};
use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, sys::CUevent_flags};

const SAMPLES: usize = 11;
/// So many milliseconds of work between two events, or as many calls: waiting for the events gives memory back to the
/// driver, and getting it again takes as long as a small operator.
const SAMPLE_MS: f32 = 15.;
const MOST_CALLS: usize = 100;

pub struct Clock {
    stream: Arc<CudaStream>,
}

impl Clock {
    pub fn new(device: &Device) -> Result<Self> {
        let Device::Cuda(device) = device else { bail!("{device:?} is not a GPU") };
        Ok(Self { stream: device.cuda_stream() })
    }

    pub fn card(&self) -> Result<String> {
        Ok(self.stream.context().name()?)
    }

    /// Milliseconds a call of `f`, which queues work on Candle's stream: the median of samples of several calls each.
    pub fn median<R>(&self, f: impl Fn() -> Result<R>) -> Result<f64> {
        for _ in 0..3 {
            f()?;
        }
        let once = self.time(1, &f)?;
        let calls = ((SAMPLE_MS / once.max(1e-3)) as usize).clamp(1, MOST_CALLS);
        let mut samples = (0..SAMPLES).map(|_| self.time(calls, &f)).collect::<Result<Vec<_>>>()?;
        samples.sort_by(f32::total_cmp);
        Ok(f64::from(samples[SAMPLES / 2]))
    }

    fn time<R>(&self, calls: usize, f: &impl Fn() -> Result<R>) -> Result<f32> {
        let event = || self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let start = event()?;
        for _ in 0..calls {
            f()?;
        }
        Ok(start.elapsed_ms(&event()?)? / calls as f32)
    }

    /// Bytes read plus bytes written a second by a copy of 1 GiB.
    pub fn copy_rate(&self) -> Result<f64> {
        const BYTES: usize = 1 << 30;
        let from = self.stream.alloc_zeros::<u8>(BYTES)?;
        let to = std::cell::RefCell::new(self.stream.alloc_zeros::<u8>(BYTES)?);
        let ms = self.median(|| Ok(self.stream.memcpy_dtod(&from, &mut *to.borrow_mut())?))?;
        Ok(2. * BYTES as f64 / (ms * 1e-3))
    }
}
