//! How fast this machine reads memory: the ceiling of decoding, which reads all weights for every token.
//!
//! Each thread sums its own part of a buffer that is larger than the caches; the best of some passes counts, because
//! whatever else runs can only slow a pass down.

use std::hint::black_box;
use std::time::Instant;

const PASSES: usize = 5;
/// Independent sums, so that the adds hide behind the loads.
const LANES: usize = 32;

/// Bytes per second that `threads` threads read of a buffer of `bytes`; `None` if there is no memory for it or no thread
/// can be started.
pub(super) fn measure(bytes: usize, threads: usize) -> Option<f64> {
    let words = bytes / size_of::<u64>();
    let mut buffer: Vec<u64> = Vec::new();
    buffer.try_reserve_exact(words).ok()?;
    // Every word is written, so that each page is real memory and not the kernel's page of zeros.
    buffer.extend(0..words as u64);
    let part = buffer.len().div_ceil(threads).max(1);
    let mut fastest = f64::INFINITY;
    for _ in 0..PASSES {
        let start = Instant::now();
        std::thread::scope(|scope| {
            // The first part is this thread's own.
            let mut parts = buffer.chunks(part);
            let own = parts.next();
            for part in parts {
                std::thread::Builder::new().spawn_scoped(scope, || black_box(sum(part))).ok()?;
            }
            black_box(own.map(sum));
            Some(())
        })?;
        fastest = fastest.min(start.elapsed().as_secs_f64());
    }
    Some(size_of_val(&buffer[..]) as f64 / fastest)
}

fn sum(words: &[u64]) -> u64 {
    let (blocks, rest) = words.as_chunks::<LANES>();
    let mut lanes = [0u64; LANES];
    for block in blocks {
        for (lane, word) in lanes.iter_mut().zip(block) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.iter().chain(rest).fold(0, |a, b| a.wrapping_add(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_covers_every_word() {
        let words: Vec<u64> = (0..1003).collect();
        assert_eq!(sum(&words), 1002 * 1003 / 2);
    }

    #[test]
    fn a_measurement_is_a_plausible_number() {
        for threads in [1, 2, 7] {
            let found = measure(1 << 20, threads).unwrap();
            assert!(found > 1e6 && found.is_finite(), "{threads}: {found}");
        }
    }
}
