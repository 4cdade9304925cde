//! The bodies of requests: the fields of OpenAI's API, and those that a dialect adds.

use serde_json::{Map, Value, json};
use ternion_core::{ChatOptions, Error, GenerateParams, Message, Result, Sampling, ToolChoice};

use crate::{Dialect, constraint::Fields, probe::IdSource};

/// Tokens that llama-server's penalties count where its context is not known.
const UNKNOWN_CONTEXT: usize = 1 << 16;

/// What a request is about, for the endpoint that takes it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Input {
    /// `/chat/completions`
    Chat(Vec<Message>),
    /// `/completions`
    Text(String),
    /// `/completions`
    Tokens(Vec<u32>),
}

impl Input {
    pub(crate) fn endpoint(&self) -> &'static str {
        match self {
            Self::Chat(_) => "chat/completions",
            Self::Text(_) | Self::Tokens(_) => "completions",
        }
    }
}

/// What is the same for all requests to a model.
#[derive(Debug, Clone)]
pub(crate) struct Common {
    pub(crate) model: String,
    pub(crate) dialect: Dialect,
    /// 0: not known.
    pub(crate) context_length: usize,
}

/// What a request needs besides its parameters.
#[derive(Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) params: &'a GenerateParams,
    /// The request's sampling, with the configuration's where it is open.
    pub(crate) sampling: &'a Sampling,
    /// Tokens of answer; `None`: the server's own bound.
    pub(crate) max_tokens: Option<usize>,
    /// Where token ids come from on this endpoint.
    pub(crate) ids: IdSource,
    /// The seed that goes to the server.
    pub(crate) seed: Option<u32>,
    /// The constraints that this endpoint enforces.
    pub(crate) constraints: Fields,
}

/// The body of a request for a stream.
///
/// # Errors
/// [`Unsupported`](ternion_core::ErrorKind::Unsupported) for what the dialect cannot say.
pub(crate) fn generation(common: &Common, input: &Input, wanted: &Wanted<'_>) -> Result<Value> {
    let dialect = common.dialect;
    let mut body = base(common, input);
    body.insert("stream".into(), true.into());
    let mut stream = json!({"include_usage": true});
    if dialect == Dialect::Vllm {
        stream["continuous_usage_stats"] = true.into();
    }
    body.insert("stream_options".into(), stream);
    if dialect == Dialect::LlamaServer {
        body.insert("timings_per_token".into(), true.into());
    }
    if let Some(most) = wanted.max_tokens {
        // The newer name, which is the only one that newer models of OpenAI take, is unknown to other servers.
        let chat = matches!(input, Input::Chat(_));
        let key = if chat && dialect == Dialect::OpenAi { "max_completion_tokens" } else { "max_tokens" };
        body.insert(key.into(), most.into());
    }
    sampling(&mut body, common, wanted)?;
    if wanted.params.ignore_eos {
        if dialect == Dialect::OpenAi {
            return Err(unable("ignore_eos", dialect));
        }
        if dialect == Dialect::LlamaServer && wanted.sampling.logit_bias.values().any(|bias| *bias > 0.0) {
            return Err(Error::unsupported(
                "ignore_eos: llama-server forbids the tokens that end an answer, whatever the `logit_bias` of the same request",
            ));
        }
        body.insert("ignore_eos".into(), true.into());
    }
    tokens(&mut body, common, input, wanted);
    if !wanted.params.stop_tokens.is_empty() && wanted.ids == IdSource::None {
        if !dialect.has_vllm_sampling() {
            return Err(unable("stop_tokens", dialect));
        }
        body.insert("stop_token_ids".into(), json!(wanted.params.stop_tokens));
    }
    if let Some(budget) = wanted.params.reasoning_budget {
        if !matches!(dialect, Dialect::Vllm | Dialect::Ternion) {
            return Err(unable("reasoning_budget", dialect));
        }
        body.insert("thinking_token_budget".into(), budget.into());
    }
    if let Some(constraint) = &wanted.params.constraint {
        wanted.constraints.add(&mut body, constraint, dialect)?;
    }
    if let Input::Chat(_) = input {
        chat(&mut body, dialect, &wanted.params.chat)?;
    }
    Ok(Value::Object(body))
}

/// Model and prompt.
pub(crate) fn base(common: &Common, input: &Input) -> Map<String, Value> {
    let (key, value) = match input {
        Input::Chat(messages) => ("messages", json!(messages)),
        Input::Text(text) => ("prompt", json!(text)),
        Input::Tokens(tokens) => ("prompt", json!(tokens)),
    };
    Map::from_iter([("model".to_owned(), json!(common.model)), (key.to_owned(), value)])
}

/// Asks for log-probabilities and for what gives token ids.
fn tokens(body: &mut Map<String, Value>, common: &Common, input: &Input, wanted: &Wanted<'_>) {
    if wanted.ids == IdSource::Field {
        body.insert("return_token_ids".into(), true.into());
    }
    if wanted.params.logprobs || wanted.ids == IdSource::Logprobs {
        logprobs(body, common.dialect, matches!(input, Input::Chat(_)), wanted.params.top_logprobs);
    }
}

/// Asks for the log-probabilities of tokens and of the `top` most probable ones.
pub(crate) fn logprobs(body: &mut Map<String, Value>, dialect: Dialect, chat: bool, top: usize) {
    // llama-server takes 0 for "none at all".
    let top = if dialect == Dialect::LlamaServer { top.max(1) } else { top };
    if chat {
        body.insert("logprobs".into(), true.into());
        body.insert("top_logprobs".into(), top.into());
    } else {
        body.insert("logprobs".into(), top.into());
    }
    if dialect.has_vllm_sampling() {
        body.insert("return_tokens_as_token_ids".into(), true.into());
    }
}

fn sampling(body: &mut Map<String, Value>, common: &Common, wanted: &Wanted<'_>) -> Result<()> {
    let (sampling, dialect) = (wanted.sampling, common.dialect);
    let mut put = |key: &str, value: Option<Value>| {
        if let Some(value) = value {
            body.insert(key.into(), value);
        }
    };
    put("temperature", sampling.temperature.map(Value::from));
    put("top_p", sampling.top_p.map(Value::from));
    put("presence_penalty", sampling.presence_penalty.map(Value::from));
    put("frequency_penalty", sampling.frequency_penalty.map(Value::from));
    put("seed", wanted.seed.map(Value::from));
    match dialect {
        Dialect::OpenAi | Dialect::Auto => {
            let refused = [
                ("top_k", sampling.top_k.is_some_and(|k| k != 0)),
                ("min_p", sampling.min_p.is_some_and(|p| p != 0.0)),
                ("repetition_penalty", sampling.repetition_penalty.is_some_and(|p| p != 1.0)),
            ];
            if let Some((field, _)) = refused.into_iter().find(|(_, refused)| *refused) {
                return Err(unable(field, dialect));
            }
        }
        Dialect::Vllm | Dialect::Sglang | Dialect::Ternion => {
            // -1 keeps all tokens in every version; 0 does so only in newer ones.
            let all = if dialect == Dialect::Ternion { 0 } else { -1 };
            put("top_k", sampling.top_k.map(|k| if k == 0 { all.into() } else { bounded(k) }));
            put("min_p", sampling.min_p.map(Value::from));
            put("repetition_penalty", sampling.repetition_penalty.map(Value::from));
        }
        Dialect::LlamaServer => {
            put("top_k", sampling.top_k.map(bounded));
            put("min_p", sampling.min_p.map(Value::from));
            put("repeat_penalty", sampling.repetition_penalty.map(Value::from));
            // Penalties count this many of the last tokens, for which the server allocates memory; its default is 64.
            let penalties = [
                sampling.repetition_penalty.is_some_and(|p| p != 1.0),
                sampling.presence_penalty.is_some_and(|p| p != 0.0),
                sampling.frequency_penalty.is_some_and(|p| p != 0.0),
            ];
            let known = if common.context_length > 0 { common.context_length } else { UNKNOWN_CONTEXT };
            put("repeat_last_n", penalties.contains(&true).then(|| known.into()));
            // The order that `Sampling` promises; the server's own has the temperature last.
            put("samplers", Some(json!(["penalties", "temperature", "top_k", "top_p", "min_p"])));
        }
    }
    if !sampling.logit_bias.is_empty() {
        let bias = |bias: f32| match dialect {
            Dialect::LlamaServer if bias == f32::NEG_INFINITY => Value::from(false),
            Dialect::LlamaServer | Dialect::Ternion => Value::from(bias.max(f32::MIN)),
            _ => Value::from(bias.clamp(-100.0, 100.0)),
        };
        let biases: Map<String, Value> =
            sampling.logit_bias.iter().map(|(token, value)| (token.to_string(), bias(*value))).collect();
        put("logit_bias", Some(Value::Object(biases)));
    }
    Ok(())
}

fn bounded(top_k: usize) -> Value {
    top_k.min(i32::MAX as usize).into()
}

fn chat(body: &mut Map<String, Value>, dialect: Dialect, options: &ChatOptions) -> Result<()> {
    if !options.tools.is_empty() {
        body.insert("tools".into(), json!(options.tools));
        if options.tool_choice != ToolChoice::Auto {
            body.insert("tool_choice".into(), json!(options.tool_choice));
        }
        if !options.parallel_tool_calls {
            body.insert("parallel_tool_calls".into(), false.into());
        }
    }
    let extended = dialect != Dialect::OpenAi;
    if !options.template_args.is_empty() {
        if !extended {
            return Err(unable("chat.template_args", dialect));
        }
        body.insert("chat_template_kwargs".into(), Value::Object(options.template_args.clone()));
    }
    if options.continue_final_message {
        if !extended {
            return Err(unable("chat.continue_final_message", dialect));
        }
        body.insert("continue_final_message".into(), true.into());
        body.insert("add_generation_prompt".into(), false.into());
    } else if !options.add_generation_prompt {
        if !extended {
            return Err(unable("chat.add_generation_prompt", dialect));
        }
        body.insert("add_generation_prompt".into(), false.into());
    }
    Ok(())
}

/// The error for what a dialect has no field for.
pub(crate) fn unable(field: &str, dialect: Dialect) -> Error {
    Error::unsupported(format!(
        "{field}: a server of the dialect `{}` cannot be asked for it; `options.dialect` names another",
        dialect.as_str()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(
        dialect: Dialect,
        sampling: &Sampling,
        change: impl FnOnce(&mut GenerateParams),
    ) -> Result<Value> {
        let mut params = GenerateParams::new("x");
        change(&mut params);
        let common = Common { model: "m".to_owned(), dialect, context_length: 512 };
        let wanted = Wanted {
            params: &params,
            sampling,
            max_tokens: Some(3),
            ids: IdSource::None,
            seed: Some(7),
            constraints: Fields::default(),
        };
        generation(&common, &Input::Text("x".to_owned()), &wanted)
    }

    #[test]
    fn what_a_dialect_cannot_say_is_refused() {
        let top_k = Sampling::default().with_top_k(5);
        let error = body(Dialect::OpenAi, &top_k, |_| {}).unwrap_err();
        assert!(error.kind() == ternion_core::ErrorKind::Unsupported && error.message().starts_with("top_k"));
        assert!(body(Dialect::OpenAi, &Sampling::default(), |p| p.ignore_eos = true).is_err());
        assert!(body(Dialect::OpenAi, &Sampling::default(), |p| p.stop_tokens = vec![1]).is_err());
        // What changes nothing is no reason.
        let neutral = Sampling::greedy().with_top_k(0).with_min_p(0.0);
        let body = body(Dialect::OpenAi, &neutral, |_| {}).unwrap();
        assert_eq!(body.get("top_k"), None);
        assert_eq!((body["seed"].as_u64(), body["max_tokens"].as_u64()), (Some(7), Some(3)));
    }

    #[test]
    fn fields_have_the_names_of_the_dialect() {
        let sampling = Sampling::default().with_top_k(0).with_repetition_penalty(1.5);
        let vllm = body(Dialect::Vllm, &sampling, |p| p.stop_tokens = vec![9]).unwrap();
        assert_eq!(vllm["top_k"], -1);
        assert_eq!(vllm["repetition_penalty"], 1.5);
        assert_eq!(vllm["stop_token_ids"], json!([9]));
        let llama = body(Dialect::LlamaServer, &sampling, |p| p.logprobs = true).unwrap();
        assert_eq!((&llama["top_k"], &llama["logprobs"]), (&json!(0), &json!(1)));
        assert_eq!((&llama["repeat_penalty"], &llama["repeat_last_n"]), (&json!(1.5), &json!(512)));
        let huge = Sampling::default().with_top_k(usize::MAX);
        assert_eq!(body(Dialect::LlamaServer, &huge, |_| {}).unwrap()["top_k"], i32::MAX);
        // There an end token is never chosen, so nothing can go on past one that a bias makes certain.
        let biased = Sampling::default().with_logit_bias(2, 50.0);
        assert!(body(Dialect::LlamaServer, &biased, |p| p.ignore_eos = true).is_err());
        assert!(body(Dialect::LlamaServer, &biased, |_| {}).is_ok());
    }

    #[test]
    fn biases_stay_within_what_json_and_the_server_take() {
        let sampling = Sampling::default().with_logit_bias(1, f32::NEG_INFINITY).with_logit_bias(2, 1e30);
        let vllm = body(Dialect::Vllm, &sampling, |_| {}).unwrap();
        assert_eq!(vllm["logit_bias"], json!({"1": -100.0, "2": 100.0}));
        let llama = body(Dialect::LlamaServer, &sampling, |_| {}).unwrap();
        assert_eq!(llama["logit_bias"]["1"], false);
        assert!(llama["logit_bias"]["2"].as_f64().unwrap() > 1e29);
    }
}
