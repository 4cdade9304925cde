//! Against outside truth: what another implementation computed for the same weights.
//!
//! All other checks compare a backend with itself and with its own tokenizer. A wrong activation, a missing norm or a
//! second BOS is consistent with itself; only numbers from elsewhere tell.

use serde::{Deserialize, Serialize};
use ternion_core::{Error, LlmBackend, LogitsRequest, Message, Result as CoreResult, ScoreRequest};

use crate::{Failure, Outcome, Sentence, ask::greedy};

const LOGITS: Sentence =
    Sentence::new("reference", "The logits are those of the reference, within its tolerance.");
const LOGPROBS: Sentence =
    Sentence::new("reference", "The log-probabilities are those of the reference, within its tolerance.");
const CHAT: Sentence = Sentence::new("reference", "A conversation has the token ids of the reference.");
const TEXT: Sentence = Sentence::new("reference", "A text has the token ids of the reference.");
const GREEDY: Sentence = Sentence::new("reference", "The greedy continuation is that of the reference.");

/// What a reference implementation gave for one prompt. All but the tokens may be left out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Reference {
    /// What reports call it.
    pub name: String,
    /// The token ids of the prompt.
    pub tokens: Vec<u32>,
    /// The conversation whose rendering the tokens are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages: Option<Vec<Message>>,
    /// The text whose encoding the tokens are, with what the tokenizer adds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Rows of logits, each with the position of the token whose successor they are about.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logits: Vec<Row>,
    /// The log-probabilities of `tokens[1..]`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<f32>,
    /// The most probable tokens that follow.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub greedy: Vec<u32>,
    /// What logits and log-probabilities may differ by, absolutely.
    pub tolerance: f32,
}

/// The logits at one position.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The index of the token that they follow.
    pub position: usize,
    /// One for each entry of the vocabulary.
    pub logits: Vec<f32>,
}

impl Reference {
    /// A reference that says nothing yet of a prompt, with a tolerance of 1e-3.
    pub fn new(name: impl Into<String>, tokens: Vec<u32>) -> Self {
        Self { name: name.into(), tokens, tolerance: 1e-3, ..Self::default() }
    }

    /// The references of a JSON array with the fields of this type.
    ///
    /// # Errors
    /// [`InvalidConfig`](ternion_core::ErrorKind::InvalidConfig) with the place where the text is not that.
    pub fn from_json(json: &str) -> CoreResult<Vec<Self>> {
        serde_json::from_str(json)
            .map_err(|e| Error::invalid_config("not an array of references").with_source(e))
    }

    /// The checks of this reference and how they ended, by name: `NAME::logits`. Those that the reference says nothing
    /// about are left out.
    pub async fn outcomes(&self, model: &dyn LlmBackend) -> Vec<(String, Outcome)> {
        let mut outcomes = Vec::new();
        for aspect in Aspect::ALL.into_iter().filter(|aspect| aspect.is_in(self)) {
            let outcome = match aspect.skipped(model) {
                Some(reason) => Outcome::Skipped(reason),
                None => match self.check(model, aspect).await {
                    Ok(()) => Outcome::Passed,
                    Err(failure) => Outcome::Failed(failure),
                },
            };
            outcomes.push((format!("{}::{}", self.name, aspect.name()), outcome));
        }
        outcomes
    }

    /// Compares one aspect of the backend with the reference.
    ///
    /// # Errors
    /// The first difference beyond the tolerance.
    pub async fn check(&self, model: &dyn LlmBackend, aspect: Aspect) -> Result<(), Failure> {
        match aspect {
            Aspect::Logits => self.logits(model).await,
            Aspect::Logprobs => self.logprobs(model).await,
            Aspect::Chat => self.chat(model).await,
            Aspect::Text => self.text(model).await,
            Aspect::Greedy => self.greedy(model).await,
        }
    }

    async fn logits(&self, model: &dyn LlmBackend) -> Result<(), Failure> {
        let rows = model.logits(LogitsRequest::new(self.tokens.clone())).await;
        let rows = rows.map_err(LOGITS.refused("logits"))?;
        let vocab = model.info().limits.vocab_size;
        LOGITS.equal("number of logits", rows.len(), self.tokens.len() * vocab)?;
        for Row { position, logits } in &self.logits {
            let Some(found) = rows.chunks_exact(vocab.max(1)).nth(*position) else {
                return Err(LOGITS.broken(format_args!("no row at position {position}"), "one"));
            };
            self.close(LOGITS, &format!("logits at position {position}"), found, logits)?;
        }
        Ok(())
    }

    async fn logprobs(&self, model: &dyn LlmBackend) -> Result<(), Failure> {
        let score = model.score(ScoreRequest::new(self.tokens.clone(), 1)).await;
        let score = score.map_err(LOGPROBS.refused("score"))?;
        let found: Vec<f32> = score.tokens.iter().map(|t| t.logprob).collect();
        self.close(LOGPROBS, "log-probabilities", &found, &self.logprobs)
    }

    fn close(&self, sentence: Sentence, what: &str, found: &[f32], expected: &[f32]) -> Result<(), Failure> {
        sentence.equal(format_args!("number of {what}"), found.len(), expected.len())?;
        let differences = found.iter().zip(expected).map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() });
        let Some((index, worst)) = differences.enumerate().max_by(|a, b| a.1.total_cmp(&b.1)) else {
            return Ok(());
        };
        sentence.require(
            worst <= self.tolerance,
            format_args!("{what}: {} at index {index}, off by {worst}", found[index]),
            format_args!("{} with a tolerance of {}", expected[index], self.tolerance),
        )
    }

    async fn chat(&self, model: &dyn LlmBackend) -> Result<(), Failure> {
        let messages = self.messages.clone().unwrap_or_default();
        let tokenizer = crate::ask::tokenizer(model, CHAT)?;
        let found = tokenizer.encode_chat(&messages, true).map_err(CHAT.refused("encode_chat"))?;
        CHAT.equal("token ids of the chat", &found, &self.tokens)?;
        self.prompt_is_as_long(model, messages.into(), CHAT).await
    }

    async fn text(&self, model: &dyn LlmBackend) -> Result<(), Failure> {
        let text = self.text.clone().unwrap_or_default();
        let found = crate::ask::encode(model, &text, TEXT)?;
        TEXT.equal("token ids of the text", &found, &self.tokens)?;
        self.prompt_is_as_long(model, text.into(), TEXT).await
    }

    /// What the backend itself makes of the prompt.
    async fn prompt_is_as_long(
        &self,
        model: &dyn LlmBackend,
        prompt: ternion_core::Prompt,
        sentence: Sentence,
    ) -> Result<(), Failure> {
        if !model.info().capabilities.generate {
            return Ok(());
        }
        let usage = crate::ask::answer(model, greedy(prompt, 1), sentence).await?.usage;
        sentence.equal("usage.prompt_tokens", usage.prompt_tokens, self.tokens.len())
    }

    async fn greedy(&self, model: &dyn LlmBackend) -> Result<(), Failure> {
        let request = greedy(self.tokens.clone(), self.greedy.len());
        let answer = crate::ask::answer(model, request, GREEDY).await?;
        GREEDY.equal("tokens", &answer.tokens, &self.greedy)
    }
}

/// What a reference can say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Aspect {
    /// `Reference::logits`.
    Logits,
    /// `Reference::logprobs`.
    Logprobs,
    /// `Reference::messages` have the ids `Reference::tokens`.
    Chat,
    /// `Reference::text` has the ids `Reference::tokens`.
    Text,
    /// `Reference::greedy`.
    Greedy,
}

impl Aspect {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Logits, Self::Logprobs, Self::Chat, Self::Text, Self::Greedy];

    /// The last part of a check's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Logits => "logits",
            Self::Logprobs => "logprobs",
            Self::Chat => "chat",
            Self::Text => "text",
            Self::Greedy => "greedy",
        }
    }

    /// Whether the reference says something about it.
    pub fn is_in(self, reference: &Reference) -> bool {
        match self {
            Self::Logits => !reference.logits.is_empty(),
            Self::Logprobs => !reference.logprobs.is_empty(),
            Self::Chat => reference.messages.is_some(),
            Self::Text => reference.text.is_some(),
            Self::Greedy => !reference.greedy.is_empty(),
        }
    }

    /// Why it cannot be tried on this backend.
    pub fn skipped(self, model: &dyn LlmBackend) -> Option<String> {
        let can = model.info().capabilities.clone();
        let tokenizer = model.tokenizer().is_some();
        let (has, lacks) = match self {
            Self::Logits => (can.logits, "the backend does not give logits"),
            Self::Logprobs => (can.score, "the backend does not score"),
            Self::Chat => (can.chat && tokenizer, "chats cannot be rendered on this side"),
            Self::Text => (tokenizer, "tokens are not known on this side"),
            Self::Greedy => (can.generate && tokenizer, "the backend does not continue tokens"),
        };
        (!has).then(|| lacks.to_owned())
    }
}
