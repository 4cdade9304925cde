//! A decoder layer: attention and feed-forward on hidden states, in buffers that all layers and passes share. To candle
//! all layers together are one operation on a tensor, so that nothing is allocated between their steps.

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, bail};
use ternion_engine::batch::Span;
use ternion_engine::kv::{Factors, KeyRotation, KvCache, KvType};
use ternion_formats::{Activation, LayerTensors, RmsNorm};
use ternion_kernels::{self as kernels, ActivationType, Attention, AttentionSequence};

use crate::ops::{self, Input, Projections, sized};
use crate::residency::Place;
use crate::stream::Stream;

/// The sub-norms are part of the projections behind them.
pub(crate) struct Layer {
    qkv: Projections,
    /// Norms of each head of queries and keys.
    head_norms: Option<(RmsNorm, RmsNorm)>,
    o: Projections,
    gate_up: Projections,
    activation: Activation,
    down: Projections,
}

impl Layer {
    pub(crate) fn new(
        tensors: LayerTensors,
        places: [Place; 7],
        stream: Option<&Arc<Stream>>,
        activation: Activation,
        activations: ActivationType,
    ) -> Self {
        let t = tensors;
        let [q, k, v, o, gate, up, down] = places;
        let input = Some(t.input_norm);
        let post_attention = Some(t.post_attention_norm);
        Self {
            qkv: Projections::new(input, vec![(t.q, q), (t.k, k), (t.v, v)], stream, activations),
            head_norms: t.q_norm.zip(t.k_norm),
            o: Projections::new(t.attn_sub_norm, vec![(t.o, o)], stream, activations),
            gate_up: Projections::new(post_attention, vec![(t.gate, gate), (t.up, up)], stream, activations),
            activation,
            down: Projections::new(t.ffn_sub_norm, vec![(t.down, down)], stream, activations),
        }
    }
}

/// Buffers for the steps of a layer.
#[derive(Default)]
pub(crate) struct Scratch {
    input: Input,
    /// Queries, keys, values and what attention makes of them; later gate and up.
    wide: Vec<f32>,
    gated: Vec<f32>,
    /// Of keys, then of values: what the sums of each token are multiplied by.
    factors: Vec<f32>,
    /// What is added to the hidden states.
    sum: Vec<f32>,
}

/// All layers, for the tokens of one batch: hidden states `[T, hidden]` to such.
pub(crate) struct Layers<'a> {
    pub(crate) layers: &'a [Layer],
    pub(crate) cache: RefCell<&'a mut KvCache>,
    pub(crate) scratch: RefCell<&'a mut Scratch>,
    pub(crate) spans: &'a [Span],
    /// `past` is that of no span.
    pub(crate) shape: Attention,
    /// Cosines and sines of the rotary embedding, `[T, head_dim / 2]` each.
    pub(crate) angles: (&'a [f32], &'a [f32]),
    /// The same for keys that are stored without it, block by block.
    pub(crate) rotations: &'a [KeyRotation],
}

impl CustomOp1 for Layers<'_> {
    fn name(&self) -> &'static str {
        "decoder-layers"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut h = ops::floats(storage, layout)?.to_vec();
        let (tokens, _) = layout.shape().dims2()?;
        let mut cache = self.cache.borrow_mut();
        let mut scratch = self.scratch.borrow_mut();
        for (index, layer) in self.layers.iter().enumerate() {
            self.attention(index, layer, tokens, &mut h, &mut cache, &mut scratch)?;
            feed_forward(layer, tokens, &mut h, &mut scratch)?;
        }
        Ok((CpuStorage::F32(h), layout.shape().clone()))
    }
}

impl Layers<'_> {
    fn attention(
        &self,
        index: usize,
        layer: &Layer,
        tokens: usize,
        h: &mut [f32],
        cache: &mut KvCache,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Attention { heads, kv_heads, head_dim, .. } = self.shape;
        let (width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let Scratch { input, wide, factors, sum, .. } = scratch;
        let wide = sized(wide, tokens * (3 * width + 4 * kv_width));
        let (qkv, rest) = wide.split_at_mut(tokens * (width + 2 * kv_width));
        let (q, rest) = rest.split_at_mut(tokens * width);
        let (k, rest) = rest.split_at_mut(tokens * kv_width);
        let (v, attended) = rest.split_at_mut(tokens * kv_width);
        if layer.qkv.rows() != width + 2 * kv_width {
            bail!("layer {index}: {} rows of queries, keys and values", layer.qkv.rows());
        }
        layer.qkv.forward(h, input, qkv)?;
        if let Some((q, k)) = &layer.head_norms {
            kernels::norm_heads(&self.shape, qkv, (&q.weight, q.eps), (&k.weight, k.eps));
        }
        let are_sums = cache.kv_type() == KvType::Exact;
        if are_sums {
            kernels::rotate_queries(&self.shape, qkv, self.angles, q, k, v);
            factors.clear();
            factors.extend(layer.qkv.factors(1, input).chain(layer.qkv.factors(2, input)));
        } else {
            kernels::rotate(&self.shape, qkv, self.angles, q, k, v);
        }
        for span in self.spans {
            let tokens_of = span.start..span.start + span.count;
            let kv = tokens_of.start * kv_width..tokens_of.end * kv_width;
            let (k, v) = (&k[kv.clone()], &v[kv]);
            let written = if are_sums {
                let (keys, values) = factors.split_at(tokens);
                let factors = Factors { keys: &keys[tokens_of.clone()], values: &values[tokens_of] };
                cache.write_sums(span.sequence, index, (k, v), factors)
            } else {
                cache.write(span.sequence, index, k, v)
            };
            written.map_err(candle_core::Error::wrap)?;
        }
        let sequence = |span: &Span| {
            let kv = cache.layer(span.sequence, index).map_err(candle_core::Error::wrap)?;
            let kv = kv.with_rotations(self.rotations);
            Ok(AttentionSequence { past: span.past, tokens: span.count, kv })
        };
        let sequences = self.spans.iter().map(sequence).collect::<Result<Vec<_>>>()?;
        kernels::attention_all(&self.shape, &sequences, q, attended);
        add_projected(&layer.o, attended, h, input, sum)
    }
}

fn feed_forward(layer: &Layer, tokens: usize, h: &mut [f32], scratch: &mut Scratch) -> Result<()> {
    let Scratch { input, wide, gated, sum, .. } = scratch;
    let gated = sized(gated, tokens * layer.gate_up.rows() / 2);
    layer.gate_up.gated(layer.activation, h, input, wide, gated)?;
    add_projected(&layer.down, gated, h, input, sum)
}

/// Adds the projections of `x` to the hidden states.
fn add_projected(
    projections: &Projections,
    x: &[f32],
    h: &mut [f32],
    input: &mut Input,
    sum: &mut Vec<f32>,
) -> Result<()> {
    let sum = sized(sum, h.len());
    projections.forward(x, input, sum)?;
    kernels::add(h, sum);
    Ok(())
}
