//! What one model answers to the questions of a comparison.

use std::sync::Arc;

use ternion_core::{
    Error, GenerateRequest, LlmBackend, LogitsRequest, ModelInfo, Prompt, Result, ResultExt, Sampling,
    ScoreRequest, TokenScore,
    text::{Chunk, ChunkKind, ChunkOptions, chunks},
};

use super::Questions;

/// How many alternatives to each token of a greedy answer are kept: enough to see how near the other model's choice was.
const ALTERNATIVES: usize = 20;

/// Tokens of a chunk: few, so that there are many.
const CHUNK: usize = 32;

/// The ways to cut a text.
pub(super) const KINDS: [(ChunkKind, &str); 3] =
    [(ChunkKind::Text, "text"), (ChunkKind::Markdown, "Markdown"), (ChunkKind::Code, "code")];

/// The answers of one model. A part that the model is not capable of is empty.
#[derive(Debug, Clone)]
pub struct Answers {
    pub(super) info: Arc<ModelInfo>,
    /// The ids of each text, without special tokens; empty without a tokenizer.
    pub(super) texts: Vec<Vec<u32>>,
    /// The rendered text of each conversation, and its ids.
    pub(super) chats: Vec<(String, Vec<u32>)>,
    /// How all texts together are cut, in each way that there is; empty without a tokenizer.
    pub(super) plans: Vec<Vec<Chunk>>,
    /// `[positions, vocab_size]`, of all sequences.
    pub(super) logits: Option<Vec<f32>>,
    pub(super) greedy: Vec<GreedyAnswer>,
    /// The log-probability of each scored token of the document.
    pub(super) document: Vec<f32>,
}

/// A greedy continuation.
#[derive(Debug, Clone)]
pub struct GreedyAnswer {
    pub(super) text: String,
    pub(super) tokens: Vec<u32>,
    /// The most probable tokens at each place, with their log-probabilities; empty if the model cannot score.
    pub(super) alternatives: Vec<Vec<(u32, f32)>>,
}

impl Answers {
    /// Asks a model.
    ///
    /// # Errors
    /// What the model's methods return; [`Unsupported`](ternion_core::ErrorKind::Unsupported) for a vocabulary of
    /// another size than the reference's, whose token ids then mean something else.
    pub async fn of(model: &dyn LlmBackend, questions: &Questions) -> Result<Self> {
        let info = model.info();
        Self::ask(model, questions).await.with("model", &info.name).with_operation("compare")
    }

    async fn ask(model: &dyn LlmBackend, questions: &Questions) -> Result<Self> {
        let info = model.info();
        if info.limits.vocab_size != questions.vocab_size {
            return Err(Error::unsupported(format!(
                "a vocabulary of {} entries cannot be compared with the reference's of {}",
                info.limits.vocab_size, questions.vocab_size
            )));
        }
        let (mut texts, mut chats, mut plans) = (Vec::new(), Vec::new(), Vec::new());
        if let Some(tokenizer) = model.tokenizer() {
            for text in &questions.inputs.texts {
                texts.push(tokenizer.encode_plain(text)?);
            }
            let all = questions.inputs.texts.join("\n\n");
            for (kind, _) in KINDS {
                let options = ChunkOptions::new(CHUNK).with_overlap(CHUNK / 8).with_kind(kind);
                plans.push(chunks(&tokenizer, &all, &options)?);
            }
            if info.capabilities.chat {
                for chat in &questions.inputs.chats {
                    chats.push((tokenizer.render_chat(chat, true)?, tokenizer.encode_chat(chat, true)?));
                }
            }
        }
        let logits = if info.capabilities.logits { Some(logits(model, questions).await?) } else { None };
        let mut greedy = Vec::new();
        if info.capabilities.generate {
            for prompt in &questions.prompts {
                greedy.push(answer(model, prompt, questions.inputs.answer_tokens).await?);
            }
        }
        let mut document = Vec::new();
        if info.capabilities.score {
            for window in &questions.windows {
                let score = model.score(ScoreRequest::new(window.clone(), 1)).await?;
                document.extend(score.tokens.iter().map(|token| token.logprob));
            }
        }
        Ok(Self { info, texts, chats, plans, logits, greedy, document })
    }
}

async fn logits(model: &dyn LlmBackend, questions: &Questions) -> Result<Vec<f32>> {
    let mut logits = Vec::new();
    for tokens in &questions.sequences {
        let rows = model.logits(LogitsRequest::new(tokens.clone())).await?;
        if rows.len() != tokens.len() * questions.vocab_size {
            return Err(Error::backend(format!(
                "{} logits for {} tokens; {} expected",
                rows.len(),
                tokens.len(),
                tokens.len() * questions.vocab_size
            )));
        }
        logits.extend_from_slice(&rows);
    }
    Ok(logits)
}

async fn answer(model: &dyn LlmBackend, prompt: &[u32], max_tokens: usize) -> Result<GreedyAnswer> {
    let info = model.info();
    let max_tokens = max_tokens.min(info.limits.context_length - prompt.len()).max(1);
    let request = GenerateRequest::new(Prompt::Tokens(prompt.to_vec()))
        .with_max_tokens(max_tokens)
        .with_sampling(Sampling::greedy());
    let completion = model.generate(request).await?.collect().await?;
    let mut alternatives = Vec::new();
    if info.capabilities.score && !completion.tokens.is_empty() {
        let tokens = [prompt, &completion.tokens].concat();
        let top = ALTERNATIVES.min(info.limits.vocab_size);
        let score = model.score(ScoreRequest::new(tokens, prompt.len()).with_top(top)).await?;
        let pairs = |token: TokenScore| token.top.iter().map(|t| (t.id, t.logprob)).collect();
        alternatives = score.tokens.into_iter().map(pairs).collect();
    }
    Ok(GreedyAnswer { text: completion.text, tokens: completion.tokens, alternatives })
}
