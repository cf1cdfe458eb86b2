//! The file to be: tensors are encoded, hashed as they are written, and read again at the end.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use bitnet_gguf::{AtomicFile, Gguf, TensorInfo, TensorType, TensorWriter, Writer};
use bitnet_kernels::blocks::BlockFormat;
use bitnet_kernels::half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use bitnet_kernels::ternary::pack;
use sha2::{Digest, Sha256};

use super::gguf::{error, pieces, read_ternary};
use super::{ConvertError, Meter, Report, Result};
use crate::model::stored::{ExactScales, is_ternary, row_format};

/// The ternary weights of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Trits {
    /// Hash of all of them, 64 hexadecimal digits, the same for every type that they are stored in: SHA-256 over the
    /// SHA-256 of each ternary tensor, in the order of their names. The latter is over the name, a zero byte, and the
    /// weights as the bytes of I2_S, filled up with zero weights to a whole block.
    pub hash: String,
    /// Number of tensors.
    pub tensors: usize,
    /// How many weights are -1, 0 and +1.
    pub counts: [u64; 3],
    /// Smallest and largest scale.
    pub scales: (f32, f32),
    /// Names of the tensors whose weights are all zero.
    pub zero: Vec<String>,
}

impl Trits {
    /// Reads all ternary weights of a file, checking each, and that scales are above 0.
    pub fn read(gguf: &Gguf) -> Result<Self, ConvertError> {
        let exact = ExactScales::read(gguf);
        let (mut all, mut zero) = (BTreeMap::new(), Vec::new());
        let (mut counts, mut scales) = ([0; 3], (f32::INFINITY, f32::NEG_INFINITY));
        for tensor in gguf.tensors().iter().filter(|tensor| is_ternary(tensor)) {
            let mut hash = TritHash::new(&tensor.name);
            let mut is_zero = true;
            let scale = read_ternary(gguf, tensor, &exact, &mut |trits, _| {
                is_zero &= trits.iter().all(|&trit| trit == 0);
                let count = |wanted| trits.iter().filter(|&&trit| trit == wanted).count() as u64;
                for (sum, wanted) in counts.iter_mut().zip([-1, 0, 1]) {
                    *sum += count(wanted);
                }
                hash.push(trits)
            })?;
            if is_zero {
                zero.push(tensor.name.clone());
            }
            if let Some(scale) = scale {
                if scale <= 0.0 {
                    return Err(error(gguf, tensor, format!("the scale is {scale}, expected one above 0")));
                }
                scales = (scales.0.min(scale), scales.1.max(scale));
            }
            all.insert(tensor.name.as_str(), hash.end());
            gguf.advise_dontneed(tensor.range());
        }
        Ok(Self { hash: joined(all.values()), tensors: all.len(), counts, scales, zero })
    }
}

fn joined<'a>(hashes: impl Iterator<Item = &'a [u8; 32]>) -> String {
    let all = hashes.fold(Sha256::new(), Digest::chain_update).finalize();
    all.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The hash of one tensor's trits.
struct TritHash {
    sha: Sha256,
    pending: Vec<i8>,
}

impl TritHash {
    fn new(name: &str) -> Self {
        Self { sha: Sha256::new().chain_update(name).chain_update([0]), pending: Vec::new() }
    }

    fn push(&mut self, trits: &[i8]) -> Result<()> {
        self.pending.extend(trits);
        let whole = self.pending.len() / pack::BLOCK * pack::BLOCK;
        // Whoever gives trits has checked them.
        self.sha.update(pack::pack_i2s(&self.pending[..whole]).unwrap_or_default());
        self.pending.drain(..whole);
        Ok(())
    }

    fn end(mut self) -> [u8; 32] {
        self.pending.resize(self.pending.len().next_multiple_of(pack::BLOCK), 0);
        self.sha.update(pack::pack_i2s(&self.pending).unwrap_or_default());
        self.sha.finalize().into()
    }
}

/// What the written tensor must read as.
enum Expected {
    Ternary { trits: [u8; 32], scale: f32 },
    Bytes([u8; 32]),
}

pub(super) struct Output<'a> {
    data: TensorWriter<AtomicFile>,
    path: &'a Path,
    expected: BTreeMap<String, Expected>,
    /// What is to be told of it, but for the hash.
    report: Report,
}

impl<'a> Output<'a> {
    pub(super) fn new(
        writer: Writer,
        path: &'a Path,
        architecture: &str,
        embedding: TensorType,
    ) -> Result<Self> {
        let report = Report {
            architecture: architecture.to_owned(),
            tensors: 0,
            ternary_weights: 0,
            zero_weights: 0,
            embedding,
            trits: String::new(),
            notices: Vec::new(),
        };
        Ok(Self { data: writer.create()?, path, expected: BTreeMap::new(), report })
    }

    /// Writes a ternary tensor of rows of `columns` weights, which `read` hands over in pieces.
    pub(super) fn ternary(
        &mut self,
        name: &str,
        ty: TensorType,
        columns: usize,
        scale: f32,
        read: impl FnOnce(&mut dyn FnMut(&[i8]) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        self.data.start(name)?;
        let mut hash = TritHash::new(name);
        let unit = if ty == TensorType::I2S { pack::BLOCK } else { columns };
        let mut pending: Vec<i8> = Vec::new();
        let mut bytes = Vec::new();
        let path = self.path;
        let wrong = |error: pack::PackError| {
            ConvertError::checkpoint(path, format!("tensor {name:?}"), error.to_string())
        };
        read(&mut |trits| {
            self.report.ternary_weights += trits.len() as u64;
            self.report.zero_weights += trits.iter().filter(|&&trit| trit == 0).count() as u64;
            pending.extend(trits);
            let whole = pending.len() / unit * unit;
            bytes.clear();
            match row_format(ty) {
                Some(format) => {
                    for row in pending[..whole].chunks_exact(columns) {
                        format.pack_row(row, scale, &mut bytes).map_err(wrong)?;
                    }
                }
                None => bytes = pack::pack_i2s(&pending[..whole]).map_err(wrong)?,
            }
            self.data.write_all(&bytes).map_err(|e| ConvertError::io(path, "write", e))?;
            pending.drain(..whole);
            hash.push(trits)
        })?;
        if ty == TensorType::I2S {
            self.data.write_all(&pack::tail(scale)).map_err(|e| ConvertError::io(path, "write", e))?;
        }
        self.expected.insert(name.to_owned(), Expected::Ternary { trits: hash.end(), scale });
        Ok(())
    }

    /// Writes any other tensor, whose bytes `read` hands over in pieces.
    pub(super) fn bytes(
        &mut self,
        name: &str,
        read: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        self.data.start(name)?;
        let mut sha = Sha256::new();
        read(&mut |bytes| {
            sha.update(bytes);
            self.data.write_all(bytes).map_err(|e| ConvertError::io(self.path, "write", e))
        })?;
        self.expected.insert(name.to_owned(), Expected::Bytes(sha.finalize().into()));
        Ok(())
    }

    /// Reads the whole file again, and gives it its name if it is right.
    pub(super) fn finish(self, meter: &mut Meter<'_>, notices: Vec<String>) -> Result<Report> {
        let Self { data, path, expected, report } = self;
        let file = data.end()?;
        let gguf = Gguf::open(file.temporary())?;
        let refuse = |tensor: &TensorInfo| ConvertError::Verify {
            file: path.display().to_string(),
            tensor: tensor.name.clone(),
        };
        let exact = ExactScales::read(&gguf);
        let mut all = BTreeMap::new();
        for tensor in gguf.tensors() {
            match expected.get(&tensor.name) {
                Some(Expected::Ternary { trits, scale }) => {
                    let mut hash = TritHash::new(&tensor.name);
                    let found = read_ternary(&gguf, tensor, &exact, &mut |trits, bytes| {
                        meter.read(&tensor.name, bytes)?;
                        hash.push(trits)
                    })?;
                    let same = found.is_none_or(|found| found.to_bits() == scale.to_bits());
                    if hash.end() != *trits || !same {
                        return Err(refuse(tensor));
                    }
                    all.insert(tensor.name.as_str(), trits);
                }
                Some(Expected::Bytes(hash)) => {
                    let mut sha = Sha256::new();
                    for piece in pieces(&gguf, tensor, 1 << 20) {
                        sha.update(piece);
                        meter.read(&tensor.name, piece.len() as u64)?;
                    }
                    if <[u8; 32]>::from(sha.finalize()) != *hash {
                        return Err(refuse(tensor));
                    }
                }
                None => return Err(refuse(tensor)),
            }
            gguf.advise_dontneed(tensor.range());
        }
        let trits = joined(all.into_values());
        drop(gguf);
        file.commit().map_err(|e| ConvertError::io(path, "write", e))?;
        Ok(Report { tensors: expected.len(), trits, notices, ..report })
    }
}

/// Appends finite values as `ty`, whole blocks of them.
pub(super) fn encode(ty: TensorType, values: &[f32], out: &mut Vec<u8>) {
    match ty {
        TensorType::F16 => out.extend(values.iter().flat_map(|&x| f32_to_f16(x).to_le_bytes())),
        TensorType::BF16 => out.extend(values.iter().flat_map(|&x| f32_to_bf16(x).to_le_bytes())),
        TensorType::Q8_0 => BlockFormat::Q8_0.encode(values, out),
        TensorType::Q6_K => BlockFormat::Q6_K.encode(values, out),
        _ => out.extend(values.iter().flat_map(|x| x.to_le_bytes())),
    }
}

/// The values of whole blocks of `ty`; nothing where the type is none that [`encode`] writes.
pub(super) fn decode(ty: TensorType, bytes: &[u8], values: &mut Vec<f32>) {
    values.clear();
    let halves = bytes.as_chunks::<2>().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
    let format = match ty {
        TensorType::F32 => {
            return values.extend(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)));
        }
        TensorType::F16 => return values.extend(halves.map(f16_to_f32)),
        TensorType::BF16 => return values.extend(halves.map(bf16_to_f32)),
        TensorType::Q8_0 => BlockFormat::Q8_0,
        TensorType::Q6_K => BlockFormat::Q6_K,
        _ => return,
    };
    let (block, block_bytes) = format.sizes();
    values.resize(bytes.len() / block_bytes * block, 0.0);
    format.decode(&bytes[..values.len() / block * block_bytes], values);
}
