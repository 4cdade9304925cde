//! The filters of Jinja2 for texts.

use std::{borrow::Cow, sync::LazyLock};

use minijinja::{State, Value};
use regex::Regex;

use super::{
    Result,
    args::{Args, flag, given},
    fail,
    filters::Callable,
    ops::{Num, add, int_arg, repeat},
    percent,
    strings::{self, capitalize, join_texts, replace, split_lines, strip},
    text::{self, charge_text, escape, str_of, to_json},
    unicode::is_word,
    value::{Dict, Type, charge_bytes, items, iterate, tuple},
};

pub(super) const TEXT_FILTERS: &[(&str, Callable)] = &[
    ("capitalize", |state, args| changed(state, args, "capitalize", capitalize)),
    ("center", center),
    ("e", escaped),
    ("escape", escaped),
    ("filesizeformat", file_size),
    ("forceescape", force_escape),
    ("format", format),
    ("indent", indent),
    ("join", join),
    ("lower", |state, args| changed(state, args, "lower", str::to_lowercase)),
    ("pprint", pprint),
    ("replace", replaced),
    ("safe", safe),
    ("string", string),
    ("striptags", strip_tags),
    ("title", |state, args| changed(state, args, "title", title)),
    ("tojson", to_json),
    ("trim", trim),
    ("truncate", truncate),
    ("upper", |state, args| changed(state, args, "upper", str::to_uppercase)),
    ("urlencode", url_encode),
    ("wordcount", word_count),
    ("xmlattr", xml_attributes),
];

/// A text that is safe if its source is.
fn like(source: &Value, text: String) -> Value {
    if source.is_safe() { Value::from_safe_string(text) } else { text.into() }
}

fn changed(
    state: &mut State<'_, '_>,
    args: Args,
    name: &str,
    change: impl Fn(&str) -> String,
) -> Result<Value> {
    let [value] = args.bind(name, ["s"], 1)?;
    let value = value.unwrap_or_default();
    let text = str_of(state, &value)?;
    charge_text(state, &text)?;
    Ok(like(&value, change(&text)))
}

/// The filter `title`, unlike the method: words begin behind white space and opening brackets only.
fn title(text: &str) -> String {
    let is_separator = |c: char| matches!(c, '-' | '(' | '{' | '[' | '<') || super::unicode::is_space(c);
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while !rest.is_empty() {
        let (word, after) = rest.split_at(rest.find(is_separator).unwrap_or(rest.len()));
        if let Some(first) = word.chars().next() {
            result.extend(first.to_uppercase());
            result.push_str(&word[first.len_utf8()..].to_lowercase());
        }
        let (separators, after) = after.split_at(after.find(|c| !is_separator(c)).unwrap_or(after.len()));
        result.push_str(separators);
        rest = after;
    }
    result
}

fn center(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value, width] = args.bind("center", ["value", "width"], 1)?;
    let text = str_of(state, value.as_ref().unwrap_or(&Value::UNDEFINED))?.into_owned();
    let args = Args { positional: vec![width.unwrap_or_else(|| 80.into())], named: Vec::new() };
    strings::call(state, &text.into(), "center", args)
}

fn escaped(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value] = args.bind("escape", [""], 1)?;
    let value = value.unwrap_or_default();
    if value.is_safe() {
        return Ok(value);
    }
    escape_all(state, &value)
}

fn escape_all(state: &mut State<'_, '_>, value: &Value) -> Result<Value> {
    let text = str_of(state, value)?;
    charge_bytes(state, text.len() * 5)?;
    Ok(Value::from_safe_string(escape(&text)))
}

fn force_escape(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value] = args.bind("forceescape", ["value"], 1)?;
    escape_all(state, &value.unwrap_or_default())
}

fn file_size(_: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value, binary] = args.bind("filesizeformat", ["value", "binary"], 1)?;
    let value = value.unwrap_or_default();
    let bytes = match value.as_str() {
        Some(text) => strip(text, None, true, true).parse().ok(),
        None => Num::of(&value).map(Num::to_f64),
    };
    let bytes: f64 = bytes.ok_or_else(|| fail("filesizeformat: expected a number"))?;
    let binary = flag(binary.as_ref());
    let base: f64 = if binary { 1024.0 } else { 1000.0 };
    if bytes == 1.0 {
        return Ok("1 Byte".into());
    }
    if bytes < base {
        return Ok(format!("{} Bytes", percent::float_to_int(bytes)?).into());
    }
    if bytes.is_nan() {
        return Ok("nan YB".into());
    }
    let mut unit = base;
    let mut prefix = 'k';
    for next in ['k', 'M', 'G', 'T', 'P', 'E', 'Z', 'Y'] {
        (unit, prefix) = (unit * base, next);
        if bytes < unit {
            break;
        }
    }
    let prefix = if binary && prefix == 'k' { 'K' } else { prefix };
    let number = base * bytes / unit;
    let number = if number.is_finite() { format!("{number:.1}") } else { text::float(number) };
    Ok(format!("{number} {prefix}{}", if binary { "iB" } else { "B" }).into())
}

fn format(state: &mut State<'_, '_>, mut args: Args) -> Result<Value> {
    if args.positional.is_empty() {
        return Err(fail("format: the text is missing"));
    }
    let template = args.positional.remove(0);
    let template = match template.as_str() {
        Some(_) => template,
        None => str_of(state, &template)?.into_owned().into(),
    };
    let values = match (args.positional.is_empty(), args.named.is_empty()) {
        (false, false) => return Err(fail("format: has positional and keyword arguments at once")),
        (_, true) => tuple(state, args.positional)?,
        (true, false) => {
            let pairs = args.named.into_iter().map(|(name, value)| (Value::from(name), value));
            Dict::value(state, pairs)?
        }
    };
    percent::format(state, &template, &values)
}

fn indent(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value, width, first, blank] = args.bind("indent", ["s", "width", "first", "blank"], 1)?;
    let value = value.unwrap_or_default();
    let text = value.as_str().ok_or_else(|| fail("indent: expected a string"))?;
    let indention = match width.as_ref() {
        Some(width) if width.as_str().is_some() => width.as_str().unwrap_or_default().to_owned(),
        Some(width) => repeat(state, " ", usize::try_from(int_arg(width)?).unwrap_or(0))?,
        None => "    ".to_owned(),
    };
    let text = format!("{text}\n");
    let lines = split_lines(&text, false);
    charge_bytes(state, text.len().saturating_add(lines.len().saturating_mul(indention.len())))?;
    let blank = flag(blank.as_ref());
    let mut result = if flag(first.as_ref()) { indention.clone() } else { String::new() };
    for (at, line) in lines.into_iter().enumerate() {
        if at > 0 {
            result.push('\n');
            if blank || !line.is_empty() {
                result.push_str(&indention);
            }
        }
        result.push_str(line);
    }
    Ok(like(&value, result))
}

fn join(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value, separator, attribute] = args.bind("join", ["value", "d", "attribute"], 1)?;
    let separator = separator.unwrap_or_else(|| "".into());
    let mut values = iterate(state, &value.unwrap_or_default())?;
    if let Some(attribute) = given(attribute) {
        let args = Args { positional: Vec::new(), named: vec![("attribute".to_owned(), attribute)] };
        let map = super::find_filter("map")?;
        let list = super::value::list(state, values)?;
        let mapped = map(state, args.with_first(list))?;
        values = iterate(state, &mapped)?;
    }
    let separator = str_of(state, &separator)?.into_owned();
    let texts = values.iter().map(|value| str_of(state, value)).collect::<Result<Vec<_>>>()?;
    join_texts(state, &separator, &texts).map(Value::from)
}

/// `pprint` of values that fit into one line; longer ones would be broken into several.
fn pprint(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value] = args.bind("pprint", ["value"], 1)?;
    let value = sorted_keys(state, &value.unwrap_or_default())?;
    let text = text::repr(state, &value)?;
    let is_nested = matches!(Type::of(&value), Type::List | Type::Tuple | Type::Dict | Type::Str);
    if is_nested && text.chars().count() > 80 {
        return Err(minijinja::Error::new(
            minijinja::ErrorKind::UnknownFilter,
            "filter pprint of more than 80 characters is not supported",
        ));
    }
    Ok(text.into())
}

/// The same value with the keys of all dicts sorted, as `pprint` prints them.
fn sorted_keys(state: &State, value: &Value) -> Result<Value> {
    match Type::of(value) {
        kind @ (Type::List | Type::Tuple) => {
            let items = items(value).iter().map(|item| sorted_keys(state, item)).collect::<Result<_>>()?;
            super::value::sequence(state, items, kind == Type::Tuple)
        }
        Type::Dict => {
            let Some(dict) = value.downcast_object_ref::<Dict>() else { return Ok(value.clone()) };
            let mut pairs = Vec::new();
            for (key, value) in dict.pairs() {
                pairs.push((key.clone(), sorted_keys(state, value)?));
            }
            // Keys that Python cannot compare are ordered by their type.
            let pairs = super::ops::merge_sort(pairs, &mut |a, b| {
                let by_type = || format!("{:?}", Type::of(&a.0)) < format!("{:?}", Type::of(&b.0));
                Ok(super::ops::ordered(state, "<", &a.0, &b.0).unwrap_or_else(|_| by_type()))
            })?;
            Dict::value(state, pairs)
        }
        _ => Ok(value.clone()),
    }
}

fn replaced(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value, old, new, count] = args.bind("replace", ["s", "old", "new", "count"], 3)?;
    let [value, old, new] = [value, old, new].map(Option::unwrap_or_default);
    let count = given(count).map_or(Ok(-1), |count| int_arg(&count))?;
    let (old, new) = (str_of(state, &old)?, str_of(state, &new)?);
    replace(state, &str_of(state, &value)?, &old, &new, count).map(Value::from)
}

fn safe(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value] = args.bind("safe", ["value"], 1)?;
    Ok(Value::from_safe_string(str_of(state, &value.unwrap_or_default())?.into_owned()))
}

fn string(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value] = args.bind("string", [""], 1)?;
    let value = value.unwrap_or_default();
    match value.as_str() {
        Some(_) => Ok(value),
        None => Ok(str_of(state, &value)?.into_owned().into()),
    }
}

fn strip_tags(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value] = args.bind("striptags", ["value"], 1)?;
    let value = value.unwrap_or_default();
    let mut text = str_of(state, &value)?.into_owned();
    charge_text(state, &text)?;
    for (open, close) in [("<!--", "-->"), ("<", ">")] {
        let mut result = String::with_capacity(text.len());
        let mut rest = text.as_str();
        while let Some(start) = rest.find(open)
            && let Some(end) = rest[start..].find(close)
        {
            result.push_str(&rest[..start]);
            rest = &rest[start + end + close.len()..];
        }
        result.push_str(rest);
        text = result;
    }
    let words: Vec<_> = text.split(super::unicode::is_space).filter(|word| !word.is_empty()).collect();
    Ok(unescape(&words.join(" ")).into())
}

/// The entities that [`escape`] writes and the usual names, as characters.
fn unescape(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        result.push_str(&rest[..at]);
        rest = &rest[at..];
        let end = rest.find(';').unwrap_or(0);
        let entity = &rest[1.min(end)..end];
        let c = match entity {
            "amp" => Some('&'),
            "lt" => Some('<'),
            "gt" => Some('>'),
            "quot" => Some('"'),
            "apos" => Some('\''),
            "nbsp" => Some('\u{a0}'),
            _ => entity.strip_prefix('#').and_then(|code| {
                let code = match code.strip_prefix(['x', 'X']) {
                    Some(hex) => u32::from_str_radix(hex, 16),
                    None => code.parse(),
                };
                code.ok().and_then(char::from_u32)
            }),
        };
        if let Some(c) = c {
            result.push(c);
            rest = &rest[end + 1..];
        } else {
            result.push('&');
            rest = &rest[1..];
        }
    }
    result + rest
}

fn trim(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value, chars] = args.bind("trim", ["value", "chars"], 1)?;
    let value = value.unwrap_or_default();
    let text = str_of(state, &value)?;
    let chars = given(chars);
    let chars = chars.as_ref().map(|chars| strings::string(Some(chars))).transpose()?;
    Ok(like(&value, strip(&text, chars, true, true).to_owned()))
}

fn truncate(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let names = ["s", "length", "killwords", "end", "leeway"];
    let [value, length, kill, end, leeway] = args.bind("truncate", names, 1)?;
    let value = value.unwrap_or_default();
    let length = length.map_or(Ok(255), |length| int_arg(&length))?;
    let end = end.unwrap_or_else(|| "...".into());
    let end = strings::string(Some(&end))?;
    let leeway = given(leeway).map_or(Ok(5), |leeway| int_arg(&leeway))?;
    let keep = length.saturating_sub(end.chars().count() as i128);
    if keep < 0 || leeway < 0 {
        return Err(fail("truncate: the length or leeway is too small"));
    }
    let count = super::ops::length(&value)? as i128;
    if count <= length.saturating_add(leeway) {
        return Ok(value);
    }
    let text = value.as_str().ok_or_else(|| fail("truncate: expected a string"))?;
    charge_text(state, text)?;
    let start: String = text.chars().take(keep as usize).collect();
    let start =
        if flag(kill.as_ref()) { &*start } else { start.rsplit_once(' ').map_or(&*start, |(a, _)| a) };
    add(state, &like(&value, start.to_owned()), &end.into())
}

fn url_encode(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value] = args.bind("urlencode", ["value"], 1)?;
    let value = value.unwrap_or_default();
    let is_single = value.as_str().is_some() || !super::methods::is_iterable(&value);
    if is_single {
        return quote(state, &value, true).map(Value::from);
    }
    let pairs = if let Some(dict) = value.downcast_object_ref::<Dict>() {
        dict.pairs().cloned().collect()
    } else {
        let pair = |item: Value| match &iterate(state, &item)?[..] {
            [key, value] => Ok((key.clone(), value.clone())),
            _ => Err(fail("urlencode: expected pairs")),
        };
        iterate(state, &value)?.into_iter().map(pair).collect::<Result<Vec<_>>>()?
    };
    let mut parts = Vec::new();
    for (key, value) in pairs {
        parts.push(quote(state, &key, false)? + "=" + &quote(state, &value, false)?);
    }
    Ok(parts.join("&").into())
}

/// Percent encoding for a path, or for a query, where a space becomes a plus.
fn quote(state: &State, value: &Value, path: bool) -> Result<String> {
    let text = str_of(state, value)?;
    charge_bytes(state, text.len() * 3)?;
    let mut result = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => result.push(byte as char),
            b'/' if path => result.push('/'),
            b' ' if !path => result.push('+'),
            byte => result.push_str(&format!("%{byte:02X}")),
        }
    }
    Ok(result)
}

fn word_count(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value] = args.bind("wordcount", ["s"], 1)?;
    let value = value.unwrap_or_default();
    let text = str_of(state, &value)?;
    charge_text(state, &text)?;
    Ok(text.split(|c| !is_word(c)).filter(|word| !word.is_empty()).count().into())
}

fn xml_attributes(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    static FORBIDDEN: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"[ \t\n\r\x0B\x0C/>=]").expect("the expression is a constant"));
    let [value, space] = args.bind("xmlattr", ["d", "autospace"], 1)?;
    let value = value.unwrap_or_default();
    let dict = value.downcast_object_ref::<Dict>().ok_or_else(|| fail("xmlattr: expected a dict"))?;
    let mut result = Vec::new();
    for (key, value) in dict.pairs() {
        if value.is_none() || value.is_undefined() {
            continue;
        }
        let name = strings::string(Some(key))?;
        if FORBIDDEN.is_match(name) {
            return Err(fail(format!("xmlattr: `{name}` is no name of an attribute")));
        }
        let text: Cow<'_, str> = str_of(state, value)?;
        let text = if value.is_safe() { text } else { escape(&text).into() };
        charge_bytes(state, text.len())?;
        result.push(format!("{}=\"{text}\"", escape(name)));
    }
    let result = result.join(" ");
    let needs_space = space.is_none_or(|space| space.is_true()) && !result.is_empty();
    Ok(if needs_space { format!(" {result}") } else { result }.into())
}
