//! How byte-level BPE splits a text before it merges: the rules that `tokenizer.ggml.pre` names.
//!
//! GGUF files hold a name and no rule. The names are those that llama.cpp and bitnet.cpp know. The rules are those of
//! the models' own `tokenizer.json` files as far as they are published; llama.cpp, whose regular expressions have no
//! Unicode categories for upper and lower case, approximates a few of them.

use serde_json::{Value, json};

/// Llama 3, and BitNet b1.58 2B4T after it.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const YOUTU: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const KIMI: &str = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-2's rule, where another step follows it.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const CJK: &str = "[一-龥぀-ゟ゠-ヿ]+";
const CJK_WIDE: &str = "[一-龥ࠀ-一가-\u{d7ff}]+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const SPARK: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"##;
const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";
const DEEPSEEK_LETTERS: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\x{1f7d}ᾀ-ᾴᾶ-ᾼ\x{1fbe}ῂ-ῄῆ-ῌῐ-\x{1fd3}ῖ-\x{1fdb}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\x{2126}ℨ\x{212a}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";
const JAIS2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}";
const BAILING: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const SEED_CODER: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const UFAKZEKA: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const EXAONE_MOE: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+";
const MINICPM5: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Groups of three digits, counted from the right.
const DIGITS_FROM_RIGHT: &str = r"\p{N}{1,2}(?=(?:\p{N}{3})+(?!\p{N}))|\p{N}{3}|\p{N}{1,2}";
const ASIAN: &str = "[\u{4e00}-\u{9fff}\u{3400}-\u{4dbf}\u{f900}-\u{faff}\u{3040}-\u{309f}\u{30a0}-\u{30ff}\u{ff65}-\u{ff9f}\u{2f00}-\u{2fdf}\u{e40}-\u{e7f}\u{e80}-\u{eff}\u{1780}-\u{17ff}\u{1000}-\u{109f}\u{aa60}-\u{aa7f}\u{a9e0}-\u{a9ff}\u{ac00}-\u{d7af}\u{1100}-\u{11ff}]+";

/// What is done before the bytes become characters.
#[derive(Debug)]
enum Step {
    Gpt2,
    /// Every digit on its own.
    Digits,
    Regex(&'static str),
}
use Step::{Digits, Gpt2, Regex};

/// A rule with the names that it has.
#[derive(Debug)]
pub(crate) struct PreTokenizer {
    /// The first is the one that is written.
    names: &'static [&'static str],
    steps: &'static [Step],
    /// A text that is a token as a whole is that token, whatever the merges say.
    pub(crate) ignore_merges: bool,
    /// A BOS is added where a file does not say.
    pub(crate) adds_bos: bool,
    /// There is no BOS token where a file does not name one.
    pub(crate) lacks_bos: bool,
}

const fn rule(names: &'static [&'static str], steps: &'static [Step]) -> PreTokenizer {
    PreTokenizer { names, steps, ignore_merges: false, adds_bos: false, lacks_bos: false }
}

const fn whole_words(names: &'static [&'static str], steps: &'static [Step]) -> PreTokenizer {
    PreTokenizer { ignore_merges: true, ..rule(names, steps) }
}

static RULES: [PreTokenizer; 32] = [
    PreTokenizer {
        adds_bos: true,
        ..whole_words(
            &[
                "llama-bpe",
                "llama3",
                "llama-v3",
                "falcon3",
                // bitnet.cpp's name for Falcon-E.
                "falcon_e",
                "falcon-h1",
                "pixtral",
                "midm-2.0",
                "lfm2",
                "jina-v5-nano",
            ],
            &[Regex(LLAMA3)],
        )
    },
    rule(&["smaug-bpe", "dbrx"], &[Regex(LLAMA3)]),
    PreTokenizer { lacks_bos: true, ..rule(&["chatglm-bpe"], &[Regex(LLAMA3)]) },
    PreTokenizer { lacks_bos: true, ..whole_words(&["glm4", "glm5"], &[Regex(LLAMA3)]) },
    rule(
        &[
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "stablelm2",
            "grok-2",
            "megrez",
            "hunyuan",
            "solar-open",
        ],
        &[Regex(QWEN2)],
    ),
    rule(&["qwen35"], &[Regex(QWEN35)]),
    PreTokenizer { adds_bos: true, ..whole_words(&["tekken"], &[Regex(TEKKEN)]) },
    rule(&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], &[Regex(GPT4O)]),
    whole_words(&["granite-embed-multi-97m"], &[Regex(GPT4O)]),
    rule(
        &[
            "gpt-2",
            "phi-2",
            "gigachat",
            "jina-es",
            "jina-de",
            "jina-v1-en",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v2-code",
            "roberta-bpe",
            "modern-bert",
            "mellum",
            "a.x-4.0",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
        ],
        &[Gpt2],
    ),
    rule(
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"],
        &[Digits, Gpt2],
    ),
    rule(
        &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        &[Regex(r"\p{N}{1,3}"), Regex(CJK), Regex(DEEPSEEK3)],
    ),
    rule(
        &["deepseek-llm"],
        &[
            Regex(r"[\r\n]"),
            Regex(DEEPSEEK_LETTERS),
            Regex(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
            Regex(r"\s+$"),
            Regex(CJK_WIDE),
            Regex(r"\p{N}+"),
        ],
    ),
    rule(
        &["deepseek-coder"],
        &[Regex(r"[\r\n]"), Regex(r"\s?\p{L}+"), Regex(r"\s?\p{P}+"), Regex(CJK_WIDE), Regex(r"\p{N}")],
    ),
    rule(&["spark2_5"], &[Regex(r"\p{N}{1,3}"), Regex(CJK), Regex(SPARK), Regex(r"\p{N}")]),
    whole_words(
        &["youtu"],
        &[Regex("[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+"), Regex(YOUTU)],
    ),
    rule(&["falcon"], &[Regex(r"[\p{P}\$\+<=>\^~\|`]+"), Regex(GPT2), Regex("[0-9][0-9][0-9]")]),
    rule(&["bloom", "poro-chat", "gpt3-finnish"], &[Regex(BLOOM)]),
    rule(&["viking"], &[Regex(BLOOM), Regex(r"\p{N}")]),
    PreTokenizer {
        adds_bos: true,
        ..rule(
            &["chameleon"],
            &[
                Regex("<sentinel:[0-9]+>"),
                Regex("(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z"),
                Regex(r"([\t\n]|    |  )"),
                Regex(r"\p{N}"),
                Regex(r"[\p{P}!-/:-@\[-`\{-~]"),
                Gpt2,
            ],
        )
    },
    rule(&["tiny_aya", "cohere2moe"], &[Regex(r"\d{1,3}(?=(?:\d{3})*\b)"), Regex(GPT4O)]),
    rule(&["kimi-k2"], &[Regex(KIMI)]),
    rule(&["superbpe"], &[Regex(r"\p{N}+"), Regex(r"(?=(\d{3})+(?!\d))")]),
    rule(&["bailingmoe", "bailingmoe2", "llada-moe"], &[Regex(BAILING)]),
    rule(&["seed-coder"], &[Regex(SEED_CODER)]),
    rule(&["ufakzeka"], &[Regex(UFAKZEKA)]),
    rule(&["afmoe"], &[Regex(DIGITS_FROM_RIGHT), Regex(ASIAN), Regex(DEEPSEEK3)]),
    rule(&["laguna"], &[Regex(r"[^\n]+|[\n]+"), Regex(QWEN2)]),
    rule(&["exaone-moe"], &[Regex(EXAONE_MOE)]),
    rule(&["jais-2"], &[Regex(JAIS2)]),
    whole_words(&["minicpm5"], &[Regex(r"\p{N}{1,3}"), Regex(MINICPM5)]),
    rule(
        &[DEFAULT],
        &[Regex(r"[\p{P}\$\+<=>\^~\|]+"), Regex(GPT2), Regex(r"\p{N}+"), Regex("[0-9][0-9][0-9]")],
    ),
];

/// The rule of files without a name.
pub(super) const DEFAULT: &str = "default";

impl PreTokenizer {
    /// The rule of this name.
    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        RULES.iter().find(|rule| rule.names.contains(&name))
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
        let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        // The byte-level step has GPT-2's rule built in.
        let (split_by, last) = match self.steps {
            [split_by @ .., Gpt2] => (split_by, bytes(true)),
            split_by => (split_by, bytes(false)),
        };
        if split_by.is_empty() {
            return last;
        }
        let steps = split_by.iter().map(|step| match step {
            Gpt2 => split(GPT2),
            Digits => json!({"type": "Digits", "individual_digits": true}),
            Regex(regex) => split(regex),
        });
        json!({"type": "Sequence", "pretokenizers": steps.chain([last]).collect::<Vec<_>>()})
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
            let found = PreTokenizer::of(&rule.json(), rule.ignore_merges).unwrap();
            assert_eq!((found.json(), found.ignore_merges), (rule.json(), rule.ignore_merges));
        }
        assert!(PreTokenizer::named("no such rule").is_none());
        assert!(PreTokenizer::of(&json!({"type": "Whitespace"}), false).is_none());
    }
}
