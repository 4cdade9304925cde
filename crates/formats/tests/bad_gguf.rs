//! GGUF files that are wrong in one respect: the container, the metadata, the tensors.
#![allow(clippy::unwrap_used, reason = "a failure in a helper fails its test, as it should")]

mod common;

use common::assert_says;
use common::gguf::{Raw, array, string};
use ternion_core::ErrorKind::{InvalidModel, NotFound, Unsupported};
use ternion_formats::Checkpoint;
use ternion_formats::SharedBytes;
use ternion_formats::convert::Target;
use ternion_formats::gguf::{Array, File, Value, ValueType, preflight};

/// A container with one pair and two tensors.
fn small() -> Raw {
    let mut raw = Raw::new();
    raw.set("general.architecture", "bitnet");
    raw.add("a", &[4, 2], 0, vec![0; 32]);
    raw.add("b", &[3], 1, vec![0; 6]);
    raw
}

#[track_caller]
fn refused(change: impl FnOnce(&mut Raw), kind: ternion_core::ErrorKind, words: &[&str]) {
    let mut raw = small();
    change(&mut raw);
    let error = raw.error();
    assert_says(&error, kind, words);
    assert!(error.to_string().contains("x.gguf"), "{error}");
}

#[test]
fn a_right_file_is_read() {
    for version in [2, 3] {
        let mut raw = small();
        raw.version = version;
        let file = raw.parse().unwrap();
        assert_eq!(
            (file.version(), file.architecture().unwrap(), file.tensors().len()),
            (version, "bitnet", 2)
        );
        assert_eq!(file.data(file.tensor("b").unwrap()).len(), 6);
        assert_eq!(file.tensor("a").unwrap().dims, [4, 2]);
    }
    let mut raw = small();
    raw.alignment = 64;
    raw.set("general.alignment", 64u32);
    assert_eq!(raw.parse().unwrap().alignment(), 64);
    assert!(Raw::new().parse().is_ok(), "a file may be empty");
}

#[test]
fn headers() {
    refused(|r| r.magic = *b"GGML", InvalidModel, &["begins with `GGML`", "expected `GGUF`"]);
    for version in [0, 1, 4, 0xffff_ffff] {
        refused(|r| r.version = version, Unsupported, &[&format!("version is {version}"), "supported: 2, 3"]);
    }
    refused(|r| r.version = 3u32.swap_bytes(), Unsupported, &["big-endian"]);
    refused(
        |r| r.tensor_count = Some(u64::MAX),
        InvalidModel,
        &["number of tensors is 18446744073709551615", "at most"],
    );
    refused(|r| r.tensor_count = Some(60_000), InvalidModel, &["ends within", "table of tensors"]);
    refused(
        |r| r.pair_count = Some(u64::MAX),
        InvalidModel,
        &["metadata pairs is 18446744073709551615", "at most"],
    );
    refused(|r| r.pair_count = Some(50_000), InvalidModel, &["ends within", "metadata pairs"]);
    refused(|r| r.tensor_count = Some(3), InvalidModel, &["tensor 2"]);
    for bytes in [&b""[..], b"GG", b"GGUF\x03\0\0", b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0"] {
        assert_says(&File::parse(&bytes.to_vec().into(), "x").unwrap_err(), InvalidModel, &["ends within"]);
    }
}

#[test]
fn keys_and_values() {
    let one = 1u32.to_le_bytes().to_vec();
    refused(|r| r.pair(b"", 4, one.clone()), InvalidModel, &["key 1 is empty"]);
    refused(|r| r.pairs.push(r.pairs[0].clone()), InvalidModel, &["occurs twice", "general.architecture"]);
    refused(
        |r| r.pair(&[b'k'; 300], 4, one.clone()),
        InvalidModel,
        &["length of key 1 is 300", "at most 256"],
    );
    refused(|r| r.pair(b"\xff", 4, one.clone()), InvalidModel, &["key 1 is not UTF-8"]);
    refused(|r| r.pair(b"k", 13, one.clone()), InvalidModel, &["type of the value is 13", "key: k"]);
    refused(|r| r.pair(b"k", u32::MAX, one.clone()), InvalidModel, &["type of the value is 4294967295"]);
    refused(|r| r.pair(b"k", 7, vec![2]), InvalidModel, &["boolean is 2", "0 or 1", "key: k"]);
    refused(|r| r.pair(b"k", 8, string(b"a\xc3\x28")), InvalidModel, &["`k` is not UTF-8"]);
    let long = u64::MAX.to_le_bytes().to_vec();
    refused(|r| r.pair(b"k", 8, long.clone()), InvalidModel, &["length of `k` is 18446744073709551615"]);
    refused(|r| r.pair(b"k", 8, 1_000_000u64.to_le_bytes().to_vec()), InvalidModel, &["ends within `k`"]);
    // A key of length -1.
    let mut bytes = small().bytes();
    bytes[24..32].copy_from_slice(&long);
    let error = File::parse(&SharedBytes::from(bytes), "x").unwrap_err();
    assert_says(&error, InvalidModel, &["length of key 0 is 18446744073709551615"]);
}

#[test]
fn arrays() {
    let kind = ValueType::U32;
    refused(
        |r| r.pair(b"k", 9, array(kind, u64::MAX, &[])),
        InvalidModel,
        &["array `k` is 18446744073709551615"],
    );
    refused(|r| r.pair(b"k", 9, array(kind, 1 << 27, &[])), InvalidModel, &["ends within the array `k`"]);
    refused(
        |r| r.pair(b"k", 9, array(ValueType::String, 1 << 20, &[])),
        InvalidModel,
        &["ends within the array `k`"],
    );
    let nested = array(ValueType::Array, 1, &array(kind, 0, &[]));
    refused(|r| r.pair(b"k", 9, nested), Unsupported, &["array of arrays", "key: k"]);
    let strings = [string(b"fine"), string(b"\xff\xfe")].concat();
    refused(
        |r| r.pair(b"k", 9, array(ValueType::String, 2, &strings)),
        InvalidModel,
        &["array `k` is not UTF-8"],
    );
    refused(|r| r.pair(b"k", 9, vec![99, 0, 0, 0]), InvalidModel, &["type of the value is 99"]);
}

#[test]
fn alignments() {
    for n in [0u32, 13, 3 << 20, 1 << 31] {
        refused(
            |r| r.set("general.alignment", n),
            InvalidModel,
            &["general.alignment", &n.to_string(), "power of two"],
        );
    }
    refused(|r| r.set("general.alignment", 32u64), InvalidModel, &["general.alignment", "u64", "as u32"]);
    refused(|r| r.set("general.alignment", "32"), InvalidModel, &["general.alignment", "string"]);
}

#[test]
fn tables_of_tensors() {
    refused(|r| r.tensors[0].name = vec![b'n'; 64], InvalidModel, &["name of tensor 0 is 64", "at most 63"]);
    refused(|r| r.tensors[0].name.clear(), InvalidModel, &["tensor 0", "printable"]);
    refused(|r| r.tensors[0].name = b"a\nb".into(), InvalidModel, &["tensor 0", "printable"]);
    refused(|r| r.tensors[0].name = b"\xff".into(), InvalidModel, &["tensor 0 is not UTF-8"]);
    refused(|r| r.tensors[1].name = b"a".into(), InvalidModel, &["occurs twice", "tensor: a"]);
    refused(|r| r.tensors[0].dims.clear(), InvalidModel, &["0 dimensions", "1 to 4", "tensor: a"]);
    refused(|r| r.tensors[0].dims = vec![1; 5], InvalidModel, &["5 dimensions", "tensor: a"]);
    refused(|r| r.tensors[0].dims = vec![0, 2], InvalidModel, &["[0, 2]", "each from 1"]);
    refused(
        |r| r.tensors[0].dims = vec![u64::MAX, 2],
        InvalidModel,
        &["18446744073709551615", "each from 1"],
    );
    refused(|r| r.tensors[0].dims = vec![1 << 40, 1 << 40], InvalidModel, &["overflows", "tensor: a"]);
    refused(|r| r.tensors[0].dims = vec![1 << 61, 2], InvalidModel, &["overflows", "tensor: a"]);
    // A type of another program may be looked at, but not run.
    let mut raw = small();
    raw.tensors[0].kind = 77;
    assert_eq!(raw.parse().unwrap().tensors()[0].kind.to_string(), "unknown type 77");
    assert_says(&raw.open_error(), Unsupported, &["has the id 77", "tensor: a", "x.gguf"]);
    assert_says(&preflight(&raw.parse().unwrap()).unwrap_err(), Unsupported, &["id 77", "tensor: a"]);
    refused(
        |r| r.tensors[0].kind = 12,
        InvalidModel,
        &["4 elements", "multiple of 256", "Q4_K", "tensor: a"],
    );
    refused(|r| r.tensors[0].kind = 36, InvalidModel, &["4 elements", "multiple of 64", "I2_S", "tensor: a"]);
}

#[test]
fn places_of_tensors() {
    refused(
        |r| r.tensors[1].offset = Some(33),
        InvalidModel,
        &["33", "multiple of the alignment 32", "tensor: b"],
    );
    refused(
        |r| r.tensors[1].offset = Some(0),
        InvalidModel,
        &["offset is 0: an overlap", "expected 32", "tensor: b"],
    );
    refused(|r| r.tensors[1].offset = Some(64), InvalidModel, &["offset is 64: a gap", "tensor: b"]);
    refused(|r| r.tensors[0].offset = Some(64), InvalidModel, &["offset is 64", "tensor: a"]);
    refused(
        |r| r.tensors[0].offset = Some(1 << 63),
        InvalidModel,
        &["offset is 9223372036854775808", "tensor: a"],
    );
    refused(
        |r| r.tensors[0].dims = vec![1 << 20, 2],
        InvalidModel,
        &["8388608 bytes", "complete file", "tensor: a"],
    );
    // Two sizes whose sum is over 2^63.
    refused(
        |r| (0..2).for_each(|i| r.tensors[i].dims = vec![1 << 60]),
        InvalidModel,
        &["complete file", "tensor: a"],
    );
    refused(|r| r.trailing = vec![7; 32], InvalidModel, &["tensors end at 64", "96 bytes of data"]);
    let bytes = small().bytes();
    let error = File::parse(&bytes[..bytes.len() - 30].to_vec().into(), "x").unwrap_err();
    assert_says(&error, InvalidModel, &["6 bytes at offset 32", "34 bytes of data", "tensor: b"]);
}

#[test]
fn no_prefix_of_a_file_is_a_file() {
    let raw = Raw::fixture("nano-packed", Target::GgufI2s);
    let bytes = raw.bytes();
    // The end is padding.
    for len in (0..bytes.len() - 64).step_by(bytes.len() / 997) {
        assert!(File::parse(&bytes[..len].to_vec().into(), "x").is_err(), "{len} of {}", bytes.len());
    }
}

#[track_caller]
fn model_refused(
    target: Target,
    change: impl FnOnce(&mut Raw),
    kind: ternion_core::ErrorKind,
    words: &[&str],
) {
    let mut raw = Raw::fixture("tiny-packed", target);
    change(&mut raw);
    let error = raw.open_error();
    assert_says(&error, kind, words);
    assert!(error.to_string().contains("x.gguf"), "{error}");
}

#[test]
fn sizes_of_models() {
    let i2s = Target::GgufI2s;
    let key = |name: &str| format!("bitnet-b1.58.{name}");
    for (name, value, words) in [
        ("block_count", 0u32, "from 1 to 1024"),
        ("block_count", 2000, "from 1 to 1024"),
        ("context_length", 0, "from 1"),
        ("embedding_length", 0, "from 1"),
        ("attention.head_count", 0, "from 1"),
        ("attention.head_count", 3, "divisor"),
        ("attention.head_count_kv", 3, "divisor"),
        ("vocab_size", 0, "from 1"),
        ("rope.dimension_count", 32, "width of a head (64)"),
    ] {
        let kind = if name == "rope.dimension_count" { Unsupported } else { InvalidModel };
        model_refused(i2s, |r| r.set(&key(name), value), kind, &[name, &value.to_string(), words]);
    }
    model_refused(
        i2s,
        |r| r.set(&key("block_count"), 1u64 << 32),
        InvalidModel,
        &["block_count", "4294967296"],
    );
    model_refused(i2s, |r| r.set(&key("block_count"), -1), InvalidModel, &["block_count` is -1"]);
    model_refused(i2s, |r| r.set(&key("block_count"), "3"), InvalidModel, &["block_count", "\"3\""]);
    model_refused(
        i2s,
        |r| r.remove(&key("embedding_length")),
        InvalidModel,
        &["embedding_length", "missing"],
    );
    model_refused(
        i2s,
        |r| r.set(&key("block_count"), 4u32),
        InvalidModel,
        &["blk.3.attn_q.weight", "missing"],
    );
    model_refused(
        i2s,
        |r| r.set(&key("block_count"), 2u32),
        InvalidModel,
        &["blk.2", "no place", "2 layers"],
    );
    model_refused(
        i2s,
        |r| r.set(&key("vocab_size"), 500u32),
        InvalidModel,
        &["token_embd.weight", "[512, 256]", "[500, 256]"],
    );
    model_refused(
        i2s,
        |r| r.set("general.architecture", "qwen2"),
        Unsupported,
        &["general.architecture", "qwen2", "bitnet-b1.58"],
    );
    model_refused(
        i2s,
        |r| r.remove("general.architecture"),
        InvalidModel,
        &["general.architecture", "missing"],
    );
    model_refused(
        i2s,
        |r| r.set(&key("hidden_activation"), "gelu"),
        Unsupported,
        &["hidden_activation", "gelu", "relu2, silu"],
    );
    model_refused(
        i2s,
        |r| r.set(&key("rope.scaling.type"), "longrope"),
        Unsupported,
        &["rope.scaling.type", "longrope", "none, linear, yarn"],
    );
    model_refused(i2s, |r| r.set(&key("rope.freq_base"), f32::NAN), InvalidModel, &["rope.freq_base", "NaN"]);
    model_refused(i2s, |r| r.set(&key("expert_count"), 8u32), Unsupported, &["expert_count"]);
    model_refused(
        i2s,
        |r| r.set("split.count", Value::U16(3)),
        InvalidModel,
        &["first of 3 parts", "-00001-of-00003.gguf"],
    );
}

#[test]
fn tensors_of_models() {
    let (i2s, tq2) = (Target::GgufI2s, Target::GgufTq2);
    let down = "blk.1.ffn_down.weight";
    for name in ["token_embd.weight", "output_norm.weight", "blk.0.attn_sub_norm.weight", down] {
        model_refused(
            i2s,
            |r| r.tensors.retain(|t| t.name != name.as_bytes()),
            InvalidModel,
            &[name, "missing"],
        );
    }
    model_refused(
        i2s,
        |r| r.tensor(down).dims = vec![256, 512],
        InvalidModel,
        &[down, "[512, 256]", "expected [256, 512]"],
    );
    model_refused(
        i2s,
        |r| r.add("blk.0.attn_q.bias", &[256], 0, vec![0; 1024]),
        Unsupported,
        &["attn_q.bias", "bias"],
    );
    model_refused(i2s, |r| r.add("mystery", &[1], 0, vec![0; 4]), InvalidModel, &["mystery", "no place"]);
    model_refused(
        i2s,
        |r| {
            let tensor = r.tensor(down);
            (tensor.kind, tensor.data) = (22, vec![0; 512 / 256 * 82 * 256]);
        },
        Unsupported,
        &[down, "IQ2_S", "expected one of: F32"],
    );
    model_refused(
        i2s,
        |r| r.tensor(down).data[77] = 0b00_11_00_01,
        InvalidModel,
        &[down, "byte 77", "0x31", "code 3"],
    );
    model_refused(tq2, |r| r.tensor(down).data[10] |= 3, InvalidModel, &[down, "code 3"]);
    for (value, shown) in
        [(0.0f32, "0.0"), (f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")]
    {
        let words = [down, "scale is", shown, "finite number other than 0"];
        let at = 256 * 512 / 4;
        model_refused(
            i2s,
            |r| r.tensor(down).data[at..at + 4].copy_from_slice(&value.to_le_bytes()),
            InvalidModel,
            &words,
        );
        let words: &[&str] =
            if value == 0.0 { &words } else { &["blk.1.ffn_down.scale", "infinite or not a number"] };
        let scale = value.to_le_bytes().to_vec();
        model_refused(tq2, |r| r.tensor("blk.1.ffn_down.scale").data = scale, InvalidModel, words);
    }
    model_refused(
        tq2,
        |r| r.tensor(down).data[64..66].copy_from_slice(&half::f16::from_f32(0.5).to_le_bytes()),
        Unsupported,
        &[down, "scale of block 1 is 1", "others have 0.5"],
    );
    model_refused(
        i2s,
        |r| r.tensor("output_norm.weight").data[4..8].copy_from_slice(&f32::NAN.to_le_bytes()),
        InvalidModel,
        &["output_norm.weight", "infinite or not a number"],
    );
    model_refused(i2s, |r| r.tensor(down).data.truncate(256 * 512 / 4), InvalidModel, &["offset"]);
}

#[test]
fn vocabularies() {
    let tokens = |raw: &Raw| -> Vec<String> {
        let file = raw.parse().unwrap();
        let list = file.array("tokenizer.ggml.tokens").unwrap().unwrap();
        list.as_strings().unwrap().map(str::to_owned).collect()
    };
    let refused = |change: &dyn Fn(&mut Raw), kind, words: &[&str]| {
        let mut raw = Raw::fixture("nano-packed", Target::GgufI2s);
        change(&mut raw);
        let error = raw.open().and_then(|c| c.tokenizer().map(|_| ())).expect_err("accepted");
        assert_says(&error, kind, words);
    };
    let set = |raw: &mut Raw, tokens: &[String]| {
        raw.set("tokenizer.ggml.tokens", Array::strings(tokens.iter().map(String::as_str)));
    };
    refused(
        &|r| {
            let mut list = tokens(r);
            list[7] = list[9].clone();
            set(r, &list);
        },
        InvalidModel,
        &["token 9", "another token"],
    );
    let short = |r: &mut Raw| r.set("tokenizer.ggml.token_type", Array::i32s(&[1; 300]));
    refused(&short, InvalidModel, &["tokenizer.ggml.token_type", "320 integers"]);
    refused(&|r| r.set("tokenizer.ggml.tokens", 5u32), InvalidModel, &["tokenizer.ggml.tokens", "an array"]);
    refused(&|r| r.remove("tokenizer.ggml.tokens"), InvalidModel, &["tokenizer.ggml.tokens", "missing"]);
    refused(&|r| r.remove("tokenizer.ggml.merges"), InvalidModel, &["tokenizer.ggml.merges", "missing"]);
    refused(&|r| r.remove("tokenizer.ggml.model"), InvalidModel, &["tokenizer.ggml.model", "missing"]);
    refused(
        &|r| r.set("tokenizer.ggml.model", "bert"),
        Unsupported,
        &["tokenizer.ggml.model", "bert", "tokenizer.json"],
    );
    refused(
        &|r| r.set("tokenizer.ggml.pre", "new-rule"),
        Unsupported,
        &["tokenizer.ggml.pre", "new-rule", "tokenizer.json"],
    );
    for (merge, shown) in [("ab", "`ab`"), ("a b c", "`a b c`"), ("q \u{fffd}", "`\u{fffd}`")] {
        refused(
            &|r| r.set("tokenizer.ggml.merges", Array::strings([merge])),
            InvalidModel,
            &["merge 0", shown],
        );
    }
    refused(&|r| r.set("tokenizer.chat_template", "{% for %}"), InvalidModel, &["template"]);
}

#[test]
fn what_llama_cpp_would_assert() {
    let check = |change: &dyn Fn(&mut Raw)| {
        let mut raw = Raw::fixture("tiny-packed", Target::GgufTq2);
        change(&mut raw);
        preflight(&raw.parse().unwrap())
    };
    check(&|_| {}).unwrap();
    let refused = |change: &dyn Fn(&mut Raw), words: &[&str]| {
        assert_says(&check(change).expect_err("accepted"), InvalidModel, words);
    };
    for (key, value, word) in [
        ("block_count", 0u32, "from 1 to 512"),
        ("block_count", 513, "from 1 to 512"),
        ("context_length", 0, "from 1"),
        ("embedding_length", 0, "from 1"),
        ("attention.head_count", 0, "at least 1"),
        ("attention.head_count_kv", 3, "divisors"),
        ("expert_count", 2000, "0 to 1024"),
        ("expert_count", 8, "expert_used_count"),
        ("expert_used_count", 1, "0 to 0"),
        ("nextn_predict_layers", 4, "0 to 3"),
        ("vocab_size", 600, "512 tokens"),
    ] {
        refused(&|r| r.set(&format!("bitnet.{key}"), value), &[&format!("bitnet.{key}")[..7], word]);
    }
    refused(&|r| r.set("bitnet.block_count", 1u64 << 32), &["bitnet.block_count", "4294967296"]);
    refused(&|r| r.set("bitnet.attention.head_count", Array::u32s(&[4, 4])), &["head_count", "one or 3"]);
    refused(&|r| r.set("bitnet.rope.scaling.type", "new"), &["rope.scaling.type", "yarn"]);
    refused(&|r| r.remove("bitnet.context_length"), &["bitnet.context_length", "missing"]);
    let duplicate = |r: &mut Raw| {
        let tokens: Vec<String> = (0..512).map(|i| format!("t{}", i % 511)).collect();
        r.set("tokenizer.ggml.tokens", Array::strings(tokens.iter().map(String::as_str)));
    };
    refused(&duplicate, &["token 511", "`t0`", "another token"]);
    refused(&|r| r.set("tokenizer.ggml.tokens", Array::strings(["a", "b"])), &["2 tokens", "expected 512"]);
    refused(&|r| r.set("tokenizer.ggml.token_type", Array::i32s(&[1; 10])), &["token_type", "512 numbers"]);
    refused(&|r| r.set("tokenizer.ggml.bos_token_id", 512u32), &["bos_token_id", "512"]);
    let error = {
        let raw = Raw::fixture("tiny-packed", Target::GgufI2s);
        preflight(&raw.parse().unwrap()).unwrap_err()
    };
    assert_says(&error, Unsupported, &["llama.cpp", "I2_S", "blk.0.attn_q.weight"]);
}

#[test]
fn parts_of_a_split_model_must_be_there() {
    let folder = tempfile::tempdir().unwrap();
    let mut raw = Raw::fixture("tiny-packed", Target::GgufTq2);
    raw.set("split.count", Value::U16(2));
    raw.set("split.no", Value::U16(0));
    let check = |raw: &Raw, name: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, raw.bytes()).unwrap();
        File::open(&path).unwrap().joined().map(|_| ())
    };
    assert_says(&check(&raw, "m.gguf").unwrap_err(), InvalidModel, &["-00001-of-00002.gguf", "m.gguf"]);
    let error = check(&raw, "m-00001-of-00002.gguf").unwrap_err();
    assert_says(&error, NotFound, &["m-00002-of-00002.gguf", "2 of 2"]);
    let mut other = small();
    other.set("split.no", Value::U16(1));
    std::fs::write(folder.path().join("m-00002-of-00002.gguf"), other.bytes()).unwrap();
    check(&raw, "m-00001-of-00002.gguf").unwrap();
    raw.set("split.tensors.count", 7u32);
    let error = check(&raw, "m-00001-of-00002.gguf").unwrap_err();
    assert_says(&error, InvalidModel, &["split.tensors.count", "7"]);
    other.tensors[0].name = b"output_norm.weight".into();
    std::fs::write(folder.path().join("m-00002-of-00002.gguf"), other.bytes()).unwrap();
    let error = check(&raw, "m-00001-of-00002.gguf").unwrap_err();
    assert_says(&error, InvalidModel, &["two parts", "output_norm.weight"]);
    raw.set("split.no", Value::U16(1));
    let error = check(&raw, "m-00001-of-00002.gguf").unwrap_err();
    assert_says(&error, InvalidModel, &["part 2 of 2", "name the first part"]);
}

#[test]
fn what_is_no_gguf_file_is_told() {
    let folder = tempfile::tempdir().unwrap();
    assert_says(&Checkpoint::open(folder.path().join("no.gguf")).unwrap_err(), NotFound, &["no.gguf"]);
    std::fs::write(folder.path().join("empty.gguf"), b"").unwrap();
    assert_says(&Checkpoint::open(folder.path().join("empty.gguf")).unwrap_err(), InvalidModel, &["empty"]);
}
