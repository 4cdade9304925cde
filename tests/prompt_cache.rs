//! The prompt cache on the disk: the same answers with and without it, after a restart, and whatever happens to its files.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::{path::Path, sync::Arc};

use ternion::formats::{
    Checkpoint,
    convert::{Options, Target, convert},
};
use ternion::{
    Completion, ErrorKind, GenerateRequest, LlmBackend, Prompt, Sampling,
    config::{ByteSize, Config, ModelConfig, PromptCacheConfig},
};
use ternion_test_support::fixture;

fn config(cache: Option<&Path>, kv_type: &str) -> ModelConfig {
    let mut config = ModelConfig::for_path(fixture("ternion-tiny"));
    config.prompt_cache = cache.map(PromptCacheConfig::in_folder);
    config.options.insert("kv_type".to_owned(), kv_type.into());
    config
}

/// The model in each engine, and in each way in which an engine may compute it, with the length of a prompt. Files are put into
/// `folder`.
#[allow(unused_mut, unused_variables, reason = "no other engine may be compiled in")]
fn engines(folder: &Path) -> Vec<(&'static str, ModelConfig, u32)> {
    let mut candle = config(None, "int8");
    "candle".clone_into(&mut candle.backend);
    let mut engines = vec![("candle", candle, LENGTH)];
    let mut add = |name, backend: &str, target: Target, options: &[(&str, &str)]| {
        let path = folder.join(name).with_extension(if backend == "onnx" { "" } else { "gguf" });
        let checkpoint = Checkpoint::open(fixture("ternion-tiny")).unwrap();
        convert(&checkpoint, &path, &Options::new(target), &mut |_, _| {}).unwrap();
        let mut config = ModelConfig::for_path(path);
        backend.clone_into(&mut config.backend);
        config.options.extend(options.iter().map(|(key, value)| ((*key).to_owned(), (*value).into())));
        engines.push((name, config, LENGTH));
    };
    #[cfg(feature = "llama-cpp")]
    {
        add("llama-cpp", "llama-cpp", Target::GgufI2s, &[("kv_type", "f16")]);
    }
    #[cfg(feature = "onnx")]
    match ternion_backend_onnx::Library::load(None) {
        Ok(_) => {
            add("onnx", "onnx", Target::Onnx, &[]);
            add("onnx-fast", "onnx", Target::OnnxFast, &[("kv_type", "f16")]);
        }
        Err(error) => assert!(std::env::var_os("ORT_DYLIB_PATH").is_none(), "{error}"),
    }
    #[cfg(feature = "llama-cpp")]
    {
        // llama.cpp's own arithmetic, for a model with a shorter context.
        let mut own = ModelConfig::for_path(fixture("gguf-llama/model.gguf"));
        "llama-cpp".clone_into(&mut own.backend);
        own.options.insert("arithmetic".to_owned(), "llama-cpp".into());
        own.prefill_chunk = Some(32);
        engines.push(("llama-cpp-own", own, 150));
    }
    engines
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

/// Tokens of the long text.
const LENGTH: u32 = 300;

/// A long text, and a question about it.
fn prompt(question: u32) -> Vec<u32> {
    prompt_of(LENGTH, question)
}

fn prompt_of(length: u32, question: u32) -> Vec<u32> {
    (0..length).map(|i| 20 + i * 7 % 200).chain([30 + question, 40, 41]).collect()
}

fn flip_a_bit_of_each(folder: &Path) {
    for path in files(folder) {
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
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
    for kv_type in ["f32", "exact", "f16", "int8"] {
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
async fn every_engine_answers_bit_by_bit_as_without_a_cache() {
    let models = tempfile::tempdir().unwrap();
    for (name, config, length) in engines(models.path()) {
        let prompt = |question| prompt_of(length, question);
        // Whole blocks of 64 tokens, and whole steps of 128 or 32.
        let whole = length as usize / 64 * 64;
        let folder = tempfile::tempdir().unwrap();
        let mut cached = config.clone();
        cached.prompt_cache = Some(PromptCacheConfig::in_folder(folder.path()));
        // A model for each question: of one that has answered another, a part would be in memory.
        let mut expected = Vec::new();
        for question in [0, 1] {
            expected.push(ask(&*load(config.clone()).await, &prompt(question)).await);
        }
        let first = load(cached.clone()).await;
        let cold = ask(&*first, &prompt(0)).await;
        assert_eq!(cold.usage.cached_tokens, 0, "{name}");
        assert_eq!((&cold.tokens, &cold.logprobs), (&expected[0].tokens, &expected[0].logprobs), "{name}");
        unload(first).await;
        for question in [0, 1] {
            let model = load(cached.clone()).await;
            let warm = ask(&*model, &prompt(question)).await;
            let expected = &expected[question as usize];
            assert_eq!(warm.usage.cached_tokens, whole, "{name}");
            assert_eq!((&warm.tokens, &warm.logprobs), (&expected.tokens, &expected.logprobs), "{name}");
            unload(model).await;
        }
        // A session is a prompt with a name.
        let model = load(cached.clone()).await;
        model.save_session("text", prompt(5)).await.unwrap();
        unload(model).await;
        let model = load(cached.clone()).await;
        let tokens = model.load_session("text").await.unwrap();
        assert_eq!(ask(&*model, &tokens).await.usage.cached_tokens, whole, "{name}");
        unload(model).await;

        flip_a_bit_of_each(folder.path());
        let model = load(cached.clone()).await;
        let found = ask(&*model, &prompt(0)).await;
        assert_eq!(found.usage.cached_tokens, 0, "{name}");
        assert_eq!((&found.tokens, &found.logprobs), (&expected[0].tokens, &expected[0].logprobs), "{name}");
        unload(model).await;
        let model = load(cached).await;
        assert_eq!(ask(&*model, &prompt(0)).await.usage.cached_tokens, whole, "{name}: written again");
        unload(model).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_memory_limit_counts_the_prompts_on_their_way() {
    let folder = tempfile::tempdir().unwrap();
    let limited = |cache: Option<&Path>| {
        let mut config = config(cache, "f32");
        config.memory_limit = Some(ByteSize(700_000_000));
        config.max_sequences = Some(2);
        config
    };
    let plain = load(limited(None)).await;
    let expected = ask(&*plain, &prompt(0)).await;
    let part = |model: &dyn LlmBackend, name: &str| {
        let plan = model.info().memory.clone().unwrap();
        plan.parts.iter().filter(|part| part.name.contains(name)).map(|part| part.bytes).sum::<u64>()
    };
    assert_eq!(part(&*plain, "between memory and disk"), 0);
    let first = load(limited(Some(folder.path()))).await;
    // One prompt in each direction, beside two sequences.
    assert_eq!(part(&*first, "between memory and disk"), part(&*first, "keys and values"));
    assert_eq!(ask(&*first, &prompt(0)).await.tokens, expected.tokens);
    unload(first).await;
    let second = load(limited(Some(folder.path()))).await;
    // They come from the disk one after the other.
    let prompts: Vec<_> = (0..6).map(prompt).collect();
    for answer in futures_util::future::join_all(prompts.iter().map(|prompt| ask(&*second, prompt))).await {
        assert!(answer.usage.cached_tokens >= 256, "{:?}", answer.usage);
    }
    let again = ask(&*second, &prompt(0)).await;
    assert_eq!((&again.tokens, &again.logprobs), (&expected.tokens, &expected.logprobs));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_is_found_and_the_rest_computed() {
    let folder = tempfile::tempdir().unwrap();
    let model = load(config(Some(folder.path()), "f32")).await;
    let expected = ask(&*model, &prompt(0)).await;
    unload(model).await;
    flip_a_bit_of_each(folder.path());
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
