//! `POST /v1/completions`.

use axum::{extract::State, response::Response};
use futures_util::StreamExt;
use ternion::{GenerateRequest, Prompt, ScoreRequest};

use super::{blocking, chat::seeded, json, tokenizer_of};
use crate::{
    choices::{self, Item, Job},
    error::ApiError,
    reply::{
        chat::Head,
        common::{new_id, now},
        completion::{Collected, CompletionChunks, Echo, Style},
        sse,
    },
    request::{Completion, CompletionRequest, JsonBody, Prompts},
    state::{App, Model},
    token_text::TokenTexts,
};

pub(crate) async fn post(
    State(app): State<App>,
    JsonBody(body): JsonBody<CompletionRequest>,
) -> Result<Response, ApiError> {
    let completion = body.check()?;
    let delivery = completion.delivery.clone();
    let model = app.model(delivery.model.as_deref()).await?;
    let needs_text = completion.logprobs.is_some() && !completion.tokens_as_ids;
    let texts = TokenTexts::new(if needs_text { model.backend.tokenizer() } else { None });
    let prompts = prompts(&model, &completion).await?;
    let jobs: Vec<Job> = prompts.iter().flat_map(|prompt| jobs(prompt, &completion)).collect();
    let style = Style {
        texts: texts.with_ids(completion.tokens_as_ids),
        logprobs: completion.logprobs.is_some(),
        per_prompt: delivery.choices,
        echo: prompts.into_iter().filter_map(|prompt| prompt.echo).collect(),
    };
    let count = jobs.len();
    let head = Head { id: new_id("cmpl"), created: now(), model: model.name };
    let items = choices::start(&app, model.backend, jobs, "prompt").await?;
    if delivery.stream {
        let chunks = CompletionChunks::new(head, &style, count, delivery.include_usage);
        return Ok(sse::respond(items, chunks));
    }
    let mut answers = Collected::new(&style, count);
    let mut items = std::pin::pin!(items);
    while let Some(item) = items.next().await {
        match item {
            Item::Event(index, event) => answers.event(index, event),
            Item::End => break,
            Item::Error(error) => return Err(error),
        }
    }
    Ok(json(answers.into_json(&head)))
}

/// A prompt, and what is given back of it.
struct Prepared {
    prompt: Prompt,
    echo: Option<Echo>,
}

/// The prompts as the model takes them. With `echo` their tokens or their texts have to be found out.
async fn prompts(model: &Model, completion: &Completion) -> Result<Vec<Prepared>, ApiError> {
    let prompts: Vec<Prompt> = match completion.prompts.clone() {
        Prompts::Texts(texts) => texts.into_iter().map(Prompt::Text).collect(),
        Prompts::Tokens(lists) => lists.into_iter().map(Prompt::Tokens).collect(),
    };
    let encodes = matches!(completion.prompts, Prompts::Texts(_)) && !completion.add_special_tokens;
    if !completion.echo && !encodes {
        return Ok(prompts.into_iter().map(|prompt| Prepared { prompt, echo: None }).collect());
    }
    let scores = completion.echo && (completion.logprobs.is_some() || completion.only_echo);
    let only_text = !scores && !encodes && matches!(completion.prompts, Prompts::Texts(_));
    if only_text {
        let echo = |prompt: &Prompt| Echo {
            text: prompt.text().unwrap_or_default().into_owned(),
            tokens: Vec::new(),
        };
        return Ok(prompts
            .into_iter()
            .map(|prompt| Prepared { echo: Some(echo(&prompt)), prompt })
            .collect());
    }
    let tokenizer = tokenizer_of(model)?;
    let (echo, add_special) = (completion.echo, completion.add_special_tokens);
    let prepare = move |prompt: Prompt| {
        let (text, tokens) = match prompt {
            Prompt::Tokens(tokens) => (tokenizer.decode(&tokens, false)?, tokens),
            prompt => {
                let text = prompt.text().unwrap_or_default().into_owned();
                let tokens = tokenizer.encode(&text, add_special)?;
                (text, tokens)
            }
        };
        let echo = echo.then(|| Echo { text, tokens: tokens.clone() });
        Ok(Prepared { prompt: Prompt::Tokens(tokens), echo })
    };
    blocking("prompt", move || prompts.into_iter().map(prepare).collect()).await
}

/// The answers to one prompt.
fn jobs(prepared: &Prepared, completion: &Completion) -> Vec<Job> {
    let mut params = completion.params.clone();
    params.prompt = prepared.prompt.clone();
    let request = GenerateRequest::from(params);
    let scored = completion.logprobs.filter(|_| completion.echo);
    let tokens = prepared.echo.as_ref().map(|echo| echo.tokens.as_slice()).unwrap_or_default();
    (0..completion.delivery.choices)
        .map(|index| {
            let mut job = Job::new(seeded(&request, index));
            // A single token has nothing before it, so there is nothing to score.
            job.score = scored
                .filter(|_| tokens.len() > 1)
                .map(|top| ScoreRequest::new(tokens.to_vec(), 1).with_top(top));
            job.echo_only = completion.only_echo.then_some(tokens.len());
            job
        })
        .collect()
}
