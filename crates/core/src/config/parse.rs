//! From text to typed values, with errors that name the place.

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Format, suggest, unique::Unique};
use crate::{Error, Result, file::without_bom};

/// The text's own structure, which the environment can still change. An empty text is an empty table.
pub(super) fn to_value(text: &str, format: Format) -> Result<Value> {
    let text = without_bom(text);
    let value = match format {
        Format::Toml => toml::from_str(text).map_err(|e| {
            let place = e.span().map_or(String::new(), |span| line_and_column(text, span.start));
            Error::invalid_config(format!("not valid TOML: {}{place}", one_line(e.message())))
        })?,
        Format::Json => serde_json::from_str::<Unique>(text)
            .map(|value| value.0)
            .map_err(|e| Error::invalid_config(format!("not valid JSON: {}", one_line(&e.to_string()))))?,
        Format::Yaml => serde_saphyr::from_str::<Option<Value>>(text)
            .map_err(|e| Error::invalid_config(format!("not valid YAML: {}", one_line(&e.to_string()))))?
            .unwrap_or(Value::Null),
    };
    match value {
        Value::Null => Ok(Value::Object(serde_json::Map::new())),
        Value::Object(_) => {
            refuse_null(&value, "")?;
            Ok(value)
        }
        other => Err(Error::invalid_config(format!("the file holds {}; a table expected", kind(&other)))),
    }
}

/// `value` as a `T` that has every key of it. `place` is where it lies in the file.
pub(super) fn strict<T: DeserializeOwned + JsonSchema>(value: Value, place: &str) -> Result<T> {
    let schema = schemars::schema_for!(T).to_value();
    refuse_unknown_keys(&value, &schema, &schema, place)?;
    serde_path_to_error::deserialize(value).map_err(|e| {
        let path = e.path().to_string();
        let place = if path == "." { place.to_owned() } else { join(place, &path) };
        Error::invalid_config(format!("{place}: {}", one_line(&e.into_inner().to_string())))
    })
}

/// The schema of what lies at `key` of an object with this schema.
pub(super) fn child<'a>(schema: &'a Value, root: &'a Value, key: &str) -> Option<&'a Value> {
    let schema = target(schema, root);
    let property = |schema: &'a Value| schema.get("properties").and_then(|p| p.get(key));
    let of_a_variant = || schema.get("oneOf")?.as_array()?.iter().find_map(property);
    let property = property(schema).or_else(of_a_variant);
    let id =
        || numbered(schema).filter(|_| key.bytes().all(|b| b.is_ascii_digit()) && key.parse::<u32>().is_ok());
    property.or_else(id).or_else(|| schema.get("additionalProperties").filter(|s| s.is_object()))
}

/// Of a schema with variants that a key tells apart, the one that `value` chooses; any other schema as it is.
fn variant<'a>(schema: &'a Value, root: &'a Value, value: &Value) -> &'a Value {
    let chosen = |variant: &&Value| {
        let properties = variant.get("properties").and_then(Value::as_object);
        properties
            .into_iter()
            .flatten()
            .any(|(key, s)| s.get("const").is_some_and(|c| value.get(key) == Some(c)))
    };
    let variants = target(schema, root).get("oneOf").and_then(Value::as_array);
    variants.and_then(|variants| variants.iter().find(chosen)).unwrap_or(schema)
}

/// The schema of all values of a map whose keys are numbers: the only maps here that a schema describes by a pattern.
fn numbered(schema: &Value) -> Option<&Value> {
    schema.get("patternProperties")?.as_object()?.values().next()
}

/// Whether this schema describes a text.
pub(super) fn is_text(schema: &Value, root: &Value) -> bool {
    match target(schema, root).get("type") {
        Some(Value::String(name)) => name == "string",
        Some(Value::Array(names)) => names.iter().any(|name| name == "string"),
        _ => false,
    }
}

/// Whether this schema describes a table: an object, or a map.
pub(super) fn is_table(schema: &Value, root: &Value) -> bool {
    let schema = target(schema, root);
    let is_object = |schema: &Value| schema.get("type").and_then(Value::as_str) == Some("object");
    is_object(schema)
        || schema.get("oneOf").and_then(Value::as_array).is_some_and(|all| all.iter().all(is_object))
}

/// All keys that lead to a value which is no table, as paths; `*` stands for the name of a model. Free tables have none.
pub(super) fn key_paths(schema: &Value, root: &Value) -> Vec<Vec<String>> {
    fn visit(schema: &Value, root: &Value, path: &[String], paths: &mut Vec<Vec<String>>) {
        let schema = target(schema, root);
        let variants = schema.get("oneOf").and_then(Value::as_array).into_iter().flatten();
        let properties = std::iter::once(schema)
            .chain(variants)
            .filter_map(|schema| schema.get("properties")?.as_object())
            .flatten()
            .map(|(key, described)| (key.as_str(), described));
        let models = schema.get("additionalProperties").filter(|s| s.is_object()).map(|s| ("*", s));
        for (key, described) in properties.chain(models) {
            let path = [path, &[key.to_owned()]].concat();
            if is_table(described, root) {
                visit(described, root, &path, paths);
            } else {
                paths.push(path);
            }
        }
    }
    let mut paths = Vec::new();
    visit(schema, root, &[], &mut paths);
    paths.sort();
    paths.dedup();
    paths
}

/// Follows a reference to a definition of the root, also that of a table which may be left out.
fn target<'a>(schema: &'a Value, root: &'a Value) -> &'a Value {
    let optional = schema
        .get("anyOf")
        .and_then(Value::as_array)
        .and_then(|any| any.iter().find(|s| s.get("$ref").is_some()));
    optional
        .unwrap_or(schema)
        .get("$ref")
        .and_then(Value::as_str)
        .and_then(|reference| root.pointer(reference.strip_prefix('#')?))
        .unwrap_or(schema)
}

fn refuse_unknown_keys(value: &Value, schema: &Value, root: &Value, place: &str) -> Result<()> {
    let Value::Object(entries) = value else { return Ok(()) };
    let whole = schema;
    let schema = variant(whole, root, value);
    // A variant without keys of its own does not say that it has no others.
    let closed = !std::ptr::eq(whole, schema)
        || target(schema, root).get("additionalProperties") == Some(&Value::Bool(false));
    for (key, value) in entries {
        if let Some(child) = child(schema, root, key) {
            refuse_unknown_keys(value, child, root, &join(place, key))?;
        } else if closed {
            let mut message = format!("unknown key `{}`", join(place, key));
            let known = target(schema, root).get("properties").and_then(Value::as_object);
            let known: Vec<&str> = known.into_iter().flat_map(|k| k.keys()).map(String::as_str).collect();
            let plain = message.len();
            suggest(&mut message, key, known.iter().copied());
            if message.len() == plain {
                message += "; ";
                message += &if numbered(target(schema, root)).is_some() {
                    format!("a whole number from 0 to {} expected", u32::MAX)
                } else if known.is_empty() {
                    "there are none here".to_owned()
                } else {
                    format!("known: {}", known.join(", "))
                };
            }
            return Err(Error::invalid_config(message));
        }
    }
    Ok(())
}

/// A key without a value says nothing, and NaN arrives as that from TOML and YAML.
fn refuse_null(value: &Value, place: &str) -> Result<()> {
    match value {
        Value::Null => Err(Error::invalid_config(format!("{place}: no value, or not a finite number"))),
        Value::Array(items) => {
            items.iter().enumerate().try_for_each(|(i, item)| refuse_null(item, &format!("{place}[{i}]")))
        }
        Value::Object(entries) => entries.iter().try_for_each(|(k, v)| refuse_null(v, &join(place, k))),
        _ => Ok(()),
    }
}

fn join(place: &str, key: &str) -> String {
    if place.is_empty() { key.to_owned() } else { format!("{place}.{key}") }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "a table",
    }
}

fn line_and_column(text: &str, at: usize) -> String {
    let before = text.get(..at).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
    format!(" at line {line} column {column}")
}

/// The libraries' messages may go on with a picture of the place; errors here are one line.
fn one_line(message: &str) -> &str {
    message.lines().find(|line| !line.trim().is_empty()).unwrap_or("").trim()
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use crate::config::{Config, Format};

    fn biases(config: &Config) -> Vec<(u32, f32)> {
        config.models["m"].sampling.logit_bias.clone().into_iter().collect()
    }

    #[test]
    fn a_logit_bias_can_be_set_in_every_format() {
        for (text, format) in [
            ("[models.m.sampling.logit_bias]\n42 = -5.0\n7 = 2", Format::Toml),
            (r#"{"models": {"m": {"sampling": {"logit_bias": {"42": -5.0, "7": 2}}}}}"#, Format::Json),
            (
                "models:\n  m:\n    sampling:\n      logit_bias:\n        42: -5.0\n        \"7\": 2\n",
                Format::Yaml,
            ),
        ] {
            let config = Config::from_str(text, format).unwrap();
            assert_eq!(biases(&config), [(7, 2.0), (42, -5.0)], "{format:?}");
        }
    }

    #[test]
    fn a_logit_bias_can_be_set_by_the_environment() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ternion.toml");
        std::fs::write(&path, "[models.m.sampling.logit_bias]\n7 = 2.0\n").unwrap();
        let variable: (OsString, OsString) =
            ("TERNION_MODELS__M__SAMPLING__LOGIT_BIAS__42".into(), "-5".into());
        let config = Config::load_with_env(&path, [variable]).unwrap();
        assert_eq!(biases(&config), [(7, 2.0), (42, -5.0)]);
    }

    #[test]
    fn what_is_no_token_id_or_no_bias_is_refused_with_its_place() {
        for (entry, place) in [
            (
                "x = 1.0",
                "unknown key `models.m.sampling.logit_bias.x`; a whole number from 0 to 4294967295 expected",
            ),
            ("4294967296 = 1.0", "unknown key `models.m.sampling.logit_bias.4294967296`"),
            ("-1 = 1.0", "unknown key `models.m.sampling.logit_bias.-1`"),
            ("1 = \"much\"", "models.m.sampling.logit_bias"),
        ] {
            let text = format!("[models.m.sampling.logit_bias]\n{entry}");
            let error = Config::from_str(&text, Format::Toml).unwrap_err().to_string();
            assert!(error.contains(place), "{error}");
        }
    }

    #[test]
    fn a_context_policy_is_as_strict_as_all_else() {
        let policy = |text: &str| {
            let text = format!("[models.m.context_policy]\n{text}");
            Config::from_str(&text, Format::Toml).map(|c| c.models["m"].context_policy.clone())
        };
        for text in [
            "kind = \"reject\"",
            "kind = \"truncate\"\ndrop = \"middle\"\nreserve = 100",
            "kind = \"sliding\"\nsinks = 8",
            "kind = \"map_reduce\"\nchunk_kind = \"markdown\"\nfirst_prompt = \"{task} {text}\"",
            "kind = \"refine\"\noverlap = 0",
        ] {
            let name = policy(text).unwrap().name();
            assert!(text.contains(name), "{name}");
        }
        for (text, words) in [
            ("kind = \"truncat\"", "models.m.context_policy"),
            ("drop = \"head\"", "models.m.context_policy"),
            ("kind = \"reject\"\ndrop = \"head\"", "unknown key `models.m.context_policy.drop`"),
            (
                "kind = \"truncate\"\ndorp = \"head\"",
                "unknown key `models.m.context_policy.dorp`; did you mean `drop`?",
            ),
            ("kind = \"truncate\"\ndrop = \"heads\"", "models.m.context_policy"),
            ("kind = \"truncate\"\nreserve = 0", "models.m.context_policy.reserve: 0 is out of range"),
            ("kind = \"sliding\"\nrecent = 0", "models.m.context_policy.recent: 0 is out of range"),
            (
                "kind = \"map_reduce\"\nchunk_tokens = 10\noverlap = 10",
                "models.m.context_policy.overlap: 10 tokens",
            ),
            (
                "kind = \"map_reduce\"\nfirst_prompt = \"{task}\"",
                "context_policy.first_prompt: has no `{text}`",
            ),
            ("kind = \"refine\"\nnext_prompt = \"{text}\"", "context_policy.next_prompt: has no `{answer}`"),
        ] {
            let error = policy(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
