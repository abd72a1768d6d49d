//! The operators: each describes its call as a problem and hands it to the backend.

mod gla;
mod linear_attn;
mod retention;
mod simple_gla;

pub use gla::gla;
pub use linear_attn::{chunk_linear_attn, fused_chunk_linear_attn, fused_recurrent_linear_attn, linear_attn};
pub use retention::retention;
pub use simple_gla::simple_gla;
