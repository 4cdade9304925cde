//! The operators of the fast variant on weights with a scale for each group of a row.
//!
//! An embedding reads its rows where the runtime has mapped them. A linear operator repacks its matrices once, when the session
//! is made, into the layout that the kernels of `ternion-kernels` read.

use half::f16;
use ort::operator::{ComputeContext, KernelContext, Operator, OperatorInput, OperatorOutput};
use ort::value::{DynTensorValueType, TensorElementType};
use ternion_formats::onnx::fast;
use ternion_kernels::{
    self as kernels, ActivationType, GroupedKind, GroupedMatrix, GroupedProduct, WeightsError,
};

use crate::attributes;
use crate::ops::{
    Guarded, Scratch, Shared, Weight, epsilon, failed, kernel, matrix, normalised, optional, required, write,
};

/// The most matrices of an operator: those of query, key and value.
const MOST_MATRICES: usize = 3;

/// Types of the scales.
pub(crate) trait Scale: Weight {
    fn value(self) -> f32;
}

impl Scale for f32 {
    fn value(self) -> f32 {
        self
    }
}

impl Scale for f16 {
    fn value(self) -> f32 {
        self.to_f32()
    }
}

/// A matrix as it lies in the file.
#[derive(Clone, Copy)]
struct Stored<'a, S> {
    kind: GroupedKind,
    codes: &'a [u8],
    scales: &'a [S],
    rows: usize,
    cols: usize,
    group: usize,
}

impl<'a, S: Scale> Stored<'a, S> {
    fn new(
        kind: GroupedKind,
        (codes_shape, codes): (&[i64], &'a [u8]),
        (scales_shape, scales): (&[i64], &'a [S]),
    ) -> ort::Result<Self> {
        let (rows, width) = matrix(codes_shape)?;
        let (lines, groups) = matrix(scales_shape)?;
        let cols = width.saturating_mul(kind.word() / 4);
        let group = cols / groups;
        if lines != rows || !cols.is_multiple_of(groups) || !group.is_multiple_of(kind.word()) {
            return failed(format!("codes of the shape {codes_shape:?} and scales of {scales_shape:?}"));
        }
        Ok(Self { kind, codes, scales, rows, cols, group })
    }

    /// The codes and scales of a row.
    fn row(&self, row: usize) -> (&'a [u8], &'a [S]) {
        let (width, groups) = (self.codes.len() / self.rows, self.cols / self.group);
        (&self.codes[row * width..(row + 1) * width], &self.scales[row * groups..(row + 1) * groups])
    }

    /// Fills the words and scales of a row, which are checked as those of every other format are.
    fn fill(&self, row: usize, words: &mut [u32], scales: &mut [f32]) -> Result<(), Wrong> {
        let (codes, own) = self.row(row);
        if self.kind == GroupedKind::Ternary && kernels::find_invalid_code(codes).is_some() {
            return Err(Wrong(format!("row {row} holds the code 3; expected the codes 0, 1 and 2")));
        }
        for (word, bytes) in words.iter_mut().zip(codes.as_chunks().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        for (group, (scale, own)) in scales.iter_mut().zip(own).enumerate() {
            *scale = own.value();
            if !kernels::is_group_scale(*scale) {
                let message = format!(
                    "row {row}, group {group}: the scale is {scale:?}, expected a finite number, not -0.0"
                );
                return Err(Wrong(message));
            }
        }
        Ok(())
    }

    fn packed(&self) -> ort::Result<GroupedMatrix> {
        let matrix = GroupedMatrix::new(
            self.kind,
            [self.rows, self.cols],
            self.group,
            |row, words: &mut [u32], scales: &mut [f32]| self.fill(row, words, scales),
        );
        matrix.map_err(|Wrong(message)| ort::Error::new(message))
    }
}

/// Why a matrix cannot be used.
struct Wrong(String);

impl From<WeightsError> for Wrong {
    fn from(error: WeightsError) -> Self {
        Self(error.to_string())
    }
}

/// The attribute `bits`.
fn kind(context: &KernelContext<'_>) -> ort::Result<GroupedKind> {
    match context.get::<i64>("bits") {
        Some(2) => Ok(GroupedKind::Ternary),
        Some(1) => Ok(GroupedKind::Binary),
        other => failed(format!("the attribute `bits` is {other:?}, expected 1 or 2")),
    }
}

/// Rows of a table.
pub(crate) struct Embedding<S>(std::marker::PhantomData<S>);

impl<S> Embedding<S> {
    pub(crate) fn new() -> Self {
        Self(std::marker::PhantomData)
    }
}

impl<S: Scale> Operator for Embedding<S> {
    type Kernel<'a> = Guarded;

    fn name(&self) -> &str {
        fast::GROUPED_EMBEDDING
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [
            OperatorInput::required(TensorElementType::Int64),
            OperatorInput::required(TensorElementType::Uint8),
            OperatorInput::required(S::ELEMENT),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel(&self, context: &KernelContext<'_>) -> ort::Result<Guarded> {
        kernel(fast::GROUPED_EMBEDDING, || {
            let kind = kind(context)?;
            Ok(move |ctx: &ComputeContext| embed::<S>(ctx, kind))
        })
    }
}

fn embed<S: Scale>(ctx: &ComputeContext, kind: GroupedKind) -> ort::Result<()> {
    let (ids, codes, scales) = (required(ctx, 0)?, required(ctx, 1)?, required(ctx, 2)?);
    let (_, ids) = ids.try_extract_tensor::<i64>()?;
    let (codes, scales) = (codes.try_extract_tensor::<u8>()?, scales.try_extract_tensor::<S>()?);
    let table = Stored::new(kind, (codes.0, codes.1), (scales.0, scales.1))?;
    let (words, groups) = (table.cols / kind.word(), table.cols / table.group);
    let (mut words, mut scales) = (vec![0; words], vec![0.0; groups]);
    write(ctx, ids.len(), table.cols, |out| {
        for (id, out) in ids.iter().zip(out.chunks_exact_mut(table.cols)) {
            let Some(id) = usize::try_from(*id).ok().filter(|id| *id < table.rows) else {
                return failed(format!("the token {id} is not below {}", table.rows));
            };
            table.fill(id, &mut words, &mut scales).map_err(|Wrong(message)| ort::Error::new(message))?;
            for (i, out) in out.iter_mut().enumerate() {
                let (word, at, scale) = (words[i / kind.word()], i % kind.word(), scales[i / table.group]);
                *out = scale
                    * match kind {
                        GroupedKind::Ternary => (word >> (2 * at) & 3) as f32 - 1.0,
                        GroupedKind::Binary => (word >> at & 1) as f32 * 2.0 - 1.0,
                    };
            }
        }
        Ok(())
    })
}

/// Products with one to three matrices.
pub(crate) struct Linear<S>(Shared, std::marker::PhantomData<S>);

impl<S> Linear<S> {
    pub(crate) fn new(shared: &Shared) -> Self {
        Self(shared.clone(), std::marker::PhantomData)
    }
}

impl<S: Scale> Operator for Linear<S> {
    type Kernel<'a> = Guarded;

    fn name(&self) -> &str {
        fast::GROUPED_LINEAR
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        let mut inputs = vec![
            OperatorInput::required(TensorElementType::Float32),
            OperatorInput::optional(TensorElementType::Float32),
            OperatorInput::required(TensorElementType::Uint8),
            OperatorInput::required(S::ELEMENT),
        ];
        for _ in 1..MOST_MATRICES {
            inputs.push(OperatorInput::optional(TensorElementType::Uint8));
            inputs.push(OperatorInput::optional(S::ELEMENT));
        }
        inputs
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel(&self, context: &KernelContext<'_>) -> ort::Result<Guarded> {
        kernel(fast::GROUPED_LINEAR, || {
            let (kind, epsilon) = (kind(context)?, epsilon(context)?);
            let mut matrices = Vec::new();
            let count =
                attributes::size("matrices", context.get::<i64>("matrices")).map_err(ort::Error::new)?;
            if !(1..=MOST_MATRICES).contains(&count) {
                return failed(format!("the attribute `matrices` is {count}, expected 1 to {MOST_MATRICES}"));
            }
            for input in (2..2 + 2 * count).step_by(2) {
                let codes = context.constant_input::<DynTensorValueType>(input)?;
                let scales = context.constant_input::<DynTensorValueType>(input + 1)?;
                let (codes, scales) = (codes.try_extract_tensor::<u8>()?, scales.try_extract_tensor::<S>()?);
                let stored = Stored::new(kind, (codes.0, codes.1), (scales.0, scales.1))?;
                matrices.push(stored.packed()?);
            }
            let rows = matrices.iter().try_fold(0usize, |all, matrix| all.checked_add(matrix.rows()));
            let Some(rows) = rows.filter(|rows| *rows < attributes::MOST_WIDTH) else {
                return failed("the matrices have too many rows");
            };
            if matrices.iter().any(|matrix| matrix.cols() != matrices[0].cols()) {
                return failed("matrices of different widths");
            }
            let shared = self.0.clone();
            Ok(move |ctx: &ComputeContext| {
                let state = &mut *shared.lock();
                linear(ctx, &mut state.scratch, &matrices, rows, epsilon, state.activations)
            })
        })
    }
}

fn linear(
    ctx: &ComputeContext,
    scratch: &mut Scratch,
    matrices: &[GroupedMatrix],
    rows: usize,
    epsilon: Option<f32>,
    activations: ActivationType,
) -> ort::Result<()> {
    let x = required(ctx, 0)?;
    let (shape, x) = x.try_extract_tensor::<f32>()?;
    let (tokens, cols) = matrix(shape)?;
    if cols != matrices[0].cols() {
        return failed(format!("weights of {} columns for an input of {cols}", matrices[0].cols()));
    }
    let Scratch { normed, grouped, .. } = scratch;
    let input = normalised(x, cols, optional(ctx, 1)?, epsilon, normed)?;
    let mut offset = 0;
    let products = matrices.iter().map(|weights| {
        let product = GroupedProduct { weights, offset };
        offset += weights.rows();
        product
    });
    let products: Vec<GroupedProduct<'_>> = products.collect();
    write(ctx, tokens, rows, |out| {
        kernels::grouped_matmul_all(&products, input, activations, grouped, out, rows);
        Ok(())
    })
}
