//! Few-shot prompts, built as lm-evaluation-harness builds them: as one text, or as the turns of a chat.

use std::sync::Arc;

use ternion_core::{Message, Result, text::Tokenizer};

/// A question with its answer, as it stands before the one that is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shot {
    /// The question with all that a task writes around it.
    pub question: String,
    /// The answer, without the space before it.
    pub answer: String,
}

/// A prompt with examples, of which as many are taken as fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FewShot {
    /// What stands before everything; may be empty.
    pub description: String,
    /// The examples in their order.
    pub shots: Arc<[Shot]>,
    /// The question that is asked.
    pub question: String,
}

impl FewShot {
    /// The prompt with the first `shots` examples as one text.
    pub fn text(&self, shots: usize) -> String {
        let mut text = self.description.clone();
        for shot in self.shots.iter().take(shots) {
            text.extend([&shot.question, " ", &shot.answer, "\n\n"]);
        }
        text + &self.question
    }

    /// The same as a conversation: the description is the system's, an example is a turn of each side.
    pub fn messages(&self, shots: usize) -> Vec<Message> {
        let system = (!self.description.is_empty()).then(|| Message::system(&self.description));
        let examples = self
            .shots
            .iter()
            .take(shots)
            .flat_map(|shot| [Message::user(&shot.question), Message::assistant(&shot.answer)]);
        system.into_iter().chain(examples).chain([Message::user(&self.question)]).collect()
    }

    /// The text that the model continues. With `chat` the template of the tokenizer is put around the turns, without the
    /// system's message where the template refuses that.
    pub(crate) fn render(&self, shots: usize, tokenizer: &Tokenizer, chat: bool) -> Result<String> {
        if !chat {
            return Ok(self.text(shots));
        }
        let messages = self.messages(shots);
        match tokenizer.render_chat(&messages, true) {
            Err(_) if !self.description.is_empty() => tokenizer.render_chat(&messages[1..], true),
            rendered => rendered,
        }
    }
}

/// Whether Python's `str.isspace` holds: Rust's white space and four separators of old tapes.
pub(crate) fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Python's `str.strip()`.
pub(crate) fn python_strip(text: &str) -> &str {
    text.trim_matches(is_python_space)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt() -> FewShot {
        let shot = |q: &str, a: &str| Shot { question: q.to_owned(), answer: a.to_owned() };
        FewShot {
            description: "About.\n\n".to_owned(),
            shots: [shot("Q: 1\nA:", "one"), shot("Q: 2\nA:", "two")].into(),
            question: "Q: 3\nA:".to_owned(),
        }
    }

    #[test]
    fn a_text_has_a_space_before_answers_and_an_empty_line_after() {
        assert_eq!(prompt().text(2), "About.\n\nQ: 1\nA: one\n\nQ: 2\nA: two\n\nQ: 3\nA:");
        assert_eq!(prompt().text(1), "About.\n\nQ: 1\nA: one\n\nQ: 3\nA:");
        assert_eq!(prompt().text(0), "About.\n\nQ: 3\nA:");
    }

    #[test]
    fn a_chat_has_a_turn_for_each_part() {
        let roles: Vec<_> =
            prompt().messages(1).into_iter().map(|m| (m.role, m.content.into_text())).collect();
        let expected =
            [("system", "About.\n\n"), ("user", "Q: 1\nA:"), ("assistant", "one"), ("user", "Q: 3\nA:")];
        assert_eq!(roles, expected.map(|(role, content)| (role.to_owned(), content.to_owned())));
    }

    #[test]
    fn stripping_knows_python_s_white_space() {
        assert_eq!(python_strip("\u{1c} \u{a0}\u{3000}a b\u{85}\r\n\u{1f}"), "a b");
        assert_eq!(python_strip("\u{200b}x"), "\u{200b}x");
    }
}
