//! What a GGUF file of a BitNet tells of facts that it does not state.
//!
//! Two kinds of models go by the same architecture names. Microsoft's 2B4T has squared ReLU and the tokenizer, rotary base
//! and vocabulary of Llama 3; 1bitLLM's reproductions have SiLU and those of Llama 2. Converters write both as `bitnet` or
//! `bitnet-b1.58`, and none of them writes the activation.

use ternion_core::Result;

use super::File;
use super::keys::{self, Keys};
use crate::Activation;
use crate::notes::Notes;

/// Names and addresses of the model and of what it was made from.
const NAMES: [&str; 8] = [
    "general.name",
    "general.basename",
    "general.repo_url",
    "general.source.url",
    "general.source.repo_url",
    "general.source.huggingface.repository",
    "general.base_model.0.name",
    "general.base_model.0.repo_url",
];

/// A vocabulary of this size is that of Llama 3 or a later model.
pub(super) const LARGE_VOCAB: usize = 100_000;
/// Llama 2's vocabulary, with room for added tokens.
const SMALL_VOCAB: std::ops::RangeInclusive<usize> = 32_000..=32_100;

/// Facts that the file states and that the two kinds differ in.
pub(super) struct Facts {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) vocab_size: usize,
    pub(super) rope_theta: Option<f32>,
}

/// One sign, what it speaks for and how much it counts.
struct Sign {
    text: String,
    speaks_for: Activation,
    weight: u32,
}

/// The activation of a file that does not state it.
pub(super) fn activation(file: &File, keys: &Keys, facts: &Facts, notes: &mut Notes) -> Result<Activation> {
    let signs = signs(file, keys, facts)?;
    let weight =
        |activation| signs.iter().filter(|s| s.speaks_for == activation).map(|s| s.weight).sum::<u32>();
    let (relu2, silu) = (weight(Activation::Relu2), weight(Activation::Silu));
    let list = |activation| {
        let texts: Vec<&str> =
            signs.iter().filter(|s| s.speaks_for == activation).map(|s| s.text.as_str()).collect();
        texts.join(", ")
    };
    // Where nothing prevails: llama.cpp computes SiLU.
    let chosen = if relu2 > silu { Activation::Relu2 } else { Activation::Silu };
    let key = keys.of(keys::ACTIVATION);
    if relu2 > 0 && silu > 0 {
        notes.warn(format!(
            "the file states no `{key}` and its signs disagree: {} (squared ReLU, as 2B4T) and {} (SiLU, as 1bitLLM); \
             {chosen} is used; the option `activation` (relu2 or silu) decides",
            list(Activation::Relu2),
            list(Activation::Silu),
        ));
    } else if relu2 + silu == 0 {
        notes.warn(format!(
            "the file states no `{key}` and has no sign of it; {chosen} is used, as by llama.cpp; the option \
             `activation` (relu2 or silu) decides"
        ));
    } else {
        notes.assume(format!(
            "activation {chosen}: the file states no `{key}`; concluded from {}",
            list(chosen)
        ));
    }
    Ok(chosen)
}

fn signs(file: &File, keys: &Keys, facts: &Facts) -> Result<Vec<Sign>> {
    let mut signs = Vec::new();
    let mut add = |text: String, is_relu2: bool, weight: u32| {
        let speaks_for = if is_relu2 { Activation::Relu2 } else { Activation::Silu };
        signs.push(Sign { text, speaks_for, weight });
    };
    // The official file's architecture. Later converters of bitnet.cpp give it to 1bitLLM's models too.
    if keys.architecture() != "bitnet" {
        add(format!("the architecture {}", keys.architecture()), true, 3);
    }
    match file.string(keys::TOKENIZER)? {
        Some("gpt2") => add("the tokenizer gpt2".to_owned(), true, 2),
        Some("llama") => add("the tokenizer llama".to_owned(), false, 2),
        _ => {}
    }
    match facts.rope_theta {
        Some(theta) if theta == 500_000.0 => add(format!("the rotary base {theta}"), true, 2),
        Some(theta) if theta == 10_000.0 => add(format!("the rotary base {theta}"), false, 2),
        _ => {}
    }
    if facts.vocab_size >= LARGE_VOCAB || SMALL_VOCAB.contains(&facts.vocab_size) {
        let text = format!("a vocabulary of {}", facts.vocab_size);
        add(text, facts.vocab_size >= LARGE_VOCAB, 2);
    }
    let is_grouped = facts.kv_heads < facts.heads;
    add(format!("{} heads for keys and values of {}", facts.kv_heads, facts.heads), is_grouped, 1);
    for key in NAMES {
        let Ok(Some(name)) = file.string(key) else { continue };
        let name = name.to_lowercase();
        let official = ["2b-4t", "2b4t", "2b_4t", "2b 4t"].iter().any(|part| name.contains(part));
        if official || ["1bitllm", "b1_58"].iter().any(|part| name.contains(part)) {
            add(format!("`{key}`"), official, 3);
            break;
        }
    }
    Ok(signs)
}
