//! The CUDA kernels where there is no GPU: compiled for the host, a fiber a thread (`cuda/host/`), and held against the
//! definition on small problems. `cargo test --features cuda-host --test cuda_host`; with `CLA_SANITIZE=1` they run under
//! AddressSanitizer.
//!
//! Nothing here says how long a kernel takes or whether a GPU runs it in the same order; `tests/gpu.rs` does that.

// The helpers serve other tests as well.
#![allow(dead_code)]

#[path = "ops/case.rs"]
mod case;
#[path = "ops/compare.rs"]
mod compare;
#[path = "ops/files.rs"]
mod files;
#[path = "kernels/mod.rs"]
mod kernels;
#[path = "ops/layout.rs"]
mod layout;
#[path = "ops/reference.rs"]
mod reference;
#[path = "ops/run.rs"]
mod run;
#[path = "models/support.rs"]
mod support;

#[path = "kernels/convolutions.rs"]
mod convolutions;
#[path = "kernels/host.rs"]
mod host;
#[path = "kernels/models.rs"]
mod models;
#[path = "kernels/norms.rs"]
mod norms;
#[path = "kernels/pointwise.rs"]
mod pointwise;
#[path = "kernels/rotary.rs"]
mod rotary;
#[path = "kernels/small.rs"]
mod small;

use candle_core::Device;
use candle_linear_attn::cuda_host;

/// Where the kernels are.
pub fn on_kernels<R>(f: impl FnOnce(&Device) -> R) -> R {
    cuda_host::run(|| f(&Device::Cpu))
}
