//! What hostile constraints cost, and that each one is compiled once.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use ternion_core::{
    Constraint, Error, ErrorKind,
    text::{Tokenizer, TokenizerParts},
};

use super::{
    Grammar, Grammars, compile,
    tests::{accepts, grammars, tokenizer},
};

/// Grammars for the small vocabulary of the fixtures and, where it is there, the large one of BitNet 2B4T.
fn vocabularies() -> Vec<(&'static str, Grammars, usize)> {
    let small = tokenizer("nano-packed");
    let mut all = vec![("small", grammars(), small.vocab_size())];
    if let Some(folder) = ternion_test_support::oracle().map(|oracle| oracle.join("official")) {
        let parts = TokenizerParts::from_folder(folder).unwrap();
        let tokenizer = Arc::new(Tokenizer::from_parts(parts).unwrap());
        let size = tokenizer.vocab_size();
        let eos = tokenizer.eos_id().unwrap();
        all.push(("large", Grammars::new(tokenizer, size, &[eos]), size));
    } else {
        println!("skipped: TERNION_ORACLE is not set");
    }
    all
}

/// Answers with random tokens. The error, if the grammar fails before the answer ends or has so many tokens.
fn walk(grammar: &Grammar, vocab: usize, steps: usize, seed: u64) -> Option<Error> {
    let mut grammar = grammar.clone();
    let mut random = seed;
    for _ in 0..steps {
        if grammar.must_end() {
            return None;
        }
        let mut logits = vec![0.0; vocab];
        if let Err(error) = grammar.restrict(&mut logits) {
            return Some(error);
        }
        let allowed: Vec<usize> = (0..vocab).filter(|&id| logits[id] == 0.0).collect();
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let id = allowed[(random >> 33) as usize % allowed.len()];
        if let Err(error) = grammar.push(id as u32) {
            return Some(error);
        }
    }
    None
}

fn shown(constraint: &Constraint) -> String {
    format!("{constraint:?}").chars().take(90).collect()
}

/// Regular expressions that other engines take exponential time or space for. Each is refused before the answer, or followed to its end.
#[test]
fn catastrophic_expressions_are_refused_or_enforced() {
    let expressions = [
        "((a{1000}){1000}){1000}",
        "((a{0,1000}){1000}){1000}",
        "((a{0,100}){0,100}){0,100}",
        "[xy]((a{1000}){1000}){1000}",
        "[xy]{100}(ab{0,1}){20000}",
        "(a|b)*a(a|b){1000}",
        "(?s:.*a.{1000})",
        "(?s:.*[0-9].{100}[0-9].{100})",
        "(?s:(.*a.{20}){10})",
        "(x+x+)+y",
        "(([a-z])+.)+[A-Z]([a-z])+",
        "(a?){1000}a{1000}",
        "([a-z]{1,100} ?){1,100}c",
        "[\\p{L}\\p{N}]{1,5000}",
        "(?s:.{1,500}x){1,50}",
        "(\\w+\\s?)*",
        "(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)[0-9]+",
        "(a*)*b",
        "(a|aa)+b",
        "([a-zA-Z0-9])(([\\-.]|[_]+)?([a-zA-Z0-9]+))*@([a-z0-9]+[.]){1,20}[a-z]{2,}",
    ];
    for (vocabulary, grammars, vocab) in vocabularies() {
        for expression in expressions {
            for constraint in [
                Constraint::Regex(expression.to_owned()),
                Constraint::JsonSchema(json!({ "type": "string", "pattern": format!("^{expression}$") })),
                Constraint::Lark(format!("start: /{expression}/")),
            ] {
                let start = Instant::now();
                let compiled = grammars.compile(&constraint);
                let compiling = start.elapsed();
                let text = shown(&constraint);
                let start = Instant::now();
                match compiled {
                    Err(error) => {
                        println!("{vocabulary}: {compiling:.0?}, {text}: {error}");
                        assert_eq!(error.kind(), ErrorKind::InvalidRequest, "{text}: {error}");
                    }
                    Ok(grammar) => {
                        for seed in 1..4 {
                            let failed = walk(&grammar, vocab, 300, seed);
                            println!(
                                "{vocabulary}: {compiling:.0?}, {:.0?}, {text}: {failed:?}",
                                start.elapsed()
                            );
                            if let Some(error) = failed {
                                assert_eq!(error.kind(), ErrorKind::InvalidRequest, "{text}: {error}");
                                assert!(
                                    error.message().contains("a simpler one expected"),
                                    "{text}: {error}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Whatever the constraint, the answer to "can this be enforced" comes within the time.
#[test]
fn no_constraint_takes_longer_than_a_request_waits() {
    let words: Vec<String> = (0..10_000).map(|i| format!("word number {i}")).collect();
    let objects: Vec<Value> = (0..10_000)
        .map(|i| json!({ "type": "object", "properties": { format!("k{i}"): { "type": "integer" } }, "required": [format!("k{i}")] }))
        .collect();
    let megabyte: serde_json::Map<String, Value> = (0..12_000)
        .map(|i| {
            (format!("property_{i}_with_a_rather_long_name"), json!({ "enum": [i, "a text of some length"] }))
        })
        .collect();
    let tree = json!({ "type": "object", "properties": { "value": { "type": "string" }, "children": { "type": "array", "items": { "$ref": "#" } } },
                       "required": ["value"], "additionalProperties": false });
    let nested = (0..12).fold(
        json!({ "type": "string" }),
        |inner, _| json!({ "anyOf": [inner, { "type": "array", "items": inner }] }),
    );
    let patterns: Vec<Value> = (0..3000)
        .map(|i| json!({ "type": "string", "pattern": format!("^(a|b)*{i}(a|b){{1,300}}$") }))
        .collect();
    // Large terminals, each of which llguidance tries on the whole vocabulary.
    let big = "BIG: /([a-z]{1,3}[0-9]{1,3}|[A-Z]{1,3}x){1,400}/\n";
    let terminals: Vec<String> = (0..3000).map(|i| format!("T{i}: BIG \"{i}\" BIG\n")).collect();
    let terminals = terminals.concat();
    let all: Vec<String> = (0..3000).map(|i| format!("T{i}")).collect();
    let lark = format!("start: {}\n{big}{terminals}", all.join(" | "));
    let constraints = [
        Constraint::Choice(words.clone()),
        Constraint::JsonSchema(json!({ "enum": words })),
        Constraint::JsonSchema(json!({ "anyOf": objects })),
        Constraint::JsonSchema(json!({ "type": "object", "properties": megabyte })),
        Constraint::JsonSchema(tree),
        Constraint::JsonSchema(nested),
        Constraint::JsonSchema(json!({ "anyOf": patterns })),
        Constraint::JsonSchema(
            json!({ "$defs": { "a": { "anyOf": [{ "$ref": "#/$defs/b" }, { "type": "null" }] },
                                                  "b": { "type": "array", "items": { "$ref": "#/$defs/a" } } }, "$ref": "#/$defs/a" }),
        ),
        Constraint::JsonSchema(
            json!({ "$defs": { "a": { "$ref": "#/$defs/b" }, "b": { "$ref": "#/$defs/a" } }, "$ref": "#/$defs/a" }),
        ),
        Constraint::JsonSchema(json!({ "type": "string", "minLength": 1_000_000 })),
        Constraint::JsonSchema(json!({ "type": "string", "maxLength": 1_000_000 })),
        Constraint::JsonSchema(json!({ "type": "array", "minItems": 100_000 })),
        Constraint::Regex(format!("({})+", words.join("|"))),
        Constraint::Lark(lark),
    ];
    for (vocabulary, grammars, vocab) in vocabularies() {
        grammars.factory().unwrap();
        for constraint in &constraints {
            let start = Instant::now();
            let compiled = grammars.compile(constraint);
            let compiling = start.elapsed();
            let text = shown(constraint);
            // Other programs may hold the processor for some seconds.
            assert!(compiling < compile::PATIENCE + Duration::from_secs(5), "{compiling:.0?}: {text}");
            let start = Instant::now();
            match compiled {
                Err(error) => {
                    println!("{vocabulary}: {compiling:.0?}: {text}: {error}");
                    assert_eq!(error.kind(), ErrorKind::InvalidRequest, "{text}: {error}");
                }
                Ok(grammar) => {
                    let failed = walk(&grammar, vocab, 100, 7);
                    println!("{vocabulary}: {compiling:.0?}, {:.0?}: {text}: {failed:?}", start.elapsed());
                }
            }
        }
    }
}

#[test]
fn a_request_does_not_wait_for_a_compilation_that_does_not_end() {
    let grammars = grammars();
    let factory = grammars.factory().unwrap();
    let words: Vec<String> = (0..5_000).map(|i| format!("word number {i}")).collect();
    let constraint = Constraint::Choice(words);
    let error = compile::compile(factory, &constraint, Duration::from_micros(1)).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidRequest);
    assert!(error.message().contains("too long to compile"), "{error}");
    // It goes on without a request, whose place others cannot have, and at its end nothing is left of it.
    let begun = factory.compilations.begun();
    assert!(grammars.compile(&constraint).is_ok());
    assert!(factory.compilations.begun() <= begun + 1);
}

#[test]
fn a_constraint_is_compiled_once() {
    let grammars = grammars();
    let factory = grammars.factory().unwrap();
    let schema =
        Constraint::JsonSchema(json!({ "type": "object", "properties": { "a": { "type": "integer" } } }));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| grammars.compile(&schema).map(drop).unwrap());
        }
    });
    assert_eq!(factory.compilations.begun(), 1);
    // What one answer makes of it is nothing to the next.
    let tokenizer = tokenizer("nano-packed");
    for _ in 0..2 {
        let mut grammar = grammars.compile(&schema).unwrap();
        assert!(
            accepts(&grammar, &tokenizer, "{\"a\": 1}") && !accepts(&grammar, &tokenizer, "{\"a\": true}")
        );
        for id in tokenizer.encode_within("{\"a\": 12}").unwrap() {
            grammar.push(id).unwrap();
        }
        assert!(grammar.can_end());
    }
    assert_eq!(factory.compilations.begun(), 1);
    // The order of properties is that of the answer's.
    grammars.compile(&Constraint::Regex("a".into())).unwrap();
    assert_eq!((factory.compilations.begun(), factory.compilations.kept().0), (2, 2));
}

#[test]
fn few_grammars_are_kept() {
    let grammars = grammars();
    let factory = grammars.factory().unwrap();
    let constraint = |i: usize| Constraint::Regex(format!("[a-z]{{1,{}}}", i + 1));
    for i in 0..70 {
        grammars.compile(&constraint(i)).unwrap();
        // The first is used again and again, and stays.
        grammars.compile(&constraint(0)).unwrap();
    }
    let (count, bytes) = factory.compilations.kept();
    assert!(count == 64 && bytes <= 64 << 20, "{count} grammars of {bytes} bytes");
    assert_eq!(factory.compilations.begun(), 70);
    grammars.compile(&constraint(1)).unwrap();
    assert_eq!(factory.compilations.begun(), 71);
    // Nothing is kept of what is refused.
    assert!(grammars.compile(&Constraint::Regex("(".into())).is_err());
    assert_eq!(factory.compilations.kept().0, 64);
}
