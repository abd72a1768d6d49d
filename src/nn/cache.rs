//! What a layer remembers between two pieces of a sequence.

use crate::State;
use crate::nn::kv_cache::KeyValues;
use candle_core::{Result, Tensor, bail};

/// The memory of one layer: its recurrent state, the last inputs of its short convolutions, and how many tokens it has
/// seen, for each of the sequences it works on. Empty by default, its size does not grow with the tokens, except that of
/// softmax attention, which remembers the keys and values of all of them.
///
/// It holds values, not history: gradients do not flow from one call into an earlier one.
#[derive(Debug, Clone, Default)]
pub struct LayerCache {
    state: Option<State>,
    conv: Vec<Tensor>,
    /// Of each sequence, in layers of softmax attention.
    key_values: Vec<KeyValues>,
    positions: Vec<usize>,
}

impl LayerCache {
    /// An empty cache, for the start of a sequence.
    pub fn new() -> Self {
        Self::default()
    }

    /// The recurrent state, `None` before the first token and in layers that have none.
    pub fn state(&self) -> Option<&State> {
        self.state.as_ref()
    }

    /// How many tokens have been seen: of each sequence, or of the longest where they differ.
    pub fn tokens(&self) -> usize {
        self.positions.iter().copied().max().unwrap_or(0)
    }

    /// How many tokens of each sequence have been seen; empty before the first call.
    pub fn positions(&self) -> &[usize] {
        &self.positions
    }

    /// The size of everything held, in bytes.
    pub fn bytes(&self) -> usize {
        self.key_values.iter().map(KeyValues::bytes).chain(self.tensors().map(size)).sum()
    }

    /// What each sequence takes besides keys and values.
    pub(crate) fn bytes_of_sequence(&self) -> f64 {
        let tensors: usize = self.tensors().map(size).sum();
        let fixed = size_of::<usize>() + if self.key_values.is_empty() { 0 } else { size_of::<KeyValues>() };
        fixed as f64 + tensors as f64 / self.positions.len().max(1) as f64
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// The keys and values of each sequence, in layers of softmax attention.
    pub(crate) fn key_values(&self) -> &[KeyValues] {
        &self.key_values
    }

    /// The last inputs of all of the layer's short convolutions.
    pub(crate) fn conv(&self) -> &[Tensor] {
        &self.conv
    }

    /// Stores what a layer remembers, and how many more tokens it has seen of each sequence.
    pub(crate) fn advance(&mut self, state: Option<State>, conv: Vec<Tensor>, lengths: &[usize]) {
        self.state = state.map(|state| State { kv: state.kv.detach(), z: state.z.map(|z| z.detach()) });
        self.conv = conv.iter().map(Tensor::detach).collect();
        self.move_on(lengths);
    }

    /// Stores the keys and values that softmax attention remembers, and how many more tokens it has seen.
    pub(crate) fn advance_key_values(&mut self, key_values: Vec<KeyValues>, lengths: &[usize]) {
        self.key_values = key_values;
        self.move_on(lengths);
    }

    fn move_on(&mut self, lengths: &[usize]) {
        self.positions.resize(lengths.len(), 0);
        self.positions.iter_mut().zip(lengths).for_each(|(position, length)| *position += length);
    }

    /// The tensors, each with one row a sequence, always in the same order.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let state = self.state.iter().flat_map(|state| std::iter::once(&state.kv).chain(&state.z));
        state.chain(&self.conv)
    }

    /// The sequences at `indices`.
    pub(crate) fn select(&self, indices: &[usize]) -> Result<Self> {
        let numbers: Vec<u32> = indices.iter().map(|index| *index as u32).collect();
        let own = |index: &usize| self.key_values.get(*index).cloned();
        let positions = indices.iter().filter_map(|index| self.positions.get(*index).copied()).collect();
        self.map(positions, indices.iter().filter_map(own).collect(), |tensor| {
            tensor.index_select(&Tensor::new(numbers.as_slice(), tensor.device())?, 0)
        })
    }

    /// The same cache with other sequences in it: every tensor mapped, and what does not lie in tensors of all.
    fn map(
        &self,
        positions: Vec<usize>,
        key_values: Vec<KeyValues>,
        mut tensor: impl FnMut(&Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        let state = match &self.state {
            Some(State { kv, z }) => {
                let kv = tensor(kv)?;
                Some(State { kv, z: z.as_ref().map(&mut tensor).transpose()? })
            }
            None => None,
        };
        let conv = self.conv.iter().map(tensor).collect::<Result<_>>()?;
        Ok(Self { state, conv, key_values, positions })
    }

    /// A cache like this one, of `sequences` that have seen nothing.
    pub(crate) fn zeros(&self, sequences: usize) -> Result<Self> {
        let key_values = if self.key_values.is_empty() { 0 } else { sequences };
        self.map(vec![0; sequences], vec![KeyValues::default(); key_values], |tensor| {
            let mut dims = tensor.dims().to_vec();
            dims[0] = sequences;
            Tensor::zeros(dims, tensor.dtype(), tensor.device())
        })
    }

    /// Copies the sequences of `from`, a cache that is [alike](Self::check_alike), over those at `indices`. In place:
    /// whoever has a clone of this cache sees it. Keys and values are not copied.
    pub(crate) fn store(&mut self, indices: &[usize], from: &Self) -> Result<()> {
        for (own, from) in self.tensors().zip(from.tensors()) {
            // A tensor without elements has nothing to copy, and Candle would not do it.
            for (i, index) in indices.iter().enumerate().filter(|_| from.elem_count() > 0) {
                own.slice_set(&from.narrow(0, i, 1)?.contiguous()?, 0, *index)?;
            }
        }
        for (index, position) in indices.iter().zip(&from.positions) {
            self.positions[*index] = *position;
        }
        for (index, key_values) in indices.iter().zip(&from.key_values) {
            self.key_values[*index] = key_values.clone();
        }
        Ok(())
    }

    /// Gives back the memory of a sequence that nobody will ask for, where it has memory of its own.
    pub(crate) fn release(&mut self, index: usize) {
        if let Some(key_values) = self.key_values.get_mut(index) {
            *key_values = KeyValues::default();
        }
    }

    /// Refuses a cache whose tensors are others than those of this one, but for the number of sequences.
    pub(crate) fn check_alike(&self, other: &Self) -> Result<()> {
        let kinds = |cache: &Self| -> Vec<_> {
            let kind =
                |tensor: &Tensor| (tensor.dims()[1..].to_vec(), tensor.dtype(), tensor.device().location());
            cache.tensors().map(kind).collect()
        };
        let (own, found) = (kinds(self), kinds(other));
        if own != found {
            bail!("cache: holds {found:?} of each sequence, it must be {own:?}, as those before");
        }
        let kinds = |cache: &Self| cache.key_values.iter().find_map(KeyValues::kind);
        let differ = matches!((kinds(self), kinds(other)), (Some(own), Some(found)) if own != found);
        if self.key_values.is_empty() != other.key_values.is_empty() || differ {
            bail!("cache: holds other keys and values than those before");
        }
        Ok(())
    }

    /// Refuses a cache that some other layer has filled.
    pub(crate) fn check_convs(&self, own: usize) -> Result<()> {
        let held = self.conv.len();
        if !self.key_values.is_empty() {
            bail!("cache: holds keys and values of softmax attention, which this layer has not");
        }
        if !self.positions.is_empty() && held != own {
            bail!("cache: holds the inputs of {held} short convolutions, this layer has {own}");
        }
        Ok(())
    }
}

/// In bytes.
fn size(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}
