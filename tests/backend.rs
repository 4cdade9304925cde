//! The facade as a host uses it: configuration files, swapping, concurrent chats, errors of loading.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::sync::Arc;

use ternion::{
    ErrorKind, Event, FinishReason, GenerateRequest, LlmBackend, LlmBackendExt, Message, Sampling,
};
use ternion_test_support::fixture;

async fn answer(model: &Arc<dyn LlmBackend>) -> ternion::Completion {
    let request = GenerateRequest::chat([Message::user("How many days are in a week?")])
        .with_max_tokens(12)
        .with_sampling(Sampling::greedy());
    model.generate(request).await.unwrap().collect().await.unwrap()
}

#[tokio::test]
async fn a_host_swaps_its_model_by_its_configuration_alone() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("host.toml");
    let mut answers = Vec::new();
    for (backend, path) in [
        ("candle", Some(fixture("tiny-packed"))),
        ("candle", Some(fixture("llama-ternary"))),
        ("candle", Some(fixture("1bitllm").join("model.safetensors"))),
        ("echo", None),
    ] {
        let path = path.map_or(String::new(), |p| format!("path = '{}'\n", p.display()));
        std::fs::write(&file, format!("[models.chat]\nbackend = \"{backend}\"\n{path}")).unwrap();
        let model = ternion::load_file(&file).await.unwrap();
        assert_eq!(model.info().name, "chat");
        assert_eq!(model.info().backend, backend);
        answers.push(answer(&model).await.text);
    }
    assert!(answers[3].contains("days"), "echo repeats: {}", answers[3]);
    assert_ne!(answers[0], answers[1]);
}

#[tokio::test]
async fn conversations_at_the_same_time_do_not_disturb_each_other() {
    let model = ternion::open(fixture("nano-packed")).await.unwrap();
    let alone = answer(&model).await;
    let mut tasks = Vec::new();
    for i in 0..6 {
        let model = Arc::clone(&model);
        tasks.push(tokio::spawn(async move {
            if i % 2 == 0 {
                answer(&model).await.tokens
            } else {
                model.complete(&format!("text number {i}"), 9).await.unwrap().tokens
            }
        }));
    }
    for (i, task) in tasks.into_iter().enumerate() {
        let tokens = task.await.unwrap();
        assert!(i % 2 == 1 || tokens == alone.tokens, "{i}");
    }
}

#[tokio::test]
async fn a_second_turn_reuses_the_first() {
    let model = ternion::open(fixture("nano-packed")).await.unwrap();
    let mut messages = vec![Message::user("one"), Message::assistant("two"), Message::user("three")];
    let first = model.chat(messages.clone()).await.unwrap();
    assert_eq!(first.usage.cached_tokens, 0);
    messages.extend([Message::assistant("four"), Message::user("five")]);
    let second = model.chat(messages).await.unwrap();
    assert!(second.usage.cached_tokens >= first.usage.prompt_tokens - 8, "{:?}", second.usage);
}

#[tokio::test]
async fn dropping_a_stream_frees_its_sequence() {
    let model = ternion::open(fixture("tiny-packed")).await.unwrap();
    let mut request = GenerateRequest::new("endless");
    request.params.ignore_eos = true;
    let mut stream = model.generate(request).await.unwrap();
    while !matches!(stream.next().await, Some(Ok(Event::Token(_)))) {}
    drop(stream);
    for _ in 0..500 {
        if model.stats().active == 0 {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("the sequence is still in use");
}

#[tokio::test]
async fn the_context_of_the_configuration_is_the_limit() {
    let mut config = ternion::config::ModelConfig::for_path(fixture("nano-packed"));
    config.context_length = Some(32);
    let model = ternion::load(&ternion::config::Config::single("m", config.clone()), None).await.unwrap();
    assert_eq!(model.info().limits.context_length, 32);
    let error = model.complete(&"word ".repeat(100), 5).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ContextOverflow);
    let mut request = GenerateRequest::new(vec![5; 30]);
    request.params.ignore_eos = true;
    let end = model.generate(request).await.unwrap().collect().await.unwrap();
    assert_eq!(end.finish_reason, FinishReason::ContextFull);

    config.context_length = Some(1 << 30);
    let error = ternion::load(&ternion::config::Config::single("m", config), None).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    assert!(error.to_string().contains("context"), "{error}");
}

#[tokio::test]
async fn what_cannot_be_loaded_says_why() {
    let error = ternion::open("no/such/folder").await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("no/such/folder"), "{error}");

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("host.toml");
    std::fs::write(&file, "[models.m]\nbackend = \"candel\"\npath = \"x\"\n").unwrap();
    let error = ternion::load_file(&file).await.err().unwrap().to_string();
    assert!(error.contains("unknown backend `candel`; compiled in: candle, echo"), "{error}");

    std::fs::write(
        &file,
        "[models.m]\nbackend = \"candle\"\npath = \"x\"\n[models.m.options]\nfast = true\n",
    )
    .unwrap();
    let error = ternion::load_file(&file).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    assert!(error.to_string().contains("fast"), "{error}");
}
