//! Grammars that make an answer call tools, or make its calls valid.

use std::fmt::Write;

use serde_json::{Map, Value};
use ternion_core::{
    ChatOptions, Constraint, ConstraintStart, Error, Result, Tool, ToolChoice,
    answer::{AnswerFormat, ToolFormat},
    text::Tokenizer,
};

use super::Grammars;

/// What enforces the calls of an answer: the grammar, and where it holds. `None` if there is nothing to enforce.
///
/// A call that is required is enforced from the beginning of the answer on. Where the model decides, its calls are enforced once
/// a tag has opened one. In a form without tags, and beside a constraint of the request, the grammar is that of an answer which is
/// either calls or something else: text, or what the constraint asks for.
///
/// # Errors
/// [`InvalidRequest`](ternion_core::ErrorKind::InvalidRequest) for a tool whose parameters the form cannot enforce, and for a
/// constraint that cannot stand beside calls.
pub(super) fn constraint(
    chat: &ChatOptions,
    format: &AnswerFormat,
    other: Option<&Constraint>,
    start_of_answer: ConstraintStart,
    tokenizer: &Tokenizer,
) -> Result<Option<(String, ConstraintStart)>> {
    let tools = chat.offered_tools();
    if tools.is_empty() || format.tools == ToolFormat::None {
        return Ok(None);
    }
    let (required, tools): (bool, Vec<&Tool>) = match &chat.tool_choice {
        ToolChoice::Required => (true, tools.iter().collect()),
        ToolChoice::Function(name) => (true, tools.iter().filter(|tool| tool.name() == name).collect()),
        _ => (false, tools.iter().collect()),
    };
    let grammar = CallGrammar { format: format.tools, parallel: chat.parallel_tool_calls, tokenizer };
    let tag = format.tools.opening().filter(|_| !format.tools.is_bare());
    let (start, position) = match (required, tag, other) {
        (true, ..) => (grammar.calls(), start_of_answer),
        (false, Some(tag), None) if chat.parallel_tool_calls => {
            ("one".to_owned(), ConstraintStart::EachTime(tag.to_owned()))
        }
        (false, Some(tag), None) => ("one".to_owned(), ConstraintStart::Once(tag.to_owned())),
        (false, _, other) => {
            let other = other.map_or(Ok("TEXT?".to_owned()), alternative)?;
            (format!("{} | {other}\nTEXT: {TEXT}", grammar.calls()), start_of_answer)
        }
    };
    let mut lark = format!("start: {start}\n");
    grammar.rules(&tools, &mut lark)?;
    Ok(Some((lark, position)))
}

/// Text that cannot be taken for a call.
const TEXT: &str = r"/\s*[^\s{](.|\n)*/";

/// What a constraint asks for, as a part of a grammar.
fn alternative(constraint: &Constraint) -> Result<String> {
    match constraint {
        Constraint::JsonSchema(schema) => Ok(format!("%json {}", Grammars::prepared(schema)?)),
        Constraint::JsonObject => {
            let object = serde_json::json!({ "type": "object" });
            Ok(format!("%json {}", Grammars::prepared(&object)?))
        }
        Constraint::Choice(texts) => {
            let texts: Vec<String> = texts.iter().map(|text| quoted(text)).collect();
            Ok(texts.join(" | "))
        }
        _ => Err(Error::invalid_request(
            "constraint: a regular expression or a grammar cannot be combined with tools that the model may call",
        )),
    }
}

struct CallGrammar<'a> {
    format: ToolFormat,
    parallel: bool,
    tokenizer: &'a Tokenizer,
}

impl CallGrammar<'_> {
    /// The rule of all calls of an answer, from the first opening tag on.
    fn calls(&self) -> String {
        let open = self.format.opening().filter(|_| !self.format.is_bare()).map(|tag| self.tag(tag));
        let (first, separator) = match (self.format, open) {
            (ToolFormat::Mistral, Some(open)) if self.has_list() => return format!("{open} one"),
            (ToolFormat::Mistral, Some(open)) => (format!("{open} one"), String::new()),
            (_, Some(open)) => (format!("{open} one"), "\"\\n\" ".to_owned()),
            (ToolFormat::Llama3, None) => ("one".to_owned(), "\"; \" ".to_owned()),
            (_, None) => ("one".to_owned(), "\"\\n\" ".to_owned()),
        };
        // Llama 3 may announce its calls.
        let announced = match self.tokenizer.token_id("<|python_tag|>") {
            Some(id) if self.format == ToolFormat::Llama3 => format!("<[{id}]>? "),
            _ => String::new(),
        };
        if self.parallel {
            format!("{announced}{first} ({separator}{first})*")
        } else {
            format!("{announced}{first}")
        }
    }

    /// Whether calls of Mistral's models stand in one list: those without a token for arguments.
    fn has_list(&self) -> bool {
        self.tokenizer.token_id("[ARGS]").is_none()
    }

    /// A tag as a token where it is one, else as text.
    fn tag(&self, tag: &str) -> String {
        match self.tokenizer.token_id(tag) {
            Some(id) if self.tokenizer.is_added(id) => format!("<[{id}]>"),
            _ => quoted(tag),
        }
    }

    /// The rule `one`, a call behind its opening tag, and those that it consists of.
    fn rules(&self, tools: &[&Tool], lark: &mut String) -> Result<()> {
        let mut names = Vec::new();
        for (i, tool) in tools.iter().enumerate() {
            names.push(format!("call_{i}"));
            let call = match self.format {
                ToolFormat::QwenXml => self.xml(i, tool, lark)?,
                ToolFormat::Mistral if !self.has_list() => {
                    format!("{} {} arguments_{i}", quoted(tool.name()), self.tag("[ARGS]"))
                }
                _ => self.object(i, tool),
            };
            line(lark, &format!("call_{i}: {call}"));
            if self.format != ToolFormat::QwenXml {
                line(lark, &format!("arguments_{i}: %json {}", json_schema(&parameters(tool))));
            }
        }
        let any = names.join(" | ");
        let one = match self.format {
            ToolFormat::Hermes => format!("\"\\n\"? any \"\\n\"? {}", self.tag("</tool_call>")),
            ToolFormat::QwenXml => format!("any {}", self.tag("</tool_call>")),
            ToolFormat::Mistral if self.has_list() && self.parallel => {
                "\"[\" any (\", \" any)* \"]\"".to_owned()
            }
            ToolFormat::Mistral if self.has_list() => "\"[\" any \"]\"".to_owned(),
            _ => "any".to_owned(),
        };
        line(lark, &format!("one: {one}"));
        line(lark, &format!("any: {any}"));
        Ok(())
    }

    fn object(&self, i: usize, tool: &Tool) -> String {
        let key = if self.format == ToolFormat::Llama3 { "parameters" } else { "arguments" };
        let before = format!("{{\"name\": {}, \"{key}\": ", Value::from(tool.name()));
        format!("{} arguments_{i} \"}}\"", quoted(&before))
    }

    /// A call in XML: the parameters in the order of the schema.
    fn xml(&self, i: usize, tool: &Tool, lark: &mut String) -> Result<String> {
        let schema = parameters(tool);
        let known = [
            "type",
            "properties",
            "required",
            "additionalProperties",
            "$defs",
            "definitions",
            "title",
            "description",
            "$schema",
        ];
        let keywords = schema.as_object().into_iter().flat_map(Map::keys);
        if let Some(keyword) = keywords.into_iter().find(|keyword| !known.contains(&keyword.as_str())) {
            return Err(self.refuse(tool, keyword, "the parameters"));
        }
        let required = |key: &str| {
            schema["required"].as_array().is_some_and(|keys| keys.iter().any(|required| required == key))
        };
        let mut call = quoted(&format!("\n<function={}>\n", tool.name()));
        for (n, (key, property)) in schema["properties"].as_object().into_iter().flatten().enumerate() {
            if key.is_empty() || key.len() > 256 || key.contains(['<', '>']) || key.contains(char::is_control)
            {
                return Err(self.refuse(tool, "name", &format!("the parameter `{key}`")));
            }
            let optional = if required(key) { "" } else { "?" };
            let _ = write!(call, " parameter_{i}_{n}{optional}");
            line(
                lark,
                &format!("parameter_{i}_{n}: {} value_{i}_{n}", quoted(&format!("<parameter={key}>\n"))),
            );
            if tool.takes_text(key) {
                self.text(i, n, tool, key, lark)?;
            } else {
                let value = json_schema(&with_definitions(property, &schema));
                line(lark, &format!("value_{i}_{n}: %json {value} {}", quoted(&format!("\n{VALUE_END}\n"))));
            }
        }
        call.push(' ');
        call.push_str(&quoted("</function>\n"));
        Ok(call)
    }

    /// The value of a parameter that is text, which ends with its closing tag.
    fn text(&self, i: usize, n: usize, tool: &Tool, key: &str, lark: &mut String) -> Result<()> {
        let schema = tool.parameter(key).cloned().unwrap_or_default();
        let of = |name: &str| schema.get(name);
        let texts = match (of("enum"), of("const")) {
            (Some(Value::Array(values)), _) => values.iter().filter_map(Value::as_str).collect(),
            (_, Some(Value::String(value))) => vec![value.as_str()],
            _ => Vec::new(),
        };
        if !texts.is_empty() {
            let texts: Vec<String> = texts.into_iter().map(quoted).collect();
            let end = quoted(&format!("\n{VALUE_END}\n"));
            line(lark, &format!("value_{i}_{n}: ({}) {end}", texts.join(" | ")));
            return Ok(());
        }
        let unknown = ["pattern", "format", "anyOf", "allOf", "oneOf", "not", "if"];
        if let Some(keyword) = unknown.into_iter().find(|keyword| of(keyword).is_some()) {
            return Err(self.refuse(tool, keyword, &format!("the parameter `{key}`")));
        }
        let bound = |name: &str| of(name).and_then(Value::as_u64);
        match (bound("minLength"), bound("maxLength")) {
            (None, None) => {
                line(lark, &format!("value_{i}_{n}: text_{i}_{n} \"\\n\""));
                line(lark, &format!("text_{i}_{n}[suffix={}]: /(.|\\n)*/", quoted(VALUE_END)));
            }
            (least, most) => {
                let most = most.map(|most| most.to_string()).unwrap_or_default();
                let least = least.unwrap_or(0);
                line(lark, &format!("value_{i}_{n}: VALUE_{i}_{n}"));
                let end = quoted(&format!("\n{VALUE_END}\n"));
                line(lark, &format!("VALUE_{i}_{n}: /[^<]{{{least},{most}}}/ {end}"));
            }
        }
        Ok(())
    }

    fn refuse(&self, tool: &Tool, keyword: &str, place: &str) -> Error {
        Error::invalid_request(format!(
            "chat.tools: `{keyword}` of {place} of `{}` cannot be enforced in calls of the form {}",
            tool.name(),
            self.format
        ))
    }
}

/// What ends a value in XML.
const VALUE_END: &str = "</parameter>";

fn line(lark: &mut String, text: &str) {
    lark.push_str(text);
    lark.push('\n');
}

/// A text in the syntax of Lark, which is that of JSON.
fn quoted(text: &str) -> String {
    Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

/// The schema of a tool's arguments, which are an object.
pub(super) fn parameters(tool: &Tool) -> Value {
    let mut schema = tool
        .parameters()
        .cloned()
        .unwrap_or_else(|| serde_json::json!({ "properties": {}, "additionalProperties": false }));
    if let Value::Object(fields) = &mut schema {
        fields.entry("type").or_insert_with(|| "object".into());
    }
    schema
}

/// The schema of a property, with the definitions that it may refer to.
fn with_definitions(property: &Value, root: &Value) -> Value {
    let mut schema = property.as_object().cloned().unwrap_or_else(Map::new);
    for key in ["$defs", "definitions"] {
        if let Some(definitions) = root.get(key) {
            schema.entry(key).or_insert_with(|| definitions.clone());
        }
    }
    Value::Object(schema)
}

/// A schema whose JSON is written as templates write it: a space after commas and colons and no other white space.
fn json_schema(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if let Value::Object(fields) = &mut schema {
        fields.entry("x-guidance").or_insert_with(|| {
            serde_json::json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " })
        });
    }
    schema
}
