//! Checkpoints and GGUF files through llama.cpp, held to what transformers and a reference in double precision compute.
//!
//! Ternary products and the head are the same kernels as candle's; llama.cpp adds norms, rotary embedding and attention in
//! its own order of additions. With a KV cache of single-precision floats nothing is rounded that transformers does not
//! round, so strict cases, in which no activation lies near a rounding tie of the int8 quantisation, agree to the same 1e-3.
//! A cache of f16 rounds each key and value to 11 bits, a relative 2^-12, and one of q8_0 to half a step of 1/127 of the
//! largest of 32; that moves activations by far more than the distance that makes a case strict, so single activations
//! are rounded to the neighbouring step, as they are wherever a case is not strict.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

#[path = "oracle/cases.rs"]
mod cases;

use std::{path::Path, sync::Arc};

use cases::{Case, argmax, cases, checkpoints, ids, largest_difference};
use serde_json::{Value, json};
use ternion::{
    Completion, Error, ErrorKind, FinishReason, GenerateRequest, LlmBackend, LlmBackendExt, LogitsRequest,
    Sampling,
    config::{Config, ModelConfig},
    formats::{
        Checkpoint,
        convert::{Options, Target, convert},
    },
};
use ternion_test_support::fixture;

/// What strict cases are held to with a KV cache of floats, absolutely.
const TOLERANCE: f32 = 1e-3;

async fn try_load(path: &Path, change: impl FnOnce(&mut ModelConfig)) -> Result<Arc<dyn LlmBackend>, Error> {
    let mut config = ModelConfig::for_path(path);
    config.backend = "llama-cpp".into();
    config.threads = Some(1); // tests run side by side
    change(&mut config);
    ternion::load(&Config::single("model", config), None).await
}

async fn load(path: &Path, change: impl FnOnce(&mut ModelConfig)) -> Arc<dyn LlmBackend> {
    try_load(path, change).await.unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn option(config: &mut ModelConfig, key: &str, value: impl Into<Value>) {
    config.options.insert(key.to_owned(), value.into());
}

async fn greedy(model: &dyn LlmBackend, prompt: Vec<u32>, count: usize) -> Completion {
    let mut request = GenerateRequest::new(prompt).with_max_tokens(count).with_sampling(Sampling::greedy());
    request.params.ignore_eos = true;
    model.generate(request).await.unwrap().collect().await.unwrap()
}

/// Of every family: squared ReLU and SiLU, with and without sub-norms, packed and float masters.
#[tokio::test]
async fn logits_are_those_of_transformers() {
    let mut strict = 0;
    for checkpoint in checkpoints() {
        let model = load(&checkpoint, |c| c.threads = Some(2)).await;
        let vocab = model.info().limits.vocab_size;
        for case in cases(&checkpoint) {
            let logits = model.logits(LogitsRequest::new(case.ids.clone())).await.unwrap();
            let difference = largest_difference(&logits, &case.logits);
            let place = format!("{} {}", checkpoint.display(), case.name);
            println!("{place}: difference {difference:.2e}, strict {}", case.strict);
            if case.strict {
                strict += 1;
                assert!(difference <= TOLERANCE, "{place}: {difference}");
                for (ours, theirs) in logits.chunks_exact(vocab).zip(case.logits.chunks_exact(vocab)) {
                    assert_eq!(argmax(ours), argmax(theirs), "{place}: the most probable token differs");
                }
            }
        }
    }
    assert!(strict >= 30, "only {strict} strict cases");
}

#[tokio::test]
async fn greedy_continuations_are_those_of_transformers() {
    for checkpoint in checkpoints() {
        let model = load(&checkpoint, |_| {}).await;
        for case in cases(&checkpoint).iter().filter(|c| c.strict && c.golden["greedy_strict"] == true) {
            let expected = ids(&case.golden["greedy_f32"]);
            let answer = greedy(&*model, case.ids.clone(), expected.len()).await;
            assert_eq!(answer.tokens, expected, "{} {}", checkpoint.display(), case.name);
        }
    }
}

/// A key or value in f16 is off by a relative 2^-12, in q8_0 by up to 1/254 of the largest of 32. What attention makes of
/// that moves some activations to the neighbouring step of their int8 quantisation, and a step here is enough for further
/// ones in the layers behind. So the logits differ by what that quantisation itself costs: 0.03 to 0.05 of them against
/// activations in floats, up to 0.06 between two schemes of int8, whichever of two tokens is ahead where they are close.
#[tokio::test]
async fn smaller_kv_caches_come_close() {
    for (kv_type, tolerance) in [("f16", 0.05), ("q8_0", 0.1)] {
        let (mut worst, mut total, mut same) = (0.0f32, 0, 0);
        for checkpoint in checkpoints() {
            let model = load(&checkpoint, |c| option(c, "kv_type", kv_type)).await;
            let vocab = model.info().limits.vocab_size;
            for case in cases(&checkpoint).iter().filter(|c| c.strict) {
                let logits = model.logits(LogitsRequest::new(case.ids.clone())).await.unwrap();
                let distance = distance(&case.logits, &logits);
                worst = worst.max(distance);
                let place = format!("{} {} {kv_type}", checkpoint.display(), case.name);
                assert!(distance <= tolerance, "{place}: {distance}");
                for (ours, theirs) in logits.chunks_exact(vocab).zip(case.logits.chunks_exact(vocab)) {
                    total += 1;
                    same += usize::from(argmax(ours) == argmax(theirs));
                }
            }
        }
        println!(
            "{kv_type}: distance up to {worst:.1e}, the same most probable token in {same} of {total} places"
        );
        assert!(same * 100 >= total * 95, "{kv_type}: {same} of {total}");
    }
}

/// The root mean square of the difference, relative to that of `a`.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    let difference: f32 = a.iter().zip(b).map(|(x, y)| (x - y) * (x - y)).sum();
    (difference / a.iter().map(|x| x * x).sum::<f32>()).sqrt()
}

/// However the prompt comes into the KV cache, the logits are the same but for the order of additions in attention. Only
/// cases whose activations are known to be some units in the last place of a float away from a rounding tie: ggml multiplies
/// one token by another routine than several, and a single unit decides a tie that is nearer.
#[tokio::test]
async fn chunks_and_kept_prefixes_change_nothing() {
    /// In steps of the quantisation: 4 units in the last place of its largest values.
    const MARGIN: f64 = 4.0 * 64.0 * f32::EPSILON as f64;
    let mut compared = 0;
    for checkpoint in checkpoints() {
        let cases = cases(&checkpoint);
        let apart =
            |case: &&Case| case.strict && case.golden["min_margin"].as_f64().is_some_and(|m| m >= MARGIN);
        for case in cases.iter().filter(|c| c.ids.len() > 8).filter(apart) {
            compared += 1;
            let place = format!("{} {}", checkpoint.display(), case.name);
            for chunk in [1, 3, 64] {
                let model = load(&checkpoint, |c| {
                    c.prefill_chunk = Some(chunk);
                })
                .await;
                let logits = model.logits(LogitsRequest::new(case.ids.clone())).await.unwrap();
                let difference = largest_difference(&logits, &case.logits);
                println!("{place}: chunks of {chunk}: {difference:.1e}");
                assert!(difference <= TOLERANCE, "{place}: chunks of {chunk}: {difference}");
            }
            let model = load(&checkpoint, |_| {}).await;
            let half = case.ids.len() / 2;
            let vocab = model.info().limits.vocab_size;
            model.logits(LogitsRequest::new(case.ids[..half].to_vec())).await.unwrap();
            let rest = model.logits(LogitsRequest::new(case.ids.clone()).with_start(half)).await.unwrap();
            assert_eq!(model.stats().cached_tokens, half as u64, "{place}: the prefix was computed again");
            let difference = largest_difference(&rest, &case.logits[half * vocab..]);
            assert!(difference <= TOLERANCE, "{place}: on a reused prefix: {difference}");
        }
    }
    assert!(compared >= 10, "only {compared} cases");
}

#[tokio::test]
async fn conversations_at_the_same_time_do_not_disturb_each_other() {
    let checkpoint = fixture("nano-packed");
    let model = load(&checkpoint, |_| {}).await;
    let cases = cases(&checkpoint);
    let case = cases.iter().find(|c| c.strict && c.golden["greedy_strict"] == true).unwrap();
    let expected = ids(&case.golden["greedy_f32"]);
    let mut tasks = Vec::new();
    for i in 0..6 {
        let (model, prompt, count) = (Arc::clone(&model), case.ids.clone(), expected.len());
        tasks.push(tokio::spawn(async move {
            if i % 2 == 0 {
                greedy(&*model, prompt, count).await.tokens
            } else {
                model.complete(&format!("text number {i}"), 9).await.unwrap().tokens
            }
        }));
    }
    for (i, task) in tasks.into_iter().enumerate() {
        let tokens = task.await.unwrap();
        assert!(i % 2 == 1 || tokens == expected, "{i}");
    }
}

#[tokio::test]
async fn the_context_of_the_configuration_is_the_limit() {
    let model = load(&fixture("nano-packed"), |c| c.context_length = Some(32)).await;
    assert_eq!(model.info().limits.context_length, 32);
    let error = model.complete(&"word ".repeat(100), 5).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ContextOverflow);
    let end = greedy(&*model, vec![5; 30], 10).await;
    assert_eq!(end.finish_reason, FinishReason::ContextFull);
}

/// Two conversations that together are longer than the cache: the second pushes the first one's leftovers out.
#[tokio::test]
async fn a_full_cache_forgets_idle_conversations() {
    let model = load(&fixture("nano-packed"), |c| c.context_length = Some(256)).await;
    for first in [10, 20, 30] {
        let prompt: Vec<u32> = (0..200).map(|i| (first + i * 7) % 300).collect();
        let answer = greedy(&*model, prompt, 8).await;
        assert_eq!(answer.tokens.len(), 8);
    }
}

#[tokio::test]
async fn sizes_that_would_end_the_process_are_refused() {
    let refused =
        async |change: &dyn Fn(&mut ModelConfig)| match try_load(&fixture("nano-packed"), change).await {
            Ok(_) => panic!("an error is expected"),
            Err(error) => error.to_string(),
        };
    for (key, value, expected) in [
        ("kv_type", json!("i8"), "kv_type"),
        ("kv_typo", json!("f16"), "kv_typo"),
        ("cache_tokens", json!(31), "cache_tokens: 31 is out of range"),
        ("cache_tokens", json!(1 << 30), "cache_tokens: 1073741824 is out of range"),
    ] {
        let error = refused(&|c| option(c, key, value.clone())).await;
        assert!(error.contains(expected), "{error}");
    }
    let error = refused(&|c| c.context_length = Some(1 << 30)).await;
    assert!(error.contains("context_length: 1073741824 is out of range"), "{error}");
    let error = refused(&|c| c.context_length = Some(8)).await;
    assert!(error.contains("context_length: 8 is out of range; at least 32"), "{error}");
    let error = refused(&|c| c.max_sequences = Some(257)).await;
    assert!(error.contains("max_sequences: 257 is out of range; 1 to 256"), "{error}");
    let error = refused(&|c| {
        option(c, "kv_type", "q8_0");
        option(c, "flash_attention", false);
    })
    .await;
    assert!(error.contains("q8_0 needs `flash_attention`"), "{error}");

    // More threads than cores would wait for each other for hours.
    let model = load(&fixture("nano-packed"), |c| c.threads = Some(1024)).await;
    assert_eq!(greedy(&*model, vec![1, 2, 3], 4).await.tokens.len(), 4);
}

#[tokio::test]
async fn what_cannot_be_loaded_says_why() {
    let error = try_load(Path::new("no/such/model.gguf"), |_| {}).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let error = try_load(Path::new("no/such/folder"), |_| {}).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let error = try_load(Path::new("x"), |c| c.path = None).await.err().unwrap();
    assert!(error.to_string().contains("has no `path`"), "{error}");

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.gguf");
    std::fs::write(&file, b"GGML and more").unwrap();
    let error = try_load(&file, |_| {}).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidModel);
    assert!(error.to_string().contains("expected `GGUF`"), "{error}");
    assert!(error.to_string().contains("model.gguf"), "{error}");

    // Whole for Ternion's check, but not for llama.cpp, whose words are passed on.
    let mut bytes = std::fs::read(fixture("gguf-llama").join("model.gguf")).unwrap();
    for i in 0..bytes.len() - 6 {
        if bytes[i..].starts_with(b"llama.") || bytes[i..].starts_with(b"llama\x14") {
            bytes[i + 1] = b'h';
        }
    }
    std::fs::write(&file, bytes).unwrap();
    let error = try_load(&file, |_| {}).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidModel);
    assert!(error.to_string().contains("unknown model architecture: 'lhama'"), "{error}");
}

/// Ternary GGUF files are read by Ternion, and no differently computed than what they were made of.
#[tokio::test]
async fn ternary_gguf_files_run_in_the_same_arithmetic() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.gguf");
    let mut strict = 0;
    for path in checkpoints() {
        let mut options = Options::new(Target::GgufI2s);
        options.overwrite = true;
        convert(&Checkpoint::open(&path).unwrap(), &file, &options, &mut |_, _| {}).unwrap();
        let model = load(&file, |_| {}).await;
        assert!(model.info().format.contains("I2_S"), "{}", model.info().format);
        for case in cases(&path).iter().filter(|c| c.strict) {
            strict += 1;
            let logits = model.logits(LogitsRequest::new(case.ids.clone())).await.unwrap();
            let difference = largest_difference(&logits, &case.logits);
            assert!(difference <= TOLERANCE, "{} {}: {difference}", path.display(), case.name);
        }
    }
    assert!(strict >= 30, "only {strict} strict cases");
}

/// Ternary files that llama.cpp computes as well: of Qwen3, and with another scale in each block. The golden logits have llama.cpp's rounding of activations to 8 bits in them; a cache of f16 would add its own.
#[tokio::test]
async fn ternary_gguf_files_of_other_models_run_in_llama_cpps_arithmetic() {
    let golden: Value =
        serde_json::from_slice(&std::fs::read(fixture("gguf-ternary").join("golden.json")).unwrap()).unwrap();
    let prompt = ids(&golden["input_ids"]);
    for (name, architecture) in [("qwen3", "qwen3"), ("llama-scales", "llama")] {
        let expected: Vec<Vec<f32>> = serde_json::from_value(golden[name].clone()).unwrap();
        let model = load(&fixture("gguf-ternary").join(format!("{name}.gguf")), |c| {
            option(c, "kv_type", "f32");
            option(c, "arithmetic", "llama-cpp");
        })
        .await;
        let info = model.info();
        assert_eq!((&*info.architecture, info.limits.context_length), (architecture, 128));
        assert!(info.format.contains("TQ2_0"), "{}", info.format);
        let logits = model.logits(LogitsRequest::new(prompt.clone())).await.unwrap();
        let difference = largest_difference(&logits, &expected.concat());
        println!("{name}: difference {difference:.2e}");
        // The logits have a deviation of 1.6.
        assert!(difference <= 0.01, "{name}: {difference}");

        // Ternion's arithmetic, which does not round that much, is near, and the same in both engines.
        let path = fixture("gguf-ternary").join(format!("{name}.gguf"));
        let ours = load(&path, |_| {}).await.logits(LogitsRequest::new(prompt.clone())).await.unwrap();
        let candle = load(&path, |c| c.backend = "candle".into()).await;
        let candle = candle.logits(LogitsRequest::new(prompt.clone())).await.unwrap();
        let (near, same) =
            (largest_difference(&ours, &expected.concat()), largest_difference(&ours, &candle));
        println!("{name}: {near:.2e} from llama.cpp's, {same:.2e} from candle's");
        // llama.cpp rounds activations to int8 in blocks of 256, which moved the farthest of 5120 logits by 0.10.
        assert!(near <= 0.2 && same <= TOLERANCE, "{name}: {near} {same}");
    }
}

/// A GGUF file of a dense model, written by the Python package `gguf`, by llama.cpp's own loader and arithmetic. Its
/// products round activations to f16, a relative 2^-12 for each; the logits, up to 11, are sums over some of those.
#[tokio::test]
async fn other_gguf_models_run() {
    let golden: Value =
        serde_json::from_slice(&std::fs::read(fixture("gguf-llama").join("golden.json")).unwrap()).unwrap();
    let prompt = ids(&golden["input_ids"]);
    let expected: Vec<Vec<f32>> = serde_json::from_value(golden["logits"].clone()).unwrap();
    let model = load(&fixture("gguf-llama").join("model.gguf"), |_| {}).await;
    let info = model.info();
    assert_eq!((info.architecture.as_str(), info.limits.vocab_size), ("llama", 320));
    assert_eq!(info.limits.context_length, 256);
    assert!(info.format.starts_with("GGUF (llama"), "{}", info.format);
    let logits = model.logits(LogitsRequest::new(prompt.clone())).await.unwrap();
    let difference = largest_difference(&logits, &expected.concat());
    println!("difference {difference:.2e}");
    assert!(difference <= 0.02, "{difference}");
    for (ours, theirs) in logits.chunks_exact(320).zip(&expected) {
        assert_eq!(argmax(ours), argmax(theirs));
    }
    let answer = greedy(&*model, prompt, 5).await;
    assert_eq!(answer.tokens[0] as usize, argmax(&expected[24]));
    let answer = model.complete("How many days", 6).await.unwrap();
    assert!(answer.usage.completion_tokens > 0);

    // The file alone, with the tokenizer that is in it.
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(fixture("gguf-llama").join("model.gguf"), folder.path().join("alone.gguf")).unwrap();
    let alone = load(folder.path(), |_| {}).await;
    let tokens =
        |model: &Arc<dyn LlmBackend>| model.tokenizer().unwrap().encode("How many days?", true).unwrap();
    assert_eq!(tokens(&alone), tokens(&model));
}
