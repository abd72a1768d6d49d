//! `gla`: a decoder of [`GatedLinearAttention`] layers.

use crate::models::decoder::{DecoderConfig, Defaults};
use crate::models::fields::{Fields, in_field};
use crate::models::registry::{Family, Parsed};
use crate::nn::{Activation, GatedLinearAttention, GatedLinearAttentionConfig};
use candle_core::Result;

pub(super) const FAMILY: Family = Family { model_type: "gla", architecture: "GLAForCausalLM", parse };

fn parse(fields: &mut Fields) -> Result<Parsed> {
    let decoder = DecoderConfig::parse(fields, Defaults::default())?;
    fields.choice("attn_mode", "chunk", &["chunk", "fused_chunk", "fused_recurrent"])?;
    // The gate takes the function of the MLP, and of those it has a norm of its own name for "swish" alone.
    let gate_fn = fields.choice("hidden_act", "swish", &["swish", "silu"])?;
    let feature_map = match fields.optional_text("feature_map", None)? {
        Some(name) => Some(in_field("feature_map", Activation::from_fla(&name))?),
        None => None,
    };
    let layer = GatedLinearAttentionConfig {
        hidden_size: decoder.hidden_size,
        expand_k: fields.positive("expand_k", 0.5)?,
        expand_v: fields.positive("expand_v", 1.)?,
        num_heads: fields.size("num_heads", 4)?,
        num_kv_heads: fields.optional_size("num_kv_heads", None)?,
        feature_map,
        use_short_conv: fields.flag("use_short_conv", false)?,
        conv_size: fields.size("conv_size", 4)?,
        use_output_gate: fields.flag("use_output_gate", true)?,
        clamp_min: fields.optional_number("clamp_min", None)?,
        elementwise_affine: fields.flag("elementwise_affine", true)?,
        norm_eps: decoder.norm_eps,
        fuse_norm: fields.flag("fuse_norm", true)? && gate_fn == "swish",
        initializer_range: decoder.initializer_range,
        ..Default::default()
    };
    if layer.use_short_conv {
        fields.early_flag("share_conv_kernel", false, "one convolution for all projections")?;
    }
    layer.check()?;
    Ok(decoder.with_mixer(Box::new(move |site| Ok(Box::new(GatedLinearAttention::new(&layer, site.vb)?)))))
}
