//! Weights for candle's models from our checked readers: nothing that candle parses itself, and no tensor left over that a
//! model would silently ignore.

use std::{
    collections::BTreeSet,
    io::{self, Read, Seek, SeekFrom},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use ternion_core::{
    Error, Result,
    registry::{LoadProgress, Progress},
};
use ternion_formats::gguf::{File, TensorInfo};

/// The shape and the values of a tensor; `None` where there is none of this name.
type Lookup<'a> = dyn Fn(&str) -> Result<Option<(Vec<usize>, Vec<f32>)>> + Send + Sync + 'a;

/// Named tensors of floats, each of which has to be taken.
pub(super) struct Weights<'a> {
    lookup: Box<Lookup<'a>>,
    left: Mutex<BTreeSet<String>>,
    /// What went wrong: candle's errors would hide it.
    failure: Mutex<Option<Error>>,
    progress: &'a Progress,
    done: AtomicU64,
    total: u64,
}

impl<'a> Weights<'a> {
    /// The tensors called `names`, of `total` elements together.
    pub(super) fn new(
        names: impl IntoIterator<Item = String>,
        total: u64,
        progress: &'a Progress,
        lookup: impl Fn(&str) -> Result<Option<(Vec<usize>, Vec<f32>)>> + Send + Sync + 'a,
    ) -> Self {
        Self {
            lookup: Box::new(lookup),
            left: Mutex::new(names.into_iter().collect()),
            failure: Mutex::new(None),
            progress,
            done: AtomicU64::new(0),
            total,
        }
    }

    /// What `build` makes of these tensors.
    ///
    /// # Errors
    /// Where a tensor is missing, has another shape or values that are not finite, or is not used.
    pub(super) fn build<M>(&self, build: impl FnOnce(VarBuilder<'_>) -> candle_core::Result<M>) -> Result<M> {
        let builder = VarBuilder::from_backend(Box::new(Taken(self)), DType::F32, Device::Cpu);
        let model = build(builder);
        if let Some(error) = lock(&self.failure).take() {
            return Err(error);
        }
        let model =
            model.map_err(|e| Error::invalid_model("candle cannot build the model").with_source(e))?;
        match lock(&self.left).first() {
            None => Ok(model),
            Some(name) => {
                Err(Error::unsupported("the tensor has no place in the model").with("tensor", name))
            }
        }
    }

    fn take(&self, name: &str, expected: Option<&Shape>) -> Result<Tensor> {
        let (shape, values) = (self.lookup)(name)?
            .ok_or_else(|| Error::invalid_model("the tensor is missing").with("tensor", name))?;
        if let Some(expected) = expected.filter(|expected| expected.dims() != shape) {
            let message = format!("the shape is {shape:?}, expected {:?}", expected.dims());
            return Err(Error::invalid_model(message).with("tensor", name));
        }
        if values.iter().any(|x| !x.is_finite()) {
            let message = "a value is infinite or not a number, expected finite numbers";
            return Err(Error::invalid_model(message).with("tensor", name));
        }
        lock(&self.left).remove(name);
        let count = values.len() as u64;
        let done = self.done.fetch_add(count, Ordering::Relaxed) + count;
        self.progress.report(LoadProgress::new("weights", done.min(self.total), self.total));
        Tensor::from_vec(values, shape, &Device::Cpu).map_err(|e| {
            Error::invalid_model("candle cannot hold the tensor").with("tensor", name).with_source(e)
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The tensors as candle takes them.
struct Taken<'a, 'b>(&'a Weights<'b>);

impl Taken<'_, '_> {
    fn get(&self, name: &str, shape: Option<&Shape>) -> candle_core::Result<Tensor> {
        self.0.take(name, shape).map_err(|error| {
            let message = error.to_string();
            lock(&self.0.failure).get_or_insert(error);
            candle_core::Error::Msg(message)
        })
    }
}

impl SimpleBackend for Taken<'_, '_> {
    fn get(&self, s: Shape, name: &str, _: Init, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        Taken::get(self, name, Some(&s))
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        Taken::get(self, name, None)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        lock(&self.0.left).contains(name)
    }
}

/// The tensors of a GGUF file, of all its parts, one behind the other.
pub(super) struct TensorReader {
    file: File,
    /// Where each tensor begins here, in the file's order.
    begins: Vec<u64>,
    length: u64,
    position: u64,
}

impl TensorReader {
    pub(super) fn new(file: File) -> Self {
        let mut length = 0;
        let begin = |tensor: &TensorInfo| {
            let begin = length;
            length += tensor.bytes;
            begin
        };
        let begins = file.tensors().iter().map(begin).collect();
        Self { file, begins, length, position: 0 }
    }

    /// Each tensor with the place where it begins.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (&TensorInfo, u64)> {
        self.file.tensors().iter().zip(self.begins.iter().copied())
    }
}

impl Read for TensorReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        // The last tensor that begins here or before; empty ones do not occur.
        let index = self.begins.partition_point(|begin| *begin <= self.position);
        let Some(index) = index.checked_sub(1) else { return Ok(0) };
        let tensor = &self.file.tensors()[index];
        let from = self.position - self.begins[index];
        let count = (tensor.bytes - from.min(tensor.bytes)).min(out.len() as u64) as usize;
        self.file.read(tensor, from, &mut out[..count]).map_err(io::Error::other)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for TensorReader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(offset) => self.length.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}
