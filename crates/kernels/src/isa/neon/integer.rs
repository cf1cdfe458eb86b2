//! Integer products with one token: stored rows, stored columns, four-bit rows, and the two parts of a 15-bit number.

use super::panel::zip_pairs;
use super::{BASE, GROUP, Sum, ask, dot};
use crate::attention::FETCH;
use std::arch::aarch64::*;
use std::arch::asm;

/// R rows, one after the other so that memory is read as one stream, and T tokens, N at a time.
///
/// # Safety
/// As [`dot`].
#[inline(always)]
pub(super) unsafe fn dots<const LEVEL: u8, const R: usize, const T: usize, const N: usize>(
    w: [&[u8]; R],
    ahead: [*const u8; R],
    a: [&[i8]; T],
    chunks: usize,
    out: &mut [[i32; R]; T],
) {
    for t in (0..T).step_by(N) {
        // The last ones may have company of the last alone.
        let mut some = [a[t]; N];
        for i in 1..N {
            some[i] = a[(t + i).min(T - 1)];
        }
        for r in 0..R {
            // SAFETY: the caller's contract, handed on.
            let dots = unsafe { dot::<LEVEL, N>(w[r], ahead[r], some, chunks) };
            for i in 0..N.min(T - t) {
                out[t + i][r] = dots[i];
            }
        }
    }
}

/// One row and T tokens, each with as many codes. The fields of the low six bits are multiplied where they stand in
/// the byte (as 1, 4 or 16 times the code, so at most 32), each into sums of its own, and only these are shifted: a field
/// costs one instruction to take out. A lane of int32 grows by at most 8 * 32 * 128 in each sum of a chunk, which stays
/// below 2^31 for rows of sixteen million weights.
///
/// # Safety
/// Needs the extensions of `LEVEL`, 64 `chunks` bytes in `w` and 256 `chunks` codes in each `a`. In base NEON T must be 1.
#[inline(always)]
unsafe fn dot<const LEVEL: u8, const T: usize>(
    w: &[u8],
    ahead: *const u8,
    a: [&[i8]; T],
    chunks: usize,
) -> [i32; T] {
    // Two sums a field, taken in turn, hide the latency of each where there are no other tokens to do it.
    let turns = if T == 1 { 2 } else { 1 };
    // A chunk adds two products of at most 32 * 128 to a lane of field 1, so those of four chunks fit int16, and those of
    // sixteen chunks in the other fields.
    let (few, many) = if LEVEL == BASE { (4, 16) } else { (chunks, chunks) };
    // SAFETY: chunk c < chunks reads weights below 64 c + 64 and codes below 256 c + 256; the extensions are the caller's.
    unsafe {
        let masks = [vdupq_n_u8(0x30), vdupq_n_u8(0x0c), vdupq_n_u8(0x03)];
        let mut fields = [[vdupq_n_s32(0); 4]; T];
        let mut c = 0;
        while c < chunks {
            let mut sums = [[[Sum::<LEVEL>::zero(); 2]; 4]; T];
            let end = (c + many).min(chunks);
            while c < end {
                for c in c..(c + few).min(end) {
                    ask(ahead.wrapping_add(64 * c));
                    for i in 0..4 {
                        let v = vld1q_u8(w.as_ptr().add(64 * c + 16 * i));
                        for field in 0..4 {
                            let codes = field_of(v, field, masks);
                            for t in 0..T {
                                let q = vld1q_s8(a[t].as_ptr().add(256 * c + 64 * field + 16 * i));
                                sums[t][field][i % turns].add(codes, q);
                            }
                        }
                    }
                }
                c += few;
                for t in 0..T {
                    for turn in 0..2 {
                        sums[t][1][turn].drain(&mut fields[t][1]);
                    }
                }
            }
            for t in 0..T {
                for field in [0, 2, 3] {
                    for turn in 0..2 {
                        sums[t][field][turn].drain(&mut fields[t][field]);
                    }
                }
            }
        }
        // Exact shifts: a field's lane is a multiple of its place.
        fields.map(|fields| {
            let inner = vaddq_s32(vshrq_n_s32::<4>(fields[1]), vshrq_n_s32::<2>(fields[2]));
            vaddvq_s32(vaddq_s32(inner, vaddq_s32(fields[0], fields[3])))
        })
    }
}

/// R rows of four-bit codes and T rows of int8.
///
/// # Safety
/// Needs the extensions of `LEVEL`, 64 `chunks` bytes in each `w` and 128 `chunks` codes in each `q`.
#[inline(always)]
pub(super) unsafe fn nibbles<const LEVEL: u8, const R: usize, const T: usize>(
    w: [&[u8]; R],
    ahead: [*const u8; R],
    q: [&[i8]; T],
    chunks: usize,
) -> [[i32; R]; T] {
    // A chunk adds two products of at most 15 * 128 to a lane, so those of eight chunks fit int16.
    let block = if LEVEL == BASE { 8 } else { chunks };
    // SAFETY: chunk c < chunks reads weights below 64 c + 64 and codes below 128 c + 128; the extensions are the caller's.
    unsafe {
        let mask = vdupq_n_u8(15);
        let mut planes = [[vdupq_n_s32(0); R]; T];
        let mut sums = [[[Sum::<LEVEL>::zero(); 4]; R]; T];
        let mut c = 0;
        while c < chunks {
            for c in c..(c + block).min(chunks) {
                for r in 0..R {
                    ask(ahead[r].wrapping_add(64 * c));
                }
                for i in 0..4 {
                    let mut codes = [[mask; 2]; R];
                    for r in 0..R {
                        let v = vld1q_u8(w[r].as_ptr().add(64 * c + 16 * i));
                        codes[r] = [vandq_u8(v, mask), vshrq_n_u8::<4>(v)];
                    }
                    for plane in 0..T {
                        for half in 0..2 {
                            let q = vld1q_s8(q[plane].as_ptr().add(128 * c + 64 * half + 16 * i));
                            for r in 0..R {
                                sums[plane][r][2 * half + i % 2].add(codes[r][half], q);
                            }
                        }
                    }
                }
            }
            c += block;
            for plane in 0..T {
                for r in 0..R {
                    for turn in 0..4 {
                        sums[plane][r][turn].drain(&mut planes[plane][r]);
                    }
                }
            }
        }
        planes.map(|rows| rows.map(|plane| vaddvq_s32(plane)))
    }
}

/// One run and R rows of [`Isa::dot_split`](super::Isa::dot_split), asking for the bytes from `far` on meanwhile.
///
/// # Safety
/// Needs the extensions of `LEVEL`, and four numbers of each row for a block of codes.
#[inline(always)]
pub(super) unsafe fn split<const LEVEL: u8, const R: usize>(
    codes: &[[u8; 64]],
    rows: [[&[i8]; 2]; R],
    start: [[i32; 2]; R],
    far: Option<*const u8>,
) -> [[float32x4_t; 4]; R] {
    // SAFETY: block c reads its 64 codes and the parts below 4 c + 4, which exist; the extensions are the caller's.
    unsafe {
        let mut sums = [[[vdupq_n_s32(0); 4]; 2]; R];
        for r in 0..R {
            for part in 0..2 {
                // The codes less 128 are signed: what that takes from the sums is added here.
                let all = rows[r][part].iter().fold(0i32, |sum, &x| sum.wrapping_add(i32::from(x)));
                sums[r][part] = [vdupq_n_s32(start[r][part].wrapping_add(all.wrapping_mul(128))); 4];
            }
        }
        let less = vdupq_n_u8(0x80);
        for c in 0..codes.len() {
            if let Some(far) = far {
                ask(far.wrapping_add(FETCH * c));
            }
            let mut fours = [[vdupq_n_s8(0); 2]; R];
            for r in 0..R {
                for part in 0..2 {
                    let four = rows[r][part].as_ptr().add(4 * c).cast::<i32>().read_unaligned();
                    fours[r][part] = vreinterpretq_s8_s32(vdupq_n_s32(four));
                }
            }
            for i in 0..4 {
                let v = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(codes[c].as_ptr().add(16 * i)), less));
                for r in 0..R {
                    for part in 0..2 {
                        let (sum, four) = (&mut sums[r][part][i], fours[r][part]);
                        if LEVEL == BASE {
                            let lo = vpaddlq_s16(vmull_s8(vget_low_s8(v), vget_low_s8(four)));
                            let hi = vpaddlq_s16(vmull_high_s8(v, four));
                            *sum = vaddq_s32(*sum, vpaddq_s32(lo, hi));
                        } else {
                            dot!("sdot", *sum, v, four);
                        }
                    }
                }
            }
        }
        let mut out = [[vdupq_n_f32(0.0); 4]; R];
        for r in 0..R {
            for i in 0..4 {
                let high = vmulq_f32(vcvtq_f32_s32(sums[r][0][i]), vdupq_n_f32(128.0));
                out[r][i] = vaddq_f32(high, vcvtq_f32_s32(sums[r][1][i]));
            }
        }
        out
    }
}

/// The codes of a field, times 1, 16, 4 or 1: those of the low six bits stay where they stand in the byte, so that each
/// field costs one instruction. `masks` are those of the last three.
///
/// # Safety
/// None beyond NEON, which every CPU of this target has.
#[inline(always)]
unsafe fn field_of(v: uint8x16_t, field: usize, masks: [uint8x16_t; 3]) -> uint8x16_t {
    // SAFETY: no memory is touched.
    unsafe { if field == 0 { vshrq_n_u8::<6>(v) } else { vandq_u8(v, masks[field - 1]) } }
}

/// Eight columns by `sdot`.
///
/// # Safety
/// Needs dotprod, `chunks` chunks in each column and 256 `chunks` sums.
#[inline(always)]
pub(super) unsafe fn columns_sdot(
    columns: [&[u8]; GROUP],
    ahead: [*const u8; GROUP],
    q: [i8; GROUP],
    chunks: usize,
    sums: &mut [i32],
) {
    // SAFETY: chunk c < chunks reads bytes below 64 c + 64 of a column and sums below 256 c + 256; the extensions are the
    // caller's.
    unsafe {
        let masks = [vdupq_n_u8(0x30), vdupq_n_u8(0x0c), vdupq_n_u8(0x03)];
        // A register for both: with one for each four the compiler runs out of them.
        let factors = vcombine_s8(vld1_s8(q.as_ptr()), vdup_n_s8(0));
        for c in 0..chunks {
            for ahead in ahead {
                ask(ahead.wrapping_add(64 * c));
            }
            // Two lanes at a time, so that neighbours are loaded and stored in pairs.
            for pair in 0..2 {
                // v[lane][quad][x]: four outputs, the four columns of the quad side by side.
                let mut v = [[[masks[0]; 4]; 2]; 2];
                for quad in 0..2 {
                    let mut lines = [[masks[0]; 4]; 2];
                    for i in 0..4 {
                        for lane in 0..2 {
                            let at = 64 * c + 32 * pair + 16 * lane;
                            lines[lane][i] = vld1q_u8(columns[4 * quad + i].as_ptr().add(at));
                        }
                    }
                    for lane in 0..2 {
                        let [a, b, c, d] = lines[lane];
                        let low = zip_pairs(vzip1q_u8(a, b), vzip1q_u8(c, d));
                        let high = zip_pairs(vzip2q_u8(a, b), vzip2q_u8(c, d));
                        v[lane][quad] = [low[0], low[1], high[0], high[1]];
                    }
                }
                macro_rules! outputs {
                    ($($x:literal)+) => {$(
                        for field in 0..4 {
                            let out = sums.as_mut_ptr().add(256 * c + 64 * field + 16 * $x + 8 * pair);
                            let mut sum = [vld1q_s32(out), vld1q_s32(out.add(4))];
                            for lane in 0..2 {
                                let [first, second] = v[lane];
                                dot!("sdot", sum[lane], field_of(first[$x], field, masks), factors, 0);
                                dot!("sdot", sum[lane], field_of(second[$x], field, masks), factors, 1);
                            }
                            vst1q_s32(out, sum[0]);
                            vst1q_s32(out.add(4), sum[1]);
                        }
                    )+};
                }
                outputs!(0 1 2 3);
            }
        }
    }
}

/// Eight columns by products in int16.
///
/// # Safety
/// Needs `chunks` chunks in each column and 256 `chunks` sums.
#[inline(always)]
pub(super) unsafe fn columns_base(
    columns: [&[u8]; GROUP],
    ahead: [*const u8; GROUP],
    q: [i8; GROUP],
    chunks: usize,
    sums: &mut [i32],
) {
    // SAFETY: chunk c < chunks reads bytes below 64 c + 64 of a column and sums below 256 c + 256.
    unsafe {
        let masks = [vdupq_n_u8(0x30), vdupq_n_u8(0x0c), vdupq_n_u8(0x03)];
        let mut factors = [vdupq_n_s8(0); GROUP];
        for i in 0..GROUP {
            factors[i] = vdupq_n_s8(q[i]);
        }
        for c in 0..chunks {
            for ahead in ahead {
                ask(ahead.wrapping_add(64 * c));
            }
            for lane in 0..4 {
                // Eight products from -128 * 32 to 127 * 32: all but the first field are multiplied in their place.
                let mut products = [Sum::<BASE>::zero(); 4];
                macro_rules! columns {
                    ($($i:literal)+) => {$(
                        let v = vld1q_u8(columns[$i].as_ptr().add(64 * c + 16 * lane));
                        for field in 0..4 {
                            products[field].add(field_of(v, field, masks), factors[$i]);
                        }
                    )+};
                }
                columns!(0 1 2 3 4 5 6 7);
                for field in 0..4 {
                    for x in 0..4 {
                        let half = products[field].narrow[x / 2];
                        let out = sums.as_mut_ptr().add(256 * c + 64 * field + 16 * x + 4 * lane);
                        let sum = vld1q_s32(out);
                        let sum = match x % 2 {
                            0 => vaddw_s16(sum, vget_low_s16(half)),
                            _ => vaddw_high_s16(sum, half),
                        };
                        vst1q_s32(out, sum);
                    }
                }
            }
        }
    }
}
