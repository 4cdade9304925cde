//! Attention in the place of llama.cpp's, over llama.cpp's cache.
//!
//! Where the cache is in f32, llama.cpp converts keys and values to f16 before its flash attention. Both conversions are left
//! out, and the cache is read as it is.

use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use llama_cpp_sys_2 as sys;
use ternion_core::{Error, Result};
use ternion_kernels::{self as kernels, CellFloats, CellRows, VisibleCells};

use crate::guard::Guard;
use crate::ops::{CustomOp, InputId, check_apart, check_host};

/// The attention of a model's layers. Its address must not change once [`Attention::op`] has been called.
pub(crate) struct Attention {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// The number of the graph that is computed, see [`Hook`](crate::hook::Hook).
    graph: AtomicU64,
    guard: Arc<Guard>,
}

/// Indices of a node's sources.
const QUERIES: usize = 0;
const KEYS: usize = 1;
const VALUES: usize = 2;
const MASK: usize = 3;
const SINKS: usize = 4;

impl Attention {
    pub(crate) fn new([heads, kv_heads, head_dim]: [usize; 3], guard: &Arc<Guard>) -> Self {
        Self { heads, kv_heads, head_dim, graph: AtomicU64::new(0), guard: Arc::clone(guard) }
    }

    /// The operation that computes it.
    pub(crate) fn op(&self) -> Result<CustomOp> {
        CustomOp::new(Some(attend), std::ptr::from_ref(self).cast_mut().cast())
    }

    /// Tells which graph is about to be computed.
    pub(crate) fn begin(&self, graph: u64) {
        self.graph.store(graph, Ordering::Relaxed);
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Whether a node of flash attention reads keys and values of a type that this attention knows.
    pub(crate) fn knows(node: &sys::ggml_tensor) -> bool {
        [KEYS, VALUES].iter().all(|side| {
            // SAFETY: Sources of a node live as long as its graph.
            unsafe { source(node, *side) }
                .is_some_and(|side| matches!(cells(side).type_, sys::GGML_TYPE_F32 | sys::GGML_TYPE_F16))
        })
    }

    /// What must hold of the parameters of llama.cpp's node before it becomes this attention.
    pub(crate) fn check_params(&self, node: &sys::ggml_tensor) -> std::result::Result<(), String> {
        let [scale, max_bias, softcap] = [0, 1, 2].map(|i| f32::from_bits(node.op_params[i] as u32));
        if scale != self.scale() || max_bias != 0.0 || softcap != 0.0 {
            return Err(format!("another attention: scale {scale}, bias {max_bias}, cap {softcap}"));
        }
        Ok(())
    }

    /// What must hold of the tensors of a node that is this attention.
    pub(crate) fn check(&self, node: &sys::ggml_tensor) -> std::result::Result<(), String> {
        let [heads, kv_heads, width] = [self.heads, self.kv_heads, self.head_dim].map(|size| size as i64);
        // SAFETY: Sources of a node live as long as its graph.
        let [q, keys, values, mask, sinks] =
            [QUERIES, KEYS, VALUES, MASK, SINKS].map(|index| unsafe { source(node, index) });
        let (Some(q), Some(keys), Some(values), Some(mask), None) = (q, keys, values, mask, sinks) else {
            return Err("attention has other inputs".into());
        };
        let (tokens, count) = (q.ne[1], keys.ne[1]);
        let rows = 4 * self.heads * self.head_dim;
        let out = ([width, heads, tokens, 1], [4, 4 * self.head_dim, rows]);
        check_view(node, sys::GGML_TYPE_F32, out)?;
        check_view(q, sys::GGML_TYPE_F32, ([width, tokens, heads, 1], [4, rows, 4 * self.head_dim]))?;
        for side in [keys, values].map(cells) {
            let element = if side.type_ == sys::GGML_TYPE_F32 { 4 } else { 2 };
            let strides = [element, side.nb[1], element * self.head_dim];
            check_view(side, side.type_, ([width, count, kv_heads, 1], strides))?;
            if !side.nb[1].is_multiple_of(element) || side.nb[1] < element * self.kv_heads * self.head_dim {
                return Err("heads of keys or values do not lie side by side".into());
            }
        }
        check_view(mask, sys::GGML_TYPE_F16, ([count, tokens, 1, 1], [2, 2 * count as usize, mask.nb[2]]))?;
        check_apart(node, q)
    }

    /// Leaves out the nodes that would convert the keys and values of a node to f16.
    ///
    /// # Safety
    /// The node is one of a graph that is not being computed.
    pub(crate) unsafe fn skip_casts(node: &sys::ggml_tensor) {
        for side in [KEYS, VALUES] {
            // SAFETY: Sources of a node live as long as its graph, and nothing else refers to them now.
            if let Some(copy) = unsafe { node.src[side].as_mut() }
                && copy.op == sys::GGML_OP_CPY
            {
                copy.op = sys::GGML_OP_NONE;
            }
        }
    }

    /// Computes a part, `(part, of)`, of a node.
    ///
    /// # Safety
    /// The node passed [`Attention::check`], its inputs are computed, and no one but the other parts writes to its output.
    unsafe fn run(&self, node: &sys::ggml_tensor, part: (usize, usize)) {
        let shape = kernels::Attention {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            past: 0,
            scale: self.scale(),
        };
        // SAFETY: The caller's promise: there are these sources, and each has as many elements, in memory of this process.
        let (q, kv, mask, count) = unsafe {
            let [q, keys, values, mask] = [QUERIES, KEYS, VALUES, MASK].map(|index| &*node.src[index]);
            let (tokens, count) = (q.ne[1] as usize, keys.ne[1] as usize);
            let elements = tokens * self.heads * self.head_dim;
            let queries = std::slice::from_raw_parts(q.data.cast::<f32>(), elements);
            let rows = [keys, values].map(|side| self.rows(cells(side), count));
            (queries, rows, std::slice::from_raw_parts(mask.data.cast::<u16>(), tokens * count), count)
        };
        let id = InputId::new(self.graph.load(Ordering::Relaxed), node.src[MASK]);
        SEEN.with_borrow_mut(|seen| {
            if seen.as_ref().is_none_or(|(of, _)| *of != id) {
                *seen = VisibleCells::of(mask, count).map(|visible| (id, visible));
            }
            match seen {
                // SAFETY: The caller's promise; the output has the elements of the queries.
                Some((_, visible)) => unsafe {
                    kernels::cells_attention_part(&shape, visible, q, kv, node.data.cast(), part);
                },
                None => {
                    self.guard.fail("attention", &Error::backend("the mask is not of 0 and minus infinity"));
                }
            }
        });
    }

    /// The rows of keys or values.
    ///
    /// # Safety
    /// The tensor passed [`Attention::check`], and nothing writes to it as long as the result lives.
    unsafe fn rows<'a>(&self, side: &sys::ggml_tensor, count: usize) -> CellRows<'a> {
        let is_single = side.type_ == sys::GGML_TYPE_F32;
        let stride = side.nb[1] / if is_single { 4 } else { 2 };
        let elements = count.saturating_sub(1) * stride + self.kv_heads * self.head_dim;
        let elements = if count == 0 { 0 } else { elements };
        // SAFETY: The caller's promise: so many elements from the first to the last cell, in memory of this process.
        let elements = unsafe {
            if is_single {
                CellFloats::F32(std::slice::from_raw_parts(side.data.cast(), elements))
            } else {
                CellFloats::F16(std::slice::from_raw_parts(side.data.cast(), elements))
            }
        };
        CellRows { elements, stride }
    }
}

thread_local! {
    /// What the tokens of a mask see, which is the same in all layers of a graph.
    static SEEN: RefCell<Option<(InputId, VisibleCells)>> = const { RefCell::new(None) };
}

/// A source of a node.
///
/// # Safety
/// The sources of the node are alive as long as the result.
unsafe fn source(node: &sys::ggml_tensor, index: usize) -> Option<&sys::ggml_tensor> {
    // SAFETY: The caller's promise.
    unsafe { node.src[index].as_ref() }
}

/// The cells of keys or values: the source of the conversion, where llama.cpp converts them to f16.
fn cells(side: &sys::ggml_tensor) -> &sys::ggml_tensor {
    // SAFETY: Sources of a node live as long as its graph.
    let original = unsafe { source(side, 0) };
    let is_copy = matches!(side.op, sys::GGML_OP_CPY | sys::GGML_OP_NONE) && side.type_ == sys::GGML_TYPE_F16;
    original.filter(|original| is_copy && original.type_ == sys::GGML_TYPE_F32).unwrap_or(side)
}

/// Whether a tensor has this type, these sizes and these distances in bytes, in memory of this process.
fn check_view(
    tensor: &sys::ggml_tensor,
    type_: sys::ggml_type,
    (sizes, strides): ([i64; 4], [usize; 3]),
) -> std::result::Result<(), String> {
    if tensor.ne != sizes || tensor.type_ != type_ {
        return Err(format!("a shape of attention is {:?}, expected {sizes:?}", tensor.ne));
    }
    if tensor.nb[..3] != strides {
        return Err(format!("distances in attention are {:?}, expected {strides:?}", &tensor.nb[..3]));
    }
    check_host(tensor)
}

unsafe extern "C" fn attend(node: *mut sys::ggml_tensor, part: c_int, of: c_int, data: *mut c_void) {
    // SAFETY: `data` is the attention that the operation was made of; it outlives the context that computes the graph.
    let attention = unsafe { &*data.cast::<Attention>() };
    attention.guard.run("attention", || {
        // SAFETY: `node` passed `Attention::check` when its graph was made, and ggml has computed its inputs and lets no one
        // else touch its output.
        unsafe { attention.run(&*node, (part as usize, of as usize)) };
    });
}
