//! Element types of tensors, by the numbers that ONNX gives them (`TensorProto.DataType`).

use crate::DenseType;

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the names say it")]
pub enum Element {
    F32,
    U8,
    I8,
    U16,
    I16,
    I32,
    I64,
    String,
    Bool,
    F16,
    F64,
    U32,
    U64,
    Bf16,
    /// Any other, by its number: complex numbers, 8-bit floats, numbers of less than a byte.
    Other(i32),
}

impl Element {
    const NAMED: [(Self, i32, &'static str, usize); 14] = [
        (Self::F32, 1, "float", 4),
        (Self::U8, 2, "uint8", 1),
        (Self::I8, 3, "int8", 1),
        (Self::U16, 4, "uint16", 2),
        (Self::I16, 5, "int16", 2),
        (Self::I32, 6, "int32", 4),
        (Self::I64, 7, "int64", 8),
        (Self::String, 8, "string", 0),
        (Self::Bool, 9, "bool", 1),
        (Self::F16, 10, "float16", 2),
        (Self::F64, 11, "double", 8),
        (Self::U32, 12, "uint32", 4),
        (Self::U64, 13, "uint64", 8),
        (Self::Bf16, 16, "bfloat16", 2),
    ];

    /// The type with this number.
    pub(crate) fn from_number(number: i32) -> Self {
        Self::NAMED.iter().find(|n| n.1 == number).map_or(Self::Other(number), |n| n.0)
    }

    /// The number that ONNX gives it.
    pub(crate) fn number(self) -> i32 {
        match self {
            Self::Other(number) => number,
            named => Self::NAMED.iter().find(|n| n.0 == named).map_or(0, |n| n.1),
        }
    }

    /// Bytes that `count` elements take; `None` where that is more than there can be, or not fixed (strings).
    pub fn bytes(self, count: u64) -> Option<u64> {
        match self {
            Self::String => None,
            Self::Other(number) => {
                // By `onnx.proto`: complex64, complex128, four 8-bit floats, uint4, int4, float4e2m1, float8e8m0,
                // uint2, int2.
                let bits = match number {
                    14 => 64,
                    15 => 128,
                    17..=20 | 24 => 8,
                    21..=23 => 4,
                    25 | 26 => 2,
                    _ => return None,
                };
                count.checked_mul(bits).map(|all| all.div_ceil(8))
            }
            named => {
                let size = Self::NAMED.iter().find(|n| n.0 == named)?.3;
                count.checked_mul(size as u64)
            }
        }
    }
}

impl From<DenseType> for Element {
    fn from(dtype: DenseType) -> Self {
        match dtype {
            DenseType::F32 => Self::F32,
            DenseType::F16 => Self::F16,
            DenseType::Bf16 => Self::Bf16,
        }
    }
}

impl std::fmt::Display for Element {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Other(number) => write!(f, "type {number}"),
            named => f.write_str(Self::NAMED.iter().find(|n| n.0 == *named).map_or("?", |n| n.2)),
        }
    }
}
