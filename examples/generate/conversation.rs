//! A conversation whose state is kept between turns: of every turn only what is new is read.

use crate::{
    common::text::TextStream,
    generator::Generator,
    template::{ChatTemplate, Message},
    thinking::Thinking,
};
use anyhow::{Context, Result, anyhow};
use candle_core::Tensor;
use candle_linear_attn::models::Cache;
use std::time::{Duration, Instant};
use tokenizers::Tokenizer;

/// Tokens that decide how the next one is written.
const CONTEXT: usize = 16;

pub struct Conversation<'a> {
    pub generator: Generator<'a>,
    tokenizer: &'a Tokenizer,
    template: ChatTemplate,
    messages: Vec<Message>,
    /// What the state stands for, as the template writes it, and its tokens, the last few of which may not be read yet.
    text: String,
    ids: Vec<u32>,
    unread: usize,
    /// Where the last answer began.
    before_answer: Option<Mark>,
    /// Of all that was read and not written here.
    pub prompt_tokens: usize,
    pub prompt_time: Duration,
}

/// A place to come back to: a state cannot be made to forget what it has seen.
struct Mark {
    text: usize,
    ids: usize,
    state: Cache,
}

impl<'a> Conversation<'a> {
    pub fn new(
        mut generator: Generator<'a>,
        tokenizer: &'a Tokenizer,
        template: ChatTemplate,
        system: Option<&str>,
    ) -> Self {
        if let Some(end) = template.end_token().and_then(|token| tokenizer.token_to_id(token)) {
            generator.end_at(end);
        }
        Self {
            generator,
            tokenizer,
            template,
            messages: system.map(|text| Message::new("system", text)).into_iter().collect(),
            text: String::new(),
            ids: vec![],
            unread: 0,
            before_answer: None,
            prompt_tokens: 0,
            prompt_time: Duration::ZERO,
        }
    }

    /// Says something and shows the answer piece by piece. False if `show` has had enough.
    pub fn say(
        &mut self,
        text: &str,
        hide_thinking: bool,
        mut show: impl FnMut(&str) -> Result<bool>,
    ) -> Result<bool> {
        self.messages.push(Message::new("user", text));
        let started = Instant::now();
        let logits = self.read_turn()?;
        self.prompt_time += started.elapsed();

        let recent = &self.ids[self.ids.len().saturating_sub(CONTEXT)..];
        let mut shown = TextStream::after(self.tokenizer, recent, true)?;
        let mut exact = TextStream::after(self.tokenizer, recent, false)?;
        let mut thinking = Thinking::new(self.tokenizer, &self.ids, hide_thinking);
        let mut answer = String::new();
        let written = self.generator.write(logits, &mut self.ids, |id| {
            answer += &exact.push(id)?;
            show(&thinking.filter(id, shown.push(id)?))
        })?;
        self.unread = written.unread;
        self.text += &answer;
        self.messages.push(Message::new("assistant", answer));
        Ok(!written.stopped)
    }

    /// Reads what the last message adds, up to where the answer begins, and gives the logits there.
    fn read_turn(&mut self) -> Result<Tensor> {
        let asked = self.template.render(&self.messages, false)?;
        let whole = self.template.render(&self.messages, true)?;
        self.go_back_within(&whole);
        let new = &whole[self.text.len()..];
        let encoding =
            self.tokenizer.encode(new, false).map_err(|e| anyhow!("cannot tokenize a message: {e}"))?;
        let (mut tokens, offsets) = (encoding.get_ids().to_vec(), encoding.get_offsets());
        // Templates may write an answer otherwise once it is past, as those that drop what the model thought. It and its
        // introduction will then be read again, from here.
        let split = match asked.len().checked_sub(self.text.len()) {
            Some(cut) if whole.starts_with(&asked) => {
                offsets.iter().position(|(_, end)| *end > cut).unwrap_or(tokens.len())
            }
            _ => 0,
        };
        let mark = self.text.len() + offsets.get(split).map_or(new.len(), |(start, _)| *start);
        self.prompt_tokens += tokens.len();
        let introduction = tokens.split_off(split);
        let mut last = None;
        if !tokens.is_empty() && whole.is_char_boundary(mark) {
            last = Some(self.read(tokens)?);
            self.before_answer =
                Some(Mark { text: mark, ids: self.ids.len(), state: self.generator.reader.state() });
        }
        if !introduction.is_empty() {
            last = Some(self.read(introduction)?);
        }
        self.text = whole;
        self.generator.reader.logits(&last.context("the chat template adds nothing for a message")?)
    }

    /// Reads tokens behind those that are not read yet.
    fn read(&mut self, tokens: Vec<u32>) -> Result<Tensor> {
        let from = self.ids.len() - self.unread;
        self.ids.extend(tokens);
        self.unread = 0;
        self.generator.reader.read_only(&self.ids[from..])
    }

    /// To the last place from which on `whole` may be read.
    fn go_back_within(&mut self, whole: &str) {
        if whole.starts_with(&self.text) {
            return;
        }
        let (text, ids, state) = match &self.before_answer {
            Some(mark) if whole.starts_with(&self.text[..mark.text]) => {
                (mark.text, mark.ids, Some(mark.state.clone()))
            }
            _ => (0, 0, None),
        };
        self.text.truncate(text);
        self.ids.truncate(ids);
        self.unread = 0;
        self.generator.reader.rewind(state);
    }
}
