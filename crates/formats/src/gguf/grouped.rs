//! Element types with a scale for each group of a row, unpacked to words of codes.
//!
//! * Q2_0: groups of 64, an `f16` scale and 16 bytes of four codes `w + 1`, the first in the lowest bits. An older form has
//!   groups of 128 and the same id; PrismML's fork of llama.cpp later gave that form the id of PQ2_0.
//! * PTQ1_0 (that fork's, too): groups of 128 in 26 bytes of five trits each and the scale behind them.
//! * Q1_0: groups of 128, an `f16` scale and a bit for each weight, 1 for plus.
//! * TQ1_0 and TQ2_0, where the scales of a tensor's blocks differ: groups of 256.

use half::f16;
use ternion_core::Result;
use ternion_kernels::{GroupedKind, GroupedMatrix};

use super::TensorType;
use super::ternary::{TritPart, decode_tq, decode_trits, encode_tq, encode_trits};
use crate::SharedBytes;
use crate::grouped::{Wrong, check_codes, check_scale, part};

/// Where PTQ1_0 has its trits: (first weight, first byte, bytes, trits of a byte).
const PTQ1_PARTS: [TritPart; 3] = [(0, 0, 16, 5), (80, 16, 8, 5), (120, 24, 2, 4)];

/// The rows of a tensor as a matrix. `in_file` tells which row of the file is a row of the matrix.
pub(super) fn matrix(
    kind: TensorType,
    bytes: &SharedBytes,
    shape: [usize; 2],
    in_file: impl Fn(usize) -> usize + Sync,
) -> Result<GroupedMatrix, Wrong> {
    let group = kind.block_len();
    let weights = if kind == TensorType::Q1_0 { GroupedKind::Binary } else { GroupedKind::Ternary };
    let width = kind.row_bytes(shape[1]).unwrap_or(0);
    // One read of the tensor is faster than one of each row; a process with little memory has already asked for the latter.
    let bytes =
        &if bytes.is_untouched() { bytes.clone() } else { bytes.untouched().loaded().map_err(Wrong)? };
    GroupedMatrix::new(weights, shape, group, |row, words, scales| {
        let mut buffer = Vec::new();
        let at = in_file(row) * width;
        let bytes = part(bytes, at..at + width, &mut buffer).map_err(Wrong)?;
        let per_group = group / weights.word();
        let blocks = bytes.chunks_exact(kind.block_bytes());
        for (g, ((block, words), scale)) in
            blocks.zip(words.chunks_exact_mut(per_group)).zip(&mut *scales).enumerate()
        {
            let last = block.len() - 2;
            let half = match kind {
                TensorType::Ptq1_0 | TensorType::Tq1_0 | TensorType::Tq2_0 => [block[last], block[last + 1]],
                _ => [block[0], block[1]],
            };
            *scale = check_scale(row, g, f16::from_le_bytes(half).to_f32())?;
            match kind {
                TensorType::Ptq1_0 => ptq1(block, words),
                TensorType::Tq1_0 | TensorType::Tq2_0 => tq(kind, block, words),
                _ => {
                    for (word, bytes) in words.iter_mut().zip(block[2..].as_chunks::<4>().0) {
                        *word = u32::from_le_bytes(*bytes);
                    }
                }
            }
        }
        if weights == GroupedKind::Ternary { check_codes(row, words, group) } else { Ok(()) }
    })
}

/// Four codes to a byte, the first in the lowest bits.
fn pack(codes: &[u8], words: &mut [u32]) {
    for (word, codes) in words.iter_mut().zip(codes.as_chunks::<16>().0) {
        *word = codes.iter().enumerate().fold(0, |word, (i, code)| word | u32::from(*code) << (2 * i));
    }
}

fn tq(kind: TensorType, block: &[u8], words: &mut [u32]) {
    let mut codes = [0; 256];
    // What is invalid stays 3 and is found with the row's words.
    decode_tq(kind, block, &mut codes);
    pack(&codes, words);
}

fn ptq1(block: &[u8], words: &mut [u32]) {
    let mut codes = [0; 128];
    decode_trits(&PTQ1_PARTS, block, &mut codes);
    pack(&codes, words);
}

/// Encodes a row of a matrix, the reverse of [`matrix`]; `scales` are those of the type's blocks.
pub(crate) fn encode(kind: TensorType, words: &[u32], scales: &[f16], bytes: &mut [u8]) {
    let per_group = words.len() / scales.len();
    let blocks = bytes.chunks_exact_mut(kind.block_bytes());
    for ((block, words), scale) in blocks.zip(words.chunks_exact(per_group)).zip(scales) {
        let last = block.len() - 2;
        let (scale_at, codes_at) = match kind {
            TensorType::Ptq1_0 | TensorType::Tq1_0 | TensorType::Tq2_0 => (last, 0),
            _ => (0, 2),
        };
        match kind {
            TensorType::Ptq1_0 => encode_ptq1(words, block),
            TensorType::Tq1_0 | TensorType::Tq2_0 => {
                let codes: Vec<u8> = unpack(words).collect();
                encode_tq(kind, &codes, block);
            }
            _ => {
                for (bytes, word) in block[codes_at..].as_chunks_mut::<4>().0.iter_mut().zip(words) {
                    *bytes = word.to_le_bytes();
                }
            }
        }
        block[scale_at..scale_at + 2].copy_from_slice(&scale.to_le_bytes());
    }
}

fn unpack(words: &[u32]) -> impl Iterator<Item = u8> {
    words.iter().flat_map(|word| (0..16).map(move |i| (word >> (2 * i) & 3) as u8))
}

fn encode_ptq1(words: &[u32], block: &mut [u8]) {
    encode_trits(&PTQ1_PARTS, &unpack(words).collect::<Vec<u8>>(), block);
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERNARY: [TensorType; 6] = [
        TensorType::Q2_0,
        TensorType::Q2_0G128,
        TensorType::Pq2_0,
        TensorType::Ptq1_0,
        TensorType::Tq1_0,
        TensorType::Tq2_0,
    ];

    fn words(count: u32) -> Vec<u32> {
        let noise = (1..=count).map(|i| i.wrapping_mul(2_654_435_761) ^ i << 7);
        noise.map(|word| word & !(word >> 1 & 0x5555_5555)).collect()
    }

    #[test]
    fn rows_come_back_as_they_were() {
        for kind in TERNARY.into_iter().chain([TensorType::Q1_0]) {
            let (rows, cols) = (3, 512);
            let groups = cols / kind.block_len();
            let word = if kind == TensorType::Q1_0 { 32 } else { 16 };
            let words = words((rows * cols / word) as u32);
            let scales: Vec<f16> = (0..rows * groups).map(|i| f16::from_f32(0.1 + i as f32)).collect();
            let width = kind.row_bytes(cols).unwrap();
            let mut bytes = vec![0; rows * width];
            for (row, bytes) in bytes.chunks_exact_mut(width).enumerate() {
                let words = &words[row * cols / word..(row + 1) * cols / word];
                encode(kind, words, &scales[row * groups..(row + 1) * groups], bytes);
            }
            // The file has the rows in another order.
            let matrix = matrix(kind, &bytes.into(), [rows, cols], |row| 2 - row).ok().unwrap();
            for row in 0..rows {
                let expected = &words[(2 - row) * cols / word..(3 - row) * cols / word];
                assert!(matrix.words(row).eq(expected.iter().copied()), "{kind} {row}");
                for g in 0..groups {
                    assert_eq!(matrix.scale(row, g), scales[(2 - row) * groups + g].to_f32(), "{kind}");
                }
            }
        }
    }

    #[test]
    fn what_is_wrong_is_named_by_row_and_group() {
        for kind in TERNARY {
            let groups = 512 / kind.block_len();
            let width = kind.row_bytes(512).unwrap();
            let mut good = vec![0; 2 * width];
            for row in good.chunks_exact_mut(width) {
                encode(kind, &words(32), &vec![f16::ONE; groups], row);
            }
            let block = width + kind.block_bytes();
            let scale = match kind {
                TensorType::Q2_0 | TensorType::Q2_0G128 | TensorType::Pq2_0 => block,
                _ => block + kind.block_bytes() - 2,
            };
            for bad in [f16::NAN, f16::INFINITY, f16::NEG_ZERO] {
                let mut bytes = good.clone();
                bytes[scale..scale + 2].copy_from_slice(&bad.to_le_bytes());
                let Err(Wrong(error)) = matrix(kind, &bytes.into(), [2, 512], |row| row) else {
                    panic!("{kind}: accepted {bad}")
                };
                assert!(error.to_string().starts_with("row 1, group 1: the scale is"), "{kind}: {error}");
            }
            if matches!(kind, TensorType::Ptq1_0 | TensorType::Tq1_0) {
                continue;
            }
            let mut bytes = good.clone();
            bytes[block + 5] |= 0x0c;
            let Err(Wrong(error)) = matrix(kind, &bytes.into(), [2, 512], |row| row) else {
                panic!("{kind}: accepted")
            };
            assert!(
                error.to_string().starts_with("row 1, group 1: a weight has the code 3"),
                "{kind}: {error}"
            );
        }
    }

    #[test]
    fn weights_lie_where_the_layouts_say() {
        // Weight 0 is 1, weight 5 is -1, all others 0.
        let mut words = vec![0x5555_5555; 8];
        words[0] = 0x5555_5155 & !0b11 | 0b10;
        let mut bytes = [0; 34];
        encode(TensorType::Pq2_0, &words, &[f16::ONE], &mut bytes);
        assert_eq!(bytes[..4], [0x00, 0x3c, 0b01_01_01_10, 0b01_01_00_01]);
        let mut bytes = [0; 28];
        encode(TensorType::Ptq1_0, &words, &[f16::ONE], &mut bytes);
        // In threes, 21111 and 01111.
        let byte = |number: u32| (number * 256).div_ceil(243) as u8;
        assert_eq!((bytes[0], bytes[5], bytes[1]), (byte(202), byte(40), byte(121)));
        assert_eq!(bytes[26..], [0x00, 0x3c]);
    }
}
