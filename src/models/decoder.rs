//! The blocks that most of these models have: a token mixer and a gated MLP, each behind a norm.
//! A model of this shape is a [`Mixer`] and the fields that make it.

use crate::Mode;
use crate::models::fields::Fields;
use crate::models::registry::Parsed;
use crate::models::stack::{Block, FLA, Middle, Pass, StackConfig};
use crate::nn::{GatedMlp, GatedMlpConfig, GluKind, Mixer, RmsNorm};
use candle_core::{Result, Tensor, bail};
use candle_nn::VarBuilder;

/// Makes the mixer of one block.
pub(super) type BuildMixer = dyn Fn(Site) -> Result<Box<dyn Mixer>> + Send + Sync;

/// Where a mixer is.
pub(super) struct Site<'a> {
    /// The number of its block.
    pub layer: usize,
    /// Its parameters.
    pub vb: VarBuilder<'a>,
    /// What the blocks have in common.
    pub model: &'a VarBuilder<'a>,
}

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
        self.stack.clone().with_middle(FLA, move |model| {
            let block = |layer| -> Result<Box<dyn Block>> {
                Ok(Box::new(DecoderBlock::new(&self, &mixer, layer, &model)?))
            };
            let norm = RmsNorm::new(self.hidden_size, self.norm_eps, true, model.pp("norm"))?;
            Ok(Middle {
                blocks: (0..self.num_layers).map(block).collect::<Result<_>>()?,
                norm: Box::new(norm),
            })
        })
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

struct DecoderBlock {
    attn_norm: RmsNorm,
    attn: Box<dyn Mixer>,
    mlp_norm: RmsNorm,
    mlp: GatedMlp,
}

impl DecoderBlock {
    fn new(cfg: &DecoderConfig, mixer: &BuildMixer, layer: usize, model: &VarBuilder) -> Result<Self> {
        let vb = model.pp(format!("layers.{layer}"));
        // Early checkpoints of DeltaNet have the norms inside of what they precede.
        let old = vb.contains_tensor("mlp.norm.weight") && !vb.contains_tensor("mlp_norm.weight");
        let [attn_norm, mlp_norm] = if old { ["attn.norm", "mlp.norm"] } else { ["attn_norm", "mlp_norm"] };
        let norm = |name: &str| RmsNorm::new(cfg.hidden_size, cfg.norm_eps, true, vb.pp(name));
        Ok(Self {
            attn_norm: norm(attn_norm)?,
            attn: mixer(Site { layer, vb: vb.pp("attn"), model })?,
            mlp_norm: norm(mlp_norm)?,
            mlp: GatedMlp::new(&cfg.mlp, vb.pp("mlp"))?,
        })
    }
}

impl Block for DecoderBlock {
    fn forward(&self, xs: &Tensor, pass: &mut Pass) -> Result<Tensor> {
        let xs = (xs + self.attn.mix(&self.attn_norm.forward(xs)?, pass.call()?)?)?;
        let ys = self.mlp.forward(&self.mlp_norm.forward(&xs)?)?;
        xs + ys
    }

    fn set_mode(&mut self, mode: Mode) {
        self.attn.set_mode(mode);
    }
}
