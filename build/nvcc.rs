//! The kernels for a GPU, through nvcc. What can be wrong with the toolkit is found out before `bindgen_cuda`, which panics.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::files;

/// The first that compiles all of `cuda/`: C++17 and sm_90a.
const LEAST_NVCC: u32 = 12;
const LEAST_CAP: u32 = 80;

pub fn build() -> Result<(), String> {
    println!("cargo::rerun-if-changed=cuda");
    for name in ["CUDA_COMPUTE_CAP", "CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN", "PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let toolkit = ["CUDA_HOME", "CUDA_PATH"].iter().find_map(std::env::var_os).map(PathBuf::from);
    let version = find_nvcc(toolkit.as_deref())?;
    let cap = compute_cap()?;
    check_target(cap)?;

    let mut args = vec!["-std=c++17", "-O3"];
    if cfg!(unix) {
        // A Rust executable is position-independent.
        args.extend(["-Xcompiler", "-fPIC"]);
    }
    if cap == 90 {
        // wgmma is for this GPU alone, which the plain architecture is not allowed to use.
        args.push("-gencode=arch=compute_90a,code=sm_90a");
    }
    let kernels = files("cuda", &["cu"])?;
    let all = files("cuda", &["cu", "cuh", "h"])?;
    let archive = format!("cla_{cap}_{:016x}", fingerprint(&version, &args, &all)?);
    let out_dir = std::env::var("OUT_DIR").map(PathBuf::from).map_err(|e| format!("OUT_DIR: {e}"))?;
    let mut builder = bindgen_cuda::Builder::default().kernel_paths(kernels).watch(all);
    for arg in args {
        builder = builder.arg(arg);
    }
    builder.build_lib(out_dir.join(format!("lib{archive}.a")));

    println!("cargo::rustc-link-search=native={}", out_dir.display());
    println!("cargo::rustc-link-lib=static={archive}");
    for dir in ["lib64", "lib"] {
        if let Some(dir) = toolkit.as_ref().map(|t| t.join(dir)).filter(|d| d.is_dir()) {
            println!("cargo::rustc-link-search=native={}", dir.display());
        }
    }
    println!("cargo::rustc-link-lib=dylib=cudart");
    println!("cargo::rustc-link-lib=dylib=stdc++");
    Ok(())
}

/// Makes sure that `nvcc` can be started by that name, as `bindgen_cuda` does, and returns what it says of itself.
fn find_nvcc(toolkit: Option<&Path>) -> Result<String, String> {
    let ask = || Command::new("nvcc").arg("--version").output().ok().filter(|o| o.status.success());
    if ask().is_none()
        && let Some(bin) = toolkit.map(|t| t.join("bin")).filter(|b| b.join("nvcc").is_file())
    {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let dirs = std::iter::once(bin).chain(std::env::split_paths(&path));
        let path = std::env::join_paths(dirs).map_err(|e| format!("PATH: {e}"))?;
        // SAFETY: no other thread has been started yet that could read the environment.
        unsafe { std::env::set_var("PATH", path) };
    }
    let Some(output) = ask() else {
        return Err("feature cuda: there is no nvcc on PATH nor in CUDA_HOME. Install the CUDA toolkit 12 or later, or run \
                    scripts/cuda-toolkit.sh, which gets it from PyPI and prints the environment to set"
            .to_string());
    };
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let release = said.split("release ").nth(1).and_then(|s| s.split([',', ' ', '\n']).next()).unwrap_or("");
    match release.split('.').next().and_then(|major| major.parse::<u32>().ok()) {
        Some(major) if major >= LEAST_NVCC => Ok(said),
        Some(_) => Err(format!("feature cuda: nvcc is {release}, it must be {LEAST_NVCC}.0 or later")),
        None => Err(format!("feature cuda: cannot read nvcc's version from {said:?}")),
    }
}

/// The compute capability to compile for, without its point.
fn compute_cap() -> Result<u32, String> {
    let cap = match std::env::var("CUDA_COMPUTE_CAP") {
        Ok(cap) => cap.trim().parse().map_err(|_| {
            format!("CUDA_COMPUTE_CAP is {cap:?}, it must be a number such as 80, 89, 90, 100 or 120")
        })?,
        Err(_) => ask_gpu().ok_or(
            "feature cuda: CUDA_COMPUTE_CAP is not set and nvidia-smi finds no GPU to ask. Set it to the compute capability \
             to compile for: 80 (A100), 89 (RTX 40), 90 (H100, H200), 100 (B200), 120 (RTX 50)",
        )?,
    };
    if cap < LEAST_CAP {
        return Err(format!("CUDA_COMPUTE_CAP is {cap}, the kernels need at least {LEAST_CAP}"));
    }
    Ok(cap)
}

fn ask_gpu() -> Option<u32> {
    let output = Command::new("nvidia-smi")
        .args(["--query-gpu=compute_cap", "--format=csv,noheader"])
        .output()
        .ok()?;
    let said = String::from_utf8(output.stdout).ok()?;
    said.lines().next()?.trim().replace('.', "").parse().ok()
}

fn check_target(cap: u32) -> Result<(), String> {
    let output = Command::new("nvcc").arg("--list-gpu-code").output().map_err(|e| format!("nvcc: {e}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if said.lines().any(|code| code.trim() == format!("sm_{cap}")) {
        return Ok(());
    }
    let known: Vec<&str> = said.split_whitespace().collect();
    Err(format!("this nvcc does not compile for compute capability {cap}, only for {}", known.join(", ")))
}

/// `bindgen_cuda` goes by the time of the archive alone, which a change of arguments or a checkout can leave in place.
fn fingerprint(version: &str, args: &[&str], files: &[PathBuf]) -> Result<u64, String> {
    let mut hasher = DefaultHasher::new();
    (version, args, std::env::var("NVCC_CCBIN").ok()).hash(&mut hasher);
    for file in files {
        let bytes = std::fs::read(file).map_err(|e| format!("{}: {e}", file.display()))?;
        (file, bytes).hash(&mut hasher);
    }
    Ok(hasher.finish())
}
