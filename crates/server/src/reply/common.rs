//! What all answers have in common.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use ternion::{DoneEvent, FinishReason, context::ContextReport};

/// An id that no other answer has.
pub(crate) fn new_id(prefix: &str) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    // The keys of the hasher are random for each call.
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let random = [RandomState::new().hash_one(count), RandomState::new().hash_one(!count)];
    format!("{prefix}-{:016x}{:016x}", random[0], random[1])
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_secs())
}

/// Why an answer ended, in OpenAI's words.
pub(crate) fn finish_reason(reason: &FinishReason) -> &'static str {
    match reason {
        FinishReason::MaxTokens | FinishReason::ContextFull => "length",
        FinishReason::ToolCalls => "tool_calls",
        _ => "stop",
    }
}

/// What ended an answer: a stop string or the id of a stop token, as vLLM reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub(crate) enum StopReason {
    Text(String),
    Token(u32),
}

impl StopReason {
    pub(crate) fn of(reason: &FinishReason) -> Option<Self> {
        match reason {
            FinishReason::StopString(text) => Some(Self::Text(text.clone())),
            FinishReason::StopToken(id) => Some(Self::Token(*id)),
            _ => None,
        }
    }
}

/// A log-probability as JSON can hold it: OpenAI's stand-in for minus infinity. The f32 is written as the f64 of the same value, so that
/// a reader gets every bit of it.
pub(crate) fn finite(logprob: f32) -> f64 {
    if logprob.is_finite() { f64::from(logprob) } else { -9999.0 }
}

/// Tokens used by a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct UsageBody {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
    completion_tokens_details: CompletionDetails,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
struct PromptDetails {
    cached_tokens: usize,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
struct CompletionDetails {
    accepted_prediction_tokens: usize,
    rejected_prediction_tokens: usize,
}

/// Where the time of a request went, under the names of llama.cpp. Of several answers, the last one's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Timings {
    queued_ms: f64,
    prompt_ms: f64,
    predicted_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    predicted_per_second: Option<f64>,
}

/// What is known when all answers have ended.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    pub(crate) usage: UsageBody,
    pub(crate) timings: Option<Timings>,
    pub(crate) context: Option<ContextReport>,
}

impl Totals {
    /// Adds one answer. The prompt of several answers counts once.
    pub(crate) fn add(&mut self, done: &DoneEvent, counts_prompt: bool) {
        let (usage, timing) = (&done.usage, &done.timing);
        let sum = &mut self.usage;
        if counts_prompt {
            sum.prompt_tokens += usage.prompt_tokens;
            sum.prompt_tokens_details.cached_tokens += usage.cached_tokens;
        }
        sum.completion_tokens += usage.completion_tokens;
        let details = &mut sum.completion_tokens_details;
        details.accepted_prediction_tokens += usage.accepted_tokens;
        details.rejected_prediction_tokens += usage.drafted_tokens.saturating_sub(usage.accepted_tokens);
        sum.total_tokens = sum.prompt_tokens + sum.completion_tokens;
        let ms = |time: std::time::Duration| time.as_secs_f64() * 1000.0;
        self.timings = Some(Timings {
            queued_ms: ms(timing.queued),
            prompt_ms: ms(timing.prefill),
            predicted_ms: ms(timing.decode),
            prompt_per_second: timing.prefill_rate(usage),
            predicted_per_second: timing.decode_rate(usage),
        });
    }
}
