//! The operators: each describes its call as a problem and hands it to the backend.

mod delta_rule;
mod gated_delta_rule;
mod gla;
mod kda;
mod linear_attn;
mod retention;
mod rwkv7;
mod simple_gla;

pub use delta_rule::delta_rule;
pub use gated_delta_rule::gated_delta_rule;
pub use gla::gla;
pub use kda::kda;
pub use linear_attn::{chunk_linear_attn, fused_chunk_linear_attn, fused_recurrent_linear_attn, linear_attn};
pub use retention::retention;
pub use rwkv7::rwkv7;
pub use simple_gla::simple_gla;
