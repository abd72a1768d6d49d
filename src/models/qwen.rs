//! What Qwen3-Next and Qwen3.5 have in common: gated delta nets, gated softmax attention every few layers, norms whose
//! weights are stored as their difference from 1.

use crate::models::block::{FeedForward, PreNormBlock};
use crate::models::fields::{Fields, by_fields};
use crate::models::hybrid::{self, LayerType};
use crate::models::registry::Parsed;
use crate::models::rope::{RopeDefaults, rope};
use crate::models::stack::{Block, Layers, Names, Norm, Site, StackConfig};
use crate::nn::{
    Attention, AttentionConfig, GatedMlpConfig, Mixer, PackedGatedDeltaNet, PackedGatedDeltaNetConfig,
    Packing, QkRmsNorm, RmsNorm,
};
use candle_core::Result;
use candle_nn::VarBuilder;
use serde_json::Value;

/// What differs from model to model where the file does not say.
pub(super) struct QwenDefaults {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_kv_heads: usize,
}

/// The fields that both have.
#[derive(Debug, Clone)]
pub(super) struct QwenConfig {
    pub mlp: GatedMlpConfig,
    pub layer_types: Vec<LayerType>,
    stack: StackConfig,
    norm_eps: f64,
    attention: AttentionConfig,
    delta: PackedGatedDeltaNetConfig,
}

impl QwenConfig {
    /// Reads and checks the fields.
    pub fn parse(fields: &mut Fields, packing: Packing, defaults: QwenDefaults) -> Result<Self> {
        fields.value("bos_token_id", Value::Null);
        fields.value("eos_token_id", Value::Null);
        fields.size("vocab_size", defaults.vocab_size)?;
        fields.size("hidden_size", defaults.hidden_size)?;
        let stack = StackConfig::parse(fields, defaults.num_layers)?;
        let norm_eps = fields.positive("rms_norm_eps", 1e-6)?;
        let hidden_act = hybrid::hidden_act(fields)?;
        fields.early_flag("use_sliding_window", false, "attention in a sliding window")?;
        fields.early_flag("attn_output_gate", true, "softmax attention without an output gate")?;
        let default_type = hybrid::full_attention_interval(fields)?;
        let layer_types = hybrid::layer_types(fields, stack.num_layers, default_type)?;
        let attention = attention(fields, &stack, norm_eps, defaults.num_kv_heads)?;
        let delta = PackedGatedDeltaNetConfig {
            hidden_size: stack.hidden_size,
            num_k_heads: fields.size("linear_num_key_heads", 16)?,
            num_v_heads: fields.size("linear_num_value_heads", 32)?,
            head_k_dim: fields.size("linear_key_head_dim", 128)?,
            head_v_dim: fields.size("linear_value_head_dim", 128)?,
            conv_size: fields.size("linear_conv_kernel_dim", 4)?,
            conv_act: hidden_act,
            packing,
            norm_eps,
            initializer_range: stack.initializer_range,
        };
        by_fields(&hybrid::DELTA_NET, delta.check())?;
        let mlp = GatedMlpConfig {
            hidden_size: stack.hidden_size,
            intermediate_size: fields.size("intermediate_size", defaults.intermediate_size)?,
            kind: hidden_act.into(),
            initializer_range: stack.initializer_range,
        };
        Ok(Self { mlp, layer_types, stack, norm_eps, attention, delta })
    }

    /// The whole model, given how to make the feed-forward layer of each block.
    pub fn with_feed_forward(
        self,
        names: Names,
        feed_forward: impl Fn(usize, VarBuilder) -> Result<FeedForward> + Send + Sync + 'static,
    ) -> Parsed {
        self.stack.clone().with_layers(names, QwenLayers { config: self, feed_forward })
    }

    fn rms_norm(&self, vb: VarBuilder) -> Result<RmsNorm> {
        RmsNorm::zero_centered(self.stack.hidden_size, self.norm_eps, vb)
    }

    fn mixer(&self, kind: LayerType, vb: &VarBuilder) -> Result<Box<dyn Mixer>> {
        Ok(match kind {
            LayerType::Linear => Box::new(PackedGatedDeltaNet::new(&self.delta, vb.pp("linear_attn"))?),
            LayerType::Full => Box::new(Attention::new(&self.attention, vb.pp("self_attn"))?),
        })
    }
}

struct QwenLayers<F> {
    config: QwenConfig,
    feed_forward: F,
}

impl<F: Fn(usize, VarBuilder) -> Result<FeedForward> + Send + Sync> Layers for QwenLayers<F> {
    fn block(&self, Site { layer, vb, .. }: Site) -> Result<Box<dyn Block>> {
        let config = &self.config;
        Ok(Box::new(PreNormBlock {
            mixer_norm: config.rms_norm(vb.pp("input_layernorm"))?,
            mixer: config.mixer(config.layer_types[layer], &vb)?,
            feed_forward_norm: config.rms_norm(vb.pp("post_attention_layernorm"))?,
            feed_forward: (self.feed_forward)(layer, vb.pp("mlp"))?,
        }))
    }

    fn norm(&self, vb: VarBuilder) -> Result<Norm> {
        Ok(Box::new(self.config.rms_norm(vb)?))
    }
}

fn attention(
    fields: &mut Fields,
    stack: &StackConfig,
    norm_eps: f64,
    num_kv_heads: usize,
) -> Result<AttentionConfig> {
    let num_heads = fields.size("num_attention_heads", 16)?;
    let head_dim = hybrid::head_dim(fields, Some(256), stack.hidden_size, num_heads)?;
    let attention = AttentionConfig {
        hidden_size: stack.hidden_size,
        num_heads,
        num_kv_heads: fields.size("num_key_value_heads", num_kv_heads)?,
        head_dim,
        bias: fields.flag("attention_bias", false)?,
        qk_norm: QkRmsNorm::PerHeadZeroCentered,
        norm_eps,
        output_gate: true,
        rotary: Some(rope(fields, head_dim, RopeDefaults { theta: 1e4, partial_rotary_factor: 0.25 })?),
        initializer_range: stack.initializer_range,
    };
    by_fields(&hybrid::ATTENTION, attention.check())?;
    Ok(attention)
}
