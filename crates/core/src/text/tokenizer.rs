//! The tokenizer of a model: text to ids, ids to text, and conversations to prompts.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    panic::AssertUnwindSafe,
    sync::Arc,
};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::{
    AddedVocabulary, Encoding, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper,
};

use super::{
    AddedToken, IncrementalDecoder, TokenizerParts, Vocabulary,
    control::{ControlTokens, choose_sentinel, mark},
    growth, library,
    stream::{self, Stage, stages},
    template::ChatTemplate,
    vocabulary::{EngineModel, Inner, VocabularyModel, alphabet},
};
use crate::{
    Error, Result, ResultExt,
    answer::{AnswerFormat, Reasoning, ToolFormat},
};

/// A tokenizer with its chat template. Immutable; share it in an [`Arc`].
pub struct Tokenizer {
    pub(super) inner: Inner,
    /// The added tokens for untrusted text: special ones do not match.
    pub(super) plain_added: AddedVocabulary,
    /// The pre-tokenizer for text within a prompt, where it differs from the start's (SentencePiece's `first` scheme).
    pub(super) pre_tokenizer_within: Option<PreTokenizerWrapper>,
    pub(super) control: ControlTokens,
    special_ids: HashSet<u32>,
    /// Special tokens that text may become: letters that a side file gives a role, as in `"pad_token": "!"`.
    harmless: HashSet<u32>,
    unk_id: Option<u32>,
    /// A special token is matched after normalizing, so that other text may become it: never trust the fast path.
    pub(super) always_mark: bool,
    /// Tokens before and after a text.
    affixes: (Vec<u32>, Vec<u32>),
    /// The affixes replace the post-processor's.
    own_affixes: bool,
    stages: Vec<Stage>,
    pub(super) template: Option<ChatTemplate>,
    /// How the model answers conversations; `None` without a template.
    answers: Option<AnswerFormat>,
    bos_id: Option<u32>,
    eos_id: Option<u32>,
    vocab_size: usize,
    /// The same without the tokens that only the side files name.
    own_size: usize,
    warnings: Vec<String>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size)
            .field("bos_id", &self.bos_id)
            .field("eos_id", &self.eos_id)
            .field("has_chat_template", &self.has_chat_template())
            .finish_non_exhaustive()
    }
}

/// What is read of a `tokenizer.json` besides what the tokenizers crate makes of it. To parse these parts first also
/// finds broken JSON, which that crate does not expect everywhere.
#[derive(Default, Deserialize)]
struct Head {
    #[serde(default)]
    added_tokens: Vec<HeadToken>,
    model: HeadModel,
}

#[derive(Deserialize)]
struct HeadToken {
    id: u32,
    content: String,
}

#[derive(Default, Deserialize)]
struct HeadModel {
    r#type: Option<String>,
    unk_token: Option<String>,
    unk_id: Option<u32>,
}

impl Tokenizer {
    /// Builds the tokenizer and compiles the chat template.
    ///
    /// # Errors
    /// [`InvalidModel`](crate::ErrorKind::InvalidModel) where a part is damaged, contradicts another or does not fit
    /// the model's vocabulary; [`Unsupported`](crate::ErrorKind::Unsupported) for decoders that no causal language
    /// model has.
    pub fn from_parts(parts: TokenizerParts) -> Result<Self> {
        guarded(|| Self::build(parts), Error::invalid_model).with_operation("load tokenizer")
    }

    fn build(mut parts: TokenizerParts) -> Result<Self> {
        let around = parts.vocabulary.as_ref().map(|vocabulary| vocabulary.around());
        let (head, mut inner) = match parts.vocabulary.take() {
            Some(vocabulary) => (Head::default(), of_engine(vocabulary, &parts.added_tokens)?),
            None => read(&parts.tokenizer_json)?,
        };
        // Settings of a training run; transformers drops them as well unless a call asks for them.
        inner.with_truncation(None).map_err(failed)?;
        inner.with_padding(None);
        parts.pipeline.apply(&mut inner)?;

        let own_size = check_ids(&inner, &head.added_tokens)?;
        let harmless = if around.is_some() {
            HashSet::new() // the vocabulary itself says what is special
        } else {
            single_letters(&inner, &head.added_tokens, &parts.added_tokens)
        };
        add_tokens(&mut inner, &head.added_tokens, &parts.added_tokens)?;
        inner.set_encode_special_tokens(parts.split_special_tokens);
        let added_ids = inner.get_added_vocabulary().get_added_tokens_decoder().keys();
        let vocab_size = added_ids.map(|&id| id as usize + 1).fold(own_size, usize::max);
        let decoder = json_of(inner.get_decoder())?;
        let stages = stages(decoder.as_ref())?;
        let pre_tokenizer_within = pre_tokenizer_within(&inner)?;
        let mut plain_added = inner.get_added_vocabulary().clone();
        plain_added.set_encode_special_tokens(true);

        let special =
            || inner.get_added_vocabulary().get_added_tokens_decoder().iter().filter(|(_, t)| t.special);
        let control = ControlTokens::new(special().map(|(_, token)| token.content.as_str()));
        let special_ids = special().map(|(&id, _)| id).collect();
        let always_mark = inner.get_normalizer().is_some() && special().any(|(_, token)| token.normalized);
        let unk_id = head.model.unk_token.and_then(|token| inner.token_to_id(&token)).or(head.model.unk_id);

        let mut special_tokens = parts.special_tokens;
        let unk_id = match special_tokens.get("unk_token").filter(|_| around.is_some()) {
            Some(token) => inner.token_to_id(token),
            None => unk_id,
        };
        if let Some(id) = parts.bos_id {
            let token = inner.id_to_token(id).ok_or_else(|| {
                Error::invalid_config(format!("bos: {id} is no token; ids below {vocab_size} expected"))
            })?;
            special_tokens.insert("bos_token".to_owned(), token);
        }
        let named = |name: &str| special_tokens.get(name).and_then(|token| inner.token_to_id(token));
        let (bos_id, eos_id) = (parts.bos_id.or_else(|| named("bos_token")), named("eos_token"));
        let own_affixes = around.is_some()
            || parts.bos_id.is_some()
            || parts.add_bos_token.is_some()
            || parts.add_eos_token.is_some();
        let (mut before, mut after) = around.map_or_else(|| added_around(&inner, vocab_size), Ok)?;
        let wanted = |name: &str, id: Option<u32>| match special_tokens.get(name) {
            Some(token) => id.map(|id| vec![id]).ok_or_else(|| {
                Error::invalid_model(format!("`{name}` is `{token}`, which tokenizer.json does not have"))
            }),
            None => Ok(Vec::new()),
        };
        match parts.add_bos_token {
            Some(true) => {
                before = wanted("bos_token", bos_id)?;
                if before.is_empty() {
                    let message = "add_bos: the tokenizer names no BOS; the option `bos` names one";
                    return Err(Error::invalid_config(message));
                }
            }
            Some(false) => before.clear(),
            None if parts.bos_id.is_some() && !before.is_empty() => before = wanted("bos_token", bos_id)?,
            None => {}
        }
        match parts.add_eos_token {
            Some(true) => after = wanted("eos_token", eos_id)?,
            Some(false) => after.clear(),
            None => {}
        }
        let affixes = (before, after);
        let template = parts.chat_template.map(|source| ChatTemplate::new(&source, special_tokens));
        let template = template.transpose()?;
        let answers = template.as_ref().map(|t| AnswerFormat::detect(t.source(), t.prints_tools()));
        let tokenizer = Self {
            plain_added,
            pre_tokenizer_within,
            control,
            special_ids,
            harmless,
            unk_id,
            always_mark,
            affixes,
            own_affixes,
            stages,
            template,
            answers,
            bos_id,
            eos_id,
            vocab_size,
            own_size,
            warnings: parts.warnings,
            inner,
        };
        parts.vocab_limit.map_or(Ok(()), |entries| tokenizer.check_limit(entries))?;
        Ok(tokenizer)
    }

    /// Whether a model whose embedding has `entries` entries can take all tokens, for one that was built without
    /// [`TokenizerParts::vocab_limit`]. Tokens that only side files name may lie beyond: a padding token that was never
    /// trained is common, and a prompt that has one is refused.
    ///
    /// # Errors
    /// [`InvalidModel`](crate::ErrorKind::InvalidModel) where an id lies outside of them.
    pub fn check_limit(&self, entries: usize) -> Result<()> {
        if self.own_size <= entries {
            return Ok(());
        }
        let id = self.own_size - 1;
        let token = self.inner.id_to_token(id as u32).unwrap_or_default();
        Err(Error::invalid_model(format!(
            "tokenizer.json: token `{token}` has id {id}, but the model's vocabulary has {entries} entries"
        ))
        .with_operation("load tokenizer"))
    }

    /// The ids of trusted text: special tokens in it are control tokens. With `add_special` the tokenizer adds what
    /// it adds, for most models a BOS. The same as `tokenizer(text, add_special_tokens=...)` in transformers.
    ///
    /// # Errors
    /// [`InvalidRequest`](crate::ErrorKind::InvalidRequest) where the vocabulary has no way to write the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encode = || self.inner.encode_fast(text, add_special && !self.own_affixes).map_err(failed);
        let encoding = guarded(encode, Error::invalid_request)?;
        let ids = encoding.get_ids();
        if add_special && self.own_affixes {
            Ok([&self.affixes.0, ids, &self.affixes.1].concat())
        } else {
            Ok(ids.to_vec())
        }
    }

    /// The ids of untrusted text: special tokens in it are plain text, and nothing is added.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        guarded(|| self.encode_untrusted(text), Error::invalid_request)
    }

    fn encode_untrusted(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.encode_segment(text, true)?;
        if !self.has_control(&ids) {
            return Ok(ids);
        }
        let sentinel = choose_sentinel(std::iter::once(text));
        self.encode_pieces(&mark(text, &self.control.breaks(text), sentinel), true, sentinel)
    }

    /// The ids of untrusted text in the middle of another text.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_within(&self, text: &str) -> Result<Vec<u32>> {
        guarded(|| self.encode_segment(text, false), Error::invalid_request)
    }

    /// How many tokens `text` is as a prompt, without any that the tokenizer would add around it: the length of
    /// [`encode`](Self::encode) without `add_special`. For text that goes into messages and may have special tokens
    /// in it, take the length of [`encode_plain`](Self::encode_plain); for any other text the two are the same.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn count(&self, text: &str) -> Result<usize> {
        self.encode(text, false).map(|ids| ids.len())
    }

    /// The bytes of `text` that each of its tokens stands for, in their order. `trusted`: special tokens in the text are
    /// control tokens, as [`encode`](Self::encode) takes them; else they are text, as [`encode_plain`](Self::encode_plain) does.
    ///
    /// Tokens that are parts of one character all have that character's bytes.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn token_spans(&self, text: &str, trusted: bool) -> Result<Vec<Range<usize>>> {
        let spans = || {
            let encoding = if trusted {
                self.inner.encode(text, false).map_err(failed)?
            } else {
                let normalizer = self.inner.get_normalizer();
                let parts = self.plain_added.extract_and_normalize(normalizer, text);
                self.encoding_of(parts, true, OffsetType::Byte)?
            };
            Ok(encoding.get_offsets().iter().map(|&(start, end)| start..end).collect())
        };
        guarded(spans, Error::invalid_request)
    }

    /// The text of `ids`. Ids that the tokenizer does not have give no text, and bytes that are not UTF-8 give
    /// U+FFFD. Spaces are not "cleaned up": the text is what the tokens say.
    ///
    /// # Errors
    /// [`Backend`](crate::ErrorKind::Backend) where the decoder fails, which those accepted at load do not.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        if let VocabularyModel::Engine(model) = self.inner.get_model() {
            return Ok(self.decode_with(&model.vocabulary, ids, skip_special));
        }
        let cannot = |e| Error::backend("the tokenizer cannot decode").with_source(e);
        guarded(|| self.inner.decode(ids, skip_special).map_err(cannot), Error::backend)
            .with_operation("decode")
    }

    /// A decoder for a stream of tokens, without special tokens.
    pub fn decoder(self: &Arc<Self>) -> IncrementalDecoder {
        IncrementalDecoder::new(Arc::clone(self))
    }

    /// A decoder for a stream of tokens in the middle of a text, without special tokens: each token gives the bytes of
    /// [`token_bytes`](Self::token_bytes).
    pub fn decoder_within(self: &Arc<Self>) -> IncrementalDecoder {
        IncrementalDecoder::within(Arc::clone(self))
    }

    /// Whether each token stands for bytes of its own, whatever is around it. True for vocabularies of bytes and of
    /// SentencePiece; false where the decoder puts a space between all tokens.
    pub fn has_token_bytes(&self) -> bool {
        stream::have_token_bytes(&self.stages)
    }

    /// The bytes that a token stands for in the middle of a text; they may be a part of a character. `None` for special
    /// tokens, for ids that the tokenizer does not have, and without [`has_token_bytes`](Self::has_token_bytes).
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.text_token(id).filter(|_| self.has_token_bytes())?;
        Some(stream::token_bytes(&self.stages, token))
    }

    /// The highest id + 1, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token, written as in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id, written as in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        match self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&id) {
            Some(added) => Some(added.content.clone()),
            None => self.inner.id_to_token(id),
        }
    }

    /// Whether `id` is a special token, one that has a meaning and no text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// Whether `id` is an added token: one that is looked for in a text before the text is split.
    pub fn is_added(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id)
    }

    /// The token that begins a sequence.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// The token that ends a sequence, according to the tokenizer; a model may have more of them.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos_id
    }

    /// The tokens that [`encode`](Self::encode) adds before and after a text if it is asked to.
    pub fn added_around(&self) -> (&[u32], &[u32]) {
        (&self.affixes.0, &self.affixes.1)
    }

    /// What is doubtful about the files that it was made from, one sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// A `tokenizer.json` with all tokens, those of the side files too.
    ///
    /// # Errors
    /// [`Backend`](crate::ErrorKind::Backend) where a part cannot be written.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        let cannot = |e| Error::backend("the tokenizer cannot be written").with_source(e);
        serde_json::to_vec(&self.inner).map_err(cannot)
    }

    /// Whether conversations can be rendered.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// The source of the chat template.
    pub fn chat_template(&self) -> Option<&str> {
        self.template.as_ref().map(ChatTemplate::source)
    }

    /// How the model writes thoughts and calls in its answers to conversations; `None` without a chat template.
    pub fn answer_format(&self) -> Option<&AnswerFormat> {
        self.answers.as_ref()
    }

    /// Takes over what a model's configuration says about its answers, before what the chat template says.
    pub fn configure_answers(&mut self, tools: Option<ToolFormat>, reasoning: Option<&Reasoning>) {
        self.answers = self.answers.take().map(|format| format.configured(tools, reasoning));
    }

    pub(super) fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// The token as the decoder takes it; `None` where it has no text.
    pub(super) fn text_token(&self, id: u32) -> Option<String> {
        if let VocabularyModel::Engine(model) = self.inner.get_model() {
            let is_text = (id as usize) < model.vocabulary.size() && !self.is_special(id);
            return is_text.then(|| alphabet(&model.vocabulary.bytes(id)));
        }
        let token = self.inner.id_to_token(id)?;
        if self.inner.get_added_vocabulary().is_special_token(&token) { None } else { Some(token) }
    }

    /// What the tokenizers crate does to text, with the special tokens switched off. `first`: the text stands at the
    /// start of the prompt.
    pub(super) fn encode_segment(&self, text: &str, first: bool) -> Result<Vec<u32>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        self.encode_parts(self.plain_added.extract_and_normalize(self.inner.get_normalizer(), text), first)
    }

    /// The ids of text that is normalized.
    pub(super) fn encode_parts(&self, parts: PreTokenizedString, first: bool) -> Result<Vec<u32>> {
        Ok(self.encoding_of(parts, first, OffsetType::None)?.get_ids().to_vec())
    }

    fn encoding_of(
        &self,
        mut parts: PreTokenizedString,
        first: bool,
        offsets: OffsetType,
    ) -> Result<Encoding> {
        let pre_tokenizer = match &self.pre_tokenizer_within {
            Some(within) if !first => Some(within),
            _ => self.inner.get_pre_tokenizer(),
        };
        if let Some(pre_tokenizer) = pre_tokenizer {
            pre_tokenizer.pre_tokenize(&mut parts).map_err(failed)?;
        }
        let model = self.inner.get_model();
        parts.tokenize(|part| tokenizers::Model::tokenize(model, part.get())).map_err(failed)?;
        parts.into_encoding(None, 0, offsets).map_err(failed)
    }

    /// The text of ids of an engine's own vocabulary.
    fn decode_with(&self, vocabulary: &Arc<dyn Vocabulary>, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids.iter().filter(|&&id| (id as usize) < vocabulary.size()) {
            if !self.is_special(id) {
                bytes.extend(vocabulary.bytes(id));
            } else if !skip_special {
                bytes.extend(self.token(id).unwrap_or_default().into_bytes());
            }
        }
        let begins_with_space = vocabulary.adds_space() && bytes.first() == Some(&b' ');
        String::from_utf8_lossy(&bytes[usize::from(begins_with_space)..]).into_owned()
    }

    pub(super) fn has_control(&self, ids: &[u32]) -> bool {
        ids.iter().any(|&id| self.is_control(id))
    }

    /// Unknown characters become the unknown token, which is special but harmless.
    pub(super) fn is_control(&self, id: u32) -> bool {
        self.is_special(id) && Some(id) != self.unk_id && !self.harmless.contains(&id)
    }
}

/// What a `tokenizer.json` holds.
fn read(json: &[u8]) -> Result<(Head, Inner)> {
    growth::check(json)?;
    let head: Head = serde_json::from_slice(json)
        .map_err(|e| Error::invalid_model("tokenizer.json is damaged").with_source(e))?;
    let inner = library::read(json, head.model.r#type.as_deref())?;
    Ok((head, inner))
}

/// An engine's own vocabulary, whose tokens are called by their bytes.
fn of_engine(vocabulary: Arc<dyn Vocabulary>, added: &[AddedToken]) -> Result<Inner> {
    let mut decoders = vec![serde_json::json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false
    })];
    if vocabulary.adds_space() {
        decoders.push(serde_json::json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    let decoder = serde_json::json!({ "type": "Sequence", "decoders": decoders });
    let mut inner = Inner::new(VocabularyModel::Engine(EngineModel::new(vocabulary, added)));
    inner.with_decoder(library::decoder(&decoder)?);
    Ok(inner)
}

/// The tokenizers crate panics on some damaged files (a wrong `precompiled_charsmap`, a template without its tokens),
/// at load or only with certain texts. To a caller this is an error like any other.
pub(super) fn guarded<T>(work: impl FnOnce() -> Result<T>, error: fn(String) -> Error) -> Result<T> {
    // Nothing is left half-done: all that the work changes is its own, or the crate's cache behind a lock.
    std::panic::catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let reason =
            panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        let reason = reason.unwrap_or_default().replace('\n', " ");
        Err(error(format!("tokenizer.json has a part that cannot be used: {reason}")))
    })
}

/// The vocabulary's size, after the checks that ids are what the file says and what the model has.
fn check_ids(inner: &Inner, added: &[HeadToken]) -> Result<usize> {
    for token in added.iter().filter(|t| !t.content.is_empty()) {
        let id = inner.token_to_id(&token.content);
        if id != Some(token.id) {
            let found = id.map_or("no id".to_owned(), |id| format!("id {id}"));
            return Err(Error::invalid_model(format!(
                "tokenizer.json: added token `{}` says id {}, but the vocabulary gives it {found}",
                token.content, token.id
            )));
        }
    }
    if let VocabularyModel::Engine(model) = inner.get_model() {
        return Ok(model.vocabulary.size());
    }
    let size = inner.get_vocab_size(true);
    // Where no id is left out, the largest need not be looked for in a copy of the vocabulary.
    if size > 0 && (0..size).all(|id| inner.id_to_token(id as u32).is_some()) {
        return Ok(size);
    }
    let largest = inner.get_vocab(true).into_values().max();
    largest
        .map(|id| id as usize + 1)
        .ok_or_else(|| Error::invalid_model("tokenizer.json: the vocabulary is empty"))
}

/// The letters of the model's own vocabulary that side files make special. No text with such a letter can avoid it.
fn single_letters(inner: &Inner, own: &[HeadToken], added: &[AddedToken]) -> HashSet<u32> {
    let letters = added.iter().filter(|token| token.content.chars().nth(1).is_none());
    let letters = letters.filter(|token| own.iter().all(|known| known.content != token.content));
    letters.filter_map(|token| inner.token_to_id(&token.content)).collect()
}

/// Adds the tokens that side files name.
fn add_tokens(inner: &mut Inner, own: &[HeadToken], added: &[AddedToken]) -> Result<()> {
    let own_texts: HashSet<&str> = own.iter().map(|token| token.content.as_str()).collect();
    let own_ids: HashSet<u32> = own.iter().map(|token| token.id).collect();
    let known = inner.get_added_vocabulary().get_added_tokens_decoder();
    let known: HashMap<&str, _> = known.values().map(|token| (token.content.as_str(), token)).collect();
    let mut wanted = Vec::new();
    for token in added {
        let is_kept = token.keep_existing && own_texts.contains(token.content.as_str());
        if is_kept || token.stated_id.is_some_and(|id| own_ids.contains(&id)) {
            continue;
        }
        let token = tokenizers::AddedToken::from(token.content.as_str(), token.special)
            .single_word(token.single_word)
            .lstrip(token.lstrip)
            .rstrip(token.rstrip)
            .normalized(token.normalized);
        if known.get(token.content.as_str()) != Some(&&token) {
            wanted.push(token);
        }
    }
    if !wanted.is_empty() {
        inner.add_tokens(wanted).map_err(unreadable)?;
    }
    Ok(())
}

/// What the post-processor adds before and after a text, after the check that its ids are below `limit`.
fn added_around(inner: &Inner, limit: usize) -> Result<(Vec<u32>, Vec<u32>)> {
    let with = inner.encode_fast("a", true).map_err(unreadable)?;
    let without = inner.encode_fast("a", false).map_err(unreadable)?;
    let (with, without) = (with.get_ids(), without.get_ids());
    if let Some(id) = with.iter().find(|&&id| id as usize >= limit) {
        return Err(Error::invalid_model(format!(
            "tokenizer.json: the post-processor adds id {id}, but the vocabulary has {limit} entries"
        )));
    }
    let start = (0..=with.len().saturating_sub(without.len())).find(|&at| with[at..].starts_with(without));
    Ok(start.map_or_else(Default::default, |at| (with[..at].to_vec(), with[at + without.len()..].to_vec())))
}

/// The pre-tokenizer for a text within another one; `None` where it is the same.
fn pre_tokenizer_within(inner: &Inner) -> Result<Option<PreTokenizerWrapper>> {
    let Some(mut json) = json_of(inner.get_pre_tokenizer())? else { return Ok(None) };
    let differs = never_prepend(&mut json);
    if differs { library::pre_tokenizer(&json) } else { Ok(None) }
}

/// Turns SentencePiece's `first` scheme into `never`; whether there was one.
fn never_prepend(json: &mut Value) -> bool {
    match json {
        Value::Object(fields) => {
            let mut changed = false;
            if fields.get("prepend_scheme").and_then(Value::as_str) == Some("first") {
                fields.insert("prepend_scheme".to_owned(), "never".into());
                changed = true;
            }
            fields.values_mut().fold(changed, |changed, value| never_prepend(value) | changed)
        }
        Value::Array(items) => items.iter_mut().fold(false, |changed, item| never_prepend(item) | changed),
        _ => false,
    }
}

pub(super) fn json_of<T: serde::Serialize>(part: Option<&T>) -> Result<Option<Value>> {
    // As text, which is also what whole tokenizers are written as: the code for each other form is large.
    let text = part.map(serde_json::to_string).transpose().map_err(unreadable)?;
    text.map(|text| serde_json::from_str(&text)).transpose().map_err(unreadable)
}

pub(super) fn unreadable(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::invalid_model("tokenizer.json is not understood").with_source(source)
}

fn failed(source: Box<dyn std::error::Error + Send + Sync>) -> Error {
    Error::invalid_request("the tokenizer cannot encode the text")
        .with_source(source)
        .with_operation("encode")
}
