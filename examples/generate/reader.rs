//! Tokens in, logits out, with the state of what has been read.

use crate::common::runtime::progress_bar;
use anyhow::{Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use candle_linear_attn::models::{Cache, Model};

/// A prompt is read in pieces of so many tokens: what a piece needs besides the state grows with its length.
pub const PIECE: usize = 2048;
/// Prompts from which on there is time to look at a bar.
const LONG: usize = 2 * PIECE;
const BAR: &str = "reading {bar:30} {pos}/{len} tokens, {eta} left";

pub struct Reader<'a> {
    model: &'a Model,
    cache: Cache,
    /// The most that states have taken, in bytes.
    pub peak_state: usize,
}

impl<'a> Reader<'a> {
    pub fn new(model: &'a Model) -> Self {
        Self { model, cache: model.new_cache(), peak_state: 0 }
    }

    /// What has been read, to come back to. It shares its tensors with the reader.
    pub fn state(&self) -> Cache {
        self.cache.clone()
    }

    /// Goes back to a state, or to the beginning.
    pub fn rewind(&mut self, state: Option<Cache>) {
        self.cache = state.unwrap_or_else(|| self.model.new_cache());
    }

    /// Logits `[vocab]` f32 after the last of `ids`. The others need no logits, so they do not go through the head.
    pub fn read(&mut self, ids: &[u32]) -> Result<Tensor> {
        let last = self.read_only(ids)?;
        self.logits(&last)
    }

    /// `[vocab]` f32 of a hidden state.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = self.model.logits(hidden)?.flatten_all()?.to_dtype(DType::F32)?;
        Ok(logits.to_device(&Device::Cpu)?)
    }

    /// The hidden state after the last of `ids`, `[1, 1, hidden]`.
    pub fn read_only(&mut self, ids: &[u32]) -> Result<Tensor> {
        self.check(ids)?;
        let bar = (ids.len() >= LONG).then(|| progress_bar(ids.len() as u64, BAR));
        let mut last = None;
        for piece in ids.chunks(PIECE) {
            let input = Tensor::from_slice(piece, (1, piece.len()), self.model.device())?;
            let hidden = self.model.hidden_states(&input, Some(&mut self.cache))?;
            last = Some(hidden.narrow(1, piece.len() - 1, 1)?);
            self.peak_state = self.peak_state.max(self.cache.bytes());
            if let Some(bar) = &bar {
                bar.inc(piece.len() as u64);
            }
        }
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
        let Some(last) = last else { bail!("the prompt has no tokens") };
        Ok(last)
    }

    fn check(&self, ids: &[u32]) -> Result<()> {
        let vocab = self.model.config().vocab_size();
        let highest = ids.iter().copied().max().unwrap_or(0);
        ensure!(
            (highest as usize) < vocab,
            "the tokenizer gives token {highest}, the model knows {vocab}: they do not belong together"
        );
        Ok(())
    }
}
