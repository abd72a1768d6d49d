//! A conversation whose state is kept between turns: of every turn only what is new is read.
//!
//! Templates may write an answer otherwise once it is past: many leave out what was thought before it. A state cannot be
//! made to forget, so the one before the last answer is kept as well, and such an answer is read again from there, as the
//! template has it now. Where even what came before it is written otherwise, everything is read again.

use crate::{
    common::text::TextStream,
    generator::{End, Generator},
    template::{ChatTemplate, Message},
    thinking::Thinking,
};
use anyhow::{Context, Result, anyhow};
use candle_core::Tensor;
use candle_linear_attn::models::Cache;
use std::time::{Duration, Instant};
use tokenizers::Tokenizer;

/// So many tokens decide how the next one is written.
const CONTEXT: usize = 16;

pub struct Conversation<'a> {
    pub generator: Generator<'a>,
    tokenizer: &'a Tokenizer,
    template: ChatTemplate,
    messages: Vec<Message>,
    /// What the state stands for, as the template writes it, and its tokens.
    text: String,
    pub ids: Vec<u32>,
    /// How many of the last tokens have not been read yet.
    pub unread: usize,
    before_answer: Option<Place>,
    /// Of all that was read and not written here.
    pub prompt_tokens: usize,
    pub prompt_time: Duration,
}

/// A place to come back to: how far text and tokens went, and the state there.
struct Place {
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

    /// Forgets all that was said but for what the system says. The next turn will go back.
    pub fn reset(&mut self) {
        self.messages.retain(|message| message.role == "system");
    }

    /// Says something and shows the answer piece by piece, until it ends or `show` returns false.
    pub fn say(
        &mut self,
        text: &str,
        hide_thinking: bool,
        mut show: impl FnMut(&str) -> Result<bool>,
    ) -> Result<End> {
        self.messages.push(Message::new("user", text));
        let started = Instant::now();
        let logits = self.read_turn()?;
        self.prompt_time += started.elapsed();

        let recent = &self.ids[self.ids.len().saturating_sub(CONTEXT)..];
        // With special tokens, so that the answer is what has been written and may be followed by what comes next.
        let mut stream = TextStream::after(self.tokenizer, recent, false)?;
        let mut thinking = Thinking::new(&self.text, hide_thinking);
        let mut answer = String::new();
        let mut whole = true;
        if !show(thinking.begin())? {
            return Ok(End::Unwanted);
        }
        let end = self.generator.write(logits, &mut self.ids, |id| {
            let piece = stream.push(id)?;
            whole = !piece.is_empty();
            answer += &piece;
            show(&thinking.filter(&piece))
        })?;
        show(&thinking.end())?;
        // A text that ends by itself has been read to its end, else its last token is to come.
        self.unread = usize::from(end != End::Token);
        self.messages.push(Message::answer(&self.text, &answer));
        self.text += &answer;
        if !whole {
            // A part of a character, which no template will write: the answer is to be read again without it.
            self.text.push(char::REPLACEMENT_CHARACTER);
        }
        Ok(end)
    }

    /// Reads what the last message adds, up to where the model is to write, and gives the logits there.
    fn read_turn(&mut self) -> Result<Tensor> {
        let question = self.template.render(&self.messages, false)?;
        let whole = self.template.render(&self.messages, true)?;
        if !whole.starts_with(&self.text) {
            self.before_answer.take_if(|place| !whole.starts_with(&self.text[..place.text]));
            self.go_back();
        }
        let new = &whole[self.text.len()..];
        let encoding =
            self.tokenizer.encode(new, false).map_err(|e| anyhow!("cannot tokenize a message: {e}"))?;
        // The template's words before an answer are written otherwise, too, once it is past.
        let split = match question.len().checked_sub(self.text.len()) {
            Some(end) if whole.starts_with(&question) => tokens_until(encoding.get_offsets(), end),
            _ => 0,
        };
        let (question_ids, introduction) = encoding.get_ids().split_at(split);
        let mut last = None;
        if !question_ids.is_empty() {
            last = Some(self.read(question_ids)?);
            let state = self.generator.reader.state();
            self.before_answer = Some(Place { text: question.len(), ids: self.ids.len(), state });
        }
        if !introduction.is_empty() {
            last = Some(self.read(introduction)?);
        }
        self.text = whole;
        self.generator.reader.logits(&last.context("the chat template adds nothing for a message")?)
    }

    /// Reads tokens behind those that are not read yet.
    fn read(&mut self, tokens: &[u32]) -> Result<Tensor> {
        let from = self.ids.len() - self.unread;
        self.ids.extend(tokens);
        self.unread = 0;
        self.prompt_tokens += tokens.len();
        self.generator.reader.read_only(&self.ids[from..])
    }

    /// To where the last answer began, or to the beginning.
    fn go_back(&mut self) {
        let place = self.before_answer.as_ref();
        let (text, ids) = place.map_or((0, 0), |place| (place.text, place.ids));
        self.text.truncate(text);
        self.ids.truncate(ids);
        self.unread = 0;
        self.generator.reader.rewind(place.map(|place| place.state.clone()));
    }
}

/// How many tokens make up a text up to `end`; 0 if one of them goes beyond it.
fn tokens_until(offsets: &[(usize, usize)], end: usize) -> usize {
    let count = offsets.iter().position(|(start, _)| *start >= end).unwrap_or(offsets.len());
    if offsets[..count].iter().all(|(_, to)| *to <= end) { count } else { 0 }
}
