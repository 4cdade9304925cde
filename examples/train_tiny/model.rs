//! The graph of BitNet b1.58 2B4T on candle's autograd: what inference computes, with float masters behind the ternary
//! weights.

use candle_core::{Device, Result, Tensor, Var};

use super::attention::{DocumentSoftmax, Places, Rope};
use super::ops::{self, GatedUnit, Norm, with_floats};
use super::text::Random;

/// Positions that the configuration promises; longer texts than those of the training degrade.
pub(crate) const CONTEXT: usize = 1024;

/// 2B4T's.
pub(crate) const THETA: f32 = 500_000.0;

/// Deviation of the weights at the start, about 1 / sqrt(hidden).
const DEVIATION: f32 = 0.05;

/// The sizes of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Shape {
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) vocab: usize,
}

impl Shape {
    pub(crate) fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }

    /// Names and shapes of all parameters, in the order of their making. Names are those of Hugging Face.
    fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, wide, kv) = (self.hidden, self.intermediate, self.kv_heads * self.head_dim());
        let mut list = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab, hidden])];
        for layer in 0..self.layers {
            let parts: [(&str, Vec<usize>); 11] = [
                ("input_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![hidden, hidden]),
                ("self_attn.k_proj", vec![kv, hidden]),
                ("self_attn.v_proj", vec![kv, hidden]),
                ("self_attn.attn_sub_norm", vec![hidden]),
                ("self_attn.o_proj", vec![hidden, hidden]),
                ("post_attention_layernorm", vec![hidden]),
                ("mlp.gate_proj", vec![wide, hidden]),
                ("mlp.up_proj", vec![wide, hidden]),
                ("mlp.ffn_sub_norm", vec![wide]),
                ("mlp.down_proj", vec![hidden, wide]),
            ];
            list.extend(parts.map(|(part, shape)| (format!("model.layers.{layer}.{part}.weight"), shape)));
        }
        list.push(("model.norm.weight".to_owned(), vec![hidden]));
        list
    }
}

/// A parameter with its name.
pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) value: Var,
}

/// A model in training.
pub(crate) struct Model {
    pub(crate) shape: Shape,
    pub(crate) parameters: Vec<Parameter>,
}

impl Model {
    /// Norms of 1, all else random.
    pub(crate) fn new(shape: Shape, seed: u64) -> Result<Self> {
        let mut random = Random::new(seed, u64::MAX - 1);
        Self::from_values(shape, |_, dims| {
            let count = dims.iter().product();
            match dims {
                [_] => vec![1.0; count],
                _ => (0..count).map(|_| DEVIATION * random.normal()).collect(),
            }
        })
    }

    /// A model whose parameters are what `values` gives for a name and a shape.
    pub(crate) fn from_values(
        shape: Shape,
        mut values: impl FnMut(&str, &[usize]) -> Vec<f32>,
    ) -> Result<Self> {
        let parameters = shape.parameters().into_iter().map(|(name, dims)| {
            let tensor = Tensor::from_vec(values(&name, &dims), dims, &Device::Cpu)?;
            Ok(Parameter { name, value: Var::from_tensor(&tensor)? })
        });
        Ok(Self { shape, parameters: parameters.collect::<Result<_>>()? })
    }

    /// Numbers in all parameters.
    pub(crate) fn count(&self) -> usize {
        self.parameters.iter().map(|p| p.value.elem_count()).sum()
    }

    /// The parameters as inference has them, ternary where it is ternary. Straight through: the gradient by such a weight is
    /// taken for the gradient by its master.
    pub(crate) fn quantised(&self) -> Result<Quantised> {
        let weights = self.parameters.iter().map(|Parameter { name, value }| {
            let values = with_floats(value, |values| match value.dims() {
                [_, cols] if name.ends_with("_proj.weight") => ops::ternary(values, *cols),
                _ => ops::rounded(values),
            })?;
            Var::from_tensor(&Tensor::from_vec(values, value.shape(), &Device::Cpu)?)
        });
        Ok(Quantised { shape: self.shape, weights: weights.collect::<Result<_>>()? })
    }
}

/// The weights of one step.
pub(crate) struct Quantised {
    shape: Shape,
    /// In the order of the parameters.
    pub(crate) weights: Vec<Var>,
}

impl Quantised {
    /// Logits `[T, vocab]` of `tokens`, rows of `places` one after the other.
    pub(crate) fn forward(&self, tokens: &[u32], places: &Places) -> Result<Tensor> {
        let Shape { hidden, heads, kv_heads, layers, .. } = self.shape;
        let head_dim = self.shape.head_dim();
        let (count, length) = (tokens.len(), places.length);
        let (rows, group) = (count / length, heads / kv_heads);
        let kv = kv_heads * head_dim;
        let rope = Rope::new(places, THETA, head_dim);

        let mut parameters = self.weights.iter().map(Var::as_tensor);
        let mut next = || parameters.next().expect("invariant: the parameters are those of the shape");
        let norm = |x: &Tensor, w: &Tensor, quantise| x.apply_op2(w, Norm { quantise });
        let linear = |x: &Tensor, w: &[&Tensor]| x.matmul(&Tensor::cat(w, 0)?.t()?);

        let embed = next();
        let mut h = embed.index_select(&Tensor::from_slice(tokens, count, &Device::Cpu)?, 0)?;
        for _ in 0..layers {
            let x = norm(&h, next(), true)?;
            let qkv = linear(&x, &[next(), next(), next()])?;
            let part = |start, width| qkv.narrow(1, start, width)?.contiguous();
            let q = part(0, hidden)?.apply_op1(rope.clone())?;
            let k = part(hidden, kv)?.apply_op1(rope.clone())?;
            let v = part(hidden + kv, kv)?;
            // Query head i uses key-value head i / group.
            let q = q.reshape((rows, length, kv_heads, group, head_dim))?.permute((0, 2, 3, 1, 4))?;
            let q = q.contiguous()?.reshape((rows, kv_heads, group * length, head_dim))?;
            let split =
                |x: Tensor| x.reshape((rows, length, kv_heads, head_dim))?.transpose(1, 2)?.contiguous();
            let (k, v) = (split(k)?, split(v)?);
            let scale = 1.0 / (head_dim as f32).sqrt();
            let softmax = DocumentSoftmax { places: places.clone(), scale };
            let o = q.matmul(&k.t()?)?.apply_op1(softmax)?.matmul(&v)?;
            let o = o.reshape((rows, kv_heads, group, length, head_dim))?.permute((0, 3, 1, 2, 4))?;
            let o = norm(&o.contiguous()?.reshape((count, hidden))?, next(), true)?;
            h = (h + linear(&o, &[next()])?)?;

            let x = norm(&h, next(), true)?;
            let g = linear(&x, &[next(), next()])?.apply_op1(GatedUnit)?;
            let g = norm(&g, next(), true)?;
            h = (h + linear(&g, &[next()])?)?;
        }
        norm(&h, next(), false)?.matmul(&embed.t()?)
    }
}
