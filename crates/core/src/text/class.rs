//! What the classes of transformers make of a `tokenizer.json`. Most take it as it is; some take its vocabulary and build
//! the steps around the model themselves, from flags in `tokenizer_config.json`.

use serde_json::{Map, Value, json};
use tokenizers::ModelWrapper;

use super::library;
use super::vocabulary::{Inner, VocabularyModel};

use super::tokenizer::{json_of, unreadable};
use crate::Result;

/// The steps around a tokenizer's model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pipeline {
    /// Those of `tokenizer.json`.
    #[default]
    AsWritten,
    /// SentencePiece's, as `LlamaTokenizer` of transformers 5 builds them. Version 4 takes those of `tokenizer.json`.
    SentencePiece {
        /// Where a space is put before the text.
        prefix: SpacePrefix,
    },
    /// Those of `tokenizer.json`, but whether a space is put before a text that is split into bytes.
    ByteLevel {
        /// Whether it is.
        add_prefix_space: bool,
    },
}

/// Where SentencePiece puts a space before a text that begins with none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SpacePrefix {
    /// At the start.
    First,
    /// At the start and behind each special token.
    Always,
    /// Nowhere.
    Never,
}

impl Pipeline {
    /// The pipeline of the class that a `tokenizer_config.json` names.
    pub(super) fn of(config: &Map<String, Value>) -> Self {
        let class = config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
        let flag = |name: &str| config.get(name).and_then(Value::as_bool);
        match class.strip_suffix("Fast").unwrap_or(class) {
            "LlamaTokenizer" => Self::SentencePiece {
                prefix: match (flag("add_prefix_space"), flag("legacy")) {
                    (Some(false), _) => SpacePrefix::Never,
                    (_, Some(true)) => SpacePrefix::Always,
                    _ => SpacePrefix::First,
                },
            },
            "GPT2Tokenizer" | "GPTNeoXTokenizer" => {
                Self::ByteLevel { add_prefix_space: flag("add_prefix_space").unwrap_or(false) }
            }
            _ => Self::AsWritten,
        }
    }

    /// Puts the steps in place of the file's.
    pub(super) fn apply(self, inner: &mut Inner) -> Result<()> {
        if self == Self::AsWritten || inner.get_model().bpe().is_none() {
            return Ok(());
        }
        let mut pre_tokenizer = json_of(inner.get_pre_tokenizer())?.unwrap_or_default();
        match self {
            Self::AsWritten => {}
            // Llama 3 and others name the class although their tokenizers are byte-level.
            Self::SentencePiece { .. } if pre_tokenizer.to_string().contains("\"ByteLevel\"") => {}
            Self::SentencePiece { prefix } => sentence_piece(prefix, inner)?,
            Self::ByteLevel { add_prefix_space } => {
                if pre_tokenizer["type"] == "ByteLevel" {
                    pre_tokenizer["add_prefix_space"] = add_prefix_space.into();
                    inner.with_pre_tokenizer(library::pre_tokenizer(&pre_tokenizer)?);
                }
            }
        }
        Ok(())
    }
}

fn sentence_piece(prefix: SpacePrefix, inner: &mut Inner) -> Result<()> {
    let scheme = match prefix {
        SpacePrefix::First => "first",
        SpacePrefix::Always => "always",
        SpacePrefix::Never => "never",
    };
    let steps = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix != SpacePrefix::Never {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let decoder = json!({"type": "Sequence", "decoders": decoders});
    let none: Option<tokenizers::NormalizerWrapper> = None;
    inner.with_normalizer(none).map_err(unreadable)?;
    inner.with_pre_tokenizer(library::pre_tokenizer(&steps)?);
    inner.with_decoder(library::decoder(&decoder)?);
    let Some(model) = inner.get_model().bpe() else { return Ok(()) };
    if !(model.fuse_unk && model.byte_fallback) || model.ignore_merges {
        let mut model = model.clone();
        (model.fuse_unk, model.byte_fallback, model.ignore_merges) = (true, true, false);
        let model = tokenizers::Tokenizer::new(ModelWrapper::BPE(model));
        inner.with_model(VocabularyModel::Library(model));
    }
    Ok(())
}
