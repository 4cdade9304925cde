//! `generation_config.json`: the sampling that a model's authors ask for, and the tokens that end an answer.

use std::path::Path;

use ternion_core::{Result, SamplingDefaults};

use crate::json::Object;

/// Reads `path` if it exists. The second value is `None` where the file names no end-of-text token.
///
/// As in transformers, a model whose authors do not ask for sampling is decoded greedily.
pub(crate) fn read(path: &Path, cap: u64) -> Result<(SamplingDefaults, Option<Vec<u32>>)> {
    let mut sampling = SamplingDefaults::default();
    if !path.exists() {
        return Ok((sampling, None));
    }
    let file = Object::read(path, cap)?;
    if let Some(penalty) = file.number("repetition_penalty", f32::MIN_POSITIVE..=100.0)? {
        sampling.repetition_penalty = penalty;
    }
    // What is not used is not looked at: published files have `top_k` -1 and the like beside greedy decoding.
    if file.boolean("do_sample")? == Some(true) {
        sampling.temperature = file.number("temperature", 0.0..=100.0)?.unwrap_or(1.0);
        if let Some(top_p) = file.number("top_p", f32::MIN_POSITIVE..=1.0)? {
            sampling.top_p = top_p;
        }
        if let Some(min_p) = file.number("min_p", 0.0..=1.0)? {
            sampling.min_p = min_p;
        }
        let keeps_all = file.value("top_k").and_then(serde_json::Value::as_i64) == Some(-1);
        if !keeps_all && let Some(top_k) = file.integer("top_k", 0..=u64::from(u32::MAX))? {
            sampling.top_k = top_k;
        }
    }
    Ok((sampling, file.token_ids("eos_token_id")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<(SamplingDefaults, Option<Vec<u32>>)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("generation_config.json");
        std::fs::write(&path, text).unwrap();
        read(&path, 1 << 20)
    }

    #[test]
    fn the_authors_sampling_is_taken() {
        let text =
            r#"{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [128001, 128009]}"#;
        let (sampling, eos) = parse(text).unwrap();
        assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (0.6, 0.9, 0));
        assert_eq!(parse(r#"{"do_sample": true, "top_k": -1}"#).unwrap().0.top_k, 0, "-1 keeps all");
        assert_eq!(eos, Some(vec![128_001, 128_009]));
    }

    #[test]
    fn without_do_sample_it_is_greedy() {
        let (sampling, eos) = parse(r#"{"temperature": 0.7, "top_k": -3, "eos_token_id": 2}"#).unwrap();
        assert_eq!(sampling, SamplingDefaults::default());
        assert_eq!((sampling.temperature, eos), (0.0, Some(vec![2])));
    }

    #[test]
    fn absent_file_and_bad_values() {
        assert_eq!(read(Path::new("/no/such/file"), 9).unwrap(), (SamplingDefaults::default(), None));
        for (text, key) in [
            (r#"{"do_sample": true, "temperature": -1}"#, "temperature"),
            (r#"{"do_sample": true, "top_p": 0}"#, "top_p"),
            (r#"{"do_sample": true, "top_p": 1.5}"#, "top_p"),
            (r#"{"do_sample": true, "top_k": -3}"#, "top_k"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty"),
            (r#"{"do_sample": 1}"#, "do_sample"),
            (r#"{"eos_token_id": "</s>"}"#, "eos_token_id"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("generation_config.json"), "{error}");
        }
    }
}
