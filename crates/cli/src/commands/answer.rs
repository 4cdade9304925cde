//! One generation, from the request to the closing line: what `chat` and `generate` have in common.

use serde::Serialize;
use ternion::context::{ContextReport, ContextStep};
use ternion::text::TokenName;
use ternion::{
    Error, ErrorKind, Event, FinishReason, GenerateRequest, LlmBackend, PrefillEvent, ServedBy, TextEvent,
    Timing, TokenEvent, Usage,
};

use super::long;
use crate::App;
use crate::args::GenerationArgs;
use crate::failure::{Failure, Outcome};

/// A finished answer.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The text, as far as it came.
    pub(crate) text: String,
    /// What the model thought before it, as far as it came.
    pub(crate) reasoning: String,
    tokens: Vec<Token>,
    finish_reason: FinishReason,
    usage: Usage,
    timing: Timing,
    seed: Option<u64>,
    context: Option<ContextReport>,
    served_by: Option<ServedBy>,
    constraint_complete: Option<bool>,
}

/// A token of an answer, as `--json` shows it.
#[derive(Debug, Serialize)]
struct Token {
    id: u32,
    text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprob: Option<f32>,
}

impl Answer {
    /// Whether Ctrl-C ended it.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.finish_reason == FinishReason::Cancelled
    }

    /// How the command ends that printed this answer. An answer that is cut off within its constraint is of no use to a program.
    pub(crate) fn outcome(&self) -> Outcome {
        if self.is_cancelled() {
            return Err(Failure::Interrupted);
        }
        if self.constraint_complete == Some(false) {
            let reason = self.finish_reason.as_str();
            let message =
                format!("the answer is incomplete under its constraint; it was cut off by {reason}");
            return Err(Error::backend(message).with_operation("generate").into());
        }
        Ok(())
    }

    fn to_json(&self, backend: &dyn LlmBackend) -> serde_json::Value {
        let served_by = self.served_by.clone().unwrap_or_else(|| ServedBy::from(&*backend.info()));
        let (timing, usage) = (&self.timing, &self.usage);
        let (stop, token) = match &self.finish_reason {
            FinishReason::StopString(stop) => (Some(stop), None),
            FinishReason::StopToken(token) => (None, Some(token)),
            _ => (None, None),
        };
        serde_json::json!({
            "model": served_by.model,
            "backend": served_by.backend,
            "text": self.text,
            "reasoning": self.reasoning,
            "finish_reason": self.finish_reason.as_str(),
            "stop_string": stop,
            "stop_token": token,
            "seed": self.seed,
            "usage": usage,
            "timing": {
                "queued_seconds": timing.queued.as_secs_f64(),
                "prefill_seconds": timing.prefill.as_secs_f64(),
                "decode_seconds": timing.decode.as_secs_f64(),
                "first_token_seconds": timing.first_token.map(|t| t.as_secs_f64()),
                "prefill_tokens_per_second": timing.prefill_rate(usage),
                "decode_tokens_per_second": timing.decode_rate(usage),
            },
            "constraint_complete": self.constraint_complete,
            "tokens": self.tokens,
            "context": self.context,
        })
    }
}

/// The request with what the command line says about it.
pub(crate) fn request(prompt: impl Into<ternion::Prompt>, args: &GenerationArgs) -> GenerateRequest {
    let mut request = GenerateRequest::new(prompt)
        .with_max_tokens(args.max_tokens)
        .with_stop(args.stop.clone())
        .with_sampling(args.sampling());
    request.params.logprobs = args.logprobs;
    request
}

fn stop_tokens(backend: &dyn LlmBackend, names: &[TokenName]) -> Outcome<Vec<u32>> {
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let info = backend.info();
    let Some(tokenizer) = backend.tokenizer() else {
        let message = format!("--stop-token: the tokens of the backend `{}` are not known", info.backend);
        return Err(Error::unsupported(message).into());
    };
    let resolve = |name: &TokenName| name.resolve(&tokenizer, info.limits.vocab_size);
    let tokens: Result<Vec<u32>, Error> = names.iter().map(resolve).collect();
    Ok(tokens.map_err(|e| Error::invalid_request(format!("--stop-token: {}", e.message())))?)
}

/// Generates, streams the text (or prints the object), and closes with the speed. Ctrl-C ends it early, which is no
/// failure here.
pub(crate) async fn generate(
    app: &App,
    backend: &dyn LlmBackend,
    mut request: GenerateRequest,
    args: &GenerationArgs,
    show_reasoning: bool,
) -> Outcome<Answer> {
    let logprobs = request.params.logprobs;
    request.params.stop_tokens = stop_tokens(backend, &args.stop_token)?;
    let request = request.with_cancel(app.interrupts.renew());
    let mut stream = backend.generate(request).await?;
    let bar = app.output.steps("prompt");
    let mut answer = Answer {
        text: String::new(),
        reasoning: String::new(),
        tokens: Vec::new(),
        finish_reason: FinishReason::Cancelled,
        usage: Usage::default(),
        timing: Timing::default(),
        seed: None,
        context: None,
        served_by: None,
        constraint_complete: None,
    };
    // A line that has been begun is ended, whatever happens, before anything else is written.
    let ended = async {
        while let Some(event) = stream.next().await {
            match event? {
                Event::Prefill(PrefillEvent { done, total, .. }) => bar.set(done as u64, total as u64),
                Event::Context(ContextStep::Report(report)) => answer.context = Some(report),
                Event::Context(step) => long::show(app, &bar, &step),
                Event::Token(TokenEvent { id, logprob, .. }) => {
                    answer.tokens.push(Token { id, text: String::new(), logprob });
                }
                Event::Reasoning(TextEvent { text, .. }) => {
                    bar.clear();
                    if show_reasoning {
                        app.output.aside(&text);
                    }
                    answer.reasoning.push_str(&text);
                    add_to_token(&mut answer, &text);
                }
                Event::Text(TextEvent { text, .. }) => {
                    bar.clear();
                    if show_reasoning && answer.text.is_empty() && !answer.reasoning.is_empty() {
                        app.output.aside("\n\n");
                    }
                    print(app, &text)?;
                    answer.text.push_str(&text);
                    add_to_token(&mut answer, &text);
                }
                Event::Done(done) => {
                    bar.clear();
                    (answer.finish_reason, answer.usage) = (done.finish_reason, done.usage);
                    (answer.timing, answer.seed, answer.served_by) = (done.timing, done.seed, done.served_by);
                    answer.constraint_complete = done.constraint_complete;
                    return Ok(());
                }
                _ => {}
            }
        }
        let error = Error::new(ErrorKind::Closed, "the backend stopped before the answer ended");
        Err(Failure::from(error.with_operation("generate")))
    }
    .await;
    bar.clear();
    if !app.output.json
        && (ended.is_ok() || !answer.text.is_empty())
        && !matches!(ended, Err(Failure::BrokenPipe))
    {
        app.output.line("")?;
    }
    ended?;
    if app.output.json {
        app.output.object(&answer.to_json(backend))?;
    } else if logprobs {
        for token in &answer.tokens {
            let logprob = token.logprob.map_or_else(|| "-".to_owned(), |p| format!("{p:.4}"));
            app.output.notice(&format!("{logprob:>10} {:>7} {:?}", token.id, token.text));
        }
    }
    app.output.closing(&answer.usage, &answer.timing);
    for line in answer.context.iter().flat_map(long::lines) {
        app.output.notice(&line);
    }
    Ok(answer)
}

/// The text that became certain with a token follows it.
fn add_to_token(answer: &mut Answer, text: &str) {
    if let Some(token) = answer.tokens.last_mut() {
        token.text.push_str(text);
    }
}

fn print(app: &App, text: &str) -> Outcome {
    if app.output.json || text.is_empty() {
        return Ok(());
    }
    app.output.piece(text)
}
