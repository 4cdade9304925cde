//! Configurations that are wrong: the error names the file, the key, what was found and what is expected.
#![allow(clippy::unwrap_used, reason = "a failure in a helper fails its test, as it should")]

mod common;

use std::fs;

use common::{Model, assert_says, fixture, open_error};
use serde_json::{Value, json};
use ternion_core::ErrorKind::{InvalidModel, NotFound, Unsupported};

/// The error of a fixture of which one key is changed.
#[track_caller]
fn changed(key: &str, value: Value) -> ternion_core::Error {
    let mut model = Model::fixture("nano-packed");
    model.config[key] = value;
    model.error()
}

#[test]
fn a_missing_key_is_named() {
    for key in [
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    ] {
        let mut model = Model::fixture("nano-packed");
        model.config.as_object_mut().unwrap().remove(key);
        assert_says(&model.error(), InvalidModel, &["config.json", key, "is missing", "expected"]);
    }
}

#[test]
fn a_wrong_value_is_shown_with_what_is_allowed() {
    for (key, value, parts) in [
        ("hidden_size", json!("128"), ["\"128\"", "integer from 1 to"]),
        ("hidden_size", json!(0), ["is 0", "integer from 1 to"]),
        ("hidden_size", json!(1u64 << 40), ["1099511627776", "to 1048576"]),
        ("hidden_size", json!(-1), ["is -1", "integer"]),
        ("hidden_size", json!(128.5), ["is 128.5", "integer"]),
        ("num_hidden_layers", json!(0), ["is 0", "from 1 to 1024"]),
        ("num_hidden_layers", json!(4_294_967_296u64), ["4294967296", "from 1 to 1024"]),
        ("num_attention_heads", json!(3), ["is 3", "a divisor of `hidden_size` (128)"]),
        ("num_key_value_heads", json!(4), ["is 4", "a divisor of `num_attention_heads` (2)"]),
        ("head_dim", json!(63), ["is 63", "even"]),
        ("head_dim", json!(1 << 20), ["is 1048576", "at most 524288 for 2 heads"]),
        ("vocab_size", json!(1u64 << 30), ["1073741824", "to 16777216"]),
        ("rms_norm_eps", json!("tiny"), ["\"tiny\"", "a number from 0.0 to 1.0"]),
        ("rms_norm_eps", json!(-0.5), ["is -0.5", "a number from 0.0 to 1.0"]),
        ("rope_theta", json!(0), ["is 0", "a number"]),
        ("tie_word_embeddings", json!(1), ["is 1", "true or false"]),
        ("quantization_config", json!("bitnet"), ["\"bitnet\"", "an object"]),
        ("eos_token_id", json!("</s>"), ["</s>", "token id"]),
    ] {
        let mut parts = parts.to_vec();
        parts.extend(["config.json", key]);
        assert_says(&changed(key, value), InvalidModel, &parts);
    }
}

#[test]
fn what_is_not_implemented_is_named_with_what_is() {
    assert_says(
        &changed("model_type", json!("gpt2")),
        Unsupported,
        &["config.json", "model_type", "gpt2", "bitnet, llama, mistral, qwen3"],
    );
    assert_says(&changed("hidden_act", json!("gelu")), Unsupported, &["hidden_act", "gelu", "relu2, silu"]);
    assert_says(&changed("attention_bias", json!(true)), Unsupported, &["attention_bias", "true"]);
    assert_says(
        &changed("rope_scaling", json!({"rope_type": "longrope", "factor": 4.0})),
        Unsupported,
        &["rope_scaling.rope_type", "longrope", "default, linear, dynamic, yarn, llama3"],
    );
    for (key, value) in [("quant_method", "awq"), ("linear_class", "nf4"), ("quantization_mode", "sometimes")]
    {
        let error = changed("quantization_config", json!({ key: value }));
        assert_says(&error, Unsupported, &["config.json", &format!("quantization_config.{key}"), value]);
    }
    let error = changed("quantization_config", json!({"modules_to_not_convert": ["lm_head", "layers.[01]"]}));
    assert_says(&error, Unsupported, &["modules_to_not_convert", "layers.[01]", "names of modules"]);
    let long = changed("model_type", json!("x\n".repeat(100_000)));
    assert_says(&long, Unsupported, &["model_type", "x x x", "..."]);
    let mut bits = Model::fixture("1bitllm");
    bits.config["weight_bits"] = 2.into();
    assert_says(&bits.error(), Unsupported, &["weight_bits", "2", "supported: 1"]);
}

#[test]
fn rope_scaling_must_be_whole() {
    let error = changed("rope_scaling", json!({"type": "linear"}));
    assert_says(&error, InvalidModel, &["rope_scaling.factor", "missing"]);
    let swapped = json!({"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1});
    assert_says(&changed("rope_scaling", swapped), InvalidModel, &["low_freq_factor", "high_freq_factor"]);
}

#[test]
fn a_file_that_is_no_json_object() {
    for (text, parts) in [
        ("", ["is not JSON", "EOF"]),
        ("{\"hidden_size\": ", ["is not JSON", "EOF"]),
        ("[1, 2]", ["found [1,2]", "JSON object"]),
        ("\u{feff}\u{feff}{}", ["is not JSON", "expected value"]),
    ] {
        let folder = Model::fixture("nano-packed").write();
        fs::write(folder.path().join("config.json"), text).unwrap();
        let mut parts = parts.to_vec();
        parts.push("config.json");
        assert_says(&open_error(folder.path()), InvalidModel, &parts);
    }
    let folder = Model::fixture("nano-packed").write();
    fs::write(folder.path().join("config.json"), vec![b' '; 5 << 20]).unwrap();
    assert_says(
        &open_error(folder.path()),
        InvalidModel,
        &["config.json", "5242880 bytes", "at most 4194304"],
    );
    fs::write(folder.path().join("config.json"), "[".repeat(100_000)).unwrap();
    assert_says(&open_error(folder.path()), InvalidModel, &["config.json", "recursion limit"]);
}

#[test]
fn missing_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    assert_says(&open_error(&folder.path().join("none")), NotFound, &["none"]);
    assert_says(&open_error(folder.path()), NotFound, &["model.safetensors", "model.safetensors.index.json"]);
    fs::copy(fixture("nano-packed").join("model.safetensors"), folder.path().join("model.safetensors"))
        .unwrap();
    assert_says(&open_error(folder.path()), NotFound, &["config.json"]);
    fs::write(folder.path().join("model.onnx"), b"ONNX").unwrap();
    let words = ["model.onnx", "backend `onnx`", ".safetensors", "GGUF"];
    assert_says(&open_error(&folder.path().join("model.onnx")), Unsupported, &words);
}

#[test]
fn token_ids_beyond_the_vocabulary_are_dropped() {
    let mut model = Model::fixture("nano-packed");
    model.config["eos_token_id"] = json!([128_001, 305]);
    model.config["bos_token_id"] = 128_000.into();
    let checkpoint = ternion_formats::Checkpoint::open(model.write().path()).unwrap();
    assert_eq!((checkpoint.spec.bos, checkpoint.spec.eos), (None, vec![305]));
}

#[test]
fn a_tokenizer_larger_than_the_vocabulary() {
    let folder = Model::fixture("nano-packed").write();
    fs::copy(fixture("tiny-packed").join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    let checkpoint = ternion_formats::Checkpoint::open(folder.path()).unwrap();
    let Err(error) = checkpoint.tokenizer() else { panic!("accepted") };
    assert_says(&error, InvalidModel, &["320"]);
}
