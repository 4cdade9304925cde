//! The largest of many logits.

use crate::isa::multiversion;

/// Elements that are looked at together.
pub(crate) const CHUNK: usize = 256;

/// The indices of the `count` largest elements, in no order; of equal ones the first. Those that are not a number are passed
/// over.
pub fn leading(x: &[f32], count: usize) -> Vec<u32> {
    let mut maxima = vec![f32::NEG_INFINITY; x.len().div_ceil(CHUNK)];
    chunk_maxima(x, &mut maxima);
    let mut sorted = maxima.clone();
    // So many chunks have an element that is at least this, so no smaller element is among the largest.
    let least = if count > 0 && sorted.len() > count {
        *sorted.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1
    } else {
        f32::NEG_INFINITY
    };
    let mut found = Vec::with_capacity(4 * count);
    for (i, (chunk, most)) in x.chunks(CHUNK).zip(&maxima).enumerate() {
        if *most >= least {
            let indices = chunk.iter().enumerate().filter(|(_, x)| **x >= least);
            found.extend(indices.map(|(k, _)| (i * CHUNK + k) as u32));
        }
    }
    if found.len() > count {
        found.select_nth_unstable_by(count, |a, b| x[*b as usize].total_cmp(&x[*a as usize]).then(a.cmp(b)));
        found.truncate(count);
    }
    found
}

multiversion! {
    pub(crate) fn chunk_maxima(x: &[f32], maxima: &mut [f32]) = chunk_maxima_body;
}

#[inline(always)]
pub(crate) fn chunk_maxima_body<const FMA: bool>(x: &[f32], maxima: &mut [f32]) {
    for (chunk, most) in x.chunks(CHUNK).zip(maxima) {
        let mut lanes = [f32::NEG_INFINITY; 32];
        let (groups, rest) = chunk.as_chunks::<32>();
        for group in groups {
            for i in 0..32 {
                lanes[i] = if group[i] > lanes[i] { group[i] } else { lanes[i] };
            }
        }
        *most = lanes.iter().chain(rest).fold(*most, |most, x| if *x > most { *x } else { most });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_those_of_a_sorted_list() {
        let mut state = 1u32;
        let mut next = |range: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % range
        };
        for (length, range) in [(0, 1), (1, 9), (40, 5), (300, 1000), (20_000, 50), (40_001, 1 << 24)] {
            let mut x: Vec<f32> = (0..length).map(|_| next(range) as f32 - 20.0).collect();
            if length > 100 {
                (x[3], x[77], x[90]) = (f32::NAN, f32::NEG_INFINITY, f32::INFINITY);
            }
            for count in [0, 1, 7, 64, 500] {
                let mut expected: Vec<u32> =
                    (0..length as u32).filter(|i| !x[*i as usize].is_nan()).collect();
                expected.sort_by(|a, b| x[*b as usize].total_cmp(&x[*a as usize]));
                expected.truncate(count);
                expected.sort_unstable();
                let mut found = leading(&x, count);
                found.sort_unstable();
                assert_eq!(found, expected, "{count} of {length}");
            }
        }
    }
}
