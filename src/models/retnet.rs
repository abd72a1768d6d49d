//! `retnet`: a decoder of [`MultiScaleRetention`] layers.

use crate::models::decoder::{DecoderConfig, Defaults};
use crate::models::fields::{Fields, in_field};
use crate::models::registry::{Family, Parsed};
use crate::nn::{Activation, MultiScaleRetention, MultiScaleRetentionConfig};
use candle_core::Result;

pub(super) const FAMILY: Family = Family { model_type: "retnet", architecture: "RetNetForCausalLM", parse };

fn parse(fields: &mut Fields) -> Result<Parsed> {
    let decoder = DecoderConfig::parse(fields, Defaults { hidden_ratio: 2, ..Default::default() })?;
    fields.choice("attn_mode", "chunk", &["chunk", "fused_chunk", "fused_recurrent", "parallel"])?;
    // The gate takes the function of the MLP, and of those it has a norm of its own name for "swish" alone.
    let gate_fn = fields.choice("hidden_act", "swish", &["swish", "silu"])?;
    let feature_map = match fields.optional_text("feature_map", None)? {
        Some(name) => Some(in_field("feature_map", Activation::from_transformers(&name))?),
        None => None,
    };
    // The configuration has these two, but the authors' model never hands them to its layers, so that no checkpoint has
    // the convolutions. They are read for their types alone.
    fields.flag("use_short_conv", false)?;
    fields.size("conv_size", 4)?;
    let layer = MultiScaleRetentionConfig {
        hidden_size: decoder.hidden_size,
        expand_k: fields.positive("expand_k", 1.)?,
        expand_v: fields.positive("expand_v", 2.)?,
        num_heads: fields.size("num_heads", 8)?,
        num_kv_heads: fields.optional_size("num_kv_heads", None)?,
        feature_map,
        use_output_gate: fields.flag("use_output_gate", true)?,
        elementwise_affine: fields.flag("elementwise_affine", true)?,
        norm_eps: decoder.norm_eps,
        fuse_norm: fields.flag("fuse_norm", true)? && gate_fn == "swish",
        initializer_range: decoder.initializer_range,
        ..Default::default()
    };
    layer.check()?;
    Ok(decoder.with_mixer(Box::new(move |site| Ok(Box::new(MultiScaleRetention::new(&layer, site.vb)?)))))
}
