//! Perplexity of texts: rolling log-likelihoods in windows, as lm-evaluation-harness has them.

use std::path::Path;

use ternion_core::{Error, ErrorKind, Result};
use tokio_util::sync::CancellationToken;

use crate::{
    data,
    likelihood::{loglikelihood, windows},
    model::Model,
    prompt::is_python_space,
    records::{Outcome, Record},
    task::{DataHash, DataId, Document, Item, Work},
};

/// The text at `path`, or those of all `.txt` files in the folder; each is a document.
pub(crate) fn read(path: &Path) -> Result<(Vec<Document>, Vec<String>, DataId)> {
    let mut files = vec![path.to_owned()];
    if path.is_dir() {
        files = data::list(path)?;
        files.retain(|file| data::extension(file) == "txt");
    }
    if files.is_empty() {
        let error = Error::new(ErrorKind::NotFound, "no .txt file in the folder");
        return Err(error.with("path", path.display()));
    }
    let mut hash = DataHash::default();
    let mut documents = Vec::new();
    let mut texts = Vec::new();
    for file in files {
        let text = data::read_text(&file)?;
        if text.is_empty() {
            return Err(data::empty(&file));
        }
        hash.text(&text);
        let name = file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        documents.push(Document { name, words: count_words(&text), bytes: text.len() });
        texts.push(text);
    }
    let data = hash.finish(texts.len());
    Ok((documents, texts, data))
}

/// The length of Python's `re.split(r"\s+", text)`: one more than there are runs of white space.
fn count_words(text: &str) -> usize {
    let mut after_space = false;
    let mut runs = 0;
    for c in text.chars() {
        let space = is_python_space(c);
        runs += usize::from(space && !after_space);
        after_space = space;
    }
    runs + 1
}

/// The windows of all texts.
pub(crate) fn items(documents: &[Document], texts: &[String], model: &Model) -> Result<Vec<Item>> {
    let encoder = model.scoring("perplexity")?;
    let mut items = Vec::new();
    for (document, text) in documents.iter().zip(texts) {
        let (tokens, added) = encoder.encode_document(text)?;
        for (i, (tokens, start)) in windows(&tokens, encoder.prefix, model.context()).into_iter().enumerate()
        {
            let added = if i == 0 { added } else { 0 };
            items.push(Item {
                id: format!("{}/{i}", document.name),
                group: document.name.clone(),
                work: Work::Score { tokens, start, added },
            });
        }
    }
    Ok(items)
}

/// Scores a window.
pub(crate) async fn score(
    model: &Model,
    item: &Item,
    (tokens, start, added): (&[u32], usize, usize),
    cancel: &CancellationToken,
) -> Result<Record> {
    let count = tokens.len() - start;
    let added = added.min(count);
    let found = loglikelihood(&*model.backend, tokens.to_vec(), start, added, cancel).await?;
    Ok(Record {
        id: item.id.clone(),
        group: item.group.clone(),
        shots: 0,
        truncated: false,
        outcome: Outcome::Scored {
            tokens: count,
            loglikelihood: found.total,
            added_tokens: added,
            added_loglikelihood: found.head,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers are those of CPython's `len(re.split(r"\s+", text))`.
    #[test]
    fn words_are_counted_as_python_splits() {
        for (text, words) in [("a b", 2), (" a  b\n\n", 4), ("", 1), ("\u{a0}x\u{1f}y", 3), ("one", 1)] {
            assert_eq!(count_words(text), words, "{text:?}");
        }
    }
}
