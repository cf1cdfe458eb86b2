//! How ternary tensors lie in a GGUF file.

use super::config::{Config, LLAMA};
use bitnet_gguf::{Gguf, TensorInfo, TensorType, Value};
use bitnet_kernels::ternary::blocks::RowFormat;
use bitnet_kernels::ternary::{CHUNK, pack};
use std::collections::HashMap;

/// Key of the scales before they were rounded to f16: float32, one for each ternary tensor, in the order of the file's
/// directory. The types with f16 scales lose the digits that make a model give the same bits in every type; other
/// programs do not know the key and read the rounded scales.
pub(crate) const EXACT_SCALES: &str = "bitnet.exact_scales";

/// The encoding of ternary weights in a type that goes row by row.
pub(crate) fn row_format(ty: TensorType) -> Option<RowFormat> {
    match ty {
        TensorType::TQ1_0 => Some(RowFormat::TQ1_0),
        TensorType::TQ2_0 => Some(RowFormat::TQ2_0),
        TensorType::IQ1BN => Some(RowFormat::IQ1_BN),
        TensorType::IQ2BN => Some(RowFormat::IQ2_BN),
        TensorType::F32 => Some(RowFormat::F32),
        TensorType::F16 => Some(RowFormat::F16),
        TensorType::BF16 => Some(RowFormat::BF16),
        _ => None,
    }
}

/// Whether a tensor holds ternary weights that can be read. Those of a projection may be floats.
pub(crate) fn is_ternary(tensor: &TensorInfo) -> bool {
    let projection = || {
        let part = tensor.name.strip_prefix("blk.").and_then(|name| name.strip_suffix(".weight"));
        part.and_then(|part| part.split_once('.')).is_some_and(|(_, part)| PROJECTIONS.contains(&part))
    };
    match row_format(tensor.ty) {
        Some(format) => !format.is_float() || projection(),
        None => tensor.ty == TensorType::I2S,
    }
}

/// The ternary matrices of a block.
const PROJECTIONS: [&str; 7] =
    ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];

/// The order of the rows of the query and key projections in llama.cpp's `llama`: RoPE rotates the adjacent rows 2i and
/// 2i + 1 of a head, where this engine and Hugging Face rotate i and i + half. The rows are put in the latter order as
/// they are loaded; scores of attention do not depend on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pairs {
    pub(crate) head_dim: usize,
    pub(crate) rope_dim: usize,
}

impl Pairs {
    /// Of a model, if it has that order.
    pub(crate) fn of(config: &Config) -> Option<Self> {
        let &Config { head_dim, rope_dim, .. } = config;
        (config.architecture == LLAMA).then_some(Self { head_dim, rope_dim })
    }

    /// The row of the file that is row `r` here.
    pub(crate) fn row(self, r: usize) -> usize {
        let (first, i, half) = (r - r % self.head_dim, r % self.head_dim, self.rope_dim / 2);
        first
            + if i < half {
                2 * i
            } else if i < 2 * half {
                2 * (i - half) + 1
            } else {
                i
            }
    }
}

/// The unrounded scales of a file; none where it has none, or not as many as tensors.
pub(crate) struct ExactScales<'a>(HashMap<&'a str, f32>);

impl<'a> ExactScales<'a> {
    pub(crate) fn read(gguf: &'a Gguf) -> Self {
        let ternary: Vec<_> = gguf.tensors().iter().filter(|tensor| is_ternary(tensor)).collect();
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
    let len = format.row_bytes(width);
    let mut blocks = &source[r * row + at - prefix..][..len];
    let mut short = [0; 80];
    if prefix > 0 {
        // The blocks of the chunk behind the scale of the row are a short row.
        short[..prefix].copy_from_slice(&source[r * row..][..prefix]);
        short[prefix..len].copy_from_slice(&blocks[prefix..]);
        blocks = &short[..len];
    }
    let mut trits = [0; CHUNK];
    let stored = format.unpack_row(blocks, &mut trits[..width]).map_err(|e| format!("row {r}: {e}"))?;
    if let Some(found) = stored.filter(|found| found.to_bits() != format.stored_scale(scale).to_bits()) {
        return Err(format!("row {r}: its scale is {found}, others have {scale}: this is no BitNet"));
    }
    let codes = pack::pack_i2s(&trits).map_err(|e| format!("row {r}: {e}"))?;
    codes.first_chunk().copied().ok_or_else(|| "a short chunk".to_owned())
}
