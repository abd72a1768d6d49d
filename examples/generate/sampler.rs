//! From logits to the next token.

use crate::settings::Settings;
use anyhow::{Result, ensure};
use candle_core::Tensor;
use candle_transformers::{
    generation::{LogitsProcessor, Sampling},
    utils::apply_repeat_penalty,
};

pub struct Sampler {
    processor: LogitsProcessor,
    repeat_penalty: f32,
    repeat_last_n: usize,
}

impl Sampler {
    pub fn new(settings: &Settings) -> Self {
        // candle takes p as f32, and 0 leaves it no token to choose.
        let (temperature, p) = (settings.temperature, settings.top_p.max(f32::MIN_POSITIVE.into()));
        let sampling = match settings.top_k {
            // A temperature this low is the likeliest token but for overflow.
            _ if temperature < 1e-5 => Sampling::ArgMax,
            None if p < 1.0 => Sampling::TopP { p, temperature },
            None => Sampling::All { temperature },
            Some(k) if p < 1.0 => Sampling::TopKThenTopP { k, p, temperature },
            Some(k) => Sampling::TopK { k, temperature },
        };
        Self {
            processor: LogitsProcessor::from_sampling(settings.seed, sampling),
            repeat_penalty: settings.repeat_penalty,
            repeat_last_n: settings.repeat_last_n,
        }
    }

    /// The token after `ids`, given the logits `[vocab]` for it.
    pub fn next(&mut self, logits: &Tensor, ids: &[u32]) -> Result<u32> {
        let recent = &ids[ids.len().saturating_sub(self.repeat_last_n)..];
        let penalized;
        let logits = if self.repeat_penalty == 1.0 {
            logits
        } else {
            penalized = apply_repeat_penalty(logits, self.repeat_penalty, recent)?;
            &penalized
        };
        ensure!(
            !logits.to_vec1::<f32>()?.iter().any(|x| x.is_nan()),
            "the model's logits are not numbers; its weights may be broken, or too large for --dtype"
        );
        Ok(self.processor.sample(logits)?)
    }
}
