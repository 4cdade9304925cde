//! Detokenizing token by token: a decoder pipeline that keeps its state.
//!
//! Decoding a sequence is not the concatenation of decoding its tokens: a character may be spread over several tokens,
//! and SentencePiece decoders strip a space at the very start. Decoding everything again for each token would cost
//! quadratic time, and comparing two decodings of a window goes wrong where the window begins. So the steps of the
//! tokenizer's decoder are done here on a stream, each with the little state that it needs.

use std::sync::Arc;

use serde_json::Value;

use crate::{Error, Result, text::Tokenizer};

/// Turns tokens into text as they come. The pieces, one after the other, are what
/// [`Tokenizer::decode`] gives for all tokens, without special tokens.
///
/// A piece ends with a whole character. Held back is only what is not certain yet: the bytes of an incomplete
/// character, and with SentencePiece vocabularies a run of byte tokens, which is valid or invalid as a whole.
#[derive(Clone)]
pub struct IncrementalDecoder {
    tokenizer: Arc<Tokenizer>,
    stages: Vec<Stage>,
}

impl std::fmt::Debug for IncrementalDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IncrementalDecoder").field("stages", &self.stages).finish_non_exhaustive()
    }
}

impl IncrementalDecoder {
    pub(super) fn new(tokenizer: Arc<Tokenizer>) -> Self {
        let stages = tokenizer.stages().to_vec();
        Self { tokenizer, stages }
    }

    /// A decoder that begins in the middle of a text: each token gives the bytes of [`Tokenizer::token_bytes`], also the first.
    pub(super) fn within(tokenizer: Arc<Tokenizer>) -> Self {
        let mut decoder = Self::new(tokenizer);
        decoder.stages.iter_mut().for_each(Stage::skip_start);
        decoder
    }

    /// The text that is certain with this token; often empty. Special tokens and ids that the tokenizer does not have
    /// give no text.
    ///
    /// # Errors
    /// None at present; callers that stream should not depend on it.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let mut text = String::new();
        if let Some(token) = self.tokenizer.text_token(id) {
            feed(&mut self.stages, token, &mut text);
        }
        Ok(text)
    }

    /// The name of a special token, which has no text; `None` for other ids.
    pub fn special_name(&self, id: u32) -> Option<String> {
        if self.tokenizer.text_token(id).is_some() { None } else { self.tokenizer.token(id) }
    }

    /// The text that was held back, after the last token: what is incomplete comes out as U+FFFD. The decoder is then
    /// as new.
    ///
    /// # Errors
    /// None at present; callers that stream should not depend on it.
    pub fn finish(&mut self) -> Result<String> {
        let mut text = String::new();
        for at in 0..self.stages.len() {
            let (done, rest) = self.stages.split_at_mut(at + 1);
            for piece in done[at].finish() {
                feed(rest, piece, &mut text);
            }
        }
        self.stages = self.tokenizer.stages().to_vec();
        Ok(text)
    }
}

fn feed(stages: &mut [Stage], piece: String, text: &mut String) {
    match stages.split_first_mut() {
        None => text.push_str(&piece),
        Some((stage, rest)) => stage.push(piece, &mut |piece| feed(rest, piece, text)),
    }
}

/// One step of a decoder. "Pieces" are tokens until a step joins them, then arbitrary parts of the text.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Stage {
    /// Without a decoder tokens are joined by spaces.
    Separate { first: bool },
    /// GPT-2's alphabet of bytes to UTF-8.
    ByteLevel { pending: Vec<u8> },
    /// `from` to `to` in every piece.
    Replace { from: String, to: String },
    /// `<0xE2>` to the byte. A run of them that is not UTF-8 becomes one U+FFFD per byte.
    ByteFallback { run: Vec<u8> },
    /// Up to `left` of `content` at the start are dropped: of each piece, or of the whole text once it is joined.
    Strip { content: char, count: usize, left: usize, joined: bool },
    /// A space before each token but the first, or instead of it nothing for the `prefix` of a token that continues a word.
    WordPiece { prefix: String, cleanup: bool, first: bool },
    /// `replacement` to a space, but to nothing in the first piece.
    Metaspace { replacement: char, drop: bool, joined: bool },
}

impl Stage {
    /// Leaves out what is special about the start of a text.
    fn skip_start(&mut self) {
        match self {
            Self::Separate { first } | Self::WordPiece { first, .. } => *first = false,
            Self::Strip { left, joined: true, .. } => *left = 0,
            Self::Metaspace { drop, joined: false, .. } => *drop = false,
            _ => {}
        }
    }

    fn push(&mut self, mut piece: String, emit: &mut dyn FnMut(String)) {
        match self {
            Self::Separate { first } => {
                if !std::mem::take(first) {
                    piece.insert(0, ' ');
                }
                emit(piece);
            }
            Self::ByteLevel { pending } => {
                extend_bytes(&piece, pending);
                emit(take_certain(pending));
            }
            Self::Replace { from, to } => emit(piece.replace(from.as_str(), to)),
            Self::ByteFallback { run } => {
                if let Some(byte) = byte_token(&piece) {
                    run.push(byte);
                } else {
                    decode_run(run, emit);
                    emit(piece);
                }
            }
            Self::Strip { content, count, left, joined } => {
                if !*joined {
                    *left = *count;
                }
                let mut rest = piece.as_str();
                while *left > 0 && !rest.is_empty() {
                    match rest.strip_prefix(*content) {
                        Some(shorter) => {
                            rest = shorter;
                            *left -= 1;
                        }
                        None => *left = 0,
                    }
                }
                emit(rest.to_owned());
            }
            Self::WordPiece { prefix, cleanup, first } => {
                if !std::mem::take(first) {
                    piece = match piece.strip_prefix(prefix.as_str()) {
                        Some(rest) => rest.to_owned(),
                        None => format!(" {piece}"),
                    };
                }
                emit(if *cleanup { without_spaces(&piece) } else { piece });
            }
            Self::Metaspace { replacement, drop, joined } => {
                let to = if *drop { "" } else { " " };
                *drop &= *joined;
                emit(piece.replace(*replacement, to));
            }
        }
    }

    /// What is held back, at the end of the tokens.
    fn finish(&mut self) -> Vec<String> {
        let mut pieces = Vec::new();
        match self {
            Self::ByteLevel { pending } if !pending.is_empty() => {
                pieces.push(String::from_utf8_lossy(pending).into_owned());
            }
            Self::ByteFallback { run } => decode_run(run, &mut |piece| pieces.push(piece)),
            _ => {}
        }
        pieces
    }
}

/// The stages for the `decoder` of a tokenizer.json.
///
/// # Errors
/// [`Unsupported`](crate::ErrorKind::Unsupported) for steps that no causal language model's tokenizer has, or in an
/// order that cannot be streamed.
pub(super) fn stages(decoder: Option<&Value>) -> Result<Vec<Stage>> {
    let Some(decoder) = decoder.filter(|d| !d.is_null()) else {
        return Ok(vec![Stage::Separate { first: true }]);
    };
    let mut stages = Vec::new();
    let mut joined = false;
    add_stages(decoder, &mut stages, &mut joined, 0)?;
    Ok(stages)
}

fn add_stages(decoder: &Value, stages: &mut Vec<Stage>, joined: &mut bool, depth: usize) -> Result<()> {
    let kind = decoder.get("type").and_then(Value::as_str).unwrap_or("without `type`");
    let unsupported = |what: &str| {
        Error::unsupported(format!("tokenizer.json: decoder {kind}{what} is not implemented"))
            .with_operation("load tokenizer")
    };
    let character = |key: &str| {
        let mut chars = decoder.get(key).and_then(Value::as_str).unwrap_or_default().chars();
        match (chars.next(), chars.next()) {
            (Some(c), None) => Ok(c),
            _ => Err(unsupported(&format!(" with a `{key}` of not one character"))),
        }
    };
    match kind {
        "Sequence" if depth < 8 => {
            for step in decoder.get("decoders").and_then(Value::as_array).into_iter().flatten() {
                add_stages(step, stages, joined, depth + 1)?;
            }
        }
        "ByteLevel" => {
            if *joined {
                return Err(unsupported(" after a step that joins"));
            }
            stages.push(Stage::ByteLevel { pending: Vec::new() });
            *joined = true;
        }
        "Replace" => {
            let from = decoder.pointer("/pattern/String").and_then(Value::as_str);
            let to = decoder.get("content").and_then(Value::as_str);
            let (Some(from), Some(to)) = (from, to) else { return Err(unsupported(" with a regex")) };
            if *joined && from.chars().count() != 1 {
                return Err(unsupported(" of several characters after a step that joins"));
            }
            stages.push(Stage::Replace { from: from.to_owned(), to: to.to_owned() });
        }
        "ByteFallback" => {
            if *joined {
                return Err(unsupported(" after a step that joins"));
            }
            stages.push(Stage::ByteFallback { run: Vec::new() });
        }
        "Fuse" => *joined = true,
        "Strip" => {
            if decoder.get("stop").and_then(Value::as_u64) != Some(0) {
                return Err(unsupported(" with `stop` over 0"));
            }
            let count = decoder.get("start").and_then(Value::as_u64).unwrap_or(0) as usize;
            stages.push(Stage::Strip { content: character("content")?, count, left: count, joined: *joined });
        }
        "Metaspace" => {
            let drop = decoder.get("prepend_scheme").and_then(Value::as_str) != Some("never");
            stages.push(Stage::Metaspace { replacement: character("replacement")?, drop, joined: *joined });
        }
        "WordPiece" => {
            if *joined {
                return Err(unsupported(" after a step that joins"));
            }
            let prefix = decoder.get("prefix").and_then(Value::as_str).unwrap_or("##").to_owned();
            let cleanup = decoder.get("cleanup").and_then(Value::as_bool).unwrap_or(true);
            stages.push(Stage::WordPiece { prefix, cleanup, first: true });
        }
        _ => return Err(unsupported("")),
    }
    Ok(())
}

/// Whether each token stands for bytes of its own, whatever is around it.
pub(super) fn have_token_bytes(stages: &[Stage]) -> bool {
    let mut joined = false;
    stages.iter().all(|stage| {
        let is_start = matches!(stage, Stage::Strip { joined: true, .. });
        let spaced = matches!(stage, Stage::Separate { .. } | Stage::WordPiece { .. });
        let allowed = is_start || !(joined || spaced);
        joined |= matches!(stage, Stage::ByteLevel { .. });
        allowed
    })
}

/// The bytes of a token in the middle of a text, for stages that [have](have_token_bytes) them.
pub(super) fn token_bytes(stages: &[Stage], mut token: String) -> Vec<u8> {
    for stage in stages {
        match stage {
            Stage::ByteLevel { .. } => {
                let mut bytes = Vec::with_capacity(token.len());
                extend_bytes(&token, &mut bytes);
                return bytes;
            }
            Stage::ByteFallback { .. } => {
                if let Some(byte) = byte_token(&token) {
                    return vec![byte];
                }
            }
            stage => {
                let mut text = String::new();
                let mut stage = stage.clone();
                stage.skip_start();
                stage.push(token, &mut |piece| text.push_str(&piece));
                token = text;
            }
        }
    }
    token.into_bytes()
}

/// The bytes that a token of a byte-level vocabulary stands for: each character is one byte of GPT-2's alphabet. A
/// token with any other character (an added token) stands for itself.
fn extend_bytes(token: &str, bytes: &mut Vec<u8>) {
    let start = bytes.len();
    for c in token.chars() {
        let Some(byte) = alphabet_byte(c) else {
            bytes.truncate(start);
            bytes.extend_from_slice(token.as_bytes());
            return;
        };
        bytes.push(byte);
    }
}

/// GPT-2's alphabet: printable Latin-1 stands for itself, and the 68 other bytes, in ascending order, are U+0100 to
/// U+0143.
fn alphabet_byte(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// Takes from `bytes` all that no later byte can change, with U+FFFD for what is not UTF-8, exactly as
/// `String::from_utf8_lossy` does it for the whole. At most 3 bytes stay.
fn take_certain(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut done = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        done += chunk.valid().len();
        if chunk.invalid().is_empty() {
            continue;
        }
        let incomplete = std::str::from_utf8(&bytes[done..])
            .is_err_and(|e| e.valid_up_to() == 0 && e.error_len().is_none());
        if incomplete {
            break;
        }
        text.push(char::REPLACEMENT_CHARACTER);
        done += chunk.invalid().len();
    }
    bytes.drain(..done);
    text
}

/// A token without the spaces before punctuation and contractions, as the tokenizers crate cleans up WordPiece.
fn without_spaces(piece: &str) -> String {
    const CLEANED: [(&str, &str); 11] = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" do not", " don't"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    CLEANED.iter().fold(piece.to_owned(), |text, (from, to)| text.replace(from, to))
}

fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

fn decode_run(run: &mut Vec<u8>, emit: &mut dyn FnMut(String)) {
    if run.is_empty() {
        return;
    }
    match String::from_utf8(std::mem::take(run)) {
        Ok(text) => emit(text),
        Err(e) => e.as_bytes().iter().for_each(|_| emit(char::REPLACEMENT_CHARACTER.to_string())),
    }
}
