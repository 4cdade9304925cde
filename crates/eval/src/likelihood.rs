//! Tokens of prompts and their log-likelihoods, as lm-evaluation-harness has them for models of transformers.

use std::sync::Arc;

use ternion_core::{Error, LlmBackend, Result, ScoreRequest, text::Tokenizer};
use tokio_util::sync::CancellationToken;

use crate::prompt::is_python_space;

/// Turns text into tokens. A BOS is added where the tokenizer adds one, unless the text begins with it already.
#[derive(Debug, Clone)]
pub(crate) struct Encoder {
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// What stands before a text whose first token is to be predicted: the BOS, else the EOS.
    pub(crate) prefix: u32,
    prefix_text: String,
}

impl Encoder {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>) -> Result<Self> {
        let prefix = tokenizer.bos_id().or(tokenizer.eos_id()).ok_or_else(|| {
            Error::unsupported("the tokenizer has neither a BOS nor an EOS, and one is needed before a text")
        })?;
        let prefix_text = tokenizer.decode(&[prefix], false)?;
        Ok(Self { tokenizer, prefix, prefix_text })
    }

    /// The tokens of a prompt.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let has_prefix = !self.prefix_text.is_empty() && text.starts_with(&self.prefix_text);
        self.tokenizer.encode(text, !has_prefix)
    }

    /// The tokens of a text for perplexity, and how many of them at its start the tokenizer has added.
    pub(crate) fn encode_document(&self, text: &str) -> Result<(Vec<u32>, usize)> {
        let tokens = self.encode(text)?;
        let own = self.tokenizer.encode(text, false)?;
        let added = if tokens.ends_with(&own) { tokens.len() - own.len() } else { 0 };
        Ok((tokens, added))
    }

    /// The tokens of a context and those of its continuation. Both are encoded as one text, and the continuation's are
    /// what is longer; white space at the end of the context belongs to it.
    pub(crate) fn pair(&self, context: &str, continuation: &str) -> Result<(Vec<u32>, Vec<u32>)> {
        let kept = context.trim_end_matches(is_python_space);
        let whole = format!("{context}{continuation}");
        let context = self.encode(kept)?;
        let mut whole = self.encode(&whole)?;
        let continuation = whole.split_off(context.len().min(whole.len()));
        if context.is_empty() || continuation.is_empty() {
            return Err(Error::invalid_request(
                "the tokenizer leaves a context or its continuation without tokens of its own",
            ));
        }
        Ok((context, continuation))
    }
}

/// A continuation's log-likelihood.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Likelihood {
    /// The sum over its tokens.
    pub(crate) total: f64,
    /// The sum over the first of them, as many as were asked for.
    pub(crate) head: f64,
}

/// The log-likelihood of `tokens[start..]`, and of the first `head` of them.
pub(crate) async fn loglikelihood(
    backend: &dyn LlmBackend,
    tokens: Vec<u32>,
    start: usize,
    head: usize,
    cancel: &CancellationToken,
) -> Result<Likelihood> {
    let mut request = ScoreRequest::new(tokens, start);
    request.cancel = cancel.clone();
    let score = backend.score(request).await?;
    let head = score.tokens.iter().take(head).map(|t| f64::from(t.logprob)).sum();
    Ok(Likelihood { total: score.total(), head })
}

/// The last `room` tokens of a context with its continuation, and where the continuation begins. The flag says whether
/// something was cut off.
pub(crate) fn joined(context: &[u32], continuation: &[u32], room: usize) -> Result<(Vec<u32>, usize, bool)> {
    if continuation.len() >= room {
        return Err(Error::invalid_request(format!(
            "the continuation has {} tokens; fewer than the context of {room} expected",
            continuation.len()
        )));
    }
    let cut = (context.len() + continuation.len()).saturating_sub(room);
    let tokens = [&context[cut..], continuation].concat();
    Ok((tokens, context.len() - cut, cut > 0))
}

/// The windows over a text's `tokens`: in each at most `context` tokens, of which those from an index on are scored. Each
/// token is scored once, the first one after `prefix`, and the last window is as full as the others.
pub(crate) fn windows(tokens: &[u32], prefix: u32, context: usize) -> Vec<(Vec<u32>, usize)> {
    // One place of the context is the last token's, which is scored and not fed.
    let most = context.saturating_sub(1).max(1);
    let first = most.min(tokens.len());
    if first == 0 {
        return Vec::new();
    }
    let mut windows = vec![([&[prefix], &tokens[..first]].concat(), 1)];
    let mut done = first;
    while done < tokens.len() {
        let count = most.min(tokens.len() - done);
        done += count;
        let window = &tokens[done - most - 1..done];
        windows.push((window.to_vec(), window.len() - count));
    }
    windows
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example in the documentation of `loglikelihood_rolling`: ten tokens, four at a time.
    #[test]
    fn windows_score_each_token_once_with_as_much_before_it_as_fits() {
        let tokens: Vec<u32> = (0..10).collect();
        let expected = [(vec![99, 0, 1, 2, 3], 1), (vec![3, 4, 5, 6, 7], 1), (vec![5, 6, 7, 8, 9], 3)];
        assert_eq!(windows(&tokens, 99, 5), expected);
        assert_eq!(windows(&tokens[..2], 99, 5), [(vec![99, 0, 1], 1)]);
        assert_eq!(windows(&tokens[..4], 99, 5), [(vec![99, 0, 1, 2, 3], 1)]);
        assert!(windows(&[], 99, 5).is_empty());
    }

    #[test]
    fn a_context_that_is_too_long_loses_its_beginning() {
        assert_eq!(joined(&[1, 2, 3], &[4], 4).unwrap(), (vec![1, 2, 3, 4], 3, false));
        assert_eq!(joined(&[1, 2, 3], &[4], 3).unwrap(), (vec![2, 3, 4], 2, true));
        assert!(joined(&[1, 2, 3], &[4, 5], 2).unwrap_err().to_string().contains("2 tokens"));
    }
}
