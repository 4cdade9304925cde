//! GGUF files as other tools leave them: names without an extension, folders with more in them, models in parts, element
//! types of every kind and of other programs.
#![allow(clippy::unwrap_used, reason = "a failure in a helper fails its test, as it should")]

mod common;

use std::fs;
use std::path::Path;

use common::gguf::Raw;
use common::{assert_says, fixture};
use ternion_core::ErrorKind::{InvalidModel, NotFound, Unsupported};
use ternion_formats::convert::{Options, Target, convert};
use ternion_formats::gguf::{File, Overview, TensorType, Value, decode, is_dense};
use ternion_formats::{Checkpoint, Weights, gguf_file};

/// A small ternary model with its tokenizer in the file.
fn model() -> Raw {
    Raw::fixture("nano-packed", Target::GgufI2s)
}

fn write(raw: &Raw, path: &Path) {
    fs::write(path, raw.bytes()).unwrap();
}

/// A file of an architecture and `general.type` without tensors.
fn other(architecture: &str, kind: &str) -> Raw {
    let mut raw = Raw::new();
    raw.set("general.architecture", architecture);
    raw.set("general.type", kind);
    raw
}

#[test]
fn names_of_files_do_not_matter() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["sha256-3f6a0c", "model.gguf?download=true", "model.GGUF", "model.bin", "a.safetensors"] {
        let path = folder.path().join(name);
        write(&model(), &path);
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.format, "GGUF (I2_S)", "{name}");
        assert!(checkpoint.tokenizer().is_ok(), "{name}");
        fs::remove_file(path).unwrap();
    }
    // Safetensors too, in their folder.
    let source = fixture("nano-packed");
    for file in ["config.json", "tokenizer.json"] {
        fs::copy(source.join(file), folder.path().join(file)).unwrap();
    }
    for name in ["model.safetensors?download=true", "weights.gguf"] {
        let path = folder.path().join(name);
        fs::copy(source.join("model.safetensors"), &path).unwrap();
        assert_eq!(Checkpoint::open(&path).unwrap().format, "safetensors (packed 1.58-bit)", "{name}");
    }
}

#[test]
fn a_folder_with_one_model_is_that_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    write(&model(), &path("some-model.gguf"));
    // An adapter, a vision tower, adapters and importance matrices in GGUF, notes.
    fs::write(path("adapter_model.safetensors"), b"\x02\0\0\0\0\0\0\0{}").unwrap();
    fs::write(path("adapter_config.json"), "{}").unwrap();
    fs::write(path("README.md"), "GGUF files").unwrap();
    for (name, architecture, kind) in [
        ("mmproj-model-f16.gguf", "clip", "mmproj"),
        ("vision", "clip", "model"),
        ("lora.gguf", "llama", "adapter"),
        ("imatrix.gguf", "llama", "imatrix"),
    ] {
        write(&other(architecture, kind), &path(name));
    }
    assert_eq!(gguf_file(folder.path()).unwrap(), Some(path("some-model.gguf")));
    assert_eq!(Checkpoint::open(folder.path()).unwrap().name, "some-model");

    write(&model(), &path("other.GGUF"));
    let error = Checkpoint::open(folder.path()).unwrap_err();
    assert_says(&error, Unsupported, &["2 GGUF files", "`other.GGUF`, `some-model.gguf`"]);

    // What transformers would load goes first.
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        fs::copy(fixture("nano-packed").join(file), path(file)).unwrap();
    }
    assert_eq!(Checkpoint::open(folder.path()).unwrap().format, "safetensors (packed 1.58-bit)");
}

#[test]
fn a_folder_without_a_model_says_what_it_holds() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let error = || Checkpoint::open(folder.path()).unwrap_err();
    assert_says(&error(), NotFound, &["holds no weights", "model.safetensors"]);
    fs::write(path("pytorch_model.bin"), "PK").unwrap();
    assert_says(&error(), NotFound, &["`pytorch_model.bin`", "convert"]);
    fs::create_dir(path("onnx")).unwrap();
    fs::write(path("onnx/model_q4.onnx"), "x").unwrap();
    assert_says(&error(), NotFound, &["`model_q4.onnx`", "backend `onnx`", "cargo feature"]);
    fs::write(path("adapter_model.safetensors"), b"\x02\0\0\0\0\0\0\0{}").unwrap();
    assert_says(&error(), NotFound, &["`adapter_model.safetensors`"]);
    let error = Checkpoint::open(path("onnx/model_q4.onnx")).unwrap_err();
    assert_says(&error, Unsupported, &["ONNX", "backend `onnx` (cargo feature `onnx`)"]);
    for name in ["model.gguf", "model.safetensors"] {
        fs::write(path(name), "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n").unwrap();
        assert_says(
            &Checkpoint::open(path(name)).unwrap_err(),
            InvalidModel,
            &["Git LFS", "git lfs pull", name],
        );
    }
}

#[cfg(unix)]
#[test]
fn the_hub_cache_is_read_through_its_links() {
    let folder = tempfile::tempdir().unwrap();
    let repository = folder.path().join("models--a--b");
    let snapshot = repository.join("snapshots/0123");
    for folder in [&snapshot, &repository.join("blobs"), &repository.join("refs")] {
        fs::create_dir_all(folder).unwrap();
    }
    fs::write(repository.join("refs/main"), "0123\n").unwrap();
    write(&model(), &repository.join("blobs/f00d"));
    std::os::unix::fs::symlink("../../blobs/f00d", snapshot.join("model.gguf")).unwrap();
    assert_eq!(Checkpoint::open(&snapshot).unwrap().name, "model");
    Checkpoint::open(repository.join("blobs/f00d")).unwrap();
    let error = Checkpoint::open(&repository).unwrap_err();
    assert_says(&error, NotFound, &["Hugging Face cache", "models--a--b/snapshots/0123"]);
}

#[test]
fn a_model_in_parts_is_read_from_its_first() {
    let folder = tempfile::tempdir().unwrap();
    let whole = Checkpoint::open(fixture("tiny-packed")).unwrap();
    let mut first = Raw::fixture("tiny-packed", Target::GgufTq2);
    let count = first.tensors.len() as u32;
    let mut rest = first.tensors.split_off(9).into_iter();
    for no in 1..3u16 {
        let mut part = Raw::new();
        part.set("split.no", Value::U16(no));
        part.set("split.count", Value::U16(3));
        part.tensors = rest.by_ref().take(if no == 1 { 5 } else { usize::MAX }).collect();
        write(&part, &folder.path().join(format!("m-0000{}-of-00003.gguf", no + 1)));
    }
    first.set("split.no", Value::U16(0));
    first.set("split.count", Value::U16(3));
    first.set("split.tensors.count", count);
    write(&first, &folder.path().join("m-00001-of-00003.gguf"));
    for path in [folder.path().to_owned(), folder.path().join("m-00001-of-00003.gguf")] {
        let read = Checkpoint::open(&path).unwrap();
        assert_eq!(read.files.len(), 3);
        for (a, b) in read.layers.iter().zip(&whole.layers) {
            for (a, b) in a.linears().into_iter().zip(b.linears()) {
                let (Weights::Ternary(a), Weights::Ternary(b)) = (&a.weights, &b.weights) else {
                    panic!("{} is dense", a.name)
                };
                assert!(common::trits(a) == common::trits(b));
            }
        }
        assert_eq!(read.final_norm.weight, whole.final_norm.weight);
    }
    let error = Checkpoint::open(folder.path().join("m-00002-of-00003.gguf")).unwrap_err();
    assert_says(&error, InvalidModel, &["part 2 of 3", "-00001-of-00003.gguf"]);
    let overview =
        Overview::of(&File::open(folder.path().join("m-00001-of-00003.gguf")).unwrap().joined().unwrap());
    assert_eq!(
        (overview.files, overview.types.iter().map(|t| t.tensors).sum::<usize>()),
        (3, count as usize)
    );
}

/// As embedding, head, norm and as a projection, which then is dense; and through a conversion.
#[test]
fn dense_tensors_may_have_any_type() {
    let types = File::open(fixture("gguf").join("types.gguf")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for &kind in TensorType::ALL.iter().filter(|kind| is_dense(**kind)) {
        let bytes = types.data(types.tensor(kind.name()).unwrap());
        let row = |i: usize| &bytes[i % 4 * bytes.len() / 4..][..bytes.len() / 4];
        let rows = |count: usize| (0..count).flat_map(row).copied().collect::<Vec<u8>>();
        let mut decoded = vec![0.0; 4 * 256];
        decode(kind, &bytes, &mut decoded).unwrap();
        let expected = |count: usize| -> Vec<f32> {
            (0..count).flat_map(|i| &decoded[i % 4 * 256..][..256]).copied().collect()
        };
        let mut raw = Raw::read(&fixture("gguf").join("llama-tq.gguf"));
        for (name, count) in
            [("token_embd.weight", 300), ("output_norm.weight", 1), ("blk.0.ffn_up.weight", 256)]
        {
            let tensor = raw.tensor(name);
            (tensor.kind, tensor.data) = (kind.id(), rows(count));
        }
        raw.add("output.weight", &[256, 300], kind.id(), [rows(1), rows(299)].concat());
        let path = folder.path().join("x.gguf");
        write(&raw, &path);
        let read = Checkpoint::open(&path).unwrap_or_else(|e| panic!("{kind}: {e}"));
        assert!(read.embed.to_f32() == expected(300), "{kind}");
        assert!(read.head.as_ref().unwrap().to_f32() == [expected(1), expected(299)].concat(), "{kind}");
        assert!(read.final_norm.weight == expected(1), "{kind}");
        let Weights::Dense(up) = &read.layers[0].up.weights else { panic!("{kind}: ternary") };
        assert!(up.to_f32() == expected(256), "{kind}");

        // The tokenizer of the fixture is not in the file.
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(fixture("nano-packed").join(file), folder.path().join(file)).unwrap();
        }
        let out = folder.path().join(format!("converted-{kind}"));
        convert(&read, &out, &Options::new(Target::Safetensors), &mut |_, _| {}).unwrap();
        assert!(Checkpoint::open(&out).unwrap().embed.to_f32() == read.embed.to_f32(), "{kind}");
    }
    let mut raw = Raw::read(&fixture("gguf").join("llama-tq.gguf"));
    let tensor = raw.tensor("token_embd.weight");
    (tensor.kind, tensor.data) = (TensorType::Iq2S.id(), vec![0; 300 * 82]);
    assert_says(&raw.open_error(), Unsupported, &["IQ2_S", "Q4_K", "token_embd.weight"]);
}

/// Each of these files is whole: the error says what it is, and the overview shows it.
#[test]
fn types_of_other_programs_are_told() {
    for (id, len, bytes, trailer, words) in [
        (38, 4, 1, 32, ["TL1", "bitnet.cpp"]),
        (42, 256, 42, 0, ["STQ1_0", "AngelSlim"]),
        (135, 64, 17, 0, ["IQ2_BN", "ik_llama.cpp"]),
        (31, 32, 18, 0, ["Q4_0_4_4", "llama.cpp before 2025"]),
        (99, 64, 16, 0, ["id 99", "none that is known"]),
        // Ids of two programs, with sizes that tell neither.
        (142, 64, 21, 0, ["PQ2_0 (blocks of 128 in a row, 34 bytes each)", "IQ2_TN, which ik_llama.cpp"]),
        (143, 64, 17, 0, ["PTQ1_0 (blocks of 128 in a row, 28 bytes each)", "IQ1_TN, which ik_llama.cpp"]),
    ] {
        let mut raw = Raw::read(&fixture("gguf").join("llama-tq.gguf"));
        for tensor in raw.tensors.iter_mut().filter(|t| t.dims.len() == 2 && t.name.starts_with(b"blk")) {
            let elements = tensor.dims.iter().product::<u64>() as usize;
            (tensor.kind, tensor.data) = (id, vec![0x55; elements / len * bytes + trailer]);
        }
        let error = raw.open_error();
        assert_says(&error, Unsupported, &[words[0], words[1], "tensor: blk.0"]);
        let file = raw.parse().unwrap();
        let error = ternion_formats::gguf::preflight(&file).unwrap_err();
        assert_says(&error, Unsupported, &words);
        let overview = Overview::of(&file);
        assert_eq!(overview.architecture.as_deref(), Some("llama"));
        assert!(overview.llama_cpp_error.is_some_and(|error| error.contains(words[0])));
        assert!(overview.types.iter().any(|t| t.tensors == 7 && t.bytes > 0), "{:?}", overview.types);
    }
    // Types that Ternion computes with and llama.cpp does not.
    for (id, bytes, name) in [(42, 34, "Q2_0 (groups of 128)"), (142, 34, "PQ2_0"), (143, 28, "PTQ1_0")] {
        let mut raw = Raw::read(&fixture("gguf").join("llama-tq.gguf"));
        for tensor in raw.tensors.iter_mut().filter(|t| t.dims.len() == 2 && t.name.starts_with(b"blk")) {
            let elements = tensor.dims.iter().product::<u64>() as usize;
            (tensor.kind, tensor.data) = (id, vec![0x55; elements / 128 * bytes]);
        }
        assert!(raw.open().unwrap().format.contains(name), "{name}");
        let error = ternion_formats::gguf::preflight(&raw.parse().unwrap()).unwrap_err();
        assert_says(&error, Unsupported, &[name, "llama.cpp does not have", "candle"]);
    }
    // Sizes that nothing explains are damage still.
    let mut raw = Raw::read(&fixture("gguf").join("llama-tq.gguf"));
    raw.tensor("blk.0.attn_q.weight").data.extend([0; 64]);
    assert_says(&raw.error(), InvalidModel, &["a gap"]);
}

#[test]
fn an_error_names_the_engine_that_runs_the_file() {
    // An architecture that Ternion does not know.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let mut bytes = fs::read(fixture("gguf-ternary").join("qwen3.gguf")).unwrap();
    while let Some(at) = bytes.windows(5).position(|name| name == b"qwen3") {
        bytes[at + 4] = b'2';
    }
    fs::write(&path, bytes).unwrap();
    let error = Checkpoint::open(&path).unwrap_err();
    assert_says(&error, Unsupported, &["qwen2", "backend `llama-cpp` (cargo feature `llama-cpp`)"]);
    let overview = Overview::of(&File::open(&path).unwrap());
    assert_eq!(overview.llama_cpp_error, None);
    assert_eq!(
        (overview.context_length, overview.layers, overview.vocab_size),
        (Some(128), Some(1), Some(320))
    );
    assert_eq!(overview.tokenizer.as_deref(), Some("gpt2"));
    assert!(overview.types.iter().any(|t| t.name == "TQ2_0" && t.tensors == 7));
    // llama.cpp's graph of this architecture computes another activation, so it is not named.
    let mut raw = Raw::fixture("tiny-packed", Target::GgufTq2);
    raw.set("bitnet.rope.scaling.type", "longrope");
    let error = raw.open_error();
    assert_says(&error, Unsupported, &["longrope"]);
    assert!(!error.to_string().contains("llama-cpp"), "{error}");
}

#[test]
fn a_byte_order_mark_is_not_part_of_json() {
    let folder = tempfile::tempdir().unwrap();
    let source = fixture("nano-packed");
    fs::copy(source.join("model.safetensors"), folder.path().join("shard.safetensors")).unwrap();
    let text = |name: &str| fs::read_to_string(source.join(name)).unwrap();
    let bytes = fs::read(source.join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let map: serde_json::Map<_, _> =
        tensors.names().into_iter().map(|name| (name.to_owned(), "shard.safetensors".into())).collect();
    let index = serde_json::json!({ "weight_map": map }).to_string();
    for (name, text) in [
        ("config.json", text("config.json")),
        ("tokenizer.json", text("tokenizer.json")),
        ("tokenizer_config.json", text("tokenizer_config.json")),
        ("special_tokens_map.json", "{}".to_owned()),
        ("generation_config.json", r#"{"do_sample": true, "temperature": 0.5}"#.to_owned()),
        ("model.safetensors.index.json", index),
    ] {
        fs::write(folder.path().join(name), format!("\u{feff}{text}")).unwrap();
    }
    let (read, plain) = (Checkpoint::open(folder.path()).unwrap(), Checkpoint::open(&source).unwrap());
    assert_eq!(read.sampling.temperature, 0.5);
    let ids = |checkpoint: &Checkpoint| checkpoint.tokenizer().unwrap().encode("one 2", true).unwrap();
    assert_eq!(ids(&read), ids(&plain));
}
