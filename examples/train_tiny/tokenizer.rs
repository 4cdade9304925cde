//! A tokenizer of 2B4T's kind, Llama 3's: byte-level BPE behind Llama 3's split, learned from the training text.

use serde_json::{Map, Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    DecoderWrapper, Model, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    SplitDelimiterBehavior, TokenizerImpl,
};

use super::text::{self, Random};

/// How Llama 3 splits a text before it merges.
const SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// 2B4T's chat template.
const CHAT_TEMPLATE: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = \
    message['role'] | capitalize + ': '+ message['content'] | trim + '<|eot_id|>' %}{{ content }}{% endfor %}\
    {% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";

/// The special tokens by the names that Llama 3 gave them, the last of the vocabulary.
const SPECIALS: [&str; 16] = [
    "<|begin_of_text|>",
    text::END_OF_TEXT,
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|reserved_special_token_2|>",
    "<|reserved_special_token_3|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    text::END_OF_TURN,
    "<|reserved_special_token_5|>",
    "<|reserved_special_token_6|>",
    "<|reserved_special_token_7|>",
    "<|reserved_special_token_8|>",
    "<|reserved_special_token_9|>",
    "<|reserved_special_token_10|>",
];

/// The two files of a tokenizer.
pub(crate) struct Files {
    pub(crate) tokenizer: Value,
    pub(crate) config: Value,
}

/// Learns a tokenizer of `vocab_size` tokens, or fewer where there is no more to merge, from so many documents of `seed`.
pub(crate) fn learn(
    vocab_size: usize,
    seed: u64,
    documents: usize,
) -> Result<Files, Box<dyn std::error::Error>> {
    let mut random = Random::new(seed, u64::MAX);
    let texts: Vec<String> = (0..documents)
        .map(|_| {
            let long = random.below(3) == 0;
            let document = text::document(&mut random, long, text::MOST_SHOTS);
            let text: String = document.0.iter().map(|(text, _)| text.as_str()).collect();
            let text = text.replace(text::END_OF_TEXT, "\n").replace(text::END_OF_TURN, "\n");
            // Without digits, of which each stays a token of its own.
            text.replace(|c: char| c.is_ascii_digit(), "\n")
        })
        .collect();
    let split = Split::new(SplitPattern::Regex(SPLIT.into()), SplitDelimiterBehavior::Isolated, false)
        .map_err(|e| e.to_string())?;
    let steps: Vec<PreTokenizerWrapper> = vec![split.into(), ByteLevel::new(false, true, false).into()];
    let mut tokenizer: TokenizerImpl<
        BPE,
        NormalizerWrapper,
        PreTokenizerWrapper,
        PostProcessorWrapper,
        DecoderWrapper,
    > = TokenizerImpl::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(PreTokenizerWrapper::from(Sequence::new(steps))));
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(vocab_size - SPECIALS.len())
        .min_frequency(1)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    tokenizer.train(&mut trainer, texts.iter()).map_err(|e| e.to_string())?;
    let model = serde_json::to_value(tokenizer.get_model())?;
    Ok(files(model, tokenizer.get_model().get_vocab_size()))
}

fn files(mut model: Value, learned: usize) -> Files {
    let added = |content: &str| {
        json!({
            "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true
        })
    };
    let specials: Vec<Value> = SPECIALS
        .iter()
        .enumerate()
        .map(|(i, name)| {
            let mut token = json!({"id": learned + i});
            token
                .as_object_mut()
                .expect("invariant: an object")
                .extend(added(name).as_object().expect("invariant: an object").clone());
            token
        })
        .collect();
    let decoder: Map<String, Value> =
        SPECIALS.iter().enumerate().map(|(i, name)| ((learned + i).to_string(), added(name))).collect();
    model["ignore_merges"] = true.into();
    let bos = SPECIALS[0];
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": specials,
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}
        ]},
        "post_processor": {"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
            {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": bos, "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}}
                ],
                "pair": [
                    {"SpecialToken": {"id": bos, "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": bos, "type_id": 1}},
                    {"Sequence": {"id": "B", "type_id": 1}}
                ],
                "special_tokens": {bos: {"id": bos, "ids": [learned], "tokens": [bos]}}
            }
        ]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": model
    });
    let config = json!({
        "added_tokens_decoder": decoder,
        "bos_token": bos,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": false,
        "eos_token": text::END_OF_TURN,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": super::model::CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast"
    });
    Files { tokenizer, config }
}
