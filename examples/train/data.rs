//! Texts, their tokens, and which tokens a step is trained on.

use crate::common::files::write_atomically;
use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::{Device, Tensor};
use std::path::Path;
use tokenizers::Tokenizer;

const SEPARATOR: &str = "<|endoftext|>";
const MAGIC: &[u8; 8] = b"CLATOK01";

/// A data file, split into texts.
pub struct Texts {
    contents: String,
}

impl Texts {
    pub fn read(file: &Path) -> Result<Self> {
        let contents =
            std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let texts = Self { contents };
        ensure!(texts.iter().next().is_some(), "{} has no text in it", file.display());
        Ok(texts)
    }

    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.contents
            .split(SEPARATOR)
            .map(|text| text.trim_matches(['\n', '\r']))
            .filter(|text| !text.is_empty())
    }

    pub fn fingerprint(&self) -> u64 {
        fingerprint(self.contents.as_bytes())
    }

    /// Whole texts from all over the file, about `bytes` of them.
    pub fn sample(&self, bytes: usize) -> impl Iterator<Item = &str> {
        let every = self.contents.len().div_ceil(bytes).max(1);
        self.iter().step_by(every)
    }
}

/// FNV-1a: stable over versions of everything, and fast enough for a few hundred megabytes.
pub fn fingerprint(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// All texts as one row of tokens, the end token before the first, between and after them.
pub struct TokenStream {
    pub tokens: Vec<u32>,
    /// Bytes of the texts, separators not counted: what "per byte" refers to.
    pub text_bytes: u64,
}

impl TokenStream {
    pub fn encode(texts: &Texts, tokenizer: &Tokenizer, end_token: u32) -> Result<Self> {
        let mut tokens = vec![end_token];
        let mut text_bytes = 0;
        let texts: Vec<&str> = texts.iter().collect();
        // A batch is encoded by all cores; several batches keep the encodings, bigger than the text, from piling up.
        for batch in texts.chunks(8192) {
            let encodings = tokenizer
                .encode_batch_fast(batch.to_vec(), false)
                .map_err(|e| anyhow!("cannot tokenize the data: {e}"))?;
            for (text, encoding) in batch.iter().zip(encodings) {
                text_bytes += text.len() as u64;
                tokens.extend(encoding.get_ids());
                tokens.push(end_token);
            }
        }
        Ok(Self { tokens, text_bytes })
    }

    /// As [`encode`](Self::encode), kept in `cache` for the next start with the same texts and tokenizer.
    pub fn encode_cached(
        cache: &Path,
        texts: &Texts,
        tokenizer: &Tokenizer,
        tokenizer_id: u64,
        end_token: u32,
    ) -> Result<Self> {
        let key = texts.fingerprint() ^ tokenizer_id.rotate_left(1);
        if let Some(stream) = Self::read(cache, key) {
            return Ok(stream);
        }
        let stream = Self::encode(texts, tokenizer, end_token)?;
        stream.write(cache, key)?;
        Ok(stream)
    }

    /// `magic, key, text bytes, bytes a token, tokens`, all little-endian. Whatever is not that is encoded again.
    fn read(cache: &Path, key: u64) -> Option<Self> {
        let contents = std::fs::read(cache).ok()?;
        let (header, tokens) = contents.split_at_checked(32)?;
        let number = |i: usize| u64::from_le_bytes(header[8 * i..8 * i + 8].try_into().unwrap());
        if &header[..8] != MAGIC || number(1) != key {
            return None;
        }
        let tokens = match number(3) {
            2 => tokens.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]).into()).collect(),
            4 => tokens.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            _ => return None,
        };
        Some(Self { tokens, text_bytes: number(2) })
    }

    fn write(&self, cache: &Path, key: u64) -> Result<()> {
        let narrow = self.tokens.iter().all(|&t| t <= u16::MAX.into());
        let mut contents = MAGIC.to_vec();
        for number in [key, self.text_bytes, if narrow { 2 } else { 4 }] {
            contents.extend(number.to_le_bytes());
        }
        for &token in &self.tokens {
            if narrow {
                contents.extend((token as u16).to_le_bytes());
            } else {
                contents.extend(token.to_le_bytes());
            }
        }
        write_atomically(cache, &contents)
    }
}

/// Draws batches from a stream. Which tokens sequence `i` of a run holds depends on the seed and `i` alone, so a resumed
/// run needs no state to go on with the same data.
///
/// An epoch visits every window of the stream once in a shuffled order; the next one moves all the windows a little.
pub struct Batches<'a> {
    tokens: &'a [u32],
    seq_len: usize,
    windows: u64,
    seed: u64,
}

impl<'a> Batches<'a> {
    pub fn new(stream: &'a TokenStream, seq_len: usize, seed: u64) -> Result<Self> {
        let tokens = stream.tokens.as_slice();
        if tokens.len() <= seq_len {
            bail!("--seq-len is {seq_len}, must be less than the {} tokens of the data", tokens.len());
        }
        // One window less than fits, where there is more than one, leaves room to move them.
        let windows = ((tokens.len() - 1) / seq_len).saturating_sub(1).max(1) as u64;
        Ok(Self { tokens, seq_len, windows, seed })
    }

    /// Inputs and targets, `[batch_size, seq_len]` u32 each, of the batch whose first sequence is number `first`.
    pub fn get(&self, first: u64, batch_size: usize, device: &Device) -> Result<(Tensor, Tensor)> {
        let mut inputs = Vec::<u32>::with_capacity(batch_size * self.seq_len);
        let mut targets = Vec::<u32>::with_capacity(batch_size * self.seq_len);
        for sequence in first..first + batch_size as u64 {
            let start = self.start_of(sequence);
            inputs.extend(&self.tokens[start..start + self.seq_len]);
            targets.extend(&self.tokens[start + 1..start + 1 + self.seq_len]);
        }
        let shape = (batch_size, self.seq_len);
        Ok((Tensor::from_vec(inputs, shape, device)?, Tensor::from_vec(targets, shape, device)?))
    }

    fn start_of(&self, sequence: u64) -> usize {
        let (epoch, index) = (sequence / self.windows, sequence % self.windows);
        let key = mix(self.seed ^ mix(epoch));
        let slack = self.tokens.len() - 1 - self.windows as usize * self.seq_len;
        let shift = (key % (slack as u64 + 1)) as usize;
        shift + shuffled(index, self.windows, key) as usize * self.seq_len
    }
}

/// Position `index` of a keyed permutation of `0..len`: a Feistel network over the next even number of bits, walked until
/// it lands inside. Needs no memory and no history, unlike a shuffled list.
fn shuffled(index: u64, len: u64, key: u64) -> u64 {
    let half = (64 - (len - 1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1 << half) - 1;
    let mut index = index;
    loop {
        let (mut left, mut right) = (index >> half, index & mask);
        for round in 0..4 {
            (left, right) = (right, left ^ (mix(right ^ mix(key ^ round)) & mask));
        }
        index = left << half | right;
        if index < len {
            return index;
        }
    }
}

/// The finalizer of splitmix64.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
