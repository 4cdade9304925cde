//! From a configuration to a model on a server: asks what the server is, tries what it can do.

use std::{path::Path, sync::Arc};

use async_trait::async_trait;
use ternion_core::{
    Error, LlmBackend, ModelInfo, Result, ResultExt,
    answer::{AnswerFormat, Reasoning, ToolFormat},
    blocking::blocking,
    config::ModelConfig,
    registry::{BackendFactory, Progress, Suitability},
    text::{Tokenizer, TokenizerParts},
};

use crate::{
    Dialect, OpenAiOptions,
    admission::Admission,
    body::Common,
    client::Client,
    embed,
    facts::{self, Facts},
    model::RemoteModel,
    probe::{self, Abilities, Scoring, Tokenizing},
    prompt::Preparation,
};

/// Requests on their way at the same time, where neither the configuration nor the server says how many.
const SEQUENCES: usize = 256;
/// Requests that may wait beyond those.
const QUEUED: usize = 64;

/// Connects to models for the backend `openai`.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenAiFactory;

#[async_trait]
impl BackendFactory for OpenAiFactory {
    fn name(&self) -> &'static str {
        "openai"
    }

    fn description(&self) -> &'static str {
        "a remote model behind OpenAI's HTTP API"
    }

    fn suitability(&self, config: &ModelConfig) -> Result<Suitability> {
        if config.path.is_some() {
            return Err(Error::unsupported("a remote model has no `path`"));
        }
        let options: OpenAiOptions = config.parse_options()?;
        if options.url.is_empty() {
            return Err(Error::invalid_config("the model has no `options.url`"));
        }
        Ok(Suitability::Native)
    }

    fn options_schema(&self) -> Option<serde_json::Value> {
        Some(schemars::schema_for!(OpenAiOptions).to_value())
    }

    async fn load(
        &self,
        name: &str,
        config: &ModelConfig,
        _progress: Progress,
    ) -> Result<Arc<dyn LlmBackend>> {
        connect(name, config).await.with_operation("load")
    }
}

async fn connect(name: &str, config: &ModelConfig) -> Result<Arc<dyn LlmBackend>> {
    let options: OpenAiOptions = config.parse_options()?;
    options.validate(config)?;
    let (tool_format, reasoning) = (config.tool_format, config.reasoning.clone());
    let answers = AnswerFormat::default().configured(tool_format, reasoning.as_ref());
    let (client, tokenizer, options) = blocking("the setup of the client", move || {
        let client = Client::new(&options)?;
        let mut tokenizer = options.tokenizer.as_deref().map(tokenizer).transpose()?;
        if let Some(tokenizer) = &mut tokenizer {
            tokenizer.configure_answers(tool_format, reasoning.as_ref());
        }
        let tokenizer = tokenizer.map(Arc::new);
        Ok((client, tokenizer, options))
    })
    .await?;

    let facts = facts::find(&client, &options).await.with("server", client.address())?;
    if options.embeddings.unwrap_or(facts.embedding.is_some()) {
        let address = client.address().to_owned();
        return embed::connect(name, config, &options, (client, facts, tokenizer))
            .await
            .with("server", address);
    }
    let common =
        Common { model: facts.model.clone(), dialect: facts.dialect, context_length: facts.context_length };
    let abilities = if options.probe {
        let ids =
            tokenizer.as_ref().and_then(|t| t.encode("One, two", false).ok()).filter(|ids| ids.len() > 1);
        let tried = probe::find(&client, &common, ids).await;
        tried.with("model", &facts.model).with("server", client.address())?
    } else {
        Abilities::untried()
    };
    if facts.listed == Some(false) {
        tracing::warn!(model = name, server_model = facts.model, "the server does not list this model");
    }
    if let Some(tokenizer) = &tokenizer {
        check_tokenizer(tokenizer, &facts, &client, &common, abilities).await?;
    }

    let preparation = Preparation { tokenizer, rendering: options.rendering, abilities };
    let info = describe(name, config, &facts, &preparation)?;
    tracing::info!(
        model = name,
        server = client.address(),
        server_model = facts.model,
        dialect = facts.dialect.as_str(),
        capabilities = ?info.capabilities,
        "connected"
    );
    Ok(Arc::new(RemoteModel {
        admission: Admission::new(&info.limits),
        info: Arc::new(info),
        client: Arc::new(client),
        common,
        preparation,
        sampling: config.sampling.clone(),
        answers,
        token_ids: options.token_ids,
    }))
}

fn tokenizer(folder: &Path) -> Result<Tokenizer> {
    let tokenizer = Tokenizer::from_parts(TokenizerParts::from_folder(folder)?)
        .map_err(|error| error.with("options.tokenizer", folder.display()))?;
    for warning in tokenizer.warnings() {
        tracing::warn!(folder = %folder.display(), "{warning}");
    }
    Ok(tokenizer)
}

/// A tokenizer of another model would give answers that look almost right.
async fn check_tokenizer(
    tokenizer: &Tokenizer,
    facts: &Facts,
    client: &Client,
    common: &Common,
    abilities: Abilities,
) -> Result<()> {
    const SAMPLE: &str = "The quick brown fox: 1234 naïve tokens\n  {\"é\": [42]}";
    if facts.vocab_size > 0 && tokenizer.vocab_size() > facts.vocab_size {
        return Err(Error::invalid_config(format!(
            "options.tokenizer: has {} tokens, and the server's model has {}",
            tokenizer.vocab_size(),
            facts.vocab_size
        )));
    }
    if abilities.tokenizing == Tokenizing::None {
        return Ok(());
    }
    let here = tokenizer.encode(SAMPLE, false)?;
    let there = probe::tokenize(client, common, SAMPLE, false).await?;
    if here == there {
        return Ok(());
    }
    Err(Error::invalid_config(format!(
        "options.tokenizer: is that of another model: it makes {here:?} of a text of which the server makes {there:?}"
    )))
}

fn describe(name: &str, config: &ModelConfig, facts: &Facts, preparation: &Preparation) -> Result<ModelInfo> {
    let (tokenizer, able) = (&preparation.tokenizer, &preparation.abilities);
    let mut info = ModelInfo::new(name, "openai");
    info.format = match facts.dialect {
        Dialect::OpenAi | Dialect::Auto => "remote".to_owned(),
        dialect => format!("remote ({})", dialect.as_str()),
    };
    info.parameters = facts.parameters;
    info.defaults = facts.defaults.clone();
    let limits = &mut info.limits;
    limits.context_length = match (config.context_length, facts.context_length) {
        (Some(wanted), known) if known > 0 && wanted > known => {
            return Err(Error::invalid_config(format!(
                "context_length: {wanted} is out of range; the server's context has {known} tokens"
            )));
        }
        (wanted, known) => wanted.unwrap_or(known),
    };
    limits.vocab_size = match (facts.vocab_size, tokenizer) {
        (0, Some(tokenizer)) => tokenizer.vocab_size(),
        (known, _) => known,
    };
    let slots = if facts.sequences > 0 { facts.sequences } else { SEQUENCES };
    limits.max_sequences = config.max_sequences.unwrap_or(slots);
    limits.max_queued = config.max_queued.unwrap_or(QUEUED);
    info.end_tokens = tokenizer.iter().filter_map(|tokenizer| tokenizer.eos_id()).collect();

    let renders = preparation.renders();
    let chat = if renders { able.completions } else { able.chat };
    let can = &mut info.capabilities;
    can.generate = true;
    can.chat = chat.works;
    can.score = able.scoring != Scoring::None;
    // Of every kind of prompt that is taken.
    can.logprobs = [chat, able.completions].iter().all(|endpoint| endpoint.logprobs || !endpoint.works);
    let answers = tokenizer.as_ref().and_then(|tokenizer| tokenizer.answer_format());
    can.tool_calls =
        if renders { answers.is_some_and(|answers| answers.tools != ToolFormat::None) } else { chat.works };
    can.required_tool_calls = !renders && able.required_calls;
    can.reasoning = if renders {
        answers.is_some_and(|answers| answers.reasoning.is_some())
    } else {
        config.reasoning.as_ref().is_some_and(|reasoning| *reasoning != Reasoning::Off)
            || !matches!(facts.dialect, Dialect::OpenAi | Dialect::Auto)
    };
    // A kind that the endpoint of a request does not enforce is refused with the request.
    can.constraints = [able.chat, able.completions].iter().any(|endpoint| endpoint.constraints.any());
    can.seed = able.seed;
    can.prefix_reuse = able.prefix_reuse;
    Ok(info)
}
