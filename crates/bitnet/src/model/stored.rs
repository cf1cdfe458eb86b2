//! How ternary tensors lie in a GGUF file.

use super::config::{Config, LLAMA};
use bitnet_gguf::{Gguf, TensorInfo, TensorType};
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
        let scales = gguf.get(EXACT_SCALES).and_then(|value| value.as_array()?.f32s());
        let scales: Vec<f32> = scales.into_iter().flatten().collect();
        let fits = scales.len() == ternary.len();
        let names = ternary.iter().map(|tensor| tensor.name.as_str());
        Self(names.zip(scales).filter(|_| fits).collect())
    }

    /// The scale of a tensor, of which the file's own field says `stored`: that one, unless it is the rounded form of the
    /// exact one. None for a tensor of zeros without either.
    pub(crate) fn of(&self, tensor: &TensorInfo, format: RowFormat, stored: Option<f32>) -> Option<f32> {
        let exact = self.0.get(tensor.name.as_str()).copied().filter(|scale| scale.is_finite());
        let rounded = |exact: f32| format.stored_scale(exact).to_bits();
        let same = |stored: f32| exact.is_some_and(|exact| rounded(exact) == stored.to_bits());
        if stored.is_none_or(same) { exact } else { stored }
    }
}

/// The values of a tensor of float32.
pub(crate) fn floats<'a>(gguf: &'a Gguf, tensor: &TensorInfo) -> impl Iterator<Item = f32> + use<'a> {
    gguf.tensor_bytes(tensor).as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))
}

/// What speaks for the I2_S layout of ARM builds, which has the same type and size and decodes to nonsense: a tensor, and what
/// is wrong with it. Nothing in a file says which of the two it has, but its columns do: see [`pack::layout_z`].
pub(crate) fn arm_layout(gguf: &Gguf) -> Option<(&TensorInfo, String)> {
    // Enough rows for a density, of one layer in the middle.
    const ROWS: usize = 512;
    let layers = gguf.tensors().iter().filter(|tensor| tensor.name.ends_with(".ffn_down.weight")).count();
    let tensor = |part: &str| gguf.tensor(&format!("blk.{}.{part}.weight", layers / 2));
    let bytes = |part: &str| {
        let tensor = tensor(part).filter(|tensor| tensor.ty == TensorType::I2S)?;
        let columns = *tensor.dims.first()? as usize;
        Some((gguf.tensor_bytes(tensor).get(..tensor.n_elements() as usize / 4)?, columns))
    };
    // Where rows are not whole blocks the functions refuse, and there is no evidence to be had.
    let columns = |part: &str| {
        let (codes, columns) = bytes(part)?;
        pack::zero_columns(&codes[..codes.len().min(ROWS * columns / 4)], columns).ok()
    };
    let norm = |part: &str| {
        let tensor = tensor(part).filter(|tensor| tensor.ty == TensorType::F32)?;
        Some(floats(gguf, tensor).map(f32::abs).collect::<Vec<f32>>())
    };
    let down = columns("ffn_down");
    let gate_rows = bytes("ffn_gate").and_then(|(codes, columns)| pack::zero_rows(codes, columns).ok());
    let pairs = [
        (norm("attn_norm"), columns("attn_q")),
        (norm("attn_sub_norm"), columns("attn_output")),
        (norm("ffn_norm"), columns("ffn_gate")),
        (norm("ffn_sub_norm"), down.clone()),
        (gate_rows, down),
    ];
    let pairs: Vec<_> = pairs.iter().filter_map(|(a, b)| Some((a.as_deref()?, b.as_deref()?))).collect();
    let z = pack::layout_z(&pairs);
    let problem = format!(
        "the weights are in the I2_S layout of ARM builds (blocks of 64; the columns fit it with z = {z:.0}); \
         expected the published layout (blocks of 128): convert the model again on x86"
    );
    tensor("ffn_down").filter(|_| z < pack::ARM_LAYOUT_Z).map(|tensor| (tensor, problem))
}

/// Why a matrix of these dimensions, the fastest first, does not fill the blocks of a type of ternary weights.
pub(crate) fn misfit(dims: &[u64], ty: TensorType) -> Option<String> {
    let (block, weights, rows, hint) = match row_format(ty) {
        Some(format) => (format.block(), dims[0], "rows of ", ": use I2_S"),
        None => (pack::BLOCK, dims.iter().product(), "", ""),
    };
    (!weights.is_multiple_of(block as u64))
        .then(|| format!("{rows}{weights} weights do not fill the blocks of {block} of {ty}{hint}"))
}

/// The scale of a ternary tensor: that of the first row that has one. None for a tensor of zeros without any.
pub(crate) fn scale_of(
    gguf: &Gguf,
    tensor: &TensorInfo,
    exact: &ExactScales<'_>,
) -> Result<Option<f32>, String> {
    misfit(&tensor.dims, tensor.ty).map_or(Ok(()), Err)?;
    let bytes = gguf.tensor_bytes(tensor);
    let Some(format) = row_format(tensor.ty) else {
        let at = tensor.n_elements() / 4;
        let tail = bytes.get(at as usize..).and_then(|tail| tail.first_chunk());
        let (scale, at) = (f32::from_le_bytes(*tail.ok_or("too short for its scale")?), tensor.offset + at);
        let refusal = || format!("the scale at byte {at} is {scale}, expected a finite number");
        return scale.is_finite().then_some(Some(scale)).ok_or_else(refusal);
    };
    let columns = tensor.dims[0] as usize;
    let mut trits = vec![0; columns];
    let mut stored = None;
    for (r, row) in bytes.chunks_exact(format.row_bytes(columns)).enumerate() {
        stored = format.unpack_row(row, &mut trits).map_err(|e| format!("row {r}: {e}"))?;
        if stored.is_some() {
            break;
        }
    }
    let scale = exact.of(tensor, format, stored);
    scale.filter(|scale| !scale.is_finite()).map_or(Ok(scale), |scale| Err(format!("the scale is {scale}")))
}

/// The weights of row `r`, or of a part of it that has the form of a row. All rows must have the scale of the tensor.
pub(crate) fn unpack_row(
    row: &[u8],
    format: RowFormat,
    r: usize,
    scale: f32,
    trits: &mut [i8],
) -> Result<(), String> {
    let found = format.unpack_row(row, trits).map_err(|e| format!("row {r}: {e}"))?;
    let other = found.filter(|found| found.to_bits() != format.stored_scale(scale).to_bits());
    other.map_or(Ok(()), |found| {
        Err(format!("row {r}: its scale is {found}, others have {scale}: this is no BitNet"))
    })
}

/// Chunk `chunk` of row `r` as I2_S codes padded with zero weights.
pub(crate) fn row_chunk(
    source: &[u8],
    format: Option<RowFormat>,
    columns: usize,
    r: usize,
    chunk: usize,
    scale: f32,
) -> Result<[u8; CHUNK / 4], String> {
    let width = CHUNK.min(columns - CHUNK * chunk);
    let Some(format) = format else { return Ok(flat_chunk(source, r * columns + CHUNK * chunk, width)) };
    let row = format.row_bytes(columns);
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
    unpack_row(blocks, format, r, scale, &mut trits[..width])?;
    let codes = pack::pack_i2s(&trits).map_err(|e| format!("row {r}: {e}"))?;
    codes.first_chunk().copied().ok_or_else(|| "a short chunk".to_owned())
}

/// `width` of the weights that lie flat in the file, from number `first` on, padded.
fn flat_chunk(source: &[u8], first: usize, width: usize) -> [u8; CHUNK / 4] {
    const ZERO: u8 = 0x55;
    let mut codes = [ZERO; CHUNK / 4];
    if width == CHUNK && first.is_multiple_of(pack::BLOCK) {
        codes.copy_from_slice(&source[first / 4..][..CHUNK / 4]);
        return codes;
    }
    let place = |i: usize| (i / 128 * 32 + i % 32, 6 - 2 * (i % 128 / 32));
    // Runs of 32 weights share their shift in the source and in the target where both begin together.
    let run = if (first | width).is_multiple_of(32) { 32 } else { 1 };
    for i in (0..width).step_by(run) {
        let ((from, right), (to, left)) = (place(first + i), place(i));
        for (t, s) in codes[to..to + run].iter_mut().zip(&source[from..]) {
            *t = *t & !(3 << left) | (s >> right & 3) << left;
        }
    }
    codes
}
