//! Where a model runs and in what number format.

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device};
use candle_linear_attn::{Mode, models::Model};
use clap::ValueEnum;
use std::path::Path;

/// `--mode`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ModeArg {
    Auto,
    Recurrent,
    Chunk,
    FusedChunk,
}

impl From<ModeArg> for Mode {
    fn from(mode: ModeArg) -> Self {
        match mode {
            ModeArg::Auto => Self::Auto,
            ModeArg::Recurrent => Self::Recurrent,
            ModeArg::Chunk => Self::Chunk,
            ModeArg::FusedChunk => Self::FusedChunk,
        }
    }
}

/// `--dtype`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DTypeArg {
    F32,
    F16,
    Bf16,
}

impl From<DTypeArg> for DType {
    fn from(dtype: DTypeArg) -> Self {
        match dtype {
            DTypeArg::F32 => Self::F32,
            DTypeArg::F16 => Self::F16,
            DTypeArg::Bf16 => Self::BF16,
        }
    }
}

/// Keeps candle from splitting element-wise operations over threads of its own: they are too short to gain by it, and
/// where something else runs on the other cores each waits for the slowest. Must come before anything else: candle looks
/// once, and no other thread may be running.
pub fn keep_operations_on_their_thread() {
    const THREADS: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(THREADS).is_none() {
        // SAFETY: called at the start of main, where this is the only thread.
        unsafe { std::env::set_var(THREADS, "1") };
    }
}

/// The first CUDA device if this build has CUDA and the machine a device, else the CPU.
pub fn device(force_cpu: bool) -> Result<Device> {
    if force_cpu {
        return Ok(Device::Cpu);
    }
    Device::cuda_if_available(0).context("cannot open the CUDA device; --cpu runs on the CPU instead")
}

/// Loads the model in `folder`. Without a dtype it is computed in f32 on a CPU, where 16-bit matrix products are slower
/// than 32-bit ones, and in the dtype it is stored in elsewhere.
pub fn open_model(folder: &Path, dtype: Option<DTypeArg>, mode: ModeArg, device: &Device) -> Result<Model> {
    if !folder.is_dir() {
        bail!(
            "no model folder at {}: expected a folder with config.json, model.safetensors and tokenizer.json",
            folder.display()
        );
    }
    let dtype = match dtype {
        Some(dtype) => Some(DType::from(dtype)),
        None if device.is_cpu() => Some(DType::F32),
        None => None,
    };
    let mut model = Model::load(folder, dtype, device)
        .with_context(|| format!("cannot load the model in {}", folder.display()))?;
    model.set_mode(mode.into());
    Ok(model)
}
