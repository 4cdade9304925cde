//! Vocabularies that end a process in llama.cpp, when it loads them or at a text, are refused before it sees them.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use ternion_core::{Error, ErrorKind};
use ternion_formats::{
    SharedBytes,
    gguf::{Array, File, Value, Writer, preflight, preflight_tokenizer},
};

const NORMAL: i32 = 1;
const BYTE: i32 = 6;

/// A file with nothing but what is needed for this kind of vocabulary.
fn file(model: &str, tokens: &[&str], more: &[(&str, Value)]) -> File {
    let mut writer = Writer::new();
    writer.set("general.architecture", "llama");
    for (key, value) in
        [("block_count", 1u32), ("context_length", 64), ("embedding_length", 8), ("attention.head_count", 1)]
    {
        writer.set(format!("llama.{key}"), value);
    }
    writer.set("tokenizer.ggml.model", model);
    writer.set("tokenizer.ggml.tokens", Array::strings(tokens.iter().copied()));
    for (key, value) in more {
        writer.set(*key, value.clone());
    }
    let bytes = writer.begin(Vec::new()).unwrap().finish().unwrap();
    File::parse(&SharedBytes::from(bytes), "vocabulary.gguf").unwrap()
}

fn assert_says(error: &Error, kind: ErrorKind, words: &[&str]) {
    assert_eq!(error.kind(), kind, "{error}");
    let text = error.to_string();
    assert!(
        words.iter().all(|word| text.contains(word)) && !text.contains('\n'),
        "{text}: {words:?} expected"
    );
}

fn refused(file: &File, words: &[&str]) {
    assert_says(&preflight(file).unwrap_err(), ErrorKind::InvalidModel, words);
}

/// A map that SentencePiece has made, for \u{fb01}, \u{fb00}, \u{2460}, \u{ff21}, \u{bd}, tab, "...", "ab" and "abc".
fn charsmap() -> Vec<u8> {
    std::fs::read(ternion_test_support::fixture("gguf-tokenizers/charsmap.bin")).unwrap()
}

fn unigram(map: &[u8]) -> File {
    let map = Value::Array(Array::u8s(map));
    file("t5", &["<pad>", "</s>", "<unk>", "a"], &[("tokenizer.ggml.precompiled_charsmap", map)])
}

/// Entry `index` of the trie.
fn entry(map: &[u8], index: usize) -> u32 {
    u32::from_le_bytes(map[4 + 4 * index..][..4].try_into().unwrap())
}

fn with_entry(map: &[u8], index: usize, value: u32) -> Vec<u8> {
    let mut map = map.to_vec();
    map[4 + 4 * index..][..4].copy_from_slice(&value.to_le_bytes());
    map
}

fn base(entry: u32) -> usize {
    ((entry >> 10) << ((entry & (1 << 9)) >> 6)) as usize
}

/// The entry that these bytes lead to, and the place from which the next one is looked for.
fn walk(map: &[u8], text: &[u8]) -> (usize, usize) {
    let mut place = base(entry(map, 0));
    let mut at = 0;
    for &byte in text {
        at = place ^ usize::from(byte);
        assert_eq!(entry(map, at) & 0xff, u32::from(byte));
        place = at ^ base(entry(map, at));
    }
    (at, place)
}

#[test]
fn a_whole_map_is_accepted() {
    preflight(&unigram(&charsmap())).unwrap();
    preflight(&file("t5", &["a"], &[])).unwrap();
}

#[test]
fn maps_are_refused_where_a_text_leads_out_of_them() {
    let map = charsmap();
    let key = "tokenizer.ggml.precompiled_charsmap";
    for (length, words) in [
        (0, "has 0 bytes, expected at least 5"),
        (3, "has 3 bytes"),
        (4, "its trie has 1024 bytes, expected fewer than 0"),
        (500, "its trie has 1024 bytes, expected fewer than 496"),
        (1028, "expected fewer than 1024"),
    ] {
        refused(&unigram(&map[..length]), &[key, words]);
    }
    let mut odd = map.clone();
    odd[0] += 2;
    refused(&unigram(&odd), &["1026 bytes, expected a multiple of 4"]);
    let mut huge = map.clone();
    huge[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    refused(&unigram(&huge), &["4294967295 bytes"]);

    // The last replacement loses its NUL, and all of them.
    let mut open = map.clone();
    *open.last_mut().unwrap() = b'x';
    refused(&unigram(&open), &["which no NUL ends"]);
    for byte in &mut open[1028..] {
        *byte = b'x';
    }
    refused(&unigram(&open), &["which no NUL ends", "expected one of the first 0"]);

    // A replacement behind the end, from the first and from the last byte of what is replaced.
    let (_, place) = walk(&map, "\u{fb01}".as_bytes());
    refused(&unigram(&with_entry(&map, place, (1 << 31) | 4096)), &["replacement at byte 4096"]);

    // Places behind the end: of the root, and of what follows a byte.
    refused(&unigram(&with_entry(&map, 0, 0x3fff << 10)), &["leads to entry", "which has 256"]);
    let (at, _) = walk(&map, b"ab");
    let far = with_entry(&map, at, (entry(&map, at) & 0x3ff) | (0x3fff << 10));
    refused(&unigram(&far), &["leads to entry", "which has 256"]);

    // A byte that leads back to where it came from.
    let place = walk(&map, b"a").1;
    let back = (at ^ place) as u32;
    let looped = with_entry(&map, at, (u32::from(b'b')) | (back << 10));
    refused(&unigram(&looped), &["has a loop in its trie"]);

    let wrong = file("t5", &["a"], &[(key, Value::from("text"))]);
    refused(&wrong, &[key, "an array of bytes"]);
}

/// Whatever is flipped: the walk ends without a panic, and what it accepts leads nowhere outside.
#[test]
fn damaged_maps_do_no_harm() {
    let map = charsmap();
    let mut accepted = 0;
    for position in 0..map.len() {
        for bit in 0..8 {
            let mut damaged = map.clone();
            damaged[position] ^= 1 << bit;
            if preflight(&unigram(&damaged)).is_err() {
                continue;
            }
            accepted += 1;
            let size = u32::from_le_bytes(damaged[..4].try_into().unwrap()) as usize / 4;
            if size == 0 {
                continue; // No trie, so nothing is replaced.
            }
            for text in ["abc", "\u{fb01}x", "\u{ff21}", "...", "\t\t", "\u{bd}"] {
                let mut place = base(entry(&damaged, 0));
                for byte in text.bytes() {
                    let at = place ^ usize::from(byte);
                    assert!(at < size, "{position} {bit}: {text:?}");
                    if entry(&damaged, at) & (1 << 31 | 0xff) != u32::from(byte) {
                        break;
                    }
                    place = at ^ base(entry(&damaged, at));
                    if entry(&damaged, at) & (1 << 8) != 0 {
                        let offset = (entry(&damaged, place) & !(1 << 31)) as usize;
                        assert!(damaged[4 + 4 * size + offset..].contains(&0), "{position} {bit}: {text:?}");
                    }
                }
            }
        }
    }
    assert!(accepted > 1000, "{accepted}");
}

#[test]
fn other_kinds_have_what_their_tokenizers_need() {
    // RWKV: llama.cpp looks for the longest token for ever where there is none.
    let bytes: Vec<String> = (0..256).map(|byte| format!("\\x{byte:02x}")).collect();
    let mut tokens: Vec<&str> = vec!["<s>"];
    tokens.extend(bytes.iter().map(String::as_str).filter(|text| !matches!(*text, "\\x6e")));
    tokens.push("nn");
    refused(&file("rwkv", &tokens, &[]), &["token 256", "byte 0x6e"]);
    tokens.push("n");
    preflight(&file("rwkv", &tokens, &[])).unwrap();
    refused(&file("rwkv", &["\\xZZ"], &[]), &["token 0", "escape"]);
    refused(&file("rwkv", &["\\x0A"], &[]), &["token 0", "escape"]);

    let byte = |kinds: &[i32]| ("tokenizer.ggml.token_type", Value::Array(Array::i32s(kinds)));
    refused(&file("bert", &["a", "<0x00>"], &[byte(&[NORMAL, BYTE])]), &["token 1", "WordPiece"]);
    refused(&file("t5", &["a", "b"], &[byte(&[NORMAL, BYTE])]), &["token 1", "`b`", "<0xFF>"]);
    preflight(&file("t5", &["a", "<0x00>"], &[byte(&[NORMAL, BYTE])])).unwrap();

    let long = "x".repeat(1025);
    for (kind, most) in [("t5", 1024), ("rwkv", 1024), ("bert", 1024), ("plamo2", 256)] {
        refused(&file(kind, &["x", &long], &[]), &["token 1", "1025 bytes", &most.to_string()]);
    }
}

/// llama.cpp sees keys, values and tokens up to a NUL, and would read what is not checked here.
#[test]
fn nothing_hides_behind_a_nul() {
    refused(&file("llama\0x", &["a"], &[]), &["NUL", "tokenizer.ggml.model"]);
    let hidden = ("llama.expert_count\0x", Value::from(70_000u32));
    refused(&file("llama", &["a"], &[hidden]), &["NUL", "llama.expert_count"]);
    refused(&file("llama", &["a", "b\0c", "b"], &[]), &["token 2", "another token"]);
    refused(&file("llama", &["\0c", "[EMPTY_0]"], &[]), &["EMPTY"]);
}

#[test]
fn texts_that_cannot_be_written_are_found_beforehand() {
    let bytes: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    let all: Vec<&str> = bytes.iter().map(String::as_str).collect();
    preflight_tokenizer(&file("llama", &all, &[])).unwrap();
    let mut some = all.clone();
    some.retain(|text| *text != "<0x41>");
    let error = preflight_tokenizer(&file("llama", &some, &[])).unwrap_err();
    assert_says(&error, ErrorKind::Unsupported, &["<0x41>", "llama.cpp"]);
    some.push("A");
    preflight_tokenizer(&file("llama", &some, &[])).unwrap();

    let pre = ("tokenizer.ggml.pre", Value::from("whitespace"));
    let error = preflight_tokenizer(&file("gpt2", &["a"], std::slice::from_ref(&pre))).unwrap_err();
    assert_says(&error, ErrorKind::Unsupported, &["tokenizer.ggml.pre", "whitespace"]);
    preflight_tokenizer(&file("whitespace", &["a"], &[pre])).unwrap();
}
