//! Ternary matrices and the exact integer product with int8 activations.
//!
//! A row of weights is stored as in I2_S: 32 bytes hold 128 weights, weight j of the block in byte j mod 32 at bit
//! 6 - 2 (j / 32), as -1, 0, +1 -> 0, 1, 2. Rows are padded with zero weights to a multiple of 256, two blocks, which
//! is one 64-byte register. The activations are permuted once, when they are quantised, to the order in which
//! those registers meet them ([`position`]), and the weights stay as they are in the file.
//!
//! A matrix whose input is mostly zeros is stored by [`columns`] instead, and its activations stay in order.

pub mod columns;
pub mod pack;
pub(crate) mod panel;

use crate::isa::Isa;

/// Weights in a chunk: what 64 bytes hold. Rows are padded to a multiple of it.
pub const CHUNK: usize = 256;

/// How a matrix is stored, and in which order it takes its activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Row after row; activations in the order of [`position`].
    Rows,
    /// Column after column, as [`columns`] says; activations in their own order.
    Columns,
}

impl Layout {
    /// Bytes of a stored matrix.
    pub const fn bytes(self, rows: usize, columns: usize) -> usize {
        match self {
            Self::Rows => rows * row_bytes(columns),
            Self::Columns => columns * columns::column_bytes(rows),
        }
    }
}

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
    /// The elements from `row` on must be in bounds of the output and written by no one else meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn write_all(self, token: usize, row: usize, values: &[f32]) {
        // SAFETY: the caller's; `values` is a shared borrow and cannot be part of the output.
        unsafe {
            let to = self.ptr.add(token * self.stride + row);
            std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len());
        }
    }
    /// # Safety
    /// The element must be in bounds of the output and written by no one else meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn write(self, token: usize, row: usize, value: f32) {
        // SAFETY: the caller's.
        unsafe { *self.ptr.add(token * self.stride + row) = value }
    }
}

/// Which rows of a matrix are multiplied.
#[derive(Clone, Copy)]
pub(crate) enum Which<'a> {
    /// A run of rows, from the first.
    All { first: usize, count: usize },
    /// These rows.
    Listed(&'a [u32]),
}

/// Multiplies rows of the stored matrix `w` (each `row_bytes`) with one token and writes row r to `out` at (0, r), as
/// `(Σ w q) * (weight_scale / s)`.
///
/// # Safety
/// `out` must have room for all those elements, and nobody else may touch them meanwhile.
#[inline(always)]
pub(crate) unsafe fn gemv_rows<I: Isa>(
    isa: I,
    w: &[u8],
    row_bytes: usize,
    which: Which<'_>,
    weight_scale: f32,
    a: Activations<'_>,
    out: OutPtr,
) {
    // SAFETY: the caller's contract, handed on.
    unsafe {
        match which {
            Which::All { first, count } => {
                let w = &w[first * row_bytes..][..count * row_bytes];
                let row = |i: usize| (&w[i * row_bytes..][..row_bytes], first + i);
                gemv(isa, count, row, |_| (), weight_scale, a, out);
            }
            Which::Listed(list) => {
                let row = |i: usize| (&w[list[i] as usize * row_bytes..][..row_bytes], list[i] as usize);
                // The next rows are anywhere: ask for them while these are multiplied.
                let ask = |i: usize| {
                    let Some(&r) = list.get(i) else { return };
                    let at = w.as_ptr().wrapping_add(r as usize * row_bytes);
                    let mut line = 0;
                    while line < row_bytes {
                        isa.prefetch(at.wrapping_add(line));
                        line += 64;
                    }
                };
                gemv(isa, list.len(), row, ask, weight_scale, a, out);
            }
        }
    }
}

/// # Safety
/// As [`gemv_rows`], for the rows and places that `row` gives.
#[inline(always)]
unsafe fn gemv<'a, I: Isa>(
    isa: I,
    count: usize,
    row: impl Fn(usize) -> (&'a [u8], usize),
    ask: impl Fn(usize),
    weight_scale: f32,
    a: Activations<'_>,
    out: OutPtr,
) {
    let (factor, sum) = (weight_scale / a.scales[0], a.sums[0]);
    let put = |r: usize, dot: i32| {
        // SAFETY: the caller's contract.
        unsafe { out.write(0, r, (dot - sum) as f32 * factor) }
    };
    const AHEAD: usize = 8;
    for i in 0..AHEAD {
        ask(i);
    }
    let mut i = 0;
    while i + 4 <= count {
        for k in 0..4 {
            ask(i + AHEAD + k);
        }
        let rows = [row(i), row(i + 1), row(i + 2), row(i + 3)];
        let dots = isa.dot_rows([rows[0].0, rows[1].0, rows[2].0, rows[3].0], a.codes);
        for k in 0..4 {
            put(rows[k].1, dots[k]);
        }
        i += 4;
    }
    while i < count {
        let (w, r) = row(i);
        put(r, isa.dot_rows([w], a.codes)[0]);
        i += 1;
    }
}
