use crate::{TensorType, ValueType};

/// What went wrong with a GGUF file. Every message is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused; the fault is outside the file.
    #[error("{file}: cannot {action}: {error}")]
    Io {
        /// The file, as it was named by the caller.
        file: String,
        /// What was attempted, as a verb: "open", "map".
        action: &'static str,
        /// The system's answer.
        error: std::io::Error,
    },
    /// The bytes are not a GGUF file that this crate accepts; the fault is in the file.
    #[error("{file}: {thing} at byte {offset}: {fault}")]
    Malformed {
        /// The file, as it was named by the caller.
        file: String,
        /// The part that is wrong: the header, a key or a tensor.
        thing: String,
        /// Absolute position in the file.
        offset: u64,
        /// What was found, and what was expected.
        fault: Fault,
    },
    /// A key holds a value of another type than the caller needs; the file is well formed.
    #[error("{file}: key {key:?} at byte {offset}: expected {expected}, found {found}")]
    WrongType {
        /// The file, as it was named by the caller.
        file: String,
        /// The metadata key.
        key: String,
        /// The type that was asked for.
        expected: &'static str,
        /// The type, and for an integer that does not fit the value.
        found: String,
        /// Absolute position of the value in the file.
        offset: u64,
    },
    /// The [`Writer`](crate::Writer) was asked for a file that would not be valid; the fault is the caller's.
    #[error("{file}: cannot write {thing}: {problem}")]
    Write {
        /// The destination.
        file: String,
        /// The key or tensor.
        thing: String,
        /// What was asked, and what would be right.
        problem: String,
    },
}

/// The ways in which a file can be malformed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The file ends inside a header field.
    #[error("truncated: {needed} more bytes expected, the file has {left}")]
    Short {
        /// Bytes that the field needs.
        needed: u64,
        /// Bytes between the offset and the end.
        left: u64,
    },
    /// The file ends before a tensor does.
    #[error("truncated: the tensor needs bytes {start}..{end}, the file has {len}")]
    Truncated {
        /// First byte of the tensor.
        start: u64,
        /// One past its last byte.
        end: u64,
        /// Length of the file.
        len: u64,
    },
    /// The first four bytes are something else.
    #[error("expected \"GGUF\", found \"{}\": this is not a GGUF file", found.escape_ascii())]
    Magic {
        /// The bytes.
        found: [u8; 4],
    },
    /// The version reads as a small number in the other byte order.
    #[error("this is a big-endian file (version {version}), only little-endian files are supported")]
    BigEndian {
        /// The version, in the file's own byte order.
        version: u32,
    },
    /// A version without support.
    #[error("expected GGUF version 2 or 3, found {found}")]
    Version {
        /// The version.
        found: u32,
    },
    /// A count of things that cannot fit in the rest of the file.
    #[error("expected at most {left} bytes, found a count of {count} entries of at least {each} bytes")]
    Count {
        /// The count.
        count: u64,
        /// The least size of one thing, in bytes.
        each: u64,
        /// Bytes left in the file.
        left: u64,
    },
    /// More of something than this crate accepts.
    #[error("expected at most {limit} {what}, found {found}")]
    Limit {
        /// The unit.
        what: &'static str,
        /// The number in the file.
        found: u64,
        /// The largest number accepted.
        limit: u64,
    },
    /// A string that is not UTF-8.
    #[error("expected UTF-8, found a bad sequence {valid} bytes into the string")]
    Utf8 {
        /// Length of the good prefix, in bytes.
        valid: u64,
    },
    /// A number that is no metadata type.
    #[error("expected a value type 0 to 12, found {id}")]
    ValueType {
        /// The number.
        id: u32,
    },
    /// A boolean that is neither 0 nor 1.
    #[error("expected a boolean of 0 or 1, found {found}")]
    Bool {
        /// The byte.
        found: u8,
    },
    /// A key or a tensor name that was already used.
    #[error("expected a unique name, found it already at byte {first}")]
    Duplicate {
        /// Position of the first use.
        first: u64,
    },
    /// `general.alignment` that is no alignment.
    #[error("expected a power of two from 8 to {}, found {found}", crate::MAX_ALIGNMENT)]
    Alignment {
        /// The value, as text.
        found: String,
    },
    /// Dimensions that make no tensor of this type.
    #[error("dimensions {dims:?} of type {ty}: {problem}")]
    Shape {
        /// The dimensions, fastest first.
        dims: Vec<u64>,
        /// The tensor's type.
        ty: TensorType,
        /// Which rule they break.
        problem: &'static str,
    },
    /// A number that is no known tensor type.
    #[error("expected a known tensor type, found {id}")]
    TensorType {
        /// The number.
        id: u32,
    },
    /// A tensor that does not start at a multiple of the alignment.
    #[error("expected a data offset that is a multiple of {alignment}, found {found}")]
    Misaligned {
        /// The offset, relative to the data section.
        found: u64,
        /// The file's alignment.
        alignment: u64,
    },
    /// Two tensors that share bytes.
    #[error(
        "expected data of its own, found byte {start} in {other}, which has bytes {other_start}..{other_end}"
    )]
    Overlap {
        /// First byte of the tensor.
        start: u64,
        /// The tensor that lies before it.
        other: String,
        /// First byte of that one.
        other_start: u64,
        /// One past its last byte.
        other_end: u64,
    },
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
