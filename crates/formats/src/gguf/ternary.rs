//! Ternary element types, row by row: decoded to and encoded from one code `w + 1` a byte.
//!
//! * I2_S (bitnet.cpp, as built for x86): 128 weights in 32 bytes; byte `j` holds weights `j`, `32 + j`, `64 + j` and `96 + j`
//!   in bits 7..6, 5..4, 3..2 and 1..0. One `f32` scale after all codes of the tensor. Other builds write other orders under
//!   the same type, see [`I2sLayout`].
//! * TQ2_0 (ggml): blocks of 256 in 64 bytes and an `f16` scale; the same order of weights in each 32 bytes, from the
//!   lowest bits up.
//! * TQ1_0 (ggml): blocks of 256 in 52 bytes and an `f16` scale; five trits a byte as a fraction of 3^5.

use half::f16;
use ternion_core::{Error, Result};

use super::types::{I2S_GROUP, I2S_GROUP_ARM, TensorType};
use crate::I2sLayout;

/// The code that stands for no weight.
const INVALID: u8 = 3;
/// The code of the weight 0.
const ZERO: u8 = 1;
const TQ_BLOCK: usize = 256;
const ONE: [u8; 2] = [0x00, 0x3c];

/// How TQ1_0 lays out a block: (first weight, first byte, bytes, trits a byte).
const TQ1_PARTS: [TritPart; 3] = [(0, 0, 32, 5), (160, 32, 16, 5), (240, 48, 4, 4)];

/// Decodes a row of I2_S.
pub(crate) fn decode_i2s(bytes: &[u8], codes: &mut [u8]) {
    for (group, codes) in bytes.as_chunks::<32>().0.iter().zip(codes.as_chunks_mut::<I2S_GROUP>().0) {
        for (field, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (code, byte) in codes.iter_mut().zip(group) {
                *code = byte >> (6 - 2 * field) & 3;
            }
        }
    }
}

/// Decodes row `row` of an I2_S tensor in any layout.
pub(crate) fn decode_i2s_as(layout: I2sLayout, tensor: &[u8], row: usize, codes: &mut [u8]) {
    let cols = codes.len();
    let bytes = || &tensor[row * cols / 4..(row + 1) * cols / 4];
    match layout {
        I2sLayout::X86 => decode_i2s(bytes(), codes),
        I2sLayout::Arm => {
            let groups = codes.as_chunks_mut::<I2S_GROUP_ARM>().0;
            for (group, codes) in bytes().as_chunks::<16>().0.iter().zip(groups) {
                for (field, codes) in codes.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                    for (code, byte) in codes.iter_mut().zip(group) {
                        *code = byte >> (6 - 2 * field) & 3;
                    }
                }
            }
        }
        I2sLayout::X86FourRows => {
            let (group, field) = (row / 4, row % 4);
            for (code, byte) in codes.iter_mut().zip(&tensor[group * cols..]) {
                *code = byte >> (6 - 2 * field) & 3;
            }
        }
    }
}

/// Encodes a row of I2_S.
pub(crate) fn encode_i2s(codes: &[u8], bytes: &mut [u8]) {
    for (codes, group) in codes.as_chunks::<I2S_GROUP>().0.iter().zip(bytes.as_chunks_mut::<32>().0) {
        for (j, byte) in group.iter_mut().enumerate() {
            *byte = codes[j] << 6 | codes[32 + j] << 4 | codes[64 + j] << 2 | codes[96 + j];
        }
    }
}

/// The scale that all blocks of a TQ1_0 or TQ2_0 tensor share. Blocks with the scale 0 are all zero whatever they
/// hold; a tensor of such blocks alone has the scale 1.
pub(crate) fn shared_scale(kind: TensorType, bytes: &[u8]) -> Result<f32> {
    let size = kind.block_bytes();
    let mut shared: Option<f16> = None;
    for (index, block) in bytes.chunks_exact(size).enumerate() {
        let scale = f16::from_le_bytes([block[size - 2], block[size - 1]]);
        if !ternion_kernels::is_group_scale(scale.to_f32()) {
            return Err(Error::invalid_model(format!(
                "the scale of block {index} is {scale:?}, expected a finite number, not -0.0"
            )));
        }
        if scale == f16::ZERO {
            continue;
        }
        match shared {
            None => shared = Some(scale),
            Some(first) if first == scale => {}
            Some(first) => {
                return Err(Error::unsupported(format!(
                    "the scale of block {index} is {scale}, others have {first}; expected one scale for the whole tensor"
                )));
            }
        }
    }
    Ok(shared.map_or(1.0, f16::to_f32))
}

/// Decodes a row of TQ1_0 or TQ2_0; returns whether a code was invalid.
pub(crate) fn decode_tq(kind: TensorType, bytes: &[u8], codes: &mut [u8]) -> bool {
    let size = kind.block_bytes();
    let mut invalid = false;
    for (block, codes) in bytes.chunks_exact(size).zip(codes.as_chunks_mut::<TQ_BLOCK>().0) {
        let is_zero = f16::from_le_bytes([block[size - 2], block[size - 1]]) == f16::ZERO;
        if is_zero {
            codes.fill(ZERO);
        } else if kind == TensorType::Tq1_0 {
            decode_tq1(block, codes);
        } else {
            decode_tq2(block, codes);
            invalid |= codes.contains(&INVALID);
        }
    }
    invalid
}

fn decode_tq2(block: &[u8], codes: &mut [u8; TQ_BLOCK]) {
    for (group, codes) in block.as_chunks::<32>().0.iter().zip(codes.as_chunks_mut::<I2S_GROUP>().0) {
        for (field, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (code, byte) in codes.iter_mut().zip(group) {
                *code = byte >> (2 * field) & 3;
            }
        }
    }
}

fn decode_tq1(block: &[u8], codes: &mut [u8; TQ_BLOCK]) {
    decode_trits(&TQ1_PARTS, block, codes);
}

/// Bytes of several trits each: the first code, the first byte, how many bytes there are, and the trits of each.
pub(super) type TritPart = (usize, usize, usize, usize);

/// Decodes the parts of a block.
pub(super) fn decode_trits(parts: &[TritPart], block: &[u8], codes: &mut [u8]) {
    for &(first, at, count, trits) in parts {
        for (j, &byte) in block[at..at + count].iter().enumerate() {
            // The byte is a fraction of 256; each multiplication by 3 moves the next trit before the point.
            let mut rest = byte;
            for trit in 0..trits {
                let product = u16::from(rest) * 3;
                codes[first + trit * count + j] = (product >> 8) as u8;
                rest = product as u8;
            }
        }
    }
}

/// Encodes a row of TQ1_0 or TQ2_0 with the block scale 1.
pub(crate) fn encode_tq(kind: TensorType, codes: &[u8], bytes: &mut [u8]) {
    let size = kind.block_bytes();
    for (codes, block) in codes.as_chunks::<TQ_BLOCK>().0.iter().zip(bytes.chunks_exact_mut(size)) {
        if kind == TensorType::Tq1_0 {
            encode_tq1(codes, block);
        } else {
            for (half, codes) in codes.as_chunks::<I2S_GROUP>().0.iter().enumerate() {
                for (j, byte) in block[half * 32..][..32].iter_mut().enumerate() {
                    *byte = codes[j] | codes[32 + j] << 2 | codes[64 + j] << 4 | codes[96 + j] << 6;
                }
            }
        }
        block[size - 2..].copy_from_slice(&ONE);
    }
}

fn encode_tq1(codes: &[u8; TQ_BLOCK], block: &mut [u8]) {
    encode_trits(&TQ1_PARTS, codes, block);
}

/// The reverse of [`decode_trits`].
pub(super) fn encode_trits(parts: &[TritPart], codes: &[u8], block: &mut [u8]) {
    for &(first, at, count, trits) in parts {
        for (j, byte) in block[at..at + count].iter_mut().enumerate() {
            let digit =
                |trit: usize| if trit < trits { u16::from(codes[first + trit * count + j]) } else { 0 };
            let number = (0..5).fold(0, |number, trit| number * 3 + digit(trit));
            // Rounded up, so that decoding, which rounds down, finds the same digits.
            *byte = (number * 256).div_ceil(243) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes() -> Vec<u8> {
        (0u32..1024).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8 % 3).collect()
    }

    #[test]
    fn rows_come_back_as_they_were() {
        let codes = codes();
        let mut back = vec![9; codes.len()];
        let mut bytes = vec![0; codes.len() / 4];
        encode_i2s(&codes, &mut bytes);
        decode_i2s(&bytes, &mut back);
        assert_eq!(back, codes);
        for kind in [TensorType::Tq1_0, TensorType::Tq2_0] {
            let mut bytes = vec![0; kind.row_bytes(codes.len()).unwrap()];
            encode_tq(kind, &codes, &mut bytes);
            back.fill(9);
            assert!(!decode_tq(kind, &bytes, &mut back));
            assert_eq!(back, codes, "{kind}");
            assert_eq!(shared_scale(kind, &bytes).unwrap(), 1.0);
        }
    }

    #[test]
    fn other_builds_of_bitnet_cpp_order_weights_otherwise() {
        // Four rows of 128, packed as `quantize_i2_s` of bitnet.cpp does it for each build.
        let codes: Vec<u8> = codes().into_iter().take(4 * 128).collect();
        let mut arm = vec![0; 128];
        for (i, group) in codes.chunks_exact(64).enumerate() {
            for (j, code) in group.iter().enumerate() {
                arm[i * 16 + j % 16] |= code << (6 - 2 * (j / 16));
            }
        }
        let four_rows: Vec<u8> =
            (0..128).map(|col| (0..4).fold(0, |byte, row| byte << 2 | codes[row * 128 + col])).collect();
        let mut x86 = vec![0; 128];
        encode_i2s(&codes, &mut x86);
        for (layout, tensor) in
            [(I2sLayout::X86, x86), (I2sLayout::Arm, arm), (I2sLayout::X86FourRows, four_rows)]
        {
            for row in 0..4 {
                let mut back = [9; 128];
                decode_i2s_as(layout, &tensor, row, &mut back);
                assert_eq!(back, codes[row * 128..][..128], "{layout:?}");
            }
        }
    }

    #[test]
    fn weights_lie_where_the_layout_says() {
        let mut codes = [ZERO; 128];
        codes[3] = 2;
        codes[32 + 3] = 0;
        codes[96 + 3] = 2;
        let mut bytes = [0; 32];
        encode_i2s(&codes, &mut bytes);
        assert_eq!(bytes[2], 0b01_01_01_01);
        assert_eq!(bytes[3], 0b10_00_01_10);
    }

    #[test]
    fn block_scales_must_agree_unless_the_block_is_zero() {
        let kind = TensorType::Tq2_0;
        let mut bytes = vec![0; kind.row_bytes(1024).unwrap()];
        encode_tq(kind, &codes(), &mut bytes);
        bytes[66 + 64..66 + 66].fill(0);
        assert_eq!(shared_scale(kind, &bytes).unwrap(), 1.0);
        let mut back = vec![9; 1024];
        assert!(!decode_tq(kind, &bytes, &mut back));
        assert_eq!(back[256..512], [ZERO; 256]);
        bytes[3 * 66 + 64..].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        assert!(shared_scale(kind, &bytes).unwrap_err().to_string().contains("block 3 is 0.5"));
        bytes[3 * 66 + 64..].copy_from_slice(&f16::NAN.to_le_bytes());
        assert!(shared_scale(kind, &bytes).unwrap_err().to_string().contains("finite"));
        bytes[7] = 3;
        assert!(decode_tq(kind, &bytes, &mut back), "the code 3 is none");
    }
}
