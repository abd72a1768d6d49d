//! What a model remembers between two pieces of a sequence.

use crate::nn::LayerCache;
use candle_core::{Result, bail};

/// The memory of a model: one state for each layer, whose size does not depend on how many tokens have been seen.
///
/// Made by [`Model::new_cache`](crate::models::Model::new_cache) and good for that model alone. If a call fails, the
/// cache is as it was before.
#[derive(Debug, Clone)]
pub struct Cache {
    layers: Vec<LayerCache>,
    tokens: usize,
}

impl Cache {
    pub(super) fn new(layers: usize) -> Self {
        Self {
            layers: vec![LayerCache::new(); layers],
            tokens: 0,
        }
    }

    /// The size of all states, in bytes.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(LayerCache::bytes).sum()
    }

    /// How many tokens of each sequence have been seen.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Forgets everything, for a new sequence.
    pub fn reset(&mut self) {
        *self = Self::new(self.layers.len());
    }

    /// A copy of the states to work on, for a model of so many layers. Tensors are shared, so this costs nothing.
    pub(super) fn layers(&self, layers: usize) -> Result<Vec<LayerCache>> {
        if self.layers.len() != layers {
            bail!(
                "cache: made for a model of {} layers, this one has {layers}",
                self.layers.len()
            );
        }
        Ok(self.layers.clone())
    }

    /// Stores the states after `tokens` more tokens.
    pub(super) fn commit(&mut self, layers: Vec<LayerCache>, tokens: usize) {
        self.layers = layers;
        self.tokens += tokens;
    }
}
