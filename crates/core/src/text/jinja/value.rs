//! Python's containers as objects of minijinja.
//!
//! Templates see lists, tuples, dicts, ranges and generators that behave as those of Python. Each container knows how
//! deeply it is nested, so that no template can build a value whose walk or drop overflows the stack.

use std::{
    fmt,
    hash::{Hash, Hasher},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use indexmap::{Equivalent, IndexMap};
use minijinja::{
    Error, State, Value,
    value::{DynObject, Enumerator, Object, ObjectRepr, ValueKind},
};

use super::{DictType, Function, Result, fail, methods};

/// Deeper values are refused.
pub(super) const MAX_DEPTH: usize = 64;
/// Items that one step of the budget pays for.
pub(super) const ITEMS_PER_FUEL: usize = 8;
/// Bytes that one step of the budget pays for.
pub(super) const BYTES_PER_FUEL: usize = 64;
/// The longest range that the sandbox of Jinja2 allows.
const MAX_RANGE: u64 = 100_000;

/// How deeply a value is nested, and whether it holds an object that can refer back to it, such as a namespace.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Nesting {
    depth: usize,
    pub(super) opaque: bool,
}

impl Nesting {
    pub(super) fn of(value: &Value) -> Self {
        if value.as_object().is_none() {
            return Self::default();
        }
        if let Some(sequence) = value.downcast_object_ref::<Sequence>() {
            sequence.nesting
        } else if let Some(dict) = value.downcast_object_ref::<Dict>() {
            dict.nesting
        } else if let Some(generator) = value.downcast_object_ref::<Generator>() {
            generator.nesting
        } else if let Some(view) = value.downcast_object_ref::<View>() {
            view.dict.nesting
        } else if let Some(method) = value.downcast_object_ref::<Method>() {
            Self::of(&method.receiver)
        } else if let Some(cycler) = value.downcast_object_ref::<Cycler>() {
            cycler.nesting
        } else if matches!(Type::of(value), Type::Range | Type::Joiner | Type::Function) {
            Self::default()
        } else {
            Self { depth: 1, opaque: true }
        }
    }

    fn around<'a>(items: impl Iterator<Item = &'a Value>) -> Result<Self> {
        let mut nesting = Self::default();
        for item in items {
            let item = Self::of(item);
            nesting.depth = nesting.depth.max(item.depth);
            nesting.opaque |= item.opaque;
        }
        nesting.depth += 1;
        if nesting.depth > MAX_DEPTH {
            return Err(fail("a value is nested too deeply"));
        }
        Ok(nesting)
    }
}

/// Takes fuel for a container of `items` items.
pub(super) fn charge_items(state: &State, items: usize) -> Result<()> {
    state.consume_fuel(items.div_ceil(ITEMS_PER_FUEL) as u64)
}

/// Takes fuel for a text of `bytes` bytes.
pub(super) fn charge_bytes(state: &State, bytes: usize) -> Result<()> {
    state.consume_fuel((bytes / BYTES_PER_FUEL) as u64)
}

/// Takes fuel for the items that an operation visits.
pub(super) struct Meter<'a, 'template, 'env> {
    state: &'a State<'template, 'env>,
    visited: usize,
}

impl<'a, 'template, 'env> Meter<'a, 'template, 'env> {
    pub(super) fn new(state: &'a State<'template, 'env>) -> Self {
        Self { state, visited: 0 }
    }

    pub(super) fn state(&self) -> &'a State<'template, 'env> {
        self.state
    }

    pub(super) fn visit(&mut self) -> Result<()> {
        self.visited += 1;
        if self.visited.is_multiple_of(ITEMS_PER_FUEL) { self.state.consume_fuel(1) } else { Ok(()) }
    }
}

/// `list` and `tuple`.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) items: Vec<Value>,
    pub(super) is_tuple: bool,
    /// A tuple of `groupby`, whose items have names.
    pub(super) is_group: bool,
    nesting: Nesting,
}

pub(super) fn list(state: &State, items: Vec<Value>) -> Result<Value> {
    sequence(state, items, false)
}

pub(super) fn tuple(state: &State, items: Vec<Value>) -> Result<Value> {
    sequence(state, items, true)
}

pub(super) fn sequence(state: &State, items: Vec<Value>, is_tuple: bool) -> Result<Value> {
    charge_items(state, items.len())?;
    let nesting = Nesting::around(items.iter())?;
    Ok(Value::from_object(Sequence { items, is_tuple, is_group: false, nesting }))
}

/// The tuple that `groupby` makes of each group.
pub(super) fn group(state: &State, grouper: Value, members: Value) -> Result<Value> {
    let items = vec![grouper, members];
    charge_items(state, items.len())?;
    let nesting = Nesting::around(items.iter())?;
    Ok(Value::from_object(Sequence { items, is_tuple: true, is_group: true, nesting }))
}

/// The list of messages and the like, made before a template runs.
pub(in crate::text) fn list_of(items: Vec<Value>) -> Value {
    let nesting = Nesting::around(items.iter()).unwrap_or_default();
    Value::from_object(Sequence { items, is_tuple: false, is_group: false, nesting })
}

/// A dict with texts as keys, made before a template runs.
pub(in crate::text) fn dict_of(pairs: Vec<(&str, Value)>) -> Value {
    let nesting = Nesting::around(pairs.iter().map(|(_, value)| value)).unwrap_or_default();
    let entry = |(key, value): (&str, Value)| (Key::Str(key.into()), (key.into(), value));
    Value::from_object(Dict { entries: pairs.into_iter().map(entry).collect(), nesting })
}

/// A tuple of texts.
pub(super) fn tuple_of(items: Vec<Value>) -> Value {
    let nesting = Nesting { depth: 1, opaque: false };
    Value::from_object(Sequence { items, is_tuple: true, is_group: false, nesting })
}

impl Object for Sequence {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.items.get(key.as_usize()?).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.items.len())
    }

    fn call_method(self: &Arc<Self>, state: &mut State<'_, '_>, name: &str, args: &[Value]) -> Result<Value> {
        methods::call(state, &Value::from_dyn_object(Arc::clone(self)), name, args)
    }
}

/// A hashable value as key of a dict. Numbers that are equal are one key, whatever their type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Key {
    None,
    Undefined,
    Int(i128),
    /// The bits of a float that is no integer.
    Float(u64),
    Str(Arc<str>),
    Tuple(Vec<Key>),
    Object(usize),
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match self {
            Self::None => state.write_u8(0),
            Self::Undefined => state.write_u8(1),
            Self::Int(int) => int.hash(state),
            Self::Float(bits) => bits.hash(state),
            Self::Str(text) => StrKey(text).hash(state),
            Self::Tuple(keys) => keys.hash(state),
            Self::Object(address) => address.hash(state),
        }
    }
}

struct StrKey<'a>(&'a str);

impl Hash for StrKey<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl Equivalent<Key> for StrKey<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        matches!(key, Key::Str(text) if **text == *self.0)
    }
}

impl Key {
    /// # Errors
    /// Where the value is not hashable in Python.
    pub(super) fn new(state: &State, value: &Value) -> Result<Self> {
        Self::metered(&mut Meter::new(state), value)
    }

    fn metered(meter: &mut Meter<'_, '_, '_>, value: &Value) -> Result<Self> {
        meter.visit()?;
        Ok(match Type::of(value) {
            Type::Undefined => Self::Undefined,
            Type::None => Self::None,
            Type::Bool => Self::Int(value.is_true().into()),
            Type::Int => Self::Int(i128::try_from(value.clone())?),
            Type::Float => {
                let float = f64::try_from(value.clone())?;
                if float.fract() == 0.0 && float.abs() < 1e38 {
                    Self::Int(float as i128)
                } else {
                    Self::Float(float.to_bits())
                }
            }
            Type::Str => {
                let text = value.to_str().unwrap_or_default();
                charge_bytes(meter.state, text.len())?;
                Self::Str(text)
            }
            Type::Tuple => Self::Tuple(
                items(value).iter().map(|item| Self::metered(meter, item)).collect::<Result<_>>()?,
            ),
            Type::Range => {
                let range = value.downcast_object_ref::<Range>().map(Range::bounds).unwrap_or_default();
                Self::Tuple(vec![Self::None, Self::Int(range.0), Self::Int(range.1), Self::Int(range.2)])
            }
            found @ (Type::List | Type::Dict | Type::View) => {
                return Err(fail(format!("a {found} cannot be the key of a dict")));
            }
            _ => Self::Object(address(value)),
        })
    }
}

/// Where an object is in memory: its identity.
pub(super) fn address(value: &Value) -> usize {
    value.as_object().map_or(0, |object: &DynObject| {
        // The address of the allocation is the same for all references to an object.
        pointer::<Sequence>(object)
            .or_else(|| pointer::<Dict>(object))
            .or_else(|| pointer::<Generator>(object))
            .or_else(|| pointer::<Namespace>(object))
            .or_else(|| pointer::<Cycler>(object))
            .or_else(|| pointer::<Joiner>(object))
            .or_else(|| pointer::<Range>(object))
            .or_else(|| pointer::<View>(object))
            .or_else(|| pointer::<Function>(object))
            .or_else(|| pointer::<DictType>(object))
            .unwrap_or(0)
    })
}

fn pointer<T: 'static>(object: &DynObject) -> Option<usize> {
    object.downcast_ref::<T>().map(|object| std::ptr::from_ref(object) as usize)
}

/// `dict`.
#[derive(Debug)]
pub(in crate::text) struct Dict {
    /// The keys as they were first given, with their values.
    entries: IndexMap<Key, (Value, Value)>,
    nesting: Nesting,
}

impl Dict {
    pub(super) fn new(state: &State, pairs: impl IntoIterator<Item = (Value, Value)>) -> Result<Self> {
        let mut entries = IndexMap::<Key, (Value, Value)>::new();
        let mut meter = Meter::new(state);
        for (key, value) in pairs {
            meter.visit()?;
            let hashable = Key::metered(&mut meter, &key)?;
            match entries.get_mut(&hashable) {
                Some((_, old)) => *old = value,
                None => drop(entries.insert(hashable, (key, value))),
            }
        }
        charge_items(state, entries.len())?;
        let nesting = Nesting::around(entries.values().flat_map(|(key, value)| [key, value]))?;
        Ok(Self { entries, nesting })
    }

    pub(super) fn value(state: &State, pairs: impl IntoIterator<Item = (Value, Value)>) -> Result<Value> {
        Self::new(state, pairs).map(Value::from_object)
    }

    pub(super) fn get(&self, state: &State, key: &Value) -> Result<Option<Value>> {
        match key.as_str() {
            Some(key) => Ok(self.get_str(key)),
            None => Ok(self.entries.get(&Key::new(state, key)?).map(|(_, value)| value.clone())),
        }
    }

    pub(super) fn get_str(&self, key: &str) -> Option<Value> {
        self.entries.get(&StrKey(key)).map(|(_, value)| value.clone())
    }

    pub(super) fn pairs(&self) -> impl ExactSizeIterator<Item = &(Value, Value)> + DoubleEndedIterator {
        self.entries.values()
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = Value> + '_ {
        self.pairs().map(|(key, _)| key.clone())
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}

impl Object for Dict {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get_str(key.as_str()?)
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.keys().collect())
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.len())
    }

    fn call_method(self: &Arc<Self>, state: &mut State<'_, '_>, name: &str, args: &[Value]) -> Result<Value> {
        methods::call(state, &Value::from_dyn_object(Arc::clone(self)), name, args)
    }
}

/// What `keys()`, `values()` and `items()` of a dict return.
#[derive(Debug)]
pub(super) struct View {
    pub(super) dict: Arc<Dict>,
    pub(super) kind: ViewKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ViewKind {
    Keys,
    Values,
    Items,
}

impl View {
    pub(super) fn items(&self, state: &State) -> Result<Vec<Value>> {
        charge_items(state, self.dict.len())?;
        let item = |(key, value): &(Value, Value)| match self.kind {
            ViewKind::Keys => Ok(key.clone()),
            ViewKind::Values => Ok(value.clone()),
            ViewKind::Items => tuple(state, vec![key.clone(), value.clone()]),
        };
        self.dict.pairs().map(item).collect()
    }
}

/// An object that minijinja cannot look into, with the truth value and the calls of its Python counterpart.
macro_rules! plain_object {
    ($name:ident, is_true: |$object:ident| $is_true:expr) => {
        impl Object for $name {
            fn repr(self: &Arc<Self>) -> ObjectRepr {
                ObjectRepr::Plain
            }

            fn is_true(self: &Arc<Self>) -> bool {
                let $object = self;
                $is_true
            }

            fn call(self: &Arc<Self>, state: &mut State<'_, '_>, args: &[Value]) -> Result<Value> {
                methods::call_object(state, &Value::from_dyn_object(Arc::clone(self)), args)
            }

            fn call_method(
                self: &Arc<Self>,
                state: &mut State<'_, '_>,
                name: &str,
                args: &[Value],
            ) -> Result<Value> {
                methods::call(state, &Value::from_dyn_object(Arc::clone(self)), name, args)
            }
        }
    };
}

plain_object!(View, is_true: |view| view.dict.len() > 0);
plain_object!(Range, is_true: |range| range.len() > 0);
plain_object!(Generator, is_true: |_generator| true);
plain_object!(Method, is_true: |_method| true);
plain_object!(Namespace, is_true: |_namespace| true);
plain_object!(Cycler, is_true: |_cycler| true);
plain_object!(Joiner, is_true: |_joiner| true);

/// `range`.
#[derive(Debug)]
pub(super) struct Range {
    pub(super) start: i128,
    pub(super) stop: i128,
    pub(super) step: i128,
}

impl Range {
    pub(super) fn new(start: i128, stop: i128, step: i128) -> Result<Self> {
        if step == 0 {
            return Err(fail("range() with a step of 0"));
        }
        let range = Self { start, stop, step };
        if range.len() as u64 > MAX_RANGE {
            return Err(fail(format!("range() of more than {MAX_RANGE} numbers")));
        }
        Ok(range)
    }

    pub(super) fn len(&self) -> usize {
        let span = if self.step > 0 {
            self.stop.saturating_sub(self.start)
        } else {
            self.start.saturating_sub(self.stop)
        };
        if span <= 0 {
            return 0;
        }
        let count = (span as u128 - 1) / self.step.unsigned_abs() + 1;
        usize::try_from(count).unwrap_or(usize::MAX)
    }

    pub(super) fn get(&self, index: usize) -> i128 {
        self.start + self.step * index as i128
    }

    /// What decides whether two ranges are equal: length, first item, step.
    pub(super) fn bounds(&self) -> (i128, i128, i128) {
        match self.len() {
            0 => (0, 0, 0),
            1 => (1, self.start, 0),
            length => (length as i128, self.start, self.step),
        }
    }
}

/// What filters such as `map` and `select` return: items that can be taken once.
pub(super) struct Generator {
    items: Mutex<std::vec::IntoIter<Value>>,
    /// The name that Python prints.
    pub(super) name: &'static str,
    nesting: Nesting,
}

impl fmt::Debug for Generator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

pub(super) fn generator(state: &State, name: &'static str, items: Vec<Value>) -> Result<Value> {
    charge_items(state, items.len())?;
    let nesting = Nesting::around(items.iter())?;
    Ok(Value::from_object(Generator { items: Mutex::new(items.into_iter()), name, nesting }))
}

impl Generator {
    pub(super) fn next(&self) -> Option<Value> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner).next()
    }

    pub(super) fn take(&self) -> Vec<Value> {
        std::mem::take(&mut *self.items.lock().unwrap_or_else(PoisonError::into_inner)).collect()
    }
}

/// A method that was looked up but not called yet.
#[derive(Debug)]
pub(super) struct Method {
    pub(super) receiver: Value,
    pub(super) name: String,
}

/// `namespace`: the only object that a template can change.
#[derive(Default)]
pub(super) struct Namespace(Mutex<IndexMap<String, Value>>);

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("namespace")
    }
}

impl Namespace {
    pub(super) fn get(&self, name: &str) -> Option<Value> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// # Errors
    /// For a private name, and for a value that may refer back to a namespace.
    pub(super) fn set(&self, name: &str, value: Value) -> Result<()> {
        if name.starts_with('_') {
            return Err(fail(format!("`{name}` cannot be set: the name begins with an underscore")));
        }
        if Nesting::of(&value).opaque {
            return Err(fail(format!("`{name}` cannot be set to a value with a namespace, macro or loop")));
        }
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), value);
        Ok(())
    }

    pub(super) fn attributes(&self) -> Vec<(Value, Value)> {
        let attributes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        attributes.iter().map(|(name, value)| (Value::from(name.as_str()), value.clone())).collect()
    }
}

/// `cycler`.
#[derive(Debug)]
pub(super) struct Cycler {
    pub(super) items: Vec<Value>,
    pub(super) position: AtomicUsize,
    nesting: Nesting,
}

impl Cycler {
    pub(super) fn new(items: Vec<Value>) -> Result<Self> {
        let nesting = Nesting::around(items.iter())?;
        Ok(Self { items, position: AtomicUsize::new(0), nesting })
    }

    pub(super) fn current(&self) -> Value {
        self.items[self.position.load(Ordering::Relaxed) % self.items.len()].clone()
    }
}

/// `joiner`: nothing at the first call, the separator at all others.
#[derive(Debug)]
pub(super) struct Joiner {
    pub(super) separator: Value,
    pub(super) used: AtomicBool,
}

/// The type that a value has in Python.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    Undefined,
    None,
    Bool,
    Int,
    Float,
    Str,
    List,
    Tuple,
    Dict,
    Range,
    Generator,
    View,
    Method,
    Namespace,
    Cycler,
    Joiner,
    Macro,
    Loop,
    Function,
    Other,
}

impl Type {
    pub(super) fn of(value: &Value) -> Self {
        match value.kind() {
            ValueKind::Undefined => return Self::Undefined,
            ValueKind::None => return Self::None,
            ValueKind::Bool => return Self::Bool,
            ValueKind::Number if value.is_integer() => return Self::Int,
            ValueKind::Number => return Self::Float,
            ValueKind::String => return Self::Str,
            _ => {}
        }
        let Some(object) = value.as_object() else { return Self::Other };
        if let Some(sequence) = object.downcast_ref::<Sequence>() {
            return if sequence.is_tuple { Self::Tuple } else { Self::List };
        }
        if object.is::<Dict>() {
            Self::Dict
        } else if object.is::<Namespace>() {
            Self::Namespace
        } else if object.is::<Range>() {
            Self::Range
        } else if object.is::<Generator>() {
            Self::Generator
        } else if object.is::<View>() {
            Self::View
        } else if object.is::<Method>() {
            Self::Method
        } else if object.is::<Cycler>() {
            Self::Cycler
        } else if object.is::<Joiner>() {
            Self::Joiner
        } else {
            match object.type_name().rsplit("::").next() {
                Some("Macro") => Self::Macro,
                Some("Loop") => Self::Loop,
                _ if value.kind() == ValueKind::Plain => Self::Function,
                _ => Self::Other,
            }
        }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Undefined => "undefined value",
            Self::None => "none",
            Self::Bool => "bool",
            Self::Int => "int",
            Self::Float => "float",
            Self::Str => "string",
            Self::List => "list",
            Self::Tuple => "tuple",
            Self::Dict => "dict",
            Self::Range => "range",
            Self::Generator => "generator",
            Self::View => "view of a dict",
            Self::Method => "method",
            Self::Namespace => "namespace",
            Self::Cycler => "cycler",
            Self::Joiner => "joiner",
            Self::Macro => "macro",
            Self::Loop => "loop",
            Self::Function => "function",
            Self::Other => "value of this kind",
        })
    }
}

/// The items of a list or tuple; none for all other values.
pub(super) fn items(value: &Value) -> &[Value] {
    value.downcast_object_ref::<Sequence>().map_or(&[], |sequence| &sequence.items)
}

/// The values that Python's `iter` gives.
pub(super) fn iterate(state: &State, value: &Value) -> Result<Vec<Value>> {
    let result = match Type::of(value) {
        Type::Undefined => Vec::new(),
        Type::List | Type::Tuple => items(value).to_vec(),
        Type::Str => {
            let text = value.as_str().unwrap_or_default();
            charge_items(state, text.len())?;
            let mut buffer = [0; 4];
            text.chars().map(|c| Value::from(&*c.encode_utf8(&mut buffer))).collect()
        }
        Type::Dict => value.downcast_object_ref::<Dict>().map_or(Vec::new(), |dict| dict.keys().collect()),
        Type::View => value.downcast_object_ref::<View>().map_or(Ok(Vec::new()), |view| view.items(state))?,
        Type::Range => value.downcast_object_ref::<Range>().map_or(Vec::new(), |range| {
            (0..range.len()).map(|index| Value::from(range.get(index))).collect()
        }),
        Type::Generator => value.downcast_object_ref::<Generator>().map_or(Vec::new(), Generator::take),
        Type::Other => value.try_iter()?.checked().collect::<Result<_>>()?,
        found => return Err(not_iterable(found)),
    };
    charge_items(state, result.len())?;
    Ok(result)
}

pub(super) fn not_iterable(found: Type) -> Error {
    fail(format!("a {found} cannot be iterated over"))
}
