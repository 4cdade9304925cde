//! What a checkpoint consists of and what it takes, for people who want to know before they run it.

use serde::Serialize;

use crate::tensors::kind_name;
use crate::{Checkpoint, DenseTensor, Linear, RmsNorm, Table, Weights};
use ternion_kernels::GroupedMatrix;

/// What a checkpoint is: its tensors and sums over them. Serialises to JSON.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// The checkpoint's name.
    pub name: String,
    /// The architecture as the checkpoint names it.
    pub architecture: String,
    /// The family of decoders, for people.
    pub family: String,
    /// The format, for people.
    pub format: String,
    /// Number of decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Positions that the model was made for.
    pub context_length: usize,
    /// Parameters, ternary and dense together; a tied head counts once.
    pub parameters: u64,
    /// Parameters that are ternary or binary.
    pub ternary_parameters: u64,
    /// Bytes of weights that stay in the mapped files.
    pub mapped_bytes: u64,
    /// Bytes of weights that are held in memory of our own.
    pub owned_bytes: u64,
    /// Bytes that each token of context takes in a KV cache of 32-bit floats.
    pub kv_bytes_per_token: u64,
    /// All tensors in the order in which a token meets them.
    pub tensors: Vec<TensorReport>,
}

/// One tensor of a [`Report`].
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct TensorReport {
    /// Its name, without `.weight`.
    pub name: String,
    /// `ternary`, `binary`, `dense` or `norm`.
    pub kind: &'static str,
    /// How an element is stored: `2-bit`, `1-bit`, `BF16`, `F16` or `F32`.
    pub dtype: &'static str,
    /// Dimensions of the matrix or vector, not of its packed bytes.
    pub shape: Vec<usize>,
    /// Bytes in memory.
    pub bytes: u64,
    /// Whether these stay in the mapped file.
    pub mapped: bool,
    /// What the integer product of a ternary matrix is multiplied by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<f32>,
    /// Columns that share a scale, where there are several in a row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<usize>,
}

impl TensorReport {
    fn dense(name: &str, tensor: &DenseTensor) -> Self {
        Self {
            name: name.to_owned(),
            kind: "dense",
            dtype: tensor.dtype.name(),
            shape: tensor.shape.clone(),
            bytes: tensor.bytes.len() as u64,
            mapped: tensor.bytes.is_mapped(),
            scale: None,
            group: None,
        }
    }

    fn grouped(name: &str, matrix: &GroupedMatrix) -> Self {
        Self {
            name: name.to_owned(),
            kind: match matrix.kind() {
                ternion_kernels::GroupedKind::Ternary => "ternary",
                ternion_kernels::GroupedKind::Binary => "binary",
            },
            dtype: kind_name(matrix),
            shape: vec![matrix.rows(), matrix.cols()],
            bytes: matrix.bytes() as u64,
            mapped: false,
            scale: None,
            group: Some(matrix.group()),
        }
    }

    fn table(name: &str, table: &Table) -> Self {
        match table {
            Table::Dense(tensor) => Self::dense(name, tensor),
            Table::Quantized(quantized) => Self {
                name: name.to_owned(),
                kind: "dense",
                dtype: table.type_name(),
                shape: quantized.shape().to_vec(),
                bytes: quantized.bytes.len() as u64,
                mapped: quantized.bytes.is_mapped(),
                scale: None,
                group: None,
            },
            Table::Grouped(matrix) => Self::grouped(name, matrix),
        }
    }

    fn norm(name: String, norm: &RmsNorm) -> Self {
        let width = norm.weight.len();
        Self {
            name,
            kind: "norm",
            dtype: "F32",
            shape: vec![width],
            bytes: 4 * width as u64,
            mapped: false,
            scale: None,
            group: None,
        }
    }

    fn linear(linear: &Linear) -> Self {
        match &linear.weights {
            Weights::Dense(tensor) => Self::dense(&linear.name, tensor),
            Weights::Grouped(matrix) => Self::grouped(&linear.name, matrix),
            Weights::Ternary(tensor) => Self {
                name: linear.name.clone(),
                kind: "ternary",
                dtype: "2-bit",
                shape: vec![tensor.rows, tensor.cols],
                bytes: tensor.codes.len() as u64,
                mapped: tensor.codes.is_mapped(),
                scale: Some(tensor.scale),
                group: None,
            },
        }
    }

    /// Number of elements.
    pub fn parameters(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }
}

impl Checkpoint {
    /// What this checkpoint consists of and what it takes.
    pub fn report(&self) -> Report {
        let mut tensors = vec![TensorReport::table("model.embed_tokens", &self.embed)];
        for (index, layer) in self.layers.iter().enumerate() {
            let prefix = format!("model.layers.{index}");
            let mut norm = |name: &str, norm: &RmsNorm| {
                tensors.push(TensorReport::norm(format!("{prefix}.{name}"), norm));
            };
            norm("input_layernorm", &layer.input_norm);
            if let (Some(q), Some(k)) = (&layer.q_norm, &layer.k_norm) {
                norm("self_attn.q_norm", q);
                norm("self_attn.k_norm", k);
            }
            if let Some(sub_norm) = &layer.attn_sub_norm {
                norm("self_attn.attn_sub_norm", sub_norm);
            }
            norm("post_attention_layernorm", &layer.post_attention_norm);
            if let Some(sub_norm) = &layer.ffn_sub_norm {
                norm("mlp.ffn_sub_norm", sub_norm);
            }
            for linear in layer.linears() {
                if let Some(input_norm) = &linear.input_norm {
                    tensors.push(TensorReport::norm(format!("{}.rms_norm", linear.name), input_norm));
                }
                tensors.push(TensorReport::linear(linear));
            }
        }
        tensors.push(TensorReport::norm("model.norm".to_owned(), &self.final_norm));
        if let Some(head) = &self.head {
            tensors.push(TensorReport::table("lm_head", head));
        }
        let sum = |value: fn(&TensorReport) -> u64, of: fn(&TensorReport) -> bool| {
            tensors.iter().filter(|t| of(t)).map(value).sum()
        };
        Report {
            name: self.name.clone(),
            architecture: self.spec.architecture.clone(),
            family: self.spec.family.to_string(),
            format: self.format.clone(),
            layers: self.spec.layers,
            hidden_size: self.spec.hidden_size,
            vocab_size: self.spec.vocab_size,
            context_length: self.spec.context_length,
            parameters: sum(TensorReport::parameters, |_| true),
            ternary_parameters: sum(TensorReport::parameters, |t| matches!(t.kind, "ternary" | "binary")),
            mapped_bytes: sum(|t| t.bytes, |t| t.mapped),
            owned_bytes: sum(|t| t.bytes, |t| !t.mapped),
            kv_bytes_per_token: self.spec.kv_bytes_per_token(),
            tensors,
        }
    }
}
