//! `gated_deltanet`: a decoder of [`GatedDeltaNet`] layers.

use crate::models::decoder::{DecoderConfig, Defaults};
use crate::models::fields::Fields;
use crate::models::registry::{Family, Parsed};
use crate::nn::{Activation, GatedDeltaNet, GatedDeltaNetConfig};
use candle_core::Result;

pub(super) const FAMILY: Family =
    Family { model_type: "gated_deltanet", architecture: "GatedDeltaNetForCausalLM", parse };

fn parse(fields: &mut Fields) -> Result<Parsed> {
    let decoder = DecoderConfig::parse(fields, Defaults { num_layers: 21, ..Default::default() })?;
    fields.choice("attn_mode", "chunk", &["chunk", "fused_recurrent"])?;
    let gate_fn = fields.choice("output_gate_activation", "swish", &["swish", "silu", "sigmoid"])?;
    let layer = GatedDeltaNetConfig {
        hidden_size: decoder.hidden_size,
        head_dim: fields.size("head_dim", 256)?,
        expand_v: fields.positive("expand_v", 2.)?,
        num_heads: fields.size("num_heads", 6)?,
        num_v_heads: fields.optional_size("num_v_heads", None)?,
        use_gate: fields.flag("use_gate", true)?,
        gate_fn: if gate_fn == "sigmoid" { Activation::Sigmoid } else { Activation::Silu },
        use_short_conv: fields.flag("use_short_conv", true)?,
        conv_size: fields.size("conv_size", 4)?,
        allow_neg_eigval: fields.flag("allow_neg_eigval", false)?,
        norm_eps: decoder.norm_eps,
        initializer_range: decoder.initializer_range,
        ..Default::default()
    };
    if layer.use_short_conv {
        fields.early_flag("share_conv_kernel", false, "one convolution for all projections")?;
    }
    fields.early_flag("use_mamba_gate", true, "another gate than Mamba-2's")?;
    fields.early_flag("use_residual", false, "a skip connection around the operator")?;
    layer.check()?;
    Ok(decoder.with_mixer(Box::new(move |site| Ok(Box::new(GatedDeltaNet::new(&layer, site.vb)?)))))
}
