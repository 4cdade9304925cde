//! A training on disk: weights, the optimiser's state and the number of the step in one safetensors file.

use std::collections::HashMap;
use std::error::Error;
use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};

use super::model::{Model, Shape};
use super::ops::with_floats;
use super::optimizer::{AdamW, cooling};

/// What a training is: with the same plan and the same step, the next step is the same.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Plan {
    pub(crate) shape: Shape,
    pub(crate) seed: u64,
    pub(crate) steps: usize,
    pub(crate) rows: usize,
    pub(crate) length: usize,
    pub(crate) rate: f64,
}

/// A training at the beginning of step `step`.
pub(crate) struct State {
    pub(crate) plan: Plan,
    pub(crate) step: usize,
    /// Seconds of all runs so far.
    pub(crate) seconds: f64,
    pub(crate) model: Model,
    pub(crate) optimizer: AdamW,
}

const PLAN: &str = "plan";
const STEP: &str = "step";
const SECONDS: &str = "seconds";

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

impl State {
    pub(crate) fn new(plan: Plan) -> Result<Self, Box<dyn Error>> {
        let model = Model::new(plan.shape, plan.seed)?;
        let optimizer = AdamW::new(&model);
        Ok(Self { plan, step: 0, seconds: 0.0, model, optimizer })
    }

    /// The plan with another number of steps, if that would not have changed what has been done so far.
    pub(crate) fn lengthened(&self, steps: usize) -> Result<Plan, Box<dyn Error>> {
        let begun = self.step > cooling(steps).min(cooling(self.plan.steps));
        if steps != self.plan.steps && begun {
            return Err(format!(
                "--steps {steps} comes too late: of {} steps {} are done, and the learning rate would have been another",
                self.plan.steps, self.step
            )
            .into());
        }
        Ok(Plan { steps, ..self.plan })
    }

    /// Writes the file under another name first: a stop in the middle leaves the last one.
    pub(crate) fn save(&self, path: &Path) -> Result<(), Box<dyn Error>> {
        let mut tensors = Vec::new();
        for (parameter, (mean, square)) in self.model.parameters.iter().zip(&self.optimizer.moments) {
            let value = with_floats(&parameter.value, bytes)?;
            let shape = parameter.value.dims().to_vec();
            for (suffix, bytes) in [("", value), (".mean", bytes(mean)), (".square", bytes(square))] {
                tensors.push((format!("{}{suffix}", parameter.name), shape.clone(), bytes));
            }
        }
        let views = tensors
            .iter()
            .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
        let views = views.collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
        let metadata = HashMap::from([
            (PLAN.to_owned(), serde_json::to_string(&self.plan)?),
            (STEP.to_owned(), self.step.to_string()),
            (SECONDS.to_owned(), self.seconds.to_string()),
        ]);
        let unfinished = path.with_extension("part");
        serialize_to_file(views, Some(metadata), &unfinished)?;
        Ok(fs::rename(unfinished, path)?)
    }

    pub(crate) fn load(path: &Path) -> Result<Self, Box<dyn Error>> {
        let file = fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let (_, header) = SafeTensors::read_metadata(&file)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let entry = |key: &str| {
            metadata.get(key).ok_or_else(|| format!("{}: `{key}` is missing in the metadata", path.display()))
        };
        let plan: Plan = serde_json::from_str(entry(PLAN)?)?;
        let tensors = SafeTensors::deserialize(&file)?;
        let floats = |name: &str, count: usize| -> Result<Vec<f32>, Box<dyn Error>> {
            let view = tensors.tensor(name)?;
            if view.dtype() != Dtype::F32 || view.data().len() != 4 * count {
                return Err(format!("{}: {name} is not {count} floats", path.display()).into());
            }
            let (floats, _) = view.data().as_chunks::<4>();
            Ok(floats.iter().map(|x| f32::from_le_bytes(*x)).collect())
        };
        let mut failure = None;
        let model = Model::from_values(plan.shape, |name, dims| {
            let count = dims.iter().product();
            floats(name, count).unwrap_or_else(|e| {
                failure = Some(e);
                vec![0.0; count]
            })
        })?;
        if let Some(failure) = failure {
            return Err(failure);
        }
        let moments = model.parameters.iter().map(|p| {
            let count = p.value.elem_count();
            Ok((floats(&format!("{}.mean", p.name), count)?, floats(&format!("{}.square", p.name), count)?))
        });
        let moments = moments.collect::<Result<Vec<_>, Box<dyn Error>>>()?;
        let optimizer = AdamW { moments };
        Ok(Self { plan, step: entry(STEP)?.parse()?, seconds: entry(SECONDS)?.parse()?, model, optimizer })
    }
}
