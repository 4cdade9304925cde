//! The names of metadata and tensors, in one place for reading and writing.

pub(crate) const ARCHITECTURE: &str = "general.architecture";
/// The model's name, for people. llama.cpp knows Phi-3 by it.
pub(crate) const NAME: &str = "general.name";
/// `model`, `adapter`, `mmproj` ...
pub(crate) const KIND: &str = "general.type";
pub(crate) const SPLIT_COUNT: &str = "split.count";
pub(crate) const SPLIT_INDEX: &str = "split.no";
pub(crate) const SPLIT_TENSORS: &str = "split.tensors.count";

pub(crate) const TEMPERATURE: &str = "general.sampling.temp";
pub(crate) const TOP_K: &str = "general.sampling.top_k";
pub(crate) const TOP_P: &str = "general.sampling.top_p";
pub(crate) const MIN_P: &str = "general.sampling.min_p";
pub(crate) const XTC: &str = "general.sampling.xtc_probability";
pub(crate) const MIROSTAT: &str = "general.sampling.mirostat";
pub(crate) const PENALTY: &str = "general.sampling.penalty_repeat";

pub(crate) const TOKENIZER: &str = "tokenizer.ggml.model";
pub(crate) const PRE_TOKENIZER: &str = "tokenizer.ggml.pre";
pub(crate) const TOKENS: &str = "tokenizer.ggml.tokens";
pub(crate) const TOKEN_TYPES: &str = "tokenizer.ggml.token_type";
pub(crate) const SCORES: &str = "tokenizer.ggml.scores";
/// The normalisation of Unigram.
pub(crate) const CHARSMAP: &str = "tokenizer.ggml.precompiled_charsmap";
pub(crate) const MERGES: &str = "tokenizer.ggml.merges";
pub(crate) const BOS: &str = "tokenizer.ggml.bos_token_id";
pub(crate) const EOS: &str = "tokenizer.ggml.eos_token_id";
pub(crate) const EOT: &str = "tokenizer.ggml.eot_token_id";
pub(crate) const EOM: &str = "tokenizer.ggml.eom_token_id";
pub(crate) const UNK: &str = "tokenizer.ggml.unknown_token_id";
pub(crate) const PAD: &str = "tokenizer.ggml.padding_token_id";
pub(crate) const FIM_PREFIX: &str = "tokenizer.ggml.fim_pre_token_id";
pub(crate) const FIM_SUFFIX: &str = "tokenizer.ggml.fim_suf_token_id";
pub(crate) const FIM_MIDDLE: &str = "tokenizer.ggml.fim_mid_token_id";
pub(crate) const FIM_PAD: &str = "tokenizer.ggml.fim_pad_token_id";
pub(crate) const FIM_REPOSITORY: &str = "tokenizer.ggml.fim_rep_token_id";
pub(crate) const FIM_SEPARATOR: &str = "tokenizer.ggml.fim_sep_token_id";
pub(crate) const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
pub(crate) const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
pub(crate) const ADD_SPACE: &str = "tokenizer.ggml.add_space_prefix";
pub(crate) const CHAT_TEMPLATE: &str = "tokenizer.chat_template";
/// A whole `tokenizer.json`, for tokenizers that the other keys cannot describe.
pub(crate) const HUGGING_FACE: &str = "tokenizer.huggingface.json";

/// Ternion's own: which version wrote the file.
pub(crate) const WRITER: &str = "ternion.version";
/// Ternion's own: all tokens that end an answer, of which the other keys have room for some.
pub(crate) const EOS_LIST: &str = "ternion.eos_token_ids";

/// The activation of the feed-forward network: `relu2` or `silu`.
pub(crate) const ACTIVATION: &str = "hidden_activation";

pub(crate) const EMBED: &str = "token_embd.weight";
pub(crate) const FINAL_NORM: &str = "output_norm.weight";
pub(crate) const HEAD: &str = "output.weight";
/// What the rotary frequencies are divided by.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The keys of an architecture, which begin with its name.
pub(crate) struct Keys {
    architecture: String,
}

impl Keys {
    pub(crate) fn new(architecture: &str) -> Self {
        Self { architecture: architecture.to_owned() }
    }

    pub(crate) fn architecture(&self) -> &str {
        &self.architecture
    }

    pub(crate) fn of(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }
}

/// Behind the name of a projection: the norm on its input.
pub(crate) const INPUT_NORM: &str = "_norm_in";

/// The names of a layer's tensors in GGUF, then below `model.layers.N` of transformers.
pub(crate) const PROJECTIONS: [(&str, &str); 7] = [
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];
