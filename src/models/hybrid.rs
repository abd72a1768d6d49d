//! What models that mix linear and softmax attention have in common.

use crate::models::fields::{Fields, in_field};
use crate::nn::Activation;
use candle_core::{Result, bail};
use candle_nn::VarBuilder;
use serde_json::Value;

/// What files call the sizes of softmax attention.
pub(super) const ATTENTION: [(&str, &str); 2] =
    [("num_heads", "num_attention_heads"), ("num_kv_heads", "num_key_value_heads")];

/// What they call those of gated delta nets.
pub(super) const DELTA_NET: [(&str, &str); 4] = [
    ("num_heads", "linear_num_key_heads"),
    ("num_v_heads", "linear_num_value_heads"),
    ("head_dim", "linear_key_head_dim"),
    ("conv_size", "linear_conv_kernel_dim"),
];

/// The kind of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LayerType {
    Linear,
    Full,
}

impl LayerType {
    fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear_attention",
            Self::Full => "full_attention",
        }
    }
}

/// Reads `layer_types`, one for each layer, or fills it in.
pub(super) fn layer_types(
    fields: &mut Fields,
    layers: usize,
    default: impl Fn(usize) -> LayerType,
) -> Result<Vec<LayerType>> {
    if fields.get("layer_types").is_none() {
        let names: Vec<Value> = (0..layers).map(|layer| default(layer).name().into()).collect();
        fields.set("layer_types", names.into());
    }
    let Some(Value::Array(names)) = fields.get("layer_types") else {
        bail!("field `layer_types` must be a list with the type of each layer")
    };
    if names.len() != layers {
        bail!("field `layer_types` has {} entries, it must have {layers}, as num_hidden_layers", names.len());
    }
    let kind = |name: &Value| match name.as_str() {
        Some("linear_attention") => Ok(LayerType::Linear),
        Some("full_attention") => Ok(LayerType::Full),
        _ => bail!("field `layer_types` holds {name}, it must be one of linear_attention, full_attention"),
    };
    names.iter().map(kind).collect()
}

/// Every so many layers, the last of them, is one of softmax attention: `full_attention_interval`.
pub(super) fn full_attention_interval(fields: &mut Fields) -> Result<impl Fn(usize) -> LayerType + use<>> {
    let interval = fields.optional_size("full_attention_interval", Some(4))?.unwrap_or(4);
    Ok(
        move |layer: usize| {
            if (layer + 1).is_multiple_of(interval) { LayerType::Full } else { LayerType::Linear }
        },
    )
}

/// Reads `hidden_act`.
pub(super) fn hidden_act(fields: &mut Fields) -> Result<Activation> {
    let name = fields.text("hidden_act", "silu")?;
    in_field("hidden_act", Activation::from_transformers(&name))
}

/// The width of a head: `head_dim` or, if that is null, a part of the layer's.
pub(super) fn head_dim(
    fields: &mut Fields,
    default: Option<usize>,
    hidden_size: usize,
    heads: usize,
) -> Result<usize> {
    match fields.optional_size("head_dim", default)? {
        Some(head_dim) => Ok(head_dim),
        None if heads <= hidden_size => Ok(hidden_size / heads),
        None => {
            bail!("field `num_attention_heads` is {heads}, it must be at most hidden_size, {hidden_size}")
        }
    }
}

/// The part of `vb` that has the tensor `name` under the second of two names, or the part with the first.
pub(super) fn either<'a>(vb: &VarBuilder<'a>, names: [&str; 2], name: &str) -> VarBuilder<'a> {
    let [first, second] = names.map(|part| vb.pp(part));
    if !first.contains_tensor(name) && second.contains_tensor(name) { second } else { first }
}
