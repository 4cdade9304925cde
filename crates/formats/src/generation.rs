//! `generation_config.json`: the sampling that a model's authors ask for, and the tokens that end an answer.

use std::path::Path;

use serde_json::Value;
use ternion_core::{Result, SamplingDefaults};

use crate::json::Object;
use crate::notes::Notes;

/// What transformers takes for `top_k` where a model samples and the key is absent.
pub(crate) const DEFAULT_TOP_K: usize = 50;

/// Settings that change answers and have no counterpart here, with what stands for "off" beside null, `false` and an empty
/// list; those that only act on sampled tokens come second.
const NOT_APPLIED: [(&str, f64); 16] = [
    ("num_beams", 1.0),
    ("penalty_alpha", 0.0),
    ("no_repeat_ngram_size", 0.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("min_length", 0.0),
    ("min_new_tokens", 0.0),
    ("guidance_scale", 1.0),
    ("bad_words_ids", 0.0),
    ("sequence_bias", 0.0),
    ("suppress_tokens", 0.0),
    ("begin_suppress_tokens", 0.0),
    ("forced_eos_token_id", -1.0),
    ("exponential_decay_length_penalty", 0.0),
    ("stop_strings", 0.0),
    ("watermarking_config", 0.0),
];
const NOT_APPLIED_WHEN_SAMPLED: [(&str, f64); 4] =
    [("typical_p", 1.0), ("epsilon_cutoff", 0.0), ("eta_cutoff", 0.0), ("top_h", 1.0)];

/// Reads `path`, or where that does not exist the same keys of `config`, which older versions of transformers kept there.
/// The second value is `None` where the file names no end-of-text token.
///
/// As in transformers, a model whose authors do not ask for sampling is decoded greedily, and one that samples has
/// `top_k` 50 unless they say otherwise. 0 and null switch that off.
pub(crate) fn read(
    path: &Path,
    cap: u64,
    config: Option<&Object>,
    notes: &mut Notes,
) -> Result<(SamplingDefaults, Option<Vec<u32>>)> {
    if path.exists() {
        let file = Object::read(path, cap)?;
        return Ok((sampling(&file, true, notes)?, file.token_ids("eos_token_id")?));
    }
    // The configuration's own end-of-text token is read where the rest of it is.
    Ok((config.map_or_else(|| Ok(SamplingDefaults::default()), |file| sampling(file, false, notes))?, None))
}

/// The sampling that `file` asks for. With `nulls`, a null is a value of its own; else it counts as absent.
fn sampling(file: &Object, nulls: bool, notes: &mut Notes) -> Result<SamplingDefaults> {
    let mut sampling = SamplingDefaults::default();
    if let Some(penalty) = file.number("repetition_penalty", f32::MIN_POSITIVE..=100.0)? {
        sampling.repetition_penalty = penalty;
    }
    let sampled = file.boolean("do_sample")? == Some(true);
    not_applied(file, sampled, notes);
    // What is not used is not looked at: published files have `top_k` -1 and the like beside greedy decoding.
    if !sampled {
        return Ok(sampling);
    }
    sampling.temperature = file.number("temperature", 0.0..=100.0)?.unwrap_or(1.0);
    if let Some(top_p) = file.number("top_p", 0.0..=f32::MAX)? {
        // 0 keeps the best token alone, 1 and more keep all.
        sampling.top_p = top_p.clamp(f32::MIN_POSITIVE, 1.0);
    }
    if let Some(min_p) = file.number("min_p", 0.0..=1.0)? {
        sampling.min_p = min_p;
    }
    let is_null = nulls && file.is_null("top_k");
    if is_null {
        notes.assume(format!(
            "top-k off: `top_k` is null, which is \"off\" in transformers 4; transformers 5 takes {DEFAULT_TOP_K}"
        ));
    }
    // -1 is vLLM's way to say it.
    if !is_null && file.value("top_k").and_then(Value::as_i64) != Some(-1) {
        sampling.top_k = if let Some(top_k) = file.integer("top_k", 0..=u64::from(u32::MAX))? {
            top_k
        } else {
            notes.assume(format!(
                "top-k {DEFAULT_TOP_K}: the model samples and states no `top_k`; transformers' default"
            ));
            DEFAULT_TOP_K
        };
    }
    Ok(sampling)
}

/// Warns of settings that would change answers in transformers.
fn not_applied(file: &Object, sampled: bool, notes: &mut Notes) {
    let more = if sampled { &NOT_APPLIED_WHEN_SAMPLED[..] } else { &[] };
    let is_off = |value: &Value, off: f64| match value {
        Value::Bool(value) => !value,
        Value::Array(items) => items.is_empty(),
        Value::Number(number) => number.as_f64() == Some(off),
        _ => false,
    };
    let set: Vec<&str> = NOT_APPLIED
        .iter()
        .chain(more)
        .filter(|(key, off)| file.value(key).is_some_and(|value| !is_off(value, *off)))
        .map(|(key, _)| *key)
        .collect();
    if !set.is_empty() {
        notes.warn(format!(
            "the model's authors ask for settings of generation that are not applied here: {}",
            set.join(", ")
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<(SamplingDefaults, Option<Vec<u32>>)> {
        parse_with(text, &mut Notes::default())
    }

    fn parse_with(text: &str, notes: &mut Notes) -> Result<(SamplingDefaults, Option<Vec<u32>>)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("generation_config.json");
        std::fs::write(&path, text).unwrap();
        read(&path, 1 << 20, None, notes)
    }

    #[test]
    fn the_authors_sampling_is_taken() {
        let text =
            r#"{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [128001, 128009]}"#;
        let (sampling, eos) = parse(text).unwrap();
        assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (0.6, 0.9, 50));
        assert_eq!(eos, Some(vec![128_001, 128_009]));
    }

    #[test]
    fn top_k_is_fifty_unless_it_is_stated() {
        // Those of transformers 4.57's `GenerationConfig.from_dict`, but for -1.
        for (stated, expected) in
            [("", 50), (r#", "top_k": 50"#, 50), (r#", "top_k": 7"#, 7), (r#", "top_k": 0"#, 0)]
                .into_iter()
                .chain([(r#", "top_k": null"#, 0), (r#", "top_k": -1"#, 0)])
        {
            let (sampling, _) = parse(&format!(r#"{{"do_sample": true{stated}}}"#)).unwrap();
            assert_eq!((sampling.top_k, sampling.temperature), (expected, 1.0), "{stated}");
        }
    }

    #[test]
    fn top_p_of_nothing_keeps_the_best_token_and_one_keeps_all() {
        let top_p =
            |value: &str| parse(&format!(r#"{{"do_sample": true, "top_p": {value}}}"#)).unwrap().0.top_p;
        assert_eq!(top_p("0.0"), f32::MIN_POSITIVE);
        assert_eq!((top_p("1.0"), top_p("1.5"), top_p("null")), (1.0, 1.0, 1.0));
    }

    #[test]
    fn without_do_sample_it_is_greedy() {
        let (sampling, eos) = parse(r#"{"temperature": 0.7, "top_k": -3, "eos_token_id": 2}"#).unwrap();
        assert_eq!(sampling, SamplingDefaults::default());
        assert_eq!((sampling.temperature, eos), (0.0, Some(vec![2])));
        assert_eq!(parse(r#"{"do_sample": null, "top_p": 0.5}"#).unwrap().0.temperature, 0.0);
    }

    #[test]
    fn settings_without_a_counterpart_are_named() {
        let warnings = |text: &str| {
            let mut notes = Notes::default();
            parse_with(text, &mut notes).unwrap();
            notes.finish().1.join(" ")
        };
        assert_eq!(
            warnings(r#"{"num_beams": 1, "no_repeat_ngram_size": 0, "typical_p": 0.5, "bad_words_ids": []}"#),
            "",
            "all are off, or only act on sampled tokens"
        );
        let text = r#"{"do_sample": true, "num_beams": 4, "typical_p": 0.5, "suppress_tokens": [1]}"#;
        assert!(warnings(text).ends_with(": num_beams, suppress_tokens, typical_p"), "{}", warnings(text));
    }

    #[test]
    fn an_old_configuration_holds_them_itself() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, r#"{"do_sample": true, "temperature": 0.6, "top_k": null}"#).unwrap();
        let config = Object::read(&path, 1 << 20).unwrap();
        let absent = folder.path().join("generation_config.json");
        let (sampling, eos) = read(&absent, 9, Some(&config), &mut Notes::default()).unwrap();
        assert_eq!((sampling.temperature, sampling.top_k, eos), (0.6, 50, None));
    }

    #[test]
    fn absent_file_and_bad_values() {
        let absent = read(Path::new("/no/such/file"), 9, None, &mut Notes::default()).unwrap();
        assert_eq!(absent, (SamplingDefaults::default(), None));
        for (text, key) in [
            (r#"{"do_sample": true, "temperature": -1}"#, "temperature"),
            (r#"{"do_sample": true, "top_p": -0.1}"#, "top_p"),
            (r#"{"do_sample": true, "top_k": -3}"#, "top_k"),
            (r#"{"do_sample": true, "min_p": 2}"#, "min_p"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty"),
            (r#"{"do_sample": 1}"#, "do_sample"),
            (r#"{"eos_token_id": "</s>"}"#, "eos_token_id"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("generation_config.json"), "{error}");
        }
    }
}
