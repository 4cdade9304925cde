//! The fields that chat and completion requests share.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;
use ternion::{Constraint, GenerateParams, context::ContextPolicy};

use super::format::{ResponseFormat, StructuredOutputs, json_schema};
use crate::error::ApiError;

/// The most answers of one request, over all of its prompts.
pub(crate) const MAX_CHOICES: usize = 1024;
/// The most stop strings of a request.
const MAX_STOPS: usize = 64;

/// One string or several.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub(crate) enum Strings {
    One(String),
    Many(Vec<String>),
}

impl Strings {
    fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

/// Options of a stream.
#[derive(Debug, Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct StreamOptions {
    /// Send the usage in a last chunk without choices.
    pub(crate) include_usage: Option<bool>,
}

/// Defines a request with fields of its own and those of [`Common`]. `serde(flatten)` would do the same but forgets the place of an
/// error.
macro_rules! request {
    ($(#[$meta:meta])* $name:ident { $($(#[$own_meta:meta])* $own:ident: $own_type:ty,)* }) => {
        request!(@define
            $(#[$meta])*
            $name { $($(#[$own_meta])* $own: $own_type,)* } {
                /// The model, by its name or an alias. Without it, the default model.
                model: Option<String>,
                /// The most tokens of the answer.
                max_tokens: Option<usize>,
                /// 0 takes the most probable token; higher is more varied.
                temperature: Option<f32>,
                /// Keep the smallest set of tokens whose probabilities sum to this.
                top_p: Option<f32>,
                /// Keep this many of the most probable tokens; 0 and -1 keep all.
                top_k: Option<i64>,
                /// Keep tokens at least this many times as probable as the best.
                min_p: Option<f32>,
                /// Subtracted once from the logit of each token that the answer has.
                presence_penalty: Option<f32>,
                /// Subtracted from the logit of a token each time that the answer has it.
                frequency_penalty: Option<f32>,
                /// Over 1 makes tokens of prompt and answer less likely to come again.
                repetition_penalty: Option<f32>,
                /// Added to the logits of tokens, by token id.
                logit_bias: Option<std::collections::BTreeMap<String, f32>>,
                /// Draw the same tokens each time.
                seed: Option<i64>,
                /// The answer ends before one of these.
                stop: Option<crate::request::common::Strings>,
                /// The answer ends with one of these tokens.
                stop_token_ids: Option<Vec<u32>>,
                /// Go on past the tokens that end an answer.
                ignore_eos: Option<bool>,
                /// Not supported; at most 0.
                min_tokens: Option<usize>,
                /// Answers to each prompt.
                n: Option<usize>,
                /// Send the answer in pieces as server-sent events.
                stream: Option<bool>,
                /// Options of the stream.
                stream_options: Option<crate::request::common::StreamOptions>,
                /// What the answer must look like.
                response_format: Option<crate::request::format::ResponseFormat>,
                /// What the answer must look like, as vLLM has it.
                structured_outputs: Option<crate::request::format::StructuredOutputs>,
                /// A JSON schema, as older versions of vLLM have it.
                guided_json: Option<serde_json::Value>,
                /// A regular expression.
                guided_regex: Option<String>,
                /// A list of texts.
                guided_choice: Option<Vec<String>>,
                /// A grammar.
                guided_grammar: Option<String>,
                /// Of Ternion: what is done if the prompt does not fit into the context.
                context_policy: Option<ternion::context::ContextPolicy>,
                /// Of Ternion: a long text that the prompt is about.
                document: Option<String>,
            }
        );
    };
    (@define $(#[$meta:meta])* $name:ident { $($(#[$own_meta:meta])* $own:ident: $own_type:ty,)* }
     { $($(#[$shared_meta:meta])* $shared:ident: $shared_type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Default, serde::Deserialize, schemars::JsonSchema)]
        #[serde(default)]
        pub(crate) struct $name {
            $($(#[$own_meta])* pub(crate) $own: $own_type,)*
            $($(#[$shared_meta])* pub(crate) $shared: $shared_type,)*
        }

        impl $name {
            /// Takes the shared fields out.
            fn take_common(&mut self) -> crate::request::common::Common {
                crate::request::common::Common { $($shared: self.$shared.take(),)* }
            }
        }
    };
}
pub(super) use request;

/// The shared fields of a request.
#[derive(Debug, Clone)]
pub(crate) struct Common {
    pub(crate) model: Option<String>,
    pub(crate) max_tokens: Option<usize>,
    pub(super) temperature: Option<f32>,
    pub(super) top_p: Option<f32>,
    pub(super) top_k: Option<i64>,
    pub(super) min_p: Option<f32>,
    pub(super) presence_penalty: Option<f32>,
    pub(super) frequency_penalty: Option<f32>,
    pub(super) repetition_penalty: Option<f32>,
    pub(super) logit_bias: Option<BTreeMap<String, f32>>,
    pub(super) seed: Option<i64>,
    pub(super) stop: Option<Strings>,
    pub(super) stop_token_ids: Option<Vec<u32>>,
    pub(super) ignore_eos: Option<bool>,
    pub(super) min_tokens: Option<usize>,
    pub(super) n: Option<usize>,
    pub(super) stream: Option<bool>,
    pub(super) stream_options: Option<StreamOptions>,
    pub(super) response_format: Option<ResponseFormat>,
    pub(super) structured_outputs: Option<StructuredOutputs>,
    pub(super) guided_json: Option<serde_json::Value>,
    pub(super) guided_regex: Option<String>,
    pub(super) guided_choice: Option<Vec<String>>,
    pub(super) guided_grammar: Option<String>,
    pub(super) context_policy: Option<ContextPolicy>,
    pub(super) document: Option<String>,
}

/// How the answer is delivered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Delivery {
    /// The model that is asked.
    pub(crate) model: Option<String>,
    /// Answers to each prompt.
    pub(crate) choices: usize,
    /// In pieces.
    pub(crate) stream: bool,
    /// A stream ends with its usage.
    pub(crate) include_usage: bool,
}

impl Common {
    /// How the answer is delivered.
    pub(super) fn delivery(&self) -> Result<Delivery, ApiError> {
        let choices = self.n.unwrap_or(1);
        if !(1..=MAX_CHOICES).contains(&choices) {
            let message = format!("{choices} is out of range; from 1 to {MAX_CHOICES} expected");
            return Err(ApiError::field("n", message));
        }
        let stream = self.stream.unwrap_or(false);
        if self.stream_options.is_some() && !stream {
            return Err(ApiError::field("stream_options", "needs `stream`, which is off"));
        }
        let include_usage = self.stream_options.is_some_and(|options| options.include_usage.unwrap_or(false));
        Ok(Delivery { model: self.model.clone(), choices, stream, include_usage })
    }

    /// Sets what these fields say. The ranges of numbers are checked by the model.
    pub(super) fn apply(self, params: &mut GenerateParams) -> Result<(), ApiError> {
        if let Some(least) = self.min_tokens.filter(|&least| least > 0) {
            return Err(ApiError::unsupported(
                "min_tokens",
                &format!("{least} is not supported; 0 expected"),
            ));
        }
        let sampling = &mut params.sampling;
        sampling.temperature = self.temperature;
        sampling.top_p = self.top_p;
        sampling.min_p = self.min_p;
        sampling.top_k = self.top_k.map(top_k).transpose()?;
        sampling.presence_penalty = self.presence_penalty;
        sampling.frequency_penalty = self.frequency_penalty;
        sampling.repetition_penalty = self.repetition_penalty;
        for (key, bias) in self.logit_bias.into_iter().flatten() {
            let token = key.trim().parse().map_err(|_| {
                ApiError::field("logit_bias", format!("`{key}` is no token id; a number expected"))
            })?;
            sampling.logit_bias.insert(token, bias);
        }
        // OpenAI's seeds are signed; each one is a seed of its own.
        sampling.seed = self.seed.map(i64::cast_unsigned);
        params.max_tokens = self.max_tokens;
        params.stop = self.stop.map(Strings::into_vec).unwrap_or_default();
        if params.stop.len() > MAX_STOPS {
            let message = format!("{} strings; at most {MAX_STOPS} expected", params.stop.len());
            return Err(ApiError::field("stop", message));
        }
        params.stop_tokens = self.stop_token_ids.unwrap_or_default();
        params.ignore_eos = self.ignore_eos.unwrap_or(false);
        params.context_policy = self.context_policy;
        params.document = self.document;
        let guided = [
            self.guided_json.map(|schema| json_schema("guided_json", schema)).transpose()?,
            self.guided_regex.map(Constraint::Regex),
            self.guided_choice.map(Constraint::Choice),
            self.guided_grammar.map(Constraint::Lark),
        ];
        let mut constraints = guided
            .into_iter()
            .flatten()
            .chain(self.response_format.and_then(ResponseFormat::into_constraint))
            .chain(self.structured_outputs.map(StructuredOutputs::into_constraint).transpose()?);
        params.constraint = constraints.next();
        if constraints.next().is_some() {
            return Err(ApiError::field(
                "response_format",
                "the form of the answer is given twice; one expected",
            ));
        }
        Ok(())
    }
}

fn top_k(top_k: i64) -> Result<usize, ApiError> {
    match usize::try_from(top_k) {
        Ok(top_k) => Ok(top_k),
        // As in vLLM.
        Err(_) if top_k == -1 => Ok(0),
        Err(_) => Err(ApiError::field("top_k", format!("{top_k} is out of range; at least -1 expected"))),
    }
}
