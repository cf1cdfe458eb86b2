//! Instruction sets: one file each, all computing the same sixteen-lane definition.
//!
//! An [`Isa`] value is proof that the CPU has the instructions: it is made only after detection, or inside a
//! function compiled for them. Bodies in `ops` and `ternary` are written once, generic over `Isa`, and compiled
//! once for each set by the wrappers in `table`. Every method must be `#[inline(always)]`, so that it takes on the
//! features of the wrapper it is inlined into.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod ask;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod scalar;
#[cfg(target_arch = "x86_64")]
mod vbmi;

use crate::screen;
use crate::ternary::columns::{self, GROUP};
use crate::ternary::lookup::{self, LANES, Places, Quads};
use crate::ternary::panel::{self, PANEL};
use crate::ternary::tiles::Dots;
use crate::ternary::{OutPtr, StoredRows, base3};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Bytes of a stream that are asked for once more, ahead of those that are read: see [`Isa::prefetch_again`].
pub(crate) const SHORTLY: usize = 1 << 10;

/// Asks for the cache line at `p`, which need not be readable, to be brought to the second-level cache.
#[inline(always)]
pub(crate) fn prefetch_soon(p: *const u8) {
    // SAFETY: a prefetch reads nothing and never faults.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(p.cast());
    }
    // SAFETY: as above.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{}]", in(reg) p, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = p;
}

/// Primitives over sixteen float32 lanes, and the exact integer dot product.
///
/// Float operations are IEEE-754 single, each rounded once (no fused multiply-add). `max` is `if a > b { a } else
/// { b }`, lane by lane, so that a NaN in `a` gives `b` everywhere.
pub(crate) trait Isa: Copy {
    /// Sixteen float32 lanes.
    type F: Copy;
    /// Most tokens of a panel's tile whose sums fit the registers: one of 1, 2, 4, 6, 8, 32.
    const PANEL_TOKENS: usize;
    /// Whether two panels side by side make a better tile than one: of up to six tokens.
    const PANEL_PAIRS: bool = false;
    /// Sums of sixteen lanes that attention keeps at a time: about as many as fit the registers.
    const SUMS: usize = 8;
    /// Whether products with several tokens are looked up and not multiplied.
    const LOOKS_UP: bool = false;
    /// Whether the CPU multiplies whole tiles, as [`crate::ternary::tiles`] has them.
    const TILES: bool = false;
    /// Rows of a float tile of four tokens: 4, or 1 where sixty-four sums of four lanes are more than the registers hold.
    const HEAD_ROWS: usize = 4;
    /// The powers of two by which [`Isa::add_columns`] leaves the sums of each field too large.
    const COLUMN_SHIFTS: [u32; 4] = [6, 4, 2, 0];
    /// Whether to the sums of each field, so much too large, those of all later fields are added, each as it is too large.
    const COLUMN_NESTED: bool = false;

    /// Asks for the cache line at `p`, which need not be readable.
    fn prefetch(self, p: *const u8);
    /// Asks once more for the cache line at `p`, shortly before it is read, where that is faster.
    #[inline(always)]
    fn prefetch_again(self, _: *const u8) {}
    /// Bytes that are best asked for ahead of those that are read, of a stream.
    #[inline(always)]
    fn ahead(self) -> usize {
        5 << 10
    }
    /// The same for pages of the cache, which take longer to compute with.
    #[inline(always)]
    fn ahead_in_cache(self) -> usize {
        4 << 10
    }
    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; 16]) -> Self::F;
    fn store(self, v: Self::F, out: &mut [f32; 16]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    fn abs(self, a: Self::F) -> Self::F;
    /// To the nearest integer, halves to even.
    fn round(self, a: Self::F) -> Self::F;
    /// 2^n for integral lanes -126 <= n <= 127.
    fn pow2(self, n: Self::F) -> Self::F;
    /// IEEE half precision to single, exactly.
    fn f16_lanes(self, x: &[u16; 16]) -> Self::F;
    /// bfloat16 to single, exactly.
    fn bf16_lanes(self, x: &[u16; 16]) -> Self::F;
    /// Rounds to the nearest integer, halves to even, and clamps to int8. NaN becomes -128.
    fn to_i8(self, v: Self::F, out: &mut [i8; 16]);
    /// A bit for each lane: whether a >= b.
    #[inline(always)]
    fn at_least(self, a: Self::F, b: Self::F) -> u16 {
        let (mut x, mut y) = ([0.0; 16], [0.0; 16]);
        self.store(a, &mut x);
        self.store(b, &mut y);
        x.iter().zip(y).enumerate().fold(0, |mask, (i, (x, y))| mask | u16::from(*x >= y) << i)
    }
    /// A bit for each code: whether it is not 0.
    #[inline(always)]
    fn nonzero(self, codes: &[i8; 16]) -> u16 {
        codes.iter().enumerate().fold(0, |mask, (i, &code)| mask | u16::from(code != 0) << i)
    }
    /// Writes `first` + i to the front of `out` for every bit i that is set, in order, and returns their number; what follows them in
    /// `out` is lost.
    #[inline(always)]
    fn places(self, mask: u64, first: u32, out: &mut [MaybeUninit<u32>; 64]) -> usize {
        let mut count = 0;
        // Every place is written and stays if its bit is set: a branch would be guessed wrong too often.
        for part in (0..64).step_by(16) {
            let (mask, first) = (mask >> part, first + part);
            for i in 0..16 {
                out[count].write(first + i);
                count += (mask >> i & 1) as usize;
            }
        }
        count
    }
    /// Exact dot products of R stored rows with int8 codes: `Σ code · q` with the codes 0, 1, 2 as stored (not yet less
    /// one). Every row has the same multiple of 64 bytes, `a` four times as many codes in the order of
    /// [`crate::ternary::position`]. As much memory as the rows take is asked for at the places `ahead`.
    fn dot_rows<const R: usize>(self, w: [&[u8]; R], ahead: [*const u8; R], a: &[i8]) -> [i32; R];
    /// As [`Isa::dot_rows`] with T rows of codes.
    #[inline(always)]
    fn dot_tile<const R: usize, const T: usize>(
        self,
        w: [&[u8]; R],
        ahead: [*const u8; R],
        a: [&[i8]; T],
    ) -> [[i32; R]; T] {
        let mut dots = [[0; R]; T];
        for t in 0..T {
            dots[t] = self.dot_rows(w, ahead, a[t]);
        }
        dots
    }
    /// Whether rows in the layout of [`base3`] are multiplied about as fast as those in two bits.
    #[inline(always)]
    fn fast_base3(self) -> bool {
        false
    }
    /// Multiplies `count` rows in the layout of [`base3`] with one token's activations, where that is fast, and writes
    /// `(product - bias) * factor`. `row(i)` is the number of the i-th, or past the end that of any; they are a list or one after
    /// the other.
    ///
    /// # Safety
    /// As [`crate::ternary::gemv_rows`].
    #[inline(always)]
    unsafe fn base3_dots(
        self,
        _w: StoredRows<'_>,
        _count: usize,
        _row: impl Fn(usize) -> usize,
        _listed: bool,
        _a: &[i8],
        _bias: i32,
        _factor: f32,
        _out: OutPtr,
    ) {
        unreachable!("not fast")
    }
    /// Multiplies `count` rows, in two bits or in the layout of [`base3`], with the activations of T tokens, two to eight, as
    /// [`Isa::base3_dots`] does with one's, and returns true; or false where that is no faster than [`Isa::dot_tile`]. `plain` has room
    /// for [`crate::ternary::STEP`] rows in two bits.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn row_tiles<const T: usize>(
        self,
        _w: StoredRows<'_>,
        _count: usize,
        _row: impl Fn(usize) -> usize,
        _a: [&[i8]; T],
        _biases: &[i32],
        _factors: [f32; T],
        _plain: &mut [u8],
        _out: OutPtr,
    ) -> bool {
        false
    }
    /// Unpacks a row in the layout of [`base3`] to two bits.
    #[inline(always)]
    fn base3_unpack(self, row: &[u8], out: &mut [u8]) {
        base3::unpack(row, out);
    }
    /// Unpacks sixteen stored rows, of equal length, into outputs `16 half..` of a panel as long as they are.
    #[inline(always)]
    fn panel_rows(self, rows: [&[u8]; 16], panel: &mut [u8], half: usize) {
        panel::panel_rows(rows, panel, half);
    }
    /// Unpacks 32 outputs, the `part`-th of eight, from a chunk of four stored columns to `codes[4 * output + column]`.
    #[inline(always)]
    fn panel_columns(self, columns: [&[u8; 64]; 4], part: usize, codes: &mut [u8]) {
        panel::panel_columns(columns, part, codes);
    }
    /// Makes `dots` the exact dot products of the outputs of P panels with T rows of codes, in the panels' order of inputs.
    #[inline(always)]
    fn panel_tile<const T: usize, const P: usize>(
        self,
        panels: [&[u8]; P],
        a: [&[i8]; T],
        dots: &mut [[[i32; PANEL]; T]; P],
    ) {
        for p in 0..P {
            panel::panel_tile(panels[p], a, &mut dots[p]);
        }
    }
    /// With [`Isa::TILES`]: lays out the codes of up to sixteen tokens as [`crate::ternary::tiles`] says. Each has 64 bytes for each tile.
    #[inline(always)]
    fn tile_codes(self, _rows: &[&[i8]], _tiles: &mut [i8]) {
        unreachable!("no tiles")
    }
    /// With [`Isa::TILES`]: calls `put(t, r, dots)` with the exact dot products of tokens t to t + 15 (`dots[token][row]`) and rows r to
    /// r + 15, for all stored rows of `w`, a multiple of sixteen, and all tokens of `tiles`.
    #[inline(always)]
    fn tile_rows(self, _w: &[u8], _row_bytes: usize, _tiles: &[i8], _put: impl FnMut(usize, usize, &Dots)) {
        unreachable!("no tiles")
    }
    /// With [`Isa::TILES`]: adds the columns `range` of `w`, which begins with a multiple of 64, each times its code in `codes`
    /// (`[tokens][columns]`), to `sums` (`[tokens][outputs]`), as [`columns::add_columns`] says. Up to sixteen tokens; past the last
    /// column their codes are zero.
    #[inline(always)]
    fn tile_columns(
        self,
        _w: &[u8],
        _column_bytes: usize,
        _range: Range<usize>,
        _codes: &[i8],
        _tokens: usize,
        _sums: &mut [i32],
    ) {
        unreachable!("no tiles")
    }
    /// Makes rows columns.
    #[inline(always)]
    fn transpose(self, rows: &[[i8; LANES]; LANES], out: &mut [[i8; LANES]; LANES]) {
        for i in 0..LANES {
            for j in 0..LANES {
                out[i][j] = rows[j][i];
            }
        }
    }
    /// Fills the tables of a step of [`lookup`]: row d0 + 3 d1 + 9 d2 + 27 d3 of group g has for each token the sum of (d - 1) q, the
    /// inputs of d0 to d3 being g of each of the quads.
    #[inline(always)]
    fn fill_tables(self, quads: Quads<'_>, tables: &mut [[i16; LANES]]) {
        lookup::fill_tables(quads, tables);
    }
    /// Adds to the sums of each output, a lane being a token, the rows at its places in the tables, wrapping.
    ///
    /// # Safety
    /// The tables must be those of [`lookup`], and every place that of one of the first 128 rows from a table's first on.
    #[inline(always)]
    unsafe fn add_looked_up(self, tables: &[[i16; LANES]], places: &[Places], sums: &mut [[i16; LANES]]) {
        lookup::add_looked_up(tables, places, sums);
    }
    /// Adds eight stored columns, each times its factor, to `sums` as [`columns::add_columns`] says. As much memory as they take is
    /// asked for at those of `ahead`, at the first, which come next, once more.
    #[inline(always)]
    fn add_columns(
        self,
        columns: [&[u8]; GROUP],
        _ahead: [[*const u8; GROUP]; 2],
        q: [i8; GROUP],
        sums: &mut [i32],
    ) {
        columns::add_group(columns, q, sums);
    }
    /// Exact dot products of R rows of four-bit codes, in the layout of [`crate::screen`], with T rows of int8. All have
    /// whole chunks of 64 bytes and 128 codes. `ahead`: as above.
    #[inline(always)]
    fn nibble_dots<const R: usize, const T: usize>(
        self,
        w: [&[u8]; R],
        _ahead: [*const u8; R],
        q: [&[i8]; T],
    ) -> [[i32; R]; T] {
        screen::nibble_dots(w, q)
    }
    /// Integer dot products of P runs of stored bytes, unsigned, with Q rows of numbers that have a high and a low part, every
    /// row having four of each for a block of 64 bytes. With H and L the sum over blocks c and i < 4 of `codes[c][4 j + i]`
    /// times the part at `4 c + i`, begun with `start`, lane j is 128 · H + L: H and L exact in 32 bits (which must hold
    /// them), then made float32 and summed, each step rounded.
    /// Meanwhile it asks for the bytes from each `far` on, which need not be readable, [`crate::attention::FETCH`] a block.
    fn dot_split<const Q: usize, const P: usize>(
        self,
        codes: [&[[u8; 64]]; P],
        rows: [[&[i8]; 2]; Q],
        start: [[i32; 2]; Q],
        far: [*const u8; P],
    ) -> [[Self::F; Q]; P];
}

/// Methods of [`Isa`] that are one operation each, applied to all registers by the macro `$each`.
macro_rules! lanes {
    ($each:ident: $($name:ident($($x:ident),+) = $op:expr;)+) => {$(
        #[inline(always)]
        fn $name(self, $($x: Self::F),+) -> Self::F {
            $each!($op, $($x),+)
        }
    )+};
}
use lanes;

/// Checks the lengths that [`Isa::dot_rows`] relies on. Returns the number of 64-byte chunks of a row.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
fn row_chunks<const R: usize>(w: [&[u8]; R], a: &[i8]) -> usize {
    let bytes = w[0].len();
    for w in w {
        assert_eq!(w.len(), bytes);
    }
    assert_eq!(a.len(), bytes * 4);
    assert_eq!(bytes % 64, 0);
    bytes / 64
}

/// Checks the lengths that [`Isa::dot_split`] relies on.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
fn check_split<const Q: usize, const P: usize>(codes: [&[[u8; 64]]; P], rows: [[&[i8]; 2]; Q]) {
    let len = codes[0].len();
    for codes in codes {
        assert_eq!(codes.len(), len);
    }
    for [high, low] in rows {
        assert!(high.len() == 4 * len && low.len() == 4 * len);
    }
}

/// Checks the lengths that [`Isa::panel_tile`] relies on. Returns the number of quads of inputs.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
fn panel_quads<const T: usize, const P: usize>(panels: [&[u8]; P], a: [&[i8]; T]) -> usize {
    let quads = panels[0].len() / (4 * PANEL);
    for panel in panels {
        assert_eq!(panel.len(), 4 * PANEL * quads);
    }
    for a in a {
        assert_eq!(a.len(), 4 * quads);
    }
    // Rows end with a whole chunk.
    assert!(quads.is_multiple_of(4));
    quads
}

/// Checks the lengths that [`Isa::add_columns`] relies on. Returns the number of chunks of a column.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
fn column_chunks(columns: [&[u8]; GROUP], sums: &[i32]) -> usize {
    let chunks = sums.len() / 256;
    for column in columns {
        assert_eq!(column.len(), 64 * chunks);
    }
    chunks
}

/// Checks the lengths that [`Isa::nibble_dots`] relies on. Returns the number of chunks of a row.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
fn nibble_chunks<const R: usize, const T: usize>(w: [&[u8]; R], q: [&[i8]; T]) -> usize {
    let chunks = w[0].len() / 64;
    for w in w {
        assert_eq!(w.len(), 64 * chunks);
    }
    for q in q {
        assert_eq!(q.len(), 128 * chunks);
    }
    chunks
}
