//! Where the data of tensors lies, and which types they have.
//!
//! Each tensor begins where the one before ends, padded to the alignment; that is what ggml demands, too. So where the
//! types of llama.cpp do not explain the offsets, the types of other programs are tried that have the same ids.

use std::collections::BTreeMap;

use ternion_core::{Error, Result};

use super::file::TensorInfo;
use super::foreign::{Foreign, Size};
use super::types::TensorType;

/// A line of the table of tensors.
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dims: Vec<u64>,
    pub(super) id: u32,
    pub(super) offset: u64,
}

/// Tells the types of all tensors and checks that they fill the `available` bytes of data in their order, without gap or
/// overlap. Also returns where the last one ends.
pub(super) fn place(entries: Vec<Entry>, available: u64, alignment: u64) -> Result<(Vec<TensorInfo>, u64)> {
    let kinds = match strict(&entries, available, alignment) {
        Ok(kinds) => kinds,
        Err(error) => foreign(&entries, available, alignment)?.ok_or(error)?,
    };
    let mut end = 0;
    let place = |(entry, (kind, bytes)): (Entry, (TensorType, u64))| {
        end = entry.offset + bytes;
        TensorInfo { name: entry.name, kind, dims: entry.dims, offset: entry.offset, bytes, part: 0 }
    };
    let tensors = entries.into_iter().zip(kinds).map(place).collect();
    Ok((tensors, end))
}

/// The types and sizes that llama.cpp and bitnet.cpp (I2_S) give the ids.
fn strict(entries: &[Entry], available: u64, alignment: u64) -> Result<Vec<(TensorType, u64)>> {
    let mut kinds = Vec::with_capacity(entries.len());
    let mut expected = 0u64;
    for entry in entries {
        let wrong = |message: String| Err(Error::invalid_model(message).with("tensor", &entry.name));
        let kind = TensorType::from_id(entry.id).unwrap_or(TensorType::Foreign(Foreign::unknown(entry.id)));
        let bytes = kind.bytes(&entry.dims).map_err(|e| e.with("tensor", &entry.name))?;
        let offset = entry.offset;
        if offset % alignment != 0 {
            return wrong(format!(
                "the offset is {offset}, expected a multiple of the alignment {alignment}"
            ));
        }
        if offset != expected {
            let what = if offset > expected { "a gap" } else { "an overlap" };
            return wrong(format!(
                "the offset is {offset}: {what}, expected {expected}, where the tensor before ends"
            ));
        }
        let Some(end) = offset.checked_add(bytes).filter(|end| *end <= available) else {
            return Err(incomplete(entry, bytes, available));
        };
        expected = end.next_multiple_of(alignment);
        kinds.push((kind, bytes));
    }
    if available > expected {
        return Err(Error::invalid_model(format!(
            "the tensors end at {expected}, but the file has {available} bytes of data"
        )));
    }
    Ok(kinds)
}

fn incomplete(entry: &Entry, bytes: u64, available: u64) -> Error {
    let offset = entry.offset;
    Error::invalid_model(format!(
        "the tensor has {bytes} bytes at offset {offset}, but the file has {available} bytes of data; expected a complete \
         file"
    ))
    .with("tensor", &entry.name)
}

/// The types and sizes that other programs may give the ids; `None` where they do not explain the offsets either.
fn foreign(entries: &[Entry], available: u64, alignment: u64) -> Result<Option<Vec<(TensorType, u64)>>> {
    let Some(rooms) = rooms(entries, available, alignment) else { return Ok(None) };
    let last = entries.len() - 1;
    let mut by_id: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (index, entry) in entries.iter().enumerate() {
        by_id.entry(entry.id).or_default().push(index);
    }
    let mut found = vec![None; entries.len()];
    for (id, members) in by_id {
        let known = TensorType::from_id(id).filter(|kind| {
            members.iter().all(|&i| {
                let bytes = kind.bytes(&entries[i].dims);
                bytes.is_ok_and(|bytes| i == last || bytes <= rooms[i] && rooms[i] - bytes < alignment)
            })
        });
        let kind = known.or_else(|| foreign_type(id, entries, &rooms, &members, alignment));
        // Without a type for an id of llama.cpp, the file is damaged.
        let Some(kind) = kind else { return Ok(None) };
        for &i in &members {
            let bytes = kind.bytes(&entries[i].dims).unwrap_or(rooms[i]);
            if bytes > rooms[i] {
                return Err(incomplete(&entries[i], bytes, available));
            }
            if rooms[i] - bytes >= alignment {
                return Ok(None);
            }
            found[i] = Some((kind, bytes));
        }
    }
    Ok(found.into_iter().collect())
}

/// The bytes from each tensor's begin to the next one's, which its type has to explain. `None` where the offsets are no
/// ascending multiples of the alignment that begin with 0.
fn rooms(entries: &[Entry], available: u64, alignment: u64) -> Option<Vec<u64>> {
    if entries.first()?.offset != 0 {
        return None;
    }
    let ends = entries.iter().skip(1).map(|next| next.offset).chain([available]);
    let room =
        |(entry, end): (&Entry, u64)| end.checked_sub(entry.offset).filter(|_| entry.offset % alignment == 0);
    entries.iter().zip(ends).map(room).collect()
}

/// The type of another program that explains the sizes of all `members`, which share an id.
fn foreign_type(
    id: u32,
    entries: &[Entry],
    rooms: &[u64],
    members: &[usize],
    alignment: u64,
) -> Option<TensorType> {
    // The file's last tensor may be incomplete, so it decides only where there is no other.
    let last = entries.len() - 1;
    let decide = || members.iter().filter(|&&i| i != last || members.len() == 1);
    let fits = |size: Size| decide().all(|&i| size.fits(&entries[i].dims, rooms[i], alignment));
    if id == TensorType::Q2_0G128.id() && fits(Size::Blocks(128, 34)) {
        return Some(TensorType::Q2_0G128);
    }
    match Foreign::candidates(id).find(|(_, size)| fits(*size)) {
        Some((foreign, _)) => Some(TensorType::Foreign(foreign)),
        None if TensorType::from_id(id).is_none() => Some(TensorType::Foreign(Foreign::unknown(id))),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of an embedding in F32, two matrices of the type `id` of these dimensions and sizes, and a norm.
    fn types(id: u32, dims: [u64; 2], bytes: u64) -> Result<Vec<TensorType>> {
        let sizes =
            [(0, vec![64, 2], 512), (id, dims.to_vec(), bytes), (id, dims.to_vec(), bytes), (0, vec![8], 32)];
        let mut offset = 0u64;
        let entries = sizes.into_iter().enumerate().map(|(i, (id, dims, bytes))| {
            let entry = Entry { name: format!("t{i}"), dims, id, offset };
            offset += u64::next_multiple_of(bytes, 32);
            entry
        });
        let entries = entries.collect();
        place(entries, offset, 32).map(|(tensors, _)| tensors.into_iter().map(|t| t.kind).collect())
    }

    #[test]
    fn forks_are_told_by_id_and_size() {
        let elements = 256 * 128;
        for (id, bytes, name) in [
            (38, elements / 4 + 32, "TL1 of bitnet.cpp"),
            (38, elements / 32 * 18, "IQ4_NL_8_8 of llama.cpp before 2025"),
            // 252 of 256 columns in threes of 5 bits, the others in twos of 4 bits.
            (39, (252 / 3 * 5 + 4 * 2) * 128 / 8 + 32, "TL2 of bitnet.cpp"),
            (39, elements / 32 * 17, "MXFP4"),
            (42, elements / 64 * 18, "Q2_0"),
            (42, elements / 128 * 34, "Q2_0 (groups of 128)"),
            (42, elements / 256 * 42, "STQ1_0 of Tencent's fork of llama.cpp (AngelSlim)"),
            (43, elements / 256 * 42, "STQ1_0 of Tencent's fork of llama.cpp (AngelSlim)"),
            (36, elements / 4 + 32, "I2_S"),
            (36, elements / 32 * 18, "IQ4_NL_4_4 of llama.cpp before 2025"),
            (35, elements / 256 * 66, "TQ2_0"),
            (35, elements / 64 * 16, "IQ2_BN of ik_llama.cpp"),
            (142, elements / 128 * 34, "PQ2_0"),
            (143, elements / 128 * 28, "PTQ1_0"),
            (135, elements / 4 + 4 * 128, "IQ2_BN of ik_llama.cpp"),
            (31, elements / 32 * 18, "Q4_0_4_4 of llama.cpp before 2025"),
            (77, 999, "unknown type 77"),
        ] {
            let kinds = types(id, [256, 128], bytes).unwrap();
            assert_eq!(kinds[1].to_string(), name);
            assert_eq!((kinds[0], kinds[2], kinds[3]), (TensorType::F32, kinds[1], TensorType::F32));
        }
    }

    #[test]
    fn sizes_that_no_type_explains_are_damage() {
        let (overlap, gap, cut) = ("an overlap", "a gap", "expected a complete file");
        for (id, bytes, expected) in [
            (8, 20_000, overlap),
            (39, 256 * 128, gap),
            (42, 8_000, overlap),
            (0, 100_000, overlap),
            // The whole file is shorter than one of these tensors.
            (8, 5000, cut),
            (42, 999, cut),
            (0, 64, cut),
        ] {
            let error = types(id, [256, 128], bytes).unwrap_err();
            assert_eq!(error.kind(), ternion_core::ErrorKind::InvalidModel);
            assert!(error.to_string().contains(expected), "{id}: {error}");
        }
    }

    #[test]
    fn a_cut_file_of_a_fork_is_incomplete() {
        let entry = |name: &str, id, offset| Entry { name: name.into(), dims: vec![256, 128], id, offset };
        let size = 256 * 128 / 128 * 34;
        let entries = || vec![entry("a", 42, 0), entry("b", 42, size), entry("c", 0, 2 * size)];
        let error = place(entries(), 2 * size + 256 * 128 * 4 - 32, 32).unwrap_err().to_string();
        assert!(error.contains("complete file") && error.contains("tensor: c"), "{error}");
        let mut short = entries();
        short.pop();
        let error = place(short, 2 * size - 64, 32).unwrap_err().to_string();
        assert!(error.contains("complete file") && error.contains("tensor: b"), "{error}");
    }
}
