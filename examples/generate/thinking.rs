//! What a model thinks before it answers, between `<think>` and `</think>`.

use tokenizers::Tokenizer;

/// Follows the tokens of an answer, and drops what is thought if asked to.
pub struct Thinking {
    marks: Option<[u32; 2]>,
    hide: bool,
    inside: bool,
    /// Nothing of the answer has been shown.
    first: bool,
}

impl Thinking {
    /// The end of the prompt may have begun the thinking already.
    pub fn new(tokenizer: &Tokenizer, prompt: &[u32], hide: bool) -> Self {
        let mark = |text: &str| tokenizer.token_to_id(text);
        let marks = mark("<think>").zip(mark("</think>")).map(|(open, close)| [open, close]);
        let last =
            |[open, close]: [u32; 2]| prompt.iter().rfind(|id| **id == open || **id == close) == Some(&open);
        Self { marks, hide, inside: marks.is_some_and(last), first: true }
    }

    /// What is shown of the text of a token.
    pub fn filter(&mut self, id: u32, text: String) -> String {
        let Some([open, close]) = self.marks.filter(|_| self.hide) else { return text };
        let was_inside = self.inside;
        self.inside = id != close && (was_inside || id == open);
        if was_inside || self.inside {
            return String::new();
        }
        // The line break that separates it from what is not shown.
        let text = if self.first { text.trim_start().to_owned() } else { text };
        self.first &= text.is_empty();
        text
    }
}
