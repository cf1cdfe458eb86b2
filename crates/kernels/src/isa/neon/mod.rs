//! NEON of 64-bit ARM, alone or with the dotprod and i8mm extensions: sixteen lanes as four registers of four.
//!
//! Base NEON belongs to every CPU that this target is compiled for. What the extensions add is written as inline assembly,
//! for their intrinsics are not stable; each is used only where a [`Neon`] value proves that the CPU has it.

mod integer;
mod panel;

use super::{GROUP, Isa, PANEL, check_split, column_chunks, lanes, nibble_chunks, panel_quads, row_chunks};
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
    ($op:expr, $($x:expr),+) => {{
        // SAFETY: every CPU of this target has NEON; the operation touches no memory.
        #[allow(unused_unsafe)]
        unsafe { [$op($($x[0]),+), $op($($x[1]),+), $op($($x[2]),+), $op($($x[3]),+)] }
    }};
}

/// An instruction `$op` that adds to the sums `$sum` what it makes of `$a` and `$b`, with a fourth argument of that lane of `$b`.
///
/// - `sdot`: to each lane of four four products of int8. Needs dotprod.
/// - `smmla`: `$a` and `$b` are two rows of eight int8 each; to lane 2 i + j row i of `$a` times row j of `$b`. Needs i8mm.
macro_rules! dot {
    ($op:literal, $sum:expr, $a:expr, $b:expr, $lane:expr) => {
        asm!(
            concat!($op, " {0:v}.4s, {1:v}.16b, {2:v}.4b[{lane}]"),
            inlateout(vreg) $sum, in(vreg) $a, in(vreg) $b, lane = const $lane,
            options(pure, nomem, nostack, preserves_flags),
        )
    };
    ($op:literal, $sum:expr, $a:expr, $b:expr) => {
        asm!(
            concat!($op, " {0:v}.4s, {1:v}.16b, {2:v}.16b"),
            inlateout(vreg) $sum, in(vreg) $a, in(vreg) $b,
            options(pure, nomem, nostack, preserves_flags),
        )
    };
}
use dot;

/// Sums of products of bytes: of four each in a lane of int32 by `sdot`, or of one each in sixteen lanes of int16, which the
/// caller takes away before they overflow.
#[derive(Clone, Copy)]
struct Sum<const LEVEL: u8> {
    wide: int32x4_t,
    narrow: [int16x8_t; 2],
}

/// All of it needs the extensions of `LEVEL`, and touches no memory.
impl<const LEVEL: u8> Sum<LEVEL> {
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: as said above.
        unsafe { Self { wide: vdupq_n_s32(0), narrow: [vdupq_n_s16(0); 2] } }
    }
    /// Adds the products of sixteen codes, below 128, with sixteen int8.
    #[inline(always)]
    unsafe fn add(&mut self, codes: uint8x16_t, q: int8x16_t) {
        // SAFETY: as said above.
        unsafe {
            if LEVEL == BASE {
                // Written out, for compilers widen codes and multiply int16, which is twice the work.
                let [low, high] = &mut self.narrow;
                asm!(
                    "smlal {0:v}.8h, {1:v}.8b, {2:v}.8b", inlateout(vreg) *low, in(vreg) codes, in(vreg) q,
                    options(pure, nomem, nostack, preserves_flags),
                );
                asm!(
                    "smlal2 {0:v}.8h, {1:v}.16b, {2:v}.16b", inlateout(vreg) *high, in(vreg) codes, in(vreg) q,
                    options(pure, nomem, nostack, preserves_flags),
                );
            } else {
                dot!("sdot", self.wide, codes, q);
            }
        }
    }
    /// As [`Sum::add`], with four int8, lane `LANE` of `q`, for each four codes.
    #[inline(always)]
    unsafe fn add_lane<const LANE: i32>(&mut self, codes: uint8x16_t, q: int8x16_t) {
        // SAFETY: as said above.
        unsafe {
            if LEVEL == BASE {
                let four = vdupq_laneq_s32::<LANE>(vreinterpretq_s32_s8(q));
                self.add(codes, vreinterpretq_s8_s32(four));
            } else {
                dot!("sdot", self.wide, codes, q, LANE);
            }
        }
    }
    /// Takes the sums away and adds them to the four of `wide`, whichever to each.
    #[inline(always)]
    unsafe fn drain(&mut self, wide: &mut int32x4_t) {
        // SAFETY: as said above.
        unsafe {
            *wide = match LEVEL {
                BASE => vpadalq_s16(vpadalq_s16(*wide, self.narrow[0]), self.narrow[1]),
                _ => vaddq_s32(*wide, self.wide),
            };
            *self = Self::zero();
        }
    }
    /// The sums of each four products.
    #[inline(always)]
    unsafe fn lanes(self) -> int32x4_t {
        // SAFETY: as said above.
        unsafe {
            match LEVEL {
                BASE => vpaddq_s32(vpaddlq_s16(self.narrow[0]), vpaddlq_s16(self.narrow[1])),
                _ => self.wide,
            }
        }
    }
}

impl<const LEVEL: u8> Isa for Neon<LEVEL> {
    type F = [float32x4_t; 4];
    // Base NEON sums in int16 and needs two registers where the others need one.
    const PANEL_TOKENS: usize = if LEVEL == BASE { 4 } else { 8 };
    const HEAD_ROWS: usize = 1;
    const SUMS: usize = 4;
    // Twice 64 is not a signed byte, so the first field is shifted down; the others stay in their place.
    const COLUMN_SHIFTS: [u32; 4] = [0, 4, 2, 0];

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
    lanes! { each:
        add(a, b) = vaddq_f32;
        sub(a, b) = vsubq_f32;
        mul(a, b) = vmulq_f32;
        div(a, b) = vdivq_f32;
        abs(a) = vabsq_f32;
        round(a) = vrndnq_f32;
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // A comparison and a choice: `fmax` and `fmaxnm` treat NaN and the two zeros otherwise.
        let greater = each!(vcgtq_f32, a, b);
        each!(vbslq_f32, greater, a, b)
    }
    #[inline(always)]
    fn pow2(self, n: Self::F) -> Self::F {
        // SAFETY: every CPU of this target has NEON.
        let bias = unsafe { [vdupq_n_s32(127); 4] };
        let n = each!(vcvtq_s32_f32, n);
        let exponent = each!(vaddq_s32, n, bias);
        let bits = each!(vshlq_n_s32::<23>, exponent);
        each!(vreinterpretq_f32_s32, bits)
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
            let v = each!(vcvtnq_s32_f32, v);
            let lo = vqmovn_high_s32(vqmovn_s32(v[0]), v[1]);
            let hi = vqmovn_high_s32(vqmovn_s32(v[2]), v[3]);
            vst1q_s8(out.as_mut_ptr(), vqmovn_high_s16(vqmovn_s16(lo), hi));
        }
    }
    #[inline(always)]
    fn at_least(self, a: Self::F, b: Self::F) -> u16 {
        let m = each!(vcgeq_f32, a, b);
        // SAFETY: every CPU of this target has NEON.
        unsafe {
            let lo = vmovn_high_u32(vmovn_u32(m[0]), m[1]);
            let hi = vmovn_high_u32(vmovn_u32(m[2]), m[3]);
            mask_bits(vmovn_high_u16(vmovn_u16(lo), hi))
        }
    }
    #[inline(always)]
    fn nonzero(self, codes: &[i8; 16]) -> u16 {
        // SAFETY: every CPU of this target has NEON; the load is the sixteen bytes.
        unsafe {
            let codes = vld1q_s8(codes.as_ptr());
            mask_bits(vtstq_s8(codes, codes))
        }
    }
    #[inline(always)]
    fn dot_rows<const R: usize>(self, w: [&[u8]; R], ahead: [*const u8; R], a: &[i8]) -> [i32; R] {
        let [dots] = self.dot_tile(w, ahead, [a]);
        dots
    }
    #[inline(always)]
    fn dot_tile<const R: usize, const T: usize>(
        self,
        w: [&[u8]; R],
        ahead: [*const u8; R],
        a: [&[i8]; T],
    ) -> [[i32; R]; T] {
        let chunks = row_chunks(w, a[0]);
        for a in a {
            assert_eq!(a.len(), 256 * chunks);
        }
        let mut dots = [[0; R]; T];
        // SAFETY: the CPU has the extensions, as `self` proves, and the lengths were checked above.
        unsafe {
            match T {
                // Base NEON takes most of its time for products, not for the codes that tokens could share.
                _ if LEVEL == BASE => integer::dots::<LEVEL, R, T, 1>(w, ahead, a, chunks, &mut dots),
                1 => integer::dots::<LEVEL, R, T, 1>(w, ahead, a, chunks, &mut dots),
                2 => integer::dots::<LEVEL, R, T, 2>(w, ahead, a, chunks, &mut dots),
                3 | 5 | 6 => integer::dots::<LEVEL, R, T, 3>(w, ahead, a, chunks, &mut dots),
                _ => integer::dots::<LEVEL, R, T, 4>(w, ahead, a, chunks, &mut dots),
            }
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
        // SAFETY: the lengths were just checked.
        unsafe { panel::unpack_rows(rows, panel, half) }
    }
    #[inline(always)]
    fn panel_columns(self, columns: [&[u8; 64]; 4], part: usize, codes: &mut [u8]) {
        assert_eq!(codes.len(), 4 * PANEL);
        // SAFETY: the length was just checked.
        unsafe { panel::unpack_columns(columns, part, codes) }
    }
    #[inline(always)]
    fn panel_tile<const T: usize, const P: usize>(
        self,
        panels: [&[u8]; P],
        a: [&[i8]; T],
        dots: &mut [[[i32; PANEL]; T]; P],
    ) {
        let quads = panel_quads(panels, a);
        let (panel, dots) = (panels[0], &mut dots[0]);
        assert_eq!(P, 1, "a pair is no better tile");
        *dots = [[0; PANEL]; T];
        // A block of the panel stays in the first-level cache while some outputs after the others pass over it. In base NEON
        // it adds 124 products of at most 2 * 128 to an int16 lane.
        const BLOCK: usize = 124;
        let mut start = 0;
        while start < quads {
            let end = (start + BLOCK).min(quads);
            // SAFETY: the CPU has the extensions, as `self` proves; `end` is at most the number of quads that `panel` and
            // each `a` hold, and whole fours of quads lie before it.
            unsafe {
                if LEVEL == I8MM && T.is_multiple_of(2) {
                    panel::tile_smmla(panel, a, start, end, dots);
                } else {
                    panel::tile::<LEVEL, T>(panel, a, start, end, dots);
                }
            }
            start = end;
        }
    }
    #[inline(always)]
    fn add_columns(
        self,
        columns: [&[u8]; GROUP],
        [_, ahead]: [[*const u8; GROUP]; 2],
        q: [i8; GROUP],
        sums: &mut [i32],
    ) {
        let chunks = column_chunks(columns, sums);
        // SAFETY: the CPU has the extensions, as `self` proves; the lengths were checked above.
        unsafe {
            match LEVEL {
                BASE => integer::columns_base(columns, ahead, q, chunks, sums),
                _ => integer::columns_sdot(columns, ahead, q, chunks, sums),
            }
        }
    }
    #[inline(always)]
    fn nibble_dots<const R: usize, const T: usize>(
        self,
        w: [&[u8]; R],
        ahead: [*const u8; R],
        q: [&[i8]; T],
    ) -> [[i32; R]; T] {
        let chunks = nibble_chunks(w, q);
        let mut dots = [[0; R]; T];
        let mut r = 0;
        while r < R {
            // SAFETY: the CPU has the extensions, as `self` proves, and the lengths were checked above.
            unsafe {
                // Two rows of one token share what is loaded of it: with `sdot` loads would be what limits.
                if LEVEL != BASE && T == 1 && r + 1 < R {
                    let (w, ahead) = ([w[r], w[r + 1]], [ahead[r], ahead[r + 1]]);
                    let rows = integer::nibbles::<LEVEL, 2, T>(w, ahead, q, chunks);
                    for t in 0..T {
                        [dots[t][r], dots[t][r + 1]] = rows[t];
                    }
                    r += 2;
                } else {
                    let rows = integer::nibbles::<LEVEL, 1, T>([w[r]], [ahead[r]], q, chunks);
                    for t in 0..T {
                        [dots[t][r]] = rows[t];
                    }
                    r += 1;
                }
            }
        }
        dots
    }
    #[inline(always)]
    fn dot_split<const Q: usize, const P: usize>(
        self,
        codes: [&[[u8; 64]]; P],
        rows: [[&[i8]; 2]; Q],
        start: [[i32; 2]; Q],
        far: [*const u8; P],
    ) -> [[Self::F; Q]; P] {
        check_split(codes, rows);
        let mut out = [[self.splat(0.0); Q]; P];
        for (p, codes) in codes.into_iter().enumerate() {
            let mut q = 0;
            while q < Q {
                let far = (q == 0).then_some(far[p]);
                // SAFETY: the CPU has the extensions, as `self` proves; the lengths were checked above.
                unsafe {
                    // The sums of two rows fit the registers.
                    if q + 1 < Q {
                        let (rows, start) = ([rows[q], rows[q + 1]], [start[q], start[q + 1]]);
                        [out[p][q], out[p][q + 1]] = integer::split::<LEVEL, 2>(codes, rows, start, far);
                    } else {
                        [out[p][q]] = integer::split::<LEVEL, 1>(codes, [rows[q]], [start[q]], far);
                    }
                }
                q += 2;
            }
        }
        out
    }
}

/// Asks for the cache line at `p`.
#[inline(always)]
fn ask(p: *const u8) {
    // SAFETY: a prefetch reads nothing and never faults.
    unsafe { asm!("prfm pldl1keep, [{}]", in(reg) p, options(readonly, nostack, preserves_flags)) }
}

/// A bit for each byte: whether it is 255 and not 0.
#[inline(always)]
fn mask_bits(mask: uint8x16_t) -> u16 {
    const BITS: [u8; 16] = [1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128];
    // SAFETY: every CPU of this target has NEON; the load is the sixteen bytes.
    unsafe {
        let bits = vandq_u8(mask, vld1q_u8(BITS.as_ptr()));
        u16::from(vaddv_u8(vget_low_u8(bits))) | u16::from(vaddv_u8(vget_high_u8(bits))) << 8
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
