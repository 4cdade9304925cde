//! The pieces of a stream are the whole decoding, for every kind of decoder and any tokens.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::{
    fs,
    sync::{Arc, LazyLock},
};

use proptest::prelude::*;
use serde_json::{Value, json};
use ternion_core::text::{Tokenizer, TokenizerParts};

fn byte_level() -> Arc<Tokenizer> {
    let path = ternion_test_support::fixture("nano-packed/tokenizer.json");
    Arc::new(Tokenizer::from_parts(TokenizerParts::new(fs::read(path).unwrap())).unwrap())
}

/// Tokens that are hard to decode: all bytes, pieces with spaces in all places, special and added tokens.
fn with_decoder(decoder: &Value) -> Arc<Tokenizer> {
    let mut pieces: Vec<_> = (0..=255).map(|b| format!("<0x{b:02X}>")).collect();
    pieces.extend(
        ["▁", "▁▁", "▁a", "b▁c", "é", "😀", "", " ", "▁▁x▁", "Ġ", "Ã", "©", "<unk>"].map(String::from),
    );
    let vocab: serde_json::Map<_, _> =
        pieces.iter().enumerate().map(|(i, p)| (p.clone(), i.into())).collect();
    let first = vocab.len() as u32;
    let added = |id: u32, content: &str, special: bool| json!({"id": id, "content": content, "special": special, "normalized": false, "single_word": false, "lstrip": false, "rstrip": false});
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(first, "<s>", true), added(first + 1, "added é ▁", false)],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
        "model": {"type": "WordLevel", "unk_token": "<unk>", "vocab": vocab},
    });
    Arc::new(Tokenizer::from_parts(TokenizerParts::new(json.to_string())).unwrap())
}

static TOKENIZERS: LazyLock<Vec<(String, Arc<Tokenizer>)>> = LazyLock::new(|| {
    let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let strip = |start: u32| json!({"type": "Strip", "content": " ", "start": start, "stop": 0});
    let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true});
    let (bytes, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
    let byte_level_decoder =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let sequence = |steps: &[&Value]| json!({"type": "Sequence", "decoders": steps});
    let decoders = [
        json!(null),
        byte_level_decoder.clone(),
        metaspace("always"),
        metaspace("first"),
        metaspace("never"),
        sequence(&[&replace, &bytes, &fuse, &strip(1)]),
        sequence(&[&replace, &bytes, &fuse]),
        sequence(&[&bytes, &metaspace("always")]),
        sequence(&[&bytes, &fuse, &metaspace("first")]),
        sequence(&[&bytes, &fuse, &replace, &strip(2)]),
        sequence(&[&strip(1), &replace]),
        sequence(&[&byte_level_decoder, &replace, &strip(3)]),
        sequence(&[]),
    ];
    let mut all = vec![("byte level vocabulary".to_owned(), byte_level())];
    all.extend(decoders.iter().map(|decoder| (decoder.to_string(), with_decoder(decoder))));
    all
});

fn check(name: &str, tokenizer: &Arc<Tokenizer>, ids: &[u32]) {
    let whole = tokenizer.decode(ids, true).unwrap();
    let mut decoder = tokenizer.decoder();
    // Twice: after `finish` the decoder is as new.
    for _ in 0..2 {
        let mut text = String::new();
        for &id in ids {
            text += &decoder.push(id).unwrap();
            assert!(whole.starts_with(&text), "{name} {ids:?}: {text:?} is no prefix of {whole:?}");
        }
        text += &decoder.finish().unwrap();
        assert_eq!(text, whole, "{name} {ids:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn pieces_are_the_whole(which in 0..TOKENIZERS.len(), ids in prop::collection::vec(0u32..330, 0..40)) {
        let (name, tokenizer) = &TOKENIZERS[which];
        check(name, tokenizer, &ids);
    }

    #[test]
    fn bytes_of_text_with_noise(which in 0..TOKENIZERS.len(), text in "\\PC{0,12}", noise in any::<u8>(), at in 0usize..40) {
        let (name, tokenizer) = &TOKENIZERS[which];
        let mut bytes = text.into_bytes();
        let at = at.min(bytes.len());
        bytes.insert(at, noise);
        // In the made vocabularies the first 256 ids are the bytes.
        let ids: Vec<u32> = bytes.iter().map(|&b| u32::from(b)).collect();
        check(name, tokenizer, &ids);
    }
}

#[test]
fn a_character_comes_out_with_its_last_byte() {
    let tokenizer = byte_level();
    let ids = tokenizer.encode_plain("a😀é").unwrap();
    let mut decoder = tokenizer.decoder();
    let pieces: Vec<_> = ids.iter().map(|&id| decoder.push(id).unwrap()).collect();
    assert_eq!(pieces.concat(), "a😀é", "nothing is held back at the end of a character");
    assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')));
    assert_eq!(decoder.finish().unwrap(), "");
}

#[test]
fn what_stays_incomplete_is_shown_at_the_end() {
    let tokenizer = byte_level();
    let ids = tokenizer.encode_plain("😀").unwrap();
    let mut decoder = tokenizer.decoder();
    for &id in &ids[..ids.len() - 1] {
        assert_eq!(decoder.push(id).unwrap(), "");
    }
    // An incomplete character followed by another is certain to be invalid.
    let mut interrupted = decoder.clone();
    let a = tokenizer.encode_plain("a").unwrap()[0];
    assert_eq!(interrupted.push(a).unwrap(), "\u{FFFD}a");
    assert_eq!(decoder.finish().unwrap(), "\u{FFFD}");
}

#[test]
fn a_token_costs_the_same_late_as_early() {
    let tokenizer = byte_level();
    let mut decoder = tokenizer.decoder();
    let started = std::time::Instant::now();
    for i in 0..200_000 {
        decoder.push(i % 256).unwrap();
    }
    decoder.finish().unwrap();
    assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
}
