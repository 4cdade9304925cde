//! Constraints of answers: the fields by which a server takes them, and whether an answer keeps to one.
//!
//! No field is standard but `response_format`, and most servers ignore fields that they do not know. So each kind is tried when
//! the model is loaded (module `probe`), and what no field has enforced is refused.

use regex::Regex;
use serde_json::{Map, Value, json};
use ternion_core::{Constraint, Error, FinishReason, Result};

use crate::{Dialect, body::unable, llama_schema, schema};

/// The most bytes of a grammar that is made of texts.
const MAX_BYTES: usize = 1 << 20;

/// The kinds of constraints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    JsonSchema,
    JsonObject,
    Regex,
    Choice,
    Lark,
}

impl Kind {
    pub(crate) const ALL: [Self; 5] =
        [Self::JsonSchema, Self::JsonObject, Self::Regex, Self::Choice, Self::Lark];

    /// The kind of a constraint; `None` for one that is newer than this backend.
    fn of(constraint: &Constraint) -> Option<Self> {
        match constraint {
            Constraint::JsonSchema(_) => Some(Self::JsonSchema),
            Constraint::JsonObject => Some(Self::JsonObject),
            Constraint::Regex(_) => Some(Self::Regex),
            Constraint::Choice(_) => Some(Self::Choice),
            Constraint::Lark(_) => Some(Self::Lark),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::JsonSchema => "a JSON schema",
            Self::JsonObject => "a JSON object",
            Self::Regex => "a regular expression",
            Self::Choice => "a choice",
            Self::Lark => "a Lark grammar",
        }
    }

    /// A constraint that leaves no choice, so that the answer tells whether it is enforced.
    pub(crate) fn trial(self) -> Constraint {
        match self {
            // The root of a schema is an object, as OpenAI wants it.
            Self::JsonSchema => Constraint::JsonSchema(json!({
                "type": "object", "properties": { "zq": { "type": "integer", "enum": [17] } }, "required": ["zq"], "additionalProperties": false,
            })),
            Self::JsonObject => Constraint::JsonObject,
            Self::Regex => Constraint::Regex("Zq[-]1[7]x".to_owned()),
            Self::Choice => Constraint::Choice(vec!["Zq-17x".to_owned()]),
            Self::Lark => Constraint::Lark("start: \"Zq-17x\"".to_owned()),
        }
    }

    /// The most tokens of the answer to it.
    pub(crate) fn trial_tokens(self) -> usize {
        // JSON may have white space between its parts.
        if self == Self::JsonSchema { 100 } else { 32 }
    }

    /// Whether the answer to the trial is what it must be. Its beginning is enough for JSON: an object without a schema is long,
    /// and white space between the parts may use up the tokens.
    pub(crate) fn is_kept(self, answer: &str) -> bool {
        match self {
            Self::JsonSchema => {
                let parts: String = answer.split_ascii_whitespace().collect();
                parts.starts_with("{\"zq\"") && "{\"zq\":17}".starts_with(&parts)
            }
            Self::JsonObject => answer.trim_start().starts_with('{'),
            Self::Regex | Self::Choice | Self::Lark => answer == "Zq-17x",
        }
    }
}

/// The field that takes a constraint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Field {
    /// `response_format` of OpenAI.
    ResponseFormat,
    /// `structured_outputs` of vLLM.
    StructuredOutputs,
    /// `guided_json` and others of older versions of vLLM.
    Guided,
    /// `json_schema` of llama-server.
    JsonSchema,
    /// `grammar` of llama-server, in GBNF.
    Gbnf,
    /// `regex` of SGLang.
    Regex,
}

/// The fields that may take a kind on a server of this dialect, the likeliest first.
pub(crate) fn candidates(dialect: Dialect, kind: Kind) -> &'static [Field] {
    let json = matches!(kind, Kind::JsonSchema | Kind::JsonObject);
    match (dialect, kind) {
        (Dialect::Ternion, _) => &[Field::StructuredOutputs],
        (Dialect::Vllm, Kind::JsonObject) => &[Field::StructuredOutputs, Field::ResponseFormat],
        (Dialect::Vllm, _) => &[Field::StructuredOutputs, Field::Guided],
        (Dialect::LlamaServer, _) if json => &[Field::JsonSchema],
        (Dialect::LlamaServer, Kind::Choice) => &[Field::Gbnf],
        (Dialect::Sglang, Kind::Regex | Kind::Choice) => &[Field::Regex],
        (Dialect::Sglang | Dialect::OpenAi | Dialect::Auto, _) if json => &[Field::ResponseFormat],
        _ => &[],
    }
}

/// Which field takes which kind, of one endpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Fields([Option<Field>; Kind::ALL.len()]);

impl Fields {
    pub(crate) fn set(&mut self, kind: Kind, field: Field) {
        self.0[kind as usize] = Some(field);
    }

    pub(crate) fn any(&self) -> bool {
        self.0.iter().any(Option::is_some)
    }

    /// Adds a constraint to the body of a request.
    ///
    /// # Errors
    /// [`Unsupported`](ternion_core::ErrorKind::Unsupported) for a kind that the server does not enforce, and what cannot be
    /// said to it.
    pub(crate) fn add(
        &self,
        body: &mut Map<String, Value>,
        constraint: &Constraint,
        dialect: Dialect,
    ) -> Result<()> {
        let kind = Kind::of(constraint).ok_or_else(|| {
            Error::unsupported("constraint: this kind is not known to the backend `openai`")
        })?;
        let Some(field) = self.0[kind as usize] else {
            if candidates(dialect, kind).is_empty() {
                return Err(unable(&format!("constraint: {}", kind.name()), dialect));
            }
            return Err(Error::unsupported(format!(
                "constraint: the server has not enforced {} when the model was loaded",
                kind.name()
            )));
        };
        let (key, value) = field.of(constraint)?;
        body.insert(key.to_owned(), value);
        Ok(())
    }
}

impl Field {
    /// The field's name and value for a constraint.
    pub(crate) fn of(self, constraint: &Constraint) -> Result<(&'static str, Value)> {
        let unsaid = || Error::unsupported("constraint: the server has no field for this kind");
        if let Constraint::JsonSchema(wanted) = constraint {
            schema::check(wanted)?;
        }
        let object = |schema: &Value| match schema {
            Value::Bool(true) => json!({}),
            schema => schema.clone(),
        };
        let value = match (self, constraint) {
            (Self::ResponseFormat, Constraint::JsonObject) => json!({ "type": "json_object" }),
            (Self::ResponseFormat, Constraint::JsonSchema(wanted)) => json!({
                "type": "json_schema",
                "json_schema": { "name": "answer", "schema": object(wanted), "strict": true },
            }),
            (Self::StructuredOutputs, Constraint::JsonObject) => json!({ "json_object": true }),
            (Self::StructuredOutputs, Constraint::JsonSchema(wanted)) => json!({ "json": object(wanted) }),
            (Self::StructuredOutputs, Constraint::Regex(regex)) => json!({ "regex": regex }),
            (Self::StructuredOutputs, Constraint::Choice(texts)) => json!({ "choice": texts }),
            (Self::StructuredOutputs, Constraint::Lark(grammar)) => json!({ "grammar": grammar }),
            (Self::Guided, Constraint::JsonSchema(wanted)) => object(wanted),
            (Self::Guided | Self::Regex, Constraint::Regex(regex)) => json!(regex),
            (Self::Guided, Constraint::Choice(texts)) => json!(texts),
            (Self::Guided, Constraint::Lark(grammar)) => json!(grammar),
            (Self::JsonSchema, Constraint::JsonObject) => json!({ "type": "object" }),
            (Self::JsonSchema, Constraint::JsonSchema(wanted)) => {
                llama_schema::check(wanted)?;
                object(wanted)
            }
            (Self::Gbnf, Constraint::Choice(texts)) => gbnf(texts)?.into(),
            (Self::Regex, Constraint::Choice(texts)) => {
                let texts: Vec<String> = texts.iter().map(|text| regex::escape(text)).collect();
                json!(format!("({})", texts.join("|")))
            }
            _ => return Err(unsaid()),
        };
        let key = match (self, constraint) {
            (Self::ResponseFormat, _) => "response_format",
            (Self::StructuredOutputs, _) => "structured_outputs",
            (Self::Guided, Constraint::JsonSchema(_)) => "guided_json",
            (Self::Guided, Constraint::Regex(_)) => "guided_regex",
            (Self::Guided, Constraint::Choice(_)) => "guided_choice",
            (Self::Guided, _) => "guided_grammar",
            (Self::JsonSchema, _) => "json_schema",
            (Self::Gbnf, _) => "grammar",
            (Self::Regex, _) => "regex",
        };
        Ok((key, value))
    }
}

/// The texts as a grammar of llama.cpp.
fn gbnf(texts: &[String]) -> Result<String> {
    let mut grammar = String::from("root ::= ");
    for (i, text) in texts.iter().enumerate() {
        grammar.push_str(if i > 0 { " | \"" } else { "\"" });
        for c in text.chars() {
            match c {
                '"' | '\\' => grammar.extend(['\\', c]),
                '\n' => grammar.push_str("\\n"),
                '\r' => grammar.push_str("\\r"),
                '\t' => grammar.push_str("\\t"),
                '\0' => {
                    return Err(Error::unsupported(
                        "constraint: a grammar of llama-server cannot have a text with the character U+0000",
                    ));
                }
                c if c.is_control() => grammar.push_str(&format!("\\U{:08X}", u32::from(c))),
                c => grammar.push(c),
            }
        }
        grammar.push('"');
        if grammar.len() > MAX_BYTES {
            let message = format!("constraint: the choice makes a grammar of more than {MAX_BYTES} bytes");
            return Err(Error::invalid_request(message));
        }
    }
    Ok(grammar)
}

/// Whether an answer keeps to its constraint, as far as that can be told on this side.
#[derive(Debug)]
pub(crate) struct Kept {
    form: Form,
    /// The answer so far, without thoughts.
    text: String,
}

#[derive(Debug)]
enum Form {
    Json {
        object: bool,
    },
    Regex(Regex),
    Choice(Vec<String>),
    /// Only the server can tell.
    Unknown,
}

impl Kept {
    /// # Errors
    /// [`InvalidRequest`](ternion_core::ErrorKind::InvalidRequest) for a regular expression that is none.
    pub(crate) fn new(constraint: &Constraint) -> Result<Self> {
        let form = match constraint {
            Constraint::JsonSchema(schema) => {
                Form::Json { object: schema.get("type").is_some_and(|kind| kind == "object") }
            }
            Constraint::JsonObject => Form::Json { object: true },
            Constraint::Choice(texts) => Form::Choice(texts.clone()),
            Constraint::Regex(regex) => Form::Regex(Regex::new(&format!("^(?:{regex})$")).map_err(|e| {
                let reason = e.to_string();
                let reason = reason.lines().last().unwrap_or_default().trim();
                Error::invalid_request(format!("constraint: the regular expression cannot be read: {reason}"))
            })?),
            _ => Form::Unknown,
        };
        Ok(Self { form, text: String::new() })
    }

    pub(crate) fn push(&mut self, text: &str) {
        self.text.push_str(text);
    }

    /// Whether the answer is complete under the constraint.
    ///
    /// # Errors
    /// [`Backend`](ternion_core::ErrorKind::Backend) for one that the server calls complete and that is not.
    pub(crate) fn complete(&self, finish: &FinishReason) -> Result<bool> {
        if *finish == FinishReason::ToolCalls {
            return Ok(true);
        }
        let ended = *finish == FinishReason::EndOfSequence;
        let complete = match &self.form {
            Form::Json { object } => {
                serde_json::from_str::<Value>(&self.text).is_ok_and(|value| !object || value.is_object())
            }
            Form::Regex(regex) => regex.is_match(&self.text),
            Form::Choice(texts) => texts.contains(&self.text),
            Form::Unknown => ended,
        };
        if ended && !complete {
            return Err(Error::backend(
                "the server has ended an answer that breaks the constraint of its request; a thought in it belongs to `reasoning` of \
                 the model's configuration",
            ));
        }
        Ok(complete)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beginning_of_an_answer_tells_whether_a_schema_is_enforced() {
        for kept in ["{\"zq\": 17}", "{\n \"zq\" \t\n", " {\"zq\":1", "{ \"zq\" :\n\n17 \n}\n"] {
            assert!(Kind::JsonSchema.is_kept(kept), "{kept}");
        }
        for other in [
            "",
            "{",
            "{ \"z",
            "{\"zq\": 18}",
            "{\"zq\": 17} and",
            "Here is {\"zq\": 17}",
            "{\"zq\": 17, \"a\": 1}",
        ] {
            assert!(!Kind::JsonSchema.is_kept(other), "{other}");
        }
    }

    #[test]
    fn each_dialect_gets_its_fields() {
        let choice = Constraint::Choice(vec!["a\"b\\".into(), "c\nd".into()]);
        let schema = Constraint::JsonSchema(json!({ "type": "object" }));
        for (field, constraint, key, value) in [
            (
                Field::StructuredOutputs,
                &choice,
                "structured_outputs",
                json!({ "choice": ["a\"b\\", "c\nd"] }),
            ),
            (Field::Guided, &choice, "guided_choice", json!(["a\"b\\", "c\nd"])),
            (Field::Guided, &schema, "guided_json", json!({ "type": "object" })),
            (Field::Gbnf, &choice, "grammar", json!("root ::= \"a\\\"b\\\\\" | \"c\\nd\"")),
            (Field::Regex, &choice, "regex", json!("(a\"b\\\\|c\nd)")),
            (Field::JsonSchema, &Constraint::JsonObject, "json_schema", json!({ "type": "object" })),
            (
                Field::ResponseFormat,
                &Constraint::JsonObject,
                "response_format",
                json!({ "type": "json_object" }),
            ),
        ] {
            assert_eq!(field.of(constraint).unwrap(), (key, value));
        }
        let (_, format) = Field::ResponseFormat.of(&schema).unwrap();
        assert_eq!(format["json_schema"]["schema"], json!({ "type": "object" }));
        assert!(Field::Gbnf.of(&Constraint::Lark("start: \"a\"".into())).is_err());
    }

    #[test]
    fn what_was_not_enforced_is_refused() {
        let mut fields = Fields::default();
        fields.set(Kind::JsonSchema, Field::JsonSchema);
        let mut body = Map::new();
        let add = |body: &mut Map<String, Value>, constraint, dialect| fields.add(body, &constraint, dialect);
        add(&mut body, Constraint::JsonSchema(json!({ "type": "integer" })), Dialect::LlamaServer).unwrap();
        assert_eq!(body["json_schema"], json!({ "type": "integer" }));
        for (constraint, dialect, said) in [
            (Constraint::Lark("start: \"a\"".into()), Dialect::LlamaServer, "a Lark grammar"),
            (Constraint::Choice(vec!["a".into()]), Dialect::LlamaServer, "has not enforced a choice"),
            (Constraint::Regex("a".into()), Dialect::OpenAi, "a regular expression"),
        ] {
            let error = add(&mut body, constraint, dialect).unwrap_err();
            assert_eq!(error.kind(), ternion_core::ErrorKind::Unsupported, "{error}");
            assert!(error.message().contains(said), "{error}");
        }
        assert_eq!(body.len(), 1);
    }

    #[test]
    fn an_answer_that_breaks_its_constraint_is_an_error_and_one_that_is_cut_off_is_incomplete() {
        let complete = |constraint: &Constraint, text: &str, finish: &FinishReason| {
            let mut kept = Kept::new(constraint).unwrap();
            kept.push(text);
            kept.complete(finish).map_err(|error| error.kind())
        };
        let broken = Err(ternion_core::ErrorKind::Backend);
        let (end, cut) = (FinishReason::EndOfSequence, FinishReason::MaxTokens);
        for (constraint, good, bad) in [
            (Constraint::Choice(vec!["yes".into(), "no".into()]), "no", "now"),
            (Constraint::Regex("a|bc".into()), "bc", "ac"),
            (Constraint::JsonObject, " {\"a\": 1}", "[1]"),
            (Constraint::JsonSchema(json!({ "type": "array" })), "[1, 2]", "[1, 2"),
        ] {
            assert_eq!(complete(&constraint, good, &end), Ok(true));
            assert_eq!(complete(&constraint, good, &cut), Ok(true));
            assert_eq!(complete(&constraint, bad, &end), broken);
            assert_eq!(complete(&constraint, bad, &cut), Ok(false));
        }
        assert!(Kept::new(&Constraint::Regex("a(b".into())).is_err());
        assert_eq!(complete(&Constraint::JsonObject, "", &FinishReason::ToolCalls), Ok(true));
    }
}
