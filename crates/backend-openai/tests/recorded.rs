//! Exchanges with real servers, recorded once and replayed: what they send is read as it was, and what is sent to them is
//! still what they were sent.
//!
//! A recording is a list of requests with their responses, in `tests/data`. `TERNION_OPENAI_RECORD` names a server to talk to
//! instead, such as a proxy that writes a new recording.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod fake;

use std::{path::Path, sync::Arc};

use fake::{Fake, Reply, load, whole};
use serde_json::{Value, json};
use ternion_core::{
    Completion, Constraint, ErrorKind, FinishReason, GenerateRequest, LlmBackend, Message, Result, Sampling,
    ScoreRequest, config::ModelConfig,
};

/// The recording as a server, which answers only what is in it.
async fn server(recording: &str) -> (Option<Fake>, ModelConfig) {
    let mut config = ModelConfig::default();
    "openai".clone_into(&mut config.backend);
    if let Ok(url) = std::env::var("TERNION_OPENAI_RECORD") {
        config.options.insert("url".to_owned(), json!(url));
        return (None, config);
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(recording);
    let exchanges: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let replay = move |asked: &fake::Asked| {
        let same = |exchange: &&Value| {
            exchange["path"].as_str() == Some(&asked.path) && exchange["request"] == asked.body
        };
        let Some(exchange) = exchanges.iter().find(same) else {
            return Some(whole(
                418,
                &json!({"error": {"message": format!("not recorded: {} {}", asked.path, asked.body)}}),
            ));
        };
        Some(Reply::Whole {
            status: exchange["status"].as_u64().unwrap() as u16,
            headers: vec![("content-type", exchange["content_type"].as_str().unwrap_or_default().to_owned())],
            body: exchange["body"].as_str().unwrap().to_owned(),
        })
    };
    let fake = Fake::with([], Box::new(replay)).await;
    config.options.insert("url".to_owned(), json!(fake.url));
    (Some(fake), config)
}

async fn answer(model: &Arc<dyn LlmBackend>, request: GenerateRequest) -> Result<Completion> {
    let greedy = request.with_sampling(Sampling::greedy());
    model.generate(greedy).await?.collect().await
}

fn france() -> GenerateRequest {
    GenerateRequest::chat([Message::user("Name the capital city of France.")]).with_max_tokens(16)
}

#[tokio::test]
async fn llama_server_with_smollm2() {
    let (_fake, config) = server("llama-server.json").await;
    let model = load(&config).await.unwrap();
    let info = model.info();
    assert_eq!(info.format, "remote (llama-server)");
    assert_eq!(
        (info.limits.context_length, info.limits.vocab_size, info.limits.max_sequences),
        (256, 49152, 2)
    );
    assert_eq!((info.defaults.top_k, info.parameters), (40, 134_515_008));
    let can = &info.capabilities;
    assert!(can.generate && can.chat && can.logprobs && can.seed && can.prefix_reuse, "{can:?}");
    // It has no scores.
    assert!(!can.score && !can.logits && can.tool_calls && can.constraints, "{can:?}");

    let chat = answer(&model, france()).await.unwrap();
    assert_eq!(chat.text, "The capital city of France is Paris.");
    assert_eq!((chat.finish_reason, chat.usage.prompt_tokens), (FinishReason::EndOfSequence, 37));
    // The server counts the end token and does not show it in a chat.
    assert_eq!((chat.usage.completion_tokens, chat.tokens.last()), (chat.tokens.len(), Some(&30)));

    let stopped = answer(&model, france().with_stop(["e is P", "unlikely"])).await.unwrap();
    assert_eq!(stopped.text, "The capital city of Franc");
    assert_eq!(stopped.finish_reason, FinishReason::StopString("e is P".to_owned()));

    let text =
        answer(&model, GenerateRequest::new("One, two, three,").with_max_tokens(4).with_top_logprobs(3))
            .await
            .unwrap();
    assert_eq!((text.finish_reason.clone(), text.tokens.len()), (FinishReason::MaxTokens, 4));
    assert_eq!((text.logprobs.len(), text.top_logprobs.len()), (4, 4));
    for (token, (logprob, top)) in text.tokens.iter().zip(text.logprobs.iter().zip(&text.top_logprobs)) {
        assert_eq!((top.len(), top[0].id, top[0].logprob), (3, *token, *logprob));
        assert!(*logprob < 0.0 && top.windows(2).all(|pair| pair[0].logprob >= pair[1].logprob));
    }

    let tokens = answer(&model, GenerateRequest::new(vec![504, 3575, 282]).with_max_tokens(2)).await.unwrap();
    assert_eq!((tokens.usage.prompt_tokens, tokens.tokens.len()), (3, 2));

    // As many tokens as the context has are refused on this side, and so is what the server's tokenizer counts.
    let long = answer(&model, GenerateRequest::new(vec![504; 256])).await.unwrap_err();
    assert_eq!(long.kind(), ErrorKind::ContextOverflow, "{long}");
    for request in [
        GenerateRequest::new("word ".repeat(300)),
        GenerateRequest::chat([Message::user("word ".repeat(300))]),
    ] {
        let error = answer(&model, request).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ContextOverflow, "{error}");
        assert!(error.message().contains("at most 255 fit"), "{error}");
    }
    let unknown = answer(&model, GenerateRequest::new(vec![504, 49152])).await.unwrap_err();
    assert_eq!(unknown.kind(), ErrorKind::InvalidRequest, "{unknown}");
    let score = model.score(ScoreRequest::new(vec![504, 3575], 1)).await.unwrap_err();
    assert_eq!(score.kind(), ErrorKind::Unsupported);
}

/// JSON schemas and choices are enforced; what its grammars cannot say is refused, for the server itself leaves it out.
#[tokio::test]
async fn llama_server_keeps_constraints() {
    let (_fake, config) = server("llama-server.json").await;
    let model = load(&config).await.unwrap();
    let chat = |constraint: Constraint| france().with_max_tokens(40).with_constraint(constraint);
    let schema = json!({ "type": "object", "properties": { "capital": { "enum": ["Paris", "Rome"] } }, "required": ["capital"] });
    let found = answer(&model, chat(Constraint::JsonSchema(schema))).await.unwrap();
    let value: Value = serde_json::from_str(&found.text).unwrap();
    assert_eq!((value, found.constraint_complete), (json!({ "capital": "Paris" }), Some(true)));

    let choice = Constraint::Choice(vec!["four \"or\" five".into(), "\\".into()]);
    let text = GenerateRequest::new("One, two, three,").with_max_tokens(12).with_constraint(choice);
    let found = answer(&model, text).await.unwrap();
    assert_eq!((found.text.as_str(), found.constraint_complete), ("four \"or\" five", Some(true)));

    for (constraint, said) in [
        (Constraint::Regex("a+".into()), "a regular expression"),
        (Constraint::Lark("start: \"a\"".into()), "a Lark grammar"),
        (
            Constraint::JsonSchema(json!({ "type": "array", "items": {}, "uniqueItems": true })),
            "`uniqueItems` at #",
        ),
    ] {
        let error = answer(&model, chat(constraint)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.message().contains(said), "{error}");
    }
}

/// vLLM 0.32 on a CPU with a Llama of random weights and the tokenizer of the small model.
#[tokio::test]
async fn vllm_with_random_weights() {
    let (_fake, config) = server("vllm.json").await;
    let model = load(&config).await.unwrap();
    let info = model.info();
    assert_eq!(info.format, "remote (vllm)");
    assert_eq!(info.limits.context_length, 1024);
    let can = &info.capabilities;
    assert!(can.generate && can.chat && can.score && can.logprobs && can.seed, "{can:?}");

    // A tokenizer is not known on this side, but the ids of tokens are.
    let text = answer(&model, GenerateRequest::new("How many days").with_max_tokens(6).with_top_logprobs(3));
    let text = text.await.unwrap();
    assert_eq!((&text.finish_reason, text.usage.completion_tokens), (&FinishReason::MaxTokens, 6));
    assert_eq!((text.tokens.len(), text.logprobs.len()), (6, 6));
    for (token, (logprob, top)) in text.tokens.iter().zip(text.logprobs.iter().zip(&text.top_logprobs)) {
        assert_eq!((top.len(), top[0].id, top[0].logprob), (3, *token, *logprob));
    }

    // The answer's own log-probabilities are those that a score of prompt and answer gives.
    let prompt = vec![1264, 300, 301, 302];
    let tokens = GenerateRequest::new(prompt.clone()).with_max_tokens(4).with_top_logprobs(1);
    let tokens = answer(&model, tokens).await.unwrap();
    let whole = [&prompt[..], &tokens.tokens].concat();
    let score = model.score(ScoreRequest::new(whole, prompt.len()).with_top(2)).await.unwrap();
    for (found, (token, logprob)) in score.tokens.iter().zip(tokens.tokens.iter().zip(&tokens.logprobs)) {
        assert_eq!((found.id, found.rank, found.top.len()), (*token, 0, 2));
        assert!((found.logprob - logprob).abs() < 1e-4, "{found:?}, {logprob} expected");
    }

    let chat = answer(&model, france()).await.unwrap();
    assert_eq!((chat.finish_reason, chat.usage.completion_tokens), (FinishReason::MaxTokens, 16));
    let error = answer(&model, GenerateRequest::new(vec![300; 2000])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ContextOverflow, "{error}");
}
