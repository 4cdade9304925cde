//! How byte-level BPE splits a text before it merges: the rules that `tokenizer.ggml.pre` names.
//!
//! GGUF files hold a name and no rule. The names are llama.cpp's; the rules are those of the models' own
//! `tokenizer.json` files, in whose form they are given to the tokenizer.

use serde_json::{Value, json};

/// Llama 3, and BitNet b1.58 2B4T after it.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What is done before the bytes become characters.
#[derive(Debug)]
enum Split {
    /// GPT-2's rule, which is built into the byte-level step.
    Gpt2,
    /// Every digit on its own, then GPT-2's rule.
    Digits,
    /// A regular expression.
    Regex(&'static str),
}

/// A rule with the names that it has.
#[derive(Debug)]
pub(crate) struct PreTokenizer {
    /// The first is the one that is written.
    names: &'static [&'static str],
    split: Split,
    /// A text that is a token as a whole is that token, whatever the merges say.
    pub(crate) ignore_merges: bool,
    /// A BOS is added where a file does not say.
    pub(crate) adds_bos: bool,
}

const fn rule(names: &'static [&'static str], split: Split) -> PreTokenizer {
    PreTokenizer { names, split, ignore_merges: false, adds_bos: false }
}

static RULES: [PreTokenizer; 7] = [
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
        split: Split::Regex(LLAMA3),
        ignore_merges: true,
        adds_bos: true,
    },
    rule(&["smaug-bpe", "dbrx", "chatglm-bpe", "glm4"], Split::Regex(LLAMA3)),
    rule(&["qwen2", "deepseek-r1-qwen", "kormo", "stablelm2", "grok-2", "megrez"], Split::Regex(QWEN2)),
    PreTokenizer { names: &["tekken"], split: Split::Regex(TEKKEN), ignore_merges: true, adds_bos: true },
    rule(&["gpt-4o", "llama4", "kanana2"], Split::Regex(GPT4O)),
    rule(
        &["gpt-2", "phi-2", "gigachat", "jina-es", "jina-de", "a.x-4.0", "mpt", "olmo", "jais", "trillion"],
        Split::Gpt2,
    ),
    rule(&["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"], Split::Digits),
];

impl PreTokenizer {
    /// The rule of this name.
    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        RULES.iter().find(|rule| rule.names.contains(&name))
    }

    /// All names, for a message.
    pub(crate) fn names() -> String {
        RULES.iter().flat_map(|rule| rule.names).copied().collect::<Vec<_>>().join(", ")
    }

    /// The name that is written for it.
    pub(crate) fn name(&self) -> &'static str {
        self.names[0]
    }

    /// The rule that a `tokenizer.json` has, if it is one of these.
    pub(crate) fn of(pre_tokenizer: &Value, ignore_merges: bool) -> Option<&'static Self> {
        let wanted = essence(pre_tokenizer);
        RULES.iter().find(|rule| rule.ignore_merges == ignore_merges && essence(&rule.json()) == wanted)
    }

    /// The `pre_tokenizer` of a `tokenizer.json`.
    pub(crate) fn json(&self) -> Value {
        let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let sequence = |steps: Vec<Value>| json!({"type": "Sequence", "pretokenizers": steps});
        match self.split {
            Split::Gpt2 => bytes(true),
            Split::Digits => {
                sequence(vec![json!({"type": "Digits", "individual_digits": true}), bytes(true)])
            }
            Split::Regex(regex) => sequence(vec![
                json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false}),
                bytes(false),
            ]),
        }
    }
}

/// What of a pre-tokenizer decides about the tokens.
fn essence(json: &Value) -> Vec<Value> {
    let field = |name: &str, default: Value| json.get(name).cloned().unwrap_or(default);
    match json["type"].as_str() {
        Some("Sequence") => json["pretokenizers"]
            .as_array()
            .map(|steps| steps.iter().flat_map(essence).collect())
            .unwrap_or_default(),
        Some("ByteLevel") => vec![json!([
            "ByteLevel",
            field("add_prefix_space", true.into()),
            field("use_regex", true.into())
        ])],
        Some("Split") => {
            vec![json!(["Split", json["pattern"], json["behavior"], field("invert", false.into())])]
        }
        Some("Digits") => vec![json!(["Digits", field("individual_digits", false.into())])],
        _ => vec![json.clone()],
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_rule_is_found_by_its_names_and_by_its_json() {
        let mut seen = HashSet::new();
        for rule in &RULES {
            assert!(rule.names.iter().all(|name| seen.insert(name)), "{:?}", rule.names);
            assert_eq!(PreTokenizer::of(&rule.json(), rule.ignore_merges).unwrap().name(), rule.name());
        }
        assert!(PreTokenizer::named("qwen35").is_none());
        assert!(PreTokenizer::of(&json!({"type": "Whitespace"}), false).is_none());
    }
}
