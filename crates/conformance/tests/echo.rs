//! The suite on echo, and on an echo that fails.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use ternion_conformance::{Outcome, Reference, checks, failing, outcomes};
use ternion_core::{
    ErrorKind,
    echo::{Echo, EchoOptions},
};

fn echo(change: impl FnOnce(&mut EchoOptions)) -> Echo {
    let mut options = EchoOptions::default();
    change(&mut options);
    Echo::new("model", options)
}

#[tokio::test]
async fn echo_keeps_the_contract() {
    let model = echo(|_| {});
    let mut passed = 0;
    for (check, outcome) in outcomes(&model).await {
        match outcome {
            Outcome::Passed => passed += 1,
            Outcome::Failed(failure) => panic!("{}: {failure}", check.name),
            Outcome::Skipped(reason) => assert!(!reason.is_empty()),
        }
    }
    assert_eq!(passed, checks(&model).len());
    assert!(passed > 40, "only {passed} checks");
}

#[tokio::test]
async fn a_failing_engine_ends_its_streams() {
    for after in [0, 3] {
        let model = echo(|o| (o.fail, o.fail_after) = (Some(ErrorKind::Backend), Some(after)));
        failing::a_failure_ends_the_stream(&model).await.unwrap();
    }
    let healthy = failing::a_failure_ends_the_stream(&echo(|_| {})).await.unwrap_err();
    assert!(healthy.found.contains("EndOfSequence"), "{healthy}");
}

#[tokio::test]
async fn a_model_that_fails_passes_no_check_that_generates() {
    let model = echo(|o| o.fail = Some(ErrorKind::Backend));
    let mut failed = 0;
    for (check, outcome) in outcomes(&model).await {
        if ["streaming", "stopping", "sampling"].iter().any(|module| check.name.starts_with(module)) {
            assert!(!matches!(outcome, Outcome::Passed), "{}", check.name);
            failed += usize::from(matches!(outcome, Outcome::Failed(_)));
        }
    }
    assert!(failed > 20, "only {failed} failed");
}

#[tokio::test]
async fn references_are_read_from_json() {
    let json = r#"[{"name": "one", "tokens": [1, 2], "text": "a b", "tolerance": 0.001}]"#;
    let [reference] = Reference::from_json(json).unwrap().try_into().unwrap();
    assert_eq!(reference.tokens, [1, 2]);
    let outcomes = reference.outcomes(&echo(|_| {})).await;
    assert!(matches!(&outcomes[..], [(name, Outcome::Skipped(_))] if name == "one::text"), "{outcomes:?}");

    let error = Reference::from_json(r#"[{"name": "one", "token": [1]}]"#).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    assert!(error.to_string().contains("unknown field `token`"), "{error}");
}
