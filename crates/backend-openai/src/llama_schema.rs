//! Which JSON schemas llama-server enforces. It makes a grammar of a schema, and leaves out what that grammar cannot say, in
//! silence. So what its converter (`json-schema-to-grammar.cpp`) does not read is refused on this side.

use serde_json::{Map, Value};
use ternion_core::{Error, Result};

/// Keywords that say nothing about the value.
const ANNOTATIONS: [&str; 11] = [
    "$comment",
    "$defs",
    "$id",
    "$schema",
    "default",
    "definitions",
    "deprecated",
    "description",
    "examples",
    "readOnly",
    "title",
];

/// Levels of nesting.
const MAX_DEPTH: usize = 100;

/// # Errors
/// [`Unsupported`](ternion_core::ErrorKind::Unsupported) naming the keyword that the server would not enforce, and its path.
pub(crate) fn check(schema: &Value) -> Result<()> {
    visit(schema, "#", 0)
}

fn refuse(path: &str, what: impl std::fmt::Display) -> Error {
    Error::unsupported(format!("constraint: {what} at {path} is not enforced by llama-server"))
}

fn visit(schema: &Value, path: &str, depth: usize) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(Error::invalid_request(format!(
            "constraint: the JSON schema has more than {MAX_DEPTH} levels"
        )));
    }
    let keywords = match schema {
        Value::Bool(true) => return Ok(()),
        Value::Object(keywords) => keywords,
        _ => return Err(refuse(path, "a schema that is no object")),
    };
    for (key, schemas) in keywords.iter().filter(|(key, _)| matches!(key.as_str(), "$defs" | "definitions")) {
        for (name, schema) in schemas.as_object().into_iter().flatten() {
            visit(schema, &format!("{path}/{key}/{name}"), depth + 1)?;
        }
    }
    let has = |key: &str| keywords.contains_key(key);
    // Each of these stands alone: the converter does not look at what is beside it.
    let (form, beside): (&str, &[&str]) = if has("$ref") {
        ("$ref", &[])
    } else if has("anyOf") {
        ("anyOf", &[])
    } else if has("const") {
        ("const", &["type"])
    } else if has("enum") {
        ("enum", &["type"])
    } else {
        (keywords.get("type").and_then(Value::as_str).unwrap_or_default(), of_type(keywords))
    };
    for key in keywords.keys().map(String::as_str) {
        if key != form && !beside.contains(&key) && !ANNOTATIONS.contains(&key) {
            return Err(refuse(path, format_args!("`{key}`")));
        }
    }
    let below = |key: &str| format!("{path}/{key}");
    match form {
        "$ref" => {
            let local = keywords["$ref"].as_str().is_some_and(|target| target.starts_with('#'));
            if local { Ok(()) } else { Err(refuse(path, "a `$ref` to another document")) }
        }
        "anyOf" => {
            let schemas =
                keywords["anyOf"].as_array().ok_or_else(|| refuse(path, "an `anyOf` without a list"))?;
            let mut schemas = schemas.iter().enumerate();
            schemas.try_for_each(|(i, schema)| visit(schema, &format!("{path}/anyOf/{i}"), depth + 1))
        }
        "const" | "enum" => {
            let one = std::slice::from_ref(&keywords[form]);
            let values = keywords[form].as_array().filter(|_| form == "enum").map_or(one, Vec::as_slice);
            let kind = keywords.get("type");
            if values.iter().all(|value| kind.is_none_or(|kind| is_of(value, kind))) {
                Ok(())
            } else {
                Err(refuse(path, format_args!("the `type` beside a value of `{form}`")))
            }
        }
        "object" => object(keywords, path, depth),
        "array" => match (keywords.get("items"), keywords.get("prefixItems").and_then(Value::as_array)) {
            (Some(items), None) if !items.is_array() => visit(items, &below("items"), depth + 1),
            (None, Some(items)) if !has("minItems") && !has("maxItems") => items
                .iter()
                .enumerate()
                .try_for_each(|(i, item)| visit(item, &format!("{path}/prefixItems/{i}"), depth + 1)),
            _ => Err(refuse(path, "an array without a schema for its items alone")),
        },
        "string" => string(keywords, path),
        "" => match keywords.get("type") {
            Some(Value::Array(kinds))
                if kinds.iter().filter_map(Value::as_str).all(|kind| {
                    ["string", "number", "integer", "boolean", "null", "object"].contains(&kind)
                }) =>
            {
                Ok(())
            }
            None if keywords.keys().all(|key| ANNOTATIONS.contains(&key.as_str())) => Ok(()),
            _ => Err(refuse(path, "a schema without a `type`")),
        },
        "integer" | "number" | "boolean" | "null" => Ok(()),
        unknown => {
            Err(Error::invalid_request(format!("constraint: `{unknown}` at {path} is no type of JSON")))
        }
    }
}

/// The keywords that the converter reads beside a type.
fn of_type(keywords: &Map<String, Value>) -> &'static [&'static str] {
    match keywords.get("type").and_then(Value::as_str) {
        Some("object") => &["type", "properties", "required", "additionalProperties"],
        Some("array") => &["type", "items", "prefixItems", "minItems", "maxItems"],
        Some("string") if keywords.contains_key("pattern") => &["type", "pattern"],
        Some("string") if keywords.contains_key("format") => &["type", "format"],
        Some("string") => &["type", "minLength", "maxLength"],
        Some("integer") => &["type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"],
        _ => &["type"],
    }
}

fn object(keywords: &Map<String, Value>, path: &str, depth: usize) -> Result<()> {
    let properties = keywords.get("properties").and_then(Value::as_object);
    for (name, schema) in properties.into_iter().flatten() {
        visit(schema, &format!("{path}/properties/{name}"), depth + 1)?;
    }
    match keywords.get("additionalProperties") {
        None | Some(Value::Bool(_)) => {}
        Some(schema) => visit(schema, &format!("{path}/additionalProperties"), depth + 1)?,
    }
    let required = keywords.get("required").and_then(Value::as_array).into_iter().flatten();
    match required.filter_map(Value::as_str).find(|key| properties.is_none_or(|all| !all.contains_key(*key)))
    {
        Some(key) => {
            Err(refuse(path, format_args!("`required` of `{key}`, which `properties` does not have,")))
        }
        None => Ok(()),
    }
}

fn string(keywords: &Map<String, Value>, path: &str) -> Result<()> {
    if let Some(format) = keywords.get("format").and_then(Value::as_str)
        && !["date", "time", "date-time", "uuid"].contains(&format)
    {
        return Err(refuse(path, format_args!("the format `{format}`")));
    }
    let Some(pattern) = keywords.get("pattern").and_then(Value::as_str) else { return Ok(()) };
    // The converter reads a small language: what it has is copied, and what it does not have as well.
    let whole = pattern.starts_with('^') && pattern.ends_with('$') && !pattern.ends_with("\\$");
    let mut escaped = pattern.match_indices('\\').map(|(at, _)| pattern[at + 1..].chars().next());
    let known =
        escaped.all(|next| next.is_some_and(|c| matches!(c, 'd' | 'w' | 's') || c.is_ascii_punctuation()));
    if whole && known && !pattern.contains("(?") && !pattern[1..pattern.len() - 1].contains(['^', '$']) {
        Ok(())
    } else {
        Err(refuse(path, format_args!("the pattern `{pattern}`")))
    }
}

fn is_of(value: &Value, kind: &Value) -> bool {
    let is = |kind: &Value| match kind.as_str().unwrap_or_default() {
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "object" => value.is_object(),
        "array" => value.is_array(),
        _ => false,
    };
    kind.as_array().map_or_else(|| is(kind), |kinds| kinds.iter().any(is))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_the_converter_reads_is_accepted() {
        for schema in [
            json!({}),
            json!({ "type": "object" }),
            json!({ "type": "object", "title": "T", "properties": { "a": { "type": "integer", "minimum": 3 }, "b": { "enum": ["x", 1] } },
                    "required": ["a"], "additionalProperties": false }),
            json!({ "type": "array", "items": { "type": "string", "minLength": 1, "maxLength": 9 }, "minItems": 1 }),
            json!({ "$defs": { "n": { "type": ["string", "null"] } }, "anyOf": [{ "$ref": "#/$defs/n" }, { "const": 4 }] }),
            json!({ "type": "string", "pattern": "^[a-z]{2,3}-\\d+$" }),
            json!({ "type": "string", "enum": ["a", "b"] }),
        ] {
            check(&schema).unwrap_or_else(|error| panic!("{schema}: {error}"));
        }
    }

    #[test]
    fn what_it_leaves_out_is_refused_by_name() {
        for (schema, said) in [
            (json!({ "type": "array", "items": {}, "uniqueItems": true }), "`uniqueItems` at #"),
            (
                json!({ "type": "object", "properties": { "a": { "type": "number", "maximum": 3 } } }),
                "`maximum` at #/properties/a",
            ),
            (json!({ "oneOf": [{ "type": "string" }] }), "`oneOf` at #"),
            (json!({ "type": "object", "required": ["x"] }), "`required` of `x`"),
            (json!({ "type": "string", "pattern": "a+" }), "the pattern `a+`"),
            (json!({ "type": "string", "pattern": "^a\\b$" }), "the pattern"),
            (json!({ "type": "string", "pattern": "^a$", "maxLength": 3 }), "`maxLength` at #"),
            (json!({ "type": "string", "format": "email" }), "the format `email`"),
            (json!({ "minLength": 3 }), "`minLength` at #"),
            (json!({ "type": "integer", "enum": ["a"] }), "`type` beside a value of `enum`"),
            (json!({ "$ref": "https://example.org/schema" }), "another document"),
            (json!({ "type": "nonsense" }), "no type of JSON"),
            (
                json!({ "type": "object", "additionalProperties": { "not": {} } }),
                "`not` at #/additionalProperties",
            ),
        ] {
            let error = check(&schema).unwrap_err();
            assert!(error.message().contains(said), "{schema}: {error}");
        }
        let deep = (0..200).fold(json!({}), |inner, _| json!({ "type": "array", "items": inner }));
        assert!(check(&deep).is_err());
    }
}
