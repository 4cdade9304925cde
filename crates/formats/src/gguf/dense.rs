//! Dense element types: decoded to and encoded from single-precision floats.
//!
//! The block layouts are ggml's (`ggml-common.h`), and values are decoded to the same bits as there. Q8_0 and Q4_0 are
//! encoded to the same bytes as ggml's reference, Q6_K by a search for the scale with the least squared error. What
//! files hold besides these (`llama-quantize` and bitnet.cpp's `quantize_embeddings`) is decoded only.

use half::{bf16, f16};
use ternion_core::{Error, Result};

use super::kquants;
use super::types::TensorType;

/// Elements of a Q6_K block, and of one of its parts with a scale of its own.
const Q6_BLOCK: usize = 256;
const Q6_PART: usize = 16;

/// Types that [`decode`] knows.
const DENSE: [TensorType; 16] = [
    TensorType::F32,
    TensorType::F16,
    TensorType::Bf16,
    TensorType::F64,
    TensorType::Q8_0,
    TensorType::Q6K,
    TensorType::Q5K,
    TensorType::Q5_0,
    TensorType::Q5_1,
    TensorType::Q4K,
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::Iq4Nl,
    TensorType::Iq4Xs,
    TensorType::Q3K,
    TensorType::Q2K,
];

/// Types that [`encode`] knows.
const ENCODED: [TensorType; 6] =
    [TensorType::F32, TensorType::F16, TensorType::Bf16, TensorType::Q8_0, TensorType::Q6K, TensorType::Q4_0];

/// Whether [`decode`] knows the type.
pub fn is_dense(kind: TensorType) -> bool {
    DENSE.contains(&kind)
}

/// The names of some types, for messages.
fn names(kinds: &[TensorType]) -> String {
    kinds.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", ")
}

/// The names of the types that [`decode`] knows, for messages.
pub(super) fn dense_names() -> String {
    names(&DENSE)
}

/// Decodes whole blocks into as many elements as they have. All values are exact, but those of F64, which are rounded.
///
/// # Errors
/// [`Unsupported`](ternion_core::ErrorKind::Unsupported) for types that are not [dense](is_dense);
/// [`InvalidRequest`](ternion_core::ErrorKind::InvalidRequest) where the lengths do not fit each other.
pub fn decode(kind: TensorType, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    check(kind, &DENSE, bytes.len(), out.len())?;
    match kind {
        TensorType::F32 => each(bytes, out, |b| f32::from_le_bytes(*b)),
        TensorType::F16 => each(bytes, out, |b| f16::from_le_bytes(*b).to_f32()),
        TensorType::Bf16 => each(bytes, out, |b| bf16::from_le_bytes(*b).to_f32()),
        TensorType::F64 => each(bytes, out, |b| f64::from_le_bytes(*b) as f32),
        TensorType::Q8_0 => blocks(bytes, out, decode_q8_0),
        TensorType::Q4_0 => blocks(bytes, out, decode_q4_0),
        TensorType::Q4_1 => blocks(bytes, out, decode_q4_1),
        TensorType::Q5_0 => blocks(bytes, out, decode_q5_0),
        TensorType::Q5_1 => blocks(bytes, out, decode_q5_1),
        TensorType::Q2K => blocks(bytes, out, kquants::decode_q2_k),
        TensorType::Q3K => blocks(bytes, out, kquants::decode_q3_k),
        TensorType::Q4K => blocks(bytes, out, kquants::decode_q4_k),
        TensorType::Q5K => blocks(bytes, out, kquants::decode_q5_k),
        TensorType::Q6K => blocks(bytes, out, kquants::decode_q6_k),
        TensorType::Iq4Nl => blocks(bytes, out, kquants::decode_iq4_nl),
        TensorType::Iq4Xs => blocks(bytes, out, kquants::decode_iq4_xs),
        other => unreachable!("invariant: {other} is not among the dense types"),
    }
    Ok(())
}

/// Encodes elements into whole blocks.
///
/// # Errors
/// As [`decode`], for types other than F32, F16, BF16, Q8_0, Q6_K and Q4_0, and
/// [`InvalidRequest`](ternion_core::ErrorKind::InvalidRequest) where a value is too large for the type.
pub fn encode(kind: TensorType, values: &[f32], out: &mut [u8]) -> Result<()> {
    check(kind, &ENCODED, out.len(), values.len())?;
    let fits = match kind {
        TensorType::F32 => put(values, out, |x| Some(x.to_le_bytes())),
        TensorType::F16 => put(values, out, |x| finite(f16::from_f32(x)).map(f16::to_le_bytes)),
        TensorType::Bf16 => {
            put(values, out, |x| Some(bf16::from_f32(x)).filter(|x| x.is_finite()).map(bf16::to_le_bytes))
        }
        TensorType::Q8_0 => fill(values, out, encode_q8_0),
        TensorType::Q4_0 => fill(values, out, encode_q4_0),
        _ => fill(values, out, encode_q6_k),
    };
    fits.ok_or_else(|| Error::invalid_request(format!("a value is too large for {kind}")))
}

fn check(kind: TensorType, known: &[TensorType], bytes: usize, elements: usize) -> Result<()> {
    if !known.contains(&kind) {
        let known = names(known);
        return Err(Error::unsupported(format!(
            "the element type {kind} is not supported here; supported: {known}"
        )));
    }
    if kind.row_bytes(elements) == Some(bytes) {
        return Ok(());
    }
    Err(Error::invalid_request(format!(
        "{elements} elements of {kind} for {bytes} bytes, expected whole blocks"
    )))
}

fn finite(x: f16) -> Option<f16> {
    Some(x).filter(|x| x.is_finite())
}

fn each<const B: usize>(bytes: &[u8], out: &mut [f32], widen: impl Fn(&[u8; B]) -> f32) {
    for (out, element) in out.iter_mut().zip(bytes.as_chunks::<B>().0) {
        *out = widen(element);
    }
}

fn put<const B: usize>(
    values: &[f32],
    out: &mut [u8],
    narrow: impl Fn(f32) -> Option<[u8; B]>,
) -> Option<()> {
    for (out, &value) in out.as_chunks_mut::<B>().0.iter_mut().zip(values) {
        *out = narrow(value)?;
    }
    Some(())
}

fn blocks<const B: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; B], &mut [f32; N]),
) {
    for (block, out) in bytes.as_chunks::<B>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        decode(block, out);
    }
}

fn fill<const B: usize, const N: usize>(
    values: &[f32],
    out: &mut [u8],
    encode: impl Fn(&[f32; N], &mut [u8; B]) -> Option<()>,
) -> Option<()> {
    values.as_chunks::<N>().0.iter().zip(out.as_chunks_mut::<B>().0).try_for_each(|(v, out)| encode(v, out))
}

pub(super) fn scale_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The value whose magnitude is the largest; of several the first.
fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest: f32, &x| if x.abs() > largest.abs() { x } else { largest })
}

fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

fn decode_q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let scale = scale_at(block, 0);
    for (out, &q) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(q.cast_signed()) * scale;
    }
}

fn encode_q8_0(values: &[f32; 32], out: &mut [u8; 34]) -> Option<()> {
    let scale = largest(values).abs() / 127.0;
    out[..2].copy_from_slice(&finite(f16::from_f32(scale))?.to_le_bytes());
    let inverse = inverse(scale);
    for (out, &x) in out[2..].iter_mut().zip(values) {
        *out = ((x * inverse).round() as i8).cast_unsigned();
    }
    Some(())
}

fn decode_q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let scale = scale_at(block, 0);
    for (i, &byte) in block[2..].iter().enumerate() {
        out[i] = (f32::from(byte & 15) - 8.0) * scale;
        out[i + 16] = (f32::from(byte >> 4) - 8.0) * scale;
    }
}

fn encode_q4_0(values: &[f32; 32], out: &mut [u8; 18]) -> Option<()> {
    let scale = largest(values) / -8.0;
    out[..2].copy_from_slice(&finite(f16::from_f32(scale))?.to_le_bytes());
    let inverse = inverse(scale);
    let code = |x: f32| ((x * inverse + 8.5) as u8).min(15);
    for i in 0..16 {
        out[2 + i] = code(values[i]) | code(values[i + 16]) << 4;
    }
    Some(())
}

fn decode_q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (scale, min) = (scale_at(block, 0), scale_at(block, 2));
    for (i, &byte) in block[4..].iter().enumerate() {
        out[i] = f32::from(byte & 15) * scale + min;
        out[i + 16] = f32::from(byte >> 4) * scale + min;
    }
}

fn decode_q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let scale = scale_at(block, 0);
    for (i, out) in out.iter_mut().enumerate() {
        *out = (f32::from(five_bits(&block[2..], i)) - 16.0) * scale;
    }
}

fn decode_q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (scale, min) = (scale_at(block, 0), scale_at(block, 2));
    for (i, out) in out.iter_mut().enumerate() {
        *out = f32::from(five_bits(&block[4..], i)) * scale + min;
    }
}

/// Code `i` of 32: one bit in the first 4 bytes, four in the 16 bytes after them.
fn five_bits(codes: &[u8], i: usize) -> u8 {
    let high = codes[i / 8] >> (i % 8) & 1;
    let low = codes[4 + i % 16] >> (i / 16 * 4) & 15;
    low | high << 4
}

fn encode_q6_k(values: &[f32; Q6_BLOCK], out: &mut [u8; 210]) -> Option<()> {
    out.fill(0);
    let mut scales = [0.0; Q6_BLOCK / Q6_PART];
    for (scale, part) in scales.iter_mut().zip(values.as_chunks::<Q6_PART>().0) {
        *scale = best_scale(part);
    }
    let top = f16::from_f32(largest(&scales) / -128.0);
    out[208..].copy_from_slice(&finite(top)?.to_le_bytes());
    let (top, inverse_top) = (top.to_f32(), inverse(top.to_f32()));
    for (at, part) in values.as_chunks::<Q6_PART>().0.iter().enumerate() {
        let scale = (scales[at] * inverse_top).round_ties_even() as i8;
        out[192 + at] = scale.cast_unsigned();
        let inverse = inverse(top * f32::from(scale));
        for (i, &x) in part.iter().enumerate() {
            let code = ((x * inverse).round_ties_even().clamp(-32.0, 31.0) + 32.0) as u8;
            let (half, i) = ((at * Q6_PART + i) / 128, (at * Q6_PART + i) % 128);
            out[half * 64 + i % 64] |= (code & 15) << (i / 64 * 4);
            out[128 + half * 32 + i % 32] |= (code >> 4) << (i / 32 * 2);
        }
    }
    Some(())
}

/// The scale `s` for which `s * q` with `q` from -32 to 31 comes nearest to the values, large ones weighing more.
///
/// Each of a few scales around the one that uses the whole range gives codes; the best scale for given codes is that of
/// the least squares.
fn best_scale(values: &[f32; Q6_PART]) -> f32 {
    let extreme = largest(values);
    if extreme == 0.0 {
        return 0.0;
    }
    let (mut best, mut gain) = (extreme / -32.0, 0.0);
    for step in -9i8..=9 {
        let inverse = -(32.0 + 0.1 * f32::from(step)) / extreme;
        let (mut product, mut square) = (0.0, 0.0);
        for &x in values {
            let code = (x * inverse).round_ties_even().clamp(-32.0, 31.0);
            // Relative to the extreme, so that squares of tiny values stay in range.
            let weight = (x / extreme) * (x / extreme);
            product += weight * (x / extreme) * code;
            square += weight * code * code;
        }
        if square > 0.0 && product * product > gain * square {
            (best, gain) = (extreme * product / square, product * product / square);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(kind: TensorType, values: &[f32]) -> Vec<f32> {
        let mut bytes = vec![0; kind.row_bytes(values.len()).unwrap()];
        encode(kind, values, &mut bytes).unwrap();
        let mut out = vec![0.0; values.len()];
        decode(kind, &bytes, &mut out).unwrap();
        out
    }

    fn wave(scale: f32) -> Vec<f32> {
        (0..512).map(|i| scale * ((i * i) as f32 * 0.37).sin() * (1.0 + (i % 7) as f32)).collect()
    }

    #[test]
    fn errors_are_those_of_the_bits() {
        for scale in [1.0, 1e-3, 300.0] {
            let values = wave(scale);
            let error = |kind| {
                let decoded = round_trip(kind, &values);
                let square: f32 = values.iter().zip(&decoded).map(|(a, b)| (a - b) * (a - b)).sum();
                (square / values.iter().map(|x| x * x).sum::<f32>()).sqrt()
            };
            assert_eq!(error(TensorType::F32), 0.0);
            assert!(error(TensorType::F16) < 4e-4);
            assert!(error(TensorType::Bf16) < 3e-3);
            assert!(error(TensorType::Q8_0) < 6e-3, "{}", error(TensorType::Q8_0));
            // Steps of 1/32 of a part's extreme, which is about twice its root mean square: 2 / 32 / sqrt(12).
            assert!(error(TensorType::Q6K) < 1.8e-2, "{}", error(TensorType::Q6K));
            assert!(error(TensorType::Q4_0) < 0.1, "{}", error(TensorType::Q4_0));
        }
    }

    #[test]
    fn what_a_type_can_hold_exactly_it_keeps() {
        // Each part reaches the lowest code, so that all have the same scale.
        let value = |i: usize| if i.is_multiple_of(16) { -16.0 } else { ((i * 7 % 64) as f32 - 32.0) * 0.5 };
        let values: Vec<f32> = (0..256).map(value).collect();
        assert_eq!(round_trip(TensorType::Q6K, &values), values);
        let values: Vec<f32> = (0..64).map(|i| (i * 4 % 255) as f32 - 127.0).collect();
        assert_eq!(round_trip(TensorType::Q8_0, &values[..32]), values[..32]);
        assert_eq!(round_trip(TensorType::Q6K, &[0.0; 256]), [0.0; 256]);
    }

    #[test]
    fn too_large_or_misshapen_input_is_refused() {
        let mut bytes = vec![0; 34];
        assert!(
            encode(TensorType::Q8_0, &[1e9; 32], &mut bytes).unwrap_err().to_string().contains("too large")
        );
        assert!(encode(TensorType::F16, &[70_000.0; 17], &mut bytes).is_err());
        assert!(decode(TensorType::Q8_0, &bytes, &mut [0.0; 31]).is_err());
        let error = decode(TensorType::Iq2S, &[0; 82], &mut [0.0; 256]).unwrap_err().to_string();
        assert!(error.contains("IQ2_S") && error.contains("Q4_K"), "{error}");
        let error = encode(TensorType::Q4K, &[0.0; 256], &mut [0; 144]).unwrap_err().to_string();
        assert!(error.contains("Q4_K") && !error.contains("Q5_K"), "{error}");
    }
}
