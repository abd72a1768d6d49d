//! What a model remembers between two pieces of a sequence.

use crate::nn::LayerCache;
use candle_core::{Result, bail};

/// The memory of a model: one state for each layer, whose size does not depend on how many tokens have been seen, except
/// in layers of softmax attention, which keep the keys and values of every token.
///
/// A clone costs nothing, and neither sees what the other goes on to see. Made by [`Model::new_cache`](crate::models::Model::new_cache) and good for that model alone. If a call fails, the
/// cache is as it was before.
#[derive(Debug, Clone)]
pub struct Cache {
    layers: Vec<LayerCache>,
}

impl Cache {
    pub(super) fn new(layers: usize) -> Self {
        Self { layers: vec![LayerCache::new(); layers] }
    }

    /// The size of all states, in bytes.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(LayerCache::bytes).sum()
    }

    /// How many tokens have been seen: of each sequence, or of the longest where they differ.
    pub fn tokens(&self) -> usize {
        self.layers.first().map_or(0, LayerCache::tokens)
    }

    /// How many tokens of each sequence have been seen; empty before the first call.
    pub fn positions(&self) -> &[usize] {
        self.layers.first().map_or(&[], LayerCache::positions)
    }

    /// How many layers it is for.
    pub(super) fn len(&self) -> usize {
        self.layers.len()
    }

    /// Forgets everything, for a new sequence.
    pub fn reset(&mut self) {
        *self = Self::new(self.layers.len());
    }

    /// A copy of the states to work on, for a model of so many layers. Tensors are shared, so this costs nothing.
    pub(super) fn layers(&self, layers: usize) -> Result<Vec<LayerCache>> {
        if self.layers.len() != layers {
            bail!("cache: made for a model of {} layers, this one has {layers}", self.layers.len());
        }
        Ok(self.layers.clone())
    }

    /// Stores the states after a call.
    pub(super) fn commit(&mut self, layers: Vec<LayerCache>) {
        self.layers = layers;
    }
}
