//! The eval callback: turns nodes of llama.cpp's graph into custom operations before the graph is computed.
//!
//! ggml's scheduler asks, for each node of a graph and before any of them is computed, whether the caller wants to see
//! its result. The answer here is always no, so that the graph stays one piece, but the question is the occasion to
//! change the node. Products are found by the tensor of their weights, which is a placeholder; attention and gated units by
//! what they are. All that was found is counted, and a graph that was not changed completely is an error. Multiplications by
//! scales of 1 and additions of biases of 0, which llama.cpp has in its graph once a model is made from memory, are left
//! out: they took a twentieth of the time of a prompt.

use std::collections::{HashMap, HashSet};
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use llama_cpp_sys_2 as sys;
use ternion_core::{Error, Result};

use crate::{
    attention::Attention,
    guard::Guard,
    ops::{self, CustomOp, Product},
};

/// The number of the next graph of any model in this process. Threads compute graphs of several models and keep quantised
/// inputs between nodes; by the number they know which graph an input belongs to.
static NEXT_GRAPH: AtomicU64 = AtomicU64::new(1);

/// What is to be changed in the graphs of one model, and what has been.
pub(crate) struct Hook {
    /// By the address of the placeholder.
    products: HashMap<usize, (Box<Product>, CustomOp)>,
    /// Squared ReLU in the place of gated units, where the model has it.
    relu2: Option<CustomOp>,
    /// Attention of each layer, in the place of llama.cpp's flash attention.
    attention: Box<Attention>,
    attend: CustomOp,
    layers: usize,
    /// The addresses of scales of 1 and biases of 0.
    neutral: HashSet<usize>,
    found: Found,
    /// Shared with the operations.
    guard: Arc<Guard>,
}

/// What has been found since the last [`Hook::begin`].
#[derive(Default)]
struct Found {
    products: usize,
    gated_units: usize,
    attentions: usize,
    /// The number of the graph that is looked at.
    graph: u64,
    error: Option<String>,
}

impl Hook {
    /// A hook without products for a model of so many layers; `relu2` says whether gated units are squared ReLUs, and `neutral`
    /// are scales of 1 and biases of 0. `attention` and the products have the guard `guard`.
    pub(crate) fn new(
        layers: usize,
        relu2: bool,
        attention: Attention,
        neutral: &[*const sys::ggml_tensor],
        guard: Arc<Guard>,
    ) -> Result<Self> {
        let relu2 = relu2.then(|| ops::relu2(&guard)).transpose()?;
        let neutral = neutral.iter().map(|tensor| *tensor as usize).collect();
        let attention = Box::new(attention);
        let attend = attention.op()?;
        let (products, found) = (HashMap::new(), Found::default());
        Ok(Self { products, relu2, attention, attend, layers, neutral, found, guard })
    }

    /// Computes `product` wherever a graph multiplies by `placeholder`.
    pub(crate) fn add(&mut self, placeholder: *const sys::ggml_tensor, product: Box<Product>) -> Result<()> {
        let op = product.op()?;
        self.products.insert(placeholder as usize, (product, op));
        Ok(())
    }

    /// How many products there are.
    pub(crate) fn products(&self) -> usize {
        self.products.len()
    }

    /// To be called before graphs are computed.
    pub(crate) fn begin(&mut self) {
        self.found = Found::default();
    }

    /// An error if a callback has panicked while graphs were computed.
    pub(crate) fn check_panics(&self) -> Result<()> {
        self.guard.check()
    }

    /// To be called after it: an error if a graph was not changed completely, so that what it computed means nothing.
    pub(crate) fn finish(&mut self) -> Result<()> {
        let found = std::mem::take(&mut self.found);
        if let Some(error) = found.error {
            return Err(Error::backend(format!("llama.cpp's graph is not the expected one: {error}")));
        }
        let (products, units) = (self.products.len(), if self.relu2.is_some() { self.layers } else { 0 });
        let graphs = found.products / products.max(1);
        // None where llama.cpp computes attention.
        let attends = found.attentions == 0 || found.attentions == graphs * self.layers;
        if graphs == 0
            || found.products != graphs * products
            || found.gated_units != graphs * units
            || !attends
        {
            return Err(Error::backend(format!(
                "llama.cpp's graph is not the expected one: {} products, {} gated units and {} attentions found, expected \
                 {products}, {units} and {} in each graph",
                found.products, found.gated_units, found.attentions, self.layers
            )));
        }
        Ok(())
    }

    fn visit(&mut self, node: &mut sys::ggml_tensor) {
        if self.found.error.is_some() {
            return;
        }
        if let Err(error) = self.change(node) {
            self.found.error = Some(format!("node `{}`: {error}", name(node)));
        }
    }

    fn change(&mut self, node: &mut sys::ggml_tensor) -> std::result::Result<(), String> {
        match node.op {
            sys::GGML_OP_MUL_MAT | sys::GGML_OP_CUSTOM => {
                if let Some((product, op)) = self.products.get(&(node.src[0] as usize)) {
                    if let Err(error) = product.check(node) {
                        // llama.cpp computes a graph again that has been changed before. The operation must not run.
                        if op.is(node) {
                            node.op = sys::GGML_OP_NONE;
                        }
                        return Err(error);
                    }
                    if !op.is(node) {
                        op.put(node);
                    }
                    if self.found.products.is_multiple_of(self.products.len()) {
                        self.found.graph = NEXT_GRAPH.fetch_add(1, Ordering::Relaxed);
                        self.attention.begin(self.found.graph);
                    }
                    product.begin(self.found.graph);
                    self.found.products += 1;
                } else if self.attend.is(node) {
                    if let Err(error) = self.attention.check(node) {
                        node.op = sys::GGML_OP_NONE;
                        return Err(error);
                    }
                    self.found.attentions += 1;
                } else if self.relu2.is_some_and(|op| op.is(node)) {
                    if let Err(error) = ops::check_gated(node) {
                        node.op = sys::GGML_OP_NONE;
                        return Err(error);
                    }
                    self.found.gated_units += 1;
                }
            }
            sys::GGML_OP_FLASH_ATTN_EXT if Attention::knows(node) => {
                self.attention.check_params(node)?;
                self.attention.check(node)?;
                // SAFETY: The graph is not being computed yet.
                unsafe { Attention::skip_casts(node) };
                self.attend.put(node);
                self.found.attentions += 1;
            }
            sys::GGML_OP_GLU => {
                if let Some(op) = &self.relu2 {
                    ops::check_relu2(node)?;
                    op.put(node);
                    self.found.gated_units += 1;
                }
            }
            sys::GGML_OP_MUL | sys::GGML_OP_ADD if self.neutral.contains(&(node.src[1] as usize)) => {
                // SAFETY: Sources of a node live as long as its graph.
                let input = unsafe { node.src[0].as_ref() };
                // Where ggml has given it memory of its own, it is computed: a copy.
                if input.is_some_and(|input| input.data == node.data) {
                    node.op = sys::GGML_OP_NONE;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

fn name(node: &sys::ggml_tensor) -> String {
    let bytes = node.name.iter().map(|c| *c as u8).take_while(|c| *c != 0).collect::<Vec<_>>();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The callback, with a [`Hook`] as its user data.
///
/// # Safety
/// `data` points to a `Hook` that nothing else uses while graphs are computed.
pub(crate) unsafe extern "C" fn on_node(node: *mut sys::ggml_tensor, ask: bool, data: *mut c_void) -> bool {
    if ask {
        // SAFETY: The caller's promise, and ggml's: the node is one of a graph that is not being computed yet.
        let (hook, node) = unsafe { (&mut *data.cast::<Hook>(), &mut *node) };
        let guard = Arc::clone(&hook.guard);
        guard.run("the change of llama.cpp's graph", || hook.visit(node));
        return false;
    }
    // Never asked, since no result is wanted; `true` goes on.
    true
}
