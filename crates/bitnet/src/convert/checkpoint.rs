//! The tensors of a checkpoint: safetensors files, read piece by piece.
//!
//! Format: <https://huggingface.co/docs/safetensors>: the length of a JSON header in 8 bytes, the header, the data.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::output::decode;
use super::{ConvertError, Result};
use bitnet_gguf::TensorType;

/// Longest header accepted, in bytes: the limit of the safetensors library.
const MAX_HEADER: u64 = 100_000_000;

/// Values in a piece of a tensor: a multiple of the 256 of the largest blocks.
const PIECE: u64 = 1 << 18;

/// The open files of a checkpoint and their directories.
pub(super) struct Checkpoint {
    dir: PathBuf,
    shards: Vec<Shard>,
    /// By name: the shard's index and what it says.
    tensors: BTreeMap<String, (usize, Entry)>,
}

struct Shard {
    path: PathBuf,
    file: File,
    /// Where its data starts.
    data: u64,
}

#[derive(Deserialize)]
struct Header {
    #[serde(rename = "__metadata__", default)]
    _metadata: IgnoredAny,
    #[serde(flatten)]
    tensors: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    /// First byte and one past the last, from the start of the data; checked to be in the file.
    data_offsets: [u64; 2],
}

#[derive(Deserialize)]
struct Index {
    /// From tensor to file.
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens `model.safetensors`, or the files that `model.safetensors.index.json` lists.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let mut checkpoint = Self { dir: dir.to_owned(), shards: Vec::new(), tensors: BTreeMap::new() };
        let single = dir.join("model.safetensors");
        let index_path = dir.join("model.safetensors.index.json");
        if single.exists() || !index_path.exists() {
            for (name, entry) in checkpoint.shard(single)? {
                checkpoint.tensors.insert(name, (0, entry));
            }
            return Ok(checkpoint);
        }
        let index: Index = read_json(&index_path)?;
        let mut by_file: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, file) in &index.weight_map {
            by_file.entry(file).or_default().push(name);
        }
        for (file, names) in by_file {
            // Nothing outside the folder is read.
            if Path::new(file).file_name() != Some(file.as_ref()) {
                let problem = format!("expected the name of a file in the same folder, found {file:?}");
                return Err(ConvertError::checkpoint(&index_path, "weight_map", problem));
            }
            let path = dir.join(file);
            let mut entries = checkpoint.shard(path.clone())?;
            for name in names {
                let Some(entry) = entries.remove(name) else {
                    let problem = format!("expected here by {}, missing", index_path.display());
                    return Err(ConvertError::checkpoint(&path, format!("tensor {name:?}"), problem));
                };
                checkpoint.tensors.insert(name.to_owned(), (checkpoint.shards.len() - 1, entry));
            }
            if let Some(name) = entries.keys().next() {
                let problem = format!("not listed in {}", index_path.display());
                return Err(ConvertError::checkpoint(&path, format!("tensor {name:?}"), problem));
            }
        }
        Ok(checkpoint)
    }

    /// Opens one more file and reads its header.
    fn shard(&mut self, path: PathBuf) -> Result<BTreeMap<String, Entry>> {
        let header_error = |problem: String| ConvertError::checkpoint(&path, "header", problem);
        let mut file = File::open(&path).map_err(|e| ConvertError::io(&path, "open", e))?;
        let io = |e| ConvertError::io(&path, "read", e);
        let file_len = file.metadata().map_err(io)?.len();
        let room = file_len.checked_sub(8).ok_or_else(|| {
            header_error(format!("expected its length in the first 8 bytes, the file has {file_len}"))
        })?;
        let mut len = [0; 8];
        file.read_exact(&mut len).map_err(io)?;
        let len = u64::from_le_bytes(len);
        if len > room.min(MAX_HEADER) {
            let most = room.min(MAX_HEADER);
            return Err(header_error(format!(
                "expected a length of at most {most} bytes at byte 0, found {len}"
            )));
        }
        let mut json = vec![0; len as usize];
        file.read_exact(&mut json).map_err(io)?;
        let header: Header = serde_json::from_slice(&json).map_err(|e| header_error(e.to_string()))?;
        for (name, Entry { data_offsets: [start, end], .. }) in &header.tensors {
            if start > end || *end > room - len {
                let problem =
                    format!("expected offsets in the {} bytes of data, found {start} to {end}", room - len);
                return Err(ConvertError::checkpoint(&path, format!("tensor {name:?}"), problem));
            }
        }
        self.shards.push(Shard { path, file, data: 8 + len });
        Ok(header.tensors)
    }

    /// All tensors with their files, by name.
    pub(super) fn names(&self) -> impl Iterator<Item = (&Path, &str)> {
        self.tensors.iter().map(|(name, (shard, _))| (self.shards[*shard].path.as_path(), name.as_str()))
    }

    /// The one value of a tensor.
    pub(super) fn scalar(&self, name: &str) -> Result<f32> {
        let no_dims = self.tensors.get(name).is_some_and(|(_, entry)| entry.shape.is_empty());
        let tensor = self.tensor(name, if no_dims { &[] } else { &[1] }, false)?;
        let mut value = 0.0;
        tensor.read(|values, _| {
            value = values[0];
            Ok(())
        })?;
        if value > 0.0 {
            Ok(value)
        } else {
            Err(tensor.error(format!("expected a scale above 0, found {value}")))
        }
    }

    /// The tensor of a name, which must have this shape and be of floats, or of bytes where it is `packed`.
    pub(super) fn tensor(&self, name: &str, shape: &[u64], packed: bool) -> Result<Tensor<'_>> {
        let thing = || format!("tensor {name:?}");
        let Some((name, (shard, entry))) = self.tensors.get_key_value(name) else {
            let problem = format!("missing among {} tensors", self.tensors.len());
            return Err(ConvertError::checkpoint(&self.dir, thing(), problem));
        };
        let Shard { path, file, data } = &self.shards[*shard];
        let refuse = |problem| Err(ConvertError::checkpoint(path, thing(), problem));
        let ty = match entry.dtype.as_str() {
            "F32" => TensorType::F32,
            "F16" => TensorType::F16,
            "BF16" => TensorType::BF16,
            "U8" => PACKED,
            other => return refuse(format!("expected type F32, F16 or BF16, found {other}")),
        };
        if packed != (ty == PACKED) {
            let problem = if packed {
                format!(
                    "expected packed weights (U8), found {}: is the checkpoint one of master weights?",
                    entry.dtype
                )
            } else {
                "type U8: packed weights, which the configuration says nothing of".to_owned()
            };
            return refuse(problem);
        }
        if entry.shape != shape {
            return refuse(format!("expected shape {shape:?} from config.json, found {:?}", entry.shape));
        }
        let [start, end] = entry.data_offsets;
        let size = ty.byte_len(&[1]).unwrap_or(1);
        let expected = shape.iter().try_fold(size, |n, &dim| n.checked_mul(dim));
        if expected != Some(end - start) {
            let problem =
                format!("a shape of {shape:?} does not fill the {} bytes from {start} to {end}", end - start);
            return refuse(problem);
        }
        Ok(Tensor {
            name,
            path,
            file,
            start: data + start,
            byte_len: end - start,
            shape: &entry.shape,
            ty,
            size,
        })
    }
}

/// Reads a JSON file.
pub(super) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = std::fs::read(path).map_err(|e| ConvertError::io(path, "read", e))?;
    serde_json::from_slice(&bytes).map_err(|e| ConvertError::checkpoint(path, "JSON", e.to_string()))
}

/// Four ternary weights a byte.
const PACKED: TensorType = TensorType::I8;

/// A tensor of the checkpoint, checked to lie in its file.
pub(super) struct Tensor<'a> {
    pub(super) name: &'a str,
    pub(super) path: &'a Path,
    /// Slowest dimension first.
    pub(super) shape: &'a [u64],
    /// Size in bytes.
    pub(super) byte_len: u64,
    /// First byte in the file.
    start: u64,
    file: &'a File,
    ty: TensorType,
    /// Bytes of a value.
    size: u64,
}

impl Tensor<'_> {
    /// The number of values.
    pub(super) fn elements(&self) -> u64 {
        self.byte_len / self.size
    }

    /// Hands over the values, which are finite, piece by piece with the number of bytes they took.
    pub(super) fn read(&self, mut take: impl FnMut(&[f32], u64) -> Result<()>) -> Result<()> {
        let io = |e| ConvertError::io(self.path, "read", e);
        let mut file = self.file;
        file.seek(SeekFrom::Start(self.start)).map_err(io)?;
        let (mut bytes, mut values) = (Vec::new(), Vec::new());
        let mut done = 0;
        while done < self.byte_len {
            let len = (self.byte_len - done).min(PIECE * self.size);
            bytes.resize(len as usize, 0);
            file.read_exact(&mut bytes).map_err(io)?;
            if self.ty == PACKED {
                values.clear();
                values.extend(bytes.iter().map(|&byte| f32::from(byte)));
            } else {
                decode(self.ty, &bytes, &mut values);
            }
            if let Some(bad) = values.iter().position(|x| !x.is_finite()) {
                let problem = format!("expected a finite number, found {}", values[bad]);
                return Err(self.error_at(done / self.size + bad as u64, problem));
            }
            take(&values, len)?;
            done += len;
        }
        Ok(())
    }

    pub(super) fn error(&self, problem: String) -> ConvertError {
        ConvertError::checkpoint(self.path, format!("tensor {:?}", self.name), problem)
    }

    /// An error of the value that `index` others precede.
    pub(super) fn error_at(&self, index: u64, problem: String) -> ConvertError {
        let columns = self.shape.last().copied().unwrap_or(1);
        let place = if self.shape.len() < 2 {
            format!("[{index}]")
        } else {
            format!("[{}, {}]", index / columns, index % columns)
        };
        let byte = self.start + index * self.size;
        let thing = format!("tensor {:?}, element {place} at byte {byte}", self.name);
        ConvertError::checkpoint(self.path, thing, problem)
    }
}
