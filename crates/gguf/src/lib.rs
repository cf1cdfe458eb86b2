//! GGUF files: from bytes to a typed, validated directory over a memory map, and back.
//!
//! [`Gguf`] reads versions 2 and 3, little-endian. The file is not trusted: each count and length is checked against
//! the bytes that are there before it sizes anything, and after a successful parse every tensor lies in the file,
//! aligned and apart from the others. The data itself is not looked at; its pages are read when they are used.
//! [`Writer`] makes such files, on disk all or nothing. Neither knows anything about models.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

#![deny(unsafe_code)]

#[cfg(not(all(target_endian = "little", target_pointer_width = "64")))]
compile_error!(
    "BitNet-Rust needs a little-endian 64-bit target: GGUF files are little-endian and may be larger than 4 GiB"
);

mod error;
#[allow(unsafe_code)]
mod map;
mod parse;
mod types;
mod value;
mod write;

pub use error::{Error, Fault};
pub use types::{TensorInfo, TensorType};
pub use value::{Array, Value, ValueType};
pub use write::{AtomicFile, TensorWriter, Writer};

use map::Bytes;
use parse::Directory;
use std::{ops::Range, path::Path};

/// Largest `general.alignment` accepted, in bytes.
pub const MAX_ALIGNMENT: u64 = 1 << 20;

/// A parsed file and its bytes.
pub struct Gguf {
    name: String,
    bytes: Bytes,
    directory: Directory,
}

impl Gguf {
    /// Maps a file and parses its directory.
    ///
    /// As with every memory map, the file must not be changed while it is open: changed weights give changed results, and
    /// reading beyond the new end of a shortened file kills the process.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::new(path.display().to_string(), Bytes::map(path)?)
    }

    /// Parses bytes built into the program; `name` stands for a path in errors.
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Result<Self, Error> {
        Self::new(name.to_owned(), Bytes::Static(bytes))
    }

    /// Parses bytes in memory; `name` stands for a path in errors.
    pub fn from_vec(name: &str, bytes: Vec<u8>) -> Result<Self, Error> {
        Self::new(name.to_owned(), Bytes::Owned(bytes))
    }

    fn new(name: String, bytes: Bytes) -> Result<Self, Error> {
        let directory = Directory::parse(&name, bytes.as_slice())?;
        Ok(Self { name, bytes, directory })
    }

    /// The path, or the name given in place of one.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The format's version: 2 or 3.
    pub fn version(&self) -> u32 {
        self.directory.version
    }

    /// Alignment of the data section and of the tensors in it, in bytes: a power of two from 8 to [`MAX_ALIGNMENT`].
    pub fn alignment(&self) -> usize {
        self.directory.alignment as usize
    }

    /// Where the data section starts, in bytes. (A file without tensors may end before.)
    pub fn data_offset(&self) -> u64 {
        self.directory.data_offset
    }

    /// Length of the file in bytes.
    pub fn byte_len(&self) -> u64 {
        self.bytes.as_slice().len() as u64
    }

    /// Copies bytes of the file from `offset` on to `out`, without making its pages memory of this process.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        self.bytes.read_at(offset, out)
    }

    /// All keys and values in the order of the file.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, Value<'_>)> {
        let bytes = self.bytes.as_slice();
        self.directory.entries.iter().filter_map(|e| Some((e.key.as_str(), e.value(bytes)?)))
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        self.directory.entry(key)?.value(self.bytes.as_slice())
    }

    /// The value of a key, None if absent; an integer of any width that fits.
    pub fn get_u32(&self, key: &str) -> Result<Option<u32>, Error> {
        self.get_as(key, "u32", |v| v.as_int()?.try_into().ok())
    }

    /// The value of a key, None if absent; an integer of any width that fits.
    pub fn get_u64(&self, key: &str) -> Result<Option<u64>, Error> {
        self.get_as(key, "u64", |v| v.as_int()?.try_into().ok())
    }

    /// The value of a key, None if absent; an f64 is rounded.
    pub fn get_f32(&self, key: &str) -> Result<Option<f32>, Error> {
        self.get_as(key, "f32", |v| v.as_f32())
    }

    /// The value of a key, None if absent.
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>, Error> {
        self.get_as(key, "bool", |v| v.as_bool())
    }

    /// The value of a key, None if absent.
    pub fn get_str(&self, key: &str) -> Result<Option<&str>, Error> {
        self.get_as(key, "str", |v| v.as_str())
    }

    /// The value of a key, None if absent; an array of any element type.
    pub fn get_array(&self, key: &str) -> Result<Option<Array<'_>>, Error> {
        self.get_as(key, "array", |v| v.as_array())
    }

    fn get_as<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        cast: impl Fn(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(entry) = self.directory.entry(key) else { return Ok(None) };
        let Some(value) = entry.value(self.bytes.as_slice()) else { return Ok(None) };
        cast(value).map(Some).ok_or_else(|| Error::WrongType {
            file: self.name.clone(),
            key: key.to_owned(),
            expected,
            found: match value.as_int() {
                Some(int) => format!("{} {int}", value.ty()),
                None => value.ty().to_string(),
            },
            offset: entry.offset,
        })
    }

    /// All tensors in the order of the file's directory (which need not be that of their data).
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.directory.tensors
    }

    /// The tensor of a name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.directory.tensor(name)
    }

    /// The data of one of this file's tensors. Empty for a tensor that was not taken from this file and does not fit in it.
    pub fn tensor_bytes(&self, tensor: &TensorInfo) -> &[u8] {
        let Range { start, end } = tensor.range();
        let bytes = self.bytes.as_slice();
        match (usize::try_from(start), usize::try_from(end)) {
            (Ok(start), Ok(end)) => bytes.get(start..end).unwrap_or_default(),
            _ => &[],
        }
    }

    /// Gives the memory of a mapped byte range (of the file) back to the system; when it is used again it is read again.
    /// Advice: without effect on bytes that are not mapped and on systems other than Unix.
    pub fn advise_dontneed(&self, range: Range<u64>) {
        self.bytes.advise_dontneed(range);
    }
}

impl AsRef<[u8]> for Gguf {
    /// The whole file.
    fn as_ref(&self) -> &[u8] {
        self.bytes.as_slice()
    }
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Directory { entries, tensors, .. } = &self.directory;
        write!(f, "Gguf({:?}, {} keys, {} tensors)", self.name, entries.len(), tensors.len())
    }
}
