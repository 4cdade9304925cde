//! Values of the environment that override a configuration file.

use std::ffi::OsString;

use serde_json::{Map, Value};

use super::{Config, parse, suggest};
use crate::{Error, Result};

const DEFAULT_MODEL: &str = "TERNION_DEFAULT_MODEL";
const MODELS: &str = "TERNION_MODELS__";

/// Sets in `config` what the variables say, in the order of their names.
pub(super) fn apply(
    config: &mut Value,
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<()> {
    let mut ours = Vec::new();
    for (name, value) in variables {
        let Ok(name) = name.into_string() else { continue };
        if (name == DEFAULT_MODEL || name.starts_with(MODELS)) && !value.is_empty() {
            let value = value.into_string().map_err(|value| {
                Error::invalid_config(format!("{} is not valid UTF-8", value.display()))
                    .with("variable", &name)
            })?;
            ours.push((name, value));
        }
    }
    ours.sort();
    let schema = Config::schema();
    // Checked at the end: the key that makes a new model complete may come after its others.
    let mut new_models = Vec::new();
    for (variable, value) in &ours {
        if variable == DEFAULT_MODEL {
            table(config).insert("default_model".into(), Value::String(value.clone()));
            continue;
        }
        let mut segments = variable[MODELS.len()..].split("__");
        let name = segments.next().unwrap_or_default();
        let keys: Vec<String> = segments.map(str::to_ascii_lowercase).collect();
        if name.is_empty() || keys.is_empty() || keys.iter().any(String::is_empty) {
            return Err(
                Error::invalid_config(format!("{MODELS}<NAME>__<KEY> expected")).with("variable", variable)
            );
        }
        let models = table(config).entry("models").or_insert_with(|| Value::Object(Map::new()));
        let model = find(models, name).unwrap_or_else(|| {
            let name = name.to_ascii_lowercase();
            if !new_models.iter().any(|(n, _)| *n == name) {
                new_models.push((name.clone(), variable));
            }
            name
        });
        set(models, &schema, &model, &keys, value);
    }
    for (name, variable) in new_models {
        let models = &config["models"];
        if models[&name].get("path").is_none() && models[&name].get("backend").is_none() {
            let known: Vec<&str> = models
                .as_object()
                .into_iter()
                .flat_map(Map::keys)
                .map(String::as_str)
                .filter(|k| *k != name)
                .collect();
            let mut message =
                format!("no model `{name}` is in the file, and no variable gives it a path or a backend");
            suggest(&mut message, &name, known.into_iter());
            return Err(Error::invalid_config(message).with("variable", variable));
        }
    }
    Ok(())
}

/// The configured model that a variable's `name` stands for.
fn find(models: &Value, name: &str) -> Option<String> {
    let plain = |text: &str| -> String {
        text.chars().map(|c| if c.is_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect()
    };
    models.as_object()?.keys().find(|key| plain(key) == plain(name)).cloned()
}

/// Sets one value, making the tables on the way. A text stays a text where the schema wants one; elsewhere a value that
/// reads as JSON is what it reads as.
fn set(models: &mut Value, schema: &Value, model: &str, keys: &[String], text: &str) {
    let mut place = table(models).entry(model).or_insert(Value::Null);
    let mut described = parse::child(schema, schema, "models").and_then(|s| parse::child(s, schema, model));
    for key in keys {
        place = table(place).entry(key.as_str()).or_insert(Value::Null);
        described = described.and_then(|s| parse::child(s, schema, key));
    }
    let text_wanted = described.is_some_and(|s| parse::is_text(s, schema));
    let parsed =
        if text_wanted { None } else { serde_json::from_str(text).ok().filter(|v: &Value| !v.is_null()) };
    *place = parsed.unwrap_or_else(|| Value::String(text.to_owned()));
}

/// `value` as a table; what else it was is replaced.
fn table(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => map,
        _ => unreachable!("it has just been made an object"),
    }
}
