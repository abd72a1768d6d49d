//! The CUDA kernels on a GPU: the small problems of `tests/cuda_host.rs`, and problems of real sizes against the CPU backend.
//! `cargo test --release --features cuda --test gpu`, on a machine that has one.

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
#[path = "kernels/large.rs"]
mod large;
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
use std::sync::OnceLock;

/// Where the kernels are: on the first GPU. All tests share what Candle keeps for it.
pub fn on_kernels<R>(f: impl FnOnce(&Device) -> R) -> R {
    static GPU: OnceLock<Device> = OnceLock::new();
    f(GPU.get_or_init(|| Device::new_cuda(0).expect("these tests need a GPU")))
}
