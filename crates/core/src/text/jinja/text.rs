//! Python's `str`, `repr` and `json.dumps` of values.

use std::{borrow::Cow, fmt::Write as _};

use minijinja::{State, Value};

use super::{
    Result,
    args::Args,
    fail,
    ops::{Num, merge_sort, ordered, repeat},
    unicode,
    value::{
        BYTES_PER_FUEL, Dict, Generator, Method, Namespace, Range, Type, View, ViewKind, charge_bytes, items,
    },
};
use crate::text::control::may_be_sentinel;

/// Takes fuel for reading a text.
pub(super) fn charge_text(state: &State, text: &str) -> Result<()> {
    charge_bytes(state, text.len())
}

/// `str(value)`.
pub(super) fn str_of<'a>(state: &State, value: &'a Value) -> Result<Cow<'a, str>> {
    match value.as_str() {
        Some(text) => Ok(Cow::Borrowed(text)),
        None if value.is_undefined() => Ok(Cow::Borrowed("")),
        None => repr(state, value).map(Cow::Owned),
    }
}

/// `repr(value)`.
pub(super) fn repr(state: &State, value: &Value) -> Result<String> {
    let mut printer = Printer { state, out: String::new(), charged: 0 };
    printer.value(value)?;
    Ok(printer.out)
}

/// A text that grows, paid for by its length.
struct Printer<'a, 'template, 'env> {
    state: &'a State<'template, 'env>,
    out: String,
    charged: usize,
}

impl Printer<'_, '_, '_> {
    /// A value may contain another many times over, so its text is paid for while it grows.
    fn charge(&mut self) -> Result<()> {
        self.state.consume_fuel(1 + ((self.out.len() - self.charged) / BYTES_PER_FUEL) as u64)?;
        self.charged = self.out.len();
        Ok(())
    }

    fn value(&mut self, value: &Value) -> Result<()> {
        self.charge()?;
        match Type::of(value) {
            Type::Undefined => self.out.push_str("Undefined"),
            Type::None => self.out.push_str("None"),
            Type::Bool => self.out.push_str(if value.is_true() { "True" } else { "False" }),
            Type::Int => self.out.push_str(&value.to_string()),
            Type::Float => self.out.push_str(&float(f64::try_from(value.clone())?)),
            Type::Str if value.is_safe() => {
                self.out.push_str("Markup(");
                quoted(&mut self.out, value.as_str().unwrap_or_default());
                self.out.push(')');
            }
            Type::Str => quoted(&mut self.out, value.as_str().unwrap_or_default()),
            Type::List => self.sequence('[', items(value), ']')?,
            Type::Tuple => {
                let items = items(value);
                self.sequence('(', items, ')')?;
                if items.len() == 1 {
                    self.out.insert(self.out.len() - 1, ',');
                }
            }
            Type::Dict => {
                if let Some(dict) = value.downcast_object_ref::<Dict>() {
                    self.pairs(dict.pairs())?;
                }
            }
            Type::Namespace => {
                if let Some(namespace) = value.downcast_object_ref::<Namespace>() {
                    self.out.push_str("<Namespace ");
                    self.pairs(namespace.attributes().iter())?;
                    self.out.push('>');
                }
            }
            Type::View => {
                if let Some(view) = value.downcast_object_ref::<View>() {
                    self.out.push_str(match view.kind {
                        ViewKind::Keys => "dict_keys(",
                        ViewKind::Values => "dict_values(",
                        ViewKind::Items => "dict_items(",
                    });
                    self.sequence('[', &view.items(self.state)?, ']')?;
                    self.out.push(')');
                }
            }
            Type::Range => {
                if let Some(Range { start, stop, step }) = value.downcast_object_ref::<Range>() {
                    let step = if *step == 1 { String::new() } else { format!(", {step}") };
                    self.out.push_str(&format!("range({start}, {stop}{step})"));
                }
            }
            Type::Macro => {
                let name = value.get_attr("name")?;
                self.out.push_str("<Macro ");
                quoted(&mut self.out, name.as_str().unwrap_or_default());
                self.out.push('>');
            }
            Type::Loop => {
                let part = |name: &str| value.get_attr(name);
                self.out.push_str(&format!("<LoopContext {}/{}>", part("index")?, part("length")?));
            }
            // Python prints an address behind these.
            Type::Generator => {
                let name = value.downcast_object_ref::<Generator>().map_or("", |generator| generator.name);
                self.out.push_str(&format!("<{name}>"));
            }
            Type::Method => {
                let name = value.downcast_object_ref::<Method>().map_or("", |method| &method.name);
                self.out.push_str(&format!("<built-in method {name}>"));
            }
            other => self.out.push_str(&format!("<{other}>")),
        }
        Ok(())
    }

    fn sequence(&mut self, open: char, items: &[Value], close: char) -> Result<()> {
        self.out.push(open);
        for (at, item) in items.iter().enumerate() {
            if at > 0 {
                self.out.push_str(", ");
            }
            self.value(item)?;
        }
        self.out.push(close);
        Ok(())
    }

    fn pairs<'a>(&mut self, pairs: impl Iterator<Item = &'a (Value, Value)>) -> Result<()> {
        self.out.push('{');
        for (at, (key, value)) in pairs.enumerate() {
            if at > 0 {
                self.out.push_str(", ");
            }
            self.value(key)?;
            self.out.push_str(": ");
            self.value(value)?;
        }
        self.out.push('}');
        Ok(())
    }
}

/// `repr` of a string: in single quotes, unless it has some and no double quotes.
pub(super) fn quoted(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            // A sentinel must be found again in the prompt.
            c if unicode::is_printable(c) || may_be_sentinel(c) => out.push(c),
            c => escaped(out, c),
        }
    }
    out.push(quote);
}

/// The escape that `repr` and `ascii` write for a character.
pub(super) fn escaped(out: &mut String, c: char) {
    // Writing to a string does not fail.
    let _ = match c as u32 {
        code @ 0..=0xFF => write!(out, "\\x{code:02x}"),
        code @ 0x100..=0xFFFF => write!(out, "\\u{code:04x}"),
        code => write!(out, "\\U{code:08x}"),
    };
}

/// `repr` of a float: the shortest digits that give it back, with an exponent below 1e-4 and from 1e16.
pub(super) fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let magnitude = value.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        return exponent(&format!("{value:e}"));
    }
    format!("{value:?}")
}

/// Rust's `1e5` as C's `1e+05`.
pub(super) fn exponent(text: &str) -> String {
    let Some((digits, exponent)) = text.split_once('e') else { return text.to_owned() };
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
    format!("{digits}e{sign}{exponent:0>2}")
}

/// The escapes of HTML as markupsafe makes them.
pub(super) fn escape(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => result.push_str("&amp;"),
            '<' => result.push_str("&lt;"),
            '>' => result.push_str("&gt;"),
            '\'' => result.push_str("&#39;"),
            '"' => result.push_str("&#34;"),
            c => result.push(c),
        }
    }
    result
}

/// `json.dumps(value, ensure_ascii, indent, separators, sort_keys)`, which transformers installs as `tojson`: nothing
/// is escaped for HTML, and keys keep their order.
pub(super) fn to_json(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let names = ["x", "ensure_ascii", "indent", "separators", "sort_keys"];
    let [value, ascii, indent, separators, sort] = args.bind("tojson", names, 1)?;
    let is_true = |flag: &Option<Value>| flag.as_ref().is_some_and(Value::is_true);
    let indent = match indent.filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => Some(match (indent.as_str(), Num::of(&indent)) {
            (Some(text), _) => text.to_owned(),
            (None, Some(Num::Int(width))) => repeat(state, " ", usize::try_from(width).unwrap_or(0))?,
            _ => return Err(fail("tojson: `indent` is neither a number nor a string")),
        }),
    };
    let (item, key) = match separators.filter(|pair| !pair.is_none()) {
        Some(pair) => {
            let pair = super::value::iterate(state, &pair)?;
            match pair.iter().map(Value::as_str).collect::<Vec<_>>()[..] {
                [Some(item), Some(key)] => (item.to_owned(), key.to_owned()),
                _ => return Err(fail("tojson: `separators` are not two strings")),
            }
        }
        None => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
    };
    let printer = Printer { state, out: String::new(), charged: 0 };
    let mut json = Json { printer, ascii: is_true(&ascii), sort: is_true(&sort), indent, item, key };
    json.value(&value.unwrap_or_default(), 0)?;
    Ok(json.printer.out.into())
}

struct Json<'a, 'template, 'env> {
    printer: Printer<'a, 'template, 'env>,
    ascii: bool,
    sort: bool,
    indent: Option<String>,
    item: String,
    key: String,
}

impl Json<'_, '_, '_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<()> {
        self.printer.charge()?;
        let out = &mut self.printer.out;
        match Type::of(value) {
            Type::None => out.push_str("null"),
            Type::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            Type::Int => out.push_str(&value.to_string()),
            Type::Float => out.push_str(&json_float(f64::try_from(value.clone())?)),
            Type::Str => json_string(out, value.as_str().unwrap_or_default(), self.ascii),
            Type::List | Type::Tuple => {
                let items = items(value);
                self.list('[', ']', items.len(), depth, |json, at| json.value(&items[at], depth + 1))?;
            }
            Type::Dict => {
                let Some(dict) = value.downcast_object_ref::<Dict>() else { return Ok(()) };
                let mut pairs: Vec<_> = dict.pairs().cloned().collect();
                if self.sort {
                    let state = self.printer.state;
                    pairs = merge_sort(pairs, &mut |a, b| ordered(state, "<", &a.0, &b.0))?;
                }
                self.list('{', '}', pairs.len(), depth, |json, at| {
                    let (key, value) = &pairs[at];
                    let name = json_key(key)?;
                    json_string(&mut json.printer.out, &name, json.ascii);
                    json.printer.out.push_str(&json.key);
                    json.value(value, depth + 1)
                })?;
            }
            found => return Err(fail(format!("tojson: a {found} cannot be written as JSON"))),
        }
        Ok(())
    }

    fn list(
        &mut self,
        open: char,
        close: char,
        count: usize,
        depth: usize,
        mut write: impl FnMut(&mut Self, usize) -> Result<()>,
    ) -> Result<()> {
        self.printer.out.push(open);
        for at in 0..count {
            if at > 0 {
                self.printer.out.push_str(&self.item);
            }
            self.line(depth + 1)?;
            write(self, at)?;
        }
        if count > 0 {
            self.line(depth)?;
        }
        self.printer.out.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) -> Result<()> {
        if let Some(indent) = &self.indent {
            self.printer.out.push('\n');
            self.printer.out.push_str(&repeat(self.printer.state, indent, depth)?);
        }
        Ok(())
    }
}

fn json_float(value: f64) -> String {
    match float(value).as_str() {
        "inf" => "Infinity".to_owned(),
        "-inf" => "-Infinity".to_owned(),
        "nan" => "NaN".to_owned(),
        other => other.to_owned(),
    }
}

fn json_key(key: &Value) -> Result<Cow<'_, str>> {
    Ok(match Type::of(key) {
        Type::Str => Cow::Borrowed(key.as_str().unwrap_or_default()),
        Type::Bool => (if key.is_true() { "true" } else { "false" }).into(),
        Type::None => "null".into(),
        Type::Int => key.to_string().into(),
        Type::Float => json_float(f64::try_from(key.clone())?).into(),
        found => return Err(fail(format!("tojson: a {found} cannot be the key of an object"))),
    })
}

fn json_string(out: &mut String, text: &str, ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{C}' => out.push_str("\\f"),
            // A sentinel must be found again in the prompt.
            c if c < ' ' || (ascii && !c.is_ascii() && !may_be_sentinel(c)) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // Writing to a string does not fail.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}
