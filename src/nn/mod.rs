//! Layers in candle-nn's style: `new(&config, vb)`, then `forward(&xs, cache)`.
//!
//! Each takes `xs` of shape `[B, T, hidden_size]` in f32, f16 or bf16 and returns the same shape and dtype. All can be
//! trained: built from a [`VarBuilder`](candle_nn::VarBuilder) over a [`VarMap`](candle_nn::VarMap), every parameter
//! gets a gradient. Parameter names are those of flash-linear-attention, so its checkpoints load as they are.
//!
//! A [`LayerCache`] carries a layer from one piece of a sequence to the next: a prompt in one call, then a token a call.
//! `forward_packed` takes sequences of different lengths that lie one after the other.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_linear_attn::nn::{GatedLinearAttention, GatedLinearAttentionConfig};
//! use candle_nn::{VarBuilder, VarMap};
//!
//! # fn main() -> candle_core::Result<()> {
//! let varmap = VarMap::new();
//! let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
//! let config = GatedLinearAttentionConfig { hidden_size: 32, num_heads: 2, ..Default::default() };
//! let layer = GatedLinearAttention::new(&config, vb)?;
//! let xs = Tensor::randn(0f32, 1., (1, 10, 32), &Device::Cpu)?;
//! assert_eq!(layer.forward(&xs, None)?.dims(), [1, 10, 32]);
//! # Ok(())
//! # }
//! ```

mod activation;
mod attention;
mod cache;
mod call;
mod decay;
mod delta;
mod delta_net;
mod feature_map;
pub(crate) mod fused;
mod gated_delta_net;
mod gated_linear_attention;
mod gated_mlp;
mod heads;
mod hgrn2;
mod kimi_delta_attention;
mod kv_cache;
mod latent_attention;
mod layer_norm;
mod lightning_attention;
mod linear;
mod linear_attention;
mod mamba2;
mod mixture_of_experts;
mod output_norm;
mod packed_gated_delta_net;
mod qkv;
mod retention;
mod rms_norm;
mod rotary;
mod rotary_scaling;
mod routing;
mod rwkv7;
mod rwkv7_feed_forward;
mod short_conv;
mod softmax_attention;
mod token_shift;
mod weight;

pub use activation::Activation;
pub use attention::{Attention, AttentionConfig, QkRmsNorm};
pub use cache::LayerCache;
pub use decay::log_decay;
pub use delta_net::{DeltaNet, DeltaNetConfig, QkNorm};
pub use feature_map::{FeatureMap, FeatureMapKind};
pub use gated_delta_net::{GatedDeltaNet, GatedDeltaNetConfig};
pub use gated_linear_attention::{GatedLinearAttention, GatedLinearAttentionConfig};
pub use gated_mlp::{GatedMlp, GatedMlpConfig, GluKind, gated};
pub use hgrn2::{Hgrn2Attention, Hgrn2AttentionConfig, LowerBounds};
pub use kimi_delta_attention::{KdaLayout, KimiDeltaAttention, KimiDeltaAttentionConfig};
pub use latent_attention::{LatentAttention, LatentAttentionConfig};
pub use layer_norm::LayerNorm;
pub use lightning_attention::{LightningAttention, LightningAttentionConfig};
pub use linear_attention::{LinearAttention, LinearAttentionConfig};
pub use mamba2::{Mamba2, Mamba2Config};
pub use mixture_of_experts::{ExpertNames, MixtureOfExperts, MixtureOfExpertsConfig, SharedExpert};
pub use packed_gated_delta_net::{PackedGatedDeltaNet, PackedGatedDeltaNetConfig, Packing};
pub use retention::{MultiScaleRetention, MultiScaleRetentionConfig};
pub use rms_norm::{NormGate, RmsNorm, l2_norm};
pub use rotary::{RotaryConfig, RotaryEmbedding};
pub use rotary_scaling::RotaryScaling;
pub use routing::{RouterConfig, RouterScore};
pub use rwkv7::{Rwkv7Attention, Rwkv7AttentionConfig};
pub use rwkv7_feed_forward::{Rwkv7FeedForward, Rwkv7FeedForwardConfig};
pub use short_conv::{ShortConvOptions, ShortConvolution, short_conv};
pub use weight::Quantization;

pub(crate) use call::{Call, Mixer};
pub(crate) use heads::MAX_SIZE;
pub(crate) use linear::{Linear, normal, project};
pub(crate) use weight::{Keeping, Weight, as_stored, keeping, read_dtype};
