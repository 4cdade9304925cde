//! What chat templates expect of Python that minijinja does differently: `json.dumps`, string methods, white space.

use std::fmt::Write;

use minijinja::{
    Environment, Error, ErrorKind, State, Value,
    filters::capitalize,
    value::{Kwargs, Rest, StringInput, ValueKind, from_args},
};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::control::may_be_sentinel;

/// Deeper values are refused; a namespace may even contain itself.
const MAX_DEPTH: usize = 64;

/// Adds the filters and methods of this module.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.add_filter("tojson", to_json);
    environment.add_filter("trim", trim);
    environment.set_unknown_method_callback(|state, value, method, args| {
        match value.as_str().map(|text| string_method(state, text, method, args)) {
            Some(Some(result)) => result,
            _ => unknown_method_callback(state, value, method, args),
        }
    });
}

/// `str.isspace` of Python: Unicode white space and the four separators U+001C to U+001F.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1C}'..='\u{1F}').contains(&c)
}

fn trim(value: &Value, chars: Option<&str>) -> String {
    let text = value.to_str().unwrap_or_else(|| value.to_string().into());
    strip(&text, chars, true, true).to_owned()
}

fn strip<'a>(text: &'a str, chars: Option<&str>, start: bool, end: bool) -> &'a str {
    let unwanted = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let text = if start { text.trim_start_matches(unwanted) } else { text };
    if end { text.trim_end_matches(unwanted) } else { text }
}

/// Methods that minijinja-contrib lacks or that differ in a detail; `None` for all others.
fn string_method(state: &State, text: &str, method: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    let result = match method {
        "title" => from_args(args).and_then(|()| title(state, text)),
        "strip" | "lstrip" | "rstrip" => from_args(args).map(|(chars,): (Option<&str>,)| {
            Value::from(strip(text, chars, method != "rstrip", method != "lstrip"))
        }),
        "removeprefix" => {
            from_args(args).map(|(affix,): (&str,)| Value::from(text.strip_prefix(affix).unwrap_or(text)))
        }
        "removesuffix" => {
            from_args(args).map(|(affix,): (&str,)| Value::from(text.strip_suffix(affix).unwrap_or(text)))
        }
        // Priced here, then done by minijinja-contrib.
        "format" => match pay_for_format(state, text, args) {
            Ok(()) => return None,
            Err(e) => Err(e),
        },
        "rsplit" if !args.is_empty() => {
            from_args(args).and_then(|(separator, limit)| rsplit(text, separator, limit))
        }
        "partition" | "rpartition" => {
            from_args(args).and_then(|(separator,)| partition(text, separator, method))
        }
        _ => return None,
    };
    Some(result)
}

/// Takes fuel for the most that `str.format` may give: in each field the longest argument, padded to the largest number.
fn pay_for_format(state: &State, text: &str, args: &[Value]) -> Result<(), Error> {
    // A width may be an argument: `{:{}}`.
    let has_nested = text.split('{').skip(1).any(|field| !field.is_empty() && !field.contains('}'));
    let mut width = largest_number(text);
    let mut longest = 0;
    for arg in args {
        let arg = arg.to_string();
        longest = longest.max(arg.len() as u64);
        if has_nested {
            width = width.max(largest_number(&arg));
        }
    }
    let fields = text.matches('{').count() as u64;
    state.consume_fuel(fields.saturating_mul(longest.saturating_add(width)) / 64)
}

/// The largest of the numbers that are written in a text.
fn largest_number(text: &str) -> u64 {
    let numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    numbers.map(|digits| digits.parse().unwrap_or(u64::MAX)).max().unwrap_or(0)
}

/// Capitalizes each run of cased letters, also behind an apostrophe.
fn title(state: &State, text: &str) -> Result<Value, Error> {
    let is_cased = |c: char| !c.to_lowercase().eq(c.to_uppercase());
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while !rest.is_empty() {
        let (word, after) = rest.split_at(rest.find(|c| !is_cased(c)).unwrap_or(rest.len()));
        let word = capitalize(StringInput::new(state, &Value::from(word))?);
        result.push_str(word.as_str().unwrap_or_default());
        let (other, after) = after.split_at(after.find(is_cased).unwrap_or(after.len()));
        result.push_str(other);
        rest = after;
    }
    Ok(result.into())
}

fn rsplit(text: &str, separator: &str, limit: Option<i64>) -> Result<Value, Error> {
    not_empty(separator)?;
    let parts = match limit.and_then(|n| usize::try_from(n).ok()) {
        Some(limit) => text.rsplitn(limit + 1, separator).collect::<Vec<_>>(),
        None => text.rsplit(separator).collect(),
    };
    Ok(parts.into_iter().rev().map(Value::from).collect())
}

fn partition(text: &str, separator: &str, method: &str) -> Result<Value, Error> {
    not_empty(separator)?;
    let parts = if method == "partition" {
        text.split_once(separator).map_or([text, "", ""], |(a, b)| [a, separator, b])
    } else {
        text.rsplit_once(separator).map_or(["", "", text], |(a, b)| [a, separator, b])
    };
    Ok(Value::from(parts.map(Value::from).to_vec()))
}

fn not_empty(separator: &str) -> Result<(), Error> {
    if separator.is_empty() {
        return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
    }
    Ok(())
}

/// `json.dumps(value, ensure_ascii, indent, separators, sort_keys)`, which transformers installs as `tojson`: nothing
/// is escaped for HTML, and keys keep their order.
fn to_json(state: &State, value: &Value, positional: Rest<Value>, options: Kwargs) -> Result<String, Error> {
    let mut arguments = Vec::new();
    for (at, key) in ["ensure_ascii", "indent", "separators", "sort_keys"].into_iter().enumerate() {
        let argument = match positional.get(at) {
            Some(value) => Some(value.clone()),
            None => options.get::<Option<Value>>(key)?,
        };
        arguments.push(argument.filter(|value| !value.is_none()));
    }
    options.assert_all_used()?;
    let [ascii, indent, separators, sort] = &arguments[..] else {
        return Err(Error::new(ErrorKind::TooManyArguments, "tojson"));
    };
    let is_true = |flag: &Option<Value>| flag.as_ref().is_some_and(Value::is_true);
    let indent = match indent.as_ref().map(|indent| (indent.as_str(), indent.as_i64())) {
        None => None,
        Some((Some(text), _)) => Some(text.to_owned()),
        Some((None, Some(width))) => Some(" ".repeat(width.clamp(0, 64) as usize)),
        Some((None, None)) => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "tojson: `indent` is no number and no string",
            ));
        }
    };
    let (item, key) = match separators {
        Some(pair) => {
            let separator = |index| {
                let text = pair.get_item_by_index(index)?;
                text.as_str().map(str::to_owned).ok_or_else(|| {
                    Error::new(ErrorKind::InvalidOperation, "tojson: a separator is no string")
                })
            };
            (separator(0)?, separator(1)?)
        }
        None => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
    };
    let (ascii, sort) = (is_true(ascii), is_true(sort));
    let mut json = JsonWriter { state, out: String::new(), charged: 0, ascii, sort, indent, item, key };
    json.value(value, 0)?;
    Ok(json.out)
}

struct JsonWriter<'a, 'env, 'state> {
    state: &'a State<'env, 'state>,
    out: String,
    charged: usize,
    ascii: bool,
    sort: bool,
    indent: Option<String>,
    item: String,
    key: String,
}

impl JsonWriter<'_, '_, '_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        // A value may contain another many times over, so its text is paid for while it grows.
        self.state.consume_fuel(1 + (self.out.len() - self.charged) as u64 / 64)?;
        self.charged = self.out.len();
        if depth > MAX_DEPTH {
            return Err(Error::new(ErrorKind::BadSerialization, "tojson: the value is nested too deeply"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => match value.to_string().as_str() {
                "inf" => self.out.push_str("Infinity"),
                "-inf" => self.out.push_str("-Infinity"),
                number => self.out.push_str(number),
            },
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.checked().map(|item| item.map(|item| (None, item)));
                self.list('[', ']', items, depth)?;
            }
            ValueKind::Map => {
                let mut entries = Vec::new();
                for name in value.try_iter()?.checked() {
                    let name = name?;
                    let entry = value.get_item(&name)?;
                    entries.push((name, entry));
                }
                if self.sort {
                    entries.sort_by_key(|(name, _)| name.to_string());
                }
                let entries = entries.into_iter().map(|(name, entry)| Ok((Some(name), entry)));
                self.list('{', '}', entries, depth)?;
            }
            kind => {
                let message = format!("tojson: {kind} is not JSON serializable");
                return Err(Error::new(ErrorKind::BadSerialization, message));
            }
        }
        Ok(())
    }

    fn list(
        &mut self,
        open: char,
        close: char,
        items: impl Iterator<Item = Result<(Option<Value>, Value), Error>>,
        depth: usize,
    ) -> Result<(), Error> {
        self.out.push(open);
        let mut empty = true;
        for item in items {
            let (name, item) = item?;
            if !std::mem::take(&mut empty) {
                self.out.push_str(&self.item);
            }
            self.line(depth + 1);
            if let Some(name) = name {
                if let Some(name) = name.as_str() {
                    self.string(name);
                } else {
                    self.out.push('"');
                    self.value(&name, depth + 1)?;
                    self.out.push('"');
                }
                self.out.push_str(&self.key);
            }
            self.value(&item, depth + 1)?;
        }
        if !empty {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{C}' => self.out.push_str("\\f"),
                // A sentinel must be found again in the prompt.
                c if c < ' ' || (self.ascii && (c == '\u{7F}' || !c.is_ascii()) && !may_be_sentinel(c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing to a string does not fail.
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}
