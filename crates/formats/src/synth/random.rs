//! Random bytes at the speed of a disk: a counter-based generator and tables that turn 16 of its bits into an element.

use half::bf16;

/// SplitMix64 (Steele, Lea, Flood 2014): an odd counter through a bijective mixing function.
pub(super) struct SplitMix(u64);

impl SplitMix {
    /// Streams of the same seed and different numbers have nothing visible in common.
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        let mut outer = Self(seed);
        let start = outer.next() ^ Self(stream).next().rotate_left(32);
        Self(start)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0.0..1.0`.
    pub(super) fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }

    /// Approximately normal with mean 0 and deviation 1: the sum of twelve uniform values, so never beyond 6.
    pub(super) fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }

    /// Fills `out` with elements of `table`, each chosen by 16 bits.
    pub(super) fn fill<const N: usize>(&mut self, table: &Table<N>, out: &mut [u8]) {
        let pick = |bits: u64| &table.0[usize::from(bits as u16)];
        let (elements, _) = out.as_chunks_mut::<N>();
        let (quads, rest) = elements.as_chunks_mut::<4>();
        for quad in quads {
            let bits = self.next();
            *quad = [*pick(bits), *pick(bits >> 16), *pick(bits >> 32), *pick(bits >> 48)];
        }
        for element in rest {
            *element = *pick(self.next());
        }
    }
}

/// One element of `N` bytes for each value of 16 bits.
pub(super) struct Table<const N: usize>(Vec<[u8; N]>);

const ENTRIES: usize = 1 << 16;

/// Bytes of four ternary codes. 40 % of the weights are 0, the rest -1 and +1 in equal parts.
pub(super) fn ternary_codes() -> Table<1> {
    let probability = [0.3, 0.4, 0.3f64];
    let mut table = Vec::with_capacity(ENTRIES);
    let mut sum = 0.0;
    for index in 0..81usize {
        let codes = [index % 3, index / 3 % 3, index / 9 % 3, index / 27];
        sum += codes.iter().map(|&c| probability[c]).product::<f64>();
        let byte = codes.iter().enumerate().fold(0, |byte, (i, &c)| byte | (c as u8) << (2 * i));
        // Rounding the running sum keeps the shares right to one entry.
        table.resize((sum * ENTRIES as f64).round() as usize, [byte]);
    }
    Table(table)
}

/// Normally distributed bf16 values of mean 0.
pub(super) fn normal_bf16(deviation: f32) -> Table<2> {
    // The table is the same for every seed: a sample of the distribution, of which the elements are samples.
    let mut random = SplitMix::new(0, 0);
    Table((0..ENTRIES).map(|_| bf16::from_f32(deviation * random.normal()).to_le_bytes()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_in_ten_trits_are_zero_and_no_code_is_three() {
        let Table(bytes) = ternary_codes();
        assert_eq!(bytes.len(), ENTRIES);
        let mut count = [0usize; 4];
        for [byte] in bytes {
            (0..4).for_each(|i| count[usize::from(byte >> (2 * i) & 3)] += 1);
        }
        assert_eq!(count[3], 0);
        let share = |code: usize| count[code] as f64 / (4 * ENTRIES) as f64;
        assert!((share(1) - 0.4).abs() < 1e-3 && (share(0) - share(2)).abs() < 1e-3, "{count:?}");
    }

    #[test]
    fn normal_values_have_their_moments() {
        let Table(values) = normal_bf16(0.02);
        let values: Vec<f64> = values.iter().map(|&b| bf16::from_le_bytes(b).to_f64()).collect();
        let mean = values.iter().sum::<f64>() / ENTRIES as f64;
        let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / ENTRIES as f64;
        assert!(mean.abs() < 5e-4, "{mean}");
        assert!((variance.sqrt() - 0.02).abs() < 5e-4, "{}", variance.sqrt());
    }

    #[test]
    fn fill_covers_lengths_that_are_no_multiple_of_four() {
        let table = ternary_codes();
        let mut out = [0xff; 7];
        SplitMix::new(1, 2).fill(&table, &mut out);
        assert!(out.iter().all(|b| b & (b >> 1) & 0x55 == 0), "{out:?}");
    }
}
