//! From logits to the next token.

use crate::settings::Settings;
use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use candle_transformers::{
    generation::{LogitsProcessor, Sampling},
    utils::apply_repeat_penalty,
};

pub struct Sampler {
    processor: LogitsProcessor,
    min_p: f64,
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
            min_p: settings.min_p,
            repeat_penalty: settings.repeat_penalty as f32,
            repeat_last_n: settings.repeat_last_n,
        }
    }

    /// The token after `ids`, given the logits `[vocab]` for it.
    pub fn next(&mut self, logits: &Tensor, ids: &[u32]) -> Result<u32> {
        // Once: what follows looks at them several times, which a GPU would be waited for at each.
        let logits = &logits.to_device(&Device::Cpu)?;
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
        let min_p = self.min_p as f32;
        Ok(self.processor.sample_f(logits, |probabilities| {
            let least = min_p * probabilities.iter().copied().fold(0., f32::max);
            probabilities.iter_mut().filter(|p| **p < least).for_each(|p| *p = 0.);
        })?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Every token that is ever chosen of five, whose probabilities are 0.4, 0.3, 0.15, 0.1 and 0.05.
    fn chosen(change: impl FnOnce(&mut Settings)) -> BTreeSet<u32> {
        let mut settings = Settings::plain();
        change(&mut settings);
        let mut sampler = Sampler::new(&settings);
        let probabilities = [0.3f32, 0.05, 0.4, 0.1, 0.15];
        let logits = Tensor::new(&probabilities.map(f32::ln), &Device::Cpu).unwrap();
        (0..500).map(|_| sampler.next(&logits, &[]).unwrap()).collect()
    }

    #[test]
    fn unlikely_tokens_are_left_out() {
        assert_eq!(chosen(|_| {}), BTreeSet::from([0, 1, 2, 3, 4]));
        assert_eq!(chosen(|s| s.min_p = 0.3), BTreeSet::from([0, 2, 4]));
        assert_eq!(chosen(|s| (s.min_p, s.top_p) = (0.3, 0.65)), BTreeSet::from([0, 2]));
        assert_eq!(chosen(|s| (s.min_p, s.top_k) = (0.3, Some(4))), BTreeSet::from([0, 2, 4]));
        assert_eq!(chosen(|s| (s.min_p, s.top_p, s.top_k) = (0.3, 0.9, Some(2))), BTreeSet::from([0, 2]));
        assert_eq!(chosen(|s| s.min_p = 1.), BTreeSet::from([2]));
        assert_eq!(chosen(|s| s.temperature = 0.), BTreeSet::from([2]));
    }
}
