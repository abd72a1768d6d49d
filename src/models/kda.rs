//! `kda`: a decoder of [`KimiDeltaAttention`] layers.

use crate::models::decoder::{DecoderConfig, Defaults};
use crate::models::fields::Fields;
use crate::models::registry::{Family, Parsed};
use crate::nn::{KimiDeltaAttention, KimiDeltaAttentionConfig};
use candle_core::{Result, bail};

pub(super) const FAMILY: Family = Family { model_type: "kda", architecture: "KDAForCausalLM", parse };

fn parse(fields: &mut Fields) -> Result<Parsed> {
    let decoder = DecoderConfig::parse(fields, Defaults::default())?;
    fields.choice("attn_mode", "chunk", &["chunk", "fused_recurrent"])?;
    let lower_bound = fields.optional_number("lower_bound", None)?;
    // The bound alone makes the gate a bounded one; `safe_gate` promises the authors' kernels that it is not too low.
    if fields.flag("safe_gate", false)? {
        match lower_bound {
            Some(bound) if (-5. ..0.).contains(&bound) => {}
            Some(bound) => {
                bail!("field `lower_bound` is {bound}, it must be from -5 to below 0 with `safe_gate`")
            }
            None => {
                bail!("field `lower_bound` is null, it must be a number from -5 to below 0 with `safe_gate`")
            }
        }
    }
    let layer = KimiDeltaAttentionConfig {
        hidden_size: decoder.hidden_size,
        head_dim: fields.size("head_dim", 128)?,
        expand_v: fields.positive("expand_v", 1.)?,
        num_heads: fields.size("num_heads", 16)?,
        num_v_heads: fields.optional_size("num_v_heads", None)?,
        use_short_conv: fields.flag("use_short_conv", true)?,
        conv_size: fields.size("conv_size", 4)?,
        allow_neg_eigval: fields.flag("allow_neg_eigval", false)?,
        lower_bound,
        norm_eps: decoder.norm_eps,
        initializer_range: decoder.initializer_range,
        ..Default::default()
    };
    layer.check()?;
    Ok(decoder.with_mixer(Box::new(move |site| Ok(Box::new(KimiDeltaAttention::new(&layer, site.vb)?)))))
}
