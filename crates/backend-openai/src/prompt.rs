//! What of a prompt goes to the server: its tokens where they can be known on this side, else a text or messages.

use std::sync::Arc;

use serde_json::json;
use ternion_core::{
    ChatOptions, Error, GenerateRequest, ModelInfo, Prompt, Result, blocking::blocking, text::Tokenizer,
    validate,
};

use crate::{
    Rendering,
    body::{Common, Input},
    client::Client,
    probe::{self, Abilities, Tokenizing},
};

/// A prompt as the server takes it.
#[derive(Debug, Clone)]
pub(crate) struct Prepared {
    pub(crate) input: Input,
    /// How many tokens it has, where that is known.
    pub(crate) tokens: Option<usize>,
    /// The text of the answer is decoded on this side.
    pub(crate) decoded: bool,
}

/// What decides how prompts are prepared.
#[derive(Debug)]
pub(crate) struct Preparation {
    pub(crate) tokenizer: Option<Arc<Tokenizer>>,
    pub(crate) rendering: Rendering,
    pub(crate) abilities: Abilities,
}

impl Preparation {
    /// Whether conversations are rendered on this side.
    pub(crate) fn renders(&self) -> bool {
        self.rendering == Rendering::Auto
            && self.abilities.token_prompts
            && self.tokenizer.as_ref().is_some_and(|tokenizer| tokenizer.has_chat_template())
    }

    /// Whether the answers to conversations begin with thoughts.
    fn thinks(&self) -> bool {
        let answers = self.tokenizer.as_ref().and_then(|tokenizer| tokenizer.answer_format());
        answers.is_some_and(|answers| answers.reasoning.is_some())
    }

    /// Checks a request, and turns its prompt into what the server takes.
    ///
    /// # Errors
    /// Those of [`validate`]; [`Unsupported`](ternion_core::ErrorKind::Unsupported) for a prompt that the server has no
    /// endpoint for.
    pub(crate) async fn prepare(
        &self,
        request: &GenerateRequest,
        info: &ModelInfo,
        client: &Client,
        common: &Common,
    ) -> Result<Prepared> {
        validate::generate(&request.params, info)?;
        validate::not_empty(&request.params.prompt)?;
        let prepared = self.input(request, info).await?;
        let context = info.limits.context_length;
        let tokens = match prepared.tokens {
            Some(tokens) => Some(tokens),
            None if context > 0 && may_overflow(request, context) => {
                self.count(&prepared.input, request, client, common).await?
            }
            None => None,
        };
        if let Some(tokens) = tokens.filter(|_| context > 0) {
            validate::prompt_fits(tokens, context)?;
        }
        Ok(Prepared { tokens, ..prepared })
    }

    async fn input(&self, request: &GenerateRequest, info: &ModelInfo) -> Result<Prepared> {
        let able = &self.abilities;
        let params = &request.params;
        let local = match &params.prompt {
            Prompt::Tokens(_) => false,
            Prompt::Chat(_) if params.constraint.is_some() && self.renders() && self.thinks() => {
                // Of a prompt of tokens the server does not know where a thought ends and what is constrained begins.
                if !able.chat.works {
                    return Err(Error::unsupported(
                        "constraint: the model thinks before it answers, and the server has no /chat/completions to tell the two apart",
                    ));
                }
                false
            }
            Prompt::Chat(_) => self.renders(),
            _ => able.token_prompts,
        };
        let vocab = if info.limits.vocab_size == 0 { usize::MAX } else { info.limits.vocab_size };
        if let Some(tokenizer) = self.tokenizer.as_ref().filter(|_| local) {
            let tokens = if request.knows_tokens(tokenizer) {
                request.prompt_tokens(tokenizer)?
            } else {
                let (request, tokenizer) = (request.clone(), Arc::clone(tokenizer));
                blocking("the prompt's tokenization", move || request.prompt_tokens(&tokenizer)).await?
            };
            validate::tokens("prompt", &tokens, vocab)?;
            let input = Input::Tokens(tokens.to_vec());
            return Ok(Prepared { input, tokens: Some(tokens.len()), decoded: true });
        }
        let plain = |input| Ok(Prepared { input, tokens: None, decoded: false });
        match &params.prompt {
            Prompt::Tokens(tokens) => {
                validate::tokens("prompt", tokens, vocab)?;
                if !able.token_prompts {
                    return Err(Error::unsupported("prompt: the server takes no token ids"));
                }
                let (input, count) = (Input::Tokens(tokens.clone()), tokens.len());
                Ok(Prepared { input, tokens: Some(count), decoded: self.tokenizer.is_some() })
            }
            Prompt::Chat(messages) if able.chat.works => plain(Input::Chat(messages.clone())),
            Prompt::Chat(_) => Err(Error::unsupported("prompt: the server answers no conversations")),
            Prompt::Segments(segments) if segments.iter().any(|segment| !segment.trusted) => {
                Err(Error::unsupported(
                    "prompt: a part that is not trusted needs a tokenizer on this side (`options.tokenizer`) and a server that \
                     takes token ids",
                ))
            }
            prompt if able.completions.works => {
                plain(Input::Text(prompt.text().unwrap_or_default().into_owned()))
            }
            _ => Err(Error::unsupported(
                "prompt: the server has no /completions for a text; a conversation expected",
            )),
        }
    }

    /// How many tokens the server makes of a prompt, if it tells.
    async fn count(
        &self,
        input: &Input,
        request: &GenerateRequest,
        client: &Client,
        common: &Common,
    ) -> Result<Option<usize>> {
        let count = match (input, self.abilities.tokenizing) {
            (Input::Text(text), Tokenizing::Texts | Tokenizing::Chats) => {
                probe::tokenize(client, common, text, true).await?.len()
            }
            // What tools and further variables add depends on the template.
            (Input::Chat(messages), Tokenizing::Chats) if request.params.chat == ChatOptions::default() => {
                probe::count_chat(client, common, &json!(messages)).await?
            }
            _ => return Ok(None),
        };
        Ok(Some(count))
    }
}

/// Whether prompt and answer may not fit together. No common tokenizer makes more tokens of a text than it has bytes; a
/// template adds some words to each message.
fn may_overflow(request: &GenerateRequest, context: usize) -> bool {
    const TEMPLATE: usize = 64;
    let bytes = match &request.params.prompt {
        Prompt::Chat(messages) => {
            let tools: usize =
                request.params.chat.tools.iter().map(|tool| json!(tool).to_string().len()).sum();
            let texts: usize = messages.iter().map(|m| json!(m).to_string().len() + TEMPLATE).sum();
            texts + tools + TEMPLATE
        }
        prompt => prompt.text().map_or(0, |text| text.len()),
    };
    bytes.saturating_add(request.params.max_tokens.unwrap_or(context)) >= context
}
