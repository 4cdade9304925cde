//! Packed ternary weights: the layout, its checks, packing and unpacking.

use std::fmt;

use rayon::prelude::*;

/// The widest input for which a product is exact in int32: codes are used times 64, and 64 * 2 * 128 * 131072 = 2^31.
pub const MAX_COLS: usize = 131_072;

/// Bytes that one task checks at a time.
const CHECK_CHUNK: usize = 1 << 20;

/// Why weights cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightsError(String);

impl WeightsError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

impl fmt::Display for WeightsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for WeightsError {}

/// A ternary matrix `[rows, cols]` in the packed layout of Hugging Face transformers.
///
/// Byte `[r, k]` of `[rows / 4, cols]` holds in bits `2i..2i+1` the code `w + 1` of weight `[i * rows / 4 + r, k]`, so
/// one row of bytes carries four output rows a quarter apart.
#[derive(Debug, Clone, Copy)]
pub struct TernaryRef<'a> {
    pub(crate) codes: &'a [u8],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl<'a> TernaryRef<'a> {
    /// The matrix in `codes`, none of which may be 3 ([`find_invalid_code`]; a 3 counts as the weight 2).
    ///
    /// # Errors
    /// If `rows` is no multiple of 4, if a dimension is 0, if `cols` is over [`MAX_COLS`], or if `codes` has another
    /// length than `rows / 4 * cols`.
    pub fn new(codes: &'a [u8], rows: usize, cols: usize) -> Result<Self, WeightsError> {
        check_shape(rows, cols)?;
        if (rows / 4).checked_mul(cols) != Some(codes.len()) {
            return Err(WeightsError::new(format!(
                "{} bytes of codes for {rows} rows and {cols} columns; {} expected",
                codes.len(),
                (rows / 4).saturating_mul(cols)
            )));
        }
        Ok(Self { codes, rows, cols })
    }

    /// Output width.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input width.
    pub fn cols(&self) -> usize {
        self.cols
    }
}

pub(crate) fn check_shape(rows: usize, cols: usize) -> Result<(), WeightsError> {
    if rows == 0 || !rows.is_multiple_of(4) {
        return Err(WeightsError::new(format!("{rows} rows; a multiple of 4 expected")));
    }
    if cols == 0 || cols > MAX_COLS {
        return Err(WeightsError::new(format!("{cols} columns; from 1 to {MAX_COLS} expected")));
    }
    Ok(())
}

/// The index of the first byte in which a code is 3, which stands for no weight.
pub fn find_invalid_code(codes: &[u8]) -> Option<usize> {
    codes
        .par_chunks(CHECK_CHUNK)
        .enumerate()
        .find_map_first(|(i, chunk)| invalid_in(chunk).map(|at| i * CHECK_CHUNK + at))
}

fn invalid_in(codes: &[u8]) -> Option<usize> {
    let is_invalid = |byte: u8| byte & (byte >> 1) & 0x55 != 0;
    for (i, piece) in codes.chunks(4096).enumerate() {
        // Without a branch for each byte, the loop is as fast as memory.
        let bad = piece.iter().fold(0, |bad, byte| bad | (byte & (byte >> 1)));
        if bad & 0x55 != 0 {
            return piece.iter().position(|&byte| is_invalid(byte)).map(|at| i * 4096 + at);
        }
    }
    None
}

/// Packs weights `[rows, cols]`, each -1, 0 or 1.
///
/// # Errors
/// As [`TernaryRef::new`], and for any other weight.
pub fn pack(trits: &[i8], rows: usize, cols: usize) -> Result<Vec<u8>, WeightsError> {
    check_shape(rows, cols)?;
    if rows.checked_mul(cols) != Some(trits.len()) {
        return Err(WeightsError::new(format!("{} weights for {rows} rows and {cols} columns", trits.len())));
    }
    if let Some(at) = trits.iter().position(|t| !(-1..=1).contains(t)) {
        return Err(WeightsError::new(format!("weight {at} is {}; -1, 0 or 1 expected", trits[at])));
    }
    let plane = rows / 4 * cols;
    Ok((0..plane).map(|j| (0..4).map(|i| ((trits[i * plane + j] + 1) as u8) << (2 * i)).sum()).collect())
}

/// The weights `[rows, cols]` of a packed matrix.
pub fn unpack(weights: TernaryRef<'_>) -> Vec<i8> {
    (0..4).flat_map(|i| weights.codes.iter().map(move |byte| ((byte >> (2 * i)) & 3) as i8 - 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_that_of_transformers() {
        // The example of the format's description: rows 0, 2, 4 and 6 share the first byte.
        let trits = [1, 0, -1, 1, 0, 0, 1, -1];
        let codes = pack(&trits, 8, 1).unwrap();
        assert_eq!(codes, [0x92, 0x19]);
        assert_eq!(unpack(TernaryRef::new(&codes, 8, 1).unwrap()), trits);
    }

    #[test]
    fn an_invalid_code_is_found_wherever_it_is() {
        let mut codes = vec![0b10_01_00_10; CHECK_CHUNK + 5000];
        assert_eq!(find_invalid_code(&codes), None);
        for at in [0, 1, 4095, 4096, CHECK_CHUNK - 1, CHECK_CHUNK, CHECK_CHUNK + 4999] {
            for field in 0..4 {
                let valid = codes[at];
                codes[at] |= 3 << (2 * field);
                assert_eq!(find_invalid_code(&codes), Some(at));
                codes[at] = valid;
            }
        }
        // Neighbouring fields with one bit each are no 3.
        assert_eq!(find_invalid_code(&[0b01_10_01_10, 0b10_01_10_01, 0b10_10_10_10]), None);
    }

    #[test]
    fn wrong_shapes_are_refused() {
        assert!(TernaryRef::new(&[0; 10], 8, 5).is_ok());
        for (rows, cols) in [(8, 4), (6, 5), (0, 5), (8, 0), (usize::MAX - 3, 5), (4, MAX_COLS + 1)] {
            assert!(TernaryRef::new(&[0; 10], rows, cols).is_err(), "{rows} x {cols}");
        }
        assert!(pack(&[2, 0, 0, 0], 4, 1).is_err());
        assert!(pack(&[0; 5], 4, 1).is_err());
    }
}
