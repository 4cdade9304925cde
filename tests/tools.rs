//! Functions of the host in a loop with a model that is scripted.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use ternion::{
    ChatOptions, Content, DoneEvent, ErrorKind, Event, FinishReason, GenerateParams, GenerateRequest,
    GenerateStream, LlmBackend, Message, ModelInfo, Prompt, Result, Timing, Tool, ToolCallEvent, ToolChoice,
    Usage, async_trait,
    tools::{RunEvent, ToolLoop},
};

/// Gives these answers one after the other, and remembers what it was asked.
struct Scripted {
    answers: Mutex<VecDeque<Vec<Event>>>,
    asked: Mutex<Vec<GenerateParams>>,
}

impl Scripted {
    fn new(answers: impl IntoIterator<Item = Vec<Event>>) -> Arc<Self> {
        Arc::new(Self { answers: Mutex::new(answers.into_iter().collect()), asked: Mutex::default() })
    }

    /// The messages of the request with this number.
    fn messages(&self, request: usize) -> Vec<Message> {
        match &self.asked.lock().unwrap()[request].prompt {
            Prompt::Chat(messages) => messages.clone(),
            other => panic!("{other:?}"),
        }
    }
}

#[async_trait]
impl LlmBackend for Scripted {
    fn info(&self) -> Arc<ModelInfo> {
        Arc::new(ModelInfo::new("scripted", "test"))
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        self.asked.lock().unwrap().push(request.params);
        let mut events = self.answers.lock().unwrap().pop_front().unwrap_or_default();
        let called = events.iter().any(|event| matches!(event, Event::ToolCall(_)));
        let reason = if called { FinishReason::ToolCalls } else { FinishReason::EndOfSequence };
        events.push(DoneEvent::new(reason, Usage::new(10, 3), Timing::default()).into());
        Ok(GenerateStream::from_events(events.into_iter().map(Ok)))
    }
}

fn call(index: usize, name: &str, arguments: &str) -> [Event; 2] {
    [
        ToolCallEvent::start(index, format!("id{index}"), name).into(),
        ToolCallEvent::arguments(index, arguments).into(),
    ]
}

fn tool(name: &str) -> Tool {
    Tool::function(name, "A test.", json!({ "type": "object" }))
}

fn hello() -> GenerateRequest {
    GenerateRequest::chat([Message::user("Hi")])
}

#[tokio::test]
async fn the_model_gets_what_its_calls_return() {
    let first =
        [Event::reasoning("Hm."), Event::text("See:")].into_iter().chain(call(0, "double", "{\"n\": 4}"));
    let model = Scripted::new([first.chain(call(1, "name", "{}")).collect(), vec![Event::text("Eight.")]]);
    let assistant = ToolLoop::new(model.clone())
        .with_tool(tool("double"), async |arguments: Value| Ok(json!(arguments["n"].as_i64().unwrap() * 2)))
        .with_tool(tool("name"), async |_| Ok("Ann".into()));
    let mut results = Vec::new();
    let request = hello().with_chat_options(ChatOptions::default().with_tool_choice(ToolChoice::Required));
    let run = assistant
        .run_with(request, |event| {
            if let RunEvent::Result { call, result, failed } = event {
                results.push((call.name, result, failed));
            }
        })
        .await
        .unwrap();
    assert_eq!((run.answer.text.as_str(), run.rounds), ("Eight.", 1));
    assert_eq!((run.usage.prompt_tokens, run.usage.completion_tokens), (20, 6));
    assert_eq!(results, [("double".into(), "8".into(), false), ("name".into(), "Ann".into(), false)]);

    let messages = model.messages(1);
    assert_eq!(messages.len(), 4);
    assert_eq!((messages[1].content.clone(), messages[1].reasoning.as_deref()), ("See:".into(), Some("Hm.")));
    assert_eq!(messages[1].tool_calls[0].arguments, "{\"n\": 4}");
    assert_eq!(
        (messages[2].tool_call_id.as_deref(), &messages[2].content),
        (Some("id0"), &Content::from("8"))
    );
    assert_eq!(run.messages[..4], messages);
    assert_eq!(run.messages[4], Message::assistant("Eight."));
    // The choice holds for the first round, else there would be no end.
    let asked = model.asked.lock().unwrap();
    assert_eq!(asked[0].chat.tool_choice, ToolChoice::Required);
    assert_eq!((&asked[1].chat.tool_choice, asked[1].chat.tools.len()), (&ToolChoice::Auto, 2));
}

#[tokio::test]
async fn what_goes_wrong_in_a_function_goes_to_the_model() {
    let calls = [("fails", "{}"), ("panics", "{}"), ("unknown", "{}"), ("fails", "{\"a\": ")];
    let calls = calls.iter().enumerate().flat_map(|(i, (name, arguments))| call(i, name, arguments));
    let model = Scripted::new([calls.collect(), vec![Event::text("Sorry.")]]);
    let assistant = ToolLoop::new(model.clone())
        .with_tool(tool("fails"), async |_| Err("no network".into()))
        .with_tool(tool("panics"), async |_| panic!("a bug"));
    let run = assistant.run(hello()).await.unwrap();
    assert_eq!(run.answer.text, "Sorry.");
    let results: Vec<String> = model.messages(1)[2..].iter().map(|m| m.content.to_string()).collect();
    assert_eq!(results[0], "error: no network");
    assert_eq!(results[1], "error: the function has panicked");
    assert_eq!(results[2], "error: there is no function `unknown`; available: fails, panics");
    assert!(results[3].starts_with("error: the arguments are no valid JSON"), "{}", results[3]);
}

#[tokio::test]
async fn rounds_have_a_limit_and_the_last_one_has_no_tools() {
    let again = || call(0, "again", "{}").to_vec();
    let model = Scripted::new([again(), again(), vec![Event::text("Enough.")]]);
    let assistant =
        ToolLoop::new(model.clone()).with_tool(tool("again"), async |_| Ok(Value::Null)).with_max_rounds(2);
    let run = assistant.run(hello()).await.unwrap();
    assert_eq!((run.answer.text.as_str(), run.rounds), ("Enough.", 2));
    assert_eq!(model.asked.lock().unwrap()[2].chat.tool_choice, ToolChoice::None);
}

#[tokio::test(start_paused = true)]
async fn calls_of_a_round_run_side_by_side_and_a_cancelled_run_stops_them() {
    let both = || call(0, "slow", "{}").into_iter().chain(call(1, "slow", "{}")).collect::<Vec<_>>();
    let finished = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&finished);
    let assistant = |model| {
        let count = Arc::clone(&count);
        ToolLoop::new(model).with_tool(tool("slow"), move |_| {
            let count = Arc::clone(&count);
            async move {
                tokio::time::sleep(Duration::from_secs(60)).await;
                count.fetch_add(1, Ordering::SeqCst);
                Ok(Value::Null)
            }
        })
    };
    let began = tokio::time::Instant::now();
    assistant(Scripted::new([both(), vec![]])).run(hello()).await.unwrap();
    assert_eq!((began.elapsed().as_secs(), finished.load(Ordering::SeqCst)), (60, 2));

    let request = hello();
    let cancel = request.cancel.clone();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(1)).await;
        cancel.cancel();
    });
    let error = assistant(Scripted::new([both()])).run(request).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert_eq!(finished.load(Ordering::SeqCst), 2, "the functions go on");
}

#[tokio::test]
async fn a_prompt_that_is_no_conversation_is_refused() {
    let model = Scripted::new([vec![Event::text("x")]]);
    let error = ToolLoop::new(model).run(GenerateRequest::new("Hi")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidRequest);
}

/// The small model has no form of calls of its own.
#[cfg(all(feature = "candle", feature = "constraints"))]
#[tokio::test]
async fn a_required_call_of_a_small_model_keeps_the_contract() {
    let model = ternion::open(ternion_test_support::fixture("ternion-tiny")).await.unwrap();
    ternion_conformance::tools::a_required_call_comes_in_pieces(&*model).await.unwrap();
    ternion_conformance::tools::wrong_tools_are_refused(&*model).await.unwrap();
}
