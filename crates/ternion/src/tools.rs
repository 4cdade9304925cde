//! A model that calls functions of the host, in a loop: the model is asked, its calls are run, it gets the results, and so on
//! until it answers.
//!
//! ```
//! use std::sync::Arc;
//!
//! use ternion::{GenerateRequest, LlmBackend, Message, Tool, tools::ToolLoop};
//! use serde_json::{Value, json};
//!
//! # async fn run(model: Arc<dyn LlmBackend>) -> ternion::Result<()> {
//! let add = Tool::function(
//!     "add",
//!     "The sum of two numbers.",
//!     json!({
//!         "type": "object",
//!         "properties": { "a": { "type": "number" }, "b": { "type": "number" } },
//!         "required": ["a", "b"],
//!     }),
//! );
//! let assistant = ToolLoop::new(model).with_tool(add, async |arguments: Value| {
//!     let number = |key: &str| arguments[key].as_f64().ok_or(format!("`{key}` is no number"));
//!     Ok(json!(number("a")? + number("b")?))
//! });
//! let run = assistant.run(GenerateRequest::chat([Message::user("What is 17 + 25?")])).await?;
//! println!("{}", run.answer.text);
//! # Ok(())
//! # }
//! ```

use std::{fmt, future::Future, pin::Pin, sync::Arc};

use serde_json::Value;
use ternion_core::{
    CancellationToken, Completion, Error, ErrorKind, Event, FinishReason, GenerateRequest, LlmBackend,
    Message, Prompt, Result, Tool, ToolCall, ToolChoice, Usage,
};
use tokio::task::JoinSet;

/// How often the model may call functions before it must answer.
const MAX_ROUNDS: usize = 8;

/// What goes wrong in a function. The model gets its text.
pub type FunctionError = Box<dyn std::error::Error + Send + Sync>;

type Outcome = std::result::Result<Value, FunctionError>;
type Function = dyn Fn(Value) -> Pin<Box<dyn Future<Output = Outcome> + Send>> + Send + Sync;

/// A model with functions that it may call.
#[derive(Clone)]
pub struct ToolLoop {
    backend: Arc<dyn LlmBackend>,
    tools: Vec<(Tool, Arc<Function>)>,
    max_rounds: usize,
}

/// What happens in a run.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum RunEvent {
    /// An event of the model. Each round ends with its own [`Event::Done`].
    Model(Event),
    /// A function has been run.
    Result {
        /// The call.
        call: ToolCall,
        /// What the model is told: the function's value as text, or the error.
        result: String,
        /// Whether this is an error.
        failed: bool,
    },
}

/// The end of a run.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Run {
    /// The conversation with all calls, results and the answer, to be continued.
    pub messages: Vec<Message>,
    /// The model's last answer.
    pub answer: Completion,
    /// How often the model has called functions.
    pub rounds: usize,
    /// Tokens used by all rounds together.
    pub usage: Usage,
}

impl ToolLoop {
    /// A model without functions.
    pub fn new(backend: Arc<dyn LlmBackend>) -> Self {
        Self { backend, tools: Vec::new(), max_rounds: MAX_ROUNDS }
    }

    /// Adds a function. It gets its arguments as JSON, which only a model with the capability
    /// [`constraints`](ternion_core::Capabilities::constraints) makes fit the schema. What it returns goes to the model as text: a
    /// string as it is, any other value as JSON. An error, or a panic, goes to the model as well, so that it can try again.
    pub fn with_tool<F>(mut self, tool: Tool, function: impl Fn(Value) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Outcome> + Send + 'static,
    {
        self.tools.push((tool, Arc::new(move |arguments| Box::pin(function(arguments)))));
        self
    }

    /// At most `rounds` rounds of calls. After them the model is asked once more, without tools. Default: 8.
    pub fn with_max_rounds(mut self, rounds: usize) -> Self {
        self.max_rounds = rounds;
        self
    }

    /// Asks the model, runs what it calls, and asks again with the results, until it answers or its answer is cut.
    ///
    /// The request's choice of tools holds for the first round; afterwards the model decides. Calls of one round run side by side, as
    /// tasks. Dropping the future stops them.
    ///
    /// # Errors
    /// Those of [`LlmBackend::generate`]; [`InvalidRequest`](ErrorKind::InvalidRequest) for a prompt that is no conversation;
    /// [`Cancelled`](ErrorKind::Cancelled) if the request is cancelled while functions run.
    pub async fn run(&self, request: GenerateRequest) -> Result<Run> {
        self.run_with(request, |_| {}).await
    }

    /// [`run`](Self::run) that tells what happens.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub async fn run_with(
        &self,
        mut request: GenerateRequest,
        mut on_event: impl FnMut(RunEvent),
    ) -> Result<Run> {
        let Prompt::Chat(mut messages) = request.params.prompt else {
            return Err(Error::invalid_request("prompt: a conversation expected, to add results to"));
        };
        request.params.chat.tools.extend(self.tools.iter().map(|(tool, _)| tool.clone()));
        let mut usage = Usage::default();
        let mut round = 0;
        loop {
            if round == self.max_rounds {
                request.params.chat.tool_choice = ToolChoice::None;
            }
            request.params.prompt = messages.clone().into();
            let answer = self.ask(&request, &mut on_event).await?;
            usage.prompt_tokens += answer.usage.prompt_tokens;
            usage.cached_tokens += answer.usage.cached_tokens;
            usage.completion_tokens += answer.usage.completion_tokens;
            messages.push(answer.clone().into());
            if answer.finish_reason != FinishReason::ToolCalls || round == self.max_rounds {
                return Ok(Run { messages, answer, rounds: round, usage });
            }
            let results = self.call_all(&answer.tool_calls, &request.cancel).await?;
            for (call, result) in answer.tool_calls.into_iter().zip(results) {
                let failed = result.is_err();
                let result = result.unwrap_or_else(|error| format!("error: {error}"));
                let mut message = Message::new("tool", result.as_str()).with_name(&call.name);
                message.tool_call_id.clone_from(&call.id);
                messages.push(message);
                on_event(RunEvent::Result { call, result, failed });
            }
            request.params.chat.tool_choice = ToolChoice::Auto;
            round += 1;
        }
    }

    async fn ask(
        &self,
        request: &GenerateRequest,
        on_event: &mut impl FnMut(RunEvent),
    ) -> Result<Completion> {
        let mut stream = self.backend.generate(request.clone()).await?;
        let mut answer = Completion::default();
        while let Some(event) = stream.next().await {
            let event = event?;
            on_event(RunEvent::Model(event.clone()));
            if answer.add(event) {
                return Ok(answer);
            }
        }
        Err(Error::new(ErrorKind::Closed, "the backend stopped before the answer ended"))
    }

    /// The results of calls in their order; errors as text.
    async fn call_all(
        &self,
        calls: &[ToolCall],
        cancel: &CancellationToken,
    ) -> Result<Vec<std::result::Result<String, String>>> {
        let mut running = JoinSet::new();
        let mut at = std::collections::HashMap::new();
        let mut results = vec![Err("the function has panicked".to_owned()); calls.len()];
        for (index, call) in calls.iter().enumerate() {
            match self.prepare(call) {
                Ok(future) => {
                    at.insert(running.spawn(future).id(), index);
                }
                Err(error) => results[index] = Err(error),
            }
        }
        loop {
            let next = cancel.run_until_cancelled(running.join_next_with_id()).await;
            let next = next.ok_or_else(Error::cancelled)?;
            match next {
                None => return Ok(results),
                // A function that panics keeps the result that was there before.
                Some(Err(_)) => {}
                Some(Ok((id, outcome))) => {
                    if let Some(index) = at.get(&id) {
                        results[*index] = outcome.map(text_of).map_err(|error| error.to_string());
                    }
                }
            }
        }
    }

    /// The work of a call, or why there is none.
    fn prepare(
        &self,
        call: &ToolCall,
    ) -> std::result::Result<Pin<Box<dyn Future<Output = Outcome> + Send>>, String> {
        let Some((_, function)) = self.tools.iter().find(|(tool, _)| tool.name() == call.name) else {
            let names: Vec<&str> = self.tools.iter().map(|(tool, _)| tool.name()).collect();
            return Err(format!("there is no function `{}`; available: {}", call.name, names.join(", ")));
        };
        let arguments = serde_json::from_str(&call.arguments)
            .map_err(|error| format!("the arguments are no valid JSON: {error}"))?;
        Ok(function(arguments))
    }
}

fn text_of(value: Value) -> String {
    match value {
        Value::String(text) => text,
        value => value.to_string(),
    }
}

impl fmt::Debug for ToolLoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.tools.iter().map(|(tool, _)| tool.name()).collect();
        f.debug_struct("ToolLoop")
            .field("model", &self.backend.info().name)
            .field("tools", &names)
            .field("max_rounds", &self.max_rounds)
            .finish()
    }
}
