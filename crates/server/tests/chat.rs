//! `/v1/chat/completions` over HTTP, with the backend that repeats what it is told.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use common::{Running, eventually, json};
use serde_json::{Value, json};
use ternion::LlmBackend;

const CHAT: &str = "/v1/chat/completions";

fn say(text: &str) -> Value {
    json!([{ "role": "user", "content": text }])
}

#[tokio::test]
async fn an_answer_has_openais_form() {
    let server = Running::echo().await;
    let answer = server.ok(CHAT, &json!({ "messages": say("one two three"), "model": "echo" })).await;
    assert_eq!(answer["object"], "chat.completion");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(answer["model"], "echo");
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["message"]["content"], "one two three");
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(answer["usage"]["prompt_tokens"], 3);
    assert_eq!(answer["usage"]["completion_tokens"], 3);
    assert_eq!(answer["usage"]["total_tokens"], 6);
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
}

#[tokio::test]
async fn a_stream_begins_with_the_role_and_ends_with_done() {
    let server = Running::echo().await;
    let body =
        json!({ "messages": say("one two"), "stream": true, "stream_options": { "include_usage": true } });
    let (chunks, done) = server.stream(CHAT, &body).await;
    assert!(done);
    assert!(
        chunks
            .iter()
            .all(|chunk| chunk["object"] == "chat.completion.chunk" && chunk["id"] == chunks[0]["id"])
    );
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({ "role": "assistant", "content": "" }));
    let text: String =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "one two");
    let last = &chunks[chunks.len() - 1];
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 2);
    assert_eq!(chunks[chunks.len() - 2]["choices"][0]["finish_reason"], "stop");
    let (chunks, done) = server.stream(CHAT, &json!({ "messages": say("one"), "stream": true })).await;
    assert!(done && chunks.iter().all(|chunk| chunk.get("usage").is_none()));
}

#[tokio::test]
async fn limits_and_stop_strings_are_told_by_the_finish_reason() {
    let server = Running::echo().await;
    for field in ["max_tokens", "max_completion_tokens"] {
        let answer = server.ok(CHAT, &json!({ "messages": say("a b c d"), field: 2 })).await;
        assert_eq!(answer["choices"][0]["message"]["content"], "a b");
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
    }
    let both = json!({ "messages": say("a b c d"), "max_tokens": 3, "max_completion_tokens": 1 });
    assert_eq!(server.ok(CHAT, &both).await["choices"][0]["message"]["content"], "a");
    for stop in [json!(" c"), json!(["x", " c"])] {
        let answer = server.ok(CHAT, &json!({ "messages": say("a b c d"), "stop": stop })).await;
        assert_eq!(answer["choices"][0]["message"]["content"], "a b");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        assert_eq!(answer["choices"][0]["stop_reason"], " c");
    }
}

#[tokio::test]
async fn several_answers_have_an_index_each() {
    let server = Running::echo().await;
    let answer = server.ok(CHAT, &json!({ "messages": say("a b"), "n": 9 })).await;
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 9);
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], index);
        assert_eq!(choice["message"]["content"], "a b");
    }
    assert_eq!(answer["usage"]["prompt_tokens"], 2, "the prompt counts once");
    assert_eq!(answer["usage"]["completion_tokens"], 18);
    // More answers than the model has places: they follow each other.
    let answer = server.ok(CHAT, &json!({ "model": "busy", "messages": say("a"), "n": 3 })).await;
    assert_eq!(answer["choices"].as_array().unwrap().len(), 3);
    let (chunks, done) =
        server.stream(CHAT, &json!({ "messages": say("a b"), "n": 3, "stream": true })).await;
    assert!(done);
    for index in 0..3 {
        let own = chunks.iter().filter(|chunk| chunk["choices"][0]["index"] == index);
        let text: String = own.filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(text, "a b");
    }
}

#[tokio::test]
async fn an_error_in_a_stream_is_its_last_event() {
    let server = Running::echo().await;
    let body = json!({ "model": "broken", "messages": say("a b c d"), "stream": true });
    let (chunks, done) = server.stream(CHAT, &body).await;
    assert!(!done, "a stream that failed does not look like one that ended");
    common::assert_is_error(chunks.last().unwrap());
    let text: String =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "a b");
    let error = server.refused(CHAT, &json!({ "model": "broken", "messages": say("a b c d") }), 500).await;
    assert_eq!(error["code"], "internal_error");
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_its_answer() {
    let server = Running::echo().await;
    let slow = server.models.get("slow").await.unwrap();
    let words = "word ".repeat(200);
    for stream in [true, false] {
        let body = json!({ "model": "slow", "messages": say(&words), "stream": stream });
        let request = server.post(CHAT, &body).send();
        let sent = tokio::spawn(async move {
            let mut response = request.await.unwrap();
            while response.chunk().await.unwrap().is_some() {}
        });
        eventually("the answer's start", || slow.stats().active == 1).await;
        let before = slow.stats().completion_tokens;
        sent.abort();
        eventually("the answer's end", || slow.stats().active == 0).await;
        assert!(slow.stats().completion_tokens - before < 20, "it ends soon");
    }
}

#[tokio::test]
async fn a_full_queue_is_429_with_the_time_to_wait() {
    let server = Running::echo().await;
    let busy = server.models.get("busy").await.unwrap();
    let body = json!({ "model": "busy", "messages": say(&"word ".repeat(100)), "stream": true });
    let running = server.post(CHAT, &body).send().await.unwrap();
    eventually("the answer's start", || busy.stats().active == 1).await;
    let response = server.post(CHAT, &body).send().await.unwrap();
    assert_eq!(response.headers()["retry-after"], "1");
    let error = json(response, 429).await;
    assert_eq!(error["error"]["code"], "queue_full");
    drop(running);
    eventually("a free place", || busy.stats().active == 0).await;
    server.ok(CHAT, &json!({ "model": "busy", "messages": say("a") })).await;
}

#[tokio::test]
async fn what_a_backend_cannot_do_is_refused_by_name() {
    let server = Running::echo().await;
    let tools =
        json!([{ "type": "function", "function": { "name": "f", "parameters": { "type": "object" } } }]);
    for (extra, param) in [
        (json!({ "response_format": { "type": "json_object" } }), "response_format"),
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": {} } } }),
            "response_format",
        ),
        (json!({ "structured_outputs": { "regex": "a" } }), "response_format"),
        (json!({ "guided_choice": ["a"] }), "response_format"),
        (json!({ "tools": tools, "tool_choice": "required" }), "tool_choice"),
        (
            json!({ "tools": tools, "tool_choice": { "type": "function", "function": { "name": "f" } } }),
            "tool_choice",
        ),
        (json!({ "logprobs": true }), "logprobs"),
        (json!({ "min_tokens": 4 }), "min_tokens"),
        (json!({ "chat_template": "{{ messages }}" }), "chat_template"),
    ] {
        let mut body = json!({ "messages": say("a") });
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let error = server.refused(CHAT, &body, 400).await;
        assert_eq!(error["param"], param, "{error}");
    }
    for choice in ["auto", "none"] {
        let body = json!({ "messages": say("a"), "tools": tools, "tool_choice": choice, "response_format": { "type": "text" } });
        assert_eq!(server.ok(CHAT, &body).await["choices"][0]["message"]["content"], "a");
    }
}

#[tokio::test]
async fn models_are_chosen_by_name_and_listed() {
    let mut options = ternion_server::ServerOptions::default();
    options.aliases.insert("gpt-4o".to_owned(), "slow".to_owned());
    let server = Running::start(common::config(common::ECHO), options).await;
    assert_eq!(server.ok(CHAT, &json!({ "messages": say("a") })).await["model"], "echo");
    assert_eq!(server.ok(CHAT, &json!({ "messages": say("a"), "model": "gpt-4o" })).await["model"], "slow");
    let error = server.refused(CHAT, &json!({ "messages": say("a"), "model": "nothing" }), 404).await;
    assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
    let error = server.refused(CHAT, &json!({ "messages": say("a"), "model": "missing" }), 503).await;
    assert!(!error["message"].as_str().unwrap().contains("no/such"), "{error}");

    let list = json(server.get("/v1/models").send().await.unwrap(), 200).await;
    let ids: Vec<&str> =
        list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["echo", "broken", "busy", "missing", "slow", "gpt-4o"], "the default model comes first");
    assert_eq!(list["data"][0]["max_model_len"], 4096);
    let one = json(server.get("/v1/models/gpt-4o").send().await.unwrap(), 200).await;
    assert_eq!(one["root"], "slow");
    json(server.get("/v1/models/nothing").send().await.unwrap(), 404).await;
}

#[tokio::test]
async fn fields_that_clients_send_and_nobody_knows_change_nothing() {
    let server = Running::echo().await;
    let body = json!({
        "messages": [{ "role": "developer", "content": "x", "cache": 1 }, { "role": "user", "content": [{ "type": "text", "text": "a b" }] }],
        "user": "me", "store": false, "metadata": {}, "service_tier": "auto", "some_new_field": [1, { "x": 2 }],
        "temperature": null, "stop": null, "max_tokens": null, "tools": null, "logit_bias": null, "n": 1,
        "parallel_tool_calls": true, "seed": -5, "top_k": -1, "reasoning_effort": "low", "modalities": ["text"],
        "prediction": { "type": "content", "content": "a" },
    });
    assert_eq!(server.ok(CHAT, &body).await["choices"][0]["message"]["content"], "a b");
}

#[tokio::test]
async fn an_answer_has_the_form_that_was_asked_for() {
    let server = Running::tiny().await;
    let schema = json!({
        "type": "object",
        "properties": { "day": { "enum": ["monday", "sunday"] }, "number": { "type": "integer", "minimum": 1, "maximum": 31 } },
        "required": ["day", "number"],
        "additionalProperties": false,
    });
    let with = |extra: Value| {
        let mut body = json!({ "messages": say("Which day?"), "seed": 1, "temperature": 1 });
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        body
    };
    let format =
        json!({ "type": "json_schema", "json_schema": { "name": "day", "strict": true, "schema": schema } });
    let is_day = |text: &str| {
        let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert!(["monday", "sunday"].contains(&value["day"].as_str().unwrap()), "{text}");
        assert!((1..=31).contains(&value["number"].as_u64().unwrap()), "{text}");
    };
    let text = async |body: &Value| {
        let answer = server.ok(CHAT, body).await;
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    };
    let body = with(json!({ "response_format": format }));
    let whole = text(&body).await;
    is_day(&whole);
    // With log-probabilities, which need every token's own step, and streamed, the text is the same.
    let mut logprobs = body.clone();
    logprobs["logprobs"] = true.into();
    let answer = server.ok(CHAT, &logprobs).await;
    assert_eq!(answer["choices"][0]["message"]["content"], whole.as_str());
    let tokens = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(answer["usage"]["completion_tokens"], tokens.len());
    let mut stream = body.clone();
    stream["stream"] = true.into();
    let (chunks, done) = server.stream(CHAT, &stream).await;
    let pieces = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
    assert!(done && pieces.collect::<String>() == whole);

    is_day(&text(&with(json!({ "structured_outputs": { "json": schema } }))).await);
    is_day(&text(&with(json!({ "guided_json": schema.to_string() }))).await);
    let word = text(&with(json!({ "structured_outputs": { "choice": ["yes", "no"] } }))).await;
    assert!(["yes", "no"].contains(&word.as_str()), "{word}");
    let digits = text(&with(json!({ "guided_regex": "[0-9]{4}" }))).await;
    assert!(digits.len() == 4 && digits.parse::<u32>().is_ok(), "{digits}");
    let lark =
        text(&with(json!({ "structured_outputs": { "grammar": "start: \"<\" /[a-z]/ \">\"" } }))).await;
    assert!(lark.len() == 3 && lark.starts_with('<'), "{lark}");

    let mut short = body.clone();
    short["max_tokens"] = 4.into();
    let cut = server.ok(CHAT, &short).await;
    assert_eq!(cut["choices"][0]["finish_reason"], "length");
    assert!(
        serde_json::from_str::<Value>(cut["choices"][0]["message"]["content"].as_str().unwrap()).is_err()
    );

    let nested = json!({ "properties": { "a": { "not": {} } } });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": nested } });
    let error = server.refused(CHAT, &with(json!({ "response_format": format })), 400).await;
    assert_eq!(error["param"], "response_format");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("`not` at #/properties/a cannot be enforced"), "{message}");
}
