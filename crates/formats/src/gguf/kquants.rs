//! The block layouts of llama.cpp's k-quants and of IQ4, decoded to single-precision floats.
//!
//! Layouts and the order of the operations are those of ggml (`ggml-common.h`, `ggml-quants.c`), so that the values are the
//! same bit by bit. A block has 256 elements with one or two scales in half precision; parts of 16 or 32 elements have
//! integer scales within it.

use super::dense::scale_at;

/// The values of IQ4's codes.
const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Q2_K: 16 bytes of scales and minimums, 64 of codes, the scale of the scales and that of the minimums.
pub(super) fn decode_q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (scale, min) = (scale_at(block, 80), scale_at(block, 82));
    for (part, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let (scale, min) = (scale * f32::from(block[part] & 15), min * f32::from(block[part] >> 4));
        for (i, out) in out.iter_mut().enumerate() {
            *out = scale * f32::from(pair(&block[16..80], 16 * part + i)) - min;
        }
    }
}

/// Q3_K: 32 bytes of high bits, 64 of low pairs of bits, 12 of scales with 6 bits each, the scale of those.
pub(super) fn decode_q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let scales = &block[96..108];
    for (part, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let low = scales[part % 8] >> (part / 8 * 4) & 15;
        let high = scales[8 + part % 4] >> (part / 4 * 2) & 3;
        let scale = scale_at(block, 108) * (f32::from(low | high << 4) - 32.0);
        for (i, out) in out.iter_mut().enumerate() {
            let at = 16 * part + i;
            let high = block[at % 32] >> (at / 32) & 1;
            *out = scale * (f32::from(pair(&block[32..96], at) | high << 2) - 4.0);
        }
    }
}

/// Q4_K: the scale of the scales and that of the minimums, 12 bytes of both, 128 of codes.
pub(super) fn decode_q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    for (part, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(block, part);
        for (out, code) in out.iter_mut().zip(nibbles(&block[16..], part)) {
            *out = scale * f32::from(code) - min;
        }
    }
}

/// Q5_K: as Q4_K, with 32 bytes of high bits before the codes.
pub(super) fn decode_q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    for (part, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(block, part);
        for ((out, code), high) in out.iter_mut().zip(nibbles(&block[48..], part)).zip(&block[16..48]) {
            *out = scale * f32::from(code | (high >> part & 1) << 4) - min;
        }
    }
}

/// Q6_K: 128 bytes of low nibbles, 64 of high pairs of bits, 16 signed scales, the scale of those.
///
/// Each half of the block has 128 elements; byte `l` of its low nibbles holds elements `l` and `64 + l`, byte `l` of its
/// high pairs elements `l`, `32 + l`, `64 + l` and `96 + l`.
pub(super) fn decode_q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let scale = scale_at(block, 208);
    for (part, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let (half, at) = (part / 8, part % 8 * 16);
        let low = &block[half * 64 + at % 64..][..16];
        let high = &block[128 + half * 32 + at % 32..][..16];
        let (low_shift, high_shift) = (at / 64 * 4, at / 32 * 2);
        let scale = scale * f32::from(block[192 + part].cast_signed());
        // One after the other without branches: vector instructions.
        for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
            let code = low >> low_shift & 15 | (high >> high_shift & 3) << 4;
            *out = scale * (f32::from(code) - 32.0);
        }
    }
}

/// IQ4_XS: the scale of the scales, 2 bytes of their high bits, 4 of their low bits, 128 of codes.
pub(super) fn decode_iq4_xs(block: &[u8; 136], out: &mut [f32; 256]) {
    let high = u16::from_le_bytes([block[2], block[3]]);
    for (part, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let low = block[4 + part / 2] >> (part % 2 * 4) & 15;
        let high = (high >> (2 * part) & 3) as u8;
        let scale = scale_at(block, 0) * (f32::from(low | high << 4) - 32.0);
        iq4(&block[8 + 16 * part..][..16], scale, out);
    }
}

/// IQ4_NL: a scale, 16 bytes of codes.
pub(super) fn decode_iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    iq4(&block[2..], scale_at(block, 0), out);
}

fn iq4(codes: &[u8], scale: f32, out: &mut [f32; 32]) {
    for (i, &byte) in codes.iter().enumerate() {
        out[i] = scale * f32::from(IQ4_VALUES[usize::from(byte & 15)]);
        out[i + 16] = scale * f32::from(IQ4_VALUES[usize::from(byte >> 4)]);
    }
}

/// Pair of bits `at` of 256: byte `l` of each half holds elements `l`, `32 + l`, `64 + l` and `96 + l`.
fn pair(codes: &[u8], at: usize) -> u8 {
    codes[at / 128 * 32 + at % 32] >> (at % 128 / 32 * 2) & 3
}

/// The nibbles of part `part` of 8: two parts share 32 bytes, the first has the low ones.
fn nibbles(codes: &[u8], part: usize) -> impl Iterator<Item = u8> {
    let shift = part % 2 * 4;
    codes[part / 2 * 32..][..32].iter().map(move |byte| byte >> shift & 15)
}

/// Scale and minimum of a part of a Q4_K or Q5_K block: 6 bits each, those of the last four parts split over two bytes.
fn scale_and_min(block: &[u8], part: usize) -> (f32, f32) {
    let packed = &block[4..16];
    let (scale, min) = match part {
        0..4 => (packed[part] & 63, packed[part + 4] & 63),
        _ => (
            packed[part + 4] & 15 | packed[part - 4] >> 6 << 4,
            packed[part + 4] >> 4 | packed[part] >> 6 << 4,
        ),
    };
    (scale_at(block, 0) * f32::from(scale), scale_at(block, 2) * f32::from(min))
}
