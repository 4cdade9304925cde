//! What decoding has to read of memory for each token.

use serde::{Deserialize, Serialize};
use ternion::MemoryPlan;
use ternion::config::ModelConfig;
use ternion::engine::kv::KvType;
use ternion::formats::gguf::File;
use ternion::formats::{Checkpoint, LayerTensors, Weights};
use ternion_head::{HeadKind, HeadWeights};
use ternion_kernels::BoundedMatrix;

/// A copy of the head that an engine computes with is a part of its memory plan, under a name that begins with one of these.
const HEAD_COPIES: [&str; 2] = ["head in ", "certified copy of the head"];

/// Bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Reads {
    /// The weights of all projections, as they lie in memory.
    pub(super) linears: u64,
    /// Those of the head, in the form that logits are computed from. Of an embedding that is not the head one row is read,
    /// which is nothing beside them.
    pub(super) head: u64,
    /// Keys and values of one position of one sequence; `None` where their type is the engine's own.
    pub(super) kv_position: Option<u64>,
}

impl Reads {
    /// Those of a checkpoint that was loaded with this configuration and this plan.
    pub(super) fn of(checkpoint: &Checkpoint, config: &ModelConfig, plan: Option<&MemoryPlan>) -> Self {
        let linears = checkpoint.layers.iter().flat_map(LayerTensors::linears);
        let (linears, head) = dense_file(checkpoint).unwrap_or_else(|| {
            (linears.map(|linear| linear.size() as u64).sum(), checkpoint.head_or_embed().size() as u64)
        });
        Self {
            linears,
            head: head_copy(plan).or_else(|| certified_copy(checkpoint, config, plan)).unwrap_or(head),
            kv_position: kv_type(config, plan)
                .map(|kv_type| checkpoint.spec.kv_layout().bytes_read_per_position(kv_type)),
        }
    }

    /// For one token of `batch` sequences that decode together and have `positions` each: they share the weights that a step
    /// reads, and each has keys and values of its own.
    pub(super) fn per_token(&self, batch: usize, positions: f64) -> Option<f64> {
        let weights = (self.linears + self.head) as f64;
        Some(weights / batch.max(1) as f64 + positions * self.kv_position? as f64)
    }
}

/// Bytes of the projections and of the head of a GGUF file without ternary weights. A [`Checkpoint`] has them as floats; the engines compute
/// them in the types of the file.
fn dense_file(checkpoint: &Checkpoint) -> Option<(u64, u64)> {
    let mut linears = checkpoint.layers.iter().flat_map(LayerTensors::linears);
    if !linears.all(|linear| matches!(linear.weights, Weights::Dense(_))) {
        return None;
    }
    let file = File::open(checkpoint.files.first()?).and_then(File::joined).ok()?;
    let is_linear = |name: &str| name.starts_with("blk.") && name.ends_with(".weight");
    let linears = file.tensors().iter().filter(|tensor| tensor.dims.len() == 2 && is_linear(&tensor.name));
    let head = file.tensor("output.weight").or_else(|| file.tensor("token_embd.weight"))?;
    Some((linears.map(|tensor| tensor.bytes).sum(), head.bytes))
}

/// The copy of the head, where the engine made one.
fn head_copy(plan: Option<&MemoryPlan>) -> Option<u64> {
    let is_copy = |name: &str| HEAD_COPIES.iter().any(|copy| name.starts_with(copy));
    plan?.parts.iter().find(|part| is_copy(&part.name)).map(|part| part.bytes)
}

/// The certified copy of the head in an engine without a plan.
fn certified_copy(checkpoint: &Checkpoint, config: &ModelConfig, plan: Option<&MemoryPlan>) -> Option<u64> {
    if plan.is_some() || config.backend != "llama-cpp" {
        return None;
    }
    let kind = config.options.get("head").map(|head| serde_json::from_value(head.clone()));
    let kind: HeadKind = kind.transpose().ok()?.unwrap_or_default();
    let weights = HeadWeights::of(checkpoint.head_or_embed())?;
    let [rows, cols] = weights.shape();
    kind.has_copy(&weights, config.mmap.unwrap_or(true)).then(|| BoundedMatrix::bytes(rows, cols) as u64)
}

/// How keys and values are stored: as planned, else as configured, else in f32, which is what engines without a plan have.
fn kv_type(config: &ModelConfig, plan: Option<&MemoryPlan>) -> Option<KvType> {
    let planned = plan.map(|plan| plan.kv_type.clone()).filter(|name| !name.is_empty());
    let name = match planned {
        Some(name) => serde_json::Value::String(name),
        None => config.options.get("kv_type").cloned().unwrap_or_else(|| "f32".into()),
    };
    serde_json::from_value(name).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint() -> Checkpoint {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/nano-packed");
        Checkpoint::open(path).unwrap()
    }

    #[test]
    fn the_head_is_the_one_that_logits_are_computed_from() {
        let checkpoint = checkpoint();
        let config = ModelConfig::default();
        let exact = Reads::of(&checkpoint, &config, None);
        assert_eq!(exact.head, checkpoint.head_or_embed().size() as u64);
        let mut plan = MemoryPlan::new();
        plan.add("embedding and head", exact.head);
        assert_eq!(Reads::of(&checkpoint, &config, Some(&plan)), exact);
        for name in ["head in int8", "head in int4", "certified copy of the head"] {
            let mut plan = plan.clone();
            plan.add(name, 1234);
            assert_eq!(Reads::of(&checkpoint, &config, Some(&plan)).head, 1234, "{name}");
        }
    }

    #[test]
    fn dense_weights_are_counted_in_the_types_of_their_file() {
        let path =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/gguf-llama/model.gguf");
        let checkpoint = Checkpoint::open(&path).unwrap();
        let reads = Reads::of(&checkpoint, &ModelConfig::default(), None);
        let file = File::open(&path).unwrap();
        let all: u64 = file.tensors().iter().map(|tensor| tensor.bytes).sum();
        let lookup = file.tensor("token_embd.weight").unwrap().bytes;
        let norms: u64 = file.tensors().iter().filter(|t| t.dims.len() == 1).map(|t| t.bytes).sum();
        let unread = if file.tensor("output.weight").is_some() { lookup } else { 0 };
        assert_eq!(reads.linears + reads.head, all - norms - unread);
    }

    #[test]
    fn keys_and_values_are_counted_in_the_type_that_is_stored() {
        let checkpoint = checkpoint();
        let bytes = |kv_type| checkpoint.spec.kv_layout().bytes_per_position(kv_type);
        let mut config = ModelConfig::default();
        let mut plan = MemoryPlan::new();
        assert_eq!(Reads::of(&checkpoint, &config, Some(&plan)).kv_position, Some(bytes(KvType::F32)));
        config.options.insert("kv_type".into(), "f16".into());
        assert_eq!(Reads::of(&checkpoint, &config, None).kv_position, Some(bytes(KvType::F16)));
        plan.kv_type = "int8".into();
        assert_eq!(Reads::of(&checkpoint, &config, Some(&plan)).kv_position, Some(bytes(KvType::Int8)));
        config.options.insert("kv_type".into(), "q8_0".into());
        let unknown = Reads::of(&checkpoint, &config, None);
        assert_eq!((unknown.kv_position, unknown.per_token(1, 0.0)), (None, None));
    }
}
