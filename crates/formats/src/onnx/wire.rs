//! The protobuf wire format: a cursor over the fields of a message, in place.
//!
//! A message here is a slice of the mapped file. Nothing is copied and nothing is allocated, so a length that a file claims
//! costs nothing; it only has to lie within the message around it.

use ternion_core::{Error, Result};

/// Messages within messages that are followed. A graph within a graph is three deeper; protobuf's own parsers stop at 100.
const MAX_DEPTH: u32 = 100;

/// A message, read field by field.
#[derive(Clone, Copy)]
pub(super) struct Message<'a> {
    bytes: &'a [u8],
    /// Where `bytes` begins in the file, for errors.
    offset: usize,
    depth: u32,
}

/// The value of a field.
#[derive(Clone, Copy)]
pub(super) enum Value<'a> {
    /// An integer of variable length.
    Integer(u64),
    /// Four bytes, of a float or an integer.
    Fixed32(u32),
    /// Eight bytes.
    Fixed64,
    /// A string, bytes, a packed list or a message.
    Bytes(Message<'a>),
}

impl<'a> Message<'a> {
    /// The whole of a file.
    pub(super) fn whole(bytes: &'a [u8]) -> Self {
        Self { bytes, offset: 0, depth: 0 }
    }

    /// The number and the value of the next field; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<(u32, Value<'a>)>> {
        if self.bytes.is_empty() {
            return Ok(None);
        }
        let at = self.offset;
        let key = self.integer()?;
        let number = u32::try_from(key >> 3).unwrap_or(0);
        if number == 0 {
            return Err(damaged(at, "a field has the number 0 or one beyond 32 bits"));
        }
        let value = match key & 7 {
            0 => Value::Integer(self.integer()?),
            1 => {
                self.take(8)?;
                Value::Fixed64
            }
            2 => {
                let length = self.integer()?;
                let offset = self.offset;
                let bytes = self.take(length)?;
                Value::Bytes(Message { bytes, offset, depth: self.depth + 1 })
            }
            5 => Value::Fixed32(self.take(4)?.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes))),
            kind => {
                return Err(damaged(at, &format!("a field has the wire type {kind}, expected 0, 1, 2 or 5")));
            }
        };
        Ok(Some((number, value)))
    }

    /// The next integer of a packed list; `None` at the end.
    pub(super) fn next_integer(&mut self) -> Result<Option<u64>> {
        if self.bytes.is_empty() { Ok(None) } else { self.integer().map(Some) }
    }

    /// How many integers a packed list holds.
    pub(super) fn count_integers(&self) -> u64 {
        self.bytes.iter().filter(|byte| **byte < 0x80).count() as u64
    }

    /// The next float of a packed list; `None` at the end, or where less than a float is left.
    pub(super) fn next_float(&mut self) -> Option<f32> {
        self.take(4).ok()?.first_chunk().map(|bytes| f32::from_le_bytes(*bytes))
    }

    /// Where the message begins in the file.
    pub(super) fn offset(&self) -> usize {
        self.offset
    }

    /// Bytes of the message.
    pub(super) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The same as a message to be read, unless it lies too deep.
    pub(super) fn enter(self) -> Result<Self> {
        if self.depth > MAX_DEPTH {
            return Err(damaged(self.offset, &format!("messages are nested more than {MAX_DEPTH} deep")));
        }
        Ok(self)
    }

    /// The same as text.
    pub(super) fn text(&self) -> Result<&'a str> {
        std::str::from_utf8(self.bytes).map_err(|_| damaged(self.offset, "a text is not UTF-8"))
    }

    fn integer(&mut self) -> Result<u64> {
        let at = self.offset;
        let mut value = 0u64;
        for (i, &byte) in self.bytes.iter().take(10).enumerate() {
            value |= u64::from(byte & 0x7f).checked_shl(7 * i as u32).unwrap_or(0);
            if byte < 0x80 {
                self.take(i as u64 + 1)?;
                return Ok(value);
            }
        }
        let problem = if self.bytes.len() < 10 {
            "the message ends within a number"
        } else {
            "a number has more than 10 bytes"
        };
        Err(damaged(at, problem))
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8]> {
        let split = usize::try_from(length).ok().and_then(|length| self.bytes.split_at_checked(length));
        let Some((taken, rest)) = split else {
            let left = self.bytes.len();
            return Err(damaged(
                self.offset,
                &format!("a field of {length} bytes in a message that has {left} left"),
            ));
        };
        self.bytes = rest;
        self.offset += taken.len();
        Ok(taken)
    }
}

fn damaged(at: usize, problem: &str) -> Error {
    Error::invalid_model(format!("is no ONNX model or is truncated: at byte {at}, {problem}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_in_order() {
        // 1: 300; 2: "hi"; 3: 1.5f; 4: 8 bytes.
        let bytes = [8, 0xac, 2, 18, 2, b'h', b'i', 29, 0, 0, 0xc0, 0x3f, 33, 0, 0, 0, 0, 0, 0, 0, 0];
        let mut message = Message::whole(&bytes);
        assert!(matches!(message.next().unwrap(), Some((1, Value::Integer(300)))));
        let Some((2, Value::Bytes(text))) = message.next().unwrap() else { panic!() };
        assert_eq!(text.text().unwrap(), "hi");
        assert!(matches!(message.next().unwrap(), Some((3, Value::Fixed32(0x3fc0_0000)))));
        assert!(matches!(message.next().unwrap(), Some((4, Value::Fixed64))));
        assert!(message.next().unwrap().is_none());
    }

    #[test]
    fn whatever_is_cut_or_wrong_is_an_error() {
        for (bytes, words) in [
            (&[0x08][..], "ends within a number"),
            (&[0x12, 5, 1][..], "a field of 5 bytes in a message that has 1 left"),
            (&[0x0d, 0, 0][..], "a field of 4 bytes"),
            (&[0x0b][..], "the wire type 3"),
            (&[0x00][..], "the number 0"),
            (&[0x08, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1][..], "more than 10 bytes"),
            (&[0x12, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1][..], "left"),
        ] {
            let error = Message::whole(bytes).next().err().unwrap().to_string();
            assert!(error.contains(words), "{bytes:?}: {error}");
        }
    }

    #[test]
    fn depth_is_bounded() {
        // Field 1 of field 1 of field 1 ...: each level adds a key and a length.
        let mut bytes = Vec::new();
        for _ in 0..150 {
            let mut outer = vec![0x0a];
            let mut length = bytes.len();
            while length >= 0x80 {
                outer.push(length as u8 | 0x80);
                length >>= 7;
            }
            outer.push(length as u8);
            outer.extend(&bytes);
            bytes = outer;
        }
        let mut message = Message::whole(&bytes);
        let error = loop {
            match message.next().unwrap() {
                Some((1, Value::Bytes(inner))) => match inner.enter() {
                    Ok(inner) => message = inner,
                    Err(error) => break error,
                },
                _ => panic!("the end was reached"),
            }
        };
        assert!(error.to_string().contains("nested more than 100 deep"), "{error}");
    }
}
