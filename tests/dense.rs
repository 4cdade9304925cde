//! Dense families, by Ternion's own decoder and by candle-transformers: against transformers, which computes on the same values in
//! f32. The checkpoints are in `fixtures/dense`.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::SafeTensors;
use serde_json::Value;
use ternion::{
    Completion, Error, ErrorKind, GenerateRequest, LlmBackend, LlmBackendExt, LogitsRequest, Message,
    Sampling,
    config::{Config, ModelConfig},
};
use ternion_test_support::fixture;

/// What logits in f32 are held to, absolutely.
const TOLERANCE: f32 = 1e-3;

const FAMILIES: [&str; 7] = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"];
/// Those that have a GGUF file too.
const GGUF: [&str; 5] = ["llama", "qwen2", "qwen3", "gemma3", "phi3"];

/// A family's checkpoint and what transformers computes on it.
struct Golden {
    folder: PathBuf,
    ids: Vec<u32>,
    logits: Vec<f32>,
    greedy: Vec<u32>,
    /// Logits at the last positions, of the values in the GGUF file.
    gguf: Option<Vec<f32>>,
}

fn golden(family: &str) -> Golden {
    let folder = fixture("dense").join(family);
    let golden: Value = serde_json::from_slice(&std::fs::read(folder.join("golden.json")).unwrap()).unwrap();
    let file = std::fs::read(folder.join("golden.f32.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        let tensor = tensors.tensor(name).unwrap();
        tensor.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    let ids = |key: &str| -> Vec<u32> { serde_json::from_value(golden[key].clone()).unwrap() };
    let gguf = GGUF.contains(&family).then(|| floats("gguf.logits"));
    Golden { ids: ids("input_ids"), logits: floats("logits"), greedy: ids("greedy"), gguf, folder }
}

async fn try_load(path: &Path, change: impl FnOnce(&mut ModelConfig)) -> Result<Arc<dyn LlmBackend>, Error> {
    let mut config = ModelConfig::for_path(path);
    config.backend = "candle".into();
    change(&mut config);
    ternion::load(&Config::single("model", config), None).await
}

async fn load(path: &Path, change: impl FnOnce(&mut ModelConfig)) -> Arc<dyn LlmBackend> {
    try_load(path, change).await.unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn greedy_request(prompt: &[u32], count: usize) -> GenerateRequest {
    let request = GenerateRequest::new(prompt.to_vec()).with_max_tokens(count);
    let mut request = request.with_sampling(Sampling::greedy());
    request.params.ignore_eos = true;
    request
}

async fn greedy(model: &dyn LlmBackend, prompt: &[u32], count: usize) -> Completion {
    model.generate(greedy_request(prompt, count)).await.unwrap().collect().await.unwrap()
}

fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().all(|logit| logit.is_finite()));
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn argmax(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

#[tokio::test]
async fn logits_and_greedy_continuations_are_those_of_transformers() {
    for family in FAMILIES {
        let golden = golden(family);
        let model = load(&golden.folder, |_| {}).await;
        let vocab = model.info().limits.vocab_size;
        let logits = model.logits(LogitsRequest::new(golden.ids.clone())).await.unwrap();
        let found = difference(&logits, &golden.logits);
        println!("{family}: {found:.1e}, {}", model.info().format);
        assert!(found <= TOLERANCE, "{family}: {found}");
        for (ours, theirs) in logits.chunks_exact(vocab).zip(golden.logits.chunks_exact(vocab)) {
            assert_eq!(argmax(ours), argmax(theirs), "{family}");
        }
        let answer = greedy(&*model, &golden.ids, golden.greedy.len()).await;
        assert_eq!(answer.tokens, golden.greedy, "{family}");
    }
}

/// candle rounds activations to int8 for a quantised product, as llama.cpp does, and transformers does not.
#[tokio::test]
async fn quantised_files_are_close_to_their_values() {
    for family in GGUF {
        let golden = golden(family);
        let expected = golden.gguf.unwrap();
        let model = load(&golden.folder.join("q8_0.gguf"), |_| {}).await;
        let vocab = model.info().limits.vocab_size;
        let rows = expected.len() / vocab;
        let mut request = LogitsRequest::new(golden.ids.clone());
        request.start = golden.ids.len() - rows;
        let logits = model.logits(request).await.unwrap();
        let found = difference(&logits, &expected);
        println!("{family}: {found:.1e}, {}", model.info().format);
        // Gemma 3 is computed on decoded weights.
        let tolerance = if family == "gemma3" { TOLERANCE } else { 0.2 };
        assert!(found <= tolerance, "{family}: {found}");
        // Only tokens that are as close as that may change places.
        for (ours, theirs) in logits.chunks_exact(vocab).zip(expected.chunks_exact(vocab)) {
            let gap = theirs[argmax(theirs)] - theirs[argmax(ours)];
            assert!(gap <= 2.0 * found, "{family}: {gap}");
        }
    }
}

/// llama.cpp rounds in the same way. Only the order of additions differs, which moves an activation that lies near a tie to the next
/// step of the rounding, and with it the logits of its row and of those behind it.
#[cfg(feature = "llama-cpp")]
#[tokio::test]
async fn quantised_files_give_the_logits_of_llama_cpp() {
    for family in GGUF {
        let golden = golden(family);
        let file = golden.folder.join("q8_0.gguf");
        let logits = async |backend: &str| {
            let model = load(&file, |config| {
                config.backend = backend.to_owned();
                if backend == "llama-cpp" {
                    config.options.insert("kv_type".to_owned(), "f32".into());
                }
            });
            model.await.logits(LogitsRequest::new(golden.ids.clone())).await.unwrap()
        };
        let (ours, theirs) = (logits("candle").await, logits("llama-cpp").await);
        let vocab = ours.len() / golden.ids.len();
        let rows = ours.chunks_exact(vocab).zip(theirs.chunks_exact(vocab));
        let rows: Vec<f32> = rows.map(|(ours, theirs)| difference(ours, theirs)).collect();
        let same = rows.iter().filter(|difference| **difference <= TOLERANCE).count();
        let most = rows.iter().copied().fold(0.0, f32::max);
        println!("{family}: {same} of {} rows are the same, at most {most:.1e}", rows.len());
        // Gemma 3 is computed on decoded weights, and its activations are not rounded.
        let least = if family == "gemma3" { 0 } else { rows.len() / 2 };
        assert!(same >= least && most <= 0.3, "{family}: {rows:?}");
    }
}

fn files() -> impl Iterator<Item = (Golden, PathBuf)> {
    let folders = FAMILIES.iter().map(|family| (golden(family), golden(family).folder));
    let files = GGUF.iter().map(|family| (golden(family), golden(family).folder.join("q8_0.gguf")));
    folders.chain(files)
}

/// However tokens come into the KV cache: in chunks, behind a window, after an answer.
#[tokio::test]
async fn chunks_and_turns_change_nothing() {
    for (golden, path) in files() {
        let whole = load(&path, |_| {}).await;
        let expected = whole.logits(LogitsRequest::new(golden.ids.clone())).await.unwrap();
        let chunked = load(&path, |config| config.prefill_chunk = Some(5)).await;
        let found = chunked.logits(LogitsRequest::new(golden.ids.clone())).await.unwrap();
        assert!(difference(&found, &expected) <= TOLERANCE, "{}", path.display());

        // A second turn goes on behind the first answer.
        let first = greedy(&*chunked, &golden.ids, 4).await;
        let mut turn = [&golden.ids[..], &first.tokens].concat();
        turn.extend(&golden.ids[..7]);
        let continued = greedy(&*chunked, &turn, 6).await;
        assert!(continued.usage.cached_tokens >= golden.ids.len(), "{}", path.display());
        let anew = greedy(&*load(&path, |_| {}).await, &turn, 6).await;
        assert_eq!(continued.tokens, anew.tokens, "{}", path.display());
    }
}

/// Requests at the same time, more than the model has sequences, do not see each other.
#[tokio::test]
async fn requests_at_the_same_time_do_not_mix() {
    for (golden, path) in files() {
        let model = load(&path, |_| {}).await;
        let prompts: Vec<&[u32]> = (1..=6).map(|i| &golden.ids[..4 * i]).collect();
        let mut alone = Vec::new();
        for prompt in &prompts {
            alone.push(greedy(&*load(&path, |_| {}).await, prompt, 8).await.tokens);
        }
        let requests = prompts.iter().map(|prompt| model.generate(greedy_request(prompt, 8)));
        let mut streams = Vec::new();
        for request in requests {
            streams.push(request.await.unwrap());
        }
        for (stream, alone) in streams.into_iter().zip(alone) {
            assert_eq!(stream.collect().await.unwrap().tokens, alone, "{}", path.display());
        }
    }
}

#[tokio::test]
async fn a_chat_is_answered() {
    for family in ["qwen2", "gemma3"] {
        let model = load(&fixture("dense").join(family), |_| {}).await;
        let info = model.info();
        assert!(
            info.capabilities.chat && info.capabilities.score && !info.capabilities.prefix_reuse,
            "{info:?}"
        );
        let answer = model.chat(vec![Message::user("How many days are in a week?")]).await.unwrap();
        assert!(answer.usage.prompt_tokens > 5, "{answer:?}");
    }
}

#[tokio::test]
async fn what_candle_does_not_compute_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (family, key, value, kind, message) in [
        (
            "qwen2",
            "use_sliding_window",
            Value::from(true),
            ErrorKind::Unsupported,
            "`use_sliding_window` is true",
        ),
        ("qwen2", "num_hidden_layers", 1.into(), ErrorKind::Unsupported, "has no place"),
        ("qwen2", "num_hidden_layers", 3.into(), ErrorKind::InvalidModel, "the tensor is missing"),
        ("qwen2", "intermediate_size", 65.into(), ErrorKind::InvalidModel, "expected [65, 32]"),
        (
            "phi3",
            "rope_scaling",
            serde_json::json!({"type": "longrope"}),
            ErrorKind::Unsupported,
            "`longrope`",
        ),
        (
            "gemma2",
            "query_pre_attn_scalar",
            17.into(),
            ErrorKind::Unsupported,
            "`query_pre_attn_scalar` is 17",
        ),
        ("gemma3", "hidden_activation", "silu".into(), ErrorKind::Unsupported, "gelu_pytorch_tanh"),
        ("gemma3", "num_attention_heads", 3.into(), ErrorKind::InvalidModel, "a divisor of"),
    ] {
        let source = fixture("dense").join(family);
        let copy = folder.path().join(format!("{family}-{key}-{value}").replace(['{', '}', '"', ':'], ""));
        std::fs::create_dir(&copy).unwrap();
        for name in ["model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(source.join(name), copy.join(name)).unwrap();
        }
        let config = std::fs::read(source.join("config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&config).unwrap();
        config[key] = value;
        std::fs::write(copy.join("config.json"), config.to_string()).unwrap();
        let error = try_load(&copy, |_| {}).await.err().unwrap_or_else(|| panic!("{family} {key}: loaded"));
        assert!(error.kind() == kind && error.to_string().contains(message), "{family} {key}: {error}");
    }
}

#[tokio::test]
async fn settings_that_a_dense_model_does_not_have_are_refused() {
    let path = fixture("dense/qwen2/q8_0.gguf");
    let refused = async |change: fn(&mut ModelConfig), message: &str| {
        let error = try_load(&path, change).await.err().unwrap_or_else(|| panic!("{message}: loaded"));
        assert!(error.to_string().contains(message), "{error}");
    };
    refused(|c| c.max_sequences = Some(2), "one sequence at a time").await;
    refused(|c| c.context_length = Some(1000), "at most 128").await;
    refused(|c| drop(c.options.insert("head".to_owned(), "int8".into())), "options.head").await;
    refused(|c| drop(c.options.insert("activation".to_owned(), "relu2".into())), "options.activation").await;
    refused(|c| c.memory_limit = Some("1GB".parse().unwrap()), "memory_limit").await;
}

/// The backends that run a model, the best first.
fn chosen(path: &Path, change: impl FnOnce(&mut ModelConfig)) -> Vec<&'static str> {
    let mut config = ModelConfig::for_path(path);
    change(&mut config);
    let all = ternion::suitability(&Config::single("model", config), None).unwrap();
    all.into_iter().filter_map(|(name, judgement)| judgement.is_ok().then_some(name)).collect()
}

#[test]
fn the_backend_is_chosen_by_what_the_files_are() {
    let folder = tempfile::tempdir().unwrap();
    // An Ollama blob, and a folder with a GGUF file beside an adapter.
    let blob = folder.path().join("sha256-1f");
    std::fs::copy(fixture("dense/llama/q8_0.gguf"), &blob).unwrap();
    let mixed = folder.path().join("mixed");
    std::fs::create_dir(&mixed).unwrap();
    std::fs::copy(&blob, mixed.join("weights.gguf")).unwrap();
    std::fs::copy(fixture("dense/qwen3/model.safetensors"), mixed.join("adapter_model.safetensors")).unwrap();
    let is_compiled_in = |name: &&str| !ternion::missing_backends().any(|missing| missing == *name);
    for (path, expected) in [
        (fixture("nano-packed"), &["candle", "llama-cpp"][..]),
        (fixture("gguf-ternary/qwen3.gguf"), &["candle", "llama-cpp"]),
        (fixture("gguf-llama/model.gguf"), &["candle", "llama-cpp"]),
        (fixture("dense/mistral"), &["candle", "llama-cpp"]),
        (fixture("dense/qwen2"), &["candle"]),
        (fixture("dense/qwen2/q8_0.gguf"), &["llama-cpp", "candle"]),
        (blob, &["llama-cpp", "candle"]),
        (mixed, &["llama-cpp", "candle"]),
        (fixture("onnx/plain-f32"), &["onnx"]),
    ] {
        let expected: Vec<&str> = expected.iter().copied().filter(is_compiled_in).collect();
        assert_eq!(chosen(&path, |_| {}), expected, "{}", path.display());
    }
    let limited = chosen(&fixture("nano-packed"), |config| {
        config.options.insert("kv_type".to_owned(), "int8".into());
    });
    assert_eq!(limited, ["candle"], "llama.cpp has no such type");
}

#[tokio::test]
async fn the_default_loads_with_the_backend_that_it_chose() {
    let open = async |name: &str| ternion::open(fixture("dense").join(name)).await.unwrap();
    assert_eq!(open("gemma2").await.info().backend, "candle");
    let quantised = open("llama/q8_0.gguf").await.info().backend.clone();
    assert_eq!(quantised, if cfg!(feature = "llama-cpp") { "llama-cpp" } else { "candle" });

    let folder = tempfile::tempdir().unwrap();
    let unknown = folder.path().join("model");
    std::fs::create_dir(&unknown).unwrap();
    std::fs::copy(fixture("dense/llama/model.safetensors"), unknown.join("model.safetensors")).unwrap();
    std::fs::write(unknown.join("config.json"), r#"{"model_type": "gpt2"}"#).unwrap();
    let error = ternion::open(&unknown).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("`model_type` is `gpt2`"), "{error}");
}
