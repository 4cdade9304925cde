//! Limits for what minijinja does to lists and maps without asking for fuel.
//!
//! A list of two references to a list of two references and so on has a short template and more items than there is
//! memory or time for, and a namespace may even contain itself. minijinja does not pay for the walk where it compares,
//! hashes, converts or concatenates such values, and multiplies and appends lists without making them. So a compiled
//! template is rewritten: before an operation that walks a value there is a call that walks it first, for fuel and to a
//! limited depth, and after one that only promises a list there is a call that makes it, for fuel. For the values that
//! pass, all operations do what they always do.
//!
//! This uses minijinja's `unstable_machinery`, and so a version that is not newer than the one it was written for.

use std::{borrow::Cow, sync::Arc};

use minijinja::{
    Environment, Error, ErrorKind, State, Value, escape_formatter,
    machinery::{Instruction, Instructions, Token, tokenize},
    syntax::SyntaxConfig,
    value::{Object, Rest, Tuple, ValueKind},
};

/// Deeper values are refused.
const MAX_DEPTH: usize = 64;

/// Items that one step pays for.
const ITEMS_PER_FUEL: usize = 8;
const BYTES_PER_FUEL: usize = 64;

// The functions that instructions call. No template can name or replace them, as identifiers have no spaces.
const WALK: &str = "walk value";
const MAKE_LIST: &str = "make list";
const MAKE_MAP: &str = "make map";
const NO_NAMESPACE: &str = "no namespace";
const FILTER: &str = "apply filter";
const TEST: &str = "perform test";
const METHOD: &str = "call method";
/// A filter without effect.
const AS_IS: &str = "as_is";

/// Filters that look at the items of a list or map, or at none, and not into them; `tojson` walks for fuel itself.
const SHALLOW_FILTERS: [&str; 11] =
    ["length", "count", "first", "last", "list", "default", "d", "tojson", "items", "safe", AS_IS];

/// Filters that are shallow as well unless an argument tells them to compare or convert the items.
const SELECTING_FILTERS: [&str; 5] = ["select", "reject", "selectattr", "rejectattr", "map"];

/// Adds the functions that [`rewrite`] calls, and takes away what prints values that it does not see.
pub(super) fn install(environment: &mut Environment<'static>) {
    // An error would otherwise print all variables.
    environment.set_debug(false);
    environment.remove_global("debug");
    environment.set_formatter(|out, state, value| {
        walk(state, value)?;
        escape_formatter(out, state, value)
    });
    environment.add_filter(AS_IS, |value: Value| value);
    environment.add_function(WALK, |state: &State, value: Value| walk(state, &value).map(|()| value));
    environment.add_function(MAKE_LIST, make_list);
    environment.add_function(MAKE_MAP, make_map);
    environment.add_function(NO_NAMESPACE, |state: &State, value: Value| {
        Walk { state, items: 0, namespaces: false }.value(&value, 0).map(|()| value)
    });
    environment.add_global(FILTER, Value::from_object(Call(apply_filter)));
    environment.add_global(TEST, Value::from_object(Call(perform_test)));
    environment.add_global(METHOD, Value::from_object(Call(call_method)));
}

/// A function that also takes keyword arguments as they are.
#[derive(Debug)]
struct Call(fn(&mut State<'_, '_>, &str, &[Value]) -> Result<Value, Error>);

impl Object for Call {
    /// The last of the arguments is the name of a filter, test or method.
    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, arguments: &[Value]) -> Result<Value, Error> {
        match arguments.split_last() {
            Some((name, arguments)) => (self.0)(state, name.as_str().unwrap_or_default(), arguments),
            None => Err(Error::from(ErrorKind::MissingArgument)),
        }
    }
}

fn apply_filter(state: &mut State<'_, '_>, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    if !SELECTING_FILTERS.contains(&name) || arguments.iter().skip(1).any(|a| walks(name, a)) {
        arguments.iter().try_for_each(|a| walk(state, a))?;
    }
    let result = state.apply_filter(name, arguments).map_err(|e| named(e, "filter", name))?;
    make_list(state, result)
}

fn perform_test(state: &mut State<'_, '_>, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    arguments.iter().try_for_each(|a| walk(state, a))?;
    state.perform_test(name, arguments).map(Value::from).map_err(|e| named(e, "test", name))
}

fn call_method(state: &mut State<'_, '_>, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    let Some((receiver, arguments)) = arguments.split_first() else {
        return Err(Error::from(ErrorKind::MissingArgument));
    };
    if matches!(receiver.kind(), ValueKind::Seq | ValueKind::Iterable) {
        walk(state, receiver)?;
    }
    arguments.iter().try_for_each(|a| walk(state, a))?;
    let result = receiver.call_method(state, name, arguments)?;
    make_list(state, result)
}

/// The same error with the name of the filter or test, which it lacks if it was called by name.
fn named(error: Error, what: &str, name: &str) -> Error {
    match error.kind() {
        ErrorKind::UnknownFilter | ErrorKind::UnknownTest if error.detail().is_none() => {
            Error::new(error.kind(), format!("{what} {name} is unknown"))
        }
        _ => error,
    }
}

/// Whether a selecting filter with this argument looks into the items.
fn walks(filter: &str, argument: &Value) -> bool {
    !argument.is_kwargs() && (filter == "map" || argument.as_object().is_some())
}

/// Walks all of a value, which takes fuel, and fails where it is nested too deeply.
pub(super) fn walk(state: &State, value: &Value) -> Result<(), Error> {
    Walk { state, items: 0, namespaces: true }.value(value, 0)
}

struct Walk<'a, 'template, 'env> {
    state: &'a State<'template, 'env>,
    items: usize,
    /// Whether a namespace may be within the value.
    namespaces: bool,
}

impl Walk<'_, '_, '_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if let Some(bytes) = value.as_str().map(str::len).or_else(|| Some(value.as_bytes()?.len())) {
            return self.state.consume_fuel((bytes / BYTES_PER_FUEL) as u64);
        }
        let Some(object) = value.as_object() else { return Ok(()) };
        if depth > MAX_DEPTH {
            return Err(Error::new(ErrorKind::InvalidOperation, "a value is nested too deeply"));
        }
        if !self.namespaces && object.type_name().ends_with("::Namespace") {
            return Err(Error::new(ErrorKind::InvalidOperation, "a namespace cannot contain another one"));
        }
        let is_map = value.kind() == ValueKind::Map;
        if !is_map && !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
            return Ok(());
        }
        for item in value.try_iter()?.checked() {
            let item = item?;
            self.items += 1;
            if self.items.is_multiple_of(ITEMS_PER_FUEL) {
                self.state.consume_fuel(1)?;
            }
            if is_map {
                self.value(&value.get_item(&item)?, depth + 1)?;
            }
            self.value(&item, depth + 1)?;
        }
        Ok(())
    }
}

/// The list that a value promises to be.
fn make_list(state: &State, value: Value) -> Result<Value, Error> {
    let is_list = matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable);
    let is_made =
        value.downcast_object_ref::<Vec<Value>>().is_some() || value.downcast_object_ref::<Tuple>().is_some();
    if !is_list || is_made {
        return Ok(value);
    }
    let mut items = Vec::new();
    for item in value.try_iter()?.checked() {
        items.push(item?);
        if items.len().is_multiple_of(ITEMS_PER_FUEL) {
            state.consume_fuel(1)?;
        }
    }
    Ok(items.into())
}

/// The map of keys and values in turn. As in Python, a list or map is no key.
fn make_map(state: &State, pairs: Rest<Value>) -> Result<Value, Error> {
    state.consume_fuel(pairs.len() as u64)?;
    let (pairs, _) = pairs.as_chunks::<2>();
    for [key, _] in pairs {
        walk(state, key)?;
    }
    Ok(Value::from_pairs(pairs.iter().map(|[key, value]| (key.clone(), value.clone()))))
}

/// The instructions of a template with the calls that walk and make values.
///
/// # Errors
/// [`UnknownFilter`](ErrorKind::UnknownFilter) for a filter, test or method that is called with `*arguments`.
pub(super) fn rewrite<'a>(original: &Instructions<'a>) -> Result<Instructions<'a>, Error> {
    let mut result = Instructions::new(original.name(), original.source());
    let mut moved = Vec::new();
    let mut length = 0;
    while let Some(instruction) = original.get(moved.len() as u32) {
        let at = moved.len() as u32;
        moved.push(length);
        for instruction in replacement(instruction)? {
            length = 1 + match (original.get_span(at), original.get_line(at)) {
                (Some(span), _) => result.add_with_span(instruction, span),
                (None, Some(line)) => {
                    result.add_with_line(instruction, u16::try_from(line).unwrap_or(u16::MAX))
                }
                (None, None) => result.add(instruction),
            };
        }
    }
    moved.push(length);
    for at in 0..length {
        if let Some(
            Instruction::Jump(target)
            | Instruction::JumpIfFalse(target)
            | Instruction::JumpIfFalseOrPop(target)
            | Instruction::JumpIfTrueOrPop(target)
            | Instruction::Iterate(target)
            | Instruction::BuildMacro(_, target, _),
        ) = result.get_mut(at)
            && let Some(&to) = moved.get(*target as usize)
        {
            *target = to;
        }
    }
    Ok(result)
}

fn replacement<'a>(instruction: &Instruction<'a>) -> Result<Vec<Instruction<'a>>, Error> {
    let same = || instruction.clone();
    let call = |function: &'static str| Instruction::CallFunction(function, Some(1));
    let named = |function: &'static str, name: &str, count: u16| {
        vec![
            Instruction::LoadConst(Value::from(name)),
            Instruction::CallFunction(function, Some(count.saturating_add(1))),
        ]
    };
    Ok(match instruction {
        Instruction::StringConcat
        | Instruction::Eq
        | Instruction::Ne
        | Instruction::Gt
        | Instruction::Gte
        | Instruction::Lt
        | Instruction::Lte
        | Instruction::In
        | Instruction::CompareAndPreserve(_)
        | Instruction::Sub
        | Instruction::Div
        | Instruction::IntDiv
        | Instruction::Rem
        | Instruction::Pow => {
            vec![call(WALK), Instruction::Swap, call(WALK), Instruction::Swap, same()]
        }
        Instruction::GetItem | Instruction::Neg => vec![call(WALK), same()],
        Instruction::Add | Instruction::Mul | Instruction::Slice => vec![same(), call(MAKE_LIST)],
        Instruction::SetAttr(_) => vec![Instruction::Swap, call(NO_NAMESPACE), Instruction::Swap, same()],
        Instruction::BuildMap(pairs) => match u16::try_from(2 * pairs) {
            Ok(count) => vec![Instruction::CallFunction(MAKE_MAP, Some(count))],
            Err(_) => return Err(Error::new(ErrorKind::TooManyArguments, "a map has too many keys")),
        },
        Instruction::ApplyFilter(name, ..) if SHALLOW_FILTERS.contains(name) => vec![same()],
        Instruction::ApplyFilter(name, Some(count), _) => named(FILTER, name, *count),
        // Without arguments, tests ask what a value is, and methods neither compare nor convert it.
        Instruction::PerformTest(_, Some(1), _) | Instruction::CallMethod(_, Some(1)) => vec![same()],
        Instruction::PerformTest(name, Some(count), _) => named(TEST, name, *count),
        Instruction::CallMethod(name, Some(count)) => named(METHOD, name, *count),
        Instruction::ApplyFilter(name, None, _)
        | Instruction::PerformTest(name, None, _)
        | Instruction::CallMethod(name, None) => {
            return Err(Error::new(ErrorKind::UnknownFilter, format!("{name} with a list of arguments")));
        }
        _ => vec![same()],
    })
}

/// The same template without products of constants, which the compiler would compute without any limit.
pub(super) fn without_constant_products<'a>(source: &'a str, syntax: &SyntaxConfig) -> Cow<'a, str> {
    let mut result = String::new();
    let mut done = 0;
    let mut previous = None;
    for token in tokenize(source, false, syntax.clone()) {
        // A template that has no tokens is refused when it is compiled.
        let Ok((token, span)) = token else { break };
        let is_unpacking = matches!(previous, Some(Token::ParenOpen | Token::Comma));
        if matches!(token, Token::Mul)
            && !is_unpacking
            && let Some(before) = source.get(done..span.start_offset as usize)
        {
            result.push_str(before);
            result.push_str(" | ");
            result.push_str(AS_IS);
            result.push(' ');
            done = span.start_offset as usize;
        }
        previous = Some(token);
    }
    if done == 0 {
        return source.into();
    }
    result.push_str(source.get(done..).unwrap_or_default());
    result.into()
}
