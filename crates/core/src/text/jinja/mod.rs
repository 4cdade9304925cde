//! Jinja2 as transformers configures it, on top of minijinja.
//!
//! minijinja parses a template and runs its statements. The expressions have the types, operators, filters, tests and
//! methods of Python, which this module provides: [`rewrite`] replaces each operator and literal by a filter that no
//! template can name. All of them take fuel for the values that they visit and make, so a budget bounds the time and
//! the memory of a template.

mod args;
mod compile;
mod filters;
mod json;
mod literals;
mod methods;
mod operators;
mod ops;
mod percent;
mod rewrite;
mod source;
mod strings;
mod tests;
mod text;
mod text_filters;
mod unicode;
mod value;

use std::{
    fmt,
    sync::{Arc, atomic::AtomicBool},
};

use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, State, Value,
    value::{Object, ObjectRepr, Rest, ValueOrKwargs},
};

pub(super) use compile::Program;
pub(super) use json::from_json;
use value::Dict;
pub(super) use value::{dict_of, list_of};

use args::Args;
use filters::Callable;
use value::{Cycler, Joiner, Namespace, iterate};

type Result<T, E = Error> = std::result::Result<T, E>;

/// Nested macros, loops and the like count towards this; a macro counts four times. Each nested macro takes stack.
const RECURSION_LIMIT: usize = 200;

fn fail(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

fn find_filter(name: &str) -> Result<Callable> {
    let mut filters = filters::FILTERS.iter().chain(text_filters::TEXT_FILTERS);
    let found = filters.find(|(known, _)| *known == name).map(|(_, filter)| *filter);
    found.ok_or_else(|| Error::new(ErrorKind::UnknownFilter, format!("filter {name} is unknown")))
}

fn find_test(name: &str) -> Result<Callable> {
    let found = tests::TESTS.iter().find(|(known, _)| *known == name).map(|(_, test)| *test);
    found.ok_or_else(|| Error::new(ErrorKind::UnknownTest, format!("test {name} is unknown")))
}

/// An environment with all that a template may name, and the operators.
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::empty();
    // An error would otherwise print all variables.
    environment.set_debug(false);
    environment.set_recursion_limit(RECURSION_LIMIT);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_formatter(|out, state, value| {
        let text = text::str_of(state, value)?;
        let escapes = !matches!(state.auto_escape(), AutoEscape::None) && !value.is_safe();
        let written = if escapes { out.write_str(&text::escape(&text)) } else { out.write_str(&text) };
        written.map_err(Error::from)
    });
    environment.set_unknown_method_callback(methods::call);
    for &(name, filter) in filters::FILTERS.iter().chain(text_filters::TEXT_FILTERS) {
        environment.add_filter(name, move |state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>| {
            filter(state, Args::new(&args.into_values()))
        });
    }
    for &(name, test) in tests::TESTS {
        environment.add_test(name, move |state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>| {
            test(state, Args::new(&args.into_values()))
        });
    }
    for &(name, function) in FUNCTIONS {
        environment.add_global(name, Value::from_object(Function(function)));
    }
    environment.add_global("dict", Value::from_object(DictType));
    operators::add_operators(&mut environment);
    environment
}

const FUNCTIONS: &[(&str, Callable)] = &[
    ("cycler", cycler),
    ("joiner", joiner),
    ("lipsum", |_, _| Err(Error::new(ErrorKind::UnknownFunction, "lipsum is not supported"))),
    ("namespace", namespace),
    ("raise_exception", raise_exception),
    ("range", |_, args| methods::range(args)),
    ("strftime_now", strftime_now),
];

/// A function that a template can call.
#[derive(Debug)]
struct Function(Callable);

impl Object for Function {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, args: &[Value]) -> Result<Value> {
        (self.0)(state, Args::new(args))
    }
}

/// `dict`, which can be called and has the method `fromkeys`.
#[derive(Debug)]
struct DictType;

impl Object for DictType {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, args: &[Value]) -> Result<Value> {
        Dict::value(state, pairs(state, "dict", Args::new(args))?)
    }

    fn call_method(self: &Arc<Self>, state: &mut State<'_, '_>, name: &str, args: &[Value]) -> Result<Value> {
        match name {
            "fromkeys" => methods::fromkeys(state, Args::new(args)),
            _ => Err(Error::new(ErrorKind::UnknownMethod, format!("dict has no method `{name}`"))),
        }
    }
}

/// What `dict(...)` makes entries of: a dict or pairs, then keyword arguments.
fn pairs(state: &State, function: &str, args: Args) -> Result<Vec<(Value, Value)>> {
    let Args { positional, named } = args;
    let [source] = Args { positional, named: Vec::new() }.bind(function, [""], 0)?;
    let mut pairs = Vec::new();
    match source.as_ref().map(|source| (source, source.downcast_object_ref::<Dict>())) {
        None => {}
        Some((_, Some(dict))) => pairs.extend(dict.pairs().cloned()),
        Some((source, None)) => {
            if source.is_undefined() {
                return Err(fail(format!("{function}: the value is undefined")));
            }
            for item in iterate(state, source)? {
                match &iterate(state, &item)?[..] {
                    [key, value] => pairs.push((key.clone(), value.clone())),
                    _ => return Err(fail(format!("{function}: expected pairs"))),
                }
            }
        }
    }
    pairs.extend(named.into_iter().map(|(name, value)| (Value::from(name), value)));
    Ok(pairs)
}

fn namespace(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let namespace = Namespace::default();
    for (name, value) in pairs(state, "namespace", args)? {
        namespace.set(strings::string(Some(&name))?, value)?;
    }
    Ok(Value::from_object(namespace))
}

fn cycler(_: &mut State<'_, '_>, args: Args) -> Result<Value> {
    if args.positional.is_empty() || !args.named.is_empty() {
        return Err(fail("cycler: expected items"));
    }
    Cycler::new(args.positional).map(Value::from_object)
}

fn joiner(_: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [separator] = args.bind("joiner", ["sep"], 0)?;
    let separator = separator.unwrap_or_else(|| ", ".into());
    if separator.as_object().is_some() {
        return Err(fail("joiner: expected a string"));
    }
    Ok(Value::from_object(Joiner { separator, used: AtomicBool::new(false) }))
}

/// What `raise_exception` was given; kept as the source of the engine's error, to be found again.
#[derive(Debug)]
pub(super) struct Raised(pub(super) String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(state: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [message] = args.bind("raise_exception", ["message"], 1)?;
    let message = text::str_of(state, &message.unwrap_or_default())?.into_owned();
    Err(fail("raise_exception").with_source(Raised(message)))
}

/// Local time, as `datetime.now().strftime(format)` gives it.
fn strftime_now(_: &mut State<'_, '_>, args: Args) -> Result<Value> {
    let [format] = args.bind("strftime_now", ["format"], 1)?;
    let format = strings::string(format.as_ref())?;
    let text = jiff::fmt::strtime::format(format, &jiff::ZonedDateTime::now());
    text.map(Value::from).map_err(|e| fail(format!("strftime_now({format:?})")).with_source(e))
}
