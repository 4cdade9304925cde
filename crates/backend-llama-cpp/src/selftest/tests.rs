//! Layers in which some projections are ternary and others are not, and callbacks that panic.

use std::sync::Arc;

use ternion_engine::{ComputeThreads, SequenceId};

use super::*;
use crate::guard::Guard;

const SEQUENCES: usize = 4;

#[test]
fn this_build_passes() {
    crate::runtime::start();
    run().unwrap();
}

/// A model of two layers.
struct Tiny {
    embed: DenseTensor,
    layers: Vec<LayerTensors>,
    final_norm: RmsNorm,
    activation: Activation,
    rope: RopeSpec,
}

impl Tiny {
    /// Bit `i` of a layer's mask makes its projection `i` (q, k, v, o, gate, up, down) a dense one of the type `dense`.
    fn new(seed: u64, masks: [u32; 2], dense: DenseType, sub_norms: bool) -> Self {
        let mut random = Random(seed);
        let mut layers: Vec<LayerTensors> = masks.iter().map(|_| random.layer()).collect();
        for (layer, mask) in layers.iter_mut().zip(masks) {
            if !sub_norms {
                (layer.attn_sub_norm, layer.ffn_sub_norm) = (None, None);
            }
            let LayerTensors { q, k, v, o, gate, up, down, .. } = layer;
            for (i, linear) in [q, k, v, o, gate, up, down].into_iter().enumerate() {
                if mask >> i & 1 == 1 {
                    linear.weights = Weights::Dense(random.dense_of(dense, linear.rows(), linear.cols()));
                }
            }
        }
        Self {
            embed: random.dense(VOCAB, HIDDEN),
            layers,
            final_norm: random.norm(HIDDEN),
            activation: if sub_norms { Activation::Relu2 } else { Activation::Silu },
            rope: RopeSpec { theta: 500_000.0, scaling: RopeScaling::None },
        }
    }

    fn load(&self, threads: usize, guard: &Arc<Guard>) -> Result<LlamaCpp> {
        crate::runtime::start();
        let parts = Parts {
            hidden_size: HIDDEN,
            intermediate_size: INNER,
            heads: HEADS,
            kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
            vocab_size: VOCAB,
            context_length: 256,
            rms_eps: EPS,
            rope: &self.rope,
            activation: self.activation,
            layers: &self.layers,
            final_norm: &self.final_norm,
            head: Table::Dense(self.embed.clone()),
            activations: kernels::ActivationType::default(),
            head_node: None,
        };
        let (model, hook) = parts.load_with(Arc::clone(guard))?;
        let sizes = ContextSizes {
            cache_tokens: 128,
            batch: 8,
            sequences: SEQUENCES,
            threads: ComputeThreads::new(threads),
            kv_type: KvType::F32,
            flash_attention: true,
            keeps_prompts: false,
        };
        LlamaCpp::start(model, Some(hook), Some(Table::Dense(self.embed.clone())), 32, sizes)
    }

    /// One step with each of these tokens in a sequence of its own.
    fn check(&self, model: &mut LlamaCpp, tokens: &[u32]) {
        let sequences: Vec<SequenceId> = tokens.iter().map(|_| model.new_sequence().unwrap()).collect();
        let input = |(sequence, token): (&SequenceId, _)| {
            SequenceInput::new(*sequence, std::slice::from_ref(token), LogitsWanted::Last)
        };
        let batch: Vec<SequenceInput<'_>> = sequences.iter().zip(tokens).map(input).collect();
        let mut logits = Vec::new();
        model.forward(&batch, &mut logits).unwrap();
        assert_eq!(logits.len(), tokens.len() * VOCAB);
        for (logits, &token) in logits.chunks(VOCAB).zip(tokens) {
            let expected = by_hand(&self.embed, &self.layers, &self.final_norm, self.activation, token);
            let difference = difference(logits, &expected);
            assert!(difference <= TOLERANCE, "token {token}: {difference}");
        }
        for sequence in sequences {
            model.free(sequence);
        }
    }
}

impl Random {
    fn dense_of(&mut self, dtype: DenseType, rows: usize, cols: usize) -> DenseTensor {
        let values = self.dense(rows, cols).to_f32();
        let bytes: Vec<u8> = match dtype {
            DenseType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DenseType::F16 => values.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
            DenseType::Bf16 => values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
        };
        DenseTensor { dtype, shape: vec![rows, cols], bytes: bytes.into() }
    }
}

/// Each projection alone, all but one, and mixtures, in the first layer, each with another choice in the second; with and
/// without sub-norms; one token and several; a graph that is made and one that is computed again.
#[test]
fn dense_and_ternary_projections_may_be_mixed() {
    let alone = (0..7).map(|i| 1 << i);
    let all_but_one = (0..7).map(|i| 127 - (1 << i));
    for (i, mask) in alone.chain(all_but_one).chain((0..128).step_by(9)).enumerate() {
        let dense = [DenseType::F32, DenseType::F16, DenseType::Bf16][i % 3];
        let masks = [mask, (mask * 37 + 11) % 128];
        let sub_norms = i % 2 == 0;
        let tiny = Tiny::new(u64::from(mask) + 1, masks, dense, sub_norms);
        let mut model = tiny.load(1 + i % 3, &Arc::default()).unwrap();
        println!("{masks:?} {dense:?}, sub-norms {sub_norms}");
        for tokens in [&[7][..], &[3], &[3, 9, 7], &[1, 2, 5], &[4]] {
            tiny.check(&mut model, tokens);
        }
    }
}

/// Two models on one thread do not take each other's inputs.
#[test]
fn models_may_take_turns() {
    let tinies =
        [Tiny::new(1, [0, 0b11], DenseType::F32, true), Tiny::new(2, [0b1, 0], DenseType::F16, true)];
    let mut models = tinies.each_ref().map(|tiny| tiny.load(1, &Arc::default()).unwrap());
    for token in [1, 2, 2, 3, 3, 3] {
        for (tiny, model) in tinies.iter().zip(&mut models) {
            tiny.check(model, &[token]);
        }
    }
}

#[test]
fn a_panic_in_a_callback_fails_the_step_alone() {
    let guard: Arc<Guard> = Arc::default();
    let tiny = Tiny::new(1, [0, 0b1010], DenseType::Bf16, true);
    for threads in [1, 3] {
        let mut model = tiny.load(threads, &guard).unwrap();
        for callback in ["a matrix product", "attention", "a squared ReLU", "the change of llama.cpp's graph"]
        {
            let sequence = model.new_sequence().unwrap();
            let input = |token| SequenceInput::new(sequence, token, LogitsWanted::Last);
            let mut logits = vec![1.0];
            model.forward(&[input(&[1])], &mut logits).unwrap();
            guard.inject(Some(callback));
            for _ in 0..2 {
                let error = model.forward(&[input(&[2])], &mut logits).unwrap_err();
                assert_eq!(error.kind(), ternion_core::ErrorKind::Backend);
                assert!(error.to_string().contains(&format!("{callback} panicked: injected")), "{error}");
                assert!(logits.is_empty() && model.len(sequence) == 1);
            }
            guard.inject(None);
            model.free(sequence);
            tiny.check(&mut model, &[7, 2]);
        }
    }
}

/// A panic of a kernel, not an injected one: a norm that is shorter than its input.
#[test]
fn a_kernel_that_panics_does_not_end_the_process() {
    let mut tiny = Tiny::new(1, [0, 0], DenseType::F32, true);
    tiny.layers[1].up.input_norm = Some(Random(3).norm(HIDDEN - 1));
    let mut model = tiny.load(2, &Arc::default()).unwrap();
    let sequence = model.new_sequence().unwrap();
    let input = SequenceInput::new(sequence, &[1], LogitsWanted::Last);
    let error = model.forward(&[input], &mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains("a matrix product panicked: lengths of the normalisation"), "{error}");
}

#[test]
fn a_panic_while_llama_cpp_asks_for_tensors_fails_the_load() {
    let guard: Arc<Guard> = Arc::default();
    let tiny = Tiny::new(1, [0, 0], DenseType::F32, true);
    guard.inject(Some("the source of llama.cpp's tensors"));
    let error = tiny.load(1, &guard).err().expect("refused").to_string();
    assert!(error.contains("the source of llama.cpp's tensors panicked: injected"), "{error}");
    guard.inject(None);
    let mut model = tiny.load(1, &guard).unwrap();
    tiny.check(&mut model, &[1]);
}
