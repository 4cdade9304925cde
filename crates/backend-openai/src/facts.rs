//! What a server tells about itself and its model, without generating anything.

use serde::Deserialize as _;
use serde_json::Value;
use ternion_core::{EmbeddingInfo, Error, ErrorKind, Result, SamplingDefaults};

use crate::{Dialect, OpenAiOptions, client::Client};

/// What is known of the model. Zero: not known.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Facts {
    /// Its name on the server.
    pub(crate) model: String,
    pub(crate) dialect: Dialect,
    pub(crate) context_length: usize,
    pub(crate) vocab_size: usize,
    pub(crate) parameters: u64,
    /// Requests that the server works on at the same time.
    pub(crate) sequences: usize,
    pub(crate) defaults: SamplingDefaults,
    /// How the model makes embeddings, where the server tells it.
    pub(crate) embedding: Option<EmbeddingInfo>,
    /// Whether the server's list of models has the model; `None` without such a list.
    pub(crate) listed: Option<bool>,
}

/// Asks the server.
///
/// # Errors
/// [`InvalidConfig`](ErrorKind::InvalidConfig) where it is not clear which model is meant, and those of the module `failure`.
pub(crate) async fn find(client: &Client, options: &OpenAiOptions) -> Result<Facts> {
    let list = match client.get(&client.api("models")).await {
        Ok(list) => list,
        // A server without a list of models can be used all the same.
        Err(error)
            if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Unsupported)
                && options.model.is_some() =>
        {
            Value::Null
        }
        Err(error) => return Err(error),
    };
    let mut facts = of_list(&list, options)?;
    if facts.dialect == Dialect::LlamaServer {
        // One that was started without this endpoint says so by an error, which changes nothing.
        if let Ok(props) = client.get(&client.outside("props")).await {
            add_props(&mut facts, &props);
        }
    }
    Ok(facts)
}

fn of_list(list: &Value, options: &OpenAiOptions) -> Result<Facts> {
    let models: Vec<&Value> = list.get("data").and_then(Value::as_array).into_iter().flatten().collect();
    let names: Vec<&str> = models.iter().filter_map(|model| model.get("id")?.as_str()).collect();
    let wanted = match (&options.model, &names[..]) {
        (Some(model), _) => model.clone(),
        (None, [only]) => (*only).to_owned(),
        (None, []) => {
            return Err(Error::invalid_config(
                "options.model: is missing, and the server lists no model that could be meant",
            ));
        }
        (None, several) => {
            let shown = several.iter().take(20).copied().collect::<Vec<_>>().join(", ");
            return Err(Error::invalid_config(format!(
                "options.model: is missing, and the server has several models: {shown}"
            )));
        }
    };
    let named = |model: &&&Value| {
        let aliases = model.get("aliases").and_then(Value::as_array).into_iter().flatten();
        model.get("id").into_iter().chain(aliases).any(|name| name.as_str() == Some(&wanted))
    };
    let found = models.iter().find(named).copied();
    // llama-server answers for its one model whatever name is asked for.
    let entry =
        found.or_else(|| models.first().copied().filter(|model| owner(model) == Dialect::LlamaServer));
    let number = |path: &str| entry.and_then(|model| model.pointer(path)?.as_u64()).unwrap_or(0);
    let first = |paths: &[&str]| paths.iter().map(|path| number(path)).find(|n| *n > 0).unwrap_or(0);
    Ok(Facts {
        dialect: match options.dialect {
            Dialect::Auto => entry.map_or(Dialect::OpenAi, owner),
            dialect => dialect,
        },
        // vLLM, llama-server (of one slot, then of the training), and what gateways call it.
        context_length: first(&[
            "/max_model_len",
            "/meta/n_ctx",
            "/meta/n_ctx_train",
            "/context_length",
            "/context_window",
        ]) as usize,
        vocab_size: number("/meta/n_vocab") as usize,
        parameters: number("/meta/n_params"),
        sequences: 0,
        // Those that Ternion's server tells; else those of OpenAI's API.
        defaults: entry
            .and_then(|model| SamplingDefaults::deserialize(model.pointer("/ternion/defaults")?).ok())
            .unwrap_or_else(|| {
                let mut defaults = SamplingDefaults::default();
                defaults.temperature = 1.0;
                defaults
            }),
        embedding: entry
            .filter(|_| matches!(options.dialect, Dialect::Auto | Dialect::Ternion))
            .and_then(|model| EmbeddingInfo::deserialize(model.pointer("/ternion/embedding")?).ok()),
        listed: (!names.is_empty()).then_some(entry.is_some()),
        model: wanted,
    })
}

fn owner(model: &Value) -> Dialect {
    match model.get("owned_by").and_then(Value::as_str).unwrap_or_default() {
        "vllm" => Dialect::Vllm,
        "sglang" => Dialect::Sglang,
        "llamacpp" => Dialect::LlamaServer,
        "ternion" => Dialect::Ternion,
        _ => Dialect::OpenAi,
    }
}

/// Adds what llama-server's `/props` tells.
fn add_props(facts: &mut Facts, props: &Value) {
    let number = |path: &str| props.pointer(path).and_then(Value::as_u64).unwrap_or(0) as usize;
    if number("/default_generation_settings/n_ctx") > 0 {
        facts.context_length = number("/default_generation_settings/n_ctx");
    }
    facts.sequences = number("/total_slots");
    let Some(params) = props.pointer("/default_generation_settings/params") else { return };
    let float = |key: &str, other: f32| params.get(key).and_then(Value::as_f64).map_or(other, |n| n as f32);
    let defaults = &mut facts.defaults;
    defaults.temperature = float("temperature", defaults.temperature).max(0.0);
    defaults.top_k = params.get("top_k").and_then(Value::as_i64).map_or(0, |n| n.max(0) as usize);
    defaults.top_p = float("top_p", defaults.top_p);
    defaults.min_p = float("min_p", defaults.min_p);
    defaults.repetition_penalty = float("repeat_penalty", defaults.repetition_penalty);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn options(model: Option<&str>) -> OpenAiOptions {
        OpenAiOptions { model: model.map(str::to_owned), ..OpenAiOptions::default() }
    }

    #[test]
    fn servers_are_told_by_their_lists() {
        let vllm =
            json!({"object": "list", "data": [{"id": "m", "owned_by": "vllm", "max_model_len": 4096}]});
        let facts = of_list(&vllm, &options(None)).unwrap();
        assert_eq!((facts.model.as_str(), facts.dialect, facts.context_length), ("m", Dialect::Vllm, 4096));
        assert_eq!(facts.listed, Some(true));
        let llama = json!({"data": [{"id": "file.gguf", "aliases": ["a"], "owned_by": "llamacpp",
                                     "meta": {"n_vocab": 49152, "n_ctx": 512, "n_ctx_train": 8192, "n_params": 7}}]});
        for name in [None, Some("a"), Some("any")] {
            let facts = of_list(&llama, &options(name)).unwrap();
            assert_eq!(
                (facts.dialect, facts.context_length, facts.vocab_size),
                (Dialect::LlamaServer, 512, 49152)
            );
        }
        let other = of_list(&json!({"data": [{"id": "m"}]}), &options(Some("x"))).unwrap();
        assert_eq!((other.dialect, other.context_length, other.listed), (Dialect::OpenAi, 0, Some(false)));
        assert_eq!(of_list(&Value::Null, &options(Some("x"))).unwrap().listed, None);
    }

    #[test]
    fn the_defaults_of_another_ternion_are_its_own() {
        let own = json!({"data": [{"id": "m", "owned_by": "ternion", "max_model_len": 256, "ternion": {"defaults":
                         {"temperature": 0.5, "top_k": 50, "top_p": 0.75, "min_p": 0.0, "repetition_penalty": 1.0}}}]});
        let facts = of_list(&own, &options(None)).unwrap();
        assert_eq!(
            (facts.dialect, facts.defaults.temperature, facts.defaults.top_k),
            (Dialect::Ternion, 0.5, 50)
        );
        let vllm = json!({"data": [{"id": "m", "owned_by": "vllm"}]});
        assert_eq!(of_list(&vllm, &options(None)).unwrap().defaults.temperature, 1.0);
    }

    #[test]
    fn a_model_that_is_not_named_must_be_the_only_one() {
        let several = json!({"data": [{"id": "a"}, {"id": "b"}]});
        let error = of_list(&several, &options(None)).unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidConfig && error.message().contains("a, b"), "{error}");
        assert!(of_list(&json!({"data": []}), &options(None)).is_err());
    }

    #[test]
    fn the_slots_of_llama_server_are_its_sequences() {
        let mut facts =
            of_list(&json!({"data": [{"id": "m", "owned_by": "llamacpp"}]}), &options(None)).unwrap();
        let props = json!({"default_generation_settings": {"n_ctx": 512, "params": {"temperature": 0.8, "top_k": 40,
                           "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0}}, "total_slots": 2});
        add_props(&mut facts, &props);
        assert_eq!((facts.context_length, facts.sequences, facts.defaults.top_k), (512, 2, 40));
        assert_eq!(facts.defaults.min_p, 0.05);
    }
}
