//! Context policies around a backend that answers at once and notes what it was asked: nothing is ever over the context, and
//! what was done is told.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::{
    pin::Pin,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use futures_core::Stream;
use ternion_core::{
    ChatOptions, DoneEvent, Error, ErrorKind, Event, FinishReason, GenerateRequest, GenerateStream,
    LlmBackend, LlmBackendExt, Message, ModelInfo, Prompt, Result, Score, ScoreRequest, Timing, TokenEvent,
    Usage,
    context::{
        Chunked, ContextLayer, ContextPolicy, ContextReport, ContextStep, DropFrom, MessageTokens,
        TokenBudget, Truncate,
    },
    echo::{Echo, EchoOptions},
    text::{ChunkKind, Tokenizer, TokenizerParts},
    validate,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

const CONTEXT: usize = 256;

static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    let folder = ternion_test_support::fixture("nano-packed");
    Arc::new(Tokenizer::from_parts(TokenizerParts::from_folder(folder).unwrap()).unwrap())
});

/// Answers every prompt that fits with the same words, and remembers it.
#[derive(Clone)]
struct Clerk {
    info: Arc<ModelInfo>,
    reply: Arc<str>,
    /// Fails on a prompt with these words.
    poison: Option<Arc<str>>,
    /// So many requests find it busy ...
    busy: Arc<AtomicUsize>,
    /// ... after it has accepted so many.
    busy_after: usize,
    prompts: Arc<Mutex<Vec<Prompt>>>,
    active: Arc<AtomicUsize>,
    most_active: Arc<AtomicUsize>,
    delay: Duration,
}

impl Clerk {
    fn new(reply: &str) -> Self {
        let mut info = ModelInfo::new("clerk", "test");
        info.limits.context_length = CONTEXT;
        info.limits.max_sequences = 3;
        info.limits.max_queued = 8;
        info.limits.vocab_size = TOKENIZER.vocab_size();
        Self {
            info: Arc::new(info),
            reply: reply.into(),
            poison: None,
            busy: Arc::default(),
            busy_after: 0,
            prompts: Arc::default(),
            active: Arc::default(),
            most_active: Arc::default(),
            delay: Duration::from_millis(1),
        }
    }

    fn with(&self, policy: ContextPolicy) -> Arc<dyn LlmBackend> {
        Arc::new(ContextLayer::new(Arc::new(self.clone()), policy).unwrap())
    }

    fn prompts(&self) -> Vec<Prompt> {
        self.prompts.lock().unwrap().clone()
    }
}

fn text_of(prompt: &Prompt) -> String {
    match prompt {
        Prompt::Tokens(ids) => TOKENIZER.decode(ids, true).unwrap(),
        Prompt::Chat(messages) => messages.iter().map(|m| m.content.text()).collect::<Vec<_>>().join("|"),
        text => text.text().unwrap().into_owned(),
    }
}

fn count(prompt: &Prompt) -> usize {
    TOKENIZER.encode_prompt(prompt, &ChatOptions::default()).unwrap().len()
}

struct Events(mpsc::Receiver<Result<Event>>);

impl Stream for Events {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(cx)
    }
}

#[async_trait]
impl LlmBackend for Clerk {
    fn info(&self) -> Arc<ModelInfo> {
        Arc::clone(&self.info)
    }

    fn tokenizer(&self) -> Option<Arc<Tokenizer>> {
        Some(Arc::clone(&TOKENIZER))
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        validate::generate(&request.params, &self.info)?;
        let prompt_tokens = count(&request.params.prompt);
        validate::prompt_fits(prompt_tokens, CONTEXT)?;
        let text = text_of(&request.params.prompt);
        if self.poison.as_ref().is_some_and(|words| text.contains(&**words)) {
            return Err(Error::backend("poisoned"));
        }
        let counts = self.prompts.lock().unwrap().len() >= self.busy_after;
        if counts && self.busy.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok()
        {
            return Err(Error::new(ErrorKind::Busy, "busy"));
        }
        self.prompts.lock().unwrap().push(request.params.prompt);
        let (sender, events) = mpsc::channel(8);
        let clerk = self.clone();
        tokio::spawn(async move {
            let active = clerk.active.fetch_add(1, Ordering::SeqCst) + 1;
            clerk.most_active.fetch_max(active, Ordering::SeqCst);
            let cancelled =
                request.cancel.run_until_cancelled(tokio::time::sleep(clerk.delay)).await.is_none();
            let text = if cancelled { String::new() } else { clerk.reply.to_string() };
            let generated = TOKENIZER.encode_plain(&text).unwrap().len();
            let completion_tokens = generated.min(request.params.max_tokens.unwrap_or(generated));
            let _ = sender.send(Ok(TokenEvent::new(1).into())).await;
            let _ = sender.send(Ok(Event::text(text))).await;
            clerk.active.fetch_sub(1, Ordering::SeqCst);
            let mut usage = Usage::default();
            (usage.prompt_tokens, usage.completion_tokens) = (prompt_tokens, completion_tokens);
            let finish_reason = if cancelled { FinishReason::Cancelled } else { FinishReason::EndOfSequence };
            let done = DoneEvent::new(finish_reason, usage, Timing::default());
            let _ = sender.send(Ok(done.into())).await;
        });
        Ok(GenerateStream::new(Events(events)))
    }

    async fn score(&self, _: ScoreRequest) -> Result<Score> {
        Err(Error::unsupported("no scores"))
    }
}

/// The same request without what a check has computed.
fn fresh(request: &GenerateRequest) -> GenerateRequest {
    let mut fresh = GenerateRequest::new(request.params.prompt.clone());
    fresh.params.max_tokens = request.params.max_tokens;
    fresh.params.document.clone_from(&request.params.document);
    fresh.params.context_policy.clone_from(&request.params.context_policy);
    fresh
}

/// A text of about this many tokens, with each sentence numbered.
fn long_text(tokens: usize) -> String {
    let mut text = String::new();
    let mut counted = 0;
    for i in 0.. {
        let sentence = format!("Sentence number {i} says – naïvely – that the sky is blue, 天空是蓝色的. ");
        counted += TOKENIZER.encode_plain(&sentence).unwrap().len();
        if counted > tokens {
            return text;
        }
        text += &sentence;
        if i % 5 == 4 {
            text += "\n\n";
        }
    }
    text
}

fn truncate(drop: DropFrom) -> Truncate {
    let mut policy = Truncate::default();
    policy.drop = drop;
    policy
}

const ALL: [DropFrom; 4] = [DropFrom::OldestTurns, DropFrom::Head, DropFrom::Tail, DropFrom::Middle];

#[test]
fn the_parts_of_a_budget_sum_up_to_the_prompt() {
    let conversations = [
        vec![Message::user("hi")],
        vec![
            Message::system("Be brief."),
            Message::user(" leading space"),
            Message::assistant("naïve 天空"),
            Message::user(""),
        ],
        vec![Message::user("<|eot_id|> as text"), Message::assistant("\n\n"), Message::user("x".repeat(500))],
    ];
    for messages in conversations {
        let budget = TokenBudget::for_chat(&TOKENIZER, &messages, Some(CONTEXT), 20).unwrap();
        assert_eq!(budget.prompt, TOKENIZER.encode_chat(&messages, true).unwrap().len());
        let texts = budget.system() + budget.history() + budget.input();
        assert_eq!(budget.template() + texts as i64, budget.prompt as i64);
        let parts: i64 = budget.messages.iter().map(MessageTokens::total).sum();
        assert_eq!(budget.opening as i64 + parts + budget.answer_header, budget.prompt as i64);
        assert_eq!(budget.free(), Some(CONTEXT as i64 - budget.prompt as i64 - 20));
        for (part, message) in budget.messages.iter().zip(&messages) {
            assert_eq!(part.text, TOKENIZER.encode_plain(&message.content.text()).unwrap().len());
            assert!(part.template >= 0, "this template trims nothing: {part:?}");
        }
    }
}

#[tokio::test]
async fn truncation_keeps_the_system_message_and_the_last_one_whatever_it_drops() {
    let mut messages = vec![Message::system("SYSTEM")];
    for i in 0..12 {
        messages.push(Message::user(format!("question {i} 天空 👨‍👩‍👧 naïve")));
        messages.push(Message::assistant(format!("answer {i} é\u{301}é 天空是蓝色的")));
    }
    messages.push(Message::user("LAST"));
    let limit = CONTEXT - 16;
    assert!(TOKENIZER.count_chat(&messages).unwrap() > limit);
    for drop in ALL {
        let clerk = Clerk::new("fine");
        let request = GenerateRequest::chat(messages.clone()).with_max_tokens(16);
        let answer = clerk.with(ContextPolicy::Truncate(truncate(drop))).generate(request).await.unwrap();
        let answer = answer.collect().await.unwrap();
        let prompts = clerk.prompts();
        let [Prompt::Chat(kept)] = &prompts[..] else { panic!("{prompts:?}") };
        let tokens = TOKENIZER.count_chat(kept).unwrap();
        assert!(tokens <= limit, "{drop:?}: {tokens}");
        // Not much more than needed, but for whole turns.
        assert!(tokens + 60 > limit, "{drop:?}: {tokens}");
        assert_eq!((&*kept[0].content.text(), &*kept.last().unwrap().content.text()), ("SYSTEM", "LAST"));
        // Roles still alternate, and what is there is a part of what was there.
        for (i, message) in kept.iter().enumerate().skip(1) {
            assert_eq!(message.role, if i % 2 == 1 { "user" } else { "assistant" });
            let whole = messages.iter().any(|m| m.content.text().contains(&*message.content.text()));
            let middle = drop == DropFrom::Middle;
            assert!(whole || middle, "{drop:?}: {message:?}");
        }
        let report = answer.context.unwrap();
        assert_eq!((report.policy.as_str(), report.calls, report.prompt_limit), ("truncate", 1, limit));
        assert_eq!(report.prompt_tokens, TOKENIZER.count_chat(&messages).unwrap());
        // What is reported as dropped is what is missing.
        let missing: usize = report.dropped.iter().map(|d| d.end - d.start).sum();
        let bytes = |messages: &[Message]| messages.iter().map(|m| m.content.text().len()).sum::<usize>();
        assert_eq!(bytes(&messages) - bytes(kept), missing, "{drop:?}");
        for dropped in &report.dropped {
            let content = messages[dropped.message.unwrap()].content.text();
            assert!(content.is_char_boundary(dropped.start) && content.is_char_boundary(dropped.end));
            let divided =
                |at: usize| content[..at].ends_with('\u{200d}') || content[at..].starts_with('\u{200d}');
            assert!(!divided(dropped.start) && !divided(dropped.end), "{content:?} at {dropped:?}");
        }
        match drop {
            DropFrom::Tail => assert_eq!(kept[1], messages[1]),
            DropFrom::Middle => assert!(kept[1] == messages[1] && kept[kept.len() - 2] == messages[24]),
            _ => assert_eq!(kept[kept.len() - 2], messages[24]),
        }
    }
}

#[tokio::test]
async fn documents_texts_and_tokens_are_cut_between_characters() {
    let text = long_text(3000);
    let ids = TOKENIZER.encode(&text, true).unwrap();
    for drop in ALL {
        let clerk = Clerk::new("fine");
        let model = clerk.with(ContextPolicy::Truncate(truncate(drop)));
        let chat = GenerateRequest::chat([Message::user("TASK")]).with_document(text.as_str());
        for request in [chat, GenerateRequest::new(text.as_str()), GenerateRequest::new(ids.clone())] {
            let answer = model.generate(request).await.unwrap().collect().await.unwrap();
            let prompt = clerk.prompts().pop().unwrap();
            let tokens = count(&prompt);
            let limit = CONTEXT - CONTEXT / 4;
            assert!(tokens <= limit && tokens + 8 > limit, "{drop:?}: {tokens}");
            let kept = text_of(&prompt);
            assert!(!kept.contains('\u{fffd}'), "{kept}");
            if matches!(prompt, Prompt::Chat(_)) {
                assert!(kept.ends_with("\n\nTASK"));
            }
            if let Prompt::Tokens(kept) = &prompt {
                assert_eq!(kept[0], ids[0], "the first token begins every sequence");
            }
            let report = answer.context.unwrap();
            assert_eq!((report.dropped.len(), report.dropped[0].message), (1, None));
            let has = |words: &str| kept.contains(words);
            let first = text.split('.').next().unwrap();
            assert_eq!(has(first), matches!(drop, DropFrom::Tail | DropFrom::Middle), "{drop:?}");
        }
    }
}

#[tokio::test]
async fn what_cannot_be_made_to_fit_is_refused_with_its_size() {
    let clerk = Clerk::new("fine");
    let messages = [
        Message::system("Be brief."),
        Message::user("old"),
        Message::assistant("older"),
        Message::user(long_text(400)),
    ];
    for drop in ALL {
        let model = clerk.with(ContextPolicy::Truncate(truncate(drop)));
        let error = model.generate(GenerateRequest::chat(messages.clone())).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ContextOverflow);
        let error = error.to_string();
        assert!(
            error.contains("the system message and the last user message") && error.contains("at most 192"),
            "{error}"
        );

        let mut policy = truncate(drop);
        policy.cut_last_message = true;
        let model = clerk.with(ContextPolicy::Truncate(policy));
        model.chat(messages.to_vec()).await.unwrap();
    }
    // What fits is left alone, without a report.
    let model = clerk.with(ContextPolicy::Truncate(Truncate::default()));
    let answer = model.chat(vec![Message::user("short")]).await.unwrap();
    assert_eq!(
        (answer.context, clerk.prompts().pop().unwrap()),
        (None, Prompt::Chat(vec![Message::user("short")]))
    );
    // The default is to refuse.
    let model = clerk.with(ContextPolicy::Reject);
    let error = model.chat(messages.to_vec()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ContextOverflow);
    assert!(!model.info().capabilities.long_prompts);
    // A request may ask for another policy.
    let request = GenerateRequest::new(long_text(400)).with_context_policy("truncate-tail".parse().unwrap());
    model.generate(request).await.unwrap().collect().await.unwrap();
}

fn chunked(change: impl FnOnce(&mut Chunked)) -> Chunked {
    let mut chunked = Chunked::default();
    change(&mut chunked);
    chunked
}

/// All events of a stream, until it ends or fails.
async fn events(mut stream: GenerateStream) -> (Vec<Event>, Option<Error>) {
    let mut all = Vec::new();
    while let Some(event) = stream.next().await {
        match event {
            Ok(event) => all.push(event),
            Err(error) => return (all, Some(error)),
        }
    }
    (all, None)
}

fn report(events: &[Event]) -> &ContextReport {
    let reports: Vec<_> = events
        .iter()
        .filter_map(|e| match e {
            Event::Context(ContextStep::Report(report)) => Some(report),
            _ => None,
        })
        .collect();
    assert_eq!(reports.len(), 1);
    reports[0]
}

#[tokio::test]
async fn map_reduce_reads_all_of_it_and_makes_one_answer_of_the_answers() {
    let text = long_text(6000);
    let clerk = Clerk::new("This part says that the sky is blue and little else.");
    for kind in [ChunkKind::Text, ChunkKind::Markdown, ChunkKind::Code] {
        clerk.prompts.lock().unwrap().clear();
        let model = clerk.with(ContextPolicy::MapReduce(chunked(|c| c.chunk_kind = kind)));
        let request = GenerateRequest::chat([Message::system("SYSTEM"), Message::user("TASK")])
            .with_document(text.as_str())
            .with_max_tokens(30);
        let (events, error) = events(model.generate(request).await.unwrap()).await;
        assert!(error.is_none(), "{error:?}");
        let report = report(&events);
        // The chunks are the text, and each was read once.
        let mut end = 0;
        for chunk in &report.chunks {
            assert_eq!(chunk.start + chunk.overlap, end);
            end = chunk.end;
        }
        assert_eq!(end, text.len());
        let prompts = clerk.prompts();
        assert_eq!(prompts.len(), report.calls);
        for chunk in &report.chunks {
            let own = &text[chunk.start..chunk.end];
            assert!(own.len() > 30, "{own:?} is worth no request");
            assert_eq!(prompts.iter().filter(|p| text_of(p).contains(own)).count(), 1);
        }
        for prompt in &prompts {
            assert!(count(prompt) <= CONTEXT - 30, "{}", count(prompt));
            assert!(text_of(prompt).starts_with("SYSTEM|TASK\n\n"), "{}", text_of(prompt));
        }
        // In rounds: the chunks' answers, then the answers' answers.
        assert_eq!(report.merged[0], report.chunks.len());
        assert!(report.merged.len() > 1 && report.merged.is_sorted_by(|a, b| a > b), "{:?}", report.merged);
        let rounds: usize = report.merged.iter().sum();
        assert_eq!(report.calls, rounds + 1);
        let done = |e: &&Event| matches!(e, Event::Context(ContextStep::PartDone { .. }));
        assert_eq!(events.iter().filter(done).count(), rounds);
        assert_eq!(report.total_prompt_tokens, prompts.iter().map(count).sum::<usize>());
        let [.., before, Event::Done(DoneEvent { usage, .. })] = &events[..] else { panic!() };
        assert!(matches!(before, Event::Context(ContextStep::Report(_))));
        assert_eq!(usage.prompt_tokens, count(prompts.last().unwrap()), "the last request's own");
        assert_eq!(clerk.most_active.load(Ordering::SeqCst), 3, "as many at once as there are sequences");
    }
}

#[tokio::test]
async fn refine_carries_the_answer_through_the_text() {
    let text = long_text(1500);
    let clerk = Clerk::new("The answer so far is blue.");
    let model = clerk.with("refine".parse().unwrap());
    let request = GenerateRequest::new("TASK").with_document(text.as_str()).with_max_tokens(20);
    let (events, error) = events(model.generate(request).await.unwrap()).await;
    assert!(error.is_none(), "{error:?}");
    let report = report(&events);
    let prompts = clerk.prompts();
    assert_eq!((prompts.len(), report.calls), (report.chunks.len(), report.chunks.len()));
    for (i, (chunk, prompt)) in report.chunks.iter().zip(&prompts).enumerate() {
        let prompt = text_of(prompt);
        assert!(prompt.contains(&text[chunk.start..chunk.end]) && prompt.starts_with("TASK"));
        assert_eq!(prompt.contains("The answer so far is blue."), i > 0);
    }
    assert!(prompts.iter().all(|p| count(p) <= CONTEXT - 20));
    assert_eq!(clerk.most_active.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_part_that_fails_is_named_and_the_answers_of_others_are_not_lost() {
    let text = long_text(1500);
    let mut clerk = Clerk::new("answer");
    clerk.poison = Some("number 20 ".into());
    let model = clerk.with("map-reduce".parse().unwrap());
    let request = GenerateRequest::new("TASK").with_document(text.as_str()).with_max_tokens(20);
    let (events, error) = events(model.generate(request).await.unwrap()).await;
    let error = error.unwrap();
    assert_eq!(error.kind(), ErrorKind::Backend);
    let error = error.to_string();
    assert!(error.contains("poisoned") && error.contains("part: ") && error.contains("bytes: "), "{error}");
    let kept =
        |e: &&Event| matches!(e, Event::Context(ContextStep::PartDone { answer, .. }) if answer == "answer");
    assert!(events.iter().filter(kept).count() >= 2);
}

#[tokio::test]
async fn a_full_queue_delays_a_run_and_does_not_end_it() {
    let text = long_text(1500);
    for policy in ["map-reduce", "refine"] {
        let run = async |busy: usize, busy_after: usize| {
            let mut clerk = Clerk::new("answer");
            clerk.busy.store(busy, Ordering::SeqCst);
            clerk.busy_after = busy_after;
            let model = clerk.with(policy.parse().unwrap());
            let request = GenerateRequest::new("TASK").with_document(text.as_str()).with_max_tokens(20);
            let (events, error) = events(model.generate(request).await.unwrap()).await;
            assert!(error.is_none(), "{error:?}");
            assert_eq!(clerk.busy.load(Ordering::SeqCst), 0);
            let mut started = Vec::new();
            let mut used = 0;
            for event in &events {
                match event {
                    Event::Context(ContextStep::PartStarted { round, part, .. }) => {
                        started.push((*round, *part));
                    }
                    Event::Context(ContextStep::PartDone { usage, .. })
                    | Event::Done(DoneEvent { usage, .. }) => used += usage.prompt_tokens,
                    _ => {}
                }
            }
            let count = started.len();
            started.sort_unstable();
            started.dedup();
            assert_eq!(started.len(), count, "a part starts once");
            let report = report(&events);
            assert_eq!(used, report.total_prompt_tokens, "the parts say what they used");
            (report.calls, count)
        };
        let quiet = run(0, 0).await;
        assert_eq!(run(5, 0).await, quiet, "busy at the first parts");
        assert_eq!(run(2, 2).await, quiet, "busy while parts are at work");
        assert_eq!(run(2, quiet.0 - 1).await, quiet, "busy at the answer");
    }
}

#[tokio::test]
async fn a_check_judges_as_generation_does() {
    let long = long_text(600);
    for policy in ["reject", "truncate", "map-reduce", "refine"] {
        let model = Clerk::new("answer").with(policy.parse().unwrap());
        for request in [
            GenerateRequest::new(long.as_str()),
            GenerateRequest::new("TASK").with_document(long.as_str()),
            GenerateRequest::new("TASK").with_document("short"),
            GenerateRequest::new("TASK").with_document(""),
            GenerateRequest::new(long.as_str()).with_max_tokens(0),
            GenerateRequest::new(long.as_str()).with_context_policy("truncate-middle".parse().unwrap()),
            GenerateRequest::new(long.as_str()).with_context_policy("sliding".parse().unwrap()),
        ] {
            let kind = |e: Error| (e.kind(), e.message().to_owned());
            let checked = model.validate(&request).await.err().map(kind);
            // The request has what its check has computed; its copy has that, too, and a fresh one has not.
            let fresh = fresh(&request);
            let after = model.generate(request).await.err().map(kind);
            let alone = model.generate(fresh).await.err().map(kind);
            assert_eq!((&checked, &after), (&alone, &alone), "{policy}");
        }
    }
}

#[tokio::test]
async fn a_request_that_changes_after_its_check_is_judged_anew() {
    let model = Clerk::new("answer").with("truncate".parse().unwrap());
    let mut request = GenerateRequest::new(long_text(600)).with_max_tokens(20);
    model.validate(&request).await.unwrap();
    request.params.prompt = "short".into();
    let (events, _) = events(model.generate(request).await.unwrap()).await;
    let [.., Event::Done(DoneEvent { usage, .. })] = &events[..] else { panic!("{events:?}") };
    assert_eq!(usage.prompt_tokens, count(&"short".into()));
}

#[tokio::test]
async fn cancelling_or_dropping_ends_all_steps() {
    let text = long_text(1500);
    let mut clerk = Clerk::new("answer");
    clerk.delay = Duration::from_secs(60);
    let model = clerk.with("map-reduce".parse().unwrap());
    let cancel = CancellationToken::new();
    let request = || GenerateRequest::new("TASK").with_document(text.as_str()).with_max_tokens(20);
    let mut stream = model.generate(request().with_cancel(cancel.clone())).await.unwrap();
    stream.next().await.unwrap().unwrap();
    cancel.cancel();
    let (events, error) = events(stream).await;
    assert!(error.is_none(), "{error:?}");
    assert!(
        matches!(events.last(), Some(Event::Done(DoneEvent { finish_reason: FinishReason::Cancelled, .. }))),
        "{events:?}"
    );

    let mut stream = model.generate(request()).await.unwrap();
    for _ in 0..3 {
        stream.next().await.unwrap().unwrap();
    }
    drop(stream);
    for _ in 0..500 {
        if clerk.active.load(Ordering::SeqCst) == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("steps are still going on");
}

#[tokio::test]
async fn what_a_policy_cannot_do_is_said_before_any_work() {
    let text = long_text(1500);
    let clerk = Clerk::new("answer");
    let refused = async |policy: Chunked, request: GenerateRequest| {
        let model = clerk.with(ContextPolicy::MapReduce(policy));
        let error = model.generate(request.with_max_tokens(20)).await.unwrap_err();
        assert!(clerk.prompts().is_empty());
        (error.kind(), error.to_string())
    };
    let task = || GenerateRequest::chat([Message::user("TASK")]).with_document(text.as_str());
    // No task, no way to read it.
    let (kind, error) =
        refused(Chunked::default(), GenerateRequest::chat([Message::user(text.as_str())])).await;
    assert!(kind == ErrorKind::InvalidRequest && error.contains("what to do with the long text"), "{error}");
    let ids = TOKENIZER.encode(&text, true).unwrap();
    let (kind, error) = refused(Chunked::default(), GenerateRequest::new(ids)).await;
    assert!(kind == ErrorKind::Unsupported && error.contains("tokens"), "{error}");
    // No room.
    let long_task = GenerateRequest::chat([Message::user(long_text(230))]).with_document(text.as_str());
    let (kind, error) = refused(Chunked::default(), long_task).await;
    assert!(kind == ErrorKind::ContextOverflow && error.contains("at least"), "{error}");
    let (kind, error) = refused(chunked(|c| c.answer_tokens = Some(120)), task()).await;
    assert!(kind == ErrorKind::ContextOverflow && error.contains("two answers of 120 tokens"), "{error}");
    let (kind, error) = refused(chunked(|c| c.chunk_tokens = Some(1)), task()).await;
    assert!(kind == ErrorKind::InvalidRequest && error.contains("cannot hold the character"), "{error}");
    let (kind, error) = refused(chunked(|c| c.overlap = Some(250)), task()).await;
    assert!(kind == ErrorKind::InvalidRequest && error.contains("overlap"), "{error}");
    // Without a boundary it is cut all the same.
    let word = GenerateRequest::new("TASK").with_document("x".repeat(2000)).with_max_tokens(20);
    let answer = clerk.with("map-reduce".parse().unwrap()).generate(word).await.unwrap();
    assert!(answer.collect().await.unwrap().context.unwrap().chunks.len() > 3);
    // A configuration that cannot work does not load.
    let layer = |policy: &str| ContextLayer::new(Arc::new(clerk.clone()), policy.parse().unwrap());
    assert_eq!(layer("sliding").unwrap_err().kind(), ErrorKind::Unsupported);
    let echo = Arc::new(Echo::new("e", EchoOptions::default()));
    let error = ContextLayer::new(echo, "truncate".parse().unwrap()).unwrap_err();
    assert!(error.to_string().contains("backend `echo` has no tokenizer"), "{error}");
}

/// 100,000 tokens through each policy but `sliding`, which is the engine's.
#[tokio::test]
async fn a_hundred_thousand_tokens_are_taken_by_every_policy() {
    let text = long_text(100_000);
    let clerk = Clerk::new("blue");
    for policy in ["truncate", "truncate-tail", "truncate-middle", "map-reduce", "refine"] {
        let start = std::time::Instant::now();
        let request = GenerateRequest::new("TASK").with_document(text.as_str()).with_max_tokens(20);
        let answer =
            clerk.with(policy.parse().unwrap()).generate(request).await.unwrap().collect().await.unwrap();
        let report = answer.context.unwrap();
        println!("{policy}: {} calls, {} chunks, {:?}", report.calls, report.chunks.len(), start.elapsed());
        assert!(report.prompt_tokens > 95_000);
        let all = report.dropped_tokens() + report.chunks.iter().map(|c| c.tokens).sum::<usize>();
        assert!(all > 95_000, "{policy}: {all}");
    }
}
