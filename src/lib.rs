#![doc = include_str!("../README.md")]
#![deny(unsafe_op_in_unsafe_fn, missing_docs)]

mod autograd;
mod backend;
mod cpu;
mod memory;
pub mod models;
pub mod nn;
mod ops;
mod options;
mod problem;

pub use ops::*;
pub use options::{Mode, Options, Output, State};
