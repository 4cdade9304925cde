//! A budget for the tokens of a thought.

use ternion_core::{Result, answer::Thought, text::Tokenizer};

/// Counts the tokens of a thought, and ends it when they are used up.
pub(crate) struct ThoughtBudget {
    /// Tokens that the thought may still have.
    left: usize,
    start: String,
    end: String,
    /// The tokens of the end tag.
    end_tokens: Vec<u32>,
    state: State,
}

enum State {
    /// The answer has not begun. Holds its text, which may be the start tag.
    Before(String),
    /// Holds the end of the thought, in which the end tag may have begun.
    Within(String),
    Over,
}

impl ThoughtBudget {
    /// A budget of `most` tokens; `None` if there is no thought to be bounded.
    ///
    /// # Errors
    /// If the end tag cannot be encoded.
    pub(crate) fn new(most: usize, tokenizer: &Tokenizer, thought: Thought) -> Result<Option<Self>> {
        let tags = tokenizer.answer_format().and_then(|format| format.reasoning.as_ref());
        let state = match thought {
            Thought::Open => State::Within(String::new()),
            Thought::Possible => State::Before(String::new()),
            _ => return Ok(None),
        };
        let Some(tags) = tags else { return Ok(None) };
        Ok(Some(Self {
            left: most,
            start: tags.start.clone(),
            end: tags.end.clone(),
            end_tokens: tokenizer.encode(&tags.end, false)?,
            state,
        }))
    }

    /// The tokens that end the thought before it begins.
    pub(crate) fn begin(&mut self) -> Vec<u32> {
        self.end_if_used_up()
    }

    /// Follows a token of the answer. Returns the tokens that end the thought if its budget is used up.
    pub(crate) fn accept(&mut self, text: &str) -> Vec<u32> {
        match &mut self.state {
            State::Before(begun) => {
                begun.push_str(text);
                let begun = begun.trim_start();
                if let Some(rest) = begun.strip_prefix(&self.start) {
                    self.state = State::Within(rest.to_owned());
                } else if !self.start.starts_with(begun) {
                    self.state = State::Over;
                }
            }
            State::Within(end) => {
                self.left = self.left.saturating_sub(1);
                end.push_str(text);
                if end.contains(&self.end) {
                    self.state = State::Over;
                } else {
                    let least = end.len().saturating_sub(self.end.len());
                    let from = (least..=end.len()).find(|&at| end.is_char_boundary(at));
                    end.drain(..from.unwrap_or(0));
                }
            }
            State::Over => {}
        }
        self.end_if_used_up()
    }

    fn end_if_used_up(&mut self) -> Vec<u32> {
        if self.left > 0 || !matches!(self.state, State::Within(_)) {
            return Vec::new();
        }
        self.state = State::Over;
        self.end_tokens.clone()
    }
}
