//! Constraints over a toy model with random logits: whatever it would like to say, its answer has the form that was asked for.
#![cfg(feature = "constraints")]
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
    sync::atomic::Ordering,
};

use common::{Toy, VOCAB, tokenizer, tokens};
use serde_json::{Value, json};
use ternion_core::{
    Completion, Constraint, ErrorKind, Event, FinishReason, GenerateRequest, LlmBackend, Result, Sampling,
};

const PROMPT: [u32; 5] = [300, 301, 302, 303, 304];

/// The token that ends an answer. It has a text in the tokenizer, and still ends an answer and nothing else.
const EOS: u32 = 511;

fn toy() -> Toy {
    let mut toy = Toy::new(VOCAB);
    toy.context = 4096;
    toy
}

async fn answer_of(toy: Toy, request: GenerateRequest) -> Result<Completion> {
    toy.start_with(|o| o.eos_tokens = vec![EOS]).generate(request).await?.collect().await
}

/// An answer of the toy with random logits, drawn with this seed.
async fn drawn(constraint: Constraint, seed: u64) -> Result<Completion> {
    let sampling = Sampling::default().with_temperature(1.0).with_seed(seed);
    let request = tokens(&PROMPT).with_constraint(constraint).with_sampling(sampling);
    answer_of(toy(), request.with_max_tokens(2000)).await
}

fn object(properties: Value) -> Value {
    let required: Vec<&String> = properties.as_object().unwrap().keys().collect();
    json!({ "type": "object", "properties": properties, "required": required, "additionalProperties": false })
}

#[tokio::test]
async fn random_logits_give_the_form_that_was_asked_for() {
    let schema = object(json!({
        "kind": { "enum": ["cat", "dog", "ünïcode ☃"] },
        "lives": { "type": "integer", "minimum": 1, "maximum": 9 },
        "tags": { "type": "array", "items": { "type": "boolean" }, "minItems": 1, "maxItems": 3 },
    }));
    for seed in 0..5 {
        let answer = drawn(Constraint::JsonSchema(schema.clone()), seed).await.unwrap();
        let value: Value =
            serde_json::from_str(&answer.text).unwrap_or_else(|e| panic!("{e}: {}", answer.text));
        assert!(["cat", "dog", "ünïcode ☃"].contains(&value["kind"].as_str().unwrap()));
        assert!((1..=9).contains(&value["lives"].as_u64().unwrap()));
        let tags = value["tags"].as_array().unwrap();
        assert!((1..=3).contains(&tags.len()) && tags.iter().all(Value::is_boolean));
        assert_eq!(answer.finish_reason, FinishReason::EndOfSequence);
        assert_eq!(answer.constraint_complete, Some(true));

        let answer = drawn(Constraint::Regex(r"^[a-f]{3}-[0-9]{2,4}$".into()), seed).await.unwrap();
        let (letters, digits) = answer.text.split_once('-').unwrap();
        assert!(letters.len() == 3 && letters.bytes().all(|b| (b'a'..=b'f').contains(&b)), "{}", answer.text);
        assert!((2..=4).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit()));

        let texts = ["yes", "no", "no way", "a \"b\"\\\n", "é☃🎉"].map(str::to_owned);
        let answer = drawn(Constraint::Choice(texts.to_vec()), seed).await.unwrap();
        assert!(texts.contains(&answer.text), "{:?}", answer.text);

        let lark = "start: \"say \" WORD (\",\" %json {\"type\": \"null\"})~2\nWORD: /[xyz]+/".to_owned();
        let answer = drawn(Constraint::Lark(lark), seed).await.unwrap();
        assert!(answer.text.starts_with("say ") && answer.text.ends_with(",null,null"), "{}", answer.text);
    }
}

#[tokio::test]
async fn what_has_no_choice_is_fed_in_one_pass_and_counted() {
    let schema = object(
        json!({ "a_rather_long_name": { "const": "and a long constant text" }, "n": { "enum": [1, 22] } }),
    );
    let request = tokens(&PROMPT).with_constraint(Constraint::JsonSchema(schema));
    let toy = toy();
    let probe = std::sync::Arc::clone(&toy.probe);
    let answer = answer_of(toy, request.clone()).await.unwrap();
    let (usage, calls) = (answer.usage, probe.calls.load(Ordering::SeqCst));
    assert!(usage.forced_tokens > usage.completion_tokens / 2, "{usage:?}: {}", answer.text);
    assert!(calls < usage.completion_tokens, "{calls} calls for {usage:?}");
    assert_eq!(answer.tokens.len(), usage.completion_tokens);

    // With log-probabilities each token has its own step, and they are those of the model without the constraint.
    let toy = self::toy();
    let probe = std::sync::Arc::clone(&toy.probe);
    let slow = answer_of(toy, request.with_logprobs()).await.unwrap();
    assert_eq!((&slow.text, &slow.tokens, slow.usage), (&answer.text, &answer.tokens, usage));
    assert!(probe.calls.load(Ordering::SeqCst) >= usage.completion_tokens);
    let mut sequence = PROMPT.to_vec();
    for (&token, &logprob) in slow.tokens.iter().zip(&slow.logprobs) {
        let logits = common::hashed_logits(&sequence, VOCAB);
        let expected = ternion_core::logprob::log_softmax_at(&logits, token as usize);
        assert!((logprob - expected).abs() < 1e-5, "{logprob} {expected}");
        sequence.push(token);
    }
}

#[tokio::test]
async fn an_answer_that_is_cut_off_says_so() {
    let constraint =
        Constraint::JsonSchema(object(json!({ "name": { "type": "string", "minLength": 100 } })));
    let request = tokens(&PROMPT).with_constraint(constraint);
    let cut = answer_of(toy(), request.clone().with_max_tokens(12)).await.unwrap();
    assert_eq!((cut.finish_reason.clone(), cut.constraint_complete), (FinishReason::MaxTokens, Some(false)));
    let error = cut.parse::<Value>().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidRequest);
    assert!(error.to_string().contains("max_tokens: the answer is cut off after 12 tokens"), "{error}");
    // Forced tokens count: the limit lies within them.
    let cut = answer_of(toy(), request.clone().with_max_tokens(2)).await.unwrap();
    assert_eq!((cut.tokens.len(), cut.constraint_complete), (2, Some(false)));

    let stopped = answer_of(toy(), request.with_stop(["name"])).await.unwrap();
    assert_eq!(stopped.finish_reason, FinishReason::StopString("name".into()));
    assert!(stopped.text.starts_with('{') && stopped.text.ends_with('"'), "{}", stopped.text);
    assert_eq!(stopped.constraint_complete, Some(false));

    let mut small = toy();
    small.context = 16;
    let digits = tokens(&PROMPT).with_constraint(Constraint::Regex("[0-9]{500}".into()));
    let full = answer_of(small, digits).await.unwrap();
    assert_eq!(
        (full.finish_reason.clone(), full.constraint_complete),
        (FinishReason::ContextFull, Some(false))
    );
    assert_eq!(full.parse::<Value>().unwrap_err().kind(), ErrorKind::ContextOverflow);
    let free = answer_of(toy(), tokens(&PROMPT).with_max_tokens(3)).await.unwrap();
    assert_eq!((free.constraint_complete, free.usage.forced_tokens), (None, 0));
}

#[tokio::test]
async fn a_mask_is_stronger_than_every_other_setting() {
    let only = |regex: &str| tokens(&PROMPT).with_constraint(Constraint::Regex(regex.into()));
    let sampling = (0..VOCAB as u32)
        .filter(|&id| tokenizer().token_bytes(id).is_none_or(|bytes| !bytes.contains(&b'7')))
        .fold(Sampling::greedy(), |s, id| s.with_logit_bias(id, 1e30));
    let answer = answer_of(toy(), only("7{20}").with_sampling(sampling)).await.unwrap();
    assert_eq!(answer.text, "7".repeat(20));

    let seven = tokenizer().token_id("7").unwrap();
    let banned = Sampling::greedy().with_logit_bias(seven, f32::NEG_INFINITY);
    let error = answer_of(toy(), only("7").with_sampling(banned)).await.unwrap_err();
    assert!(error.to_string().contains("no token is left"), "{error}");
}

#[tokio::test]
async fn stop_tokens_and_the_end_come_only_where_the_answer_is_complete() {
    let text = tokenizer().encode("12", false).unwrap();
    let script: Vec<u32> = [EOS, text[0]].into_iter().chain(text.clone()).collect();
    let toy = || {
        let mut toy = Toy::scripted(VOCAB, PROMPT.len(), &script);
        toy.context = 64;
        toy
    };
    // The model wants to end at once, and the digit 1, a stop token, cannot come before the answer is complete.
    let request =
        tokens(&PROMPT).with_constraint(Constraint::Regex("[a-c1]{4}".into())).with_stop_tokens([text[0]]);
    let answer = answer_of(toy(), request).await.unwrap();
    assert!(answer.text.len() == 4 && !answer.text.contains('1'), "{}", answer.text);
    let request = tokens(&PROMPT).with_constraint(Constraint::Regex("x*".into()));
    let answer = answer_of(toy(), request).await.unwrap();
    assert_eq!((answer.text.as_str(), answer.tokens.as_slice()), ("", &[EOS][..]));
    assert_eq!(answer.constraint_complete, Some(true));
    let mut request = tokens(&PROMPT).with_constraint(Constraint::JsonObject);
    request.params.ignore_eos = true;
    let error = answer_of(toy(), request).await.unwrap_err();
    assert!(error.to_string().contains("ignore_eos: cannot be combined"), "{error}");
}

#[tokio::test]
async fn what_cannot_be_enforced_is_refused_with_its_path() {
    let nested = |schema: Value| json!({ "type": "object", "properties": { "a/b": { "items": schema } } });
    let cases = [
        (nested(json!({ "not": { "type": "null" } })), "`not` at #/properties/a~1b/items cannot be enforced"),
        (nested(json!({ "uniqueItems": true })), "`uniqueItems` at #/properties/a~1b/items"),
        (nested(json!({ "type": "string", "format": "nonsense" })), "`format` at #/properties/a~1b/items"),
        (nested(json!({ "oneOf": [{ "type": "object" }, { "type": "object" }] })), "`oneOf` at #/properties"),
        (nested(json!({ "minimum": "x" })), "`minimum` at #/properties/a~1b/items"),
        (json!({ "type": "string", "pattern": "(?=a)b" }), "look-around"),
        (json!({ "$ref": "https://example.com/schema.json" }), "cannot be enforced"),
        (json!({ "type": "integer", "minimum": 3, "maximum": 2 }), "cannot be enforced"),
        (json!({ "x-guidance": { "lenient": true } }), "`x-guidance` at # cannot be set"),
        (json!(false), "allows no value"),
        (json!(3), "neither an object nor a boolean"),
    ];
    for (schema, expected) in cases {
        let error = drawn(Constraint::JsonSchema(schema.clone()), 0).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidRequest, "{schema}");
        let text = error.to_string();
        assert!(text.contains(expected) && text.lines().count() == 1, "{schema}: {text}");
    }
    for constraint in [
        Constraint::Regex("a(b".into()),
        Constraint::Regex(r"(a)\1".into()),
        Constraint::Lark("start: nowhere".into()),
        Constraint::Lark("start: <|no_such_token|>".into()),
        Constraint::Choice(Vec::new()),
    ] {
        let error = drawn(constraint.clone(), 0).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidRequest, "{constraint:?}: {error}");
        assert!(error.to_string().contains("constraint: "), "{error}");
    }
    // A check alone says the same.
    let engine = toy().start();
    let request = tokens(&PROMPT).with_constraint(Constraint::Regex("a(b".into()));
    let checked = engine.validate(&request).await.unwrap_err().to_string();
    assert_eq!(checked, engine.generate(request).await.unwrap_err().to_string());
}

#[tokio::test]
async fn ids_that_the_tokenizer_does_not_have_are_never_chosen() {
    let size = tokenizer().vocab_size();
    assert!(size < VOCAB, "the model has more logits than the tokenizer tokens");
    let bias = (size as u32..VOCAB as u32).fold(Sampling::greedy(), |s, id| s.with_logit_bias(id, 1e30));
    let request =
        tokens(&PROMPT).with_constraint(Constraint::Regex("(?s:.){10,30}".into())).with_sampling(bias);
    let answer = answer_of(toy(), request).await.unwrap();
    assert!(answer.tokens.iter().all(|&id| (id as usize) < size || id == EOS), "{:?}", answer.tokens);
}

#[tokio::test]
async fn several_sequences_small_chunks_and_a_panic_change_no_answer() {
    let schema =
        object(json!({ "word": { "const": "something rather long to feed" }, "n": { "type": "integer" } }));
    let request = |seed| {
        tokens(&PROMPT)
            .with_constraint(Constraint::JsonSchema(schema.clone()))
            .with_sampling(Sampling::default().with_temperature(1.5).with_seed(seed))
            .with_max_tokens(120)
    };
    let alone: Vec<String> = {
        let mut all = Vec::new();
        for seed in 0..4 {
            all.push(answer_of(toy(), request(seed)).await.unwrap().text);
        }
        all
    };
    for chunk in [1, 3, 64] {
        let mut toy = toy();
        toy.chunk = chunk;
        toy.delay = std::time::Duration::from_millis(2);
        let faults = std::sync::Arc::clone(&toy.faults);
        let engine = toy.start_with(|o| o.eos_tokens = vec![EOS]);
        let mut streams = Vec::new();
        for seed in 0..4 {
            streams.push(engine.generate(request(seed)).await.unwrap());
        }
        // A step of several sequences that panics is computed again, one by one.
        for stream in &mut streams {
            while !matches!(stream.next().await.unwrap().unwrap(), Event::Token(_)) {}
        }
        *faults.once.lock().unwrap() = Some("forward");
        for (stream, expected) in streams.into_iter().zip(&alone) {
            let rest = stream.collect().await.unwrap().text;
            assert!(!rest.is_empty() && expected.ends_with(&rest), "chunk {chunk}: {rest}; {expected}");
        }
    }
}

#[tokio::test]
async fn a_sliding_window_moves_over_forced_tokens() {
    let schema = object(json!({ "a": { "const": "x".repeat(300) }, "b": { "const": "tail" } }));
    let mut toy = toy();
    toy.context = 48;
    let request = tokens(&PROMPT)
        .with_constraint(Constraint::JsonSchema(schema))
        .with_context_policy("sliding".parse().unwrap())
        .with_max_tokens(1000);
    let mut stream = toy.start_with(|o| o.eos_tokens = vec![EOS]).generate(request).await.unwrap();
    let (mut text, mut moves) = (String::new(), 0);
    while let Some(event) = stream.next().await {
        match event.unwrap() {
            Event::Text(piece) => text.push_str(&piece.text),
            Event::Context(_) => moves += 1,
            _ => {}
        }
    }
    let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert_eq!((value["a"].as_str().unwrap().len(), &value["b"]), (300, &json!("tail")));
    assert!(moves > 1);
}

/// Answers under 40 schemas, `TERNION_ANSWERS` of each, checked by another implementation of JSON Schema.
#[tokio::test]
async fn answers_from_random_logits_are_valid_by_python() {
    let imports = ["-c", "import jsonschema"];
    if !Command::new("python3").args(imports).output().is_ok_and(|out| out.status.success()) {
        println!("skipped: Python has no package jsonschema");
        return;
    }
    let each: u64 = std::env::var("TERNION_ANSWERS").map_or(3, |count| count.parse().unwrap());
    let schemas = std::fs::read(common::fixture("json-schema/schemas.json")).unwrap();
    let schemas: Vec<Value> = serde_json::from_slice(&schemas).unwrap();
    let engine = toy().start_with(|o| o.eos_tokens = vec![EOS]);
    let mut lines = String::new();
    for schema in &schemas {
        for seed in 0..each {
            let request = tokens(&PROMPT)
                .with_constraint(Constraint::JsonSchema(schema.clone()))
                .with_sampling(Sampling::default().with_temperature(1.0).with_seed(seed));
            let answer = engine.generate(request).await.unwrap().collect().await.unwrap();
            assert_eq!(answer.constraint_complete, Some(true), "{schema}: {}", answer.text);
            lines += &format!("{}\n", json!({ "schema": schema, "text": answer.text }));
        }
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/valid.py");
    let mut python = Command::new("python3").arg(script).stdin(Stdio::piped()).spawn().unwrap();
    python.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    assert!(python.wait().unwrap().success(), "an answer is not valid");
}
