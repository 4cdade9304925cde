//! Tools: what a model may call, what it calls, and what else a request says to the chat template.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::{Map, Value};

/// A tool that the model may call: the tool object of OpenAI's chat API. The JSON is kept as it is, because chat
/// templates print it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct Tool(Map<String, Value>);

impl Tool {
    /// A function with its description and the JSON schema of its parameters.
    pub fn function(name: impl Into<String>, description: impl Into<String>, parameters: Value) -> Self {
        let name = Value::from(name.into());
        let function = Map::from_iter([
            ("name".to_owned(), name),
            ("description".to_owned(), description.into().into()),
            ("parameters".to_owned(), parameters),
        ]);
        Self(Map::from_iter([
            ("type".to_owned(), "function".into()),
            ("function".to_owned(), function.into()),
        ]))
    }

    /// The name of the function.
    pub fn name(&self) -> &str {
        self.function_field("name").and_then(Value::as_str).unwrap_or_default()
    }

    /// What the function does.
    pub fn description(&self) -> Option<&str> {
        self.function_field("description").and_then(Value::as_str)
    }

    /// The JSON schema of the parameters; `None` for a function without any.
    pub fn parameters(&self) -> Option<&Value> {
        self.function_field("parameters").filter(|parameters| !parameters.is_null())
    }

    /// The schema of one parameter, behind references.
    pub fn parameter(&self, name: &str) -> Option<&Value> {
        let root = self.parameters()?;
        let mut schema = root.get("properties")?.get(name)?;
        // References that lead in a circle end as well.
        for _ in 0..8 {
            let Some(reference) = schema.get("$ref").and_then(Value::as_str) else { break };
            schema = root.pointer(reference.strip_prefix('#')?)?;
        }
        Some(schema)
    }

    /// Whether a parameter takes nothing but text. That of a parameter which the schema does not have is text as well.
    pub fn takes_text(&self, name: &str) -> bool {
        let Some(schema) = self.parameter(name) else { return true };
        match (schema.get("type"), schema.get("enum"), schema.get("const")) {
            (Some(kind), ..) => kind == "string" || *kind == Value::from(vec!["string"]),
            (None, Some(Value::Array(values)), _) => values.iter().all(Value::is_string),
            (None, _, Some(value)) => value.is_string(),
            _ => false,
        }
    }

    /// The JSON object.
    pub fn as_json(&self) -> &Map<String, Value> {
        &self.0
    }

    fn function_field(&self, key: &str) -> Option<&Value> {
        self.0.get("function")?.get(key)
    }
}

impl TryFrom<Value> for Tool {
    type Error = String;

    fn try_from(json: Value) -> Result<Self, String> {
        let Value::Object(tool) = json else { return Err("a tool is no object".to_owned()) };
        match tool.get("type").and_then(Value::as_str) {
            Some("function") => {}
            Some(kind) => {
                return Err(format!("a tool of the type `{kind}` is not supported; `function` expected"));
            }
            None => return Err("a tool has no `type`; `function` expected".to_owned()),
        }
        let tool = Self(tool);
        if tool.name().is_empty() {
            return Err("a tool has no `function.name`".to_owned());
        }
        if tool.parameters().is_some_and(|parameters| !parameters.is_object()) {
            return Err(format!("the tool `{}` has `parameters` that are no JSON schema", tool.name()));
        }
        Ok(tool)
    }
}

impl From<Tool> for Value {
    fn from(tool: Tool) -> Self {
        Self::Object(tool.0)
    }
}

/// A call of a tool in an assistant message. The serde form is that of OpenAI's chat API, with the arguments as a
/// string of JSON; arguments that are a JSON object are read as well.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ToolCall {
    /// Identifies the call in the conversation; the result refers to it.
    pub id: Option<String>,
    /// The function.
    pub name: String,
    /// Its arguments as JSON text. What a model writes need not be valid JSON.
    pub arguments: String,
}

impl ToolCall {
    /// A call of the function `name` with these arguments as JSON text.
    pub fn new(id: impl Into<String>, name: impl Into<String>, arguments: impl Into<String>) -> Self {
        Self { id: Some(id.into()), name: name.into(), arguments: arguments.into() }
    }

    /// The arguments as chat templates take them: parsed where they are JSON, else the text.
    pub(crate) fn parsed_arguments(&self) -> Value {
        serde_json::from_str(&self.arguments).unwrap_or_else(|_| self.arguments.as_str().into())
    }
}

#[derive(Serialize, Deserialize)]
struct CallForm {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "type", default = "function")]
    kind: String,
    function: FunctionForm,
}

#[derive(Serialize, Deserialize)]
struct FunctionForm {
    name: String,
    #[serde(default)]
    arguments: Value,
}

fn function() -> String {
    "function".to_owned()
}

impl Serialize for ToolCall {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let function = FunctionForm { name: self.name.clone(), arguments: self.arguments.as_str().into() };
        CallForm { id: self.id.clone(), kind: self::function(), function }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ToolCall {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let form = CallForm::deserialize(deserializer)?;
        if form.kind != "function" {
            let kind = form.kind;
            return Err(de::Error::custom(format_args!(
                "a tool call of the type `{kind}` is not supported; `function` expected"
            )));
        }
        let arguments = match form.function.arguments {
            Value::Null => "{}".to_owned(),
            Value::String(text) => text,
            object @ Value::Object(_) => object.to_string(),
            _ => return Err(de::Error::custom("`arguments` is neither a string nor an object")),
        };
        Ok(Self { id: form.id, name: form.function.name, arguments })
    }
}

/// Whether the model may, must or must not call a tool. The serde form is that of OpenAI's chat API.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ToolChoice {
    /// `"auto"`: the model decides.
    #[default]
    Auto,
    /// `"none"`: no call. The chat template gets no tools.
    None,
    /// `"required"`: at least one call.
    Required,
    /// `{"type": "function", "function": {"name": "..."}}`: a call of this function.
    Function(String),
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum ChoiceForm {
    Word(String),
    Named {
        #[serde(rename = "type")]
        kind: String,
        function: NameForm,
    },
}

#[derive(Serialize, Deserialize)]
struct NameForm {
    name: String,
}

impl Serialize for ToolChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let word = |word: &str| ChoiceForm::Word(word.to_owned());
        let form = match self {
            Self::Auto => word("auto"),
            Self::None => word("none"),
            Self::Required => word("required"),
            Self::Function(name) => {
                ChoiceForm::Named { kind: function(), function: NameForm { name: name.clone() } }
            }
        };
        form.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ToolChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expected = "`auto`, `none`, `required` or `{\"type\": \"function\", \"function\": {\"name\": ...}}` expected";
        let form = ChoiceForm::deserialize(deserializer).map_err(|_| de::Error::custom(expected))?;
        match form {
            ChoiceForm::Word(word) => match word.as_str() {
                "auto" => Ok(Self::Auto),
                "none" => Ok(Self::None),
                "required" => Ok(Self::Required),
                _ => Err(de::Error::custom(format_args!("`{word}`; {expected}"))),
            },
            ChoiceForm::Named { kind, function } if kind == "function" => Ok(Self::Function(function.name)),
            ChoiceForm::Named { kind, .. } => {
                Err(de::Error::custom(format_args!("type `{kind}`; {expected}")))
            }
        }
    }
}

/// What the chat template gets besides the messages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct ChatOptions {
    /// The tools that the model may call.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<Tool>,
    /// Whether it may, must or must not call one.
    #[serde(skip_serializing_if = "is_default")]
    pub tool_choice: ToolChoice,
    /// Whether one answer may call several tools.
    #[serde(skip_serializing_if = "is_true")]
    pub parallel_tool_calls: bool,
    /// Further variables of the template, such as `enable_thinking`. They cannot replace those that the conversation
    /// sets, such as `messages`.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub template_args: Map<String, Value>,
    /// Whether the header of the assistant's turn stands at the end of the prompt, so that the model begins an answer.
    pub add_generation_prompt: bool,
    /// Whether the model continues the last message instead of answering it. The prompt then ends within that message,
    /// whatever `add_generation_prompt` says.
    #[serde(skip_serializing_if = "is_default")]
    pub continue_final_message: bool,
}

impl Default for ChatOptions {
    fn default() -> Self {
        Self {
            tools: Vec::new(),
            tool_choice: ToolChoice::Auto,
            parallel_tool_calls: true,
            template_args: Map::new(),
            add_generation_prompt: true,
            continue_final_message: false,
        }
    }
}

impl ChatOptions {
    /// The same options with these tools.
    pub fn with_tools(mut self, tools: impl IntoIterator<Item = Tool>) -> Self {
        self.tools = tools.into_iter().collect();
        self
    }

    /// The same options with this choice of tools.
    pub fn with_tool_choice(mut self, choice: ToolChoice) -> Self {
        self.tool_choice = choice;
        self
    }

    /// The same options for answers of at most one call.
    pub fn without_parallel_tool_calls(mut self) -> Self {
        self.parallel_tool_calls = false;
        self
    }

    /// The same options with one more variable for the template.
    pub fn with_template_arg(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.template_args.insert(name.into(), value.into());
        self
    }

    /// The same options with or without the header of the assistant's turn.
    pub fn with_generation_prompt(mut self, add: bool) -> Self {
        self.add_generation_prompt = add;
        self
    }

    /// The same options for a model that continues the last message.
    pub fn continuing_final_message(mut self) -> Self {
        self.continue_final_message = true;
        self
    }

    /// The tools that the model may call in its answer; none where the choice is `none`.
    pub fn offered_tools(&self) -> &[Tool] {
        if self.tool_choice == ToolChoice::None { &[] } else { &self.tools }
    }
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_true(value: &bool) -> bool {
    *value
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}
