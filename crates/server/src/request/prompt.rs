//! The prompts of a completion request: a text, a list of texts, a list of token ids, or a list of such lists.

use std::{borrow::Cow, fmt};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer,
    de::{self, SeqAccess, Visitor},
};

/// The field `prompt`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Prompts {
    Texts(Vec<String>),
    Tokens(Vec<Vec<u32>>),
}

const EXPECTED: &str = "a text, a list of texts, a list of token ids or a list of such lists";

/// An element of the list.
enum Item {
    Text(String),
    Id(u32),
    Ids(Vec<u32>),
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ItemVisitor;

        impl<'de> Visitor<'de> for ItemVisitor {
            type Value = Item;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text, a token id or a list of token ids")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Item, E> {
                Ok(Item::Text(text.to_owned()))
            }

            fn visit_u64<E: de::Error>(self, id: u64) -> Result<Item, E> {
                u32::try_from(id)
                    .map(Item::Id)
                    .map_err(|_| E::invalid_value(de::Unexpected::Unsigned(id), &self))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, ids: A) -> Result<Item, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(ids)).map(Item::Ids)
            }
        }

        deserializer.deserialize_any(ItemVisitor)
    }
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PromptsVisitor;

        impl<'de> Visitor<'de> for PromptsVisitor {
            type Value = Prompts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(EXPECTED)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Prompts, E> {
                Ok(Prompts::Texts(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Prompts, A::Error> {
                let mixed = || de::Error::custom(format_args!("the list is mixed; {EXPECTED} expected"));
                let (mut texts, mut ids, mut lists) = (Vec::new(), Vec::new(), Vec::new());
                while let Some(item) = items.next_element()? {
                    match item {
                        Item::Text(text) => texts.push(text),
                        Item::Id(id) => ids.push(id),
                        Item::Ids(list) => lists.push(list),
                    }
                    let kinds = [texts.is_empty(), ids.is_empty(), lists.is_empty()];
                    if kinds.iter().filter(|is_empty| !**is_empty).count() > 1 {
                        return Err(mixed());
                    }
                }
                if !ids.is_empty() {
                    lists.push(ids);
                }
                Ok(if lists.is_empty() { Prompts::Texts(texts) } else { Prompts::Tokens(lists) })
            }
        }

        deserializer.deserialize_any(PromptsVisitor)
    }
}

impl JsonSchema for Prompts {
    fn schema_name() -> Cow<'static, str> {
        "Prompts".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let ids = serde_json::json!({ "type": "array", "items": { "type": "integer", "minimum": 0 }, "minItems": 1 });
        json_schema!({
            "anyOf": [
                { "type": "string", "minLength": 1 },
                { "type": "array", "items": { "type": "string", "minLength": 1 }, "minItems": 1 },
                ids,
                { "type": "array", "items": ids, "minItems": 1 },
            ],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Prompts, String> {
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn all_four_forms_are_read() {
        assert_eq!(read(r#""a""#), Ok(Prompts::Texts(vec!["a".into()])));
        assert_eq!(read(r#"["a", "b"]"#), Ok(Prompts::Texts(vec!["a".into(), "b".into()])));
        assert_eq!(read("[1, 2]"), Ok(Prompts::Tokens(vec![vec![1, 2]])));
        assert_eq!(read("[[1, 2], [3]]"), Ok(Prompts::Tokens(vec![vec![1, 2], vec![3]])));
        assert_eq!(read("[]"), Ok(Prompts::Texts(vec![])));
    }

    #[test]
    fn mixed_and_wrong_lists_are_refused() {
        assert!(read(r#"["a", 1]"#).unwrap_err().contains("the list is mixed"));
        assert!(read("[-1]").unwrap_err().contains("integer `-1`"));
        assert!(read("[4294967296]").unwrap_err().contains("4294967296"));
        assert!(read("{}").unwrap_err().contains(EXPECTED));
        assert!(read("[[[1]]]").unwrap_err().contains("sequence"));
    }
}
