//! The product with several tokens where the CPU multiplies tiles ([`Isa::TILES`]): sixteen rows of weights with sixteen tokens.
//!
//! The activations of sixteen tokens are laid out once as the tiles that are multiplied: a piece of 64 codes of each token is
//! 1 KiB, byte `(i / 4 * 16 + token) * 4 + i % 4` being code i, zero where tokens are fewer; the pieces of sixteen tokens follow each other. Rows of
//! weights are unpacked sixteen at a time, a field at a time, while those before are multiplied: no shuffling is needed, and
//! what is unpacked never leaves the first-level cache.

use super::{Activations, OutPtr, StoredRows, Which};
use crate::isa::Isa;

/// Rows and tokens of a tile.
pub(crate) const SIDE: usize = 16;

/// Least tokens for which tiles pay: fewer share what they read row by row, and leave out what none of them needs.
pub(crate) const FEWEST: usize = 4;

/// Most tokens that are multiplied with tiles of a matrix stored by columns.
pub(crate) const COLUMN_TOKENS: usize = SIDE;

/// Sums of sixteen outputs for each of sixteen tokens.
pub(crate) type Dots = [[i32; SIDE]; SIDE];

/// Multiplies the stored rows `w`, outputs `first` and following, with the tokens of `a`, whose codes are also in `tiles`, and
/// writes output o of token t to `out` at (t, o), as `(Σ w q) * (weight_scale / s)`.
///
/// # Safety
/// `out` must have room for all those elements, and nobody else may touch them meanwhile.
#[inline(always)]
pub(crate) unsafe fn matmul<I: Isa>(
    isa: I,
    w: &[u8],
    row_bytes: usize,
    first: usize,
    weight_scale: f32,
    a: Activations<'_>,
    tiles: &[i8],
    out: OutPtr,
) {
    let tokens = a.scales.len();
    let (whole, rest) = w.split_at(w.len() / row_bytes / SIDE * SIDE * row_bytes);
    isa.tile_rows(whole, row_bytes, tiles, |t0, row, dots| {
        for (t, dots) in (t0..tokens).zip(dots) {
            let (sum, factor) = (a.sums[t], weight_scale / a.scales[t]);
            let mut y = [0.0; SIDE];
            for r in 0..SIDE {
                y[r] = (dots[r] - sum) as f32 * factor;
            }
            // SAFETY: the caller's contract: these outputs of this token are ours and in bounds.
            unsafe { out.write_all(t, first + row, &y) }
        }
    });
    let count = rest.len() / row_bytes;
    if count > 0 {
        // SAFETY: the caller's contract; these rows are counted from the first of `rest`.
        unsafe {
            let out = OutPtr { ptr: out.ptr.add(first + whole.len() / row_bytes), stride: out.stride };
            let rows = StoredRows { bytes: rest, row_bytes, base3: false };
            super::gemv_rows(isa, rows, Which::All { first: 0, count }, weight_scale, a, &mut [], out);
        }
    }
}
