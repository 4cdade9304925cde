//! `genai_config.json`, which the model builder of onnxruntime-genai writes in the place of `config.json`.

use std::path::{Component, Path, PathBuf};

use ternion_core::{Result, SamplingDefaults};

use super::Host;
use crate::json::Object;

const SIZES: std::ops::RangeInclusive<u64> = 1..=1 << 28;

/// Names of a decoder's inputs and outputs. Those of keys and values hold `%d` for the number of the layer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the names are those of genai_config.json")]
pub struct Names {
    pub input_ids: String,
    pub attention_mask: String,
    pub position_ids: String,
    pub past_keys: String,
    pub past_values: String,
    pub logits: String,
    pub present_keys: String,
    pub present_values: String,
}

impl Names {
    /// The present of the past that an input of this name is; `None` for any other input.
    pub fn present_of(&self, input: &str) -> Option<String> {
        let layer = |pattern: &str| {
            let (prefix, suffix) = pattern.split_once("%d")?;
            let layer = input.strip_prefix(prefix)?.strip_suffix(suffix)?;
            (!layer.is_empty() && layer.bytes().all(|b| b.is_ascii_digit())).then(|| layer.to_owned())
        };
        let present = |past: &str, present: &str| layer(past).map(|layer| present.replacen("%d", &layer, 1));
        present(&self.past_keys, &self.present_keys)
            .or_else(|| present(&self.past_values, &self.present_values))
    }
}

/// What the file says.
pub(super) struct Genai {
    model: Object,
    decoder: Object,
    search: Option<Object>,
}

impl Genai {
    pub(super) fn read(path: &Path, cap: u64) -> Result<Self> {
        let file = Object::read(path, cap)?;
        let object = |from: &Object, key: &str| {
            from.object(key)?.ok_or_else(|| from.invalid(key, &"missing", "an object"))
        };
        let model = object(&file, "model")?;
        let decoder = object(&model, "decoder")?;
        if decoder.value("pipeline").is_some() {
            return Err(decoder.unsupported("pipeline", &"a list of graphs", "a decoder in one graph"));
        }
        Ok(Self { search: file.object("search")?, model, decoder })
    }

    /// The decoder's file.
    pub(super) fn file(&self, folder: &Path) -> Result<Option<PathBuf>> {
        let Some(name) = self.decoder.string("filename")? else { return Ok(None) };
        let plain = !name.is_empty()
            && !name.contains(['\\', ':', '\0'])
            && Path::new(name).components().all(|c| matches!(c, Component::Normal(_)));
        if plain {
            Ok(Some(folder.join(name)))
        } else {
            Err(self.decoder.invalid("filename", &name, "a file in the folder"))
        }
    }

    fn names(&self) -> Result<Names> {
        let inputs = self.decoder.object("inputs")?;
        let outputs = self.decoder.object("outputs")?;
        let name = |of: &Option<Object>, key: &str, default: &str| -> Result<String> {
            let said = of.as_ref().map(|of| of.string(key)).transpose()?.flatten();
            Ok(said.unwrap_or(default).to_owned())
        };
        for (of, key) in [(&inputs, "past_names"), (&outputs, "present_names")] {
            if let Some(of) = of.as_ref().filter(|of| of.value(key).is_some()) {
                return Err(of.unsupported(
                    key,
                    &"used: keys and values are one tensor",
                    "separate keys and values",
                ));
            }
        }
        Ok(Names {
            input_ids: name(&inputs, "input_ids", "input_ids")?,
            attention_mask: name(&inputs, "attention_mask", "attention_mask")?,
            position_ids: name(&inputs, "position_ids", "position_ids")?,
            past_keys: name(&inputs, "past_key_names", "past_key_values.%d.key")?,
            past_values: name(&inputs, "past_value_names", "past_key_values.%d.value")?,
            logits: name(&outputs, "logits", "logits")?,
            present_keys: name(&outputs, "present_key_names", "present.%d.key")?,
            present_values: name(&outputs, "present_value_names", "present.%d.value")?,
        })
    }

    /// Fills what `host` does not know from elsewhere. `has_generation`: the sampling comes from a generation_config.json.
    pub(super) fn fill(&self, host: &mut Host, has_generation: bool) -> Result<()> {
        let (model, decoder) = (&self.model, &self.decoder);
        host.names = Some(self.names()?);
        if host.architecture.is_none() {
            host.architecture = model.string("type")?.map(str::to_owned);
        }
        host.vocab_size = host.vocab_size.or(model.integer("vocab_size", SIZES)?);
        host.context_length = host.context_length.or(model.integer("context_length", SIZES)?);
        host.layers = host.layers.or(decoder.integer("num_hidden_layers", SIZES)?);
        host.heads = host.heads.or(decoder.integer("num_attention_heads", SIZES)?);
        host.kv_heads = host.kv_heads.or(decoder.integer("num_key_value_heads", SIZES)?);
        host.head_dim = host.head_dim.or(decoder.integer("head_size", SIZES)?);
        host.hidden_size = host.hidden_size.or(decoder.integer("hidden_size", SIZES)?);
        if host.eos.is_empty() {
            host.eos = model.token_ids("eos_token_id")?.unwrap_or_default();
        }
        if let Some(search) = self.search.as_ref().filter(|_| !has_generation) {
            host.sampling = sampling(search)?;
        }
        Ok(())
    }
}

fn sampling(search: &Object) -> Result<SamplingDefaults> {
    let mut sampling = SamplingDefaults::default();
    if let Some(penalty) = search.number("repetition_penalty", f32::MIN_POSITIVE..=100.0)? {
        sampling.repetition_penalty = penalty;
    }
    if search.boolean("do_sample")? != Some(true) {
        return Ok(sampling);
    }
    sampling.temperature = search.number("temperature", 0.0..=100.0)?.unwrap_or(1.0);
    // The defaults are those of onnxruntime-genai.
    sampling.top_k = search.integer("top_k", 0..=u64::from(u32::MAX))?.unwrap_or(50);
    // 0 stands for "off" there.
    if let Some(top_p) = search.number("top_p", 0.0..=1.0)?.filter(|p| *p > 0.0) {
        sampling.top_p = top_p;
    }
    Ok(sampling)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_present_of_a_past_is_named_by_its_layer() {
        let names = Names {
            input_ids: "ids".into(),
            attention_mask: "mask".into(),
            position_ids: "positions".into(),
            past_keys: "k_%d_in".into(),
            past_values: "v%d".into(),
            logits: "out".into(),
            present_keys: "k_%d_out".into(),
            present_values: "new_v%d".into(),
        };
        assert_eq!(names.present_of("k_12_in").as_deref(), Some("k_12_out"));
        assert_eq!(names.present_of("v0").as_deref(), Some("new_v0"));
        for other in ["k__in", "k_x_in", "ids", "v", "k_1_out"] {
            assert_eq!(names.present_of(other), None, "{other}");
        }
    }
}
