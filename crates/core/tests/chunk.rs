//! Chunks of generated text in many scripts: they cover it, keep to their budget and divide no character.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::sync::LazyLock;

use proptest::{collection::vec, prelude::*, sample::select};
use ternion_core::{
    ErrorKind,
    text::{Chunk, ChunkKind, ChunkOptions, Tokenizer, TokenizerParts, chunks},
};
use unicode_segmentation::{GraphemeCursor, UnicodeSegmentation};

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let folder = ternion_test_support::fixture("nano-packed");
    Tokenizer::from_parts(TokenizerParts::from_folder(folder).unwrap()).unwrap()
});

/// Bits of text of many scripts and forms, to be put together.
const PIECES: &[&str] = &[
    "The quick brown fox. ",
    "It ran; why? ",
    "word ",
    "a",
    "\n",
    "\n\n",
    "\r\n",
    "\r\n\r\n",
    "\t",
    "  ",
    "\0",
    "漢字かな交じり文。",
    "中文句子，没有空格。",
    "한국어 문장입니다. ",
    "هذه جملة عربية. ",
    "שלום עולם. ",
    "ภาษาไทยไม่มีวรรค",
    "हिन्दी वाक्य। ",
    "Zażółć gęślą jaźń. ",
    "e\u{301}",
    "o\u{308}\u{323}\u{301}",
    "👨\u{200d}👩\u{200d}👧\u{200d}👦",
    "🇩🇪🇫🇷",
    "👍🏽",
    "# Heading\n",
    "## Part\n\n",
    "- item\n",
    "1. first\n",
    "```rust\nlet x = 1;\n```\n",
    "> quote\n",
    "| a | b |\n|---|---|\n",
    "fn main() {\n    let x = 1;\n\n    if x > 0 {\n        go();\n    }\n}\n\n",
    "def f(x):\n\treturn x\n",
    "<|eot_id|>",
    "\u{feff}",
    "ﷺ",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "----",
    "\u{2028}",
];

fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        8 => select(PIECES).prop_map(str::to_owned),
        1 => "\\PC{0,12}",
        1 => any::<char>().prop_map(String::from),
    ];
    vec(piece, 0..60).prop_map(|pieces| pieces.concat())
}

fn kind() -> impl Strategy<Value = ChunkKind> {
    select(vec![ChunkKind::Text, ChunkKind::Markdown, ChunkKind::Code])
}

/// What is promised of all chunks.
fn check(text: &str, chunks: &[Chunk], options: &ChunkOptions) {
    let mut end = 0;
    for chunk in chunks {
        let own = &text[chunk.start..chunk.end];
        assert_eq!(chunk.start + chunk.overlap, end, "without gaps: {chunk:?}");
        assert!(chunk.end > end, "something new: {chunk:?}");
        let tokens = TOKENIZER.encode_plain(own).unwrap().len();
        assert_eq!(tokens, chunk.tokens);
        assert!(tokens <= options.max_tokens, "{tokens} tokens");
        let repeated = TOKENIZER.encode_plain(&own[..chunk.overlap]).unwrap().len();
        assert!(repeated <= options.overlap, "{repeated} tokens of overlap");
        // A grapheme cluster is divided only where it does not fit.
        let mut cursor = GraphemeCursor::new(chunk.end, text.len(), true);
        if !cursor.is_boundary(text, 0).unwrap() {
            let before = cursor.prev_boundary(text, 0).unwrap().unwrap();
            let cluster = text[before..].graphemes(true).next().unwrap();
            let tokens = TOKENIZER.encode_plain(cluster).unwrap().len();
            assert!(tokens > options.max_tokens, "{cluster:?} of {tokens} tokens is divided");
        }
        end = chunk.end;
    }
    assert_eq!(end, text.len(), "the whole text");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn chunks_cover_the_text_and_keep_to_the_budget(
        text in text(), max in 8usize..80, overlap in 0usize..40, kind in kind(),
    ) {
        let options = ChunkOptions::new(max).with_overlap(overlap.min(max - 1)).with_kind(kind);
        check(&text, &chunks(&TOKENIZER, &text, &options).unwrap(), &options);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_text_of_several_windows_is_cut_as_well(
        pieces in vec(select(PIECES), 1..12), kind in kind(), max in 30usize..300, overlap in 0usize..25,
    ) {
        let text = pieces.concat().repeat(1 + 30_000 / pieces.concat().len());
        let options = ChunkOptions::new(max).with_overlap(overlap).with_kind(kind);
        let text = &text[..(12_000..12_004).find(|&i| text.is_char_boundary(i)).unwrap()];
        check(text, &chunks(&TOKENIZER, text, &options).unwrap(), &options);
    }
}

#[test]
fn boundaries_are_those_of_the_kind() {
    let cut = |text: &str, options: &ChunkOptions| -> Vec<String> {
        chunks(&TOKENIZER, text, options).unwrap().iter().map(|c| c.of(text).to_owned()).collect()
    };
    let count = |text: &str| TOKENIZER.encode_plain(text).unwrap().len();

    let prose = "One sentence here. Another one there.\n\nA second paragraph stands here.\n\nAnd a third.";
    let options = ChunkOptions::new(count("One sentence here. Another one there.\n\n") + 1);
    let found = cut(prose, &options);
    assert!(found[0].ends_with("there.\n\n") || found[0].ends_with("there."), "{found:?}");

    let code =
        "fn one() {\n    let a = 1;\n\n    let b = 2;\n}\n\nfn two() {\n    let c = 3;\n}\n\nfn three() {}\n";
    let first = "fn one() {\n    let a = 1;\n\n    let b = 2;\n}\n\n";
    let options = ChunkOptions::new(count(first) + count("fn two() {\n")).with_kind(ChunkKind::Code);
    assert_eq!(cut(code, &options)[0], first);

    let markdown = "# A\n\nSome text of the first part.\n\n# B\n\nSome text of the second part.\n";
    let options = ChunkOptions::new(count("# A\n\nSome text of the first part.\n\n# B\n"))
        .with_kind(ChunkKind::Markdown);
    assert!(cut(markdown, &options)[1].starts_with("# B"), "{:?}", cut(markdown, &options));
}

#[test]
fn an_overlap_begins_with_a_sentence_where_one_is_near_enough() {
    let sentences: Vec<String> = (0..60).map(|i| format!("Sentence number {i} stands here. ")).collect();
    let text = sentences.concat();
    let one = TOKENIZER.encode_plain("Sentence number 10 stands here. ").unwrap().len();
    let options = ChunkOptions::new(8 * one).with_overlap(2 * one + 2);
    let found = chunks(&TOKENIZER, &text, &options).unwrap();
    check(&text, &found, &options);
    assert!(found.len() > 8);
    for chunk in &found[1..] {
        assert!(chunk.of(&text).starts_with("Sentence"), "{:?}", chunk.of(&text));
        assert_eq!(chunk.of(&text)[..chunk.overlap].matches('.').count(), 2);
    }
}

#[test]
fn what_has_no_boundary_is_cut_all_the_same() {
    let word = "x".repeat(200_000);
    let marks = format!("a{}", "\u{301}".repeat(2_000));
    let binary: String =
        (0..10_000u32).map(|i| char::from((i.wrapping_mul(2_654_435_761) >> 24) as u8)).collect();
    let spaces = " ".repeat(20_000);
    for (text, kind) in [
        (&word, ChunkKind::Text),
        (&marks, ChunkKind::Text),
        (&binary, ChunkKind::Text),
        (&binary, ChunkKind::Markdown),
        (&binary, ChunkKind::Code),
        (&spaces, ChunkKind::Code),
    ] {
        let options = ChunkOptions::new(500).with_overlap(20).with_kind(kind);
        check(text, &chunks(&TOKENIZER, text, &options).unwrap(), &options);
    }
}

#[test]
fn options_out_of_range_are_refused() {
    let refused = |options: ChunkOptions, text: &str| {
        let error = chunks(&TOKENIZER, text, &options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidRequest);
        error.to_string()
    };
    assert!(refused(ChunkOptions::new(0), "x").contains("max_tokens: 0"));
    assert!(
        refused(ChunkOptions::new(8).with_overlap(8), "x").contains("overlap: 8 tokens; fewer than the 8")
    );
    let error = refused(ChunkOptions::new(1), "a 𒀱");
    assert!(error.contains("cannot hold the character '𒀱' at byte 2"), "{error}");
    assert_eq!(chunks(&TOKENIZER, "", &ChunkOptions::new(8)).unwrap(), []);
}
