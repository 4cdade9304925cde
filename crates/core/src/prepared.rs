//! What a check of a request computes, kept for the generation that follows.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{ChatOptions, Prompt, Result, context::Fitted, text::Tokenizer};

/// The results of work on a request. Clones of the request share them.
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
    chat: ChatOptions,
    tokens: Arc<[u32]>,
}

impl Prepared {
    /// The tokens of `prompt`, computed where they are not known. This is the one place where prompts become tokens.
    ///
    /// # Errors
    /// Those of the tokenizer and of the chat template.
    pub(crate) fn tokens(
        &self,
        tokenizer: &Arc<Tokenizer>,
        prompt: &Prompt,
        chat: &ChatOptions,
    ) -> Result<Arc<[u32]>> {
        if let Prompt::Tokens(tokens) = prompt {
            return Ok(tokens.as_slice().into());
        }
        if let Some(tokens) = self.known(tokenizer, prompt, chat) {
            return Ok(tokens);
        }
        // Encodes without the lock: a template may take seconds.
        let tokens: Arc<[u32]> = tokenizer.encode_prompt(prompt, chat)?.into();
        self.lock().tokens = Some(Tokens {
            tokenizer: Arc::clone(tokenizer),
            prompt: prompt.clone(),
            chat: chat.clone(),
            tokens: Arc::clone(&tokens),
        });
        Ok(tokens)
    }

    pub(crate) fn knows_tokens(
        &self,
        tokenizer: &Arc<Tokenizer>,
        prompt: &Prompt,
        chat: &ChatOptions,
    ) -> bool {
        self.known(tokenizer, prompt, chat).is_some()
    }

    fn known(&self, tokenizer: &Arc<Tokenizer>, prompt: &Prompt, chat: &ChatOptions) -> Option<Arc<[u32]>> {
        let results = self.lock();
        let known = results.tokens.as_ref()?;
        let same = Arc::ptr_eq(&known.tokenizer, tokenizer) && known.prompt == *prompt && known.chat == *chat;
        same.then(|| Arc::clone(&known.tokens))
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
