//! How a model writes its thoughts and its calls of tools.

use std::{borrow::Cow, fmt};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// How a model writes its thoughts and its calls of tools. It is found from the chat template's text, and the model's
/// configuration can say otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct AnswerFormat {
    /// The tags around a thought; `None` for models that think without tags, or not at all.
    pub reasoning: Option<ReasoningTags>,
    /// How calls of tools are written.
    pub tools: ToolFormat,
    /// Whether the tools are described in the system message, because the chat template does not print them.
    pub describes_tools: bool,
}

/// The tags around a thought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReasoningTags {
    /// Begins a thought, such as `<think>`.
    pub start: String,
    /// Ends it, such as `</think>`.
    pub end: String,
}

impl ReasoningTags {
    /// These tags.
    pub fn new(start: impl Into<String>, end: impl Into<String>) -> Self {
        Self { start: start.into(), end: end.into() }
    }
}

impl fmt::Display for ReasoningTags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.start, self.end)
    }
}

/// A form of calls of tools.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ToolFormat {
    /// Calls are not told from text.
    #[default]
    None,
    /// `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen 2.5, Qwen 3.
    Hermes,
    /// `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`: Qwen 3.5, Qwen3-Coder.
    QwenXml,
    /// `{"name": ..., "parameters": {...}}` at the beginning of an answer, with or without `<|python_tag|>`: Llama 3.
    Llama3,
    /// `[TOOL_CALLS][{"name": ..., "arguments": {...}}]` or `[TOOL_CALLS]NAME[ARGS]{...}`: Mistral.
    Mistral,
    /// `{"name": ..., "arguments": {...}}` at the beginning of an answer, each call on a line of its own. Tools are described
    /// in this form where the chat template has none.
    Json,
}

impl ToolFormat {
    /// The name in configurations.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Hermes => "hermes",
            Self::QwenXml => "qwen-xml",
            Self::Llama3 => "llama3",
            Self::Mistral => "mistral",
            Self::Json => "json",
        }
    }

    /// The tag that begins a call; `None` for a form without one.
    pub fn opening(self) -> Option<&'static str> {
        match self {
            Self::Hermes | Self::QwenXml => Some("<tool_call>"),
            Self::Llama3 => Some("<|python_tag|>"),
            Self::Mistral => Some("[TOOL_CALLS]"),
            Self::None | Self::Json => None,
        }
    }

    /// The tags that may be special tokens, which have no text otherwise.
    pub(crate) fn tags(self) -> &'static [&'static str] {
        match self {
            Self::Hermes | Self::QwenXml => &["<tool_call>", "</tool_call>"],
            Self::Llama3 => &["<|python_tag|>"],
            Self::Mistral => &["[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"],
            Self::None | Self::Json => &[],
        }
    }

    /// Whether an answer that begins with `{` may be a call.
    pub fn is_bare(self) -> bool {
        matches!(self, Self::Llama3 | Self::Json)
    }
}

impl fmt::Display for ToolFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Tags of thoughts in the templates of published models.
const REASONING: [(&str, &str); 7] = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("[THINK]", "[/THINK]"),
];

impl AnswerFormat {
    /// What a chat template's text says. `prints_tools`: whether it makes use of the tools that it is given.
    pub(crate) fn detect(template: &str, prints_tools: bool) -> Self {
        let has = |text: &str| template.contains(text);
        // Templates that only cut thoughts out of earlier answers name no more than the end.
        let reasoning = REASONING.into_iter().find(|(_, end)| has(end));
        let tools = if !prints_tools {
            ToolFormat::Json
        } else if has("<function=") && has("<parameter=") {
            ToolFormat::QwenXml
        } else if has("<tool_call>") {
            ToolFormat::Hermes
        } else if has("[TOOL_CALLS]") {
            ToolFormat::Mistral
        } else if has("<|python_tag|>") || (has("\"name\": ") && has("\"parameters\": ")) {
            ToolFormat::Llama3
        } else {
            ToolFormat::None
        };
        Self {
            reasoning: reasoning.map(|(start, end)| ReasoningTags::new(start, end)),
            tools,
            describes_tools: !prints_tools,
        }
    }

    /// The same format with what a configuration says.
    pub fn configured(mut self, tools: Option<ToolFormat>, reasoning: Option<&Reasoning>) -> Self {
        if let Some(tools) = tools {
            self.tools = tools;
            // Only this form is described.
            self.describes_tools &= tools == ToolFormat::Json;
        }
        match reasoning {
            Some(Reasoning::Tags(tags)) => self.reasoning = Some(tags.clone()),
            Some(Reasoning::Off) => self.reasoning = None,
            None => {}
        }
        self
    }
}

/// What a configuration says of a model's thoughts: their tags, or `false` for a model whose answers are all text.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reasoning {
    /// These tags.
    Tags(ReasoningTags),
    /// There are none.
    Off,
}

const EXPECTED: &str = "`false`, or the tags as in `{ start = \"<think>\", end = \"</think>\" }`";

impl Serialize for Reasoning {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Tags(tags) => tags.serialize(serializer),
            Self::Off => serializer.serialize_bool(false),
        }
    }
}

impl<'de> Deserialize<'de> for Reasoning {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Reasoning;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(EXPECTED)
            }

            fn visit_bool<E: de::Error>(self, on: bool) -> Result<Reasoning, E> {
                if on { Err(E::invalid_value(de::Unexpected::Bool(on), &self)) } else { Ok(Reasoning::Off) }
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Reasoning, A::Error> {
                let tags = ReasoningTags::deserialize(de::value::MapAccessDeserializer::new(map))?;
                if tags.start.is_empty() || tags.end.is_empty() {
                    return Err(de::Error::custom(format_args!("a tag is empty; {EXPECTED} expected")));
                }
                Ok(Reasoning::Tags(tags))
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for Reasoning {
    fn schema_name() -> Cow<'static, str> {
        "Reasoning".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let tags = ReasoningTags::json_schema(generator);
        json_schema!({ "anyOf": [{ "const": false }, tags] })
    }
}
