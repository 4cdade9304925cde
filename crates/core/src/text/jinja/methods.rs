//! The methods of Python's types that the sandbox of Jinja2 allows.

use std::sync::{Arc, atomic::Ordering};

use minijinja::{State, Value};

use super::{
    Result,
    args::Args,
    fail,
    ops::{self, int_arg, int_value},
    percent, strings,
    value::{
        Cycler, Dict, Generator, Joiner, Method, Namespace, Range, Type, View, ViewKind, items, iterate,
        list, not_iterable,
    },
};

const DICT: [&str; 6] = ["copy", "fromkeys", "get", "items", "keys", "values"];
const CHANGING_DICT: [&str; 5] = ["clear", "pop", "popitem", "setdefault", "update"];
const LIST: [&str; 3] = ["copy", "count", "index"];
const CHANGING_LIST: [&str; 8] = ["append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"];
const TUPLE: [&str; 2] = ["count", "index"];
const INT: [&str; 4] = ["as_integer_ratio", "bit_count", "bit_length", "conjugate"];
const FLOAT: [&str; 3] = ["as_integer_ratio", "conjugate", "is_integer"];
const CYCLER: [&str; 2] = ["next", "reset"];
const VIEW: [&str; 1] = ["isdisjoint"];

/// Whether values of this type have the method.
pub(super) fn exists(kind: Type, name: &str) -> bool {
    match kind {
        Type::Str => strings::exists(name),
        Type::Dict => DICT.contains(&name),
        Type::List => LIST.contains(&name),
        Type::Tuple | Type::Range => TUPLE.contains(&name),
        Type::Bool | Type::Int => INT.contains(&name),
        Type::Float => FLOAT.contains(&name),
        Type::Cycler => CYCLER.contains(&name),
        Type::View => VIEW.contains(&name),
        _ => false,
    }
}

/// Whether the method changes its object. The sandbox hides those.
pub(super) fn changes(kind: Type, name: &str) -> bool {
    match kind {
        Type::Dict => CHANGING_DICT.contains(&name),
        Type::List => CHANGING_LIST.contains(&name),
        _ => false,
    }
}

/// `receiver.name(arguments)`.
pub(super) fn call(state: &mut State<'_, '_>, receiver: &Value, name: &str, args: &[Value]) -> Result<Value> {
    let kind = Type::of(receiver);
    if exists(kind, name) {
        return builtin(state, kind, receiver, name, Args::new(args));
    }
    // What is no method may be an attribute or item that can be called.
    let attribute = ops::get_attr(state, receiver, name)?;
    if attribute.is_undefined() {
        return Err(minijinja::Error::new(
            minijinja::ErrorKind::UnknownMethod,
            format!("a {kind} has no method `{name}`"),
        ));
    }
    attribute.call(state, args)
}

/// Calls an object itself.
pub(super) fn call_object(state: &mut State<'_, '_>, object: &Value, args: &[Value]) -> Result<Value> {
    if let Some(method) = object.downcast_object_ref::<Method>() {
        return call(state, &method.receiver, &method.name, args);
    }
    if let Some(joiner) = object.downcast_object_ref::<Joiner>() {
        let [] = Args::new(args).bind("joiner", [], 0)?;
        let was_used = joiner.used.swap(true, Ordering::Relaxed);
        return Ok(if was_used { joiner.separator.clone() } else { "".into() });
    }
    Err(fail(format!("a {} cannot be called", Type::of(object))))
}

fn builtin(state: &mut State<'_, '_>, kind: Type, receiver: &Value, name: &str, args: Args) -> Result<Value> {
    match kind {
        Type::Str if name == "format" => percent::str_format(state, receiver, &args),
        Type::Str => strings::call(state, receiver, name, args),
        Type::Dict => match receiver.downcast_object::<Dict>() {
            Some(dict) => dict_method(state, dict, name, args),
            None => Ok(Value::UNDEFINED),
        },
        Type::List | Type::Tuple | Type::Range => sequence_method(state, receiver, name, args),
        Type::Cycler => match receiver.downcast_object_ref::<Cycler>() {
            Some(cycler) => {
                let [] = args.bind(name, [], 0)?;
                if name == "reset" {
                    cycler.position.store(0, Ordering::Relaxed);
                    return Ok(Value::from(()));
                }
                let current = cycler.current();
                cycler.position.fetch_add(1, Ordering::Relaxed);
                Ok(current)
            }
            None => Ok(Value::UNDEFINED),
        },
        Type::View => {
            let [other] = args.bind(name, [""], 1)?;
            for item in iterate(state, &other.unwrap_or_default())? {
                if ops::contains(state, receiver, &item)? {
                    return Ok(false.into());
                }
            }
            Ok(true.into())
        }
        _ => number_method(state, receiver, name, args),
    }
}

fn dict_method(state: &mut State<'_, '_>, dict: Arc<Dict>, name: &str, args: Args) -> Result<Value> {
    let view = |kind| Value::from_object(View { dict: Arc::clone(&dict), kind });
    match name {
        "get" => {
            let [key, default] = args.bind(name, ["", ""], 1)?;
            let value = dict.get(state, &key.unwrap_or_default())?;
            Ok(value.or(default).unwrap_or_else(|| Value::from(())))
        }
        "fromkeys" => fromkeys(state, args),
        _ => {
            let [] = args.bind(name, [], 0)?;
            match name {
                "keys" => Ok(view(ViewKind::Keys)),
                "values" => Ok(view(ViewKind::Values)),
                "items" => Ok(view(ViewKind::Items)),
                _ => Dict::value(state, dict.pairs().cloned()),
            }
        }
    }
}

/// `dict.fromkeys(iterable, value)`.
pub(super) fn fromkeys(state: &State, args: Args) -> Result<Value> {
    let [keys, value] = args.bind("fromkeys", ["", ""], 1)?;
    let value = value.unwrap_or_else(|| Value::from(()));
    let keys = iterate(state, &keys.unwrap_or_default())?;
    Dict::value(state, keys.into_iter().map(|key| (key, value.clone())))
}

fn sequence_method(state: &mut State<'_, '_>, receiver: &Value, name: &str, args: Args) -> Result<Value> {
    if name == "copy" {
        let [] = args.bind(name, [], 0)?;
        return list(state, items(receiver).to_vec());
    }
    let [wanted, start, stop] = args.bind(name, ["", "", ""], 1)?;
    let wanted = wanted.unwrap_or_default();
    let items = iterate(state, receiver)?;
    if name == "count" {
        if start.is_some() {
            return Err(fail("count: has too many arguments"));
        }
        let mut count = 0;
        for item in &items {
            count += i64::from(ops::equal(state, item, &wanted)?);
        }
        return Ok(count.into());
    }
    let bound = |value: Option<Value>, default: usize| -> Result<usize> {
        let Some(value) = value else { return Ok(default) };
        let at = int_arg(&value)?;
        let at = if at < 0 { at + items.len() as i128 } else { at };
        Ok(at.clamp(0, items.len() as i128) as usize)
    };
    let (start, stop) = (bound(start, 0)?, bound(stop, items.len())?);
    for (at, item) in items.iter().enumerate().take(stop).skip(start) {
        if ops::equal(state, item, &wanted)? {
            return Ok(at.into());
        }
    }
    Err(fail(format!("index: the {} has no such item", Type::of(receiver))))
}

fn number_method(state: &State, receiver: &Value, name: &str, args: Args) -> Result<Value> {
    let [] = args.bind(name, [], 0)?;
    let ratio = |numerator: i128, denominator: i128| {
        super::value::tuple(state, vec![int_value(numerator), int_value(denominator)])
    };
    match ops::Num::of(receiver) {
        Some(ops::Num::Int(int)) => match name {
            "bit_length" => Ok((128 - int.unsigned_abs().leading_zeros()).into()),
            "bit_count" => Ok(int.unsigned_abs().count_ones().into()),
            "conjugate" => Ok(int_value(int)),
            _ => ratio(int, 1),
        },
        Some(ops::Num::Float(float)) => match name {
            "is_integer" => Ok((float.fract() == 0.0).into()),
            "conjugate" => Ok(float.into()),
            _ => {
                let mut denominator = 1_i128;
                let mut numerator = float;
                while numerator.is_finite() && numerator.fract() != 0.0 && denominator < 1 << 100 {
                    (numerator, denominator) = (numerator * 2.0, denominator * 2);
                }
                if numerator.fract() != 0.0 {
                    return Err(fail("as_integer_ratio: an integer has more than 128 bits"));
                }
                ratio(percent::float_to_int(numerator)?, denominator)
            }
        },
        None => Err(fail(format!("a {} has no method `{name}`", Type::of(receiver)))),
    }
}

/// Whether Python could call the value.
pub(super) fn is_callable(value: &Value) -> bool {
    matches!(
        Type::of(value),
        Type::Undefined | Type::Method | Type::Joiner | Type::Macro | Type::Loop | Type::Function
    )
}

/// Whether Python could iterate over the value.
pub(super) fn is_iterable(value: &Value) -> bool {
    match Type::of(value) {
        Type::Undefined
        | Type::Str
        | Type::List
        | Type::Tuple
        | Type::Dict
        | Type::Range
        | Type::Generator
        | Type::View
        | Type::Loop => true,
        Type::Other => value.try_iter().is_ok(),
        _ => false,
    }
}

/// What a `for` loop can go over without a copy of the items, else the items as a list.
pub(super) fn loop_items(state: &State, value: Value) -> Result<Value> {
    match Type::of(&value) {
        Type::List | Type::Tuple | Type::Other => Ok(value),
        Type::Undefined | Type::Str | Type::Dict | Type::Range | Type::Generator | Type::View => {
            list(state, iterate(state, &value)?)
        }
        found => Err(not_iterable(found)),
    }
}

/// A first item of an iterable, as `next(iter(value))` gives it.
pub(super) fn first(state: &State, value: &Value) -> Result<Option<Value>> {
    match value.downcast_object_ref::<Generator>() {
        Some(generator) => Ok(generator.next()),
        None => Ok(iterate(state, value)?.into_iter().next()),
    }
}

/// The last item of what `reversed` takes.
pub(super) fn last(state: &State, value: &Value) -> Result<Option<Value>> {
    match Type::of(value) {
        Type::Undefined | Type::Str | Type::List | Type::Tuple | Type::Range | Type::Dict | Type::View => {
            Ok(iterate(state, value)?.pop())
        }
        found => Err(fail(format!("a {found} cannot be reversed"))),
    }
}

/// Sets an attribute of a namespace.
pub(super) fn set_attribute(object: &Value, name: &str, value: Value) -> Result<()> {
    match object.downcast_object_ref::<Namespace>() {
        Some(namespace) => namespace.set(name, value),
        None => Err(fail(format!("only a namespace has attributes to set, not a {}", Type::of(object)))),
    }
}

/// `range(stop)`, `range(start, stop)`, `range(start, stop, step)`.
pub(super) fn range(args: Args) -> Result<Value> {
    let [first, second, step] = args.bind("range", ["", "", ""], 1)?;
    let first = int_arg(&first.unwrap_or_default())?;
    let (start, stop) = match second {
        Some(stop) => (first, int_arg(&stop)?),
        None => (0, first),
    };
    let step = step.map_or(Ok(1), |step| int_arg(&step))?;
    Range::new(start, stop, step).map(Value::from_object)
}
