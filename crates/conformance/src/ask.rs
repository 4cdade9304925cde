//! What the checks share: prompts, requests, and reading answers.

use std::{
    collections::HashSet,
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use ternion_core::{
    Completion, DoneEvent, Event, FinishReason, GenerateRequest, GenerateStream, LlmBackend, Prompt,
    Sampling, text::Tokenizer,
};

use crate::{
    Failure, Sentence,
    check::{attempt, patience},
};

/// Tokens of most answers that checks ask for.
pub(crate) const SHORT: usize = 12;

/// A prompt whose beginning is its own, so that no check finds another's prefix in a KV cache, and no attempt of a check an
/// earlier one's. A backend that repeats what it is told has some words to say.
pub(crate) fn prompt(own: &str) -> String {
    const TEXT: &str = "the sun is up and the day is long so we go to the sea and back home";
    match attempt() {
        0 => format!("{own}: {TEXT}"),
        n => format!("{n} {own}: {TEXT}"),
    }
}

/// A text of more tokens than fit into the model's context, whatever the tokenizer: no common one has a token for several
/// of these words.
pub(crate) fn too_long(model: &dyn LlmBackend) -> String {
    let words: Vec<String> = (0..=2 * model.info().limits.context_length).map(|i| format!("w{i}")).collect();
    words.join(" ")
}

/// A request for exactly `max_tokens` of the most probable tokens.
pub(crate) fn greedy(prompt: impl Into<Prompt>, max_tokens: usize) -> GenerateRequest {
    let mut request =
        GenerateRequest::new(prompt).with_max_tokens(max_tokens).with_sampling(Sampling::greedy());
    request.params.ignore_eos = true;
    request
}

/// A request that goes on until it is stopped or the context is full.
pub(crate) fn endless(prompt: impl Into<Prompt>) -> GenerateRequest {
    let mut request = greedy(prompt, 1);
    request.params.max_tokens = None;
    request
}

/// Sampling that draws from the whole distribution.
pub(crate) fn drawn(seed: Option<u64>) -> Sampling {
    let mut sampling = Sampling::greedy();
    sampling.temperature = Some(1.5);
    sampling.top_k = Some(0);
    sampling.top_p = Some(1.0);
    sampling.min_p = Some(0.0);
    sampling.seed = seed;
    sampling
}

/// A stream of events.
pub(crate) async fn start(
    model: &dyn LlmBackend,
    request: GenerateRequest,
    sentence: Sentence,
) -> Result<GenerateStream, Failure> {
    model.generate(request).await.map_err(sentence.refused("generate"))
}

/// A whole answer.
pub(crate) async fn answer(
    model: &dyn LlmBackend,
    request: GenerateRequest,
    sentence: Sentence,
) -> Result<Completion, Failure> {
    start(model, request, sentence).await?.collect().await.map_err(sentence.refused("the stream"))
}

/// All events of an answer, whatever comes, up to an error or the end of the stream.
pub(crate) async fn events(
    model: &dyn LlmBackend,
    request: GenerateRequest,
    sentence: Sentence,
) -> Result<Vec<Event>, Failure> {
    let mut stream = start(model, request, sentence).await?;
    let mut events = Vec::new();
    while let Some(event) = stream.next().await {
        events.push(event.map_err(sentence.refused("the stream"))?);
    }
    Ok(events)
}

/// Reads until the model has chosen a token, which must be soon.
pub(crate) async fn first_token(stream: &mut GenerateStream, sentence: Sentence) -> Result<(), Failure> {
    loop {
        match soon("the next event", sentence, stream.next()).await? {
            Some(Ok(Event::Token(_))) => return Ok(()),
            Some(Ok(Event::Done(DoneEvent { finish_reason, .. }))) => {
                return Err(sentence.broken(format_args!("the end ({finish_reason:?}) first"), "a token"));
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(sentence.refused("the stream")(error)),
            None => return Err(sentence.broken("no further event", "a token")),
        }
    }
}

/// The tokenizer; checks that call this need one.
pub(crate) fn tokenizer(model: &dyn LlmBackend, sentence: Sentence) -> Result<Arc<Tokenizer>, Failure> {
    model.tokenizer().ok_or_else(|| sentence.broken("no tokenizer", "one, as the check needs it"))
}

/// The ids of a text, with what the tokenizer adds.
pub(crate) fn encode(model: &dyn LlmBackend, text: &str, sentence: Sentence) -> Result<Vec<u32>, Failure> {
    tokenizer(model, sentence)?.encode(text, true).map_err(sentence.refused("encode"))
}

/// A prompt of exactly `length` tokens that begins as no other check's does.
pub(crate) fn tokens(
    model: &dyn LlmBackend,
    own: &str,
    length: usize,
    sentence: Sentence,
) -> Result<Vec<u32>, Failure> {
    let ids = encode(model, &prompt(own), sentence)?;
    Ok(ids.into_iter().cycle().take(length).collect())
}

/// A request with an answer whose text is cut into several different pieces, and the pieces. The most probable answer of a
/// small or untrained model may be one token again and again, or control tokens alone; others are then tried.
pub(crate) async fn answer_in_pieces(
    model: &dyn LlmBackend,
    own: &str,
    sentence: Sentence,
) -> Result<(GenerateRequest, Vec<String>), Failure> {
    let without_repetition = Sampling::greedy().with_presence_penalty(2.0);
    let samplings =
        [Sampling::greedy(), without_repetition].into_iter().chain((0..14).map(|i| drawn(Some(i))));
    let mut best = 0;
    for sampling in samplings {
        let request = greedy(prompt(own), SHORT).with_sampling(sampling);
        let events = events(model, request.clone(), sentence).await?;
        let pieces: Vec<String> = events
            .into_iter()
            .filter_map(|event| match event {
                Event::Text(event) => Some(event.text),
                _ => None,
            })
            .collect();
        let different = pieces.iter().collect::<HashSet<_>>().len();
        if different >= 4 {
            return Ok((request, pieces));
        }
        best = best.max(different);
    }
    Err(sentence.broken(
        format_args!("answers of at most {best} different pieces of text"),
        "4 of them, in one of 16 answers",
    ))
}

/// Waits until the backend is idle.
pub(crate) async fn idle(model: &dyn LlmBackend, sentence: Sentence) -> Result<(), Failure> {
    let start = Instant::now();
    loop {
        let stats = model.stats();
        if stats.active == 0 && stats.queued == 0 {
            return Ok(());
        }
        if start.elapsed() > patience() {
            return Err(sentence.broken(
                format_args!("{} active and {} queued after {:?}", stats.active, stats.queued, patience()),
                "none",
            ));
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// What `future` gives, if that is soon.
pub(crate) async fn soon<T>(
    what: &str,
    sentence: Sentence,
    future: impl Future<Output = T>,
) -> Result<T, Failure> {
    let patience = patience();
    tokio::time::timeout(patience, future)
        .await
        .map_err(|_| sentence.broken(format_args!("{what}: nothing within {patience:?}"), "an answer"))
}

/// The end of a stream: what it gives to the end is read and forgotten.
pub(crate) async fn reason(stream: GenerateStream, sentence: Sentence) -> Result<FinishReason, Failure> {
    let end = soon("the stream", sentence, stream.collect()).await?;
    Ok(end.map_err(sentence.refused("the stream"))?.finish_reason)
}

/// Requests that are at work and not read, so that they hold their sequences and places.
#[derive(Default)]
pub(crate) struct RunningRequests(Vec<(GenerateRequest, GenerateStream)>);

impl RunningRequests {
    pub(crate) fn add(&mut self, request: GenerateRequest, stream: GenerateStream) {
        self.0.push((request, stream));
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Cancels all of them and waits until nothing is left. Not by dropping: that is a check of its own.
    pub(crate) async fn cancel_all(self, model: &dyn LlmBackend, sentence: Sentence) -> Result<(), Failure> {
        for (request, _) in &self.0 {
            request.cancel.cancel();
        }
        for (_, stream) in self.0 {
            reason(stream, sentence).await?;
        }
        idle(model, sentence).await
    }
}
