//! NEON of 64-bit ARM, alone or with the dotprod and i8mm extensions: sixteen lanes as four registers of four.
//!
//! Base NEON belongs to every CPU that this target is compiled for. What the extensions add is written as inline assembly,
//! for their intrinsics are not stable; each is used only where a [`Neon`] value proves that the CPU has it.

use super::{Isa, tile_chunks};
use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

/// Proof that the CPU has dotprod where `LEVEL` is 1 or more, and i8mm too where it is 2.
#[derive(Clone, Copy)]
pub(crate) struct Neon<const LEVEL: u8>(());

/// NEON and no extension.
pub(crate) const BASE: u8 = 0;
/// NEON with dotprod: `sdot`.
pub(crate) const DOTPROD: u8 = 1;
/// NEON with dotprod and i8mm: `smmla`.
pub(crate) const I8MM: u8 = 2;

impl<const LEVEL: u8> Neon<LEVEL> {
    pub(crate) fn detect() -> Option<Self> {
        let dotprod = LEVEL < DOTPROD || is_aarch64_feature_detected!("dotprod");
        let i8mm = LEVEL < I8MM || is_aarch64_feature_detected!("i8mm");
        (dotprod && i8mm).then_some(Self(()))
    }
    /// # Safety
    /// The CPU must have the extensions of `LEVEL`.
    pub(crate) unsafe fn assume() -> Self {
        Self(())
    }
}

/// Applies an intrinsic to all four registers.
macro_rules! each {
    ($op:ident($($x:expr),+)) => {{
        // SAFETY: every CPU of this target has NEON; the operation touches no memory.
        #[allow(unused_unsafe)]
        unsafe { [$op($($x[0]),+), $op($($x[1]),+), $op($($x[2]),+), $op($($x[3]),+)] }
    }};
}

/// Lane by lane of four: `sum += Σ a · b` over four int8 products. Unsafe: needs dotprod.
macro_rules! sdot {
    ($sum:expr, $a:expr, $b:expr) => {
        asm!(
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inlateout(vreg) $sum, in(vreg) $a, in(vreg) $b,
            options(pure, nomem, nostack, preserves_flags),
        )
    };
}

/// `a` and `b` are two rows of eight int8 each; lane 2 i + j of `sum` grows by row i of `a` times row j of `b`.
/// Unsafe: needs i8mm.
macro_rules! smmla {
    ($sum:expr, $a:expr, $b:expr) => {
        asm!(
            "smmla {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inlateout(vreg) $sum, in(vreg) $a, in(vreg) $b,
            options(pure, nomem, nostack, preserves_flags),
        )
    };
}

/// The four fields of a register of weights, from the lowest bits up: `$body` for each, with `$codes` taken out of the `$n`
/// registers `$v`. Written out, for as a loop of so large a body it would stay one.
macro_rules! fields {
    ($v:ident[..$n:expr], |$field:ident, $codes:ident| $body:block) => {
        fields!(@ $v, $n, $field, $codes, $body, 3, 2, 1);
        let ($field, $codes) = (0, $v);
        $body
    };
    (@ $v:ident, $n:expr, $field:ident, $codes:ident, $body:block, $($number:literal),+) => {$(
        let ($field, mut $codes) = ($number, $v);
        for r in 0..$n {
            $codes[r] = vandq_u8($v[r], vdupq_n_u8(3));
            $v[r] = vshrq_n_u8::<2>($v[r]);
        }
        $body
    )+};
}

impl<const LEVEL: u8> Isa for Neon<LEVEL> {
    type F = [float32x4_t; 4];
    // Base NEON sums in int16 and needs two registers a pair of rows and tokens, the others one.
    const TILE_TOKENS: usize = if LEVEL == BASE { 4 } else { 8 };
    // A row of activations must be joined with that of another token before `smmla`: the more rows of weights share it, the
    // better.
    const TILE_ROWS: usize = if LEVEL == I8MM { 8 } else { 2 };
    const HEAD_ROWS: usize = 1;

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch reads nothing and never faults.
        unsafe { asm!("prfm pldl1keep, [{}]", in(reg) p, options(readonly, nostack, preserves_flags)) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: every CPU of this target has NEON.
        unsafe { [vdupq_n_f32(x); 4] }
    }
    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> Self::F {
        let p = x.as_ptr();
        // SAFETY: the four loads lie within the sixteen floats.
        unsafe { [vld1q_f32(p), vld1q_f32(p.add(4)), vld1q_f32(p.add(8)), vld1q_f32(p.add(12))] }
    }
    #[inline(always)]
    fn store(self, v: Self::F, out: &mut [f32; 16]) {
        let p = out.as_mut_ptr();
        // SAFETY: the four stores lie within the sixteen floats.
        unsafe {
            vst1q_f32(p, v[0]);
            vst1q_f32(p.add(4), v[1]);
            vst1q_f32(p.add(8), v[2]);
            vst1q_f32(p.add(12), v[3]);
        }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        each!(vaddq_f32(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        each!(vsubq_f32(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        each!(vmulq_f32(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        each!(vdivq_f32(a, b))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // A comparison and a choice: `fmax` and `fmaxnm` treat NaN and the two zeros otherwise.
        let greater = each!(vcgtq_f32(a, b));
        each!(vbslq_f32(greater, a, b))
    }
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        each!(vabsq_f32(a))
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        each!(vrndnq_f32(a))
    }
    #[inline(always)]
    fn pow2(self, n: Self::F) -> Self::F {
        let mut v = n;
        for v in &mut v {
            // SAFETY: every CPU of this target has NEON.
            unsafe {
                let exponent = vaddq_s32(vcvtq_s32_f32(*v), vdupq_n_s32(127));
                *v = vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent));
            }
        }
        v
    }
    #[inline(always)]
    fn f16_lanes(self, x: &[u16; 16]) -> Self::F {
        // SAFETY: both loads lie within the sixteen halves; the conversion belongs to base NEON.
        unsafe {
            let (lo, hi) = (vld1q_u16(x.as_ptr()), vld1q_u16(x.as_ptr().add(8)));
            let [a, b] = widen_f16(lo);
            let [c, d] = widen_f16(hi);
            [a, b, c, d]
        }
    }
    #[inline(always)]
    fn bf16_lanes(self, x: &[u16; 16]) -> Self::F {
        // SAFETY: both loads lie within the sixteen halves.
        unsafe {
            let (lo, hi) = (vld1q_u16(x.as_ptr()), vld1q_u16(x.as_ptr().add(8)));
            [
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(lo))),
                vreinterpretq_f32_u32(vshll_high_n_u16::<16>(lo)),
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(hi))),
                vreinterpretq_f32_u32(vshll_high_n_u16::<16>(hi)),
            ]
        }
    }
    #[inline(always)]
    fn to_i8(self, v: Self::F, out: &mut [i8; 16]) {
        // NaN gives the second operand of the maximum. `fcvtns` rounds halves to even, and like both narrowings it saturates.
        let v = self.max(v, self.splat(-128.0));
        // SAFETY: every CPU of this target has NEON; the store is the sixteen bytes of `out`.
        unsafe {
            let v = each!(vcvtnq_s32_f32(v));
            let lo = vqmovn_high_s32(vqmovn_s32(v[0]), v[1]);
            let hi = vqmovn_high_s32(vqmovn_s32(v[2]), v[3]);
            vst1q_s8(out.as_mut_ptr(), vqmovn_high_s16(vqmovn_s16(lo), hi));
        }
    }
    #[inline(always)]
    fn dot_tile<const R: usize, const T: usize>(self, w: [&[u8]; R], a: [&[i8]; T]) -> [[i32; T]; R] {
        let chunks = tile_chunks(w, a);
        let mut dots = [[0; T]; R];
        // SAFETY: the CPU has the extensions, as `self` proves, and the lengths were checked above.
        unsafe {
            if T == 1 {
                // Row after row, so that memory is read as one stream.
                for r in 0..R {
                    dots[r][0] = match LEVEL {
                        BASE => gemv_base(w[r], a[0], chunks),
                        _ => gemv_sdot(w[r], a[0], chunks),
                    };
                }
            } else if LEVEL == BASE {
                gemm_base(w, a, chunks, &mut dots);
            } else if LEVEL == I8MM && R.is_multiple_of(2) && T.is_multiple_of(2) {
                gemm_smmla(w, a, chunks, &mut dots);
            } else {
                gemm_sdot(w, a, chunks, &mut dots);
            }
        }
        dots
    }
}

/// Eight halves as single precision: the intrinsic for it is younger than the compilers that this crate accepts.
///
/// # Safety
/// None beyond NEON, which every CPU of this target has.
#[inline(always)]
unsafe fn widen_f16(x: uint16x8_t) -> [float32x4_t; 2] {
    let (lo, hi): (float32x4_t, float32x4_t);
    // SAFETY: no memory is touched.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", lateout(vreg) lo, in(vreg) x, options(pure, nomem, nostack, preserves_flags));
        asm!("fcvtl2 {0:v}.4s, {1:v}.8h", lateout(vreg) hi, in(vreg) x, options(pure, nomem, nostack, preserves_flags));
    }
    [lo, hi]
}

/// One row and one token by `sdot`. The fields of the low six bits are multiplied where they stand in the byte (as 1, 4 or 16
/// times the code, so at most 32), each into accumulators of its own, and only these are shifted: a field costs one
/// instruction to take out. A lane grows by at most 8 * 32 * 128 in each accumulator of a chunk, which stays below 2^31 for
/// rows of sixteen million weights.
///
/// # Safety
/// Needs dotprod, 64 `chunks` bytes in `w` and 256 `chunks` codes in `a`.
#[inline(always)]
unsafe fn gemv_sdot(w: &[u8], a: &[i8], chunks: usize) -> i32 {
    // SAFETY: chunk c < chunks reads weights below 64 c + 64 and codes below 256 c + 256; dotprod is the caller's.
    unsafe {
        let masks = [vdupq_n_u8(0x30), vdupq_n_u8(0x0c), vdupq_n_u8(0x03)];
        // Two accumulators a field, taken in turn, hide the latency of the sums.
        let mut sums = [[vdupq_n_s32(0); 2]; 4];
        for c in 0..chunks {
            for i in 0..4 {
                let v = vld1q_u8(w.as_ptr().add(64 * c + 16 * i));
                let codes =
                    [vshrq_n_u8::<6>(v), vandq_u8(v, masks[0]), vandq_u8(v, masks[1]), vandq_u8(v, masks[2])];
                for field in 0..4 {
                    let q = vld1q_s8(a.as_ptr().add(256 * c + 64 * field + 16 * i));
                    sdot!(sums[field][i % 2], codes[field], q);
                }
            }
        }
        let mut fields = [vdupq_n_s32(0); 4];
        for field in 0..4 {
            fields[field] = vaddq_s32(sums[field][0], sums[field][1]);
        }
        // Exact shifts: a field's lane is a multiple of its place.
        let inner = vaddq_s32(vshrq_n_s32::<4>(fields[1]), vshrq_n_s32::<2>(fields[2]));
        vaddvq_s32(vaddq_s32(inner, vaddq_s32(fields[0], fields[3])))
    }
}

/// One row and one token by products in int16.
///
/// # Safety
/// Needs 64 `chunks` bytes in `w` and 256 `chunks` codes in `a`.
#[inline(always)]
unsafe fn gemv_base(w: &[u8], a: &[i8], chunks: usize) -> i32 {
    // SAFETY: chunk c < chunks reads weights below 64 c + 64 and codes below 256 c + 256.
    unsafe {
        let (three, twelve) = (vdupq_n_u8(0x03), vdupq_n_u8(0x0c));
        let mut wide = vdupq_n_s32(0);
        let mut wide_fours = vdupq_n_s32(0);
        let mut start = 0;
        while start < chunks {
            // A chunk adds four products to a lane. Those of the third field, which are multiplied where they stand in the
            // byte, are at most 8 * 128, so seven chunks stay below 2^15.
            let end = (start + 7).min(chunks);
            let mut narrow = [[vdupq_n_s16(0); 2]; 4];
            for c in start..end {
                for i in 0..4 {
                    let v = vld1q_u8(w.as_ptr().add(64 * c + 16 * i));
                    let codes = [
                        vshrq_n_u8::<6>(v),
                        vandq_u8(vshrq_n_u8::<4>(v), three),
                        vandq_u8(v, twelve),
                        vandq_u8(v, three),
                    ];
                    for field in 0..4 {
                        let q = vld1q_s8(a.as_ptr().add(256 * c + 64 * field + 16 * i));
                        let code = vreinterpretq_s8_u8(codes[field]);
                        let n = &mut narrow[field];
                        n[0] = vmlal_s8(n[0], vget_low_s8(code), vget_low_s8(q));
                        n[1] = vmlal_high_s8(n[1], code, q);
                    }
                }
            }
            for field in 0..4 {
                for n in narrow[field] {
                    if field == 2 {
                        wide_fours = vpadalq_s16(wide_fours, n);
                    } else {
                        wide = vpadalq_s16(wide, n);
                    }
                }
            }
            start = end;
        }
        vaddvq_s32(vaddq_s32(wide, vshrq_n_s32::<2>(wide_fours)))
    }
}

/// R rows and T tokens by `sdot`.
///
/// # Safety
/// Needs dotprod, 64 `chunks` bytes in each `w` and 256 `chunks` codes in each `a`.
#[inline(always)]
unsafe fn gemm_sdot<const R: usize, const T: usize>(
    w: [&[u8]; R],
    a: [&[i8]; T],
    chunks: usize,
    dots: &mut [[i32; T]; R],
) {
    // SAFETY: chunk c < chunks reads weights below 64 c + 64 and codes below 256 c + 256; dotprod is the caller's.
    unsafe {
        // A small tile has too few sums to hide the latency of each: it takes two in turn.
        let ways = if R * T <= 4 { 2 } else { 1 };
        let mut sums = [[[vdupq_n_s32(0); T]; R]; 2];
        for c in 0..chunks {
            for i in 0..4 {
                let mut v = [vdupq_n_u8(0); R];
                for r in 0..R {
                    v[r] = vld1q_u8(w[r].as_ptr().add(64 * c + 16 * i));
                }
                fields!(v[..R], |field, codes| {
                    for t in 0..T {
                        let q = vld1q_s8(a[t].as_ptr().add(256 * c + 64 * field + 16 * i));
                        for r in 0..R {
                            sdot!(sums[field % ways][r][t], codes[r], q);
                        }
                    }
                });
            }
        }
        for r in 0..R {
            for t in 0..T {
                dots[r][t] = vaddvq_s32(vaddq_s32(sums[0][r][t], sums[1][r][t]));
            }
        }
    }
}

/// Two runs of eight bytes in one register.
///
/// # Safety
/// Eight bytes must be readable at both.
#[inline(always)]
unsafe fn pair(low: *const u8, high: *const u8) -> uint8x16_t {
    // SAFETY: the caller's.
    unsafe { vcombine_u8(vld1_u8(low), vld1_u8(high)) }
}

/// R rows and T tokens, both even, by `smmla`: pairs of rows times pairs of tokens.
///
/// # Safety
/// Needs i8mm, 64 `chunks` bytes in each `w` and 256 `chunks` codes in each `a`.
#[inline(always)]
unsafe fn gemm_smmla<const R: usize, const T: usize>(
    w: [&[u8]; R],
    a: [&[i8]; T],
    chunks: usize,
    dots: &mut [[i32; T]; R],
) {
    // SAFETY: chunk c < chunks reads weights below 64 c + 64 and codes below 256 c + 256; i8mm is the caller's. The store of
    // a sum fills its four int32.
    unsafe {
        // Half of each is in use: `[R / 2][T / 2]` sums.
        let mut sums = [[vdupq_n_s32(0); T]; R];
        for c in 0..chunks {
            for i in 0..8 {
                let mut v = [vdupq_n_u8(0); R];
                for r in 0..R / 2 {
                    let at = 64 * c + 8 * i;
                    v[r] = pair(w[2 * r].as_ptr().add(at), w[2 * r + 1].as_ptr().add(at));
                }
                fields!(v[..R / 2], |field, codes| {
                    for t in 0..T / 2 {
                        let at = 256 * c + 64 * field + 8 * i;
                        let q = pair(a[2 * t].as_ptr().add(at).cast(), a[2 * t + 1].as_ptr().add(at).cast());
                        for r in 0..R / 2 {
                            smmla!(sums[r][t], codes[r], q);
                        }
                    }
                });
            }
        }
        for r in 0..R / 2 {
            for t in 0..T / 2 {
                let mut four = [0; 4];
                vst1q_s32(four.as_mut_ptr(), sums[r][t]);
                [dots[2 * r][2 * t], dots[2 * r][2 * t + 1]] = [four[0], four[1]];
                [dots[2 * r + 1][2 * t], dots[2 * r + 1][2 * t + 1]] = [four[2], four[3]];
            }
        }
    }
}

/// R rows and T tokens by products in int16.
///
/// # Safety
/// Needs 64 `chunks` bytes in each `w` and 256 `chunks` codes in each `a`.
#[inline(always)]
unsafe fn gemm_base<const R: usize, const T: usize>(
    w: [&[u8]; R],
    a: [&[i8]; T],
    chunks: usize,
    dots: &mut [[i32; T]; R],
) {
    // SAFETY: chunk c < chunks reads weights below 64 c + 64 and codes below 256 c + 256.
    unsafe {
        let mut wide = [[vdupq_n_s32(0); T]; R];
        let mut start = 0;
        while start < chunks {
            // A product is at most 2 * 128 and a chunk adds sixteen of them to a lane, so seven chunks stay below 2^15.
            let end = (start + 7).min(chunks);
            let mut narrow = [[[vdupq_n_s16(0); 2]; T]; R];
            for c in start..end {
                for i in 0..4 {
                    let mut v = [vdupq_n_u8(0); R];
                    for r in 0..R {
                        v[r] = vld1q_u8(w[r].as_ptr().add(64 * c + 16 * i));
                    }
                    fields!(v[..R], |field, codes| {
                        for t in 0..T {
                            let q = vld1q_s8(a[t].as_ptr().add(256 * c + 64 * field + 16 * i));
                            for r in 0..R {
                                let code = vreinterpretq_s8_u8(codes[r]);
                                let n = &mut narrow[r][t];
                                n[0] = vmlal_s8(n[0], vget_low_s8(code), vget_low_s8(q));
                                n[1] = vmlal_high_s8(n[1], code, q);
                            }
                        }
                    });
                }
            }
            for r in 0..R {
                for t in 0..T {
                    let w = vpadalq_s16(wide[r][t], narrow[r][t][0]);
                    wide[r][t] = vpadalq_s16(w, narrow[r][t][1]);
                }
            }
            start = end;
        }
        for r in 0..R {
            for t in 0..T {
                dots[r][t] = vaddvq_s32(wide[r][t]);
            }
        }
    }
}
