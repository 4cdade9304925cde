//! A model of llama.cpp made from a checkpoint, in memory and without copying its weights.
//!
//! llama.cpp gets metadata and asks for the contents of each tensor that its architecture has. Norms and rotary factors
//! are filled in; the weights stay placeholders, whose memory is reserved and never touched, so that it takes no room. Their
//! type is one that takes little address space and that the width can be divided into; no element of it is ever read.
//!
//! Three of llama.cpp's architectures serve: `bitnet`, which has the sub-norms, `qwen3`, which has norms of heads, and `exaone`,
//! which is Llama with the rotary embedding that rotates the halves of a head against each other, as checkpoints store their
//! rows.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_void};
use std::ptr::NonNull;
use std::sync::Arc;

use llama_cpp_sys_2 as sys;
use ternion_core::{Error, ErrorKind, Result};
use ternion_formats::{
    Activation, Checkpoint, LayerTensors, Linear, RmsNorm, RopeScaling, RopeSpec, Table, Weights,
};
use ternion_kernels::ActivationType;

use crate::{attention::Attention, ffi::Model, guard::Guard, head::HeadNode, hook::Hook, ops::Product};

/// The most layers that llama.cpp has room for.
const MAX_LAYERS: usize = 512;

/// The parts of a decoder that a model is made from.
pub(crate) struct Parts<'a> {
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) vocab_size: usize,
    pub(crate) context_length: usize,
    pub(crate) rms_eps: f32,
    pub(crate) rope: &'a RopeSpec,
    pub(crate) activation: Activation,
    pub(crate) layers: &'a [LayerTensors],
    pub(crate) final_norm: &'a RmsNorm,
    pub(crate) head: Table,
    /// How weights with a scale for each group take their input.
    pub(crate) activations: ActivationType,
    /// What computes the head in place of `head`, where it has a copy.
    pub(crate) head_node: Option<Arc<HeadNode>>,
}

impl<'a> From<&'a Checkpoint> for Parts<'a> {
    fn from(checkpoint: &'a Checkpoint) -> Self {
        let spec = &checkpoint.spec;
        Self {
            hidden_size: spec.hidden_size,
            intermediate_size: spec.intermediate_size,
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            vocab_size: spec.vocab_size,
            context_length: spec.context_length,
            rms_eps: spec.rms_eps,
            rope: &spec.rope,
            activation: spec.activation,
            layers: &checkpoint.layers,
            final_norm: &checkpoint.final_norm,
            head: checkpoint.head_or_embed().clone(),
            activations: ActivationType::default(),
            head_node: None,
        }
    }
}

impl Parts<'_> {
    fn sub_norms(&self) -> bool {
        self.layers.iter().any(|layer| layer.attn_sub_norm.is_some() || layer.ffn_sub_norm.is_some())
    }

    fn head_norms(&self) -> bool {
        self.layers.iter().any(|layer| layer.q_norm.is_some())
    }

    fn architecture(&self) -> &'static str {
        match (self.sub_norms(), self.head_norms()) {
            (true, _) => "bitnet",
            (false, true) => "qwen3",
            (false, false) => "exaone",
        }
    }

    /// The model in llama.cpp, and what makes its graphs right. `self` may be dropped after it: what the weights lie in is
    /// shared with the hook.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for what llama.cpp's graphs cannot express.
    pub(crate) fn load(&self) -> Result<(Model, Hook)> {
        self.load_with(Arc::default())
    }

    /// [`load`](Self::load) with the guard of all callbacks.
    pub(crate) fn load_with(&self, guard: Arc<Guard>) -> Result<(Model, Hook)> {
        self.check()?;
        let mut source = Source {
            contents: self.contents(),
            placeholders: self.placeholders(&guard),
            products: Vec::new(),
            neutral: Vec::new(),
            error: None,
            guard: Arc::clone(&guard),
        };
        let metadata = self.metadata(&source.placeholders)?;
        let user_data = std::ptr::from_mut(&mut source).cast::<c_void>();
        // SAFETY: `metadata` and `source` live for the call, and nothing else uses `source` meanwhile.
        let model = Model::load(|| unsafe {
            let mut params = sys::llama_model_default_params();
            params.n_gpu_layers = 0;
            sys::llama_model_init_from_user(metadata.raw.as_ptr(), Some(fill), user_data, params)
        });
        guard.check()?;
        let model = model?;
        if let Some(error) = source.error {
            return Err(Error::backend(error));
        }
        let relu2 = self.activation == Activation::Relu2;
        let attention = Attention::new([self.heads, self.kv_heads, self.head_dim], &guard);
        let mut hook = Hook::new(self.layers.len(), relu2, attention, &source.neutral, guard)?;
        for (tensor, product) in source.products {
            hook.add(tensor, Box::new(product))?;
        }
        let expected = 7 * self.layers.len() + 1;
        if hook.products() != expected {
            let found = hook.products();
            return Err(Error::backend(format!(
                "llama.cpp made {found} tensors of weights, expected {expected}"
            )));
        }
        Ok((model, hook))
    }

    fn check(&self) -> Result<()> {
        let unsupported = |message: String| Err(Error::new(ErrorKind::Unsupported, message));
        if self.layers.len() > MAX_LAYERS {
            return unsupported(format!("{} layers; llama.cpp has room for {MAX_LAYERS}", self.layers.len()));
        }
        let norms = self.layers.iter().flat_map(LayerTensors::norms).chain([self.final_norm]);
        if norms.into_iter().any(|norm| norm.eps != self.rms_eps) {
            return unsupported("the norms differ in their epsilon; llama.cpp has one for all".to_owned());
        }
        if self.head_norms() {
            if self.sub_norms() || self.layers.iter().any(|l| l.q_norm.is_none() || l.k_norm.is_none()) {
                let message = "norms of heads in some of the layers or together with sub-norms";
                return unsupported(message.to_owned());
            }
            if matches!(self.rope.scaling, RopeScaling::Llama3 { .. } | RopeScaling::Factors(_))
                || matches!(self.rope.scaling, RopeScaling::Yarn { truncate: false, .. })
            {
                let message = "rotary frequencies that are scaled one by one, together with norms of heads";
                return unsupported(message.to_owned());
            }
        } else if self.rope.attention_factor() != 1.0 {
            return unsupported("YaRN in a model without norms of heads".to_owned());
        }
        if self.sub_norms() {
            if self.layers.iter().any(|l| l.attn_sub_norm.is_none() || l.ffn_sub_norm.is_none()) {
                return unsupported("only some of the sub-norms exist; llama.cpp has all or none".to_owned());
            }
            if self.heads * self.head_dim != self.hidden_size {
                return unsupported(format!(
                    "{} heads of {} in a width of {}; llama.cpp's graph with sub-norms expects the heads to be as wide",
                    self.heads, self.head_dim, self.hidden_size
                ));
            }
            if matches!(self.rope.scaling, RopeScaling::Llama3 { .. } | RopeScaling::Factors(_)) {
                let message = "rotary frequencies that are scaled one by one, together with sub-norms";
                return unsupported(message.to_owned());
            }
        }
        Ok(())
    }

    /// The tensors that llama.cpp gets, by name.
    fn contents(&self) -> BTreeMap<String, Vec<f32>> {
        let mut contents =
            BTreeMap::from([("output_norm.weight".to_owned(), self.final_norm.weight.clone())]);
        for (i, layer) in self.layers.iter().enumerate() {
            let mut add = |name: &str, norm: &RmsNorm| {
                contents.insert(format!("blk.{i}.{name}.weight"), norm.weight.clone());
            };
            add("attn_norm", &layer.input_norm);
            add("ffn_norm", &layer.post_attention_norm);
            if let (Some(q), Some(k)) = (&layer.q_norm, &layer.k_norm) {
                add("attn_q_norm", q);
                add("attn_k_norm", k);
            }
            if let Some(norm) = &layer.attn_sub_norm {
                add("attn_sub_norm", norm);
            }
            if let Some(norm) = &layer.ffn_sub_norm {
                add("ffn_sub_norm", norm);
            }
        }
        // llama.cpp divides the angles by these.
        let plain =
            RopeSpec { theta: self.rope.theta, scaling: RopeScaling::None }.frequencies(self.head_dim);
        let scaled = self.rope.frequencies(self.head_dim);
        let factors = plain.iter().zip(&scaled).map(|(plain, scaled)| plain / scaled).collect();
        if !self.head_norms() {
            contents.insert("rope_freqs.weight".to_owned(), factors);
        }
        contents
    }

    /// The head as it is.
    fn exact_head(&self) -> Linear {
        let weights = match &self.head {
            Table::Dense(dense) => Weights::Dense(dense.clone()),
            Table::Quantized(table) => Weights::Dense(table.to_dense()),
            Table::Grouped(matrix) => Weights::Grouped(Arc::clone(matrix)),
        };
        Linear { name: "lm_head".to_owned(), weights, input_norm: None }
    }

    /// The products, by the name of the tensor that stands for their weights; `None` for the embedding where it is not
    /// the head: its rows are fed to llama.cpp, which never looks one up.
    fn placeholders(&self, guard: &Arc<Guard>) -> BTreeMap<String, (Option<Product>, [usize; 2])> {
        let mut placeholders = BTreeMap::new();
        let head = match &self.head_node {
            Some(node) => Product::of_head(Arc::clone(node), guard),
            None => Product::new(self.exact_head(), self.activations, guard),
        };
        let shape = [self.vocab_size, self.hidden_size];
        if self.sub_norms() {
            placeholders.insert("token_embd.weight".to_owned(), (Some(head), shape));
        } else {
            placeholders.insert("token_embd.weight".to_owned(), (None, shape));
            placeholders.insert("output.weight".to_owned(), (Some(head), shape));
        }
        for (i, layer) in self.layers.iter().enumerate() {
            let names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
            for (name, linear) in names.into_iter().zip(layer.linears()) {
                let shape = [linear.rows(), linear.cols()];
                let product = Product::new(linear.clone(), self.activations, guard);
                placeholders.insert(format!("blk.{i}.{name}.weight"), (Some(product), shape));
            }
        }
        placeholders
    }

    fn metadata(&self, placeholders: &BTreeMap<String, (Option<Product>, [usize; 2])>) -> Result<Metadata> {
        let architecture = self.architecture();
        let metadata = Metadata::new(placeholders.len())?;
        metadata.string("general.architecture", architecture);
        metadata.string("tokenizer.ggml.model", "none");
        let integers = [
            ("vocab_size", self.vocab_size),
            ("context_length", self.context_length),
            ("embedding_length", self.hidden_size),
            ("block_count", self.layers.len()),
            ("feed_forward_length", self.intermediate_size),
            ("attention.head_count", self.heads),
            ("attention.head_count_kv", self.kv_heads),
            ("attention.key_length", self.head_dim),
            ("attention.value_length", self.head_dim),
            ("rope.dimension_count", self.head_dim),
        ];
        for (key, value) in integers {
            metadata.integer(&format!("{architecture}.{key}"), value);
        }
        metadata.float(&format!("{architecture}.attention.layer_norm_rms_epsilon"), self.rms_eps);
        metadata.float(&format!("{architecture}.rope.freq_base"), self.rope.theta);
        let scaling = |key: &str| format!("{architecture}.rope.scaling.{key}");
        match self.rope.scaling {
            // Elsewhere the frequencies are divided by factors of their own.
            RopeScaling::Linear { factor } if self.sub_norms() || self.head_norms() => {
                metadata.string(&scaling("type"), "linear");
                metadata.float(&scaling("factor"), factor);
            }
            RopeScaling::Yarn {
                factor, original_context, beta_fast, beta_slow, attention_factor, ..
            } => {
                metadata.string(&scaling("type"), "yarn");
                metadata.float(&scaling("factor"), factor);
                metadata.integer(&scaling("original_context_length"), original_context);
                metadata.float(&scaling("yarn_beta_fast"), beta_fast);
                metadata.float(&scaling("yarn_beta_slow"), beta_slow);
                // llama.cpp multiplies it by the one that follows from the factor.
                let implied = 1.0 + 0.1 * factor.max(1.0).ln();
                metadata.float(&scaling("attn_factor"), attention_factor / implied);
            }
            _ => {}
        }
        for (name, (_, [_, cols])) in placeholders {
            metadata.tensor_type(name, placeholder_type(*cols), *cols);
        }
        Ok(metadata)
    }
}

/// The smallest type whose blocks divide rows of `cols` elements.
fn placeholder_type(cols: usize) -> sys::ggml_type {
    match cols {
        _ if cols.is_multiple_of(256) => sys::GGML_TYPE_TQ2_0,
        _ if cols.is_multiple_of(32) => sys::GGML_TYPE_Q4_0,
        _ => sys::GGML_TYPE_F16,
    }
}

/// Metadata of a model, and the context in which the types of its tensors are said.
struct Metadata {
    raw: NonNull<sys::gguf_context>,
    tensors: NonNull<sys::ggml_context>,
}

impl Metadata {
    fn new(tensors: usize) -> Result<Self> {
        // SAFETY: Plain constructors; what is not null is freed by `drop` or below.
        unsafe {
            let params = sys::ggml_init_params {
                mem_size: (tensors + 1) * sys::ggml_tensor_overhead(),
                mem_buffer: std::ptr::null_mut(),
                no_alloc: true,
            };
            let tensors = NonNull::new(sys::ggml_init(params));
            let raw = NonNull::new(sys::gguf_init_empty());
            match (raw, tensors) {
                (Some(raw), Some(tensors)) => Ok(Self { raw, tensors }),
                (raw, tensors) => {
                    raw.inspect(|raw| sys::gguf_free(raw.as_ptr()));
                    tensors.inspect(|tensors| sys::ggml_free(tensors.as_ptr()));
                    Err(Error::backend("ggml could not make a context"))
                }
            }
        }
    }

    fn string(&self, key: &str, value: &str) {
        let (key, value) = (c_string(key), c_string(value));
        // SAFETY: The context is alive; it copies both strings.
        unsafe { sys::gguf_set_val_str(self.raw.as_ptr(), key.as_ptr(), value.as_ptr()) };
    }

    fn integer(&self, key: &str, value: usize) {
        let key = c_string(key);
        let value = u32::try_from(value).expect("invariant: a checkpoint's sizes are far below 2^32");
        // SAFETY: As in `string`.
        unsafe { sys::gguf_set_val_u32(self.raw.as_ptr(), key.as_ptr(), value) };
    }

    fn float(&self, key: &str, value: f32) {
        let key = c_string(key);
        // SAFETY: As in `string`.
        unsafe { sys::gguf_set_val_f32(self.raw.as_ptr(), key.as_ptr(), value) };
    }

    /// Says the type of a tensor; llama.cpp knows the shapes, and here one row stands for all.
    fn tensor_type(&self, name: &str, tensor_type: sys::ggml_type, cols: usize) {
        let name = c_string(name);
        // SAFETY: Both contexts are alive; the one of the tensors has room for as many as `new` was told, and the
        // metadata copies what it takes of the tensor.
        unsafe {
            let tensor = sys::ggml_new_tensor_1d(self.tensors.as_ptr(), tensor_type, cols as i64);
            sys::ggml_set_name(tensor, name.as_ptr());
            sys::gguf_add_tensor(self.raw.as_ptr(), tensor);
        }
    }
}

impl Drop for Metadata {
    fn drop(&mut self) {
        // SAFETY: Both are this owner's.
        unsafe {
            sys::gguf_free(self.raw.as_ptr());
            sys::ggml_free(self.tensors.as_ptr());
        }
    }
}

fn c_string(text: &str) -> CString {
    CString::new(text).expect("invariant: names that are written here hold no NUL")
}

/// What [`fill`] gives to llama.cpp, and what it takes down.
struct Source {
    contents: BTreeMap<String, Vec<f32>>,
    placeholders: BTreeMap<String, (Option<Product>, [usize; 2])>,
    /// Placeholders that llama.cpp made, with what they stand for.
    products: Vec<(*const sys::ggml_tensor, Product)>,
    /// Scales of 1 and biases of 0.
    neutral: Vec<*const sys::ggml_tensor>,
    error: Option<String>,
    guard: Arc<Guard>,
}

impl Source {
    fn fill(&mut self, tensor: &mut sys::ggml_tensor, name: &str) -> std::result::Result<(), String> {
        if let Some((product, [rows, cols])) = self.placeholders.get_mut(name) {
            if tensor.ne != [*cols as i64, *rows as i64, 1, 1] {
                return Err(format!("its shape is {:?}, expected [{cols}, {rows}]", tensor.ne));
            }
            if let Some(product) = product.take() {
                self.products.push((std::ptr::from_ref(tensor), product));
            }
            return Ok(());
        }
        // SAFETY: The buffer is the one that llama.cpp has allocated for the tensor.
        let host = !tensor.buffer.is_null() && unsafe { sys::ggml_backend_buffer_is_host(tensor.buffer) };
        if tensor.type_ != sys::GGML_TYPE_F32 || tensor.data.is_null() || !host {
            return Err("it is not floats in this process's memory".into());
        }
        let size = |size: &i64| usize::try_from(*size).ok();
        let elements = tensor.ne.iter().try_fold(1, |all: usize, n| all.checked_mul(size(n)?));
        let elements = elements.filter(|n| n.checked_mul(size_of::<f32>()).is_some());
        let elements = elements.ok_or_else(|| format!("its shape is {:?}", tensor.ne))?;
        // SAFETY: llama.cpp has allocated a float for each element and asks for them to be written.
        let out = unsafe { std::slice::from_raw_parts_mut(tensor.data.cast::<f32>(), elements) };
        let kind = name.rsplit('.').next();
        match (self.contents.get(name), kind) {
            (Some(values), _) if values.len() == elements => out.copy_from_slice(values),
            (Some(values), _) => {
                return Err(format!("it has {elements} elements, expected {}", values.len()));
            }
            // llama.cpp makes all tensors that an architecture may have; these change nothing.
            (None, Some(kind @ ("scale" | "input_scale" | "bias"))) => {
                out.fill(if kind == "bias" { 0.0 } else { 1.0 });
                self.neutral.push(std::ptr::from_ref(tensor));
            }
            // That of rerankers, which the graph of a language model does not have.
            (None, _) if name.starts_with("cls.") => out.fill(0.0),
            (None, _) => return Err("it has no place in the model".into()),
        }
        Ok(())
    }
}

/// llama.cpp's question for the contents of a tensor.
///
/// # Safety
/// `data` points to a [`Source`] that nothing else uses meanwhile.
unsafe extern "C" fn fill(tensor: *mut sys::ggml_tensor, data: *mut c_void) {
    // SAFETY: The caller's promise.
    let source = unsafe { &mut *data.cast::<Source>() };
    let guard = Arc::clone(&source.guard);
    guard.run("the source of llama.cpp's tensors", || {
        // SAFETY: The tensor is llama.cpp's and has a name that ends with NUL.
        let (tensor, name) = unsafe {
            let name = CStr::from_ptr(sys::ggml_get_name(tensor)).to_string_lossy().into_owned();
            (&mut *tensor, name)
        };
        if let Err(error) = source.fill(tensor, &name)
            && source.error.is_none()
        {
            source.error = Some(format!("llama.cpp asks for the tensor `{name}`: {error}"));
        }
    });
}
