//! Numbers of bytes as people write them: `400MB`, `1.5 GiB`, `419430400`.

use std::{borrow::Cow, fmt, str::FromStr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{Error, Result};

const EXPECTED: &str = "a number of bytes such as 400MB, 1.5GiB or 419430400 expected";

/// A number of bytes. In a configuration it is a whole number, or a text of a number and a unit: B, KB, MB, GB, TB (powers
/// of 1000) or KiB, MiB, GiB, TiB (powers of 1024), in capital or small letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = || Error::invalid_config(format!("`{}` is no size; {EXPECTED}", text.escape_debug()));
        let trimmed = text.trim();
        // The crate takes single letters too, of which nobody knows whether they mean 1000 or 1024.
        let unit = trimmed.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').trim_start();
        let known = ["", "b", "kb", "mb", "gb", "tb", "kib", "mib", "gib", "tib"];
        if !known.contains(&unit.to_ascii_lowercase().as_str()) {
            return Err(refuse());
        }
        let size = bytesize::ByteSize::from_str(trimmed).map_err(|_| refuse())?;
        if size.as_u64() == u64::MAX { Err(refuse()) } else { Ok(Self(size.as_u64())) }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        bytesize::ByteSize(self.0).display().si().fmt(f)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(EXPECTED)
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(bytes))
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<ByteSize, E> {
                u64::try_from(bytes)
                    .map(ByteSize)
                    .map_err(|_| E::custom(format!("{bytes} is no size; {EXPECTED}")))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(|e: Error| E::custom(e.message()))
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for ByteSize {
    fn schema_name() -> Cow<'static, str> {
        "ByteSize".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A number of bytes, alone or with a unit: B, KB, MB, GB, TB, KiB, MiB, GiB, TiB.",
            "type": ["string", "integer"],
            "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*([KkMmGgTt]?[Ii]?[Bb])?\s*$",
            "minimum": 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Format};

    #[test]
    fn sizes_are_read_with_their_units() {
        for (text, bytes) in [
            ("400MB", 400_000_000),
            ("400 mb", 400_000_000),
            (" 1.5GiB ", 3 << 29),
            ("700MiB", 700 << 20),
            ("512 KiB", 512 << 10),
            ("2gb", 2_000_000_000),
            ("12345", 12345),
            ("7B", 7),
        ] {
            assert_eq!(text.parse::<ByteSize>().unwrap(), ByteSize(bytes), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_with_what_is_expected() {
        for text in [
            "",
            "MB",
            "lots",
            "-5MB",
            "4M",
            "4k",
            "1e9",
            "400MBit",
            "0x10",
            "1..5GB",
            "nan",
            "inf",
            "5 5MB",
            "99999999999999999999GB",
            "400MB!",
            "٤MB",
        ] {
            let error = text.parse::<ByteSize>().unwrap_err().to_string();
            assert!(error.contains("no size") && error.contains("400MB"), "{text}: {error}");
        }
    }

    #[test]
    fn a_configuration_takes_a_limit_in_both_forms_and_names_the_key_of_a_wrong_one() {
        let limit = |value: &str| {
            let text = format!("[models.m]\nmemory_limit = {value}\n");
            Config::from_str(&text, Format::Toml).map(|c| c.models["m"].memory_limit)
        };
        assert_eq!(limit("\"400MB\"").unwrap(), Some(ByteSize(400_000_000)));
        assert_eq!(limit("400000000").unwrap(), Some(ByteSize(400_000_000)));
        for wrong in ["\"much\"", "-1", "1.5", "true", "[]"] {
            let error = limit(wrong).unwrap_err().to_string();
            assert!(error.contains("models.m.memory_limit") && error.contains("bytes"), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_size_is_shown_in_powers_of_1000() {
        assert_eq!(ByteSize(400_000_000).to_string(), "400.0 MB");
    }
}
