//! A value of JSON in which no table has a key twice; TOML and YAML refuse that themselves.
//!
//! `serde_json::Value` takes the last of two entries of one name: with two models of one name, the host would get
//! whichever stands further down and never hear of the other.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Number, Value};

/// A value as it stands in the text; reading it fails where a key comes twice.
pub(super) struct Unique(pub(super) Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Values).map(Self)
    }
}

struct Values;

impl<'de> Visitor<'de> for Values {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        // What is not finite becomes null, as in `serde_json::Value`, and is refused with its place later on.
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Unique(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(A::Error::custom(format_args!("the key `{key}` stands twice")));
            }
            let Unique(value) = entries.next_value()?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, Format};

    #[test]
    fn two_models_of_one_name_are_refused_in_every_format() {
        for (text, format) in [
            ("[models.m]\nbackend = \"echo\"\n[models.m]\nbackend = \"candle\"\n", Format::Toml),
            (r#"{"models": {"m": {"backend": "echo"}, "x": {}, "m": {"backend": "candle"}}}"#, Format::Json),
            ("models:\n  m:\n    backend: echo\n  m:\n    backend: candle\n", Format::Yaml),
        ] {
            let error = Config::from_str(text, format).unwrap_err().to_string();
            let twice = ["duplicate key", "the key `m` stands twice", "duplicate mapping key: m"];
            assert!(twice.iter().any(|text| error.contains(text)), "{format:?}: {error}");
            assert!(error.contains("line"), "{format:?}: {error}");
        }
    }

    #[test]
    fn a_key_that_stands_twice_deep_inside_is_refused_as_well() {
        let text = r#"{"models": {"m": {"sampling": {"seed": 1, "seed": 2}}}}"#;
        let error = Config::from_str(text, Format::Json).unwrap_err().to_string();
        assert!(error.contains("the key `seed` stands twice at line 1 column"), "{error}");
    }
}
