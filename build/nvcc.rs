//! The kernels for a GPU, through nvcc: `cudaforge`, with which candle compiles its own, finds it and runs it.

use std::path::{Path, PathBuf};

use cudaforge::{CudaToolkit, KernelBuilder};

use crate::files;

/// The first that compiles all of `cuda/`: C++17 and sm_90a.
const LEAST_NVCC: u32 = 12;
const LEAST_CAP: usize = 80;

pub fn build() -> Result<(), String> {
    println!("cargo::rerun-if-changed=cuda");
    for name in ["CUDA_COMPUTE_CAP", "CUDA_HOME", "CUDA_PATH", "NVCC", "NVCC_CCBIN", "PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let toolkit = find_toolkit()?;
    let arch = cudaforge::detect_compute_cap().map_err(|e| {
        format!(
            "feature cuda: for which GPU? Set CUDA_COMPUTE_CAP to the compute capability to compile for: 80 (A100), 89 (RTX 40), \
             90 (H100, H200), 100 (B200), 120 (RTX 50). ({e})"
        )
    })?;
    check_target(&toolkit, arch.base())?;

    let out_dir = std::env::var("OUT_DIR").map(PathBuf::from).map_err(|e| format!("OUT_DIR: {e}"))?;
    // What was compiled before is kept by file, architecture and arguments, but not by compiler.
    let objects = out_dir.join(toolkit.version.as_deref().unwrap_or("nvcc"));
    KernelBuilder::new()
        .source_files(files("cuda", &["cu"])?)
        .watch(files("cuda", &["cuh", "h"])?)
        .out_dir(objects)
        .args(["-std=c++17", "-O3"])
        .build_lib(out_dir.join("libcla.a"))
        .map_err(|e| format!("feature cuda: {e}"))?;

    println!("cargo::rustc-link-search=native={}", out_dir.display());
    println!("cargo::rustc-link-lib=static=cla");
    let named = ["CUDA_HOME", "CUDA_PATH"].iter().find_map(std::env::var_os).map(PathBuf::from);
    for root in named.as_deref().into_iter().chain(toolkit.nvcc_path.ancestors().nth(2)) {
        for dir in ["lib64", "lib"].map(|dir| root.join(dir)).iter().filter(|dir| dir.is_dir()) {
            println!("cargo::rustc-link-search=native={}", dir.display());
        }
    }
    println!("cargo::rustc-link-lib=dylib=cudart");
    println!("cargo::rustc-link-lib=dylib=stdc++");
    Ok(())
}

/// The toolkit, new enough.
fn find_toolkit() -> Result<CudaToolkit, String> {
    let toolkit = CudaToolkit::detect().map_err(|e| {
        format!(
            "feature cuda: there is no nvcc on PATH nor in CUDA_HOME. Install the CUDA toolkit {LEAST_NVCC} or later, or run \
             scripts/cuda-toolkit.sh, which gets it from PyPI and prints the environment to set. ({e})"
        )
    })?;
    let nvcc: &Path = &toolkit.nvcc_path;
    let release = toolkit.version.as_deref().unwrap_or("");
    match release.split('.').next().and_then(|major| major.parse::<u32>().ok()) {
        Some(major) if major >= LEAST_NVCC => Ok(toolkit),
        Some(_) => {
            Err(format!("feature cuda: {} is {release}, it must be {LEAST_NVCC}.0 or later", nvcc.display()))
        }
        None => Err(format!("feature cuda: {} does not say its version", nvcc.display())),
    }
}

fn check_target(toolkit: &CudaToolkit, cap: usize) -> Result<(), String> {
    if cap < LEAST_CAP {
        return Err(format!(
            "feature cuda: the compute capability is {cap}, the kernels need at least {LEAST_CAP}"
        ));
    }
    let known = toolkit.supported_architectures();
    if known.contains(&cap) {
        return Ok(());
    }
    Err(format!("feature cuda: this nvcc does not compile for compute capability {cap}, only for {known:?}"))
}
