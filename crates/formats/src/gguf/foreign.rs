//! Element types of programs other than llama.cpp, which cannot be computed with but can be told by name.
//!
//! Forks number their types on their own, so one id may stand for several types. A type is told by its id together with
//! the bytes that its tensors take.

use std::fmt;

use ternion_core::Error;

use super::TensorType;

/// An element type that another program writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Foreign {
    /// The id in the file.
    pub id: u32,
    /// The program's name for it; empty where the id is not known.
    pub name: &'static str,
    /// The program that writes it and runs it; empty where the id is not known.
    pub program: &'static str,
}

/// What is known of the bytes that a tensor takes.
#[derive(Clone, Copy)]
pub(super) enum Size {
    /// Blocks of so many elements and bytes, one after the other.
    Blocks(u64, u64),
    /// As before, with a number of bytes after the last block.
    Trailed(u64, u64, u64),
    /// Depends on how the program splits the matrix: hundredths of a bit for an element, from and to.
    Bits(u64, u64),
    /// Nothing.
    Unknown,
}

const BITNET: &str = "bitnet.cpp";
const ANGEL: &str = "Tencent's fork of llama.cpp (AngelSlim)";
const IK: &str = "ik_llama.cpp";
const OLD: &str = "llama.cpp before 2025";
const OLDEST: &str = "llama.cpp before June 2023";

/// Id, name, program and size. Of several types with one id, those of a fixed size come first.
const TYPES: &[(u32, &str, &str, Size)] = &[
    (4, "Q4_2", OLDEST, Size::Blocks(16, 10)),
    (5, "Q4_3", OLDEST, Size::Blocks(16, 12)),
    (31, "Q4_0_4_4", OLD, Size::Blocks(32, 18)),
    (32, "Q4_0_4_8", OLD, Size::Blocks(32, 18)),
    (33, "Q4_0_8_8", OLD, Size::Blocks(32, 18)),
    (34, "IQ1_BN", IK, Size::Blocks(64, 13)),
    (35, "IQ2_BN", IK, Size::Blocks(64, 16)),
    (36, "IQ4_NL_4_4", OLD, Size::Blocks(32, 18)),
    (37, "IQ4_NL_4_8", OLD, Size::Blocks(32, 18)),
    (37, "I8_S", BITNET, Size::Unknown),
    (38, "IQ4_NL_8_8", OLD, Size::Blocks(32, 18)),
    (38, "TL1", BITNET, Size::Trailed(4, 1, 32)),
    (38, "TL1", BITNET, Size::Bits(190, 230)),
    (39, "TL2", BITNET, Size::Bits(160, 190)),
    (42, "STQ1_0", ANGEL, Size::Blocks(256, 42)),
    (43, "STQ1_0", ANGEL, Size::Blocks(256, 42)),
    (133, "Q6_0", IK, Size::Unknown),
    (134, "IQ1_BN", IK, Size::Unknown),
    (135, "IQ2_BN", IK, Size::Unknown),
    (137, "IQ2_K", IK, Size::Unknown),
    (138, "IQ3_K", IK, Size::Unknown),
    (139, "IQ4_K", IK, Size::Unknown),
    (140, "IQ5_K", IK, Size::Unknown),
    (141, "IQ6_K", IK, Size::Unknown),
    (142, "IQ2_TN", IK, Size::Unknown),
    (143, "IQ1_TN", IK, Size::Unknown),
    (144, "IQ4_KS", IK, Size::Unknown),
    (145, "IQ2_KS", IK, Size::Unknown),
    (146, "IQ4_KSS", IK, Size::Unknown),
    (152, "IQ5_KS", IK, Size::Unknown),
    (153, "IQ2_KT", IK, Size::Unknown),
    (154, "IQ3_KT", IK, Size::Unknown),
    (155, "IQ4_KT", IK, Size::Unknown),
    (156, "IQ3_KS", IK, Size::Unknown),
    (157, "IQ2_KL", IK, Size::Unknown),
    (158, "IQ1_KT", IK, Size::Unknown),
];

impl Foreign {
    /// The types that other programs have under an id, with their sizes.
    pub(super) fn candidates(id: u32) -> impl Iterator<Item = (Self, Size)> {
        let of_id = TYPES.iter().filter(move |(known, ..)| *known == id);
        of_id.map(|&(id, name, program, size)| (Self { id, name, program }, size))
    }

    /// The type of an id that is in no table.
    pub(super) fn unknown(id: u32) -> Self {
        Self { id, name: "", program: "" }
    }

    /// An error that says what the type is and what runs it.
    pub(super) fn error(self) -> Error {
        if self.name.is_empty() {
            return Error::unsupported(format!(
                "the element type has the id {}, which is none that is known; only the program that wrote the file is \
                 sure to run it",
                self.id
            ));
        }
        let Self { id, name, program } = self;
        let supported =
            "supported: I2_S, TQ1_0, TQ2_0, Q2_0, PQ2_0, PTQ1_0, Q1_0 and safetensors of the same model";
        // The id alone does not tell these: the sizes fit ours no more than those of any other type.
        if let Some(own) = TensorType::from_id(id).filter(|own| own.is_of_forks()) {
            return Error::unsupported(format!(
                "the element type has the id {id}, which is {own} (blocks of {} in a row, {} bytes each), whose size the tensor has \
                 not, or {name}, which {program} writes and runs; {supported}",
                own.block_len(),
                own.block_bytes()
            ));
        }
        Error::unsupported(format!(
            "the element type is {name}, which {program} writes and runs; Ternion and llama.cpp do not; {supported}"
        ))
    }
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.name.is_empty() {
            write!(f, "unknown type {}", self.id)
        } else {
            write!(f, "{} of {}", self.name, self.program)
        }
    }
}

impl Size {
    /// Whether a tensor with these dimensions can take `room` bytes, to which it may be padded by less than
    /// `alignment`.
    pub(super) fn fits(self, dims: &[u64], room: u64, alignment: u64) -> bool {
        let padded = |bytes: u64| bytes <= room && room - bytes < alignment;
        let Some(elements) = dims.iter().try_fold(1u64, |product, &n| product.checked_mul(n)) else {
            return false;
        };
        match self {
            Self::Blocks(len, bytes) => Self::Trailed(len, bytes, 0).fits(dims, room, alignment),
            Self::Trailed(len, bytes, trailer) => {
                dims.first().is_some_and(|row| row % len == 0)
                    && (elements / len)
                        .checked_mul(bytes)
                        .and_then(|bytes| bytes.checked_add(trailer))
                        .is_some_and(padded)
            }
            Self::Bits(from, to) => {
                let bits = u128::from(elements);
                let room = u128::from(room) * 800;
                // A scale and padding follow the codes.
                bits * u128::from(from) <= room && room <= bits * u128::from(to) + 800 * 96
            }
            Self::Unknown => true,
        }
    }
}
