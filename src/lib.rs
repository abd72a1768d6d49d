#![doc = include_str!("../README.md")]
#![deny(unsafe_op_in_unsafe_fn, missing_docs)]

mod options;
mod ops;
pub mod models;
pub mod nn;

pub use ops::*;
pub use options::{Mode, Options, Output, State};
