//! The checks quote the documentation of core word by word, and every sentence of the trait's contract has a check.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::{collections::HashSet, path::Path};

/// Sentences of the trait's documentation that no check quotes, with the reason.
const WITHOUT_A_CHECK: &[(&str, &str)] = &[
    ("A language model that a host can talk to, whatever runs it.", "says what it is"),
    ("What the model is, its limits and its capabilities.", "says what it is"),
    ("The model's tokenizer with its chat template, for exact counts.", "says what it is"),
    ("Continues a prompt as a stream of events.", "says what it is"),
    ("The log-probabilities of given tokens.", "says what it is"),
    ("What LlmBackend::unloaded returns.", "says what it is"),
    (
        "A future that ends when the memory of the model is free: some time after the backend and all of its streams are dropped.",
        "a check does not outlive the backend",
    ),
    (
        "Ends at once for a backend that holds no memory worth waiting for.",
        "a check does not outlive the backend",
    ),
    ("A wrapper returns that of what it wraps.", "a check does not outlive the backend"),
    (
        "It keeps nothing alive itself, and may be awaited after the backend is gone.",
        "a check does not outlive the backend",
    ),
    (
        "Whether the backend has stopped for good, for example because its thread has died.",
        "a check cannot close a backend",
    ),
    (
        "A closed backend fails every request with Closed and has to be loaded again.",
        "a check cannot close a backend",
    ),
    ("Conveniences on every LlmBackend, written in terms of its methods.", "says what it is"),
    ("Shows the model's name and its backend.", "says what it is"),
    ("A backend writes info and generate; all other methods have a default.", "is about the implementation"),
    (
        "A type that wraps another backend implements BackendWrapper instead, which forwards every method.",
        "is about the implementation",
    ),
    (
        "The default checks the fields and, where there is a tokenizer, the length of the prompt.",
        "is about the implementation",
    ),
    ("A backend that checks more, or that accepts more, overrides it.", "is about the implementation"),
    (
        "Those of generate for this request, but for the ones that come from the load of the backend.",
        "validation::validate_agrees_with_generate compares them",
    ),
    ("Dropping the future.", "nothing has been started"),
    (
        "Must be awaited in a tokio runtime: template and tokenizer run on its threads for blocking work.",
        "is about the caller",
    ),
    (
        "In the stream: failures of the engine, after which it ends.",
        "takes a model that fails: failing::a_failure_ends_the_stream",
    ),
    ("For checks and measurements: a row has vocab_size floats.", "repeats the shape, which is checked"),
    (
        "As score; ResourceExhausted where there is no memory for so many rows.",
        "memory cannot be exhausted in a test; bad requests are checked",
    ),
    ("As LlmBackend::generate.", "the methods behind the conveniences are checked"),
];

/// The documentation of a file of core as running text, a paragraph a line, without links and marks of code.
fn documentation(file: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../core/src").join(file);
    let source = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut paragraphs = vec![String::new()];
    for line in source.lines() {
        let words = line.trim().strip_prefix("///").map_or("", str::trim);
        if words.is_empty() || words.starts_with('#') {
            paragraphs.push(String::new());
        } else {
            let last = paragraphs.last_mut().unwrap();
            last.push_str(words);
            last.push(' ');
        }
    }
    paragraphs.iter().map(|p| plain(p)).filter(|p| !p.is_empty()).collect()
}

/// Text without Markdown: ``[`X`](path)`` and `` `X` `` are `X`.
fn plain(text: &str) -> String {
    let mut rest = text;
    let mut out = String::new();
    while let Some(at) = rest.find("[`") {
        out.push_str(&rest[..at]);
        let (name, after) = rest[at + 2..].split_once("`]").unwrap();
        out.push_str(name);
        rest = after.strip_prefix('(').map_or(after, |link| link.split_once(')').unwrap().1);
    }
    out.push_str(rest);
    out.replace('`', "").split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn checks_quote_the_documentation() {
    let files = ["backend.rs", "event.rs", "request.rs", "info.rs", "error.rs"];
    let contract = files.map(documentation).concat().join("\n");
    let mut names = HashSet::new();
    for check in ternion_conformance::all() {
        assert!(names.insert(check.name), "two checks are called {}", check.name);
        let quoted = plain(check.sentence.text);
        assert!(contract.contains(&quoted), "{}: core does not say \"{quoted}\"", check.name);
    }
    assert!(names.len() > 80, "only {} checks", names.len());
}

#[test]
fn every_sentence_of_the_trait_has_a_check() {
    let quoted: Vec<String> = ternion_conformance::all().map(|check| plain(check.sentence.text)).collect();
    let mut missing = Vec::new();
    for paragraph in documentation("backend.rs") {
        for sentence in paragraph.split_inclusive(". ").map(str::trim).filter(|s| !s.is_empty()) {
            let known = WITHOUT_A_CHECK.iter().any(|(text, _)| *text == sentence);
            if !known && !quoted.iter().any(|q| q.contains(sentence) || sentence.contains(q.as_str())) {
                missing.push(sentence.to_owned());
            }
        }
    }
    assert!(missing.is_empty(), "no check quotes:\n{}", missing.join("\n"));
}
