//! Thoughts and calls of tools in the answers of a toy model.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use common::{Toy, fixture};
use ternion_core::{
    ChatOptions, Completion, ErrorKind, FinishReason, GenerateRequest, LlmBackend, Message, ModelInfo,
    Sampling, Tool,
    answer::{Reasoning, ToolFormat},
    text::{AddedToken, Tokenizer, TokenizerParts},
};
use ternion_engine::{Engine, EngineOptions};

const TEMPLATE: &str = "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}\
    {% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
    {% if add_generation_prompt %}A:{% if enable_thinking is defined %}{% if enable_thinking %}<think>\n\
    {% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}{% endif %}";
const END: &str = "<|end|>";

/// A tokenizer whose tags are special tokens, which have no text.
fn tokenizer() -> Tokenizer {
    let mut parts = TokenizerParts::from_folder(fixture("nano-packed")).unwrap();
    parts.chat_template = Some(TEMPLATE.to_owned());
    for tag in ["<tool_call>", "</tool_call>", "<think>", "</think>", END] {
        parts.added_tokens.push(AddedToken::special(tag));
    }
    Tokenizer::from_parts(parts).unwrap()
}

/// A model that says this, and then ends.
fn engine(prompt_tokens: usize, says: &str, change: impl FnOnce(&mut EngineOptions)) -> Engine {
    let tokenizer = tokenizer();
    let script = tokenizer.encode(&format!("{says}{END}"), false).unwrap();
    let mut toy = Toy::scripted(tokenizer.vocab_size(), prompt_tokens, &script);
    toy.context = 1024;
    let mut options = EngineOptions::new(ModelInfo::new("toy", "test"));
    options.end_tokens = Some(vec![END.parse().unwrap()]);
    change(&mut options);
    Engine::start(Box::new(toy), tokenizer, options).unwrap()
}

fn request(options: ChatOptions) -> GenerateRequest {
    GenerateRequest::chat([Message::user("Hi")]).with_chat_options(options).with_sampling(Sampling::greedy())
}

fn with_tool() -> ChatOptions {
    ChatOptions::default().with_tools([Tool::function("clock", "The time.", serde_json::json!({}))])
}

async fn answer(says: &str, request: GenerateRequest, change: impl FnOnce(&mut EngineOptions)) -> Completion {
    let prompt = request.prompt_tokens(&tokenizer().into()).unwrap().len();
    engine(prompt, says, change).generate(request).await.unwrap().collect().await.unwrap()
}

const CALL: &str = "<tool_call>{\"name\": \"clock\", \"arguments\": {}}</tool_call>";

#[tokio::test]
async fn tags_that_are_special_tokens_are_seen_and_do_not_show() {
    let says = format!("<think>When?</think>So: {CALL}");
    let found = answer(&says, request(with_tool()), |_| {}).await;
    assert_eq!((found.reasoning.as_str(), found.text.as_str()), ("When?", "So:"));
    assert_eq!((found.tool_calls[0].name.as_str(), found.tool_calls[0].arguments.as_str()), ("clock", "{}"));
    assert_eq!(found.finish_reason, FinishReason::ToolCalls);
    let message = Message::from(found);
    assert_eq!((message.reasoning.as_deref(), message.tool_calls.len()), (Some("When?"), 1));

    // Without tools nobody looks for the tags of calls, and they have no text.
    let found = answer(&says, request(ChatOptions::default()), |_| {}).await;
    assert_eq!(found.text, "So: {\"name\": \"clock\", \"arguments\": {}}");
    assert_eq!(found.finish_reason, FinishReason::EndOfSequence);
    // A text prompt has no form of answers.
    let found = answer(&says, GenerateRequest::new("Hi").with_sampling(Sampling::greedy()), |_| {}).await;
    assert_eq!((found.reasoning.as_str(), found.text.starts_with("When?So")), ("", true));
}

#[tokio::test]
async fn the_prompt_says_whether_a_thought_is_open() {
    let thinking = |on: bool| request(ChatOptions::default().with_template_arg("enable_thinking", on));
    let found = answer("Hm.</think>Yes", thinking(true), |_| {}).await;
    assert_eq!((found.reasoning.as_str(), found.text.as_str()), ("Hm.", "Yes"));
    let found = answer("Yes", thinking(false), |_| {}).await;
    assert_eq!((found.reasoning.as_str(), found.text.as_str()), ("", "Yes"));
}

#[tokio::test]
async fn the_configuration_decides_before_the_template() {
    let says = format!("<think>Hm.</think>{CALL}");
    let found = answer(&says, request(with_tool()), |options| {
        options.reasoning = Some(Reasoning::Off);
        options.tool_format = Some(ToolFormat::None);
    })
    .await;
    assert_eq!((found.reasoning.as_str(), found.tool_calls.len()), ("", 0));

    let engine = engine(1, "", |options| options.reasoning = Some(Reasoning::Off));
    let capabilities = &engine.info().capabilities;
    assert!(capabilities.tool_calls && !capabilities.reasoning);
    let budget = request(ChatOptions::default()).with_reasoning_budget(3);
    assert_eq!(engine.validate(&budget).await.unwrap_err().kind(), ErrorKind::Unsupported);
}

#[tokio::test]
async fn an_answer_that_is_cut_within_a_call_says_so() {
    let found = answer(CALL, request(with_tool()).with_max_tokens(12), |_| {}).await;
    assert_eq!(found.finish_reason, FinishReason::MaxTokens);
}
