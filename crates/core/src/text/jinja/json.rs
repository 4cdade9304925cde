//! JSON from a request as values of a template.

use minijinja::Value;
use serde_json::Value as Json;

use super::{
    Result, fail,
    value::{MAX_DEPTH, dict_of, list_of},
};

/// JSON as Python's `json.loads` gives it.
///
/// # Errors
/// For JSON that is nested deeper than values of templates may be.
pub(in crate::text) fn from_json(json: &Json) -> Result<Value> {
    json_value(json, 0)
}

/// A message, and a list of them, may stand around a value.
const MAX_JSON_DEPTH: usize = MAX_DEPTH - 8;

fn json_value(json: &Json, depth: usize) -> Result<Value> {
    if depth > MAX_JSON_DEPTH {
        return Err(fail("a value is nested too deeply"));
    }
    Ok(match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => (*value).into(),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => integer.into(),
            (_, Some(integer)) => integer.into(),
            _ => number.as_f64().unwrap_or(f64::NAN).into(),
        },
        Json::String(text) => text.as_str().into(),
        Json::Array(items) => {
            list_of(items.iter().map(|item| json_value(item, depth + 1)).collect::<Result<_>>()?)
        }
        Json::Object(object) => {
            let pairs = object.iter().map(|(key, value)| Ok((key.as_str(), json_value(value, depth + 1)?)));
            dict_of(pairs.collect::<Result<_>>()?)
        }
    })
}
