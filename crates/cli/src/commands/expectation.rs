//! What a model is known to compute, as `ternion verify` compares it: the form of `data/bitnet-2b4t.json`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use ternion::Message;

use crate::failure::{Failure, Outcome};
use crate::input::TextSource;

/// The published BitNet b1.58 2B4T, packed.
const BITNET_2B4T: &str = include_str!("../../data/bitnet-2b4t.json");

/// What is known of a model. What is left out is not checked.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Expectation {
    /// The model, for people.
    pub(crate) model: String,
    /// Where the values come from, for people.
    pub(crate) source: String,
    /// Length of a row of logits.
    pub(crate) vocab_size: usize,
    /// SHA-256 of files in the checkpoint's folder, in hexadecimal.
    #[serde(default)]
    pub(crate) files: BTreeMap<String, String>,
    /// Logits of one sequence.
    pub(crate) logits: Option<ExpectedLogits>,
    /// A greedy continuation of one conversation.
    pub(crate) generation: Option<ExpectedText>,
}

/// Logits of one sequence, computed in `f32`.
///
/// A value passes within `tolerance + tolerance * |expected|`. Activations are rounded to 8 bits; another order of
/// summation moves some across a rounding boundary, which is worth up to some 1e-2 in a logit. A wrong scale, norm or
/// layout is worth far more.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ExpectedLogits {
    /// The text, with its special tokens; encoding it must give `input_ids`.
    pub(crate) text: Option<String>,
    /// The sequence.
    pub(crate) input_ids: Vec<u32>,
    /// The mean over the vocabulary at each position.
    pub(crate) mean: Vec<f64>,
    /// See above.
    pub(crate) mean_tolerance: f64,
    /// The first logits at position 0.
    pub(crate) first: Vec<f64>,
    /// See above.
    pub(crate) first_tolerance: f64,
}

/// A greedy continuation.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ExpectedText {
    /// The conversation; the template must give `prompt_ids`.
    pub(crate) messages: Vec<Message>,
    /// The prompt.
    pub(crate) prompt_ids: Vec<u32>,
    /// The answer.
    pub(crate) text: String,
    /// The answer's tokens.
    pub(crate) tokens: Vec<u32>,
    /// Where the answer departs, each expected token must still be this close to the best one in log-probability:
    /// the published text was generated in bf16, which can decide a near tie otherwise.
    pub(crate) logprob_tolerance: f64,
}

impl Expectation {
    /// Reads `path`, or the built-in expectation of the 2B4T.
    pub(crate) fn load(path: Option<&Path>) -> Outcome<Self> {
        let (text, name) = match path {
            None => (BITNET_2B4T.to_owned(), "bitnet-2b4t".to_owned()),
            Some(path) => {
                (TextSource::new(None, Some(path)).read("expectation")?, path.display().to_string())
            }
        };
        Self::parse(&text).map_err(|problem| Failure::usage(format!("{name}: {problem}")))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let found: Self = serde_json::from_str(text).map_err(|e| e.to_string())?;
        found.check()?;
        Ok(found)
    }

    fn check(&self) -> Result<(), String> {
        if let Some(file) = self.files.keys().find(|name| Path::new(name).file_name() != Some(name.as_ref()))
        {
            return Err(format!("files: `{file}` is no plain file name"));
        }
        if let Some(logits) = &self.logits {
            let (ids, means) = (logits.input_ids.len(), logits.mean.len());
            if ids == 0 || means != ids {
                return Err(format!(
                    "logits: {ids} input_ids and {means} means; as many of both expected, at least 1"
                ));
            }
            if logits.first.len() > self.vocab_size {
                return Err(format!(
                    "logits.first: {} values; at most vocab_size expected",
                    logits.first.len()
                ));
            }
        }
        if let Some(generation) = &self.generation
            && (generation.prompt_ids.is_empty() || generation.tokens.is_empty())
        {
            return Err("generation: prompt_ids or tokens are empty; at least 1 of each expected".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_expectation_is_valid() {
        let found = Expectation::load(None).unwrap();
        assert_eq!(found.vocab_size, 128_256);
        assert!(found.files.values().all(|hash| hash.len() == 64));
        assert_eq!(found.logits.unwrap().first.len(), 30);
        assert_eq!(found.generation.unwrap().tokens.len(), 20);
    }

    /// A download by the short name compares with the same hashes.
    #[cfg(feature = "hub")]
    #[test]
    fn hashes_are_those_of_the_short_name() {
        let found = Expectation::load(None).unwrap();
        let known = ternion::hub::KnownModel::named("bitnet-2b4t").unwrap();
        for (name, hash) in &found.files {
            let recorded = known.sha256.iter().find(|(known, _)| known == name);
            assert_eq!(recorded.map(|(_, hash)| *hash), Some(hash.as_str()), "{name}");
        }
    }

    #[test]
    fn a_wrong_expectation_is_refused() {
        let base = r#""model": "m", "source": "s", "vocab_size": 8"#;
        assert!(Expectation::parse(&format!("{{{base}}}")).is_ok());
        let fault = |rest: &str| Expectation::parse(&format!("{{{base}, {rest}}}")).unwrap_err();
        assert!(fault(r#""extra": 1"#).contains("extra"));
        assert!(fault(r#""files": {"../x": "00"}"#).contains("`../x`"));
        let logits = r#""logits": {"input_ids": [1], "mean": [], "mean_tolerance": 1, "first": [], "first_tolerance": 1}"#;
        assert!(fault(logits).contains("0 means"));
    }
}
