//! The operators of the fast variant (`ternion_formats::onnx::fast` says what each does), over `ternion-kernels`.
//!
//! A kernel runs on the thread that runs the session, which is one of our pool: the kernels divide their work over that
//! pool, and the runtime has no threads of its own. Attributes are checked when a kernel is made, lengths before a kernel of
//! `ternion-kernels` is called, since that one panics where they disagree. Other panics are caught, as they must not cross
//! into the runtime.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorDomain, OperatorInput, OperatorOutput,
};
use ort::value::{DynTensorValueType, PrimitiveTensorElementType, TensorElementType, ValueRef};
use ternion_core::catch_panic;
use ternion_engine::kv::KvCache;
use ternion_engine::{LogitsPrecision, SequenceId};
use ternion_formats::Activation;
use ternion_formats::onnx::fast;
use ternion_head::CertifiedHead;
use ternion_kernels as kernels;

use crate::attributes::{self, Heads};
use crate::grouped;

/// What the operators of a session share.
pub(crate) struct State {
    pub(crate) cache: KvCache,
    /// How activations are multiplied with weights that have a scale for each group of a row.
    pub(crate) activations: kernels::ActivationType,
    pub(crate) scratch: Scratch,
    /// A head with a copy, which computes the node [`LOGITS`](fast::LOGITS) in place of the graph's weights.
    pub(crate) head: Option<CertifiedHead>,
    /// How exact each row of logits must be.
    pub(crate) precision: Vec<LogitsPrecision>,
}

/// Buffers that each operator uses while it runs; one runs at a time.
#[derive(Default)]
pub(crate) struct Scratch {
    pub(crate) normed: Vec<f32>,
    pub(crate) grouped: kernels::GroupedInput,
    quantized: kernels::Quantized,
    /// Queries, keys and values with the heads of queries and keys normalised.
    heads: Vec<f32>,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// A handle to it.
#[derive(Clone)]
pub(crate) struct Shared(Arc<Mutex<State>>);

impl Shared {
    pub(crate) fn new(cache: KvCache, activations: kernels::ActivationType) -> Self {
        let (scratch, precision) = (Scratch::default(), Vec::new());
        Self(Arc::new(Mutex::new(State { cache, activations, scratch, head: None, precision })))
    }

    /// The state; after a panic in a kernel too, as a sequence's length says which of its positions count.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All operators, on this state.
pub(crate) fn domain(shared: &Shared) -> ort::Result<OperatorDomain> {
    OperatorDomain::new(fast::DOMAIN)?
        .add(Embedding::<f32>::new())?
        .add(Embedding::<half::f16>::new())?
        .add(Embedding::<half::bf16>::new())?
        .add(grouped::Embedding::<f32>::new())?
        .add(grouped::Embedding::<half::f16>::new())?
        .add(Rotations)?
        .add(TernaryLinear(shared.clone()))?
        .add(grouped::Linear::<f32>::new(shared))?
        .add(grouped::Linear::<half::f16>::new(shared))?
        .add(DenseLinear::<f32>::new(shared))?
        .add(DenseLinear::<half::f16>::new(shared))?
        .add(DenseLinear::<half::bf16>::new(shared))?
        .add(RmsNorm)?
        .add(GatedUnit)?
        .add(Attention(shared.clone()))
}

pub(crate) fn failed<T>(message: impl Into<String>) -> ort::Result<T> {
    Err(ort::Error::new(message))
}

/// A kernel whose panics become errors. Its errors name the operator.
pub(crate) struct Guarded {
    operator: &'static str,
    compute: Box<Compute>,
}

type Compute = dyn FnMut(&ComputeContext) -> ort::Result<()> + Send;

impl Kernel for Guarded {
    fn compute(&mut self, ctx: &ComputeContext) -> ort::Result<()> {
        guarded(self.operator, || (self.compute)(ctx))
    }
}

/// Runs what the runtime calls. A panic becomes an error, and errors name the operator.
fn guarded<R>(operator: &str, work: impl FnOnce() -> ort::Result<R>) -> ort::Result<R> {
    let outcome = catch_panic(work).unwrap_or_else(|panic| failed(format!("a panic: {panic}")));
    outcome.map_err(|error| ort::Error::new(format!("the operator {operator}: {error}")))
}

/// Makes the kernel of an operator from what `create` returns, which reads the attributes.
pub(crate) fn kernel<F: FnMut(&ComputeContext) -> ort::Result<()> + Send + 'static>(
    operator: &'static str,
    create: impl FnOnce() -> ort::Result<F>,
) -> ort::Result<Guarded> {
    guarded(operator, create).map(|compute| Guarded { operator, compute: Box::new(compute) })
}

/// An input that may be left out.
pub(crate) fn optional(ctx: &ComputeContext, index: usize) -> ort::Result<Option<ValueRef<'_>>> {
    if index < ctx.num_inputs()? { ctx.input(index) } else { Ok(None) }
}

pub(crate) fn required(ctx: &ComputeContext, index: usize) -> ort::Result<ValueRef<'_>> {
    match optional(ctx, index)? {
        Some(value) => Ok(value),
        None => failed(format!("input {index} is missing")),
    }
}

/// The sizes of a matrix; a vector is a matrix of one column.
pub(crate) fn matrix(shape: &[i64]) -> ort::Result<(usize, usize)> {
    match *shape {
        [rows, cols] if rows >= 0 && cols > 0 => Ok((rows as usize, cols as usize)),
        _ => failed(format!("the shape is {shape:?}, expected a matrix")),
    }
}

fn invalid(message: String) -> ort::Error {
    ort::Error::new(message)
}

/// The attribute `epsilon`, where there is one.
pub(crate) fn epsilon(context: &KernelContext<'_>) -> ort::Result<Option<f32>> {
    context.get::<f32>("epsilon").map(attributes::epsilon).transpose().map_err(invalid)
}

/// The attribute `epsilon` of an operator that normalises.
fn needed(epsilon: Option<f32>) -> ort::Result<f32> {
    epsilon.ok_or_else(|| ort::Error::new("the attribute `epsilon` is missing or no float"))
}

/// Writes an output `[rows, cols]`.
pub(crate) fn write(
    ctx: &ComputeContext,
    rows: usize,
    cols: usize,
    fill: impl FnOnce(&mut [f32]) -> ort::Result<()>,
) -> ort::Result<()> {
    match ctx.output(0, [rows, cols])? {
        Some(mut output) => fill(output.try_extract_tensor_mut::<f32>()?.1),
        None => failed("the output is missing"),
    }
}

/// Element types of tables and plain weights.
pub(crate) trait Weight:
    PrimitiveTensorElementType + std::fmt::Debug + Copy + Send + Sync + 'static
{
    const ELEMENT: TensorElementType;
    fn view(bytes: &[u8]) -> kernels::DenseRef<'_>;
}

impl Weight for f32 {
    const ELEMENT: TensorElementType = TensorElementType::Float32;
    fn view(bytes: &[u8]) -> kernels::DenseRef<'_> {
        kernels::DenseRef::F32(bytes)
    }
}

impl Weight for half::f16 {
    const ELEMENT: TensorElementType = TensorElementType::Float16;
    fn view(bytes: &[u8]) -> kernels::DenseRef<'_> {
        kernels::DenseRef::F16(bytes)
    }
}

impl Weight for half::bf16 {
    const ELEMENT: TensorElementType = TensorElementType::Bfloat16;
    fn view(bytes: &[u8]) -> kernels::DenseRef<'_> {
        kernels::DenseRef::Bf16(bytes)
    }
}

/// Weights as the kernels take them: by their bytes, which are little-endian in the file and on every supported machine.
fn dense<W: Weight>(weights: &[W]) -> kernels::DenseRef<'_> {
    let length = std::mem::size_of_val(weights);
    // SAFETY: the slice's own memory, and its own length in bytes; `Weight` is implemented for floats alone, which have
    // no padding, and any byte is a valid u8.
    W::view(unsafe { std::slice::from_raw_parts(weights.as_ptr().cast::<u8>(), length) })
}

/// Normalises `x` into `out` where there is a norm, and returns what to go on with.
pub(crate) fn normalised<'a>(
    x: &'a [f32],
    cols: usize,
    norm: Option<ValueRef<'_>>,
    epsilon: Option<f32>,
    out: &'a mut Vec<f32>,
) -> ort::Result<&'a [f32]> {
    let Some(norm) = norm else { return Ok(x) };
    let weight = norm_weight(&norm, cols)?;
    out.resize(x.len(), 0.0);
    kernels::rms_norm(x, weight, needed(epsilon)?, out);
    Ok(out)
}

/// The weights of a norm over `cols` elements.
fn norm_weight<'a>(norm: &'a ValueRef<'_>, cols: usize) -> ort::Result<&'a [f32]> {
    let (_, weight) = norm.try_extract_tensor::<f32>()?;
    if weight.len() != cols {
        return failed(format!("a norm of {} elements for {cols} columns", weight.len()));
    }
    Ok(weight)
}

struct Embedding<W>(std::marker::PhantomData<W>);

impl<W> Embedding<W> {
    fn new() -> Self {
        Self(std::marker::PhantomData)
    }
}

impl<W: Weight> Operator for Embedding<W> {
    type Kernel<'a> = Guarded;

    fn name(&self) -> &str {
        fast::EMBEDDING
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(TensorElementType::Int64), OperatorInput::required(W::ELEMENT)]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel(&self, _: &KernelContext<'_>) -> ort::Result<Guarded> {
        let compute = |ctx: &ComputeContext| {
            let (ids, table) = (required(ctx, 0)?, required(ctx, 1)?);
            let (_, ids) = ids.try_extract_tensor::<i64>()?;
            let (shape, table) = table.try_extract_tensor::<W>()?;
            let (entries, width) = matrix(shape)?;
            write(ctx, ids.len(), width, |out| {
                for (id, out) in ids.iter().zip(out.chunks_exact_mut(width)) {
                    match usize::try_from(*id) {
                        Ok(id) if id < entries => dense(table).row(id, out),
                        _ => return failed(format!("the token {id} is not below {entries}")),
                    }
                }
                Ok(())
            })
        };
        kernel(fast::EMBEDDING, || Ok(compute))
    }
}

struct Rotations;

impl Operator for Rotations {
    type Kernel<'a> = Guarded;

    fn name(&self) -> &str {
        fast::ROTATIONS
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [
            OperatorInput::required(TensorElementType::Int64),
            OperatorInput::required(TensorElementType::Float32),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel(&self, context: &KernelContext<'_>) -> ort::Result<Guarded> {
        let factor = context.get::<f32>("factor").unwrap_or(1.0);
        let compute = move |ctx: &ComputeContext| {
            let (positions, frequencies) = (required(ctx, 0)?, required(ctx, 1)?);
            let (_, positions) = positions.try_extract_tensor::<i64>()?;
            let (_, frequencies) = frequencies.try_extract_tensor::<f32>()?;
            let half = frequencies.len();
            if half == 0 {
                return failed("no frequencies");
            }
            write(ctx, positions.len(), 2 * half, |out| {
                for (position, out) in positions.iter().zip(out.chunks_exact_mut(2 * half)) {
                    let (cosines, sines) = out.split_at_mut(half);
                    for ((cos, sin), frequency) in cosines.iter_mut().zip(sines).zip(frequencies) {
                        let angle = *position as f32 * frequency;
                        (*cos, *sin) = (angle.cos() * factor, angle.sin() * factor);
                    }
                }
                Ok(())
            })
        };
        kernel(fast::ROTATIONS, || {
            attributes::factor(factor).map_err(invalid)?;
            Ok(compute)
        })
    }
}

struct TernaryLinear(Shared);

impl Operator for TernaryLinear {
    type Kernel<'a> = Guarded;

    fn name(&self) -> &str {
        fast::TERNARY_LINEAR
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [
            OperatorInput::required(TensorElementType::Float32),
            OperatorInput::required(TensorElementType::Uint8),
            OperatorInput::optional(TensorElementType::Uint8),
            OperatorInput::optional(TensorElementType::Uint8),
            OperatorInput::optional(TensorElementType::Float32),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel(&self, context: &KernelContext<'_>) -> ort::Result<Guarded> {
        kernel(fast::TERNARY_LINEAR, || {
            let scales = attributes::scales(context.get::<Vec<f32>>("scales")).map_err(invalid)?;
            let epsilon = epsilon(context)?;
            let layout = context.get::<String>("layout").unwrap_or_default();
            let layout = attributes::layout(&layout).map_err(invalid)?;
            // As for every other format, all codes are looked at once before the first is used.
            for input in 1..=scales.len() {
                let codes = context.constant_input::<DynTensorValueType>(input)?;
                if let Some(at) = kernels::find_invalid_code(codes.try_extract_tensor::<u8>()?.1) {
                    return failed(format!(
                        "byte {at} of matrix {input} holds the code 3; expected the codes 0, 1 and 2"
                    ));
                }
            }
            let shared = self.0.clone();
            Ok(move |ctx: &ComputeContext| {
                ternary_linear(ctx, &mut shared.lock().scratch, layout, &scales, epsilon)
            })
        })
    }
}

fn ternary_linear(
    ctx: &ComputeContext,
    scratch: &mut Scratch,
    layout: kernels::TernaryLayout,
    scales: &[f32],
    epsilon: Option<f32>,
) -> ort::Result<()> {
    let x = required(ctx, 0)?;
    let (shape, x) = x.try_extract_tensor::<f32>()?;
    let (tokens, cols) = matrix(shape)?;
    match optional(ctx, 4)? {
        Some(norm) => {
            let weight = norm_weight(&norm, cols)?;
            scratch.quantized.quantize_normed(x, weight, needed(epsilon)?);
        }
        None => scratch.quantized.quantize(x, cols),
    }
    let mut codes = Vec::with_capacity(scales.len());
    for input in 1..=scales.len() {
        codes.push(required(ctx, input)?);
    }
    let mut products = Vec::with_capacity(codes.len());
    let mut rows = 0usize;
    for (codes, &scale) in codes.iter().zip(scales) {
        let (shape, codes) = codes.try_extract_tensor::<u8>()?;
        let (quarter, width) = matrix(shape)?;
        if width != cols {
            return failed(format!("codes of {width} columns for an input of {cols}"));
        }
        let too_many = || ort::Error::new(format!("the codes' shape {shape:?} has too many rows"));
        let height = quarter.checked_mul(4).ok_or_else(too_many)?;
        let weights = kernels::TernaryRef::new(layout, codes, height, width)
            .map_err(|e| ort::Error::new(e.to_string()))?;
        products.push(kernels::Product { weights, scale, offset: rows });
        rows = rows.checked_add(height).ok_or_else(too_many)?;
    }
    write(ctx, tokens, rows, |out| {
        kernels::matmul_all(&products, &scratch.quantized, out, rows);
        Ok(())
    })
}

struct DenseLinear<W>(Shared, std::marker::PhantomData<W>);

impl<W> DenseLinear<W> {
    fn new(shared: &Shared) -> Self {
        Self(shared.clone(), std::marker::PhantomData)
    }
}

impl<W: Weight> Operator for DenseLinear<W> {
    type Kernel<'a> = Guarded;

    fn name(&self) -> &str {
        fast::DENSE_LINEAR
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [
            OperatorInput::required(TensorElementType::Float32),
            OperatorInput::required(W::ELEMENT),
            OperatorInput::optional(TensorElementType::Float32),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel(&self, context: &KernelContext<'_>) -> ort::Result<Guarded> {
        let shared = self.0.clone();
        let is_head = context.node_name().is_ok_and(|name| name == fast::LOGITS);
        let compute = |epsilon| {
            move |ctx: &ComputeContext| {
                let State { scratch, head, precision, .. } = &mut *shared.lock();
                let (x, weights) = (required(ctx, 0)?, required(ctx, 1)?);
                let (shape, x) = x.try_extract_tensor::<f32>()?;
                let (tokens, cols) = matrix(shape)?;
                let (shape, weights) = weights.try_extract_tensor::<W>()?;
                let (rows, width) = matrix(shape)?;
                if width != cols {
                    return failed(format!("weights of {width} columns for an input of {cols}"));
                }
                let input = normalised(x, cols, optional(ctx, 2)?, epsilon, &mut scratch.normed)?;
                write(ctx, tokens, rows, |out| {
                    match head {
                        Some(head)
                            if is_head
                                && head.weights().shape() == [rows, cols]
                                && precision.len() == tokens =>
                        {
                            let done = head.forward(input, precision, out);
                            done.map_err(|e| ort::Error::new(e.to_string()))?;
                        }
                        _ => kernels::dense_matmul(dense(weights), rows, cols, input, out, rows),
                    }
                    Ok(())
                })
            }
        };
        kernel(fast::DENSE_LINEAR, || epsilon(context).map(compute))
    }
}

struct RmsNorm;

impl Operator for RmsNorm {
    type Kernel<'a> = Guarded;

    fn name(&self) -> &str {
        fast::RMS_NORM
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [
            OperatorInput::required(TensorElementType::Float32),
            OperatorInput::required(TensorElementType::Float32),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel(&self, context: &KernelContext<'_>) -> ort::Result<Guarded> {
        let compute = |epsilon| {
            move |ctx: &ComputeContext| {
                let (x, weight) = (required(ctx, 0)?, required(ctx, 1)?);
                let (shape, x) = x.try_extract_tensor::<f32>()?;
                let (tokens, cols) = matrix(shape)?;
                let weight = norm_weight(&weight, cols)?;
                write(ctx, tokens, cols, |out| {
                    kernels::rms_norm(x, weight, epsilon, out);
                    Ok(())
                })
            }
        };
        kernel(fast::RMS_NORM, || needed(epsilon(context)?).map(compute))
    }
}

struct GatedUnit;

impl Operator for GatedUnit {
    type Kernel<'a> = Guarded;

    fn name(&self) -> &str {
        fast::GATED_UNIT
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(TensorElementType::Float32)]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel(&self, context: &KernelContext<'_>) -> ort::Result<Guarded> {
        kernel(fast::GATED_UNIT, || {
            let name = context.get::<String>("activation").unwrap_or_default();
            let unit = match attributes::activation(&name).map_err(invalid)? {
                Activation::Relu2 => kernels::relu2_glu,
                Activation::Silu => kernels::silu_glu,
            };
            Ok(move |ctx: &ComputeContext| {
                let x = required(ctx, 0)?;
                let (shape, x) = x.try_extract_tensor::<f32>()?;
                let (tokens, both) = matrix(shape)?;
                if both % 2 != 0 {
                    return failed(format!("{both} columns, expected gate and up of the same width"));
                }
                write(ctx, tokens, both / 2, |out| {
                    unit(x, both / 2, out);
                    Ok(())
                })
            })
        })
    }
}

struct Attention(Shared);

impl Operator for Attention {
    type Kernel<'a> = Guarded;

    fn name(&self) -> &str {
        fast::ATTENTION
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [
            OperatorInput::required(TensorElementType::Float32),
            OperatorInput::required(TensorElementType::Float32),
            OperatorInput::required(TensorElementType::Int64),
            OperatorInput::required(TensorElementType::Int64),
            OperatorInput::optional(TensorElementType::Float32),
            OperatorInput::optional(TensorElementType::Float32),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel(&self, context: &KernelContext<'_>) -> ort::Result<Guarded> {
        kernel(fast::ATTENTION, || {
            let integer = |name| context.get::<i64>(name);
            let layer = attributes::size("layer", integer("layer")).map_err(invalid)?;
            let heads = Heads::new(integer).map_err(invalid)?;
            let epsilon = epsilon(context)?;
            let shared = self.0.clone();
            if !shared.lock().cache.has(layer, heads.kv_heads, heads.head_dim) {
                return failed(format!("layer {layer} with {heads:?} is not what the KV cache was made for"));
            }
            Ok(move |ctx: &ComputeContext| {
                let (qkv, rotations) = (required(ctx, 0)?, required(ctx, 1)?);
                let (positions, sequences) = (required(ctx, 2)?, required(ctx, 3)?);
                let (q_norm, k_norm) = (optional(ctx, 4)?, optional(ctx, 5)?);
                let state = &mut *shared.lock();
                let mut normed = std::mem::take(&mut state.scratch.heads);
                let (shape, mut products) = qkv.try_extract_tensor::<f32>()?;
                if let (Some(q), Some(k)) = (&q_norm, &k_norm) {
                    let all = heads.width + 2 * heads.kv_width;
                    if matrix(shape)?.1 != all {
                        return failed(format!("{shape:?} for {heads:?}"));
                    }
                    let (q, k) = (norm_weight(q, heads.head_dim)?, norm_weight(k, heads.head_dim)?);
                    let epsilon = needed(epsilon)?;
                    normed.clear();
                    normed.extend_from_slice(products);
                    kernels::norm_heads(&heads.attention(0), &mut normed, (q, epsilon), (k, epsilon));
                    products = &normed;
                } else if q_norm.is_some() || k_norm.is_some() {
                    return failed("a norm of queries without one of keys, or the other way");
                }
                let attended = attend(
                    ctx,
                    state,
                    layer,
                    heads,
                    (shape, products),
                    rotations.try_extract_tensor::<f32>()?,
                    positions.try_extract_tensor::<i64>()?.1,
                    sequences.try_extract_tensor::<i64>()?.1,
                );
                state.scratch.heads = normed;
                attended
            })
        })
    }
}

#[allow(clippy::too_many_arguments, reason = "these are the operator's")]
fn attend(
    ctx: &ComputeContext,
    state: &mut State,
    layer: usize,
    heads: Heads,
    (qkv_shape, qkv): (&ort::value::Shape, &[f32]),
    (rotations_shape, rotations): (&ort::value::Shape, &[f32]),
    positions: &[i64],
    sequences: &[i64],
) -> ort::Result<()> {
    let Heads { width, kv_width, head_dim, .. } = heads;
    let (tokens, all) = matrix(qkv_shape)?;
    if all != width + 2 * kv_width || matrix(rotations_shape)? != (tokens, head_dim) {
        return failed(format!("{qkv_shape:?} and {rotations_shape:?} for {heads:?}"));
    }
    if positions.len() != tokens || sequences.len() != tokens {
        return failed(format!(
            "{} positions and {} sequences for {tokens} tokens",
            positions.len(),
            sequences.len()
        ));
    }
    let State { cache, scratch: Scratch { queries, keys, values, .. }, .. } = state;
    queries.clear();
    keys.clear();
    values.clear();
    for (row, rotation) in qkv.chunks_exact(all).zip(rotations.chunks_exact(head_dim)) {
        let (q, kv) = row.split_at(width);
        let (k, v) = kv.split_at(kv_width);
        rotate(q, rotation, queries);
        rotate(k, rotation, keys);
        values.extend_from_slice(v);
    }
    write(ctx, tokens, width, |out| {
        let mut start = 0;
        for run in sequences.chunk_by(|a, b| a == b) {
            let end = start + run.len();
            let id = u32::try_from(run[0]).map(SequenceId).map_err(|e| ort::Error::new(e.to_string()))?;
            let wrapped = |e: ternion_core::Error| ort::Error::new(e.to_string());
            let past = cache.length(id).ok_or_else(|| ort::Error::new(format!("no sequence {}", id.0)))?;
            if positions[start..end].iter().zip(past..).any(|(found, expected)| *found != expected as i64) {
                return failed(format!("positions {:?} behind {past} in the cache", &positions[start..end]));
            }
            let kv = start * kv_width..end * kv_width;
            cache.write(id, layer, &keys[kv.clone()], &values[kv]).map_err(wrapped)?;
            let kv = cache.layer(id, layer).map_err(wrapped)?;
            let part = start * width..end * width;
            let shape = heads.attention(past);
            kernels::attention(shape, &queries[part.clone()], &kv, &mut out[part]);
            start = end;
        }
        Ok(())
    })
}

/// Rotates the halves of each head against each other and appends the result.
fn rotate(x: &[f32], rotation: &[f32], out: &mut Vec<f32>) {
    let half = rotation.len() / 2;
    let (cos, sin) = rotation.split_at(half);
    for head in x.chunks_exact(2 * half) {
        let (low, high) = head.split_at(half);
        out.extend((0..half).map(|i| low[i] * cos[i] - high[i] * sin[i]));
        out.extend((0..half).map(|i| low[i] * sin[i] + high[i] * cos[i]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_an_operator_is_an_error_that_names_it() {
        let said =
            |work: fn() -> ort::Result<u32>| guarded("CachedAttention", work).map_err(|e| e.to_string());
        assert_eq!(said(|| Ok(7)), Ok(7));
        for (work, words) in [
            ((|| panic!("out of blocks")) as fn() -> ort::Result<u32>, "a panic: out of blocks"),
            (|| failed("no sequence 3"), "no sequence 3"),
        ] {
            let error = said(work).unwrap_err();
            assert!(error.contains("CachedAttention") && error.contains(words), "{error}");
        }
    }
}
