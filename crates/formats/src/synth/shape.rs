//! The shapes that are known by name, and which others are possible.

use ternion_core::{Error, Result};

use super::tokenizer::{MAX_VOCAB, MIN_VOCAB};

/// The sizes of a model: a BitNet, or a Qwen3 with ternary weights in groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width between the feed-forward network's projections.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Positions.
    pub context_length: usize,
    /// Width of a head; `None`: `hidden_size / heads`.
    pub head_dim: Option<usize>,
    /// Which family it is of, and in which form it is written.
    pub family: ShapeFamily,
}

/// The families that are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ShapeFamily {
    /// BitNet b1.58 2B4T's graph, in packed safetensors; the head is the embedding.
    BitNet,
    /// Qwen3 with ternary weights and a scale for each 128 of a row, in MLX's form, with YaRN by 4.
    Qwen3 {
        /// Whether the head is the embedding.
        tied: bool,
    },
}

/// Name, then the fields in their order.
const NAMED: [(&str, [usize; 7]); 5] = [
    // BitNet b1.58 2B4T.
    ("bitnet-2b4t", [2560, 6912, 30, 20, 5, 128_256, 4096]),
    // The sizes of the 1bitLLM reproductions, with 2B4T's graph.
    ("bitnet-3b", [3200, 8640, 26, 32, 32, 32_000, 2048]),
    ("bitnet-large", [1536, 4096, 24, 16, 16, 32_000, 2048]),
    // For tests.
    ("tiny", [256, 512, 3, 4, 2, 512, 4096]),
    ("nano", [128, 256, 2, 2, 1, 320, 4096]),
];

/// The same of Ternary-Bonsai, whose heads have 128 elements, and whether the head is the embedding.
const BONSAI: [(&str, [usize; 7], bool); 3] = [
    ("bonsai-1.7b", [2048, 6144, 28, 16, 8, 151_936, 32_768], true),
    ("bonsai-4b", [2560, 9728, 36, 32, 8, 151_936, 32_768], true),
    ("bonsai-8b", [4096, 12_288, 36, 32, 8, 151_936, 65_536], false),
];

/// Columns that share a scale.
pub(super) const GROUP: usize = 128;

impl Shape {
    /// The shape of this name.
    ///
    /// # Errors
    /// [`InvalidRequest`](ternion_core::ErrorKind::InvalidRequest), listing the known names.
    pub fn named(name: &str) -> Result<Self> {
        let bitnets = NAMED.iter().map(|(known, sizes)| (*known, sizes, None, ShapeFamily::BitNet));
        let bonsais = BONSAI
            .iter()
            .map(|(known, sizes, tied)| (*known, sizes, Some(GROUP), ShapeFamily::Qwen3 { tied: *tied }));
        let found = bitnets.chain(bonsais).find(|(known, ..)| *known == name);
        let Some((
            _,
            [hidden_size, intermediate_size, layers, heads, kv_heads, vocab_size, context_length],
            head_dim,
            family,
        )) = found
        else {
            let known = Self::names().collect::<Vec<_>>().join(", ");
            return Err(Error::invalid_request(format!("unknown shape `{name}`; known: {known}")));
        };
        Ok(Self {
            hidden_size: *hidden_size,
            intermediate_size: *intermediate_size,
            layers: *layers,
            heads: *heads,
            kv_heads: *kv_heads,
            vocab_size: *vocab_size,
            context_length: *context_length,
            head_dim,
            family,
        })
    }

    /// All names, the largest model first after the default.
    pub fn names() -> impl Iterator<Item = &'static str> {
        NAMED.iter().map(|(name, _)| *name).chain(BONSAI.iter().map(|(name, ..)| *name))
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.heads)
    }

    /// Checks what a reader of the checkpoint will check, before anything is written.
    pub(super) fn check(&self) -> Result<()> {
        let wrong = |field: &str, found: usize, expected: &str| {
            Err(Error::invalid_request(format!("`{field}` is {found}, expected {expected}")))
        };
        for (field, value, max) in [
            ("hidden_size", self.hidden_size, 1 << 17),
            ("intermediate_size", self.intermediate_size, 1 << 17),
            ("layers", self.layers, 1024),
            ("heads", self.heads, 1 << 16),
            ("kv_heads", self.kv_heads, 1 << 16),
            ("context_length", self.context_length, 1 << 28),
        ] {
            if value == 0 || value > max {
                return wrong(field, value, &format!("from 1 to {max}"));
            }
        }
        if !(MIN_VOCAB..=MAX_VOCAB).contains(&self.vocab_size) {
            let expected = format!("from {MIN_VOCAB} (all bytes and the special tokens) to {MAX_VOCAB}");
            return wrong("vocab_size", self.vocab_size, &expected);
        }
        match self.head_dim {
            None if !self.hidden_size.is_multiple_of(2 * self.heads) => {
                return wrong("heads", self.heads, "heads of an even width that add up to `hidden_size`");
            }
            Some(width) if width == 0 || width % 2 != 0 || width > 1 << 12 => {
                return wrong("head_dim", width, "an even width of at most 4096");
            }
            _ => {}
        }
        if let ShapeFamily::Qwen3 { .. } = self.family {
            let inputs = [
                ("hidden_size", self.hidden_size),
                ("intermediate_size", self.intermediate_size),
                ("heads", self.heads * self.head_dim()),
            ];
            for (field, cols) in inputs {
                if cols % GROUP != 0 {
                    return wrong(field, cols, &format!("inputs of a projection in a multiple of {GROUP}"));
                }
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return wrong("kv_heads", self.kv_heads, "a divisor of `heads`");
        }
        for (field, rows) in [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("kv_heads", self.kv_heads * self.head_dim()),
        ] {
            if rows % 4 != 0 {
                return wrong(field, rows, "rows of a projection in a multiple of 4");
            }
        }
        Ok(())
    }
}
