//! Constants that are read into memory instead of being mapped by the runtime (`mmap = false`).

use std::collections::BTreeMap;
use std::sync::Arc;

use ort::value::{DynValue, PrimitiveTensorElementType, Tensor};
use ternion_core::{Error, ErrorKind, Result, ResultExt};
use ternion_formats::SharedBytes;
use ternion_formats::onnx::{Element, Initializer, Summary};

use crate::model::engine_error;

/// Constants by their names; empty where the runtime maps the files itself.
pub(crate) type Constants = Vec<(String, Arc<DynValue>)>;

/// Reads all constants of a model that lie in files beside it.
///
/// # Errors
/// [`Io`](ternion_core::ErrorKind::Io) where a file cannot be read;
/// [`Unsupported`](ternion_core::ErrorKind::Unsupported) for a constant that the runtime would map all the same.
pub(crate) fn read(summary: &Summary) -> Result<Constants> {
    let mut files = BTreeMap::new();
    let mut constants = Constants::new();
    for initializer in &summary.initializers {
        let Some((file, offset)) = &initializer.external else { continue };
        // Touched nowhere: the data goes through `read_at`.
        let bytes = match files.entry(file) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                entry.insert(SharedBytes::map_untouched(file)?)
            }
        };
        let tensor = tensor(initializer, bytes, *offset).with("tensor", &initializer.name)?;
        constants.push((initializer.name.clone(), Arc::new(tensor)));
    }
    if constants.len() != summary.external_tensors {
        return Err(Error::unsupported(format!(
            "mmap: false, but {} tensors beside the file are no constants of the graph itself, so that ONNX Runtime maps them",
            summary.external_tensors - constants.len()
        )));
    }
    Ok(constants)
}

/// The elements of a constant, in memory that the runtime uses but does not own: it takes no other for this.
fn tensor(initializer: &Initializer, file: &SharedBytes, offset: u64) -> Result<DynValue> {
    let place = Place { dims: &initializer.dims, file, offset };
    match initializer.element {
        Element::F32 => place.read::<f32>(),
        Element::F16 => place.read::<half::f16>(),
        Element::Bf16 => place.read::<half::bf16>(),
        Element::F64 => place.read::<f64>(),
        Element::U8 => place.read::<u8>(),
        Element::I8 => place.read::<i8>(),
        Element::U16 => place.read::<u16>(),
        Element::I16 => place.read::<i16>(),
        Element::U32 => place.read::<u32>(),
        Element::I32 => place.read::<i32>(),
        Element::U64 => place.read::<u64>(),
        Element::I64 => place.read::<i64>(),
        other => Err(Error::unsupported(format!("mmap: false, but a constant of {other} cannot be read"))),
    }
}

/// Where the elements of a constant are.
struct Place<'a> {
    dims: &'a [u64],
    file: &'a SharedBytes,
    offset: u64,
}

/// Types of which every bit pattern is an element, and which have no padding.
trait Number: PrimitiveTensorElementType + Copy + Default + std::fmt::Debug + 'static {}

impl Number for f32 {}
impl Number for half::f16 {}
impl Number for half::bf16 {}
impl Number for f64 {}
impl Number for u8 {}
impl Number for i8 {}
impl Number for u16 {}
impl Number for i16 {}
impl Number for u32 {}
impl Number for i32 {}
impl Number for u64 {}
impl Number for i64 {}

impl Place<'_> {
    fn read<T: Number>(&self) -> Result<DynValue> {
        let no_memory = |why: &dyn std::fmt::Display| {
            let message = format!("no memory for a constant of the shape {:?}: {why}", self.dims);
            Error::new(ErrorKind::ResourceExhausted, message)
        };
        let dims: Vec<usize> =
            self.dims.iter().map(|size| usize::try_from(*size).unwrap_or(usize::MAX)).collect();
        let elements = dims.iter().try_fold(1usize, |all, size| all.checked_mul(*size));
        let elements = elements.ok_or_else(|| no_memory(&"its size overflows"))?;
        let mut values: Vec<T> = Vec::new();
        values.try_reserve_exact(elements).map_err(|e| no_memory(&e))?;
        values.resize(elements, T::default());
        // SAFETY: The vector's own memory and its own length in bytes. Any bytes are values of a `Number`.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(values.as_mut_ptr().cast::<u8>(), size_of_val(&values[..]))
        };
        self.file.read_at(usize::try_from(self.offset).unwrap_or(usize::MAX), bytes)?;
        let tensor = Tensor::from_array((dims, values));
        tensor.map(Tensor::into_dyn).map_err(|e| engine_error("a constant cannot be made", &e))
    }
}
