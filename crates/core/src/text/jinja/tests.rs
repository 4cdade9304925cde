//! The tests of Jinja2: what may stand behind `is`.

use minijinja::{State, Value};

use super::{
    Result,
    args::Args,
    filters::Callable,
    find_filter, find_test, methods,
    ops::{comparison, length, rem},
    text::str_of,
    unicode,
    value::{Key, Type, address},
};

pub(super) const TESTS: &[(&str, Callable)] = &[
    ("!=", |state, args| compare(state, args, "!=")),
    ("<", |state, args| compare(state, args, "<")),
    ("<=", |state, args| compare(state, args, "<=")),
    ("==", |state, args| compare(state, args, "==")),
    (">", |state, args| compare(state, args, ">")),
    (">=", |state, args| compare(state, args, ">=")),
    ("boolean", |_, args| is(args, "boolean", |value| Type::of(value) == Type::Bool)),
    ("callable", |_, args| is(args, "callable", methods::is_callable)),
    ("defined", |_, args| is(args, "defined", |value| !value.is_undefined())),
    ("divisibleby", divisible_by),
    ("eq", |state, args| compare(state, args, "==")),
    ("equalto", |state, args| compare(state, args, "==")),
    ("escaped", |_, args| is(args, "escaped", Value::is_safe)),
    ("even", |state, args| parity(state, args, "even", 0)),
    ("false", |_, args| is(args, "false", |value| Type::of(value) == Type::Bool && !value.is_true())),
    ("filter", is_filter),
    ("float", |_, args| is(args, "float", |value| Type::of(value) == Type::Float)),
    ("ge", |state, args| compare(state, args, ">=")),
    ("greaterthan", |state, args| compare(state, args, ">")),
    ("gt", |state, args| compare(state, args, ">")),
    ("in", |state, args| compare(state, args, "in")),
    ("integer", |_, args| is(args, "integer", |value| Type::of(value) == Type::Int)),
    ("iterable", |_, args| is(args, "iterable", methods::is_iterable)),
    ("le", |state, args| compare(state, args, "<=")),
    ("lessthan", |state, args| compare(state, args, "<")),
    ("lower", |state, args| is_case(state, args, unicode::is_lower, [unicode::is_upper, unicode::is_title])),
    ("lt", |state, args| compare(state, args, "<")),
    ("mapping", |_, args| is(args, "mapping", |value| Type::of(value) == Type::Dict)),
    ("ne", |state, args| compare(state, args, "!=")),
    ("none", |_, args| is(args, "none", Value::is_none)),
    ("number", |_, args| {
        is(args, "number", |value| matches!(Type::of(value), Type::Bool | Type::Int | Type::Float))
    }),
    ("odd", |state, args| parity(state, args, "odd", 1)),
    ("sameas", same_as),
    ("sequence", |_, args| is(args, "sequence", is_sequence)),
    ("string", |_, args| is(args, "string", |value| Type::of(value) == Type::Str)),
    ("test", is_test),
    ("true", |_, args| is(args, "true", |value| Type::of(value) == Type::Bool && value.is_true())),
    ("undefined", |_, args| is(args, "undefined", Value::is_undefined)),
    ("upper", |state, args| is_case(state, args, unicode::is_upper, [unicode::is_lower, unicode::is_title])),
];

fn is(args: Args, name: &str, property: fn(&Value) -> bool) -> Result<Value> {
    let [value] = args.bind(name, ["value"], 1)?;
    Ok(property(&value.unwrap_or_default()).into())
}

fn compare(state: &mut State<'_, '_>, args: Args, operator: &str) -> Result<Value> {
    let [a, b] = args.bind(operator, ["", ""], 2)?;
    comparison(state, operator, &a.unwrap_or_default(), &b.unwrap_or_default()).map(Value::from)
}

fn divisible_by(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value, number] = args.bind("divisibleby", ["value", "num"], 2)?;
    remainder_is(state, &value.unwrap_or_default(), &number.unwrap_or_default(), 0)
}

fn parity(state: &mut State<'_, '_>, args: Args, name: &str, wanted: i64) -> Result<Value> {
    let [value] = args.bind(name, ["value"], 1)?;
    remainder_is(state, &value.unwrap_or_default(), &2.into(), wanted)
}

fn remainder_is(state: &mut State<'_, '_>, value: &Value, divisor: &Value, wanted: i64) -> Result<Value> {
    let remainder = rem(state, value, divisor)?;
    comparison(state, "==", &remainder, &wanted.into()).map(Value::from)
}

fn is_filter(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [name] = args.bind("filter", ["value"], 1)?;
    let name = name.unwrap_or_default();
    Key::new(state, &name)?;
    Ok(name.as_str().is_some_and(|name| find_filter(name).is_ok() || UNSUPPORTED.contains(&name)).into())
}

/// Filters that Jinja2 has and this module does not.
const UNSUPPORTED: [&str; 3] = ["random", "urlize", "wordwrap"];

fn is_test(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [name] = args.bind("test", ["value"], 1)?;
    let name = name.unwrap_or_default();
    Key::new(state, &name)?;
    Ok(name.as_str().is_some_and(|name| find_test(name).is_ok()).into())
}

fn is_case(
    state: &mut State<'_, '_>,
    args: Args,
    wanted: fn(char) -> bool,
    others: [fn(char) -> bool; 2],
) -> Result<Value> {
    let [value] = args.bind("lower", ["value"], 1)?;
    let value = value.unwrap_or_default();
    Ok(unicode::is_all(&str_of(state, &value)?, wanted, others).into())
}

/// Identity. Numbers and texts count as one object if they are equal and of one type.
fn same_as(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [value, other] = args.bind("sameas", ["value", "other"], 2)?;
    let (value, other) = (value.unwrap_or_default(), other.unwrap_or_default());
    let kind = Type::of(&value);
    Ok(match kind {
        _ if kind != Type::of(&other) => false,
        Type::None => true,
        Type::Undefined => false,
        Type::Bool | Type::Int | Type::Float | Type::Str => comparison(state, "==", &value, &other)?,
        _ => address(&value) != 0 && address(&value) == address(&other),
    }
    .into())
}

/// Whether the value has a length and items.
fn is_sequence(value: &Value) -> bool {
    !matches!(Type::of(value), Type::View | Type::Loop) && length(value).is_ok()
}
