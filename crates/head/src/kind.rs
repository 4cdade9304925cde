//! What logits are computed from.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use ternion_engine::ComputeThreads;

use crate::{CertifiedHead, HeadWeights};

/// What logits are computed from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum HeadKind {
    /// `certified` where the head is larger than a cache and the model's files are mapped, else `exact`.
    #[default]
    Auto,
    /// The weights of the model.
    Exact,
    /// An int8 copy with proven bounds of its errors, made when the model is loaded: half the bytes to read for each token. What
    /// may be among the largest logits is computed from the weights of the model, so greedy answers and the candidates of
    /// top-k are those of `exact`, by proof.
    Certified,
}

impl HeadKind {
    /// Whether a head on `weights` has a copy. `maps`: the model's files are mapped.
    pub fn has_copy(self, weights: &HeadWeights, maps: bool) -> bool {
        match self {
            Self::Auto => maps && weights.is_large(),
            Self::Exact => false,
            Self::Certified => true,
        }
    }

    /// The certified head that this asks for, whose copy is made by threads like these; `None` for an exact one. `maps` as in
    /// [`has_copy`](Self::has_copy).
    pub fn certified(
        self,
        weights: HeadWeights,
        maps: bool,
        threads: &ComputeThreads,
    ) -> Option<CertifiedHead> {
        self.has_copy(&weights, maps).then(|| CertifiedHead::start(weights, threads))
    }
}
