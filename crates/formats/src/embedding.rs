//! Whether a checkpoint is made for embeddings, and how its hidden states become a vector: the files of sentence-transformers
//! beside a model in Hugging Face's layout, and a GGUF file's `pooling_type`.

mod dense;

use std::path::{Component, Path};

use serde_json::Value;
use ternion_core::{EmbeddingInfo, Error, Pooling, Result, ResultExt};

use crate::gguf::File;
use crate::huggingface::{self, CONFIG, CONFIG_CAP};
use crate::json::{Object, read_capped};
use crate::locate::gguf_file;
pub use dense::{DenseActivation, DenseModule, DenseWeights};

/// Why a model that gives one number for a pair of texts is refused.
const RERANKER: &str =
    "the model ranks or classifies texts, which is not implemented; one for embeddings or for text expected";

/// How a model makes embeddings.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct EmbeddingSpec {
    /// How hidden states become a vector.
    pub pooling: Pooling,
    /// Linear layers that a pooled vector goes through.
    pub dense: Vec<DenseModule>,
    /// Vectors have the length 1. llama.cpp's tools do that for all GGUF files, which do not say.
    pub normalized: bool,
    /// The most tokens of an input; `None`: as many as the model takes.
    pub max_tokens: Option<usize>,
    /// The shorter lengths that the model is trained for. `None`: none; an empty list: any.
    pub shortened: Option<Vec<usize>>,
}

impl EmbeddingSpec {
    /// Vectors by this pooling, of the length 1.
    pub fn new(pooling: Pooling) -> Self {
        Self { pooling, dense: Vec::new(), normalized: true, max_tokens: None, shortened: None }
    }

    /// What the model at `path` says of itself; `None` for one that is not made for embeddings.
    ///
    /// # Errors
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where a file is damaged,
    /// [`Unsupported`](ternion_core::ErrorKind::Unsupported) for steps after the model that are not known, and for a reranker.
    pub fn at(path: impl AsRef<Path>) -> Result<Option<Self>> {
        let path = path.as_ref();
        if let Some(file) = gguf_file(path)? {
            return Self::of_gguf(&File::open(&file)?);
        }
        let Ok((folder, _)) = huggingface::locate(path) else { return Ok(None) };
        Self::of_folder(&folder)
    }

    /// What a GGUF file says.
    ///
    /// # Errors
    /// [`Unsupported`](ternion_core::ErrorKind::Unsupported) for a way of pooling that is not known.
    pub fn of_gguf(file: &File) -> Result<Option<Self>> {
        let Ok(architecture) = file.architecture() else { return Ok(None) };
        let key = format!("{architecture}.pooling_type");
        // llama.cpp's numbers.
        Ok(Some(Self::new(match file.integer(&key, 0..=u64::from(u32::MAX))? {
            None | Some(0) => return Ok(None),
            Some(1) => Pooling::Mean,
            Some(2) => Pooling::Cls,
            Some(3) => Pooling::Last,
            Some(4) => {
                let message = format!("`{key}` is 4: {RERANKER}");
                return Err(Error::unsupported(message).with("file", file.path().display()));
            }
            Some(other) => {
                let message = format!("`{key}` is {other}, expected 0 to 4");
                return Err(Error::unsupported(message).with("file", file.path().display()));
            }
        })))
    }

    /// The same by another way of pooling.
    pub fn with_pooling(mut self, pooling: Pooling) -> Self {
        self.pooling = pooling;
        self
    }

    fn of_folder(folder: &Path) -> Result<Option<Self>> {
        let config = folder.join(CONFIG);
        if config.is_file() {
            let classes = Object::read(&config, CONFIG_CAP)?.strings("architectures")?;
            if let Some(class) = classes.iter().find(|class| class.ends_with("ForSequenceClassification")) {
                let message = format!("`architectures` has `{class}`: {RERANKER}");
                return Err(Error::unsupported(message).with("file", config.display()));
            }
        }
        let file = folder.join("modules.json");
        if !file.is_file() {
            return Ok(None);
        }
        Self::of_modules(folder, &file).map(Some).with("file", file.display())
    }

    /// The modules: the model itself, pooling, and norms.
    fn of_modules(folder: &Path, file: &Path) -> Result<Self> {
        let invalid = |what: &str| Error::invalid_model(format!("the list of modules {what}"));
        let modules: Vec<Value> = serde_json::from_slice(&read_capped(file, CONFIG_CAP)?)
            .map_err(|e| invalid("is not valid JSON, or no list").with_source(e))?;
        let mut spec: Option<Self> = None;
        let mut transformer = None;
        for (index, module) in modules.iter().enumerate() {
            let kind = module["type"].as_str().and_then(|kind| kind.rsplit('.').next()).unwrap_or_default();
            let inside = module["path"].as_str().unwrap_or_default();
            if Path::new(inside).components().any(|part| !matches!(part, Component::Normal(_))) {
                return Err(invalid(&format!("has the path `{inside}`, which is not one below the folder")));
            }
            match (kind, &mut spec) {
                ("Transformer", None) if index == 0 && inside.is_empty() => transformer = Some(()),
                ("Pooling", None) if transformer.is_some() => {
                    let config = Object::read(&folder.join(inside).join(CONFIG), CONFIG_CAP)?;
                    let mut pooled = Self::new(pooling(&config)?);
                    pooled.normalized = false;
                    spec = Some(pooled);
                }
                ("Dense", Some(spec)) if !spec.normalized => {
                    spec.dense.push(DenseModule::read(&folder.join(inside))?);
                }
                ("Normalize", Some(spec)) => spec.normalized = true,
                _ => {
                    return Err(Error::unsupported(format!(
                        "module {index} is `{kind}` in the folder `{inside}`; a Transformer in the folder itself, then \
                         Pooling, then any number of Dense, then Normalize or nothing are implemented"
                    )));
                }
            }
        }
        let mut spec = spec.ok_or_else(|| invalid("has no pooling"))?;
        for name in ["sentence_bert_config.json", "sentence_roberta_config.json"] {
            let file = folder.join(name);
            if file.is_file() {
                spec.max_tokens = Object::read(&file, CONFIG_CAP)?.integer("max_seq_length", 1..=1 << 24)?;
            }
        }
        let config = Object::read(&folder.join(CONFIG), CONFIG_CAP)?;
        spec.shortened = match config.value("matryoshka_dimensions").filter(|value| !value.is_null()) {
            Some(value) => {
                let lengths = value.as_array().into_iter().flatten().map(Value::as_u64);
                let lengths = lengths.map(|length| length.and_then(|n| usize::try_from(n).ok()));
                let lengths: Option<Vec<usize>> = lengths.collect();
                Some(
                    lengths
                        .filter(|lengths| !lengths.is_empty())
                        .ok_or_else(|| config.invalid("matryoshka_dimensions", value, "a list of lengths"))?,
                )
            }
            None => (config.boolean("is_matryoshka")? == Some(true)).then(Vec::new),
        };
        Ok(spec)
    }

    /// What is told of a model whose hidden states have `width` values.
    pub fn info(&self, width: usize) -> EmbeddingInfo {
        let dimensions = self.dense.last().map_or(width, |module| module.outputs);
        EmbeddingInfo::new(dimensions, self.pooling, self.normalized).with_shortened(self.shortened.clone())
    }
}

/// The pooling that the configuration of the module says, in its newer form or in its older one.
fn pooling(config: &Object) -> Result<Pooling> {
    if let Some(value) = config.value("pooling_mode") {
        let name = value.as_str().unwrap_or_default();
        return match name {
            "mean" => Ok(Pooling::Mean),
            "cls" => Ok(Pooling::Cls),
            "lasttoken" | "last" => Ok(Pooling::Last),
            _ => Err(config.unsupported("pooling_mode", value, "mean, cls or lasttoken")),
        };
    }
    let mut found = None;
    for (key, pooling) in [
        ("pooling_mode_cls_token", Some(Pooling::Cls)),
        ("pooling_mode_mean_tokens", Some(Pooling::Mean)),
        ("pooling_mode_lasttoken", Some(Pooling::Last)),
        ("pooling_mode_max_tokens", None),
        ("pooling_mode_mean_sqrt_len_tokens", None),
        ("pooling_mode_weightedmean_tokens", None),
    ] {
        if config.boolean(key)? != Some(true) {
            continue;
        }
        match pooling {
            Some(pooling) if found.is_none() => found = Some(pooling),
            _ => return Err(config.unsupported(key, &true, "one of the mean, the first and the last token")),
        }
    }
    found.ok_or_else(|| config.invalid("pooling_mode", &"missing", "a way of pooling"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ternion_core::ErrorKind;

    fn folder(modules: &str, pooling: &str, config: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("1_Pooling")).unwrap();
        std::fs::write(folder.path().join("1_Pooling/config.json"), pooling).unwrap();
        std::fs::write(folder.path().join("modules.json"), modules).unwrap();
        std::fs::write(folder.path().join("config.json"), config).unwrap();
        folder
    }

    const MODULES: &str = r#"[
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]"#;

    #[test]
    fn files_of_sentence_transformers_say_how_to_pool() {
        let last = r#"{"pooling_mode_cls_token": false, "pooling_mode_lasttoken": true}"#;
        let there = folder(MODULES, last, r#"{"matryoshka_dimensions": [32, 64]}"#);
        std::fs::write(there.path().join("sentence_bert_config.json"), r#"{"max_seq_length": 256}"#).unwrap();
        let spec = EmbeddingSpec::of_folder(there.path()).unwrap().unwrap();
        assert_eq!((spec.pooling, spec.normalized, spec.max_tokens), (Pooling::Last, true, Some(256)));
        assert_eq!(spec.shortened, Some(vec![32, 64]));

        let two = MODULES.rsplit_once(",\n").unwrap().0.to_owned() + "]";
        let there = folder(&two, r#"{"pooling_mode": "mean"}"#, r#"{"is_matryoshka": true}"#);
        let spec = EmbeddingSpec::of_folder(there.path()).unwrap().unwrap();
        assert_eq!((spec.pooling, spec.normalized, spec.shortened), (Pooling::Mean, false, Some(vec![])));
        assert_eq!(EmbeddingSpec::of_folder(tempfile::tempdir().unwrap().path()).unwrap(), None);
    }

    #[test]
    fn a_module_dense_is_read() {
        let modules = MODULES.replace("Normalize\"", "Dense\"").replace("2_Normalize", "2_Dense");
        let dense = |config: &str| {
            let there = folder(&modules, r#"{"pooling_mode": "mean"}"#, "{}");
            std::fs::create_dir(there.path().join("2_Dense")).unwrap();
            std::fs::write(there.path().join("2_Dense/config.json"), config).unwrap();
            EmbeddingSpec::of_folder(there.path()).map(Option::unwrap)
        };
        let spec = dense(r#"{"in_features": 4, "out_features": 2, "bias": false}"#).unwrap();
        assert_eq!((spec.dense[0].inputs, spec.dense[0].outputs), (4, 2));
        assert_eq!((spec.dense[0].activation, spec.normalized), (DenseActivation::Tanh, false));
        assert_eq!(spec.info(4).dimensions, 2);
        assert_eq!(spec.dense[0].load().unwrap_err().kind(), ErrorKind::NotFound);
        for (config, word) in [
            (r#"{"out_features": 2}"#, "in_features"),
            (r#"{"in_features": 4, "out_features": 2, "activation_function": "torch.nn.Mish"}"#, "Mish"),
            (r#"{"in_features": 4, "out_features": 2, "module_input_name": "token_embeddings"}"#, "token_"),
        ] {
            let error = dense(config).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let fails = |modules: &str, pooling: &str| {
            EmbeddingSpec::of_folder(folder(modules, pooling, "{}").path()).unwrap_err()
        };
        let max = fails(MODULES, r#"{"pooling_mode_max_tokens": true}"#);
        assert!(max.kind() == ErrorKind::Unsupported && max.to_string().contains("pooling_mode_max_tokens"));
        let norm = fails(&MODULES.replace("Normalize\"", "LayerNorm\""), r#"{"pooling_mode": "cls"}"#);
        assert!(norm.kind() == ErrorKind::Unsupported && norm.to_string().contains("`LayerNorm`"));
        assert_eq!(fails("{}", "{}").kind(), ErrorKind::InvalidModel);
        assert_eq!(fails("[]", "{}").kind(), ErrorKind::InvalidModel);
        let reranker = folder(MODULES, "{}", r#"{"architectures": ["XLMRobertaForSequenceClassification"]}"#);
        let error = EmbeddingSpec::of_folder(reranker.path()).unwrap_err();
        assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("ranks"), "{error}");
        let outside = fails(&MODULES.replace("1_Pooling", "../1_Pooling"), "{}");
        assert_eq!(outside.kind(), ErrorKind::InvalidModel);
    }
}
