//! The backend `openai` against this server: what one host serves another uses as a model of its own.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::sync::Arc;

use common::{Running, fixture, tiny};
use serde_json::{Value, json};
use ternion::{
    Completion, Constraint, ErrorKind, GenerateRequest, LlmBackend, Message, Result, Sampling,
    config::{Config, ModelConfig},
};
use ternion_server::ServerOptions;

/// The server's model as a remote one.
async fn remote(server: &Running, model: &str, options: Value) -> Result<Arc<dyn LlmBackend>> {
    let mut remote = ModelConfig::default();
    "openai".clone_into(&mut remote.backend);
    remote.options.insert("url".to_owned(), json!(server.url));
    remote.options.insert("model".to_owned(), json!(model));
    remote.options.extend(options.as_object().unwrap().clone());
    ternion::load(&Config::single("remote", remote), Some("remote")).await
}

async fn answer(model: &Arc<dyn LlmBackend>, request: GenerateRequest) -> Result<Completion> {
    let drawn = Sampling::default().with_temperature(1.5).with_seed(3);
    model.generate(request.with_sampling(drawn).with_max_tokens(100)).await?.collect().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn constraints_go_to_the_server_and_are_kept() {
    let server = Running::start(tiny(), ServerOptions::default()).await;
    let tokenizer = json!({ "tokenizer": fixture("ternion-tiny") });
    for options in [json!({}), tokenizer] {
        let model = remote(&server, "tiny", options).await.unwrap();
        let can = &model.info().capabilities;
        assert!(can.constraints && can.required_tool_calls == (model.tokenizer().is_none()), "{can:?}");
        let schema = json!({ "type": "object", "properties": { "n": { "enum": [3, "four"] } }, "required": ["n"], "additionalProperties": false });
        for prompt in [GenerateRequest::chat([Message::user("Hi")]), GenerateRequest::new("One, two")] {
            for constraint in [
                Constraint::JsonSchema(schema.clone()),
                Constraint::Regex("[ab]{3}x?".into()),
                Constraint::Choice(vec!["yes \"\\\n".into(), "no".into()]),
                Constraint::Lark("start: \"<\" WORD \">\"\nWORD: /[xyz]{1,4}/".into()),
            ] {
                let found = answer(&model, prompt.clone().with_constraint(constraint.clone())).await.unwrap();
                let text = &found.text;
                assert_eq!(found.constraint_complete, Some(true), "{constraint:?}: {text}");
                let kept = match &constraint {
                    Constraint::JsonSchema(_) => {
                        let value: Value = serde_json::from_str(text).unwrap();
                        value == json!({ "n": 3 }) || value == json!({ "n": "four" })
                    }
                    Constraint::Choice(texts) => texts.contains(text),
                    Constraint::Regex(_) => {
                        (3..5).contains(&text.len()) && text.chars().all(|c| "abx".contains(c))
                    }
                    _ => text.starts_with('<') && text.ends_with('>'),
                };
                assert!(kept, "{constraint:?}: {text}");
            }
            let cut = prompt
                .clone()
                .with_constraint(Constraint::JsonSchema(json!({ "type": "string", "minLength": 300 })));
            assert_eq!(answer(&model, cut).await.unwrap().constraint_complete, Some(false));
            // The server says what it cannot enforce, and where.
            let schema = json!({ "type": "array", "uniqueItems": true });
            let error =
                answer(&model, prompt.with_constraint(Constraint::JsonSchema(schema))).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidRequest, "{error}");
            assert!(error.message().contains("`uniqueItems` at #"), "{error}");
        }
        for check in ternion_conformance::all().filter(|check| check.name.starts_with("constraints::")) {
            match check.outcome(&*model).await {
                ternion_conformance::Outcome::Failed(failure) => panic!("{}: {failure}", check.name),
                outcome => println!("{}: {outcome:?}", check.name),
            }
        }
    }
}

/// `echo` cannot constrain answers: its server refuses, and so does the backend before it asks.
#[tokio::test]
async fn a_server_that_enforces_nothing_is_not_asked() {
    let server = Running::echo().await;
    let model = remote(&server, "echo", json!({})).await.unwrap();
    assert!(!model.info().capabilities.constraints);
    let error =
        answer(&model, GenerateRequest::new("a").with_constraint(Constraint::JsonObject)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}

/// A fallback keeps the constraint: where the remote model cannot enforce it, and where it is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_local_model_keeps_the_constraint_that_a_remote_one_cannot() {
    let server = Running::echo().await;
    for url in [server.url.clone(), "http://127.0.0.1:9".to_owned()] {
        let mut config = tiny();
        let mut remote = ModelConfig::default();
        "openai".clone_into(&mut remote.backend);
        remote.fallback = vec!["tiny".to_owned()];
        remote.options =
            json!({ "url": url, "model": "echo", "retry": { "attempts": 1 } }).as_object().unwrap().clone();
        config.models.insert("remote".to_owned(), remote);
        let model = ternion::load(&config, Some("remote")).await.unwrap();
        let choice = Constraint::Choice(vec!["yes".into(), "no".into()]);
        let found = answer(&model, GenerateRequest::new("a").with_constraint(choice)).await.unwrap();
        assert!(["yes", "no"].contains(&found.text.as_str()), "{}", found.text);
        assert_eq!(
            (found.constraint_complete, found.served_by.unwrap().model.as_str()),
            (Some(true), "tiny")
        );
    }
}

/// A certificate that an authority of the house has signed, which the system does not know. Made by `openssl` for this test, and
/// its key is known to all.
#[cfg(feature = "tls")]
#[tokio::test]
async fn https_is_trusted_by_the_file_of_the_options() {
    use ternion_server::Tls;

    let file = |name: &str| std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tls").join(name);
    let mut options = ServerOptions::default();
    options.tls = Some(Tls::new(file("signed.pem"), file("signed-key.pem")));
    let server = Running::start(common::config(common::ECHO), options).await;
    assert!(server.url.starts_with("https://"), "{}", server.url);

    let model = remote(&server, "echo", json!({ "ca_file": file("ca.pem") })).await.unwrap();
    let found = answer(&model, GenerateRequest::chat([Message::user("over TLS")])).await.unwrap();
    assert!(found.text.contains("over TLS"), "{}", found.text);

    let quick = json!({ "attempts": 1 });
    for options in [json!({ "retry": quick }), json!({ "retry": quick, "ca_file": file("cert.pem") })] {
        let error = remote(&server, "echo", options).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Backend, "{error}");
        let said = format!("{error} {:?}", std::error::Error::source(&error).map(ToString::to_string));
        assert!(said.to_lowercase().contains("certificate"), "{said}");
    }
    let none = remote(&server, "echo", json!({ "ca_file": file("signed-key.pem") })).await.err().unwrap();
    assert_eq!(none.kind(), ErrorKind::InvalidConfig, "{none}");
}
