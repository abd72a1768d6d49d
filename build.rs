//! Compiles the kernels in `cuda/`: with nvcc for the feature `cuda`, with the C++ compiler for `cuda-host`.

use std::process::ExitCode;

#[cfg(feature = "cuda-host")]
#[path = "build/host.rs"]
mod host;
#[cfg(feature = "cuda")]
#[path = "build/nvcc.rs"]
mod nvcc;

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    if cfg!(all(feature = "cuda", feature = "cuda-host")) {
        return Err("features cuda and cuda-host: both define the same kernels, choose one".to_string());
    }
    #[cfg(feature = "cuda")]
    nvcc::build()?;
    #[cfg(feature = "cuda-host")]
    host::build()?;
    Ok(())
}

/// The files in `dir` with one of the extensions, sorted.
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
fn files(dir: &str, extensions: &[&str]) -> Result<Vec<std::path::PathBuf>, String> {
    let unreadable = |e| format!("cannot read the folder {dir}: {e}");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if extensions.iter().any(|e| path.extension().is_some_and(|x| x == *e)) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
