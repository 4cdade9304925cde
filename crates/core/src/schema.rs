//! JSON schemas of several types in one document.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

const PREFIX: &str = "#/$defs/";

/// Moves the definitions of `schema` into `all`, where one of another content may have the same name: it then gets a name with
/// `owner`, also where it is referred to.
pub(crate) fn merge_definitions(all: &mut Map<String, Value>, schema: &mut Value, owner: &str) {
    let Some(Value::Object(mut new)) = schema.as_object_mut().and_then(|schema| schema.remove("$defs"))
    else {
        return;
    };
    let mut names = BTreeMap::new();
    // A definition that refers to another by a new name differs, too.
    loop {
        let differs = |(name, definition): (&String, &Value)| {
            let is_other = all.get(name).is_some_and(|there| there != definition);
            (is_other && !names.contains_key(name)).then(|| name.clone())
        };
        let Some(name) = new.iter().find_map(differs) else { break };
        let own = format!("{owner}-{name}");
        for definition in new.values_mut().chain([&mut *schema]) {
            rename(definition, &format!("{PREFIX}{name}"), &format!("{PREFIX}{own}"));
        }
        names.insert(name, own);
    }
    all.extend(new.into_iter().map(|(name, definition)| (names.remove(&name).unwrap_or(name), definition)));
}

/// Replaces the references `from`.
fn rename(value: &mut Value, from: &str, to: &str) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                match value {
                    Value::String(text) if key == "$ref" && text == from => to.clone_into(text),
                    _ => rename(value, from, to),
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|value| rename(value, from, to)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn definitions_of_one_name_and_other_content_are_kept_apart() {
        let mut all =
            json!({"Kind": {"enum": ["a"]}, "Size": {"type": "integer"}, "Pair": {"$ref": "#/$defs/Kind"}});
        let mut schema = json!({
            "properties": {"kind": {"$ref": "#/$defs/Kind"}, "size": {"anyOf": [{"$ref": "#/$defs/Size"}]}},
            "$defs": {"Kind": {"enum": ["b"]}, "Size": {"type": "integer"}, "Pair": {"$ref": "#/$defs/Kind"}}
        });
        merge_definitions(all.as_object_mut().unwrap(), &mut schema, "second");
        let expected = json!({
            "Kind": {"enum": ["a"]}, "second-Kind": {"enum": ["b"]}, "Size": {"type": "integer"},
            "Pair": {"$ref": "#/$defs/Kind"}, "second-Pair": {"$ref": "#/$defs/second-Kind"}
        });
        assert_eq!(all, expected);
        let properties =
            json!({"kind": {"$ref": "#/$defs/second-Kind"}, "size": {"anyOf": [{"$ref": "#/$defs/Size"}]}});
        assert_eq!(schema, json!({ "properties": properties }));
    }
}
