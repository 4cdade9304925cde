//! The model under test: a backend, its tokens and a fingerprint that tells it from others.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use ternion_core::{Error, LlmBackend, ModelInfo, Result, ScoreRequest};

use crate::likelihood::Encoder;

/// Tokens of the probe.
const PROBE: u64 = 16;
/// How far the mean log-probability of the probe may differ between two runs of one model: engines sum in any order.
const TOLERANCE: f32 = 0.05;

/// A backend with what the tasks need of it.
#[derive(Clone)]
pub struct Model {
    pub(crate) backend: Arc<dyn LlmBackend>,
    pub(crate) info: Arc<ModelInfo>,
    pub(crate) encoder: Option<Encoder>,
}

impl Model {
    /// The model that `backend` runs.
    ///
    /// # Errors
    /// [`Unsupported`](ternion_core::ErrorKind::Unsupported) where its tokenizer has neither BOS nor EOS.
    pub fn new(backend: Arc<dyn LlmBackend>) -> Result<Self> {
        let encoder = backend.tokenizer().map(Encoder::new).transpose()?;
        Ok(Self { info: backend.info(), encoder, backend })
    }

    /// What the backend says of it.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    pub(crate) fn context(&self) -> usize {
        self.info.limits.context_length
    }

    /// The tokens, for tasks that score them.
    pub(crate) fn scoring(&self, task: &'static str) -> Result<&Encoder> {
        if !self.info.capabilities.score {
            let message = format!("backend `{}` gives no log-probabilities", self.info.backend);
            return Err(Error::unsupported(message).with_operation(task));
        }
        self.encoder.as_ref().ok_or_else(|| {
            let message = format!("backend `{}` has no tokenizer on this side", self.info.backend);
            Error::unsupported(message).with_operation(task)
        })
    }

    /// What tells this model from others.
    ///
    /// # Errors
    /// Those of [`LlmBackend::score`].
    pub async fn fingerprint(&self) -> Result<Fingerprint> {
        let info = &self.info;
        let vocab = info.limits.vocab_size as u64;
        let mut probe = Vec::new();
        if info.capabilities.score && vocab > 0 {
            let count = PROBE.min(info.limits.context_length as u64);
            // Any tokens do, as long as they are always the same.
            let tokens: Vec<u32> = (0..count).map(|i| ((i * 7919 + 13) % vocab) as u32).collect();
            let score = self.backend.score(ScoreRequest::new(tokens, 1)).await?;
            probe.extend(score.tokens.iter().map(|t| t.logprob));
        }
        Ok(Fingerprint {
            name: info.name.clone(),
            backend: info.backend.clone(),
            architecture: info.architecture.clone(),
            format: info.format.clone(),
            parameters: info.parameters,
            context_length: info.limits.context_length,
            vocab_size: info.limits.vocab_size,
            probe,
        })
    }
}

/// What tells a model from others: what it says of itself, and its log-probabilities of a few fixed tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Fingerprint {
    /// Its name, which may change.
    pub name: String,
    /// The backend that runs it.
    pub backend: String,
    /// The architecture.
    pub architecture: String,
    /// The format of its files.
    pub format: String,
    /// Number of parameters; 0 where unknown.
    pub parameters: u64,
    /// Tokens of the context.
    pub context_length: usize,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Log-probabilities of fixed tokens; empty where the backend does not give any.
    pub probe: Vec<f32>,
}

impl Fingerprint {
    /// The first field in which `other` is another model: its name, its value here and its value there.
    pub(crate) fn difference(&self, other: &Self) -> Option<(&'static str, String, String)> {
        let fields = |f: &Self| {
            [
                ("backend", f.backend.clone()),
                ("architecture", f.architecture.clone()),
                ("format", f.format.clone()),
                ("parameters", f.parameters.to_string()),
                ("context_length", f.context_length.to_string()),
                ("vocab_size", f.vocab_size.to_string()),
                ("probe", f.probe.len().to_string()),
            ]
        };
        let differs = fields(self).into_iter().zip(fields(other)).find(|((_, a), (_, b))| a != b);
        if let Some(((name, here), (_, there))) = differs {
            return Some((name, here, there));
        }
        let distance: f32 = self.probe.iter().zip(&other.probe).map(|(a, b)| (a - b).abs()).sum();
        let allowed = TOLERANCE * self.probe.len() as f32;
        (distance > allowed).then(|| {
            let mean = |f: &Self| format!("{:.4}", f.probe.iter().sum::<f32>() / f.probe.len() as f32);
            ("weights (mean log-probability of fixed tokens)", mean(self), mean(other))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_weights_are_another_model_and_rounding_is_not() {
        let model = Fingerprint {
            name: "a".into(),
            backend: "candle".into(),
            architecture: "bitnet".into(),
            format: "safetensors".into(),
            parameters: 7,
            context_length: 64,
            vocab_size: 10,
            probe: vec![-1.0, -2.0],
        };
        let same = Fingerprint { name: "renamed".into(), probe: vec![-1.01, -1.99], ..model.clone() };
        assert!(model.difference(&same).is_none());
        let trained = Fingerprint { probe: vec![-1.5, -2.0], ..model.clone() };
        assert!(model.difference(&trained).unwrap().0.starts_with("weights"));
        let moved = Fingerprint { backend: "onnx".into(), ..model.clone() };
        assert_eq!(model.difference(&moved).unwrap(), ("backend", "candle".into(), "onnx".into()));
    }
}
