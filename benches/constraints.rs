//! What a constraint costs: each mask, and decoding under a schema beside free decoding.
//!
//! `cargo bench -p ternion --features constraints --bench constraints`. `mask` has a model that takes no time, so that the difference
//! between `free` and `schema` is the mask; `TERNION_ORACLE` names the folder with the tokenizer of BitNet 2B4T, without which a small
//! vocabulary stands in. `decode` has a real model: the one of the folder `TERNION_BENCH_MODEL`, else the small model of the
//! fixtures. Both give tokens per second; a schema whose text is partly forced gives more of them than free decoding.

use std::{collections::HashMap, path::PathBuf, sync::Arc, time::Instant};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use serde_json::{Value, json};
use ternion::{
    CausalLm, Completion, Constraint, GenerateRequest, LlmBackend, ModelInfo, Result, Sampling, SequenceId,
    SequenceInput,
    config::{Config, ModelConfig},
    engine::{Engine, EngineOptions},
    text::{Tokenizer, TokenizerParts},
};
use tokio::runtime::Runtime;

const TOKENS: usize = 64;

/// Logits that are the same for ever, rotated by the length of the sequence.
struct Instantly {
    row: Vec<f32>,
    lengths: HashMap<SequenceId, usize>,
    next: u32,
}

impl Instantly {
    fn new(vocab: usize) -> Self {
        let mut state = 1_u64;
        let row = (0..2 * vocab).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 22) as f32
        });
        Self { row: row.collect(), lengths: HashMap::new(), next: 0 }
    }
}

impl CausalLm for Instantly {
    fn context_length(&self) -> usize {
        4096
    }

    fn vocab_size(&self) -> usize {
        self.row.len() / 2
    }

    fn max_sequences(&self) -> usize {
        4
    }

    fn max_batch_tokens(&self) -> usize {
        512
    }

    fn new_sequence(&mut self) -> Result<SequenceId> {
        let id = SequenceId(self.next);
        self.next += 1;
        self.lengths.insert(id, 0);
        Ok(id)
    }

    fn forward(&mut self, batch: &[SequenceInput<'_>], logits: &mut Vec<f32>) -> Result<()> {
        logits.clear();
        let vocab = self.vocab_size();
        for input in batch {
            let length = self.lengths.entry(input.sequence).or_default();
            *length += input.tokens.len();
            for row in 0..input.rows() {
                let start = (*length * 7919 + row) % vocab;
                logits.extend_from_slice(&self.row[start..start + vocab]);
            }
        }
        Ok(())
    }

    fn len(&self, sequence: SequenceId) -> usize {
        self.lengths.get(&sequence).copied().unwrap_or(0)
    }

    fn truncate(&mut self, sequence: SequenceId, length: usize) -> Result<()> {
        self.lengths.insert(sequence, length);
        Ok(())
    }

    fn fork(&mut self, _: SequenceId, length: usize) -> Result<SequenceId> {
        let id = self.new_sequence()?;
        self.lengths.insert(id, length);
        Ok(id)
    }

    fn free(&mut self, sequence: SequenceId) {
        self.lengths.remove(&sequence);
    }
}

/// Answers that go on for a while: texts, numbers, lists.
fn open_schema() -> Value {
    json!({
        "type": "array", "minItems": 100,
        "items": { "anyOf": [{ "type": "string", "minLength": 5 }, { "type": "number" }, { "type": "array", "items": { "type": "string" } }] },
    })
}

/// Answers of which much is forced.
fn forced_schema() -> Value {
    let animal = json!({
        "type": "object",
        "properties": { "kind_of_animal": { "enum": ["cat", "dog"] }, "weight_in_kilograms": { "type": "integer", "minimum": 1, "maximum": 99 } },
        "required": ["kind_of_animal", "weight_in_kilograms"], "additionalProperties": false,
    });
    json!({ "type": "array", "minItems": 50, "items": animal })
}

fn ask(runtime: &Runtime, model: &Arc<dyn LlmBackend>, constraint: Option<Value>) -> Completion {
    let mut request = GenerateRequest::new(vec![1, 2, 3]).with_max_tokens(TOKENS);
    request.params.sampling = Sampling::default().with_temperature(1.0).with_seed(7);
    match constraint {
        Some(schema) => request = request.with_constraint(Constraint::JsonSchema(schema)),
        None => request.params.ignore_eos = true,
    }
    runtime.block_on(async { model.generate(request).await?.collect().await }).expect("an answer")
}

fn measure(c: &mut Criterion, name: &str, runtime: &Runtime, model: &Arc<dyn LlmBackend>) {
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Elements(TOKENS as u64)).sample_size(20);
    let kinds =
        [("free", None), ("schema", Some(open_schema())), ("schema with forced text", Some(forced_schema()))];
    for (kind, constraint) in kinds {
        group.bench_function(kind, |b| {
            b.iter_batched(
                || constraint.clone(),
                |schema| ask(runtime, model, schema),
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

fn mask(c: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    let oracle = std::env::var_os("TERNION_ORACLE").map(|folder| PathBuf::from(folder).join("official"));
    let folder = oracle.unwrap_or_else(|| ternion_test_support::fixture("ternion-tiny"));
    let parts = TokenizerParts::from_folder(folder).expect("a tokenizer");
    let tokenizer = Tokenizer::from_parts(parts).expect("a tokenizer");
    let vocab = tokenizer.vocab_size();
    let options = EngineOptions::new(ModelInfo::new("instantly", "bench"));
    let engine = Engine::start(Box::new(Instantly::new(vocab)), tokenizer, options).expect("an engine");
    let model: Arc<dyn LlmBackend> = Arc::new(engine);
    let start = Instant::now();
    ask(&runtime, &model, Some(open_schema()));
    println!(
        "{vocab} tokens; the first answer under a schema, with all that is made once: {:.0?}",
        start.elapsed()
    );
    measure(c, &format!("mask/{vocab} tokens"), &runtime, &model);
}

fn decode(c: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    let folder = std::env::var_os("TERNION_BENCH_MODEL").map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| ternion_test_support::fixture("ternion-tiny"));
    let config = Config::single("m", ModelConfig::for_path(folder));
    let model = runtime.block_on(ternion::load(&config, Some("m"))).expect("a model");
    measure(c, "decode", &runtime, &model);
}

criterion_group!(benches, mask, decode);
criterion_main!(benches);
