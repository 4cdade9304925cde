//! Grammars without a model: what they accept, what is refused, and what hostile ones cost.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use ternion_core::{
    Constraint, ConstraintStart, ErrorKind, Result,
    text::{Tokenizer, TokenizerParts},
};
use ternion_test_support::fixture;

use super::{EndTokens, Grammar, Grammars, Running};

pub(super) const VOCAB: usize = 600;
pub(super) const NO_ENDS: EndTokens<'static> = EndTokens { eos: &[], stop: &[] };

pub(super) fn tokenizer(name: &str) -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_parts(TokenizerParts::from_folder(fixture(name)).unwrap()).unwrap())
}

pub(super) fn grammars() -> Grammars {
    let tokenizer = tokenizer("nano-packed");
    let eos = tokenizer.eos_id().unwrap();
    Grammars::new(tokenizer, VOCAB, &[eos])
}

/// Whether the text, as the tokenizer writes it, is a whole answer.
pub(super) fn accepts(grammar: &Grammar, tokenizer: &Tokenizer, text: &str) -> bool {
    let mut grammar = grammar.clone();
    let tokens = tokenizer.encode_within(text).unwrap();
    tokens.iter().all(|&id| grammar.allows(id) && grammar.push(id).is_ok()) && grammar.can_end()
}

pub(super) fn compile(constraint: Constraint) -> Result<Grammar> {
    grammars().compile(&constraint)
}

/// Every schema of the official test suite is enforced or refused: none is accepted and lets an invalid value through.
#[test]
fn no_schema_of_the_test_suite_is_accepted_and_broken() {
    let (grammars, tokenizer) = (grammars(), tokenizer("nano-packed"));
    for (draft, uri, least) in [
        ("draft2020-12", "https://json-schema.org/draft/2020-12/schema", 160),
        ("draft7", "http://json-schema.org/draft-07/schema#", 110),
    ] {
        let groups = std::fs::read(fixture("json-schema").join(format!("{draft}.json"))).unwrap();
        let groups: Vec<Value> = serde_json::from_slice(&groups).unwrap();
        let (mut enforced, mut refused, mut missed, mut broken) = (0, 0, 0, Vec::new());
        for group in &groups {
            let mut schema = group["schema"].clone();
            if let Some(keywords) = schema.as_object_mut() {
                keywords.entry("$schema").or_insert_with(|| uri.into());
            }
            let grammar = match grammars.compile(&Constraint::JsonSchema(schema)) {
                Ok(grammar) => grammar,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::InvalidRequest, "{error}");
                    refused += 1;
                    continue;
                }
            };
            enforced += 1;
            for value in group["invalid"].as_array().unwrap() {
                if accepts(&grammar, &tokenizer, &value.to_string()) {
                    broken.push(format!("{} ({}): {value}", group["file"], group["about"]));
                }
            }
            let valid = group["valid"].as_array().unwrap();
            missed += valid.iter().filter(|v| !accepts(&grammar, &tokenizer, &v.to_string())).count();
        }
        println!("{draft}: {enforced} enforced, {refused} refused, {missed} valid values in other forms");
        assert!(broken.is_empty(), "{draft}: accepted and broken:\n{}", broken.join("\n"));
        assert!(enforced >= least, "{draft}: {enforced} enforced");
    }
}

#[test]
fn hostile_constraints_end_in_an_error_or_in_a_grammar() {
    let words: Vec<String> = (0..10_000).map(|i| format!("word number {i}")).collect();
    let properties: serde_json::Map<String, Value> = (0..20_000)
        .map(|i| (format!("property_{i}_with_a_long_name"), json!({ "type": "string" })))
        .collect();
    let deep = (0..200).fold(json!({}), |inner, _| json!({ "items": inner }));
    let objects: Vec<Value> =
        (0..10_000).map(|i| json!({ "type": "object", "required": [format!("k{i}")] })).collect();
    let patterns: serde_json::Map<String, Value> =
        (0..1_000).map(|i| (format!("^(a|b)*{i}$"), json!({}))).collect();
    let refused = [
        Constraint::JsonSchema(
            json!({ "type": "object", "properties": properties, "required": ["property_1"] }),
        ),
        Constraint::JsonSchema(deep),
        Constraint::JsonSchema(json!({ "oneOf": objects })),
        Constraint::JsonSchema(json!({ "patternProperties": patterns })),
        Constraint::JsonSchema(json!({ "$ref": "#" })),
        Constraint::JsonSchema(json!({ "allOf": [{ "$ref": "#" }] })),
        Constraint::JsonSchema(json!({ "const": "x".repeat(1_000_000) })),
        Constraint::Choice(vec!["x".repeat(1_000_000)]),
        Constraint::Regex("(".repeat(100_000)),
        Constraint::Regex("x".repeat(2 << 20)),
        Constraint::Lark(format!("start: {}\"a\"{}", "(".repeat(100_000), ")".repeat(100_000))),
    ];
    let grammars = grammars();
    for constraint in refused {
        let text = format!("{constraint:?}").chars().take(80).collect::<String>();
        let start = Instant::now();
        let compiled = grammars.compile(&constraint);
        println!("{:.0?}: {text}", start.elapsed());
        match compiled {
            Ok(_) => panic!("accepted: {text}"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::InvalidRequest, "{text}: {error}");
                assert!(error.to_string().chars().count() < 400, "{text}: {error}");
            }
        }
    }
    // These may be refused, or fail at a limit within the answer, or be enforced.
    for constraint in [
        Constraint::JsonSchema(
            json!({ "type": "string", "pattern": "(a|b|ab){1000}(c|d){1000}".repeat(50) }),
        ),
        Constraint::JsonSchema(json!({ "type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$" })),
        Constraint::Regex("((a{1000}){1000}){1000}".into()),
        Constraint::Regex("(?s:.*a.{1000})".into()),
        Constraint::Lark("start: start".into()),
        Constraint::Lark("start: \"a\"{1,1000000000}".into()),
        Constraint::Lark("start: e\ne: e e | \"a\" | e \"a\" e |".into()),
    ] {
        let start = Instant::now();
        let compiled = grammars.compile(&constraint);
        let text = format!("{constraint:?}").chars().take(80).collect::<String>();
        println!("{:.0?}: {text} {:?}", start.elapsed(), compiled.as_ref().err());
        let Ok(mut grammar) = compiled else { continue };
        let start = Instant::now();
        let ended = (0..200).find_map(|step| {
            let mut logits = vec![0.0; VOCAB];
            if grammar.must_end() {
                return Some("complete".to_owned());
            }
            grammar.restrict(&mut logits).err().map(|e| e.to_string()).or_else(|| {
                let allowed: Vec<usize> = (0..VOCAB).filter(|&id| logits[id] == 0.0).collect();
                grammar.push(allowed[step * 7 % allowed.len()] as u32).err().map(|e| e.to_string())
            })
        });
        println!("    200 steps in {:.0?}, {ended:?}", start.elapsed());
    }
    let tokenizer = tokenizer("nano-packed");
    for constraint in [
        Constraint::Choice(words.clone()),
        Constraint::JsonSchema(json!({ "enum": words })),
        Constraint::JsonSchema(
            json!({ "anyOf": words.iter().map(|w| json!({ "const": w })).collect::<Vec<_>>() }),
        ),
    ] {
        let grammar = grammars.compile(&constraint).unwrap();
        let is_choice = matches!(constraint, Constraint::Choice(_));
        let text = |word: &str| if is_choice { word.to_owned() } else { format!("\"{word}\"") };
        assert!(accepts(&grammar, &tokenizer, &text("word number 9999")));
        assert!(!accepts(&grammar, &tokenizer, &text("word number 10000")));
    }
}

#[test]
fn the_constraint_begins_after_its_text() {
    let tokenizer = tokenizer("nano-packed");
    let grammar = compile(Constraint::Regex("[ab]{2}".into())).unwrap();
    let push = |running: &mut Running, text: &str| {
        let mut complete = false;
        for id in tokenizer.encode_within(text).unwrap() {
            let mut logits = vec![0.0; VOCAB];
            running.restrict(&mut logits, NO_ENDS).unwrap();
            assert!(logits[id as usize] == 0.0, "{text:?}: token {id} is forbidden");
            let bytes = tokenizer.token_bytes(id).unwrap();
            complete = running.accept(id, std::str::from_utf8(&bytes).unwrap()).unwrap();
        }
        complete
    };
    let eos = [tokenizer.eos_id().unwrap()];
    let may_end = |running: &mut Running| {
        let mut logits = vec![0.0; VOCAB];
        running.restrict(&mut logits, EndTokens { eos: &eos, stop: &[] }).unwrap();
        logits[eos[0] as usize] == 0.0
    };

    let mut once = Running::new(grammar.clone(), ConstraintStart::AfterText("</t>".into()), &tokenizer);
    assert!(!push(&mut once, "a thought") && !may_end(&mut once) && !once.is_complete());
    for part in ["<", "/", "t", ">"] {
        assert!(!push(&mut once, part));
    }
    assert!(!push(&mut once, "\n"), "a line break may stand between");
    assert!(!may_end(&mut once));
    assert!(push(&mut once, "a") | push(&mut once, "b") && once.is_complete());

    let mut each = Running::new(grammar, ConstraintStart::EachTime("<c>".into()), &tokenizer);
    for _ in 0..2 {
        assert!(!push(&mut each, "free text") && may_end(&mut each) && each.is_complete());
        for part in ["<", "c", ">", "b"] {
            assert!(!push(&mut each, part));
        }
        assert!(!may_end(&mut each) && !each.is_complete());
        assert!(!push(&mut each, "a"), "the answer is free again");
    }
}

#[test]
fn no_token_goes_beyond_the_awaited_text() {
    let tokenizer = tokenizer("nano-packed");
    let grammar = compile(Constraint::Regex("x".into())).unwrap();
    // Awaited is what a token begins with, and the token goes on.
    let (id, text) = (0..VOCAB as u32)
        .filter_map(|id| Some((id, String::from_utf8(tokenizer.token_bytes(id)?).ok()?)))
        .find(|(_, text)| text.len() > 2 && text.is_ascii())
        .unwrap();
    for (end, awaited) in [("", text[..2].to_owned()), ("z", format!("z{}", &text[..1]))] {
        let mut running = Running::new(grammar.clone(), ConstraintStart::EachTime(awaited), &tokenizer);
        running.accept(0, end).unwrap();
        let mut logits = vec![0.0; VOCAB];
        running.restrict(&mut logits, NO_ENDS).unwrap();
        assert_eq!(logits[id as usize], f32::NEG_INFINITY);
        assert!(logits.contains(&0.0));
    }
}

#[test]
fn special_tokens_are_allowed_where_a_grammar_names_them_and_nowhere_else() {
    let mut parts = TokenizerParts::from_folder(fixture("nano-packed")).unwrap();
    let mut json: Value = serde_json::from_slice(&parts.tokenizer_json).unwrap();
    let next = Tokenizer::from_parts(parts.clone()).unwrap().vocab_size() as u32;
    for (id, tag) in (next..).zip(["<tool_call>", "</tool_call>"]) {
        let mut token = json["added_tokens"][0].clone();
        (token["id"], token["content"], token["special"]) = (id.into(), tag.into(), false.into());
        json["added_tokens"].as_array_mut().unwrap().push(token);
    }
    parts.tokenizer_json = serde_json::to_vec(&json).unwrap();
    let tokenizer = Arc::new(Tokenizer::from_parts(parts).unwrap());
    let size = tokenizer.vocab_size();
    let grammars = Grammars::new(Arc::clone(&tokenizer), size, &[]);
    let tag = tokenizer.token_id("<tool_call>").unwrap();
    let lark = "start: <tool_call> \"\\n\" %json {\"type\": \"boolean\"} \"\\n\" </tool_call>";
    let mut grammar = grammars.compile(&Constraint::Lark(lark.into())).unwrap();
    assert_eq!(grammar.forced()[0], tag);
    let mut free = grammars.compile(&Constraint::Regex("(?s:.*)".into())).unwrap();
    let mut logits = vec![0.0; size];
    free.restrict(&mut logits).unwrap();
    for id in (0..size as u32).filter(|&id| tokenizer.is_special(id) || id == tag) {
        assert_eq!(logits[id as usize], f32::NEG_INFINITY, "{:?}", tokenizer.token(id));
    }
    // The text of the tag can still be written with other tokens.
    let mut text = grammars.compile(&Constraint::Choice(vec!["<tool_call>".into()])).unwrap();
    let mut written = Vec::new();
    while !text.must_end() {
        let forced = text.forced();
        assert!(!forced.is_empty() && !forced.contains(&tag), "{forced:?}");
        for id in forced {
            written.extend(tokenizer.token_bytes(id).unwrap());
            text.push(id).unwrap();
        }
    }
    assert_eq!(written, b"<tool_call>");
}

/// The real vocabulary of BitNet 2B4T. Prints what a mask costs; `cargo test ... -- --nocapture` shows it.
#[test]
fn a_vocabulary_of_128k_tokens_follows_a_schema() {
    let Some(folder) = ternion_test_support::oracle().map(|oracle| oracle.join("official")) else {
        println!("skipped: TERNION_ORACLE is not set");
        return;
    };
    let tokenizer = Arc::new(Tokenizer::from_parts(TokenizerParts::from_folder(folder).unwrap()).unwrap());
    let size = tokenizer.vocab_size();
    let grammars = Grammars::new(Arc::clone(&tokenizer), size, &[tokenizer.eos_id().unwrap()]);
    let start = Instant::now();
    grammars.factory().unwrap();
    println!("{size} tokens: factory {:.0?}", start.elapsed());
    let schema = json!({
        "type": "object",
        "properties": {
            "name": { "type": "string" },
            "kind": { "enum": ["cat", "dog"] },
            "weights": { "type": "array", "items": { "type": "number" } },
            "owner": { "type": "object", "properties": { "id": { "type": "integer" }, "mail": { "type": "string", "format": "email" } } },
        },
        "required": ["name", "kind", "weights", "owner"],
    });
    let text = json!({
        "name": "Ünïcode ☃ and a longer sentence, with punctuation.", "kind": "dog", "weights": [1, 2.5, -3e4, 12345.678],
        "owner": { "id": 42, "mail": "someone@example.com" }, "more": [null, { "deep": [true] }],
    });
    let text = text.to_string();
    let start = Instant::now();
    let mut grammar = grammars.compile(&Constraint::JsonSchema(schema)).unwrap();
    println!("compiled in {:.0?}", start.elapsed());
    let mut times = Vec::new();
    let tokens = tokenizer.encode_within(&text).unwrap();
    for &id in &tokens {
        let mut logits = vec![0.0; size];
        let start = Instant::now();
        grammar.restrict(&mut logits).unwrap();
        times.push(start.elapsed());
        grammar.push(id).unwrap_or_else(|e| panic!("{:?}: {e}", tokenizer.token(id)));
    }
    assert!(grammar.can_end());
    times.sort_unstable();
    let mean = times.iter().sum::<Duration>() / times.len() as u32;
    println!("{} masks: mean {mean:.0?}, median {:.0?}", times.len(), times[times.len() / 2]);
}
