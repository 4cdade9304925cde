//! Values of the environment that override a configuration file.

use std::{collections::BTreeMap, ffi::OsString};

use serde_json::{Map, Value};

use super::{Config, parse, suggest};
use crate::{Error, Result, ResultExt};

const PREFIX: &str = "TERNION_";

/// What the environment has set.
#[derive(Debug, Default)]
pub(super) struct Overrides {
    /// Places such as `models.m.threads`, and the variable that set each.
    places: BTreeMap<String, String>,
}

impl Overrides {
    /// Whether a variable has set this place.
    pub(super) fn has(&self, place: &str) -> bool {
        self.places.contains_key(place)
    }

    /// The variable that an error about the whole configuration is about.
    pub(super) fn blame(&self, error: Error) -> Error {
        let blamed = self.places.iter().rev().find(|(place, _)| {
            error.message().match_indices(place.as_str()).any(|(at, place)| {
                let word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '-');
                let (before, after) = error.message().split_at(at);
                !word(before.chars().next_back()) && !word(after[place.len()..].chars().next())
            })
        });
        match blamed {
            Some((_, variable)) => error.with("variable", variable),
            None => error,
        }
    }
}

/// Sets in `config` what the variables say, in the order of their names.
///
/// Variables that are ours: those with a double underscore behind `TERNION_`, and `TERNION_<KEY>` for a top-level key that
/// is no table. An unknown key in one is an error. Names are compared without case.
pub(super) fn apply(
    config: &mut Value,
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Overrides> {
    let schema = Config::schema();
    let mut ours: BTreeMap<String, (String, String)> = BTreeMap::new();
    for (name, value) in variables {
        let variable = name.to_string_lossy().into_owned();
        let upper = variable.to_ascii_uppercase();
        let Some(rest) = upper.strip_prefix(PREFIX) else { continue };
        if value.is_empty() {
            continue;
        }
        if !rest.contains("__") && !is_top_level_value(rest, &schema) {
            refuse_single_underscores(rest, config, &schema).with("variable", &variable)?;
            continue;
        }
        let value = value.into_string().map_err(|value| {
            Error::invalid_config(format!("{} is not valid UTF-8", value.display()))
                .with("variable", &variable)
        })?;
        if let Some((other, _)) = ours.insert(rest.to_owned(), (variable.clone(), value)) {
            let message = format!("`{other}` and `{variable}` set the same key");
            return Err(Error::invalid_config(message).with("variable", &variable));
        }
    }
    let mut overrides = Overrides::default();
    // Checked at the end: the key that makes a new model complete may come after its others.
    let mut new_models = BTreeMap::new();
    for (rest, (variable, value)) in &ours {
        let place = place(config, rest, &schema).with("variable", variable)?;
        if let [table, model, ..] = &place[..]
            && table == "models"
            && config["models"].get(model).is_none()
        {
            new_models.insert(model.clone(), variable.clone());
        }
        set(config, &schema, &place, value);
        overrides.places.insert(place.join("."), variable.clone());
    }
    for (name, variable) in new_models {
        let models = &config["models"];
        if models[&name].get("path").is_none() && models[&name].get("backend").is_none() {
            let known = models.as_object().into_iter().flat_map(Map::keys).map(String::as_str);
            let mut message =
                format!("no model `{name}` is in the file, and no variable gives it a path or a backend");
            suggest(&mut message, &name, known.filter(|k| *k != name));
            return Err(Error::invalid_config(message).with("variable", variable));
        }
    }
    Ok(overrides)
}

/// The keys that a variable stands for; `rest` is its name behind the prefix, in upper case.
fn place(config: &Value, rest: &str, schema: &Value) -> Result<Vec<String>> {
    let segments = |text: &str| text.split("__").map(str::to_ascii_lowercase).collect::<Vec<_>>();
    let Some(of_model) = rest.strip_prefix("MODELS__") else {
        let keys = segments(rest);
        if parse::child(schema, schema, &keys[0]).is_none() {
            let known = top_level(schema);
            let mut message = format!("unknown key `{}`", keys[0]);
            let plain = message.len();
            suggest(&mut message, &keys[0], known.iter().copied());
            if message.len() == plain {
                message += &format!("; known: {}", known.join(", "));
            }
            return Err(Error::invalid_config(message));
        }
        return complete(keys, "TERNION_<TABLE>__<KEY>");
    };
    // The name of a model may have a double underscore itself: the longest that fits is meant.
    let models = config.get("models").and_then(Value::as_object);
    let mut matches: Vec<(&str, &str)> = Vec::new();
    for name in models.into_iter().flat_map(Map::keys) {
        if let Some(keys) = of_model.strip_prefix(&plain(name)).and_then(|rest| rest.strip_prefix("__")) {
            matches.push((name, keys));
        }
    }
    let shortest = matches.iter().map(|(_, keys)| keys.len()).min();
    matches.retain(|(_, keys)| Some(keys.len()) == shortest);
    if let [(first, _), (second, _), ..] = matches[..] {
        return Err(Error::invalid_config(format!(
            "stands for both models `{first}` and `{second}`, whose names differ only in case or punctuation; \
             rename one of them"
        )));
    }
    let (name, keys) = match matches.first() {
        Some((name, keys)) => ((*name).to_owned(), *keys),
        None => match of_model.split_once("__") {
            Some((name, keys)) => (name.to_ascii_lowercase(), keys),
            None => (of_model.to_ascii_lowercase(), ""),
        },
    };
    let keys = ["models".to_owned(), name].into_iter().chain(segments(keys));
    complete(keys.collect(), "TERNION_MODELS__<NAME>__<KEY>")
}

fn complete(keys: Vec<String>, expected: &str) -> Result<Vec<String>> {
    if keys.iter().any(String::is_empty) {
        return Err(Error::invalid_config(format!("{expected} expected")));
    }
    Ok(keys)
}

/// A model's name as variables write it.
fn plain(name: &str) -> String {
    name.chars().map(|c| if c.is_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect()
}

fn top_level(schema: &Value) -> Vec<&str> {
    let properties = schema.get("properties").and_then(Value::as_object);
    properties.into_iter().flat_map(Map::keys).map(String::as_str).collect()
}

/// Whether `TERNION_<rest>` is a top-level key that is no table.
fn is_top_level_value(rest: &str, schema: &Value) -> bool {
    let key = rest.to_ascii_lowercase();
    schema["properties"].get(&key).is_some_and(|described| !parse::is_table(described, schema))
}

/// Refuses a variable that spells a known key with single underscores. All others without a double underscore belong to
/// somebody else: other parts of the host, or Kubernetes, which sets `TERNION_SERVICE_HOST`, `TERNION_PORT_80_TCP` and the
/// like for a service called `ternion`.
fn refuse_single_underscores(rest: &str, config: &Value, schema: &Value) -> Result<()> {
    if is_service_link(rest) {
        return Ok(());
    }
    let spelled = |path: &[&str]| {
        let written = path.iter().map(|key| plain(key)).collect::<Vec<_>>();
        (written.join("_") == rest).then(|| written.join("__"))
    };
    let models = config.get("models").and_then(Value::as_object);
    for path in parse::key_paths(schema, schema) {
        let keys: Vec<&str> = path.iter().map(String::as_str).collect();
        let meant = match keys[..] {
            ["models", "*", ref keys @ ..] => models
                .into_iter()
                .flat_map(Map::keys)
                .find_map(|model| spelled(&[&["models", model], keys].concat())),
            ref keys => spelled(keys),
        };
        if let Some(meant) = meant {
            return Err(Error::invalid_config(format!(
                "keys are joined by two underscores; did you mean `{PREFIX}{meant}`?"
            )));
        }
    }
    Ok(())
}

/// Whether this is a variable that Kubernetes sets for a service: `<NAME>_SERVICE_HOST`, `<NAME>_SERVICE_PORT`,
/// `<NAME>_SERVICE_PORT_<PORT>`, `<NAME>_PORT` and `<NAME>_PORT_<NUMBER>_<PROTOCOL>` with or without `_PROTO`, `_PORT` or
/// `_ADDR` (<https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables>).
fn is_service_link(rest: &str) -> bool {
    let name = format!("_{rest}");
    if ["_SERVICE_HOST", "_SERVICE_PORT", "_PORT"].iter().any(|end| name.ends_with(end))
        || name.contains("_SERVICE_PORT_")
    {
        return true;
    }
    let end = ["_PROTO", "_PORT", "_ADDR"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
    let Some((before, protocol)) = end.rsplit_once('_') else { return false };
    let number = before.rsplit_once("_PORT_").map(|(_, number)| number);
    ["TCP", "UDP", "SCTP"].contains(&protocol)
        && number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// Sets one value, making the tables on the way. A text stays a text where the schema wants one; elsewhere a value that
/// reads as JSON is what it reads as.
fn set(config: &mut Value, schema: &Value, keys: &[String], text: &str) {
    let mut place = config;
    let mut described = Some(schema);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Format;

    const FILE: &str =
        "default_model = \"my-model\"\n[models.my-model]\npath = \"x\"\n[models.b]\npath = \"y\"\n";

    fn with(file: &str, variables: &[(&str, &str)]) -> Result<Config> {
        let mut value = parse::to_value(file, Format::Toml)?;
        let variables = variables.iter().map(|(k, v)| ((*k).into(), (*v).into()));
        let overrides = apply(&mut value, variables)?;
        Config::from_value(value).map_err(|e| overrides.blame(e))
    }

    #[test]
    fn every_key_can_be_set() {
        let config = with(
            FILE,
            &[
                ("TERNION_DEFAULT_MODEL", "b"),
                ("TERNION_RELOAD__POLL_MS", "50"),
                ("TERNION_RELOAD__MODE", "unload_then_load"),
                ("TERNION_RELOAD__CHECK", "[\"One\"]"),
                ("TERNION_MODELS__MY_MODEL__LAYERS__TIMEOUT__TOTAL_MS", "7"),
                ("ternion_models__b__threads", "3"),
                ("TERNION_MODELS__B__FALLBACK", "[\"my-model\"]"),
                ("TERNION_MODELS__B__CONTEXT_POLICY__KIND", "sliding"),
            ],
        )
        .unwrap();
        assert_eq!(config.default_model.as_deref(), Some("b"));
        assert_eq!((config.reload.poll_ms, config.reload.check), (50, Some(vec!["One".to_owned()])));
        let timeout = config.models["my-model"].layers.timeout.as_ref().unwrap();
        assert_eq!(timeout.total_ms, Some(7));
        assert_eq!((config.models["b"].threads, config.models["b"].fallback.len()), (Some(3), 1));
        // Every key of the schema that is no model's can be reached, those of later versions too.
        let schema = Config::schema();
        for path in parse::key_paths(&schema, &schema) {
            let rest = path.join("__").replace('*', "my_model").to_ascii_uppercase();
            let value = parse::to_value(FILE, Format::Toml).unwrap();
            let expected = path.iter().map(|k| if k == "*" { "my-model" } else { k }).collect::<Vec<_>>();
            assert_eq!(place(&value, &rest, &schema).unwrap(), expected);
        }
    }

    #[test]
    fn what_is_near_a_key_is_refused() {
        for (variable, value, expected) in [
            ("TERNION_RELOAD__POLL_MS", "1", "reload.poll_ms: 1 is out of range"),
            ("TERNION_RELOAD__MODE", "later", "reload.mode"),
            ("TERNION_RELOAD__POL_MS", "50", "unknown key `reload.pol_ms`; did you mean `poll_ms`?"),
            ("TERNION_MODEL__B__THREADS", "2", "unknown key `model`; did you mean `models`?"),
            (
                "TERNION_LAYERS__METRICS",
                "true",
                "unknown key `layers`; known: default_model, max_tokens, models, reload",
            ),
            ("TERNION__MODELS__B__THREADS", "2", "unknown key `_models`; did you mean `models`?"),
            ("TERNION_MODELS__B__THREDS", "2", "unknown key `models.b.threds`; did you mean `threads`?"),
            ("TERNION_MODELS__B__THREADS", "nonsense", "models.b.threads"),
            ("ternion_models__b__threads", "nonsense", "models.b.threads"),
            ("TERNION_MODELS__B", "2", "TERNION_MODELS__<NAME>__<KEY> expected"),
            ("TERNION_MODELS__B__", "2", "TERNION_MODELS__<NAME>__<KEY> expected"),
            ("TERNION_MODELS__", "2", "TERNION_MODELS__<NAME>__<KEY> expected"),
            ("TERNION_MODELS_B_THREADS", "2", "did you mean `TERNION_MODELS__B__THREADS`?"),
            ("TERNION_MODELS_MY_MODEL_PATH", "z", "did you mean `TERNION_MODELS__MY_MODEL__PATH`?"),
            ("TERNION_MODELS_B_SAMPLING_TOP_K", "2", "did you mean `TERNION_MODELS__B__SAMPLING__TOP_K`?"),
            ("TERNION_RELOAD_POLL_MS", "50", "did you mean `TERNION_RELOAD__POLL_MS`?"),
        ] {
            let error = with(FILE, &[(variable, value)]).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains(variable), "{variable}: {error}");
        }
        let twice = [("TERNION_MODELS__B__THREADS", "2"), ("ternion_models__b__threads", "3")];
        let error = with(FILE, &twice).unwrap_err().to_string();
        assert!(error.contains("set the same key"), "{error}");
    }

    #[test]
    fn what_belongs_to_others_is_ignored() {
        for variable in [
            "TERNION_PORT",
            "TERNION_SERVICE_HOST",
            "TERNION_SERVICE_PORT",
            "TERNION_SERVICE_PORT_HTTP",
            "TERNION_PORT_80_TCP",
            "TERNION_PORT_80_TCP_PROTO",
            "TERNION_PORT_80_TCP_PORT",
            "TERNION_PORT_80_TCP_ADDR",
            "TERNION_MODELS_SERVICE_HOST",
            "TERNION_MODELS_PORT",
            "TERNION_MODELS_B_PORT_8080_UDP_ADDR",
            "TERNION_CONFIG_PORT",
            "TERNION_MODEL_PORT",
            "TERNION_MODEL",
            "TERNION_MODELS",
            "TERNION_MODELS_DIR",
            "TERNION_MODELS_OTHER_PATH",
            "TERNION_LOG",
            "TERNIONS_MODELS__B__THREADS",
        ] {
            assert!(with(FILE, &[(variable, "tcp://10.0.0.1:80")]).is_ok(), "{variable}");
        }
        assert!(with(FILE, &[("TERNION_MODEL__B__THREADS", "")]).is_ok(), "an empty value is none");
    }

    #[test]
    fn a_variable_stands_for_one_model() {
        let two = "[models.a-b]\nbackend = \"echo\"\n[models.A_b]\nbackend = \"echo\"\n";
        let error = with(two, &[("TERNION_MODELS__A_B__THREADS", "2")]).unwrap_err().to_string();
        assert!(error.contains("both models `A_b` and `a-b`"), "{error}");
        assert!(with(two, &[]).is_ok());

        let nested =
            "default_model = \"a\"\n[models.a]\nbackend = \"echo\"\n[models.a--b]\nbackend = \"echo\"\n";
        let config = with(nested, &[("TERNION_MODELS__A__B__THREADS", "2")]).unwrap();
        assert_eq!((config.models["a--b"].threads, config.models["a"].threads), (Some(2), None));
    }
}
