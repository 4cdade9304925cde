//! The filters that stand for operators and literals.

use minijinja::{Environment, State, Value, value::Rest};

use super::{
    Result, fail, methods, ops,
    value::{Dict, iterate, list, sequence, tuple},
};

// No template can name these filters: a name has no such characters.
pub(super) const TEXT_CONCAT: &str = "~";
pub(super) const NEGATE: &str = "-x";
pub(super) const ATTRIBUTE: &str = ".";
pub(super) const ITEM: &str = "[]";
pub(super) const SLICE: &str = "[:]";
pub(super) const COMPARE: &str = "a<b<c";
pub(super) const LIST: &str = "[a]";
pub(super) const TUPLE: &str = "(a,)";
pub(super) const DICT: &str = "{a:b}";
pub(super) const LOOP: &str = "for-in";
pub(super) const LOOP_UNPACKED: &str = "for-,-in";
pub(super) const UNPACK: &str = "=,";
pub(super) const SPLAT: &str = "*a";
pub(super) const SPLAT_NAMED: &str = "**a";
pub(super) const SET: &str = ".a=";

/// Adds the filters that [`rewrite`](super::rewrite) puts in place of operators and literals.
pub(super) fn add_operators(environment: &mut Environment<'static>) {
    type Operator = fn(&mut State<'_, '_>, &Value, &Value) -> Result<Value>;
    let operators: [(&str, Operator); 17] = [
        ("+", |state, a, b| ops::add(state, a, b)),
        ("-", |_, a, b| ops::sub(a, b)),
        ("*", |state, a, b| ops::mul(state, a, b)),
        ("/", |_, a, b| ops::div(a, b)),
        ("//", |_, a, b| ops::floor_div(a, b)),
        ("%", ops::rem),
        ("**", |_, a, b| ops::pow(a, b)),
        (TEXT_CONCAT, ops::concat),
        ("==", |state, a, b| ops::equal(state, a, b).map(Value::from)),
        ("!=", |state, a, b| ops::equal(state, a, b).map(|equal| (!equal).into())),
        ("<", |state, a, b| ops::ordered(state, "<", a, b).map(Value::from)),
        ("<=", |state, a, b| ops::ordered(state, "<=", a, b).map(Value::from)),
        (">", |state, a, b| ops::ordered(state, ">", a, b).map(Value::from)),
        (">=", |state, a, b| ops::ordered(state, ">=", a, b).map(Value::from)),
        ("<-", |state, a, b| ops::contains(state, b, a).map(Value::from)),
        (ATTRIBUTE, |state, a, b| ops::get_attr(state, a, b.as_str().unwrap_or_default())),
        (ITEM, |state, a, b| ops::get_item(state, a, b)),
    ];
    for (name, operator) in operators {
        environment
            .add_filter(name, move |state: &mut State<'_, '_>, a: &Value, b: &Value| operator(state, a, b));
    }
    environment.add_filter(NEGATE, |a: &Value| ops::neg(a));
    environment.add_filter(SLICE, |state: &State, a: &Value, start: &Value, stop: &Value, step: &Value| {
        ops::slice(state, a, start, stop, step)
    });
    environment.add_filter(SET, |object: &Value, name: &str, value: Value| {
        methods::set_attribute(object, name, value).map(|()| "")
    });
    environment.add_filter(LOOP, |state: &State, a: Value| methods::loop_items(state, a));
    environment.add_filter(LOOP_UNPACKED, |state: &State, a: &Value| {
        // minijinja cannot unpack a text.
        let items = iterate(state, a)?.into_iter();
        let items = items.map(|item| if item.as_str().is_some() { unpacked(state, &item) } else { Ok(item) });
        list(state, items.collect::<Result<_>>()?)
    });
    environment.add_filter(UNPACK, |state: &State, a: &Value| unpacked(state, a));
    environment.add_filter(SPLAT, |state: &State, a: &Value| unpacked(state, a));
    environment.add_filter(SPLAT_NAMED, |a: Value| {
        let dict = a.downcast_object_ref::<Dict>();
        if dict.is_none_or(|dict| dict.keys().any(|key| key.as_str().is_none())) {
            return Err(fail("`**` before a value that is no dict with names as keys"));
        }
        Ok(a)
    });
    environment.add_filter(LIST, |state: &State, _: &Value, items: Rest<Value>| list(state, items.to_vec()));
    environment
        .add_filter(TUPLE, |state: &State, _: &Value, items: Rest<Value>| tuple(state, items.to_vec()));
    environment.add_filter(DICT, |state: &State, _: &Value, items: Rest<Value>| {
        let (pairs, _) = items.as_chunks::<2>();
        Dict::value(state, pairs.iter().map(|[key, value]| (key.clone(), value.clone())))
    });
    environment.add_filter(COMPARE, |state: &State, first: &Value, rest: Rest<Value>| {
        let mut left = first;
        let (pairs, _) = rest.as_chunks::<2>();
        for [operator, right] in pairs {
            if !ops::comparison(state, operator.as_str().unwrap_or_default(), left, right)? {
                return Ok(false);
            }
            left = right;
        }
        Ok(true)
    });
}

fn unpacked(state: &State, value: &Value) -> Result<Value> {
    sequence(state, iterate(state, value)?, true)
}
