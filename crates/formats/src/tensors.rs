//! The tensors of a decoder as an engine sees them: norms, and projections that are ternary or dense.

use std::ops::Range;

use std::sync::Arc;

use ternion_core::Result as CoreResult;
use ternion_kernels::{DenseRef, GroupedMatrix, TernaryLayout, TernaryRef, WeightsError, kv::MAX_SUM};

use crate::{QuantizedTensor, SharedBytes, grouped};

/// The element type of a dense tensor, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DenseType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    Bf16,
}

impl DenseType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The name that safetensors gives it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
        }
    }

    /// Elements of this type as the kernels take them.
    pub fn view(self, bytes: &[u8]) -> DenseRef<'_> {
        match self {
            Self::F32 => DenseRef::F32(bytes),
            Self::F16 => DenseRef::F16(bytes),
            Self::Bf16 => DenseRef::Bf16(bytes),
        }
    }

    /// Whether no element of `bytes` is infinite or not a number.
    pub(crate) fn is_finite(self, bytes: &[u8]) -> bool {
        // A float is non-finite if all bits of its exponent are set, so the elements need no conversion. The loops have no branch and keep
        // the width of the elements, so that they become vector instructions.
        fn any_half(bytes: &[u8], exponent: u16) -> bool {
            let halves = bytes.as_chunks().0.iter().map(|b| u16::from_le_bytes(*b));
            halves.fold(0, |any, bits| any | u16::from(bits & exponent == exponent)) != 0
        }
        fn any_single(bytes: &[u8], exponent: u32) -> bool {
            let singles = bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b));
            singles.fold(0, |any, bits| any | u32::from(bits & exponent == exponent)) != 0
        }
        !match self {
            Self::F32 => any_single(bytes, 0x7f80_0000),
            Self::F16 => any_half(bytes, 0x7c00),
            Self::Bf16 => any_half(bytes, 0x7f80),
        }
    }
}

/// A dense tensor in row-major order. Its bytes need not be aligned.
#[derive(Debug, Clone)]
pub struct DenseTensor {
    /// Element type.
    pub dtype: DenseType,
    /// Dimensions, outermost first; their product times the element size is the length of `bytes`.
    pub shape: Vec<usize>,
    /// The elements.
    pub bytes: SharedBytes,
}

impl DenseTensor {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// Row `index` of a matrix, as a matrix of one row.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, index: usize) -> Self {
        self.rows(index..index + 1)
    }

    /// Some rows of a matrix, as a matrix of their own.
    ///
    /// # Panics
    /// If there are no such rows.
    pub fn rows(&self, rows: Range<usize>) -> Self {
        let width: usize = self.shape[1..].iter().product();
        let bytes = rows.start * width * self.dtype.size()..rows.end * width * self.dtype.size();
        let bytes = self.bytes.slice(bytes).expect("rows of the matrix");
        Self { dtype: self.dtype, shape: vec![rows.len(), width], bytes }
    }

    /// The same elements as the kernels take them.
    pub fn view(&self) -> DenseRef<'_> {
        self.dtype.view(&self.bytes)
    }

    /// All elements as single-precision floats.
    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            DenseType::F32 => {
                self.bytes.as_chunks().0.iter().map(|&b: &[u8; 4]| f32::from_le_bytes(b)).collect()
            }
            DenseType::F16 => {
                let halves = self.bytes.as_chunks().0.iter();
                halves.map(|&b: &[u8; 2]| half::f16::from_le_bytes(b).to_f32()).collect()
            }
            DenseType::Bf16 => {
                let halves = self.bytes.as_chunks().0.iter();
                halves.map(|&b: &[u8; 2]| half::bf16::from_le_bytes(b).to_f32()).collect()
            }
        }
    }
}

/// A ternary matrix `[rows, cols]`, packed four codes `w + 1` to a byte. No code is 3.
#[derive(Debug, Clone)]
pub struct TernaryTensor {
    /// `rows / 4 * cols` bytes.
    pub codes: SharedBytes,
    /// Where each weight is in them: `Quarters` in safetensors, `I2s` in GGUF.
    pub layout: TernaryLayout,
    /// Output width; a multiple of 4.
    pub rows: usize,
    /// Input width; at most 131072, so that an integer product is exact.
    pub cols: usize,
    /// Multiplies the integer product, however the checkpoint stores it. Finite and not zero.
    pub scale: f32,
}

impl TernaryTensor {
    /// The same matrix as the kernels take it.
    ///
    /// # Errors
    /// Where the fields contradict each other, which those of a [`Checkpoint`](crate::Checkpoint) do not.
    pub fn view(&self) -> Result<TernaryRef<'_>, WeightsError> {
        self.view_of(&self.codes)
    }

    /// The same matrix with its codes elsewhere.
    ///
    /// # Errors
    /// As [`view`](Self::view), and where there are more or fewer codes.
    pub fn view_of<'a>(&self, codes: &'a [u8]) -> Result<TernaryRef<'a>, WeightsError> {
        TernaryRef::new(self.layout, codes, self.rows, self.cols)
    }
}

/// The weights of a projection.
#[derive(Debug, Clone)]
pub enum Weights {
    /// `y = (quantised(x) @ W^T) * scale / activation_scale`
    Ternary(TernaryTensor),
    /// `y = x @ W^T`, shape `[rows, cols]`
    Dense(DenseTensor),
    /// `y = x @ W^T`, with a scale for each group of a row. Repacked when it was loaded.
    Grouped(Arc<GroupedMatrix>),
}

/// An embedding or a head, `[vocab_size, hidden_size]`.
#[derive(Debug, Clone)]
pub enum Table {
    /// Plain weights.
    Dense(DenseTensor),
    /// Plain weights in a quantised type of GGUF, decoded as they are read.
    Quantized(QuantizedTensor),
    /// Ternary or binary weights with a scale for each group of a row. Repacked when they were loaded.
    Grouped(Arc<GroupedMatrix>),
}

impl Table {
    /// `[rows, cols]`
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Dense(dense) => [dense.shape[0], dense.shape[1]],
            Self::Quantized(table) => table.shape(),
            Self::Grouped(matrix) => [matrix.rows(), matrix.cols()],
        }
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape().iter().product()
    }

    /// The plain weights, for a form that holds no others.
    pub(crate) fn dense(&self) -> CoreResult<&DenseTensor> {
        match self {
            Self::Dense(dense) => Ok(dense),
            Self::Quantized(_) | Self::Grouped(_) => Err(not_written()),
        }
    }

    /// The bytes of plain weights, which may lie in a file.
    pub fn bytes(&self) -> Option<&SharedBytes> {
        match self {
            Self::Dense(dense) => Some(&dense.bytes),
            Self::Quantized(table) => Some(&table.bytes),
            Self::Grouped(_) => None,
        }
    }

    /// How many bytes it takes.
    pub fn size(&self) -> usize {
        match self {
            Self::Dense(dense) => dense.bytes.len(),
            Self::Quantized(table) => table.bytes.len(),
            Self::Grouped(matrix) => matrix.bytes(),
        }
    }

    /// Whether the weights lie in a mapped file rather than in memory of our own.
    pub fn is_mapped(&self) -> bool {
        self.bytes().is_some_and(SharedBytes::is_mapped)
    }

    /// The element type, for people.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Dense(dense) => dense.dtype.name(),
            Self::Quantized(table) => table.kind().name(),
            Self::Grouped(matrix) => kind_name(matrix),
        }
    }

    /// Row `index` as floats.
    ///
    /// # Errors
    /// [`Io`](ternion_core::ErrorKind::Io) where it cannot be read.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not as long as one.
    pub fn row(&self, index: usize, out: &mut [f32]) -> CoreResult<()> {
        match self {
            Self::Dense(dense) => dense.dtype.view(&dense.row(index).bytes.loaded()?).row(0, out),
            Self::Quantized(table) => table.decode_rows(index..index + 1, out)?,
            Self::Grouped(matrix) => matrix.row(index, out),
        }
        Ok(())
    }

    /// As plain weights, which hold all values exactly: F16 or F32 where they are grouped, F32 where they are quantised.
    pub fn to_dense(&self) -> DenseTensor {
        match self {
            Self::Dense(dense) => dense.clone(),
            Self::Quantized(table) => table.to_dense(),
            Self::Grouped(matrix) => grouped::to_dense(matrix),
        }
    }

    /// All elements as single-precision floats.
    pub fn to_f32(&self) -> Vec<f32> {
        self.to_dense().to_f32()
    }
}

/// An error about a form that has no scales for groups of a row.
pub(crate) fn not_written() -> ternion_core::Error {
    ternion_core::Error::unsupported("this form cannot hold weights with a scale for each group of a row")
}

/// How grouped weights are stored, for people.
pub(crate) fn kind_name(matrix: &GroupedMatrix) -> &'static str {
    match matrix.kind() {
        ternion_kernels::GroupedKind::Ternary => "2-bit",
        ternion_kernels::GroupedKind::Binary => "1-bit",
    }
}

/// A projection without bias: what a decoder sees of a family's weights.
#[derive(Debug, Clone)]
pub struct Linear {
    /// The module's name in the checkpoint, such as `model.layers.0.mlp.down_proj`.
    pub name: String,
    /// The weights.
    pub weights: Weights,
    /// An RMS norm on the input, before its activations are quantised.
    pub input_norm: Option<RmsNorm>,
}

impl Linear {
    /// Output width.
    pub fn rows(&self) -> usize {
        match &self.weights {
            Weights::Ternary(t) => t.rows,
            Weights::Dense(d) => d.shape[0],
            Weights::Grouped(g) => g.rows(),
        }
    }

    /// Input width.
    pub fn cols(&self) -> usize {
        match &self.weights {
            Weights::Ternary(t) => t.cols,
            Weights::Dense(d) => d.shape[1],
            Weights::Grouped(g) => g.cols(),
        }
    }

    /// The bytes of the weights, which may lie in a file. `None`: they were repacked when they were loaded.
    pub fn bytes(&self) -> Option<&SharedBytes> {
        match &self.weights {
            Weights::Ternary(t) => Some(&t.codes),
            Weights::Dense(d) => Some(&d.bytes),
            Weights::Grouped(_) => None,
        }
    }

    /// Whether the weights lie in a mapped file rather than in memory of our own.
    pub fn is_mapped(&self) -> bool {
        self.bytes().is_some_and(SharedBytes::is_mapped)
    }

    /// How many bytes the weights take.
    pub fn size(&self) -> usize {
        match &self.weights {
            Weights::Ternary(t) => t.codes.len(),
            Weights::Dense(d) => d.bytes.len(),
            Weights::Grouped(g) => g.bytes(),
        }
    }
}

/// `weight * x / sqrt(mean(x^2) + eps)`
#[derive(Debug, Clone, PartialEq)]
pub struct RmsNorm {
    /// One factor for each element of `x`.
    pub weight: Vec<f32>,
    /// Added to the mean square.
    pub eps: f32,
}

/// One decoder layer.
#[derive(Debug, Clone)]
pub struct LayerTensors {
    /// Before `q`, `k` and `v`: `[hidden_size]`.
    pub input_norm: RmsNorm,
    /// `[heads * head_dim, hidden_size]`
    pub q: Linear,
    /// `[kv_heads * head_dim, hidden_size]`
    pub k: Linear,
    /// `[kv_heads * head_dim, hidden_size]`
    pub v: Linear,
    /// On each head of the queries, before they are rotated: `[head_dim]`.
    pub q_norm: Option<RmsNorm>,
    /// On each head of the keys, before they are rotated: `[head_dim]`. There with `q_norm` or not at all.
    pub k_norm: Option<RmsNorm>,
    /// On the concatenated heads, before `o`: `[heads * head_dim]`.
    pub attn_sub_norm: Option<RmsNorm>,
    /// `[hidden_size, heads * head_dim]`
    pub o: Linear,
    /// Before `gate` and `up`: `[hidden_size]`.
    pub post_attention_norm: RmsNorm,
    /// `[intermediate_size, hidden_size]`
    pub gate: Linear,
    /// `[intermediate_size, hidden_size]`
    pub up: Linear,
    /// On `activation(gate) * up`, before `down`: `[intermediate_size]`.
    pub ffn_sub_norm: Option<RmsNorm>,
    /// `[hidden_size, intermediate_size]`
    pub down: Linear,
}

impl LayerTensors {
    /// The seven projections in the order in which they are applied.
    pub fn linears(&self) -> [&Linear; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }

    /// Whether keys and values are integer sums of at most [`MAX_SUM`] times a factor of the token, before keys are rotated:
    /// products of ternary weights with the shared input in int8, without a norm of each head.
    pub fn has_integer_kv(&self) -> bool {
        let is_sum = |linear: &Linear| {
            matches!(linear.weights, Weights::Ternary(_))
                && linear.input_norm.is_none()
                && linear.cols().saturating_mul(127) <= MAX_SUM
        };
        self.k_norm.is_none() && is_sum(&self.k) && is_sum(&self.v)
    }

    /// The norms in the order in which they are applied, those of the projections' inputs excepted.
    pub fn norms(&self) -> impl Iterator<Item = &RmsNorm> {
        [
            Some(&self.input_norm),
            self.q_norm.as_ref(),
            self.k_norm.as_ref(),
            self.attn_sub_norm.as_ref(),
            Some(&self.post_attention_norm),
            self.ffn_sub_norm.as_ref(),
        ]
        .into_iter()
        .flatten()
    }
}
