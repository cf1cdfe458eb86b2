//! The product with several tokens: unpacking weights into panels, and tiles of panels and tokens.

use super::{BASE, PANEL, Sum, dot};
use std::arch::aarch64::*;
use std::arch::asm;

/// Sixteen rows, of equal lengths, into outputs `16 half..` of a panel.
///
/// # Safety
/// Rows of whole 64 bytes, a panel for as many, and `half < PANEL / 16`.
#[inline(always)]
pub(super) unsafe fn unpack_rows(rows: [&[u8]; 16], panel: &mut [u8], half: usize) {
    // SAFETY: the loads are 16 bytes of a row, the stores 16 bytes of one of the 64 quads of a chunk, each 4 * PANEL
    // bytes, as the lengths allow.
    unsafe {
        let three = vdupq_n_u8(3);
        for block in 0..rows[0].len() / 16 {
            for four in 0..4 {
                let mut v = [vdupq_n_u32(0); 4];
                for r in 0..4 {
                    let at = rows[4 * four + r].as_ptr().add(16 * block);
                    v[r] = vreinterpretq_u32_u8(vld1q_u8(at));
                }
                let v = transpose(v);
                for d in 0..4 {
                    let quad = 64 * (block / 4) + 4 * (block % 4) + d;
                    let out = panel.as_mut_ptr().add(quad * 4 * PANEL + 64 * half + 16 * four);
                    let field = |f: usize| out.add(16 * f * 4 * PANEL);
                    vst1q_u8(field(0), vshrq_n_u8::<6>(v[d]));
                    vst1q_u8(field(1), vandq_u8(vshrq_n_u8::<4>(v[d]), three));
                    vst1q_u8(field(2), vandq_u8(vshrq_n_u8::<2>(v[d]), three));
                    vst1q_u8(field(3), vandq_u8(v[d], three));
                }
            }
        }
    }
}

/// Part `part` of eight of four columns into `4 * PANEL` codes.
///
/// # Safety
/// `codes` must have that length.
#[inline(always)]
pub(super) unsafe fn unpack_columns(columns: [&[u8; 64]; 4], part: usize, codes: &mut [u8]) {
    // SAFETY: each column has 64 bytes, `codes` room for the eight stores.
    unsafe {
        let down = vdupq_n_s8(2 * (part as i8 / 2) - 6);
        let three = vdupq_n_u8(3);
        for lane in 0..4 {
            let mut v = [three; 4];
            for i in 0..4 {
                v[i] = vld1q_u8(columns[i].as_ptr().add(16 * lane));
            }
            let (ab, cd) = if part.is_multiple_of(2) {
                (vzip1q_u8(v[0], v[1]), vzip1q_u8(v[2], v[3]))
            } else {
                (vzip2q_u8(v[0], v[1]), vzip2q_u8(v[2], v[3]))
            };
            let v = zip_pairs(ab, cd);
            for k in 0..2 {
                let out = codes.as_mut_ptr().add(64 * k + 16 * lane);
                vst1q_u8(out, vandq_u8(vshlq_u8(v[k], down), three));
            }
        }
    }
}

/// Transposes four registers of four 32-bit lanes.
///
/// # Safety
/// None beyond NEON, which every CPU of this target has.
#[inline(always)]
unsafe fn transpose(v: [uint32x4_t; 4]) -> [uint8x16_t; 4] {
    // SAFETY: no memory is touched.
    unsafe {
        let (ab0, ab1) =
            (vreinterpretq_u64_u32(vtrn1q_u32(v[0], v[1])), vreinterpretq_u64_u32(vtrn2q_u32(v[0], v[1])));
        let (cd0, cd1) =
            (vreinterpretq_u64_u32(vtrn1q_u32(v[2], v[3])), vreinterpretq_u64_u32(vtrn2q_u32(v[2], v[3])));
        [
            vreinterpretq_u8_u64(vzip1q_u64(ab0, cd0)),
            vreinterpretq_u8_u64(vzip1q_u64(ab1, cd1)),
            vreinterpretq_u8_u64(vzip2q_u64(ab0, cd0)),
            vreinterpretq_u8_u64(vzip2q_u64(ab1, cd1)),
        ]
    }
}

/// The pairs of bytes of `a` and `b` by turns.
///
/// # Safety
/// None beyond NEON, which every CPU of this target has.
#[inline(always)]
pub(super) unsafe fn zip_pairs(a: uint8x16_t, b: uint8x16_t) -> [uint8x16_t; 2] {
    // SAFETY: no memory is touched.
    unsafe {
        let (a, b) = (vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b));
        [vreinterpretq_u8_u16(vzip1q_u16(a, b)), vreinterpretq_u8_u16(vzip2q_u16(a, b))]
    }
}

/// Registers of four outputs that a tile of `tokens` sums at a time: enough sums to hide the latency of each, few enough for the
/// registers.
const fn tile_width(tokens: usize) -> usize {
    match tokens {
        1 | 2 => 8,
        4 => 4,
        _ => 2,
    }
}

/// Quads `start..end` of a panel and T tokens.
///
/// # Safety
/// Needs the extensions of `LEVEL`, and `end` quads in the panel and in each `a`; `start` and `end` are multiples of four.
/// In base NEON they are at most 127 apart.
#[inline(always)]
pub(super) unsafe fn tile<const LEVEL: u8, const T: usize>(
    panel: &[u8],
    a: [&[i8]; T],
    start: usize,
    end: usize,
    dots: &mut [[i32; PANEL]; T],
) {
    let n = if LEVEL == BASE { 2 } else { tile_width(T) };
    // SAFETY: quad i < end reads panel bytes below 128 i + 128 and codes below 4 i + 4; the last four outputs of a
    // register end at PANEL; the extensions are the caller's.
    unsafe {
        for part in 0..PANEL / (4 * n) {
            let mut sums = [[Sum::<LEVEL>::zero(); 8]; T];
            let weights = panel.as_ptr().add(16 * n * part);
            for i in (start..end).step_by(4) {
                let mut q = [vdupq_n_s8(0); T];
                for t in 0..T {
                    q[t] = vld1q_s8(a[t].as_ptr().add(4 * i));
                }
                macro_rules! quads {
                    ($($lane:literal)+) => {$(
                        for k in 0..n {
                            let w = vld1q_u8(weights.add(4 * PANEL * (i + $lane) + 16 * k));
                            for t in 0..T {
                                sums[t][k].add_lane::<$lane>(w, q[t]);
                            }
                        }
                    )+};
                }
                quads!(0 1 2 3);
            }
            for t in 0..T {
                for k in 0..n {
                    let out = dots[t].as_mut_ptr().add(4 * (n * part + k));
                    vst1q_s32(out, vaddq_s32(vld1q_s32(out), sums[t][k].lanes()));
                }
            }
        }
    }
}

/// Quads `start..end` of a panel and T tokens, an even number, by `smmla`: pairs of outputs times pairs of tokens.
///
/// # Safety
/// Needs i8mm, and `end` quads in the panel and in each `a`; `start` and `end` are multiples of four.
#[inline(always)]
pub(super) unsafe fn tile_smmla<const T: usize>(
    panel: &[u8],
    a: [&[i8]; T],
    start: usize,
    end: usize,
    dots: &mut [[i32; PANEL]; T],
) {
    let n = tile_width(T);
    // SAFETY: as in `tile`.
    unsafe {
        for part in 0..PANEL / (4 * n) {
            // Of T pairs of tokens only half exist.
            let mut sums = [[vdupq_n_s32(0); 16]; T];
            let weights = panel.as_ptr().add(16 * n * part);
            let mut i = start;
            while i < end {
                // Sixteen codes of each token; two tokens side by side, eight codes each.
                let mut q = [[vdupq_n_u64(0); 2]; T];
                for t in 0..T / 2 {
                    let low = vreinterpretq_u64_s8(vld1q_s8(a[2 * t].as_ptr().add(4 * i)));
                    let high = vreinterpretq_u64_s8(vld1q_s8(a[2 * t + 1].as_ptr().add(4 * i)));
                    q[t] = [vzip1q_u64(low, high), vzip2q_u64(low, high)];
                }
                for half in 0..2 {
                    for k in 0..n {
                        // Two quads of four outputs become eight codes each of two times two outputs.
                        let at = weights.add(4 * PANEL * (i + 2 * half) + 16 * k);
                        let low = vreinterpretq_u32_u8(vld1q_u8(at));
                        let high = vreinterpretq_u32_u8(vld1q_u8(at.add(4 * PANEL)));
                        let w = [vzip1q_u32(low, high), vzip2q_u32(low, high)];
                        for t in 0..T / 2 {
                            dot!("smmla", sums[t][2 * k], q[t][half], w[0]);
                            dot!("smmla", sums[t][2 * k + 1], q[t][half], w[1]);
                        }
                    }
                }
                i += 4;
            }
            for t in 0..T / 2 {
                for k in 0..n {
                    // Both halves of a sum are a token with two outputs.
                    let low = vreinterpretq_s64_s32(sums[t][2 * k]);
                    let high = vreinterpretq_s64_s32(sums[t][2 * k + 1]);
                    let four = [vzip1q_s64(low, high), vzip2q_s64(low, high)];
                    for j in 0..2 {
                        let out = dots[2 * t + j].as_mut_ptr().add(4 * (n * part + k));
                        vst1q_s32(out, vaddq_s32(vld1q_s32(out), vreinterpretq_s32_s64(four[j])));
                    }
                }
            }
        }
    }
}
