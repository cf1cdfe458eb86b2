//! How ternary tensors lie in a GGUF file.

use bitnet_gguf::{Gguf, TensorInfo, TensorType, Value};
use bitnet_kernels::ternary::blocks::RowFormat;
use bitnet_kernels::ternary::{CHUNK, pack};
use std::collections::HashMap;

/// Key of the scales before they were rounded to f16: float32, one for each ternary tensor, in the order of the file's
/// directory. The types with f16 scales lose the digits that make a model give the same bits in every type; other
/// programs do not know the key and read the rounded scales.
pub(crate) const EXACT_SCALES: &str = "bitnet.exact_scales";

/// The encoding of a type that goes row by row.
pub(crate) fn row_format(ty: TensorType) -> Option<RowFormat> {
    match ty {
        TensorType::TQ1_0 => Some(RowFormat::TQ1_0),
        TensorType::TQ2_0 => Some(RowFormat::TQ2_0),
        TensorType::IQ1BN => Some(RowFormat::IQ1_BN),
        TensorType::IQ2BN => Some(RowFormat::IQ2_BN),
        _ => None,
    }
}

/// Whether a type holds ternary weights that can be read.
pub(crate) fn is_ternary(ty: TensorType) -> bool {
    ty == TensorType::I2S || row_format(ty).is_some()
}

/// The unrounded scales of a file; none where it has none, or not as many as tensors.
pub(crate) struct ExactScales<'a>(HashMap<&'a str, f32>);

impl<'a> ExactScales<'a> {
    pub(crate) fn read(gguf: &'a Gguf) -> Self {
        let ternary: Vec<_> = gguf.tensors().iter().filter(|tensor| is_ternary(tensor.ty)).collect();
        let scales = gguf.get(EXACT_SCALES).and_then(|value| value.as_array());
        let scales: Vec<_> = match scales {
            Some(array) if array.len() == ternary.len() => {
                array.f32s().map(Iterator::collect).unwrap_or_default()
            }
            _ => Vec::new(),
        };
        let names = ternary.iter().map(|tensor| tensor.name.as_str());
        Self(if scales.len() == ternary.len() { names.zip(scales).collect() } else { HashMap::new() })
    }

    /// The scale of a tensor, of which the file's own field says `stored`: that one, unless it is the rounded form of the
    /// exact one. None for a tensor of zeros without either.
    pub(crate) fn of(&self, tensor: &TensorInfo, format: RowFormat, stored: Option<f32>) -> Option<f32> {
        let exact = self.0.get(tensor.name.as_str()).copied().filter(|scale| scale.is_finite());
        match (stored, exact) {
            (Some(stored), Some(exact)) if format.stored_scale(exact).to_bits() == stored.to_bits() => {
                Some(exact)
            }
            (None, exact) => exact,
            (stored, _) => stored,
        }
    }
}

/// The key that [`ExactScales`] reads.
pub(crate) fn exact_scales(scales: &[f32]) -> impl Iterator<Item = Value<'static>> {
    scales.iter().map(|&scale| Value::F32(scale))
}

/// Chunk `chunk` of row `r` of a type that goes row by row, as I2_S codes padded with zero weights.
pub(crate) fn row_chunk(
    source: &[u8],
    format: RowFormat,
    columns: usize,
    r: usize,
    chunk: usize,
    scale: f32,
) -> Result<[u8; CHUNK / 4], String> {
    let row = format.row_bytes(columns);
    let width = CHUNK.min(columns - CHUNK * chunk);
    let prefix = format.row_bytes(0);
    let at = format.row_bytes(CHUNK * chunk);
    // The blocks of the chunk behind the scale of the row are a short row.
    let mut short = [0; 80];
    let len = format.row_bytes(width);
    short[..prefix].copy_from_slice(&source[r * row..][..prefix]);
    short[prefix..len].copy_from_slice(&source[r * row + at..][..len - prefix]);
    let mut trits = [0; CHUNK];
    let stored =
        format.unpack_row(&short[..len], &mut trits[..width]).map_err(|e| format!("row {r}: {e}"))?;
    if let Some(found) = stored.filter(|found| found.to_bits() != format.stored_scale(scale).to_bits()) {
        return Err(format!("row {r}: its scale is {found}, others have {scale}: this is no BitNet"));
    }
    let codes = pack::pack_i2s(&trits).map_err(|e| format!("row {r}: {e}"))?;
    codes.first_chunk().copied().ok_or_else(|| "a short chunk".to_owned())
}
