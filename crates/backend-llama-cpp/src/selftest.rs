//! A model of one layer, computed through llama.cpp and by hand, before the first real one is used.
//!
//! The changes to llama.cpp's graphs stand on how ggml lays out its nodes and on what its scheduler asks when. That holds
//! for the version that the bindings are pinned to; this shows that it holds for the library that was linked. It takes some
//! milliseconds. One token is enough: its attention is its own value, which keeps what is done by hand short.

use ternion_core::{Error, Result};
use ternion_engine::{CausalLm, ComputeThreads, LogitsWanted, SequenceInput};
use ternion_formats::{
    Activation, DenseTensor, DenseType, LayerTensors, Linear, RmsNorm, RopeScaling, RopeSpec, Table,
    TernaryTensor, Weights,
};
use ternion_kernels as kernels;

use crate::{KvType, LlamaCpp, ffi::ContextSizes, source::Parts};

const HIDDEN: usize = 64;
const INNER: usize = 96;
const HEAD_DIM: usize = 32;
const HEADS: usize = 2;
const KV_HEADS: usize = 1;
const VOCAB: usize = 16;
const EPS: f32 = 1e-5;
const LAYOUT: kernels::TernaryLayout = kernels::TernaryLayout::Quarters;

/// What may differ, relative to the largest logit. A rounding tie decided otherwise moves a logit by some thousandths;
/// SiLU in the place of squared ReLU, or one product left to its placeholder, by more than a tenth.
const TOLERANCE: f32 = 0.02;

/// Computes the model in both ways.
///
/// # Errors
/// If they disagree, or llama.cpp fails.
pub(crate) fn run() -> Result<()> {
    const TOKEN: u32 = 7;
    let mut random = Random(1);
    let (embed, layer, final_norm) = (random.dense(VOCAB, HIDDEN), random.layer(), random.norm(HIDDEN));
    let layers = [layer];
    let expected = by_hand(&embed, &layers, &final_norm, Activation::Relu2, TOKEN);
    let rope = RopeSpec { theta: 500_000.0, scaling: RopeScaling::None };
    let parts = Parts {
        hidden_size: HIDDEN,
        intermediate_size: INNER,
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        vocab_size: VOCAB,
        context_length: 256, // llama.cpp rounds a cache up to that, and warns where it is more than the model's own
        rms_eps: EPS,
        rope: &rope,
        activation: Activation::Relu2,
        layers: &layers,
        final_norm: &final_norm,
        head: Table::Dense(embed.clone()),
        activations: kernels::ActivationType::default(),
        head_node: None,
    };
    let (model, hook) = parts.load()?;
    let sizes = ContextSizes {
        cache_tokens: 32,
        batch: 8,
        sequences: 1,
        threads: ComputeThreads::new(2),
        kv_type: KvType::F32,
        flash_attention: true,
        keeps_prompts: false,
    };
    let mut model = LlamaCpp::start(model, Some(hook), Some(Table::Dense(embed.clone())), 32, sizes)?;
    let sequence = model.new_sequence()?;
    let input = SequenceInput::new(sequence, &[TOKEN], LogitsWanted::Last);
    let mut logits = Vec::new();
    model.forward(&[input], &mut logits)?;
    let difference = difference(&logits, &expected);
    tracing::debug!(difference, "llama.cpp's self-test");
    // Written so that a difference that is not a number fails.
    if difference <= TOLERANCE {
        return Ok(());
    }
    Err(Error::backend(format!(
        "logits differ by {difference:e} of the largest, expected at most {TOLERANCE}"
    )))
}

/// The largest difference, relative to the largest expected logit; not a number if one is missing or not a number.
fn difference(logits: &[f32], expected: &[f32]) -> f32 {
    if logits.len() != expected.len() || logits.iter().any(|x| x.is_nan()) {
        return f32::NAN;
    }
    let largest = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    logits.iter().zip(expected).fold(0.0f32, |most, (a, b)| most.max((a - b).abs())) / largest
}

/// The layers without attention: of one token it is the value, once for each query head.
fn by_hand(
    embed: &DenseTensor,
    layers: &[LayerTensors],
    final_norm: &RmsNorm,
    activation: Activation,
    token: u32,
) -> Vec<f32> {
    let mut h = vec![0.0; HIDDEN];
    embed.view().row(token as usize, &mut h);
    for layer in layers {
        let v = project(&layer.v, &norm(&h, Some(&layer.input_norm)));
        let heads: Vec<f32> = v.chunks(HEAD_DIM).flat_map(|v| v.repeat(HEADS / KV_HEADS)).collect();
        add(&mut h, &project(&layer.o, &norm(&heads, layer.attn_sub_norm.as_ref())));
        let x = norm(&h, Some(&layer.post_attention_norm));
        let (gate, up) = (project(&layer.gate, &x), project(&layer.up, &x));
        let act = |gate: f32| match activation {
            Activation::Relu2 => gate.max(0.0).powi(2),
            Activation::Silu => gate / (1.0 + (-gate).exp()),
        };
        let unit: Vec<f32> = gate.iter().zip(&up).map(|(gate, up)| act(*gate) * up).collect();
        add(&mut h, &project(&layer.down, &norm(&unit, layer.ffn_sub_norm.as_ref())));
    }
    let h = norm(&h, Some(final_norm));
    let rows = embed.to_f32();
    rows.chunks(HIDDEN).map(|row| dot(row, &h)).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(x: &[f32], norm: Option<&RmsNorm>) -> Vec<f32> {
    let Some(RmsNorm { weight, eps }) = norm else { return x.to_vec() };
    let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    x.iter().zip(weight).map(|(x, weight)| weight * x / (mean + eps).sqrt()).collect()
}

/// W1.58A8 as BitNet defines it, or a product of floats.
fn project(linear: &Linear, x: &[f32]) -> Vec<f32> {
    let ternary = match &linear.weights {
        Weights::Ternary(ternary) => ternary,
        Weights::Grouped(matrix) => {
            return Table::Grouped(matrix.clone()).to_f32().chunks(x.len()).map(|row| dot(row, x)).collect();
        }
        Weights::Dense(dense) => return dense.to_f32().chunks(x.len()).map(|row| dot(row, x)).collect(),
    };
    let scale = 127.0 / x.iter().fold(1e-5f32, |most, x| most.max(x.abs()));
    let quantized: Vec<i32> =
        x.iter().map(|x| (x * scale).round_ties_even().clamp(-128.0, 127.0) as i32).collect();
    let plane = ternary.rows / 4;
    (0..ternary.rows)
        .map(|row| {
            let codes = &ternary.codes[row % plane * ternary.cols..][..ternary.cols];
            let trit = |byte: u8| i32::from(byte >> (2 * (row / plane)) & 3) - 1;
            let sum: i32 = codes.iter().zip(&quantized).map(|(byte, x)| trit(*byte) * x).sum();
            sum as f32 * ternary.scale / scale
        })
        .collect()
}

fn add(h: &mut [f32], x: &[f32]) {
    for (h, x) in h.iter_mut().zip(x) {
        *h += x;
    }
}

/// Numbers without a pattern, the same on every machine.
struct Random(u64);

impl Random {
    /// From 0 to 1. The generator is Knuth's MMIX.
    fn unit(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1 << 24) as f32
    }

    fn norm(&mut self, width: usize) -> RmsNorm {
        RmsNorm { weight: (0..width).map(|_| 0.5 + self.unit()).collect(), eps: EPS }
    }

    fn dense(&mut self, rows: usize, cols: usize) -> DenseTensor {
        let bytes: Vec<u8> = (0..rows * cols).flat_map(|_| (self.unit() - 0.5).to_le_bytes()).collect();
        DenseTensor { dtype: DenseType::F32, shape: vec![rows, cols], bytes: bytes.into() }
    }

    fn linear(&mut self, rows: usize, cols: usize) -> Linear {
        let trits: Vec<i8> = (0..rows * cols).map(|_| (self.unit() * 3.0) as i8 - 1).collect();
        let codes = kernels::pack(LAYOUT, &trits, rows, cols)
            .expect("invariant: the shapes above are multiples of 4");
        let scale = 0.1 + 0.1 * self.unit();
        let weights =
            Weights::Ternary(TernaryTensor { codes: codes.into(), layout: LAYOUT, rows, cols, scale });
        Linear { name: String::new(), weights, input_norm: None }
    }

    fn layer(&mut self) -> LayerTensors {
        LayerTensors {
            input_norm: self.norm(HIDDEN),
            q: self.linear(HEADS * HEAD_DIM, HIDDEN),
            k: self.linear(KV_HEADS * HEAD_DIM, HIDDEN),
            v: self.linear(KV_HEADS * HEAD_DIM, HIDDEN),
            q_norm: None,
            k_norm: None,
            attn_sub_norm: Some(self.norm(HEADS * HEAD_DIM)),
            o: self.linear(HIDDEN, HEADS * HEAD_DIM),
            post_attention_norm: self.norm(HIDDEN),
            gate: self.linear(INNER, HIDDEN),
            up: self.linear(INNER, HIDDEN),
            ffn_sub_norm: Some(self.norm(INNER)),
            down: self.linear(HIDDEN, INNER),
        }
    }
}

#[cfg(test)]
mod tests;
