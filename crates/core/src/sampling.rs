//! How the next token is chosen.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, Serializer, ser::SerializeMap};

/// How the next token is chosen. A field that is `None` takes the model's own default
/// ([`SamplingDefaults`](crate::SamplingDefaults)).
///
/// The order is: logit bias, repetition/presence/frequency penalties, temperature, top-k, top-p, min-p, draw.
///
/// The ranges stand at the fields, and a value outside is an error that names them. All values within work together:
/// a logit that bias or penalties would carry out of the range of f32 becomes its largest or smallest number.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Sampling {
    /// Finite and at least 0; 0 takes the most probable token.
    pub temperature: Option<f32>,
    /// Keep the `top_k` most probable tokens; 0 keeps all.
    pub top_k: Option<usize>,
    /// Over 0 and at most 1; 1 keeps all.
    pub top_p: Option<f32>,
    /// From 0 to 1; 0 keeps all.
    pub min_p: Option<f32>,
    /// Finite and over 0; 1 changes nothing. Counts prompt and answer.
    pub repetition_penalty: Option<f32>,
    /// Subtracted once from the logit of each token that the answer has; from -100 to 100, default 0.
    pub presence_penalty: Option<f32>,
    /// Subtracted for each occurrence of a token in the answer; from -100 to 100, default 0.
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of these token ids; finite, or `-inf`, which forbids a token. JSON and files
    /// cannot say `-inf`; there a bias of -1e30 does the same.
    #[serde(serialize_with = "finite_biases")]
    pub logit_bias: BTreeMap<u32, f32>,
    /// The same seed with the same prompt gives the same tokens, whatever else runs (but for rounding, where the backend is
    /// not [`batch_invariant`](crate::Capabilities::batch_invariant)). `None` draws a seed, which the final event reports. A
    /// drawn seed is below 2^53, so that every JSON reader holds it.
    pub seed: Option<u64>,
}

impl Sampling {
    /// Always the most probable token, without penalties, whatever the configuration's and the model's defaults are.
    ///
    /// The configuration's biases still apply: they say what the model may answer, not how a token is chosen. A bias
    /// of 0 in [`logit_bias`](Self::logit_bias) takes one of them away.
    pub fn greedy() -> Self {
        Self {
            temperature: Some(0.0),
            repetition_penalty: Some(1.0),
            presence_penalty: Some(0.0),
            frequency_penalty: Some(0.0),
            ..Self::default()
        }
    }

    /// The same with this temperature.
    pub fn with_temperature(mut self, temperature: f32) -> Self {
        self.temperature = Some(temperature);
        self
    }

    /// The same with this number of most probable tokens.
    pub fn with_top_k(mut self, top_k: usize) -> Self {
        self.top_k = Some(top_k);
        self
    }

    /// The same with this bound on the sum of probabilities.
    pub fn with_top_p(mut self, top_p: f32) -> Self {
        self.top_p = Some(top_p);
        self
    }

    /// The same with this bound on each probability.
    pub fn with_min_p(mut self, min_p: f32) -> Self {
        self.min_p = Some(min_p);
        self
    }

    /// The same with this penalty for tokens that have been seen.
    pub fn with_repetition_penalty(mut self, penalty: f32) -> Self {
        self.repetition_penalty = Some(penalty);
        self
    }

    /// The same with this penalty for tokens that the answer has.
    pub fn with_presence_penalty(mut self, penalty: f32) -> Self {
        self.presence_penalty = Some(penalty);
        self
    }

    /// The same with this penalty for each occurrence of a token in the answer.
    pub fn with_frequency_penalty(mut self, penalty: f32) -> Self {
        self.frequency_penalty = Some(penalty);
        self
    }

    /// The same with this number added to the logit of `token`.
    pub fn with_logit_bias(mut self, token: u32, bias: f32) -> Self {
        self.logit_bias.insert(token, bias);
        self
    }

    /// The same with this seed.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Takes the fields that are open here from `other`. The biases of both apply; for the same token these win.
    pub fn or(mut self, other: &Sampling) -> Sampling {
        self.temperature = self.temperature.or(other.temperature);
        self.top_k = self.top_k.or(other.top_k);
        self.top_p = self.top_p.or(other.top_p);
        self.min_p = self.min_p.or(other.min_p);
        self.repetition_penalty = self.repetition_penalty.or(other.repetition_penalty);
        self.presence_penalty = self.presence_penalty.or(other.presence_penalty);
        self.frequency_penalty = self.frequency_penalty.or(other.frequency_penalty);
        self.seed = self.seed.or(other.seed);
        for (&token, &bias) in &other.logit_bias {
            self.logit_bias.entry(token).or_insert(bias);
        }
        self
    }
}

/// Writes `-inf`, which JSON does not have, as the lowest number.
fn finite_biases<S: Serializer>(biases: &BTreeMap<u32, f32>, serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(biases.len()))?;
    for (token, &bias) in biases {
        map.serialize_entry(token, &if bias == f32::NEG_INFINITY { f32::MIN } else { bias })?;
    }
    map.end()
}
