//! Embeddings and heads of quantised types, which stay in the file: the same logits, to the last bit, as of the table in F32.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::fs::File;
use std::path::{Path, PathBuf};

use ternion_backend_candle::{Decoder, DecoderOptions, HeadPrecision};
use ternion_engine::{CausalLm, ComputeThreads, LogitsPrecision, LogitsWanted, SequenceInput};
use ternion_formats::gguf::{self, TensorType, Writer};
use ternion_formats::{Checkpoint, Table, convert};
use ternion_test_support::fixture;

const EMBEDDING: &str = "token_embd.weight";

const KINDS: [TensorType; 12] = [
    TensorType::Q8_0,
    TensorType::Q6K,
    TensorType::Q5K,
    TensorType::Q4K,
    TensorType::Q3K,
    TensorType::Q2K,
    TensorType::Q5_0,
    TensorType::Q5_1,
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::Iq4Nl,
    TensorType::Iq4Xs,
];

/// Blocks of any codes, with scales that are small and finite where the type has them.
fn blocks(kind: TensorType, elements: usize) -> Vec<u8> {
    let halves: &[usize] = match kind {
        TensorType::Q6K => &[208],
        TensorType::Q3K => &[108],
        TensorType::Q2K => &[80, 82],
        TensorType::Q4K | TensorType::Q5K | TensorType::Q4_1 | TensorType::Q5_1 => &[0, 2],
        _ => &[0],
    };
    let (len, width) = (kind.block_len(), kind.block_bytes());
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let mut bytes: Vec<u8> = (0..elements / len * width).map(|_| next()).collect();
    for block in bytes.chunks_exact_mut(width) {
        for at in halves {
            // 0.0005 to 0.001, of either sign.
            let half = 0x1000 | u16::from(next()) << 2 | u16::from(next() & 1) << 15;
            block[*at..at + 2].copy_from_slice(&half.to_le_bytes());
        }
    }
    bytes
}

/// The file with another embedding, which is the head as well.
fn with_embedding(source: &Path, kind: TensorType, out: &Path, change: impl Fn(&mut Vec<u8>)) {
    let file = gguf::File::open(source).unwrap();
    let mut writer = Writer::new();
    file.metadata().for_each(|(key, value)| writer.set(key, value.clone()));
    let kind_of = |name: &str, own| if name == EMBEDDING { kind } else { own };
    for tensor in file.tensors() {
        writer.tensor(&tensor.name, kind_of(&tensor.name, tensor.kind), &tensor.dims).unwrap();
    }
    let mut data = writer.begin(File::create(out).unwrap()).unwrap();
    for tensor in file.tensors() {
        let bytes = if tensor.name == EMBEDDING {
            let mut bytes = blocks(kind, tensor.dims.iter().product::<u64>() as usize);
            change(&mut bytes);
            bytes
        } else {
            file.data(tensor).to_vec()
        };
        data.tensor(&tensor.name, |out| out.write_all(&bytes)).unwrap();
    }
    data.finish().unwrap();
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let checkpoint = Checkpoint::open(fixture("tiny-packed")).unwrap();
    let targets = [convert::Target::GgufI2s, convert::Target::GgufTq1, convert::Target::GgufTq2];
    let written = targets.into_iter().map(|target| {
        let path = folder.join(format!("{target}.gguf"));
        convert::convert(&checkpoint, &path, &convert::Options::new(target), &mut |_, _| {}).unwrap();
        path
    });
    written.collect()
}

fn decoder(checkpoint: Checkpoint, head: HeadPrecision, resident: Option<u64>) -> Decoder {
    let mut options = DecoderOptions::new(&checkpoint.spec);
    (options.head, options.resident_weights) = (head, resident);
    Decoder::new(checkpoint, &ComputeThreads::new(2), options).unwrap()
}

/// Logits of a prompt in chunks and of single tokens.
fn logits(model: &mut Decoder, precision: LogitsPrecision) -> Vec<f32> {
    let tokens: Vec<u32> = (0..40).map(|i| i * 7 % model.vocab_size() as u32).collect();
    let id = model.new_sequence().unwrap();
    let (mut all, mut rows) = (Vec::new(), Vec::new());
    for (from, to) in [(0, 17), (17, 36), (36, 37), (37, 38), (38, 40)] {
        let wanted = LogitsWanted::From(0);
        let input = SequenceInput::new(id, &tokens[from..to], wanted).with_precision(precision);
        model.forward(&[input], &mut rows).unwrap();
        all.append(&mut rows);
    }
    model.free(id);
    all
}

#[test]
fn logits_are_those_of_the_table_in_floats() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for source in sources(folder.path()) {
        for kind in KINDS {
            with_embedding(&source, kind, &path, |_| {});
            let open = || Checkpoint::open(&path).unwrap();
            let Table::Quantized(table) = open().embed else { panic!("{kind}: widened") };
            assert!(table.kind() == kind && table.bytes.is_mapped());
            let widened = || {
                let mut checkpoint = open();
                checkpoint.embed = Table::Dense(table.to_dense());
                checkpoint
            };
            let place = format!("{} {kind}", source.display());
            for (head, precision) in [
                (HeadPrecision::Exact, LogitsPrecision::Exact),
                (HeadPrecision::Certified, LogitsPrecision::Exact),
                (HeadPrecision::Certified, LogitsPrecision::Leading(1)),
                (HeadPrecision::Int8, LogitsPrecision::Exact),
                (HeadPrecision::Int4, LogitsPrecision::Exact),
            ] {
                let expected = logits(&mut decoder(widened(), head, None), precision);
                assert!(expected.iter().any(|x| *x != expected[0]), "{place}");
                let found = logits(&mut decoder(open(), head, None), precision);
                assert!(found == expected, "{place} {head:?} {precision:?}");
            }
            // Nothing of the table has to be in memory.
            let within = Checkpoint::open_within(&path, 1 << 20, &mut |_, _| {});
            if source.ends_with("gguf-i2s.gguf") {
                let streamed = decoder(within.unwrap(), HeadPrecision::Exact, Some(0));
                let expected =
                    logits(&mut decoder(widened(), HeadPrecision::Exact, None), LogitsPrecision::Exact);
                assert!(logits(&mut { streamed }, LogitsPrecision::Exact) == expected, "{place} streamed");
            }
        }
    }
}

#[test]
fn a_value_that_is_no_number_is_told_by_its_row() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let source = &sources(folder.path())[0];
    for (kind, at) in [(TensorType::Q8_0, 0), (TensorType::Q6K, 208), (TensorType::Q4K, 2)] {
        let width = kind.row_bytes(256).unwrap();
        with_embedding(source, kind, &path, |bytes| {
            bytes[70 * width + at..][..2].copy_from_slice(&0x7e00u16.to_le_bytes());
        });
        let error = Checkpoint::open(&path).unwrap_err();
        assert_eq!(error.kind(), ternion_core::ErrorKind::InvalidModel);
        let said = error.to_string();
        assert!(said.contains("row 70") && said.contains(EMBEDDING), "{kind}: {said}");
    }
}

/// What a file holds in blocks comes out of a conversion as it was, and in floats where the form has no others.
#[test]
fn conversions_hold_the_same_values() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    with_embedding(&sources(folder.path())[2], TensorType::Q4K, &path, |_| {});
    let original = Checkpoint::open(&path).unwrap();
    for target in [convert::Target::GgufI2s, convert::Target::Safetensors] {
        let out = folder.path().join(format!("out-{target}"));
        convert::convert(&original, &out, &convert::Options::new(target), &mut |_, _| {}).unwrap();
        let read = Checkpoint::open(&out).unwrap();
        let is_quantized = matches!(read.embed, Table::Quantized(_));
        assert_eq!(is_quantized, target == convert::Target::GgufI2s);
        assert!(read.embed.to_f32() == original.embed.to_f32(), "{target}");
    }
}
