//! Matrices with a scale for each group of a row, from the forms in which files hold them: MLX's codes, and floats that are
//! exactly such weights. What is wrong with one is told with its row and group. Those of GGUF are in
//! [`gguf`](crate::gguf).

use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;
use rayon::prelude::*;
use ternion_core::{Error, Result};
use ternion_kernels::{GroupedKind, GroupedMatrix, WeightsError};

use crate::{DenseTensor, DenseType, SharedBytes};

/// Groups that are looked for in floats, the widest first.
const GROUPS: [usize; 3] = [256, 128, 64];

/// Both bits of a field in the lower one: where a word of ternary codes has a 3.
pub(crate) fn has_code_3(word: u32) -> bool {
    word & word >> 1 & 0x5555_5555 != 0
}

/// What cannot be a matrix of groups, before the tensor is named.
pub(crate) struct Wrong(pub(crate) Error);

impl From<WeightsError> for Wrong {
    fn from(error: WeightsError) -> Self {
        Self(Error::unsupported(error.to_string()))
    }
}

impl Wrong {
    pub(crate) fn group(row: usize, group: usize, message: impl std::fmt::Display) -> Self {
        Self(Error::invalid_model(format!("row {row}, group {group}: {message}")))
    }
}

/// Checks a group's scale.
pub(crate) fn check_scale(row: usize, group: usize, scale: f32) -> Result<f32, Wrong> {
    if ternion_kernels::is_group_scale(scale) {
        return Ok(scale);
    }
    Err(Wrong::group(row, group, format_args!("the scale is {scale:?}, expected a finite number, not -0.0")))
}

/// Finds a code 3 in the words of a row.
pub(crate) fn check_codes(row: usize, words: &[u32], group: usize) -> Result<(), Wrong> {
    match words.iter().position(|word| has_code_3(*word)) {
        None => Ok(()),
        Some(word) => {
            let message = "a weight has the code 3; expected the codes 0, 1 and 2";
            Err(Wrong::group(row, word * 16 / group, message))
        }
    }
}

/// Some bytes of a tensor that may not be touched, read into `buffer` then.
pub(crate) fn part<'a>(
    bytes: &'a SharedBytes,
    range: std::ops::Range<usize>,
    buffer: &'a mut Vec<u8>,
) -> Result<&'a [u8]> {
    if !bytes.is_untouched() {
        return Ok(&bytes[range]);
    }
    buffer.resize(range.len(), 0);
    bytes.read_at(range.start, buffer)?;
    Ok(buffer)
}

/// The tensors of a matrix as MLX quantises it: `weight` of 32-bit words, `scales` and `biases` with one value for each group.
pub(crate) struct Mlx<'a> {
    pub(crate) words: &'a SharedBytes,
    pub(crate) scales: &'a DenseTensor,
    pub(crate) biases: &'a DenseTensor,
    pub(crate) bits: usize,
    pub(crate) group: usize,
}

impl Mlx<'_> {
    /// MLX's weights are `scale * code + bias`. They are ternary where the bias is minus the scale and no code is 3, and binary
    /// (of one bit) where the bias is minus half the scale.
    pub(crate) fn matrix(&self, rows: usize, cols: usize) -> Result<GroupedMatrix, Wrong> {
        let kind = if self.bits == 1 { GroupedKind::Binary } else { GroupedKind::Ternary };
        let groups = cols / self.group;
        let width = cols / kind.word() * 4;
        let (scales, biases) = (self.scales.to_f32(), self.biases.to_f32());
        GroupedMatrix::new(kind, [rows, cols], self.group, |row, words, out| {
            let mut buffer = Vec::new();
            let bytes = part(self.words, row * width..(row + 1) * width, &mut buffer).map_err(Wrong)?;
            for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *word = u32::from_le_bytes(*bytes);
            }
            let of_row = row * groups..(row + 1) * groups;
            let pairs = scales[of_row.clone()].iter().zip(&biases[of_row]);
            for (group, ((scale, bias), out)) in pairs.zip(&mut *out).enumerate() {
                check_scale(row, group, *scale)?;
                let (weight, name) = match kind {
                    GroupedKind::Ternary => (*scale, "minus the scale"),
                    GroupedKind::Binary => (scale / 2.0, "minus half the scale"),
                };
                if *bias != -weight {
                    let message = format!(
                        "the bias is {bias:?} and the scale {scale:?}; expected a bias that is {name}, without which the \
                         weights are not {}",
                        if kind == GroupedKind::Binary { "binary" } else { "ternary" }
                    );
                    return Err(Wrong::group(row, group, message));
                }
                *out = weight;
            }
            if kind == GroupedKind::Ternary { check_codes(row, words, self.group) } else { Ok(()) }
        })
    }
}

/// What the groups of a float matrix are, and how many of them.
#[derive(Default)]
struct Census {
    /// Groups with a value other than 0.
    groups: AtomicUsize,
    /// Those that hold one absolute value and 0.
    ternary: AtomicUsize,
    /// Those of them without a 0.
    binary: AtomicUsize,
    /// The first other one, counted through all rows.
    first_other: AtomicUsize,
}

/// The matrix that floats exactly are: each group holds 0 and one absolute value. `None` where most groups do not.
pub(crate) fn of_floats(dense: &DenseTensor) -> Result<Option<GroupedMatrix>, Wrong> {
    let [rows, cols] = dense.shape[..] else { return Ok(None) };
    let mut nearly = None;
    for group in GROUPS.into_iter().filter(|group| cols > 0 && cols.is_multiple_of(*group)) {
        let census = census(dense, rows, cols, group).map_err(Wrong)?;
        let groups = census.groups.into_inner();
        let ternary = census.ternary.into_inner();
        if groups == 0 {
            return Ok(None);
        }
        if ternary == groups {
            let is_binary = census.binary.into_inner() == groups;
            let kind = if is_binary { GroupedKind::Binary } else { GroupedKind::Ternary };
            return pack(dense, kind, [rows, cols], group).map(Some);
        }
        if 2 * ternary > groups {
            nearly.get_or_insert((group, census.first_other.into_inner(), groups - ternary, groups));
        }
    }
    // Wider groups cannot be ternary where narrower ones are not, but may be the ones with the fewest exceptions.
    let Some((group, first, others, groups)) = nearly else { return Ok(None) };
    let (row, at) = (first / (cols / group), first % (cols / group));
    let message = format!(
        "the {group} values are not all 0 or of one absolute value, as in {} of {groups} groups: the matrix is almost \
         ternary; expected all groups or few",
        groups - others
    );
    Err(Wrong::group(row, at, message))
}

/// The bits of a float's absolute value, in the order of these values.
fn magnitude(dtype: DenseType, bytes: &[u8], index: usize) -> u32 {
    match dtype {
        DenseType::F32 => u32::from_le_bytes(bytes.as_chunks().0[index]) & 0x7fff_ffff,
        DenseType::F16 | DenseType::Bf16 => {
            u32::from(u16::from_le_bytes(bytes.as_chunks().0[index]) & 0x7fff)
        }
    }
}

fn census(dense: &DenseTensor, rows: usize, cols: usize, group: usize) -> Result<Census> {
    let size = dense.dtype.size();
    let census = Census { first_other: AtomicUsize::new(usize::MAX), ..Census::default() };
    (0..rows).into_par_iter().try_for_each(|row| {
        let mut buffer = Vec::new();
        let bytes = part(&dense.bytes, row * cols * size..(row + 1) * cols * size, &mut buffer)?;
        let (mut groups, mut ternary, mut binary) = (0, 0, 0);
        for (g, bytes) in bytes.chunks_exact(group * size).enumerate() {
            let mut zeros = 0;
            let mut value = 0;
            let is_ternary = (0..group).all(|i| {
                let magnitude = magnitude(dense.dtype, bytes, i);
                zeros += usize::from(magnitude == 0);
                value = if value == 0 { magnitude } else { value };
                magnitude == 0 || magnitude == value
            });
            if value == 0 {
                continue;
            }
            groups += 1;
            ternary += usize::from(is_ternary);
            binary += usize::from(is_ternary && zeros == 0);
            if !is_ternary {
                census.first_other.fetch_min(row * (cols / group) + g, Ordering::Relaxed);
            }
        }
        for (all, own) in [(&census.groups, groups), (&census.ternary, ternary), (&census.binary, binary)] {
            all.fetch_add(own, Ordering::Relaxed);
        }
        Ok(())
    })?;
    Ok(census)
}

fn pack(
    dense: &DenseTensor,
    kind: GroupedKind,
    [rows, cols]: [usize; 2],
    group: usize,
) -> Result<GroupedMatrix, Wrong> {
    let size = dense.dtype.size();
    GroupedMatrix::new(kind, [rows, cols], group, |row, words, scales| {
        let mut buffer = Vec::new();
        let bytes =
            part(&dense.bytes, row * cols * size..(row + 1) * cols * size, &mut buffer).map_err(Wrong)?;
        let mut values = vec![0.0; cols];
        dense.dtype.view(bytes).row(0, &mut values);
        for (index, (values, scale)) in values.chunks_exact(group).zip(scales).enumerate() {
            *scale = check_scale(row, index, values.iter().fold(0.0, |most, x| x.abs().max(most)))?;
        }
        for (word, values) in words.iter_mut().zip(values.chunks_exact(kind.word())) {
            *word = values.iter().enumerate().fold(0, |word, (i, value)| match kind {
                GroupedKind::Ternary => {
                    let code = if *value == 0.0 { 1 } else { 2 * u32::from(*value > 0.0) };
                    word | code << (2 * i)
                }
                GroupedKind::Binary => word | u32::from(*value > 0.0) << i,
            });
        }
        Ok(())
    })
}

/// The matrix as plain floats, which hold its values exactly: F16 where its scales are.
pub(crate) fn to_dense(matrix: &GroupedMatrix) -> DenseTensor {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let dtype = if matrix.has_f16_scales() { DenseType::F16 } else { DenseType::F32 };
    let width = cols * dtype.size();
    let mut bytes = vec![0; rows * width];
    bytes.par_chunks_exact_mut(width).enumerate().for_each_init(
        || vec![0.0f32; cols],
        |values, (row, out)| {
            matrix.row(row, values);
            match dtype {
                DenseType::F16 => {
                    for (out, x) in out.as_chunks_mut().0.iter_mut().zip(&*values) {
                        *out = f16::from_f32(*x).to_le_bytes();
                    }
                }
                _ => {
                    for (out, x) in out.as_chunks_mut().0.iter_mut().zip(&*values) {
                        *out = x.to_le_bytes();
                    }
                }
            }
        },
    );
    DenseTensor { dtype, shape: vec![rows, cols], bytes: bytes.into() }
}
