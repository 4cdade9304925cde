//! Ids of tool calls.

use std::{
    collections::hash_map::RandomState,
    hash::BuildHasher,
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    },
};

const LETTERS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// The first letters tell processes apart, the others the calls of this one.
const OF_PROCESS: u32 = 4;
const OF_CALL: u32 = 5;

/// An id for a call of a tool that no other call of this process has. Nine letters and digits, because Mistral's templates take no others.
pub fn call_id() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    static PROCESS: LazyLock<u64> = LazyLock::new(|| RandomState::new().hash_one(std::process::id()));
    let mut id = String::new();
    write(*PROCESS, OF_PROCESS, &mut id);
    write(COUNT.fetch_add(1, Ordering::Relaxed), OF_CALL, &mut id);
    id
}

fn write(mut number: u64, digits: u32, id: &mut String) {
    for _ in 0..digits {
        id.push(char::from(LETTERS[(number % 62) as usize]));
        number /= 62;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_differ_and_have_nine_letters() {
        let ids: std::collections::HashSet<String> = (0..10_000).map(|_| call_id()).collect();
        assert_eq!(ids.len(), 10_000);
        assert!(ids.iter().all(|id| id.len() == 9 && id.bytes().all(|b| b.is_ascii_alphanumeric())));
    }
}
