use crate::error::thing;
use crate::parse::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAX_ENTRIES, alignment, data_len};
use crate::value::{MAX_DEPTH, MAX_NAME};
use crate::{Array, Error, MAX_ALIGNMENT, TensorType, Value, ValueType};
use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use tempfile::TempPath;

/// Collects the directory of a GGUF version 3 file, then writes the file.
///
/// ```
/// # use bitnet_gguf::{Gguf, TensorType, Value, ValueType, Writer};
/// let mut writer = Writer::new("small.gguf".as_ref());
/// writer.meta("general.architecture", Value::Str("none"))?;
/// writer.meta_array("sizes", ValueType::U32, [3, 4].map(Value::U32))?;
/// writer.tensor("x", &[2], TensorType::F32)?;
/// let mut data = writer.write_to(Vec::new())?; // or .create()?
/// data.tensor("x", &[0; 8])?;
/// let file = Gguf::from_vec("small.gguf", data.end()?)?; // or .finish()?
/// # assert_eq!(file.tensors().len(), 1);
/// # Ok::<(), bitnet_gguf::Error>(())
/// ```
pub struct Writer {
    path: PathBuf,
    alignment: u64,
    keys: HashSet<String>,
    metadata: Vec<u8>,
    tensors: Vec<Declared>,
    names: HashSet<String>,
}

/// A tensor of the file to be.
struct Declared {
    name: String,
    dims: Vec<u64>,
    ty: TensorType,
    byte_len: u64,
}

impl Writer {
    /// A file without keys and tensors. Nothing is written before [`create`](Self::create).
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            alignment: DEFAULT_ALIGNMENT,
            keys: HashSet::new(),
            metadata: Vec::new(),
            tensors: Vec::new(),
            names: HashSet::new(),
        }
    }

    /// Adds a key. `general.alignment` also sets the alignment of this file, 32 bytes without it.
    pub fn meta(&mut self, key: &str, value: Value<'_>) -> Result<(), Error> {
        let refuse = |problem| Err(refused(&self.path, thing("key", key), problem));
        if let Some(problem) = unfit(key, &self.keys) {
            return refuse(problem);
        }
        if value.as_array().is_some_and(|array| depth(array) > MAX_DEPTH) {
            return refuse(format!("arrays are nested more than {MAX_DEPTH} deep"));
        }
        if key == ALIGNMENT_KEY {
            match alignment(value) {
                Some(alignment) => self.alignment = alignment,
                None => return refuse(format!("{value:?} is no power of two from 8 to {MAX_ALIGNMENT}")),
            }
        }
        self.keys.insert(key.to_owned());
        Value::Str(key).encode(&mut self.metadata);
        self.metadata.extend((value.ty() as u32).to_le_bytes());
        value.encode(&mut self.metadata);
        Ok(())
    }

    /// Adds a key with an array of values of one type.
    pub fn meta_array<'a>(
        &mut self,
        key: &str,
        element: ValueType,
        values: impl IntoIterator<Item = Value<'a>>,
    ) -> Result<(), Error> {
        let mut bytes = Vec::new();
        let mut len = 0;
        for value in values {
            if value.ty() != element {
                let problem = format!("element {len} of an array of {element} is {}", value.ty());
                return Err(refused(&self.path, thing("key", key), problem));
            }
            value.encode(&mut bytes);
            len += 1;
        }
        self.meta(key, Value::Array(Array::new(element, len, &bytes)))
    }

    /// Declares a tensor: one to four dimensions, fastest first. The data follows in the order of declaration.
    pub fn tensor(&mut self, name: &str, dims: &[u64], ty: TensorType) -> Result<(), Error> {
        let refuse = |problem| refused(&self.path, thing("tensor", name), problem);
        if let Some(problem) = unfit(name, &self.names) {
            return Err(refuse(problem));
        }
        if !ty.size_is_known() {
            return Err(refuse(format!("the size of type {ty} is not known")));
        }
        let byte_len = data_len(ty, dims).map_err(|fault| refuse(fault.to_string()))?;
        self.names.insert(name.to_owned());
        self.tensors.push(Declared { name: name.to_owned(), dims: dims.to_owned(), ty, byte_len });
        Ok(())
    }

    /// Starts the file on disk. It appears at its path only with [`TensorWriter::finish`].
    pub fn create(self) -> Result<TensorWriter<AtomicFile>, Error> {
        let file = AtomicFile::create(&self.path).map_err(|e| io_error(&self.path, "create", e))?;
        self.write_to(file)
    }

    /// Starts the file in any sink, such as a `Vec<u8>`.
    pub fn write_to<W: Write>(self, mut sink: W) -> Result<TensorWriter<W>, Error> {
        let header = self.header();
        sink.write_all(&header).map_err(|e| io_error(&self.path, "write", e))?;
        Ok(TensorWriter {
            path: self.path,
            alignment: self.alignment,
            tensors: self.tensors,
            next: 0,
            left: 0,
            sink,
        })
    }

    /// All bytes up to the data section.
    fn header(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        out.extend(&self.metadata);
        let mut offset = 0u64;
        for t in &self.tensors {
            Value::Str(&t.name).encode(&mut out);
            out.extend((t.dims.len() as u32).to_le_bytes());
            for dim in &t.dims {
                out.extend(dim.to_le_bytes());
            }
            out.extend(t.ty.id().to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset = (offset + t.byte_len).next_multiple_of(self.alignment);
        }
        out.resize(out.len().next_multiple_of(self.alignment as usize), 0);
        out
    }
}

/// Why a file cannot have a key or a tensor of this name, beside those that are there.
fn unfit(name: &str, there: &HashSet<String>) -> Option<String> {
    if name.len() as u64 > MAX_NAME {
        return Some(format!("the name has {} bytes, at most {MAX_NAME} are allowed", name.len()));
    }
    if there.len() as u64 == MAX_ENTRIES {
        return Some(format!("at most {MAX_ENTRIES} of them are allowed"));
    }
    there.contains(name).then(|| "it is already there".into())
}

/// Levels of arrays.
fn depth(array: Array<'_>) -> u64 {
    1 + array.arrays().map_or(0, |arrays| arrays.map(depth).max().unwrap_or(0))
}

/// Takes the tensors' data in the order in which they were declared.
///
/// Between [`start`](Self::start) and the next it is an [`io::Write`] for the bytes of one tensor.
pub struct TensorWriter<W: Write> {
    path: PathBuf,
    alignment: u64,
    tensors: Vec<Declared>,
    /// Index of the tensor after the current one.
    next: usize,
    /// Bytes that the current tensor still needs.
    left: u64,
    sink: W,
}

impl<W: Write> TensorWriter<W> {
    /// Writes the whole data of the next tensor.
    pub fn tensor(&mut self, name: &str, data: &[u8]) -> Result<(), Error> {
        self.start(name)?;
        if data.len() as u64 != self.left {
            let problem = format!("expected {} bytes of data, got {}", self.left, data.len());
            return Err(refused(&self.path, thing("tensor", name), problem));
        }
        self.write_all(data).map_err(|e| io_error(&self.path, "write", e))
    }

    /// Starts the next tensor, whose data is then written in any number of parts.
    pub fn start(&mut self, name: &str) -> Result<(), Error> {
        let problem = match self.tensors.get(self.next) {
            Some(t) if t.name == name => {
                let byte_len = t.byte_len;
                self.complete()?;
                self.left = byte_len;
                self.next += 1;
                return Ok(());
            }
            Some(t) => format!("expected {} to be next", thing("tensor", &t.name)),
            None => "expected no more tensors".into(),
        };
        Err(refused(&self.path, thing("tensor", name), problem))
    }

    /// Ends the file: every tensor must be complete. Returns the sink, flushed.
    pub fn end(mut self) -> Result<W, Error> {
        self.complete()?;
        if let Some(missing) = self.tensors.get(self.next) {
            let problem = "expected its data before the end".into();
            return Err(refused(&self.path, thing("tensor", &missing.name), problem));
        }
        self.sink.flush().map_err(|e| io_error(&self.path, "write", e))?;
        Ok(self.sink)
    }

    /// Checks that the current tensor has all of its bytes, and pads them. Padding counts as `left` while it is written,
    /// so that after a failed write nothing can follow.
    fn complete(&mut self) -> Result<(), Error> {
        let Some(current) = self.next.checked_sub(1).map(|i| &self.tensors[i]) else { return Ok(()) };
        if self.left > 0 {
            let problem = format!("{} bytes of {} are missing", self.left, current.byte_len);
            return Err(refused(&self.path, thing("tensor", &current.name), problem));
        }
        self.left = current.byte_len.next_multiple_of(self.alignment) - current.byte_len;
        self.write_all(&vec![0; self.left as usize]).map_err(|e| io_error(&self.path, "write", e))
    }
}

impl TensorWriter<AtomicFile> {
    /// Ends the file and puts it in its place, durably: an older file of that name is replaced at once or not at all.
    pub fn finish(self) -> Result<(), Error> {
        let path = self.path.clone();
        self.end()?.commit().map_err(|e| io_error(&path, "finish", e))
    }
}

impl<W: Write> Write for TensorWriter<W> {
    /// Refuses more bytes than the current tensor has.
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if data.len() as u64 > self.left {
            let problem =
                format!("{} bytes of data for a tensor that has room for {}", data.len(), self.left);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
        }
        let n = self.sink.write(data)?;
        self.left -= n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

fn refused(path: &Path, thing: String, problem: String) -> Error {
    Error::Write { file: path.display().to_string(), thing, problem }
}

fn io_error(path: &Path, action: &'static str, error: io::Error) -> Error {
    Error::Io { file: path.display().to_string(), action, error }
}

/// A file that appears under its name only when it is complete: it is written beside it under a temporary name, which is
/// removed if this is dropped before.
pub struct AtomicFile {
    destination: PathBuf,
    file: BufWriter<File>,
    temporary: TempPath,
}

impl AtomicFile {
    /// Starts a file. What is no regular file is not replaced.
    pub fn create(destination: &Path) -> io::Result<Self> {
        // A rename would put a file in the place of a device or a pipe.
        if fs::metadata(destination).is_ok_and(|m| !m.is_file()) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "not a regular file"));
        }
        let mut prefix = OsString::from(".");
        prefix.push(destination.file_name().ok_or(io::ErrorKind::InvalidFilename)?);
        prefix.push(".");
        #[cfg(unix)]
        remove_left(folder(destination), prefix.as_encoded_bytes());
        let mut builder = tempfile::Builder::new();
        // Created here, for others than its owner may read it.
        builder.prefix(&prefix).suffix(".tmp");
        let (file, temporary) = loop {
            let (file, temporary) =
                builder.make_in(folder(destination), |path| File::create_new(path))?.into_parts();
            #[cfg(unix)]
            let _ = file.lock();
            // Another process may have taken it for one that was left.
            if fs::exists(&temporary)? {
                break (file, temporary);
            }
        };
        let file = BufWriter::with_capacity(1 << 20, file);
        Ok(Self { destination: destination.to_owned(), file, temporary })
    }

    /// Whether files can be written where `destination` is. What is written to find out has no name that could stay.
    pub fn possible(destination: &Path) -> io::Result<()> {
        tempfile::tempfile_in(folder(destination)).map(drop)
    }

    /// Where the bytes are until [`commit`](Self::commit); all of them after [`TensorWriter::end`].
    pub fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Gives the file its name, durably: an older file of that name is replaced at once or not at all.
    pub fn commit(self) -> io::Result<()> {
        let file = self.file.into_inner()?;
        file.sync_all()?;
        self.temporary.persist(&self.destination)?;
        // The rename itself is durable once the folder is.
        #[cfg(unix)]
        File::open(folder(&self.destination))?.sync_all()?;
        Ok(())
    }
}

/// Removes what killed processes left of this file: whoever still writes one holds a lock.
#[cfg(unix)]
fn remove_left(folder: &Path, prefix: &[u8]) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let left = name
            .as_encoded_bytes()
            .strip_prefix(prefix)
            .is_some_and(|rest| rest.len() == 10 && rest.ends_with(b".tmp"));
        // The lock is held until the file is gone.
        if left
            && let Ok(file) = File::open(entry.path())
            && file.try_lock().is_ok()
        {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn folder(file: &Path) -> &Path {
    file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

impl Write for AtomicFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.file.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
