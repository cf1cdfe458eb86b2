use crate::{TensorType, ValueType};

/// What went wrong with a GGUF file. Every message is one line.
#[allow(missing_docs)] // the names and messages of the fields say it all
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused; the fault is outside the file.
    #[error("{file}: cannot {action}: {error}")]
    Io { file: String, action: &'static str, error: std::io::Error },
    /// The bytes are not a GGUF file that this crate accepts; the fault is in the file.
    #[error("{file}: {thing} at byte {offset}: {fault}")]
    Malformed { file: String, thing: String, offset: u64, fault: Fault },
    /// A key holds a value of another type than the caller needs; the file is well formed.
    #[error("{file}: key {key:?} at byte {offset}: expected {expected}, found {found}")]
    WrongType { file: String, key: String, expected: &'static str, found: String, offset: u64 },
    /// The [`Writer`](crate::Writer) was asked for a file that would not be valid; the fault is the caller's.
    #[error("{file}: cannot write {thing}: {problem}")]
    Write { file: String, thing: String, problem: String },
}

/// The ways in which a file can be malformed. Positions are absolute, in bytes; dimensions the fastest first.
#[allow(missing_docs)] // the messages say it all
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    #[error("truncated: {needed} more bytes expected, the file has {left}")]
    Short { needed: u64, left: u64 },
    #[error("truncated: the tensor needs bytes {start}..{end}, the file has {len}")]
    Truncated { start: u64, end: u64, len: u64 },
    #[error("expected \"GGUF\", found \"{}\": this is not a GGUF file", found.escape_ascii())]
    Magic { found: [u8; 4] },
    #[error("this is a big-endian file (version {version}), only little-endian files are supported")]
    BigEndian { version: u32 },
    #[error("expected GGUF version 2 or 3, found {found}")]
    Version { found: u32 },
    #[error(
        "truncated, or a wrong count: {count} entries of at least {each} bytes, the file has {left} more bytes"
    )]
    Count { count: u64, each: u64, left: u64 },
    #[error("expected at most {limit} {what}, found {found}")]
    Limit { what: &'static str, found: u64, limit: u64 },
    #[error("expected UTF-8, found a bad sequence {valid} bytes into the string")]
    Utf8 { valid: u64 },
    #[error("expected a value type 0 to 12, found {id}")]
    ValueType { id: u32 },
    #[error("expected a boolean of 0 or 1, found {found}")]
    Bool { found: u8 },
    #[error("expected a unique name, found it already at byte {first}")]
    Duplicate { first: u64 },
    #[error("expected a power of two from 8 to {}, found {found}", crate::MAX_ALIGNMENT)]
    Alignment { found: String },
    #[error("dimensions {dims:?} of type {ty}: {problem}")]
    Shape { dims: Vec<u64>, ty: TensorType, problem: &'static str },
    #[error("expected a known tensor type, found {id}")]
    TensorType { id: u32 },
    /// The offset counts from the start of the data section.
    #[error("expected a data offset that is a multiple of {alignment}, found {found}")]
    Misaligned { found: u64, alignment: u64 },
    #[error(
        "expected data of its own, found byte {start} in {other}, which has bytes {other_start}..{other_end}"
    )]
    Overlap { start: u64, other: String, other_start: u64, other_end: u64 },
}

impl Error {
    pub(crate) fn malformed(file: &str, thing: String, (offset, fault): (u64, Fault)) -> Self {
        Self::Malformed { file: file.to_owned(), thing, offset, fault }
    }
}

/// `kind "name"`: escaped, so that it stays on one line, and cut, so that a hostile name cannot fill the screen.
pub(crate) fn thing(kind: &str, name: &str) -> String {
    match name.char_indices().nth(80) {
        Some((cut, _)) => format!("{kind} {:?}...", &name[..cut]),
        None => format!("{kind} {name:?}"),
    }
}

impl std::fmt::Display for TensorType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::fmt::Display for ValueType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
