//! Tokenizers out of GGUF metadata against the ids of llama.cpp, for every rule that it knows by name and for metadata
//! that leaves things out.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};
use ternion_core::ErrorKind;
use ternion_core::text::Tokenizer;
use ternion_formats::gguf::{Array, File, Writer, end_tokens, tokenizer_parts};
use ternion_formats::{CheckpointOptions, SharedBytes};

#[derive(Deserialize)]
struct Fixture {
    vocabularies: BTreeMap<String, Vocabulary>,
    texts: Vec<String>,
    rules: Vec<Rule>,
    bos: Map<String, Value>,
    chat: Vec<String>,
    cases: Vec<Case>,
}

#[derive(Deserialize, Clone)]
struct Vocabulary {
    model: String,
    tokens: Vec<String>,
    types: Vec<i32>,
    merges: Option<Vec<String>>,
    scores: Option<Vec<f32>>,
}

/// Names that all give the same ids; null is a file without a name.
#[derive(Deserialize)]
struct Rule {
    names: Vec<Option<String>>,
    prompt: Vec<Vec<u32>>,
}

#[derive(Deserialize)]
struct Case {
    vocabulary: String,
    #[serde(default)]
    extra: Vec<String>,
    keys: Map<String, Value>,
    prompt: Vec<Vec<u32>>,
    text: Vec<Vec<u32>>,
    ends: Vec<u32>,
}

fn fixture() -> Fixture {
    let path = ternion_test_support::fixture("gguf-tokenizers/cases.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn bytes(vocabulary: &Vocabulary, keys: &Map<String, Value>) -> Vec<u8> {
    let mut writer = Writer::new();
    writer.set("general.architecture", "llama");
    writer.set("tokenizer.ggml.model", vocabulary.model.as_str());
    let strings = |list: &[String]| Array::strings(list.iter().map(String::as_str));
    writer.set("tokenizer.ggml.tokens", strings(&vocabulary.tokens));
    writer.set("tokenizer.ggml.token_type", Array::i32s(&vocabulary.types));
    if let Some(merges) = &vocabulary.merges {
        writer.set("tokenizer.ggml.merges", strings(merges));
    }
    if let Some(scores) = &vocabulary.scores {
        writer.set("tokenizer.ggml.scores", Array::f32s(scores));
    }
    for (key, value) in keys {
        match value {
            Value::Bool(flag) => writer.set(key, *flag),
            Value::Number(number) => writer.set(key, u32::try_from(number.as_u64().unwrap()).unwrap()),
            text => writer.set(key, text.as_str().unwrap()),
        }
    }
    writer.begin(Vec::new()).unwrap().finish().unwrap()
}

fn file(vocabulary: &Vocabulary, keys: &Map<String, Value>) -> File {
    File::parse(&SharedBytes::from(bytes(vocabulary, keys)), "tokenizer.gguf").unwrap()
}

fn tokenizer(vocabulary: &Vocabulary, keys: &Map<String, Value>) -> Tokenizer {
    Tokenizer::from_parts(tokenizer_parts(&file(vocabulary, keys)).unwrap()).unwrap()
}

/// Whether llama.cpp's rule differs on this text from the one of the models' own `tokenizer.json` files, which counts. Its
/// regular expressions have no marks and no case in these rules, and its groups of digits do not end at letters.
fn is_approximated(rule: &str, text: &str) -> bool {
    let has_marks = text.chars().any(|c| ('\u{900}'..'\u{e80}').contains(&c));
    match rule {
        "tekken" | "gpt-4o" | "llama4" | "kanana2" | "talkie" | "minimax-m2" | "kimi-k2" => has_marks,
        "tiny_aya" | "cohere2moe" => text.contains("x1y") || text.contains("1314151"),
        _ => false,
    }
}

#[test]
fn every_rule_splits_as_in_llama_cpp() {
    let fixture = fixture();
    let vocabulary = &fixture.vocabularies["bytes"];
    let mut seen = 0;
    let mut wrong = Vec::new();
    // bitnet.cpp's name for the same rule.
    let ours = [Some("falcon_e".to_owned())];
    for rule in &fixture.rules {
        let is_llama3 = rule.names.contains(&Some("llama-bpe".to_owned()));
        for name in rule.names.iter().chain(ours.iter().filter(|_| is_llama3)) {
            let mut keys = fixture.bos.clone();
            if let Some(name) = name {
                keys.insert("tokenizer.ggml.pre".into(), name.as_str().into());
            }
            let tokenizer = tokenizer(vocabulary, &keys);
            let shown = name.as_deref().unwrap_or("none");
            for (text, expected) in fixture.texts.iter().zip(&rule.prompt) {
                let ids = tokenizer.encode(text, true).unwrap();
                if ids != *expected && !is_approximated(shown, text) {
                    let shown_ids = |ids: &[u32]| {
                        ids.iter().map(|&id| tokenizer.token(id).unwrap()).collect::<Vec<_>>().join("|")
                    };
                    wrong.push(format!("{shown}: {text:?}: {} for {}", shown_ids(&ids), shown_ids(expected)));
                }
            }
            assert_eq!(tokenizer.warnings().is_empty(), name.is_some(), "{shown}");
            seen += 1;
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert!(seen > 80, "{seen} names");
}

#[test]
fn what_metadata_leaves_out_is_as_in_llama_cpp() {
    let fixture = fixture();
    for case in &fixture.cases {
        let mut vocabulary = fixture.vocabularies[&case.vocabulary].clone();
        vocabulary.tokens.extend(case.extra.iter().cloned());
        vocabulary.types.resize(vocabulary.tokens.len(), 1);
        let tokenizer = tokenizer(&vocabulary, &case.keys);
        for (index, text) in fixture.chat.iter().enumerate() {
            let shown = format!("{:?} {:?}: {text:?}", case.keys, case.extra);
            assert_eq!(tokenizer.encode(text, true).unwrap(), case.prompt[index], "{shown}");
            assert_eq!(tokenizer.encode_plain(text).unwrap(), case.text[index], "as text, {shown}");
        }
        let mut ends = end_tokens(&file(&vocabulary, &case.keys), vocabulary.tokens.len()).unwrap();
        ends.sort_unstable();
        assert_eq!(ends, case.ends, "{:?} {:?}", case.keys, case.extra);
    }
}

#[test]
fn what_cannot_be_read_is_said_shortly() {
    let fixture = fixture();
    let vocabulary = &fixture.vocabularies["bytes"];
    for model in ["t5", "rwkv", "plamo2", "bert", "gemma4", "new"] {
        let vocabulary = Vocabulary { model: model.to_owned(), ..vocabulary.clone() };
        let error = tokenizer_parts(&file(&vocabulary, &Map::new())).unwrap_err();
        let text = error.to_string();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{text}");
        assert!(text.contains(model) && text.contains("tokenizer.json") && text.len() < 300, "{text}");
    }
    let keys = [("tokenizer.ggml.pre".to_owned(), "no-such-rule".into())].into_iter().collect();
    let error = tokenizer_parts(&file(vocabulary, &keys)).unwrap_err();
    let text = error.to_string();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{text}");
    assert!(text.contains("no-such-rule") && text.contains("tokenizer.json") && text.len() < 300, "{text}");
}

#[test]
fn options_decide_what_metadata_leaves_out() {
    let fixture = fixture();
    let vocabulary = &fixture.vocabularies["bytes"];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes(vocabulary, &Map::new())).unwrap();
    let open = |options: CheckpointOptions| Tokenizer::from_parts(options.tokenizer_parts(&path)?);
    let with = |options| open(options).unwrap();
    let options = CheckpointOptions::default;
    // Without options: the rule `default`, and the token 11 ends an answer, which is none that should.
    let warnings = with(options()).warnings().join("\n");
    assert!(warnings.contains("`pre_tokenizer` decides") && warnings.contains("eos_token_id"), "{warnings}");

    let keys = [("tokenizer.ggml.pre".to_owned(), "qwen2".into())].into_iter().collect();
    let named = tokenizer(vocabulary, &keys);
    let text = &fixture.texts[5];
    let ids = with(options().with_pre_tokenizer("qwen2")).encode(text, true).unwrap();
    assert_eq!(ids, named.encode(text, true).unwrap());
    assert_ne!(ids, with(options()).encode(text, true).unwrap());
    let error = open(options().with_pre_tokenizer("nope")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    assert!(error.to_string().contains("pre_tokenizer: `nope`"), "{error}");

    let around = |options| with(options).added_around().0.to_vec();
    assert!(around(options()).is_empty());
    assert_eq!(around(options().with_add_bos(true)), [11]);
    assert_eq!(around(options().with_add_bos(true).with_bos(20)), [20]);
    assert!(around(options().with_bos(20)).is_empty());
    assert_eq!(around(options().with_pre_tokenizer("llama-bpe").with_bos(20)), [20]);
    assert!(around(options().with_pre_tokenizer("llama-bpe").with_add_bos(false)).is_empty());
}
