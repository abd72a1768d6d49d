//! What a layer remembers between two pieces of a sequence.

use crate::{Mode, Options, State};
use candle_core::{Result, Tensor, bail};

/// The memory of one layer: its recurrent state, the last inputs of its short convolutions, and how many tokens it has
/// seen. Empty by default, its size does not grow with the tokens.
///
/// It holds values, not history: gradients do not flow from one call into an earlier one.
#[derive(Debug, Clone, Default)]
pub struct LayerCache {
    state: Option<State>,
    conv: Vec<Tensor>,
    tokens: usize,
}

impl LayerCache {
    /// An empty cache, for the start of a sequence.
    pub fn new() -> Self {
        Self::default()
    }

    /// The recurrent state, `None` before the first token.
    pub fn state(&self) -> Option<&State> {
        self.state.as_ref()
    }

    /// How many tokens of each sequence have been seen.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The size of everything held, in bytes.
    pub fn bytes(&self) -> usize {
        let state = self.state.iter().flat_map(|state| std::iter::once(&state.kv).chain(&state.z));
        let size = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        state.chain(&self.conv).map(size).sum()
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// The last inputs of the layer's short convolution number `index`.
    pub(crate) fn conv(&self, index: usize) -> Option<&Tensor> {
        self.conv.get(index)
    }

    /// How many short convolutions it holds the inputs of.
    pub(crate) fn conv_count(&self) -> usize {
        self.conv.len()
    }

    /// Stores what a layer remembers after `tokens` more tokens.
    pub(crate) fn advance(&mut self, state: Option<State>, conv: Vec<Tensor>, tokens: usize) {
        self.state = state.map(|state| State { kv: state.kv.detach(), z: state.z.map(|z| z.detach()) });
        self.conv = conv.iter().map(Tensor::detach).collect();
        self.tokens += tokens;
    }
}

/// The options under which a layer calls its operator: continue from the cache, if there is one, and return the state.
pub(crate) fn options(mode: Mode, cache: Option<&LayerCache>) -> Options {
    let options = Options::default().with_mode(mode).with_final_state(cache.is_some());
    match cache.and_then(LayerCache::state) {
        Some(state) => options.with_initial_state(state),
        None => options,
    }
}

/// `(B, T)` of a layer's input, or an error that says what is wrong with it.
pub(crate) fn check_input(
    xs: &Tensor,
    hidden_size: usize,
    cache: Option<&LayerCache>,
) -> Result<(usize, usize)> {
    let (batch, tokens) = match *xs.dims() {
        [batch, tokens, hidden] if hidden == hidden_size && batch > 0 && tokens > 0 => (batch, tokens),
        _ => bail!("xs: shape is {:?}, it must be [B, T, {hidden_size}] with B and T at least 1", xs.dims()),
    };
    if let Some(state) = cache.and_then(LayerCache::state) {
        let held = state.kv.dim(0)?;
        if held != batch {
            bail!("xs: batch size is {batch}, but the cache holds {held} sequences");
        }
    }
    Ok((batch, tokens))
}
