//! Arguments of filters, tests, functions and methods, bound to parameters as Python binds them.

use minijinja::{Value, value::DynObject};

use super::{Result, fail};

/// Positional and keyword arguments.
#[derive(Clone, Debug, Default)]
pub(super) struct Args {
    pub(super) positional: Vec<Value>,
    pub(super) named: Vec<(String, Value)>,
}

impl Args {
    /// The arguments as minijinja hands them over: keyword arguments are the last value.
    pub(super) fn new(values: &[Value]) -> Self {
        let mut args = Self { positional: Vec::with_capacity(values.len()), named: Vec::new() };
        for value in values {
            if value.is_kwargs() {
                let pairs = value.as_object().and_then(DynObject::try_iter_pairs);
                let pairs = pairs.into_iter().flatten();
                args.named.extend(pairs.map(|(name, value)| (name.to_string(), value)));
            } else {
                args.positional.push(value.clone());
            }
        }
        args
    }

    pub(super) fn with_first(mut self, first: Value) -> Self {
        self.positional.insert(0, first);
        self
    }

    /// One value for each parameter; the first `required` must be given. A parameter whose name is empty is
    /// positional only.
    ///
    /// # Errors
    /// For too many, unknown, repeated and missing arguments.
    pub(super) fn bind<const N: usize>(
        self,
        function: &str,
        names: [&str; N],
        required: usize,
    ) -> Result<[Option<Value>; N]> {
        if self.positional.len() > N {
            return Err(fail(format!(
                "{function}: has {} arguments, expected at most {N}",
                self.positional.len()
            )));
        }
        let mut result = [const { None }; N];
        for (place, value) in result.iter_mut().zip(self.positional) {
            *place = Some(value);
        }
        for (name, value) in self.named {
            let Some(at) = names.iter().position(|known| !known.is_empty() && **known == name) else {
                return Err(fail(format!("{function}: has no parameter `{name}`")));
            };
            if result[at].replace(value).is_some() {
                return Err(fail(format!("{function}: `{name}` is given twice")));
            }
        }
        match result[..required].iter().position(Option::is_none) {
            Some(at) => Err(fail(format!("{function}: argument {} is missing", at + 1))),
            None => Ok(result),
        }
    }
}

/// Whether an optional flag is set.
pub(super) fn flag(value: Option<&Value>) -> bool {
    value.is_some_and(Value::is_true)
}

/// An optional argument, without `none`.
pub(super) fn given(value: Option<Value>) -> Option<Value> {
    value.filter(|value| !value.is_none())
}
