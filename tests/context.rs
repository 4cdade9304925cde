//! Long inputs as a host meets them: a policy in the configuration, a real engine underneath.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::{fmt::Write, sync::Arc};

use ternion::{
    ErrorKind, FinishReason, GenerateRequest, LlmBackend, LlmBackendExt, Message, Sampling,
    config::{Config, Format},
};
use ternion_test_support::fixture;

const CONTEXT: usize = 192;

/// The small model with this table as its policy.
async fn model(policy: &str) -> Arc<dyn LlmBackend> {
    let path = fixture("nano-packed");
    let text = format!(
        "[models.m]\npath = '{}'\ncontext_length = {CONTEXT}\n[models.m.context_policy]\n{policy}\n",
        path.display()
    );
    ternion::load(&Config::from_str(&text, Format::Toml).unwrap(), None).await.unwrap()
}

fn long_text() -> String {
    let mut text = String::new();
    for i in 0..60 {
        let _ = write!(text, "Sentence {i} tells of the sky, 天空, which is blue. ");
    }
    text
}

#[tokio::test]
async fn a_policy_of_the_configuration_is_that_of_every_request() {
    let text = long_text();
    for (policy, least_calls) in [
        ("kind = \"truncate\"\ndrop = \"middle\"", 1),
        ("kind = \"map_reduce\"\nanswer_tokens = 16", 8),
        ("kind = \"refine\"\nanswer_tokens = 16\noverlap = 0", 5),
        ("kind = \"sliding\"", 1),
    ] {
        let model = model(policy).await;
        assert!(model.info().capabilities.long_prompts);
        assert_eq!(model.info().limits.context_length, CONTEXT, "the window stays what it is");
        let mut request = GenerateRequest::chat([Message::system("Be brief."), Message::user("What is it?")])
            .with_document(text.as_str())
            .with_max_tokens(12)
            .with_sampling(Sampling::greedy());
        request.params.ignore_eos = true;
        let answer = model.generate(request.clone()).await.unwrap().collect().await.unwrap();
        assert_eq!(answer.finish_reason, FinishReason::MaxTokens, "{policy}");
        assert_eq!(answer.tokens.len(), 12);
        let report = answer.context.unwrap();
        assert!(report.prompt_tokens > 1000 && report.calls >= least_calls, "{policy}: {report:?}");
        assert!(report.total_completion_tokens >= 12 * least_calls, "{policy}: {report:?}");
        assert!(report.answers_cut <= report.calls);
        // The same input, the same answer.
        let again = model.generate(request).await.unwrap().collect().await.unwrap();
        assert_eq!(again.tokens, answer.tokens, "{policy}");
        // What fits is as without a policy.
        let short = model.complete("short", 5).await.unwrap();
        assert_eq!(short.context, None);
    }
    let model = model("kind = \"reject\"").await;
    let error = model.generate(GenerateRequest::new("x").with_document(text)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ContextOverflow);
}

#[tokio::test]
async fn after_the_window_has_moved_an_answer_is_that_of_a_new_request_with_what_is_kept() {
    let (sinks, recent) = (4, 60);
    let model = model(&format!("kind = \"sliding\"\nsinks = {sinks}\nrecent = {recent}")).await;
    let prompt: Vec<u32> = (10..60).collect();
    let request = |tokens: &[u32], max: usize| {
        let mut request =
            GenerateRequest::new(tokens.to_vec()).with_max_tokens(max).with_sampling(Sampling::greedy());
        request.params.ignore_eos = true;
        request
    };
    let answer = model.generate(request(&prompt, 500)).await.unwrap().collect().await.unwrap();
    assert_eq!(answer.finish_reason, FinishReason::MaxTokens);
    let moves = answer.context.unwrap().window_moves;
    assert!(moves >= 3, "{moves}");

    let (mut window, mut expected) = (prompt, Vec::<u32>::new());
    while expected.len() < 500 {
        let max = (CONTEXT - window.len()).min(500 - expected.len());
        // Without the window, and on a model that has computed nothing of it before.
        let fresh = self::model("kind = \"reject\"").await;
        let part = fresh.generate(request(&window, max)).await.unwrap().collect().await.unwrap();
        assert_eq!((part.tokens.len(), part.usage.cached_tokens), (max, 0));
        expected.extend(&part.tokens);
        window.extend(&part.tokens);
        window.drain(sinks..window.len() - recent);
    }
    assert_eq!(answer.tokens, expected);
}

#[tokio::test]
async fn a_policy_that_cannot_work_is_refused_at_load() {
    let load = async |table: &str| {
        let config = Config::from_str(table, Format::Toml).unwrap();
        ternion::load(&config, None).await.err().unwrap()
    };
    let path = fixture("nano-packed");
    let error = load(&format!(
        "[models.m]\npath = '{}'\ncontext_length = 64\n[models.m.context_policy]\nkind = \"sliding\"\nsinks = 64\n",
        path.display()
    ))
    .await;
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    assert!(error.to_string().contains("64 sinks"), "{error}");
    let error =
        load("[models.m]\nbackend = \"echo\"\n[models.m.context_policy]\nkind = \"map_reduce\"\n").await;
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("no tokenizer"), "{error}");
}
