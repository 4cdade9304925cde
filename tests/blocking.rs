//! The calls for hosts without async.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use ternion::{
    ErrorKind, Event, GenerateRequest, Message, ScoreRequest,
    blocking::Model,
    config::{Config, Format},
};

fn echo(options: &str) -> Model {
    let config = format!("[models.m]\nbackend = 'echo'\n{options}");
    Model::load(&Config::from_str(&config, Format::Toml).unwrap(), None).unwrap()
}

#[test]
fn a_host_without_async_makes_the_same_calls() {
    let model = echo("");
    assert_eq!(model.chat(vec![Message::user("one two")]).unwrap().text, "one two");
    assert_eq!(model.complete("one two three", 2).unwrap().text, "one two");
    let request = || GenerateRequest::new("a b c");
    let text: Result<String, _> = model.generate(request()).unwrap().text().collect();
    assert_eq!(text.unwrap(), "a b c");
    assert_eq!(model.generate(request()).unwrap().collect_answer().unwrap().text, "a b c");
    let events: Vec<_> = model.generate(request()).unwrap().collect::<Result<_, _>>().unwrap();
    assert!(matches!(events.last(), Some(Event::Done(_))));
    model.validate(&request()).unwrap();
    assert_eq!(model.validate(&request().with_max_tokens(0)).unwrap_err().kind(), ErrorKind::InvalidRequest);
    assert_eq!(model.score(ScoreRequest::new(vec![1, 2], 1)).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(model.info().backend, "echo");
    assert!(Model::open("no/such/model").is_err());
}

#[test]
fn threads_share_a_model_and_a_dropped_stream_is_cancelled() {
    let model = echo("options.delay_ms = 5");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let model = model.clone();
            scope.spawn(move || assert_eq!(model.complete("x y", 9).unwrap().text, "x y"));
        }
    });
    let mut events = model.generate(GenerateRequest::new("a ".repeat(1000))).unwrap();
    events.find(|event| matches!(event, Ok(Event::Text(_)))).unwrap().unwrap();
    assert_eq!(model.stats().active, 1);
    drop(events);
    assert_eq!(model.stats().active, 0);
}

#[test]
fn a_configuration_bounds_answers_for_all_its_models() {
    let load = |text: &str, model: &str| {
        Model::load(&Config::from_str(text, Format::Toml).unwrap(), Some(model)).unwrap()
    };
    let text = "max_tokens = 2\n[models.a]\nbackend = 'echo'\n[models.b]\nbackend = 'echo'\nmax_tokens = 3\n";
    let answer = |model: &str, request: GenerateRequest| {
        load(text, model).generate(request).unwrap().collect_answer().unwrap().text
    };
    assert_eq!(answer("a", GenerateRequest::new("1 2 3 4 5")), "1 2");
    assert_eq!(answer("b", GenerateRequest::new("1 2 3 4 5")), "1 2 3");
    assert_eq!(answer("a", GenerateRequest::new("1 2 3 4 5").with_max_tokens(4)), "1 2 3 4");
    for wrong in ["max_tokens = 0", "[models.a]\nmax_tokens = 0"] {
        let error = Config::from_str(wrong, Format::Toml).unwrap_err();
        assert!(error.to_string().contains("max_tokens: 0 is out of range"), "{error}");
    }
}

/// All values of `$ref`.
fn references<'a>(value: &'a serde_json::Value, found: &mut Vec<&'a str>) {
    match value {
        serde_json::Value::Object(map) => {
            found.extend(map.get("$ref").and_then(|r| r.as_str()));
            map.values().for_each(|v| references(v, found));
        }
        serde_json::Value::Array(items) => items.iter().for_each(|v| references(v, found)),
        _ => {}
    }
}

#[test]
fn the_schema_has_the_options_of_every_backend() {
    let schema = ternion::registry().schema();
    let cases = schema["$defs"]["ModelConfig"]["allOf"].as_array().unwrap();
    let of = |backend: &str| {
        let is = |case: &&serde_json::Value| case["if"]["properties"]["backend"]["const"] == backend;
        &cases.iter().find(is).unwrap()["then"]["properties"]["options"]
    };
    assert!(of("echo")["properties"]["delay_ms"].is_object());
    for (backend, _) in ternion::registry().backends() {
        assert_eq!(of(backend)["additionalProperties"], false, "{backend}");
    }
    // Every reference in it leads somewhere.
    let mut found = Vec::new();
    references(&schema, &mut found);
    for reference in found {
        assert!(schema.pointer(reference.trim_start_matches('#')).is_some(), "{reference}");
    }
}
