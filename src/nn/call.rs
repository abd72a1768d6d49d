//! One call of a layer: what it continues, and how sequences lie in its input.

use crate::nn::LayerCache;
use crate::nn::kv_cache::KeyValues;
use crate::problem;
use crate::{Mode, Options, State};
use candle_core::{Result, Tensor, bail};

/// A layer that lets tokens see each other.
pub(crate) trait Mixer: Send + Sync {
    /// `xs: [B, T, hidden_size]` to the same shape and dtype.
    fn mix(&self, xs: &Tensor, call: Call) -> Result<Tensor>;

    fn set_mode(&mut self, mode: Mode);
}

/// Gives a layer that has `mix` the methods that all have in common.
macro_rules! forward_methods {
    ($layer:ty) => {
        impl $layer {
            /// `xs: [B, T, hidden_size]` to the same shape and dtype. With a cache, `xs` continues what the cache has
            /// seen, and the cache is brought up to date.
            ///
            /// # Errors
            /// A wrong shape, or a cache of another batch size.
            pub fn forward(&self, xs: &Tensor, cache: Option<&mut LayerCache>) -> Result<Tensor> {
                self.mix(xs, Call::new(cache, None))
            }

            /// [`forward`](Self::forward) for N sequences that lie one after the other in `xs: [1, T, hidden_size]`:
            /// sequence i has the tokens from `cu_seqlens[i]` to `cu_seqlens[i + 1]`. Some may be empty. The cache is one
            /// of N sequences.
            ///
            /// # Errors
            /// Those of `forward`; `cu_seqlens` that does not begin with 0, decreases or does not end at T; B other than 1.
            pub fn forward_packed(
                &self,
                xs: &Tensor,
                cu_seqlens: &[u32],
                cache: Option<&mut LayerCache>,
            ) -> Result<Tensor> {
                self.mix(xs, Call::new(cache, Some(cu_seqlens)))
            }
        }
    };
}
pub(crate) use forward_methods;

/// The same for a [`Mixer`], whose algorithm can be chosen.
macro_rules! public_methods {
    ($layer:ty) => {
        $crate::nn::call::forward_methods!($layer);

        impl $layer {
            /// The algorithm of the operator. Default: [`Mode::Auto`].
            pub fn set_mode(&mut self, mode: Mode) {
                Mixer::set_mode(self, mode);
            }
        }
    };
}
pub(crate) use public_methods;

/// The arguments of a call besides its input.
pub(crate) struct Call<'a> {
    cache: Option<&'a mut LayerCache>,
    cu_seqlens: Option<&'a [u32]>,
}

impl<'a> Call<'a> {
    pub fn new(cache: Option<&'a mut LayerCache>, cu_seqlens: Option<&'a [u32]>) -> Self {
        Self { cache, cu_seqlens }
    }

    /// `(B, T)` of the input, or an error that says what is wrong with it.
    pub fn check(&self, xs: &Tensor, hidden_size: usize) -> Result<(usize, usize)> {
        let (batch, tokens) = match *xs.dims() {
            [batch, tokens, hidden] if hidden == hidden_size && batch > 0 && tokens > 0 => (batch, tokens),
            _ => bail!(
                "xs: shape is {:?}, it must be [B, T, {hidden_size}] with B and T at least 1",
                xs.dims()
            ),
        };
        let sequences = problem::sequences("xs", batch, tokens, self.cu_seqlens)?.len();
        if let Some(cache) = &self.cache {
            let held = cache.positions().len();
            if held > 0 && held != sequences {
                let what = if self.cu_seqlens.is_some() { "number of sequences" } else { "batch size" };
                bail!("xs: {what} is {sequences}, but the cache holds {held} sequences");
            }
        }
        Ok((batch, tokens))
    }

    pub fn cu_seqlens(&self) -> Option<&[u32]> {
        self.cu_seqlens
    }

    /// The cache, to read.
    pub fn cache(&self) -> Option<&LayerCache> {
        self.cache.as_deref()
    }

    /// The last inputs of short convolution `index` of the `own` that the layer has.
    pub fn past(&self, index: usize, own: usize) -> Result<Option<&Tensor>> {
        let Some(cache) = self.cache() else { return Ok(None) };
        cache.check_convs(own)?;
        Ok(cache.conv().get(index))
    }

    /// The options under which a layer calls its operator: continue from the cache, if there is one, and return the state.
    pub fn options(&self, mode: Mode) -> Options {
        let mut options = Options::default().with_mode(mode).with_final_state(self.cache.is_some());
        if let Some(cu_seqlens) = self.cu_seqlens {
            options = options.with_cu_seqlens(cu_seqlens);
        }
        match self.cache().and_then(LayerCache::state) {
            Some(state) => options.with_initial_state(state),
            None => options,
        }
    }

    /// The position of every token of a `[B, T]` input in its sequence.
    pub fn positions(&self, batch: usize, tokens: usize) -> Vec<usize> {
        let first =
            |sequence| self.cache().and_then(|cache| cache.positions().get(sequence)).map_or(0, |at| *at);
        let lengths = self.lengths(batch, tokens).into_iter().enumerate();
        lengths.flat_map(|(i, length)| (0..length).map(move |t| first(i).saturating_add(t))).collect()
    }

    /// Brings the cache up to date.
    pub fn finish(self, state: Option<State>, conv: Vec<Tensor>, (batch, tokens): (usize, usize)) {
        let lengths = self.lengths(batch, tokens);
        if let Some(cache) = self.cache {
            cache.advance(state, conv, &lengths);
        }
    }

    /// Whether there is a cache to bring up to date.
    pub fn remembers(&self) -> bool {
        self.cache.is_some()
    }

    /// The keys and values of a sequence, in a layer of softmax attention.
    pub fn key_values(&self, sequence: usize) -> KeyValues {
        self.cache().and_then(|cache| cache.key_values().get(sequence)).cloned().unwrap_or_default()
    }

    /// Refuses the cache of a layer that is not of softmax attention.
    pub fn check_key_values(&self) -> Result<()> {
        match self.cache() {
            Some(cache) if cache.key_values().len() != cache.positions().len() => {
                bail!("cache: holds a recurrent state, this layer of softmax attention needs keys and values")
            }
            _ => Ok(()),
        }
    }

    /// [`finish`](Self::finish) of a layer of softmax attention.
    pub fn finish_key_values(self, key_values: Vec<KeyValues>, (batch, tokens): (usize, usize)) {
        let lengths = self.lengths(batch, tokens);
        if let Some(cache) = self.cache {
            cache.advance_key_values(key_values, &lengths);
        }
    }

    /// How many tokens each sequence has in a `[B, T]` input.
    pub fn lengths(&self, batch: usize, tokens: usize) -> Vec<usize> {
        match self.cu_seqlens {
            Some(cu_seqlens) => cu_seqlens.windows(2).map(|ends| (ends[1] - ends[0]) as usize).collect(),
            None => vec![tokens; batch],
        }
    }
}
