//! A GGUF file with its ternary matrices and its head in other types.

use std::path::Path;

use bitnet_gguf::{Gguf, TensorInfo, TensorType, Value, ValueType, Writer};
use bitnet_kernels::half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use bitnet_kernels::ternary::pack;

use super::output::{Output, decode, encode};
use super::{ConvertError, Meter, Options, Report, Result, Tell};
use crate::model::stored::{
    EXACT_SCALES, ExactScales, arm_layout, is_ternary, misfit, row_format, scale_of, unpack_row,
};

/// Weights in a piece of a tensor.
const PIECE: usize = 1 << 18;
/// More bytes than a piece has.
const MAX_PIECE: u64 = 4 << 20;

pub(super) fn to_gguf(input: &Path, out: &Path, options: Options, progress: &mut Tell<'_>) -> Result<Report> {
    let gguf = Gguf::open(input)?;
    if let Some((tensor, problem)) = arm_layout(&gguf) {
        return Err(error(&gguf, tensor, problem));
    }
    let exact = ExactScales::read(&gguf);
    let mut scales = Vec::new();
    for tensor in gguf.tensors().iter().filter(|tensor| is_ternary(tensor)) {
        let scale = scale_of(&gguf, tensor, &exact).map_err(|problem| error(&gguf, tensor, problem))?;
        scales.push(scale.unwrap_or(1.0));
    }
    if scales.is_empty() {
        let thing = format!("{} tensors", gguf.tensors().len());
        return Err(ConvertError::checkpoint(
            input,
            thing,
            "none is ternary: expected I2_S, TQ1_0, TQ2_0, IQ1_BN, IQ2_BN or projections in floats",
        ));
    }

    let ternary = options.ternary.tensor_type();
    let mut writer = Writer::new(out);
    let mut file_type = Some(options.ternary.row().2);
    for (key, value) in gguf.metadata() {
        match key {
            "general.file_type" => writer.meta(key, Value::U32(file_type.take().unwrap_or_default()))?,
            EXACT_SCALES => {}
            _ => writer.meta(key, value)?,
        }
    }
    if let Some(file_type) = file_type {
        writer.meta("general.file_type", Value::U32(file_type))?;
    }
    write_scales(input, &mut writer, ternary, &scales)?;
    let mut notices = Vec::new();
    let mut types = Vec::new();
    let (mut read, mut written) = (0, 0);
    for tensor in gguf.tensors() {
        let head = ["token_embd.weight", "output.weight"].contains(&tensor.name.as_str());
        let ty = match options.head.tensor_type().filter(|_| head) {
            _ if is_ternary(tensor) => ternary,
            Some(ty) if ty != tensor.ty => {
                if decodable(tensor.ty) {
                    notices.push(format!("{}: from {} to {ty}", tensor.name, tensor.ty));
                    ty
                } else {
                    let problem = format!("expected F32, F16, BF16, Q8_0 or Q6_K, found {}", tensor.ty);
                    return Err(error(&gguf, tensor, problem));
                }
            }
            _ => tensor.ty,
        };
        if let Some(problem) = misfit(&tensor.dims, ty).filter(|_| is_ternary(tensor)) {
            return Err(error(&gguf, tensor, problem));
        }
        writer.tensor(&tensor.name, &tensor.dims, ty)?;
        read += tensor.byte_len;
        written += ty.byte_len(&tensor.dims).unwrap_or(0);
        types.push(ty);
    }

    let mut meter = Meter { progress, done: 0, total: read + written };
    let architecture = gguf.get_str("general.architecture")?.unwrap_or("unknown");
    let embedding = gguf.tensors().iter().position(|tensor| tensor.name == "token_embd.weight");
    let embedding = embedding.map_or(TensorType::F32, |at| types[at]);
    let mut output = Output::new(writer, out, architecture, embedding)?;
    let mut scales = scales.into_iter();
    for (tensor, &ty) in gguf.tensors().iter().zip(&types) {
        if is_ternary(tensor) {
            let (columns, scale) = (tensor.dims[0] as usize, scales.next().unwrap_or(1.0));
            output.ternary(&tensor.name, ty, columns, scale, |take| {
                let read = read_ternary(&gguf, tensor, &exact, &mut |trits, bytes| {
                    meter.read(&tensor.name, bytes)?;
                    take(trits)
                });
                read.map(|_| ())
            })?;
        } else {
            output.bytes(&tensor.name, |take| {
                // Whole blocks of every type, whose bytes all divide this times a block's.
                let piece = tensor.byte_len / tensor.n_elements().div_ceil(PIECE as u64).max(1);
                let block = tensor.ty.byte_len(&[256]).unwrap_or(1).max(1);
                let piece = piece.next_multiple_of(block) as usize;
                let (mut values, mut encoded) = (Vec::new(), Vec::new());
                let mut index = 0;
                for bytes in pieces(&gguf, tensor, piece) {
                    if ty == tensor.ty {
                        take(bytes)?;
                    } else {
                        decode(tensor.ty, bytes, &mut values);
                        if let Some(bad) = values.iter().position(|x| !fits(*x, ty)) {
                            let problem =
                                format!("value {} is {}: not one for {ty}", index + bad, values[bad]);
                            return Err(error(&gguf, tensor, problem));
                        }
                        index += values.len();
                        encoded.clear();
                        encode(ty, &values, &mut encoded);
                        take(&encoded)?;
                    }
                    meter.read(&tensor.name, bytes.len() as u64)?;
                }
                Ok(())
            })?;
        }
        gguf.advise_dontneed(tensor.range());
    }
    output.finish(&mut meter, notices)
}

/// Keeps the scales where the type rounds them.
pub(super) fn write_scales(input: &Path, writer: &mut Writer, ty: TensorType, scales: &[f32]) -> Result<()> {
    let Some(format) = row_format(ty) else { return Ok(()) };
    if let Some(bad) = scales.iter().find(|&&scale| {
        let stored = format.stored_scale(scale);
        let lost = stored == 0.0 && scale != 0.0 || format.is_float() && scale <= 0.0;
        !stored.is_finite() || lost
    }) {
        return Err(ConvertError::checkpoint(input, "a scale", format!("{bad} cannot be stored in {ty}")));
    }
    if scales.iter().any(|&scale| format.stored_scale(scale) != scale) {
        writer.meta_array(EXACT_SCALES, ValueType::F32, scales.iter().copied().map(Value::F32))?;
    }
    Ok(())
}

/// Whether a head of this type can be made another.
fn decodable(ty: TensorType) -> bool {
    use TensorType::{BF16, F16, F32, Q6_K, Q8_0};
    [F32, F16, BF16, Q8_0, Q6_K].contains(&ty)
}

/// Whether a value can be stored in a type of floats or of blocks with f16 scales.
pub(super) fn fits(x: f32, ty: TensorType) -> bool {
    let is_half = |x: f32| f16_to_f32(f32_to_f16(x)).is_finite();
    x.is_finite()
        && match ty {
            TensorType::F16 => is_half(x),
            TensorType::BF16 => bf16_to_f32(f32_to_bf16(x)).is_finite(),
            TensorType::Q8_0 => is_half(x / 127.0),
            TensorType::Q6_K => is_half(x / 4096.0),
            _ => true,
        }
}

pub(super) fn error(gguf: &Gguf, tensor: &TensorInfo, problem: impl Into<String>) -> ConvertError {
    let thing = format!("tensor {:?} at byte {}", tensor.name, tensor.offset);
    ConvertError::checkpoint(Path::new(gguf.name()), thing, problem)
}

/// The bytes of a tensor in pieces. Pages of those before are given back: an embedding may be larger than memory.
pub(super) fn pieces<'a>(
    gguf: &'a Gguf,
    tensor: &'a TensorInfo,
    size: usize,
) -> impl Iterator<Item = &'a [u8]> {
    let mut at = tensor.offset;
    gguf.tensor_bytes(tensor).chunks(size).inspect(move |piece| {
        gguf.advise_dontneed(at.saturating_sub(MAX_PIECE).max(tensor.offset)..at);
        at += piece.len() as u64;
    })
}

/// Hands over the trits of a ternary tensor in pieces, with the bytes they took. Returns the scale; None where the
/// tensor is all zeros and has none.
pub(super) fn read_ternary(
    gguf: &Gguf,
    tensor: &TensorInfo,
    exact: &ExactScales<'_>,
    take: &mut dyn FnMut(&[i8], u64) -> Result<()>,
) -> Result<Option<f32>> {
    let (bytes, n) = (gguf.tensor_bytes(tensor), tensor.n_elements() as usize);
    let scale = scale_of(gguf, tensor, exact).map_err(|problem| error(gguf, tensor, problem))?;
    let Some(format) = row_format(tensor.ty) else {
        let (codes, tail) = bytes.split_at(n / 4);
        for (i, piece) in codes.chunks(PIECE / 4).enumerate() {
            let trits = pack::unpack_i2s(piece, 4 * piece.len()).map_err(|e| {
                error(gguf, tensor, format!("in the piece from weight {} on: {e}", i * PIECE))
            })?;
            let last = (i + 1) * PIECE >= n;
            take(&trits, (piece.len() + if last { tail.len() } else { 0 }) as u64)?;
        }
        return Ok(scale);
    };
    let (columns, row_bytes) = (tensor.dims[0] as usize, format.row_bytes(tensor.dims[0] as usize));
    let rows = (PIECE / columns).max(1);
    let mut trits = vec![0; rows * columns];
    for (i, piece) in pieces(gguf, tensor, rows * row_bytes).enumerate() {
        let mut filled = 0;
        for (r, (row, trits)) in piece.chunks(row_bytes).zip(trits.chunks_mut(columns)).enumerate() {
            unpack_row(row, format, i * rows + r, scale.unwrap_or(1.0), trits)
                .map_err(|problem| error(gguf, tensor, problem))?;
            filled += columns;
        }
        take(&trits[..filled], piece.len() as u64)?;
    }
    Ok(scale)
}
