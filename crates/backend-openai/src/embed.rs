//! A model for embeddings on a server: `/v1/embeddings`, and nothing else of the server's API.

use std::sync::Arc;

use serde::Deserialize as _;
use serde_json::{Value, json};
use ternion_core::{
    EmbedInput, EmbedRequest, Embedding, EmbeddingInfo, Embeddings, Error, GenerateRequest, GenerateStream,
    InputTruncation, LlmBackend, ModelInfo, Pooling, Result, ResultExt, ServedBy, Stats, Usage, async_trait,
    config::ModelConfig, embed, text::Tokenizer,
};

use crate::{Dialect, OpenAiOptions, admission::Admission, client::Client, facts::Facts};

/// Requests on their way at the same time, and those that may wait, where the configuration does not say.
const SEQUENCES: usize = 16;
const QUEUED: usize = 64;

/// A model for embeddings on a server.
struct RemoteEmbedder {
    info: Arc<ModelInfo>,
    embedding: EmbeddingInfo,
    client: Arc<Client>,
    model: String,
    dialect: Dialect,
    tokenizer: Option<Arc<Tokenizer>>,
    admission: Arc<Admission>,
}

/// Connects, and asks for one vector to see how long it is, unless the server has told that.
///
/// # Errors
/// Those of the server.
pub(crate) async fn connect(
    name: &str,
    config: &ModelConfig,
    options: &OpenAiOptions,
    (client, facts, tokenizer): (Client, Facts, Option<Arc<Tokenizer>>),
) -> Result<Arc<dyn LlmBackend>> {
    let mut info = ModelInfo::new(name, "openai");
    info.format = match facts.dialect {
        Dialect::OpenAi | Dialect::Auto => "remote".to_owned(),
        dialect => format!("remote ({})", dialect.as_str()),
    };
    info.parameters = facts.parameters;
    info.limits.context_length = config.context_length.unwrap_or(facts.context_length);
    info.limits.vocab_size = tokenizer.as_ref().map_or(facts.vocab_size, |tokenizer| tokenizer.vocab_size());
    info.limits.max_sequences = config.max_sequences.unwrap_or(SEQUENCES);
    info.limits.max_queued = config.max_queued.unwrap_or(QUEUED);
    info.capabilities.generate = false;
    info.capabilities.embed = true;
    let mut this = RemoteEmbedder {
        admission: Admission::new(&info.limits),
        info: Arc::new(info),
        embedding: facts.embedding.clone().unwrap_or(EmbeddingInfo::new(0, Pooling::Unknown, false)),
        client: Arc::new(client),
        model: facts.model,
        dialect: facts.dialect,
        tokenizer,
    };
    if facts.embedding.is_none() {
        let found = this.ask(&EmbedRequest::new(["a"])).await?;
        let vector = found.first().map(|item| item.values.as_slice()).unwrap_or_default();
        let norm = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt();
        this.embedding = EmbeddingInfo::new(vector.len(), Pooling::Unknown, (norm - 1.0).abs() < 1e-3);
    }
    if let Some(matryoshka) = options.matryoshka {
        this.embedding.shortened = matryoshka.then(Vec::new);
    }
    Arc::make_mut(&mut this.info).embedding = Some(this.embedding.clone());
    tracing::info!(model = name, server_model = this.model, embedding = ?this.embedding, "connected for embeddings");
    Ok(Arc::new(this))
}

impl RemoteEmbedder {
    async fn ask(&self, request: &EmbedRequest) -> Result<Vec<Embedding>> {
        let url = self.client.api("embeddings");
        let response = self.client.post(&url, &self.body(request)?).await?;
        let found = read(&response, request.inputs.len()).map_err(|error| self.client.told(error, &url))?;
        let is_right = |item: &Embedding| {
            let expected = request.dimensions.unwrap_or(self.embedding.dimensions);
            expected == 0 || item.values.len() == expected
        };
        if found.iter().all(is_right) {
            return Ok(found);
        }
        let lengths: Vec<usize> = found.iter().map(|item| item.values.len()).collect();
        let message = format!("the response has vectors of {lengths:?} values");
        Err(self.client.told(Error::backend(message), &url))
    }

    fn body(&self, request: &EmbedRequest) -> Result<Value> {
        let texts: Option<Vec<&str>> = request
            .inputs
            .iter()
            .map(|input| match input {
                EmbedInput::Text(text) => Some(text.as_str()),
                _ => None,
            })
            .collect();
        let tokens: Option<Vec<&[u32]>> = request
            .inputs
            .iter()
            .map(|input| match input {
                EmbedInput::Tokens(tokens) => Some(tokens.as_slice()),
                _ => None,
            })
            .collect();
        let input = match (texts, tokens) {
            (Some(texts), _) => json!(texts),
            (None, Some(tokens)) => json!(tokens),
            (None, None) => {
                return Err(Error::unsupported(
                    "inputs: texts and token ids in one request; one kind expected",
                ));
            }
        };
        let mut body = json!({ "model": self.model, "input": input, "encoding_format": "float" });
        if let Some(dimensions) = request.dimensions {
            body["dimensions"] = dimensions.into();
        }
        match request.truncation {
            InputTruncation::Refuse => {}
            truncation if self.dialect == Dialect::Ternion => body["truncation"] = json!(truncation),
            _ => {
                return Err(Error::unsupported(
                    "truncation: the server is not told how to cut an input; one that fits expected",
                ));
            }
        }
        Ok(body)
    }

    async fn run(&self, request: EmbedRequest) -> Result<Embeddings> {
        embed::check(&request, &self.info)?;
        let mut place = self.admission.place()?;
        place.start().await;
        let items = self.ask(&request).await?;
        let embeddings = Embeddings::new(items).with_served_by(ServedBy::from(&*self.info));
        place.count(&Usage::new(embeddings.usage.prompt_tokens, 0));
        Ok(embeddings)
    }
}

/// The vectors of a response, in the order of the inputs. A server counts the tokens of all inputs together; where there are
/// several, they are divided evenly.
fn read(response: &Value, count: usize) -> Result<Vec<Embedding>> {
    let missing = |what: String| Error::backend(format!("the response with embeddings {what}"));
    let data =
        response.get("data").and_then(Value::as_array).ok_or_else(|| missing("has no `data`".into()))?;
    let mut vectors = vec![None; count];
    for (at, item) in data.iter().enumerate() {
        let index = item.get("index").and_then(Value::as_u64).map_or(at, |index| index as usize);
        let values = item.get("embedding").map(Vec::<f32>::deserialize);
        let values = values.ok_or_else(|| missing(format!("has no vector at {at}")))?;
        let values = values.map_err(|e| missing(format!("has no list of numbers at {at}")).with_source(e))?;
        if values.is_empty() || !values.iter().all(|value| value.is_finite()) {
            return Err(missing(format!("has a vector at {at} that is none")));
        }
        match vectors.get_mut(index) {
            Some(place @ None) => *place = Some(values),
            _ => return Err(missing(format!("has an index {index} that is not expected"))),
        }
    }
    let total = response.pointer("/usage/prompt_tokens").and_then(Value::as_u64).unwrap_or(0) as usize;
    let tokens = |index: usize| total / count.max(1) + usize::from(index < total % count.max(1));
    let item = |(index, values): (usize, Option<Vec<f32>>)| {
        let values = values.ok_or_else(|| missing(format!("lacks the vector of input {index}")))?;
        Ok(Embedding::new(values, tokens(index)))
    };
    vectors.into_iter().enumerate().map(item).collect()
}

#[async_trait]
impl LlmBackend for RemoteEmbedder {
    fn info(&self) -> Arc<ModelInfo> {
        Arc::clone(&self.info)
    }

    fn tokenizer(&self) -> Option<Arc<Tokenizer>> {
        self.tokenizer.clone()
    }

    fn stats(&self) -> Stats {
        self.admission.stats()
    }

    async fn validate(&self, request: &GenerateRequest) -> Result<()> {
        let _ = request;
        Err(embed::no_generation(&self.info))
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        drop(request);
        Err(embed::no_generation(&self.info))
    }

    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings> {
        let cancel = request.cancel.clone();
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(Error::cancelled()),
            outcome = self.run(request) => outcome,
        }
        .with_operation("embed")
    }
}

#[cfg(test)]
mod tests {
    use ternion_core::ErrorKind;

    use super::*;

    #[test]
    fn vectors_are_put_in_the_order_of_their_inputs() {
        let response = json!({
            "data": [{"index": 1, "embedding": [0.5, 1]}, {"index": 0, "embedding": [2, -1.5]}],
            "usage": {"prompt_tokens": 7},
        });
        let found = read(&response, 2).unwrap();
        assert_eq!((&found[0].values[..], &found[1].values[..]), (&[2.0, -1.5][..], &[0.5, 1.0][..]));
        assert_eq!(found[0].tokens + found[1].tokens, 7);
    }

    #[test]
    fn a_response_without_all_vectors_is_an_error() {
        for response in [
            json!({}),
            json!({"data": [{"index": 0, "embedding": [1]}]}),
            json!({"data": [{"index": 0, "embedding": [1]}, {"index": 0, "embedding": [1]}]}),
            json!({"data": [{"index": 0, "embedding": [1]}, {"index": 1, "embedding": []}]}),
            json!({"data": [{"index": 0, "embedding": [1]}, {"index": 1, "embedding": "AAAA"}]}),
            json!({"data": [{"index": 0, "embedding": [1]}, {"index": 9, "embedding": [1]}]}),
        ] {
            assert_eq!(read(&response, 2).unwrap_err().kind(), ErrorKind::Backend, "{response}");
        }
    }
}
