//! Writing a container: the metadata and the table first, then the data of one tensor after the other.

use std::io::{self, Write};

use ternion_core::{Error, Result};

use super::file::{DEFAULT_ALIGNMENT, MAX_DIMS, MAX_NAME, TensorInfo};
use super::types::TensorType;
use super::value::{Value, encode_string};

/// What a file will consist of. Version 3, little-endian, alignment 32.
#[derive(Debug, Default)]
pub struct Writer {
    metadata: Vec<(String, Value)>,
    tensors: Vec<TensorInfo>,
    end: u64,
}

impl Writer {
    /// A file without anything.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a pair of metadata, or replaces the value of the key.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        let (key, value) = (key.into(), value.into());
        match self.metadata.iter_mut().find(|(known, _)| *known == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key, value)),
        }
    }

    /// Adds a tensor with these dimensions, innermost first. The data follows in the same order.
    ///
    /// # Errors
    /// [`InvalidRequest`](ternion_core::ErrorKind::InvalidRequest) for a name that is empty, too long or taken;
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) for dimensions that the type cannot have.
    pub fn tensor(&mut self, name: impl Into<String>, kind: TensorType, dims: &[u64]) -> Result<()> {
        let name = name.into();
        let wrong = |what: String| Err(Error::invalid_request(what).with("tensor", &name));
        if name.is_empty() || name.len() > MAX_NAME {
            return wrong(format!("the name has {} bytes, expected 1 to {MAX_NAME}", name.len()));
        }
        if self.tensors.iter().any(|t| t.name == name) {
            return wrong("the tensor occurs twice".to_owned());
        }
        if dims.is_empty() || dims.len() > MAX_DIMS as usize || dims.contains(&0) {
            return wrong(format!("the dimensions are {dims:?}, expected 1 to {MAX_DIMS}, none of them 0"));
        }
        let bytes = kind.bytes(dims).map_err(|e| e.with("tensor", &name))?;
        // I2_S is read in several layouts and written in the one with the larger groups.
        let (row, block) = (dims[0], kind.block_len() as u64);
        if !row.is_multiple_of(block) {
            let message = format!("a row has {row} elements, expected a multiple of {block} for {kind}");
            return Err(Error::invalid_model(message).with("tensor", &name));
        }
        let offset = self.end;
        self.end = offset
            .checked_add(bytes)
            .and_then(|end| end.checked_next_multiple_of(DEFAULT_ALIGNMENT))
            .ok_or_else(|| Error::invalid_request("the tensors are too large together"))?;
        self.tensors.push(TensorInfo { name, kind, dims: dims.to_vec(), offset, bytes, part: 0 });
        Ok(())
    }

    /// Bytes of all tensors with their padding.
    pub fn data_bytes(&self) -> u64 {
        self.end
    }

    /// Writes all that stands before the data.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn begin<W: Write>(self, mut out: W) -> io::Result<DataWriter<W>> {
        let mut head = Vec::new();
        head.extend(b"GGUF");
        head.extend(3u32.to_le_bytes());
        head.extend((self.tensors.len() as u64).to_le_bytes());
        head.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            encode_string(key, &mut head);
            head.extend((value.kind() as u32).to_le_bytes());
            value.encode(&mut head);
        }
        for tensor in &self.tensors {
            encode_string(&tensor.name, &mut head);
            head.extend((tensor.dims.len() as u32).to_le_bytes());
            for n in &tensor.dims {
                head.extend(n.to_le_bytes());
            }
            head.extend(tensor.kind.id().to_le_bytes());
            head.extend(tensor.offset.to_le_bytes());
        }
        head.resize(head.len().next_multiple_of(DEFAULT_ALIGNMENT as usize), 0);
        out.write_all(&head)?;
        Ok(DataWriter { out, tensors: self.tensors.into_iter() })
    }
}

/// Takes the data of the tensors in their order.
#[derive(Debug)]
pub struct DataWriter<W> {
    out: W,
    tensors: std::vec::IntoIter<TensorInfo>,
}

impl<W: Write> DataWriter<W> {
    /// Writes the data of the next tensor, which must be the one of this name: `fill` writes as many bytes as it has.
    ///
    /// # Errors
    /// Those of `out`; [`InvalidInput`](io::ErrorKind::InvalidInput) where it is another tensor's turn or `fill` writes
    /// another number of bytes.
    pub fn tensor(
        &mut self,
        name: &str,
        fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> io::Result<()> {
        let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
        let tensor =
            self.tensors.next().ok_or_else(|| wrong(format!("`{name}`: all tensors are written")))?;
        if tensor.name != name {
            return Err(wrong(format!("`{name}`: `{}` expected", tensor.name)));
        }
        let mut counted = Counted { out: &mut self.out, count: 0 };
        fill(&mut counted)?;
        let count = counted.count;
        if count != tensor.bytes {
            return Err(wrong(format!("`{name}`: {count} bytes, {} expected", tensor.bytes)));
        }
        let padding = tensor.bytes.next_multiple_of(DEFAULT_ALIGNMENT) - tensor.bytes;
        self.out.write_all(&[0; DEFAULT_ALIGNMENT as usize][..padding as usize])
    }

    /// Ends the file.
    ///
    /// # Errors
    /// Those of `out`; [`InvalidInput`](io::ErrorKind::InvalidInput) where a tensor has no data yet.
    pub fn finish(mut self) -> io::Result<W> {
        if let Some(tensor) = self.tensors.next() {
            let what = format!("`{}`: no data was written", tensor.name);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        self.out.flush()?;
        Ok(self.out)
    }
}

struct Counted<'a, W> {
    out: &'a mut W,
    count: u64,
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.out.write(bytes)?;
        self.count += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
