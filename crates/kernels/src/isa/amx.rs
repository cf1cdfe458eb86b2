//! AMX: eight tiles of sixteen rows of 64 bytes, and a product of two tiles in sixteen cycles. Only for several tokens at once.
//!
//! Sixteen stored rows, unpacked to a byte for each weight, are the first operand as they are; the second one is made of the
//! activations, once for all rows ([`crate::ternary::tiles`]). Columns are the second operand when four of them have been interleaved,
//! as in a panel, and rows of activations the first.

use super::PANEL;
use crate::ternary::tiles::{Dots, SIDE};
use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::OnceLock;

/// Bytes of a tile.
const TILE: usize = 64 * SIDE;

/// Tokens of a panel's product.
pub(super) const TOKENS: usize = 32;

/// Whether the CPU has AMX for int8 and the system lets this process use it, which is asked for here.
pub(super) fn enable() -> bool {
    static ENABLED: OnceLock<bool> = OnceLock::new();
    *ENABLED.get_or_init(|| {
        const AMX_TILE: u32 = 1 << 24;
        const AMX_INT8: u32 = 1 << 25;
        let leaf = __cpuid_count(0, 0).eax;
        let both = AMX_TILE | AMX_INT8;
        leaf >= 7 && __cpuid_count(7, 0).edx & both == both && request()
    })
}

/// Linux gives the tiles, eight kilobytes of state, only to who asks.
#[cfg(target_os = "linux")]
fn request() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and changes only what state the kernel saves for this process.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn request() -> bool {
    false
}

/// Fields of a byte of a row.
const FIELDS: usize = 4;

/// Palette 1, then row lengths, then numbers of rows.
#[repr(C, align(64))]
struct Config([u8; 64]);

/// Rows of 64 bytes: sixteen in every tile but 0, 1 and 4, which have `rows`.
///
/// # Safety
/// Needs AMX, allowed to the process. [`release`] must follow before anything else uses tiles.
#[inline(always)]
unsafe fn configure(rows: usize) {
    let mut config = Config([0; 64]);
    config.0[0] = 1;
    for tile in 0..8 {
        config.0[16 + 2 * tile] = 64;
        config.0[48 + tile] = if matches!(tile, 0 | 1 | 4) { rows as u8 } else { SIDE as u8 };
    }
    // SAFETY: the caller has AMX; the configuration is 64 valid bytes.
    unsafe { asm!("ldtilecfg [{}]", in(reg) config.0.as_ptr(), options(nostack, readonly)) }
}

/// # Safety
/// Needs AMX.
#[inline(always)]
unsafe fn release() {
    // SAFETY: the caller has AMX.
    unsafe { asm!("tilerelease", options(nostack, nomem)) }
}

/// `load!(tile, place, stride)`: rows of 64 bytes, so many bytes apart. Blocks of assembly stay in their order.
macro_rules! load {
    ($tile:literal, $from:expr, $stride:expr) => {
        asm!(concat!("tileloadd tmm", $tile, ", [{} + {}]"), in(reg) $from, in(reg) $stride, options(nostack, readonly))
    };
}
macro_rules! store {
    ($tile:literal, $to:expr, $stride:expr) => {
        asm!(concat!("tilestored [{} + {}], tmm", $tile), in(reg) $to, in(reg) $stride, options(nostack))
    };
}
macro_rules! zero {
    ($($tile:literal)*) => { $(asm!(concat!("tilezero tmm", $tile), options(nostack, nomem));)* };
}
/// Adds to the first tile the product of the second, unsigned (`us`) or signed (`su`), with the third.
macro_rules! multiply {
    ($signs:literal, $sum:literal, $a:literal, $b:literal) => {
        asm!(concat!("tdpb", $signs, "d tmm", $sum, ", tmm", $a, ", tmm", $b), options(nostack, nomem))
    };
}

/// Where weights are unpacked to: some tiles are multiplied while others are filled.
#[repr(C, align(64))]
struct Unpacked([MaybeUninit<u8>; 4 * TILE]);

/// The dot products of stored rows with every sixteen tokens in `tiles`: see [`super::Isa::tile_rows`].
///
/// # Safety
/// Needs AVX-512 F and BW, and AMX for int8, allowed to the process.
#[inline(always)]
pub(super) unsafe fn rows(
    w: &[u8],
    row_bytes: usize,
    tiles: &[i8],
    mut put: impl FnMut(usize, usize, &Dots),
) {
    let (chunks, count) = (row_bytes / 64, w.len() / row_bytes);
    let sixteen = chunks * FIELDS * TILE;
    assert!(row_bytes.is_multiple_of(64) && w.len() == count * row_bytes && count.is_multiple_of(SIDE));
    assert!(tiles.len().is_multiple_of(sixteen));
    let mut unpacked = Unpacked([MaybeUninit::uninit(); 4 * TILE]);
    // SAFETY: `first` and `rows` count rows of `w`, sixteens `t` those of `tiles`, all of whose pieces are there.
    unsafe {
        configure(SIDE);
        let all = tiles.len() / sixteen;
        for first in (0..count).step_by(4 * SIDE) {
            let end = count.min(first + 4 * SIDE);
            let mut t = 0;
            while t < all {
                let tokens = (all - t).min(2);
                let most = if tokens == 2 { 2 } else { 4 };
                let mut row = first;
                while row < end {
                    let w = w.as_ptr().add(row * row_bytes);
                    let (some, other) =
                        (tiles.as_ptr().add(t * sixteen), tiles.as_ptr().add((all - 1).min(t + 1) * sixteen));
                    let mut dots = MaybeUninit::<[Dots; 4]>::uninit();
                    let to: *mut Dots = dots.as_mut_ptr().cast();
                    let place: *mut u8 = unpacked.0.as_mut_ptr().cast();
                    let (rows, count) = if end - row < most * SIDE {
                        // A few rows are left.
                        block::<1, 1>(w, row_bytes, chunks, [some; 2], place, to);
                        if tokens == 2 {
                            block::<1, 1>(w, row_bytes, chunks, [other; 2], place, to.add(1));
                        }
                        (1, tokens)
                    } else if tokens == 2 {
                        block::<2, 2>(w, row_bytes, chunks, [some, other], place, to);
                        (2, 4)
                    } else {
                        block::<4, 1>(w, row_bytes, chunks, [some; 2], place, to);
                        (4, 4)
                    };
                    for i in 0..count {
                        let dots = &mut *to.add(i);
                        transpose(dots);
                        put((t + i % tokens) * SIDE, row + i / tokens * SIDE, dots);
                    }
                    row += rows * SIDE;
                }
                t += tokens;
            }
        }
        release();
    }
}

/// Writes the sums of `16 R` rows and `16 N` tokens to `dots`: (R, N) may be (4, 1), (2, 2), row after row, or (1, 1).
///
/// # Safety
/// As [`rows`]; `w` begins so many rows of `chunks` 64-byte chunks, and `tiles` the pieces of the first and the last sixteen tokens.
#[inline(always)]
unsafe fn block<const R: usize, const N: usize>(
    w: *const u8,
    row_bytes: usize,
    chunks: usize,
    tiles: [*const i8; 2],
    unpacked: *mut u8,
    dots: *mut Dots,
) {
    // SAFETY: step s unpacks field s % FIELDS of chunk s / FIELDS, which exists while there are steps.
    unsafe {
        zero!(0 1 2 3);
        let mask = _mm512_set1_epi8(3);
        let after = w.wrapping_add(R * SIDE * row_bytes);
        let sixteen = SIDE * row_bytes;
        // The rows that follow are asked for in a line, some with each unpacked tile.
        let mut asked = after.cast::<i8>();
        macro_rules! ask {
            () => {
                for _ in 0..SIDE / FIELDS {
                    _mm_prefetch::<_MM_HINT_T1>(asked);
                    asked = asked.wrapping_add(64);
                }
            };
        }
        // The place of the r-th sixteen rows of step s. All places together are 4 KiB: what is loaded is in no way of what is stored.
        let place = [0, 1, 2, 3].map(|i: usize| unpacked.wrapping_add(i * TILE));
        unpack(w, row_bytes, 0, mask, place[0]);
        if R > 1 {
            unpack(w.add(sixteen), row_bytes, 0, mask, place[1]);
        }
        for c in 0..chunks {
            let w = w.add(64 * c);
            for f in 0..FIELDS {
                let s = FIELDS * c + f;
                let b = tiles.map(|tile| tile.add(s * TILE));
                let (next, field) = if f + 1 < FIELDS { (w, f + 1) } else { (w.add(64), 0) };
                let more = f + 1 < FIELDS || c + 1 < chunks;
                load!(4, b[0], 64usize);
                if R == 4 {
                    ask!();
                    unpack(w.add(2 * sixteen), row_bytes, f, mask, place[2]);
                    load!(5, place[0], 64usize);
                    multiply!("us", 0, 5, 4);
                    ask!();
                    unpack(w.add(3 * sixteen), row_bytes, f, mask, place[3]);
                    load!(6, place[1], 64usize);
                    multiply!("us", 1, 6, 4);
                    if more {
                        unpack(next, row_bytes, field, mask, place[0]);
                    }
                    ask!();
                    load!(7, place[2], 64usize);
                    multiply!("us", 2, 7, 4);
                    if more {
                        unpack(next.add(sixteen), row_bytes, field, mask, place[1]);
                    }
                    ask!();
                    load!(5, place[3], 64usize);
                    multiply!("us", 3, 5, 4);
                    continue;
                }
                let (now, then) = (2 * (s % 2), 2 - 2 * (s % 2));
                if more {
                    unpack(next, row_bytes, field, mask, place[then]);
                }
                ask!();
                load!(6, place[now], 64usize);
                multiply!("us", 0, 6, 4);
                if N == 2 {
                    load!(5, b[1], 64usize);
                    ask!();
                    multiply!("us", 1, 6, 5);
                    if more {
                        unpack(next.add(sixteen), row_bytes, field, mask, place[then + 1]);
                    }
                    load!(7, place[now + 1], 64usize);
                    multiply!("us", 2, 7, 4);
                    multiply!("us", 3, 7, 5);
                }
            }
        }
        store!(0, dots, 64usize);
        if R * N == 4 {
            store!(1, dots.add(1), 64usize);
            store!(2, dots.add(2), 64usize);
            store!(3, dots.add(3), 64usize);
        }
    }
}

/// Unpacks a field of 64 bytes of each of sixteen rows.
///
/// # Safety
/// Needs AVX-512 F and BW, so many bytes in each row, and room for them.
#[inline(always)]
unsafe fn unpack(w: *const u8, row_bytes: usize, field: usize, mask: __m512i, to: *mut u8) {
    // SAFETY: the caller's contract.
    unsafe {
        match field {
            0 => unpack_shifted::<6>(w, row_bytes, mask, to),
            1 => unpack_shifted::<4>(w, row_bytes, mask, to),
            2 => unpack_shifted::<2>(w, row_bytes, mask, to),
            _ => unpack_shifted::<0>(w, row_bytes, mask, to),
        }
    }
}

/// # Safety
/// As [`unpack`].
#[inline(always)]
unsafe fn unpack_shifted<const SHIFT: u32>(w: *const u8, row_bytes: usize, mask: __m512i, to: *mut u8) {
    for r in 0..SIDE {
        // SAFETY: the caller's contract.
        unsafe {
            let v = _mm512_loadu_si512(w.add(r * row_bytes).cast());
            let v = _mm512_and_si512(_mm512_srli_epi16::<SHIFT>(v), mask);
            _mm512_store_si512(to.add(64 * r).cast(), v);
        }
    }
}

/// # Safety
/// Needs AVX-512F.
#[inline(always)]
unsafe fn transpose(dots: &mut Dots) {
    // SAFETY: the caller has AVX-512F; a row is one register.
    unsafe {
        let mut v = [_mm512_setzero_si512(); SIDE];
        for i in 0..SIDE {
            v[i] = _mm512_loadu_si512(dots[i].as_ptr().cast());
        }
        let v = super::avx512::transpose(v);
        for i in 0..SIDE {
            _mm512_storeu_si512(dots[i].as_mut_ptr().cast(), v[i]);
        }
    }
}

/// Lays out pieces of the codes of sixteen tokens: see [`super::Isa::tile_codes`].
///
/// # Safety
/// Needs AVX-512F.
#[inline(always)]
pub(super) unsafe fn tile_codes(rows: &[&[i8]], tiles: &mut [i8]) {
    let pieces = tiles.len() / TILE;
    assert!(rows.len() <= SIDE);
    for row in rows {
        assert!(row.len() == 64 * pieces);
    }
    for piece in 0..pieces {
        // SAFETY: the caller has AVX-512F; a row has 64 bytes for each piece, a tile sixteen times as many.
        unsafe {
            let mut v = [_mm512_setzero_si512(); SIDE];
            for i in 0..rows.len() {
                v[i] = _mm512_loadu_si512(rows[i].as_ptr().add(64 * piece).cast());
            }
            let to = tiles.as_mut_ptr().add(piece * TILE);
            let v = super::avx512::transpose(v);
            for i in 0..SIDE {
                _mm512_storeu_si512(to.add(64 * i).cast(), v[i]);
            }
        }
    }
}

/// Adds the columns `range` of a matrix stored by columns, each times its code, to the sums of each of up to sixteen tokens: see
/// [`super::Isa::tile_columns`].
///
/// # Safety
/// Needs AVX-512 F and BW, and AMX for int8, allowed to the process.
#[inline(always)]
pub(super) unsafe fn columns(
    w: &[u8],
    column_bytes: usize,
    range: Range<usize>,
    codes: &[i8],
    tokens: usize,
    sums: &mut [i32],
) {
    let (width, outputs) = (codes.len() / tokens, sums.len() / tokens);
    let (last, steps) = (w.len() / column_bytes - 1, range.len().div_ceil(64));
    assert!(column_bytes.is_multiple_of(64) && outputs == 4 * column_bytes && tokens <= SIDE);
    assert!(range.start + 64 * steps <= width && w.len() == (last + 1) * column_bytes);
    let mut unpacked = Unpacked([MaybeUninit::uninit(); 4 * TILE]);
    let first: *mut u8 = unpacked.0.as_mut_ptr().cast();
    let halves = [first, first.wrapping_add(2 * TILE)];
    // SAFETY: the loads of codes are 64 of each token below `width`; those of columns begin with one that exists; sums are loaded
    // and stored 32 for each token, below `outputs`.
    unsafe {
        configure(tokens);
        for part in 0..outputs / PANEL {
            let (chunk, field, high) = (part / 8, part % 8 / 2, part % 2 == 1);
            let mask = _mm512_set1_epi8((0xc0u8 >> (2 * field)) as i8);
            let sums = sums.as_mut_ptr().add(PANEL * part);
            load!(0, sums, 4 * outputs);
            load!(1, sums.add(SIDE), 4 * outputs);
            let line = w.as_ptr().add(64 * chunk);
            interleave(line, column_bytes, range.start, last, high, mask, halves[0]);
            for step in 0..steps {
                // The columns that follow are asked for in a line.
                let after = range.end * column_bytes + (part * steps + step) * 512;
                for i in 0..8 {
                    _mm_prefetch::<_MM_HINT_T1>(w.as_ptr().wrapping_add(after + 64 * i).cast());
                }
                if step + 1 < steps {
                    let to = halves[(step + 1) % 2];
                    interleave(line, column_bytes, range.start + 64 * (step + 1), last, high, mask, to);
                }
                load!(4, codes.as_ptr().add(range.start + 64 * step), width);
                load!(6, halves[step % 2], 64usize);
                load!(7, halves[step % 2].add(TILE), 64usize);
                multiply!("su", 0, 4, 6);
                multiply!("su", 1, 4, 7);
            }
            store!(0, sums, 4 * outputs);
            store!(1, sums.add(SIDE), 4 * outputs);
        }
        release();
    }
}

/// Interleaves 64 bytes of 64 columns from `first` on, four by four, and leaves two tiles of sixteen outputs each in their field.
///
/// # Safety
/// Needs AVX-512 F and BW, columns up to `last`, the last there is, and room for two tiles.
#[inline(always)]
unsafe fn interleave(
    w: *const u8,
    column_bytes: usize,
    first: usize,
    last: usize,
    high: bool,
    mask: __m512i,
    to: *mut u8,
) {
    for quad in 0..SIDE {
        // SAFETY: the caller's contract. Past the last column codes are zero.
        unsafe {
            let mut v = [mask; 4];
            for i in 0..4 {
                v[i] = _mm512_loadu_si512(w.add((first + 4 * quad + i).min(last) * column_bytes).cast());
            }
            let [a, b, c, d] = v;
            let (ab, cd) = if high {
                (_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d))
            } else {
                (_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d))
            };
            let (left, right) = (_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd));
            _mm512_store_si512(to.add(64 * quad).cast(), _mm512_and_si512(left, mask));
            _mm512_store_si512(to.add(TILE + 64 * quad).cast(), _mm512_and_si512(right, mask));
        }
    }
}

/// Writes the dot products of a panel with [`TOKENS`] rows of codes to `dots` (`[TOKENS][PANEL]`).
///
/// # Safety
/// Needs AMX for int8, allowed to the process, `quads` quads in the panel, a multiple of sixteen, and 4 `quads` codes in
/// each of the `TOKENS` rows of `a`.
#[inline(always)]
pub(super) unsafe fn panel_tile(panel: &[u8], a: &[&[i8]], quads: usize, dots: &mut [i32]) {
    assert!(a.len() == TOKENS && dots.len() == TOKENS * PANEL && quads >= 16);
    let stride = a[1].as_ptr() as usize - a[0].as_ptr() as usize;
    for i in 0..TOKENS {
        assert_eq!(a[i].as_ptr() as usize, a[0].as_ptr() as usize + i * stride, "rows at one distance");
    }
    // SAFETY: a step loads sixteen quads of both halves of the panel and 64 codes of each row; there are quads / 16 steps.
    // The stores are 32 rows of 128 bytes, which `dots` has.
    unsafe {
        configure(SIDE);
        zero!(0 1 2 3);
        let row = 4 * PANEL;
        for step in 0..quads / 16 {
            let panel = panel.as_ptr().add(16 * row * step);
            load!(4, a[0].as_ptr().add(64 * step), stride);
            load!(6, panel, row);
            load!(7, panel.add(64), row);
            multiply!("su", 0, 4, 6);
            multiply!("su", 1, 4, 7);
            load!(5, a[SIDE].as_ptr().add(64 * step), stride);
            multiply!("su", 2, 5, 6);
            multiply!("su", 3, 5, 7);
        }
        let dots = dots.as_mut_ptr();
        store!(0, dots, row);
        store!(1, dots.add(SIDE), row);
        store!(2, dots.add(SIDE * PANEL), row);
        store!(3, dots.add(SIDE * PANEL + SIDE), row);
        release();
    }
}
