#![doc = include_str!("../README.md")]
#![deny(unsafe_op_in_unsafe_fn, missing_docs)]

pub mod models;
pub mod nn;
mod ops;
mod options;

pub use ops::*;
pub use options::{Mode, Options, Output, State};
