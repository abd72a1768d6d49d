//! Text to token ids and back.

use anyhow::{Result, anyhow, bail};
use std::path::Path;
use tokenizers::{
    DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer,
    tokenizer::DecodeStream,
};

/// Ends every text; also what a text is told to come after.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Reads a `tokenizer.json`.
pub fn load_tokenizer(file: &Path) -> Result<Tokenizer> {
    if !file.is_file() {
        bail!(
            "no tokenizer at {}: expected a tokenizer.json as the tokenizers library writes it",
            file.display()
        );
    }
    let failed = |e| anyhow!("cannot read the tokenizer {}: {e}", file.display());
    let mut tokenizer = Tokenizer::from_file(file).map_err(failed)?;
    // What a file has of these is left from its making: transformers does neither unless asked to.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(failed)?;
    Ok(tokenizer)
}

/// Token ids of `text`, with the special tokens that the tokenizer puts around a text.
pub fn encode_prompt(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let encoding =
        tokenizer.encode_fast(text, true).map_err(|e| anyhow!("cannot tokenize the prompt: {e}"))?;
    Ok(encoding.get_ids().to_vec())
}

/// Token ids in, pieces of text out as soon as they are whole characters.
pub struct TextStream<'a> {
    stream: DecodeStream<
        'a,
        ModelWrapper,
        NormalizerWrapper,
        PreTokenizerWrapper,
        PostProcessorWrapper,
        DecoderWrapper,
    >,
}

impl<'a> TextStream<'a> {
    /// The prompt is decoded and dropped: some decoders strip the space before the first token they see.
    pub fn after(tokenizer: &'a Tokenizer, prompt: &[u32], skip_special_tokens: bool) -> Result<Self> {
        let mut stream = Self { stream: tokenizer.decode_stream(skip_special_tokens) };
        for &id in prompt {
            stream.push(id)?;
        }
        Ok(stream)
    }

    /// The text that `id` completes: empty in the middle of a character.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let piece = self.stream.step(id).map_err(|e| anyhow!("cannot decode token {id}: {e}"))?;
        Ok(piece.unwrap_or_default())
    }
}
