//! Reads memory as fast as it can be read: the limit that the speed of the products is compared with.

use crate::isa::multiversion;
use crate::lanes::prefetch_all;
use crate::team::for_each_mut;

/// Bytes that one thread reads in a row.
const PIECE: usize = 4 << 20;
/// Bytes of one round of the loop: four loads of the widest vectors.
const BLOCK: usize = 256;
/// Prefetches so many bytes ahead, as the hardware alone does not keep enough cache lines in flight.
const AHEAD: usize = 4096;

/// Reads all bytes with wide loads, on all threads of the [`Team`](crate::Team) that the caller runs in.
///
/// Returns the exclusive or of all 64-bit words, so that the compiler cannot leave the loads out.
pub fn read_through(bytes: &[u8]) -> u64 {
    let mut found = vec![0; bytes.len().div_ceil(PIECE)];
    for_each_mut(&mut found, |i, found| {
        let begin = i * PIECE;
        xor(&bytes[begin..bytes.len().min(begin + PIECE)], found);
    });
    found.iter().fold(0, |a, b| a ^ b)
}

multiversion! {
    fn xor(bytes: &[u8], found: &mut u64) = xor_body;
}

#[inline(always)]
fn xor_body<const FMA: bool>(bytes: &[u8], found: &mut u64) {
    let (blocks, rest) = bytes.as_chunks::<BLOCK>();
    let mut lanes = [0u64; BLOCK / 8];
    for block in blocks {
        prefetch_all(block.as_ptr().wrapping_add(AHEAD), BLOCK);
        for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<8>().0) {
            *lane ^= u64::from_le_bytes(*word);
        }
    }
    *found = lanes.iter().fold(0, |a, b| a ^ b);
    for word in rest.chunks(8) {
        let mut padded = [0; 8];
        padded[..word.len()].copy_from_slice(word);
        *found ^= u64::from_le_bytes(padded);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Team;

    #[test]
    fn every_byte_is_read_once_by_any_number_of_threads() {
        for length in [0, 1, 7, 8, 255, 256, 257, 4000, PIECE, 2 * PIECE + 1234] {
            let bytes: Vec<u8> = (0..length).map(|i| (i * 31 % 251) as u8).collect();
            let mut expected = [0u8; 8];
            for (i, byte) in bytes.iter().enumerate() {
                expected[i % 8] ^= byte;
            }
            for threads in [1, 2, 3] {
                let team = Team::new(threads).unwrap();
                let found = team.install(|| read_through(&bytes));
                assert_eq!(found, u64::from_le_bytes(expected), "{length} bytes, {threads} threads");
            }
        }
    }
}
