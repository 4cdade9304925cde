//! What a new model has to do before it takes the place of an old one.

use std::time::Duration;

use ternion_core::{
    DoneEvent, EmbedInput, EmbedRequest, Error, ErrorKind, Event, FinishReason, GenerateRequest, LlmBackend,
    Message, Result, ResultExt, Sampling, ScoreRequest, TokenEvent, config::ReloadConfig,
};

/// The prompts of a configuration that names none.
const PROMPTS: [&str; 2] = ["The", "How many days are in a week?"];

/// Tokens that each prompt is continued by.
const TOKENS: usize = 8;

/// Lets `model` continue each prompt, as far as its capabilities go: its tokenizer gives back what it was given, the
/// answer's events are in order and end properly, and all log-probabilities are finite.
///
/// # Errors
/// What the model returns; [`Backend`](ErrorKind::Backend) for an answer that cannot be one, [`Timeout`](ErrorKind::Timeout)
/// if it takes too long.
pub(super) async fn check(model: &dyn LlmBackend, reload: &ReloadConfig) -> Result<()> {
    let time = Duration::from_secs(reload.check_seconds);
    let all = async {
        match &reload.check {
            Some(prompts) => {
                for prompt in prompts {
                    check_prompt(model, prompt).await.with("prompt", prompt)?;
                }
            }
            None => {
                for prompt in PROMPTS {
                    match check_prompt(model, prompt).await {
                        // Nobody said that this prompt has to fit.
                        Err(error) if error.kind() == ErrorKind::ContextOverflow => {}
                        outcome => outcome.with("prompt", prompt)?,
                    }
                }
            }
        }
        Ok(())
    };
    tokio::time::timeout(time, all)
        .await
        .unwrap_or_else(|_| {
            let message = format!("no answer to the prompts of the check within {} s", time.as_secs());
            Err(Error::new(ErrorKind::Timeout, message))
        })
        .with_operation("check")
}

async fn check_prompt(model: &dyn LlmBackend, prompt: &str) -> Result<()> {
    let mut tokens = check_tokenizer(model, prompt)?;
    let info = model.info();
    if info.capabilities.generate {
        tokens.extend(check_answer(model, prompt).await?);
    }
    if info.capabilities.embed {
        check_embedding(model, prompt, &tokens).await?;
    }
    if info.capabilities.score && tokens.len() >= 2 && tokens.len() <= info.limits.context_length {
        let score = model.score(ScoreRequest::new(tokens, 1)).await?;
        for token in &score.tokens {
            check_logprob(token.logprob, token.id)?;
        }
    }
    Ok(())
}

/// The embedding of the prompt, as text and as tokens, is one.
async fn check_embedding(model: &dyn LlmBackend, prompt: &str, tokens: &[u32]) -> Result<()> {
    let mut inputs = vec![EmbedInput::from(prompt)];
    inputs.extend((!tokens.is_empty()).then(|| tokens.to_vec().into()));
    let count = inputs.len();
    let found = model.embed(EmbedRequest::new(inputs)).await?.items;
    let is_one = |values: &[f32]| {
        !values.is_empty() && values.iter().all(|x| x.is_finite()) && values.iter().any(|x| *x != 0.0)
    };
    if found.len() == count && found.iter().all(|embedding| is_one(&embedding.values)) {
        return Ok(());
    }
    Err(Error::backend("the embeddings of the prompt are no vectors of finite numbers"))
}

/// The prompt's tokens, which mean the prompt; none where they are not known.
fn check_tokenizer(model: &dyn LlmBackend, prompt: &str) -> Result<Vec<u32>> {
    let Some(tokenizer) = model.tokenizer() else { return Ok(Vec::new()) };
    let plain = tokenizer.encode(prompt, false)?;
    let text = tokenizer.decode(&plain, false)?;
    // Normalizers may change a text, but only once.
    if tokenizer.encode(&text, false)? != plain {
        return Err(Error::backend(format!(
            "the tokenizer does not give back what it was given: {prompt:?} became {text:?}"
        )));
    }
    tokenizer.encode(prompt, true)
}

/// The tokens of a short answer that is one.
async fn check_answer(model: &dyn LlmBackend, prompt: &str) -> Result<Vec<u32>> {
    let info = model.info();
    let mut request = GenerateRequest::new(prompt).with_max_tokens(TOKENS).with_sampling(Sampling::greedy());
    request.params.logprobs = info.capabilities.logprobs;
    let mut answer = match model.generate(request.clone()).await {
        // A server of chats takes no plain text.
        Err(error) if error.kind() == ErrorKind::Unsupported && info.capabilities.chat => {
            request.params.prompt = vec![Message::user(prompt)].into();
            model.generate(request).await?
        }
        outcome => outcome?,
    };
    let (mut tokens, mut texts) = (Vec::new(), String::new());
    while let Some(event) = answer.next().await {
        match event? {
            Event::Token(TokenEvent { id, logprob, .. }) => {
                let vocabulary = info.limits.vocab_size;
                if vocabulary > 0 && id as usize >= vocabulary {
                    return Err(Error::backend(format!(
                        "token {id} is outside of the vocabulary of {vocabulary}"
                    )));
                }
                if info.capabilities.logprobs {
                    check_logprob(logprob.unwrap_or(f32::NAN), id)?;
                }
                tokens.push(id);
            }
            Event::Done(DoneEvent { finish_reason, usage, .. }) => {
                let expected = matches!(
                    finish_reason,
                    FinishReason::EndOfSequence | FinishReason::MaxTokens | FinishReason::ContextFull
                );
                if !expected {
                    return Err(Error::backend(format!("the answer ended with {}", finish_reason.as_str())));
                }
                // A model on a server may send text alone.
                let all_came =
                    usage.completion_tokens == tokens.len() || (tokens.is_empty() && !texts.is_empty());
                if !all_came || tokens.len() > TOKENS {
                    return Err(Error::backend(format!(
                        "{} tokens came and {} were counted, at most {TOKENS} expected",
                        tokens.len(),
                        usage.completion_tokens
                    )));
                }
                return match answer.next().await {
                    None => Ok(tokens),
                    Some(_) => Err(Error::backend("the answer went on after its end")),
                };
            }
            Event::Text(piece) | Event::Reasoning(piece) => texts.push_str(&piece.text),
            _ => {}
        }
    }
    Err(Error::backend("the answer stopped without an end"))
}

fn check_logprob(logprob: f32, id: u32) -> Result<()> {
    // Rounding may carry the logarithm of one a little over zero.
    if logprob.is_finite() && logprob <= 1e-3 {
        return Ok(());
    }
    Err(Error::backend(format!(
        "token {id} has the log-probability {logprob}; a finite number up to 0 expected"
    )))
}
