//! From what has been read to the end of the text that comes after it.

use crate::{reader::Reader, sampler::Sampler, settings::Settings};
use anyhow::Result;
use candle_core::Tensor;
use candle_linear_attn::models::Model;
use std::{
    collections::HashSet,
    fmt,
    time::{Duration, Instant},
};

pub struct Generator<'a> {
    pub reader: Reader<'a>,
    sampler: Sampler,
    ends: HashSet<u32>,
    max_new_tokens: usize,
    report: Report,
}

impl<'a> Generator<'a> {
    pub fn new(model: &'a Model, settings: Settings) -> Self {
        Self {
            reader: Reader::new(model),
            sampler: Sampler::new(&settings),
            ends: settings.ends.unwrap_or_else(|| model.config().eos_token_ids().into_iter().collect()),
            max_new_tokens: settings.max_new_tokens,
            report: Report::default(),
        }
    }

    /// Says that a token ends a text as well.
    pub fn end_at(&mut self, token: u32) {
        self.ends.insert(token);
    }

    /// Goes on from `ids` until the text ends, the limit is reached or `show` returns false, and puts what it writes behind
    /// them. The first token comes out of `logits`. What it writes has been read, but for the last token where something
    /// other than [`End::Token`] comes behind it.
    pub fn write(
        &mut self,
        mut logits: Tensor,
        ids: &mut Vec<u32>,
        mut show: impl FnMut(u32) -> Result<bool>,
    ) -> Result<End> {
        let started = Instant::now();
        let mut end = End::Limit;
        for count in 1..=self.max_new_tokens {
            let id = self.sampler.next(&logits, ids)?;
            // The first comes out of the prompt's last position; decoding is what each further one takes.
            self.report.decoded += usize::from(count > 1);
            if self.ends.contains(&id) {
                end = End::Token;
                break;
            }
            ids.push(id);
            if !show(id)? {
                end = End::Unwanted;
                break;
            }
            if count < self.max_new_tokens {
                logits = self.reader.read(&[id])?;
            }
        }
        self.report.decode_time += started.elapsed();
        Ok(end)
    }

    /// How fast it went, given how many tokens were prompts and how long they took.
    pub fn report(&self, prompt_tokens: usize, prompt_time: Duration) -> Report {
        Report { prompt_tokens, prompt_time, peak_state: self.reader.peak_state, ..self.report }
    }
}

/// How a text came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By a token that says so.
    Token,
    /// It was as long as it may be.
    Limit,
    /// Nobody wants to see more.
    Unwanted,
}

/// How fast it went.
#[derive(Debug, Default, Clone, Copy)]
pub struct Report {
    prompt_tokens: usize,
    prompt_time: Duration,
    decoded: usize,
    decode_time: Duration,
    peak_state: usize,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
        write!(
            f,
            "prompt: {} tokens, {:.1} tokens/s; decode: {} tokens, {:.1} tokens/s; peak state: {:.1} KiB",
            self.prompt_tokens,
            rate(self.prompt_tokens, self.prompt_time),
            self.decoded,
            rate(self.decoded, self.decode_time),
            self.peak_state as f64 / 1024.0,
        )
    }
}
