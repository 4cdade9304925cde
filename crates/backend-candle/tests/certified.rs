//! The certified head: its leading logits are those of the exact head, whatever the tokens.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::path::{Path, PathBuf};

use ternion_backend_candle::{Decoder, DecoderOptions, HeadPrecision};
use ternion_core::{Completion, GenerateRequest, LlmBackend, ModelInfo, Sampling};
use ternion_engine::{
    CausalLm, ComputeThreads, Engine, EngineOptions, LogitsPrecision, LogitsWanted, SequenceInput,
};
use ternion_formats::Checkpoint;
use ternion_test_support::fixture;

/// Test models, those of the reference beside the repository included.
fn models() -> Vec<PathBuf> {
    let mut models: Vec<PathBuf> =
        ["ternion-tiny", "tiny-packed", "nano-packed", "llama-ternary", "gguf-llama/model.gguf"]
            .iter()
            .map(|name| fixture(name))
            .collect();
    if let Some(oracle) = std::env::var_os("TERNION_ORACLE") {
        let folders = std::fs::read_dir(oracle).unwrap().map(|entry| entry.unwrap().path());
        models.extend(folders.filter(|path| path.join("config.json").is_file()));
    }
    models.retain(|path| Checkpoint::open(path).is_ok());
    assert!(models.len() >= 5);
    models
}

fn decoder(path: &Path, head: HeadPrecision) -> Decoder {
    let checkpoint = Checkpoint::open(path).unwrap();
    let mut options = DecoderOptions::new(&checkpoint.spec);
    options.head = head;
    Decoder::new(checkpoint, &ComputeThreads::new(2), options).unwrap()
}

/// Rows of logits of all of `tokens`, `chunk` at a time.
fn logits(model: &mut Decoder, tokens: &[u32], chunk: usize, precision: LogitsPrecision) -> Vec<f32> {
    let sequence = model.new_sequence().unwrap();
    let (mut all, mut rows) = (Vec::new(), Vec::new());
    for tokens in tokens.chunks(chunk) {
        let input = SequenceInput::new(sequence, tokens, LogitsWanted::From(0)).with_precision(precision);
        model.forward(&[input], &mut rows).unwrap();
        all.append(&mut rows);
    }
    model.free(sequence);
    all
}

/// The KL divergence of the distributions that two rows of logits stand for.
fn divergence(expected: &[f32], found: &[f32]) -> f64 {
    let log_softmax = |row: &[f32]| {
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        row.iter().map(|x| f64::from(*x) - sum.ln()).collect::<Vec<f64>>()
    };
    let (expected, found) = (log_softmax(expected), log_softmax(found));
    expected.iter().zip(&found).map(|(p, q)| p.exp() * (p - q)).sum()
}

/// The indices of a row, the largest first, of equals the first.
fn order(row: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|a, b| row[*b].total_cmp(&row[*a]).then(a.cmp(b)));
    order
}

#[test]
fn leading_logits_are_those_of_the_exact_head() {
    for path in models() {
        let (mut exact, mut certified) =
            (decoder(&path, HeadPrecision::Exact), decoder(&path, HeadPrecision::Certified));
        let vocab = exact.vocab_size();
        let count = exact.context_length().min(96);
        let tokens: Vec<u32> = (0..count).map(|i| ((i * i * 31 + i * 7) % vocab) as u32).collect();
        let expected = logits(&mut exact, &tokens, 32, LogitsPrecision::Exact);
        assert_eq!(
            logits(&mut certified, &tokens, 32, LogitsPrecision::Exact),
            expected,
            "{}",
            path.display()
        );
        for leading in [1, 3, 64] {
            let found = logits(&mut certified, &tokens, 32, LogitsPrecision::Leading(leading));
            let alone = logits(&mut certified, &tokens, 1, LogitsPrecision::Leading(leading));
            assert!(found == alone, "{}: the batch changes logits", path.display());
            let (mut same, mut sum) = (0, 0.0);
            for (row, (found, expected)) in found.chunks(vocab).zip(expected.chunks(vocab)).enumerate() {
                let place = format!("{}, row {row}, the first {leading}", path.display());
                let leading = leading.min(vocab);
                assert_eq!(order(found)[..leading], order(expected)[..leading], "{place}");
                for id in &order(expected)[..leading] {
                    assert_eq!(found[*id], expected[*id], "{place}");
                }
                same += found.iter().zip(expected).filter(|(a, b)| a == b).count();
                sum += divergence(expected, found);
            }
            let divergence = sum / count as f64;
            // Tokens are drawn with 64 exact logits. The bound of a head in int8 is 4e-5.
            let least = if leading == 64 { 4e-5 } else { 1e-3 };
            assert!(divergence < least, "{}: the others are nearly exact, {divergence}", path.display());
            let share = same as f64 / found.len() as f64;
            let rows = share * vocab as f64;
            println!("{}: {rows:.1} of {vocab} exact, for {leading}; KL {divergence:.1e}", path.display());
            assert!(found != expected || share == 1.0);
        }
    }
}

/// On the trained model few rows have to be computed again.
#[test]
fn few_rows_are_candidates_in_a_trained_model() {
    let path = fixture("ternion-tiny");
    let (mut exact, mut certified) =
        (decoder(&path, HeadPrecision::Exact), decoder(&path, HeadPrecision::Certified));
    let tokenizer = Checkpoint::open(&path).unwrap().tokenizer().unwrap();
    let text = "How many days are in a week? There are seven days in a week. Hello! How can I help you?";
    let tokens = tokenizer.encode(text, true).unwrap();
    let expected = logits(&mut exact, &tokens, 32, LogitsPrecision::Exact);
    let found = logits(&mut certified, &tokens, 32, LogitsPrecision::Leading(1));
    let same = found.iter().zip(&expected).filter(|(a, b)| a == b).count();
    // Some are equal by chance.
    assert!(same < expected.len() / 4, "{same} of {}", expected.len());
}

/// Answers of each kind, of which none may depend on the head.
#[tokio::test]
async fn answers_are_those_of_the_exact_head() {
    for path in models() {
        let engine = |head| {
            let model = decoder(&path, head);
            let tokenizer = Checkpoint::open(&path).unwrap().tokenizer().unwrap();
            let mut info = ModelInfo::new("test", "candle");
            info.capabilities.batch_invariant = true;
            Engine::start(Box::new(model), tokenizer, EngineOptions::new(info)).unwrap()
        };
        let (exact, certified) = (engine(HeadPrecision::Exact), engine(HeadPrecision::Certified));
        let vocab = exact.info().limits.vocab_size as u32;
        for seed in 0..12 {
            let prompt: Vec<u32> = (0..8 + seed).map(|i| (i * i * 97 + i * 13 + seed * 41) % vocab).collect();
            let hot = Sampling::default().with_temperature(1.3).with_seed(u64::from(seed));
            let greedy = Sampling::greedy();
            for (sampling, logprobs) in [
                (greedy.clone(), false),
                (greedy.clone().with_repetition_penalty(1.3), false),
                (greedy.with_logit_bias(3, 2.0).with_presence_penalty(0.5), false),
                (hot.clone().with_top_k(5), false),
                (hot.clone().with_top_k(40).with_top_p(0.9), false),
                (hot, true),
            ] {
                let mut request =
                    GenerateRequest::new(prompt.clone()).with_sampling(sampling.clone()).with_max_tokens(24);
                request.params.ignore_eos = true;
                request.params.logprobs = logprobs;
                let ask = async |engine: &Engine| -> Completion {
                    engine.generate(request.clone()).await.unwrap().collect().await.unwrap()
                };
                let (expected, found) = (ask(&exact).await, ask(&certified).await);
                let place = format!("{}, {sampling:?}", path.display());
                assert_eq!((found.tokens, found.logprobs), (expected.tokens, expected.logprobs), "{place}");
            }
        }
    }
}
