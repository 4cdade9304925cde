//! What servers send, as far as it is read. Every field may be missing or `null`: servers differ, and an unknown field
//! means nothing.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;
use ternion_core::TokenLogprob;

/// A chunk of a stream, or a whole response.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Chunk {
    pub(crate) choices: Option<Vec<Choice>>,
    pub(crate) usage: Option<Usage>,
    pub(crate) error: Option<Value>,
    /// `error` in the older form of vLLM, whose fields stand beside it.
    pub(crate) object: Option<String>,
    /// FastAPI's error.
    pub(crate) detail: Option<Value>,
    /// Of llama-server.
    pub(crate) timings: Option<Timings>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Choice {
    pub(crate) index: Option<u64>,
    /// Of completions.
    pub(crate) text: Option<String>,
    /// Of chats.
    pub(crate) delta: Option<Delta>,
    pub(crate) logprobs: Option<Logprobs>,
    pub(crate) finish_reason: Option<String>,
    /// Of vLLM: the ids of this chunk's tokens.
    pub(crate) token_ids: Option<Vec<u32>>,
    /// Of vLLM, in a response that is no stream: for each token of the prompt, ids with their log-probabilities.
    pub(crate) prompt_logprobs: Option<Vec<Option<BTreeMap<String, PromptLogprob>>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Delta {
    pub(crate) content: Option<Value>,
    pub(crate) refusal: Option<String>,
    pub(crate) reasoning_content: Option<String>,
    /// Another name of the same; vLLM has sent both with the same text.
    pub(crate) reasoning: Option<String>,
    pub(crate) tool_calls: Option<Vec<ToolDelta>>,
    /// Of the older form of calls.
    pub(crate) function_call: Option<FunctionDelta>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ToolDelta {
    pub(crate) index: Option<u64>,
    pub(crate) id: Option<String>,
    pub(crate) function: Option<FunctionDelta>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct FunctionDelta {
    pub(crate) name: Option<String>,
    pub(crate) arguments: Option<Value>,
}

/// Tokens with their log-probabilities.
pub(crate) type Alternatives = BTreeMap<String, Option<f64>>;

/// Log-probabilities in both forms: lists of objects, and parallel lists.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Logprobs {
    pub(crate) content: Option<Vec<TokenInfo>>,
    pub(crate) tokens: Option<Vec<String>>,
    pub(crate) token_logprobs: Option<Vec<Option<f64>>>,
    pub(crate) top_logprobs: Option<Vec<Option<Alternatives>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct TokenInfo {
    /// Of llama-server.
    pub(crate) id: Option<u32>,
    pub(crate) token: Option<String>,
    pub(crate) logprob: Option<f64>,
    pub(crate) top_logprobs: Option<Vec<TokenInfo>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct PromptLogprob {
    pub(crate) logprob: Option<f64>,
    /// From 1.
    pub(crate) rank: Option<u64>,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(default)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: Option<usize>,
    pub(crate) completion_tokens: Option<usize>,
    pub(crate) prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(default)]
pub(crate) struct PromptDetails {
    pub(crate) cached_tokens: Option<usize>,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(default)]
pub(crate) struct Timings {
    pub(crate) cache_n: Option<usize>,
    pub(crate) prompt_n: Option<usize>,
    pub(crate) predicted_n: Option<usize>,
}

/// A token of an answer as far as the server tells of it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Seen {
    pub(crate) id: u32,
    pub(crate) logprob: Option<f32>,
    /// In the order of the server.
    pub(crate) top: Vec<TokenLogprob>,
}

impl Choice {
    /// The tokens of this chunk; `None` where the server does not give their ids.
    pub(crate) fn tokens(&self) -> Option<Vec<Seen>> {
        let from_logprobs = self.logprobs.as_ref().and_then(Logprobs::tokens);
        match (&self.token_ids, from_logprobs) {
            (Some(ids), Some(seen)) if seen.len() != ids.len() => {
                Some(ids.iter().map(|&id| Seen { id, logprob: None, top: Vec::new() }).collect())
            }
            (_, Some(seen)) => Some(seen),
            (Some(ids), None) => {
                Some(ids.iter().map(|&id| Seen { id, logprob: None, top: Vec::new() }).collect())
            }
            (None, None) => None,
        }
    }
}

impl Logprobs {
    /// The tokens with their ids, if all have one.
    fn tokens(&self) -> Option<Vec<Seen>> {
        if let Some(content) = &self.content {
            return content.iter().map(TokenInfo::seen).collect();
        }
        let tokens = self.tokens.as_ref()?;
        let logprobs = self.token_logprobs.as_deref().unwrap_or_default();
        let tops = self.top_logprobs.as_deref().unwrap_or_default();
        let seen = tokens.iter().enumerate().map(|(at, token)| {
            let top = tops.get(at).and_then(Option::as_ref).map(map).unwrap_or_default();
            let logprob = logprobs.get(at).copied().flatten().map(|logprob| logprob as f32);
            Some(Seen { id: token_id(token)?, logprob, top })
        });
        seen.collect()
    }
}

impl TokenInfo {
    fn seen(&self) -> Option<Seen> {
        let top = self.top_logprobs.iter().flatten();
        let top = top.filter_map(|info| Some(TokenLogprob::new(info.id()?, info.logprob? as f32))).collect();
        Some(Seen { id: self.id()?, logprob: self.logprob.map(|logprob| logprob as f32), top })
    }

    fn id(&self) -> Option<u32> {
        self.id.or_else(|| token_id(self.token.as_deref()?))
    }
}

/// The alternatives at one place, as far as they have ids.
pub(crate) fn map(top: &Alternatives) -> Vec<TokenLogprob> {
    top.iter()
        .filter_map(|(token, logprob)| Some(TokenLogprob::new(token_id(token)?, (*logprob)? as f32)))
        .collect()
}

/// The id in `token_id:N`, which is how vLLM writes tokens on request.
fn token_id(token: &str) -> Option<u32> {
    token.strip_prefix("token_id:")?.parse().ok()
}

/// The most probable of `top` first, ties by id, at most `most`.
pub(crate) fn best(mut top: Vec<TokenLogprob>, most: usize) -> Vec<TokenLogprob> {
    top.sort_by(|a, b| b.logprob.total_cmp(&a.logprob).then(a.id.cmp(&b.id)));
    top.truncate(most);
    top
}

impl Delta {
    /// The content: a text, or a list of parts with texts.
    pub(crate) fn content(&self) -> String {
        match &self.content {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(parts)) => {
                parts.iter().filter_map(|part| part.get("text")?.as_str()).collect::<Vec<_>>().concat()
            }
            _ => String::new(),
        }
    }

    /// Whether there is a piece of a call.
    pub(crate) fn calls(&self) -> bool {
        self.function_call.is_some() || self.tool_calls.as_ref().is_some_and(|calls| !calls.is_empty())
    }

    /// What the model thinks, under either name.
    pub(crate) fn reasoning(&self) -> Option<&str> {
        self.reasoning_content.as_deref().or(self.reasoning.as_deref()).filter(|text| !text.is_empty())
    }
}

impl FunctionDelta {
    /// A piece of the arguments; some servers send a whole object.
    pub(crate) fn arguments(&self) -> String {
        match &self.arguments {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Null) | None => String::new(),
            Some(object) => object.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(json: &str) -> Choice {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn ids_are_found_wherever_servers_put_them() {
        let vllm = choice(
            r#"{"text": " of", "logprobs": {"tokens": ["token_id:7"], "token_logprobs": [-0.5],
                "top_logprobs": [{"token_id:7": -0.5, "token_id:9": -1.5}], "text_offset": [0]}, "token_ids": [7]}"#,
        );
        let seen = vllm.tokens().unwrap();
        assert_eq!((seen[0].id, seen[0].logprob), (7, Some(-0.5)));
        assert_eq!(best(seen[0].top.clone(), 1), [TokenLogprob::new(7, -0.5)]);
        let llama = choice(
            r#"{"delta": {"content": "x"}, "logprobs": {"content": [{"id": 3, "token": "x", "bytes": [120],
                "logprob": -1.0, "top_logprobs": [{"id": 4, "token": "y", "logprob": -0.5}]}]}}"#,
        );
        assert_eq!(llama.tokens().unwrap()[0].top, [TokenLogprob::new(4, -0.5)]);
        let ids = choice(r#"{"text": "", "logprobs": null, "token_ids": [2, 5]}"#);
        assert_eq!(ids.tokens().unwrap().iter().map(|seen| seen.id).collect::<Vec<_>>(), [2, 5]);
    }

    #[test]
    fn texts_of_tokens_are_no_ids() {
        let openai = choice(
            r#"{"logprobs": {"content": [{"token": "x", "logprob": -1.0, "bytes": [120], "top_logprobs": []}]}}"#,
        );
        assert_eq!(openai.tokens(), None);
        let legacy =
            choice(r#"{"logprobs": {"tokens": ["x"], "token_logprobs": [-1.0], "top_logprobs": null}}"#);
        assert_eq!(legacy.tokens(), None);
        assert_eq!(choice("{}").tokens(), None);
    }

    #[test]
    fn null_and_missing_fields_are_the_same() {
        let chunk: Chunk = serde_json::from_str(
            r#"{"choices": [{"index": 0, "delta": {"content": null, "tool_calls": null}, "finish_reason": null}],
                "usage": null, "unknown": 1}"#,
        )
        .unwrap();
        let delta = chunk.choices.unwrap().pop().unwrap().delta.unwrap();
        assert!(delta.content().is_empty() && delta.tool_calls.is_none());
        // Both names at once are no error.
        let delta: Delta = serde_json::from_str(r#"{"reasoning": "r", "reasoning_content": "r"}"#).unwrap();
        assert_eq!(delta.reasoning(), Some("r"));
    }
}
