//! Python's operators: arithmetic, comparison, membership and subscription.

use std::cmp::Ordering;

use minijinja::{State, Value};

use super::{
    Result, fail, methods, percent,
    text::{charge_text, escape, str_of},
    value::{
        Dict, Key, Meter, Method, Namespace, Range, Sequence, Type, View, ViewKind, address, charge_bytes,
        charge_items, items, iterate, not_iterable, sequence, tuple_of,
    },
};

/// A number of Python: an `int` (or `bool`) or a `float`.
#[derive(Clone, Copy, Debug)]
pub(super) enum Num {
    Int(i128),
    Float(f64),
}

impl Num {
    pub(super) fn of(value: &Value) -> Option<Self> {
        match Type::of(value) {
            Type::Bool => Some(Self::Int(value.is_true().into())),
            Type::Int => i128::try_from(value.clone()).ok().map(Self::Int),
            Type::Float => f64::try_from(value.clone()).ok().map(Self::Float),
            _ => None,
        }
    }

    pub(super) fn to_f64(self) -> f64 {
        match self {
            Self::Int(int) => int as f64,
            Self::Float(float) => float,
        }
    }

    fn compare(self, other: Self) -> Option<Ordering> {
        match (self, other) {
            (Self::Int(a), Self::Int(b)) => Some(a.cmp(&b)),
            (Self::Float(a), Self::Float(b)) => a.partial_cmp(&b),
            (Self::Int(a), Self::Float(b)) => compare_int_float(a, b),
            (Self::Float(a), Self::Int(b)) => compare_int_float(b, a).map(Ordering::reverse),
        }
    }
}

/// Compares without rounding the integer.
fn compare_int_float(int: i128, float: f64) -> Option<Ordering> {
    if float.is_nan() {
        return None;
    }
    if float >= 1.7e38 {
        return Some(Ordering::Less);
    }
    if float <= -1.7e38 {
        return Some(Ordering::Greater);
    }
    let whole = float.trunc();
    Some(int.cmp(&(whole as i128)).then_with(|| whole.partial_cmp(&float).unwrap_or(Ordering::Equal)))
}

pub(super) fn int_value(int: i128) -> Value {
    i64::try_from(int).map_or_else(|_| Value::from(int), Value::from)
}

fn too_large() -> minijinja::Error {
    fail("an integer has more than 128 bits")
}

/// An integer argument; `true` and `false` count as 1 and 0, a float is refused.
pub(super) fn int_arg(value: &Value) -> Result<i128> {
    match Num::of(value) {
        Some(Num::Int(int)) => Ok(int),
        _ => Err(fail(format!("a {} was given, expected an integer", Type::of(value)))),
    }
}

fn unsupported(operator: &str, a: &Value, b: &Value) -> minijinja::Error {
    fail(format!("`{operator}` between a {} and a {}", Type::of(a), Type::of(b)))
}

pub(super) fn add(state: &State, a: &Value, b: &Value) -> Result<Value> {
    match (Type::of(a), Type::of(b)) {
        (Type::Str, Type::Str) => {
            let (x, y) = (a.as_str().unwrap_or_default(), b.as_str().unwrap_or_default());
            charge_bytes(state, x.len() + y.len())?;
            Ok(match (a.is_safe(), b.is_safe()) {
                (false, false) => Value::from([x, y].concat()),
                (true, true) => Value::from_safe_string([x, y].concat()),
                (true, false) => Value::from_safe_string([x, &escape(y)].concat()),
                (false, true) => Value::from_safe_string([&escape(x), y].concat()),
            })
        }
        (Type::List, Type::List) => sequence(state, [items(a), items(b)].concat(), false),
        (Type::Tuple, Type::Tuple) => sequence(state, [items(a), items(b)].concat(), true),
        _ => arithmetic("+", a, b, i128::checked_add, |x, y| x + y),
    }
}

pub(super) fn sub(a: &Value, b: &Value) -> Result<Value> {
    arithmetic("-", a, b, i128::checked_sub, |x, y| x - y)
}

fn arithmetic(
    operator: &str,
    a: &Value,
    b: &Value,
    ints: fn(i128, i128) -> Option<i128>,
    floats: fn(f64, f64) -> f64,
) -> Result<Value> {
    match (Num::of(a), Num::of(b)) {
        (Some(Num::Int(x)), Some(Num::Int(y))) => ints(x, y).map(int_value).ok_or_else(too_large),
        (Some(x), Some(y)) => Ok(floats(x.to_f64(), y.to_f64()).into()),
        _ => Err(unsupported(operator, a, b)),
    }
}

pub(super) fn mul(state: &State, a: &Value, b: &Value) -> Result<Value> {
    let repeated = |value: &Value, count: &Value| -> Option<Result<Value>> {
        let Some(Num::Int(count)) = Num::of(count) else { return None };
        let count = usize::try_from(count.max(0)).unwrap_or(usize::MAX);
        match Type::of(value) {
            Type::Str => Some(
                repeat(state, value.as_str().unwrap_or_default(), count)
                    .map(|text| if value.is_safe() { Value::from_safe_string(text) } else { text.into() }),
            ),
            kind @ (Type::List | Type::Tuple) => Some(
                charge_items(state, items(value).len().saturating_mul(count))
                    .and_then(|()| sequence(state, repeated_items(items(value), count), kind == Type::Tuple)),
            ),
            _ => None,
        }
    };
    repeated(a, b)
        .or_else(|| repeated(b, a))
        .unwrap_or_else(|| arithmetic("*", a, b, i128::checked_mul, |x, y| x * y))
}

fn repeated_items(items: &[Value], count: usize) -> Vec<Value> {
    std::iter::repeat_n(items, if items.is_empty() { 0 } else { count }).flatten().cloned().collect()
}

/// A text many times over, paid for before it is made.
pub(super) fn repeat(state: &State, text: &str, count: usize) -> Result<String> {
    charge_bytes(state, text.len().saturating_mul(count))?;
    Ok(if text.is_empty() { String::new() } else { text.repeat(count) })
}

pub(super) fn div(a: &Value, b: &Value) -> Result<Value> {
    match (Num::of(a), Num::of(b)) {
        (Some(_), Some(y)) if y.to_f64() == 0.0 => Err(fail("division by zero")),
        (Some(x), Some(y)) => Ok((x.to_f64() / y.to_f64()).into()),
        _ => Err(unsupported("/", a, b)),
    }
}

pub(super) fn floor_div(a: &Value, b: &Value) -> Result<Value> {
    divide("//", a, b).map(|(quotient, _)| quotient)
}

pub(super) fn rem(state: &mut State<'_, '_>, a: &Value, b: &Value) -> Result<Value> {
    if Type::of(a) == Type::Str {
        return percent::format(state, a, b);
    }
    divide("%", a, b).map(|(_, remainder)| remainder)
}

/// Quotient and remainder; the remainder has the sign of the divisor.
fn divide(operator: &str, a: &Value, b: &Value) -> Result<(Value, Value)> {
    match (Num::of(a), Num::of(b)) {
        (Some(_), Some(y)) if y.to_f64() == 0.0 => Err(fail("division by zero")),
        (Some(Num::Int(x)), Some(Num::Int(y))) => {
            let quotient = x.checked_div_euclid(y).ok_or_else(too_large)?;
            let remainder = x.checked_rem_euclid(y).ok_or_else(too_large)?;
            // Euclid's remainder is never negative; Python's has the sign of the divisor.
            let (quotient, remainder) =
                if y < 0 && remainder != 0 { (quotient - 1, remainder + y) } else { (quotient, remainder) };
            Ok((int_value(quotient), int_value(remainder)))
        }
        (Some(x), Some(y)) => {
            let (x, y) = (x.to_f64(), y.to_f64());
            let mut remainder = x % y;
            let mut quotient = (x - remainder) / y;
            if remainder == 0.0 {
                remainder = 0.0_f64.copysign(y);
            } else if (y < 0.0) != (remainder < 0.0) {
                remainder += y;
                quotient -= 1.0;
            }
            let floor = quotient.floor();
            let floor = if quotient == 0.0 {
                0.0_f64.copysign(x / y)
            } else if quotient - floor > 0.5 {
                floor + 1.0
            } else {
                floor
            };
            Ok((floor.into(), remainder.into()))
        }
        _ => Err(unsupported(operator, a, b)),
    }
}

pub(super) fn pow(a: &Value, b: &Value) -> Result<Value> {
    match (Num::of(a), Num::of(b)) {
        (Some(Num::Int(x)), Some(Num::Int(y))) if y >= 0 => {
            let power = match (x, u32::try_from(y)) {
                (_, Ok(y)) => x.checked_pow(y),
                (0 | 1, _) => Some(x),
                (-1, _) => Some(if y % 2 == 0 { 1 } else { -1 }),
                _ => None,
            };
            power.map(int_value).ok_or_else(too_large)
        }
        (Some(x), Some(y)) => {
            let (x, y) = (x.to_f64(), y.to_f64());
            if x == 0.0 && y < 0.0 {
                return Err(fail("zero cannot be raised to a negative power"));
            }
            if x < 0.0 && x.is_finite() && y.is_finite() && y.fract() != 0.0 {
                return Err(fail("the power is a complex number"));
            }
            let power = x.powf(y);
            if power.is_infinite() && x.is_finite() && y.is_finite() {
                return Err(fail("the power is too large for a float"));
            }
            Ok(power.into())
        }
        _ => Err(unsupported("**", a, b)),
    }
}

pub(super) fn neg(a: &Value) -> Result<Value> {
    match Num::of(a) {
        Some(Num::Int(int)) => int.checked_neg().map(int_value).ok_or_else(too_large),
        Some(Num::Float(float)) => Ok((-float).into()),
        None => Err(fail(format!("`-` before a {}", Type::of(a)))),
    }
}

pub(super) fn concat(state: &mut State<'_, '_>, a: &Value, b: &Value) -> Result<Value> {
    let mut text = str_of(state, a)?.into_owned();
    let end = str_of(state, b)?;
    charge_bytes(state, text.len() + end.len())?;
    text.push_str(&end);
    Ok(text.into())
}

/// `a == b`.
pub(super) fn equal(state: &State, a: &Value, b: &Value) -> Result<bool> {
    equal_within(&mut Meter::new(state), a, b)
}

fn equal_within(meter: &mut Meter<'_, '_, '_>, a: &Value, b: &Value) -> Result<bool> {
    meter.visit()?;
    if let (Some(a), Some(b)) = (a.as_str(), b.as_str()) {
        return Ok(a == b);
    }
    if let (Some(a), Some(b)) = (Num::of(a), Num::of(b)) {
        return Ok(a.compare(b) == Some(Ordering::Equal));
    }
    let kind = Type::of(a);
    if kind != Type::of(b) {
        return Ok(false);
    }
    Ok(match kind {
        Type::Undefined | Type::None => true,
        Type::List | Type::Tuple => {
            let (a, b) = (items(a), items(b));
            if a.len() != b.len() {
                return Ok(false);
            }
            for (a, b) in a.iter().zip(b) {
                if !equal_within(meter, a, b)? {
                    return Ok(false);
                }
            }
            true
        }
        Type::Dict => match (a.downcast_object_ref::<Dict>(), b.downcast_object_ref::<Dict>()) {
            (Some(a), Some(b)) => equal_dicts(meter, a, b)?,
            _ => false,
        },
        Type::Range => match (a.downcast_object_ref::<Range>(), b.downcast_object_ref::<Range>()) {
            (Some(a), Some(b)) => a.bounds() == b.bounds(),
            _ => false,
        },
        Type::View => match (a.downcast_object_ref::<View>(), b.downcast_object_ref::<View>()) {
            (Some(a), Some(b)) if a.kind == b.kind => match a.kind {
                ViewKind::Keys => a.dict.len() == b.dict.len() && all_keys(meter, &a.dict, &b.dict)?,
                ViewKind::Items => equal_dicts(meter, &a.dict, &b.dict)?,
                ViewKind::Values => false,
            },
            _ => false,
        },
        Type::Method => match (a.downcast_object_ref::<Method>(), b.downcast_object_ref::<Method>()) {
            (Some(a), Some(b)) => a.name == b.name && equal_within(meter, &a.receiver, &b.receiver)?,
            _ => false,
        },
        _ => address(a) != 0 && address(a) == address(b),
    })
}

fn all_keys(meter: &mut Meter<'_, '_, '_>, a: &Dict, b: &Dict) -> Result<bool> {
    for key in a.keys() {
        if b.get(meter.state(), &key)?.is_none() {
            return Ok(false);
        }
    }
    Ok(true)
}

fn equal_dicts(meter: &mut Meter<'_, '_, '_>, a: &Dict, b: &Dict) -> Result<bool> {
    if a.len() != b.len() {
        return Ok(false);
    }
    for (key, value) in a.pairs() {
        match b.get(meter.state(), key)? {
            Some(other) if equal_within(meter, value, &other)? => {}
            _ => return Ok(false),
        }
    }
    Ok(true)
}

/// How two values are ordered; `None` where a NaN is involved.
///
/// # Errors
/// Where Python does not order values of these types.
pub(super) fn compare(state: &State, operator: &str, a: &Value, b: &Value) -> Result<Option<Ordering>> {
    compare_within(&mut Meter::new(state), operator, a, b)
}

fn compare_within(
    meter: &mut Meter<'_, '_, '_>,
    operator: &str,
    a: &Value,
    b: &Value,
) -> Result<Option<Ordering>> {
    meter.visit()?;
    if let (Some(a), Some(b)) = (a.as_str(), b.as_str()) {
        return Ok(Some(a.cmp(b)));
    }
    if let (Some(a), Some(b)) = (Num::of(a), Num::of(b)) {
        return Ok(a.compare(b));
    }
    match (Type::of(a), Type::of(b)) {
        (Type::List, Type::List) | (Type::Tuple, Type::Tuple) => {
            let (a, b) = (items(a), items(b));
            for (a, b) in a.iter().zip(b) {
                if !equal_within(meter, a, b)? {
                    return compare_within(meter, operator, a, b);
                }
            }
            Ok(Some(a.len().cmp(&b.len())))
        }
        _ => Err(unsupported(operator, a, b)),
    }
}

/// `<`, `<=`, `>` and `>=`.
pub(super) fn ordered(state: &State, operator: &str, a: &Value, b: &Value) -> Result<bool> {
    let ordering = compare(state, operator, a, b)?;
    Ok(match operator {
        "<" => ordering.is_some_and(Ordering::is_lt),
        "<=" => ordering.is_some_and(Ordering::is_le),
        ">" => ordering.is_some_and(Ordering::is_gt),
        _ => ordering.is_some_and(Ordering::is_ge),
    })
}

/// A comparison by the name of its operator.
pub(super) fn comparison(state: &State, operator: &str, a: &Value, b: &Value) -> Result<bool> {
    match operator {
        "==" => equal(state, a, b),
        "!=" => equal(state, a, b).map(|equal| !equal),
        "in" => contains(state, b, a),
        "not in" => contains(state, b, a).map(|contains| !contains),
        _ => ordered(state, operator, a, b),
    }
}

/// `item in container`.
pub(super) fn contains(state: &State, container: &Value, item: &Value) -> Result<bool> {
    match Type::of(container) {
        Type::Str => match item.as_str() {
            Some(part) => {
                charge_bytes(state, container.as_str().map_or(0, str::len))?;
                Ok(container.as_str().unwrap_or_default().contains(part))
            }
            None => Err(unsupported("in", item, container)),
        },
        Type::Dict => match container.downcast_object_ref::<Dict>() {
            Some(dict) => Ok(dict.get(state, item)?.is_some()),
            None => Ok(false),
        },
        Type::View => match container.downcast_object_ref::<View>() {
            Some(view) if view.kind == ViewKind::Keys => Ok(view.dict.get(state, item)?.is_some()),
            Some(view) => any_equal(state, &view.items(state)?, item),
            None => Ok(false),
        },
        Type::List | Type::Tuple => any_equal(state, items(container), item),
        Type::Range => match (container.downcast_object_ref::<Range>(), Num::of(item)) {
            (Some(range), Some(item)) => {
                let int = match item {
                    Num::Int(int) => int,
                    Num::Float(float) if float.fract() == 0.0 => float as i128,
                    Num::Float(_) => return Ok(false),
                };
                let Some(offset) = int.checked_sub(range.start) else { return Ok(false) };
                Ok(offset % range.step == 0 && (0..range.len() as i128).contains(&(offset / range.step)))
            }
            _ => Ok(false),
        },
        Type::Undefined | Type::Generator | Type::Other => {
            any_equal(state, &iterate(state, container)?, item)
        }
        found => Err(not_iterable(found)),
    }
}

pub(super) fn any_equal(state: &State, items: &[Value], wanted: &Value) -> Result<bool> {
    let mut meter = Meter::new(state);
    for item in items {
        if equal_within(&mut meter, item, wanted)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// `object.name`: the attribute, else the item of that name, else undefined.
pub(super) fn get_attr(state: &State, object: &Value, name: &str) -> Result<Value> {
    if object.is_undefined() {
        return Err(fail(format!("an undefined value has no attribute `{name}`")));
    }
    if let Some(attribute) = attribute(object, name) {
        return Ok(attribute);
    }
    Ok(match Type::of(object) {
        Type::Dict => object.downcast_object_ref::<Dict>().and_then(|dict| dict.get_str(name)),
        Type::Other => foreign(state, object.get_attr(name)?)?,
        _ => None,
    }
    .unwrap_or_default())
}

/// The attribute that a value has in Python. `Some(undefined)` for those that the sandbox hides.
pub(super) fn attribute(object: &Value, name: &str) -> Option<Value> {
    let kind = Type::of(object);
    let value = match kind {
        Type::Namespace => object.downcast_object_ref::<Namespace>().and_then(|ns| ns.get(name)),
        Type::Macro if name.starts_with("catch_") => Some(false.into()),
        Type::Macro if name == "arguments" => {
            let names = object.get_attr(name).and_then(|names| Ok(names.try_iter()?.collect()));
            names.ok().map(tuple_of)
        }
        Type::Macro | Type::Loop => object.get_attr(name).ok().filter(|value| !value.is_undefined()),
        Type::Cycler => object.downcast_object_ref::<super::value::Cycler>().and_then(|cycler| match name {
            "current" => Some(cycler.current()),
            _ => None,
        }),
        Type::Range => object.downcast_object_ref::<Range>().and_then(|range| match name {
            "start" => Some(int_value(range.start)),
            "stop" => Some(int_value(range.stop)),
            "step" => Some(int_value(range.step)),
            _ => None,
        }),
        Type::Tuple => {
            object.downcast_object_ref::<Sequence>().filter(|tuple| tuple.is_group).and_then(|group| {
                match name {
                    "grouper" => group.items.first().cloned(),
                    "list" => group.items.get(1).cloned(),
                    _ => None,
                }
            })
        }
        Type::Bool | Type::Int | Type::Float => match (name, Num::of(object)?) {
            ("real" | "numerator", Num::Int(int)) => Some(int_value(int)),
            ("real", Num::Float(float)) => Some(float.into()),
            ("imag", Num::Int(_)) => Some(0.into()),
            ("imag", Num::Float(_)) => Some(0.0.into()),
            ("denominator", Num::Int(_)) => Some(1.into()),
            _ => None,
        },
        _ => None,
    };
    value.or_else(|| {
        let hidden = name.starts_with("__") || methods::changes(kind, name);
        if hidden {
            return Some(Value::UNDEFINED);
        }
        methods::exists(kind, name)
            .then(|| Value::from_object(Method { receiver: object.clone(), name: name.to_owned() }))
    })
}

/// A list or tuple that minijinja made, as ours.
fn foreign(state: &State, value: Value) -> Result<Option<Value>> {
    if Type::of(&value) == Type::Other {
        let is_tuple = value.is_tuple();
        let items = value.try_iter()?.checked().collect::<Result<Vec<_>>>()?;
        return sequence(state, items, is_tuple).map(Some);
    }
    Ok(Some(value).filter(|value| !value.is_undefined()))
}

/// `object[key]`: the item, else the attribute of that name, else undefined.
pub(super) fn get_item(state: &State, object: &Value, key: &Value) -> Result<Value> {
    let by_index = |length: usize| match Num::of(key) {
        Some(Num::Int(index)) => position(index, length),
        _ => None,
    };
    let item = match Type::of(object) {
        Type::Undefined => return Err(fail("an undefined value has no items")),
        Type::List | Type::Tuple => by_index(items(object).len()).map(|at| items(object)[at].clone()),
        Type::Str => {
            let text = object.as_str().unwrap_or_default();
            char_at(state, text, key)?
        }
        Type::Dict => match (object.downcast_object_ref::<Dict>(), Key::new(state, key)) {
            (Some(dict), Ok(_)) => dict.get(state, key)?,
            // Out of fuel must not look like an unhashable key.
            _ => state.consume_fuel(0).map(|()| None)?,
        },
        Type::Range => object
            .downcast_object_ref::<Range>()
            .and_then(|range| by_index(range.len()).map(|at| int_value(range.get(at)))),
        Type::Other => foreign(state, object.get_item(key)?)?,
        _ => None,
    };
    Ok(item.or_else(|| attribute(object, key.as_str()?)).unwrap_or_default())
}

/// The place of an index that may count from the end.
pub(super) fn position(index: i128, length: usize) -> Option<usize> {
    let index = if index < 0 { index + length as i128 } else { index };
    usize::try_from(index).ok().filter(|&index| index < length)
}

fn char_at(state: &State, text: &str, key: &Value) -> Result<Option<Value>> {
    let Some(Num::Int(index)) = Num::of(key) else { return Ok(None) };
    charge_text(state, text)?;
    let length = if text.is_ascii() { text.len() } else { text.chars().count() };
    Ok(position(index, length).and_then(|at| text.chars().nth(at)).map(Value::from))
}

/// `object[start:stop:step]`.
pub(super) fn slice(
    state: &State,
    object: &Value,
    start: &Value,
    stop: &Value,
    step: &Value,
) -> Result<Value> {
    let bound = |value: &Value| if value.is_none() { Ok(None) } else { int_arg(value).map(Some) };
    let (start, stop, step) = (bound(start)?, bound(stop)?, bound(step)?.unwrap_or(1));
    if step == 0 {
        return Err(fail("a slice with a step of 0"));
    }
    match Type::of(object) {
        kind @ (Type::List | Type::Tuple) => {
            let items = items(object);
            let picked = indices(items.len(), start, stop, step).map(|at| items[at].clone()).collect();
            sequence(state, picked, kind == Type::Tuple)
        }
        Type::Str => {
            let text = object.as_str().unwrap_or_default();
            charge_items(state, text.len())?;
            let chars: Vec<char> = text.chars().collect();
            let picked: String = indices(chars.len(), start, stop, step).map(|at| chars[at]).collect();
            Ok(if object.is_safe() { Value::from_safe_string(picked) } else { picked.into() })
        }
        Type::Range => match object.downcast_object_ref::<Range>() {
            Some(range) => {
                let (first, end, step) = clamped(range.len(), start, stop, step);
                Range::new(
                    range.start.saturating_add(first.saturating_mul(range.step)),
                    range.start.saturating_add(end.saturating_mul(range.step)),
                    range.step.saturating_mul(step),
                )
                .map(Value::from_object)
            }
            None => Ok(Value::UNDEFINED),
        },
        found => Err(fail(format!("a {found} cannot be sliced"))),
    }
}

/// The bounds of a slice as `slice.indices` of Python gives them.
fn clamped(length: usize, start: Option<i128>, stop: Option<i128>, step: i128) -> (i128, i128, i128) {
    let length = length as i128;
    let (low, high) = if step < 0 { (-1, length - 1) } else { (0, length) };
    let clamp = |bound: i128| {
        let bound = if bound < 0 { bound.saturating_add(length) } else { bound };
        bound.clamp(low, high.max(low))
    };
    let (first, end) = if step < 0 { (high, low) } else { (low, high) };
    (start.map_or(first, clamp), stop.map_or(end, clamp), step)
}

fn indices(
    length: usize,
    start: Option<i128>,
    stop: Option<i128>,
    step: i128,
) -> impl Iterator<Item = usize> {
    let (start, stop, step) = clamped(length, start, stop, step);
    std::iter::successors(Some(start), move |at| at.checked_add(step))
        .take_while(move |&at| if step > 0 { at < stop } else { at > stop })
        .map(|at| at as usize)
}

/// The length that Python's `len` gives.
pub(super) fn length(value: &Value) -> Result<usize> {
    Ok(match Type::of(value) {
        Type::Undefined => 0,
        Type::Str => value.as_str().unwrap_or_default().chars().count(),
        Type::List | Type::Tuple => items(value).len(),
        Type::Dict => value.downcast_object_ref::<Dict>().map_or(0, Dict::len),
        Type::Range => value.downcast_object_ref::<Range>().map_or(0, Range::len),
        Type::View => value.downcast_object_ref::<View>().map_or(0, |view| view.dict.len()),
        Type::Loop => value.get_attr("length")?.as_usize().unwrap_or(0),
        found => return Err(fail(format!("a {found} has no length"))),
    })
}

/// Sorts by a `<` that may fail. Stable, as the sort of Python.
pub(super) fn merge_sort<T>(
    mut items: Vec<T>,
    less: &mut dyn FnMut(&T, &T) -> Result<bool>,
) -> Result<Vec<T>> {
    if items.len() < 2 {
        return Ok(items);
    }
    let right = items.split_off(items.len() / 2);
    let mut result = Vec::with_capacity(items.len() + right.len());
    let mut left = merge_sort(items, less)?.into_iter().peekable();
    let mut right = merge_sort(right, less)?.into_iter().peekable();
    while let (Some(a), Some(b)) = (left.peek(), right.peek()) {
        let next = if less(b, a)? { right.next() } else { left.next() };
        result.extend(next);
    }
    result.extend(left);
    result.extend(right);
    Ok(result)
}
