//! What a pooled vector goes through before it is an embedding: the modules `Dense` of sentence-transformers.

use candle_core::{Device, Tensor};
use ternion_core::{Error, Result};
use ternion_formats::{DenseActivation, DenseWeights, EmbeddingSpec};

/// Linear layers, one after the other; mostly none.
pub(crate) struct Projections(Vec<Projection>);

struct Projection {
    weight: Tensor,
    bias: Option<Tensor>,
    activation: DenseActivation,
}

fn failed(error: candle_core::Error) -> Error {
    Error::backend("candle cannot compute the module Dense").with_source(error)
}

impl Projections {
    /// Loads those of a model whose hidden states have `width` values.
    ///
    /// # Errors
    /// Where weights are missing, and where a layer takes another number of values than it gets.
    pub(crate) fn load(spec: &EmbeddingSpec, width: usize) -> Result<Self> {
        let mut width = width;
        let mut all = Vec::new();
        for module in &spec.dense {
            let (inputs, outputs) = (module.inputs, module.outputs);
            if inputs != width {
                return Err(Error::invalid_model(format!(
                    "a module Dense takes {inputs} values, expected {width}, as the step before it gives"
                )));
            }
            let DenseWeights { weight, bias, .. } = module.load()?;
            let tensor = |values: Vec<f32>, shape: (usize, usize)| {
                Tensor::from_vec(values, shape, &Device::Cpu).map_err(failed)
            };
            all.push(Projection {
                weight: tensor(weight, (outputs, inputs))?,
                bias: if bias.is_empty() { None } else { Some(tensor(bias, (outputs, 1))?) },
                activation: module.activation,
            });
            width = outputs;
        }
        Ok(Self(all))
    }

    /// The embedding that a pooled vector becomes.
    ///
    /// # Errors
    /// None but those of candle.
    pub(crate) fn apply(&self, pooled: Vec<f32>) -> Result<Vec<f32>> {
        if self.0.is_empty() {
            return Ok(pooled);
        }
        let width = pooled.len();
        let outcome = Tensor::from_vec(pooled, (width, 1), &Device::Cpu)
            .and_then(|vector| self.0.iter().try_fold(vector, |vector, projection| projection.apply(&vector)))
            .and_then(|vector| vector.flatten_all()?.to_vec1());
        outcome.map_err(failed)
    }
}

impl Projection {
    fn apply(&self, vector: &Tensor) -> candle_core::Result<Tensor> {
        let mut product = self.weight.matmul(vector)?;
        if let Some(bias) = &self.bias {
            product = (product + bias)?;
        }
        match self.activation {
            DenseActivation::Tanh => product.tanh(),
            DenseActivation::Relu => product.relu(),
            // 1 / (1 + exp(-x))
            DenseActivation::Sigmoid => (product.neg()?.exp()? + 1.0)?.recip(),
            _ => Ok(product),
        }
    }
}
