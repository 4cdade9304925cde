//! Tokenizers, of a loaded model or read from a checkpoint alone.

use std::{path::PathBuf, sync::Arc};

use pyo3::{prelude::*, types::PyBytes};
use ternion::{ChatOptions, Error, Message, Prompt, Result, formats::CheckpointOptions, text};

use crate::{
    convert,
    errors::exception,
    operation::Operation,
    source::{self, Need},
};

/// A tokenizer with its chat template.
#[pyclass(frozen, module = "ternion._native")]
pub(crate) struct Tokenizer(Arc<text::Tokenizer>);

impl From<Arc<text::Tokenizer>> for Tokenizer {
    fn from(tokenizer: Arc<text::Tokenizer>) -> Self {
        Self(tokenizer)
    }
}

impl Tokenizer {
    /// Runs `work` without the GIL, as texts may be long.
    fn detached<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&text::Tokenizer) -> Result<T> + Send,
    ) -> PyResult<T> {
        py.detach(|| work(&self.0)).map_err(|error| exception(py, &error))
    }
}

#[pymethods]
impl Tokenizer {
    /// Reads the tokenizer of the checkpoint in a folder or file, without its weights.
    #[staticmethod]
    fn open(path: PathBuf) -> Operation {
        let open = async move {
            let path = source::local(path, Need::Tokenizer).await?;
            let read =
                move || text::Tokenizer::from_parts(CheckpointOptions::default().tokenizer_parts(path)?);
            tokio::task::spawn_blocking(read)
                .await
                .unwrap_or_else(|e| Err(Error::backend("reading the tokenizer panicked").with_source(e)))
        };
        Operation::new(open, |py, tokenizer| Ok(Py::new(py, Self(Arc::new(tokenizer)))?.into_any()))
    }

    /// The ids of a text. `trusted`: special tokens in it are control tokens.
    fn encode(&self, py: Python<'_>, text: &str, add_special: bool, trusted: bool) -> PyResult<Vec<u32>> {
        self.detached(py, |tokenizer| {
            if trusted {
                return tokenizer.encode(text, add_special);
            }
            let ids = tokenizer.encode_plain(text)?;
            let (before, after) = tokenizer.added_around();
            Ok(if add_special { [before, &ids, after].concat() } else { ids })
        })
    }

    /// The ids of a prompt: text, segments, ids or a conversation.
    fn encode_prompt(
        &self,
        py: Python<'_>,
        prompt: &Bound<'_, PyAny>,
        chat: &Bound<'_, PyAny>,
    ) -> PyResult<Vec<u32>> {
        let prompt: Prompt = convert::from_python(prompt)?;
        let options: ChatOptions = convert::from_python(chat)?;
        self.detached(py, |tokenizer| tokenizer.encode_prompt(&prompt, &options))
    }

    /// The text that the chat template makes of a conversation.
    fn render_chat(
        &self,
        py: Python<'_>,
        messages: &Bound<'_, PyAny>,
        chat: &Bound<'_, PyAny>,
    ) -> PyResult<String> {
        let messages: Vec<Message> = convert::from_python(messages)?;
        let options: ChatOptions = convert::from_python(chat)?;
        self.detached(py, |tokenizer| tokenizer.render_chat_with(&messages, &options))
    }

    /// The text of ids. Bytes that are not UTF-8 become U+FFFD.
    fn decode(&self, py: Python<'_>, ids: Vec<u32>, skip_special: bool) -> PyResult<String> {
        self.detached(py, |tokenizer| tokenizer.decode(&ids, skip_special))
    }

    /// The bytes of a token within a text, which need not be whole characters; for a special token, which has no text, those of
    /// its name. `None` for an id that the tokenizer does not have.
    fn token_bytes<'py>(&self, py: Python<'py>, id: u32) -> Option<Bound<'py, PyBytes>> {
        let name = self.0.token(id)?;
        let bytes = self.0.token_bytes(id).unwrap_or_else(|| name.into_bytes());
        Some(PyBytes::new(py, &bytes))
    }

    /// The token of an id, as the vocabulary writes it.
    fn token(&self, id: u32) -> Option<String> {
        self.0.token(id)
    }

    /// The id of a token, as the vocabulary writes it.
    fn token_id(&self, token: &str) -> Option<u32> {
        self.0.token_id(token)
    }

    /// Whether an id is a special token.
    fn is_special(&self, id: u32) -> bool {
        self.0.is_special(id)
    }

    /// The ids that are put before and after a text.
    fn added_around(&self) -> (Vec<u32>, Vec<u32>) {
        let (before, after) = self.0.added_around();
        (before.to_vec(), after.to_vec())
    }

    /// The id that begins a sequence.
    #[getter]
    fn bos_id(&self) -> Option<u32> {
        self.0.bos_id()
    }

    /// The id that ends a sequence.
    #[getter]
    fn eos_id(&self) -> Option<u32> {
        self.0.eos_id()
    }

    /// The highest id + 1.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }

    /// The source of the chat template.
    #[getter]
    fn chat_template(&self) -> Option<String> {
        self.0.chat_template().map(str::to_owned)
    }
}
