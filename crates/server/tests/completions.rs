//! `/v1/completions` and the paths about tokens, with the small real model of `fixtures/`.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use common::{Running, json};
use serde_json::{Value, json};
use ternion::{GenerateRequest, LlmBackend, Message, Prompt, Sampling, ScoreRequest};

const COMPLETIONS: &str = "/v1/completions";
const TEXT: &str = "How many days are in a week?";

#[tokio::test]
async fn all_forms_of_a_prompt_give_the_same_answer() {
    let server = Running::tiny().await;
    let model = server.models.get("tiny").await.unwrap();
    let ids = model.tokenizer().unwrap().encode(TEXT, true).unwrap();
    let request = GenerateRequest::new(TEXT).with_max_tokens(8).with_sampling(Sampling::greedy());
    let expected = model.generate(request).await.unwrap().collect().await.unwrap().text;
    for (prompt, count) in
        [(json!(TEXT), 1), (json!([TEXT, TEXT]), 2), (json!(ids), 1), (json!([ids, ids, ids]), 3)]
    {
        let body = json!({ "prompt": prompt, "max_tokens": 8, "temperature": 0 });
        let answer = server.ok(COMPLETIONS, &body).await;
        assert_eq!(answer["object"], "text_completion");
        let choices = answer["choices"].as_array().unwrap();
        assert_eq!(choices.len(), count);
        for (index, choice) in choices.iter().enumerate() {
            assert_eq!((&choice["index"], &choice["text"]), (&json!(index), &json!(expected)));
        }
        assert_eq!(answer["usage"]["prompt_tokens"], ids.len() * count);
    }
    let answer = server.ok(COMPLETIONS, &json!({ "prompt": TEXT, "ignore_eos": true })).await;
    assert_eq!(answer["usage"]["completion_tokens"], 16, "OpenAI's default");
}

#[tokio::test]
async fn an_echo_with_logprobs_gives_the_scores_of_the_prompt() {
    let server = Running::tiny().await;
    let model = server.models.get("tiny").await.unwrap();
    let ids = model.tokenizer().unwrap().encode(TEXT, true).unwrap();
    let score = model.score(ScoreRequest::new(ids.clone(), 1).with_top(1)).await.unwrap();
    let body =
        json!({ "prompt": [ids], "echo": true, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1 });
    let answer = server.ok(COMPLETIONS, &body).await;
    let logprobs = &answer["choices"][0]["logprobs"];
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(
            logprobs[list].as_array().unwrap().len(),
            ids.len() + 1,
            "{list}: the prompt and one token"
        );
    }
    assert!(logprobs["token_logprobs"][0].is_null() && logprobs["top_logprobs"][0].is_null());
    for (index, token) in score.tokens.iter().enumerate() {
        let found = logprobs["token_logprobs"][index + 1].as_f64().unwrap();
        assert_eq!(found, f64::from(token.logprob), "every bit of it");
        let top = logprobs["top_logprobs"][index + 1].as_object().unwrap();
        let best = top.values().map(|value| value.as_f64().unwrap()).fold(f64::NEG_INFINITY, f64::max);
        assert_eq!(best == found, token.rank == 0, "the largest of the map tells the greedy token");
        assert!(top.values().any(|value| value.as_f64() == Some(found)), "the token itself is in the map");
    }
    let text = answer["choices"][0]["text"].as_str().unwrap();
    assert!(text.starts_with(TEXT) || text.contains(TEXT), "{text}");
}

#[tokio::test]
async fn the_lists_have_one_entry_more_even_where_the_answer_is_its_end() {
    let server = Running::tiny().await;
    let model = server.models.get("tiny").await.unwrap();
    let tokenizer = model.tokenizer().unwrap();
    let question = GenerateRequest::chat([Message::user(TEXT)]);
    let prompt = question.prompt_tokens(&tokenizer).unwrap();
    let mut request = GenerateRequest::new(Prompt::Tokens(prompt.to_vec())).with_sampling(Sampling::greedy());
    request.params.max_tokens = Some(100);
    let answer = model.generate(request).await.unwrap().collect().await.unwrap();
    // The prompt and the whole answer but for its last token, which ends it.
    let all = [&prompt[..], &answer.tokens[..answer.tokens.len() - 1]].concat();
    let body = json!({ "prompt": [all], "echo": true, "logprobs": 1, "max_tokens": 1, "temperature": 0 });
    let answer = server.ok(COMPLETIONS, &body).await;
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["logprobs"]["token_logprobs"].as_array().unwrap().len(), all.len() + 1);
}

#[tokio::test]
async fn an_echo_alone_scores_without_an_answer() {
    let server = Running::tiny().await;
    let body = json!({ "prompt": TEXT, "echo": true, "logprobs": 0, "max_tokens": 0 });
    let answer = server.ok(COMPLETIONS, &body).await;
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], TEXT);
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    let tokens = choice["logprobs"]["tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), answer["usage"]["prompt_tokens"].as_u64().unwrap() as usize);
    let one = json!({ "prompt": [5], "echo": true, "logprobs": 1, "max_tokens": 1, "temperature": 0 });
    let answer = server.ok(COMPLETIONS, &one).await;
    assert!(answer["choices"][0]["logprobs"]["token_logprobs"][0].is_null());
    assert_eq!(answer["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len(), 2);
    let error = server.refused(COMPLETIONS, &json!({ "prompt": TEXT, "max_tokens": 0 }), 400).await;
    assert_eq!(error["param"], "max_tokens");
}

#[tokio::test]
async fn streams_and_whole_answers_are_the_same() {
    let server = Running::tiny().await;
    for extra in [
        json!({}),
        json!({ "logprobs": 2 }),
        json!({ "logprobs": 1, "echo": true }),
        json!({ "n": 2, "seed": 7, "temperature": 1.0 }),
    ] {
        let mut body = json!({ "prompt": [TEXT, "What is 1 + 1?"], "max_tokens": 6, "temperature": 0 });
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let whole = server.ok(COMPLETIONS, &body).await;
        body["stream"] = true.into();
        let (chunks, done) = server.stream(COMPLETIONS, &body).await;
        assert!(done);
        for choice in whole["choices"].as_array().unwrap() {
            let own: Vec<&Value> = chunks
                .iter()
                .map(|chunk| &chunk["choices"][0])
                .filter(|own| own["index"] == choice["index"])
                .collect();
            let text: String = own.iter().map(|own| own["text"].as_str().unwrap()).collect();
            assert_eq!(text, choice["text"].as_str().unwrap(), "{extra}");
            assert_eq!(own.last().unwrap()["finish_reason"], choice["finish_reason"]);
            for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
                let parts = own.iter().filter_map(|own| own["logprobs"][list].as_array()).flatten();
                let parts: Vec<&Value> = parts.collect();
                let all: Vec<&Value> = choice["logprobs"][list].as_array().into_iter().flatten().collect();
                assert_eq!(parts, all, "{list} {extra}");
            }
        }
    }
}

#[tokio::test]
async fn sampling_is_the_librarys() {
    let server = Running::tiny().await;
    let ask = async |extra: Value| {
        let mut body = json!({ "prompt": TEXT, "max_tokens": 12, "temperature": 1.5, "top_k": 0, "ignore_eos": true, "seed": 3 });
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.ok(COMPLETIONS, &body).await["choices"].clone()
    };
    let first = ask(json!({})).await;
    assert_eq!(first, ask(json!({})).await, "the same seed");
    assert_ne!(first, ask(json!({ "seed": 4 })).await, "another seed");
    let several = ask(json!({ "n": 2 })).await;
    assert_eq!(several[0]["text"], first[0]["text"]);
    assert_ne!(several[0]["text"], several[1]["text"], "each of several answers has a seed of its own");
    // A bias decides every token, and a forbidden one never comes.
    let forced =
        ask(json!({ "logit_bias": { "100": 100.0 }, "logprobs": 0, "return_tokens_as_token_ids": true }))
            .await;
    let tokens = forced[0]["logprobs"]["tokens"].as_array().unwrap();
    assert!(tokens.iter().all(|token| token == "token_id:100"), "{tokens:?}");
    let error = server.refused(COMPLETIONS, &json!({ "prompt": TEXT, "logit_bias": { "x": 1 } }), 400).await;
    assert_eq!(error["param"], "logit_bias");
}

#[tokio::test]
async fn chat_logprobs_belong_to_the_text() {
    let server = Running::tiny().await;
    let body = json!({
        "messages": [{ "role": "user", "content": TEXT }], "temperature": 0, "logprobs": true, "top_logprobs": 3,
    });
    let answer = server.ok("/v1/chat/completions", &body).await;
    let choice = &answer["choices"][0];
    let content = choice["logprobs"]["content"].as_array().unwrap();
    let text = choice["message"]["content"].as_str().unwrap();
    assert!(text.contains("seven") || text.contains('7'), "{text}");
    let bytes: Vec<u8> = content
        .iter()
        .flat_map(|token| token["bytes"].as_array().unwrap().iter().map(|byte| byte.as_u64().unwrap() as u8))
        .collect();
    assert_eq!(String::from_utf8(bytes).unwrap().trim_start(), text.trim_start());
    for token in content {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        assert_eq!(top[0]["token"], token["token"], "greedy");
        assert_eq!(top[0]["logprob"], token["logprob"]);
    }
    // The same in a stream.
    let mut body = body;
    body["stream"] = true.into();
    let (chunks, _) = server.stream("/v1/chat/completions", &body).await;
    let parts: Vec<&Value> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array())
        .flatten()
        .collect();
    assert_eq!(parts.len(), content.len());
}

#[tokio::test]
async fn the_last_message_can_be_continued() {
    let server = Running::tiny().await;
    let messages = json!([
        { "role": "user", "content": TEXT },
        { "role": "assistant", "content": "There are" },
    ]);
    let body = json!({ "messages": messages, "temperature": 0, "continue_final_message": true, "add_generation_prompt": false });
    let answer = server.ok("/v1/chat/completions", &body).await;
    let model = server.models.get("tiny").await.unwrap();
    let request = GenerateRequest::chat([Message::user(TEXT), Message::assistant("There are")])
        .with_chat_options(ternion::ChatOptions::default().continuing_final_message())
        .with_sampling(Sampling::greedy());
    let expected = model.generate(request).await.unwrap().collect().await.unwrap();
    assert_eq!(answer["choices"][0]["message"]["content"], expected.text);
    assert_eq!(answer["usage"]["prompt_tokens"], expected.usage.prompt_tokens);
}

#[tokio::test]
async fn a_prompt_that_is_too_long_is_told_by_openais_code() {
    let server = Running::tiny().await;
    let long = "word ".repeat(2000);
    for (path, body, param) in [
        (COMPLETIONS, json!({ "prompt": long }), "prompt"),
        ("/v1/chat/completions", json!({ "messages": [{ "role": "user", "content": long }] }), "messages"),
    ] {
        let error = server.refused(path, &body, 400).await;
        assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &json!(param)));
    }
    let body = json!({
        "messages": [{ "role": "user", "content": "What is 1 + 1?" }], "document": long, "max_tokens": 4,
        "context_policy": { "kind": "truncate", "drop": "head" },
    });
    let answer = server.ok("/v1/chat/completions", &body).await;
    assert_eq!(answer["context"]["policy"], "truncate");
    let wrong =
        json!({ "messages": [{ "role": "user", "content": "a" }], "context_policy": { "kind": "nothing" } });
    assert_eq!(server.refused("/v1/chat/completions", &wrong, 400).await["param"], "context_policy");
}

#[tokio::test]
async fn tokens_are_those_of_the_tokenizer() {
    let server = Running::tiny().await;
    let tokenizer = server.models.get("tiny").await.unwrap().tokenizer().unwrap();
    let text = "How many? <|eot|> é€";
    let with = tokenizer.encode(text, true).unwrap();
    let without = tokenizer.encode(text, false).unwrap();
    // vLLM's form.
    let answer = server.ok("/tokenize", &json!({ "prompt": text, "return_token_strs": true })).await;
    assert_eq!((&answer["tokens"], &answer["count"]), (&json!(with), &json!(with.len())));
    assert_eq!(answer["max_model_len"], 256);
    assert_eq!(answer["token_strs"].as_array().unwrap().len(), with.len());
    let answer = server.ok("/tokenize", &json!({ "prompt": text, "add_special_tokens": false })).await;
    assert_eq!(answer["tokens"], json!(without));
    let messages = json!([{ "role": "user", "content": "Hi" }]);
    let chat = tokenizer.encode_chat(&[Message::user("Hi")], true).unwrap();
    assert_eq!(server.ok("/tokenize", &json!({ "messages": messages })).await["tokens"], json!(chat));
    // llama.cpp's form.
    assert_eq!(server.ok("/tokenize", &json!({ "content": text })).await["tokens"], json!(without));
    let plain = json!({ "content": text, "parse_special": false });
    assert_eq!(server.ok("/tokenize", &plain).await["tokens"], json!(tokenizer.encode_plain(text).unwrap()));
    let answer = server.ok("/tokenize", &json!({ "content": text, "with_pieces": true })).await;
    let pieces = answer["tokens"].as_array().unwrap();
    let bytes: Vec<u8> = pieces
        .iter()
        .flat_map(|token| match &token["piece"] {
            Value::String(text) => text.clone().into_bytes(),
            bytes => bytes.as_array().unwrap().iter().map(|byte| byte.as_u64().unwrap() as u8).collect(),
        })
        .collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), text, "the bytes of all tokens are the text");

    let answer = server.ok("/detokenize", &json!({ "tokens": without })).await;
    assert_eq!((&answer["prompt"], &answer["content"]), (&json!(text), &json!(text)));
    server.refused("/detokenize", &json!({ "tokens": [99_999_999] }), 400).await;
    server.refused("/tokenize", &json!({ "prompt": "a", "content": "b" }), 400).await;

    let info = json(server.get("/tokenizer_info").send().await.unwrap(), 200).await;
    assert_eq!(info["eos_token"], json!(tokenizer.eos_id().and_then(|id| tokenizer.token(id))));
    assert!(info["chat_template"].as_str().unwrap().contains("messages"));
}
