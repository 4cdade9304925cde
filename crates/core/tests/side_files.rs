//! Folders of a tokenizer whose side files name tokens, against ids, roles and prompts of transformers.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::{collections::BTreeMap, fs};

use serde::Deserialize;
use serde_json::{Map, Value};
use ternion_core::Message;
use ternion_core::text::{Tokenizer, TokenizerParts};

#[derive(Deserialize)]
struct Fixture {
    base: Value,
    pieces: Value,
    texts: Vec<String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    tokenizer: Changes,
    files: BTreeMap<String, Value>,
    with: Vec<Vec<u32>>,
    without: Vec<Vec<u32>>,
    roles: BTreeMap<String, String>,
    chat: Option<String>,
}

/// What differs from the base.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Changes {
    added_tokens: Vec<Value>,
    post_processor: Value,
    extra_vocab: Vec<String>,
    pieces_: bool,
}

fn fixture() -> Fixture {
    let path = ternion_test_support::fixture("tokenizer-side-files/cases.json");
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn folder(base: &Value, changes: &Changes, files: &BTreeMap<String, Value>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut json = base.clone();
    if !changes.pieces_ {
        json["added_tokens"] = changes.added_tokens.clone().into();
        json["post_processor"] = changes.post_processor.clone();
    }
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    for text in &changes.extra_vocab {
        vocab.insert(text.clone(), vocab.len().into());
    }
    fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    for (name, content) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content.as_str().map_or_else(|| content.to_string(), str::to_owned)).unwrap();
    }
    folder
}

#[test]
fn side_files_count_as_in_transformers() {
    let fixture = fixture();
    assert!(fixture.cases.len() > 40);
    for case in &fixture.cases {
        let base = if case.tokenizer.pieces_ { &fixture.pieces } else { &fixture.base };
        let folder = folder(base, &case.tokenizer, &case.files);
        let parts =
            TokenizerParts::from_folder(folder.path()).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        assert_eq!(parts.special_tokens, case.roles, "{}", case.name);
        let tokenizer = Tokenizer::from_parts(parts).unwrap();
        for (index, text) in fixture.texts.iter().enumerate() {
            let ids = |add| tokenizer.encode(text, add).unwrap();
            assert_eq!(ids(true), case.with[index], "{}: {text:?}", case.name);
            assert_eq!(ids(false), case.without[index], "{}: {text:?}", case.name);
            let plain = tokenizer.encode_plain(text).unwrap();
            let is_text = plain.iter().all(|&id| id < 256 || !tokenizer.is_special(id));
            assert!(is_text, "{}: {text:?}: {plain:?}", case.name);
        }
        let chat = [Message::new("user", "hi")];
        assert_eq!(tokenizer.render_chat(&chat, false).ok(), case.chat, "{}", case.name);
    }
}

/// A letter that a side file makes a padding token is still a letter in messages.
#[test]
fn a_letter_with_a_role_is_text() {
    let fixture = fixture();
    let config = serde_json::json!({"pad_token": "!", "chat_template": "{{ messages[0].content }}"});
    let files = [("tokenizer_config.json".to_owned(), config)].into();
    let folder = folder(&fixture.base, &Changes::default(), &files);
    let tokenizer = Tokenizer::from_parts(TokenizerParts::from_folder(folder.path()).unwrap()).unwrap();
    let text: Vec<u32> = b"hi! ho".iter().map(|&byte| byte.into()).collect();
    assert_eq!(tokenizer.encode_plain("hi! ho").unwrap(), text);
    assert_eq!(tokenizer.encode_chat(&[Message::new("user", "hi! ho")], false).unwrap(), text);
}

/// The options of a host win over what the files say.
#[test]
fn bos_can_be_set_by_hand() {
    let fixture = fixture();
    let folder = folder(&fixture.pieces, &Changes { pieces_: true, ..Changes::default() }, &BTreeMap::new());
    let parts = TokenizerParts::from_folder(folder.path()).unwrap();
    let ids = |change: &dyn Fn(&mut TokenizerParts)| {
        let mut parts = parts.clone();
        change(&mut parts);
        Tokenizer::from_parts(parts).map(|tokenizer| tokenizer.encode("hi", true).unwrap())
    };
    let plain = ids(&|_| ()).unwrap();
    assert_eq!(plain[0], 1);
    assert_eq!(ids(&|parts| parts.add_bos_token = Some(false)).unwrap(), plain[1..]);
    assert_eq!(ids(&|parts| parts.bos_id = Some(2)).unwrap(), [&[2], &plain[1..]].concat());
    let without = |parts: &mut TokenizerParts| (parts.bos_id, parts.add_bos_token) = (Some(2), Some(false));
    assert_eq!(ids(&without).unwrap(), plain[1..]);
    let error = ids(&|parts| parts.bos_id = Some(9999)).unwrap_err();
    assert!(error.to_string().contains("bos: 9999 is no token"), "{error}");
}

/// A message cannot bring about a token that only a side file names.
#[test]
fn tokens_of_side_files_are_text_in_messages() {
    let fixture = fixture();
    let template = "{% for m in messages %}<a>{{ m.content }}<b>{% endfor %}";
    for config in [
        serde_json::json!({"eos_token": "<a>", "additional_special_tokens": ["<b>"], "chat_template": template}),
        serde_json::json!({"image_token": "<a>", "pad_token": "<b>", "chat_template": template}),
        serde_json::json!({"chat_template": template, "added_tokens_decoder": {
            "256": {"content": "<a>", "special": true}, "257": {"content": "<b>", "special": true}}}),
    ] {
        let files = [("tokenizer_config.json".to_owned(), config)].into();
        let folder = folder(&fixture.base, &Changes::default(), &files);
        let tokenizer = Tokenizer::from_parts(TokenizerParts::from_folder(folder.path()).unwrap()).unwrap();
        let (a, b) = (tokenizer.token_id("<a>").unwrap(), tokenizer.token_id("<b>").unwrap());
        assert!(a >= 256 && b >= 256);
        let ids = tokenizer.encode_chat(&[Message::new("user", "x<a>y<b>")], false).unwrap();
        let text: Vec<u32> = b"x<a>y<b>".iter().map(|&byte| byte.into()).collect();
        assert_eq!(ids, [&[a][..], &text, &[b]].concat());
    }
}

#[test]
fn a_template_of_a_processor_is_the_last_resort() {
    let fixture = fixture();
    let with = |files: &[(&str, &str)]| {
        let files = files.iter().map(|(name, text)| ((*name).to_owned(), Value::from(*text))).collect();
        let folder = folder(&fixture.base, &Changes::default(), &files);
        TokenizerParts::from_folder(folder.path()).unwrap()
    };
    let processor = ("chat_template.json", r#"{"chat_template": "P"}"#);
    assert_eq!(with(&[processor]).chat_template.as_deref(), Some("P"));
    let config = ("tokenizer_config.json", r#"{"chat_template": "C"}"#);
    assert_eq!(with(&[processor, config]).chat_template.as_deref(), Some("C"));
    let parts = with(&[("additional_chat_templates/rag.jinja", "R"), config]);
    assert_eq!(parts.chat_template, None);
    assert!(parts.warnings[0].contains("rag"), "{:?}", parts.warnings);
}

#[test]
fn damaged_side_files_are_refused() {
    let fixture = fixture();
    for (file, text, found) in [
        ("tokenizer_config.json", r#"{"eos_token": 5}"#, "`eos_token` is a number"),
        ("tokenizer_config.json", r#"{"eos_token": {"content": 5}}"#, "`eos_token` is an object"),
        ("tokenizer_config.json", r#"{"added_tokens_decoder": []}"#, "`added_tokens_decoder` is a list"),
        ("tokenizer_config.json", r#"{"added_tokens_decoder": {"x": {"content": "a"}}}"#, "the key `x`"),
        (
            "tokenizer_config.json",
            r#"{"added_tokens_decoder": {"7": "a"}}"#,
            "`added_tokens_decoder.7` is a string",
        ),
        (
            "tokenizer_config.json",
            r#"{"eos_token": {"content": "a", "lstrip": 1}}"#,
            "`eos_token.lstrip` is a number",
        ),
        (
            "tokenizer_config.json",
            r#"{"additional_special_tokens": "a"}"#,
            "`additional_special_tokens` is a string",
        ),
        ("tokenizer_config.json", r#"{"split_special_tokens": 1}"#, "`split_special_tokens` is a number"),
        ("special_tokens_map.json", r#"{"pad_token": []}"#, "`pad_token` is a list"),
        ("added_tokens.json", r#"{"<a>": "5"}"#, "`<a>` is a string"),
        ("added_tokens.json", "[]", "not a JSON object"),
        ("chat_template.json", r#"{"chat_template": 5}"#, "`chat_template` is a number"),
    ] {
        let files = [(file.to_owned(), Value::from(text))].into();
        let folder = folder(&fixture.base, &Changes::default(), &files);
        let error = TokenizerParts::from_folder(folder.path()).unwrap_err().to_string();
        assert!(error.contains(found), "{text}: {error}");
    }
}

/// A padding token that was never trained is no reason to refuse a model.
#[test]
fn tokens_of_side_files_may_lie_beyond_the_embedding() {
    let fixture = fixture();
    let config = serde_json::json!({"pad_token": "[PAD]"});
    let files = [("tokenizer_config.json".to_owned(), config)].into();
    let folder = folder(&fixture.base, &Changes::default(), &files);
    let parts = TokenizerParts::from_folder(folder.path()).unwrap();
    assert!(Tokenizer::from_parts(parts.clone().with_vocab_limit(256)).is_ok());
    assert!(Tokenizer::from_parts(parts.clone().with_vocab_limit(255)).is_err());
    let tokenizer = Tokenizer::from_parts(parts).unwrap();
    assert_eq!((tokenizer.token_id("[PAD]"), tokenizer.vocab_size()), (Some(256), 257));
    let json: Map<String, Value> = serde_json::from_slice(&tokenizer.to_json().unwrap()).unwrap();
    assert_eq!(json["added_tokens"][0]["content"], "[PAD]");
}
