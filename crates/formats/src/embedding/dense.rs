//! The module `Dense` of sentence-transformers: a linear layer that a pooled vector goes through.

use std::path::{Path, PathBuf};

use ternion_core::{Error, Result};

use crate::RawCheckpoint;
use crate::huggingface::{CONFIG, CONFIG_CAP};
use crate::json::Object;

const MAX_WIDTH: u64 = 1 << 20;

/// A linear layer after the pooling. Its weights are read by [`load`](Self::load).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DenseModule {
    /// Values that it takes.
    pub inputs: usize,
    /// Values that it gives.
    pub outputs: usize,
    /// What is applied to each of them.
    pub activation: DenseActivation,
    bias: bool,
    folder: PathBuf,
}

/// A function of one value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the names say it")]
pub enum DenseActivation {
    Identity,
    Tanh,
    Relu,
    Sigmoid,
}

/// The weights of a [`DenseModule`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DenseWeights {
    /// `outputs` rows of `inputs` values.
    pub weight: Vec<f32>,
    /// What is added to each output; empty where there is none.
    pub bias: Vec<f32>,
}

impl DenseModule {
    /// What the folder of a module says.
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let config = Object::read(&folder.join(CONFIG), CONFIG_CAP)?;
        let size = |key: &str| config.required_integer(key, 1..=MAX_WIDTH);
        // Newer versions may route other values than the vector of a text.
        for key in ["module_input_name", "module_output_name"] {
            if let Some(name) = config.string(key)?.filter(|name| *name != "sentence_embedding") {
                return Err(config.unsupported(key, &name, "sentence_embedding"));
            }
        }
        let key = "activation_function";
        let activation = match config.string(key)?.map(|name| name.rsplit('.').next().unwrap_or_default()) {
            Some("Identity") => DenseActivation::Identity,
            // The default of sentence-transformers.
            None | Some("Tanh") => DenseActivation::Tanh,
            Some("ReLU") => DenseActivation::Relu,
            Some("Sigmoid") => DenseActivation::Sigmoid,
            Some(other) => return Err(config.unsupported(key, &other, "Identity, Tanh, ReLU, Sigmoid")),
        };
        Ok(Self {
            inputs: size("in_features")?,
            outputs: size("out_features")?,
            activation,
            bias: config.boolean("bias")?.unwrap_or(true),
            folder: folder.to_owned(),
        })
    }

    /// Reads the weights, from safetensors.
    ///
    /// # Errors
    /// [`NotFound`](ternion_core::ErrorKind::NotFound) where there are none,
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where they are damaged or of another shape.
    pub fn load(&self) -> Result<DenseWeights> {
        let file = RawCheckpoint::open(self.folder.join("model.safetensors"))?;
        let tensor = |name: &str, shape: &[usize]| {
            let wrong = |what: String| {
                Err(Error::invalid_model(what).with("tensor", name).with("folder", self.folder.display()))
            };
            match file.dense(name)? {
                None => wrong("the tensor is missing".to_owned()),
                Some(tensor) if tensor.shape != shape => {
                    wrong(format!("the shape is {:?}, expected {shape:?}", tensor.shape))
                }
                Some(tensor) => Ok(tensor.to_f32()),
            }
        };
        Ok(DenseWeights {
            weight: tensor("linear.weight", &[self.outputs, self.inputs])?,
            bias: if self.bias { tensor("linear.bias", &[self.outputs])? } else { Vec::new() },
        })
    }
}
