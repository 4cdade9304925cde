//! A byte-level BPE tokenizer of any size that is made up rather than learned: all bytes, merges of letters in the order
//! of their frequency in English, and the special tokens of the 2B4T.

use crate::bpe;
use serde_json::{Map, Value, json};

use super::Shape;

pub(super) const BOS: usize = 0;
pub(super) const END_OF_TEXT: usize = 1;
pub(super) const END_OF_TURN: usize = 9;

/// 2B4T's chat template: roles with a capital, an end-of-turn token after each message.
pub(crate) const CHAT_TEMPLATE: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = \
    message['role'] | capitalize + ': '+ message['content'] | trim + '<|eot_id|>' %}{{ content }}{% endfor %}\
    {% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";

/// Letters by their frequency in English text.
const LETTERS: &[u8; 26] = b"etaoinshrdlcumwfgypbvkjxqz";

const BYTES: usize = 256;
const FEW_SPECIALS: usize = 16;
const MANY_SPECIALS: usize = 256;

/// The smallest vocabulary that has room for all bytes and the special tokens.
pub(super) const MIN_VOCAB: usize = BYTES + FEW_SPECIALS;

/// The largest: there are so many merges.
pub(super) const MAX_VOCAB: usize = 400_000;

fn specials(vocab_size: usize) -> usize {
    if vocab_size >= 4096 { MANY_SPECIALS } else { FEW_SPECIALS }
}

/// The id of special token number `index`: they are the last of the vocabulary.
pub(super) fn special_id(shape: &Shape, index: usize) -> usize {
    shape.vocab_size - specials(shape.vocab_size) + index
}

/// The names that Llama 3 gave them: those with a purpose and the gaps between, then reserved ones.
fn special_name(index: usize) -> String {
    match index {
        BOS => "<|begin_of_text|>".to_owned(),
        END_OF_TEXT => "<|end_of_text|>".to_owned(),
        6 => "<|start_header_id|>".to_owned(),
        7 => "<|end_header_id|>".to_owned(),
        END_OF_TURN => "<|eot_id|>".to_owned(),
        2..=5 => format!("<|reserved_special_token_{}|>", index - 2),
        8 => "<|reserved_special_token_4|>".to_owned(),
        _ => format!("<|reserved_special_token_{}|>", index - 5),
    }
}

/// The character that stands for a byte in byte-level BPE: itself where it can be seen, else one from U+0100 on.
fn byte_chars() -> [char; BYTES] {
    let mut hidden = 0x100;
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        if matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
            return char::from(byte);
        }
        hidden += 1;
        char::from_u32(hidden - 1).expect("invariant: at most 256 values from U+0100 on, all of them letters")
    })
}

/// `count` merges, most useful first: letter pairs, a space before a letter or a pair, three letters, four letters.
fn merges(count: usize) -> Vec<(String, String)> {
    let letters: Vec<String> = LETTERS.iter().map(|&b| char::from(b).to_string()).collect();
    let space = vec![byte_chars()[usize::from(b' ')].to_string()];
    let pairs: Vec<String> = ranked(&letters, &letters).into_iter().map(|(a, b)| a + &b).collect();
    let mut list = Vec::new();
    for (left, right) in
        [(&letters, &letters), (&space, &letters), (&space, &pairs), (&pairs, &letters), (&pairs, &pairs)]
    {
        if list.len() < count {
            list.extend(ranked(left, right));
        }
    }
    list.truncate(count);
    list
}

/// All pairs of two lists by the sum of their relative ranks: what is frequent on both sides comes first.
fn ranked(left: &[String], right: &[String]) -> Vec<(String, String)> {
    let ranks = (0..left.len()).flat_map(|i| (0..right.len()).map(move |j| (i, j)));
    let mut ranks: Vec<(usize, usize)> = ranks.collect();
    ranks.sort_by_key(|&(i, j)| (i * right.len() + j * left.len(), i));
    ranks.into_iter().map(|(i, j)| (left[i].clone(), right[j].clone())).collect()
}

/// `tokenizer.json`
pub(super) fn tokenizer(shape: &Shape) -> Value {
    let specials = specials(shape.vocab_size);
    let merges = merges(shape.vocab_size - specials - BYTES);
    let tokens =
        byte_chars().into_iter().map(String::from).chain(merges.iter().map(|(a, b)| format!("{a}{b}")));
    let tokens: Vec<String> = tokens.collect();
    let vocab = tokens.iter().enumerate().map(|(id, token)| (&token[..], id)).collect();
    let merges: Vec<String> = merges.into_iter().map(|(a, b)| format!("{a} {b}")).collect();
    let added: Vec<Value> = (0..specials)
        .map(|index| {
            let mut token = added_token(index);
            token["id"] = special_id(shape, index).into();
            token
        })
        .collect();
    let bos = special_name(BOS);
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}}
            ],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}}
            ],
            "special_tokens": {
                &bos: {"id": bos, "ids": [special_id(shape, BOS)], "tokens": [bos]}
            }
        },
        "decoder": bpe::byte_level_decoder(),
        "model": bpe::Model::new(vocab, merges)
    })
}

/// `tokenizer_config.json`
pub(super) fn config(shape: &Shape) -> Value {
    let specials = 0..specials(shape.vocab_size);
    let added: Map<String, Value> =
        specials.map(|index| (special_id(shape, index).to_string(), added_token(index))).collect();
    json!({
        "added_tokens_decoder": added,
        "bos_token": special_name(BOS),
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": true,
        "eos_token": special_name(END_OF_TURN),
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": shape.context_length,
        "tokenizer_class": "PreTrainedTokenizerFast"
    })
}

fn added_token(index: usize) -> Value {
    json!({
        "content": special_name(index),
        "single_word": false,
        "lstrip": false,
        "rstrip": false,
        "normalized": false,
        "special": true
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn merges_are_distinct_and_made_of_what_was_merged_before() {
        let merges = merges(20_000);
        assert_eq!(merges.len(), 20_000);
        let mut known: HashSet<String> = byte_chars().into_iter().map(String::from).collect();
        for (left, right) in merges {
            assert!(known.contains(&left) && known.contains(&right), "{left} {right}");
            assert!(known.insert(left.clone() + &right), "{left}{right} twice");
        }
    }

    #[test]
    fn each_byte_has_a_character_of_its_own() {
        let chars: HashSet<char> = byte_chars().into_iter().collect();
        assert_eq!(chars.len(), BYTES);
        assert!(chars.iter().all(|c| !c.is_whitespace() && !c.is_control()));
        assert_eq!(byte_chars()[usize::from(b' ')], '\u{120}');
    }

    #[test]
    fn special_names_are_distinct() {
        let names: HashSet<String> = (0..MANY_SPECIALS).map(special_name).collect();
        assert_eq!(names.len(), MANY_SPECIALS);
    }
}
