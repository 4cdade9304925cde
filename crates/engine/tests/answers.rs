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

/// Calls that the engine enforces, whatever the logits are.
#[cfg(feature = "constraints")]
mod enforced {
    use serde_json::{Value, json};
    use ternion_core::{ToolCall, ToolChoice};

    use super::*;

    const TAGS: [&str; 8] = [
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        "<|python_tag|>",
        "[TOOL_CALLS]",
        "[ARGS]",
        END,
    ];

    /// A form of calls: what its template has in it, and the tags that are tokens.
    const FORMS: [(ToolFormat, &str, &[&str]); 8] = [
        (ToolFormat::Hermes, "{% if tools %}<tool_call>{{ tools }}{% endif %}", &TAGS),
        (ToolFormat::Hermes, "{% if tools %}<tool_call>{{ tools }}{% endif %}", &[END]),
        (ToolFormat::QwenXml, "{% if tools %}<tool_call><function=<parameter={{ tools }}{% endif %}", &TAGS),
        (ToolFormat::Llama3, "{% if tools %}<|python_tag|>{{ tools }}{% endif %}", &TAGS),
        (ToolFormat::Llama3, "{% if tools %}<|python_tag|>{{ tools }}{% endif %}", &[END]),
        (ToolFormat::Mistral, "{% if tools %}[TOOL_CALLS]{{ tools }}{% endif %}", &TAGS),
        (ToolFormat::Mistral, "{% if tools %}[TOOL_CALLS]{{ tools }}{% endif %}", &["[TOOL_CALLS]", END]),
        (ToolFormat::Json, "", &[END]),
    ];

    fn tokenizer(template: &str, tags: &[&str]) -> Tokenizer {
        let mut parts = TokenizerParts::from_folder(fixture("nano-packed")).unwrap();
        parts.chat_template = Some(TEMPLATE.split_once("{% endif %}").unwrap().1.to_owned());
        parts.chat_template.as_mut().unwrap().insert_str(0, template);
        parts.added_tokens.extend(tags.iter().map(|tag| AddedToken::special(*tag)));
        Tokenizer::from_parts(parts).unwrap()
    }

    /// A model with random logits that says this first.
    fn engine(tokenizer: Tokenizer, prompt_tokens: usize, says: &str) -> Engine {
        let script = tokenizer.encode(says, false).unwrap();
        let mut toy = Toy::scripted(tokenizer.vocab_size(), prompt_tokens, &script);
        toy.context = 4096;
        let mut options = EngineOptions::new(ModelInfo::new("toy", "test"));
        options.end_tokens = Some(vec![END.parse().unwrap()]);
        Engine::start(Box::new(toy), tokenizer, options).unwrap()
    }

    fn tools() -> Vec<Tool> {
        let weather = json!({
            "type": "object",
            "properties": {
                "city": { "type": "string", "maxLength": 12 },
                "unit": { "enum": ["°C", "°F"] },
                "days": { "type": "integer", "minimum": 1, "maximum": 7 },
                "hours": { "type": "array", "items": { "$ref": "#/$defs/hour" }, "maxItems": 2 },
            },
            "required": ["city", "days"],
            "additionalProperties": false,
            "$defs": { "hour": { "type": "integer", "minimum": 0, "maximum": 23 } },
        });
        let nothing = json!({ "type": "object", "properties": {}, "additionalProperties": false });
        vec![
            Tool::function("weather", "The weather.", weather),
            Tool::function("clock", "The time.", nothing),
        ]
    }

    fn check(call: &ToolCall) {
        let arguments: Value =
            serde_json::from_str(&call.arguments).unwrap_or_else(|e| panic!("{e}: {call:?}"));
        let arguments = arguments.as_object().unwrap();
        if call.name == "clock" {
            return assert!(arguments.is_empty(), "{call:?}");
        }
        assert_eq!(call.name, "weather");
        assert!(arguments["city"].as_str().unwrap().chars().count() <= 12, "{call:?}");
        assert!((1..=7).contains(&arguments["days"].as_u64().unwrap()), "{call:?}");
        for (key, value) in arguments {
            match key.as_str() {
                "city" | "days" => {}
                "unit" => assert!(["°C", "°F"].contains(&value.as_str().unwrap()), "{call:?}"),
                "hours" => {
                    let hours = value.as_array().unwrap();
                    assert!(
                        hours.len() <= 2 && hours.iter().all(|hour| hour.as_u64().unwrap() < 24),
                        "{call:?}"
                    );
                }
                _ => panic!("{call:?}"),
            }
        }
    }

    async fn drawn(form: usize, says: &str, options: ChatOptions, seed: u64) -> Completion {
        let (format, template, tags) = FORMS[form];
        let tokenizer = tokenizer(template, tags);
        assert_eq!(tokenizer.answer_format().unwrap().tools, format);
        let sampling = Sampling::default().with_temperature(1.0).with_seed(seed);
        let request = request(options).with_sampling(sampling).with_max_tokens(1500).with_reasoning_budget(5);
        let prompt = request.prompt_tokens(&self::tokenizer(template, tags).into()).unwrap().len();
        engine(tokenizer, prompt, says).generate(request).await.unwrap().collect().await.unwrap()
    }

    #[tokio::test]
    async fn every_required_call_of_a_random_model_is_valid() {
        let options = || ChatOptions::default().with_tools(tools()).without_parallel_tool_calls();
        for form in 0..FORMS.len() {
            for seed in 0..3 {
                for choice in [ToolChoice::Required, ToolChoice::Function("weather".to_owned())] {
                    // An empty thought, one that is open, and one that the model may begin.
                    for thinking in [Some(false), Some(true), None] {
                        let mut options = options().with_tool_choice(choice.clone());
                        if let Some(on) = thinking {
                            options = options.with_template_arg("enable_thinking", on);
                        }
                        let found = drawn(form, "", options, seed).await;
                        assert_eq!(found.tool_calls.len(), 1, "{form} {thinking:?} {found:?}");
                        assert_eq!(found.finish_reason, FinishReason::ToolCalls, "{form} {found:?}");
                        assert_eq!(found.text, "", "{form} {found:?}");
                        found.tool_calls.iter().for_each(check);
                        assert!(choice == ToolChoice::Required || found.tool_calls[0].name == "weather");
                    }
                }
            }
        }
    }

    #[tokio::test]
    async fn a_call_that_the_model_begins_is_valid() {
        let options = ChatOptions::default().with_tools(tools()).with_template_arg("enable_thinking", false);
        for (form, says) in [
            (0, "Well: <tool_call>"),
            (1, "Well: <tool_call>"),
            (2, "Well: <tool_call>"),
            (3, "{\"na"),
            (5, "Well: [TOOL_CALLS]"),
            (6, "Well: [TOOL_CALLS]"),
            (7, "{\"na"),
        ] {
            for seed in 0..3 {
                let found = drawn(form, says, options.clone(), seed).await;
                assert!(!found.tool_calls.is_empty(), "{form} {found:?}");
                check(&found.tool_calls[0]);
                let one = drawn(form, says, options.clone().without_parallel_tool_calls(), seed).await;
                assert_eq!((one.tool_calls.len(), one.finish_reason), (1, FinishReason::ToolCalls), "{form}");
                check(&one.tool_calls[0]);
            }
        }
        // Text stays text.
        let found = drawn(7, "So", options, 1).await;
        assert!(found.tool_calls.is_empty() && found.text.starts_with("So"), "{found:?}");
    }

    #[tokio::test]
    async fn parameters_that_cannot_be_enforced_are_refused_by_the_name_of_the_tool() {
        for (form, schema, words) in [
            (0, json!({ "properties": { "a": { "type": "string", "pattern": "(?=x)" } } }), "`f`"),
            (0, json!({ "x-guidance": {} }), "`x-guidance`"),
            (2, json!({ "properties": { "a": { "type": "string", "pattern": "x" } } }), "`pattern`"),
            (2, json!({ "anyOf": [] }), "`anyOf`"),
        ] {
            let (_, template, tags) = FORMS[form];
            let engine = engine(tokenizer(template, tags), 1, "");
            let options = ChatOptions::default().with_tools([Tool::function("f", "", schema)]);
            let error = engine.validate(&request(options)).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidRequest, "{error}");
            assert!(error.message().starts_with("chat.tools") && error.message().contains(words), "{error}");
        }
    }

    #[tokio::test]
    async fn a_thought_ends_when_its_budget_is_used_up() {
        let thinking = request(ChatOptions::default().with_template_arg("enable_thinking", true));
        for budget in [0, 1, 7] {
            let (_, template, tags) = FORMS[0];
            let tokenizer = tokenizer(template, tags);
            let end = tokenizer.token_id("</think>").unwrap();
            let request = thinking.clone().with_max_tokens(40).with_reasoning_budget(budget);
            let found = engine(tokenizer, 1, "").generate(request).await.unwrap().collect().await.unwrap();
            assert_eq!((found.tokens[budget], found.usage.forced_tokens), (end, 1), "{found:?}");
        }
        let found = drawn(0, "<think>a b c d e f g h i j k l", ChatOptions::default(), 1).await;
        assert!(!found.reasoning.contains('k') && found.usage.forced_tokens == 1, "{found:?}");
    }
}
