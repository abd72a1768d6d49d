//! The tokenizer of a run: loaded, or trained on the data.

use crate::{common::text::load_tokenizer, data::Texts};
use anyhow::{Context, Result, anyhow, ensure};
use std::path::Path;
use tokenizers::{
    AddedToken, Tokenizer,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainer},
    },
    pre_tokenizers::byte_level::ByteLevel,
    processors::template::TemplateProcessing,
};

/// Reads a tokenizer and finds the token that stands between texts.
pub fn load(file: &Path, end_token: &str) -> Result<(Tokenizer, u32)> {
    let tokenizer = load_tokenizer(file)?;
    let id = tokenizer.token_to_id(end_token).with_context(|| {
        format!(
            "the tokenizer {} has no token {end_token:?}; --end-token names the one to put between texts",
            file.display()
        )
    })?;
    Ok((tokenizer, id))
}

/// Trains a byte-level BPE. Encoding a text with special tokens puts `end_token` in front of it: a text always comes after
/// the end of another in training.
pub fn train(texts: &Texts, bytes: usize, vocab_size: usize, end_token: &str) -> Result<(Tokenizer, u32)> {
    ensure!(
        !end_token.starts_with('$') && !end_token.contains(':'),
        "--end-token is {end_token:?}, must not begin with $ nor have a colon in it: a tokenizer's template gives both a \
         meaning"
    );
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, false, true)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    let mut trainer = TrainerWrapper::from(
        BpeTrainer::builder()
            .vocab_size(vocab_size)
            .min_frequency(2)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(end_token, true)])
            .build(),
    );
    tokenizer
        .train(&mut trainer, texts.sample(bytes))
        .map_err(|e| anyhow!("cannot train a tokenizer: {e}"))?;
    let id = tokenizer.token_to_id(end_token).context("the trained tokenizer lacks its end token")?;
    let template = TemplateProcessing::builder()
        .try_single(vec![end_token, "$A"])
        .map_err(anyhow::Error::msg)?
        .special_tokens(vec![(end_token, id)])
        .build()?;
    tokenizer.with_post_processor(Some(template));
    Ok((tokenizer, id))
}
