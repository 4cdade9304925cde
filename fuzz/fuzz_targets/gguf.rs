//! Any bytes as a GGUF file: an error or a file, never a panic.
//!
//! `cargo +nightly fuzz run gguf` starts from `corpus/gguf`, which has the known ways to break a reader. The same
//! calls run without libFuzzer in `crates/formats/tests/gguf_mutations.rs`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ternion_core::text::Tokenizer;
use ternion_formats::SharedBytes;
use ternion_formats::gguf::{File, Overview, decode, is_dense, preflight, tokenizer_parts};

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = File::parse(&SharedBytes::from(bytes.to_vec()), "fuzz") else { return };
    let _ = preflight(&file);
    let _ = Overview::of(&file);
    let _ = tokenizer_parts(&file).and_then(Tokenizer::from_parts);
    for tensor in file.tensors() {
        let data = file.data(tensor);
        assert_eq!(data.len() as u64, tensor.bytes);
        if is_dense(tensor.kind) {
            let elements = tensor.dims.iter().product::<u64>() as usize;
            decode(tensor.kind, &data, &mut vec![0.0; elements]).expect("whole blocks of a dense type");
        }
    }
});
