//! What attention asks of each type of the KV cache.

use super::VECTORS;
use crate::{
    kv::{BLOCK, Int8Block, KvBlocks},
    vector::Vector,
};

impl KvBlocks<'_> {
    /// Whether there are at least `count` blocks, of the right lengths.
    pub(super) fn are(&self, count: usize, kv_heads: usize, head_dim: usize) -> bool {
        let plane = kv_heads * BLOCK * head_dim;
        match self {
            Self::F32 { keys, values } => {
                [keys, values].iter().all(|s| s.len() >= count && s.iter().all(|b| b.len() == plane))
            }
            Self::F16 { keys, values } => {
                [keys, values].iter().all(|s| s.len() >= count && s.iter().all(|b| b.len() == plane))
            }
            Self::Int8 { keys, values } => {
                let fits = |b: &Int8Block<'_>| b.0.len() == plane && b.1.len() == kv_heads * BLOCK;
                head_dim.is_multiple_of(2)
                    && [keys, values].iter().all(|s| s.len() >= count && s.iter().all(fits))
            }
        }
    }
}

/// A head of keys and values in a block.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) block: usize,
    pub(super) head: usize,
    /// Whether to ask for the same place of the next block, which the hardware's own prefetching does not know.
    pub(super) ahead: bool,
}

/// The two products of an attention with the blocks of a type.
pub(super) trait Blocks: Copy {
    /// What a query becomes before it is multiplied with keys.
    type Query<'a>;

    fn query<V: Vector>(q: &[f32]) -> Self::Query<'_>;

    /// The products of the queries with all keys of a head in a block.
    fn scores<V: Vector, const R: usize>(
        self,
        place: Place,
        queries: &[Self::Query<'_>; R],
    ) -> [[V; VECTORS]; R];

    /// `out = out * correction + weights * values`, over the first `visible` positions of a block. Weights are 0 behind those
    /// that a row sees.
    fn weigh<V: Vector, const R: usize>(
        self,
        place: Place,
        weights: &[[f32; BLOCK]; R],
        correction: &[f32; R],
        visible: usize,
        out: &mut [&mut [f32]; R],
    );
}
