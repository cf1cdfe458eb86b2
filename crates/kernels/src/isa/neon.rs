//! NEON of 64-bit ARM, alone or with the dotprod and i8mm extensions: sixteen lanes as four registers of four.
//!
//! Base NEON belongs to every CPU that this target is compiled for. What the extensions add is written as inline assembly,
//! for their intrinsics are not stable; each is used only where a [`Neon`] value proves that the CPU has it.

use super::{GROUP, Isa, PANEL, check_split, column_chunks, nibble_chunks, panel_quads, row_chunks};
use crate::attention::FETCH;
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

/// Lane by lane of four: `sum += Σ a · b` over four int8 products, with a fourth argument those of that lane of `b` in all.
/// Unsafe: needs dotprod.
macro_rules! sdot {
    ($sum:expr, $a:expr, $b:expr, $lane:literal) => {
        asm!(
            concat!("sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[", $lane, "]"),
            inlateout(vreg) $sum, in(vreg) $a, in(vreg) $b,
            options(pure, nomem, nostack, preserves_flags),
        )
    };
    ($sum:expr, $a:expr, $b:expr) => {
        asm!(
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inlateout(vreg) $sum, in(vreg) $a, in(vreg) $b,
            options(pure, nomem, nostack, preserves_flags),
        )
    };
}

/// As `sdot`, `a` being unsigned. Unsafe: needs i8mm.
macro_rules! usdot {
    ($sum:expr, $a:expr, $b:expr) => {
        asm!(
            "usdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
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

impl<const LEVEL: u8> Isa for Neon<LEVEL> {
    type F = [float32x4_t; 4];
    // Base NEON sums in int16 and needs two registers where the others need one.
    const PANEL_TOKENS: usize = if LEVEL == BASE { 4 } else { 8 };
    const HEAD_ROWS: usize = 1;

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        ask(p);
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
    fn dot_rows<const R: usize>(self, w: [&[u8]; R], ahead: [*const u8; R], a: &[i8]) -> [i32; R] {
        let chunks = row_chunks(w, a);
        let mut dots = [0; R];
        // Row after row, so that memory is read as one stream.
        for r in 0..R {
            // SAFETY: the CPU has the extensions, as `self` proves, and the lengths were checked above.
            dots[r] = unsafe {
                match LEVEL {
                    BASE => dot_base(w[r], ahead[r], a, chunks),
                    _ => dot_sdot(w[r], ahead[r], a, chunks),
                }
            };
        }
        dots
    }
    #[inline(always)]
    fn panel_rows(self, rows: [&[u8]; 16], panel: &mut [u8], half: usize) {
        let bytes = rows[0].len();
        for row in rows {
            assert_eq!(row.len(), bytes);
        }
        assert!(panel.len() == 4 * bytes * PANEL && bytes.is_multiple_of(64) && half < PANEL / 16);
        // SAFETY: the loads are 16 bytes of a row, the stores 16 bytes of one of the 64 quads of a chunk, each 4 * PANEL
        // bytes, as the lengths just checked allow.
        unsafe {
            let three = vdupq_n_u8(3);
            for block in 0..bytes / 16 {
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
    #[inline(always)]
    fn panel_columns(self, columns: [&[u8; 64]; 4], part: usize, codes: &mut [u8]) {
        assert_eq!(codes.len(), 4 * PANEL);
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
    #[inline(always)]
    fn panel_tile<const T: usize>(self, panel: &[u8], a: [&[i8]; T], dots: &mut [[i32; PANEL]; T]) {
        let quads = panel_quads(panel, a);
        // A block of the panel stays in the first-level cache while some outputs after the others pass over it. In base NEON
        // it adds 124 products of at most 2 * 128 to an int16 lane.
        const BLOCK: usize = 124;
        let mut start = 0;
        while start < quads {
            let end = (start + BLOCK).min(quads);
            // SAFETY: the CPU has the extensions, as `self` proves; `end` is at most the number of quads that `panel` and
            // each `a` hold.
            unsafe {
                if LEVEL == BASE {
                    tile_base(panel, a, start, end, dots);
                } else if LEVEL == I8MM && T.is_multiple_of(2) {
                    tile_smmla(panel, a, start, end, dots);
                } else {
                    tile_sdot(panel, a, start, end, dots);
                }
            }
            start = end;
        }
    }
    #[inline(always)]
    fn add_columns(
        self,
        columns: [&[u8]; GROUP],
        ahead: [*const u8; GROUP],
        q: [i8; GROUP],
        sums: &mut [i32],
    ) {
        let chunks = column_chunks(columns, sums);
        // SAFETY: the CPU has the extensions, as `self` proves; the lengths were checked above.
        unsafe {
            match LEVEL {
                BASE => columns_base(columns, ahead, q, chunks, sums),
                _ => columns_sdot(columns, ahead, q, chunks, sums, LEVEL == I8MM),
            }
        }
    }
    #[inline(always)]
    fn nibble_dots<const R: usize>(
        self,
        w: [&[u8]; R],
        ahead: [*const u8; R],
        high: &[i8],
        low: &[i8],
    ) -> [[i32; 2]; R] {
        let chunks = nibble_chunks(w, high, low);
        let mut dots = [[0; 2]; R];
        for r in 0..R {
            // SAFETY: the CPU has the extensions, as `self` proves, and the lengths were checked above.
            dots[r] = unsafe {
                match LEVEL {
                    BASE => nibbles_base(w[r], ahead[r], [high, low], chunks),
                    _ => nibbles_sdot(w[r], ahead[r], [high, low], chunks),
                }
            };
        }
        dots
    }
    #[inline(always)]
    fn dot_split<const Q: usize>(
        self,
        codes: &[[u8; 64]],
        rows: [[&[i8]; 2]; Q],
        start: [[i32; 2]; Q],
        far: *const u8,
    ) -> [Self::F; Q] {
        check_split(codes, rows);
        let mut out = [self.splat(0.0); Q];
        for q in 0..Q {
            // SAFETY: the CPU has the extensions, as `self` proves; block c reads its 64 codes and the parts below 4 c + 4,
            // which exist.
            unsafe {
                let mut sums = [[vdupq_n_s32(0); 4]; 2];
                for part in 0..2 {
                    // The codes less 128 are signed: what that takes from the sums is added here.
                    let all = rows[q][part].iter().fold(0i32, |sum, &x| sum.wrapping_add(i32::from(x)));
                    sums[part] = [vdupq_n_s32(start[q][part].wrapping_add(all.wrapping_mul(128))); 4];
                }
                let less = vdupq_n_u8(0x80);
                for c in 0..codes.len() {
                    if q == 0 {
                        ask(far.wrapping_add(FETCH * c));
                    }
                    let mut fours = [vdupq_n_s8(0); 2];
                    for part in 0..2 {
                        let four = rows[q][part].as_ptr().add(4 * c).cast::<i32>().read_unaligned();
                        fours[part] = vreinterpretq_s8_s32(vdupq_n_s32(four));
                    }
                    for i in 0..4 {
                        let v = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(codes[c].as_ptr().add(16 * i)), less));
                        for part in 0..2 {
                            let (sum, four) = (&mut sums[part][i], fours[part]);
                            if LEVEL == BASE {
                                let lo = vpaddlq_s16(vmull_s8(vget_low_s8(v), vget_low_s8(four)));
                                let hi = vpaddlq_s16(vmull_high_s8(v, four));
                                *sum = vaddq_s32(*sum, vpaddq_s32(lo, hi));
                            } else {
                                sdot!(*sum, v, four);
                            }
                        }
                    }
                }
                for i in 0..4 {
                    let high = vmulq_f32(vcvtq_f32_s32(sums[0][i]), vdupq_n_f32(128.0));
                    out[q][i] = vaddq_f32(high, vcvtq_f32_s32(sums[1][i]));
                }
            }
        }
        out
    }
}

/// Asks for the cache line at `p`.
#[inline(always)]
fn ask(p: *const u8) {
    // SAFETY: a prefetch reads nothing and never faults.
    unsafe { asm!("prfm pldl1keep, [{}]", in(reg) p, options(nomem, nostack, preserves_flags)) }
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
unsafe fn dot_sdot(w: &[u8], ahead: *const u8, a: &[i8], chunks: usize) -> i32 {
    // SAFETY: chunk c < chunks reads weights below 64 c + 64 and codes below 256 c + 256; dotprod is the caller's.
    unsafe {
        let masks = [vdupq_n_u8(0x30), vdupq_n_u8(0x0c), vdupq_n_u8(0x03)];
        // Two accumulators a field, taken in turn, hide the latency of the sums.
        let mut sums = [[vdupq_n_s32(0); 2]; 4];
        for c in 0..chunks {
            ask(ahead.wrapping_add(64 * c));
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
unsafe fn dot_base(w: &[u8], ahead: *const u8, a: &[i8], chunks: usize) -> i32 {
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
                ask(ahead.wrapping_add(64 * c));
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
unsafe fn zip_pairs(a: uint8x16_t, b: uint8x16_t) -> [uint8x16_t; 2] {
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

/// Quads `start..end` of a panel and T tokens by `sdot`.
///
/// # Safety
/// Needs dotprod, and `end` quads in the panel and in each `a`.
#[inline(always)]
unsafe fn tile_sdot<const T: usize>(
    panel: &[u8],
    a: [&[i8]; T],
    start: usize,
    end: usize,
    dots: &mut [[i32; PANEL]; T],
) {
    let n = tile_width(T);
    // SAFETY: quad i < end reads panel bytes below 128 i + 128 and codes below 4 i + 4; the last four outputs of a
    // register end at PANEL; dotprod is the caller's.
    unsafe {
        for part in 0..PANEL / (4 * n) {
            let mut sums = [[vdupq_n_s32(0); 8]; T];
            for t in 0..T {
                for k in 0..n {
                    sums[t][k] = vld1q_s32(dots[t].as_ptr().add(4 * (n * part + k)));
                }
            }
            let weights = panel.as_ptr().add(16 * n * part);
            let mut i = start;
            while i + 4 <= end {
                let mut q = [vdupq_n_s8(0); T];
                for t in 0..T {
                    q[t] = vld1q_s8(a[t].as_ptr().add(4 * i));
                }
                macro_rules! quads {
                    ($($lane:literal)+) => {$(
                        for k in 0..n {
                            let w = vld1q_u8(weights.add(4 * PANEL * (i + $lane) + 16 * k));
                            for t in 0..T {
                                sdot!(sums[t][k], w, q[t], $lane);
                            }
                        }
                    )+};
                }
                quads!(0 1 2 3);
                i += 4;
            }
            while i < end {
                for k in 0..n {
                    let w = vld1q_u8(weights.add(4 * PANEL * i + 16 * k));
                    for t in 0..T {
                        let q = vdupq_n_s32(a[t].as_ptr().add(4 * i).cast::<i32>().read_unaligned());
                        sdot!(sums[t][k], w, q);
                    }
                }
                i += 1;
            }
            for t in 0..T {
                for k in 0..n {
                    vst1q_s32(dots[t].as_mut_ptr().add(4 * (n * part + k)), sums[t][k]);
                }
            }
        }
    }
}

/// Quads `start..end` of a panel and T tokens, an even number, by `smmla`: pairs of outputs times pairs of tokens.
///
/// # Safety
/// Needs i8mm and dotprod, and `end` quads in the panel and in each `a`.
#[inline(always)]
unsafe fn tile_smmla<const T: usize>(
    panel: &[u8],
    a: [&[i8]; T],
    start: usize,
    end: usize,
    dots: &mut [[i32; PANEL]; T],
) {
    let n = tile_width(T);
    let whole = start + (end - start) / 4 * 4;
    // SAFETY: as in `tile_sdot`.
    unsafe {
        for part in 0..PANEL / (4 * n) {
            // Of T pairs of tokens only half exist.
            let mut sums = [[vdupq_n_s32(0); 16]; T];
            let weights = panel.as_ptr().add(16 * n * part);
            let mut i = start;
            while i < whole {
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
                            smmla!(sums[t][2 * k], q[t][half], w[0]);
                            smmla!(sums[t][2 * k + 1], q[t][half], w[1]);
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
        if whole < end {
            tile_sdot(panel, a, whole, end, dots);
        }
    }
}

/// Quads `start..end` of a panel and T tokens by products in int16.
///
/// # Safety
/// Needs `end` quads in the panel and in each `a`, and `end - start` at most 127.
#[inline(always)]
unsafe fn tile_base<const T: usize>(
    panel: &[u8],
    a: [&[i8]; T],
    start: usize,
    end: usize,
    dots: &mut [[i32; PANEL]; T],
) {
    // SAFETY: quad i < end reads panel bytes below 128 i + 128 and codes below 4 i + 4.
    unsafe {
        for part in 0..PANEL / 8 {
            let mut narrow = [[[vdupq_n_s16(0); 2]; 2]; T];
            for i in start..end {
                let at = panel.as_ptr().add(4 * PANEL * i + 32 * part).cast();
                let w = [vld1q_s8(at), vld1q_s8(at.add(16))];
                for t in 0..T {
                    let q = vld1q_dup_s32(a[t].as_ptr().add(4 * i).cast());
                    let q = vreinterpretq_s8_s32(q);
                    for k in 0..2 {
                        let sums = &mut narrow[t][k];
                        sums[0] = vmlal_s8(sums[0], vget_low_s8(w[k]), vget_low_s8(q));
                        sums[1] = vmlal_high_s8(sums[1], w[k], q);
                    }
                }
            }
            for t in 0..T {
                for k in 0..2 {
                    let [low, high] = narrow[t][k];
                    let four = vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
                    let out = dots[t].as_mut_ptr().add(8 * part + 4 * k);
                    vst1q_s32(out, vaddq_s32(vld1q_s32(out), four));
                }
            }
        }
    }
}

/// # Safety
/// Needs dotprod, and i8mm where `i8mm` is true; `chunks` chunks in each column and 256 `chunks` sums.
#[inline(always)]
unsafe fn columns_sdot(
    columns: [&[u8]; GROUP],
    ahead: [*const u8; GROUP],
    q: [i8; GROUP],
    chunks: usize,
    sums: &mut [i32],
    i8mm: bool,
) {
    // SAFETY: chunk c < chunks reads bytes below 64 c + 64 of a column and sums below 256 c + 256; the extensions are the
    // caller's.
    unsafe {
        let masks = [vdupq_n_u8(0xc0), vdupq_n_u8(0x30), vdupq_n_u8(0x0c), vdupq_n_u8(0x03)];
        let mut factors = [vdupq_n_s32(0); 2];
        for quad in 0..2 {
            factors[quad] = vdupq_n_s32(q.as_ptr().add(4 * quad).cast::<i32>().read_unaligned());
        }
        for c in 0..chunks {
            for ahead in ahead {
                ask(ahead.wrapping_add(64 * c));
            }
            for lane in 0..4 {
                // v[quad][x]: four outputs, the four columns of the quad side by side.
                let mut v = [[masks[0]; 4]; 2];
                for quad in 0..2 {
                    let mut line = [masks[0]; 4];
                    for i in 0..4 {
                        line[i] = vld1q_u8(columns[4 * quad + i].as_ptr().add(64 * c + 16 * lane));
                    }
                    let low = zip_pairs(vzip1q_u8(line[0], line[1]), vzip1q_u8(line[2], line[3]));
                    let high = zip_pairs(vzip2q_u8(line[0], line[1]), vzip2q_u8(line[2], line[3]));
                    v[quad] = [low[0], low[1], high[0], high[1]];
                }
                for x in 0..4 {
                    for field in 0..4 {
                        let out = sums.as_mut_ptr().add(256 * c + 64 * field + 16 * x + 4 * lane);
                        let mut sum = vld1q_s32(out);
                        if i8mm {
                            for quad in 0..2 {
                                usdot!(sum, vandq_u8(v[quad][x], masks[field]), factors[quad]);
                            }
                        } else if field == 0 {
                            // Twice 64 is not a signed byte: this field is shifted down, and its sum up again.
                            let mut ones = vdupq_n_s32(0);
                            for quad in 0..2 {
                                sdot!(ones, vshrq_n_u8::<6>(v[quad][x]), factors[quad]);
                            }
                            sum = vaddq_s32(sum, vshlq_n_s32::<6>(ones));
                        } else {
                            for quad in 0..2 {
                                sdot!(sum, vandq_u8(v[quad][x], masks[field]), factors[quad]);
                            }
                        }
                        vst1q_s32(out, sum);
                    }
                }
            }
        }
    }
}

/// # Safety
/// Needs `chunks` chunks in each column and 256 `chunks` sums.
#[inline(always)]
unsafe fn columns_base(
    columns: [&[u8]; GROUP],
    ahead: [*const u8; GROUP],
    q: [i8; GROUP],
    chunks: usize,
    sums: &mut [i32],
) {
    // SAFETY: chunk c < chunks reads bytes below 64 c + 64 of a column and sums below 256 c + 256.
    unsafe {
        let three = vdupq_n_u8(3);
        for c in 0..chunks {
            for ahead in ahead {
                ask(ahead.wrapping_add(64 * c));
            }
            for lane in 0..4 {
                // Eight products of at most 2 * 128.
                let mut narrow = [[vdupq_n_s16(0); 2]; 4];
                for i in 0..GROUP {
                    let factor = vdupq_n_s8(q[i]);
                    let v = vld1q_u8(columns[i].as_ptr().add(64 * c + 16 * lane));
                    let codes = [
                        vshrq_n_u8::<6>(v),
                        vandq_u8(vshrq_n_u8::<4>(v), three),
                        vandq_u8(vshrq_n_u8::<2>(v), three),
                        vandq_u8(v, three),
                    ];
                    for field in 0..4 {
                        let code = vreinterpretq_s8_u8(codes[field]);
                        let sums = &mut narrow[field];
                        sums[0] = vmlal_s8(sums[0], vget_low_s8(code), vget_low_s8(factor));
                        sums[1] = vmlal_high_s8(sums[1], code, factor);
                    }
                }
                for field in 0..4 {
                    let place = 64 >> (2 * field);
                    for x in 0..4 {
                        let half = narrow[field][x / 2];
                        let four = if x % 2 == 0 { vget_low_s16(half) } else { vget_high_s16(half) };
                        let out = sums.as_mut_ptr().add(256 * c + 64 * field + 16 * x + 4 * lane);
                        vst1q_s32(out, vmlal_n_s16(vld1q_s32(out), four, place));
                    }
                }
            }
        }
    }
}

/// One row of four-bit codes and two rows of int8 by `sdot`.
///
/// # Safety
/// Needs dotprod, 64 `chunks` bytes in `w` and 128 `chunks` codes in each `q`.
#[inline(always)]
unsafe fn nibbles_sdot(w: &[u8], ahead: *const u8, q: [&[i8]; 2], chunks: usize) -> [i32; 2] {
    // SAFETY: chunk c < chunks reads weights below 64 c + 64 and codes below 128 c + 128; dotprod is the caller's.
    unsafe {
        let mask = vdupq_n_u8(15);
        let mut sums = [[vdupq_n_s32(0); 4]; 2];
        for c in 0..chunks {
            ask(ahead.wrapping_add(64 * c));
            for i in 0..4 {
                let v = vld1q_u8(w.as_ptr().add(64 * c + 16 * i));
                let codes = [vandq_u8(v, mask), vshrq_n_u8::<4>(v)];
                for plane in 0..2 {
                    for half in 0..2 {
                        let q = vld1q_s8(q[plane].as_ptr().add(128 * c + 64 * half + 16 * i));
                        sdot!(sums[plane][2 * half + i % 2], codes[half], q);
                    }
                }
            }
        }
        let mut dots = [0; 2];
        for plane in 0..2 {
            let [a, b, c, d] = sums[plane];
            dots[plane] = vaddvq_s32(vaddq_s32(vaddq_s32(a, b), vaddq_s32(c, d)));
        }
        dots
    }
}

/// One row of four-bit codes and two rows of int8 by products in int16.
///
/// # Safety
/// Needs 64 `chunks` bytes in `w` and 128 `chunks` codes in each `q`.
#[inline(always)]
unsafe fn nibbles_base(w: &[u8], ahead: *const u8, q: [&[i8]; 2], chunks: usize) -> [i32; 2] {
    // SAFETY: chunk c < chunks reads weights below 64 c + 64 and codes below 128 c + 128.
    unsafe {
        let mask = vdupq_n_u8(15);
        let mut wide = [vdupq_n_s32(0); 2];
        let mut start = 0;
        while start < chunks {
            // A chunk adds four products of at most 15 * 128 to a lane, so four chunks stay below 2^15.
            let end = (start + 4).min(chunks);
            let mut narrow = [[[vdupq_n_s16(0); 2]; 2]; 2];
            for c in start..end {
                ask(ahead.wrapping_add(64 * c));
                for i in 0..4 {
                    let v = vld1q_u8(w.as_ptr().add(64 * c + 16 * i));
                    let codes = [vandq_u8(v, mask), vshrq_n_u8::<4>(v)];
                    for plane in 0..2 {
                        for half in 0..2 {
                            let q = vld1q_s8(q[plane].as_ptr().add(128 * c + 64 * half + 16 * i));
                            let code = vreinterpretq_s8_u8(codes[half]);
                            let n = &mut narrow[plane][half];
                            n[0] = vmlal_s8(n[0], vget_low_s8(code), vget_low_s8(q));
                            n[1] = vmlal_high_s8(n[1], code, q);
                        }
                    }
                }
            }
            for plane in 0..2 {
                for half in narrow[plane] {
                    for n in half {
                        wide[plane] = vpadalq_s16(wide[plane], n);
                    }
                }
            }
            start = end;
        }
        [vaddvq_s32(wide[0]), vaddvq_s32(wide[1])]
    }
}
