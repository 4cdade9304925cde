//! The element types of GGUF tensors: their ids, and how many bytes a tensor of them takes.
//!
//! The ids and sizes are ggml's (`ggml.h`, `ggml-common.h`), except for [`TensorType::I2S`], which bitnet.cpp added under an
//! id that ggml had given up, and for those of PrismML's fork of llama.cpp (PQ2_0, PTQ1_0, Q2_0 in groups of 128).

use std::fmt;

use ternion_core::{Error, Result};

use super::foreign::Foreign;

/// Weights of a row that I2_S codes together where it is written on x86.
pub const I2S_GROUP: usize = 128;

/// The same where it is written on ARM.
pub(crate) const I2S_GROUP_ARM: usize = 64;

/// Bytes after the codes of an I2_S tensor: the `f32` scale, then padding.
pub const I2S_TRAILER: u64 = 32;

macro_rules! tensor_types {
    ($($name:ident = $id:literal, $text:literal, $block:literal, $bytes:literal;)*) => {
        /// The element type of a tensor.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        #[allow(missing_docs, reason = "the names are ggml's")]
        pub enum TensorType {
            $($name,)*
            /// Q2_0 as PrismML's fork of llama.cpp first had it: the same id, groups of 128.
            Q2_0G128,
            /// A type of another program. Its size is not known, and nothing here computes with it.
            Foreign(Foreign),
        }

        impl TensorType {
            /// All types that have an id of their own.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The type that llama.cpp, or bitnet.cpp for I2_S, has under this id. Forks use some of the ids for
            /// other types; [`File`](super::File) tells them apart by their sizes.
            pub fn from_id(id: u32) -> Option<Self> {
                match id {
                    $($id => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// The id in the file.
            pub fn id(self) -> u32 {
                match self {
                    $(Self::$name => $id,)*
                    Self::Q2_0G128 => Self::Q2_0.id(),
                    Self::Foreign(foreign) => foreign.id,
                }
            }

            /// The name that the program gives it which writes it.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                    Self::Q2_0G128 => "Q2_0 (groups of 128)",
                    Self::Foreign(foreign) => foreign.name,
                }
            }

            /// Elements of a block; a row is a whole number of blocks. 1 for a foreign type.
            pub fn block_len(self) -> usize {
                match self {
                    $(Self::$name => $block,)*
                    Self::Q2_0G128 => 128,
                    Self::Foreign(_) => 1,
                }
            }

            /// Bytes of a block; 0 for a foreign type.
            pub fn block_bytes(self) -> usize {
                match self {
                    $(Self::$name => $bytes,)*
                    Self::Q2_0G128 => 34,
                    Self::Foreign(_) => 0,
                }
            }
        }
    };
}

tensor_types! {
    F32 = 0, "F32", 1, 4;
    F16 = 1, "F16", 1, 2;
    Q4_0 = 2, "Q4_0", 32, 18;
    Q4_1 = 3, "Q4_1", 32, 20;
    Q5_0 = 6, "Q5_0", 32, 22;
    Q5_1 = 7, "Q5_1", 32, 24;
    Q8_0 = 8, "Q8_0", 32, 34;
    Q8_1 = 9, "Q8_1", 32, 36;
    Q2K = 10, "Q2_K", 256, 84;
    Q3K = 11, "Q3_K", 256, 110;
    Q4K = 12, "Q4_K", 256, 144;
    Q5K = 13, "Q5_K", 256, 176;
    Q6K = 14, "Q6_K", 256, 210;
    Q8K = 15, "Q8_K", 256, 292;
    Iq2Xxs = 16, "IQ2_XXS", 256, 66;
    Iq2Xs = 17, "IQ2_XS", 256, 74;
    Iq3Xxs = 18, "IQ3_XXS", 256, 98;
    Iq1S = 19, "IQ1_S", 256, 50;
    Iq4Nl = 20, "IQ4_NL", 32, 18;
    Iq3S = 21, "IQ3_S", 256, 110;
    Iq2S = 22, "IQ2_S", 256, 82;
    Iq4Xs = 23, "IQ4_XS", 256, 136;
    I8 = 24, "I8", 1, 1;
    I16 = 25, "I16", 1, 2;
    I32 = 26, "I32", 1, 4;
    I64 = 27, "I64", 1, 8;
    F64 = 28, "F64", 1, 8;
    Iq1M = 29, "IQ1_M", 256, 56;
    Bf16 = 30, "BF16", 1, 2;
    Tq1_0 = 34, "TQ1_0", 256, 54;
    Tq2_0 = 35, "TQ2_0", 256, 66;
    I2S = 36, "I2_S", 128, 32;
    Mxfp4 = 39, "MXFP4", 32, 17;
    Nvfp4 = 40, "NVFP4", 64, 36;
    Q1_0 = 41, "Q1_0", 128, 18;
    Q2_0 = 42, "Q2_0", 64, 18;
    Pq2_0 = 142, "PQ2_0", 128, 34;
    Ptq1_0 = 143, "PTQ1_0", 128, 28;
}

impl TensorType {
    /// Whether an element is one of three values, with one scale for the tensor (or, in TQ1_0 and TQ2_0, for each block).
    pub fn is_ternary(self) -> bool {
        matches!(self, Self::I2S | Self::Tq1_0 | Self::Tq2_0)
    }

    /// Whether an element is one of three or two values, with a scale for each group of a row.
    pub fn is_grouped(self) -> bool {
        matches!(self, Self::Q2_0 | Self::Q2_0G128 | Self::Pq2_0 | Self::Ptq1_0 | Self::Q1_0)
    }

    /// Whether llama.cpp has no such type, but Ternion computes with it.
    pub(crate) fn is_of_forks(self) -> bool {
        matches!(self, Self::Q2_0G128 | Self::Pq2_0 | Self::Ptq1_0)
    }

    /// Bytes that a row of `len` elements takes; `None` where that is no whole number of blocks, or not known.
    pub fn row_bytes(self, len: usize) -> Option<usize> {
        if matches!(self, Self::Foreign(_)) || !len.is_multiple_of(self.block_len()) {
            return None;
        }
        (len / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Bytes of a tensor with these dimensions, innermost first.
    ///
    /// # Errors
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where a row is no whole number of blocks, or the size is
    /// over what ggml can count (a signed 64-bit number); [`Unsupported`](ternion_core::ErrorKind::Unsupported) for a
    /// foreign type.
    pub fn bytes(self, dims: &[u64]) -> Result<u64> {
        const MAX: u64 = i64::MAX as u64;
        if let Self::Foreign(foreign) = self {
            return Err(foreign.error());
        }
        let too_large = || Error::invalid_model(format!("the product of the dimensions {dims:?} overflows"));
        let row = dims.first().copied().unwrap_or(1);
        // The smaller group: which of the layouts a tensor has is not known from its type.
        let (block, block_bytes) = match self {
            Self::I2S => (I2S_GROUP_ARM as u64, I2S_GROUP_ARM as u64 / 4),
            _ => (self.block_len() as u64, self.block_bytes() as u64),
        };
        if row % block != 0 {
            return Err(Error::invalid_model(format!(
                "a row has {row} elements, expected a multiple of {block} for {self}"
            )));
        }
        let elements = dims.iter().try_fold(1u64, |product, &n| product.checked_mul(n).filter(|&n| n <= MAX));
        let blocks = elements.ok_or_else(too_large)? / block;
        let trailer = if self == Self::I2S { I2S_TRAILER } else { 0 };
        let bytes = blocks.checked_mul(block_bytes).and_then(|bytes| bytes.checked_add(trailer));
        bytes.filter(|&bytes| bytes <= MAX).ok_or_else(too_large)
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign(foreign) => foreign.fmt(f),
            known => f.write_str(known.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_of_their_types() {
        for &kind in TensorType::ALL {
            assert_eq!(TensorType::from_id(kind.id()), Some(kind));
        }
        for removed in [4, 5, 31, 32, 33, 37, 38, 43, u32::MAX] {
            assert_eq!(TensorType::from_id(removed), None);
        }
    }

    #[test]
    fn sizes_are_counted_in_blocks_and_do_not_overflow() {
        assert_eq!(TensorType::Q4K.bytes(&[4096, 32]).unwrap(), 4096 / 256 * 144 * 32);
        assert_eq!(TensorType::I2S.bytes(&[2560, 6912]).unwrap(), 2560 * 6912 / 4 + 32);
        assert_eq!(TensorType::F32.bytes(&[7]).unwrap(), 28);
        assert!(TensorType::Q8_0.bytes(&[33]).unwrap_err().to_string().contains("multiple of 32"));
        for dims in [[1 << 32, 1 << 31, 1, 1], [1 << 62, 1, 1, 1], [1 << 63, 2, 1, 1], [1 << 62, 4, 0, 1]] {
            assert!(TensorType::F32.bytes(&dims).unwrap_err().to_string().contains("overflows"), "{dims:?}");
        }
    }
}
