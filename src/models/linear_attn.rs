//! `linear_attn`: a decoder of [`LinearAttention`] layers.

use crate::models::decoder::{DecoderConfig, Defaults};
use crate::models::fields::{Fields, in_field};
use crate::models::registry::{Family, Parsed};
use crate::nn::{FeatureMapKind, LinearAttention, LinearAttentionConfig};
use candle_core::Result;

pub(super) const FAMILY: Family =
    Family { model_type: "linear_attn", architecture: "LinearAttentionForCausalLM", parse };

fn parse(fields: &mut Fields) -> Result<Parsed> {
    let decoder = DecoderConfig::parse(fields, Defaults::default())?;
    fields.choice("attn_mode", "fused_chunk", &["chunk", "fused_chunk", "fused_recurrent"])?;
    let feature_map = fields.text("feature_map", "elementwise_product")?;
    let layer = LinearAttentionConfig {
        hidden_size: decoder.hidden_size,
        expand_k: fields.positive("expand_k", 1.)?,
        expand_v: fields.positive("expand_v", 1.)?,
        num_heads: fields.size("num_heads", 4)?,
        num_kv_heads: fields.optional_size("num_kv_heads", None)?,
        feature_map: in_field("feature_map", FeatureMapKind::from_name(&feature_map))?,
        tie_feature_map_qk: fields.flag("tie_feature_map_qk", false)?,
        output_norm: true,
        norm_q: fields.flag("norm_q", false)?,
        norm_k: fields.flag("norm_k", false)?,
        norm_feature_map: fields.flag("norm_feature_map", false)?,
        elementwise_affine: fields.flag("elementwise_affine", true)?,
        norm_eps: decoder.norm_eps,
        initializer_range: decoder.initializer_range,
    };
    layer.check()?;
    Ok(decoder.with_mixer(Box::new(move |site| Ok(Box::new(LinearAttention::new(&layer, site.vb)?)))))
}
