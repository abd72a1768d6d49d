//! The states of many sequences that come and go, for a server that decodes them together.

use crate::memory;
use crate::models::cache::Cache;
use crate::nn::LayerCache;
use candle_core::{Result, bail};
use std::collections::BTreeSet;

/// A fixed number of slots, each with the states of one sequence or empty.
///
/// A server prefills new prompts in a cache of their own, packed or not, [`store`](Self::store)s them in free slots, and
/// decodes any selection of slots as one batch: [`load`](Self::load) makes the cache of the batch, and `store` puts it
/// back. A sequence gets what it would get alone.
///
/// Made by [`Model::new_pool`](crate::models::Model::new_pool), good for that model alone. Its memory is taken when the
/// first sequence is stored, and does not grow with tokens, but for the keys and values of models that have softmax
/// attention: those belong to each sequence, and are given back with it.
///
/// ```no_run
/// use candle_core::{Device, Tensor};
/// use candle_linear_attn::models::Model;
///
/// # fn main() -> candle_core::Result<()> {
/// let model = Model::load("path/to/checkpoint", None, &Device::Cpu)?;
/// let mut pool = model.new_pool(64);
/// // Two prompts, of three and of two tokens.
/// let prompts = Tensor::new(&[[5u32, 17, 3, 8, 1]], &Device::Cpu)?;
/// let mut cache = model.new_cache();
/// let hidden = model.hidden_states_packed(&prompts, &[0, 3, 5], Some(&mut cache))?;
/// let last = model.logits(&hidden.index_select(&Tensor::new(&[2u32, 4], &Device::Cpu)?, 1)?)?; // [1, 2, vocab_size]
/// pool.store(&[7, 0], &cache)?;
/// // A token for each, in whatever order and company.
/// let mut cache = pool.load(&[0, 7])?;
/// let logits = model.forward(&Tensor::new(&[[4u32], [2]], &Device::Cpu)?, Some(&mut cache))?; // [2, 1, vocab_size]
/// pool.store(&[0, 7], &cache)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Pool {
    /// Of all slots together; empty until the first sequence is stored. Nobody else has these tensors: they change in
    /// place.
    layers: Vec<LayerCache>,
    slots: usize,
    /// The slots that hold a sequence.
    held: BTreeSet<usize>,
}

impl Pool {
    pub(super) fn new(layers: usize, slots: usize) -> Self {
        Self { layers: vec![LayerCache::new(); layers], slots, held: BTreeSet::new() }
    }

    /// How many slots there are.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// An empty slot, if there is one.
    pub fn free(&self) -> Option<usize> {
        (0..self.slots).find(|slot| !self.held.contains(slot))
    }

    /// How many tokens the sequence in a slot has seen; `None` if it is empty or there is no such slot.
    pub fn tokens(&self, slot: usize) -> Option<usize> {
        self.layers.first()?.positions().get(slot).copied().filter(|_| self.held.contains(&slot))
    }

    /// The size of the states of all slots, in bytes.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(LayerCache::bytes).sum()
    }

    /// Empties a slot.
    ///
    /// # Errors
    /// There is no such slot.
    pub fn release(&mut self, slot: usize) -> Result<()> {
        self.check(&[slot])?;
        self.held.remove(&slot);
        self.layers.iter_mut().for_each(|layer| layer.release(slot));
        Ok(())
    }

    /// Puts the sequences of a cache in slots, the first in `slots[0]` and so on, over what they held.
    ///
    /// # Errors
    /// A slot that there is not or that comes twice, or as many slots as the cache has not sequences; the cache of another
    /// model than that of the sequences that are held; more memory than this machine has.
    pub fn store(&mut self, slots: &[usize], cache: &Cache) -> Result<()> {
        self.check(slots)?;
        let sequences = cache.positions().len();
        if slots.len() != sequences {
            bail!("slots: there are {}, but the cache holds {sequences} sequences", slots.len());
        }
        if slots.is_empty() {
            return Ok(());
        }
        let from = cache.layers(self.layers.len())?;
        let alike = self.layers.iter().zip(&from).try_for_each(|(own, from)| own.check_alike(from));
        match alike {
            Err(_) if self.held.is_empty() => self.layers = self.room_for(&from)?,
            alike => alike?,
        }
        for (own, from) in self.layers.iter_mut().zip(&from) {
            own.store(slots, from)?;
        }
        self.held.extend(slots);
        Ok(())
    }

    /// Layers of empty slots for sequences such as these.
    fn room_for(&self, from: &[LayerCache]) -> Result<Vec<LayerCache>> {
        let bytes = self.slots as f64 * from.iter().map(LayerCache::bytes_of_sequence).sum::<f64>();
        if !memory::is_available(bytes) {
            bail!("slots: the states of {} need {} of memory", self.slots, memory::shown(bytes));
        }
        from.iter().map(|layer| layer.zeros(self.slots)).collect()
    }

    /// A cache of the sequences in these slots, in this order. The slots keep them until others are stored there.
    ///
    /// # Errors
    /// A slot that there is not, is empty or comes twice.
    pub fn load(&self, slots: &[usize]) -> Result<Cache> {
        self.check(slots)?;
        if let Some(slot) = slots.iter().find(|slot| !self.held.contains(slot)) {
            bail!("slots: slot {slot} is empty");
        }
        let mut cache = Cache::new(self.layers.len());
        cache.commit(self.layers.iter().map(|layer| layer.select(slots)).collect::<Result<_>>()?);
        Ok(cache)
    }

    fn check(&self, slots: &[usize]) -> Result<()> {
        let mut seen = BTreeSet::new();
        for slot in slots {
            if *slot >= self.slots {
                bail!("slots: slot {slot} does not exist, there are {}", self.slots);
            }
            if !seen.insert(slot) {
                bail!("slots: slot {slot} comes twice");
            }
        }
        Ok(())
    }
}
