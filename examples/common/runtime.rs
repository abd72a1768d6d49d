//! Where a model runs and in what number format.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use candle_linear_attn::{
    Mode,
    models::{LoadOptions, Model, Progress, Quantization},
};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use std::{path::Path, sync::Arc};

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

/// What is set for the whole process. Must come before anything else.
pub fn prepare_process() {
    keep_errors_on_one_line();
    keep_operations_on_their_thread();
    keep_freed_memory();
}

/// Keeps candle from putting a backtrace into the message of every error where `RUST_BACKTRACE` asks for those of panics.
fn keep_errors_on_one_line() {
    set_unless_given("RUST_LIB_BACKTRACE", "0");
}

/// Keeps candle from splitting element-wise operations over threads of its own: they are too short to gain by it, and
/// where something else runs on the other cores each waits for the slowest. Candle looks once, and no other thread may be
/// running.
fn keep_operations_on_their_thread() {
    set_unless_given("CANDLE_NUM_THREADS", "1");
}

fn set_unless_given(variable: &str, value: &str) {
    if std::env::var_os(variable).is_none() {
        // SAFETY: called at the start of main, where this is the only thread.
        unsafe { std::env::set_var(variable, value) };
    }
}

/// Keeps memory that has been freed for the next tensor: by default a large part of what a prompt takes goes back to the
/// operating system after each operation, and every page of it is a fault the next time.
fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (parameter, bytes) in [(libc::M_MMAP_THRESHOLD, 32 << 20), (libc::M_TRIM_THRESHOLD, 1 << 30)] {
        // SAFETY: two numbers for the allocator. If it refuses them, it goes on as before.
        unsafe { libc::mallopt(parameter, bytes) };
    }
}

/// The first CUDA device if this build has CUDA and the machine a device, else the CPU.
pub fn device(force_cpu: bool) -> Result<Device> {
    if force_cpu {
        return Ok(Device::Cpu);
    }
    let open = || {
        let device = Device::cuda_if_available(0)?;
        candle_linear_attn::keep_freed_memory(&device)?;
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = &device {
            // Two events for each allocation, with which streams wait for one another.
            // SAFETY: the examples use one device from one thread, and so one stream.
            unsafe { device.disable_event_tracking() };
        }
        Ok::<_, candle_core::Error>(device)
    };
    open().context("cannot open the CUDA device; --cpu runs on the CPU instead")
}

/// `--quantize`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum QuantizeArg {
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_k")]
    Q4K,
}

impl From<QuantizeArg> for Quantization {
    fn from(quantize: QuantizeArg) -> Self {
        match quantize {
            QuantizeArg::Q8_0 => Self::Q8_0,
            QuantizeArg::Q4K => Self::Q4K,
        }
    }
}

/// How a model is computed with, as the command lines of the examples have it.
#[derive(Debug, Clone, Args)]
pub struct ComputeArgs {
    /// Number format to compute in; f32 on a CPU, where weights stored in 16 bits stay so in memory, and the stored one on
    /// a GPU unless given.
    #[arg(long, value_enum)]
    pub dtype: Option<DTypeArg>,
    /// Quantize projections and embeddings while they are read: q8_0 takes 8.5 bits a weight, q4_k 4.5. Matrices whose
    /// rows are not whole blocks of q4_k (256) take q8_0 (32), and else stay as stored.
    #[arg(long, value_enum)]
    pub quantize: Option<QuantizeArg>,
    /// The algorithm of the operators.
    #[arg(long, value_enum, default_value = "auto")]
    pub mode: ModeArg,
    /// Stay on the CPU.
    #[arg(long)]
    pub cpu: bool,
}

/// Refuses a path where no model can be.
pub fn check_folder(folder: &Path) -> Result<()> {
    ensure!(
        folder.is_dir(),
        "no model folder at {}: expected a folder with config.json, model.safetensors and tokenizer.json",
        folder.display()
    );
    Ok(())
}

/// Loads the model in `folder`. Without a dtype it is computed in f32 on a CPU, where 16-bit operations are slower than
/// 32-bit ones, and in the dtype it is stored in elsewhere.
pub fn open_model(folder: &Path, args: &ComputeArgs) -> Result<Model> {
    check_folder(folder)?;
    let device = device(args.cpu)?;
    let dtype = match args.dtype {
        Some(dtype) => Some(DType::from(dtype)),
        None if device.is_cpu() => Some(DType::F32),
        None => None,
    };
    let bar = progress_bar(0, "loading {bar:30} {bytes}/{total_bytes}");
    let progress = bar.clone();
    let options = LoadOptions {
        dtype,
        quantize: args.quantize.map(Quantization::from),
        progress: Some(Arc::new(move |Progress { done, total }| {
            progress.set_length(total);
            progress.set_position(done);
        })),
    };
    let model = Model::load_with(folder, &device, options);
    bar.finish_and_clear();
    let mut model = model.with_context(|| format!("cannot load the model in {}", folder.display()))?;
    model.set_mode(args.mode.into());
    Ok(model)
}

/// On stderr, where that is a terminal.
pub fn progress_bar(total: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(total).with_style(style)
}
