//! Reading JSON files of checkpoints: size caps, and accessors whose errors name the file, the key, what was found and
//! what was expected.

use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::{Map, Value};
use ternion_core::file::bytes_without_bom;
use ternion_core::{Error, ErrorKind, Result};

/// Characters of a value that are repeated in a message.
const SHOWN: usize = 60;

/// Characters of another library's message that are repeated; it may hold a value of any length.
const SHOWN_CAUSE: usize = 160;

/// Longest name of a tensor or key of an [`Entries`].
const MAX_NAME: usize = 256;

/// Reads a whole JSON file of at most `cap` bytes, without a byte order mark.
pub(crate) fn read_capped(path: &Path, cap: u64) -> Result<Vec<u8>> {
    ternion_core::file::read_capped(path, cap, ErrorKind::InvalidModel).map(bytes_without_bom)
}

/// A JSON object of a file, such as `config.json`, or an object within it. Its accessors check types and ranges, and their
/// errors name the file, the key, what was found and what was expected.
#[derive(Debug, Clone)]
pub struct Object {
    file: PathBuf,
    prefix: String,
    map: Map<String, Value>,
}

impl Object {
    /// Reads `path`, which must hold a JSON object and have at most `cap` bytes.
    pub(crate) fn read(path: &Path, cap: u64) -> Result<Self> {
        let bytes = read_capped(path, cap)?;
        let value: Value = serde_json::from_slice(&bytes).map_err(|e| {
            Error::invalid_model("is not JSON").with("file", path.display()).with_source(cause(e))
        })?;
        match value {
            Value::Object(map) => Ok(Self { file: path.to_owned(), prefix: String::new(), map }),
            other => Err(Error::invalid_model(format!("found {}, expected a JSON object", show(&other)))
                .with("file", path.display())),
        }
    }

    /// The object of a file that does not exist.
    pub(crate) fn missing_file(path: &Path) -> Self {
        Self { file: path.to_owned(), prefix: String::new(), map: Map::new() }
    }

    /// Whether there is no key at all.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Whether `key` is there with the value null.
    pub(crate) fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// Whether both hold the same keys and values.
    pub(crate) fn same_as(&self, other: &Self) -> bool {
        self.map == other.map
    }

    /// The first key that begins with `prefix`.
    pub(crate) fn key_with_prefix(&self, prefix: &str) -> Option<String> {
        self.map.keys().find(|key| key.starts_with(prefix)).cloned()
    }

    /// The first key whose value is an object.
    pub(crate) fn key_of_object(&self) -> Option<&str> {
        self.map.iter().find(|(_, value)| value.is_object()).map(|(key, _)| key.as_str())
    }

    /// The value of `key`; null counts as absent, as it does in transformers.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// An error about `key`, with this file.
    pub fn invalid(&self, key: &str, found: &dyn fmt::Display, expected: &str) -> Error {
        Error::invalid_model(format!("`{}{key}` is {}, expected {expected}", self.prefix, cut(found, SHOWN)))
            .with("file", self.file.display())
    }

    /// As [`invalid`](Self::invalid), for what is well-formed but not implemented.
    pub fn unsupported(&self, key: &str, found: &dyn fmt::Display, known: &str) -> Error {
        let (prefix, found) = (&self.prefix, cut(found, SHOWN));
        Error::unsupported(format!("`{prefix}{key}` is {found}, which is not supported; supported: {known}"))
            .with("file", self.file.display())
    }

    fn missing(&self, key: &str, expected: &str) -> Error {
        Error::invalid_model(format!("`{}{key}` is missing, expected {expected}", self.prefix))
            .with("file", self.file.display())
    }

    /// An object below `key`.
    ///
    /// # Errors
    /// [`InvalidModel`](ErrorKind::InvalidModel) for any other value.
    pub fn object(&self, key: &str) -> Result<Option<Self>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self {
                file: self.file.clone(),
                prefix: format!("{}{key}.", self.prefix),
                map: map.clone(),
            })),
            Some(other) => Err(self.invalid(key, &show(other), "an object")),
        }
    }

    /// An integer within `range`, or `None` where there is none.
    ///
    /// # Errors
    /// [`InvalidModel`](ErrorKind::InvalidModel) for any other value.
    pub fn integer(&self, key: &str, range: RangeInclusive<u64>) -> Result<Option<usize>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if range.contains(&n) => Ok(Some(n as usize)),
            _ => Err(self.invalid(key, &show(value), &integers(&range))),
        }
    }

    /// An integer within `range` that must be there.
    ///
    /// # Errors
    /// [`InvalidModel`](ErrorKind::InvalidModel) where it is not, and for any other value.
    pub fn required_integer(&self, key: &str, range: RangeInclusive<u64>) -> Result<usize> {
        let expected = integers(&range);
        self.integer(key, range)?.ok_or_else(|| self.missing(key, &expected))
    }

    /// A number within `range` (in single precision), or `None` where there is none.
    ///
    /// # Errors
    /// [`InvalidModel`](ErrorKind::InvalidModel) for any other value.
    pub fn number(&self, key: &str, range: RangeInclusive<f32>) -> Result<Option<f32>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match value.as_f64().map(|x| x as f32) {
            Some(x) if range.contains(&x) => Ok(Some(x)),
            _ => {
                let expected = format!("a number from {:?} to {:?}", range.start(), range.end());
                Err(self.invalid(key, &show(value), &expected))
            }
        }
    }

    /// A string, or `None` where there is none.
    ///
    /// # Errors
    /// [`InvalidModel`](ErrorKind::InvalidModel) for any other value.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(self.invalid(key, &show(other), "a string")),
        }
    }

    /// A string that must be there.
    ///
    /// # Errors
    /// [`InvalidModel`](ErrorKind::InvalidModel) where it is not, and for any other value.
    pub fn required_string(&self, key: &str, expected: &str) -> Result<&str> {
        self.string(key)?.ok_or_else(|| self.missing(key, expected))
    }

    /// A boolean, or `None` where there is none.
    ///
    /// # Errors
    /// [`InvalidModel`](ErrorKind::InvalidModel) for any other value.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(other) => Err(self.invalid(key, &show(other), "true or false")),
        }
    }

    /// A list of strings; empty where there is none.
    ///
    /// # Errors
    /// [`InvalidModel`](ErrorKind::InvalidModel) for any other value.
    pub fn strings(&self, key: &str) -> Result<Vec<String>> {
        let Some(value) = self.value(key) else { return Ok(Vec::new()) };
        let list = value.as_array().and_then(|items| {
            items.iter().map(|item| item.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()
        });
        list.ok_or_else(|| self.invalid(key, &show(value), "a list of strings"))
    }

    /// A token id or a list of them; `None` where there is none. Negative ids stand for "no token" in some checkpoints.
    ///
    /// # Errors
    /// [`InvalidModel`](ErrorKind::InvalidModel) for any other value.
    pub fn token_ids(&self, key: &str) -> Result<Option<Vec<u32>>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let items = match value {
            Value::Array(items) => items.as_slice(),
            single => std::slice::from_ref(single),
        };
        let mut ids = Vec::new();
        for item in items {
            match item.as_i64() {
                Some(id) if id < 0 => {}
                Some(id) if u32::try_from(id).is_ok() => ids.push(id as u32),
                _ => return Err(self.invalid(key, &show(value), "a token id or a list of token ids")),
            }
        }
        Ok(Some(ids))
    }
}

/// A value as a message shows it: short, on one line.
pub(crate) fn show(value: &Value) -> String {
    cut(value, SHOWN)
}

/// What another library says is wrong, short and on one line, as the source of an error.
pub(crate) fn cause(error: impl fmt::Display) -> String {
    cut(&error, SHOWN_CAUSE)
}

/// A text as a message shows it: short, on one line.
pub(crate) fn shorten(text: &dyn fmt::Display) -> String {
    cut(text, SHOWN)
}

fn cut(text: &dyn fmt::Display, length: usize) -> String {
    let text = text.to_string();
    let mut shown: String = text.chars().take(length).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(length).is_some() {
        shown.push_str("...");
    }
    shown
}

fn integers(range: &RangeInclusive<u64>) -> String {
    format!("an integer from {} to {}", range.start(), range.end())
}

/// The entries of a JSON object in their order. Unlike maps, which keep the last of equal keys, it refuses a key that
/// occurs twice: two readers that disagree about such a file would load different models.
pub(crate) struct Entries<V>(pub(crate) Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Entries<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor<V>(PhantomData<V>);

        impl<'de, V: Deserialize<'de>> Visitor<'de> for EntriesVisitor<V> {
            type Value = Entries<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                let mut seen = HashSet::new();
                while let Some(key) = map.next_key::<String>()? {
                    if key.len() > MAX_NAME || key.contains(char::is_control) {
                        let (length, key) = (key.len(), cut(&key, SHOWN));
                        return Err(A::Error::custom(format_args!(
                            "the name `{key}` has {length} bytes, expected at most {MAX_NAME} and no control characters"
                        )));
                    }
                    if !seen.insert(key.clone()) {
                        return Err(A::Error::custom(format_args!(
                            "the key `{key}` occurs twice, expected once"
                        )));
                    }
                    entries.push((key, map.next_value()?));
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(EntriesVisitor(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(text: &str) -> Object {
        let Value::Object(map) = serde_json::from_str(text).unwrap() else { panic!("not an object") };
        Object { file: "config.json".into(), prefix: String::new(), map }
    }

    #[test]
    fn errors_name_file_key_found_and_expected() {
        let o =
            object(r#"{"a": {"layers": 0, "name": 3, "eps": "x"}, "n": null}"#).object("a").unwrap().unwrap();
        assert_eq!(
            o.integer("layers", 1..=9).unwrap_err().to_string(),
            "`a.layers` is 0, expected an integer from 1 to 9 (file: config.json)"
        );
        assert_eq!(
            o.required_integer("heads", 1..=9).unwrap_err().to_string(),
            "`a.heads` is missing, expected an integer from 1 to 9 (file: config.json)"
        );
        assert_eq!(
            o.string("name").unwrap_err().to_string(),
            "`a.name` is 3, expected a string (file: config.json)"
        );
        assert!(o.number("eps", 0.0..=1.0).unwrap_err().to_string().contains(r#"`a.eps` is "x""#));
    }

    #[test]
    fn fractions_and_huge_numbers_are_no_integers() {
        for text in [r#"{"x": 1.5}"#, r#"{"x": -1}"#, r#"{"x": 1e30}"#, r#"{"x": true}"#, r#"{"x": "7"}"#] {
            assert!(object(text).integer("x", 0..=u64::MAX).is_err(), "{text}");
        }
        assert_eq!(object(r#"{"x": null}"#).integer("x", 1..=2).unwrap(), None);
    }

    #[test]
    fn token_ids_may_be_one_or_many() {
        let ids = |text| object(text).token_ids("eos");
        assert_eq!(ids(r#"{"eos": 5}"#).unwrap(), Some(vec![5]));
        assert_eq!(ids(r#"{"eos": [5, 6]}"#).unwrap(), Some(vec![5, 6]));
        assert_eq!(ids(r#"{"eos": -1}"#).unwrap(), Some(vec![]));
        assert_eq!(ids("{}").unwrap(), None);
        assert!(ids(r#"{"eos": ["</s>"]}"#).is_err());
        assert!(ids(r#"{"eos": 4294967296}"#).is_err());
    }

    #[test]
    fn a_key_that_occurs_twice_is_refused() {
        let entries: Entries<u8> = serde_json::from_str(r#"{"b": 1, "a": 2}"#).unwrap();
        assert_eq!(entries.0, [("b".to_owned(), 1), ("a".to_owned(), 2)]);
        let Err(error) = serde_json::from_str::<Entries<u8>>(r#"{"a": 1, "a": 2}"#) else {
            panic!("accepted")
        };
        assert!(error.to_string().contains("`a` occurs twice"), "{error}");
    }

    #[test]
    fn names_are_short_lines() {
        for key in ["x".repeat(1000), "a\\nb".to_owned()] {
            let Err(error) = serde_json::from_str::<Entries<u8>>(&format!(r#"{{"{key}": 1}}"#)) else {
                panic!("accepted")
            };
            let line = error.to_string();
            assert!(
                line.contains("expected at most 256") && line.len() < 250 && !line.contains('\n'),
                "{line}"
            );
        }
    }

    #[test]
    fn long_values_are_cut_between_characters() {
        let shown = show(&Value::String("é".repeat(1000)));
        assert!(shown.ends_with("...") && shown.chars().count() == SHOWN + 3);
    }
}
