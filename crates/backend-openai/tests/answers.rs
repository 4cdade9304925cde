//! What is sent to a server, and what becomes of what it sends.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod fake;

use std::{sync::Arc, time::Duration};

use fake::{Asked, Fake, Reply, Step, answer, ask, data, delta, end, hello, load, refusal, whole};
use serde_json::{Value, json};
use ternion_core::{
    ChatOptions, Constraint, ErrorKind, Event, FinishReason, GenerateRequest, Message, Prompt, Sampling,
    ScoreRequest, Segment, Tool, ToolChoice,
    answer::{Reasoning, ReasoningTags, ToolFormat},
    text::{Tokenizer, TokenizerParts},
};
use ternion_test_support::fixture;

#[tokio::test]
async fn a_request_has_the_fields_of_the_api() {
    let fake = Fake::new([answer(&["x"])]).await;
    let mut config = fake.config();
    config.sampling.top_p = Some(0.5);
    let model = load(&config).await.unwrap();
    let request = GenerateRequest::chat([Message::system("s"), Message::user("u")])
        .with_max_tokens(5)
        .with_stop(["STOP"])
        .with_sampling(Sampling::default().with_temperature(0.25).with_seed(9));
    let answer = model.generate(request).await.unwrap().collect().await.unwrap();
    assert_eq!(answer.served_by.unwrap().to_string(), "model on openai");
    let asked = fake.asked().remove(0);
    assert_eq!(asked.path, "/v1/chat/completions");
    assert_eq!(
        asked.body,
        json!({"model": "remote", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
               "stream": true, "stream_options": {"include_usage": true}, "max_completion_tokens": 5,
               "temperature": 0.25, "top_p": 0.5, "seed": 9})
    );
    assert_eq!(asked.headers["accept"], "text/event-stream");
    assert!(!asked.headers.contains_key("authorization"));
}

#[tokio::test]
async fn the_key_is_sent_and_never_told() {
    // Cargo sets this variable for tests; its value serves as a key that is no secret.
    let (variable, key) = ("CARGO_PKG_NAME", env!("CARGO_PKG_NAME"));
    let told = json!({"error": {"message": format!("Incorrect API key provided: {key}"), "code": "invalid_api_key"}});
    let fake = Fake::new([
        answer(&["x"]),
        whole(401, &told),
        whole(500, &told),
        whole(500, &told),
        whole(500, &told),
    ])
    .await;
    let mut config = fake.config();
    config.options.insert("api_key_env".to_owned(), json!(variable));
    let model = load(&config).await.unwrap();
    ask(&*model).await.unwrap();
    let header = &fake.asked()[0].headers["authorization"];
    assert_eq!(header.to_str().unwrap(), format!("Bearer {key}"));
    for kind in [ErrorKind::InvalidConfig, ErrorKind::Backend] {
        let error = ask(&*model).await.unwrap_err();
        assert_eq!(error.kind(), kind);
        assert!(!format!("{error} {error:?}").contains(key), "{error:?}");
        assert!(error.message().contains("[key]"), "{error}");
    }
    config.options.insert("api_key_env".to_owned(), json!("TERNION_TEST_NO_SUCH_VARIABLE"));
    let error = load(&config).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    assert!(error.message().contains("`TERNION_TEST_NO_SUCH_VARIABLE` is not set"), "{error}");
}

#[tokio::test]
async fn configurations_that_mean_nothing_are_refused() {
    let fake = Fake::new([]).await;
    let change = |change: fn(&mut ternion_core::config::ModelConfig)| {
        let mut config = fake.config();
        change(&mut config);
        config
    };
    for (config, words) in [
        (change(|c| c.path = Some("x".into())), "path: means nothing"),
        (change(|c| c.threads = Some(2)), "threads: means nothing"),
        (change(|c| drop(c.options.remove("url"))), "options.url: is missing"),
        (change(|c| drop(c.options.insert("url".into(), json!("gpu-1")))), "options.url: is no address"),
        (change(|c| drop(c.options.insert("ulr".into(), json!("x")))), "did you mean `url`?"),
        (
            change(|c| drop(c.options.insert("idle_timeout_ms".into(), json!(0)))),
            "options.idle_timeout_ms: 0",
        ),
        (
            change(|c| drop(c.options.insert("retry".into(), json!({"attempts": 0})))),
            "options.retry.attempts: 0",
        ),
    ] {
        let error = load(&config).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
        assert!(error.message().contains(words), "{error}");
    }
}

#[tokio::test]
async fn tools_go_through_and_calls_and_reasoning_come_apart_from_the_text() {
    let call = |json: Value| data(&json!({"choices": [{"delta": {"tool_calls": [json]}}]}));
    let mut steps = vec![
        data(&json!({"choices": [{"delta": {"role": "assistant", "reasoning_content": "hm"}}]})),
        data(&json!({"choices": [{"delta": {"reasoning": "m"}}]})),
        delta("Let me see."),
        call(
            json!({"index": 0, "id": "a", "type": "function", "function": {"name": "weather", "arguments": ""}}),
        ),
        call(json!({"index": 0, "function": {"arguments": "{\"city\": "}})),
        call(json!({"index": 0, "function": {"arguments": "\"Bern\"}"}})),
        call(json!({"index": 1, "id": "b", "function": {"name": "time", "arguments": {}}})),
    ];
    steps.extend(end("tool_calls"));
    let fake = Fake::new([Reply::Stream(steps)]).await;
    let model = fake.load().await;
    let tool = Tool::function("weather", "tells it", json!({"type": "object"}));
    let request = hello().with_chat_options(ChatOptions::default().with_tools([tool.clone()]));
    let answer = model.generate(request).await.unwrap().collect().await.unwrap();
    assert_eq!((answer.reasoning.as_str(), answer.text.as_str()), ("hmm", "Let me see."));
    let called: Vec<_> =
        answer.tool_calls.iter().map(|call| (call.id.as_deref(), &*call.name, &*call.arguments)).collect();
    assert_eq!(called, [(Some("a"), "weather", "{\"city\": \"Bern\"}"), (Some("b"), "time", "{}")]);
    assert_eq!(answer.finish_reason, FinishReason::ToolCalls);
    assert_eq!(fake.asked()[0].body["tools"], json!([tool]));

    // That a call is required is the server's to keep.
    fake.then(Reply::Stream(end("stop")));
    assert!(model.info().capabilities.required_tool_calls);
    let options = ChatOptions::default().with_tools([tool]).with_tool_choice(ToolChoice::Required);
    let request = hello().with_chat_options(options.without_parallel_tool_calls());
    model.generate(request).await.unwrap().collect().await.unwrap();
    let body = &fake.asked()[1].body;
    assert_eq!((&body["tool_choice"], &body["parallel_tool_calls"]), (&json!("required"), &json!(false)));
}

#[tokio::test]
async fn a_form_in_the_configuration_tells_calls_from_the_text_of_a_server() {
    let steps = [delta("<think>Hm.</think>So <tool"), delta("_call>{\"name\": \"time\"}</tool_call>")];
    let steps = steps.into_iter().chain(end("stop")).collect();
    let fake = Fake::new([Reply::Stream(steps)]).await;
    let mut config = fake.config();
    config.tool_format = Some(ToolFormat::Hermes);
    config.reasoning = Some(Reasoning::Tags(ReasoningTags::new("<think>", "</think>")));
    let model = load(&config).await.unwrap();
    let tool = Tool::function("time", "tells it", json!({}));
    let request = hello().with_chat_options(ChatOptions::default().with_tools([tool]));
    let answer = model.generate(request).await.unwrap().collect().await.unwrap();
    assert_eq!((answer.reasoning.as_str(), answer.text.as_str()), ("Hm.", "So"));
    assert_eq!((answer.tool_calls[0].name.as_str(), answer.finish_reason), ("time", FinishReason::ToolCalls));
}

#[tokio::test]
async fn a_stop_string_across_pieces_ends_the_answer_and_the_connection() {
    let steps = vec![delta("one, tw"), delta("o, th"), delta("ree"), Step::Stall];
    let fake = Fake::new([Reply::Stream(steps)]).await;
    let model = fake.load().await;
    let answer =
        model.generate(hello().with_stop(["o, three", "four"])).await.unwrap().collect().await.unwrap();
    assert_eq!(
        (answer.text.as_str(), answer.finish_reason),
        ("one, tw", FinishReason::StopString("o, three".into()))
    );
    fake.closed().await;
}

#[tokio::test]
async fn what_cannot_be_told_on_this_side_is_refused() {
    let fake = Fake::new([]).await;
    let model = fake.load().await; // untried: conversations alone
    for request in [
        GenerateRequest::new("a text"),
        GenerateRequest::new(vec![1, 2]),
        GenerateRequest::new(Prompt::Segments(vec![Segment::untrusted("x")])),
        hello().with_logprobs(),
        hello().with_stop_tokens([3]),
        hello().with_sampling(Sampling::default().with_top_k(5)),
    ] {
        let error = model.validate(&request).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert_eq!(model.generate(request).await.unwrap_err().message(), error.message());
    }
    assert!(fake.asked().is_empty());
}

#[tokio::test]
async fn the_queue_is_on_this_side() {
    let slow = || Reply::Stream([vec![delta("a"), Step::Wait(300)], end("stop")].concat());
    let fake = Fake::new([slow(), answer(&["b"]), answer(&["c"])]).await;
    let mut config = fake.config();
    (config.max_sequences, config.max_queued) = (Some(1), Some(1));
    let model = load(&config).await.unwrap();
    let first = model.generate(hello()).await.unwrap();
    let second = model.generate(hello()).await.unwrap(); // returns, and waits in its stream
    let error = model.generate(hello()).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Busy && error.is_retryable(), "{error}");
    model.validate(&hello()).await.unwrap();
    assert_eq!((model.stats().active, model.stats().queued, fake.asked().len()), (1, 1, 1));
    let (first, second) = tokio::join!(first.collect(), second.collect());
    let (first, second) = (first.unwrap(), second.unwrap());
    assert_eq!((first.text.as_str(), second.text.as_str()), ("a", "b"));
    assert!(second.timing.queued >= Duration::from_millis(200), "{:?}", second.timing);
    assert_eq!((model.stats().active, model.stats().queued, model.stats().finished), (0, 0, 2));
    // Nobody reads this answer, and yet the place is free when the server has sent it.
    let _unread = model.generate(hello()).await.unwrap();
    fake.then(answer(&["d"]));
    assert_eq!(ask(&*model).await.unwrap().text, "d");
}

/// vLLM as far as its API goes: token ids by `token_ids`, scores by `prompt_logprobs`, an answer that repeats the prompt's ids.
fn vllm(tokenizer: Arc<Tokenizer>) -> impl Fn(&Asked) -> Option<Reply> {
    move |asked| {
        let body = &asked.body;
        let ids = |value: &Value| -> Vec<u32> {
            value.as_array().into_iter().flatten().filter_map(|id| Some(id.as_u64()? as u32)).collect()
        };
        match asked.path.as_str() {
            "/v1/models" => {
                Some(whole(200, &json!({"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 32}]})))
            }
            "/tokenize" => {
                let text = body["prompt"].as_str()?;
                let tokens = tokenizer.encode(text, body["add_special_tokens"] == true).unwrap();
                Some(whole(200, &json!({"count": tokens.len(), "max_model_len": 32, "tokens": tokens})))
            }
            "/v1/completions" if body["prompt_logprobs"].is_u64() => {
                let place =
                    |id: &u32| json!({id.to_string(): {"logprob": -0.5, "rank": 2, "decoded_token": "x"}});
                let prompt = ids(&body["prompt"]);
                let all: Vec<Value> =
                    std::iter::once(Value::Null).chain(prompt.iter().skip(1).map(place)).collect();
                Some(whole(200, &json!({"choices": [{"text": "x", "prompt_logprobs": all}]})))
            }
            "/v1/completions" => {
                let prompt = match body["prompt"].as_str() {
                    Some(text) => tokenizer.encode(text, true).unwrap(),
                    None => ids(&body["prompt"]),
                };
                let most = body["max_tokens"].as_u64()? as usize;
                let mut steps = Vec::new();
                // Two tokens to a chunk, as with speculative decoding.
                for pair in prompt.iter().cycle().take(most).copied().collect::<Vec<_>>().chunks(2) {
                    let names: Vec<String> = pair.iter().map(|id| format!("token_id:{id}")).collect();
                    let tops: Vec<Value> =
                        names.iter().map(|name| json!({name: -0.25, "token_id:0": -3.0})).collect();
                    let logprobs = body["logprobs"].is_u64().then(
                        || json!({"tokens": names, "token_logprobs": vec![-0.25; pair.len()], "top_logprobs": tops}),
                    );
                    let ids = (body["return_token_ids"] == true).then_some(pair);
                    let text = tokenizer.decode(pair, true).unwrap();
                    steps.push(data(&json!({"choices": [{"index": 0, "text": text, "token_ids": ids,
                                                         "logprobs": logprobs, "finish_reason": null}]})));
                }
                steps.push(data(&json!({"choices": [{"text": "", "finish_reason": "length"}]})));
                steps.push(data(
                    &json!({"choices": [], "usage": {"prompt_tokens": prompt.len(), "completion_tokens": most,
                                        "prompt_tokens_details": {"cached_tokens": 2}}}),
                ));
                steps.push(Step::Bytes(b"data: [DONE]\n\n".to_vec()));
                Some(Reply::Stream(steps))
            }
            _ => Some(refusal(400, "no_chat_template")),
        }
    }
}

#[tokio::test]
async fn with_a_tokenizer_on_this_side_prompts_and_texts_are_made_here() {
    let folder = fixture("nano-packed");
    let tokenizer = Arc::new(Tokenizer::from_parts(TokenizerParts::from_folder(&folder).unwrap()).unwrap());
    let fake = Fake::with([], Box::new(vllm(Arc::clone(&tokenizer)))).await;
    let mut config = fake.config();
    config.options.insert("probe".to_owned(), json!(true));
    config.options.insert("tokenizer".to_owned(), json!(folder));
    let model = load(&config).await.unwrap();
    let info = model.info();
    let can = &info.capabilities;
    assert!(can.chat && can.score && can.logprobs && can.seed && can.prefix_reuse && !can.logits, "{can:?}");
    assert_eq!((info.limits.context_length, info.limits.vocab_size), (32, tokenizer.vocab_size()));

    // The server has no template, so the conversation is rendered here, and special tokens in it stay text.
    let messages = vec![Message::user("a </s> b")];
    let expected = tokenizer.encode_chat(&messages, true).unwrap();
    let request = GenerateRequest::chat(messages).with_max_tokens(3).with_top_logprobs(1);
    let answer = model.generate(request).await.unwrap().collect().await.unwrap();
    assert_eq!(answer.usage.prompt_tokens, expected.len());
    assert_eq!(answer.usage.cached_tokens, 2);
    let sent = fake.asked().pop().unwrap();
    assert_eq!(sent.path, "/v1/completions");
    assert_eq!(sent.body["prompt"], json!(expected));

    let text = "the sun is up";
    let ids = tokenizer.encode(text, true).unwrap();
    let plain: Vec<u32> = ids.iter().copied().filter(|id| !tokenizer.is_special(*id)).collect();
    let request = || GenerateRequest::new(plain.clone()).with_max_tokens(plain.len()).with_top_logprobs(2);
    let mut stream = model.generate(request()).await.unwrap();
    assert!(matches!(stream.next().await, Some(Ok(Event::Prefill(_)))));
    let answer = stream.collect().await.unwrap();
    assert_eq!((&answer.tokens, &answer.text), (&plain, &tokenizer.decode(&plain, true).unwrap()));
    assert_eq!(answer.logprobs, vec![-0.25; plain.len()]);
    assert_eq!((answer.top_logprobs[0][0].id, answer.top_logprobs[0].len()), (plain[0], 2));
    assert_eq!(answer.finish_reason, FinishReason::MaxTokens);
    // A stop token in the middle of a chunk.
    let stopped =
        model.generate(request().with_stop_tokens([plain[1]])).await.unwrap().collect().await.unwrap();
    let at = plain.iter().position(|id| *id == plain[1]).unwrap();
    assert_eq!(
        (&stopped.tokens[..], stopped.finish_reason),
        (&plain[..=at], FinishReason::StopToken(plain[1]))
    );
    assert_eq!(stopped.text, tokenizer.decode(&plain[..at], true).unwrap());
    // What does not fit is refused before anything is sent; what nearly fits fills the context.
    let before = fake.asked().len();
    let long = model.generate(GenerateRequest::new(vec![plain[0]; 32])).await.unwrap_err();
    assert_eq!((long.kind(), fake.asked().len()), (ErrorKind::ContextOverflow, before));
    let full =
        model.generate(GenerateRequest::new(vec![plain[0]; 30])).await.unwrap().collect().await.unwrap();
    assert_eq!((full.tokens.len(), full.finish_reason), (2, FinishReason::ContextFull));

    let score = model.score(ScoreRequest::new(plain.clone(), 1)).await.unwrap();
    assert_eq!(
        (score.tokens.len(), score.tokens[0].id, score.tokens[0].rank),
        (plain.len() - 1, plain[1], 1)
    );
    let error = model.score(ScoreRequest::new(plain, 0)).await.unwrap_err();
    assert_eq!((error.kind(), error.operation()), (ErrorKind::InvalidRequest, "score"));
}

#[tokio::test]
async fn a_tokenizer_of_another_model_is_refused() {
    let own = Tokenizer::from_parts(TokenizerParts::from_folder(fixture("nano-packed")).unwrap()).unwrap();
    let fake = Fake::with([], Box::new(vllm(Arc::new(own)))).await;
    let mut config = fake.config();
    config.options.insert("probe".to_owned(), json!(true));
    config.options.insert("tokenizer".to_owned(), json!(fixture("llama-ternary")));
    let error = load(&config).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
    assert!(error.message().contains("options.tokenizer"), "{error}");
}

/// An older vLLM: it takes `guided_choice`, and ignores the newer field as well as every other constraint.
fn older_vllm(asked: &Asked) -> Option<Reply> {
    if asked.path.ends_with("/models") {
        return Some(whole(
            200,
            &json!({ "data": [{ "id": "m", "owned_by": "vllm", "max_model_len": 512 }] }),
        ));
    }
    if !asked.path.ends_with("completions") {
        return None;
    }
    let said = asked.body["guided_choice"][0].as_str().unwrap_or("free text");
    if asked.path.ends_with("chat/completions") {
        return Some(answer(&[said]));
    }
    let finished = json!({ "choices": [{ "index": 0, "text": said, "finish_reason": "stop" }] });
    Some(Reply::Stream(vec![data(&finished), Step::Bytes(b"data: [DONE]\n\n".to_vec())]))
}

#[tokio::test]
async fn a_constraint_goes_by_the_field_that_the_server_has_kept_to() {
    let fake = Fake::with([], Box::new(older_vllm)).await;
    let mut config = fake.config();
    config.options.insert("probe".to_owned(), json!(true));
    let model = load(&config).await.unwrap();
    assert!(model.info().capabilities.constraints);
    let choice = Constraint::Choice(vec!["yes".to_owned(), "no".to_owned()]);
    for prompt in [hello(), GenerateRequest::new("Hello")] {
        let request = prompt.clone().with_constraint(choice.clone());
        let said = model.generate(request).await.unwrap().collect().await.unwrap();
        assert_eq!((said.text.as_str(), said.constraint_complete), ("yes", Some(true)));
        let body = fake.asked().last().unwrap().body.clone();
        assert_eq!((&body["guided_choice"], body.get("structured_outputs")), (&json!(["yes", "no"]), None));
        for constraint in [
            Constraint::JsonSchema(json!({ "type": "object" })),
            Constraint::Regex("a".to_owned()),
            Constraint::Lark("start: \"a\"".to_owned()),
        ] {
            let count = fake.asked().len();
            let error = model.generate(prompt.clone().with_constraint(constraint)).await.err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            assert!(error.message().contains("has not enforced"), "{error}");
            assert_eq!(fake.asked().len(), count, "nothing is sent");
        }
    }
}

#[tokio::test]
async fn an_answer_that_the_server_ends_against_the_constraint_is_an_error() {
    // It keeps to the trials, and to nothing that comes after.
    let breaks = |asked: &Asked| {
        let wanted = asked.body["guided_choice"][0].as_str();
        if wanted.is_some_and(|text| !text.starts_with("Zq")) {
            Some(answer(&["may", "be"]))
        } else {
            older_vllm(asked)
        }
    };
    let fake = Fake::with([], Box::new(breaks)).await;
    let mut config = fake.config();
    config.options.insert("probe".to_owned(), json!(true));
    let model = load(&config).await.unwrap();
    let request = hello().with_constraint(Constraint::Choice(vec!["yes".to_owned()]));
    let error = model.generate(request).await.unwrap().collect().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Backend, "{error}");
    assert!(error.message().contains("breaks the constraint"), "{error}");
}
