//! Requests at the same time, one behind the other, and readers that do not read.

use futures_util::future::join_all;
use std::{future::Future, pin::Pin};

use ternion_core::{Completion, GenerateRequest, LlmBackend, LogitsRequest, ScoreRequest};

use crate::{
    Failure, Sentence,
    ask::{SHORT, answer, drawn, endless, first_token, greedy, idle, prompt, soon, start, tokens},
    check::checks,
};

checks! { "concurrency";
    requests_side_by_side_give_what_they_give_alone, SIDE_BY_SIDE, [Generate], rounding;
    all_methods_work_at_the_same_time, SIDE_BY_SIDE, [Generate, Score, Logits, Tokenizer], rounding;
    a_slow_reader_slows_nobody_else, SLOW, [Generate, FewSequences], rounding;
    a_kept_prefix_does_not_show, KEPT, [Generate], rounding;
    a_common_prefix_is_computed_once, PREFIX, [Generate, PrefixReuse, Tokenizer];
    no_more_sequences_than_promised, SEQUENCES, [Generate, SmallQueue];
}

const SIDE_BY_SIDE: Sentence =
    Sentence::new("LlmBackend", "all methods may be called at the same time from many tasks.");
const SLOW: Sentence =
    Sentence::new("LlmBackend::generate", "A slow reader slows its own generation down and nobody else's.");
const PREFIX: Sentence =
    Sentence::new("Capabilities::prefix_reuse", "A common prefix of successive requests is computed once.");
const KEPT: Sentence = Sentence::new(
    "Capabilities::prefix_reuse",
    "It shows in the time and the usage, and in nothing else but rounding.",
);
const SEQUENCES: Sentence =
    Sentence::new("Limits::max_sequences", "Sequences that are worked on at the same time.");

type Answers<'a> = Vec<Pin<Box<dyn Future<Output = Result<Completion, Failure>> + Send + 'a>>>;

fn same(sentence: Sentence, what: &str, found: &Completion, expected: &Completion) -> Result<(), Failure> {
    sentence.equal(format_args!("tokens {what}"), &found.tokens, &expected.tokens)?;
    sentence.equal(format_args!("text {what}"), &found.text, &expected.text)?;
    sentence.equal(format_args!("finish_reason {what}"), &found.finish_reason, &expected.finish_reason)?;
    sentence.equal(
        format_args!("prompt_tokens {what}"),
        found.usage.prompt_tokens,
        expected.usage.prompt_tokens,
    )
}

/// More requests than sequences, of different prompts and samplings, each of which gives what it gives alone.
///
/// # Errors
/// The answer that differs.
pub async fn requests_side_by_side_give_what_they_give_alone(model: &dyn LlmBackend) -> Result<(), Failure> {
    let limits = model.info().limits.clone();
    let count = (limits.max_sequences + 2).min(limits.max_sequences + limits.max_queued).clamp(2, 8);
    let requests: Vec<GenerateRequest> = (0..count)
        .map(|i| {
            let request = greedy(prompt(&format!("side {i}")), SHORT);
            if i % 2 == 1 { request.with_sampling(drawn(Some(i as u64))) } else { request }
        })
        .collect();
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(answer(model, request.clone(), SIDE_BY_SIDE).await?);
    }
    let all: Answers<'_> = requests
        .iter()
        .map(|r| Box::pin(answer(model, r.clone(), SIDE_BY_SIDE)) as Pin<Box<dyn Future<Output = _> + Send>>)
        .collect();
    for (i, (found, expected)) in join_all(all).await.into_iter().zip(&alone).enumerate() {
        same(SIDE_BY_SIDE, &format!("of request {i} of {count}"), &found?, expected)?;
    }
    Ok(())
}

/// A score and logits beside two generations.
///
/// # Errors
/// What differs from the same alone.
pub async fn all_methods_work_at_the_same_time(model: &dyn LlmBackend) -> Result<(), Failure> {
    let sequence = tokens(model, "all methods", 24, SIDE_BY_SIDE)?;
    let request = greedy(prompt("methods"), SHORT);
    let score = async || {
        model.score(ScoreRequest::new(sequence.clone(), 1)).await.map_err(SIDE_BY_SIDE.refused("score"))
    };
    let logits = async || {
        let request = LogitsRequest::new(sequence.clone()).with_start(20);
        model.logits(request).await.map_err(SIDE_BY_SIDE.refused("logits"))
    };
    let (scored, rows) = (score().await?, logits().await?);
    let alone = answer(model, request.clone(), SIDE_BY_SIDE).await?;
    let (a, b, c) = tokio::join!(answer(model, request, SIDE_BY_SIDE), score(), logits());
    same(SIDE_BY_SIDE, "beside a score", &a?, &alone)?;
    let (found, expected) = (b?.total(), scored.total());
    SIDE_BY_SIDE.require(
        (found - expected).abs() <= f64::from(crate::scoring::TOLERANCE) * 24.0,
        format_args!("a total of {found} beside others"),
        format_args!("{expected}, as alone"),
    )?;
    crate::scoring::close(SIDE_BY_SIDE, "logits beside others", &c?, &rows)
}

/// While answers are not read, one for each sequence, others come to their end; then the first ones give all that they have.
///
/// Without a queue one sequence is left to the others, and a backend with one sequence and no queue refuses them.
///
/// # Errors
/// An answer that does not come, or differs.
pub async fn a_slow_reader_slows_nobody_else(model: &dyn LlmBackend) -> Result<(), Failure> {
    let limits = model.info().limits.clone();
    let count = limits.max_sequences - usize::from(limits.max_queued == 0);
    let what = format!("an answer beside {count} that are not read");
    let fast = async |i: usize| {
        let fast = answer(model, greedy(prompt(&format!("fast {i}")), SHORT), SLOW);
        soon(&what, SLOW, fast).await?
    };
    let mut alone = Vec::new();
    for i in 0..usize::from(count > 0) * 3 {
        alone.push(fast(i).await?);
    }
    let mut unread = Vec::new();
    for i in 0..count {
        let mut request = endless(prompt(&format!("slow {i}")));
        // Where a policy lets answers go on past the context, this one would never end.
        request.params.max_tokens = Some(limits.context_length);
        let mut stream = start(model, request.clone(), SLOW).await?;
        first_token(&mut stream, SLOW).await?;
        unread.push((request, stream));
    }
    for (i, alone) in alone.iter().enumerate() {
        same(SLOW, "beside answers that are not read", &fast(i).await?, alone)?;
    }
    for (request, stream) in unread {
        let rest = soon("an answer that was not read", SLOW, stream.collect()).await?;
        let rest = rest.map_err(SLOW.refused("the stream"))?;
        let whole = answer(model, request, SLOW).await?;
        // An answer that gave its sequence away goes on from keys and values that are computed again, in other batches.
        if model.info().capabilities.batch_invariant {
            SLOW.equal("tokens of the slow answer", &rest.tokens[..], &whole.tokens[1..])?;
        }
    }
    Ok(())
}

/// The same request again, and longer ones with the same beginning, answered as without anything kept.
///
/// # Errors
/// The answer that differs.
pub async fn a_kept_prefix_does_not_show(model: &dyn LlmBackend) -> Result<(), Failure> {
    let text = prompt("prefix");
    let longer = format!("{text} and then we sleep");
    let first = answer(model, greedy(text.as_str(), SHORT), KEPT).await?;
    let extended = answer(model, greedy(longer.as_str(), SHORT), KEPT).await?;
    for (i, other) in ["something else", "another thing"].into_iter().enumerate() {
        answer(model, greedy(prompt(other), 3 + i), KEPT).await?;
        let again = answer(model, greedy(text.as_str(), SHORT), KEPT).await?;
        same(KEPT, "of the same prompt again", &again, &first)?;
        let again = answer(model, greedy(longer.as_str(), SHORT), KEPT).await?;
        same(KEPT, "of a longer prompt again", &again, &extended)?;
    }
    Ok(())
}

/// The second of two requests with one prompt finds it in the cache.
///
/// # Errors
/// The usage, where it says that everything was computed again.
pub async fn a_common_prefix_is_computed_once(model: &dyn LlmBackend) -> Result<(), Failure> {
    let prompt = tokens(model, "computed once", 32, PREFIX)?;
    answer(model, greedy(prompt.clone(), 2), PREFIX).await?;
    let usage = answer(model, greedy(prompt, 2), PREFIX).await?.usage;
    PREFIX.require(
        usage.cached_tokens >= usage.prompt_tokens / 2,
        format_args!("{usage:?}"),
        "most of a prompt that came just before in the cache",
    )
}

/// However many requests there are, no more of them are worked on than the limit says, and what the statistics say of
/// waiting ones stays within the queue.
///
/// # Errors
/// The statistics.
pub async fn no_more_sequences_than_promised(model: &dyn LlmBackend) -> Result<(), Failure> {
    let limits = model.info().limits.clone();
    let places = limits.max_sequences + limits.max_queued;
    let mut streams = Vec::new();
    for i in 0..places.min(2 * limits.max_sequences + 1) {
        streams.push(start(model, greedy(prompt(&format!("promised {i}")), 4), SEQUENCES).await?);
    }
    for stream in streams {
        let stats = model.stats();
        // A backend without a queue of its own may count waiting requests as active.
        let fits =
            if stats.queued > 0 { stats.active <= limits.max_sequences } else { stats.active <= places };
        SEQUENCES.require(fits, format_args!("{stats:?}"), format_args!("at most {limits:?}"))?;
        let end = soon("an answer", SEQUENCES, stream.collect()).await?;
        end.map_err(SEQUENCES.refused("the stream"))?;
    }
    idle(model, SEQUENCES).await
}
