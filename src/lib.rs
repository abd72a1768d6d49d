#![doc = include_str!("../README.md")]
#![deny(unsafe_op_in_unsafe_fn, missing_docs)]

mod autograd;
mod backend;
mod cpu;
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
mod cuda;
mod memory;
pub mod models;
pub mod nn;
mod ops;
mod options;
mod problem;

pub use backend::keep_freed_memory;
#[cfg(feature = "cuda-host")]
#[doc(hidden)]
pub use cuda::cuda_host;
pub use ops::*;
pub use options::{Mode, Options, Output, State};

/// The examples of the guide are run as well.
#[cfg(doctest)]
#[doc = include_str!("../docs/models.md")]
struct Guide;
