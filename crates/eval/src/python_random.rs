//! Python's `random.Random(seed).sample(...)`: the shots of a prompt are drawn with it, and only the same draw gives the
//! same prompts.
//!
//! The generator is the Mersenne Twister MT19937 of Matsumoto and Nishimura (2002) with their seeding by an array of words;
//! CPython seeds it with the 32-bit digits of the number, least significant first, and draws below `n` by rejection.

use std::collections::HashSet;

const N: usize = 624;
const M: usize = 397;

/// CPython's `random.Random`, as far as `sample` needs it.
pub(crate) struct PythonRandom {
    state: [u32; N],
    next: usize,
}

impl PythonRandom {
    /// The generator that `random.Random(seed)` makes.
    pub(crate) fn new(seed: u64) -> Self {
        let (low, high) = (seed as u32, (seed >> 32) as u32);
        let key: &[u32] = if high == 0 { &[low] } else { &[low, high] };
        let mut random = Self::from_word(19_650_218);
        let state = &mut random.state;
        let mix = |before: u32| before ^ (before >> 30);
        let (mut i, mut j) = (1, 0);
        for _ in 0..N.max(key.len()) {
            state[i] = (state[i] ^ mix(state[i - 1]).wrapping_mul(1_664_525))
                .wrapping_add(key[j])
                .wrapping_add(j as u32);
            i += 1;
            j = (j + 1) % key.len();
            if i == N {
                state[0] = state[N - 1];
                i = 1;
            }
        }
        for _ in 0..N - 1 {
            state[i] = (state[i] ^ mix(state[i - 1]).wrapping_mul(1_566_083_941)).wrapping_sub(i as u32);
            i += 1;
            if i == N {
                state[0] = state[N - 1];
                i = 1;
            }
        }
        state[0] = 0x8000_0000;
        random
    }

    fn from_word(seed: u32) -> Self {
        let mut state = [seed; N];
        for i in 1..N {
            let before = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(before ^ (before >> 30)).wrapping_add(i as u32);
        }
        Self { state, next: N }
    }

    fn word(&mut self) -> u32 {
        if self.next == N {
            for i in 0..N {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
                let twist = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ twist;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// A number below `n`, which is at least 1 and below 2^32.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let drawn = (self.word() >> (32 - bits)) as usize;
            if drawn < n {
                return drawn;
            }
        }
    }

    /// The indices of `sample(population, k)` for a population of `n`; `None` where Python raises because `k` is over `n`.
    pub(crate) fn sample(&mut self, n: usize, k: usize) -> Option<Vec<usize>> {
        if k > n || u32::try_from(n).is_err() {
            return None;
        }
        let mut set_size = 21;
        if k > 5 {
            let mut power = 4;
            while power < 3 * k {
                power *= 4;
            }
            set_size += power;
        }
        let mut drawn = Vec::with_capacity(k);
        if n <= set_size {
            let mut pool: Vec<usize> = (0..n).collect();
            for i in 0..k {
                let j = self.below(n - i);
                drawn.push(pool[j]);
                pool[j] = pool[n - i - 1];
            }
        } else {
            let mut taken = HashSet::with_capacity(k);
            for _ in 0..k {
                let mut j = self.below(n);
                while !taken.insert(j) {
                    j = self.below(n);
                }
                drawn.push(j);
            }
        }
        Some(drawn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What CPython 3.11 gives for the same seeds and sizes, one draw after another.
    #[test]
    fn samples_are_those_of_cpython() {
        let mut random = PythonRandom::new(1234);
        let mut draws = |n| random.sample(n, 5).unwrap();
        assert_eq!(draws(7473), [6374, 3610, 957, 61, 742]);
        assert_eq!(draws(7473), [7462, 6610, 4769, 286, 5501]);
        assert_eq!(draws(7473), [5677, 687, 806, 6279, 2905]);
        let mut random = PythonRandom::new(1234);
        let mut draws = |n| random.sample(n, 5).unwrap();
        assert_eq!(draws(12), [7, 1, 0, 10, 9]);
        assert_eq!(draws(12), [10, 1, 11, 5, 3]);
        assert_eq!(draws(12), [0, 11, 10, 5, 7]);
    }

    #[test]
    fn both_ways_of_sampling_begin_and_end_where_cpython_says() {
        let mut random = PythonRandom::new(1234);
        assert_eq!(random.sample(21, 5).unwrap(), [14, 3, 0, 2, 1]);
        assert_eq!(random.sample(21, 5).unwrap(), [2, 3, 11, 7, 0]);
        assert_eq!(random.sample(22, 5).unwrap(), [0, 11, 20, 19, 15]);
        let mut random = PythonRandom::new(0);
        assert_eq!(random.sample(100, 8).unwrap(), [49, 97, 53, 5, 33, 65, 62, 51]);
        assert_eq!(
            random.sample(40, 30).unwrap(),
            [
                19, 30, 22, 13, 32, 8, 18, 34, 6, 39, 25, 35, 17, 37, 29, 38, 4, 9, 3, 2, 10, 15, 27, 21, 11,
                31, 5, 26, 24, 16
            ]
        );
        assert!(random.sample(4, 5).is_none());
    }

    #[test]
    fn long_seeds_and_words_are_those_of_cpython() {
        let mut random = PythonRandom::new(u64::MAX);
        assert_eq!(random.sample(1000, 4).unwrap(), [22, 254, 346, 633]);
        assert_eq!([random.word(), random.word()], [910_393_425, 1_958_779_474]);
        let mut random = PythonRandom::new(42);
        assert_eq!((0..=1000).map(|_| random.word()).last(), Some(2_672_573_305));
    }
}
