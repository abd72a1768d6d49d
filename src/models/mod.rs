//! Whole causal language models, chosen by the `model_type` of their `config.json` and loaded from safetensors with the
//! names that the Hugging Face Hub has.
//!
//! ```no_run
//! use candle_core::{Device, Tensor};
//! use candle_linear_attn::models::Model;
//!
//! # fn main() -> candle_core::Result<()> {
//! let model = Model::load("path/to/checkpoint", None, &Device::Cpu)?;
//! let mut cache = model.new_cache();
//! let prompt = Tensor::new(&[[5u32, 17, 3]], &Device::Cpu)?;
//! let logits = model.forward(&prompt, Some(&mut cache))?; // [1, 3, vocab_size]
//! let next = Tensor::new(&[[8u32]], &Device::Cpu)?;
//! let logits = model.forward(&next, Some(&mut cache))?; // [1, 1, vocab_size]
//! # Ok(())
//! # }
//! ```

// A new model is one file with a `Family` and one line in `registry::FAMILIES`.

mod block;
mod cache;
mod checkpoint;
mod config;
mod decoder;
mod delta_net;
mod fields;
mod gated_deltanet;
mod gla;
mod hgrn2;
pub mod hub;
mod hybrid;
mod kda;
mod kimi_linear;
mod linear_attn;
mod mamba2;
mod minimax;
mod model;
mod olmo_hybrid;
mod pool;
mod qwen;
mod qwen3_5;
mod qwen3_next;
mod registry;
mod residual;
mod retnet;
mod rope;
mod rwkv7;
mod stack;
mod workers;

pub use crate::nn::Quantization;
pub use cache::Cache;
pub use checkpoint::Progress;
pub use config::Config;
pub use model::{LoadOptions, Model};
pub use pool::Pool;
pub use registry::SUPPORTED;
