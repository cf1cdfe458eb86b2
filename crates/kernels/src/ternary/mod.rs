//! Ternary matrices and the exact integer product with int8 activations.
//!
//! A row of weights is stored as in I2_S: 32 bytes hold 128 weights, weight j of the block in byte j mod 32 at bit
//! 6 - 2 (j / 32), as -1, 0, +1 -> 0, 1, 2. Rows are padded with zero weights to a multiple of 256, two blocks, which
//! is one 64-byte register. The activations are permuted once, when they are quantised, to the order in which
//! those registers meet them ([`position`]), and the weights stay as they are in the file.

pub mod pack;

use crate::isa::Isa;

/// Weights in a chunk: what 64 bytes hold. Rows are padded to a multiple of it.
pub const CHUNK: usize = 256;

/// Bytes of a stored row of `columns` weights.
pub const fn row_bytes(columns: usize) -> usize {
    columns.div_ceil(CHUNK) * (CHUNK / 4)
}

/// Where activation `i` of a row stands in its permuted row: the four fields of a chunk follow each other, and in
/// each the 32 activations of the first block, then those of the second.
pub const fn position(i: usize) -> usize {
    let (chunk, block, field, byte) = (i / 256, i % 256 / 128, i % 128 / 32, i % 32);
    256 * chunk + 64 * field + 32 * block + byte
}

/// Quantised activations of several tokens, borrowed.
#[derive(Clone, Copy)]
pub(crate) struct Activations<'a> {
    /// `[tokens][row_bytes * 4]` int8 codes, permuted.
    pub(crate) codes: &'a [i8],
    /// 127 / max|x| of each token.
    pub(crate) scales: &'a [f32],
    /// Sum of the codes of each token.
    pub(crate) sums: &'a [i32],
}

/// Where a product goes: element (token, row) at `token * stride + row`.
#[derive(Clone, Copy)]
pub(crate) struct OutPtr {
    pub(crate) ptr: *mut f32,
    pub(crate) stride: usize,
}
// SAFETY: the pointer is only written through `write`, whose callers write disjoint elements.
unsafe impl Send for OutPtr {}
// SAFETY: as above.
unsafe impl Sync for OutPtr {}

impl OutPtr {
    /// # Safety
    /// The element must be in bounds of the output and written by no one else meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn write(self, token: usize, row: usize, value: f32) {
        // SAFETY: the caller's.
        unsafe { *self.ptr.add(token * self.stride + row) = value }
    }
}

/// Multiplies the stored rows `w` (each `row_bytes`) with every token of `a` and writes row r of token t to `out`
/// at (t, first_row + r), as `(Σ w q) * (weight_scale / s)`.
///
/// # Safety
/// `out` must have room for all those elements, and nobody else may touch them meanwhile.
#[inline(always)]
pub(crate) unsafe fn matmul_rows<I: Isa>(
    isa: I,
    w: &[u8],
    row_bytes: usize,
    weight_scale: f32,
    a: Activations<'_>,
    first_row: usize,
    out: OutPtr,
) {
    let tokens = a.scales.len();
    let mut t = 0;
    while t < tokens {
        let left = tokens - t;
        let step = if left >= 8 && I::TILE_TOKENS >= 8 {
            8
        } else if left >= 4 {
            4
        } else if left >= 2 {
            2
        } else {
            1
        };
        // SAFETY: the caller's contract, handed on.
        unsafe {
            match step {
                8 => token_tile::<I, 8>(isa, w, row_bytes, weight_scale, a, t, first_row, out),
                4 => token_tile::<I, 4>(isa, w, row_bytes, weight_scale, a, t, first_row, out),
                2 => token_tile::<I, 2>(isa, w, row_bytes, weight_scale, a, t, first_row, out),
                _ => token_tile::<I, 1>(isa, w, row_bytes, weight_scale, a, t, first_row, out),
            }
        }
        t += step;
    }
}

/// All rows of `w` against T tokens from `t0`, two rows at a time, or four where there is one token, or eight where the
/// instruction set asks for them.
///
/// # Safety
/// As [`matmul_rows`].
#[inline(always)]
unsafe fn token_tile<I: Isa, const T: usize>(
    isa: I,
    w: &[u8],
    row_bytes: usize,
    weight_scale: f32,
    a: Activations<'_>,
    t0: usize,
    first_row: usize,
    out: OutPtr,
) {
    let width = row_bytes * 4;
    let codes: [&[i8]; T] = std::array::from_fn(|t| &a.codes[(t0 + t) * width..][..width]);
    let factors: [f32; T] = std::array::from_fn(|t| weight_scale / a.scales[t0 + t]);
    let sums: [i32; T] = std::array::from_fn(|t| a.sums[t0 + t]);
    let rows = w.len() / row_bytes;
    let row = |r: usize| &w[r * row_bytes..][..row_bytes];
    let put = |r: usize, dots: [i32; T]| {
        for t in 0..T {
            // SAFETY: the caller's contract: (t0 + t, first_row + r) is ours and in bounds.
            unsafe { out.write(t0 + t, first_row + r, (dots[t] - sums[t]) as f32 * factors[t]) }
        }
    };
    let mut r = 0;
    while T == 1 && r + 4 <= rows {
        let dots = isa.dot_tile::<4, T>([row(r), row(r + 1), row(r + 2), row(r + 3)], codes);
        for i in 0..4 {
            put(r + i, dots[i]);
        }
        r += 4;
    }
    while I::TILE_ROWS >= 8 && T > 1 && r + 8 <= rows {
        let tile =
            [row(r), row(r + 1), row(r + 2), row(r + 3), row(r + 4), row(r + 5), row(r + 6), row(r + 7)];
        let dots = isa.dot_tile::<8, T>(tile, codes);
        for i in 0..8 {
            put(r + i, dots[i]);
        }
        r += 8;
    }
    while r + 2 <= rows {
        let [d0, d1] = isa.dot_tile::<2, T>([row(r), row(r + 1)], codes);
        put(r, d0);
        put(r + 1, d1);
        r += 2;
    }
    if r < rows {
        let [d0] = isa.dot_tile::<1, T>([row(r)], codes);
        put(r, d0);
    }
}
