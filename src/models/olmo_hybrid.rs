//! `olmo_hybrid`: OLMo Hybrid, gated delta nets behind norms, softmax attention in front of them.

use crate::Mode;
use crate::models::block::{FeedForward, PreNormBlock, gated_mlp};
use crate::models::fields::{Fields, by_fields};
use crate::models::hybrid::{self, LayerType};
use crate::models::registry::{Family, Parsed};
use crate::models::residual::Residual;
use crate::models::rope::{RopeDefaults, is_null, rope};
use crate::models::stack::{Block, Layers, Norm, Pass, Site, StackConfig, TRANSFORMERS};
use crate::nn::{
    Activation, Attention, AttentionConfig, GatedDeltaNet, GatedDeltaNetConfig, GatedMlpConfig, Mixer,
    QkRmsNorm, RmsNorm,
};
use candle_core::{Result, bail};
use candle_nn::VarBuilder;
use serde_json::Value;

pub(super) const FAMILY: Family =
    Family { model_type: "olmo_hybrid", architecture: "OlmoHybridForCausalLM", parse };

/// Epsilon of the delta nets' output norms, which no configuration changes.
const DELTA_NORM_EPS: f64 = 1e-5;

struct OlmoConfig {
    hidden_size: usize,
    norm_eps: f64,
    layer_types: Vec<LayerType>,
    attention: AttentionConfig,
    delta: GatedDeltaNetConfig,
    mlp: GatedMlpConfig,
}

fn parse(fields: &mut Fields) -> Result<Parsed> {
    fields.value("bos_token_id", Value::Null);
    fields.value("eos_token_id", 100257.into());
    fields.size("vocab_size", 100352)?;
    fields.size("hidden_size", 3840)?;
    let stack = StackConfig::parse(fields, 32)?;
    let norm_eps = fields.positive("rms_norm_eps", 1e-6)?;
    let act = hybrid::hidden_act(fields)?;
    // One of four, and the last one of fewer.
    let layers = stack.num_layers;
    let default_type = |layer: usize| {
        if layer % 4 == 3 || (layers < 4 && layer + 1 == layers) {
            LayerType::Full
        } else {
            LayerType::Linear
        }
    };
    let layer_types = hybrid::layer_types(fields, layers, default_type)?;
    let attention = attention(fields, &stack, norm_eps)?;
    let config = OlmoConfig {
        norm_eps,
        layer_types,
        delta: delta_net(fields, &stack, &attention, act)?,
        mlp: GatedMlpConfig {
            hidden_size: stack.hidden_size,
            intermediate_size: fields.size("intermediate_size", 11008)?,
            kind: act.into(),
            initializer_range: stack.initializer_range,
        },
        hidden_size: stack.hidden_size,
        attention,
    };
    Ok(stack.with_layers(TRANSFORMERS, config))
}

fn attention(fields: &mut Fields, stack: &StackConfig, norm_eps: f64) -> Result<AttentionConfig> {
    let num_heads = fields.size("num_attention_heads", 30)?;
    let head_dim = match fields.get("head_dim") {
        Some(_) => fields.size("head_dim", 1)?,
        None if num_heads <= stack.hidden_size => stack.hidden_size / num_heads,
        None => bail!("field `num_attention_heads` is {num_heads}, it must be at most hidden_size"),
    };
    let defaults = RopeDefaults { theta: 1e4, partial_rotary_factor: 1. };
    let attention = AttentionConfig {
        hidden_size: stack.hidden_size,
        num_heads,
        num_kv_heads: fields.optional_size("num_key_value_heads", None)?.unwrap_or(num_heads),
        head_dim,
        bias: fields.flag("attention_bias", false)?,
        qk_norm: QkRmsNorm::AllHeads,
        norm_eps,
        output_gate: false,
        // The released models have null here, and no rotation.
        rotary: if is_null(fields, "rope_theta")? { None } else { Some(rope(fields, head_dim, defaults)?) },
        initializer_range: stack.initializer_range,
    };
    by_fields(&hybrid::ATTENTION, attention.check())?;
    Ok(attention)
}

fn delta_net(
    fields: &mut Fields,
    stack: &StackConfig,
    attention: &AttentionConfig,
    act: Activation,
) -> Result<GatedDeltaNetConfig> {
    let mut heads = |name: &str| {
        Ok::<_, candle_core::Error>(fields.optional_size(name, None)?.unwrap_or(attention.num_heads))
    };
    let (num_heads, num_v_heads) = (heads("linear_num_key_heads")?, heads("linear_num_value_heads")?);
    let usual = (0.75 * stack.hidden_size as f64 / num_heads as f64) as usize;
    let head_dim = fields.optional_size("linear_key_head_dim", None)?.unwrap_or(usual);
    let head_v_dim = fields.optional_size("linear_value_head_dim", None)?.unwrap_or(2 * head_dim);
    let layer = GatedDeltaNetConfig {
        hidden_size: stack.hidden_size,
        head_dim,
        expand_v: head_v_dim as f64 / head_dim.max(1) as f64,
        num_heads,
        num_v_heads: Some(num_v_heads),
        conv_size: fields.size("linear_conv_kernel_dim", 4)?,
        conv_act: act,
        allow_neg_eigval: fields.flag("linear_allow_neg_eigval", true)?,
        norm_eps: DELTA_NORM_EPS,
        initializer_range: stack.initializer_range,
        ..Default::default()
    };
    by_fields(&hybrid::DELTA_NET, layer.check())?;
    Ok(layer)
}

impl Layers for OlmoConfig {
    fn block(&self, Site { layer, vb, .. }: Site) -> Result<Box<dyn Block>> {
        let feed_forward = gated_mlp(&self.mlp, vb.pp("mlp"))?;
        Ok(match self.layer_types[layer] {
            LayerType::Full => Box::new(PostNormBlock {
                mixer: Box::new(Attention::new(&self.attention, vb.pp("self_attn"))?),
                mixer_norm: self.rms_norm(vb.pp("post_attention_layernorm"))?,
                feed_forward,
                feed_forward_norm: self.rms_norm(vb.pp("post_feedforward_layernorm"))?,
            }),
            LayerType::Linear => {
                // The second of each is what transformers calls it in memory.
                let norm = |names| self.rms_norm(hybrid::either(&vb, names, "weight"));
                Box::new(PreNormBlock {
                    mixer_norm: norm(["attention_layer_norm", "input_layernorm"])?,
                    mixer: Box::new(GatedDeltaNet::new(&self.delta, vb.pp("linear_attn"))?),
                    feed_forward_norm: norm(["feedforward_layer_norm", "post_attention_layernorm"])?,
                    feed_forward,
                })
            }
        })
    }

    fn norm(&self, vb: VarBuilder) -> Result<Norm> {
        Ok(Box::new(self.rms_norm(vb)?))
    }
}

impl OlmoConfig {
    fn rms_norm(&self, vb: VarBuilder) -> Result<RmsNorm> {
        RmsNorm::new(self.hidden_size, self.norm_eps, true, vb)
    }
}

/// A mixer and a feed-forward layer, each with a norm behind it, beside a skip connection.
struct PostNormBlock {
    mixer: Box<dyn Mixer>,
    mixer_norm: RmsNorm,
    feed_forward: FeedForward,
    feed_forward_norm: RmsNorm,
}

impl Block for PostNormBlock {
    fn forward(&self, xs: &mut Residual, pass: &mut Pass) -> Result<()> {
        let ys = self.mixer_norm.forward(&self.mixer.mix(xs.sum()?, pass.call()?)?)?;
        xs.add(ys)?;
        let ys = self.feed_forward_norm.forward(&self.feed_forward.forward(xs.sum()?)?)?;
        xs.add(ys)
    }

    fn set_mode(&mut self, mode: Mode) {
        self.mixer.set_mode(mode);
    }
}
