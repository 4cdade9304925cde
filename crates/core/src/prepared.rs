//! What a check of a request computes, kept for the generation that follows.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{Prompt, context::Fitted, text::Tokenizer};

/// The results of checking a request. Clones of the request share them.
///
/// The fields of a request are public, and a layer may send it to another model, so each result is kept with all that it
/// was computed from and is used only for exactly that.
#[derive(Clone, Default)]
pub(crate) struct Prepared(Arc<Mutex<Results>>);

#[derive(Default)]
struct Results {
    tokens: Option<Tokens>,
    fitted: Option<Arc<Fitted>>,
}

struct Tokens {
    tokenizer: Arc<Tokenizer>,
    prompt: Prompt,
    tokens: Vec<u32>,
}

impl Prepared {
    /// The tokens of `prompt`, if this tokenizer has encoded it.
    pub(crate) fn tokens(&self, tokenizer: &Arc<Tokenizer>, prompt: &Prompt) -> Option<Vec<u32>> {
        let results = self.lock();
        let known = results.tokens.as_ref()?;
        (Arc::ptr_eq(&known.tokenizer, tokenizer) && known.prompt == *prompt).then(|| known.tokens.clone())
    }

    pub(crate) fn keep_tokens(&self, tokenizer: &Arc<Tokenizer>, prompt: Prompt, tokens: Vec<u32>) {
        self.lock().tokens = Some(Tokens { tokenizer: Arc::clone(tokenizer), prompt, tokens });
    }

    /// What a context policy made of the request, for the policy to compare with what it is asked.
    pub(crate) fn fitted(&self) -> Option<Arc<Fitted>> {
        self.lock().fitted.clone()
    }

    pub(crate) fn keep_fitted(&self, fitted: Arc<Fitted>) {
        self.lock().fitted = Some(fitted);
    }

    fn lock(&self) -> MutexGuard<'_, Results> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let results = self.lock();
        f.debug_struct("Prepared")
            .field("tokens", &results.tokens.as_ref().map(|t| t.tokens.len()))
            .field("fitted", &results.fitted.is_some())
            .finish()
    }
}
