//! The stream of events: its order, its end, what the pieces add up to.

use std::time::{Duration, Instant};

use ternion_core::{DoneEvent, Event, FinishReason, LlmBackend, LlmBackendExt, PrefillEvent};

use crate::{
    Failure, Sentence,
    ask::{SHORT, answer, answer_in_pieces, drawn, events, greedy, prompt, start, tokenizer},
    check::checks,
};

checks! { "streaming";
    events_come_in_order, ORDER, [Generate];
    the_last_event_is_done, LAST, [Generate];
    nothing_comes_after_the_end, ENDS, [Generate];
    prefill_grows_to_the_prompt, PREFILL, [Generate];
    pieces_are_the_answer, PIECES, [Generate, Tokenizer];
    one_token_event_for_each_token, USAGE, [Generate];
    cached_tokens_are_some_of_the_prompt, CACHED, [Generate];
    times_add_up, TIMING, [Generate];
    no_event_is_lost_to_a_dropped_future, CANCEL_SAFE, [Generate], rounding;
    awaiting_blocks_nothing, BLOCKS, [Generate];
    complete_waits_for_the_continuation, CONVENIENCES, [Generate], rounding;
}

const ORDER: Sentence = Sentence::new("Event", "Any number of Prefill, any number of Token, one Done.");
const LAST: Sentence =
    Sentence::new("LlmBackend::generate", "The events come in order; the last is Event::Done.");
const ENDS: Sentence = Sentence::new("GenerateStream", "Ends after Event::Done or after an error.");
const PREFILL: Sentence = Sentence::new("Event::Prefill", "Prompt tokens in the KV cache by now.");
const PIECES: Sentence = Sentence::new("Event::Token", "the pieces of all tokens together are the answer.");
const USAGE: Sentence =
    Sentence::new("Usage::completion_tokens", "Tokens generated, an end-of-sequence or stop token included.");
const CACHED: Sentence =
    Sentence::new("Usage::cached_tokens", "Those of them that were already in the KV cache.");
const TIMING: Sentence = Sentence::new(
    "Timing::first_token",
    "From the request to the first generated token; None if there was none.",
);
const CANCEL_SAFE: Sentence =
    Sentence::new("GenerateStream::next", "Cancel-safe: no event is lost when the future is dropped.");
const BLOCKS: Sentence =
    Sentence::new("LlmBackend", "The futures and streams need a tokio runtime, which none of them blocks.");
const CONVENIENCES: Sentence = Sentence::new(
    "LlmBackendExt::complete",
    "Continues a text and waits for the whole continuation of at most max_tokens tokens.",
);

/// Prefill before tokens before the end.
///
/// # Errors
/// The first event that comes after one that should be later.
pub async fn events_come_in_order(model: &dyn LlmBackend) -> Result<(), Failure> {
    let rank = |event: &Event| match event {
        Event::Prefill(_) => 0,
        Event::Token(_) | Event::Reasoning(_) | Event::Text(_) | Event::ToolCall(_) => 1,
        _ => 2,
    };
    let events = events(model, greedy(prompt("order"), SHORT), ORDER).await?;
    for pair in events.windows(2) {
        ORDER.require(
            rank(&pair[0]) <= rank(&pair[1]),
            format_args!("{:?} after {:?}", pair[1], pair[0]),
            "Prefill, then Token and Text, then Done",
        )?;
    }
    let ends = events.iter().filter(|event| rank(event) == 2).count();
    ORDER.equal("number of Done events", ends, 1)
}

/// A stream that nothing disturbs ends with `Done`.
///
/// # Errors
/// Another last event, or none.
pub async fn the_last_event_is_done(model: &dyn LlmBackend) -> Result<(), Failure> {
    let events = events(model, greedy(prompt("last"), SHORT), LAST).await?;
    match events.last() {
        Some(Event::Done(DoneEvent { finish_reason, usage, .. })) => {
            let natural = matches!(finish_reason, FinishReason::MaxTokens | FinishReason::EndOfSequence);
            LAST.require(natural, format_args!("{finish_reason:?}"), "MaxTokens or EndOfSequence")?;
            LAST.require(usage.completion_tokens > 0, "no token", "some")
        }
        other => Err(LAST.broken(format_args!("{other:?} last"), "Done")),
    }
}

/// After its end, a stream has ended however often it is asked.
///
/// # Errors
/// An event after the end.
pub async fn nothing_comes_after_the_end(model: &dyn LlmBackend) -> Result<(), Failure> {
    let mut stream = start(model, greedy(prompt("end"), 3), ENDS).await?;
    while let Some(event) = stream.next().await {
        if let Event::Done(_) = event.map_err(ENDS.refused("the stream"))? {
            break;
        }
    }
    for _ in 0..3 {
        if let Some(event) = stream.next().await {
            return Err(ENDS.broken(format_args!("{event:?} after the end"), "nothing"));
        }
    }
    Ok(())
}

/// What `Prefill` tells grows, stays within the prompt, and has one sum.
///
/// # Errors
/// The event that does not fit.
pub async fn prefill_grows_to_the_prompt(model: &dyn LlmBackend) -> Result<(), Failure> {
    let text = [prompt("prefill"), prompt("once more"), prompt("and again")].join(" ");
    let events = events(model, greedy(text, 3), PREFILL).await?;
    let Some(Event::Done(DoneEvent { usage, .. })) = events.last() else {
        return Err(PREFILL.broken("no Done", "the usage in it"));
    };
    let mut before = usage.cached_tokens;
    for event in &events {
        if let Event::Prefill(PrefillEvent { done, total, .. }) = event {
            PREFILL.equal("total", *total, usage.prompt_tokens)?;
            PREFILL.require(
                (before..=*total).contains(done),
                format_args!("done: {done} after {before}, of {total}"),
                "growth up to the total",
            )?;
            before = *done;
        }
    }
    Ok(())
}

/// The texts of all events, one behind the other, are what the tokenizer makes of the tokens.
///
/// # Errors
/// Both texts where they differ.
pub async fn pieces_are_the_answer(model: &dyn LlmBackend) -> Result<(), Failure> {
    let tokenizer = tokenizer(model, PIECES)?;
    let (mut request, _) = answer_in_pieces(model, "pieces", PIECES).await?;
    request.params.max_tokens = Some(3 * SHORT);
    for seed in 0..6 {
        let answer = answer(model, request.clone(), PIECES).await?;
        let expected = tokenizer.decode(&answer.tokens, true).map_err(PIECES.refused("decode"))?;
        PIECES.equal("the pieces", &answer.text, &expected)?;
        request.params.sampling = drawn(Some(seed));
    }
    Ok(())
}

/// The usage counts what the stream gave.
///
/// # Errors
/// The number that differs.
pub async fn one_token_event_for_each_token(model: &dyn LlmBackend) -> Result<(), Failure> {
    for max_tokens in [1, 2, SHORT] {
        let answer = answer(model, greedy(prompt("usage"), max_tokens), USAGE).await?;
        USAGE.equal("usage.completion_tokens", answer.usage.completion_tokens, answer.tokens.len())?;
    }
    Ok(())
}

/// A prompt has at least one token, and no more of it can be in the cache than there is.
///
/// # Errors
/// The usage.
pub async fn cached_tokens_are_some_of_the_prompt(model: &dyn LlmBackend) -> Result<(), Failure> {
    let reuses = model.info().capabilities.prefix_reuse;
    for again in [false, true] {
        let usage = answer(model, greedy(prompt("cached"), 2), CACHED).await?.usage;
        // At least one token is computed, for its logits.
        let fits = usage.prompt_tokens > 0 && usage.cached_tokens < usage.prompt_tokens;
        CACHED.require(fits, format_args!("{usage:?}"), "a prompt, and not all of it in the cache")?;
        let expected = reuses && again && usage.prompt_tokens > 1;
        let found = usage.cached_tokens > 0;
        CACHED.require(
            found || !expected,
            format_args!("{usage:?} for the same prompt again"),
            "cached tokens",
        )?;
        CACHED.require(
            !found || reuses,
            format_args!("{usage:?} without the capability"),
            "no cached tokens",
        )?;
    }
    Ok(())
}

/// The parts of the time make no more than the whole, as a caller measures it.
///
/// # Errors
/// The times.
pub async fn times_add_up(model: &dyn LlmBackend) -> Result<(), Failure> {
    let start = Instant::now();
    let answer = answer(model, greedy(prompt("timing"), SHORT), TIMING).await?;
    let (all, timing) = (start.elapsed(), answer.timing);
    let Some(first) = timing.first_token else {
        return Err(TIMING.broken("no first token", "a time, as there are tokens"));
    };
    let parts = timing.queued + timing.prefill + timing.decode;
    TIMING.require(parts <= all, format_args!("{timing:?}"), format_args!("at most {all:?} together"))?;
    let order = timing.queued <= first && first <= all;
    TIMING.require(order, format_args!("{timing:?}"), format_args!("a first token by {all:?}"))?;

    let mut request = greedy(prompt("timing of nothing"), SHORT);
    let cancel = request.cancel.clone();
    cancel.cancel();
    request.cancel = cancel;
    let none = crate::ask::answer(model, request, TIMING).await?;
    let fits = none.timing.first_token.is_none() == none.tokens.is_empty();
    TIMING.require(
        fits,
        format_args!("{:?} for {} tokens", none.timing.first_token, none.tokens.len()),
        "a time if there are tokens",
    )
}

/// A reader that gives up waiting again and again gets every event all the same.
///
/// # Errors
/// Both answers where they differ.
pub async fn no_event_is_lost_to_a_dropped_future(model: &dyn LlmBackend) -> Result<(), Failure> {
    let request = greedy(prompt("patience"), SHORT);
    let expected = answer(model, request.clone(), CANCEL_SAFE).await?;
    let mut stream = start(model, request, CANCEL_SAFE).await?;
    let (mut tokens, mut text) = (Vec::new(), String::new());
    loop {
        let next = tokio::time::timeout(Duration::from_micros(50), stream.next());
        match next.await {
            Ok(Some(Ok(Event::Token(token)))) => tokens.push(token.id),
            Ok(Some(Ok(Event::Text(piece)))) => text.push_str(&piece.text),
            Ok(Some(Ok(Event::Done(_)))) => break,
            Ok(Some(Err(error))) => return Err(CANCEL_SAFE.refused("the stream")(error)),
            Ok(None) => return Err(CANCEL_SAFE.broken("no Done", "one")),
            Err(_) | Ok(Some(Ok(_))) => {}
        }
    }
    CANCEL_SAFE.equal("tokens", tokens, expected.tokens)?;
    CANCEL_SAFE.equal("text", text, expected.text)
}

/// Most of the time of a generation is spent outside of its future and stream.
///
/// # Errors
/// The times.
pub async fn awaiting_blocks_nothing(model: &dyn LlmBackend) -> Result<(), Failure> {
    /// What preparing a request or handing out a token may take by itself.
    const NOTHING: Duration = Duration::from_millis(100);
    let mut work = Box::pin(answer(model, greedy(prompt("blocking"), 2 * SHORT), BLOCKS));
    let (start, mut inside) = (Instant::now(), Duration::ZERO);
    std::future::poll_fn(|cx| {
        let polled = Instant::now();
        let state = work.as_mut().poll(cx);
        inside += polled.elapsed();
        state
    })
    .await?;
    let all = start.elapsed();
    BLOCKS.require(
        inside <= NOTHING.max(all / 2),
        format_args!("{inside:?} of {all:?} within polls"),
        "a small part of it",
    )
}

/// `complete` is a generation that is waited for.
///
/// # Errors
/// What differs.
pub async fn complete_waits_for_the_continuation(model: &dyn LlmBackend) -> Result<(), Failure> {
    let text = prompt("complete");
    let answer = model.complete(&text, 4).await.map_err(CONVENIENCES.refused("complete"))?;
    let count = answer.usage.completion_tokens;
    CONVENIENCES.require((1..=4).contains(&count), format_args!("{count} tokens"), "1 to 4")?;
    CONVENIENCES.equal("tokens of the continuation", answer.tokens.len(), count)
}
