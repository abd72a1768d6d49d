//! What all models are: embeddings, blocks one after the other, a norm, a head.

use crate::Mode;
use crate::models::cache::Cache;
use crate::models::fields::Fields;
use crate::models::registry::{CausalLm, Parsed};
use crate::models::residual::{Residual, StreamNorm};
use crate::nn::{Call, LayerCache, Weight, normal, project};
use candle_core::{DType, Result, Tensor, bail};
use candle_nn::VarBuilder;
use std::sync::Arc;

/// No model is deeper. Layers are things to make: a limit of their own keeps a broken file from filling memory.
const MAX_LAYERS: usize = 1 << 14;

/// One of the blocks.
pub(super) trait Block: Send + Sync {
    /// Adds to the stream, or replaces it.
    fn forward(&self, xs: &mut Residual, pass: &mut Pass) -> Result<()>;

    fn set_mode(&mut self, mode: Mode);

    /// How many of its layers remember something.
    fn caches(&self) -> usize {
        1
    }
}

/// One way through the blocks.
pub(super) struct Pass<'a> {
    caches: Option<std::slice::IterMut<'a, LayerCache>>,
    cu_seqlens: Option<&'a [u32]>,
    /// The values of the first layer, where later ones mix them with their own.
    pub first_values: Option<Tensor>,
}

impl<'a> Pass<'a> {
    /// The call of the next layer that remembers something: the caches lie in the order of the layers.
    pub fn call(&mut self) -> Result<Call<'a>> {
        let cache = match &mut self.caches {
            None => None,
            Some(caches) => match caches.next() {
                Some(cache) => Some(cache),
                None => bail!("cache: made for a model of fewer layers"),
            },
        };
        Ok(Call::new(cache, self.cu_seqlens))
    }
}

/// The fields that all models have.
#[derive(Debug, Clone)]
pub(super) struct StackConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_layers: usize,
    pub initializer_range: f64,
    /// Deviation of a fresh head, `initializer_range` unless a model sets it.
    pub head_range: f64,
    tie_word_embeddings: bool,
}

impl StackConfig {
    /// Reads and checks the fields; the default number of layers differs from model to model.
    pub fn parse(fields: &mut Fields, num_layers: usize) -> Result<Self> {
        let initializer_range = fields.positive("initializer_range", 0.02)?;
        Ok(Self {
            hidden_size: fields.size("hidden_size", 2048)?,
            vocab_size: fields.size("vocab_size", 32000)?,
            num_layers: fields.size_up_to(MAX_LAYERS, "num_hidden_layers", num_layers)?,
            initializer_range,
            head_range: initializer_range,
            tie_word_embeddings: fields.flag("tie_word_embeddings", false)?,
        })
    }

    /// The whole model, given what is between embeddings and head.
    pub fn with_layers(self, names: Names, layers: impl Layers + 'static) -> Parsed {
        Parsed {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            num_layers: self.num_layers,
            models: names.model,
            build: Arc::new(move |vb| {
                let (embeddings, lm_head) = embeddings_and_head(&self, &names, &vb)?;
                let model = vb.pp(names.model_in(&vb));
                let block = |layer| {
                    layers.block(Site { layer, vb: model.pp(format!("layers.{layer}")), model: &model })
                };
                let blocks = (0..self.num_layers).map(block).collect::<Result<_>>()?;
                let norm = layers.norm(model.pp(names.norm))?;
                Ok(Box::new(Stack { embeddings, blocks, norm, lm_head, dtype: vb.dtype() }))
            }),
        }
    }
}

/// What is between embeddings and head: blocks, and a norm behind the last.
pub(super) trait Layers: Send + Sync {
    fn block(&self, site: Site) -> Result<Box<dyn Block>>;

    fn norm(&self, vb: VarBuilder) -> Result<Norm>;
}

/// A norm of any kind.
pub(super) type Norm = Box<dyn StreamNorm>;

/// Where a part of a model is.
pub(super) struct Site<'a> {
    /// The number of its block.
    pub layer: usize,
    /// Its parameters.
    pub vb: VarBuilder<'a>,
    /// What the blocks have in common.
    pub model: &'a VarBuilder<'a>,
}

/// What checkpoints call the parts.
pub(super) struct Names {
    /// All but the head, in files of its own and in those of a larger model.
    pub model: &'static [&'static str],
    /// The embeddings, in files of today and of old.
    pub embeddings: &'static [&'static str],
    /// The norm behind the last block.
    pub norm: &'static str,
}

/// As flash-linear-attention has them.
pub(super) const FLA: Names = Names { model: &["model"], embeddings: &["embeddings"], norm: "norm" };

/// As transformers has them.
pub(super) const TRANSFORMERS: Names =
    Names { model: &["model"], embeddings: &["embed_tokens"], norm: "norm" };

impl Names {
    /// What `vb` calls all but the head, the first if it has none of them.
    fn model_in(&self, vb: &VarBuilder) -> &'static str {
        let parts = || self.embeddings.iter().chain([&self.norm]);
        let has = |model: &&&str| parts().any(|part| vb.contains_tensor(&format!("{model}.{part}.weight")));
        self.model.iter().find(has).unwrap_or(&self.model[0])
    }
}

struct Stack {
    embeddings: Weight,
    blocks: Vec<Box<dyn Block>>,
    norm: Norm,
    lm_head: Weight,
    /// Of the activations.
    dtype: DType,
}

/// Both are `[vocab_size, hidden_size]`. A file that stores shared tensors once may have kept either name.
fn embeddings_and_head(cfg: &StackConfig, names: &Names, vb: &VarBuilder) -> Result<(Weight, Weight)> {
    let shape = (cfg.vocab_size, cfg.hidden_size);
    let get = |name: &str, stdev| Weight::get(vb, shape, name, normal(stdev));
    let model = names.model_in(vb);
    let known: Vec<_> = names.embeddings.iter().map(|name| format!("{model}.{name}.weight")).collect();
    let embeddings = known.iter().find(|name| vb.contains_tensor(name)).unwrap_or(&known[0]);
    let head = "lm_head.weight";
    if !cfg.tie_word_embeddings {
        return Ok((get(embeddings, cfg.initializer_range)?, get(head, cfg.head_range)?));
    }
    let only_head = vb.contains_tensor(head) && !vb.contains_tensor(embeddings);
    let shared = get(if only_head { head } else { embeddings }, cfg.initializer_range)?;
    Ok((shared.clone(), shared))
}

impl CausalLm for Stack {
    fn new_cache(&self) -> Cache {
        Cache::new(self.blocks.iter().map(|block| block.caches()).sum())
    }

    fn hidden_states(
        &self,
        input_ids: &Tensor,
        cu_seqlens: Option<&[u32]>,
        cache: Option<&mut Cache>,
    ) -> Result<Tensor> {
        let (batch, tokens) = input_ids.dims2()?;
        let mut caches = match &cache {
            Some(cache) => Some(cache.layers(self.new_cache().len())?),
            None => None,
        };
        let rows = self.embeddings.rows(&input_ids.flatten_all()?, self.dtype)?;
        let mut xs = Residual::new(rows.reshape((batch, tokens, ()))?);
        let mut pass =
            Pass { caches: caches.as_mut().map(|caches| caches.iter_mut()), cu_seqlens, first_values: None };
        for block in &self.blocks {
            block.forward(&mut xs, &mut pass)?;
        }
        let xs = xs.normed(&*self.norm)?;
        if let (Some(cache), Some(caches)) = (cache, caches) {
            cache.commit(caches);
        }
        Ok(xs)
    }

    fn logits(&self, hidden_states: &Tensor) -> Result<Tensor> {
        project(hidden_states, &self.lm_head)
    }

    fn set_mode(&mut self, mode: Mode) {
        self.blocks.iter_mut().for_each(|block| block.set_mode(mode));
    }
}
