//! How rotary frequencies are stretched for sequences longer than those of the training.

use candle_core::{Result, bail};
use std::f64::consts::TAU;

/// A change of the frequencies `f_i = base^(-2i / dim)` of a [`RotaryEmbedding`](super::RotaryEmbedding).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum RotaryScaling {
    /// As they are.
    #[default]
    None,
    /// All divided by the factor ([Chen et al., 2023](https://arxiv.org/abs/2306.15595)).
    Linear {
        /// How many times as long sequences may be.
        factor: f64,
    },
    /// The low ones divided by the factor, the high ones as they are, a ramp between: what Llama 3.1 does.
    Llama3 {
        /// How many times as long sequences may be.
        factor: f64,
        /// Waves longer than `original_len / low_freq_factor` are low.
        low_freq_factor: f64,
        /// Waves shorter than `original_len / high_freq_factor` are high.
        high_freq_factor: f64,
        /// How long sequences were.
        original_len: f64,
    },
    /// YaRN ([Peng et al., 2023](https://arxiv.org/abs/2309.00071)): low ones divided, high ones not, a ramp over the
    /// channels between, and sines and cosines multiplied by `attention_factor`.
    Yarn {
        /// How many times as long sequences may be.
        factor: f64,
        /// Channels that turn more often than this in `original_len` tokens are high.
        beta_fast: f64,
        /// Channels that turn less often are low.
        beta_slow: f64,
        /// How long sequences were.
        original_len: f64,
        /// On sines and cosines.
        attention_factor: f64,
        /// Whether the ramp begins and ends at whole channels.
        truncate: bool,
    },
}

impl RotaryScaling {
    /// The frequencies for `dim` channels, and the factor on sines and cosines.
    pub(crate) fn frequencies(&self, dim: usize, base: f64) -> Result<(Vec<f64>, f64)> {
        self.check()?;
        let plain: Vec<f64> = (0..dim / 2).map(|i| base.powf(-((2 * i) as f64) / dim as f64)).collect();
        let changed = match *self {
            Self::None => plain,
            Self::Linear { factor } => plain.iter().map(|f| f / factor).collect(),
            Self::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original_len } => {
                // Turns in the original length; 1 on the ramp where a channel keeps its frequency.
                let kept = |f: f64| ((original_len * f / TAU - low) / (high - low)).clamp(0., 1.);
                plain.iter().map(|f| kept(*f) * f + (1. - kept(*f)) * f / factor).collect()
            }
            Self::Yarn { factor, beta_fast, beta_slow, original_len, truncate, .. } => {
                // The channel that turns so often in the original length.
                let channel =
                    |turns: f64| dim as f64 * (original_len / (turns * TAU)).ln() / (2. * base.ln());
                let (mut from, mut to) = (channel(beta_fast), channel(beta_slow));
                if truncate {
                    (from, to) = (from.floor(), to.ceil());
                }
                let (from, mut to) = (from.max(0.), to.min(dim as f64 - 1.));
                if from == to {
                    to += 1e-3;
                }
                let low = |i: usize| ((i as f64 - from) / (to - from)).clamp(0., 1.);
                plain.iter().enumerate().map(|(i, f)| low(i) * f / factor + (1. - low(i)) * f).collect()
            }
        };
        let attention_factor = match *self {
            Self::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.,
        };
        Ok((changed, attention_factor))
    }

    /// Refuses numbers that make no frequencies.
    fn check(&self) -> Result<()> {
        let numbers: &[(&str, f64)] = match self {
            Self::None => &[],
            Self::Linear { factor } => &[("factor", *factor)],
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_len } => {
                if high_freq_factor <= low_freq_factor {
                    bail!(
                        "rotary embedding: high_freq_factor is {high_freq_factor}, it must be above low_freq_factor, which is {low_freq_factor}"
                    );
                }
                &[
                    ("factor", *factor),
                    ("low_freq_factor", *low_freq_factor),
                    ("original_max_position_embeddings", *original_len),
                ]
            }
            Self::Yarn { factor, beta_fast, beta_slow, original_len, attention_factor, .. } => &[
                ("factor", *factor),
                ("beta_fast", *beta_fast),
                ("beta_slow", *beta_slow),
                ("original_max_position_embeddings", *original_len),
                ("attention_factor", *attention_factor),
            ],
        };
        match numbers.iter().find(|(_, number)| !(number.is_finite() && *number > 0.)) {
            Some((name, number)) => {
                bail!("rotary embedding: {name} is {number}, it must be finite and above 0")
            }
            None => Ok(()),
        }
    }
}
