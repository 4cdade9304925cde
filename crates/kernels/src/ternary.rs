//! Packed ternary weights: the layouts, their checks, packing and unpacking.

use rayon::prelude::*;

/// The widest input for which a product is exact in int32: codes are used times 64, and 64 * 2 * 128 * 131072 = 2^31.
pub const MAX_COLS: usize = 131_072;

/// Bytes that one task checks at a time.
const CHECK_CHUNK: usize = 1 << 20;

/// Why weights cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct WeightsError(String);

impl WeightsError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

/// How the codes `w + 1` of a ternary matrix `[rows, cols]` lie in bytes, four to a byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TernaryLayout {
    /// That of Hugging Face transformers: byte `[r, k]` of `[rows / 4, cols]` holds in bits `2i..2i+1` the code of weight
    /// `[i * rows / 4 + r, k]`, so one row of bytes carries four output rows a quarter apart.
    Quarters,
    /// I2_S of GGUF files on x86: row after row, 128 weights in 32 bytes. Byte `j` of a group holds its weights `j`,
    /// `32 + j`, `64 + j` and `96 + j`, the first in the highest bits. The width is a multiple of 128.
    I2s,
}

/// Weights of a group of [`TernaryLayout::I2s`].
pub(crate) const GROUP: usize = 128;

/// Codes of a byte.
pub(crate) const FIELDS: usize = 4;

/// A ternary matrix `[rows, cols]`.
#[derive(Debug, Clone, Copy)]
pub struct TernaryRef<'a> {
    pub(crate) layout: TernaryLayout,
    pub(crate) codes: &'a [u8],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl<'a> TernaryRef<'a> {
    /// The matrix in `codes`, none of which may be 3 ([`find_invalid_code`]; a 3 counts as the weight 2).
    ///
    /// # Errors
    /// If `rows` is no multiple of 4, if a dimension is 0, if `cols` is over [`MAX_COLS`] or not what the layout needs, or
    /// if `codes` has another length than `rows / 4 * cols`.
    pub fn new(
        layout: TernaryLayout,
        codes: &'a [u8],
        rows: usize,
        cols: usize,
    ) -> Result<Self, WeightsError> {
        check_shape(layout, rows, cols)?;
        if (rows / 4).checked_mul(cols) != Some(codes.len()) {
            return Err(WeightsError::new(format!(
                "{} bytes of codes for {rows} rows and {cols} columns; {} expected",
                codes.len(),
                (rows / 4).saturating_mul(cols)
            )));
        }
        Ok(Self { layout, codes, rows, cols })
    }

    /// Output width.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input width.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// In both layouts `cols` bytes that follow each other hold four whole rows: unit `u` of the `rows / 4`.
    pub(crate) fn unit(&self, u: usize) -> &'a [u8] {
        &self.codes[u * self.cols..(u + 1) * self.cols]
    }

    /// The number of row `i` of the four in unit `u`.
    pub(crate) fn row_of(&self, u: usize, i: usize) -> usize {
        match self.layout {
            TernaryLayout::Quarters => i * (self.rows / 4) + u,
            TernaryLayout::I2s => 4 * u + i,
        }
    }

    /// Within a unit, the byte that holds weight `k` of row `i`, and how far its code is shifted up.
    pub(crate) fn place(&self, i: usize, k: usize) -> (usize, usize) {
        match self.layout {
            TernaryLayout::Quarters => (k, 2 * i),
            TernaryLayout::I2s => {
                let (group, within) = (k / GROUP, k % GROUP);
                (i * (self.cols / 4) + group * (GROUP / 4) + within % 32, 6 - 2 * (within / 32))
            }
        }
    }
}

pub(crate) fn check_shape(layout: TernaryLayout, rows: usize, cols: usize) -> Result<(), WeightsError> {
    if rows == 0 || !rows.is_multiple_of(4) {
        return Err(WeightsError::new(format!("{rows} rows; a multiple of 4 expected")));
    }
    if cols == 0 || cols > MAX_COLS {
        return Err(WeightsError::new(format!("{cols} columns; from 1 to {MAX_COLS} expected")));
    }
    if layout == TernaryLayout::I2s && !cols.is_multiple_of(GROUP) {
        return Err(WeightsError::new(format!("{cols} columns; a multiple of {GROUP} expected for I2_S")));
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
pub fn pack(layout: TernaryLayout, trits: &[i8], rows: usize, cols: usize) -> Result<Vec<u8>, WeightsError> {
    check_shape(layout, rows, cols)?;
    if rows.checked_mul(cols) != Some(trits.len()) {
        return Err(WeightsError::new(format!("{} weights for {rows} rows and {cols} columns", trits.len())));
    }
    if let Some(at) = trits.iter().position(|t| !(-1..=1).contains(t)) {
        return Err(WeightsError::new(format!("weight {at} is {}; -1, 0 or 1 expected", trits[at])));
    }
    // Only its layout is asked for.
    let shape = TernaryRef { layout, codes: &[], rows, cols };
    let mut codes = vec![0; rows / 4 * cols];
    codes.par_chunks_exact_mut(cols).enumerate().for_each(|(u, unit)| {
        for i in 0..4 {
            let row = shape.row_of(u, i);
            for (k, &trit) in trits[row * cols..(row + 1) * cols].iter().enumerate() {
                let (byte, shift) = shape.place(i, k);
                unit[byte] |= ((trit + 1) as u8) << shift;
            }
        }
    });
    Ok(codes)
}

/// The weights `[rows, cols]` of a packed matrix.
pub fn unpack(weights: TernaryRef<'_>) -> Vec<i8> {
    let mut trits = vec![0; weights.rows * weights.cols];
    for u in 0..weights.rows / 4 {
        let unit = weights.unit(u);
        for i in 0..4 {
            let row = weights.row_of(u, i);
            let trits = &mut trits[row * weights.cols..(row + 1) * weights.cols];
            for (k, trit) in trits.iter_mut().enumerate() {
                let (byte, shift) = weights.place(i, k);
                *trit = ((unit[byte] >> shift) & 3) as i8 - 1;
            }
        }
    }
    trits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_that_of_transformers() {
        // The example of the format's description: rows 0, 2, 4 and 6 share the first byte.
        let trits = [1, 0, -1, 1, 0, 0, 1, -1];
        let codes = pack(TernaryLayout::Quarters, &trits, 8, 1).unwrap();
        assert_eq!(codes, [0x92, 0x19]);
        assert_eq!(unpack(TernaryRef::new(TernaryLayout::Quarters, &codes, 8, 1).unwrap()), trits);
    }

    #[test]
    fn i2s_is_that_of_the_official_file() {
        // One row of weights 1 at 0, -1 at 33, 1 at 70 and -1 at 127 among zeros (code 1), three rows of zeros.
        let mut trits = [0; 4 * 128];
        (trits[0], trits[33], trits[70], trits[127]) = (1, -1, 1, -1);
        let codes = pack(TernaryLayout::I2s, &trits, 4, 128).unwrap();
        assert_eq!(codes[0], 0b10_01_01_01);
        assert_eq!(codes[1], 0b01_00_01_01);
        assert_eq!(codes[6], 0b01_01_10_01);
        assert_eq!(codes[31], 0b01_01_01_00);
        assert!(codes[32..].iter().all(|byte| *byte == 0x55));
        assert_eq!(unpack(TernaryRef::new(TernaryLayout::I2s, &codes, 4, 128).unwrap()), trits);
        assert!(TernaryRef::new(TernaryLayout::I2s, &codes, 8, 64).is_err());
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
        assert!(TernaryRef::new(TernaryLayout::Quarters, &[0; 10], 8, 5).is_ok());
        for (rows, cols) in [(8, 4), (6, 5), (0, 5), (8, 0), (usize::MAX - 3, 5), (4, MAX_COLS + 1)] {
            assert!(
                TernaryRef::new(TernaryLayout::Quarters, &[0; 10], rows, cols).is_err(),
                "{rows} x {cols}"
            );
        }
        assert!(pack(TernaryLayout::Quarters, &[2, 0, 0, 0], 4, 1).is_err());
        assert!(pack(TernaryLayout::Quarters, &[0; 5], 4, 1).is_err());
    }
}
