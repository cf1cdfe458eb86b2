//! The directory of a file: everything but the tensors' data, checked once.
//!
//! Layout: magic, version, tensor count, key count; the keys (name, type, value); the tensors (name, dimensions, type,
//! offset); padding to the alignment; the data, each tensor's offset a multiple of the alignment.

use crate::error::thing;
use crate::types::product;
use crate::value::{Cursor, Read};
use crate::{Array, Error, Fault, MAX_ALIGNMENT, TensorInfo, TensorType, Value, ValueType};
use std::collections::HashMap;
use std::ops::Range;

/// Most keys, and most tensors, of a file: it bounds the directory's memory whatever the file says.
pub(crate) const MAX_ENTRIES: u64 = 65_536;

/// Least bytes of a key (empty name, type, one byte) and of a tensor (empty name, one dimension).
const MIN_KEY: u64 = 8 + 4 + 1;
const MIN_TENSOR: u64 = 8 + 4 + 8 + 4 + 8;

/// Most dimensions of a tensor, and most elements: with at most 8 bytes each, all tensors of a file fit in 64 bits.
const MAX_DIMS: u32 = 4;
const MAX_ELEMENTS: u64 = 1 << 44;

/// The key that sets the alignment of the data section.
pub(crate) const ALIGNMENT_KEY: &str = "general.alignment";
pub(crate) const DEFAULT_ALIGNMENT: u64 = 32;

pub(crate) struct Directory {
    pub(crate) version: u32,
    pub(crate) alignment: u64,
    pub(crate) data_offset: u64,
    pub(crate) entries: Vec<Entry>,
    entries_by_key: HashMap<String, usize>,
    pub(crate) tensors: Vec<TensorInfo>,
    tensors_by_name: HashMap<String, usize>,
}

/// A key, and where its value is.
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) offset: u64,
    ty: ValueType,
    /// Kept, for finding an array's end costs a walk over its elements.
    array: Option<(ValueType, usize, Range<usize>)>,
}

impl Entry {
    /// None only if the bytes are no longer those that were parsed: a mapped file that was changed.
    pub(crate) fn value<'a>(&self, bytes: &'a [u8]) -> Option<Value<'a>> {
        match &self.array {
            Some((element, len, range)) => {
                Some(Value::Array(Array::new(*element, *len, bytes.get(range.clone())?)))
            }
            None => Cursor::new(bytes, self.offset as usize).value(self.ty, 0).ok(),
        }
    }
}

impl Directory {
    pub(crate) fn entry(&self, key: &str) -> Option<&Entry> {
        Some(&self.entries[*self.entries_by_key.get(key)?])
    }

    pub(crate) fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        Some(&self.tensors[*self.tensors_by_name.get(name)?])
    }

    pub(crate) fn parse(file: &str, bytes: &[u8]) -> Result<Self, Error> {
        let malformed = |what: String, fault| Error::malformed(file, what, fault);
        let mut cursor = Cursor::new(bytes, 0);
        let (version, n_tensors, n_keys) = header(&mut cursor).map_err(|f| malformed("header".into(), f))?;

        let (entries, entries_by_key, _) = named(file, &mut cursor, "key", n_keys, entry)?;
        let (tensors, tensors_by_name, starts) = named(file, &mut cursor, "tensor", n_tensors, tensor)?;
        let mut directory =
            Self { version, alignment: 0, data_offset: 0, entries, entries_by_key, tensors, tensors_by_name };
        directory.alignment =
            directory.find_alignment(bytes).map_err(|f| malformed(thing("key", ALIGNMENT_KEY), f))?;
        directory.data_offset = cursor.pos().next_multiple_of(directory.alignment);
        directory
            .place(bytes.len() as u64, &starts)
            .map_err(|(i, f)| malformed(thing("tensor", &directory.tensors[i].name), (starts[i], f)))?;
        Ok(directory)
    }

    fn find_alignment(&self, bytes: &[u8]) -> Read<u64> {
        let Some(entry) = self.entry(ALIGNMENT_KEY) else { return Ok(DEFAULT_ALIGNMENT) };
        entry.value(bytes).and_then(alignment).ok_or_else(|| {
            let found = entry.value(bytes).map_or_else(String::new, |v| match v.as_int() {
                Some(int) => int.to_string(),
                None => v.ty().to_string(),
            });
            (entry.offset, Fault::Alignment { found })
        })
    }

    /// Turns the offsets from relative to absolute and checks that every tensor has bytes of its own in the file.
    /// An error comes with the tensor's index.
    fn place(&mut self, file_len: u64, starts: &[u64]) -> Result<(), (usize, Fault)> {
        for (i, t) in self.tensors.iter_mut().enumerate() {
            if t.offset % self.alignment != 0 {
                return Err((i, Fault::Misaligned { found: t.offset, alignment: self.alignment }));
            }
            let start = self.data_offset.saturating_add(t.offset);
            let end = start.saturating_add(t.byte_len);
            // Without a size of its own a tensor has at least one byte.
            if end > file_len || start == file_len {
                return Err((
                    i,
                    Fault::Truncated { start, end: end.max(start.saturating_add(1)), len: file_len },
                ));
            }
            t.offset = start;
        }
        let mut order: Vec<usize> = (0..self.tensors.len()).collect();
        order.sort_unstable_by_key(|&i| (self.tensors[i].offset, starts[i]));
        for (n, &i) in order.iter().enumerate() {
            let next = order.get(n + 1).copied();
            let limit = next.map_or(file_len, |next| self.tensors[next].offset);
            let t = &mut self.tensors[i];
            if !t.ty.size_is_known() {
                t.byte_len = limit - t.offset;
            }
            let end = t.offset + t.byte_len.max(1);
            if let Some(next) = next.filter(|_| end > limit) {
                let other = thing("tensor", &t.name);
                return Err((
                    next,
                    Fault::Overlap { start: limit, other, other_start: t.offset, other_end: end },
                ));
            }
        }
        Ok(())
    }
}

/// The alignment that a value of `general.alignment` stands for, if it is an acceptable one.
pub(crate) fn alignment(value: Value<'_>) -> Option<u64> {
    let n = u64::try_from(value.as_int()?).ok()?;
    (n.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(&n)).then_some(n)
}

/// Version, number of tensors, number of keys.
fn header(cursor: &mut Cursor<'_>) -> Read<(u32, u64, u64)> {
    let magic = cursor.array()?;
    if magic != *b"GGUF" {
        return Err((0, Fault::Magic { found: magic }));
    }
    let start = cursor.pos();
    let version = cursor.u32()?;
    match (version, version.swap_bytes()) {
        (2 | 3, _) => {}
        (_, version @ 1..=3) => return Err((start, Fault::BigEndian { version })),
        (found, _) => return Err((start, Fault::Version { found })),
    }
    let n_tensors = count(cursor, "tensors", MIN_TENSOR, 8)?;
    let n_keys = count(cursor, "keys", MIN_KEY, 0)?;
    Ok((version, n_tensors, n_keys))
}

fn count(cursor: &mut Cursor<'_>, what: &'static str, each: u64, skip: u64) -> Read<u64> {
    let start = cursor.pos();
    let found = cursor.count(each, skip)?;
    if found > MAX_ENTRIES {
        return Err((start, Fault::Limit { what, found, limit: MAX_ENTRIES }));
    }
    Ok(found)
}

/// So many keys or tensors in order, their indices by name, and where each begins.
fn named<T>(
    file: &str,
    cursor: &mut Cursor<'_>,
    kind: &str,
    count: u64,
    read: impl Fn(&mut Cursor<'_>, &str) -> Read<T>,
) -> Result<(Vec<T>, HashMap<String, usize>, Vec<u64>), Error> {
    let (mut items, mut by_name, mut starts) = (Vec::new(), HashMap::new(), Vec::new());
    for i in 0..count as usize {
        let start = cursor.pos();
        starts.push(start);
        let name = cursor.name().map_err(|f| Error::malformed(file, format!("name of {kind} {i}"), f))?;
        let item = match by_name.insert(name.to_owned(), i) {
            Some(first) => Err((start, Fault::Duplicate { first: starts[first] })),
            None => read(cursor, name),
        };
        items.push(item.map_err(|f| Error::malformed(file, thing(kind, name), f))?);
    }
    Ok((items, by_name, starts))
}

/// What follows the name of a key.
fn entry(cursor: &mut Cursor<'_>, key: &str) -> Read<Entry> {
    let ty = cursor.value_type()?;
    let offset = cursor.pos();
    let array = cursor.value(ty, 0)?.as_array().map(|array| {
        let end = cursor.pos() as usize;
        (array.element_type(), array.len(), end - array.byte_len()..end)
    });
    Ok(Entry { key: key.to_owned(), offset, ty, array })
}

/// What follows the name of a tensor. The offset is still relative to the data section; an unknown size is zero.
fn tensor(cursor: &mut Cursor<'_>, name: &str) -> Read<TensorInfo> {
    let start = cursor.pos();
    let n_dims = cursor.u32()?;
    if n_dims > MAX_DIMS {
        let fault = Fault::Limit { what: "dimensions", found: n_dims.into(), limit: MAX_DIMS.into() };
        return Err((start, fault));
    }
    let dims = (0..n_dims).map(|_| cursor.u64()).collect::<Read<Vec<u64>>>()?;
    let type_start = cursor.pos();
    let id = cursor.u32()?;
    let ty = TensorType::from_id(id).ok_or((type_start, Fault::TensorType { id }))?;
    let byte_len = data_len(ty, &dims).map_err(|fault| (start, fault))?;
    Ok(TensorInfo { name: name.to_owned(), dims, ty, offset: cursor.u64()?, byte_len })
}

/// Size of a tensor's data in bytes, zero if the type does not tell; a fault if no tensor can have these dimensions.
pub(crate) fn data_len(ty: TensorType, dims: &[u64]) -> Result<u64, Fault> {
    let shape = |problem| Fault::Shape { dims: dims.to_owned(), ty, problem };
    if dims.is_empty() || dims.len() > MAX_DIMS as usize {
        return Err(shape("expected 1 to 4 of them"));
    }
    if dims.contains(&0) {
        return Err(shape("expected none to be zero"));
    }
    // So many have a size below 64 bits: without one, their blocks are incomplete.
    if product(dims).is_none_or(|n| n > MAX_ELEMENTS) {
        return Err(shape("expected at most 2^44 elements"));
    }
    match ty.byte_len(dims) {
        Some(len) => Ok(len),
        None if !ty.size_is_known() => Ok(0),
        None => Err(shape("expected whole blocks of elements")),
    }
}
