//! AVX-512 (F and BW), with or without VNNI: sixteen lanes in one register.
//!
//! Every intrinsic below needs only those sets, which the existence of an [`Avx512`] value proves.

use super::{Isa, check_split, tile_chunks};
use std::arch::x86_64::*;

/// Proof that the CPU has AVX-512 F and BW, and VNNI where `VNNI` is true.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const VNNI: bool>(());

impl<const VNNI: bool> Avx512<VNNI> {
    pub(crate) fn detect() -> Option<Self> {
        let base = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        (base && (!VNNI || is_x86_feature_detected!("avx512vnni"))).then_some(Self(()))
    }
    /// # Safety
    /// The CPU must have AVX-512 F and BW, and VNNI where `VNNI` is true.
    pub(crate) unsafe fn assume() -> Self {
        Self(())
    }
}

impl<const VNNI: bool> Isa for Avx512<VNNI> {
    type F = __m512;
    const TILE_TOKENS: usize = 8;

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch reads nothing and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` proves AVX-512F; no memory is touched.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> __m512 {
        // SAFETY: `self` proves AVX-512F; the load is the sixteen floats.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, v: __m512, out: &mut [f32; 16]) {
        // SAFETY: `self` proves AVX-512F; the store is the sixteen floats.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F; no memory is touched.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F; no memory is touched.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F; no memory is touched.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F; no memory is touched.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F; no memory is touched.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F; no memory is touched.
        unsafe { _mm512_abs_ps(a) }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F; no memory is touched.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn pow2(self, n: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F; no memory is touched.
        unsafe {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
        }
    }
    #[inline(always)]
    fn f16_lanes(self, x: &[u16; 16]) -> __m512 {
        // SAFETY: `self` proves AVX-512F; the load is the sixteen halves.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn bf16_lanes(self, x: &[u16; 16]) -> __m512 {
        // SAFETY: `self` proves AVX-512F; the load is the sixteen halves.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    fn to_i8(self, v: __m512, out: &mut [i8; 16]) {
        // SAFETY: `self` proves AVX-512F; the store is the sixteen bytes of `out`. The maximum takes its second
        // operand where the first is NaN, so what is converted lies in [-128, 127].
        unsafe {
            let v = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(-128.0)), _mm512_set1_ps(127.0));
            let bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v));
            _mm_storeu_si128(out.as_mut_ptr().cast(), bytes);
        }
    }
    #[inline(always)]
    fn dot_tile<const R: usize, const T: usize>(self, w: [&[u8]; R], a: [&[i8]; T]) -> [[i32; T]; R] {
        let chunks = tile_chunks(w, a);
        // SAFETY: the CPU has the instructions, as `self` proves, and the lengths were checked above.
        let sums =
            unsafe { if VNNI { dot_vnni::<R, T>(w, a, chunks) } else { dot_maddubs::<R, T>(w, a, chunks) } };
        let mut dots = [[0; T]; R];
        if T == 1 {
            // The lanes of different rows are folded together: a row of 2560 weights is only ten steps long.
            let mut column = [sums[0][0]; R];
            for r in 1..R {
                column[r] = sums[r][0];
            }
            // SAFETY: `self` proves AVX-512F.
            let column = unsafe { sum_lanes(column) };
            for r in 0..R {
                dots[r][0] = column[r];
            }
            return dots;
        }
        for r in 0..R {
            // SAFETY: `self` proves AVX-512F.
            dots[r] = unsafe { sum_lanes(sums[r]) };
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
    ) -> [__m512; Q] {
        check_split(codes, rows);
        // SAFETY: `self` proves AVX-512 F and BW, and VNNI where it is used; block c reads its 64 codes and the parts
        // below 4 c + 4, which exist.
        unsafe {
            let mut sums = [[_mm512_setzero_si512(); 2]; Q];
            for q in 0..Q {
                for part in 0..2 {
                    sums[q][part] = _mm512_set1_epi32(start[q][part]);
                }
            }
            let bytes = _mm512_set1_epi16(0xff);
            for c in 0..codes.len() {
                self.prefetch(far.wrapping_add(64 * c));
                let v = _mm512_loadu_si512(codes[c].as_ptr().cast());
                let (even, odd) = (_mm512_and_si512(v, bytes), _mm512_srli_epi16::<8>(v));
                for q in 0..Q {
                    for part in 0..2 {
                        let four = rows[q][part].as_ptr().add(4 * c).cast::<i32>().read_unaligned();
                        let four = _mm512_set1_epi32(four);
                        sums[q][part] = if VNNI {
                            _mm512_dpbusd_epi32(sums[q][part], v, four)
                        } else {
                            let b_even = _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(four));
                            let b_odd = _mm512_srai_epi16::<8>(four);
                            let products = _mm512_add_epi32(
                                _mm512_madd_epi16(even, b_even),
                                _mm512_madd_epi16(odd, b_odd),
                            );
                            _mm512_add_epi32(sums[q][part], products)
                        };
                    }
                }
            }
            let mut out = [_mm512_setzero_ps(); Q];
            for q in 0..Q {
                let high = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[q][0]), _mm512_set1_ps(128.0));
                out[q] = _mm512_add_ps(high, _mm512_cvtepi32_ps(sums[q][1]));
            }
            out
        }
    }
}

/// # Safety
/// Needs AVX-512 F, BW and VNNI, 64 `chunks` bytes in each `w` and 256 `chunks` codes in each `a`.
#[inline(always)]
unsafe fn dot_vnni<const R: usize, const T: usize>(
    w: [&[u8]; R],
    a: [&[i8]; T],
    chunks: usize,
) -> [[__m512i; T]; R] {
    // SAFETY: chunk c < chunks reads weights below 64 c + 64 and codes below 256 c + 256.
    unsafe {
        let mut sums = [[_mm512_setzero_si512(); T]; R];
        if T == 1 {
            // One token: the fields are multiplied where they stand in the byte (as 1, 4, 16 or 64 times the code), each
            // into an accumulator of its own, and only the accumulators are shifted. A field's sum is at most
            // 64 * 2 * 128 * 4 a step, so int32 holds more than 2^15 chunks: rows of eight million weights.
            let masks = [
                _mm512_set1_epi8(0xc0u8 as i8),
                _mm512_set1_epi8(0x30),
                _mm512_set1_epi8(0x0c),
                _mm512_set1_epi8(0x03),
            ];
            // Row after row, so that memory is read as one stream; the hardware's prefetch of it is better than ours.
            for r in 0..R {
                let mut fields = [_mm512_setzero_si512(); 4];
                for c in 0..chunks {
                    let v = _mm512_loadu_si512(w[r].as_ptr().add(64 * c).cast());
                    for field in 0..4 {
                        let q = _mm512_loadu_si512(a[0].as_ptr().add(256 * c + 64 * field).cast());
                        let codes = _mm512_and_si512(v, masks[field]);
                        fields[field] = _mm512_dpbusd_epi32(fields[field], codes, q);
                    }
                }
                let [f0, f1, f2, f3] = fields;
                let high = _mm512_add_epi32(_mm512_srai_epi32::<6>(f0), _mm512_srai_epi32::<4>(f1));
                sums[r][0] = _mm512_add_epi32(high, _mm512_add_epi32(_mm512_srai_epi32::<2>(f2), f3));
            }
            return sums;
        }
        let three = _mm512_set1_epi8(3);
        for c in 0..chunks {
            let mut v = [_mm512_setzero_si512(); R];
            for r in 0..R {
                v[r] = _mm512_loadu_si512(w[r].as_ptr().add(64 * c).cast());
            }
            for field in (0..4).rev() {
                let mut codes = [_mm512_setzero_si512(); R];
                for r in 0..R {
                    codes[r] = _mm512_and_si512(v[r], three);
                    v[r] = _mm512_srli_epi16::<2>(v[r]);
                }
                for t in 0..T {
                    let q = _mm512_loadu_si512(a[t].as_ptr().add(256 * c + 64 * field).cast());
                    for r in 0..R {
                        sums[r][t] = _mm512_dpbusd_epi32(sums[r][t], codes[r], q);
                    }
                }
            }
        }
        sums
    }
}

/// # Safety
/// Needs AVX-512 F and BW, 64 `chunks` bytes in each `w` and 256 `chunks` codes in each `a`.
#[inline(always)]
unsafe fn dot_maddubs<const R: usize, const T: usize>(
    w: [&[u8]; R],
    a: [&[i8]; T],
    chunks: usize,
) -> [[__m512i; T]; R] {
    // SAFETY: chunk c < chunks reads weights below 64 c + 64 and codes below 256 c + 256.
    unsafe {
        let three = _mm512_set1_epi8(3);
        let ones = _mm512_set1_epi16(1);
        let mut wide = [[_mm512_setzero_si512(); T]; R];
        let mut start = 0;
        while start < chunks {
            // One product pair is at most 2 * 2 * 128 = 512 and a chunk adds four of them to a lane, so fifteen chunks
            // stay below 2^15.
            let end = (start + 15).min(chunks);
            let mut narrow = [[_mm512_setzero_si512(); T]; R];
            for c in start..end {
                let mut v = [_mm512_setzero_si512(); R];
                for r in 0..R {
                    v[r] = _mm512_loadu_si512(w[r].as_ptr().add(64 * c).cast());
                }
                for field in (0..4).rev() {
                    let mut codes = [_mm512_setzero_si512(); R];
                    for r in 0..R {
                        codes[r] = _mm512_and_si512(v[r], three);
                        v[r] = _mm512_srli_epi16::<2>(v[r]);
                    }
                    for t in 0..T {
                        let q = _mm512_loadu_si512(a[t].as_ptr().add(256 * c + 64 * field).cast());
                        for r in 0..R {
                            narrow[r][t] = _mm512_add_epi16(narrow[r][t], _mm512_maddubs_epi16(codes[r], q));
                        }
                    }
                }
            }
            for r in 0..R {
                for t in 0..T {
                    wide[r][t] = _mm512_add_epi32(wide[r][t], _mm512_madd_epi16(narrow[r][t], ones));
                }
            }
            start = end;
        }
        wide
    }
}

/// The sum of the sixteen int32 lanes of each register. Four registers at a time are folded together, at a third
/// of the cost of one after the other.
///
/// # Safety
/// Needs AVX-512F.
#[inline(always)]
unsafe fn sum_lanes<const T: usize>(v: [__m512i; T]) -> [i32; T] {
    // SAFETY: the caller has AVX-512F; the store is the four sums of `four`.
    unsafe {
        let mut out = [0; T];
        let mut t = 0;
        while t + 4 <= T {
            let ab = _mm512_add_epi32(
                _mm512_unpacklo_epi32(v[t], v[t + 1]),
                _mm512_unpackhi_epi32(v[t], v[t + 1]),
            );
            let cd = _mm512_add_epi32(
                _mm512_unpacklo_epi32(v[t + 2], v[t + 3]),
                _mm512_unpackhi_epi32(v[t + 2], v[t + 3]),
            );
            let quads = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
            let half = _mm256_add_epi32(_mm512_castsi512_si256(quads), _mm512_extracti64x4_epi64::<1>(quads));
            let sums = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half));
            let mut four = [0i32; 4];
            _mm_storeu_si128(four.as_mut_ptr().cast(), sums);
            out[t..t + 4].copy_from_slice(&four);
            t += 4;
        }
        while t < T {
            out[t] = _mm512_reduce_add_epi32(v[t]);
            t += 1;
        }
        out
    }
}
