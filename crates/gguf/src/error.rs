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
#[allow(missing_docs)] // the names and messages of the fields say it all
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The file ends inside a header field.
    #[error("truncated: {needed} more bytes expected, the file has {left}")]
    Short { needed: u64, left: u64 },
    /// The file ends before a tensor does.
    #[error("truncated: the tensor needs bytes {start}..{end}, the file has {len}")]
    Truncated { start: u64, end: u64, len: u64 },
    /// The first four bytes are something else.
    #[error("expected \"GGUF\", found \"{}\": this is not a GGUF file", found.escape_ascii())]
    Magic { found: [u8; 4] },
    /// The version reads as a small number in the other byte order.
    #[error("this is a big-endian file (version {version}), only little-endian files are supported")]
    BigEndian { version: u32 },
    /// A version without support.
    #[error("expected GGUF version 2 or 3, found {found}")]
    Version { found: u32 },
    /// A count of things that cannot fit in the rest of the file.
    #[error("expected at most {left} bytes, found a count of {count} entries of at least {each} bytes")]
    Count { count: u64, each: u64, left: u64 },
    /// More of something than this crate accepts.
    #[error("expected at most {limit} {what}, found {found}")]
    Limit { what: &'static str, found: u64, limit: u64 },
    /// A string that is not UTF-8.
    #[error("expected UTF-8, found a bad sequence {valid} bytes into the string")]
    Utf8 { valid: u64 },
    /// A number that is no metadata type.
    #[error("expected a value type 0 to 12, found {id}")]
    ValueType { id: u32 },
    /// A boolean that is neither 0 nor 1.
    #[error("expected a boolean of 0 or 1, found {found}")]
    Bool { found: u8 },
    /// A key or a tensor name that was already used.
    #[error("expected a unique name, found it already at byte {first}")]
    Duplicate { first: u64 },
    /// `general.alignment` that is no alignment.
    #[error("expected a power of two from 8 to {}, found {found}", crate::MAX_ALIGNMENT)]
    Alignment { found: String },
    /// Dimensions that make no tensor of this type.
    #[error("dimensions {dims:?} of type {ty}: {problem}")]
    Shape { dims: Vec<u64>, ty: TensorType, problem: &'static str },
    /// A number that is no known tensor type.
    #[error("expected a known tensor type, found {id}")]
    TensorType { id: u32 },
    /// A tensor that does not start at a multiple of the alignment, from the start of the data section.
    #[error("expected a data offset that is a multiple of {alignment}, found {found}")]
    Misaligned { found: u64, alignment: u64 },
    /// Two tensors that share bytes.
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
