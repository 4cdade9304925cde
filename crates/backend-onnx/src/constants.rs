//! Constants that are read into memory instead of being mapped by the runtime (`mmap = false`).

use std::collections::BTreeMap;
use std::sync::Arc;

use ort::memory::Allocator;
use ort::value::{DynTensor, DynValue, TensorElementType};
use ternion_core::{Error, Result, ResultExt};
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
        constants.push((initializer.name.clone(), Arc::new(tensor.into_dyn())));
    }
    if constants.len() != summary.external_tensors {
        return Err(Error::unsupported(format!(
            "mmap: false, but {} tensors beside the file are no constants of the graph itself, so that ONNX Runtime maps them",
            summary.external_tensors - constants.len()
        )));
    }
    Ok(constants)
}

fn tensor(initializer: &Initializer, file: &SharedBytes, offset: u64) -> Result<DynTensor> {
    let elements = initializer.dims.iter().try_fold(1u64, |all, size| all.checked_mul(*size));
    let length = elements.and_then(|n| initializer.element.bytes(n)).and_then(|n| usize::try_from(n).ok());
    let (Some(length), Some(element)) = (length, element_type(initializer.element)) else {
        let element = initializer.element;
        return Err(Error::unsupported(format!("mmap: false, but a constant of {element} cannot be read")));
    };
    let dims: Vec<i64> = initializer.dims.iter().map(|size| *size as i64).collect();
    let mut tensor = DynTensor::new(&Allocator::default(), element, dims)
        .map_err(|e| engine_error("there is no memory for the constant", &e))?;
    if length > 0 {
        // SAFETY: The runtime has allocated as many bytes as its type and shape take, which are `length`; any bytes are
        // elements of the types of `element_type`, and nobody else uses the tensor yet.
        let out = unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr_mut().cast::<u8>(), length) };
        file.read_at(usize::try_from(offset).unwrap_or(usize::MAX), out)?;
    }
    Ok(tensor)
}

/// The runtime's name of a type of which every bit pattern is an element.
fn element_type(element: Element) -> Option<TensorElementType> {
    Some(match element {
        Element::F32 => TensorElementType::Float32,
        Element::F16 => TensorElementType::Float16,
        Element::Bf16 => TensorElementType::Bfloat16,
        Element::F64 => TensorElementType::Float64,
        Element::U8 => TensorElementType::Uint8,
        Element::I8 => TensorElementType::Int8,
        Element::U16 => TensorElementType::Uint16,
        Element::I16 => TensorElementType::Int16,
        Element::U32 => TensorElementType::Uint32,
        Element::I32 => TensorElementType::Int32,
        Element::U64 => TensorElementType::Uint64,
        Element::I64 => TensorElementType::Int64,
        _ => return None,
    })
}
