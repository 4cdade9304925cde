//! The fixtures open with the right facts, and their weights are what their files say.
#![allow(clippy::unwrap_used, reason = "a failure in a helper fails its test, as it should")]

mod common;

use std::fs;

use common::{Model, bf16, fixture};
use ternion_core::SamplingDefaults;
use ternion_formats::{Activation, Checkpoint, Family, RopeScaling, ScaleUse, TernaryTensor, Weights};

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(fixture(name)).unwrap()
}

fn ternary(weights: &Weights) -> &TernaryTensor {
    match weights {
        Weights::Ternary(tensor) => tensor,
        _ => panic!("dense, expected ternary"),
    }
}

#[test]
fn packed_bitnet() {
    let checkpoint = open("nano-packed");
    let spec = &checkpoint.spec;
    assert_eq!((spec.architecture.as_str(), spec.family), ("bitnet", Family::BitNet));
    assert_eq!((spec.hidden_size, spec.intermediate_size, spec.layers), (128, 256, 2));
    assert_eq!((spec.heads, spec.kv_heads, spec.head_dim, spec.heads / spec.kv_heads), (2, 1, 64, 2));
    assert_eq!((spec.vocab_size, spec.context_length, spec.rms_eps), (320, 4096, 1e-5));
    assert_eq!((spec.rope.theta, &spec.rope.scaling), (500_000.0, &RopeScaling::None));
    assert_eq!((spec.activation, spec.sub_norms, spec.tied), (Activation::Relu2, true, true));
    assert_eq!((spec.bos, spec.eos.as_slice()), (Some(304), &[305, 313][..]));
    let quantization = spec.quantization.as_ref().unwrap();
    assert_eq!((quantization.scale_use, quantization.online), (ScaleUse::Multiplies, false));
    assert_eq!(spec.kv_bytes_per_token(), 2 * 2 * 64 * 4);
    assert_eq!((checkpoint.sampling.temperature, checkpoint.sampling.top_p), (0.6, 0.9));
    assert_eq!(checkpoint.format, "safetensors (packed 1.58-bit)");
    assert_eq!(checkpoint.name, "nano-packed");

    assert_eq!(checkpoint.layers.len(), 2);
    assert!(checkpoint.head.is_none());
    assert!(checkpoint.embed.is_mapped());
    assert_eq!((checkpoint.embed.type_name(), checkpoint.embed.shape()), ("BF16", [320, 128]));
    for layer in &checkpoint.layers {
        for linear in layer.linears() {
            let tensor = ternary(&linear.weights);
            assert!(tensor.codes.is_mapped(), "{} was copied", linear.name);
            assert_eq!(tensor.codes.len(), tensor.rows / 4 * tensor.cols);
            assert!(linear.input_norm.is_none());
        }
        assert_eq!((layer.q.rows(), layer.k.rows(), layer.gate.rows()), (128, 64, 256));
        assert_eq!((layer.down.rows(), layer.down.cols()), (128, 256));
        assert_eq!(layer.attn_sub_norm.as_ref().unwrap().weight.len(), 128);
        assert_eq!(layer.ffn_sub_norm.as_ref().unwrap().weight.len(), 256);
    }
}

/// The packed fixture was made of the masters, with scales rounded to bf16: the same trits must come out.
#[test]
fn masters_quantise_to_the_packed_codes() {
    let (master, packed) = (open("nano-master"), open("nano-packed"));
    assert_eq!(master.format, "safetensors (bf16 masters, quantised at load)");
    assert!(master.spec.quantization.as_ref().unwrap().online);
    for (a, b) in master.layers.iter().zip(&packed.layers) {
        for (a, b) in a.linears().into_iter().zip(b.linears()) {
            let (quantised, stored) = (ternary(&a.weights), ternary(&b.weights));
            assert_eq!(a.name, b.name);
            assert!(quantised.codes[..] == stored.codes[..], "{}", a.name);
            assert!(!quantised.codes.is_mapped());
            assert!((quantised.scale / stored.scale - 1.0).abs() < 1.0 / 256.0, "{}", a.name);
        }
    }
}

/// transformers unpacks the codes when it loads them, and saves the trits as floats beside their scales.
#[test]
fn trits_stored_as_floats_are_packed_again() {
    let mut model = Model::fixture("nano-packed");
    for tensor in model.tensors.iter_mut().filter(|t| t.name.ends_with("_proj.weight")) {
        let trits = (0..4).flat_map(|i| tensor.bytes.iter().map(move |b| f32::from(b >> (2 * i) & 3) - 1.0));
        let trits: Vec<f32> = trits.collect();
        (tensor.dtype, tensor.shape[0]) = ("BF16".into(), 4 * tensor.shape[0]);
        tensor.bytes = bf16(&trits);
    }
    let (floats, packed) = (Checkpoint::open(model.write().path()).unwrap(), open("nano-packed"));
    for (a, b) in floats.layers.iter().zip(&packed.layers) {
        for (a, b) in a.linears().into_iter().zip(b.linears()) {
            let (a, b) = (ternary(&a.weights), ternary(&b.weights));
            assert!(a.codes[..] == b.codes[..] && a.scale == b.scale);
        }
    }
}

#[test]
fn llama_divides_by_the_scale() {
    let checkpoint = open("llama-ternary");
    let spec = &checkpoint.spec;
    assert_eq!((spec.family, spec.activation, spec.sub_norms), (Family::Llama, Activation::Silu, false));
    assert_eq!((spec.bos, spec.eos.as_slice(), spec.tied), (Some(496), &[505][..], false));
    assert_eq!(spec.quantization.as_ref().unwrap().scale_use, ScaleUse::Divides);
    assert_eq!(checkpoint.sampling, SamplingDefaults::default(), "no `do_sample` is greedy");
    assert_eq!(checkpoint.head.as_ref().unwrap().shape(), [512, 256]);
    assert!(checkpoint.layers.iter().all(|l| l.attn_sub_norm.is_none() && l.ffn_sub_norm.is_none()));

    let mut file = Model::fixture("llama-ternary");
    let stored = &file.tensor("model.layers.1.mlp.up_proj.weight_scale").bytes;
    let stored = half::bf16::from_le_bytes([stored[0], stored[1]]).to_f32();
    assert_eq!(ternary(&checkpoint.layers[1].up.weights).scale, 1.0 / stored);
}

#[test]
fn one_bit_llm_under_its_own_names() {
    let checkpoint = open("1bitllm");
    let spec = &checkpoint.spec;
    assert_eq!((spec.family, spec.activation), (Family::OneBitLlm, Activation::Silu));
    assert_eq!((spec.rope.theta, spec.context_length), (10_000.0, 2048));
    assert_eq!(checkpoint.format, "safetensors (f32 masters, quantised at load)");
    assert!(checkpoint.layers.iter().all(|l| l.attn_sub_norm.is_some() && l.ffn_sub_norm.is_some()));
    assert!(matches!(checkpoint.layers[0].q.weights, Weights::Ternary(_)));
}

#[test]
fn tiny_opens_and_its_tokenizer_too() {
    let checkpoint = open("tiny-packed");
    assert_eq!((checkpoint.spec.layers, checkpoint.spec.heads, checkpoint.spec.vocab_size), (3, 4, 512));
    let tokenizer = checkpoint.tokenizer().unwrap();
    let ids = tokenizer.encode("How many days?", true).unwrap();
    assert_eq!(ids[0], 496);
    assert_eq!(tokenizer.decode(&ids[1..], true).unwrap(), "How many days?");
}

#[test]
fn a_file_and_an_index_open_like_the_folder() {
    let by_file = Checkpoint::open(fixture("nano-packed").join("model.safetensors")).unwrap();
    assert_eq!(by_file.spec, open("nano-packed").spec);
    assert_eq!(by_file.name, "nano-packed");

    let model = Model::fixture("nano-packed");
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = model.tensors.split_at(model.tensors.len() / 2);
    let mut map = serde_json::Map::new();
    for (shard, tensors) in [("a.safetensors", first), ("b.safetensors", second)] {
        fs::write(folder.path().join(shard), common::container(tensors)).unwrap();
        map.extend(tensors.iter().map(|t| (t.name.clone(), shard.into())));
    }
    fs::write(folder.path().join("config.json"), model.config.to_string()).unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    fs::write(&index, serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string())
        .unwrap();
    for path in [folder.path(), index.as_path()] {
        let sharded = Checkpoint::open(path).unwrap();
        assert_eq!(sharded.files.len(), 2);
        // No generation_config.json here: the configuration's own token ends an answer.
        assert_eq!(sharded.spec.eos, [305]);
        for (a, b) in sharded.layers.iter().zip(&by_file.layers) {
            assert!(
                a.linears()
                    .iter()
                    .zip(b.linears())
                    .all(|(a, b)| a.bytes().unwrap()[..] == b.bytes().unwrap()[..])
            );
        }
    }
}

#[test]
fn progress_ends_at_the_total() {
    let mut seen = Vec::new();
    Checkpoint::open_with(fixture("nano-packed"), &mut |done, total| seen.push((done, total))).unwrap();
    assert!(seen.len() >= 2 && seen.windows(2).all(|w| w[0].0 <= w[1].0), "{seen:?}");
    let (done, total) = seen[seen.len() - 1];
    assert_eq!(done, total);
}

#[test]
fn the_report_adds_up() {
    let report = open("nano-packed").report();
    let ternary: u64 = 2 * (128 * 128 * 2 + 64 * 128 * 2 + 3 * 128 * 256);
    let norms: u64 = 2 * (128 * 3 + 256) + 128;
    assert_eq!(report.ternary_parameters, ternary);
    assert_eq!(report.parameters, ternary + norms + 320 * 128);
    assert_eq!((report.mapped_bytes, report.owned_bytes), (ternary / 4 + 320 * 128 * 2, 4 * norms));
    assert_eq!(report.tensors.len(), 1 + 2 * 11 + 1);
    let down = report.tensors.iter().find(|t| t.name == "model.layers.1.mlp.down_proj").unwrap();
    assert_eq!((down.dtype, down.bytes, down.scale.is_some()), ("2-bit", 128 * 256 / 4, true));
    assert!(serde_json::to_value(&report).unwrap()["tensors"][0]["mapped"].as_bool().unwrap());
}

#[test]
fn modules_that_are_not_converted_stay_dense() {
    let mut model = Model::fixture("nano-packed");
    let name = "model.layers.0.mlp.down_proj";
    model.config["quantization_config"]["modules_to_not_convert"] =
        serde_json::json!(["lm_head", "model.layers.0.mlp.down_proj.*"]);
    model.remove(&format!("{name}.weight_scale"));
    let weight = model.tensor(&format!("{name}.weight"));
    (weight.dtype, weight.shape) = ("BF16".into(), vec![128, 256]);
    weight.bytes = bf16(&vec![0.25; 128 * 256]);
    let folder = model.write();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let Weights::Dense(dense) = &checkpoint.layers[0].down.weights else { panic!("ternary") };
    assert_eq!((dense.shape.as_slice(), dense.to_f32()[77]), (&[128, 256][..], 0.25));
    assert!(matches!(checkpoint.layers[1].down.weights, Weights::Ternary(_)));
}

#[test]
fn projections_may_have_input_norms() {
    let mut model = Model::fixture("nano-packed");
    model.config["quantization_config"]["use_rms_norm"] = true.into();
    model.config["quantization_config"]["rms_norm_eps"] = 1e-3.into();
    let weights: Vec<(String, usize)> = model
        .tensors
        .iter()
        .filter(|t| t.name.ends_with("_proj.weight"))
        .map(|t| (t.name.replace("weight", "rms_norm.weight"), t.shape[1]))
        .collect();
    for (name, width) in &weights {
        model.add(name, "BF16", &[*width], bf16(&vec![1.5; *width]));
    }
    let folder = model.write();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let norm = checkpoint.layers[1].down.input_norm.as_ref().unwrap();
    assert_eq!((norm.weight.as_slice(), norm.eps), (&[1.5; 256][..], 1e-3));
}

#[test]
fn a_llama_without_quantization_is_dense() {
    let mut model = Model::fixture("nano-master");
    model.config["model_type"] = "llama".into();
    model.config["hidden_act"] = "silu".into();
    model.config.as_object_mut().unwrap().remove("quantization_config");
    model.tensors.retain(|t| !t.name.contains("sub_norm"));
    let folder = model.write();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.format, "safetensors (bf16, dense)");
    assert!(checkpoint.layers[0].linears().iter().all(|l| matches!(l.weights, Weights::Dense(_))));
}

#[test]
fn a_tied_head_in_the_file_counts_unless_it_is_a_copy() {
    let mut model = Model::fixture("nano-packed");
    let mut head = model.tensor("model.embed_tokens.weight").clone();
    head.name = "lm_head.weight".into();
    model.tensors.push(head);
    assert!(Checkpoint::open(model.write().path()).unwrap().head.is_none());
    model.tensor("lm_head.weight").bytes[0] ^= 1;
    assert!(Checkpoint::open(model.write().path()).unwrap().head.is_some());
}

#[test]
fn rope_in_all_its_spellings() {
    let spec = |change: serde_json::Value| {
        let mut model = Model::fixture("nano-packed");
        let config = model.config.as_object_mut().unwrap();
        config.remove("rope_theta");
        config.extend(change.as_object().unwrap().clone());
        Checkpoint::open(model.write().path()).unwrap().spec.rope
    };
    assert_eq!(spec(serde_json::json!({})).theta, 500_000.0);
    let new = spec(
        serde_json::json!({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}}),
    );
    assert_eq!((new.theta, new.scaling), (1e6, RopeScaling::Linear { factor: 4.0 }));
    let old = spec(serde_json::json!({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}}));
    assert_eq!((old.theta, old.scaling), (1e4, RopeScaling::Linear { factor: 2.0 }));
    let llama3 = serde_json::json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192,
    };
    assert_eq!(spec(serde_json::json!({ "rope_scaling": llama3 })).scaling, expected);
    assert_eq!(
        spec(serde_json::json!({"rope_parameters": {"rope_type": "default"}})).scaling,
        RopeScaling::None
    );
}
