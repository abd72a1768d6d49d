//! Models of blocks of a token mixer and a gated MLP, each behind a norm.
//! One of this shape is a [`Mixer`] and the fields that make it.

use crate::models::block::{PreNormBlock, gated_mlp};
use crate::models::fields::Fields;
use crate::models::registry::Parsed;
use crate::models::stack::{Block, FLA, Layers, Norm, Site, StackConfig};
use crate::nn::{GatedMlpConfig, GluKind, Mixer, RmsNorm};
use candle_core::{Result, bail};
use candle_nn::VarBuilder;

/// Makes the mixer of one block.
pub(super) type BuildMixer = dyn Fn(Site) -> Result<Box<dyn Mixer>> + Send + Sync;

/// The fields that all models of this shape have.
#[derive(Debug, Clone)]
pub(super) struct DecoderConfig {
    pub hidden_size: usize,
    pub num_layers: usize,
    pub norm_eps: f64,
    pub initializer_range: f64,
    stack: StackConfig,
    mlp: GatedMlpConfig,
}

/// The defaults that differ from model to model.
pub(super) struct Defaults {
    pub hidden_ratio: u32,
    pub num_layers: usize,
}

impl Default for Defaults {
    fn default() -> Self {
        Self { hidden_ratio: 4, num_layers: 24 }
    }
}

impl DecoderConfig {
    /// Reads and checks the fields.
    pub fn parse(fields: &mut Fields, defaults: Defaults) -> Result<Self> {
        let stack = StackConfig::parse(fields, defaults.num_layers)?;
        let StackConfig { hidden_size, num_layers, initializer_range, .. } = stack;
        let norm_eps = fields.positive("norm_eps", 1e-6)?;
        let mlp = GatedMlpConfig {
            hidden_size,
            intermediate_size: intermediate_size(fields, hidden_size, defaults.hidden_ratio)?,
            kind: match fields.choice("hidden_act", "swish", &["swish", "silu", "powlu"])?.as_str() {
                "powlu" => GluKind::PowLu,
                _ => GluKind::Swish,
            },
            initializer_range,
        };
        refuse_attention(fields)?;
        fields.absent("attnres_block_size", "attention residuals")?;
        Ok(Self { hidden_size, num_layers, norm_eps, initializer_range, stack, mlp })
    }

    /// The whole model, given how to make its mixers. Parameters: `model.embeddings`,
    /// `model.layers.N.{attn_norm, attn, mlp_norm, mlp}`, `model.norm`, and `lm_head` unless it is tied to the embeddings.
    pub fn with_mixer(self, mixer: Box<BuildMixer>) -> Parsed {
        self.stack.clone().with_layers(FLA, Decoder { config: self, mixer })
    }

    fn rms_norm(&self, vb: VarBuilder) -> Result<RmsNorm> {
        RmsNorm::new(self.hidden_size, self.norm_eps, true, vb)
    }
}

struct Decoder {
    config: DecoderConfig,
    mixer: Box<BuildMixer>,
}

impl Layers for Decoder {
    fn block(&self, Site { layer, vb, model }: Site) -> Result<Box<dyn Block>> {
        // Early checkpoints of DeltaNet have the norms inside of what they precede.
        let old = vb.contains_tensor("mlp.norm.weight") && !vb.contains_tensor("mlp_norm.weight");
        let [attn_norm, mlp_norm] = if old { ["attn.norm", "mlp.norm"] } else { ["attn_norm", "mlp_norm"] };
        Ok(Box::new(PreNormBlock {
            mixer_norm: self.config.rms_norm(vb.pp(attn_norm))?,
            mixer: (self.mixer)(Site { layer, vb: vb.pp("attn"), model })?,
            feed_forward_norm: self.config.rms_norm(vb.pp(mlp_norm))?,
            feed_forward: gated_mlp(&self.config.mlp, vb.pp("mlp"))?,
        }))
    }

    fn norm(&self, vb: VarBuilder) -> Result<Norm> {
        Ok(Box::new(self.config.rms_norm(vb)?))
    }
}

fn intermediate_size(fields: &mut Fields, hidden_size: usize, default_ratio: u32) -> Result<usize> {
    let given = fields.optional_size("intermediate_size", None)?;
    // Written as the integer that it is to the authors.
    fields.value("hidden_ratio", default_ratio.into());
    // An explicit null means 4, whatever the model's own default.
    let ratio = fields.optional_number("hidden_ratio", None)?.unwrap_or(4.);
    if !(0. ..=1024.).contains(&ratio) || ratio == 0. {
        bail!("field `hidden_ratio` is {ratio}, it must be above 0 and at most 1024");
    }
    Ok(given.unwrap_or_else(|| GatedMlpConfig::intermediate_size(hidden_size, ratio)))
}

/// Hybrid models put softmax attention in the layers that `attn.layers` lists; a list without layers asks for none.
pub(super) fn refuse_attention(fields: &mut Fields) -> Result<()> {
    let value = fields.value("attn", serde_json::Value::Null);
    let specs = match value {
        serde_json::Value::Array(specs) => specs.iter().collect(),
        serde_json::Value::Null => vec![],
        spec => vec![spec],
    };
    let empty = |spec: &&serde_json::Value| spec["layers"].as_array().is_some_and(Vec::is_empty);
    if !specs.iter().all(empty) {
        bail!("field `attn` is {value}, it must be null: layers of softmax attention are not supported");
    }
    Ok(())
}
