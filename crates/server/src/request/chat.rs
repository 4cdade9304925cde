//! `POST /v1/chat/completions`: the request.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};
use ternion::{Content, GenerateParams, Message, Prediction, Tool, ToolChoice};

use super::{common::request, schema};
use crate::{error::ApiError, request::Delivery};

request! {
    /// A conversation to answer.
    ChatRequest {
        /// The conversation so far.
        #[schemars(schema_with = "schema::messages")]
        messages: Option<Vec<Message>>,
        /// The most tokens of the answer. Wins over `max_tokens`.
        max_completion_tokens: Option<usize>,
        /// Report the log-probability of each token.
        logprobs: Option<bool>,
        /// Report this many of the most probable tokens at each place; needs `logprobs`.
        top_logprobs: Option<usize>,
        /// Write tokens of log-probabilities as `token_id:N`.
        return_tokens_as_token_ids: Option<bool>,
        /// The tools that the model may call.
        #[schemars(schema_with = "schema::tools")]
        tools: Option<Vec<Tool>>,
        /// Whether it may, must or must not call one.
        #[schemars(schema_with = "schema::tool_choice")]
        tool_choice: Option<ToolChoice>,
        /// Whether one answer may call several tools; on by default.
        parallel_tool_calls: Option<bool>,
        /// The most tokens of thought, as vLLM has it.
        #[serde(alias = "thinking_budget")]
        thinking_token_budget: Option<usize>,
        /// Further variables of the chat template.
        chat_template_kwargs: Option<Map<String, Value>>,
        /// Not supported: the model has its chat template.
        chat_template: Option<String>,
        /// Whether the prompt ends with the header of the assistant's turn; on by default.
        add_generation_prompt: Option<bool>,
        /// Continue the last message instead of answering it.
        continue_final_message: Option<bool>,
        /// How long a model thinks that can be told; goes to the chat template.
        reasoning_effort: Option<ReasoningEffort>,
        /// Text that much of the answer is expected to repeat.
        prediction: Option<PredictedContent>,
        /// The kinds of output; only `text`.
        modalities: Option<Vec<Modality>>,
    }
}

/// How long a model thinks.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ReasoningEffort {
    None,
    Minimal,
    Low,
    Medium,
    High,
    Xhigh,
}

/// A kind of output.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Modality {
    /// Text.
    Text,
}

/// Text that is expected.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
pub(crate) enum PredictedContent {
    /// Text.
    Content {
        /// The text.
        #[schemars(with = "String")]
        content: Content,
    },
}

impl ChatRequest {
    /// Whether tokens are shown by their ids.
    pub(crate) fn tokens_as_ids(&self) -> bool {
        self.return_tokens_as_token_ids.unwrap_or(false)
    }

    /// The parameters of the generation, and the fields that concern the answer's form.
    pub(crate) fn into_params(
        mut self,
        most_messages: usize,
    ) -> Result<(GenerateParams, Delivery), ApiError> {
        let common = self.take_common();
        let delivery = common.delivery()?;
        let mut messages = self.messages.ok_or_else(|| ApiError::field("messages", "is missing"))?;
        if messages.is_empty() {
            return Err(ApiError::field("messages", "is empty; at least one message expected"));
        }
        if messages.len() > most_messages {
            let message = format!("{} messages; at most {most_messages} expected", messages.len());
            return Err(ApiError::field("messages", message));
        }
        for message in &mut messages {
            // OpenAI's newer name for it, which chat templates do not know.
            if message.role == "developer" {
                "system".clone_into(&mut message.role);
            }
        }
        if self.chat_template.is_some() {
            return Err(ApiError::unsupported("chat_template", "a template in the request is not supported"));
        }
        let mut params = GenerateParams::new(messages);
        common.apply(&mut params)?;
        params.max_tokens = self.max_completion_tokens.or(params.max_tokens);
        if params.max_tokens == Some(0) {
            let field =
                if self.max_completion_tokens.is_some() { "max_completion_tokens" } else { "max_tokens" };
            return Err(ApiError::field(field, "0 is out of range; at least 1 expected"));
        }
        params.logprobs = self.logprobs.unwrap_or(false);
        params.top_logprobs = self.top_logprobs.unwrap_or(0);
        params.reasoning_budget = self.thinking_token_budget;
        let options = &mut params.chat;
        options.tools = self.tools.unwrap_or_default();
        options.tool_choice = self.tool_choice.unwrap_or_default();
        options.parallel_tool_calls = self.parallel_tool_calls.unwrap_or(true);
        options.template_args = self.chat_template_kwargs.unwrap_or_default();
        if let Some(effort) = self.reasoning_effort {
            let effort = format!("{effort:?}").to_ascii_lowercase();
            options.template_args.entry("reasoning_effort").or_insert_with(|| effort.into());
        }
        options.continue_final_message = self.continue_final_message.unwrap_or(false);
        options.add_generation_prompt = self.add_generation_prompt.unwrap_or(!options.continue_final_message);
        if options.continue_final_message && options.add_generation_prompt {
            let message = "cannot be combined with `continue_final_message`";
            return Err(ApiError::field("add_generation_prompt", message));
        }
        if let Some(PredictedContent::Content { content }) = self.prediction {
            params.prediction = Prediction::Text(content.into_text());
        }
        Ok((params, delivery))
    }
}
