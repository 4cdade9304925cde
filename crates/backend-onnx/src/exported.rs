//! Decoders in the layout of Hugging Face exports. Their caches are tensors that the graph takes and gives back.
//!
//! Where the graph can append in place (GroupQueryAttention), past and present are one buffer with room for more, which
//! grows by doubling; elsewhere the graph itself copies the past, and what it gives back is taken for the next step as it
//! is. Either way no key and no value comes through our hands on an ordinary step: only where a sequence is cut or leaves
//! a fork, once.
//!
//! The sequences of a batch are computed one after the other: their lengths differ, and the layout has one past for all.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use ort::memory::Allocator;
use ort::session::IoBinding;
use ort::session::Session;
use ort::value::{DynTensor, PrimitiveTensorElementType, Tensor, TensorElementType};
use ternion_core::{Error, Result};
use ternion_engine::batch::{self, Span};
use ternion_engine::kv::{BLOCK, KvPrefix};
use ternion_engine::{CausalLm, KvIdentity, SequenceId, SequenceInput};
use ternion_formats::onnx::{Host, Summary};

use crate::constants::Constants;
use crate::layout::{Cache, Integers, Layout};
use crate::library::Library;
use crate::model::{Sizes, engine_error, session_builder};

/// The fewest positions that a buffer has room for.
const SMALLEST: usize = 64;

/// The keys and values of one sequence.
#[derive(Clone, Default)]
struct Sequence {
    /// Tokens that count.
    length: usize,
    /// Positions that the tensors hold (or, in place, have room for); `length` or more.
    held: usize,
    /// One tensor for each cache, `[1, heads, held, width]`; none before the first step.
    tensors: Vec<Arc<DynTensor>>,
}

/// A decoder and the caches of its sequences.
pub(crate) struct ExportedDecoder {
    sizes: Sizes,
    layout: Layout,
    session: Session,
    binding: IoBinding,
    sequences: BTreeMap<SequenceId, Sequence>,
    next: u32,
}

impl ExportedDecoder {
    pub(crate) fn open(
        library: &Library,
        summary: &Summary,
        host: &Host,
        sizes: Sizes,
        constants: &Constants,
    ) -> Result<Self> {
        let layout = Layout::read(summary, host)?;
        // A past that is copied has another length at every step.
        let open = || -> ort::Result<(Session, IoBinding)> {
            let session = session_builder(library, &sizes.threads, layout.in_place, constants)?
                .commit_from_file(&summary.path)?;
            let binding = session.create_binding()?;
            Ok((session, binding))
        };
        let (session, binding) = open().map_err(|e| {
            engine_error("the model cannot be loaded", &e).with("file", summary.path.display())
        })?;
        Ok(Self { sizes, layout, session, binding, sequences: BTreeMap::new(), next: 0 })
    }

    fn insert(&mut self, sequence: Sequence) -> SequenceId {
        while self.sequences.contains_key(&SequenceId(self.next)) {
            self.next = self.next.wrapping_add(1);
        }
        let id = SequenceId(self.next);
        self.next = self.next.wrapping_add(1);
        self.sequences.insert(id, sequence);
        id
    }

    /// Bytes of the keys and values of a block.
    fn block_bytes(&self) -> u64 {
        let elements: usize = self.layout.caches.iter().map(|cache| BLOCK * cache.heads * cache.width).sum();
        (elements * if self.layout.is_f16 { 2 } else { 4 }) as u64
    }

    /// Appends the tokens to a sequence and the wanted logits to `logits`. After an error the sequence is as it was before.
    fn step(&mut self, input: &SequenceInput<'_>, span: &Span, logits: &mut Vec<f32>) -> Result<()> {
        // The part of a merged graph that takes a past was traced with one token, and has no mask between several.
        let one_by_one = self.layout.branch.is_some() && span.past > 0;
        let length = if one_by_one { 1 } else { span.count };
        let unwanted = span.count - input.rows();
        for (index, tokens) in input.tokens.chunks(length).enumerate() {
            let end = index * length + tokens.len();
            let rows = end.saturating_sub(unwanted).min(tokens.len());
            if let Err(error) = self.pass(input.sequence, tokens, rows, logits) {
                if let Some(sequence) = self.sequences.get_mut(&input.sequence) {
                    sequence.length = sequence.length.min(span.past);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// One run of the graph: appends the tokens to the sequence and the last `rows` rows of logits to `logits`.
    fn pass(&mut self, id: SequenceId, tokens: &[u32], rows: usize, logits: &mut Vec<f32>) -> Result<()> {
        let failed = |e: ort::Error| engine_error("the decoder failed", &e);
        let Self { sizes, layout, session, binding, sequences, .. } = self;
        // The tensors stay in the map: whatever fails below, even by a panic, they are not lost.
        let sequence = sequences.get_mut(&id).ok_or_else(|| batch::no_such(id))?;
        let total = sequence.length + tokens.len();
        prepare(layout, sizes, sequence, total).map_err(failed)?;
        let mut step = Step { layout, session, binding };
        // What a step that failed has left.
        step.binding.clear();
        let bound = step.bind_tokens(tokens, rows, sequence.length);
        let fresh = bound.and_then(|()| step.run(sequence, rows, logits));
        step.binding.clear();
        let fresh = fresh.map_err(failed)??;
        if !layout.in_place {
            sequence.tensors = fresh;
            sequence.held = total;
        }
        sequence.length = total;
        Ok(())
    }
}

/// Sees to it that the tensors hold what the next step needs: exactly the past, or in place room for all, in buffers
/// that no fork shares.
fn prepare(layout: &Layout, sizes: &Sizes, sequence: &mut Sequence, total: usize) -> ort::Result<()> {
    let fits = if layout.in_place {
        sequence.held >= total && sequence.tensors.iter_mut().all(|t| Arc::get_mut(t).is_some())
    } else {
        sequence.held == sequence.length
    };
    if fits && !sequence.tensors.is_empty() {
        return Ok(());
    }
    let held = if layout.in_place {
        total.next_power_of_two().clamp(SMALLEST, sizes.context.max(SMALLEST))
    } else {
        sequence.length
    };
    let mut tensors = Vec::with_capacity(layout.caches.len());
    for (i, cache) in layout.caches.iter().enumerate() {
        let old = match sequence.tensors.get(i) {
            Some(tensor) => Some((&**tensor, sequence.length)),
            None if sequence.length == 0 => None,
            None => return Err(ort::Error::new("the keys and values of the sequence are gone")),
        };
        tensors.push(Arc::new(if layout.is_f16 {
            copied::<half::f16>(cache, TensorElementType::Float16, held, old)?
        } else {
            copied::<f32>(cache, TensorElementType::Float32, held, old)?
        }));
    }
    sequence.tensors = tensors;
    sequence.held = held;
    Ok(())
}

/// What a step needs beside its sequence.
struct Step<'a> {
    layout: &'a Layout,
    session: &'a mut Session,
    binding: &'a mut IoBinding,
}

impl Step<'_> {
    fn bind_tokens(&mut self, tokens: &[u32], rows: usize, past: usize) -> ort::Result<()> {
        let total = past + tokens.len();
        let (layout, binding) = (self.layout, &mut *self.binding);
        bind(binding, &layout.ids, tokens.iter().map(|&id| i64::from(id)).collect())?;
        if let Some(mask) = &layout.mask {
            bind(binding, mask, vec![1; total])?;
        }
        if let Some(positions) = &layout.positions {
            bind(binding, positions, (past..total).map(|p| p as i64).collect())?;
        }
        if let Some(keep) = &layout.keep {
            // 0 would mean all.
            bind(binding, keep, vec![rows.max(1) as i64])?;
        }
        if let Some(branch) = &layout.branch {
            binding.bind_input(branch.as_str(), &Tensor::from_array(([1], vec![past > 0]))?)?;
        }
        Ok(())
    }

    /// Runs the graph on what is bound and on the caches; appends the last `rows` rows of logits and returns the caches that
    /// the graph made, unless it worked in place.
    fn run(
        &mut self,
        sequence: &mut Sequence,
        rows: usize,
        logits: &mut Vec<f32>,
    ) -> ort::Result<Result<Vec<Arc<DynTensor>>>> {
        let allocator = Allocator::default();
        let memory = allocator.memory_info();
        let (layout, binding) = (self.layout, &mut *self.binding);
        binding.bind_output_to_device(layout.logits.as_str(), memory)?;
        for (cache, tensor) in layout.caches.iter().zip(&mut sequence.tensors) {
            binding.bind_input(cache.past.as_str(), &**tensor)?;
            match Arc::get_mut(tensor).filter(|_| layout.in_place) {
                Some(tensor) => binding.bind_output(cache.present.as_str(), tensor)?,
                None => binding.bind_output_to_device(cache.present.as_str(), memory)?,
            }
        }
        let mut outputs = self.session.run_binding(binding)?;
        let mut fresh = Vec::new();
        if !layout.in_place {
            for cache in &layout.caches {
                let Some(tensor) = outputs.remove(&cache.present) else {
                    return Ok(Err(Error::backend(format!("the decoder gave no `{}`", cache.present))));
                };
                let tensor: DynTensor = tensor.downcast()?;
                if let Err(error) = check_present(cache, layout, sequence.length, &tensor) {
                    return Ok(Err(error));
                }
                fresh.push(Arc::new(tensor));
            }
        }
        let Some(found) = outputs.get(&layout.logits) else {
            return Ok(Err(Error::backend("the decoder gave no logits")));
        };
        Ok(append_last(found, rows, layout.vocab_size, logits)?.map(|()| fresh))
    }
}

/// Whether the graph has made keys or values of the type and shape that the next step takes.
fn check_present(cache: &Cache, layout: &Layout, past: usize, tensor: &DynTensor) -> Result<()> {
    let expected = if layout.is_f16 { TensorElementType::Float16 } else { TensorElementType::Float32 };
    let shape = tensor.shape();
    let fits = matches!(**shape, [1, heads, length, width]
        if heads == cache.heads as i64 && width == cache.width as i64 && length > past as i64);
    if fits && *tensor.data_type() == expected {
        return Ok(());
    }
    Err(Error::backend(format!(
        "the decoder gave `{}` as {:?} of the shape {shape:?}, expected {expected:?} of [1, {}, more than {past}, {}]",
        cache.present,
        tensor.data_type(),
        cache.heads,
        cache.width
    )))
}

/// Binds integers as `[1, n]`, or as one number.
fn bind(binding: &mut IoBinding, input: &Integers, values: Vec<i64>) -> ort::Result<()> {
    let shape: Vec<usize> = match input.rank {
        0 => vec![],
        1 => vec![values.len()],
        _ => vec![1, values.len()],
    };
    if input.is_i32 {
        let values: Vec<i32> = values.into_iter().map(|v| v as i32).collect();
        binding.bind_input(input.name.as_str(), &Tensor::from_array((shape, values))?)
    } else {
        binding.bind_input(input.name.as_str(), &Tensor::from_array((shape, values))?)
    }
}

/// A tensor for `held` positions with the first ones of an old tensor.
fn copied<T: PrimitiveTensorElementType + Copy>(
    cache: &Cache,
    element: TensorElementType,
    held: usize,
    old: Option<(&DynTensor, usize)>,
) -> ort::Result<DynTensor> {
    let mut tensor = DynTensor::new(&Allocator::default(), element, [1, cache.heads, held, cache.width])?;
    if let Some((old, length)) = old.filter(|(_, length)| *length > 0 && held > 0) {
        let (_, from) = old.try_extract_tensor::<T>()?;
        let (_, to) = tensor.try_extract_tensor_mut::<T>()?;
        let (wanted, stride) = (length * cache.width, from.len() / cache.heads);
        for (from, to) in from.chunks_exact(stride).zip(to.chunks_exact_mut(held * cache.width)) {
            to[..wanted].copy_from_slice(&from[..wanted]);
        }
    }
    Ok(tensor)
}

/// An element of a cache, which any bits are.
trait Element: PrimitiveTensorElementType + Copy {
    fn bytes(self) -> impl IntoIterator<Item = u8>;
    /// From as many bytes as it has.
    fn of(bytes: &[u8]) -> Self;
}

impl Element for f32 {
    fn bytes(self) -> impl IntoIterator<Item = u8> {
        self.to_ne_bytes()
    }

    fn of(bytes: &[u8]) -> Self {
        Self::from_ne_bytes(bytes.try_into().unwrap_or_default())
    }
}

impl Element for half::f16 {
    fn bytes(self) -> impl IntoIterator<Item = u8> {
        self.to_ne_bytes()
    }

    fn of(bytes: &[u8]) -> Self {
        Self::from_ne_bytes(bytes.try_into().unwrap_or_default())
    }
}

/// Appends the keys or values of a block: `[heads, BLOCK, width]`.
fn take_block<T: Element>(
    cache: &Cache,
    tensor: &DynTensor,
    block: usize,
    bytes: &mut Vec<u8>,
) -> ort::Result<()> {
    let (_, elements) = tensor.try_extract_tensor::<T>()?;
    let stride = elements.len() / cache.heads;
    for head in elements.chunks_exact(stride) {
        let part = &head[block * BLOCK * cache.width..(block + 1) * BLOCK * cache.width];
        bytes.extend(part.iter().flat_map(|element| element.bytes()));
    }
    Ok(())
}

/// A tensor of the keys or values of blocks. Theirs begin at `at` in each, which is moved behind them.
fn put_blocks<T: Element>(
    cache: &Cache,
    element: TensorElementType,
    blocks: &[&[u8]],
    at: &mut usize,
) -> ort::Result<DynTensor> {
    let (part, held) = (BLOCK * cache.width, blocks.len() * BLOCK);
    let mut tensor = DynTensor::new(&Allocator::default(), element, [1, cache.heads, held, cache.width])?;
    let (_, elements) = tensor.try_extract_tensor_mut::<T>()?;
    for (i, block) in blocks.iter().enumerate() {
        let own = &block[*at..*at + cache.heads * part * size_of::<T>()];
        let heads =
            elements.chunks_exact_mut(held * cache.width).zip(own.chunks_exact(part * size_of::<T>()));
        for (head, own) in heads {
            let place = head[i * part..].iter_mut().zip(own.chunks_exact(size_of::<T>()));
            place.for_each(|(to, from)| *to = T::of(from));
        }
    }
    *at += cache.heads * part * size_of::<T>();
    Ok(tensor)
}

/// Appends the last `rows` rows of logits `[1, any, vocab_size]`.
fn append_last(
    found: &ort::value::DynValue,
    rows: usize,
    vocab_size: usize,
    logits: &mut Vec<f32>,
) -> ort::Result<Result<()>> {
    let shape = found.shape();
    let fits = matches!(**shape, [1, given, width] if given >= rows as i64 && width == vocab_size as i64);
    if !fits {
        return Ok(Err(Error::backend(format!(
            "the decoder gave logits of the shape {shape:?}, expected [1, {rows} or more, {vocab_size}]"
        ))));
    }
    // No more than there are, by the shape that was checked.
    let wanted = rows * vocab_size;
    if *found.data_type() == TensorElementType::Float16 {
        let (_, values) = found.try_extract_tensor::<half::f16>()?;
        logits.extend(values[values.len() - wanted..].iter().map(|x| x.to_f32()));
    } else {
        let (_, values) = found.try_extract_tensor::<f32>()?;
        logits.extend_from_slice(&values[values.len() - wanted..]);
    }
    Ok(Ok(()))
}

impl CausalLm for ExportedDecoder {
    fn context_length(&self) -> usize {
        self.sizes.context
    }

    fn vocab_size(&self) -> usize {
        self.layout.vocab_size
    }

    fn max_sequences(&self) -> usize {
        self.sizes.max_sequences
    }

    fn max_batch_tokens(&self) -> usize {
        self.sizes.prefill_chunk
    }

    fn new_sequence(&mut self) -> Result<SequenceId> {
        batch::room_for_one(self.sequences.len(), self.sizes.max_sequences)?;
        Ok(self.insert(Sequence::default()))
    }

    fn forward(&mut self, batch: &[SequenceInput<'_>], logits: &mut Vec<f32>) -> Result<()> {
        logits.clear();
        let length = |id| self.sequences.get(&id).map(|s| s.length);
        let spans = batch::spans(batch, length, self.sizes.context, self.layout.vocab_size)?;
        let mut step =
            || batch.iter().zip(&spans).try_for_each(|(input, span)| self.step(input, span, logits));
        let outcome = step();
        if outcome.is_err() {
            // Those that came before the one that failed.
            for span in &spans {
                self.truncate(span.sequence, span.past)?;
            }
            logits.clear();
        }
        outcome
    }

    fn len(&self, sequence: SequenceId) -> usize {
        self.sequences.get(&sequence).map_or(0, |s| s.length)
    }

    fn truncate(&mut self, sequence: SequenceId, length: usize) -> Result<()> {
        if let Some(s) = self.sequences.get_mut(&sequence) {
            s.length = s.length.min(length);
        }
        Ok(())
    }

    fn fork(&mut self, sequence: SequenceId, length: usize) -> Result<SequenceId> {
        batch::room_for_one(self.sequences.len(), self.sizes.max_sequences)?;
        let mut copy = self.sequences.get(&sequence).ok_or_else(|| batch::no_such(sequence))?.clone();
        copy.length = copy.length.min(length);
        Ok(self.insert(copy))
    }

    fn free(&mut self, sequence: SequenceId) {
        self.sequences.remove(&sequence);
    }

    fn kv_identity(&self) -> Result<KvIdentity> {
        // `Decoder` knows the rest. The runtime's products of one row and of several go different ways.
        Ok(KvIdentity::opaque(self.block_bytes(), [0; 32]).with_unit(self.sizes.prefill_chunk))
    }

    fn prefix(&mut self, sequence: SequenceId, blocks: Range<usize>) -> Result<KvPrefix> {
        let source = self.sequences.get(&sequence).ok_or_else(|| batch::no_such(sequence))?;
        let end = blocks.end.min(source.length / BLOCK);
        let one = |block| {
            let mut bytes = Vec::new();
            for (cache, tensor) in self.layout.caches.iter().zip(&source.tensors) {
                if self.layout.is_f16 {
                    take_block::<half::f16>(cache, tensor, block, &mut bytes)?;
                } else {
                    take_block::<f32>(cache, tensor, block, &mut bytes)?;
                }
            }
            Ok(bytes.into())
        };
        let taken: ort::Result<Vec<_>> = (blocks.start.min(end)..end).map(one).collect();
        let failed = |e: ort::Error| engine_error("the keys and values cannot be read", &e);
        KvPrefix::opaque(self.block_bytes(), taken.map_err(failed)?)
    }

    fn adopt(&mut self, prefix: KvPrefix) -> Result<SequenceId> {
        batch::room_for_one(self.sequences.len(), self.sizes.max_sequences)?;
        let blocks = prefix.opaque_blocks(self.block_bytes())?;
        let mut sequence = Sequence { length: prefix.tokens(), held: prefix.tokens(), tensors: Vec::new() };
        let mut at = 0;
        for cache in &self.layout.caches {
            let tensor = if self.layout.is_f16 {
                put_blocks::<half::f16>(cache, TensorElementType::Float16, &blocks, &mut at)
            } else {
                put_blocks::<f32>(cache, TensorElementType::Float32, &blocks, &mut at)
            };
            let failed = |e: ort::Error| engine_error("the keys and values cannot be taken over", &e);
            sequence.tensors.push(Arc::new(tensor.map_err(failed)?));
        }
        Ok(self.insert(sequence))
    }
}
