//! A remote model among others: "remote first, local while it is down", and swaps between the two.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

#[path = "../crates/backend-openai/tests/fake/mod.rs"]
mod fake;

use fake::{Fake, Reply, Step, answer, ask, delta, hello, refusal};
use serde_json::json;
use ternion::{
    Completion, ErrorKind, LlmBackend, Result,
    config::{Config, ModelConfig},
    models::Models,
};

/// The remote model, with a local one that answers while it is down.
fn remote_first(fake: &Fake) -> Config {
    let mut remote = fake.config();
    remote.fallback = vec!["local".to_owned()];
    let mut config = Config::single("remote", remote);
    config.models.insert("local".to_owned(), local());
    config
}

fn local() -> ModelConfig {
    let mut local = ModelConfig::default();
    "echo".clone_into(&mut local.backend);
    local.options.insert("reply".to_owned(), json!("local answers"));
    local
}

fn told(outcome: &Result<Completion>) -> (String, String) {
    match outcome {
        Ok(completion) => (
            completion.text.clone(),
            completion.served_by.as_ref().map(ToString::to_string).unwrap_or_default(),
        ),
        Err(error) => (error.kind().as_str().to_owned(), error.to_string()),
    }
}

#[tokio::test]
async fn a_local_model_answers_where_the_remote_one_fails_before_the_first_token() {
    let html = Reply::Whole {
        status: 200,
        headers: vec![("content-type", "text/html".to_owned())],
        body: "<html></html>".to_owned(),
    };
    for (what, replies) in [
        ("500", vec![refusal(500, "x"); 3]),
        ("429", vec![refusal(429, "x"); 3]),
        ("quota", vec![refusal(429, "insufficient_quota")]),
        ("404", vec![refusal(404, "model_not_found")]),
        ("HTML", vec![html]),
        ("silence", vec![Reply::Silence; 3]),
        ("death", vec![Reply::Stream(vec![Step::Break]); 3]),
        ("no answer", vec![Reply::Stream(vec![Step::Bytes(b"data: [DONE]\n\n".to_vec())])]),
    ] {
        let fake = Fake::new(replies).await;
        let model = ternion::load(&remote_first(&fake), Some("remote")).await.unwrap();
        let found = told(&ask(&*model).await);
        assert_eq!(found, ("local answers".to_owned(), "local on echo".to_owned()), "{what}");
    }
}

#[tokio::test]
async fn what_the_request_or_the_key_is_at_fault_for_is_told() {
    for (status, code, kind) in [
        (400, "bad", ErrorKind::InvalidRequest),
        (400, "context_length_exceeded", ErrorKind::ContextOverflow),
        (401, "invalid_api_key", ErrorKind::InvalidConfig),
    ] {
        let fake = Fake::new([refusal(status, code)]).await;
        let model = ternion::load(&remote_first(&fake), Some("remote")).await.unwrap();
        assert_eq!(ask(&*model).await.unwrap_err().kind(), kind, "{code}");
    }
}

/// A key that is refused is a mistake in the configuration, unless the configuration says that it is as good as a server that is down.
#[tokio::test]
async fn a_refused_key_is_fallen_back_from_only_where_the_configuration_says_so() {
    for (status, code) in [(401, "invalid_api_key"), (403, "forbidden")] {
        for (falls_back, expected) in [(false, "invalid_config"), (true, "local answers")] {
            // At load, and with a request.
            for at_load in [true, false] {
                let denied = move |asked: &fake::Asked| {
                    (at_load || !asked.path.ends_with("/models")).then(|| refusal(status, code))
                };
                let fake = Fake::with([], Box::new(denied)).await;
                let mut config = remote_first(&fake);
                let remote = config.models.get_mut("remote").unwrap();
                remote.options.insert("fall_back_when_denied".to_owned(), json!(falls_back));
                let found = match ternion::load(&config, Some("remote")).await {
                    Ok(model) => told(&ask(&*model).await).0,
                    Err(error) => error.kind().as_str().to_owned(),
                };
                assert_eq!(found, expected, "{status}, at load: {at_load}");
            }
        }
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_an_error_and_not_begun_again_elsewhere() {
    let fake = Fake::new([Reply::Stream(vec![delta("Hel"), Step::Break])]).await;
    let model = ternion::load(&remote_first(&fake), Some("remote")).await.unwrap();
    let mut stream = model.generate(hello()).await.unwrap();
    let mut text = String::new();
    let error = loop {
        match stream.next().await.unwrap() {
            Ok(ternion::Event::Text(piece)) => text.push_str(&piece.text),
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!((text.as_str(), error.kind()), ("Hel", ErrorKind::Backend));
}

#[tokio::test]
async fn a_server_that_is_down_at_the_start_is_used_when_it_is_up() {
    let fake = Fake::new([answer(&["remote answers"])]).await;
    let mut config = remote_first(&fake);
    config.models.get_mut("remote").unwrap().options.insert("url".to_owned(), json!("http://127.0.0.1:1/v1"));
    let models = Models::new(config.clone()).unwrap();
    let handle = models.get("remote").await.unwrap();
    assert_eq!(told(&ask(&handle).await).0, "local answers");
    // The same with the address corrected, unchecked, because the script has one answer.
    config.models.get_mut("remote").unwrap().options.insert("url".to_owned(), json!(fake.url));
    config.reload.check = Some(Vec::new());
    models.reload_with(config).await.unwrap();
    assert_eq!(told(&ask(&handle).await), ("remote answers".to_owned(), "remote on openai".to_owned()));
}

#[tokio::test]
async fn a_remote_model_takes_the_place_of_a_local_one_while_the_host_runs() {
    let fake =
        Fake::with([], Box::new(|asked| (!asked.path.ends_with("/models")).then(|| answer(&["re", "mote"]))))
            .await;
    let models = Models::new(Config::single("m", local())).unwrap();
    let handle = models.get("m").await.unwrap();
    assert_eq!(told(&ask(&handle).await).1, "m on echo");
    // The check before it takes over asks this server, which takes conversations alone and sends text alone.
    models.reload_with(Config::single("m", fake.config())).await.unwrap();
    assert_eq!(told(&ask(&handle).await), ("remote".to_owned(), "m on openai".to_owned()));
    assert_eq!(fake.asked().len(), 3);
    // A server that does not answer does not take over.
    let dead = Fake::new([]).await;
    assert!(models.reload_with(Config::single("m", dead.config())).await.is_err());
    assert_eq!(handle.info().backend, "openai");
    assert_eq!(told(&ask(&handle).await).0, "remote");
}
