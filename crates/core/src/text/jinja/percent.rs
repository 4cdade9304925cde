//! Python's formatting of texts: `text % values` and `str.format`.

use minijinja::{State, Value};

use super::{
    Result,
    args::Args,
    fail,
    ops::{Num, get_attr, get_item, repeat},
    text::{charge_text, escape, escaped, exponent, repr, str_of},
    value::{Dict, Type, charge_bytes, items},
};

/// `text % values`.
pub(super) fn format(state: &mut State<'_, '_>, template: &Value, values: &Value) -> Result<Value> {
    let text = template.as_str().unwrap_or_default();
    charge_text(state, text)?;
    let mapping = values.downcast_object::<Dict>();
    let is_tuple = Type::of(values) == Type::Tuple;
    let single = std::slice::from_ref(values);
    let mut arguments = if is_tuple { items(values) } else { single }.iter();
    let mut next = || arguments.next().cloned().ok_or_else(|| fail("`%`: not enough values for the format"));

    let mut out = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut value = None;
        if chars.next_if_eq(&'(').is_some() {
            let mut depth = 1;
            let mut key = String::new();
            for c in chars.by_ref() {
                depth += i32::from(c == '(') - i32::from(c == ')');
                if depth == 0 {
                    break;
                }
                key.push(c);
            }
            let (0, Some(mapping)) = (depth, &mapping) else {
                return Err(fail("`%`: the format needs a dict"));
            };
            let found = mapping.get_str(&key);
            value = Some(found.ok_or_else(|| fail(format!("`%`: the dict has no key `{key}`")))?);
        }
        let mut spec = Spec::default();
        while let Some(flag) = chars.next_if(|c| "#0- +".contains(*c)) {
            match flag {
                '#' => spec.alternate = true,
                '0' => spec.zero = true,
                '-' => spec.align = Some('<'),
                other => spec.sign = if spec.sign == '+' { '+' } else { other },
            }
        }
        let mut number = |chars: &mut std::iter::Peekable<std::str::Chars<'_>>| -> Result<Option<i128>> {
            if chars.next_if_eq(&'*').is_some() {
                return match Num::of(&next()?) {
                    Some(Num::Int(int)) => Ok(Some(int)),
                    _ => Err(fail("`%`: `*` wants an integer")),
                };
            }
            let mut number = None;
            while let Some(digit) = chars.next_if(char::is_ascii_digit) {
                let digit = i128::from(digit as u8 - b'0');
                number = Some(number.unwrap_or(0_i128).saturating_mul(10).saturating_add(digit));
            }
            Ok(number)
        };
        if let Some(width) = number(&mut chars)? {
            if width < 0 {
                spec.align = Some('<');
            }
            spec.width = size(width.saturating_abs())?;
        }
        if chars.next_if_eq(&'.').is_some() {
            spec.precision = Some(size(number(&mut chars)?.unwrap_or(0).max(0))?);
        }
        while chars.next_if(|c| "hlL".contains(*c)).is_some() {}
        let Some(conversion) = chars.next() else { return Err(fail("`%`: the format ends within a field")) };
        if conversion == '%' {
            out.push('%');
            continue;
        }
        let value = match value {
            Some(value) => value,
            None => next()?,
        };
        let field = field(state, conversion, &spec, &value, template.is_safe())?;
        charge_bytes(state, field.len())?;
        out.push_str(&field);
    }
    // What can be subscribed counts as a mapping here, whose values need not be used.
    let is_mapping = matches!(Type::of(values), Type::Dict | Type::List | Type::Range | Type::Undefined);
    if arguments.next().is_some() && !is_mapping {
        return Err(fail("`%`: not all values are used by the format"));
    }
    Ok(if template.is_safe() { Value::from_safe_string(out) } else { out.into() })
}

fn size(number: i128) -> Result<usize> {
    usize::try_from(number)
        .ok()
        .filter(|&n| n < 1 << 31)
        .ok_or_else(|| fail("a width or precision is too large"))
}

/// One field of a `%` format.
fn field(
    state: &mut State<'_, '_>,
    conversion: char,
    spec: &Spec,
    value: &Value,
    safe: bool,
) -> Result<String> {
    let wrong = || fail(format!("`%{conversion}` of a {}", Type::of(value)));
    match conversion {
        's' | 'r' | 'a' => {
            let mut text = match conversion {
                's' => str_of(state, value)?.into_owned(),
                'r' => repr(state, value)?,
                _ => ascii(&repr(state, value)?),
            };
            if safe && !value.is_safe() {
                text = escape(&text);
            }
            if let Some(precision) = spec.precision {
                text = text.chars().take(precision).collect();
            }
            pad(state, &text, &Spec { zero: false, ..spec.clone() }, '>')
        }
        'c' => {
            let c = match (value.as_str(), Num::of(value)) {
                (Some(text), _) => Some(text).filter(|text| text.chars().count() == 1).map(str::to_owned),
                (None, Some(Num::Int(code))) => {
                    u32::try_from(code).ok().and_then(char::from_u32).map(String::from)
                }
                _ => None,
            };
            pad(state, &c.ok_or_else(wrong)?, &Spec { zero: false, ..spec.clone() }, '>')
        }
        'd' | 'i' | 'u' | 'x' | 'X' | 'o' => {
            let int = match Num::of(value) {
                Some(Num::Int(int)) => int,
                Some(Num::Float(float)) if "diu".contains(conversion) => float_to_int(float)?,
                _ => return Err(wrong()),
            };
            let (digits, prefix) = match conversion {
                'x' => (format!("{:x}", int.unsigned_abs()), "0x"),
                'X' => (format!("{:X}", int.unsigned_abs()), "0X"),
                'o' => (format!("{:o}", int.unsigned_abs()), "0o"),
                _ => (int.unsigned_abs().to_string(), ""),
            };
            let zeros = spec.precision.unwrap_or(0).saturating_sub(digits.len());
            let digits = repeat(state, "0", zeros)? + &digits;
            let prefix = if spec.alternate { prefix } else { "" };
            number(state, int < 0, prefix, &digits, spec)
        }
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
            let value = Num::of(value).ok_or_else(wrong)?.to_f64();
            charge_bytes(state, spec.precision.unwrap_or(6))?;
            let digits = float_digits(value.abs(), conversion, spec.precision.unwrap_or(6), spec.alternate);
            let spec = if value.is_finite() { spec.clone() } else { Spec { zero: false, ..spec.clone() } };
            number(state, value.is_sign_negative() && !value.is_nan(), "", &digits, &spec)
        }
        other => Err(fail(format!("`%{other}` is not a format"))),
    }
}

pub(super) fn float_to_int(float: f64) -> Result<i128> {
    if !float.is_finite() {
        return Err(fail("a float that is not finite cannot become an integer"));
    }
    if float.abs() >= 1.7e38 {
        return Err(fail("an integer has more than 128 bits"));
    }
    Ok(float as i128)
}

/// The digits of a float that is not negative.
fn float_digits(value: f64, conversion: char, precision: usize, alternate: bool) -> String {
    let text = if value.is_nan() {
        "nan".to_owned()
    } else if value.is_infinite() {
        "inf".to_owned()
    } else {
        match conversion.to_ascii_lowercase() {
            'e' => exponent(&format!("{value:.precision$e}")),
            'f' => format!("{value:.precision$}"),
            _ => general(value, precision.max(1), alternate),
        }
    };
    if conversion.is_ascii_uppercase() { text.to_uppercase() } else { text }
}

/// `%g`: the shorter of both forms, without zeros at its end.
fn general(value: f64, precision: usize, alternate: bool) -> String {
    let scientific = format!("{value:.*e}", precision - 1);
    let power: i64 = scientific.split_once('e').and_then(|(_, e)| e.parse().ok()).unwrap_or(0);
    let (mut digits, tail) = if power < -4 || power >= precision as i64 {
        let (digits, _) = scientific.split_once('e').unwrap_or((&scientific, ""));
        (digits.to_owned(), exponent(&format!("e{power}")))
    } else {
        (format!("{value:.*}", (precision as i64 - 1 - power).max(0) as usize), String::new())
    };
    if !alternate && digits.contains('.') {
        digits.truncate(digits.trim_end_matches('0').trim_end_matches('.').len());
    }
    digits + &tail
}

/// A format specification of `str.format`; that of `%` fits into it.
#[derive(Clone, Debug)]
struct Spec {
    fill: char,
    align: Option<char>,
    sign: char,
    alternate: bool,
    zero: bool,
    width: usize,
    grouping: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            fill: ' ',
            align: None,
            sign: '-',
            alternate: false,
            zero: false,
            width: 0,
            grouping: None,
            precision: None,
            kind: None,
        }
    }
}

fn number(state: &State, negative: bool, prefix: &str, digits: &str, spec: &Spec) -> Result<String> {
    let sign = match (negative, spec.sign) {
        (true, _) => "-",
        (false, '+') => "+",
        (false, ' ') => " ",
        _ => "",
    };
    let mut digits = digits.to_owned();
    let is_zero_filled = spec.align == Some('=') || (spec.zero && spec.align.is_none());
    if let Some(separator) = spec.grouping {
        let size = if matches!(spec.kind, Some('x' | 'X' | 'b' | 'o')) { 4 } else { 3 };
        let minimum = if is_zero_filled { spec.width.saturating_sub(sign.len() + prefix.len()) } else { 0 };
        charge_bytes(state, minimum)?;
        digits = grouped(&digits, separator, size, minimum);
    }
    if is_zero_filled {
        let length = sign.len() + prefix.len() + digits.chars().count();
        let fill = if spec.zero && spec.align.is_none() { '0' } else { spec.fill };
        let filled = repeat(state, fill.encode_utf8(&mut [0; 4]), spec.width.saturating_sub(length))?;
        return Ok([sign, prefix, &filled, &digits].concat());
    }
    pad(state, &[sign, prefix, &digits].concat(), spec, '>')
}

/// The digits before the point in groups; zeros in front fill up to `minimum` characters.
fn grouped(digits: &str, separator: char, size: usize, minimum: usize) -> String {
    let whole = digits.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(digits.len());
    let (whole, rest) = digits.split_at(whole);
    let mut reversed: Vec<char> = Vec::new();
    let mut source = whole.chars().rev();
    let mut count = 0;
    loop {
        let next = source.next();
        let missing = reversed.len() + rest.len() < minimum;
        if next.is_none() && !missing {
            break;
        }
        if count > 0 && count % size == 0 {
            reversed.push(separator);
        }
        reversed.push(next.unwrap_or('0'));
        count += 1;
    }
    reversed.iter().rev().collect::<String>() + rest
}

fn pad(state: &State, text: &str, spec: &Spec, default: char) -> Result<String> {
    let missing = spec.width.saturating_sub(text.chars().count());
    if missing == 0 {
        return Ok(text.to_owned());
    }
    let left = match spec.align.unwrap_or(default) {
        '<' => 0,
        '^' => missing / 2,
        _ => missing,
    };
    let fill = spec.fill.encode_utf8(&mut [0; 4]).to_owned();
    Ok(repeat(state, &fill, left)? + text + &repeat(state, &fill, missing - left)?)
}

/// `ascii`: what `repr` leaves as it is becomes an escape outside of ASCII.
fn ascii(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii() { result.push(c) } else { escaped(&mut result, c) }
    }
    result
}

/// `text.format(...)`.
pub(super) fn str_format(state: &mut State<'_, '_>, template: &Value, args: &Args) -> Result<Value> {
    let text = template.as_str().unwrap_or_default();
    charge_text(state, text)?;
    let mut formatter = Formatter { args, automatic: None, next: 0, safe: template.is_safe() };
    let out = formatter.render(state, text, 3)?;
    Ok(if template.is_safe() { Value::from_safe_string(out) } else { out.into() })
}

struct Formatter<'a> {
    args: &'a Args,
    /// Whether fields are numbered by their order; decided by the first field.
    automatic: Option<bool>,
    next: usize,
    safe: bool,
}

impl Formatter<'_> {
    fn render(&mut self, state: &mut State<'_, '_>, text: &str, depth: usize) -> Result<String> {
        if depth == 0 {
            return Err(fail("format: fields are nested too deeply"));
        }
        let mut out = String::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            out.push_str(&rest[..at]);
            let (brace, after) = rest[at..].split_at(1);
            if after.starts_with(brace) {
                out.push_str(brace);
                rest = &after[1..];
                continue;
            }
            if brace == "}" {
                return Err(fail("format: a single `}` in the text"));
            }
            let end = closing(after).ok_or_else(|| fail("format: a `{` is not closed"))?;
            let field = self.field(state, &after[..end], depth)?;
            charge_bytes(state, field.len())?;
            out.push_str(&field);
            rest = &after[end + 1..];
        }
        out.push_str(rest);
        Ok(out)
    }

    fn field(&mut self, state: &mut State<'_, '_>, field: &str, depth: usize) -> Result<String> {
        let split = field_end(field);
        let (name, rest) = field.split_at(split);
        let (conversion, rest) = match rest.strip_prefix('!') {
            Some(rest) => {
                let mut chars = rest.chars();
                let conversion = chars.next().ok_or_else(|| fail("format: nothing behind `!`"))?;
                (Some(conversion), chars.as_str())
            }
            None => (None, rest),
        };
        let spec = match rest.strip_prefix(':') {
            Some(spec) => spec,
            None if rest.is_empty() => "",
            None => return Err(fail("format: expected `:` behind the conversion")),
        };
        let value = self.value(state, name)?;
        let spec = self.render(state, spec, depth - 1)?;
        let value = match conversion {
            None => value,
            Some('s') => str_of(state, &value)?.into_owned().into(),
            Some('r') => repr(state, &value)?.into(),
            Some('a') => ascii(&repr(state, &value)?).into(),
            Some(other) => return Err(fail(format!("format: unknown conversion `!{other}`"))),
        };
        let text = format_value(state, &value, &spec)?;
        Ok(if self.safe && !value.is_safe() { escape(&text) } else { text })
    }

    fn value(&mut self, state: &mut State<'_, '_>, name: &str) -> Result<Value> {
        let first = name.find(['.', '[']).unwrap_or(name.len());
        let (first, mut rest) = name.split_at(first);
        let index = if first.is_empty() {
            if *self.automatic.get_or_insert(true) {
                self.next += 1;
                Some(self.next - 1)
            } else {
                return Err(fail("format: `{}` and numbered fields are mixed"));
            }
        } else if first.bytes().all(|b| b.is_ascii_digit()) {
            if *self.automatic.get_or_insert(false) {
                return Err(fail("format: `{}` and numbered fields are mixed"));
            }
            first.parse::<usize>().ok()
        } else {
            None
        };
        let found = match index {
            Some(index) => self.args.positional.get(index).cloned(),
            None => self.args.named.iter().find(|(name, _)| name == first).map(|(_, value)| value.clone()),
        };
        let mut value = found.ok_or_else(|| fail(format!("format: there is no value for `{{{first}}}`")))?;
        while !rest.is_empty() {
            if let Some(attribute) = rest.strip_prefix('.') {
                let end = attribute.find(['.', '[']).unwrap_or(attribute.len());
                value = get_attr(state, &value, &attribute[..end])?;
                rest = &attribute[end..];
            } else {
                let item = rest.strip_prefix('[').and_then(|item| item.split_once(']'));
                let (key, after) = item.ok_or_else(|| fail("format: expected `.` or `[`"))?;
                let key = key.parse::<i64>().map_or_else(|_| Value::from(key), Value::from);
                value = get_item(state, &value, &key)?;
                rest = after;
            }
        }
        Ok(value)
    }
}

/// The place of the brace that closes a field.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 1;
    for (at, byte) in text.bytes().enumerate() {
        depth += i32::from(byte == b'{') - i32::from(byte == b'}');
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

/// Where the name of a field ends; a key in brackets may contain the separators.
fn field_end(field: &str) -> usize {
    let mut in_brackets = false;
    for (at, byte) in field.bytes().enumerate() {
        match byte {
            b'[' => in_brackets = true,
            b']' => in_brackets = false,
            b'!' | b':' if !in_brackets => return at,
            _ => {}
        }
    }
    field.len()
}

/// `format(value, spec)`.
fn format_value(state: &mut State<'_, '_>, value: &Value, spec: &str) -> Result<String> {
    if spec.is_empty() {
        return str_of(state, value).map(std::borrow::Cow::into_owned);
    }
    let spec = parse_spec(spec)?;
    let wrong = || fail(format!("format: a {} cannot have this format", Type::of(value)));
    match Type::of(value) {
        Type::Str => {
            if !matches!(spec.kind, None | Some('s')) || spec.align == Some('=') || spec.grouping.is_some() {
                return Err(wrong());
            }
            if spec.sign != '-' || spec.alternate {
                return Err(wrong());
            }
            let text = value.as_str().unwrap_or_default();
            let cut: String = match spec.precision {
                Some(precision) => text.chars().take(precision).collect(),
                None => text.to_owned(),
            };
            let fill = if spec.zero { '0' } else { spec.fill };
            pad(state, &cut, &Spec { fill, ..spec }, '<')
        }
        Type::Bool | Type::Int | Type::Float => format_number(state, value, &spec, &wrong),
        _ => Err(wrong()),
    }
}

fn format_number(
    state: &State,
    value: &Value,
    spec: &Spec,
    wrong: &dyn Fn() -> minijinja::Error,
) -> Result<String> {
    let num = Num::of(value).ok_or_else(wrong)?;
    let as_float = match spec.kind {
        None | Some('n') => matches!(num, Num::Float(_)),
        Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%') => true,
        _ => false,
    };
    if !as_float {
        let Num::Int(int) = num else { return Err(wrong()) };
        if spec.precision.is_some() {
            return Err(wrong());
        }
        let size = int.unsigned_abs();
        let (digits, prefix) = match spec.kind {
            None | Some('d' | 'n') => (size.to_string(), ""),
            Some('x') => (format!("{size:x}"), "0x"),
            Some('X') => (format!("{size:X}"), "0X"),
            Some('o') => (format!("{size:o}"), "0o"),
            Some('b') => (format!("{size:b}"), "0b"),
            Some('c') => {
                let c = u32::try_from(int).ok().and_then(char::from_u32).ok_or_else(wrong)?;
                return pad(state, c.encode_utf8(&mut [0; 4]), spec, '<');
            }
            _ => return Err(wrong()),
        };
        return number(state, int < 0, if spec.alternate { prefix } else { "" }, &digits, spec);
    }
    let float = num.to_f64();
    charge_bytes(state, spec.precision.unwrap_or(6))?;
    let digits = match (spec.kind, spec.precision) {
        (None, None) => super::text::float(float.abs()),
        (None, Some(precision)) => {
            let text = general(float.abs(), precision.max(1), spec.alternate);
            // Without a type, a float keeps one digit behind the point, and so has the exponent earlier.
            let has_exponent = text.contains('e');
            if !float.is_finite() {
                float_digits(float.abs(), 'g', precision, false)
            } else if has_exponent || text.contains('.') {
                text
            } else if text.len() >= precision.max(1) && precision > 0 {
                general_with_exponent(float.abs(), precision)
            } else {
                text + ".0"
            }
        }
        (Some('%'), precision) => float_digits(float.abs() * 100.0, 'f', precision.unwrap_or(6), false) + "%",
        (Some(kind), precision) => {
            let kind = if kind == 'n' { 'g' } else { kind };
            float_digits(float.abs(), kind, precision.unwrap_or(6), spec.alternate)
        }
    };
    number(state, float.is_sign_negative() && !float.is_nan(), "", &digits, spec)
}

fn general_with_exponent(value: f64, precision: usize) -> String {
    let scientific = format!("{value:.*e}", precision - 1);
    let (digits, power) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let digits =
        if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits };
    digits.to_owned() + &exponent(&format!("e{power}"))
}

/// `[[fill]align][sign][#][0][width][grouping][.precision][type]`
fn parse_spec(text: &str) -> Result<Spec> {
    let mut spec = Spec::default();
    let chars: Vec<char> = text.chars().collect();
    let is_align = |c: Option<&char>| c.is_some_and(|c| "<>=^".contains(*c));
    let mut at = 0;
    if is_align(chars.get(1)) {
        (spec.fill, spec.align, at) = (chars[0], Some(chars[1]), 2);
    } else if is_align(chars.first()) {
        (spec.align, at) = (Some(chars[0]), 1);
    }
    let take = |at: &mut usize, accepted: &str| {
        let found = chars.get(*at).copied().filter(|c| accepted.contains(*c));
        *at += usize::from(found.is_some());
        found
    };
    let digits = |at: &mut usize| {
        let mut number = None;
        while let Some(digit) = take(at, "0123456789") {
            let digit = i128::from(digit as u8 - b'0');
            number = Some(number.unwrap_or(0_i128).saturating_mul(10).saturating_add(digit));
        }
        number.map(size).transpose()
    };
    spec.sign = take(&mut at, "+- ").unwrap_or('-');
    spec.alternate = take(&mut at, "#").is_some();
    spec.zero = take(&mut at, "0").is_some();
    spec.width = digits(&mut at)?.unwrap_or(0);
    spec.grouping = take(&mut at, ",_");
    if take(&mut at, ".").is_some() {
        spec.precision = Some(digits(&mut at)?.ok_or_else(|| fail("format: the precision is missing"))?);
    }
    spec.kind = chars.get(at).copied();
    if chars.len() > at + 1 {
        return Err(fail(format!("format: `{text}` is not a valid specification")));
    }
    Ok(spec)
}
