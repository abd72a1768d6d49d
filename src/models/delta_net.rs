//! `delta_net`: a decoder of [`DeltaNet`] layers.

use crate::models::decoder::{DecoderConfig, Defaults};
use crate::models::fields::{Fields, in_field};
use crate::models::registry::{Family, Parsed};
use crate::nn::{Activation, DeltaNet, DeltaNetConfig, QkNorm};
use candle_core::Result;

pub(super) const FAMILY: Family =
    Family { model_type: "delta_net", architecture: "DeltaNetForCausalLM", parse };

fn parse(fields: &mut Fields) -> Result<Parsed> {
    let decoder = DecoderConfig::parse(fields, Defaults::default())?;
    fields.choice("attn_mode", "chunk", &["chunk", "fused_chunk", "fused_recurrent"])?;
    // The authors' layers normalise the output whatever this says.
    fields.flag("use_output_norm", true)?;
    let qk_norm = fields.text("qk_norm", "l2")?;
    let qk_activation = fields.choice("qk_activation", "silu", &["silu", "relu", "elu", "identity"])?;
    let layer = DeltaNetConfig {
        hidden_size: decoder.hidden_size,
        expand_k: fields.positive("expand_k", 1.)?,
        expand_v: fields.positive("expand_v", 1.)?,
        num_heads: fields.size("num_heads", 16)?,
        use_beta: fields.flag("use_beta", true)?,
        use_gate: fields.flag("use_gate", false)?,
        use_short_conv: fields.flag("use_short_conv", true)?,
        conv_size: fields.size("conv_size", 4)?,
        allow_neg_eigval: fields.flag("allow_neg_eigval", false)?,
        qk_activation: match qk_activation.as_str() {
            "relu" => Activation::Relu,
            "elu" => Activation::EluPlusOne,
            "identity" => Activation::Identity,
            _ => Activation::Silu,
        },
        qk_norm: in_field("qk_norm", QkNorm::from_name(&qk_norm))?,
        norm_eps: decoder.norm_eps,
        initializer_range: decoder.initializer_range,
        ..Default::default()
    };
    if layer.use_short_conv {
        fields.early_flag("share_conv_kernel", false, "one convolution for all projections")?;
    }
    layer.check()?;
    Ok(decoder.with_mixer(Box::new(move |site| Ok(Box::new(DeltaNet::new(&layer, site.vb)?)))))
}
