//! Matrices with a scale for each group, row by row as another form holds them. What a form cannot hold is refused, or, where
//! the caller allows it, rounded and counted.

use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use half::f16;
use ternion_core::{Error, Result};
use ternion_kernels::{GroupedKind, GroupedMatrix};

/// A word of 16 ternary codes for the weight 0.
const ZEROS: u32 = 0x5555_5555;

/// What a conversion has lost.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct Lost {
    /// Groups of the output whose scale is not that of the weights in it.
    pub groups: usize,
    /// Groups of the output in all.
    pub of: usize,
    /// The largest change of a weight, relative to its value.
    pub largest: f32,
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { groups, of, largest } = self;
        write!(
            f,
            "{groups} of {of} groups have a scale that is not their weights' own; a weight changed by up to "
        )?;
        write!(f, "{:.1} %", 100.0 * largest)
    }
}

/// Rewrites rows for a form, and counts what is lost.
#[derive(Debug)]
pub(super) struct Rewrite {
    lossy: bool,
    groups: AtomicUsize,
    of: AtomicUsize,
    /// The bits of a positive float.
    largest: AtomicU32,
}

/// How a form holds matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Form {
    pub(super) name: &'static str,
    pub(super) kind: GroupedKind,
    /// Columns that share a scale.
    pub(super) group: usize,
    /// Whether scales are halves.
    pub(super) halves: bool,
}

impl Rewrite {
    /// `lossy`: what the form cannot hold is rounded.
    pub(super) fn new(lossy: bool) -> Self {
        let zero = AtomicUsize::default;
        Self { lossy, groups: zero(), of: zero(), largest: AtomicU32::new(0) }
    }

    /// What has been lost so far; `None` where nothing has.
    pub(super) fn lost(&self) -> Option<Lost> {
        let groups = self.groups.load(Ordering::Relaxed);
        let largest = f32::from_bits(self.largest.load(Ordering::Relaxed));
        (groups > 0).then(|| Lost { groups, of: self.of.load(Ordering::Relaxed), largest })
    }

    /// The words and scales of a row in this form.
    ///
    /// # Errors
    /// [`Unsupported`](ternion_core::ErrorKind::Unsupported), naming row and group, for what the form cannot hold.
    pub(super) fn row(&self, matrix: &GroupedMatrix, row: usize, form: Form) -> Result<(Vec<u32>, Vec<f32>)> {
        let mut words: Vec<u32> = matrix.words(row).collect();
        let own: Vec<f32> = (0..matrix.cols() / matrix.group()).map(|g| matrix.scale(row, g)).collect();
        match (matrix.kind(), form.kind) {
            (GroupedKind::Binary, GroupedKind::Ternary) => {
                words = words.iter().flat_map(|word| [*word & 0xffff, word >> 16].map(widened)).collect();
            }
            (GroupedKind::Ternary, GroupedKind::Binary) => {
                words = narrowed(&words, &own, matrix.group(), row, form)?;
            }
            _ => {}
        }
        let mut scales = Vec::with_capacity(matrix.cols() / form.group);
        if form.group <= matrix.group() {
            for scale in &own {
                scales.extend(std::iter::repeat_n(*scale, matrix.group() / form.group));
            }
        } else {
            let (per_group, width) = (matrix.group() / form.kind.word(), form.group / matrix.group());
            let parts = words.chunks_mut(width * per_group).zip(own.chunks(width)).enumerate();
            for (group, (words, own)) in parts {
                scales.push(self.merged(words, own, (row, group), form)?);
            }
        }
        self.of.fetch_add(scales.len(), Ordering::Relaxed);
        for (group, scale) in scales.iter_mut().enumerate().filter(|_| form.halves) {
            let half = f16::from_f32(*scale).to_f32();
            if half != *scale {
                let why = format_args!("the scale {scale:?} is no f16");
                self.lose((row, group), form, why, (half - *scale).abs() / scale.abs())?;
                *scale = half;
            }
        }
        Ok((words, scales))
    }

    /// One scale for several groups.
    fn merged(&self, words: &mut [u32], own: &[f32], place: (usize, usize), form: Form) -> Result<f32> {
        let per_group = words.len() / own.len();
        // Groups without a weight take any scale; those of the scale 0 have none.
        let mut weights = Vec::with_capacity(own.len());
        for (words, scale) in words.chunks_mut(per_group).zip(own) {
            if *scale == 0.0 && form.kind == GroupedKind::Ternary {
                words.fill(ZEROS);
            }
            weights.push(match form.kind {
                GroupedKind::Ternary => {
                    words.iter().map(|w| 16 - (!(w ^ ZEROS) & ZEROS & !((w ^ ZEROS) >> 1)).count_ones()).sum()
                }
                GroupedKind::Binary => 32 * words.len() as u32,
            });
        }
        let mut used = own.iter().zip(&weights).filter(|(_, weights)| **weights > 0).map(|(scale, _)| *scale);
        let Some(first) = used.next() else { return Ok(0.0) };
        if used.all(|scale| scale == first) {
            return Ok(first);
        }
        let count: u32 = weights.iter().sum();
        let sum: f64 = own.iter().zip(&weights).map(|(scale, n)| f64::from(*scale) * f64::from(*n)).sum();
        // The one with the least squared error.
        let scale = (sum / f64::from(count)) as f32;
        let used = own.iter().zip(&weights).filter(|(scale, n)| **n > 0 && **scale != 0.0);
        let largest = used.map(|(own, _)| ((scale - own) / own).abs()).fold(0.0, f32::max);
        let why = format_args!("its {} columns have the scales {own:?}", form.group);
        self.lose(place, form, why, largest)?;
        Ok(if form.halves { f16::from_f32(scale).to_f32() } else { scale })
    }

    fn lose(
        &self,
        (row, group): (usize, usize),
        form: Form,
        why: fmt::Arguments<'_>,
        change: f32,
    ) -> Result<()> {
        if !self.lossy {
            return Err(Error::unsupported(format!(
                "row {row}, group {group}: {why}; {} cannot hold that exactly (--lossy rounds it)",
                form.name
            )));
        }
        self.groups.fetch_add(1, Ordering::Relaxed);
        // Positive floats are in the order of their bits.
        self.largest.fetch_max(change.to_bits(), Ordering::Relaxed);
        Ok(())
    }
}

/// 16 binary codes as ternary ones: 0 and 2.
pub(crate) fn widened(bits: u32) -> u32 {
    (0..16).fold(0, |word, i| word | (bits >> i & 1) << (2 * i + 1))
}

/// Ternary codes as binary ones, where there is no weight 0.
fn narrowed(words: &[u32], scales: &[f32], group: usize, row: usize, form: Form) -> Result<Vec<u32>> {
    for (i, word) in words.iter().enumerate() {
        let group = i * 16 / group;
        // A field that is 1 has its lower bit alone.
        if scales[group] != 0.0 && word & !(word >> 1) & ZEROS != 0 {
            return Err(Error::unsupported(format!(
                "row {row}, group {group}: a weight is 0; {} holds plus and minus the scale alone",
                form.name
            )));
        }
    }
    let half = |word: u32| (0..16).fold(0, |bits, i| bits | (word >> (2 * i + 1) & 1) << i);
    Ok(words.chunks_exact(2).map(|pair| half(pair[0]) | half(pair[1]) << 16).collect())
}

#[cfg(test)]
mod tests {
    use ternion_kernels::WeightsError;

    use super::*;

    const TERNARY: Form = Form { name: "a form", kind: GroupedKind::Ternary, group: 256, halves: true };

    fn matrix(kind: GroupedKind, group: usize, words: &[u32], scales: &[f32]) -> GroupedMatrix {
        let cols = words.len() * kind.word();
        GroupedMatrix::new(kind, [1, cols], group, |_, out, out_scales| {
            out.copy_from_slice(words);
            out_scales.copy_from_slice(scales);
            Ok::<(), WeightsError>(())
        })
        .unwrap()
    }

    fn values(kind: GroupedKind, words: &[u32], scales: &[f32]) -> Vec<f32> {
        let group = words.len() * kind.word() / scales.len();
        let weight = |i: usize| match kind {
            GroupedKind::Ternary => (words[i / 16] >> (2 * (i % 16)) & 3) as f32 - 1.0,
            GroupedKind::Binary => 2.0 * (words[i / 32] >> (i % 32) & 1) as f32 - 1.0,
        };
        (0..words.len() * kind.word()).map(|i| weight(i) * scales[i / group]).collect()
    }

    fn noise(count: u32) -> Vec<u32> {
        let noise = (1..=count).map(|i| i.wrapping_mul(2_654_435_761) ^ i << 9);
        noise.map(|word| word & !(word >> 1 & ZEROS)).collect()
    }

    #[test]
    fn values_stay_the_same_in_every_form_that_holds_them() {
        let words = noise(32);
        let ternary = matrix(GroupedKind::Ternary, 128, &words, &[0.5, 0.5, 0.25, 0.25]);
        let binary = matrix(GroupedKind::Binary, 128, &[0x8123_4567; 16], &[0.5, 0.5, 0.25, 0.25]);
        for matrix in [&ternary, &binary] {
            let mut expected = vec![0.0; 512];
            matrix.row(0, &mut expected);
            for group in [64, 128, 256] {
                let rewrite = Rewrite::new(false);
                let (words, scales) = rewrite.row(matrix, 0, Form { group, ..TERNARY }).unwrap();
                assert_eq!(values(GroupedKind::Ternary, &words, &scales), expected, "{group}");
                assert_eq!(rewrite.lost(), None);
            }
        }
        let form = Form { kind: GroupedKind::Binary, ..TERNARY };
        let (words, scales) = Rewrite::new(false).row(&binary, 0, form).unwrap();
        assert_eq!((&words[..], &scales[..]), (&[0x8123_4567; 16][..], &[0.5, 0.25][..]));
        // Back from ternary codes without zeros.
        let (wide, scales) = Rewrite::new(false).row(&binary, 0, Form { group: 128, ..TERNARY }).unwrap();
        let wide = matrix_of(&wide, &scales);
        let (words, _) = Rewrite::new(false).row(&wide, 0, form).unwrap();
        assert_eq!(words, [0x8123_4567; 16]);
        let error = Rewrite::new(true).row(&ternary, 0, form).unwrap_err().to_string();
        assert!(error.contains("row 0, group 0: a weight is 0"), "{error}");
    }

    fn matrix_of(words: &[u32], scales: &[f32]) -> GroupedMatrix {
        matrix(GroupedKind::Ternary, words.len() * 16 / scales.len(), words, scales)
    }

    #[test]
    fn groups_without_weights_take_any_scale() {
        let mut words = noise(16);
        words[8..].fill(ZEROS);
        for scale in [0.25, 0.0] {
            let matrix = matrix_of(&words, &[0.5, scale]);
            let (out, scales) = Rewrite::new(false).row(&matrix, 0, TERNARY).unwrap();
            assert_eq!((&out, &scales[..]), (&words, &[0.5][..]));
        }
        // Whatever the codes of a group are whose scale is 0, its weights are 0.
        let words = noise(16);
        let (out, scales) = Rewrite::new(false).row(&matrix_of(&words, &[0.5, 0.0]), 0, TERNARY).unwrap();
        assert_eq!((&out[..8], &out[8..], &scales[..]), (&words[..8], &[ZEROS; 8][..], &[0.5][..]));
    }

    #[test]
    fn what_is_lost_is_refused_or_counted() {
        let words = vec![0xaaaa_aaaa; 16];
        let matrix = matrix_of(&words, &[0.5, 1.0]);
        let error = Rewrite::new(false).row(&matrix, 0, TERNARY).unwrap_err().to_string();
        assert!(error.contains("row 0, group 0: its 256 columns have the scales [0.5, 1.0]"), "{error}");
        let rewrite = Rewrite::new(true);
        assert_eq!(rewrite.row(&matrix, 0, TERNARY).unwrap().1, [0.75]);
        assert_eq!(rewrite.lost(), Some(Lost { groups: 1, of: 1, largest: 0.5 }));

        let matrix = matrix_of(&words, &[0.1, 0.1]);
        let error = Rewrite::new(false).row(&matrix, 0, TERNARY).unwrap_err().to_string();
        assert!(error.contains("is no f16"), "{error}");
        let (_, scales) = Rewrite::new(false).row(&matrix, 0, Form { halves: false, ..TERNARY }).unwrap();
        assert_eq!(scales, [0.1]);
        let rewrite = Rewrite::new(true);
        rewrite.row(&matrix, 0, TERNARY).unwrap();
        assert!(rewrite.lost().is_some_and(|lost| lost.largest < 1e-3));
    }
}
