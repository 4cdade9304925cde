//! Keys that `config.json` may leave out or state twice: what transformers makes of them.
#![allow(clippy::unwrap_used, reason = "a failure in a helper fails its test, as it should")]

mod common;

use common::{Model, assert_says, bf16, trits};
use serde_json::{Value, json};
use ternion_core::ErrorKind::{InvalidModel, Unsupported};
use ternion_formats::{
    Activation, Checkpoint, CheckpointOptions, Family, LayerTensors, RopeScaling, ScaleUse, Weights,
};

fn open(model: &Model) -> Checkpoint {
    Checkpoint::open(model.write().path()).unwrap()
}

fn without(name: &str, keys: &[&str]) -> Model {
    let mut model = Model::fixture(name);
    let config = model.config.as_object_mut().unwrap();
    for key in keys {
        config.remove(*key);
    }
    model
}

#[test]
fn rotary_keys_are_read_as_by_transformers() {
    let cases = std::fs::read(common::fixture("config/rope.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_slice(&cases).unwrap();
    assert_eq!(cases.len(), 40);
    for case in cases {
        let is_llama = case["model_type"] == "llama";
        let mut model = without("nano-packed", &["rope_theta", "rope_scaling", "rope_parameters"]);
        if is_llama {
            model.tensors.retain(|t| !t.name.contains("sub_norm"));
        }
        model.config["model_type"] = case["model_type"].clone();
        model.config["max_position_embeddings"] = 256.into();
        model.config.as_object_mut().unwrap().extend(case["keys"].as_object().unwrap().clone());
        let rope = open(&model).spec.rope;
        let expected = &case["rope"];
        assert_eq!(json!(rope.theta), expected["rope_theta"], "{case}");
        match rope.scaling {
            RopeScaling::None => assert_eq!(expected["rope_type"], "default", "{case}"),
            RopeScaling::Linear { factor } => {
                assert_eq!((&expected["rope_type"], &expected["factor"]), (&json!("linear"), &json!(factor)));
            }
            RopeScaling::Llama3 { factor, original_context, .. } => {
                assert_eq!((&expected["rope_type"], &expected["factor"]), (&json!("llama3"), &json!(factor)));
                assert_eq!(expected["original_max_position_embeddings"], original_context, "{case}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn rotary_keys_that_disagree_are_warned_of_unless_the_option_decides() {
    let mut model = Model::fixture("nano-packed");
    let twice = json!({"rope_theta": 10_000.0, "rope_type": "default"});
    model.config["rope_theta"] = 500_000.0.into();
    model.config["rope_scaling"] = twice.clone();
    let checkpoint = open(&model);
    assert_eq!(checkpoint.spec.rope.theta, 10_000.0);
    let [warning] = &checkpoint.warnings[..] else { panic!("{:?}", checkpoint.warnings) };
    assert!(warning.contains("10000") && warning.contains("`rope_theta` decides"), "{warning}");
    let options = CheckpointOptions::default().with_rope_theta(500_000.0);
    let checkpoint = options.open(model.write().path(), &mut |_, _| {}).unwrap();
    assert_eq!((checkpoint.spec.rope.theta, &checkpoint.warnings[..]), (500_000.0, &[][..]));

    model.config["rope_theta"] = Value::Null;
    model.config["rope_parameters"] = twice;
    assert_eq!(open(&model).warnings, [""; 0], "the same object twice");
    model.config["rope_parameters"] = json!({"rope_theta": 1.5, "rope_type": "default"});
    assert!(open(&model).warnings[0].contains("`rope_scaling` and `rope_parameters`"));

    // An object for each type of layer is no object for all of them.
    model.config["rope_scaling"] = json!({"full_attention": {"rope_theta": 1e4, "rope_type": "default"}});
    assert_says(&model.error(), Unsupported, &["rope_scaling.full_attention", "one rotary embedding"]);
    model.config["rope_scaling"] = json!({"rope_theta": 1e4, "partial_rotary_factor": 0.5});
    assert_says(&model.error(), Unsupported, &["rope_scaling.partial_rotary_factor", "0.5"]);
}

#[test]
fn a_base_that_does_not_fit_to_the_vocabulary_is_warned_of() {
    let mut model = without("nano-packed", &["rope_theta"]);
    model.config["model_type"] = "llama".into();
    model.tensors.retain(|t| !t.name.contains("sub_norm"));
    assert_eq!(open(&model).warnings, [""; 0]);
    let rows = 100_000;
    model.config["vocab_size"] = rows.into();
    let embed = model.tensor("model.embed_tokens.weight");
    embed.shape[0] = rows;
    embed.bytes.resize(rows * 128 * 2, 0);
    let checkpoint = open(&model);
    assert_eq!(checkpoint.spec.rope.theta, 10_000.0);
    assert!(checkpoint.warnings[0].contains("`rope_theta` decides"), "{:?}", checkpoint.warnings);
}

#[test]
fn keys_that_are_absent_have_the_classes_defaults() {
    let keys = [
        "rms_norm_eps",
        "hidden_act",
        "max_position_embeddings",
        "num_key_value_heads",
        "tie_word_embeddings",
        "rope_theta",
    ];
    let stated = open(&Model::fixture("nano-packed"));
    let checkpoint = open(&without("nano-packed", &keys));
    let (spec, expected) = (&checkpoint.spec, &stated.spec);
    assert_eq!((spec.rms_eps, spec.activation, spec.context_length), (1e-5, Activation::Relu2, 2048));
    assert_eq!((spec.kv_heads, spec.tied, spec.rope.theta), (expected.kv_heads, expected.tied, 500_000.0));
    for key in keys {
        assert!(
            checkpoint.assumptions.iter().any(|a| a.contains(key)),
            "{key}: {:?}",
            checkpoint.assumptions
        );
    }
    assert_eq!((&checkpoint.warnings[..], &stated.assumptions[..]), (&[][..], &[][..]));

    let mut llama = without("nano-packed", &keys);
    llama.config["model_type"] = "llama".into();
    llama.tensors.retain(|t| !t.name.contains("sub_norm"));
    let spec = open(&llama).spec;
    assert_eq!((spec.rms_eps, spec.activation, spec.rope.theta), (1e-6, Activation::Silu, 10_000.0));

    let mut model = Model::fixture("nano-packed");
    model.config["quantization_config"].as_object_mut().unwrap().remove("linear_class");
    let checkpoint = open(&model);
    assert_eq!(checkpoint.spec.quantization.unwrap().scale_use, ScaleUse::Divides);
    assert!(checkpoint.assumptions[0].contains("linear_class"));
}

#[test]
fn sub_norms_make_a_bitnet_of_a_llama() {
    let mut model = Model::fixture("nano-packed");
    model.config["model_type"] = "llama".into();
    let checkpoint = open(&model);
    assert_eq!((checkpoint.spec.family, checkpoint.spec.sub_norms), (Family::BitNet, true));
    assert!(checkpoint.warnings[0].contains("`sub_norms` decides"), "{:?}", checkpoint.warnings);
    let off = CheckpointOptions::default().with_sub_norms(false);
    let checkpoint = off.open(model.write().path(), &mut |_, _| {}).unwrap();
    assert_eq!((checkpoint.spec.family, checkpoint.spec.sub_norms), (Family::Llama, false));
    assert_eq!(checkpoint.warnings, [""; 0]);

    // The other names are those of 1bitLLM, whose float weights are masters.
    let mut model = without("1bitllm", &["architectures", "weight_bits", "input_bits"]);
    model.config["architectures"] = json!(["LlamaForCausalLM"]);
    let checkpoint = open(&model);
    assert_eq!(checkpoint.spec.family, Family::OneBitLlm);
    assert!(matches!(checkpoint.layers[0].q.weights, Weights::Ternary(_)));
    assert!(checkpoint.warnings[0].contains("inner_attn_ln"), "{:?}", checkpoint.warnings);

    let mut model = Model::fixture("nano-packed");
    model.tensors.retain(|t| !t.name.contains("sub_norm"));
    assert_says(&model.error(), InvalidModel, &["`sub_norms` to false", "self_attn.attn_sub_norm.weight"]);
    let checkpoint = off.open(model.write().path(), &mut |_, _| {}).unwrap();
    assert_eq!(checkpoint.spec.activation, Activation::Relu2);
}

#[test]
fn options_win_over_the_configuration() {
    let folder = Model::fixture("nano-packed").write();
    let options = CheckpointOptions::default().with_activation(Activation::Silu).with_rope_theta(1e4);
    let spec = options.open(folder.path(), &mut |_, _| {}).unwrap().spec;
    assert_eq!((spec.activation, spec.rope.theta), (Activation::Silu, 1e4));
}

#[test]
fn weights_that_are_quantised_already_keep_their_scale() {
    let packed = open(&Model::fixture("nano-packed"));
    let mut model = without("nano-packed", &["quantization_config"]);
    model.tensors.retain(|t| !t.name.ends_with("weight_scale"));
    for linear in packed.layers.iter().flat_map(LayerTensors::linears) {
        let Weights::Ternary(ternary) = &linear.weights else { panic!("dense") };
        let values: Vec<f32> = trits(ternary).iter().map(|&t| f32::from(t) * ternary.scale).collect();
        let tensor = model.tensor(&format!("{}.weight", linear.name));
        (tensor.dtype, tensor.shape) = ("BF16".into(), vec![ternary.rows, ternary.cols]);
        tensor.bytes = bf16(&values);
    }
    let floats = open(&model);
    let linears = |c: &Checkpoint| -> Vec<(Vec<i8>, f32)> {
        let linears = c.layers.iter().flat_map(LayerTensors::linears);
        let ternary = linears.map(|linear| match &linear.weights {
            Weights::Ternary(tensor) => (trits(tensor), tensor.scale),
            _ => panic!("dense"),
        });
        ternary.collect()
    };
    for (a, b) in linears(&floats).iter().zip(&linears(&packed)) {
        assert_eq!(a.0, b.0);
        assert!((a.1 - b.1).abs() <= b.1.abs() / 200.0, "{} {}", a.1, b.1);
    }
    assert!(
        floats.assumptions.iter().any(|a| a.contains("of one absolute value")),
        "{:?}",
        floats.assumptions
    );
    // A configuration that says they are masters is believed, as by transformers: their mean is the scale.
    model.config["quantization_config"] = json!({"quant_method": "bitnet", "quantization_mode": "online"});
    assert!(linears(&open(&model))[0].1 < 0.9 * linears(&packed)[0].1);
}
