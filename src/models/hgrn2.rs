//! `hgrn2`: a decoder of [`Hgrn2Attention`] layers.

use crate::models::decoder::{DecoderConfig, Defaults};
use crate::models::fields::Fields;
use crate::models::registry::{Family, Parsed};
use crate::nn::{Hgrn2Attention, Hgrn2AttentionConfig, LowerBounds};
use candle_core::{Result, bail};

pub(super) const FAMILY: Family = Family { model_type: "hgrn2", architecture: "HGRN2ForCausalLM", parse };

fn parse(fields: &mut Fields) -> Result<Parsed> {
    let decoder = DecoderConfig::parse(fields, Defaults::default())?;
    fields.choice("attn_mode", "chunk", &["chunk", "fused_chunk", "fused_recurrent"])?;
    let hidden_size = decoder.hidden_size;
    let num_heads = fields.optional_size("num_heads", None)?;
    let expand_ratio = match (fields.optional_size("expand_ratio", Some(128))?, num_heads) {
        // The authors' layers have as many heads as this makes, whatever `num_heads` says.
        (Some(expand_ratio), _) => expand_ratio,
        (None, Some(num_heads)) => hidden_size / num_heads,
        (None, None) => bail!("field `expand_ratio` is null and `num_heads` too, one of them must be given"),
    };
    let layer = Hgrn2AttentionConfig {
        hidden_size,
        expand_ratio,
        use_short_conv: fields.flag("use_short_conv", false)?,
        conv_size: fields.size("conv_size", 4)?,
        elementwise_affine: fields.flag("elementwise_affine", true)?,
        initializer_range: decoder.initializer_range,
        // The authors' layers leave the epsilon of the output norm at its default, whatever `norm_eps` says.
        ..Default::default()
    };
    if layer.use_short_conv {
        fields.early_flag("share_conv_kernel", false, "one convolution for all projections")?;
    }
    let heads = layer.check()?;
    let layers = decoder.num_layers;
    let use_lower_bound = fields.flag("use_lower_bound", true)?;
    let forget = heads.num_heads * heads.head_k_dim;
    if use_lower_bound && layers > 1 && forget != hidden_size {
        bail!(
            "field `expand_ratio` is {expand_ratio}, it must divide hidden_size, {hidden_size}, with `use_lower_bound`"
        );
    }
    Ok(decoder.with_mixer(Box::new(move |site| {
        // A single layer has none, and to train a parameter that nothing depends on would be an error.
        let bounds = match use_lower_bound && layers > 1 {
            true => Some(LowerBounds::new(layers, hidden_size, site.model)?),
            false => None,
        };
        let bounds = bounds.as_ref().map(|bounds| (bounds, site.layer));
        Ok(Box::new(Hgrn2Attention::new(&layer, bounds, site.vb)?))
    })))
}
