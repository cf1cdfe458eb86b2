//! Ternary matrices and the exact integer product with int8 activations.
//!
//! A row of weights is stored as in I2_S: 32 bytes hold 128 weights, weight j of the block in byte j mod 32 at bit
//! 6 - 2 (j / 32), as -1, 0, +1 -> 0, 1, 2. Rows are padded with zero weights to a multiple of 256, two blocks, which
//! is one 64-byte register. The activations are permuted once, when they are quantised, to the order in which
//! those registers meet them ([`position`]), and the weights stay as they are in the file.
//!
//! A matrix whose input is mostly zeros is stored by [`columns`] instead, and its activations stay in order.

pub mod base3;
pub mod blocks;
pub mod columns;
pub(crate) mod lookup;
pub mod pack;
pub(crate) mod panel;
pub(crate) mod tiles;

use crate::isa::Isa;

/// Weights in a chunk: what 64 bytes hold. Rows are padded to a multiple of it.
pub const CHUNK: usize = 256;

/// How a matrix is stored, and in which order it takes its activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Row after row; activations in the order of [`position`].
    Rows,
    /// The same in fewer bits, as [`base3`] says.
    Base3,
    /// Column after column, as [`columns`] says; activations in their own order.
    Columns,
}

impl Layout {
    /// Bytes of a stored matrix.
    pub const fn bytes(self, rows: usize, columns: usize) -> usize {
        match self {
            Self::Rows => rows * row_bytes(columns),
            Self::Base3 => rows * base3::row_bytes(columns),
            Self::Columns => columns * columns::column_bytes(rows),
        }
    }
    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rows => "2bit",
            Self::Base3 => "base3",
            Self::Columns => "columns",
        }
    }
    /// Whether a matrix is stored by columns.
    pub const fn by_columns(self) -> bool {
        matches!(self, Self::Columns)
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

impl<'a> Activations<'a> {
    /// Those of the first tokens, and the others.
    #[inline(always)]
    fn split_at(&self, tokens: usize) -> (Self, Self) {
        let (codes, codes2) = self.codes.split_at(self.codes.len() / self.scales.len() * tokens);
        let ((scales, scales2), (sums, sums2)) = (self.scales.split_at(tokens), self.sums.split_at(tokens));
        (Self { codes, scales, sums }, Self { codes: codes2, scales: scales2, sums: sums2 })
    }
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
    /// These elements must be in bounds of the output and written by no one meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn values<'a>(self, token: usize, row: usize, count: usize) -> &'a [f32] {
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts(self.ptr.add(token * self.stride + row), count) }
    }
    /// # Safety
    /// The element must be in bounds of the output and written by no one else meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn write(self, token: usize, row: usize, value: f32) {
        // SAFETY: the caller's.
        unsafe { *self.ptr.add(token * self.stride + row) = value }
    }
}

/// Rows of weights as they are stored.
#[derive(Clone, Copy)]
pub(crate) struct StoredRows<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) row_bytes: usize,
    /// In the layout of [`base3`].
    pub(crate) base3: bool,
}

/// Which rows of a matrix are multiplied.
#[derive(Clone, Copy)]
pub(crate) enum Which<'a> {
    /// A run of rows, from the first.
    All { first: usize, count: usize },
    /// The first `count` of these rows; those after them are only asked for.
    Listed { list: &'a [u32], count: usize },
}

/// Most tokens that are multiplied row by row, and that share columns while these are in the cache; more are worth unpacking the weights
/// for, where products are not looked up ([`lookup::FEWEST`]).
pub(crate) const ROW_TOKENS: usize = 16;

/// Rows that are multiplied at a time, at most.
pub(crate) const STEP: usize = 4;

/// Multiplies rows of the stored matrix `w` with some tokens and writes row r of token t to `out` at (t, r), as
/// `(Σ w q) * (weight_scale / s)`. `plain` has room for [`STEP`] rows in two bits.
///
/// # Safety
/// `out` must have room for all those elements, and nobody else may touch them meanwhile.
#[inline(always)]
pub(crate) unsafe fn gemv_rows<I: Isa>(
    isa: I,
    w: StoredRows<'_>,
    which: Which<'_>,
    weight_scale: f32,
    a: Activations<'_>,
    plain: &mut [u8],
    out: OutPtr,
) {
    // SAFETY: the caller's contract, handed on.
    unsafe {
        match which {
            Which::All { first, count } => {
                let row = |i: usize| first + i;
                gemv_tokens(isa, w, count, row, false, weight_scale, a, plain, out);
            }
            Which::Listed { list, count } => {
                let row = |i: usize| list[i.min(list.len() - 1)] as usize;
                gemv_tokens(isa, w, count, row, true, weight_scale, a, plain, out);
            }
        }
    }
}

/// # Safety
/// As [`gemv`].
#[inline(always)]
unsafe fn gemv_tokens<I: Isa>(
    isa: I,
    w: StoredRows<'_>,
    count: usize,
    row: impl Fn(usize) -> usize + Copy,
    listed: bool,
    weight_scale: f32,
    a: Activations<'_>,
    plain: &mut [u8],
    out: OutPtr,
) {
    let (mut rest, mut out) = (a, out);
    while !rest.scales.is_empty() {
        let (a, after) = rest.split_at(rest.scales.len().min(8));
        // SAFETY: the caller's contract, handed on; a row of `out` begins with its token.
        unsafe {
            match a.scales.len() {
                1 => gemv::<I, STEP, 1>(isa, w, count, row, listed, weight_scale, a, plain, out),
                2 => gemv::<I, STEP, 2>(isa, w, count, row, listed, weight_scale, a, plain, out),
                3 => gemv::<I, 2, 3>(isa, w, count, row, listed, weight_scale, a, plain, out),
                4 => gemv::<I, 2, 4>(isa, w, count, row, listed, weight_scale, a, plain, out),
                5 => gemv::<I, 2, 5>(isa, w, count, row, listed, weight_scale, a, plain, out),
                6 => gemv::<I, 2, 6>(isa, w, count, row, listed, weight_scale, a, plain, out),
                7 => gemv::<I, 2, 7>(isa, w, count, row, listed, weight_scale, a, plain, out),
                _ => gemv::<I, 2, 8>(isa, w, count, row, listed, weight_scale, a, plain, out),
            }
            out.ptr = out.ptr.wrapping_add(a.scales.len() * out.stride);
        }
        rest = after;
    }
}

/// [`Isa::TILES`].
#[inline(always)]
pub(crate) fn has_tiles<I: Isa>(_: I) -> bool {
    I::TILES
}

/// Multiplies the outputs of `parts` with tokens of `a`: those from `t0` on by [`lookup`] where [`looks_up`] says so, else all, at most
/// a block of each part, by [`panel`]. `scratch` as there.
///
/// # Safety
/// As there.
#[inline(always)]
pub(crate) unsafe fn matmul<I: Isa>(
    isa: I,
    parts: &[panel::Part<'_>],
    a: Activations<'_>,
    t0: usize,
    scratch: &mut [u8],
) {
    // SAFETY: the caller's contract, handed on.
    unsafe {
        if I::LOOKS_UP {
            lookup::matmul(isa, parts, a, t0, scratch);
        } else {
            for part in parts {
                if part.count > 0 {
                    panel::matmul(isa, part, a, scratch);
                }
            }
        }
    }
}

/// [`Isa::LOOKS_UP`].
#[inline(always)]
pub(crate) fn looks_up<I: Isa>(_: I) -> bool {
    I::LOOKS_UP
}

/// R rows at a time with T tokens.
///
/// # Safety
/// As [`gemv_rows`], for the rows that `row` gives for all below `count`; past them it gives any.
#[inline(always)]
unsafe fn gemv<I: Isa, const R: usize, const T: usize>(
    isa: I,
    w: StoredRows<'_>,
    count: usize,
    row: impl Fn(usize) -> usize + Copy,
    listed: bool,
    weight_scale: f32,
    a: Activations<'_>,
    plain: &mut [u8],
    out: OutPtr,
) {
    let width = a.codes.len() / T;
    let mut codes = [&a.codes[..width]; T];
    let mut factors = [0.0; T];
    for t in 0..T {
        codes[t] = &a.codes[t * width..][..width];
        factors[t] = weight_scale / a.scales[t];
    }
    let ahead = isa.ahead().div_ceil(w.row_bytes).max(2);
    if w.base3 && T == 1 && isa.fast_base3() {
        // SAFETY: the caller's contract.
        return unsafe { isa.base3_dots(w, count, row, listed, codes[0], a.sums[0], factors[0], out) };
    }
    // SAFETY: the caller's contract.
    if T > 1 && unsafe { isa.row_tiles(w, count, row, codes, a.sums, factors, plain, out) } {
        return;
    }
    let put = |t: usize, i: usize, dot: i32| {
        // SAFETY: the caller's contract.
        unsafe { out.write(t, row(i), (dot - a.sums[t]) as f32 * factors[t]) }
    };
    let mut i = 0;
    while i + R <= count {
        let dots = dots::<I, R, T>(isa, w, |r| row(i + r), |r| row(i + ahead + r), codes, plain);
        for t in 0..T {
            for r in 0..R {
                put(t, i + r, dots[t][r]);
            }
        }
        i += R;
    }
    while i < count {
        let dots = dots::<I, 1, T>(isa, w, |_| row(i), |_| row(i + ahead), codes, plain);
        for t in 0..T {
            put(t, i, dots[t][0]);
        }
        i += 1;
    }
}

/// [`Isa::dot_tile`] of rows in either layout, `next` being those that are asked for.
#[inline(always)]
fn dots<I: Isa, const R: usize, const T: usize>(
    isa: I,
    w: StoredRows<'_>,
    row: impl Fn(usize) -> usize,
    next: impl Fn(usize) -> usize,
    codes: [&[i8]; T],
    plain: &mut [u8],
) -> [[i32; R]; T] {
    let stored = |r: usize| &w.bytes[row(r) * w.row_bytes..][..w.row_bytes];
    let ahead = |r: usize| w.bytes.as_ptr().wrapping_add(next(r) * w.row_bytes);
    let (mut rows, mut nexts) = ([stored(0); R], [ahead(0); R]);
    for r in 1..R {
        (rows[r], nexts[r]) = (stored(r), ahead(r));
    }
    if w.base3 {
        // Several tokens share what is unpacked once.
        let plain_bytes = codes[0].len() / 4;
        for (r, plain) in plain[..R * plain_bytes].chunks_exact_mut(plain_bytes).enumerate() {
            for line in 0..w.row_bytes / 64 {
                isa.prefetch(nexts[r].wrapping_add(64 * line));
            }
            isa.base3_unpack(rows[r], plain);
        }
        for r in 0..R {
            rows[r] = &plain[r * plain_bytes..][..plain_bytes];
            nexts[r] = rows[r].as_ptr();
        }
    }
    isa.dot_tile(rows, nexts, codes)
}
