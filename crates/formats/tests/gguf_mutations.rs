//! Files with random damage: an error or a model, never a panic, a hang or a huge allocation.
//!
//! Runs for some seconds; `TERNION_FUZZ_SECONDS` sets how long, `TERNION_FUZZ_SEED` where it starts. The same as the target
//! in `fuzz/`, for compilers without libFuzzer, and beyond it whole checkpoints are opened. `TERNION_FUZZ_CORPUS` names a
//! folder that the starting files are written to, for `fuzz/corpus/gguf`.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use common::fixture;
use common::gguf::{Raw, array, string};
use ternion_core::text::Tokenizer;
use ternion_formats::convert::Target;
use ternion_formats::gguf::{
    Array, File, Overview, Value, ValueType, decode, is_dense, preflight, tokenizer_parts,
};
use ternion_formats::{Checkpoint, SharedBytes};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// Numbers at which counts, lengths and offsets go wrong.
const NUMBERS: [u64; 20] =
    [0, 1, 2, 3, 5, 9, 13, 31, 32, 33, 36, 63, 64, 255, 512, 513, 1 << 31, 1 << 32, 1 << 63, u64::MAX];

/// A small model: one layer, few tokens.
fn small_model() -> Raw {
    let mut raw = Raw::new();
    raw.set("general.architecture", "bitnet-b1.58");
    for (key, value) in [
        ("block_count", 1u32),
        ("context_length", 64),
        ("embedding_length", 128),
        ("feed_forward_length", 128),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("vocab_size", 6),
    ] {
        raw.set(&format!("bitnet-b1.58.{key}"), value);
    }
    raw.set("bitnet-b1.58.attention.layer_norm_rms_epsilon", 1e-5f32);
    raw.set("tokenizer.ggml.model", "gpt2");
    raw.set("tokenizer.ggml.tokens", Array::strings(["a", "b", "ab", "c", "<s>", "</s>"]));
    raw.set("tokenizer.ggml.token_type", Array::i32s(&[1, 1, 1, 1, 3, 3]));
    raw.set("tokenizer.ggml.merges", Array::strings(["a b"]));
    raw.set("tokenizer.ggml.bos_token_id", 4u32);
    raw.set("tokenizer.ggml.eos_token_id", 5u32);
    raw.add("token_embd.weight", &[128, 6], 1, vec![0; 6 * 256]);
    raw.add("output_norm.weight", &[128], 0, vec![0; 512]);
    for norm in ["attn_norm", "ffn_norm", "attn_sub_norm", "ffn_sub_norm"] {
        raw.add(&format!("blk.0.{norm}.weight"), &[128], 0, vec![0; 512]);
    }
    let parts = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
    for part in parts {
        let rows = if matches!(part, "attn_k" | "attn_v") { 64 } else { 128 };
        let mut data = vec![0x55; rows as usize * 32];
        data.extend(1f32.to_le_bytes());
        data.resize(data.len() + 28, 0);
        raw.add(&format!("blk.0.{part}.weight"), &[128, rows], 36, data);
    }
    raw
}

/// The small model with each of the known ways to break a reader, and files as they should be.
fn corpus() -> Vec<(String, Vec<u8>)> {
    type Change = fn(&mut Raw);
    let broken: [(&str, Change); 30] = [
        ("right", |_| {}),
        ("magic", |r| r.magic = *b"GGJT"),
        ("version-1", |r| r.version = 1),
        ("big-endian", |r| r.version = 3 << 24),
        ("tensors-minus-1", |r| r.tensor_count = Some(u64::MAX)),
        ("pairs-minus-1", |r| r.pair_count = Some(u64::MAX)),
        ("key-empty", |r| r.pair(b"", 4, vec![0; 4])),
        ("key-twice", |r| r.pairs.push(r.pairs[0].clone())),
        ("value-type", |r| r.pair(b"k", 13, vec![0; 4])),
        ("alignment-13", |r| r.set("general.alignment", 13u32)),
        ("alignment-0", |r| r.set("general.alignment", 0u32)),
        ("alignment-type", |r| r.set("general.alignment", 32u64)),
        ("array-length", |r| r.pair(b"k", 9, array(ValueType::U64, 1 << 61, &[]))),
        ("array-nested", |r| r.pair(b"k", 9, array(ValueType::Array, 1, &array(ValueType::U8, 0, &[])))),
        ("string-not-utf8", |r| r.pair(b"k", 8, string(b"\xff"))),
        ("string-length", |r| r.pair(b"k", 8, u64::MAX.to_le_bytes().to_vec())),
        ("tokens-short", |r| r.set("tokenizer.ggml.tokens", Array::strings(["a"]))),
        ("layers-0", |r| r.set("bitnet-b1.58.block_count", 0u32)),
        ("layers-513", |r| r.set("bitnet-b1.58.block_count", 513u32)),
        ("layers-2-32", |r| r.set("bitnet-b1.58.block_count", 1u64 << 32)),
        ("heads-3", |r| r.set("bitnet-b1.58.attention.head_count", 3u32)),
        ("name-long", |r| r.tensors[0].name = vec![b'n'; 64]),
        ("name-twice", |r| r.tensors[1].name = r.tensors[0].name.clone()),
        ("dims-0", |r| r.tensors[0].dims.clear()),
        ("dims-5", |r| r.tensors[0].dims = vec![1; 5]),
        ("dims-overflow", |r| r.tensors[0].dims = vec![1 << 40; 4]),
        ("type-unknown", |r| r.tensors[0].kind = 99),
        ("offset-beyond", |r| r.tensors[1].offset = Some(1 << 40)),
        ("trailing", |r| r.trailing = vec![1; 64]),
        ("split", |r| r.set("split.count", Value::U16(3))),
    ];
    let with = |(name, change): (&str, Change)| {
        let mut raw = small_model();
        change(&mut raw);
        (name.to_owned(), raw.bytes())
    };
    broken.into_iter().map(with).collect()
}

fn larger() -> Vec<Vec<u8>> {
    let read = |name: &str| std::fs::read(fixture("gguf").join(name)).unwrap();
    vec![read("dense.gguf"), read("bitnet-tq.gguf"), Raw::fixture("nano-packed", Target::GgufI2s).bytes()]
}

/// Some changes, most of them before the data.
fn mutate(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    for _ in 0..=random.below(3) {
        let area = if random.below(4) == 0 { bytes.len() } else { bytes.len().min(2048) };
        let at = random.below(area);
        match random.below(8) {
            0 if random.below(8) == 0 => bytes.truncate(at),
            1 | 2 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            3 if at < bytes.len() => bytes[at] = random.next() as u8,
            4 | 5 => {
                let number =
                    NUMBERS[random.below(NUMBERS.len())].wrapping_add(random.below(3) as u64).to_le_bytes();
                let number = if random.below(2) == 0 { &number[..4] } else { &number[..] };
                let end = (at + number.len()).min(bytes.len());
                if at < end {
                    bytes[at..end].copy_from_slice(&number[..end - at]);
                }
            }
            6 => {
                let from = random.below(other.len());
                let piece = &other[from..(from + 1 + random.below(64)).min(other.len())];
                bytes.splice(at..at, piece.iter().copied());
            }
            _ => {
                let end = (at + random.below(64)).min(bytes.len());
                bytes.drain(at.min(end)..end);
            }
        }
        if bytes.is_empty() {
            bytes.push(0);
        }
    }
}

/// What the target in `fuzz/` does; whether the container was taken.
fn exercise(bytes: &[u8], with_tokenizer: bool) -> bool {
    let Ok(file) = File::parse(&SharedBytes::from(bytes.to_vec()), "fuzz") else { return false };
    let _ = preflight(&file);
    let _ = Overview::of(&file);
    let parts = tokenizer_parts(&file);
    if with_tokenizer {
        let _ = parts.and_then(Tokenizer::from_parts);
    }
    for tensor in file.tensors() {
        let data = file.data(tensor);
        assert_eq!(data.len() as u64, tensor.bytes);
        if is_dense(tensor.kind) {
            let elements = tensor.dims.iter().product::<u64>() as usize;
            decode(tensor.kind, &data, &mut vec![0.0; elements]).unwrap();
        }
    }
    true
}

#[test]
fn random_damage_is_survived() {
    let number = |key: &str| std::env::var(key).ok().map(|text| text.parse::<u64>().unwrap());
    let time = Duration::from_secs(number("TERNION_FUZZ_SECONDS").unwrap_or(3));
    let corpus = corpus();
    if let Some(folder) = std::env::var_os("TERNION_FUZZ_CORPUS") {
        for (name, bytes) in &corpus {
            std::fs::write(std::path::Path::new(&folder).join(name), bytes).unwrap();
        }
    }
    let mut files: Vec<Vec<u8>> = corpus.into_iter().map(|(_, bytes)| bytes).collect();
    assert!(exercise(&files[0], true), "the small model is right");
    let small = files.len();
    files.extend(larger());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let start = Instant::now();
    let first = number("TERNION_FUZZ_SEED").unwrap_or(0);
    let (mut runs, mut taken, mut opened) = (0u64, 0u64, 0u64);
    let mut slowest = (Duration::ZERO, 0);
    while start.elapsed() < time {
        let seed = first + runs;
        let mut random = Random(seed);
        // Half of the time the right one, seldom a large one.
        let pick = match random.below(16) {
            0 => small + random.below(files.len() - small),
            1..8 => random.below(small),
            _ => 0,
        };
        let mut bytes = files[pick].clone();
        let other = random.below(files.len());
        mutate(&mut bytes, &files[other], &mut random);
        let begin = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| {
            // To compile a tokenizer's expressions takes longer than all the rest.
            let with_tokenizer = seed.is_multiple_of(16);
            if !exercise(&bytes, with_tokenizer) {
                return (false, false);
            }
            std::fs::write(&path, &bytes).unwrap();
            let checkpoint = Checkpoint::open(&path);
            (true, checkpoint.is_ok_and(|checkpoint| !with_tokenizer || checkpoint.tokenizer().is_ok()))
        }));
        let (parsed, whole) = result.unwrap_or_else(|_| panic!("TERNION_FUZZ_SEED={seed}"));
        slowest = slowest.max((begin.elapsed(), seed));
        assert!(
            begin.elapsed() < Duration::from_secs(20),
            "TERNION_FUZZ_SEED={seed} took {:?}",
            begin.elapsed()
        );
        runs += 1;
        taken += u64::from(parsed);
        opened += u64::from(whole);
    }
    println!(
        "{runs} runs, {taken} containers and {opened} models taken, slowest {:?} (seed {})",
        slowest.0, slowest.1
    );
    assert!(taken > 0 && taken < runs, "{taken} of {runs}");
}
