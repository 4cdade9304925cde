//! What takes the place of nodes of llama.cpp's graph: products with the checkpoint's weights, and squared ReLU.
//!
//! ggml calls a custom operation once on each of its threads, with the thread's number and how many there are. The
//! threads wait for each other only after a node, so each thread quantises the input itself. Products with the same input
//! follow each other, so a thread keeps the quantised input, and which input that is.

use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use llama_cpp_sys_2 as sys;
use ternion_core::{Error, Result};
use ternion_formats::{Linear, Weights};
use ternion_kernels::{self as kernels, ActivationType};

use crate::guard::Guard;
use crate::head::HeadNode;

/// What makes a node of ggml's graph a custom operation.
///
/// The layout of the parameters is private to ggml, so they are taken from a node that ggml made and never written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CustomOp {
    op: sys::ggml_op,
    params: [i32; 16],
}

impl CustomOp {
    /// `f` on all threads, with `data` as its last argument.
    pub(crate) fn new(f: sys::ggml_custom_op_t, data: *mut c_void) -> Result<Self> {
        /// `GGML_N_TASKS_MAX`: on as many threads as the graph has.
        const ALL_THREADS: c_int = -1;
        // SAFETY: The context has room for two tensors without their data, is freed below, and no node of it is used
        // after that.
        unsafe {
            let params = sys::ggml_init_params {
                mem_size: 4 * sys::ggml_tensor_overhead(),
                mem_buffer: std::ptr::null_mut(),
                no_alloc: true,
            };
            let context = sys::ggml_init(params);
            if context.is_null() {
                return Err(Error::backend("ggml could not make a context"));
            }
            let mut args = [sys::ggml_new_tensor_1d(context, sys::GGML_TYPE_F32, 1)];
            let f32 = sys::GGML_TYPE_F32;
            let node =
                sys::ggml_custom_4d(context, f32, 1, 1, 1, 1, args.as_mut_ptr(), 1, f, ALL_THREADS, data);
            let custom = Self { op: (*node).op, params: (*node).op_params };
            sys::ggml_free(context);
            Ok(custom)
        }
    }

    /// Makes `node` this operation.
    pub(crate) fn put(&self, node: &mut sys::ggml_tensor) {
        node.op = self.op;
        node.op_params = self.params;
    }

    /// Whether `node` is this operation already: llama.cpp computes a graph again where nothing in it has changed.
    pub(crate) fn is(&self, node: &sys::ggml_tensor) -> bool {
        node.op == self.op && node.op_params == self.params
    }
}

/// A product with weights of the checkpoint. Its address must not change once [`Product::op`] has been called.
pub(crate) struct Product {
    weights: Operand,
    /// How weights with a scale for each group take the input.
    activations: ActivationType,
    /// The number of the graph that is computed, see [`Hook`](crate::hook::Hook).
    graph: AtomicU64,
    guard: Arc<Guard>,
}

/// What an input is multiplied by.
enum Operand {
    Linear(Linear),
    Head(Arc<HeadNode>),
}

/// An input of products: the number of the graph and the address of the tensor in it. No two inputs are equal, since the
/// numbers of graphs are unique in the process and the tensors of a graph live as long as it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InputId {
    graph: u64,
    tensor: usize,
}

impl InputId {
    pub(crate) fn new(graph: u64, tensor: *const sys::ggml_tensor) -> Self {
        Self { graph, tensor: tensor as usize }
    }
}

impl Product {
    pub(crate) fn new(linear: Linear, activations: ActivationType, guard: &Arc<Guard>) -> Self {
        let weights = Operand::Linear(linear);
        Self { weights, activations, graph: AtomicU64::new(0), guard: Arc::clone(guard) }
    }

    /// The product of a head with a copy.
    pub(crate) fn of_head(head: Arc<HeadNode>, guard: &Arc<Guard>) -> Self {
        let (weights, activations) = (Operand::Head(head), ActivationType::default());
        Self { weights, activations, graph: AtomicU64::new(0), guard: Arc::clone(guard) }
    }

    /// The operation that computes this product.
    pub(crate) fn op(&self) -> Result<CustomOp> {
        CustomOp::new(Some(product), std::ptr::from_ref(self).cast_mut().cast())
    }

    /// Output and input width.
    fn shape(&self) -> [usize; 2] {
        match &self.weights {
            Operand::Linear(linear) => [linear.rows(), linear.cols()],
            Operand::Head(head) => head.shape(),
        }
    }

    /// Tells which graph is about to be computed.
    pub(crate) fn begin(&self, graph: u64) {
        self.graph.store(graph, Ordering::Relaxed);
    }

    /// What must hold of a node for this product to be computed in its place.
    pub(crate) fn check(&self, node: &sys::ggml_tensor) -> std::result::Result<(), String> {
        // SAFETY: A product of ggml has two sources, which live as long as its graph.
        let Some(input) = (unsafe { node.src[1].as_ref() }) else { return Err("it has one input".into()) };
        let [rows, cols] = self.shape().map(|size| size as i64);
        check_matrix(input, cols, input.ne[1])?;
        check_matrix(node, rows, input.ne[1])?;
        check_apart(node, input)
    }

    /// Computes a part, `(part, of)`, of the product; the other threads write to the rest of `out`.
    ///
    /// # Safety
    /// `out` is valid for writes of a row for each of `tokens`, and no one but the other parts uses it meanwhile.
    unsafe fn run(&self, x: &[f32], id: InputId, tokens: usize, out: *mut f32, part: (usize, usize)) {
        let [rows, cols] = self.shape();
        let linear = match &self.weights {
            Operand::Linear(linear) => linear,
            Operand::Head(head) => {
                if part.0 == 0 {
                    // SAFETY: The caller's promise; the other parts write nothing.
                    let out = unsafe { std::slice::from_raw_parts_mut(out, tokens * rows) };
                    if let Err(error) = head.forward(x, out) {
                        self.guard.fail("the head", &error);
                    }
                }
                return;
            }
        };
        assert_eq!(tokens.checked_mul(cols), Some(x.len()), "the input of `{}`", linear.name);
        SCRATCH.with_borrow_mut(|Scratch { normed, quantized, holds, grouped, holds_grouped }| {
            let (x, id) = match &linear.input_norm {
                None => (x, Some(id)),
                Some(norm) => {
                    normed.resize(x.len(), 0.0);
                    kernels::rms_norm_here(x, &norm.weight, norm.eps, normed);
                    (&normed[..], None)
                }
            };
            match &linear.weights {
                // SAFETY: The caller's promise, with as many tokens in `x` as it says.
                Weights::Dense(dense) => unsafe {
                    kernels::dense_matmul_part(dense.view(), (rows, cols), x, out, rows, part);
                },
                // SAFETY: As above.
                Weights::Grouped(weights) if self.activations == ActivationType::F32 => unsafe {
                    kernels::grouped_matmul_f32_part(weights, x, out, rows, part);
                },
                Weights::Grouped(weights) => {
                    let wanted = id.map(|id| (id, self.activations));
                    if wanted.is_none() || *holds_grouped != wanted || !grouped.fits(weights) {
                        *holds_grouped = None;
                        grouped.quantize(x, weights, self.activations);
                        *holds_grouped = wanted;
                    }
                    assert_eq!(grouped.tokens(), tokens, "the quantised input of `{}`", linear.name);
                    // SAFETY: As above, with as many tokens in `grouped`.
                    unsafe { kernels::grouped_matmul_part(weights, grouped, out, rows, part) };
                }
                Weights::Ternary(ternary) => {
                    if id.is_none() || *holds != id {
                        // After a panic, the buffer holds no input.
                        *holds = None;
                        quantized.quantize_here(x, tokens, cols, cols);
                        *holds = id;
                    }
                    assert_eq!(
                        (quantized.tokens(), quantized.cols()),
                        (tokens, cols),
                        "the quantised input of `{}`",
                        linear.name
                    );
                    let codes =
                        ternary.view().expect("invariant: a checkpoint's ternary tensors have been checked");
                    // SAFETY: The caller's promise, with as many tokens in `quantized` as it says.
                    unsafe { kernels::matmul_part(codes, ternary.scale, quantized, out, rows, part) };
                }
            }
        });
    }
}

/// What a thread keeps between the nodes of a graph.
#[derive(Default)]
struct Scratch {
    normed: Vec<f32>,
    quantized: kernels::Quantized,
    /// The input whose values are in `quantized`; `None` if it is the input of no further product.
    holds: Option<InputId>,
    grouped: kernels::GroupedInput,
    /// The input whose values are in `grouped`, and in which form.
    holds_grouped: Option<(InputId, ActivationType)>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

unsafe extern "C" fn product(node: *mut sys::ggml_tensor, part: c_int, of: c_int, data: *mut c_void) {
    // SAFETY: `data` is the product that the operation was made of; it outlives the context that computes the graph.
    let product = unsafe { &*data.cast::<Product>() };
    product.guard.run("a matrix product", || {
        // SAFETY: `node` passed `Product::check` when its graph was made, and ggml has computed its input and lets no one
        // else touch its output.
        unsafe {
            let node = &*node;
            let x = floats(&*node.src[1]);
            let id = InputId::new(product.graph.load(Ordering::Relaxed), node.src[1]);
            product.run(x, id, node.ne[1] as usize, node.data.cast(), (part as usize, of as usize));
        }
    });
}

/// `relu(gate)^2 * up` in the place of a node that computes `silu(gate) * up`. `guard` outlives the graphs.
pub(crate) fn relu2(guard: &Arc<Guard>) -> Result<CustomOp> {
    CustomOp::new(Some(relu2_node), Arc::as_ptr(guard).cast_mut().cast())
}

/// What must hold of a node before it becomes [`relu2`].
pub(crate) fn check_relu2(node: &sys::ggml_tensor) -> std::result::Result<(), String> {
    const SWAPPED: usize = 1;
    if node.op_params[0] != sys::GGML_GLU_OP_SWIGLU as i32 || node.op_params[SWAPPED] != 0 {
        return Err("it is another gated unit".into());
    }
    check_gated(node)
}

/// What must hold of the tensors of a node that is [`relu2`].
pub(crate) fn check_gated(node: &sys::ggml_tensor) -> std::result::Result<(), String> {
    for input in &node.src[..2] {
        // SAFETY: Sources of a node live as long as its graph.
        let Some(input) = (unsafe { input.as_ref() }) else {
            return Err("gate and up are one tensor".into());
        };
        check_matrix(input, node.ne[0], node.ne[1])?;
        check_apart(node, input)?;
    }
    check_matrix(node, node.ne[0], node.ne[1])
}

unsafe extern "C" fn relu2_node(node: *mut sys::ggml_tensor, part: c_int, of: c_int, data: *mut c_void) {
    /// Elements that a cache line holds, so that no two threads write to one.
    const LINE: usize = 16;
    // SAFETY: `data` is the guard that the operation was made with; it outlives the context that computes the graph.
    let guard = unsafe { &*data.cast::<Guard>() };
    guard.run("a squared ReLU", || {
        // SAFETY: `node` passed `check_gated`: both inputs are as long as the output, which is apart from them. ggml has
        // computed the inputs and lets no one else touch the output, of which each part is written by one thread.
        unsafe {
            let node = &*node;
            let (gate, up) = (floats(&*node.src[0]), floats(&*node.src[1]));
            let (part, of) = (part as usize, of as usize);
            let length = gate.len().div_ceil(of).next_multiple_of(LINE);
            let (start, end) = ((part * length).min(gate.len()), ((part + 1) * length).min(gate.len()));
            let out = std::slice::from_raw_parts_mut(node.data.cast::<f32>().add(start), end - start);
            kernels::relu2_part(&gate[start..end], &up[start..end], out);
        }
    });
}

/// The floats of a tensor.
///
/// # Safety
/// The tensor passed [`check_matrix`], is computed, and nothing writes to it as long as the result lives.
unsafe fn floats<'a>(tensor: &sys::ggml_tensor) -> &'a [f32] {
    let elements = (tensor.ne[0] * tensor.ne[1]) as usize;
    // SAFETY: The caller's promise: `elements` floats without gaps, in memory of this process.
    unsafe { std::slice::from_raw_parts(tensor.data.cast::<f32>(), elements) }
}

/// Whether a tensor is `[rows, cols]` floats (`cols` innermost), row after row without gaps, in memory of this process.
fn check_matrix(tensor: &sys::ggml_tensor, cols: i64, rows: i64) -> std::result::Result<(), String> {
    if tensor.ne != [cols, rows, 1, 1] || cols < 0 || rows < 0 || cols.checked_mul(rows).is_none() {
        return Err(format!("a shape is {:?}, expected {:?}", tensor.ne, [cols, rows, 1, 1]));
    }
    if tensor.type_ != sys::GGML_TYPE_F32 || tensor.nb[0] != 4 || tensor.nb[1] != 4 * cols as usize {
        return Err("a tensor is not contiguous floats".into());
    }
    check_host(tensor)
}

/// Whether a tensor is in memory of this process, aligned as its elements need it.
pub(crate) fn check_host(tensor: &sys::ggml_tensor) -> std::result::Result<(), String> {
    // A view has the buffer of the tensor that it is a view of.
    // SAFETY: The source of a view lives as long as the view.
    let owner = unsafe { tensor.view_src.as_ref() }.unwrap_or(tensor);
    let buffer = if tensor.buffer.is_null() { owner.buffer } else { tensor.buffer };
    // SAFETY: The buffer is one that llama.cpp has allocated.
    if tensor.data.is_null() || buffer.is_null() || !unsafe { sys::ggml_backend_buffer_is_host(buffer) } {
        return Err("a tensor is not in this process's memory".into());
    }
    if !tensor.data.cast::<f32>().is_aligned() {
        return Err("a tensor is not aligned".into());
    }
    Ok(())
}

/// Whether a node shares no memory with its input.
pub(crate) fn check_apart(
    node: &sys::ggml_tensor,
    input: &sys::ggml_tensor,
) -> std::result::Result<(), String> {
    let range = |t: &sys::ggml_tensor| {
        let start = t.data as usize;
        // SAFETY: The tensor is alive; its sizes and distances are read.
        start..start + unsafe { sys::ggml_nbytes(t) }
    };
    let (a, b) = (range(node), range(input));
    if a.start < b.end && b.start < a.end && !a.is_empty() && !b.is_empty() {
        return Err("input and output overlap".into());
    }
    Ok(())
}
