//! CPUs that threads stay on: `true`, `false`, or a list such as `0-7,16`.

use std::{borrow::Cow, fmt, str::FromStr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{Error, Result};

const EXPECTED: &str = "true, false or a list of CPUs such as \"0-7,16\" expected";

/// No system numbers its CPUs higher.
const MAX_CPU: usize = 8191;

/// Whether each computing thread of a model stays on a CPU of its own, and on which. In a configuration it is a boolean, or a text
/// that lists CPUs by number as `taskset` does: single ones and ranges, divided by commas.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum PinThreads {
    /// The system moves threads as it likes.
    #[default]
    No,
    /// Each on a physical core of its own, among those that the process may use.
    Cores,
    /// On these CPUs, in this order. None is named twice.
    Cpus(Vec<usize>),
}

impl PinThreads {
    /// Whether threads are not pinned.
    pub fn is_no(&self) -> bool {
        *self == Self::No
    }
}

impl FromStr for PinThreads {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.trim() {
            "true" => return Ok(Self::Cores),
            "false" => return Ok(Self::No),
            _ => {}
        }
        let refuse = || Error::invalid_config(format!("`{}`: {EXPECTED}", text.escape_debug()));
        let number = |text: &str| {
            let text = text.trim();
            let is_number = text.bytes().all(|b| b.is_ascii_digit());
            text.parse().ok().filter(|cpu| is_number && *cpu <= MAX_CPU).ok_or_else(refuse)
        };
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return Err(refuse());
            }
            for cpu in first..=last {
                if cpus.contains(&cpu) {
                    return Err(Error::invalid_config(format!("CPU {cpu} is listed twice")));
                }
                cpus.push(cpu);
            }
        }
        Ok(Self::Cpus(cpus))
    }
}

impl fmt::Display for PinThreads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Cpus(cpus) = self else {
            return write!(f, "{}", *self == Self::Cores);
        };
        for (i, range) in cpus.chunk_by(|a, b| a + 1 == *b).enumerate() {
            let comma = if i > 0 { "," } else { "" };
            match range {
                [first, .., last] => write!(f, "{comma}{first}-{last}")?,
                single => write!(f, "{comma}{}", single[0])?,
            }
        }
        Ok(())
    }
}

impl Serialize for PinThreads {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::No => serializer.serialize_bool(false),
            Self::Cores => serializer.serialize_bool(true),
            Self::Cpus(_) => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for PinThreads {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = PinThreads;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(EXPECTED)
            }

            fn visit_bool<E: de::Error>(self, pinned: bool) -> Result<PinThreads, E> {
                Ok(if pinned { PinThreads::Cores } else { PinThreads::No })
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<PinThreads, E> {
                text.parse().map_err(|e: Error| E::custom(e.message()))
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for PinThreads {
    fn schema_name() -> Cow<'static, str> {
        "PinThreads".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "Whether each computing thread stays on a physical core of its own; or the CPUs that they stay on.",
            "type": ["boolean", "string"],
            "pattern": r"^\s*([0-9]+\s*(-\s*[0-9]+\s*)?(,\s*[0-9]+\s*(-\s*[0-9]+\s*)?)*|true\s*|false\s*)$",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Format};

    #[test]
    fn lists_are_read_in_their_order_and_written_as_ranges() {
        for (text, cpus, written) in [
            ("0-3", &[0, 1, 2, 3][..], "0-3"),
            (" 8 , 0 - 1 ", &[8, 0, 1], "8,0-1"),
            ("5", &[5], "5"),
            ("2-2,4,5", &[2, 4, 5], "2,4-5"),
        ] {
            let pinned: PinThreads = text.parse().unwrap();
            assert_eq!((&pinned, pinned.to_string().as_str()), (&PinThreads::Cpus(cpus.to_vec()), written));
        }
        assert_eq!("true".parse::<PinThreads>().unwrap(), PinThreads::Cores);
        assert_eq!("false".parse::<PinThreads>().unwrap(), PinThreads::No);
    }

    #[test]
    fn nonsense_is_refused_with_what_is_expected() {
        for text in
            ["", ",", "0,", "3-1", "-1", "1-", "0-8192", "+1", "all", "0x3", "99999999999999999999", "٣"]
        {
            let error = text.parse::<PinThreads>().unwrap_err().to_string();
            assert!(error.contains("0-7,16"), "{text}: {error}");
        }
        let error = "0-3,2".parse::<PinThreads>().unwrap_err().to_string();
        assert!(error.contains("CPU 2 is listed twice"), "{error}");
    }

    #[test]
    fn a_configuration_takes_all_forms_and_gives_them_back() {
        let parse = |value: &str| {
            let text = format!("[models.m]\npin_threads = {value}\n");
            Config::from_str(&text, Format::Toml)
        };
        for (value, pinned) in [
            ("true", PinThreads::Cores),
            ("false", PinThreads::No),
            ("\"0,2\"", PinThreads::Cpus(vec![0, 2])),
        ] {
            let config = parse(value).unwrap();
            assert_eq!(config.models["m"].pin_threads, pinned);
            let again: Config = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
            assert_eq!(again, config);
        }
        for wrong in ["1", "1.5", "[0]", "\"many\""] {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(error.contains("models.m.pin_threads") && error.contains("0-7,16"), "{wrong}: {error}");
        }
    }
}
