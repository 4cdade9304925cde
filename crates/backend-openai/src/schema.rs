//! What is wrong with a JSON schema whatever server gets it. Servers differ: some accept a type that does not exist and constrain
//! nothing.

use serde_json::Value;
use ternion_core::{Error, Result};

const TYPES: [&str; 7] = ["array", "boolean", "integer", "null", "number", "object", "string"];

/// Levels of nesting.
const MAX_DEPTH: usize = 100;

/// Keywords whose values are schemas, lists of schemas, and schemas by name.
const ONE: [&str; 11] = [
    "additionalProperties",
    "contains",
    "else",
    "if",
    "items",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
    "contentSchema",
];
const LISTS: [&str; 4] = ["allOf", "anyOf", "oneOf", "prefixItems"];
const NAMED: [&str; 5] = ["$defs", "definitions", "dependentSchemas", "patternProperties", "properties"];

/// # Errors
/// [`InvalidRequest`](ternion_core::ErrorKind::InvalidRequest) for a `type` that JSON does not have, with its path.
pub(crate) fn check(schema: &Value) -> Result<()> {
    visit(schema, "#", 0)
}

fn visit(schema: &Value, path: &str, depth: usize) -> Result<()> {
    if depth > MAX_DEPTH {
        let message = format!("constraint: the JSON schema has more than {MAX_DEPTH} levels");
        return Err(Error::invalid_request(message));
    }
    let keywords = match schema {
        Value::Bool(_) => return Ok(()),
        Value::Object(keywords) => keywords,
        other => {
            let message = format!("constraint: {other} at {path} is no JSON schema; expected an object");
            return Err(Error::invalid_request(message));
        }
    };
    let types = keywords.get("type");
    let one = types.map_or(&[][..], std::slice::from_ref);
    for kind in types.and_then(Value::as_array).map_or(one, Vec::as_slice) {
        if !kind.as_str().is_some_and(|kind| TYPES.contains(&kind)) {
            return Err(Error::invalid_request(format!("constraint: {kind} at {path} is no type of JSON")));
        }
    }
    for (key, value) in keywords {
        let key = key.as_str();
        let path = format!("{path}/{key}");
        if ONE.contains(&key) && !value.is_array() {
            visit(value, &path, depth + 1)?;
        }
        // Older drafts have a list of schemas in `items`.
        if LISTS.contains(&key) || key == "items" {
            for (i, schema) in value.as_array().into_iter().flatten().enumerate() {
                visit(schema, &format!("{path}/{i}"), depth + 1)?;
            }
        }
        if NAMED.contains(&key) {
            for (name, schema) in value.as_object().into_iter().flatten() {
                visit(schema, &format!("{path}/{name}"), depth + 1)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use ternion_core::ErrorKind;

    use super::*;

    #[test]
    fn types_that_json_has_are_accepted() {
        for schema in [
            json!(true),
            json!({}),
            json!({ "type": ["string", "null"], "enum": ["nonsense", null] }),
            json!({ "properties": { "type": { "type": "integer" } }, "required": ["type"] }),
            json!({ "items": [{ "type": "object" }], "additionalProperties": false, "const": { "type": "nonsense" } }),
        ] {
            check(&schema).unwrap_or_else(|error| panic!("{schema}: {error}"));
        }
    }

    #[test]
    fn others_are_refused_wherever_they_are() {
        for (schema, path) in [
            (json!({ "type": "nonsense" }), "# "),
            (json!({ "type": ["string", 3] }), "# "),
            (json!({ "items": { "type": "int" } }), "#/items "),
            (
                json!({ "properties": { "a": { "anyOf": [{}, { "type": "str" }] } } }),
                "#/properties/a/anyOf/1 ",
            ),
            (json!({ "$defs": { "n": 5 } }), "#/$defs/n "),
            (json!({ "items": [{ "type": "x" }] }), "#/items/0 "),
        ] {
            let error = check(&schema).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidRequest, "{schema}");
            assert!(error.message().contains(&format!("at {path}is no")), "{error}");
        }
    }

    #[test]
    fn deep_schemas_are_refused() {
        let deep = (0..200).fold(json!({}), |schema, _| json!({ "not": schema }));
        assert_eq!(check(&deep).unwrap_err().kind(), ErrorKind::InvalidRequest);
    }
}
