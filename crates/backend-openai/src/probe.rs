//! What a server can do, found out by trying: some requests of a few tokens when a model is loaded.

use bytes::Bytes;
use serde_json::{Map, Value, json};
use ternion_core::{Error, ErrorKind, Message, Result, Tool, ToolChoice};

use crate::{
    Dialect,
    body::{Common, Input, base, logprobs},
    client::Client,
    constraint::{Fields, Kind, candidates},
    score,
    sse::{Events, Next},
    wire::{Delta, Seen},
};

/// Where the ids of an answer's tokens come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum IdSource {
    /// The server does not give them.
    #[default]
    None,
    /// From the field `token_ids`, which the field `return_token_ids` asks for.
    Field,
    /// From log-probabilities.
    Logprobs,
}

/// What one endpoint can do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// It answers.
    pub(crate) works: bool,
    pub(crate) ids: IdSource,
    /// Log-probabilities come with token ids.
    pub(crate) logprobs: bool,
    /// The constraints that are enforced.
    pub(crate) constraints: Fields,
}

/// How given tokens are scored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Scoring {
    #[default]
    None,
    /// By `prompt_logprobs`.
    PromptLogprobs,
    /// By `echo` with `logprobs`.
    Echo(Echo),
}

/// What a server can do beside `echo`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Echo {
    /// The alternatives come with token ids.
    pub(crate) with_ids: bool,
    /// It generates nothing if `max_tokens` is 0. Otherwise one token is generated, so that the prompt has to leave room
    /// for it.
    pub(crate) alone: bool,
}

/// How texts become tokens on the server's side.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Tokenizing {
    #[default]
    None,
    /// `/tokenize`, of texts.
    Texts,
    /// `/tokenize`, also of conversations.
    Chats,
}

/// What a server can do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Abilities {
    pub(crate) chat: Endpoint,
    pub(crate) completions: Endpoint,
    /// A call of a tool can be required.
    pub(crate) required_calls: bool,
    /// Completions take token ids as prompt.
    pub(crate) token_prompts: bool,
    pub(crate) scoring: Scoring,
    pub(crate) tokenizing: Tokenizing,
    /// The same seed gives the same text.
    pub(crate) seed: bool,
    /// A prompt that has come before is not computed again, and the server says so.
    pub(crate) prefix_reuse: bool,
}

impl Abilities {
    /// What is taken for granted where nothing is tried.
    pub(crate) fn untried() -> Self {
        let chat = Endpoint { works: true, ..Endpoint::default() };
        Self { chat, required_calls: true, ..Self::default() }
    }
}

/// Tries a server. `ids` are some tokens of the model, where they are known.
///
/// # Errors
/// Those of a server that answers neither completions nor chats, or that is not to be reached.
pub(crate) async fn find(client: &Client, common: &Common, ids: Option<Vec<u32>>) -> Result<Abilities> {
    let probe = Probe { client, common };
    let text = Input::Text("One, two,".to_owned());
    let (completions, seen, refused) = probe.endpoint(&text).await?;
    let chat_input = Input::Chat(vec![Message::user("Hi")]);
    let (chat, _, chat_refused) = probe.endpoint(&chat_input).await?;
    if !completions.works && !chat.works {
        // The refusal of chats says more: it is what most servers are made for.
        return Err(chat_refused.or(refused).unwrap_or_else(|| Error::backend("the server gives no answer")));
    }
    let tokenized = able(tokenize(client, common, "One, two", false).await)?.filter(|ids| ids.len() > 1);
    let tokenizing = if tokenized.is_none() {
        Tokenizing::None
    } else {
        let counted = able(count_chat(client, common, &json!([{"role": "user", "content": "Hi"}])).await)?;
        if counted.is_some_and(|count| count > 0) { Tokenizing::Chats } else { Tokenizing::Texts }
    };
    let mut abilities = Abilities { chat, completions, tokenizing, ..Abilities::default() };
    for (endpoint, input) in [(&mut abilities.chat, &chat_input), (&mut abilities.completions, &text)] {
        if endpoint.works {
            endpoint.constraints = probe.constraints(input).await?;
        }
    }
    if chat.works {
        abilities.required_calls = able(probe.answer(probe.required_call(&chat_input)).await)?.is_some();
    }
    if completions.works {
        let ids = ids.or(tokenized).or_else(|| (!seen.is_empty()).then_some(seen)).unwrap_or_else(|| vec![1]);
        let ids: Vec<u32> = ids.iter().copied().cycle().take(3).collect();
        let answer = able(probe.answer(probe.body(&Input::Tokens(ids.clone()), 1)).await)?;
        abilities.token_prompts = answer.is_some();
        if abilities.token_prompts {
            abilities.scoring = probe.scoring(&ids).await?;
        }
    }
    // Longer than the blocks in which servers keep prompts.
    let long = "The sun is up and the day is long, so we go to the sea and back home. ".repeat(4);
    let long = if completions.works { Input::Text(long) } else { Input::Chat(vec![Message::user(long)]) };
    (abilities.seed, abilities.prefix_reuse) = probe.repeated(&long).await?;
    tracing::debug!(model = common.model, ?abilities, "tried");
    Ok(abilities)
}

/// `None` for what a server refuses; other errors stay errors.
fn able<T>(outcome: Result<T>) -> Result<Option<T>> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) if is_refusal(&error) => {
            tracing::debug!(%error, "the server cannot do this");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Whether an error says that the server cannot do something, rather than that it cannot do anything.
fn is_refusal(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::InvalidRequest
            | ErrorKind::Unsupported
            | ErrorKind::NotFound
            | ErrorKind::ContextOverflow
            | ErrorKind::Backend
    )
}

struct Probe<'a> {
    client: &'a Client,
    common: &'a Common,
}

/// A short answer.
struct Answer {
    text: String,
    tokens: Vec<Seen>,
    /// Prompt tokens from the cache.
    cached: usize,
}

impl Probe<'_> {
    fn body(&self, input: &Input, max_tokens: usize) -> Map<String, Value> {
        let mut body = base(self.common, input);
        body.insert("max_tokens".into(), max_tokens.into());
        if self.common.dialect == Dialect::OpenAi && matches!(input, Input::Chat(_)) {
            body.remove("max_tokens");
            body.insert("max_completion_tokens".into(), max_tokens.into());
        }
        body.insert("temperature".into(), 0.into());
        body.insert("stream".into(), true.into());
        body
    }

    /// A request for a call of a tool.
    fn required_call(&self, input: &Input) -> Map<String, Value> {
        let tool = Tool::function("ping", "Answers.", json!({"type": "object", "properties": {}}));
        let mut body = self.body(input, 1);
        body.insert("tools".into(), json!([tool]));
        body.insert("tool_choice".into(), json!(ToolChoice::Required));
        body
    }

    /// The kinds of constraints that the answers of an endpoint keep to, and by which field.
    async fn constraints(&self, input: &Input) -> Result<Fields> {
        let mut fields = Fields::default();
        for kind in Kind::ALL {
            for &field in candidates(self.common.dialect, kind) {
                let mut body = self.body(input, kind.trial_tokens());
                let (key, value) = field.of(&kind.trial())?;
                body.insert(key.to_owned(), value);
                if matches!(input, Input::Chat(_)) && self.common.dialect != Dialect::OpenAi {
                    // A thought would take all of the answer.
                    body.insert("chat_template_kwargs".into(), json!({"enable_thinking": false}));
                }
                let answer = able(self.answer(body).await)?;
                if answer.is_some_and(|answer| kind.is_kept(&answer.text)) {
                    fields.set(kind, field);
                    break;
                }
            }
        }
        Ok(fields)
    }

    async fn answer(&self, body: Map<String, Value>) -> Result<Answer> {
        let chat = body.contains_key("messages");
        let url = self.client.api(if chat { "chat/completions" } else { "completions" });
        let body = Bytes::from(Value::Object(body).to_string());
        let response = self.client.open(&url, &body, &mut self.client.waits()).await?;
        let mut events = Events::new(response.bytes_stream(), self.client.first_byte(), self.client.idle);
        let mut answer = Answer { text: String::new(), tokens: Vec::new(), cached: 0 };
        loop {
            match events.next().await {
                Ok(Next::Done) => return Ok(answer),
                Ok(Next::Chunk(chunk)) => {
                    let details = chunk.usage.and_then(|usage| usage.prompt_tokens_details);
                    answer.cached =
                        details.and_then(|details| details.cached_tokens).unwrap_or(answer.cached);
                    for choice in chunk.choices.iter().flatten() {
                        answer.tokens.extend(choice.tokens().unwrap_or_default());
                        answer.text += choice.text.as_deref().unwrap_or_default();
                        answer.text += &choice.delta.as_ref().map(Delta::content).unwrap_or_default();
                    }
                }
                Err(failure) => return Err(self.client.told(failure.error, &url)),
            }
        }
    }

    /// What an endpoint can do, ids of some tokens, and the refusal if it does not work.
    async fn endpoint(&self, input: &Input) -> Result<(Endpoint, Vec<u32>, Option<Error>)> {
        let chat = matches!(input, Input::Chat(_));
        let mut endpoint = Endpoint::default();
        let mut body = self.body(input, 1);
        logprobs(&mut body, self.common.dialect, chat, 1);
        if let Some(answer) = able(self.answer(body).await)? {
            endpoint.works = true;
            endpoint.logprobs = answer.tokens.iter().any(|seen| seen.logprob.is_some());
            if endpoint.logprobs {
                endpoint.ids = IdSource::Logprobs;
            }
            let ids = answer.tokens.iter().map(|seen| seen.id).collect();
            if let Some(found) = self.ids(input).await? {
                endpoint.ids = IdSource::Field;
                return Ok((endpoint, found, None));
            }
            return Ok((endpoint, ids, None));
        }
        match self.answer(self.body(input, 1)).await {
            Ok(_) => {
                endpoint.works = true;
                let found = self.ids(input).await?;
                endpoint.ids = if found.is_some() { IdSource::Field } else { IdSource::None };
                Ok((endpoint, found.unwrap_or_default(), None))
            }
            Err(error) if is_refusal(&error) => Ok((endpoint, Vec::new(), Some(error))),
            Err(error) => Err(error),
        }
    }

    /// The ids that the field `token_ids` gives, if it does.
    async fn ids(&self, input: &Input) -> Result<Option<Vec<u32>>> {
        if !self.common.dialect.has_vllm_sampling() {
            return Ok(None);
        }
        let mut body = self.body(input, 1);
        body.insert("return_token_ids".into(), true.into());
        let answer = able(self.answer(body).await)?;
        let ids = answer.map(|answer| answer.tokens.iter().map(|seen| seen.id).collect::<Vec<_>>());
        Ok(ids.filter(|ids| !ids.is_empty()))
    }

    async fn scoring(&self, ids: &[u32]) -> Result<Scoring> {
        let url = self.client.api("completions");
        // Only vLLM and what follows it can write tokens as ids.
        let with_ids: &[bool] =
            if self.common.dialect.has_vllm_sampling() { &[true, false] } else { &[false] };
        let echoes = with_ids
            .iter()
            .flat_map(|&with_ids| [true, false].map(|alone| Scoring::Echo(Echo { with_ids, alone })));
        for scoring in std::iter::once(Scoring::PromptLogprobs).chain(echoes) {
            let tokens = score::Tokens::new(ids, scoring, usize::MAX);
            let body = score::body(self.common, scoring, tokens, 1);
            let Some(response) = able(self.client.post(&url, &body).await)? else { continue };
            if score::read(&response, scoring, tokens, 1, 1).is_ok() {
                return Ok(scoring);
            }
        }
        Ok(Scoring::None)
    }

    /// Whether a seed decides the text of a hot answer, and whether the second of two equal prompts is found in the cache.
    async fn repeated(&self, input: &Input) -> Result<(bool, bool)> {
        let (mut texts, mut cached) = (Vec::new(), 0);
        for _ in 0..2 {
            let mut body = self.body(input, 12);
            body.insert("temperature".into(), 1.5.into());
            body.insert("seed".into(), 11.into());
            body.insert("stream_options".into(), json!({"include_usage": true}));
            let Some(answer) = able(self.answer(body).await)? else { return Ok((false, false)) };
            texts.push(answer.text);
            cached = answer.cached;
        }
        Ok((texts[0] == texts[1], cached > 0))
    }
}

/// The server's tokens of a text. The body has the names of vLLM and of llama-server.
///
/// # Errors
/// Those of the server; [`Unsupported`](ErrorKind::Unsupported) for a response of another form.
pub(crate) async fn tokenize(
    client: &Client,
    common: &Common,
    text: &str,
    add_special: bool,
) -> Result<Vec<u32>> {
    let body = json!({
        "model": common.model, "prompt": text, "content": text, "parse_special": true,
        "add_special_tokens": add_special, "add_special": add_special,
    });
    let response = client.post(&client.outside("tokenize"), &body).await?;
    let tokens = response.get("tokens").and_then(Value::as_array);
    let ids = tokens.and_then(|all| all.iter().map(|id| u32::try_from(id.as_u64()?).ok()).collect());
    ids.ok_or_else(|| Error::unsupported("the server's /tokenize gives no token ids"))
}

/// How many tokens the server makes of a conversation.
///
/// # Errors
/// As [`tokenize`].
pub(crate) async fn count_chat(client: &Client, common: &Common, messages: &Value) -> Result<usize> {
    if common.dialect == Dialect::LlamaServer {
        let rendered = client.post(&client.outside("apply-template"), &json!({"messages": messages})).await?;
        let prompt = rendered.get("prompt").and_then(Value::as_str);
        let prompt =
            prompt.ok_or_else(|| Error::unsupported("the server's /apply-template gives no prompt"))?;
        return Ok(tokenize(client, common, prompt, true).await?.len());
    }
    let body = json!({"model": common.model, "messages": messages, "add_generation_prompt": true});
    let response = client.post(&client.outside("tokenize"), &body).await?;
    let count = response.get("tokens").and_then(Value::as_array).map(Vec::len);
    count.ok_or_else(|| Error::unsupported("the server's /tokenize does not take conversations"))
}
