//! The methods of Python's `str`.

use minijinja::{State, Value};

use super::{
    Result,
    args::{Args, flag, given},
    fail,
    ops::{int_arg, repeat},
    text::{charge_text, escape},
    unicode::{self, is_space},
    value::{Dict, Type, charge_bytes, charge_items, iterate, list, tuple},
};

const METHODS: [&str; 44] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "upper",
];
const MORE_METHODS: [&str; 1] = ["zfill"];

pub(super) fn exists(name: &str) -> bool {
    METHODS.contains(&name) || MORE_METHODS.contains(&name)
}

/// `receiver.name(arguments)`, for all methods but `format`.
pub(super) fn call(state: &mut State<'_, '_>, receiver: &Value, name: &str, args: Args) -> Result<Value> {
    let text = receiver.as_str().unwrap_or_default();
    charge_text(state, text)?;
    if name == "format_map" {
        let [map] = args.bind(name, [""], 1)?;
        let pairs = map.as_ref().and_then(|map| map.downcast_object_ref::<Dict>());
        let pairs = pairs.ok_or_else(|| fail("format_map: expected a dict"))?.pairs();
        let named =
            pairs.filter_map(|(key, value)| Some((key.as_str()?.to_owned(), value.clone()))).collect();
        return super::percent::str_format(state, receiver, &Args { positional: Vec::new(), named });
    }
    let args = if receiver.is_safe() { escaped(args) } else { args };
    let result = match name {
        "startswith" | "endswith" | "find" | "rfind" | "index" | "rindex" | "count" => {
            search(state, text, name, args)?
        }
        "split" | "rsplit" => split(state, text, name, args)?,
        "splitlines" => {
            let [keep] = args.bind(name, ["keepends"], 0)?;
            strings(state, split_lines(text, flag(keep.as_ref())))?
        }
        "partition" | "rpartition" => {
            let [separator] = args.bind(name, [""], 1)?;
            let parts = partition(text, not_empty(separator.as_ref())?, name);
            tuple(state, parts.map(Value::from).to_vec())?
        }
        "join" => {
            let [values] = args.bind(name, [""], 1)?;
            join(state, text, &iterate(state, &values.unwrap_or_default())?)?.into()
        }
        "replace" => {
            let [old, new, count] = args.bind(name, ["", "", "count"], 2)?;
            let count = count.map_or(Ok(-1), |count| int_arg(&count))?;
            replace(state, text, string(old.as_ref())?, string(new.as_ref())?, count)?.into()
        }
        "strip" | "lstrip" | "rstrip" => {
            let [chars] = args.bind(name, [""], 0)?;
            let chars = given(chars);
            let chars = chars.as_ref().map(|chars| string(Some(chars))).transpose()?;
            strip(text, chars, name != "rstrip", name != "lstrip").into()
        }
        "removeprefix" | "removesuffix" => {
            let [affix] = args.bind(name, [""], 1)?;
            let affix = string(affix.as_ref())?;
            let rest =
                if name == "removeprefix" { text.strip_prefix(affix) } else { text.strip_suffix(affix) };
            rest.unwrap_or(text).into()
        }
        "center" | "ljust" | "rjust" | "zfill" => justify(state, text, name, args)?.into(),
        "expandtabs" => {
            let [size] = args.bind(name, ["tabsize"], 0)?;
            expand_tabs(state, text, size.map_or(Ok(8), |size| int_arg(&size))?)?.into()
        }
        "encode" => return Err(fail("encode: bytes are not supported")),
        _ => {
            let [] = args.bind(name, [], 0)?;
            match changed(text, name) {
                Some(text) => text.into(),
                None => has_property(text, name).into(),
            }
        }
    };
    if !receiver.is_safe() {
        return Ok(result);
    }
    let safe = |part: &Value| Value::from_safe_string(part.as_str().unwrap_or_default().to_owned());
    match Type::of(&result) {
        Type::Str => Ok(safe(&result)),
        kind @ (Type::List | Type::Tuple) => {
            let parts = super::value::items(&result).iter().map(safe).collect();
            super::value::sequence(state, parts, kind == Type::Tuple)
        }
        _ => Ok(result),
    }
}

/// The methods of safe texts escape what they are given.
fn escaped(mut args: Args) -> Args {
    for value in &mut args.positional {
        if let Some(text) = value.as_str().filter(|_| !value.is_safe()) {
            *value = escape(text).into();
        }
    }
    args
}

/// Methods without arguments that return a text.
fn changed(text: &str, name: &str) -> Option<String> {
    Some(match name {
        "capitalize" => capitalize(text),
        "casefold" => unicode::fold(text),
        "lower" => text.to_lowercase(),
        "swapcase" => swap_case(text),
        "title" => title(text),
        "upper" => text.to_uppercase(),
        _ => return None,
    })
}

/// Methods without arguments that ask something.
fn has_property(text: &str, name: &str) -> bool {
    let all = |property: fn(char) -> bool| !text.is_empty() && text.chars().all(property);
    match name {
        "isalnum" => all(|c| unicode::is_alpha(c) || unicode::is_numeric(c)),
        "isalpha" => all(unicode::is_alpha),
        "isascii" => text.is_ascii(),
        "isdecimal" => all(unicode::is_decimal),
        "isdigit" => all(unicode::is_digit),
        "isidentifier" => {
            let mut chars = text.chars();
            chars.next().is_some_and(unicode::is_identifier_start) && chars.all(unicode::is_identifier_part)
        }
        "islower" => unicode::is_all(text, unicode::is_lower, [unicode::is_upper, unicode::is_title]),
        "isupper" => unicode::is_all(text, unicode::is_upper, [unicode::is_lower, unicode::is_title]),
        "isnumeric" => all(unicode::is_numeric),
        "isprintable" => text.chars().all(unicode::is_printable),
        "isspace" => all(is_space),
        _ => unicode::is_titled(text),
    }
}

/// A text argument.
pub(super) fn string(value: Option<&Value>) -> Result<&str> {
    let value = value.unwrap_or(&Value::UNDEFINED);
    value.as_str().ok_or_else(|| fail(format!("a {} was given, expected a string", Type::of(value))))
}

fn not_empty(value: Option<&Value>) -> Result<&str> {
    match string(value)? {
        "" => Err(fail("the separator is empty")),
        separator => Ok(separator),
    }
}

fn strings<'a>(state: &State, parts: impl IntoIterator<Item = &'a str>) -> Result<Value> {
    list(state, parts.into_iter().map(Value::from).collect())
}

/// The character that begins a title-cased word, which differs from the upper case for some.
fn title_char(c: char, result: &mut String) {
    let text = Value::from(c);
    // minijinja knows the characters whose title case differs from the upper case.
    match minijinja::value::from_args::<(minijinja::value::StringInput<'_>,)>(&[text]) {
        Ok((input,)) => result.push_str(minijinja::filters::capitalize(input).as_str().unwrap_or_default()),
        Err(_) => result.extend(c.to_uppercase()),
    }
}

/// `lower`, where a capital sigma at the end of a word depends on what stands before it.
fn lower_within(before: &str, text: &str, result: &mut String) {
    let all = format!("{before}{text}").to_lowercase();
    let skip = before.to_lowercase();
    // All but the sigma are lowered one by one, and both sigmas have the same length.
    result.push_str(all.get(skip.len()..).unwrap_or_default());
}

pub(super) fn capitalize(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    if let Some(first) = text.chars().next() {
        title_char(first, &mut result);
        let (first, rest) = text.split_at(first.len_utf8());
        lower_within(first, rest, &mut result);
    }
    result
}

/// `title`: capitalizes each run of letters, also behind an apostrophe.
fn title(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while !rest.is_empty() {
        let (word, after) = rest.split_at(rest.find(|c| !unicode::is_cased(c)).unwrap_or(rest.len()));
        result.push_str(&capitalize(word));
        let (other, after) = after.split_at(after.find(unicode::is_cased).unwrap_or(after.len()));
        result.push_str(other);
        rest = after;
    }
    result
}

fn swap_case(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    for c in text.chars() {
        if unicode::is_upper(c) {
            result.extend(c.to_lowercase());
        } else if unicode::is_lower(c) {
            result.extend(c.to_uppercase());
        } else {
            result.push(c);
        }
    }
    result
}

pub(super) fn strip<'a>(text: &'a str, chars: Option<&str>, start: bool, end: bool) -> &'a str {
    let unwanted = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let text = if start { text.trim_start_matches(unwanted) } else { text };
    if end { text.trim_end_matches(unwanted) } else { text }
}

/// Paid for before it is made, as it may be the product of two long texts.
pub(super) fn join(state: &State, separator: &str, values: &[Value]) -> Result<String> {
    let texts = values.iter().map(|value| string(Some(value))).collect::<Result<Vec<_>>>()?;
    join_texts(state, separator, &texts)
}

pub(super) fn join_texts<T: AsRef<str>>(state: &State, separator: &str, texts: &[T]) -> Result<String> {
    let length = texts.iter().fold(0_usize, |sum, text| sum.saturating_add(text.as_ref().len()));
    let separators = separator.len().saturating_mul(texts.len().saturating_sub(1));
    charge_bytes(state, length.saturating_add(separators))?;
    let mut result = String::with_capacity(length + separators);
    for (at, text) in texts.iter().enumerate() {
        if at > 0 {
            result.push_str(separator);
        }
        result.push_str(text.as_ref());
    }
    Ok(result)
}

/// Paid for before it is made, as it may be the product of two long texts.
pub(super) fn replace(state: &State, text: &str, old: &str, new: &str, count: i128) -> Result<String> {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    let found = if old.is_empty() { text.chars().count() + 1 } else { text.matches(old).take(count).count() };
    charge_bytes(state, text.len().saturating_add(found.min(count).saturating_mul(new.len())))?;
    Ok(text.replacen(old, new, count))
}

pub(super) fn split_lines(text: &str, keep: bool) -> Vec<&str> {
    let is_break = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{B}' | '\u{C}' | '\u{1C}'..='\u{1E}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(is_break).unwrap_or(rest.len());
        let length = if rest[end..].starts_with("\r\n") {
            2
        } else {
            rest[end..].chars().next().map_or(0, char::len_utf8)
        };
        lines.push(&rest[..if keep { end + length } else { end }]);
        rest = &rest[end + length..];
    }
    lines
}

fn partition<'a>(text: &'a str, separator: &'a str, name: &str) -> [&'a str; 3] {
    if name == "partition" {
        text.split_once(separator).map_or([text, "", ""], |(a, b)| [a, separator, b])
    } else {
        text.rsplit_once(separator).map_or(["", "", text], |(a, b)| [a, separator, b])
    }
}

fn split(state: &State, text: &str, name: &str, args: Args) -> Result<Value> {
    let [separator, limit] = args.bind(name, ["sep", "maxsplit"], 0)?;
    let limit = limit.map_or(Ok(-1), |limit| int_arg(&limit))?;
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    charge_items(state, text.len())?;
    let from_end = name == "rsplit";
    let Some(separator) = given(separator) else {
        return strings(state, split_space(text, limit, from_end));
    };
    let separator = not_empty(Some(&separator))?;
    let parts: Vec<&str> = if from_end {
        let mut parts: Vec<_> = text.rsplitn(limit.saturating_add(1), separator).collect();
        parts.reverse();
        parts
    } else {
        text.splitn(limit.saturating_add(1), separator).collect()
    };
    strings(state, parts)
}

/// Splits at runs of white space. What is left after the last split keeps the white space at its far end.
fn split_space(text: &str, limit: usize, from_end: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    loop {
        rest = strip(rest, None, !from_end, from_end);
        if rest.is_empty() {
            break;
        }
        if parts.len() == limit {
            parts.push(strip(rest, None, !from_end, from_end));
            break;
        }
        let cut = if from_end {
            rest.rfind(is_space).map_or(0, |at| at + rest[at..].chars().next().map_or(0, char::len_utf8))
        } else {
            rest.find(is_space).unwrap_or(rest.len())
        };
        let (head, tail) = rest.split_at(cut);
        let (part, left) = if from_end { (tail, head) } else { (head, tail) };
        parts.push(part);
        rest = left;
    }
    if from_end {
        parts.reverse();
    }
    parts
}

fn justify(state: &State, text: &str, name: &str, args: Args) -> Result<String> {
    let [width, fill] = args.bind(name, ["", ""], 1)?;
    if name == "zfill" && fill.is_some() {
        return Err(fail("zfill: has too many arguments"));
    }
    let width = usize::try_from(int_arg(&width.unwrap_or_default())?).unwrap_or(0);
    let fill = match &fill {
        Some(fill) => string(Some(fill))?,
        None if name == "zfill" => "0",
        None => " ",
    };
    if fill.chars().count() != 1 {
        return Err(fail(format!("{name}: the fill is not one character")));
    }
    let length = text.chars().count();
    let missing = width.saturating_sub(length);
    let left = match name {
        "ljust" => 0,
        // As CPython rounds: an odd rest goes to the left if the width is odd.
        "center" => missing / 2 + (missing & width & 1),
        _ => missing,
    };
    let (before, after) = (repeat(state, fill, left)?, repeat(state, fill, missing - left)?);
    if name == "zfill"
        && let Some(sign) = text.chars().next().filter(|c| "+-".contains(*c))
    {
        return Ok(format!("{sign}{before}{}", &text[1..]));
    }
    Ok(before + text + &after)
}

fn expand_tabs(state: &State, text: &str, size: i128) -> Result<String> {
    let size = usize::try_from(size).unwrap_or(0);
    let mut result = String::with_capacity(text.len());
    let mut column = 0;
    for c in text.chars() {
        match c {
            '\t' if size == 0 => {}
            '\t' => {
                let spaces = size - column % size;
                result.push_str(&repeat(state, " ", spaces)?);
                column += spaces;
            }
            c => {
                result.push(c);
                column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    Ok(result)
}

/// The methods that look for a part between two optional positions.
fn search(state: &State, text: &str, name: &str, args: Args) -> Result<Value> {
    let [part, start, stop] = args.bind(name, ["", "", ""], 1)?;
    let length = text.chars().count() as i128;
    let bound = |value: Option<Value>, default: i128| -> Result<i128> {
        let Some(value) = given(value) else { return Ok(default) };
        let at = int_arg(&value)?;
        Ok((if at < 0 { at + length } else { at }).max(0))
    };
    let (start, stop) = (bound(start, 0)?, bound(stop, length)?.min(length));
    let part = part.unwrap_or_default();
    if start > stop {
        return Ok(match name {
            "startswith" | "endswith" => false.into(),
            "index" | "rindex" => return Err(fail(format!("{name}: the text does not have the part"))),
            "count" => 0.into(),
            _ => (-1).into(),
        });
    }
    let offset = |chars: i128| text.char_indices().nth(chars as usize).map_or(text.len(), |(at, _)| at);
    let window = &text[offset(start)..offset(stop)];
    match name {
        "startswith" | "endswith" => {
            let fits = |part: &str| {
                if name == "startswith" { window.starts_with(part) } else { window.ends_with(part) }
            };
            if Type::of(&part) == Type::Tuple {
                for part in super::value::items(&part) {
                    if fits(string(Some(part))?) {
                        return Ok(true.into());
                    }
                }
                return Ok(false.into());
            }
            Ok(fits(string(Some(&part))?).into())
        }
        "count" => {
            let part = string(Some(&part))?;
            charge_text(state, window)?;
            Ok(if part.is_empty() { window.chars().count() + 1 } else { window.matches(part).count() }.into())
        }
        _ => {
            let part = string(Some(&part))?;
            let found = if name.starts_with('r') { window.rfind(part) } else { window.find(part) };
            match found {
                Some(at) => Ok((start as i64 + window[..at].chars().count() as i64).into()),
                None if name.ends_with("index") => {
                    Err(fail(format!("{name}: the text does not have the part")))
                }
                None => Ok((-1).into()),
            }
        }
    }
}
