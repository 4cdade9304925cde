//! GGUF through candle: every checkpoint in `fixtures/`, and in the folder that `TERNION_ORACLE` names, gives the logits
//! of its safetensors form after conversion, and the tokens of its `tokenizer.json`.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use ternion::config::{Config, ModelConfig};
use ternion::formats::Checkpoint;
use ternion::formats::convert::{Options, Target, convert};
use ternion::text::Tokenizer;
use ternion::{LlmBackend, LogitsRequest};

/// The integer products are the same, and so is every float operation: nothing but rounding could differ.
const TOLERANCE: f32 = 1e-4;

fn checkpoints() -> Vec<PathBuf> {
    let mut roots = vec![ternion_test_support::fixtures()];
    roots.extend(ternion_test_support::oracle());
    let entries = roots.iter().flat_map(|root| std::fs::read_dir(root).unwrap());
    let mut found: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("golden.json").is_file() && path.join("config.json").is_file())
        .collect();
    found.sort();
    assert!(found.len() >= 5, "the fixtures are missing: {found:?}");
    found
}

async fn load(path: &Path) -> Arc<dyn LlmBackend> {
    let config = Config::single("model", ModelConfig::for_path(path));
    ternion::load(&config, None).await.unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn prompts(checkpoint: &Path) -> Vec<Vec<u32>> {
    let golden: Value =
        serde_json::from_slice(&std::fs::read(checkpoint.join("golden.json")).unwrap()).unwrap();
    let ids = |case: &Value| serde_json::from_value(case["input_ids"].clone()).unwrap();
    golden["cases"].as_array().unwrap().iter().map(ids).collect()
}

#[tokio::test]
async fn logits_are_those_of_safetensors() {
    let folder = tempfile::tempdir().unwrap();
    for path in checkpoints() {
        let original = load(&path).await;
        let checkpoint = Checkpoint::open(&path).unwrap();
        let mut targets = vec![Target::GgufI2s];
        if [checkpoint.spec.hidden_size, checkpoint.spec.intermediate_size]
            .iter()
            .all(|n| n.is_multiple_of(256))
        {
            targets.extend([Target::GgufTq1, Target::GgufTq2]);
        }
        for target in targets {
            let out = folder.path().join("model.gguf");
            let mut options = Options::new(target);
            options.overwrite = true;
            convert(&checkpoint, &out, &options, &mut |_, _| {}).unwrap();
            let model = load(&out).await;
            assert_eq!(model.info().limits.vocab_size, original.info().limits.vocab_size);
            let mut worst: f32 = 0.0;
            for ids in prompts(&path) {
                let expected = original.logits(LogitsRequest::new(ids.clone())).await.unwrap();
                let found = model.logits(LogitsRequest::new(ids)).await.unwrap();
                assert_eq!(found.len(), expected.len());
                let difference = |(a, b): (&f32, &f32)| (a - b).abs();
                worst = found.iter().zip(&expected).map(difference).fold(worst, f32::max);
            }
            println!("{} as {target}: {worst:.2e}", path.display());
            assert!(worst <= TOLERANCE, "{} as {target}: {worst}", path.display());
        }
    }
}

#[tokio::test]
async fn logits_of_a_quantised_embedding_are_those_of_its_values() {
    let folder = tempfile::tempdir().unwrap();
    let path = ternion_test_support::fixture("tiny-packed");
    let checkpoint = Checkpoint::open(&path).unwrap();
    for (name, embedding) in ternion::formats::convert::Embedding::ALL {
        let quantised = folder.path().join(format!("{name}.gguf"));
        let mut options = Options::new(Target::GgufI2s);
        options.embedding = Some(embedding);
        convert(&checkpoint, &quantised, &options, &mut |_, _| {}).unwrap();
        // The same values, written out as singles.
        let singles = folder.path().join(format!("{name}-f32"));
        let read = Checkpoint::open(&quantised).unwrap();
        convert(&read, &singles, &Options::new(Target::Safetensors), &mut |_, _| {}).unwrap();
        let ids = prompts(&path).swap_remove(0);
        let a = load(&quantised).await.logits(LogitsRequest::new(ids.clone())).await.unwrap();
        let b = load(&singles).await.logits(LogitsRequest::new(ids)).await.unwrap();
        let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= TOLERANCE, "{name}: {worst}");
    }
}

/// Texts with spaces, digits, several scripts, emoji and code.
const CORPUS: [&str; 24] = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces   three    four     ",
    "\ttab\n\nlines\r\nand\r\n\r\n  indented\n",
    "1 12 123 1234 12345 3.14159 1,000,000 0x7fff 1e-9",
    "It's they're I'VE we'll don'T 'S 's",
    "Größe, naïve café, Ærøskøbing, Łódź, İstanbul",
    "Привет, мир! Съешь ещё этих мягких французских булок.",
    "Καλημέρα κόσμε",
    "こんにちは世界。カタカナ、漢字。",
    "你好，世界！人工智能２０２４",
    "안녕하세요 세계",
    "مرحبا بالعالم ١٢٣٤",
    "שלום עולם",
    "नमस्ते दुनिया १२३",
    "สวัสดีชาวโลก",
    "🙂👍🏽👩‍👩‍👧‍👦🇩🇪 and text",
    "e\u{301} \u{200d}\u{feff}\u{a0}\u{2003}x\u{0}",
    "fn main() {\n    println!(\"{}\", x >>= 2 && !y); // comment\n}\n",
    "def f(x):\n\treturn [i**2 for i in range(10) if i % 2 == 0]\n",
    "<|begin_of_text|>User: hi<|eot_id|>Assistant: <|reserved_special_token_3|> <|eot_id",
    "https://example.org/a/b?c=d&e=%20f#g user@example.com",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa the the the THE The",
];

fn assert_same_tokens(a: &Tokenizer, b: &Tokenizer, place: &str) {
    for text in CORPUS {
        for special in [false, true] {
            let expected = a.encode(text, special).unwrap();
            assert_eq!(b.encode(text, special).unwrap(), expected, "{place}: {text:?}");
            assert_eq!(
                b.decode(&expected, false).unwrap(),
                a.decode(&expected, false).unwrap(),
                "{place}: {text:?}"
            );
        }
        assert_eq!(b.encode_plain(text).unwrap(), a.encode_plain(text).unwrap(), "{place}: {text:?}");
    }
    assert_eq!((a.bos_id(), a.eos_id()), (b.bos_id(), b.eos_id()), "{place}");
    for id in 0..a.vocab_size() as u32 {
        assert_eq!(a.token(id), b.token(id), "{place}: {id}");
        assert_eq!(a.is_special(id), b.is_special(id), "{place}: {id}");
    }
}

#[test]
fn tokens_are_those_of_the_tokenizer_json() {
    let folder = tempfile::tempdir().unwrap();
    for path in checkpoints() {
        let checkpoint = Checkpoint::open(&path).unwrap();
        let out = folder.path().join("model.gguf");
        let mut options = Options::new(Target::GgufI2s);
        options.overwrite = true;
        convert(&checkpoint, &out, &options, &mut |_, _| {}).unwrap();
        let file = ternion::formats::gguf::File::open(&out).unwrap();
        assert!(file.value("tokenizer.huggingface.json").is_none(), "{}: it is not needed", path.display());
        let read = Checkpoint::open(&out).unwrap().tokenizer().unwrap();
        assert_same_tokens(&checkpoint.tokenizer().unwrap(), &read, &path.display().to_string());
    }
}

/// Meta's vocabulary of 128256 tokens, which may not be in this repository.
#[test]
fn tokens_of_the_official_tokenizer() {
    let Some(oracle) = ternion_test_support::oracle() else {
        // Past the harness, which would keep it to itself; `cargo xtask test` counts these lines.
        let mut stdout = std::io::stdout();
        writeln!(stdout, "skipped: TERNION_ORACLE is not set").unwrap();
        return;
    };
    let official = oracle.join("official");
    let folder = tempfile::tempdir().unwrap();
    // A small model with the official vocabulary.
    let mut shape = ternion::formats::synth::Shape::named("nano").unwrap();
    shape.vocab_size = 128_256;
    let model = folder.path().join("model");
    ternion::formats::synth::write(&model, &shape, 1, &mut |_, _| {}).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        std::fs::copy(official.join(name), model.join(name)).unwrap();
    }
    let checkpoint = Checkpoint::open(&model).unwrap();
    let out = folder.path().join("model.gguf");
    convert(&checkpoint, &out, &Options::new(Target::GgufI2s), &mut |_, _| {}).unwrap();
    let read = Checkpoint::open(&out).unwrap();
    let file = ternion::formats::gguf::File::open(&out).unwrap();
    assert!(file.value("tokenizer.huggingface.json").is_none(), "it is not needed");
    let (a, b) = (checkpoint.tokenizer().unwrap(), read.tokenizer().unwrap());
    assert_same_tokens(&a, &b, "official");
    let golden: Value =
        serde_json::from_slice(&std::fs::read(official.join("tokenizer_golden.json")).unwrap()).unwrap();
    for case in golden["text"].as_array().unwrap() {
        let expected: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(b.encode(case["text"].as_str().unwrap(), true).unwrap(), expected, "{}", case["text"]);
    }
    for case in golden["chat"].as_array().unwrap() {
        let messages: Vec<ternion::Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        let prompt = case["add_generation_prompt"].as_bool().unwrap();
        assert_eq!(b.render_chat(&messages, prompt).unwrap(), case["rendered"].as_str().unwrap());
    }
}
