//! llama.cpp's own tokenizer, for kinds of vocabularies that the tokenizers crate has no equal of: WordPiece of llama.cpp's
//! form, Unigram, RWKV, PLaMo 2, Gemma 4 and whatever it reads beyond those, and byte-level BPE whose rule no file names.

use std::{
    ffi::{CStr, CString},
    fmt,
    path::Path,
    sync::Arc,
};

use llama_cpp_sys_2 as sys;
use ternion_core::{
    Error, ErrorKind, Result, ResultExt,
    text::{AddedToken, TokenizerParts, Vocabulary},
};

use ternion_formats::gguf::{File, preflight_tokenizer};

use crate::{ffi::Model, gguf, runtime};

/// The most bytes of one call: llama.cpp counts in 32 bits.
const MOST_BYTES: usize = 1 << 30;

/// Stack for each character of a match: `std::regex` calls itself for each, with 340 bytes as libstdc++ is built by GCC 12.
const STACK_OF_CHAR: usize = 1024;
/// The longest run of characters that is split on the caller's stack, and the longest of all.
const SHORT_RUN: usize = 256;
const LONGEST_RUN: usize = 1 << 20;

/// A vocabulary that llama.cpp has read, without the model's weights: it outlives the model.
struct LlamaVocabulary {
    model: Model,
    /// The bytes of each token.
    bytes: Vec<Vec<u8>>,
    around: (Vec<u32>, Vec<u32>),
    adds_space: bool,
    splits: Splits,
}

/// What splits a text before it becomes tokens.
#[derive(Clone, Copy, PartialEq)]
enum Splits {
    /// Nothing that recurses.
    No,
    /// Regular expressions that match either white space or its absence, with at most one space beside.
    Words,
    /// Regular expressions that may match anything.
    Anything,
}

// SAFETY: A vocabulary does not change once it is loaded, and llama.cpp's functions on it are thread-safe, as its header says.
unsafe impl Send for LlamaVocabulary {}
// SAFETY: As above.
unsafe impl Sync for LlamaVocabulary {}

impl fmt::Debug for LlamaVocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LlamaVocabulary").field("tokens", &self.bytes.len()).finish_non_exhaustive()
    }
}

/// The parts of the tokenizer in the file `path`, which has been checked, with llama.cpp's own vocabulary.
///
/// # Errors
/// What llama.cpp says of a vocabulary that it cannot load, where the file has none, and those of [`preflight_tokenizer`].
pub(crate) fn parts(path: &Path, chat_template: Option<String>) -> Result<TokenizerParts> {
    preflight_tokenizer(&File::open(path)?)?;
    let file = path
        .to_str()
        .and_then(|path| CString::new(path).ok())
        .ok_or_else(|| Error::invalid_config("the path is not UTF-8").with("file", path.display()))?;
    runtime::start();
    // SAFETY: The path is a string that ends with NUL and lives for the call.
    let model = Model::load(|| unsafe {
        let mut params = sys::llama_model_default_params();
        params.vocab_only = true;
        params.n_gpu_layers = 0;
        sys::llama_model_load_from_file(file.as_ptr(), params)
    })
    .with("file", path.display())?;
    let tokens = Tokens::of(&model).with("file", path.display())?;
    let bytes = (0..tokens.size).map(|id| tokens.piece(id)).collect();
    let (added, marked) = tokens.added();
    let stated = gguf::text(&model, "tokenizer.ggml.unknown_token_id").and_then(|id| id.parse().ok());
    let unknown = stated.filter(|id| *id < tokens.size).or(marked);
    // SAFETY: The vocabulary is alive.
    let splits = match unsafe { sys::llama_vocab_type(tokens.vocab) } {
        sys::LLAMA_VOCAB_TYPE_BPE => match gguf::text(&model, "tokenizer.ggml.pre").as_deref() {
            None | Some("" | "default" | "gemma4") => Splits::Words,
            _ => Splits::Anything,
        },
        _ => Splits::No,
    };
    let mut vocabulary = LlamaVocabulary { bytes, around: tokens.around(), adds_space: false, splits, model };
    let first = vocabulary.tokenize("a").ok().and_then(|ids| ids.first().copied());
    vocabulary.adds_space = first.is_some_and(|id| vocabulary.bytes(id).starts_with(b" "));

    let vocab = vocabulary.vocab();
    // SAFETY: The vocabulary is alive.
    let named = unsafe {
        [
            ("bos_token", sys::llama_vocab_bos(vocab)),
            ("eos_token", sys::llama_vocab_eos(vocab)),
            ("pad_token", sys::llama_vocab_pad(vocab)),
            ("sep_token", sys::llama_vocab_sep(vocab)),
            ("mask_token", sys::llama_vocab_mask(vocab)),
        ]
    };
    let tokens = Tokens { vocab, size: vocabulary.bytes.len() as u32 };
    let named = named.into_iter().chain(unknown.map(|id| ("unk_token", id as i32)));
    let special =
        named.filter_map(|(role, id)| Some((role.to_owned(), tokens.text(u32::try_from(id).ok()?)?)));
    let special = special.collect();
    let mut parts = TokenizerParts::from_vocabulary(Arc::new(vocabulary), added).with_special_tokens(special);
    parts.chat_template = chat_template;
    Ok(parts)
}

impl LlamaVocabulary {
    fn vocab(&self) -> *const sys::llama_vocab {
        // SAFETY: The model is alive; its vocabulary lives as long as it.
        unsafe { sys::llama_model_get_vocab(self.model.as_ptr()) }
    }
}

impl Vocabulary for LlamaVocabulary {
    fn size(&self) -> usize {
        self.bytes.len()
    }

    fn tokenize(&self, text: &str) -> Result<Vec<u32>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        if text.len() > MOST_BYTES {
            return Err(Error::invalid_request(format!("the text has more than {MOST_BYTES} bytes")));
        }
        let run = self.splits.longest_match(text);
        if run <= SHORT_RUN {
            return self.tokenize_here(text);
        }
        if run > LONGEST_RUN {
            let between = if self.splits == Splits::Words { " without white space between" } else { "" };
            return Err(Error::invalid_request(format!(
                "the text has {run} characters{between}; llama.cpp's tokenizer, which the file needs, \
                 takes at most {LONGEST_RUN}"
            )));
        }
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("ternion-tokenizer".to_owned())
                .stack_size((1 << 20) + run * STACK_OF_CHAR)
                .spawn_scoped(scope, || self.tokenize_here(text))
                .map_err(|e| {
                    Error::new(ErrorKind::ResourceExhausted, "cannot start a thread for the tokenizer")
                        .with_source(e)
                })?;
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn bytes(&self, id: u32) -> Vec<u8> {
        self.bytes.get(id as usize).cloned().unwrap_or_default()
    }

    fn around(&self) -> (Vec<u32>, Vec<u32>) {
        self.around.clone()
    }

    fn adds_space(&self) -> bool {
        self.adds_space
    }
}

impl LlamaVocabulary {
    /// Tokenizes on the stack of this thread, which has to be large enough.
    fn tokenize_here(&self, text: &str) -> Result<Vec<u32>> {
        // No token is shorter than a byte, but for a space before the text.
        let mut ids = vec![0; text.len() + 8];
        let tokenize = |ids: &mut Vec<i32>| {
            // SAFETY: The vocabulary is alive, the text and the ids are as long as is said. `false` twice: no BOS is added,
            // for which there would have to be one, and special tokens are text.
            unsafe {
                let (text, length) = (text.as_ptr().cast(), text.len() as i32);
                sys::llama_tokenize(
                    self.vocab(),
                    text,
                    length,
                    ids.as_mut_ptr(),
                    ids.len() as i32,
                    false,
                    false,
                )
            }
        };
        let mut count = tokenize(&mut ids);
        if count < 0 && count != i32::MIN {
            ids.resize(count.unsigned_abs() as usize, 0);
            count = tokenize(&mut ids);
        }
        let count =
            usize::try_from(count).map_err(|_| Error::backend("llama.cpp cannot tokenize the text"))?;
        ids.truncate(count);
        let known = |id: i32| u32::try_from(id).ok().filter(|id| (*id as usize) < self.bytes.len());
        ids.into_iter()
            .map(|id| known(id).ok_or_else(|| Error::invalid_request("the vocabulary cannot write the text")))
            .collect()
    }
}

impl Splits {
    /// The most characters of `text` that one match can have.
    fn longest_match(self, text: &str) -> usize {
        match self {
            Self::No => 0,
            Self::Anything => text.chars().count(),
            Self::Words => {
                let (mut longest, mut run, mut before) = (0, 0, false);
                for c in text.chars() {
                    let is_space = c.is_ascii_whitespace();
                    run = if is_space == before { run + 1 } else { 1 };
                    before = is_space;
                    longest = longest.max(run);
                }
                longest
            }
        }
    }
}

/// The tokens of a vocabulary that is alive.
struct Tokens {
    vocab: *const sys::llama_vocab,
    size: u32,
}

impl Tokens {
    fn of(model: &Model) -> Result<Self> {
        // SAFETY: The model is alive, and its vocabulary as long.
        let (vocab, size, kind) = unsafe {
            let vocab = sys::llama_model_get_vocab(model.as_ptr());
            (vocab, sys::llama_vocab_n_tokens(vocab), sys::llama_vocab_type(vocab))
        };
        match u32::try_from(size) {
            Ok(size) if size > 0 && kind != sys::LLAMA_VOCAB_TYPE_NONE => Ok(Self { vocab, size }),
            _ => Err(Error::unsupported("the file has no vocabulary")),
        }
    }

    /// The bytes of a token in a text; none for a control token.
    fn piece(&self, id: u32) -> Vec<u8> {
        let mut bytes = vec![0u8; 64];
        loop {
            // SAFETY: The vocabulary is alive, the id in range and the buffer as long as is said.
            let length = unsafe {
                let (buffer, room) = (bytes.as_mut_ptr().cast(), bytes.len() as i32);
                sys::llama_token_to_piece(self.vocab, id as i32, buffer, room, 0, false)
            };
            match usize::try_from(length) {
                Ok(length) => {
                    bytes.truncate(length);
                    return bytes;
                }
                // The length that there is no room for.
                Err(_) => bytes.resize(length.unsigned_abs() as usize, 0),
            }
        }
    }

    /// A token as the file writes it; `None` where that is not UTF-8.
    fn text(&self, id: u32) -> Option<String> {
        if id >= self.size {
            return None;
        }
        // SAFETY: The vocabulary is alive and the id in range; the text ends with NUL and lives as long.
        let text = unsafe { CStr::from_ptr(sys::llama_vocab_get_text(self.vocab, id as i32)) };
        text.to_str().ok().map(str::to_owned)
    }

    /// The tokens that are looked for in a text, and the one that stands for what the vocabulary cannot write.
    fn added(&self) -> (Vec<AddedToken>, Option<u32>) {
        let (mut added, mut unknown) = (Vec::new(), None);
        for id in 0..self.size {
            // SAFETY: The vocabulary is alive and the id in range.
            let attributes = unsafe { sys::llama_vocab_get_attr(self.vocab, id as i32) };
            let has = |attribute| attributes & attribute != 0;
            let is_unknown = has(sys::LLAMA_TOKEN_ATTR_UNKNOWN);
            let special = has(sys::LLAMA_TOKEN_ATTR_CONTROL) || is_unknown;
            if is_unknown {
                unknown = unknown.or(Some(id));
            }
            let Some(text) = self.text(id).filter(|text| !text.is_empty()) else { continue };
            if special || has(sys::LLAMA_TOKEN_ATTR_USER_DEFINED) {
                let mut token = AddedToken::special(text);
                token.special = special;
                token.lstrip = has(sys::LLAMA_TOKEN_ATTR_LSTRIP);
                token.rstrip = has(sys::LLAMA_TOKEN_ATTR_RSTRIP);
                token.stated_id = Some(id);
                added.push(token);
            }
        }
        (added, unknown)
    }

    /// What llama.cpp adds to a text.
    fn around(&self) -> (Vec<u32>, Vec<u32>) {
        let token = |wanted: bool, id: i32| -> Vec<u32> {
            u32::try_from(id).ok().filter(|id| wanted && *id < self.size).into_iter().collect()
        };
        // SAFETY: The vocabulary is alive.
        unsafe {
            let kind = sys::llama_vocab_type(self.vocab);
            let (bos, eos) = (sys::llama_vocab_bos(self.vocab), sys::llama_vocab_eos(self.vocab));
            if kind == sys::LLAMA_VOCAB_TYPE_WPM {
                return (token(true, bos), token(true, sys::llama_vocab_sep(self.vocab)));
            }
            if kind == sys::LLAMA_VOCAB_TYPE_RWKV {
                return (Vec::new(), Vec::new());
            }
            let before = token(sys::llama_vocab_get_add_bos(self.vocab), bos);
            (before, token(sys::llama_vocab_get_add_eos(self.vocab), eos))
        }
    }
}
