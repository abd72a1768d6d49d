//! What a model thinks before it answers, between `<think>` and `</think>`.

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// Follows an answer piece by piece, and drops what is thought if asked to.
pub struct Thinking {
    hide: bool,
    inside: bool,
    /// What may turn out to be the beginning of a mark.
    held: String,
    /// Nothing has been shown.
    first: bool,
}

impl Thinking {
    pub fn new(prompt: &str, hide: bool) -> Self {
        Self { hide, inside: is_begun(prompt), held: String::new(), first: true }
    }

    /// What of the prompt is shown before the answer: the mark, where the model will write the other one.
    pub fn begin(&self) -> &'static str {
        if self.inside && !self.hide { "<think>\n" } else { "" }
    }

    /// What is shown of one more piece.
    pub fn filter(&mut self, piece: &str) -> String {
        if !self.hide {
            return piece.to_owned();
        }
        self.held += piece;
        let mut shown = String::new();
        loop {
            let mark = if self.inside { CLOSE } else { OPEN };
            if let Some(at) = self.held.find(mark) {
                self.release(at, &mut shown);
                self.held.drain(..mark.len());
                self.inside = !self.inside;
            } else {
                let held = (1..mark.len()).rev().find(|length| self.held.ends_with(&mark[..*length]));
                self.release(self.held.len() - held.unwrap_or(0), &mut shown);
                return shown;
            }
        }
    }

    /// What is shown when nothing comes any more.
    pub fn end(&mut self) -> String {
        let mut shown = String::new();
        self.release(self.held.len(), &mut shown);
        shown
    }

    /// Shows what is held up to `end`, unless it is thought.
    fn release(&mut self, end: usize, shown: &mut String) {
        let text: String = self.held.drain(..end).collect();
        if !self.inside {
            // The line break that separates it from what is not shown.
            *shown += if self.first { text.trim_start() } else { &text };
            self.first &= shown.is_empty();
        }
    }
}

/// What an answer to a prompt thinks, if it does, and what it says.
pub fn split<'a>(prompt: &str, answer: &'a str) -> (Option<&'a str>, &'a str) {
    let thought = match answer.trim_start().strip_prefix(OPEN) {
        Some(thought) => thought,
        None if is_begun(prompt) => answer,
        None => return (None, answer),
    };
    let (thought, said) = thought.split_once(CLOSE).unwrap_or((thought, ""));
    // As Qwen's templates take them apart.
    (Some(thought.trim_matches('\n')), said.trim_start_matches('\n'))
}

/// Templates may begin the thinking: then the prompt ends with its mark.
fn is_begun(prompt: &str) -> bool {
    prompt.trim_end().ends_with(OPEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(prompt: &str, hide: bool, pieces: &[&str]) -> String {
        let mut thinking = Thinking::new(prompt, hide);
        let begin = thinking.begin();
        let middle: String = pieces.iter().map(|piece| thinking.filter(piece)).collect();
        begin.to_owned() + &middle + &thinking.end()
    }

    #[test]
    fn thoughts_are_hidden_with_their_marks() {
        assert_eq!(shown("", true, &["<think>", "a", "</think>", "\n\n", "b ", "c"]), "b c");
        assert_eq!(shown("", true, &["<think>a</think>b<think>c</think> d"]), "b d");
        assert_eq!(shown("", true, &["a", "<", "thi", "nk>b</", "think", ">", "c"]), "ac");
        assert_eq!(shown("<think>\n\n</think>\n\n", true, &["a", " b"]), "a b");
    }

    #[test]
    fn the_prompt_may_have_begun_them() {
        assert_eq!(shown("assistant\n<think>\n", true, &["a", "</think>", "\nb"]), "b");
        assert_eq!(shown("assistant\n<think>\n", true, &["never ends"]), "");
        assert_eq!(shown("assistant\n<think>\n", false, &["a", "</think>", "\nb"]), "<think>\na</think>\nb");
    }

    #[test]
    fn all_else_is_shown() {
        assert_eq!(shown("", false, &["<think>", "a</think>", "b"]), "<think>a</think>b");
        assert_eq!(shown("", true, &["1 <", " 2 ä", "<th", "e>", "<think"]), "1 < 2 ä<the><think");
        assert_eq!(shown("", true, &["</think>"]), "</think>");
    }

    #[test]
    fn what_is_thought_is_told_from_what_is_said() {
        assert_eq!(split("", "a"), (None, "a"));
        assert_eq!(split("", "a <think>b</think>"), (None, "a <think>b</think>"));
        assert_eq!(split("", "\n<think>\na\n</think>\n\nb"), (Some("a"), "b"));
        assert_eq!(split("<think>\n", "a\n</think>\n\nb</think>"), (Some("a"), "b</think>"));
        assert_eq!(split("<think>\n", "never ends"), (Some("never ends"), ""));
        assert_eq!(split("<think>\n\n</think>\n\n", "a"), (None, "a"));
    }
}
