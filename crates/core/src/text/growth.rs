//! Bounds on what a `tokenizer.json` may make of the file itself and of a text.
//!
//! The parts of a tokenizer are small programs, and a chain of them can turn two letters into gigabytes: nine
//! replacements of one letter by ten. So the factor by which each chain may lengthen a text is bounded before the
//! tokenizer is built, which already normalizes the added tokens.

use serde::{Deserialize, Serialize};
use serde_json::{Value, value::RawValue};

use super::{library, tokenizer::json_of};
use crate::{Error, Result};

/// Bytes for each byte. SentencePiece's own table of replacements counts 33, followed by a replacement of spaces 132.
const MAX_FACTOR: usize = 256;

/// Bytes of the JSON of one part. The largest real one is a table of replacements with some 400 KB.
const MAX_PART_BYTES: usize = 4 << 20;

/// Values in lists and objects of the whole file, each of which takes some 100 bytes while it is read. The largest
/// real vocabularies (256 thousand tokens and twice as many merges) have 2.2 million.
const MAX_VALUES: usize = 6 << 20;

#[derive(Deserialize)]
struct Parts<'a> {
    #[serde(borrow)]
    normalizer: Option<&'a RawValue>,
    #[serde(borrow)]
    pre_tokenizer: Option<&'a RawValue>,
    #[serde(borrow)]
    post_processor: Option<&'a RawValue>,
    #[serde(borrow)]
    decoder: Option<&'a RawValue>,
}

/// Checks a `tokenizer.json` before it is read as a whole.
///
/// # Errors
/// [`InvalidModel`](crate::ErrorKind::InvalidModel) naming the part that is damaged, too large or lengthens too much.
pub(super) fn check(json: &[u8]) -> Result<()> {
    // Commas in strings count as well; they are few.
    let values = json.iter().filter(|b| matches!(b, b',' | b'[' | b'{')).count();
    if values > MAX_VALUES {
        return Err(Error::invalid_model(format!(
            "tokenizer.json has {values} values, expected at most {MAX_VALUES}"
        )));
    }
    let parts: Parts<'_> = serde_json::from_slice(json)
        .map_err(|e| Error::invalid_model("tokenizer.json is damaged").with_source(e))?;
    let parts = [
        ("normalizer", parts.normalizer),
        ("pre_tokenizer", parts.pre_tokenizer),
        ("post_processor", parts.post_processor),
        ("decoder", parts.decoder),
    ];
    let mut present = Vec::new();
    for (name, part) in parts {
        let Some(part) = part else { continue };
        let length = part.get().len();
        if length > MAX_PART_BYTES {
            return Err(Error::invalid_model(format!(
                "tokenizer.json: `{name}` has {length} bytes, expected at most {MAX_PART_BYTES}"
            )));
        }
        present.push((name, part.get()));
    }
    // Read as the tokenizers crate does, which also knows elder ways to write a part, and bounded as it has read them.
    let read = library::of_parts(&present)?;
    bounded("normalizer", read.get_normalizer())?;
    bounded("pre_tokenizer", read.get_pre_tokenizer())?;
    bounded("post_processor", read.get_post_processor())?;
    bounded("decoder", read.get_decoder())
}

fn bounded<T: Serialize>(name: &str, part: Option<&T>) -> Result<()> {
    let Some(part) = json_of(part)? else { return Ok(()) };
    if factor(&part) > MAX_FACTOR {
        return Err(Error::invalid_model(format!(
            "tokenizer.json: `{name}` may make a text more than {MAX_FACTOR} times as long"
        )));
    }
    Ok(())
}

/// By how much a part may lengthen a text, rounded up.
fn factor(part: &Value) -> usize {
    let length = |key: &str| part.get(key).and_then(Value::as_str).map_or(0, str::len);
    match part.get("type").and_then(Value::as_str).unwrap_or_default() {
        "Sequence" => ["normalizers", "pretokenizers", "processors", "decoders"]
            .iter()
            .filter_map(|key| part.get(key).and_then(Value::as_array))
            .flatten()
            .fold(1, |product: usize, part| product.saturating_mul(factor(part))),
        "Replace" => match part.pointer("/pattern/String").and_then(Value::as_str).map_or(0, str::len) {
            // An expression may match nothing at all, at every place.
            0 => 1 + length("content"),
            pattern => length("content").div_ceil(pattern).max(1),
        },
        "Prepend" => 1 + length("prepend"),
        // Normal forms as in the Unicode FAQ, for UTF-8; the two processors add tokens at both ends.
        "NFC" | "NFD" | "BertProcessing" | "RobertaProcessing" => 3,
        "NFKC" | "NFKD" => 11,
        // Spaces around a character, then NFD and lower case.
        "BertNormalizer" => 12,
        "Precompiled" => longest_replacement(part),
        // Bytes become letters of up to two bytes, with a space in front.
        "ByteLevel" if part.get("add_prefix_space") == Some(&Value::Bool(true)) => 4,
        "ByteLevel" | "Lowercase" => 2,
        "Metaspace" => 1 + length("replacement"),
        // As decoders: a space or a joiner for each token.
        "WordPiece" => 1 + length("prefix"),
        "BPEDecoder" => 1 + length("suffix"),
        "TemplateProcessing" => template_tokens(part, "single").max(template_tokens(part, "pair")),
        _ => 1,
    }
}

/// The longest string that a table of SentencePiece replaces something by.
fn longest_replacement(part: &Value) -> usize {
    use base64::Engine as _;
    let table = part.get("precompiled_charsmap").and_then(Value::as_str).unwrap_or_default();
    let Ok(table) = base64::engine::general_purpose::STANDARD.decode(table) else { return 1 };
    // The length of a trie, the trie, then strings that end with NUL.
    let Some((length, rest)) = table.split_first_chunk() else { return 1 };
    let strings = rest.get(u32::from_le_bytes(*length) as usize..).unwrap_or_default();
    strings.split(|b| *b == 0).map(<[u8]>::len).max().unwrap_or(0).max(1)
}

/// How many tokens a template makes of a text of one token.
fn template_tokens(part: &Value, template: &str) -> usize {
    let pieces = part.get(template).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let tokens = pieces.iter().map(|piece| match piece.pointer("/SpecialToken/id").and_then(Value::as_str) {
        Some(id) => part
            .get("special_tokens")
            .and_then(|tokens| tokens.get(id)?.get("ids")?.as_array())
            .map_or(0, Vec::len),
        None => 1,
    });
    tokens.fold(0, usize::saturating_add)
}
