//! Tensors that are missing, superfluous, misshapen or hold what they may not.
#![allow(clippy::unwrap_used, reason = "a failure in a helper fails its test, as it should")]

mod common;

use std::fs;

use common::{Model, assert_says, bf16, open_error};
use serde_json::json;
use ternion_core::ErrorKind::{InvalidModel, NotFound, Unsupported};

const DOWN: &str = "model.layers.1.mlp.down_proj.weight";
const SCALE: &str = "model.layers.0.self_attn.q_proj.weight_scale";

/// The error of a fixture after a change.
#[track_caller]
fn broken(fixture: &str, change: impl FnOnce(&mut Model)) -> ternion_core::Error {
    let mut model = Model::fixture(fixture);
    change(&mut model);
    model.error()
}

#[test]
fn a_missing_tensor_is_named() {
    for name in [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.self_attn.attn_sub_norm.weight",
        "model.layers.1.mlp.ffn_sub_norm.weight",
        DOWN,
        SCALE,
    ] {
        let error = broken("nano-packed", |m| drop(m.remove(name)));
        assert_says(&error, InvalidModel, &["missing", name, "model.safetensors"]);
    }
    let error = broken("llama-ternary", |m| drop(m.remove("lm_head.weight")));
    assert_says(&error, InvalidModel, &["missing", "lm_head.weight"]);
}

#[test]
fn a_wrong_shape_is_shown_with_the_right_one() {
    let error = broken("nano-packed", |m| m.tensor(DOWN).shape = vec![64, 128]);
    assert_says(&error, InvalidModel, &[DOWN, "[64, 128]", "expected [32, 256]", "model.safetensors"]);
    let error = broken("nano-packed", |m| m.tensor("model.embed_tokens.weight").shape = vec![128, 320]);
    assert_says(&error, InvalidModel, &["embed_tokens", "[128, 320]", "expected [320, 128]"]);
    let error = broken("nano-packed", |m| m.config["vocab_size"] = 321.into());
    assert_says(&error, InvalidModel, &["embed_tokens", "[320, 128]", "expected [321, 128]"]);
    let error = broken("nano-packed", |m| m.config["num_hidden_layers"] = 3.into());
    assert_says(&error, InvalidModel, &["model.layers.2.input_layernorm.weight", "missing"]);
    let error = broken("nano-packed", |m| m.config["num_hidden_layers"] = 1.into());
    assert_says(&error, InvalidModel, &["model.layers.1", "no place", "1 layers"]);
}

#[test]
fn a_huge_model_with_small_files_fails_before_anything_is_allocated() {
    let error = broken("nano-packed", |m| {
        for key in ["hidden_size", "intermediate_size"] {
            m.config[key] = (1 << 20).into();
        }
        m.config["num_hidden_layers"] = 1024.into();
    });
    assert_says(&error, InvalidModel, &["model.embed_tokens.weight", "[320, 128]", "1048576"]);
}

#[test]
fn code_three_is_found_wherever_it_is() {
    for (at, code) in [(0, 0b11), (4095, 0b1100), (8191, 0b1100_0000)] {
        let error = broken("nano-packed", |m| m.tensor(DOWN).bytes[at] = code);
        assert_says(
            &error,
            InvalidModel,
            &[DOWN, &format!("byte {at} is {code:#04x}"), "code 3", "0, 1 and 2"],
        );
    }
}

#[test]
fn a_scale_is_one_finite_number_other_than_zero() {
    for (value, shown) in [(0.0, "0.0"), (f32::NAN, "NaN"), (f32::INFINITY, "inf"), (-0.0, "-0.0")] {
        for fixture in ["nano-packed", "llama-ternary"] {
            let error = broken(fixture, |m| m.tensor(SCALE).bytes = bf16(&[value]));
            assert_says(&error, InvalidModel, &[SCALE, &format!("is {shown}"), "finite number other than 0"]);
        }
    }
    let error = broken("llama-ternary", |m| {
        let scale = m.tensor(SCALE);
        (scale.dtype, scale.bytes) = ("F32".into(), 1e-45f32.to_le_bytes().to_vec());
    });
    assert_says(&error, InvalidModel, &[SCALE, "1e-45", "finite"]);
    let error = broken("nano-packed", |m| {
        let scale = m.tensor(SCALE);
        (scale.shape, scale.bytes) = (vec![2], bf16(&[1.0, 1.0]));
    });
    assert_says(&error, InvalidModel, &[SCALE, "[2]", "one value"]);
    let error = broken("nano-packed", |m| {
        let scale = m.tensor(SCALE);
        (scale.dtype, scale.bytes) = ("I16".into(), vec![1, 0]);
    });
    assert_says(&error, InvalidModel, &[SCALE, "I16", "F32, F16 or BF16"]);
}

#[test]
fn a_scale_may_be_a_scalar_of_any_float_type() {
    let mut model = Model::fixture("nano-packed");
    let scale = model.tensor(SCALE);
    (scale.dtype, scale.shape, scale.bytes) =
        ("F16".into(), vec![], half::f16::from_f32(-1.5).to_le_bytes().to_vec());
    let checkpoint = ternion_formats::Checkpoint::open(model.write().path()).unwrap();
    let ternion_formats::Weights::Ternary(q) = &checkpoint.layers[0].q.weights else { panic!("dense") };
    assert_eq!(q.scale, -1.5);
}

#[test]
fn floats_must_be_finite() {
    let norm = "model.layers.0.input_layernorm.weight";
    let error = broken("nano-packed", |m| m.tensor(norm).bytes[2..4].copy_from_slice(&bf16(&[f32::NAN])));
    assert_says(&error, InvalidModel, &[norm, "not a number"]);
    // A half that has overflowed, as the last value of the embedding.
    let error = broken("nano-packed", |m| {
        let embed = m.tensor("model.embed_tokens.weight");
        embed.dtype = "F16".into();
        embed.bytes.fill(0);
        let end = embed.bytes.len();
        embed.bytes[end - 2..].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
    });
    assert_says(&error, InvalidModel, &["model.embed_tokens.weight", "infinite"]);
    let error =
        broken("nano-master", |m| m.tensor(DOWN).bytes[8..10].copy_from_slice(&bf16(&[f32::INFINITY])));
    assert_says(&error, InvalidModel, &[DOWN]);
}

#[test]
fn element_types_must_fit_the_configuration() {
    let error =
        broken("nano-master", |m| m.config["quantization_config"]["quantization_mode"] = "offline".into());
    assert_says(&error, InvalidModel, &["q_proj.weight", "BF16", "expected -1, 0 or 1", "quantization_mode"]);
    let error =
        broken("llama-ternary", |m| drop(m.config.as_object_mut().unwrap().remove("quantization_config")));
    assert_says(&error, InvalidModel, &["q_proj.weight", "U8", "quantization_config"]);
    let error = broken("nano-packed", |m| m.tensor("model.norm.weight").dtype = "I16".into());
    assert_says(&error, InvalidModel, &["model.norm.weight", "I16", "F32, F16 or BF16"]);
}

#[test]
fn rows_that_cannot_be_packed() {
    let error = broken("nano-packed", |m| m.config["intermediate_size"] = 258.into());
    assert_says(&error, InvalidModel, &["gate_proj.weight", "258 rows", "multiple of 4"]);
}

#[test]
fn what_would_be_ignored_is_refused() {
    let bias = "model.layers.0.self_attn.q_proj.bias";
    let error = broken("nano-packed", |m| m.add(bias, "BF16", &[128], bf16(&[0.0; 128])));
    assert_says(&error, Unsupported, &[bias, "bias is not supported"]);
    let extra = "model.layers.0.self_attn.q_norm.weight";
    let error = broken("nano-packed", |m| m.add(extra, "BF16", &[64], bf16(&[1.0; 64])));
    assert_says(&error, InvalidModel, &[extra, "no place"]);

    // Sub-norms are not ignored where the configuration says `llama`: the tensors decide, and a warning names the option.
    let mut llama = Model::fixture("nano-packed");
    llama.config["model_type"] = "llama".into();
    llama.config["hidden_act"] = "silu".into();
    let checkpoint = ternion_formats::Checkpoint::open(llama.write().path()).unwrap();
    assert!(checkpoint.spec.sub_norms);
    assert!(checkpoint.warnings.iter().any(|w| w.contains("`sub_norms`")), "{:?}", checkpoint.warnings);

    let mut old = Model::fixture("nano-packed");
    old.add("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", &[32], vec![0; 128]);
    assert!(
        ternion_formats::Checkpoint::open(old.write().path()).is_ok(),
        "it follows from the configuration"
    );
}

#[test]
fn shards_must_be_there_and_hold_what_the_index_says() {
    let model = Model::fixture("nano-packed");
    let folder = model.write();
    let index = folder.path().join("model.safetensors.index.json");
    let open = |map: serde_json::Value| {
        fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
        open_error(&index)
    };
    let name = "model.norm.weight";
    assert_says(&open(json!({ name: "lost.safetensors" })), NotFound, &["lost.safetensors", name]);
    assert_says(
        &open(json!({"model.x": "model.safetensors"})),
        InvalidModel,
        &["model.x", "does not hold", "index.json"],
    );
    for outside in ["../model.safetensors", "/etc/passwd", "a/../model.safetensors", "..", ""] {
        let error = open(json!({ name: outside }));
        assert_says(&error, InvalidModel, &[&format!("{outside:?}"), name, "index.json", "file name"]);
    }
    assert_says(&open(json!({})), InvalidModel, &["model.embed_tokens.weight", "missing", "index.json"]);
    for text in ["", "[]", "{\"metadata\": {}}", "{\"weight_map\": {\"a\": 1}}"] {
        fs::write(&index, text).unwrap();
        assert_says(&open_error(&index), InvalidModel, &["index.json", "weight_map"]);
    }
    fs::write(&index, r#"{"weight_map": {"a": "x", "a": "y"}}"#).unwrap();
    assert_says(&open_error(&index), InvalidModel, &["index.json", "`a` occurs twice"]);
}
