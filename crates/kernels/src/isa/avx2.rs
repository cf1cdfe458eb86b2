//! AVX2 with F16C: sixteen lanes as two registers of eight.
//!
//! Every intrinsic below needs only AVX2 or F16C, which the existence of an [`Avx2`] value proves.

use super::{Isa, check_split, tile_chunks};
use std::arch::x86_64::*;

/// Proof that the CPU has AVX2 and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")).then_some(Self(()))
    }
    /// # Safety
    /// The CPU must have AVX2 and F16C.
    pub(crate) unsafe fn assume() -> Self {
        Self(())
    }
}

/// Applies an intrinsic to both halves.
macro_rules! both {
    ($op:ident($($x:expr),+)) => {{
        // SAFETY: `self` proves AVX2; the operation touches no memory.
        unsafe { [$op($($x[0]),+), $op($($x[1]),+)] }
    }};
}

impl Isa for Avx2 {
    type F = [__m256; 2];
    const TILE_TOKENS: usize = 4;

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch reads nothing and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: `self` proves AVX2.
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> Self::F {
        // SAFETY: `self` proves AVX2; both loads lie within the sixteen floats.
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
    }
    #[inline(always)]
    fn store(self, v: Self::F, out: &mut [f32; 16]) {
        // SAFETY: `self` proves AVX2; both stores lie within the sixteen floats.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v[1]);
        }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        let sign = self.splat(-0.0);
        both!(_mm256_andnot_ps(sign, a))
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: `self` proves AVX2.
        unsafe { [_mm256_round_ps::<NEAREST>(a[0]), _mm256_round_ps::<NEAREST>(a[1])] }
    }
    #[inline(always)]
    fn pow2(self, n: Self::F) -> Self::F {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let bias = _mm256_set1_epi32(127);
            let lo = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n[0]), bias));
            let hi = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n[1]), bias));
            [_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi)]
        }
    }
    #[inline(always)]
    fn f16_lanes(self, x: &[u16; 16]) -> Self::F {
        // SAFETY: `self` proves F16C; both loads lie within the sixteen halves.
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().add(8).cast())),
            ]
        }
    }
    #[inline(always)]
    fn bf16_lanes(self, x: &[u16; 16]) -> Self::F {
        // SAFETY: `self` proves AVX2; both loads lie within the sixteen halves.
        unsafe {
            let lo = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().cast()));
            let hi = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().add(8).cast()));
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(lo)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(hi)),
            ]
        }
    }
    #[inline(always)]
    fn to_i8(self, v: Self::F, out: &mut [i8; 16]) {
        // SAFETY: `self` proves AVX2; the store is the sixteen bytes of `out`. `vcvtps2dq` rounds halves to even and
        // turns NaN into i32::MIN; both packs saturate, so what leaves is clamped to int8.
        unsafe {
            let v = self.max(v, self.splat(-128.0));
            let lo = _mm256_cvtps_epi32(_mm256_min_ps(v[0], _mm256_set1_ps(127.0)));
            let hi = _mm256_cvtps_epi32(_mm256_min_ps(v[1], _mm256_set1_ps(127.0)));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(lo, hi));
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(out.as_mut_ptr().cast(), bytes);
        }
    }
    #[inline(always)]
    fn dot_tile<const R: usize, const T: usize>(self, w: [&[u8]; R], a: [&[i8]; T]) -> [[i32; T]; R] {
        let chunks = tile_chunks(w, a);
        // SAFETY: `self` proves AVX2; chunk c < chunks reads weights below 64 c + 64 and codes below 256 c + 256, the lengths
        // checked above.
        unsafe {
            let three = _mm256_set1_epi8(3);
            let ones = _mm256_set1_epi16(1);
            let mut wide = [[_mm256_setzero_si256(); T]; R];
            let mut start = 0;
            while start < chunks {
                // One product pair is at most 2 * 2 * 128 = 512 and a chunk adds eight of them to a lane, so seven
                // chunks stay below 2^15.
                let end = (start + 7).min(chunks);
                let mut narrow = [[_mm256_setzero_si256(); T]; R];
                for c in start..end {
                    for block in 0..2 {
                        let mut v = [_mm256_setzero_si256(); R];
                        for r in 0..R {
                            v[r] = _mm256_loadu_si256(w[r].as_ptr().add(64 * c + 32 * block).cast());
                        }
                        for field in (0..4).rev() {
                            let mut codes = [_mm256_setzero_si256(); R];
                            for r in 0..R {
                                codes[r] = _mm256_and_si256(v[r], three);
                                v[r] = _mm256_srli_epi16::<2>(v[r]);
                            }
                            for t in 0..T {
                                let at = 256 * c + 64 * field + 32 * block;
                                let q = _mm256_loadu_si256(a[t].as_ptr().add(at).cast());
                                for r in 0..R {
                                    narrow[r][t] =
                                        _mm256_add_epi16(narrow[r][t], _mm256_maddubs_epi16(codes[r], q));
                                }
                            }
                        }
                    }
                }
                for r in 0..R {
                    for t in 0..T {
                        wide[r][t] = _mm256_add_epi32(wide[r][t], _mm256_madd_epi16(narrow[r][t], ones));
                    }
                }
                start = end;
            }
            let mut dots = [[0; T]; R];
            for r in 0..R {
                for t in 0..T {
                    dots[r][t] = sum_lanes(wide[r][t]);
                }
            }
            dots
        }
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
            // SAFETY: `self` proves AVX2; block c reads its 64 codes and the parts below 4 c + 4, which exist.
            unsafe {
                let mut sums = [[_mm256_set1_epi32(start[q][0]); 2], [_mm256_set1_epi32(start[q][1]); 2]];
                let bytes = _mm256_set1_epi16(0xff);
                for c in 0..codes.len() {
                    if q == 0 {
                        self.prefetch(far.wrapping_add(64 * c));
                    }
                    for half in 0..2 {
                        let v = _mm256_loadu_si256(codes[c].as_ptr().add(32 * half).cast());
                        let (even, odd) = (_mm256_and_si256(v, bytes), _mm256_srli_epi16::<8>(v));
                        for part in 0..2 {
                            let four = rows[q][part].as_ptr().add(4 * c).cast::<i32>().read_unaligned();
                            let four = _mm256_set1_epi32(four);
                            let b_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(four));
                            let b_odd = _mm256_srai_epi16::<8>(four);
                            let products = _mm256_add_epi32(
                                _mm256_madd_epi16(even, b_even),
                                _mm256_madd_epi16(odd, b_odd),
                            );
                            sums[part][half] = _mm256_add_epi32(sums[part][half], products);
                        }
                    }
                }
                for half in 0..2 {
                    let high = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[0][half]), _mm256_set1_ps(128.0));
                    out[q][half] = _mm256_add_ps(high, _mm256_cvtepi32_ps(sums[1][half]));
                }
            }
        }
        out
    }
}

/// The sum of eight int32 lanes.
///
/// # Safety
/// Needs AVX2.
#[inline(always)]
unsafe fn sum_lanes(v: __m256i) -> i32 {
    // SAFETY: the caller has AVX2.
    unsafe {
        let v = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
        let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b01_00_11_10>(v));
        let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b10_11_00_01>(v));
        _mm_cvtsi128_si32(v)
    }
}
