//! What llama.cpp asserts of a vocabulary, when it loads one and when it tokenizes.

use std::collections::HashSet;

use ternion_core::{Error, Result};

use super::super::{
    File, ValueType,
    file::duplicate,
    keys::{self, Keys},
    special::SpecialIds,
    token_type,
};
use super::charsmap;
use crate::json::shorten;

const MAX_U32: u64 = u32::MAX as u64;
const MAX_TOKEN: usize = 1 << 16;
/// Bytes of a token that llama.cpp follows or takes apart with a call of a function for each, or compares with each part of a text.
const MAX_PIECE: usize = 1024;
/// Bytes of a token of which llama.cpp lists every end and every beginning of each end.
const MAX_LISTED: usize = 256;

/// What llama.cpp needs of a vocabulary to load it.
pub(super) fn check(file: &File) -> Result<()> {
    let keys = Keys::new(file.architecture()?);
    let model = file.string(keys::TOKENIZER)?;
    let stated = file.integer(&keys.of("vocab_size"), 1..=MAX_U32)?;
    if matches!(model, None | Some("none" | "no_vocab")) {
        return match model {
            None => Err(file.invalid(keys::TOKENIZER, "a string")),
            Some(_) => Ok(()),
        };
    }
    let list = file.array(keys::TOKENS)?.and_then(|tokens| tokens.as_strings());
    // llama.cpp sees a token up to its first NUL.
    let cut = |text| str::split(text, '\0').next().unwrap_or_default();
    let tokens: Vec<&str> =
        list.ok_or_else(|| file.invalid(keys::TOKENS, "an array of strings"))?.map(cut).collect();
    let wrong = |message: String| Error::invalid_model(message).with("file", file.path().display());
    if tokens.is_empty() {
        return Err(file.invalid(keys::TOKENS, "at least one token"));
    }
    if let Some((id, text)) = duplicate(tokens.iter().copied()) {
        let (key, text) = (keys::TOKENS, shorten(&text));
        return Err(wrong(format!("token {id} of `{key}` is `{text}`, which another token is too")));
    }
    // The names that llama.cpp gives to empty tokens must not be in use either.
    if tokens.iter().filter(|text| text.is_empty()).count() > 0
        && tokens.iter().any(|t| t.starts_with("[EMPTY_"))
    {
        return Err(wrong(format!("`{}` has an empty token and one named `[EMPTY_...]`", keys::TOKENS)));
    }
    let count = tokens.len() as u64;
    if let Some(size) = stated.filter(|size| *size > count) {
        return Err(wrong(format!(
            "`{}` has {count} tokens, expected {size} as `{}` says",
            keys::TOKENS,
            keys.of("vocab_size")
        )));
    }
    if let Some(embedding) = file.tensor(keys::EMBED)
        && embedding.dims.get(1).is_some_and(|rows| *rows != count)
    {
        return Err(wrong(format!(
            "the tensor `{}` has the dimensions {:?}, expected {count} rows, one for each token",
            keys::EMBED,
            embedding.dims
        )));
    }
    for key in [keys::TOKEN_TYPES, keys::SCORES] {
        if file.array(key)?.is_some_and(|array| (array.len() as u64) < count || array.as_scalars().is_none())
        {
            return Err(file.invalid(key, &format!("{count} numbers, one for each token")));
        }
    }
    if file.array(keys::MERGES)?.is_some_and(|merges| merges.as_strings().is_none()) {
        return Err(file.invalid(keys::MERGES, "an array of strings"));
    }
    let ids = SpecialIds::read(file, tokens.len())?;
    for (flag, key, id) in [(keys::ADD_BOS, keys::BOS, ids.bos), (keys::ADD_EOS, keys::EOS, ids.eos)] {
        // It would assert when it adds a token that is not there.
        if file.boolean(flag)? == Some(true) && id.is_none() {
            return Err(file.invalid(key, &format!("a token, which `{flag}` wants")));
        }
    }
    by_kind(file, model.unwrap_or_default(), &tokens)
}

/// What holds for a kind of vocabulary alone.
fn by_kind(file: &File, model: &str, tokens: &[&str]) -> Result<()> {
    let wrong = |message: String| Error::invalid_model(message).with("file", file.path().display());
    let longest = match model {
        "bert" | "t5" | "rwkv" => MAX_PIECE,
        "plamo2" => MAX_LISTED,
        _ => MAX_TOKEN,
    };
    if let Some((id, text)) = tokens.iter().enumerate().find(|(_, text)| text.len() > longest) {
        let (key, length) = (keys::TOKENS, text.len());
        return Err(wrong(format!("token {id} of `{key}` has {length} bytes, expected at most {longest}")));
    }
    let types = file.array(keys::TOKEN_TYPES)?.and_then(|types| types.as_integers());
    let bytes = types.into_iter().flatten().enumerate().filter(|(_, kind)| *kind == token_type::BYTE.into());
    let is_byte = |text: &str| text.starts_with("<0x") && text.ends_with('>');
    for (id, text) in bytes.filter_map(|(id, _)| Some((id, tokens.get(id)?))) {
        let what = match model {
            "bert" => "which WordPiece does not have",
            "llama" | "t5" | "gpt2" | "gemma4" if !is_byte(text) => "expected `<0x00>` to `<0xFF>`",
            _ => continue,
        };
        let (key, text) = (keys::TOKENS, shorten(text));
        return Err(wrong(format!("token {id} of `{key}` is `{text}`, of the type for a byte, {what}")));
    }
    match model {
        "t5" => charsmap(file),
        // llama.cpp never gets past a byte that begins tokens and is none.
        "rwkv" => match unfinished(tokens) {
            None => Ok(()),
            Some((id, why)) => Err(wrong(format!("token {id} of `{}` {why}", keys::TOKENS))),
        },
        _ => Ok(()),
    }
}

fn charsmap(file: &File) -> Result<()> {
    let Some(value) = file.value(keys::CHARSMAP) else { return Ok(()) };
    let map = value.as_array().filter(|map| matches!(map.kind(), ValueType::U8 | ValueType::I8));
    let map = map.ok_or_else(|| file.invalid(keys::CHARSMAP, "an array of bytes"))?;
    charsmap::check(&map.bytes).map_err(|what| {
        Error::invalid_model(format!("`{}` {what}", keys::CHARSMAP)).with("file", file.path().display())
    })
}

/// The first token of RWKV that no text gets past, and why.
fn unfinished(tokens: &[&str]) -> Option<(usize, String)> {
    let mut single = [false; 256];
    let mut first = Vec::with_capacity(tokens.len());
    for (id, text) in tokens.iter().enumerate() {
        match unescaped(text).as_deref() {
            None => {
                return Some((
                    id,
                    "has an escape other than `\\x` with two digits, expected none".to_owned(),
                ));
            }
            Some([]) => {}
            Some([byte]) => single[usize::from(*byte)] = true,
            Some([byte, ..]) => first.push((id, *byte)),
        }
    }
    let (id, byte) = first.into_iter().find(|(_, byte)| !single[usize::from(*byte)])?;
    Some((id, format!("begins with the byte 0x{byte:02x}, which is no token of its own, expected one")))
}

/// The bytes that RWKV writes as a text. `None` where llama.cpp reads a digit that is none.
fn unescaped(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    let digit =
        |c: u8| char::from(c).to_digit(16).filter(|_| !c.is_ascii_uppercase()).map(|digit| digit as u8);
    while let Some(byte) = bytes.next() {
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        match bytes.next() {
            None => {}
            Some(b't') => out.push(b'\t'),
            Some(b'n') => out.push(b'\n'),
            Some(b'r') => out.push(b'\r'),
            Some(b'x') => out.push(digit(bytes.next()?)? << 4 | digit(bytes.next()?)?),
            Some(other) => out.push(other),
        }
    }
    Some(out)
}

/// Checks a file whose texts llama.cpp is to tokenize, beyond what [`preflight`](super::super::preflight()) checks: it ends the
/// process at some texts.
///
/// # Errors
/// [`Unsupported`](ternion_core::ErrorKind::Unsupported) for a vocabulary with which that can happen.
pub fn preflight_tokenizer(file: &File) -> Result<()> {
    let model = file.string(keys::TOKENIZER)?.unwrap_or_default();
    let refused = |what: String| {
        Error::unsupported(format!(
            "llama.cpp's tokenizer cannot write every text with this vocabulary: {what}"
        ))
        .with("file", file.path().display())
    };
    if model == "llama" {
        let list = file.array(keys::TOKENS)?.and_then(|tokens| tokens.as_strings());
        let known: HashSet<&str> = list.into_iter().flatten().collect();
        // Bytes of UTF-8; spaces are written as another character.
        let needed = (0u8..=0xf4).filter(|byte| !matches!(byte, b' ' | 0xc0 | 0xc1));
        let has = |byte: u8| {
            let own = [byte];
            known.contains(&*format!("<0x{byte:02X}>"))
                || std::str::from_utf8(&own).is_ok_and(|text| byte != 0 && known.contains(text))
        };
        if let Some(byte) = needed.into_iter().find(|byte| !has(*byte)) {
            return Err(refused(format!("`{}` has no `<0x{byte:02X}>`", keys::TOKENS)));
        }
    }
    // The rule leaves spaces in a text, which may not be looked for among the merges.
    if file.string(keys::PRE_TOKENIZER)? == Some("whitespace") && model != "whitespace" {
        return Err(refused(format!(
            "`{}` is \"whitespace\" and `{}` is not",
            keys::PRE_TOKENIZER,
            keys::TOKENIZER
        )));
    }
    Ok(())
}
