//! The decoder that most of these models are: embeddings, blocks of a token mixer and a gated MLP, a norm, a head.
//! A model of this shape is a [`Mixer`] and the fields that make it.

use crate::Mode;
use crate::models::cache::Cache;
use crate::models::fields::Fields;
use crate::models::registry::{CausalLm, Parsed};
use crate::nn::{
    GatedMlp, GatedMlpConfig, GluKind, LayerCache, RmsNorm, normal, project, resident,
};
use candle_core::{Result, Tensor, bail};
use candle_nn::VarBuilder;
use std::sync::Arc;

/// The part of a block that lets tokens see each other.
pub(super) trait Mixer: Send + Sync {
    fn forward(&self, xs: &Tensor, cache: Option<&mut LayerCache>) -> Result<Tensor>;
    fn set_mode(&mut self, mode: Mode);
}

/// Makes the mixer of one block.
pub(super) type BuildMixer = dyn Fn(VarBuilder) -> Result<Box<dyn Mixer>> + Send + Sync;

/// The layers of [`nn`](crate::nn) all mix in the same way.
macro_rules! mixers {
    ($($layer:ty),*) => {$(
        impl Mixer for $layer {
            fn forward(&self, xs: &Tensor, cache: Option<&mut LayerCache>) -> Result<Tensor> {
                <$layer>::forward(self, xs, cache)
            }

            fn set_mode(&mut self, mode: Mode) {
                <$layer>::set_mode(self, mode);
            }
        }
    )*};
}
mixers!(
    crate::nn::LinearAttention,
    crate::nn::GatedLinearAttention,
    crate::nn::MultiScaleRetention
);

/// The fields that all models of this shape have.
#[derive(Debug, Clone)]
pub(super) struct DecoderConfig {
    pub hidden_size: usize,
    pub norm_eps: f64,
    pub initializer_range: f64,
    vocab_size: usize,
    num_layers: usize,
    tie_word_embeddings: bool,
    mlp: GatedMlpConfig,
}

impl DecoderConfig {
    /// Reads and checks the fields. `hidden_ratio` is the one default that differs from model to model.
    pub fn parse(fields: &mut Fields, hidden_ratio: f64) -> Result<Self> {
        let hidden_size = fields.size("hidden_size", 2048)?;
        // The head checks its shape when it is loaded; a bound on the product keeps a fresh model's size sane.
        let vocab_size = fields.size("vocab_size", 32000)?;
        let num_layers = fields.size("num_hidden_layers", 24)?;
        let norm_eps = fields.positive("norm_eps", 1e-6)?;
        let initializer_range = fields.positive("initializer_range", 0.02)?;
        let mlp = GatedMlpConfig {
            hidden_size,
            intermediate_size: intermediate_size(fields, hidden_size, hidden_ratio)?,
            kind: match fields
                .choice("hidden_act", "swish", &["swish", "silu", "powlu"])?
                .as_str()
            {
                "powlu" => GluKind::PowLu,
                _ => GluKind::Swish,
            },
            initializer_range,
        };
        refuse_attention(fields)?;
        fields.absent("attnres_block_size", "attention residuals")?;
        let tie_word_embeddings = fields.flag("tie_word_embeddings", false)?;
        Ok(Self {
            hidden_size,
            norm_eps,
            initializer_range,
            vocab_size,
            num_layers,
            tie_word_embeddings,
            mlp,
        })
    }

    /// The whole model, given how to make its mixers.
    pub fn with_mixer(self, mixer: Box<BuildMixer>) -> Parsed {
        Parsed {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            num_layers: self.num_layers,
            build: Arc::new(move |vb| Ok(Box::new(Decoder::new(&self, &mixer, vb)?))),
        }
    }
}

fn intermediate_size(fields: &mut Fields, hidden_size: usize, default_ratio: f64) -> Result<usize> {
    let given = fields.optional_size("intermediate_size", None)?;
    // An explicit null means 4, whatever the model's own default.
    let ratio = fields
        .optional_number("hidden_ratio", Some(default_ratio))?
        .unwrap_or(4.);
    if !(0. ..=1024.).contains(&ratio) || ratio == 0. {
        bail!("field `hidden_ratio` is {ratio}, it must be above 0 and at most 1024");
    }
    Ok(given.unwrap_or_else(|| GatedMlpConfig::intermediate_size(hidden_size, ratio)))
}

/// Hybrid models put softmax attention in the layers that `attn.layers` lists; a list without layers asks for none.
fn refuse_attention(fields: &mut Fields) -> Result<()> {
    let value = fields.value("attn", serde_json::Value::Null);
    let specs = match value {
        serde_json::Value::Array(specs) => specs.iter().collect(),
        serde_json::Value::Null => vec![],
        spec => vec![spec],
    };
    let empty = |spec: &&serde_json::Value| spec["layers"].as_array().is_some_and(Vec::is_empty);
    if !specs.iter().all(empty) {
        bail!(
            "field `attn` is {value}, it must be null: layers of softmax attention are not supported"
        );
    }
    Ok(())
}

struct Block {
    attn_norm: RmsNorm,
    attn: Box<dyn Mixer>,
    mlp_norm: RmsNorm,
    mlp: GatedMlp,
}

impl Block {
    fn new(cfg: &DecoderConfig, mixer: &BuildMixer, vb: VarBuilder) -> Result<Self> {
        let norm = |name: &str| RmsNorm::new(cfg.hidden_size, cfg.norm_eps, true, vb.pp(name));
        Ok(Self {
            attn_norm: norm("attn_norm")?,
            attn: mixer(vb.pp("attn"))?,
            mlp_norm: norm("mlp_norm")?,
            mlp: GatedMlp::new(&cfg.mlp, vb.pp("mlp"))?,
        })
    }

    fn forward(&self, xs: &Tensor, cache: Option<&mut LayerCache>) -> Result<Tensor> {
        let xs = (xs + self.attn.forward(&self.attn_norm.forward(xs)?, cache)?)?;
        let ys = self.mlp.forward(&self.mlp_norm.forward(&xs)?)?;
        xs + ys
    }
}

/// The model. Parameters: `model.embeddings`, `model.layers.N.{attn_norm, attn, mlp_norm, mlp}`, `model.norm`, and
/// `lm_head` unless it is tied to the embeddings.
struct Decoder {
    embeddings: Tensor,
    layers: Vec<Block>,
    norm: RmsNorm,
    lm_head: Tensor,
}

impl Decoder {
    fn new(cfg: &DecoderConfig, mixer: &BuildMixer, vb: VarBuilder) -> Result<Self> {
        let (embeddings, lm_head) = embeddings_and_head(cfg, &vb)?;
        let model = vb.pp("model");
        let layers: Result<Vec<_>> = (0..cfg.num_layers)
            .map(|i| Block::new(cfg, mixer, model.pp(format!("layers.{i}"))))
            .collect();
        Ok(Self {
            embeddings,
            layers: layers?,
            norm: RmsNorm::new(cfg.hidden_size, cfg.norm_eps, true, model.pp("norm"))?,
            lm_head: resident(lm_head)?,
        })
    }
}

/// Both are `[vocab_size, hidden_size]`. A file that stores shared tensors once may have kept either name.
fn embeddings_and_head(cfg: &DecoderConfig, vb: &VarBuilder) -> Result<(Tensor, Tensor)> {
    let shape = (cfg.vocab_size, cfg.hidden_size);
    let get = |name: &str| vb.get_with_hints(shape, name, normal(cfg.initializer_range));
    let (embeddings, head) = ("model.embeddings.weight", "lm_head.weight");
    if !cfg.tie_word_embeddings {
        return Ok((get(embeddings)?, get(head)?));
    }
    let only_head = vb.contains_tensor(head) && !vb.contains_tensor(embeddings);
    let shared = get(if only_head { head } else { embeddings })?;
    Ok((shared.clone(), shared))
}

impl CausalLm for Decoder {
    fn new_cache(&self) -> Cache {
        Cache::new(self.layers.len())
    }

    fn hidden_states(&self, input_ids: &Tensor, cache: Option<&mut Cache>) -> Result<Tensor> {
        let (batch, tokens) = input_ids.dims2()?;
        let mut states = match &cache {
            Some(cache) => Some(cache.layers(self.layers.len())?),
            None => None,
        };
        let rows = self.embeddings.index_select(&input_ids.flatten_all()?, 0)?;
        let mut xs = rows.reshape((batch, tokens, ()))?;
        for (i, layer) in self.layers.iter().enumerate() {
            xs = layer.forward(&xs, states.as_mut().map(|states| &mut states[i]))?;
        }
        let xs = self.norm.forward(&xs)?;
        if let (Some(cache), Some(states)) = (cache, states) {
            cache.commit(states, tokens);
        }
        Ok(xs)
    }

    fn logits(&self, hidden_states: &Tensor) -> Result<Tensor> {
        project(hidden_states, &self.lm_head)
    }

    fn set_mode(&mut self, mode: Mode) {
        for layer in &mut self.layers {
            layer.attn.set_mode(mode);
        }
    }
}
