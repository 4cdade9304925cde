//! The filters of Jinja2 for containers and for single values; those for texts are in [`text_filters`](super::text_filters).

use minijinja::{State, Value};

use super::{
    Result,
    args::{Args, flag, given},
    fail, find_filter, find_test, methods,
    ops::{self, Num, add, equal, get_item, int_arg, int_value, length, merge_sort, ordered},
    percent::float_to_int,
    strings,
    value::{Dict, Key, Type, generator, iterate, list, tuple},
};

/// A filter, test or function with the arguments that a template gives it.
pub(super) type Callable = fn(&mut State<'_, '_>, Args) -> Result<Value>;

pub(super) const FILTERS: &[(&str, Callable)] = &[
    ("abs", abs),
    ("attr", attr),
    ("batch", batch),
    ("count", count),
    ("d", default),
    ("default", default),
    ("dictsort", dict_sort),
    ("first", first),
    ("float", to_float),
    ("groupby", group_by),
    ("int", to_int),
    ("items", dict_items),
    ("last", last),
    ("length", count),
    ("list", to_list),
    ("map", map),
    ("max", max),
    ("min", min),
    ("reject", reject),
    ("rejectattr", reject_attr),
    ("reverse", reverse),
    ("round", round),
    ("select", select),
    ("selectattr", select_attr),
    ("slice", slice),
    ("sort", sort),
    ("sum", sum),
    ("unique", unique),
];

fn abs(_: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value] = args.bind("abs", [""], 1)?;
    match value.as_ref().and_then(Num::of) {
        Some(Num::Int(int)) => int.checked_abs().map(int_value).ok_or_else(|| fail("abs: too large")),
        Some(Num::Float(float)) => Ok(float.abs().into()),
        None => Err(fail("abs: expected a number")),
    }
}

fn attr(_: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [object, name] = args.bind("attr", ["obj", "name"], 2)?;
    let object = object.unwrap_or_default();
    if object.is_undefined() {
        return Err(fail("attr: the value is undefined"));
    }
    Ok(ops::attribute(&object, strings::string(name.as_ref())?).unwrap_or_default())
}

fn batch(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value, size, fill] = args.bind("batch", ["value", "linecount", "fill_with"], 2)?;
    let size = int_arg(&size.unwrap_or_default())?;
    let items = iterate(state, &value.unwrap_or_default())?;
    let mut batches = Vec::new();
    let mut batch: Vec<Value> = Vec::new();
    for item in items {
        if batch.len() as i128 == size {
            batches.push(list(state, std::mem::take(&mut batch))?);
        }
        batch.push(item);
    }
    if !batch.is_empty() {
        if let Some(fill) = given(fill) {
            while (batch.len() as i128) < size {
                state.consume_fuel(1)?;
                batch.push(fill.clone());
            }
        }
        batches.push(list(state, batch)?);
    }
    generator(state, "generator object do_batch", batches)
}

fn count(_: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value] = args.bind("length", [""], 1)?;
    length(&value.unwrap_or_default()).map(Value::from)
}

fn default(_: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value, default, boolean] = args.bind("default", ["value", "default_value", "boolean"], 1)?;
    let value = value.unwrap_or_default();
    if value.is_undefined() || (flag(boolean.as_ref()) && !value.is_true()) {
        return Ok(default.unwrap_or_else(|| "".into()));
    }
    Ok(value)
}

fn dict_sort(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let names = ["value", "case_sensitive", "by", "reverse"];
    let [value, case_sensitive, by, reverse] = args.bind("dictsort", names, 1)?;
    let by_value = match by.as_ref().map(|by| by.as_str()) {
        None | Some(Some("key")) => false,
        Some(Some("value")) => true,
        _ => return Err(fail("dictsort: `by` is neither `key` nor `value`")),
    };
    let value = value.unwrap_or_default();
    let dict = value.downcast_object_ref::<Dict>().ok_or_else(|| fail("dictsort: expected a dict"))?;
    let fold = !flag(case_sensitive.as_ref());
    let pairs = dict.pairs().map(|(key, value)| {
        let by = if by_value { value } else { key };
        (if fold { lowered(by.clone()) } else { by.clone() }, (key.clone(), value.clone()))
    });
    let sorted = sort_by_key(state, pairs.collect(), flag(reverse.as_ref()))?;
    let items = sorted.into_iter().map(|(key, value)| tuple(state, vec![key, value]));
    list(state, items.collect::<Result<_>>()?)
}

/// Sorts by a key, stable in both directions.
fn sort_by_key<T>(state: &State, mut items: Vec<(Value, T)>, reverse: bool) -> Result<Vec<T>> {
    if reverse {
        items.reverse();
    }
    let mut items = merge_sort(items, &mut |a, b| ordered(state, "<", &a.0, &b.0))?;
    if reverse {
        items.reverse();
    }
    Ok(items.into_iter().map(|(_, item)| item).collect())
}

/// A text in lower case, and all else as it is: for comparisons without case.
fn lowered(value: Value) -> Value {
    match value.as_str() {
        Some(text) => text.to_lowercase().into(),
        None => value,
    }
}

/// A path such as `a.b.0` to what is within a value.
struct Path(Vec<Value>);

impl Path {
    fn new(attribute: Option<&Value>) -> Self {
        let Some(attribute) = attribute.filter(|attribute| !attribute.is_none()) else {
            return Self(Vec::new());
        };
        let Some(text) = attribute.as_str() else { return Self(vec![attribute.clone()]) };
        let part = |part: &str| part.parse::<u32>().map_or_else(|_| Value::from(part), Value::from);
        Self(text.split('.').map(part).collect())
    }

    fn get(&self, state: &State, value: &Value, default: Option<&Value>) -> Result<Value> {
        let mut value = value.clone();
        for part in &self.0 {
            value = get_item(state, &value, part)?;
            if value.is_undefined()
                && let Some(default) = default
            {
                value = default.clone();
            }
        }
        Ok(value)
    }
}

fn first(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value] = args.bind("first", ["seq"], 1)?;
    Ok(methods::first(state, &value.unwrap_or_default())?.unwrap_or_default())
}

fn last(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value] = args.bind("last", ["seq"], 1)?;
    Ok(methods::last(state, &value.unwrap_or_default())?.unwrap_or_default())
}

fn to_float(_: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value, default] = args.bind("float", ["value", "default"], 1)?;
    let value = value.unwrap_or_default();
    if value.is_undefined() {
        return Err(fail("float: the value is undefined"));
    }
    let float = match value.as_str() {
        Some(text) => parse_float(text),
        None => Num::of(&value).map(Num::to_f64),
    };
    Ok(float.map_or_else(|| default.unwrap_or_else(|| 0.0.into()), Value::from))
}

/// `float(text)`.
fn parse_float(text: &str) -> Option<f64> {
    let text = strings::strip(text, None, true, true);
    without_underscores(text)?.parse().ok()
}

/// A number without its underscores, each of which must stand between digits.
fn without_underscores(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let is_digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_alphanumeric);
    for (at, byte) in bytes.iter().enumerate() {
        if *byte == b'_' && !(at > 0 && is_digit(at - 1) && is_digit(at + 1)) {
            return None;
        }
    }
    Some(text.replace('_', ""))
}

fn to_int(_: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value, default, base] = args.bind("int", ["value", "default", "base"], 1)?;
    let value = value.unwrap_or_default();
    if value.is_undefined() {
        return Err(fail("int: the value is undefined"));
    }
    // A base that is no integer makes Python try a float.
    let base = base.map_or(Some(10), |base| int_arg(&base).ok());
    let default = default.unwrap_or_else(|| 0.into());
    match (value.as_str(), Num::of(&value)) {
        (Some(text), _) => {
            if let Some(int) = base.and_then(|base| parse_int(text, base)) {
                return Ok(int_value(int));
            }
            match parse_float(text) {
                Some(float) if float.is_finite() => float_to_int(float).map(int_value),
                _ => Ok(default),
            }
        }
        (None, Some(Num::Int(int))) => Ok(int_value(int)),
        (None, Some(Num::Float(float))) if float.is_nan() => Ok(default),
        (None, Some(Num::Float(float))) => float_to_int(float).map(int_value),
        _ => Ok(default),
    }
}

/// `int(text, base)`.
fn parse_int(text: &str, base: i128) -> Option<i128> {
    let text = strings::strip(text, None, true, true);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = digits.to_ascii_lowercase();
    let prefixed =
        |prefix: &str| lower.strip_prefix(prefix).map(|rest| rest.strip_prefix('_').unwrap_or(rest));
    let (base, digits) = match base {
        16 => (16, prefixed("0x").unwrap_or(&lower)),
        8 => (8, prefixed("0o").unwrap_or(&lower)),
        2 => (2, prefixed("0b").unwrap_or(&lower)),
        0 => match (prefixed("0x"), prefixed("0o"), prefixed("0b")) {
            (Some(digits), _, _) => (16, digits),
            (_, Some(digits), _) => (8, digits),
            (_, _, Some(digits)) => (2, digits),
            _ if lower.starts_with('0') && lower.bytes().any(|b| (b'1'..=b'9').contains(&b)) => return None,
            _ => (10, &*lower),
        },
        base => (u32::try_from(base).ok().filter(|base| (2..=36).contains(base))?, &*lower),
    };
    if digits.starts_with(['+', '-']) {
        return None;
    }
    let int = i128::from_str_radix(&without_underscores(digits)?, base).ok()?;
    Some(if negative { -int } else { int })
}

fn group_by(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let names = ["value", "attribute", "default", "case_sensitive"];
    let [value, attribute, default, case_sensitive] = args.bind("groupby", names, 2)?;
    let (path, default) = (Path::new(attribute.as_ref()), given(default));
    let fold = !flag(case_sensitive.as_ref());
    let mut keyed = Vec::new();
    for item in iterate(state, &value.unwrap_or_default())? {
        let real = path.get(state, &item, default.as_ref())?;
        let key = if fold { lowered(real.clone()) } else { real.clone() };
        keyed.push((key.clone(), (key, real, item)));
    }
    let mut groups: Vec<(Value, Value, Vec<Value>)> = Vec::new();
    for (key, real, item) in sort_by_key(state, keyed, false)? {
        match groups.last_mut() {
            Some((last, _, items)) if equal(state, last, &key)? => items.push(item),
            _ => groups.push((key, real, vec![item])),
        }
    }
    let groups = groups.into_iter().map(|(_, real, items)| {
        let items = list(state, items)?;
        super::value::group(state, real, items)
    });
    list(state, groups.collect::<Result<_>>()?)
}

fn dict_items(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value] = args.bind("items", ["value"], 1)?;
    let value = value.unwrap_or_default();
    let pairs = match (value.downcast_object_ref::<Dict>(), value.is_undefined()) {
        (Some(dict), _) => dict
            .pairs()
            .map(|(key, value)| tuple(state, vec![key.clone(), value.clone()]))
            .collect::<Result<_>>()?,
        (None, true) => Vec::new(),
        _ => return Err(fail("items: expected a dict")),
    };
    generator(state, "generator object do_items", pairs)
}

fn to_list(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value] = args.bind("list", ["value"], 1)?;
    list(state, iterate(state, &value.unwrap_or_default())?)
}

fn map(state: &mut State<'_, '_>, mut args: Args) -> Result<Value> {
    let value = first_argument(&mut args)?;
    let mut result = Vec::new();
    if value.is_true() {
        let attribute = args.named.iter().position(|(name, _)| name == "attribute");
        if let (true, Some(at)) = (args.positional.is_empty(), attribute) {
            let (_, attribute) = args.named.remove(at);
            let [default] = args.bind("map", ["default"], 0)?;
            let (path, default) = (Path::new(Some(&attribute)), given(default));
            for item in iterate(state, &value)? {
                result.push(path.get(state, &item, default.as_ref())?);
            }
        } else {
            let name =
                first_argument(&mut args).map_err(|_| fail("map: the name of the filter is missing"))?;
            let items = iterate(state, &value)?;
            for item in items {
                state.consume_fuel(1)?;
                let filter = find_filter(strings::string(Some(&name))?)?;
                result.push(filter(state, args.clone().with_first(item))?);
            }
        }
    }
    generator(state, "generator object sync_do_map", result)
}

fn first_argument(args: &mut Args) -> Result<Value> {
    if args.positional.is_empty() {
        return Err(fail("an argument is missing"));
    }
    Ok(args.positional.remove(0))
}

fn max(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    extreme(state, args, "max", ">")
}

fn min(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    extreme(state, args, "min", "<")
}

fn extreme(state: &mut State<'_, '_>, args: Args, name: &str, operator: &str) -> Result<Value> {
    let [value, case_sensitive, attribute] = args.bind(name, ["value", "case_sensitive", "attribute"], 1)?;
    let path = Path::new(attribute.as_ref());
    let fold = !flag(case_sensitive.as_ref());
    let mut best: Option<(Value, Value)> = None;
    for item in iterate(state, &value.unwrap_or_default())? {
        let key = path.get(state, &item, None)?;
        let key = if fold { lowered(key) } else { key };
        let is_better = match &best {
            Some((other, _)) => ordered(state, operator, &key, other)?,
            None => true,
        };
        if is_better {
            best = Some((key, item));
        }
    }
    Ok(best.map(|(_, item)| item).unwrap_or_default())
}

fn select(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    select_or_reject(state, args, true, false)
}

fn reject(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    select_or_reject(state, args, false, false)
}

fn select_attr(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    select_or_reject(state, args, true, true)
}

fn reject_attr(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    select_or_reject(state, args, false, true)
}

fn select_or_reject(state: &mut State<'_, '_>, mut args: Args, wanted: bool, by_attr: bool) -> Result<Value> {
    let value = first_argument(&mut args)?;
    let mut result = Vec::new();
    if value.is_true() {
        let path = if by_attr {
            Path::new(Some(&first_argument(&mut args).map_err(|_| fail("the attribute is missing"))?))
        } else {
            Path(Vec::new())
        };
        let test = first_argument(&mut args).ok();
        let items = iterate(state, &value)?;
        for item in items {
            state.consume_fuel(1)?;
            let subject = path.get(state, &item, None)?;
            let holds = match &test {
                Some(name) => {
                    let test = find_test(strings::string(Some(name))?)?;
                    test(state, args.clone().with_first(subject))?
                }
                None => subject,
            };
            if holds.is_true() == wanted {
                result.push(item);
            }
        }
    }
    generator(state, "generator object select_or_reject", result)
}

fn reverse(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value] = args.bind("reverse", ["value"], 1)?;
    let value = value.unwrap_or_default();
    if let Some(text) = value.as_str() {
        let reversed: String = text.chars().rev().collect();
        return Ok(if value.is_safe() { Value::from_safe_string(reversed) } else { reversed.into() });
    }
    let mut items = iterate(state, &value)?;
    items.reverse();
    match Type::of(&value) {
        Type::List => generator(state, "list_reverseiterator object", items),
        Type::Tuple => generator(state, "reversed object", items),
        Type::Range => generator(state, "range_iterator object", items),
        Type::Dict | Type::View => generator(state, "dict_reversekeyiterator object", items),
        _ => list(state, items),
    }
}

fn round(_: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value, precision, method] = args.bind("round", ["value", "precision", "method"], 1)?;
    let value = value.as_ref().and_then(Num::of).ok_or_else(|| fail("round: expected a number"))?;
    if let (Some(precision), Num::Float(float)) = (&precision, value)
        && precision.is_none()
    {
        // Without a precision, Python makes an integer.
        return float_to_int(float.round_ties_even()).map(int_value);
    }
    let precision = given(precision).map_or(Ok(0), |precision| int_arg(&precision))?.clamp(-400, 400) as i32;
    let floor = match method.as_ref().map(|method| method.as_str()) {
        None | Some(Some("common")) => {
            return Ok(match value {
                Num::Int(int) => int_value(round_int(int, precision)),
                Num::Float(float) => round_float(float, precision).into(),
            });
        }
        Some(Some("floor")) => f64::floor,
        Some(Some("ceil")) => f64::ceil,
        _ => return Err(fail("round: the method is none of common, ceil, floor")),
    };
    let (rounded, scale) = match (value, 10_f64.powi(precision)) {
        (Num::Int(int), _) if precision >= 0 => {
            let scale = 10_i128.checked_pow(precision as u32).and_then(|scale| int.checked_mul(scale));
            (scale.ok_or_else(|| fail("round: too large"))? as f64, 10_f64.powi(precision))
        }
        (value, scale) => (floor(value.to_f64() * scale), scale),
    };
    if !rounded.is_finite() {
        return Err(fail("round: a float that is not finite cannot become an integer"));
    }
    // An integer has no negative zero.
    Ok((if rounded == 0.0 { 0.0 } else { rounded } / scale).into())
}

/// Rounds to tens, hundreds and so on; halves go to the even neighbour.
fn round_int(int: i128, precision: i32) -> i128 {
    if precision >= 0 {
        return int;
    }
    let Some(unit) = 10_i128.checked_pow(precision.unsigned_abs()) else { return 0 };
    let (quotient, rest) = (int.div_euclid(unit), int.rem_euclid(unit));
    let up = rest * 2 > unit || (rest * 2 == unit && quotient % 2 != 0);
    (quotient + i128::from(up)) * unit
}

/// `round(float, precision)`: correctly rounded from the exact value.
fn round_float(float: f64, precision: i32) -> f64 {
    if !float.is_finite() || precision > 330 {
        return float;
    }
    if precision >= 0 {
        return format!("{float:.*}", precision as usize).parse().unwrap_or(float);
    }
    let Some(unit) = 10_i128.checked_pow(precision.unsigned_abs()) else { return 0.0_f64.copysign(float) };
    let tens = float / unit as f64;
    let rounded = tens.round_ties_even() * unit as f64;
    if rounded == 0.0 { 0.0_f64.copysign(float) } else { rounded }
}

fn slice(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value, slices, fill] = args.bind("slice", ["value", "slices", "fill_with"], 2)?;
    let items = iterate(state, &value.unwrap_or_default())?;
    let slices = int_arg(&slices.unwrap_or_default())?;
    if slices == 0 {
        return Err(fail("slice: division by zero"));
    }
    let slices = usize::try_from(slices).unwrap_or(0);
    state.consume_fuel(slices as u64)?;
    let each = items.len().checked_div(slices).unwrap_or(0);
    let extra = items.len().checked_rem(slices).unwrap_or(0);
    let fill = given(fill);
    let mut at = 0;
    let mut result = Vec::new();
    for number in 0..slices {
        let end = at + each + usize::from(number < extra);
        let mut part = items[at..end].to_vec();
        at = end;
        if let Some(fill) = fill.as_ref().filter(|_| number >= extra) {
            part.push(fill.clone());
        }
        result.push(list(state, part)?);
    }
    generator(state, "generator object sync_do_slice", result)
}

fn sort(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let names = ["value", "reverse", "case_sensitive", "attribute"];
    let [value, reverse, case_sensitive, attribute] = args.bind("sort", names, 1)?;
    let paths: Vec<Path> = match attribute.as_ref().and_then(|attribute| attribute.as_str()) {
        Some(attributes) => attributes.split(',').map(|part| Path::new(Some(&part.into()))).collect(),
        None => vec![Path::new(attribute.as_ref())],
    };
    let fold = !flag(case_sensitive.as_ref());
    let mut keyed = Vec::new();
    for item in iterate(state, &value.unwrap_or_default())? {
        let key = paths.iter().map(|path| {
            let key = path.get(state, &item, None)?;
            Ok(if fold { lowered(key) } else { key })
        });
        keyed.push((list(state, key.collect::<Result<_>>()?)?, item));
    }
    list(state, sort_by_key(state, keyed, flag(reverse.as_ref()))?)
}

fn sum(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value, attribute, start] = args.bind("sum", ["iterable", "attribute", "start"], 1)?;
    let path = Path::new(attribute.as_ref());
    let mut total = start.unwrap_or_else(|| 0.into());
    if Type::of(&total) == Type::Str {
        return Err(fail("sum: a text cannot be the start"));
    }
    for item in iterate(state, &value.unwrap_or_default())? {
        total = add(state, &total, &path.get(state, &item, None)?)?;
    }
    Ok(total)
}

fn unique(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value, case_sensitive, attribute] =
        args.bind("unique", ["value", "case_sensitive", "attribute"], 1)?;
    let path = Path::new(attribute.as_ref());
    let fold = !flag(case_sensitive.as_ref());
    let mut seen = std::collections::HashSet::new();
    let mut result = Vec::new();
    for item in iterate(state, &value.unwrap_or_default())? {
        let key = path.get(state, &item, None)?;
        let key = if fold { lowered(key) } else { key };
        if seen.insert(Key::new(state, &key)?) {
            result.push(item);
        }
    }
    generator(state, "generator object sync_do_unique", result)
}
