//! The tokenizer's model: one of the tokenizers crate, or an engine's own vocabulary behind the same steps.
//!
//! Special tokens, chat templates and the stream of text work alike for both, since all of them stand around the model.

use std::{
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Serialize, Serializer, ser::Error as _};
use tokenizers::{
    DecoderWrapper, Model, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Token,
    TokenizerImpl,
    models::{TrainerWrapper, bpe::BPE},
};

use super::AddedToken;
use crate::Result;

/// What an engine tokenizes with by itself: for kinds of tokenizers that the tokenizers crate has no equal of.
/// See [`TokenizerParts::from_vocabulary`](super::TokenizerParts::from_vocabulary).
pub trait Vocabulary: fmt::Debug + Send + Sync {
    /// The number of tokens; ids are below it.
    fn size(&self) -> usize;

    /// The ids of a text between two special tokens, or of a whole one. Special tokens in it are text; nothing is added.
    ///
    /// # Errors
    /// Where the text cannot be written with this vocabulary.
    fn tokenize(&self, text: &str) -> Result<Vec<u32>>;

    /// The bytes that a token stands for in the middle of a text; empty for one without text.
    fn bytes(&self, id: u32) -> Vec<u8>;

    /// The tokens that are added before and after a text.
    fn around(&self) -> (Vec<u32>, Vec<u32>);

    /// Whether a space is put before a text, which decoding has to drop again.
    fn adds_space(&self) -> bool;
}

/// The tokenizers crate with either model.
pub(super) type Inner = TokenizerImpl<
    VocabularyModel,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

#[allow(clippy::large_enum_variant, reason = "a tokenizer has one, and most have the larger")]
pub(super) enum VocabularyModel {
    /// The model of a tokenizer, whose other parts are not used.
    Library(tokenizers::Tokenizer),
    Engine(EngineModel),
}

impl VocabularyModel {
    /// The model of the tokenizers crate, if it is of that kind.
    pub(super) fn bpe(&self) -> Option<&BPE> {
        match self {
            Self::Library(library) => match library.get_model() {
                ModelWrapper::BPE(model) => Some(model),
                _ => None,
            },
            Self::Engine(_) => None,
        }
    }
}

/// A vocabulary of an engine as a model of the tokenizers crate. Its tokens are called by their bytes in GPT-2's alphabet, so that
/// one decoder does for all kinds; added tokens are called by their text, by which they are looked for.
pub(super) struct EngineModel {
    pub(super) vocabulary: Arc<dyn Vocabulary>,
    names: Vec<String>,
    ids: HashMap<String, u32>,
}

impl EngineModel {
    pub(super) fn new(vocabulary: Arc<dyn Vocabulary>, added: &[AddedToken]) -> Self {
        let mut names: Vec<String> =
            (0..vocabulary.size() as u32).map(|id| alphabet(&vocabulary.bytes(id))).collect();
        let mut ids = HashMap::with_capacity(names.len());
        for token in added {
            if let Some(id) = token.stated_id
                && let Some(name) = names.get_mut(id as usize)
            {
                name.clone_from(&token.content);
                ids.insert(token.content.clone(), id);
            }
        }
        for (id, name) in names.iter().enumerate() {
            if !ids.contains_key(name) {
                ids.insert(name.clone(), id as u32);
            }
        }
        Self { vocabulary, names, ids }
    }
}

/// Bytes in GPT-2's alphabet.
pub(super) fn alphabet(bytes: &[u8]) -> String {
    let letter = |byte: &u8| match *byte {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => char::from(code),
        code @ 0..=0x20 => char::from_u32(0x100 + u32::from(code)).unwrap_or_default(),
        code @ 0x7F..=0xA0 => char::from_u32(0x121 + u32::from(code) - 0x7F).unwrap_or_default(),
        0xAD => '\u{143}',
    };
    bytes.iter().map(letter).collect()
}

impl Model for VocabularyModel {
    type Trainer = TrainerWrapper;

    fn tokenize(&self, sequence: &str) -> tokenizers::Result<Vec<Token>> {
        let model = match self {
            Self::Library(library) => return library.get_model().tokenize(sequence),
            Self::Engine(model) => model,
        };
        let ids = model.vocabulary.tokenize(sequence)?;
        // Tokens stand for the bytes of the text one after the other, but for a space before it and for what a normalizer
        // of the engine has changed.
        let mut at = 0;
        let token = |id: u32| {
            let start = at;
            let bytes = model.vocabulary.bytes(id);
            let rest = &sequence.as_bytes()[at..];
            let shorter = bytes.strip_prefix(b" ").filter(|shorter| at == 0 && rest.starts_with(shorter));
            at += if rest.starts_with(&bytes) { bytes.len() } else { shorter.map_or(0, <[u8]>::len) };
            let value = model.names.get(id as usize).cloned().unwrap_or_default();
            let floor = |at| (0..=at).rev().find(|at| sequence.is_char_boundary(*at)).unwrap_or(0);
            let ceil = (at..=sequence.len()).find(|at| sequence.is_char_boundary(*at)).unwrap_or(at);
            Token::new(id, value, (floor(start), ceil))
        };
        Ok(ids.into_iter().map(token).collect())
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        match self {
            Self::Library(library) => library.get_model().token_to_id(token),
            Self::Engine(model) => model.ids.get(token).copied(),
        }
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        match self {
            Self::Library(library) => library.get_model().id_to_token(id),
            Self::Engine(model) => model.names.get(id as usize).cloned(),
        }
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        match self {
            Self::Library(library) => library.get_model().get_vocab(),
            Self::Engine(model) => model.ids.iter().map(|(name, id)| (name.clone(), *id)).collect(),
        }
    }

    fn get_vocab_size(&self) -> usize {
        match self {
            Self::Library(library) => library.get_model().get_vocab_size(),
            Self::Engine(model) => model.names.len(),
        }
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        match self {
            Self::Library(library) => library.get_model().save(folder, prefix),
            Self::Engine(_) => Err(OF_ENGINE.into()),
        }
    }

    fn get_trainer(&self) -> TrainerWrapper {
        match self {
            Self::Library(library) => library.get_model().get_trainer(),
            // Nothing here trains.
            Self::Engine(_) => tokenizers::models::bpe::BpeTrainer::default().into(),
        }
    }
}

const OF_ENGINE: &str = "the tokenizer is the engine's own, of which there is no tokenizer.json";

impl Serialize for VocabularyModel {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::Library(library) => library.get_model().serialize(serializer),
            Self::Engine(_) => Err(S::Error::custom(OF_ENGINE)),
        }
    }
}
