//! What a backend tells about itself: description, limits, statistics.

use std::time::{Duration, Instant};

use ternion_core::{LlmBackend, Stats};

use crate::{
    Failure, Sentence,
    ask::{
        RunningRequests, SHORT, answer, endless, first_token, greedy, idle, prompt, reason, start, tokenizer,
    },
    check::checks,
};

checks! { "facts";
    a_backend_generates, GENERATES, [];
    info_does_not_change, CONSTANT, [];
    limits_are_those_of_a_model, LIMITS, [Generate];
    the_vocabulary_has_all_tokens, VOCABULARY, [Tokenizer];
    the_tokenizer_stays, NONE, [];
    info_never_blocks, NEVER, [Generate];
    stats_never_block, BLOCKS, [Generate];
    a_request_at_work_is_active, ACTIVE, [Generate];
    what_has_ended_is_counted, COUNTED, [Generate];
    tokens_are_counted, TOKENS, [Generate];
}

const CONSTANT: Sentence = Sentence::new(
    "LlmBackend::info",
    "The same value on every call, except for a wrapper that has swapped its model.",
);
const GENERATES: Sentence =
    Sentence::new("Capabilities::generate", "Every backend generates or makes embeddings, and says so.");
const LIMITS: Sentence = Sentence::new(
    "Limits::context_length",
    "Tokens that prompt and answer of one sequence may have together.",
);
const VOCABULARY: Sentence =
    Sentence::new("Limits::vocab_size", "Entries of the vocabulary, which is the length of a row of logits.");
const NONE: Sentence = Sentence::new(
    "LlmBackend::tokenizer",
    "None where the tokens are not known on this side (a remote model).",
);
const NEVER: Sentence = Sentence::new("LlmBackend::info", "Never blocks.");
const BLOCKS: Sentence = Sentence::new(
    "LlmBackend::stats",
    "What the backend is doing at the moment. Never blocks; all zero where it is not known.",
);
const ACTIVE: Sentence =
    Sentence::new("Stats::active", "Requests that are being worked on; each holds one sequence.");
const COUNTED: Sentence =
    Sentence::new("Stats::finished", "Requests that have ended since the model was loaded, in whatever way.");
const TOKENS: Sentence = Sentence::new("Stats::completion_tokens", "Tokens generated.");

/// What every backend can do is declared, so that not all checks are skipped for one that declares nothing.
///
/// # Errors
/// A description without the capability, and an answer that does not come.
pub async fn a_backend_generates(model: &dyn LlmBackend) -> Result<(), Failure> {
    let can = model.info().capabilities.clone();
    if can.embed && !can.generate {
        return Ok(()); // the checks of embeddings try it
    }
    GENERATES.require(can.generate, "no capability `generate`", "it")?;
    let answer = answer(model, greedy(prompt("generates"), 2), GENERATES).await?;
    GENERATES.require(answer.usage.completion_tokens > 0, "no token", "some")
}

/// Twice the same, also after some work.
///
/// # Errors
/// Both values where they differ.
pub async fn info_does_not_change(model: &dyn LlmBackend) -> Result<(), Failure> {
    let info = model.info();
    CONSTANT.equal("info", model.info(), info.clone())?;
    CONSTANT.require(!info.backend.is_empty(), "no name of a backend", "one")?;
    if info.capabilities.generate {
        answer(model, greedy(prompt("info"), 2), CONSTANT).await?;
        CONSTANT.equal("info after an answer", model.info(), info)?;
    }
    Ok(())
}

/// There is room for a token of prompt and one of answer, and for one sequence.
///
/// # Errors
/// The limits.
pub async fn limits_are_those_of_a_model(model: &dyn LlmBackend) -> Result<(), Failure> {
    let limits = model.info().limits.clone();
    let possible = limits.context_length >= 2 && limits.max_sequences >= 1;
    LIMITS.require(possible, format_args!("{limits:?}"), "a context of at least 2 and one sequence")
}

/// The tokenizer gives no token that the model does not take.
///
/// # Errors
/// Both sizes.
pub async fn the_vocabulary_has_all_tokens(model: &dyn LlmBackend) -> Result<(), Failure> {
    let (found, most) = (tokenizer(model, VOCABULARY)?.vocab_size(), model.info().limits.vocab_size);
    VOCABULARY.require(
        found <= most,
        format_args!("{found} tokens of the tokenizer"),
        format_args!("at most {most}, the model's,"),
    )
}

/// It is there or it is not, and always of the same tokens.
///
/// # Errors
/// What changed.
pub async fn the_tokenizer_stays(model: &dyn LlmBackend) -> Result<(), Failure> {
    let size = || model.tokenizer().map(|tokenizer| tokenizer.vocab_size());
    let before = size();
    if model.info().capabilities.generate {
        answer(model, greedy(prompt("tokenizer"), 2), NONE).await?;
    }
    NONE.equal("tokens of the tokenizer", size(), before)
}

/// Asks while a request is worked on. One of ten times counts, because the system may take the processor away.
async fn asked_at_work(model: &dyn LlmBackend, ask: impl Fn(), sentence: Sentence) -> Result<(), Failure> {
    let request = endless(prompt("asking"));
    let mut stream = start(model, request.clone(), sentence).await?;
    first_token(&mut stream, sentence).await?;
    let mut held = RunningRequests::default();
    held.add(request, stream);
    let mut fastest = Duration::MAX;
    for _ in 0..10 {
        let asked = Instant::now();
        ask();
        fastest = fastest.min(asked.elapsed());
    }
    held.cancel_all(model, sentence).await?;
    sentence.require(fastest < Duration::from_millis(20), format_args!("{fastest:?}"), "an answer at once")
}

/// While a request is worked on, `info` and `tokenizer` answer at once.
///
/// # Errors
/// The time that they took.
pub async fn info_never_blocks(model: &dyn LlmBackend) -> Result<(), Failure> {
    let ask = || {
        let _ = (model.info(), model.tokenizer());
    };
    asked_at_work(model, ask, NEVER).await
}

/// While a request is worked on, `stats` answers at once.
///
/// # Errors
/// The time that it took.
pub async fn stats_never_block(model: &dyn LlmBackend) -> Result<(), Failure> {
    let ask = || {
        let _ = model.stats();
    };
    asked_at_work(model, ask, BLOCKS).await
}

/// One request that has given a token and is not at its end is active, unless nothing is known.
///
/// # Errors
/// The statistics.
pub async fn a_request_at_work_is_active(model: &dyn LlmBackend) -> Result<(), Failure> {
    answer(model, greedy(prompt("known"), 1), ACTIVE).await?;
    if model.stats() == Stats::default() {
        return Ok(()); // Nothing is known.
    }
    idle(model, ACTIVE).await?;
    let request = endless(prompt("active"));
    let cancel = request.cancel.clone();
    let mut stream = start(model, request, ACTIVE).await?;
    first_token(&mut stream, ACTIVE).await?;
    let stats = model.stats();
    // An engine may take the sequence of an unread answer away; the request then waits.
    ACTIVE.equal("active and queued requests", stats.active + stats.queued, 1)?;
    cancel.cancel();
    reason(stream, ACTIVE).await?;
    idle(model, ACTIVE).await
}

/// Answers, cancelled ones and dropped ones are counted, one by one.
///
/// # Errors
/// The number.
pub async fn what_has_ended_is_counted(model: &dyn LlmBackend) -> Result<(), Failure> {
    answer(model, greedy(prompt("known"), 1), COUNTED).await?;
    if model.stats() == Stats::default() {
        return Ok(()); // Nothing is known.
    }
    idle(model, COUNTED).await?;
    let before = model.stats().finished;
    answer(model, greedy(prompt("counted"), 2), COUNTED).await?;
    let cancelled = greedy(prompt("counted too"), 2);
    cancelled.cancel.cancel();
    answer(model, cancelled, COUNTED).await?;
    drop(start(model, endless(prompt("and this")), COUNTED).await?);
    idle(model, COUNTED).await?;
    COUNTED.equal("finished", model.stats().finished, before + 3)
}

/// The sums grow by what the usage of an answer says.
///
/// # Errors
/// The number.
pub async fn tokens_are_counted(model: &dyn LlmBackend) -> Result<(), Failure> {
    answer(model, greedy(prompt("known"), 1), TOKENS).await?;
    let before = model.stats();
    if before == Stats::default() {
        return Ok(()); // Nothing is known.
    }
    let usage = answer(model, greedy(prompt("sums"), SHORT), TOKENS).await?.usage;
    let after = model.stats();
    TOKENS.equal(
        "completion_tokens",
        after.completion_tokens - before.completion_tokens,
        usage.completion_tokens as u64,
    )?;
    TOKENS.equal("cached_tokens", after.cached_tokens - before.cached_tokens, usage.cached_tokens as u64)?;
    let computed = (usage.prompt_tokens - usage.cached_tokens) as u64;
    TOKENS.equal("prompt_tokens", after.prompt_tokens - before.prompt_tokens, computed)
}
