//! The tokens that `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` name: which of them have a
//! role, and which are added to those of `tokenizer.json`.
//!
//! The rules are those of transformers 5. Version 4 differs where `special_tokens_map.json` has an
//! `additional_special_tokens` beside one in the configuration (it joins the two) and in the order of some ids.

use std::collections::{BTreeMap, HashSet};

use serde_json::{Map, Value};

use super::parts::wrong_type;
use crate::{Error, Result, ResultExt};

const CONFIG: &str = "tokenizer_config.json";

/// The roles that a special token may have, in the order in which they are added.
const ROLES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A token that is looked for in a text before the text is split.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct AddedToken {
    /// The text.
    pub content: String,
    /// Matches only between characters that are no letters or digits.
    pub single_word: bool,
    /// Takes the white space before it.
    pub lstrip: bool,
    /// Takes the white space behind it.
    pub rstrip: bool,
    /// Is looked for in the normalized text.
    pub normalized: bool,
    /// Has a meaning rather than a text. Untrusted text cannot become it.
    pub special: bool,
    /// Is left as it is where `tokenizer.json` has a token of this text; otherwise these flags replace those.
    pub keep_existing: bool,
    /// The id that its file states. It counts only where `tokenizer.json` gives this id to another added token: then
    /// this one is dropped. New tokens get the next free ids.
    pub stated_id: Option<u32>,
}

impl AddedToken {
    /// A special token of this text.
    pub fn special(content: impl Into<String>) -> Self {
        Self {
            content: content.into(),
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
            special: true,
            keep_existing: true,
            stated_id: None,
        }
    }

    /// The token that a file has as a string or as an object with flags. `special`: where the object does not say.
    fn read(key: &str, value: &Value, special: bool) -> Result<Self> {
        let Value::Object(fields) = value else {
            let text = value
                .as_str()
                .ok_or_else(|| wrong_type(key, value, "a string or an object with a string `content`"))?;
            return Ok(Self::special(text));
        };
        let Some(Value::String(content)) = fields.get("content") else {
            return Err(wrong_type(key, value, "a string or an object with a string `content`"));
        };
        let flag = |name: &str, default: bool| match fields.get(name) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(wrong_type(&format!("{key}.{name}"), other, "true or false")),
        };
        let special = flag("special", special)?;
        Ok(Self {
            single_word: flag("single_word", false)?,
            lstrip: flag("lstrip", false)?,
            rstrip: flag("rstrip", false)?,
            normalized: flag("normalized", !special)?,
            special,
            ..Self::special(content)
        })
    }
}

/// What the side files say of the tokens.
#[derive(Debug, Default)]
pub(super) struct NamedTokens {
    /// The texts of the tokens with a role.
    pub(super) roles: BTreeMap<String, String>,
    /// The tokens to add, in order.
    pub(super) added: Vec<AddedToken>,
}

/// A file of side facts.
type Facts = Map<String, Value>;

/// Joins `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`.
pub(super) fn named_tokens(
    config: &Facts,
    map: Option<&Facts>,
    added: Option<&Facts>,
) -> Result<NamedTokens> {
    let mut roles = Roles::default();
    roles.read_config(config).with("file", CONFIG)?;
    let mut listed = Vec::new();
    if let Some(list) = config.get("added_tokens_decoder").filter(|list| !list.is_null()) {
        listed = added_tokens_decoder(list).with("file", CONFIG)?;
    } else {
        // The older files count only where the configuration has no list.
        if let Some(map) = map {
            roles.read_map(map).with("file", "special_tokens_map.json")?;
        }
        if let Some(added) = added {
            listed = added_tokens(added, &roles).with("file", "added_tokens.json")?;
        }
    }
    for token in &mut listed {
        token.special |= roles.named.iter().any(|(_, named)| named.content == token.content);
    }
    let mut seen: HashSet<String> = listed.iter().map(|token| token.content.clone()).collect();
    let NamedTokens { roles: texts, mut added } = roles.finish();
    added.retain(|token| seen.insert(token.content.clone()));
    listed.append(&mut added);
    Ok(NamedTokens { roles: texts, added: listed })
}

/// `added_tokens_decoder`: objects by their ids.
fn added_tokens_decoder(list: &Value) -> Result<Vec<AddedToken>> {
    let key = "added_tokens_decoder";
    let Value::Object(list) = list else { return Err(wrong_type(key, list, "an object of ids and tokens")) };
    let mut tokens = Vec::new();
    for (id, value) in list {
        let number: u32 = id
            .parse()
            .map_err(|_| Error::invalid_model(format!("`{key}` has the key `{id}`, expected a token id")))?;
        if !value.is_object() {
            return Err(wrong_type(&format!("{key}.{id}"), value, "an object with a string `content`"));
        }
        let token = AddedToken::read(&format!("{key}.{id}"), value, false)?;
        tokens.push((number, AddedToken { keep_existing: false, ..token }));
    }
    tokens.sort_by_key(|(id, _)| *id);
    Ok(tokens.into_iter().map(|(_, token)| token).collect())
}

/// `added_tokens.json`: ids by texts.
fn added_tokens(file: &Facts, roles: &Roles) -> Result<Vec<AddedToken>> {
    let mut tokens = Vec::new();
    for (content, value) in file {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        let id = id.ok_or_else(|| wrong_type(content, value, "a token id"))?;
        let special = roles.all().any(|token| token.content == *content);
        tokens.push(AddedToken {
            normalized: !special,
            special,
            keep_existing: false,
            stated_id: Some(id),
            ..AddedToken::special(content)
        });
    }
    tokens.sort_by_key(|token| token.stated_id);
    Ok(tokens)
}

/// The tokens with a role, by the names of the roles, and those without.
#[derive(Default)]
struct Roles {
    named: Vec<(String, AddedToken)>,
    extra: Vec<AddedToken>,
}

impl Roles {
    fn set(&mut self, role: &str, token: AddedToken) {
        match self.named.iter_mut().find(|(name, _)| name == role) {
            Some((_, old)) => *old = token,
            None => self.named.push((role.to_owned(), token)),
        }
    }

    fn all(&self) -> impl Iterator<Item = &AddedToken> {
        self.named.iter().map(|(_, token)| token).chain(&self.extra)
    }

    fn read_config(&mut self, config: &Facts) -> Result<()> {
        for role in ROLES {
            if let Some(value) = stated(config, role) {
                self.set(role, AddedToken::read(role, value, false)?);
            }
        }
        // Roles of a model's own: `image_token` and the like.
        for (role, value) in config {
            let is_token = value.is_string() || value.get("content").is_some_and(Value::is_string);
            if role.ends_with("_token") && !ROLES.contains(&role.as_str()) && is_token {
                self.set(role, AddedToken::read(role, value, false)?);
            }
        }
        let extra = |key| stated(config, key).filter(|value| !is_empty(value)).map(|value| (key, value));
        if let Some((key, value)) =
            extra("extra_special_tokens").or_else(|| extra("additional_special_tokens"))
        {
            self.read_extra(key, value, false)?;
        }
        Ok(())
    }

    fn read_map(&mut self, map: &Facts) -> Result<()> {
        for role in ROLES {
            if let Some(value) = stated(map, role) {
                self.set(role, AddedToken::read(role, value, true)?);
            }
        }
        if let Some(value) = stated(map, "extra_special_tokens") {
            self.read_extra("extra_special_tokens", value, true)?;
        } else if let Some(value) = stated(map, "additional_special_tokens").filter(|_| self.extra.is_empty())
        {
            self.read_extra("additional_special_tokens", value, true)?;
        }
        Ok(())
    }

    /// Tokens without a role as a list, or with roles of the model's own as an object.
    fn read_extra(&mut self, key: &str, value: &Value, special: bool) -> Result<()> {
        match value {
            Value::Array(list) => {
                for value in list {
                    let token = AddedToken::read(key, value, special)?;
                    if self.extra.iter().all(|known| known.content != token.content) {
                        self.extra.push(token);
                    }
                }
            }
            Value::Object(roles) => {
                for (role, value) in roles {
                    self.set(role, AddedToken::read(role, value, special)?);
                }
            }
            other => {
                return Err(wrong_type(key, other, "a list of tokens, or an object of names and tokens"));
            }
        }
        Ok(())
    }

    fn finish(mut self) -> NamedTokens {
        let rank = |role: &str| ROLES.iter().position(|known| *known == role).unwrap_or(ROLES.len());
        self.named.sort_by_key(|(role, _)| rank(role));
        let roles = self.named.iter().map(|(role, token)| (role.clone(), token.content.clone())).collect();
        let named = self.named.into_iter().map(|(_, token)| AddedToken { special: true, ..token });
        NamedTokens { roles, added: named.chain(self.extra).collect() }
    }
}

fn stated<'a>(facts: &'a Facts, key: &str) -> Option<&'a Value> {
    facts.get(key).filter(|value| !value.is_null())
}

fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(Map::is_empty)
}
