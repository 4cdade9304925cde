//! The prompt cache on the disk: the same answers with and without it, after a restart, and whatever happens to its files.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::{path::Path, sync::Arc};

use ternion::{
    Completion, ErrorKind, GenerateRequest, LlmBackend, Prompt, Sampling,
    config::{Config, ModelConfig, PromptCacheConfig},
};
use ternion_test_support::fixture;

fn config(cache: Option<&Path>, kv_type: &str) -> ModelConfig {
    let mut config = ModelConfig::for_path(fixture("ternion-tiny"));
    config.prompt_cache = cache.map(PromptCacheConfig::in_folder);
    config.options.insert("kv_type".to_owned(), kv_type.into());
    config
}

async fn load(config: ModelConfig) -> Arc<dyn LlmBackend> {
    ternion::load(&Config::single("tiny", config), None).await.unwrap()
}

async fn ask(model: &dyn LlmBackend, tokens: &[u32]) -> Completion {
    let mut request = GenerateRequest::new(Prompt::Tokens(tokens.to_vec()))
        .with_max_tokens(20)
        .with_logprobs()
        .with_sampling(Sampling::greedy());
    request.params.ignore_eos = true;
    model.generate(request).await.unwrap().collect().await.unwrap()
}

/// As the end of a process, but for the process.
async fn unload(model: Arc<dyn LlmBackend>) {
    let gone = model.unloaded();
    drop(model);
    gone.await;
}

/// A long text, and a question about it.
fn prompt(question: u32) -> Vec<u32> {
    (0..300).map(|i| 20 + i * 7 % 200).chain([30 + question, 40, 41]).collect()
}

fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let models = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<_> = models
        .flat_map(|model| std::fs::read_dir(model.path()).unwrap())
        .map(|file| file.unwrap().path())
        .collect();
    files.sort();
    files
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_text_is_not_computed_again_after_a_restart() {
    for kv_type in ["f32", "f16", "int8"] {
        let folder = tempfile::tempdir().unwrap();
        let plain = load(config(None, kv_type)).await;
        let expected = [ask(&*plain, &prompt(0)).await, ask(&*plain, &prompt(1)).await];
        let first = load(config(Some(folder.path()), kv_type)).await;
        let cold = ask(&*first, &prompt(0)).await;
        assert_eq!((cold.usage.cached_tokens, &cold.tokens), (0, &expected[0].tokens));
        unload(first).await;
        // 303 tokens of the prompt and 19 of the answer are 5 blocks of 64.
        assert_eq!(files(folder.path()).len(), 5);

        let second = load(config(Some(folder.path()), kv_type)).await;
        // Another question about the same text: 300 tokens are the same, of which 4 blocks are whole.
        let warm = ask(&*second, &prompt(1)).await;
        assert_eq!((warm.usage.cached_tokens, &warm.tokens), (256, &expected[1].tokens), "{kv_type}");
        assert_eq!(warm.logprobs, expected[1].logprobs, "bit for bit");
        let again = ask(&*second, &prompt(0)).await;
        assert!(again.usage.cached_tokens >= 256);
        assert_eq!((&again.tokens, &again.logprobs), (&expected[0].tokens, &expected[0].logprobs));
        unload(second).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_is_found_and_the_rest_computed() {
    let folder = tempfile::tempdir().unwrap();
    let model = load(config(Some(folder.path()), "f32")).await;
    let expected = ask(&*model, &prompt(0)).await;
    unload(model).await;
    for path in files(folder.path()) {
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    let model = load(config(Some(folder.path()), "f32")).await;
    let found = ask(&*model, &prompt(0)).await;
    assert_eq!(
        (found.usage.cached_tokens, &found.tokens, &found.logprobs),
        (0, &expected.tokens, &expected.logprobs)
    );
    unload(model).await;
    // It has been written again.
    let model = load(config(Some(folder.path()), "f32")).await;
    assert_eq!(ask(&*model, &prompt(0)).await.usage.cached_tokens, 256);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_at_the_same_time_and_another_process_share_it() {
    let folder = tempfile::tempdir().unwrap();
    let (one, other) =
        (load(config(Some(folder.path()), "f32")).await, load(config(Some(folder.path()), "f32")).await);
    let plain = load(config(None, "f32")).await;
    let expected = ask(&*plain, &prompt(2)).await.tokens;
    ask(&*one, &prompt(0)).await;
    unload(one).await;
    let prompts = [prompt(2), prompt(2), prompt(2), prompt(2), prompt(2), prompt(2)];
    let answers = prompts.iter().map(|prompt| ask(&*other, prompt));
    for answer in futures_util::future::join_all(answers).await {
        assert!(answer.usage.cached_tokens >= 256, "{:?}", answer.usage);
        assert_eq!(answer.tokens, expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn engines_that_cannot_save_refuse_it() {
    let mut config = ModelConfig::default();
    "echo".clone_into(&mut config.backend);
    config.prompt_cache = Some(PromptCacheConfig::in_folder("prompts"));
    let error = ternion::load(&Config::single("m", config), None).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(
        error.to_string().contains("models.m.prompt_cache: backend `echo` cannot save its KV cache"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_is_found_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let model = load(config(Some(folder.path()), "f32")).await;
    model.save_session("text", prompt(0)).await.unwrap();
    unload(model).await;
    let model = load(config(Some(folder.path()), "f32")).await;
    let tokens = model.load_session("text").await.unwrap();
    assert_eq!(tokens, prompt(0));
    assert_eq!(ask(&*model, &tokens).await.usage.cached_tokens, 256);
    assert_eq!(model.load_session("other").await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(model.save_session("x", vec![u32::MAX]).await.unwrap_err().kind(), ErrorKind::InvalidRequest);
    let plain = load(config(None, "f32")).await;
    let error = plain.save_session("text", prompt(0)).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("prompt_cache"), "{error}");
}
