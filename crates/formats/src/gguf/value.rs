//! Metadata values. Arrays stay where they lie in the file: a vocabulary has hundreds of thousands of strings.

use std::fmt;

use crate::SharedBytes;

/// The type of a metadata value, with its id in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    pub(super) fn from_id(id: u32) -> Option<Self> {
        Self::ALL.get(id as usize).copied()
    }

    /// Bytes of a value; `None` where that depends on the value.
    pub(super) fn size(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::F32 => "f32",
            Self::Bool => "bool",
            Self::String => "string",
            Self::Array => "array",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F64 => "f64",
        })
    }
}

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl Value {
    /// Its type.
    pub fn kind(&self) -> ValueType {
        match self {
            Self::U8(_) => ValueType::U8,
            Self::I8(_) => ValueType::I8,
            Self::U16(_) => ValueType::U16,
            Self::I16(_) => ValueType::I16,
            Self::U32(_) => ValueType::U32,
            Self::I32(_) => ValueType::I32,
            Self::F32(_) => ValueType::F32,
            Self::Bool(_) => ValueType::Bool,
            Self::String(_) => ValueType::String,
            Self::Array(_) => ValueType::Array,
            Self::U64(_) => ValueType::U64,
            Self::I64(_) => ValueType::I64,
            Self::F64(_) => ValueType::F64,
        }
    }

    /// An integer of any width.
    pub fn as_integer(&self) -> Option<i128> {
        Some(match *self {
            Self::U8(n) => n.into(),
            Self::I8(n) => n.into(),
            Self::U16(n) => n.into(),
            Self::I16(n) => n.into(),
            Self::U32(n) => n.into(),
            Self::I32(n) => n.into(),
            Self::U64(n) => n.into(),
            Self::I64(n) => n.into(),
            _ => return None,
        })
    }

    /// A float of either width.
    pub fn as_float(&self) -> Option<f64> {
        match *self {
            Self::F32(x) => Some(x.into()),
            Self::F64(x) => Some(x),
            _ => None,
        }
    }

    /// A string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(text) => Some(text),
            _ => None,
        }
    }

    /// A boolean.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// An array.
    pub fn as_array(&self) -> Option<&Array> {
        match self {
            Self::Array(array) => Some(array),
            _ => None,
        }
    }

    /// Appends the value as it lies in a file, without its type.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::U8(n) => out.push(*n),
            Self::I8(n) => out.extend(n.to_le_bytes()),
            Self::U16(n) => out.extend(n.to_le_bytes()),
            Self::I16(n) => out.extend(n.to_le_bytes()),
            Self::U32(n) => out.extend(n.to_le_bytes()),
            Self::I32(n) => out.extend(n.to_le_bytes()),
            Self::F32(x) => out.extend(x.to_le_bytes()),
            Self::Bool(value) => out.push((*value).into()),
            Self::String(text) => encode_string(text, out),
            Self::Array(array) => {
                out.extend((array.kind as u32).to_le_bytes());
                out.extend((array.len as u64).to_le_bytes());
                out.extend_from_slice(&array.bytes);
            }
            Self::U64(n) => out.extend(n.to_le_bytes()),
            Self::I64(n) => out.extend(n.to_le_bytes()),
            Self::F64(x) => out.extend(x.to_le_bytes()),
        }
    }

    /// The scalar of this type in `bytes`, which has exactly its size.
    pub(super) fn decode(kind: ValueType, bytes: &[u8]) -> Option<Self> {
        macro_rules! number {
            ($variant:ident, $type:ty) => {
                Self::$variant(<$type>::from_le_bytes(bytes.try_into().ok()?))
            };
        }
        Some(match kind {
            ValueType::U8 => number!(U8, u8),
            ValueType::I8 => number!(I8, i8),
            ValueType::U16 => number!(U16, u16),
            ValueType::I16 => number!(I16, i16),
            ValueType::U32 => number!(U32, u32),
            ValueType::I32 => number!(I32, i32),
            ValueType::F32 => number!(F32, f32),
            ValueType::Bool => Self::Bool(*bytes.first()? != 0),
            ValueType::U64 => number!(U64, u64),
            ValueType::I64 => number!(I64, i64),
            ValueType::F64 => number!(F64, f64),
            ValueType::String | ValueType::Array => return None,
        })
    }
}

macro_rules! from {
    ($($type:ty => $variant:ident),*) => {
        $(impl From<$type> for Value {
            fn from(value: $type) -> Self {
                Self::$variant(value.into())
            }
        })*
    };
}

from!(u32 => U32, i32 => I32, u64 => U64, f32 => F32, bool => Bool, &str => String, String => String, Array => Array);

pub(super) fn encode_string(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// An array of strings, numbers or booleans, as it lies in the file. Its strings have been checked to be UTF-8.
#[derive(Clone)]
pub struct Array {
    pub(super) kind: ValueType,
    pub(super) len: usize,
    pub(super) bytes: SharedBytes,
}

impl Array {
    /// An array of strings.
    pub fn strings<'a>(items: impl IntoIterator<Item = &'a str>) -> Self {
        let (mut bytes, mut len) = (Vec::new(), 0);
        for item in items {
            encode_string(item, &mut bytes);
            len += 1;
        }
        Self { kind: ValueType::String, len, bytes: bytes.into() }
    }

    /// An array of bytes.
    pub fn u8s(items: &[u8]) -> Self {
        Self { kind: ValueType::U8, len: items.len(), bytes: items.to_vec().into() }
    }

    /// An array of 32-bit integers.
    pub fn i32s(items: &[i32]) -> Self {
        let bytes: Vec<u8> = items.iter().flat_map(|n| n.to_le_bytes()).collect();
        Self { kind: ValueType::I32, len: items.len(), bytes: bytes.into() }
    }

    /// An array of unsigned 32-bit integers.
    pub fn u32s(items: &[u32]) -> Self {
        let bytes: Vec<u8> = items.iter().flat_map(|n| n.to_le_bytes()).collect();
        Self { kind: ValueType::U32, len: items.len(), bytes: bytes.into() }
    }

    /// An array of single-precision floats.
    pub fn f32s(items: &[f32]) -> Self {
        let bytes: Vec<u8> = items.iter().flat_map(|n| n.to_le_bytes()).collect();
        Self { kind: ValueType::F32, len: items.len(), bytes: bytes.into() }
    }

    /// The type of its elements.
    pub fn kind(&self) -> ValueType {
        self.kind
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements if they are strings.
    pub fn as_strings(&self) -> Option<impl Iterator<Item = &str>> {
        let mut rest = &self.bytes[..];
        (self.kind == ValueType::String).then(|| {
            (0..self.len).map_while(move |_| {
                let (length, after) = rest.split_first_chunk::<8>()?;
                let (text, after) = after.split_at_checked(u64::from_le_bytes(*length) as usize)?;
                rest = after;
                std::str::from_utf8(text).ok()
            })
        })
    }

    /// The elements if they are numbers or booleans.
    pub fn as_scalars(&self) -> Option<impl Iterator<Item = Value>> {
        let size = self.kind.size()?;
        Some(self.bytes.chunks_exact(size).filter_map(|bytes| Value::decode(self.kind, bytes)))
    }

    /// The elements if they are integers.
    pub fn as_integers(&self) -> Option<impl Iterator<Item = i128>> {
        let integers = !matches!(
            self.kind,
            ValueType::F32 | ValueType::F64 | ValueType::Bool | ValueType::String | ValueType::Array
        );
        self.as_scalars().filter(|_| integers).map(|items| items.filter_map(|item| item.as_integer()))
    }

    /// The elements if they are floats.
    pub fn as_floats(&self) -> Option<impl Iterator<Item = f64>> {
        let floats = matches!(self.kind, ValueType::F32 | ValueType::F64);
        self.as_scalars().filter(|_| floats).map(|items| items.filter_map(|item| item.as_float()))
    }
}

impl PartialEq for Array {
    fn eq(&self, other: &Self) -> bool {
        self.kind == other.kind && self.len == other.len && self.bytes[..] == other.bytes[..]
    }
}

impl fmt::Debug for Array {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Array({} x {})", self.len, self.kind)
    }
}

impl fmt::Display for Value {
    /// The value, or what kind of array it is.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::U8(n) => write!(f, "{n}"),
            Self::I8(n) => write!(f, "{n}"),
            Self::U16(n) => write!(f, "{n}"),
            Self::I16(n) => write!(f, "{n}"),
            Self::U32(n) => write!(f, "{n}"),
            Self::I32(n) => write!(f, "{n}"),
            Self::F32(x) => write!(f, "{x:?}"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::String(text) => write!(f, "{text:?}"),
            Self::Array(array) => write!(f, "an array of {} {}s", array.len, array.kind),
            Self::U64(n) => write!(f, "{n}"),
            Self::I64(n) => write!(f, "{n}"),
            Self::F64(x) => write!(f, "{x:?}"),
        }
    }
}
