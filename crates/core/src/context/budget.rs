//! What each part of a prompt takes of the context, to the token.

use serde::{Deserialize, Serialize};

use super::ContextPolicy;
use crate::{Error, ErrorKind, Message, Result, text::Tokenizer};

/// How the context is shared between template, conversation and answer.
///
/// The parts sum up to the tokens of the whole prompt. A message takes what the prompt grows by when it is added to those
/// before it; what its text alone takes is known, and the rest is the template's. Where characters on both sides of a border
/// merge to one token, or the template trims or changes a text, that shows in the message's `template`, which may then be
/// negative. Where the template refuses the conversation as it is before a message (some do not render a system message
/// alone), what it adds there counts for the next message.
///
/// The prompt is rendered once for each message, so the time grows with the square of their number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct TokenBudget {
    /// Tokens that prompt and answer may have together; `None` where it is not known.
    pub context: Option<usize>,
    /// Tokens that are kept free for the answer.
    pub reserved: usize,
    /// The messages in order.
    pub messages: Vec<MessageTokens>,
    /// What the template writes where there is no message: the start of the prompt.
    pub opening: usize,
    /// The header of the answer.
    pub answer_header: i64,
    /// All tokens of the prompt: the sum of the above.
    pub prompt: usize,
}

/// What one message takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MessageTokens {
    /// Who speaks.
    pub role: String,
    /// Tokens of its text alone.
    pub text: usize,
    /// What the template adds to it.
    pub template: i64,
}

impl MessageTokens {
    /// Both together.
    pub fn total(&self) -> i64 {
        self.text as i64 + self.template
    }
}

impl TokenBudget {
    /// Accounts for a conversation.
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode_chat`] for the whole conversation.
    pub fn for_chat(
        tokenizer: &Tokenizer,
        messages: &[Message],
        context: Option<usize>,
        reserved: usize,
    ) -> Result<Self> {
        let prompt = tokenizer.count_chat(messages)?;
        let without_header = tokenizer.encode_chat(messages, false).map_or(prompt, |ids| ids.len());
        let opening = tokenizer.encode_chat(&[], false).map_or(0, |ids| ids.len());
        let mut parts = Vec::with_capacity(messages.len());
        let mut before = opening;
        for (i, message) in messages.iter().enumerate() {
            let text = tokenizer.encode_plain(&message.content.text())?.len();
            let after = if i + 1 == messages.len() {
                without_header
            } else {
                tokenizer.encode_chat(&messages[..=i], false).map_or(before + text, |ids| ids.len())
            };
            let template = after as i64 - before as i64 - text as i64;
            parts.push(MessageTokens { role: message.role.clone(), text, template });
            before = after;
        }
        let answer_header = prompt as i64 - before as i64;
        Ok(Self { context, reserved, messages: parts, opening, answer_header, prompt })
    }

    /// What the template takes in all.
    pub fn template(&self) -> i64 {
        self.opening as i64 + self.answer_header + self.messages.iter().map(|m| m.template).sum::<i64>()
    }

    /// What the texts of the system messages take.
    pub fn system(&self) -> usize {
        self.messages.iter().filter(|m| m.role == "system").map(|m| m.text).sum()
    }

    /// What the texts of the other messages before the last user message take.
    pub fn history(&self) -> usize {
        let input = self.input_start();
        self.messages[..input].iter().filter(|m| m.role != "system").map(|m| m.text).sum()
    }

    /// What the texts of the last user message and of what follows it take.
    pub fn input(&self) -> usize {
        self.messages[self.input_start()..].iter().filter(|m| m.role != "system").map(|m| m.text).sum()
    }

    /// What is left of the context, negative where it does not suffice; `None` where the context is not known.
    pub fn free(&self) -> Option<i64> {
        self.context.map(|context| context as i64 - self.prompt as i64 - self.reserved as i64)
    }

    fn input_start(&self) -> usize {
        self.messages.iter().rposition(|m| m.role == "user").unwrap_or(self.messages.len())
    }
}

/// How many tokens a policy keeps free for an answer.
///
/// # Errors
/// [`InvalidConfig`](ErrorKind::InvalidConfig) if they leave nothing for a prompt.
pub(super) fn answer_room(
    reserve: Option<usize>,
    max_tokens: Option<usize>,
    context: usize,
    share: usize,
) -> Result<usize> {
    let room = reserve.unwrap_or_else(|| max_tokens.unwrap_or(usize::MAX).min(context / share).max(1));
    if room >= context {
        return Err(Error::invalid_config(format!(
            "reserve: {room} tokens for the answer; fewer than the context of {context} expected"
        )));
    }
    Ok(room)
}

/// The error of a policy that cannot make it fit.
pub(super) fn cannot_fit(policy: &ContextPolicy, what: &str, tokens: usize, limit: usize) -> Error {
    Error::new(
        ErrorKind::ContextOverflow,
        format!(
            "{what}: {tokens} tokens, which the policy `{}` cannot shorten; at most {limit} fit with room for an answer",
            policy.name()
        ),
    )
}
