//! From the trained master to the forms that engines run, by the project's own converters, and the proof that inference
//! computes what was trained.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use ternion::formats::Checkpoint;
use ternion::formats::convert::{Options, Target, convert};
use ternion::{LogitsRequest, ResultExt};

use super::attention::Places;
use super::batch::Batches;
use super::checkpoint::State;

/// Names of what is made of the master.
const TARGETS: [(Target, &str); 4] = [
    (Target::Safetensors, "packed"),
    (Target::GgufI2s, "ternion-tiny-i2s.gguf"),
    (Target::GgufTq2, "ternion-tiny-tq2.gguf"),
    (Target::OnnxFast, "onnx"),
];

/// A step that no training comes to.
const UNSEEN: usize = 1 << 39;

/// Converts the master in `out` to every format.
pub(crate) fn export(out: &Path) -> Result<(), Box<dyn Error>> {
    let checkpoint = Checkpoint::open(out.join("master"))?;
    for (target, name) in TARGETS {
        let mut options = Options::new(target);
        options.overwrite = true;
        convert(&checkpoint, &out.join(name), &options, &mut |_, _| {}).with("target", target)?;
        println!("{target:12} {}", out.join(name).display());
    }
    Ok(())
}

/// How far the logits of inference are from those of the training graph.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Difference {
    /// Tokens whose logits differ by less than 1e-3, of all.
    pub(crate) close: f64,
    /// Of any logit.
    pub(crate) largest: f32,
}

/// Compares the training graph with the inference engine on the checkpoint `folder`, on the documents of one batch.
pub(crate) async fn compare(
    state: &State,
    batches: &Batches,
    folder: &Path,
) -> Result<Difference, Box<dyn Error>> {
    let model = ternion::open(folder).await?;
    let weights = state.model.quantised()?;
    let (mut close, mut of, mut largest) = (0, 0, 0.0f32);
    for row in batches.get(UNSEEN)? {
        let vocab = state.plan.shape.vocab;
        let length = row.places.starts.iter().filter(|start| **start == 0).count();
        let places = Places { length, starts: Arc::new(vec![0; length]) };
        let ours = weights.forward(&row.tokens[..length], &places)?.flatten_all()?.to_vec1::<f32>()?;
        let theirs = model.logits(LogitsRequest::new(row.tokens[..length].to_vec())).await?;
        for (ours, theirs) in ours.chunks_exact(vocab).zip(theirs.chunks_exact(vocab)) {
            let difference = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            close += usize::from(difference < 1e-3);
            of += 1;
            largest = largest.max(difference);
        }
    }
    Ok(Difference { close: f64::from(close as u32) / f64::from(of), largest })
}
