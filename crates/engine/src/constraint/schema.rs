//! JSON schemas on their way to llguidance: what is checked before, and where in the schema an error lies.

use serde_json::{Map, Value};
use ternion_core::{Error, Result};

use super::grammar::MAX_TEXT;

/// The most values of a schema. A megabyte of schema has fewer.
const MAX_VALUES: usize = 200_000;

/// Levels of nesting, each of which takes stack when the schema is compiled.
const MAX_DEPTH: usize = 100;

/// Pairs of alternatives of `oneOf` that are compared, to see that they exclude each other.
const MAX_ONE_OF_PAIRS: usize = 500_000;

/// Pairs of `patternProperties` that are compared, each by intersecting two regular expressions.
const MAX_PATTERN_PAIRS: usize = 200;

/// White space between two tokens of JSON: a space, or a line break with an indentation. Without a bound a model that prefers white
/// space would go on with it until `max_tokens`.
const WHITE_SPACE: &str = r"\x20|\r?\n[\x20\t]{0,20}";

/// The key by which llguidance takes options from a schema.
const OPTIONS: &str = "x-guidance";

/// Keywords whose value is a schema or a list of schemas.
const SCHEMAS: [&str; 16] = [
    "additionalItems",
    "additionalProperties",
    "allOf",
    "anyOf",
    "contains",
    "else",
    "if",
    "items",
    "not",
    "oneOf",
    "prefixItems",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
    "contentSchema",
];

/// Keywords whose value is an object of schemas.
const NAMED_SCHEMAS: [&str; 6] =
    ["$defs", "definitions", "dependentSchemas", "dependencies", "patternProperties", "properties"];

/// The schema as llguidance takes it.
///
/// # Errors
/// [`InvalidRequest`](ternion_core::ErrorKind::InvalidRequest) for a schema that is too large, too deep, or takes too long to
/// compile.
pub(super) fn prepare(schema: &Value) -> Result<Value> {
    let mut prepared = match schema {
        Value::Bool(true) => Map::new(),
        Value::Object(keywords) => keywords.clone(),
        _ => return Err(Error::invalid_request("constraint: the JSON schema allows no value")),
    };
    check_size(schema)?;
    let (mut one_of, mut patterns) = (0, 0);
    visit(schema, "#", &mut |path, keywords| {
        one_of += pairs(keywords.get("oneOf").and_then(Value::as_array).map_or(0, Vec::len));
        patterns += pairs(keywords.get("patternProperties").and_then(Value::as_object).map_or(0, Map::len));
        if let Some(keyword) = too_long(keywords) {
            let message = format!("constraint: `{keyword}` at {path} cannot be enforced: {}", too_much());
            return Some(Error::invalid_request(message));
        }
        let too_many = if one_of > MAX_ONE_OF_PAIRS {
            "oneOf"
        } else if patterns > MAX_PATTERN_PAIRS {
            "patternProperties"
        } else if keywords.contains_key(OPTIONS) {
            OPTIONS
        } else {
            return None;
        };
        let why =
            if too_many == OPTIONS { "cannot be set" } else { "has too many alternatives to be enforced" };
        Some(Error::invalid_request(format!("constraint: `{too_many}` at {path} {why}")))
    })
    .map_or(Ok(()), Err)?;
    prepared.insert(OPTIONS.to_owned(), serde_json::json!({ "whitespace_pattern": WHITE_SPACE }));
    Ok(Value::Object(prepared))
}

/// The keyword by which a text or a key must be longer than can be followed.
fn too_long(keywords: &Map<String, Value>) -> Option<&'static str> {
    let text = |keyword: &str| keywords.get(keyword).and_then(Value::as_str);
    let patterns = keywords.get("patternProperties").and_then(Value::as_object);
    if text("pattern").is_some_and(needs_too_much) {
        Some("pattern")
    } else if patterns.is_some_and(|patterns| patterns.keys().any(|pattern| needs_too_much(pattern))) {
        Some("patternProperties")
    } else if keywords.get("minLength").and_then(Value::as_f64).is_some_and(|least| least > MAX_TEXT as f64) {
        Some("minLength")
    } else {
        None
    }
}

/// Whether what matches a regular expression is longer than can be followed. What cannot be read is left to llguidance.
pub(super) fn needs_too_much(regex: &str) -> bool {
    let parsed = regex_syntax::parse(regex);
    parsed.is_ok_and(|hir| hir.properties().minimum_len().is_some_and(|least| least > MAX_TEXT))
}

/// What is said of a regular expression or a keyword that needs more.
pub(super) fn too_much() -> String {
    format!("it asks for a text of more than {MAX_TEXT} bytes")
}

fn pairs(count: usize) -> usize {
    count * count.saturating_sub(1) / 2
}

fn check_size(schema: &Value) -> Result<()> {
    let mut values = vec![(schema, 0)];
    let mut count = 0;
    while let Some((value, depth)) = values.pop() {
        count += 1;
        if depth > MAX_DEPTH {
            let message = format!("constraint: the JSON schema has more than {MAX_DEPTH} levels");
            return Err(Error::invalid_request(message));
        }
        if count > MAX_VALUES {
            let message = format!("constraint: the JSON schema has more than {MAX_VALUES} values");
            return Err(Error::invalid_request(message));
        }
        let longest = match value {
            Value::String(text) => text.len(),
            Value::Object(fields) => fields.keys().map(String::len).max().unwrap_or(0),
            _ => 0,
        };
        if longest > MAX_TEXT {
            let message = format!(
                "constraint: a text of the JSON schema has {longest} bytes; at most {MAX_TEXT} expected"
            );
            return Err(Error::invalid_request(message));
        }
        match value {
            Value::Array(items) => values.extend(items.iter().map(|item| (item, depth + 1))),
            Value::Object(fields) => values.extend(fields.values().map(|field| (field, depth + 1))),
            _ => {}
        }
    }
    Ok(())
}

/// Calls `look` with the path and the keywords of each schema in `schema`, until it returns something.
fn visit<T>(
    schema: &Value,
    path: &str,
    look: &mut impl FnMut(&str, &Map<String, Value>) -> Option<T>,
) -> Option<T> {
    let keywords = schema.as_object()?;
    let found = look(path, keywords);
    if found.is_some() {
        return found;
    }
    for (keyword, value) in keywords {
        let path = format!("{path}/{}", escaped(keyword));
        let found = match value {
            Value::Object(named) if NAMED_SCHEMAS.contains(&keyword.as_str()) => named
                .iter()
                .find_map(|(name, schema)| visit(schema, &format!("{path}/{}", escaped(name)), look)),
            Value::Array(schemas) if SCHEMAS.contains(&keyword.as_str()) => {
                schemas.iter().enumerate().find_map(|(i, schema)| visit(schema, &format!("{path}/{i}"), look))
            }
            _ if SCHEMAS.contains(&keyword.as_str()) => visit(value, &path, look),
            _ => None,
        };
        if found.is_some() {
            return found;
        }
    }
    None
}

/// A key as it stands in a JSON pointer.
fn escaped(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}

/// What is said of a schema that llguidance refuses for this reason: the keyword, its path, and the reason.
pub(super) fn refused(schema: &Value, reason: &str) -> String {
    let quoted = reason.split(['"', '\'', '`']).skip(1).step_by(2);
    let unknown_format = reason.strip_prefix("Unknown format: ");
    let by_keyword = |keyword: &str| {
        visit(schema, "#", &mut |path, keywords| {
            let value = keywords.get(keyword)?;
            let is_it = unknown_format.is_none_or(|format| value.as_str() == Some(format));
            is_it.then(|| path.to_owned())
        })
        .map(|path| (keyword.to_owned(), path))
    };
    let keyword = if unknown_format.is_some() {
        by_keyword("format")
    } else if reason.starts_with("oneOf") {
        by_keyword("oneOf")
    } else {
        quoted.into_iter().find_map(by_keyword)
    };
    let reason = match reason {
        _ if reason.starts_with("Unimplemented keys") => "",
        _ if reason.starts_with("oneOf") => {
            "its alternatives do not exclude each other in a way that can be told"
        }
        reason => reason,
    };
    let what = match keyword {
        Some((keyword, path)) => format!("`{keyword}` at {path} cannot be enforced"),
        None => "the JSON schema cannot be enforced".to_owned(),
    };
    if reason.is_empty() { what } else { format!("{what}: {reason}") }
}
