//! Facts that GGUF files do not state: they follow from the signs in the file, contradictions are warned of, and options
//! decide.
#![allow(clippy::unwrap_used, reason = "a failure in a helper fails its test, as it should")]

mod common;

use common::gguf::Raw;
use common::{assert_says, trits};
use ternion_core::ErrorKind::{InvalidConfig, InvalidModel};
use ternion_core::Result;
use ternion_formats::convert::Target;
use ternion_formats::{Activation, Checkpoint, CheckpointOptions, Family, I2sLayout, LayerTensors, Weights};

const F32: u32 = 0;
const F16: u32 = 1;
const Q8_0: u32 = 8;
const BF16: u32 = 30;

/// What llama.cpp's converter writes of a 2B4T: the architecture `bitnet` and no activation.
fn bitnet() -> Raw {
    let mut raw = Raw::fixture("nano-packed", Target::GgufI2s);
    for (key, _, _) in &mut raw.pairs {
        let text = String::from_utf8(key.clone()).unwrap();
        *key = text.replace("bitnet-b1.58.", "bitnet.").into_bytes();
    }
    raw.set("general.architecture", "bitnet");
    raw.set("general.name", "model");
    raw.remove("bitnet.hidden_activation");
    raw.remove("ternion.version");
    raw
}

/// The same with the signs of 1bitLLM's models. Keys and values have a head for each head of queries.
fn one_bit_llm() -> Raw {
    let mut raw = bitnet();
    raw.set("bitnet.rope.freq_base", 10_000f32);
    raw.set("tokenizer.ggml.model", "llama");
    raw.set("bitnet.attention.head_count_kv", 2u32);
    for part in ["attn_k", "attn_v"] {
        for layer in 0..2 {
            let q = raw.tensor(&format!("blk.{layer}.attn_q.weight")).clone();
            let tensor = raw.tensor(&format!("blk.{layer}.{part}.weight"));
            (tensor.dims, tensor.data) = (q.dims, q.data);
        }
    }
    raw
}

fn open(raw: &Raw, options: &CheckpointOptions) -> Result<Checkpoint> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    std::fs::write(&path, raw.bytes()).unwrap();
    options.open(&path, &mut |_, _| {})
}

fn linears(checkpoint: &Checkpoint) -> Vec<(Vec<i8>, f32)> {
    let linears = checkpoint.layers.iter().flat_map(LayerTensors::linears);
    let ternary = linears.map(|linear| match &linear.weights {
        Weights::Ternary(tensor) => (trits(tensor), tensor.scale),
        _ => panic!("{} is dense", linear.name),
    });
    ternary.collect()
}

/// The only warning, which names the option.
#[track_caller]
fn warning<'a>(checkpoint: &'a Checkpoint, option: &str) -> &'a str {
    let [warning] = &checkpoint.warnings[..] else { panic!("warnings: {:?}", checkpoint.warnings) };
    assert!(warning.contains(&format!("`{option}`")), "{warning}");
    warning
}

#[test]
fn signs_that_agree_give_the_activation() {
    for (raw, expected, family) in
        [(bitnet(), Activation::Relu2, Family::BitNet), (one_bit_llm(), Activation::Silu, Family::OneBitLlm)]
    {
        let checkpoint = raw.open().unwrap();
        assert_eq!((checkpoint.spec.activation, checkpoint.spec.family), (expected, family));
        assert_eq!(checkpoint.warnings, [""; 0]);
        let assumed = checkpoint.assumptions.iter().find(|a| a.starts_with("activation")).unwrap();
        assert!(assumed.contains(&expected.to_string()) && assumed.contains("the rotary base"), "{assumed}");
    }
}

#[test]
fn signs_that_disagree_are_weighed_and_warned_of() {
    type Change = fn(&mut Raw);
    let changes: [(Raw, Change, Activation); 5] = [
        (bitnet(), |raw| raw.set("bitnet.rope.freq_base", 10_000f32), Activation::Relu2),
        (bitnet(), |raw| raw.set("tokenizer.ggml.model", "llama"), Activation::Relu2),
        (bitnet(), |raw| raw.set("general.name", "bitnet_b1_58-3B"), Activation::Relu2),
        (one_bit_llm(), |raw| raw.set("bitnet.rope.freq_base", 500_000f32), Activation::Silu),
        (one_bit_llm(), |raw| raw.set("general.base_model.0.name", "Bitnet B1.58 2B 4T"), Activation::Silu),
    ];
    for (mut raw, change, expected) in changes {
        change(&mut raw);
        let checkpoint = raw.open().unwrap();
        assert_eq!(checkpoint.spec.activation, expected, "{:?}", checkpoint.warnings);
        let warning = warning(&checkpoint, "activation");
        assert!(
            warning.contains("disagree") && warning.contains(&format!("{expected} is used")),
            "{warning}"
        );
    }
}

#[test]
fn a_file_of_1bitllm_may_have_the_official_files_architecture() {
    // Later converters of bitnet.cpp write both kinds so.
    let mut raw = one_bit_llm();
    for (key, _, _) in &mut raw.pairs {
        let text = String::from_utf8(key.clone()).unwrap();
        *key = text.replace("bitnet.", "bitnet-b1.58.").into_bytes();
    }
    raw.set("general.architecture", "bitnet-b1.58");
    let checkpoint = raw.open().unwrap();
    assert_eq!(checkpoint.spec.activation, Activation::Silu);
    assert!(warning(&checkpoint, "activation").contains("the architecture bitnet-b1.58"));
}

#[test]
fn the_option_decides_the_activation_without_a_warning() {
    for activation in [Activation::Relu2, Activation::Silu] {
        let options = CheckpointOptions::default().with_activation(activation);
        let mut raw = bitnet();
        raw.set("bitnet.rope.freq_base", 10_000f32);
        let checkpoint = open(&raw, &options).unwrap();
        assert_eq!((checkpoint.spec.activation, &checkpoint.warnings[..]), (activation, &[][..]));
        raw.set("bitnet.hidden_activation", "silu");
        assert_eq!(open(&raw, &options).unwrap().spec.activation, activation, "even over the file");
    }
}

#[test]
fn sub_norms_are_where_their_tensors_are() {
    let without = |mut raw: Raw| {
        raw.tensors.retain(|t| !t.name.ends_with(b"_sub_norm.weight"));
        raw
    };
    // llama.cpp refuses such a file too.
    let error = without(bitnet()).open_error();
    assert_says(&error, InvalidModel, &["`sub_norms` to false", "blk.0.attn_sub_norm.weight"]);
    let off = CheckpointOptions::default().with_sub_norms(false);
    for raw in [bitnet(), without(bitnet())] {
        let checkpoint = open(&raw, &off).unwrap();
        assert!(!checkpoint.spec.sub_norms && checkpoint.layers[0].attn_sub_norm.is_none());
        assert_eq!(checkpoint.spec.activation, Activation::Relu2);
    }

    let mut llama = Raw::fixture("llama-ternary", Target::GgufTq2);
    let on = CheckpointOptions::default().with_sub_norms(true);
    assert_says(&open(&llama, &on).unwrap_err(), InvalidModel, &["the sub-norm is missing", "blk.0"]);
    let widths = |checkpoint: &Checkpoint| (checkpoint.spec.layers, checkpoint.spec.intermediate_size);
    let plain = llama.open().unwrap();
    let (layers, inner) = widths(&plain);
    for layer in 0..layers {
        for (name, width) in [("attn_sub_norm", 256), ("ffn_sub_norm", inner)] {
            let ones = std::iter::repeat_n(1f32.to_le_bytes(), width).flatten().collect();
            llama.add(&format!("blk.{layer}.{name}.weight"), &[width as u64], F32, ones);
        }
    }
    let checkpoint = llama.open().unwrap();
    assert!(checkpoint.spec.sub_norms && checkpoint.layers[0].ffn_sub_norm.is_some());
    assert!(
        checkpoint.warnings.iter().any(|w| w.contains("`sub_norms` decides")),
        "{:?}",
        checkpoint.warnings
    );
    assert_eq!(linears(&checkpoint), linears(&plain), "rows of queries and keys are in the same order");
    assert!(!open(&llama, &off).unwrap().spec.sub_norms);
}

#[test]
fn a_rotary_base_that_is_missing_is_that_of_transformers() {
    let mut raw = bitnet();
    raw.remove("bitnet.rope.freq_base");
    let checkpoint = raw.open().unwrap();
    assert_eq!(checkpoint.spec.rope.theta, 500_000.0);
    assert!(warning(&checkpoint, "rope_theta").contains("llama.cpp takes 10000"));
    let checkpoint = open(&raw, &CheckpointOptions::default().with_rope_theta(7e4)).unwrap();
    assert_eq!((checkpoint.spec.rope.theta, &checkpoint.warnings[..]), (7e4, &[][..]));
    let error = open(&raw, &CheckpointOptions::default().with_rope_theta(0.0)).unwrap_err();
    assert_says(&error, InvalidConfig, &["rope_theta", "0 is out of range"]);

    let mut llama = Raw::fixture("llama-ternary", Target::GgufTq2);
    llama.remove("llama.rope.freq_base");
    let checkpoint = llama.open().unwrap();
    assert_eq!((checkpoint.spec.rope.theta, &checkpoint.warnings[..]), (10_000.0, &[][..]));
    assert!(checkpoint.assumptions[0].contains("llama.rope.freq_base"), "{:?}", checkpoint.assumptions);
}

#[test]
fn heads_for_keys_and_values_follow_from_the_tensor() {
    let mut raw = bitnet();
    let expected = raw.open().unwrap().spec.kv_heads;
    raw.remove("bitnet.attention.head_count_kv");
    let checkpoint = raw.open().unwrap();
    assert_eq!((checkpoint.spec.kv_heads, expected), (1, 1));
}

/// The file with its projections as floats, of each weight times the scale.
fn floats(mut raw: Raw, kind: u32, weight: impl Fn(i8, f32) -> f32) -> Raw {
    let checkpoint = raw.open().unwrap();
    let names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
    for (layer, tensors) in checkpoint.layers.iter().enumerate() {
        for (name, linear) in names.iter().zip(tensors.linears()) {
            let Weights::Ternary(ternary) = &linear.weights else { panic!("dense") };
            let values: Vec<f32> = trits(ternary).iter().map(|&trit| weight(trit, ternary.scale)).collect();
            let tensor = raw.tensor(&format!("blk.{layer}.{name}.weight"));
            tensor.kind = kind;
            tensor.data = match kind {
                F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
                F16 => values.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
                BF16 => values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
                _ => values.chunks_exact(32).flat_map(q8_0).collect(),
            };
        }
    }
    raw
}

/// A block as ggml quantises it.
fn q8_0(values: &[f32]) -> Vec<u8> {
    let scale = values.iter().fold(0f32, |max, x| max.max(x.abs())) / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let codes = values.iter().map(|x| (x * inverse).round() as i8 as u8);
    half::f16::from_f32(scale).to_le_bytes().into_iter().chain(codes).collect()
}

#[test]
fn float_projections_of_a_bitnet_are_ternary() {
    let expected = linears(&bitnet().open().unwrap());
    for kind in [F32, F16, BF16, Q8_0] {
        let checkpoint = floats(bitnet(), kind, |trit, scale| f32::from(trit) * scale).open().unwrap();
        assert!(checkpoint.format.contains("quantised at load"), "{}", checkpoint.format);
        assert!(checkpoint.spec.quantization.as_ref().unwrap().online);
        assert!(checkpoint.assumptions.iter().any(|a| a.contains("of one absolute value")));
        for (found, expected) in linears(&checkpoint).iter().zip(&expected) {
            assert_eq!(found.0, expected.0, "type {kind}");
            let (found, expected) = (found.1, expected.1);
            assert!((found - expected).abs() <= expected / 200.0, "type {kind}: {found}, not {expected}");
        }
    }
}

#[test]
fn masters_are_quantised_by_their_mean() {
    // A zero is a fifth of the scale, what is more is between a half and twice of it.
    let master = |trit: i8, scale: f32| if trit == 0 { 0.2 * scale } else { f32::from(trit) * scale };
    let expected = linears(&bitnet().open().unwrap());
    let checkpoint = floats(bitnet(), F16, master).open().unwrap();
    assert!(checkpoint.assumptions.iter().any(|a| a.contains("taken as masters")));
    for (found, expected) in linears(&checkpoint).iter().zip(&expected) {
        assert_eq!(found.0, expected.0);
        let mean =
            expected.0.iter().map(|&t| master(t, expected.1).abs()).sum::<f32>() / expected.0.len() as f32;
        assert!((found.1 - mean).abs() < mean / 500.0, "{} is not the mean {mean}", found.1);
    }
}

#[test]
fn what_is_no_bitnet_or_holds_other_values_stays_dense() {
    let half = |trit: i8, scale: f32| if trit == 0 { 0.2 * scale } else { f32::from(trit) * scale };
    let checkpoint = floats(bitnet(), Q8_0, half).open().unwrap();
    assert!(checkpoint.layers[0].linears().iter().all(|l| matches!(l.weights, Weights::Dense(_))));
    assert!(checkpoint.warnings[0].contains("Q8_0") && checkpoint.warnings[0].contains("inputs floats"));
    assert_eq!(checkpoint.spec.quantization, None);

    let llama = floats(Raw::fixture("llama-ternary", Target::GgufI2s), F32, |trit, s| f32::from(trit) * s);
    let checkpoint = llama.open();
    assert!(matches!(checkpoint.unwrap().layers[0].q.weights, Weights::Dense(_)));
}

/// Repacks all I2_S tensors as `quantize_i2_s` of bitnet.cpp does it in its other builds.
fn repack(raw: &mut Raw, layout: I2sLayout) {
    let checkpoint = raw.open().unwrap();
    let names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
    for (layer, tensors) in checkpoint.layers.iter().enumerate() {
        for (name, linear) in names.iter().zip(tensors.linears()) {
            let Weights::Ternary(ternary) = &linear.weights else { panic!("dense") };
            let codes: Vec<u8> = trits(ternary).iter().map(|t| (t + 1) as u8).collect();
            let tensor = raw.tensor(&format!("blk.{layer}.{name}.weight"));
            tensor.data[..codes.len() / 4].copy_from_slice(&packed(&codes, ternary.cols, layout));
        }
    }
}

fn packed(codes: &[u8], cols: usize, layout: I2sLayout) -> Vec<u8> {
    let mut out = vec![0; codes.len() / 4];
    for (i, code) in codes.iter().enumerate() {
        let (row, col) = (i / cols, i % cols);
        let (byte, field) = match layout {
            I2sLayout::Arm => (i / 64 * 16 + i % 16, i % 64 / 16),
            I2sLayout::X86FourRows => (row / 4 * cols + col, row % 4),
            _ => (i / 128 * 32 + i % 32, i % 128 / 32),
        };
        out[byte] |= code << (6 - 2 * field);
    }
    out
}

#[test]
fn i2s_of_other_builds_is_read_by_option() {
    let expected = linears(&bitnet().open().unwrap());
    for layout in I2sLayout::ALL {
        let mut raw = bitnet();
        repack(&mut raw, layout);
        let checkpoint = open(&raw, &CheckpointOptions::default().with_i2s_layout(layout)).unwrap();
        assert_eq!(linears(&checkpoint), expected, "{layout:?}");
        assert!(checkpoint.assumptions.iter().all(|a| !a.contains("I2_S")));
        let unset = raw.open().unwrap();
        assert_eq!(linears(&unset) == expected, layout == I2sLayout::X86, "the file does not tell");
        assert!(unset.assumptions.iter().any(|a| a.contains("`i2s_layout` = `arm`")));
    }
    // Rows of the Llama architecture are in another order beside that.
    let mut llama = Raw::fixture("llama-ternary", Target::GgufI2s);
    let expected = linears(&llama.open().unwrap());
    let checkpoint = llama.open().unwrap();
    for (layer, tensors) in checkpoint.layers.iter().enumerate() {
        let tensor = llama.tensor(&format!("blk.{layer}.attn_q.weight"));
        let cols = tensors.q.cols();
        let codes = tensor.data.len() - 32;
        // From the file's own bytes, so that the order of its rows stays.
        let unpacked: Vec<u8> = (0..codes * 4)
            .map(|i| tensor.data[i / 128 * 32 + i % 32] >> (6 - 2 * (i % 128 / 32)) & 3)
            .collect();
        tensor.data[..codes].copy_from_slice(&packed(&unpacked, cols, I2sLayout::Arm));
        for part in ["attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"] {
            let tensor = llama.tensor(&format!("blk.{layer}.{part}.weight"));
            let (codes, cols) = (tensor.data.len() - 32, tensor.dims[0] as usize);
            let unpacked: Vec<u8> = (0..codes * 4)
                .map(|i| tensor.data[i / 128 * 32 + i % 32] >> (6 - 2 * (i % 128 / 32)) & 3)
                .collect();
            tensor.data[..codes].copy_from_slice(&packed(&unpacked, cols, I2sLayout::Arm));
        }
    }
    let arm = CheckpointOptions::default().with_i2s_layout(I2sLayout::Arm);
    assert_eq!(linears(&open(&llama, &arm).unwrap()), expected);
}

#[test]
fn rows_of_64_weights_are_those_of_arm() {
    // The first 192 columns of the hidden state's 256 in `ffn_down`, that is a feed-forward width of 192.
    let mut raw = bitnet();
    let original = raw.open().unwrap();
    raw.set("bitnet.feed_forward_length", 192u32);
    for layer in 0..2 {
        for part in ["ffn_gate", "ffn_up"] {
            let tensor = raw.tensor(&format!("blk.{layer}.{part}.weight"));
            let scale = tensor.data[tensor.data.len() - 32..].to_vec();
            tensor.dims[1] = 192;
            tensor.data.truncate(192 * 128 / 4);
            tensor.data.extend(scale);
        }
        let norm = raw.tensor(&format!("blk.{layer}.ffn_sub_norm.weight"));
        norm.dims = vec![192];
        norm.data.truncate(192 * 4);
        let Weights::Ternary(down) = &original.layers[layer].down.weights else { panic!("dense") };
        let codes: Vec<u8> =
            trits(down).chunks_exact(256).flat_map(|row| row[..192].iter().map(|t| (t + 1) as u8)).collect();
        let tensor = raw.tensor(&format!("blk.{layer}.ffn_down.weight"));
        let scale = tensor.data[tensor.data.len() - 32..].to_vec();
        tensor.dims[0] = 192;
        tensor.data = packed(&codes, 192, I2sLayout::Arm);
        tensor.data.extend(scale);
    }
    let error = raw.open_error();
    assert_says(&error, InvalidModel, &["192 elements", "`i2s_layout` to `arm`", "ffn_down"]);
    // The other tensors are read as ARM's as well, and are not: only `ffn_down` is looked at.
    let checkpoint = open(&raw, &CheckpointOptions::default().with_i2s_layout(I2sLayout::Arm)).unwrap();
    let Weights::Ternary(down) = &checkpoint.layers[1].down.weights else { panic!("dense") };
    let Weights::Ternary(whole) = &original.layers[1].down.weights else { panic!("dense") };
    let expected: Vec<i8> = trits(whole).chunks_exact(256).flat_map(|row| row[..192].to_vec()).collect();
    assert_eq!(trits(down), expected);
}

#[test]
fn sampling_of_a_file_is_completed_as_by_transformers() {
    let mut raw = bitnet();
    for key in ["temp", "top_k", "top_p", "min_p"] {
        raw.remove(&format!("general.sampling.{key}"));
    }
    assert_eq!(raw.open().unwrap().sampling.temperature, 0.0);
    raw.set("general.sampling.top_p", 0.9f32);
    let checkpoint = raw.open().unwrap();
    assert_eq!(checkpoint.sampling.temperature, 0.0);
    assert!(warning(&checkpoint, "sampling.temperature").contains("greedy"));
    raw.set("general.sampling.temp", 0.6f32);
    let sampling = raw.open().unwrap().sampling;
    assert_eq!((sampling.temperature, sampling.top_k, sampling.top_p), (0.6, 50, 0.9));
    for (top_k, expected) in [(0, 0), (-1, 0), (7, 7)] {
        raw.set("general.sampling.top_k", top_k);
        assert_eq!(raw.open().unwrap().sampling.top_k, expected);
    }
    raw.set("general.sampling.xtc_probability", 0f32);
    assert_eq!(raw.open().unwrap().warnings, [""; 0]);
    raw.set("general.sampling.xtc_probability", 0.5f32);
    assert!(raw.open().unwrap().warnings[0].contains("xtc_probability"));
    raw.set("general.sampling.top_p", 0f32);
    assert_eq!(raw.open().unwrap().sampling.top_p, f32::MIN_POSITIVE, "the best token alone");
}
