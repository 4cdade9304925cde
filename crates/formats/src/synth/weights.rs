//! The tensors of a synthetic checkpoint, streamed to a safetensors file: memory holds one piece at a time.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use half::{bf16, f16};
use serde_json::{Map, json};
use ternion_core::{Error, ErrorKind, Result};

use super::random::{SplitMix, Table, normal_bf16, ternary_codes};
use super::shape::GROUP;
use super::{Shape, ShapeFamily};
use crate::checkpoint::Progress;

/// Bytes that are generated and written at a time.
const PIECE: usize = 4 << 20;

/// Standard deviation of the embedding, as models are initialised.
const EMBEDDING_DEVIATION: f32 = 0.02;

struct Tensor {
    name: String,
    shape: Vec<usize>,
    content: Content,
}

enum Content {
    /// Four codes a byte.
    Codes,
    Embedding,
    Norm,
    /// The scale of a projection with this many inputs.
    Scale(usize),
    /// The same as 32-bit words, 16 codes each.
    Words,
    /// The scales of the groups of such a projection, in F16.
    GroupScales(usize),
    /// Minus those of the tensor before.
    GroupBiases(usize),
}

impl Tensor {
    fn bytes(&self) -> usize {
        let elements: usize = self.shape.iter().product();
        match self.content {
            Content::Codes => elements,
            Content::Words => 4 * elements,
            _ => 2 * elements,
        }
    }

    fn dtype(&self) -> &'static str {
        match self.content {
            Content::Codes => "U8",
            Content::Words => "U32",
            Content::GroupScales(_) | Content::GroupBiases(_) => "F16",
            Content::Embedding | Content::Norm | Content::Scale(_) => "BF16",
        }
    }
}

/// All tensors of a Qwen3, the small ones of a layer before its large ones.
fn qwen3(shape: &Shape, tied: bool) -> Vec<Tensor> {
    let (hidden, inner, head) = (shape.hidden_size, shape.intermediate_size, shape.head_dim());
    let (q, kv) = (shape.heads * head, shape.kv_heads * head);
    let mut list = Vec::new();
    let norm = |name: String, width| Tensor { name, shape: vec![width], content: Content::Norm };
    let matrix = |name: String, rows: usize, cols: usize| {
        let of = |part: &str, width, content| Tensor {
            name: format!("{name}.{part}"),
            shape: vec![rows, width],
            content,
        };
        [
            of("scales", cols / GROUP, Content::GroupScales(cols)),
            of("biases", cols / GROUP, Content::GroupBiases(cols)),
            of("weight", cols / 16, Content::Words),
        ]
    };
    list.extend(matrix("model.embed_tokens".into(), shape.vocab_size, hidden));
    for layer in 0..shape.layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        for (part, width) in [
            ("input_layernorm", hidden),
            ("self_attn.q_norm", head),
            ("self_attn.k_norm", head),
            ("post_attention_layernorm", hidden),
        ] {
            list.push(norm(name(&format!("{part}.weight")), width));
        }
        for (part, rows, cols) in [
            ("self_attn.q_proj", q, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, q),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ] {
            list.extend(matrix(name(part), rows, cols));
        }
    }
    list.push(norm("model.norm.weight".into(), hidden));
    if !tied {
        list.extend(matrix("lm_head".into(), shape.vocab_size, hidden));
    }
    list
}

/// All tensors, the small ones of a layer before its large ones.
fn tensors(shape: &Shape) -> Vec<Tensor> {
    if let ShapeFamily::Qwen3 { tied } = shape.family {
        return qwen3(shape, tied);
    }
    let (hidden, inner) = (shape.hidden_size, shape.intermediate_size);
    let kv = shape.kv_heads * shape.head_dim();
    let mut list = Vec::new();
    let mut add = |name: String, shape: Vec<usize>, content| list.push(Tensor { name, shape, content });
    add("model.embed_tokens.weight".into(), vec![shape.vocab_size, hidden], Content::Embedding);
    for layer in 0..shape.layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        for (norm, width) in [
            ("input_layernorm", hidden),
            ("self_attn.attn_sub_norm", hidden),
            ("post_attention_layernorm", hidden),
            ("mlp.ffn_sub_norm", inner),
        ] {
            add(name(&format!("{norm}.weight")), vec![width], Content::Norm);
        }
        for (projection, rows, cols) in [
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ] {
            add(name(&format!("{projection}.weight_scale")), vec![1], Content::Scale(cols));
            add(name(&format!("{projection}.weight")), vec![rows / 4, cols], Content::Codes);
        }
    }
    add("model.norm.weight".into(), vec![hidden], Content::Norm);
    list
}

/// Writes the file `path`.
pub(super) fn write(path: &Path, shape: &Shape, seed: u64, progress: &mut Progress<'_>) -> Result<()> {
    let tensors = tensors(shape);
    let io = |e| Error::io(path, e);
    let mut file = File::create(path).map_err(io)?;
    file.write_all(&header(&tensors, path)?).map_err(io)?;

    let (codes, embedding) = (ternary_codes(), normal_bf16(EMBEDDING_DEVIATION));
    let total: u64 = tensors.iter().map(|t| t.bytes() as u64).sum();
    let mut done = 0;
    let mut piece = Vec::new();
    for (stream, tensor) in tensors.iter().enumerate() {
        // Biases are those numbers again that the scales before them are.
        let again = u64::from(matches!(tensor.content, Content::GroupBiases(_)));
        let mut random = SplitMix::new(seed, stream as u64 - again);
        let mut left = tensor.bytes();
        while left > 0 {
            piece.resize(left.min(PIECE), 0);
            fill(&mut piece, &tensor.content, &mut random, &codes, &embedding);
            file.write_all(&piece).map_err(io)?;
            left -= piece.len();
            done += piece.len() as u64;
            progress(done, total);
        }
    }
    file.flush().map_err(io)
}

fn fill(out: &mut [u8], content: &Content, random: &mut SplitMix, codes: &Table<1>, embedding: &Table<2>) {
    let mut each = |value: &dyn Fn(&mut SplitMix) -> f32| {
        for element in out.as_chunks_mut().0 {
            *element = bf16::from_f32(value(random)).to_le_bytes();
        }
    };
    match content {
        Content::GroupScales(cols) | Content::GroupBiases(cols) => {
            let sign = if matches!(content, Content::GroupBiases(_)) { -1.0 } else { 1.0 };
            for element in out.as_chunks_mut().0 {
                let scale = (0.75 + 0.5 * random.uniform()) / (0.6 * *cols as f32).sqrt();
                *element = f16::from_f32(sign * scale).to_le_bytes();
            }
        }
        Content::Norm => each(&|random| 1.0 + 0.1 * random.normal()),
        // With six in ten weights not zero this keeps a projection's output at the scale of its input.
        Content::Scale(cols) => each(&|random| (0.75 + 0.5 * random.uniform()) / (0.6 * *cols as f32).sqrt()),
        Content::Words | Content::Codes => random.fill(codes, out),
        Content::Embedding => random.fill(embedding, out),
    }
}

fn header(tensors: &[Tensor], path: &Path) -> Result<Vec<u8>> {
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut begin = 0;
    for tensor in tensors {
        let end = begin + tensor.bytes();
        let entry = json!({"dtype": tensor.dtype(), "shape": tensor.shape, "data_offsets": [begin, end]});
        entries.insert(tensor.name.clone(), entry);
        begin = end;
    }
    let mut json = serde_json::to_vec(&entries).map_err(|e| {
        Error::new(ErrorKind::Io, "cannot be serialised").with("path", path.display()).with_source(e)
    })?;
    // Padded, so that the data begins at a multiple of 64 bytes, the width of the widest vector load.
    json.resize((json.len() + 8).next_multiple_of(64) - 8, b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    Ok(bytes)
}
