//! Backends that are wrong in one way each, and the checks that tell.
//!
//! Wrong numbers come from a checkpoint that is altered between the file and the decoder, so that engine, tokenizer and
//! sampler stay what they are; such a model is consistent with itself, and only the reference tells. Wrong behaviour comes from
//! a wrapper around the right backend. In each case exactly the checks that are about the fault fail.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

#[path = "oracle/cases.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod cases;
#[path = "conformance/wrong.rs"]
mod wrong;

use std::{path::PathBuf, sync::Arc};

use ternion::engine::{ComputeThreads, Engine, EngineOptions};
use ternion::{
    LlmBackend, ModelInfo,
    formats::{Activation, Checkpoint, LayerTensors, Linear, SharedBytes, Weights},
    text::Tokenizer,
};
use ternion_backend_candle::{Decoder, DecoderOptions};
use ternion_conformance::{Failure, Outcome, Reference, Row, all};
use ternion_kernels::{TernaryLayout, pack, unpack};
use tokio::sync::Semaphore;
use wrong::{Fault, Wrong};

fn fixture() -> PathBuf {
    ternion_test_support::fixture("nano-packed")
}

/// The candle engine on the fixture's weights as `change` leaves them, with the limits that the checks like.
fn candle(change: impl FnOnce(&mut Checkpoint), tokenizer: impl FnOnce(&Checkpoint) -> Tokenizer) -> Engine {
    let mut checkpoint = Checkpoint::open(fixture()).unwrap();
    let tokenizer = tokenizer(&checkpoint);
    change(&mut checkpoint);
    let mut info = ModelInfo::new("mutant", "candle");
    info.defaults = checkpoint.sampling.clone();
    info.capabilities.batch_invariant = true;
    let mut engine = EngineOptions::new(info);
    engine.eos_tokens.clone_from(&checkpoint.spec.eos);
    engine.max_queued = 4;
    let mut options = DecoderOptions::new(&checkpoint.spec);
    (options.context_length, options.max_sequences, options.prefill_chunk) = (256, 3, 32);
    let decoder = Decoder::new(checkpoint, &ComputeThreads::new(1), options).unwrap();
    Engine::start(Box::new(decoder), tokenizer, engine).unwrap()
}

fn right() -> Engine {
    candle(|_| {}, |checkpoint| checkpoint.tokenizer().unwrap())
}

/// What transformers computed for one conversation.
fn reference() -> Reference {
    let cases = cases::cases(&fixture());
    let case = cases.iter().find(|case| case.name == "chat1").unwrap();
    let mut reference = Reference::new("chat1", case.ids.clone());
    reference.messages = Some(serde_json::from_value(case.golden["messages"].clone()).unwrap());
    let rows = case.logits.chunks_exact(case.logits.len() / case.ids.len()).enumerate();
    reference.logits = rows.map(|(position, row)| Row { position, logits: row.to_vec() }).collect();
    reference.greedy = cases::ids(&case.golden["greedy_f32"]);
    reference
}

/// The checks that fail, each on a model of its own, so that none suffers from what another left behind.
async fn failures(make: impl Fn() -> Arc<dyn LlmBackend>) -> Vec<(String, Failure)> {
    // Some at a time: those that wait for what never comes take no processor.
    let places = Arc::new(Semaphore::new(4));
    let mut running = Vec::new();
    for check in all() {
        let place = Arc::clone(&places).acquire_owned().await.unwrap();
        let model = make();
        running.push(tokio::spawn(async move {
            let outcome = check.outcome(&*model).await;
            drop(place);
            vec![(check.name.to_owned(), outcome)]
        }));
    }
    let model = make();
    running.push(tokio::spawn(async move { reference().outcomes(&*model).await }));
    let mut failed = Vec::new();
    for outcomes in running {
        for (name, outcome) in outcomes.await.unwrap() {
            if let Outcome::Failed(failure) = outcome {
                println!("{name}: {failure}");
                failed.push((name, failure));
            }
        }
    }
    failed
}

/// Exactly these checks fail.
async fn only(expected: &[&str], make: impl Fn() -> Arc<dyn LlmBackend>) {
    let failed = failures(make).await;
    let names: Vec<&str> = failed.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, expected);
    for (name, failure) in &failed {
        let check = all().find(|check| check.name == name);
        assert!(check.is_none_or(|check| check.sentence == failure.sentence), "{name}: {failure}");
        assert!(!failure.found.is_empty() && failure.found != failure.expected, "{name}: {failure}");
    }
}

async fn wrong_numbers(expected: &[&str], change: impl Fn(&mut Checkpoint)) {
    only(expected, || Arc::new(candle(&change, |checkpoint| checkpoint.tokenizer().unwrap()))).await;
}

async fn wrong_behavior(expected: &[&str], fault: Fault) {
    only(expected, || Arc::new(Wrong::new(Arc::new(right()), fault))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_right_backend_passes() {
    only(&[], || Arc::new(right())).await;
    wrong_behavior(&[], Fault::None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silu_in_the_place_of_squared_relu() {
    let change = |c: &mut Checkpoint| c.spec.activation = Activation::Silu;
    wrong_numbers(&["chat1::logits", "chat1::greedy"], change).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sub_norm_left_out() {
    let change = |c: &mut Checkpoint| c.layers[0].attn_sub_norm = None;
    wrong_numbers(&["chat1::logits", "chat1::greedy"], change).await;
    let change = |c: &mut Checkpoint| c.layers[1].ffn_sub_norm = None;
    wrong_numbers(&["chat1::logits", "chat1::greedy"], change).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inverted_scale() {
    let change = |c: &mut Checkpoint| {
        for layer in &mut c.layers {
            for linear in linears(layer) {
                let Weights::Ternary(ternary) = &mut linear.weights else { panic!("{}", linear.name) };
                ternary.scale = 1.0 / ternary.scale;
            }
        }
    };
    wrong_numbers(&["chat1::logits", "chat1::greedy"], change).await;
}

fn linears(layer: &mut LayerTensors) -> [&mut Linear; 7] {
    let LayerTensors { q, k, v, o, gate, up, down, .. } = layer;
    [q, k, v, o, gate, up, down]
}

/// A decoder that rotates neighbours where the halves of a head belong together: the same as weights whose rows are in that
/// other order.
#[tokio::test(flavor = "multi_thread")]
async fn rope_in_the_other_layout() {
    let change = |c: &mut Checkpoint| {
        let head_dim = c.spec.head_dim;
        for layer in &mut c.layers {
            for linear in [&mut layer.q, &mut layer.k] {
                let Weights::Ternary(ternary) = &mut linear.weights else { panic!("{}", linear.name) };
                let trits = unpack(ternary.view().unwrap());
                let rows: Vec<&[i8]> = trits.chunks_exact(ternary.cols).collect();
                let neighbours: Vec<i8> = (0..ternary.rows)
                    .flat_map(|row| {
                        let (head, within) = (row / head_dim, row % head_dim);
                        let other = within % 2 * (head_dim / 2) + within / 2;
                        rows[head * head_dim + other].to_vec()
                    })
                    .collect();
                let codes = pack(TernaryLayout::Quarters, &neighbours, ternary.rows, ternary.cols).unwrap();
                ternary.layout = TernaryLayout::Quarters;
                ternary.codes = SharedBytes::from(codes);
            }
        }
    };
    wrong_numbers(&["chat1::logits", "chat1::greedy"], change).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_base_of_the_rotation() {
    wrong_numbers(&["chat1::logits", "chat1::greedy"], |c| c.spec.rope.theta = 10_000.0).await;
}

/// The template writes a BOS, and the tokenizer another one.
#[tokio::test(flavor = "multi_thread")]
async fn a_double_bos_of_the_tokenizer() {
    let twice = |checkpoint: &Checkpoint| {
        let mut parts = checkpoint.tokenizer_parts().unwrap();
        let template = parts.chat_template.take().unwrap();
        parts.chat_template = Some("{{ bos_token }}{{ bos_token }}".to_owned() + &template);
        Tokenizer::from_parts(parts).unwrap()
    };
    let expected = ["chat::a_chat_begins_with_one_bos", "chat1::chat"];
    only(&expected, || Arc::new(candle(|_| {}, twice))).await;
}

/// The backend puts a BOS in front of what has one.
#[tokio::test(flavor = "multi_thread")]
async fn a_double_bos_of_the_backend() {
    let expected = [
        "chat::a_chat_is_its_rendering",
        "chat::a_chat_has_as_many_tokens_as_counted",
        "chat::a_chat_begins_with_one_bos",
        "chat::special_tokens_in_messages_are_text",
        // This fault hides the conversation from the checks of the model.
        "tools::wrong_tools_are_refused",
        "chat1::chat",
    ];
    wrong_behavior(&expected, Fault::DoubleBos).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_missed_across_tokens() {
    let expected = [
        "stopping::stop_strings_lie_across_tokens",
        "stopping::the_first_complete_stop_string_counts",
        "stopping::of_one_end_the_longest_stop_string_counts",
        "stopping::names_of_special_tokens_are_stop_strings",
    ];
    wrong_behavior(&expected, Fault::StopWithinTokens).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_ignored() {
    let expected = [
        "sampling::the_same_seed_gives_the_same_tokens",
        "sampling::the_same_seed_gives_the_same_tokens_beside_others",
        "sampling::a_seed_that_was_drawn_is_reported",
        "sampling::a_seed_that_was_given_is_reported",
        "sampling::open_fields_take_the_defaults",
        // For these prompts only a drawn answer of the small model has pieces enough.
        "stopping::the_first_complete_stop_string_counts",
        "stopping::a_beginning_of_a_stop_string_comes_out_at_the_end",
        "concurrency::requests_side_by_side_give_what_they_give_alone",
    ];
    wrong_behavior(&expected, Fault::SeedIgnored).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn special_tokens_of_users_obeyed() {
    // This fault hides the conversation from the checks of the model.
    let expected = ["chat::special_tokens_in_messages_are_text", "tools::wrong_tools_are_refused"];
    wrong_behavior(&expected, Fault::TrustedMessages).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_stream_not_freed() {
    let expected = [
        "facts::what_has_ended_is_counted",
        "cancellation::dropping_the_stream_in_prefill_frees_the_sequence",
        "cancellation::dropping_the_stream_in_decoding_frees_the_sequence",
    ];
    wrong_behavior(&expected, Fault::DropIgnored).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_token_ignored() {
    let expected = [
        "cancellation::the_token_ends_prefill",
        "cancellation::the_token_ends_decoding",
        "cancellation::a_cancelled_token_ends_the_request_at_once",
        "cancellation::cancelling_frees_the_sequence",
    ];
    wrong_behavior(&expected, Fault::CancelIgnored).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_usage_off_by_one() {
    let expected = [
        "facts::tokens_are_counted",
        "streaming::one_token_event_for_each_token",
        "streaming::complete_waits_for_the_continuation",
        "stopping::an_end_of_sequence_is_counted_but_not_shown",
        "stopping::a_stop_token_ends_the_answer",
        "limits::without_max_tokens_the_context_is_the_limit",
        "cancellation::a_cancelled_answer_keeps_what_it_has",
    ];
    wrong_behavior(&expected, Fault::UsageOffByOne).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_piece_lost() {
    let expected = [
        "streaming::pieces_are_the_answer",
        "stopping::the_first_complete_stop_string_counts",
        "stopping::a_beginning_of_a_stop_string_comes_out_at_the_end",
        "stopping::a_stop_token_ends_the_answer",
        "constraints::answers_have_the_form_that_was_asked_for",
        "constraints::a_value_is_extracted",
    ];
    wrong_behavior(&expected, Fault::LastPieceLost).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_ends() {
    let expected = ["streaming::events_come_in_order", "streaming::nothing_comes_after_the_end"];
    wrong_behavior(&expected, Fault::TwoEnds).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_after_the_temperature() {
    let expected = [
        "scoring::scores_are_the_log_probabilities_of_generation",
        "scoring::log_probabilities_come_before_penalties_and_temperature",
    ];
    wrong_behavior(&expected, Fault::ScaledLogprobs).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_temperature_silently_corrected() {
    wrong_behavior(&["errors::sampling_out_of_range_is_refused"], Fault::TemperatureClamped).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_temperature_ignored() {
    let expected =
        ["sampling::open_fields_take_the_defaults", "drawing::temperature_shapes_the_probabilities"];
    wrong_behavior(&expected, Fault::TemperatureIgnored).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_ignored() {
    let expected = [
        "sampling::filters_that_leave_one_token_are_greedy",
        "sampling::open_fields_take_the_defaults",
        "drawing::top_k_keeps_the_most_probable",
        "drawing::top_p_keeps_the_smallest_set",
        "drawing::min_p_keeps_what_is_near_the_most_probable",
    ];
    wrong_behavior(&expected, Fault::FiltersIgnored).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_at_a_time_behind_a_promise_of_three() {
    let expected = [
        "cancellation::dropping_the_stream_in_prefill_frees_the_sequence",
        "cancellation::dropping_the_stream_in_decoding_frees_the_sequence",
        "cancellation::cancelling_frees_the_sequence",
        "cancellation::dropping_the_future_gives_the_request_up",
        "cancellation::dropping_a_score_frees_the_sequence",
        "concurrency::a_slow_reader_slows_nobody_else",
    ];
    wrong_behavior(&expected, Fault::OneAtATime).await;
}
