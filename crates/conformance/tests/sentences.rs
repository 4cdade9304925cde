//! Every check names an item of core that exists, and every method of the trait has a check.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::{collections::HashSet, path::Path};

/// Methods of the trait that no check tries, with the reason.
const WITHOUT_A_CHECK: &[(&str, &str)] = &[
    ("unloaded", "a check does not outlive the backend"),
    ("is_closed", "a check cannot close a backend"),
    ("required_tokenizer", "no method"),
    ("no_sessions", "no method"),
    ("fmt", "for people"),
];

fn source(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../core/src").join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Whether a word stands in a line of code.
fn has_word(line: &str, word: &str) -> bool {
    !line.trim_start().starts_with("//")
        && line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == word)
}

/// The lines of a type's or trait's own definition and of its `impl` blocks.
fn item<'a>(source: &'a str, name: &str) -> Vec<&'a str> {
    let heads = ["struct", "enum", "trait", "impl"];
    let mut lines = Vec::new();
    let mut inside = false;
    for line in source.lines() {
        let is_head = heads.iter().any(|head| has_word(line, head)) && !line.starts_with(' ');
        inside = if is_head { has_word(line, name) } else { inside && line != "}" };
        if inside {
            lines.push(line);
        }
    }
    lines
}

#[test]
fn checks_name_items_that_exist() {
    let files = [
        "backend.rs",
        "constraint.rs",
        "embed.rs",
        "event.rs",
        "request.rs",
        "prompt.rs",
        "message.rs",
        "sampling.rs",
        "info.rs",
        "error.rs",
    ];
    let contract = files.map(source).join("\n");
    let mut names = HashSet::new();
    for check in ternion_conformance::all() {
        assert!(names.insert(check.name), "two checks are called {}", check.name);
        let (parent, member) = check.sentence.place.split_once("::").unwrap_or((check.sentence.place, ""));
        let lines = item(&contract, parent);
        assert!(!lines.is_empty(), "{}: core has no `{parent}`", check.name);
        let found = member.is_empty() || lines.iter().any(|line| has_word(line, member));
        assert!(found, "{}: `{parent}` has no `{member}`", check.name);
        assert!(!check.sentence.text.is_empty());
    }
    assert!(names.len() > 100, "only {} checks", names.len());
}

#[test]
fn every_method_of_the_trait_has_a_check() {
    let places: HashSet<&str> = ternion_conformance::all().map(|check| check.sentence.place).collect();
    let source = source("backend.rs");
    let methods = source
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .filter_map(|line| line.trim().split_once("fn "))
        .map(|(_, rest)| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap());
    for method in methods {
        let known = WITHOUT_A_CHECK.iter().any(|(name, _)| *name == method);
        let checked = places.contains(format!("LlmBackend::{method}").as_str())
            || places.contains(format!("LlmBackendExt::{method}").as_str());
        assert!(known || checked, "no check names `{method}`");
    }
}
