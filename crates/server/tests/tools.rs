//! Calls of tools and thoughts in `/v1/chat/completions`, with a backend that says what it is told to.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use common::Running;
use serde_json::{Value, json};
use ternion_server::ServerOptions;

const CHAT: &str = "/v1/chat/completions";

/// `caller` thinks, speaks and calls two functions.
const MODELS: &str = r#"
    default_model = "caller"
    [models.caller]
    backend = "echo"
    tool_format = "hermes"
    reasoning = { start = "<think>", end = "</think>" }
    options.reply = """<think>
The weather in Bern, then the time.
</think>

Let me see.
<tool_call>
{"name": "weather", "arguments": {"city": "Bern"}}
</tool_call>
<tool_call>
{"name": "clock", "arguments": {}}
</tool_call>"""
"#;

async fn caller() -> Running {
    Running::start(common::config(MODELS), ServerOptions::default()).await
}

fn tools() -> Value {
    let city =
        json!({ "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] });
    json!([
        { "type": "function", "function": { "name": "weather", "parameters": city } },
        { "type": "function", "function": { "name": "clock" } },
    ])
}

fn ask(extra: &Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": "And?" }], "tools": tools() });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn a_whole_answer_has_its_calls_and_its_thought_apart() {
    let server = caller().await;
    let answer = server.ok(CHAT, &ask(&json!({}))).await;
    let (choice, message) = (&answer["choices"][0], &answer["choices"][0]["message"]);
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(message["content"], "Let me see.");
    assert_eq!(message["reasoning_content"], "The weather in Bern, then the time.");
    assert_eq!(message["reasoning"], message["reasoning_content"]);
    let calls = message["tool_calls"].as_array().unwrap();
    let functions: Vec<&Value> = calls.iter().map(|call| &call["function"]).collect();
    assert_eq!(functions[0], &json!({ "name": "weather", "arguments": "{\"city\": \"Bern\"}" }));
    assert_eq!(functions[1], &json!({ "name": "clock", "arguments": "{}" }));
    assert!(calls.iter().all(|call| call["type"] == "function" && call["id"].is_string()));
    assert_ne!(calls[0]["id"], calls[1]["id"]);

    // Without tools a call is text, and without text the content is null.
    let answer = server.ok(CHAT, &json!({ "messages": [{ "role": "user", "content": "a" }] })).await;
    let message = &answer["choices"][0]["message"];
    assert!(
        message["content"].as_str().unwrap().contains("<tool_call>") && message.get("tool_calls").is_none()
    );
    let answer = server.ok(CHAT, &ask(&json!({ "tool_choice": "none" }))).await;
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn a_stream_has_calls_in_pieces_with_dense_indices() {
    let server = caller().await;
    let (chunks, done) = server.stream(CHAT, &ask(&json!({ "stream": true }))).await;
    assert!(done);
    let deltas: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]).collect();
    let text = |key: &str| deltas.iter().filter_map(|delta| delta[key].as_str()).collect::<String>();
    assert_eq!(text("content"), "Let me see.");
    assert_eq!(text("reasoning_content"), "The weather in Bern, then the time.");
    let pieces: Vec<&Value> =
        deltas.iter().filter_map(|delta| delta["tool_calls"].as_array()).flatten().collect();
    for (index, name, arguments) in [(0, "weather", "{\"city\": \"Bern\"}"), (1, "clock", "{}")] {
        let pieces: Vec<&&Value> = pieces.iter().filter(|piece| piece["index"] == index).collect();
        assert_eq!(pieces[0]["function"], json!({ "name": name, "arguments": "" }));
        assert!(pieces[0]["id"].is_string() && pieces[0]["type"] == "function");
        assert!(pieces[1..].iter().all(|piece| piece.get("id").is_none()));
        let whole: String =
            pieces.iter().map(|piece| piece["function"]["arguments"].as_str().unwrap()).collect();
        assert_eq!(whole, arguments);
    }
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
}

#[tokio::test]
async fn results_of_calls_go_back_to_the_model() {
    let server = caller().await;
    let answer = server.ok(CHAT, &ask(&json!({}))).await;
    let called = answer["choices"][0]["message"].clone();
    let result = |id: &Value| json!({ "role": "tool", "tool_call_id": id, "content": "rain" });
    let user = json!({ "role": "user", "content": "And?" });
    let with = |messages: Value| ask(&json!({ "messages": messages }));
    let id = called["tool_calls"][0]["id"].clone();
    server.ok(CHAT, &with(json!([user, called, result(&id)]))).await;

    let error = server.refused(CHAT, &with(json!([user, called, result(&json!("x"))])), 400).await;
    assert_eq!(error["param"], "messages");
    assert!(error["message"].as_str().unwrap().contains("`x`"), "{error}");
    server.refused(CHAT, &with(json!([user, result(&id)])), 400).await;
}

#[tokio::test]
async fn wrong_tools_are_refused_by_the_name_of_the_field() {
    let server = caller().await;
    let tool = |name: &str| json!({ "type": "function", "function": { "name": name } });
    for (extra, param) in [
        (json!({ "tools": [tool("a"), tool("a")] }), "tools"),
        (json!({ "tools": [tool("a b")] }), "tools"),
        (json!({ "tools": [tool(&"a".repeat(129))] }), "tools"),
        (json!({ "tools": [{ "type": "function", "function": { "name": "a", "parameters": 1 } }] }), "tools"),
        (json!({ "tool_choice": { "type": "function", "function": { "name": "b" } } }), "tool_choice"),
        (json!({ "tool_choice": "always" }), "tool_choice"),
        (json!({ "tools": [], "tool_choice": "required" }), "tool_choice"),
        (json!({ "thinking_token_budget": 4 }), "thinking_token_budget"),
    ] {
        let error = server.refused(CHAT, &ask(&extra), 400).await;
        assert_eq!(error["param"], param, "{error}");
    }
}

/// The model has no form of calls of its own.
#[tokio::test]
async fn a_small_model_calls_what_is_required() {
    let mut config = common::tiny();
    config.models.get_mut("tiny").unwrap().context_length = Some(1024);
    let server = Running::start(config, ServerOptions::default()).await;
    let city = json!({
        "type": "object",
        "properties": { "city": { "enum": ["Bern", "Rome"] }, "days": { "type": "integer", "minimum": 1, "maximum": 9 } },
        "required": ["city", "days"],
        "additionalProperties": false,
    });
    let tools = json!([{ "type": "function", "function": { "name": "weather", "parameters": city } }]);
    let named = json!({ "type": "function", "function": { "name": "weather" } });
    for (choice, seed) in [(json!("required"), 1), (named, 2)] {
        let body = ask(&json!({
            "tools": tools, "tool_choice": choice, "parallel_tool_calls": false, "temperature": 1.5, "seed": seed,
        }));
        let answer = server.ok(CHAT, &body).await;
        let choice = &answer["choices"][0];
        assert_eq!(
            (&choice["finish_reason"], &choice["message"]["content"]),
            (&json!("tool_calls"), &Value::Null)
        );
        let function = &choice["message"]["tool_calls"][0]["function"];
        let arguments: Value = serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
        assert!(["Bern", "Rome"].contains(&arguments["city"].as_str().unwrap()), "{answer}");
        assert!((1..=9).contains(&arguments["days"].as_u64().unwrap()), "{answer}");
    }
}
