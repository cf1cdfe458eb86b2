//! AVX-512 (F and BW), with or without VNNI: sixteen lanes in one register.
//!
//! Every intrinsic below needs only those sets, which the existence of an [`Avx512`] value proves.

use super::ask::Ask;
use super::avx2::with_avx2;
use super::{
    GROUP, Isa, LANES, PANEL, SHORTLY, check_split, column_chunks, lanes, nibble_chunks, panel_quads,
    row_chunks,
};
use crate::attention::FETCH;
use crate::ternary::lookup::{Places, Quads};
use crate::ternary::tiles::Dots;
use crate::ternary::{OutPtr, StoredRows, base3};
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Proof that the CPU has AVX-512 F and BW and POPCNT, VNNI where `VNNI` is true, and where `AMX` is true AMX for int8 too, which the
/// system lets this process use.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const VNNI: bool, const AMX: bool = false>(Ask);

impl<const VNNI: bool, const AMX: bool> Avx512<VNNI, AMX> {
    pub(crate) fn detect() -> Option<Self> {
        let base = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("popcnt");
        let vnni = !VNNI || is_x86_feature_detected!("avx512vnni");
        (base && vnni && (!AMX || super::amx::enable())).then(|| Self(Ask::new()))
    }
    /// # Safety
    /// The CPU must have AVX-512 F and BW and POPCNT, VNNI where `VNNI` is true, and AMX, allowed to the process, where `AMX` is.
    pub(crate) unsafe fn assume() -> Self {
        Self(Ask::new())
    }
}

/// Applies an intrinsic.
macro_rules! whole {
    ($op:expr, $($x:expr),+) => {{
        // SAFETY: `self` proves AVX-512F; the operation touches no memory.
        unsafe { $op($($x),+) }
    }};
}

impl<const VNNI: bool, const AMX: bool> Isa for Avx512<VNNI, AMX> {
    type F = __m512;
    const PANEL_TOKENS: usize = if AMX { 32 } else { 6 };
    const PANEL_PAIRS: bool = !AMX;
    const SUMS: usize = 16;
    const LOOKS_UP: bool = !VNNI;
    const TILES: bool = AMX;
    const COLUMN_NESTED: bool = VNNI && !AMX;

    with_avx2!();
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
    lanes! { whole:
        add(a, b) = _mm512_add_ps;
        sub(a, b) = _mm512_sub_ps;
        mul(a, b) = _mm512_mul_ps;
        div(a, b) = _mm512_div_ps;
        max(a, b) = _mm512_max_ps;
        abs(a) = _mm512_abs_ps;
        round(a) = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>;
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
    fn at_least(self, a: __m512, b: __m512) -> u16 {
        // SAFETY: `self` proves AVX-512F; no memory is touched.
        unsafe { _mm512_cmp_ps_mask::<_CMP_GE_OQ>(a, b) }
    }
    #[inline(always)]
    fn places(self, mask: u64, first: u32, out: &mut [MaybeUninit<u32>; 64]) -> usize {
        let mut count = 0;
        // SAFETY: `self` proves AVX-512F; a store is sixteen numbers, behind at most sixteen of each part before.
        unsafe {
            let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            for part in 0..4 {
                let (mask, first) = ((mask >> (16 * part)) as u16, first + 16 * part);
                let all = _mm512_add_epi32(lanes, _mm512_set1_epi32(first as i32));
                _mm512_storeu_si512(
                    out.as_mut_ptr().add(count).cast(),
                    _mm512_maskz_compress_epi32(mask, all),
                );
                count += mask.count_ones() as usize;
            }
        }
        count
    }
    #[inline(always)]
    fn dot_rows<const R: usize>(self, w: [&[u8]; R], ahead: [*const u8; R], a: &[i8]) -> [i32; R] {
        let chunks = row_chunks(w, a);
        // SAFETY: `self` proves AVX-512F.
        let mut sums = [unsafe { _mm512_setzero_si512() }; R];
        // Row after row, so that memory is read as one stream.
        for r in 0..R {
            // SAFETY: the CPU has the instructions, as `self` proves, and the lengths were checked above.
            sums[r] = unsafe {
                if VNNI {
                    dot_vnni(self, w[r], ahead[r], a, chunks)
                } else {
                    dot_maddubs(self, w[r], ahead[r], a, chunks)
                }
            };
        }
        // The lanes of different rows are folded together: a row of 2560 weights is only ten steps long.
        // SAFETY: `self` proves AVX-512F.
        unsafe { sum_lanes(sums) }
    }
    #[inline(always)]
    fn dot_tile<const R: usize, const T: usize>(
        self,
        w: [&[u8]; R],
        ahead: [*const u8; R],
        a: [&[i8]; T],
    ) -> [[i32; R]; T] {
        let mut dots = [[0; R]; T];
        if !VNNI || T == 1 {
            for t in 0..T {
                dots[t] = self.dot_rows(w, ahead, a[t]);
            }
            return dots;
        }
        let chunks = row_chunks(w, a[0]);
        for a in a {
            assert_eq!(a.len(), 256 * chunks);
        }
        // SAFETY: `self` proves VNNI; chunk c < chunks reads weights below 64 c + 64 and codes below 256 c + 256.
        unsafe {
            let three = _mm512_set1_epi8(3);
            let mut sums = [[_mm512_setzero_si512(); T]; R];
            for c in 0..chunks {
                let mut v = [_mm512_setzero_si512(); R];
                for r in 0..R {
                    v[r] = _mm512_loadu_si512(w[r].as_ptr().add(64 * c).cast());
                    self.prefetch(ahead[r].wrapping_add(64 * c));
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
            for r in 0..R {
                let row = sum_lanes(sums[r]);
                for t in 0..T {
                    dots[t][r] = row[t];
                }
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
        // SAFETY: `self` proves AVX-512F and BW; the loads are 64 bytes of a row, the stores 64 bytes of one of the 64 quads
        // of a chunk, each 4 * PANEL bytes, as the lengths just checked allow.
        unsafe {
            let three = _mm512_set1_epi8(3);
            for chunk in 0..bytes / 64 {
                let mut v = [_mm512_setzero_si512(); 16];
                for r in 0..16 {
                    v[r] = _mm512_loadu_si512(rows[r].as_ptr().add(64 * chunk).cast());
                }
                let v = transpose(v);
                for d in 0..16 {
                    let out = panel.as_mut_ptr().add((64 * chunk + d) * 4 * PANEL + 64 * half);
                    let field = |f: usize| out.add(16 * f * 4 * PANEL).cast();
                    _mm512_storeu_si512(field(0), _mm512_and_si512(_mm512_srli_epi16::<6>(v[d]), three));
                    _mm512_storeu_si512(field(1), _mm512_and_si512(_mm512_srli_epi16::<4>(v[d]), three));
                    _mm512_storeu_si512(field(2), _mm512_and_si512(_mm512_srli_epi16::<2>(v[d]), three));
                    _mm512_storeu_si512(field(3), _mm512_and_si512(v[d], three));
                }
            }
        }
    }
    #[inline(always)]
    fn panel_columns(self, columns: [&[u8; 64]; 4], part: usize, codes: &mut [u8]) {
        assert_eq!(codes.len(), 4 * PANEL);
        // SAFETY: `self` proves AVX-512F and BW; each column has 64 bytes, `codes` room for both stores.
        unsafe {
            let [a, b, c, d] = [
                _mm512_loadu_si512(columns[0].as_ptr().cast()),
                _mm512_loadu_si512(columns[1].as_ptr().cast()),
                _mm512_loadu_si512(columns[2].as_ptr().cast()),
                _mm512_loadu_si512(columns[3].as_ptr().cast()),
            ];
            let (ab, cd) = match part % 2 {
                0 => (_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d)),
                _ => (_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d)),
            };
            let shift = _mm_cvtsi32_si128(6 - 2 * (part as i32 / 2));
            let three = _mm512_set1_epi8(3);
            let (lo, hi) = (_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd));
            let out = codes.as_mut_ptr();
            _mm512_storeu_si512(out.cast(), _mm512_and_si512(_mm512_srl_epi16(lo, shift), three));
            _mm512_storeu_si512(out.add(64).cast(), _mm512_and_si512(_mm512_srl_epi16(hi, shift), three));
        }
    }
    #[inline(always)]
    fn panel_tile<const T: usize, const P: usize>(
        self,
        panels: [&[u8]; P],
        a: [&[i8]; T],
        dots: &mut [[[i32; PANEL]; T]; P],
    ) {
        assert!(VNNI, "without it sums are looked up");
        let quads = panel_quads(panels, a);
        if AMX && P == 1 && T == super::amx::TOKENS && quads % 16 == 0 {
            // SAFETY: `self` proves AMX; the lengths were checked above.
            unsafe {
                super::amx::panel_tile(panels[0], &a, quads, dots.as_flattened_mut().as_flattened_mut());
            }
            return;
        }
        // SAFETY: the CPU has the instructions, as `self` proves, and the lengths were checked above.
        unsafe { panel_vnni(panels, a, quads, dots) }
    }
    #[inline(always)]
    fn fast_base3(self) -> bool {
        VNNI && super::vbmi::detect()
    }
    #[inline(always)]
    unsafe fn base3_dots(
        self,
        w: StoredRows<'_>,
        count: usize,
        row: impl Fn(usize) -> usize,
        listed: bool,
        a: &[i8],
        bias: i32,
        factor: f32,
        out: OutPtr,
    ) {
        assert!(self.fast_base3());
        // SAFETY: just detected; the rest is the caller's contract.
        unsafe { super::vbmi::dots(self.0, w, count, row, listed, a, bias, factor, out) }
    }
    #[inline(always)]
    unsafe fn row_tiles<const T: usize>(
        self,
        w: StoredRows<'_>,
        count: usize,
        row: impl Fn(usize) -> usize,
        a: [&[i8]; T],
        biases: &[i32],
        factors: [f32; T],
        plain: &mut [u8],
        out: OutPtr,
    ) -> bool {
        let pays = T > 4 && self.fast_base3();
        if pays {
            // SAFETY: just detected; the rest is the caller's contract.
            unsafe { super::vbmi::tiles(self.0, w, count, row, a, biases, factors, plain, out) }
        }
        pays
    }
    #[inline(always)]
    fn base3_unpack(self, row: &[u8], out: &mut [u8]) {
        if self.fast_base3() {
            // SAFETY: just detected.
            return unsafe { super::vbmi::unpack(row, out) };
        }
        base3::unpack(row, out);
    }
    #[inline(always)]
    fn tile_codes(self, rows: &[&[i8]], tiles: &mut [i8]) {
        // SAFETY: `self` proves AVX-512F.
        unsafe { super::amx::tile_codes(rows, tiles) }
    }
    #[inline(always)]
    fn tile_rows(self, w: &[u8], row_bytes: usize, tiles: &[i8], put: impl FnMut(usize, usize, &Dots)) {
        assert!(AMX);
        // SAFETY: `self` proves AMX.
        unsafe { super::amx::rows(w, row_bytes, tiles, put) }
    }
    #[inline(always)]
    fn tile_columns(
        self,
        w: &[u8],
        column_bytes: usize,
        range: Range<usize>,
        codes: &[i8],
        tokens: usize,
        sums: &mut [i32],
    ) {
        assert!(AMX);
        // SAFETY: `self` proves AMX.
        unsafe { super::amx::columns(w, column_bytes, range, codes, tokens, sums) }
    }
    #[inline(always)]
    fn add_columns(
        self,
        columns: [&[u8]; GROUP],
        ahead: [[*const u8; GROUP]; 2],
        q: [i8; GROUP],
        sums: &mut [i32],
    ) {
        let chunks = column_chunks(columns, sums);
        // SAFETY: as above.
        unsafe {
            if VNNI {
                columns_vnni(self, columns, ahead, q, chunks, sums);
            } else {
                columns_maddubs(self, columns, ahead, q, chunks, sums);
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
        // SAFETY: the CPU has the instructions, as `self` proves, and the lengths were checked above.
        unsafe {
            let mut sums = [[_mm512_setzero_si512(); R]; T];
            if T == 1 {
                // Row after row, so that memory is read as one stream.
                for r in 0..R {
                    [[sums[0][r]]] = nibbles::<VNNI, 1, 1>(self.0, [w[r]], [ahead[r]], [q[0]], chunks);
                }
            } else {
                sums = nibbles::<VNNI, R, T>(self.0, w, ahead, q, chunks);
            }
            for t in 0..T {
                dots[t] = sum_lanes(sums[t]);
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
    ) -> [[__m512; Q]; P] {
        check_split(codes, rows);
        // SAFETY: `self` proves AVX-512 F and BW, and VNNI where it is used; block c reads its 64 codes and the parts
        // below 4 c + 4, which exist.
        unsafe {
            let zero = _mm512_setzero_si512();
            let mut sums = [[[zero; 2]; Q]; P];
            for p in 0..P {
                for q in 0..Q {
                    for part in 0..2 {
                        sums[p][q][part] = _mm512_set1_epi32(start[q][part]);
                    }
                }
            }
            let bytes = _mm512_set1_epi16(0xff);
            for c in 0..codes[0].len() {
                let (mut v, mut even, mut odd) = ([zero; P], [zero; P], [zero; P]);
                for p in 0..P {
                    self.prefetch(far[p].wrapping_add(FETCH * c));
                    v[p] = _mm512_loadu_si512(codes[p].get_unchecked(c).as_ptr().cast());
                    (even[p], odd[p]) = (_mm512_and_si512(v[p], bytes), _mm512_srli_epi16::<8>(v[p]));
                }
                for q in 0..Q {
                    for part in 0..2 {
                        let four = rows[q][part].as_ptr().add(4 * c).cast::<i32>().read_unaligned();
                        let four = _mm512_set1_epi32(four);
                        for p in 0..P {
                            let sum = &mut sums[p][q][part];
                            *sum = if VNNI {
                                _mm512_dpbusd_epi32(*sum, v[p], four)
                            } else {
                                let b_even = _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(four));
                                let b_odd = _mm512_srai_epi16::<8>(four);
                                let products = _mm512_add_epi32(
                                    _mm512_madd_epi16(even[p], b_even),
                                    _mm512_madd_epi16(odd[p], b_odd),
                                );
                                _mm512_add_epi32(*sum, products)
                            };
                        }
                    }
                }
            }
            let mut out = [[_mm512_setzero_ps(); Q]; P];
            for p in 0..P {
                for q in 0..Q {
                    let [high, low] = sums[p][q];
                    let high = _mm512_mul_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(128.0));
                    out[p][q] = _mm512_add_ps(high, _mm512_cvtepi32_ps(low));
                }
            }
            out
        }
    }
}

/// The lanes of the sums of [`Isa::nibble_dots`].
///
/// # Safety
/// Needs AVX-512 F and BW, VNNI where that is true, 64 `chunks` bytes in each `w` and 128 `chunks` codes in each `q`.
#[inline(always)]
unsafe fn nibbles<const VNNI: bool, const R: usize, const T: usize>(
    ask: Ask,
    w: [&[u8]; R],
    ahead: [*const u8; R],
    q: [&[i8]; T],
    chunks: usize,
) -> [[__m512i; R]; T] {
    let run = if VNNI { chunks.max(1) } else { 4 };
    // SAFETY: the caller's contract; chunk c < chunks reads weights below 64 c + 64 and codes below 128 c + 128.
    unsafe {
        let (mask, ones) = (_mm512_set1_epi8(15), _mm512_set1_epi16(1));
        let zero = _mm512_setzero_si512();
        let mut sums = [[zero; R]; T];
        let mut start = 0;
        while start < chunks {
            let end = (start + run).min(chunks);
            let mut parts = [[zero; R]; T];
            for c in start..end {
                let mut v = [zero; R];
                for r in 0..R {
                    v[r] = _mm512_loadu_si512(w[r].as_ptr().add(64 * c).cast());
                    ask.line(ahead[r].wrapping_add(64 * c));
                    // Such rows follow each other; single ones of which more is asked are anywhere.
                    if R > 1 || T == 1 {
                        ask.again(w[r].as_ptr().wrapping_add(64 * c + SHORTLY));
                    }
                }
                for half in 0..2 {
                    let mut codes = [zero; R];
                    for r in 0..R {
                        codes[r] = _mm512_and_si512(v[r], mask);
                        v[r] = _mm512_srli_epi16::<4>(v[r]);
                    }
                    for t in 0..T {
                        let q = _mm512_loadu_si512(q[t].as_ptr().add(128 * c + 64 * half).cast());
                        for r in 0..R {
                            let sum = &mut parts[t][r];
                            // Without VNNI a pair is at most 2 * 15 * 128 = 3840, eight of them below 2^15.
                            *sum = if VNNI {
                                _mm512_dpbusd_epi32(*sum, codes[r], q)
                            } else {
                                _mm512_add_epi16(*sum, _mm512_maddubs_epi16(codes[r], q))
                            };
                        }
                    }
                }
            }
            for t in 0..T {
                for r in 0..R {
                    let part = parts[t][r];
                    let part = if VNNI { part } else { _mm512_madd_epi16(part, ones) };
                    sums[t][r] = _mm512_add_epi32(sums[t][r], part);
                }
            }
            start = end;
        }
        sums
    }
}

/// Transposes sixteen registers of sixteen 32-bit lanes.
///
/// # Safety
/// Needs AVX-512F.
#[inline(always)]
pub(super) unsafe fn transpose(v: [__m512i; 16]) -> [__m512i; 16] {
    // SAFETY: the caller has AVX-512F; no memory is touched.
    unsafe {
        let zero = _mm512_setzero_si512();
        let (mut a, mut b) = ([zero; 16], [zero; 16]);
        for i in 0..8 {
            a[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
            a[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
        }
        // b[4 i + j]: column j of each 128-bit lane, of rows 4 i to 4 i + 3.
        for i in 0..4 {
            b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
            b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
            b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
            b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
        }
        let mut out = [zero; 16];
        for j in 0..4 {
            let low = _mm512_shuffle_i32x4::<0x88>(b[j], b[4 + j]);
            let high = _mm512_shuffle_i32x4::<0xdd>(b[j], b[4 + j]);
            let low2 = _mm512_shuffle_i32x4::<0x88>(b[8 + j], b[12 + j]);
            let high2 = _mm512_shuffle_i32x4::<0xdd>(b[8 + j], b[12 + j]);
            out[j] = _mm512_shuffle_i32x4::<0x88>(low, low2);
            out[8 + j] = _mm512_shuffle_i32x4::<0xdd>(low, low2);
            out[4 + j] = _mm512_shuffle_i32x4::<0x88>(high, high2);
            out[12 + j] = _mm512_shuffle_i32x4::<0xdd>(high, high2);
        }
        out
    }
}

/// # Safety
/// Needs AVX-512 F, BW and VNNI, `quads` quads in each panel, a multiple of four, and 4 `quads` codes in each `a`.
#[inline(always)]
unsafe fn panel_vnni<const T: usize, const P: usize>(
    panels: [&[u8]; P],
    a: [&[i8]; T],
    quads: usize,
    dots: &mut [[[i32; PANEL]; T]; P],
) {
    // Where another guest has a part of the core, instructions are what limits: four quads a turn need few beside the products.
    const TURN: usize = 4;
    // SAFETY: quad i < quads reads panel bytes below 128 i + 128 and codes below 4 i + 4.
    unsafe {
        let mut sums = [[[_mm512_setzero_si512(); 2]; P]; T];
        // The codes of the tokens that follow in memory are wanted next: they come to the second-level cache meanwhile.
        let next = a[T - 1].as_ptr().wrapping_add(4 * quads);
        for turn in 0..quads / TURN {
            let (begin, codes) = (128 * TURN * turn, 4 * TURN * turn);
            for line in 0..T.div_ceil(4) {
                _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(T * codes + 64 * line));
            }
            for i in 0..TURN {
                let mut w = [[_mm512_setzero_si512(); 2]; P];
                for p in 0..P {
                    for half in 0..2 {
                        let at = panels[p].as_ptr().add(begin).add(128 * i + 64 * half);
                        w[p][half] = _mm512_loadu_si512(at.cast());
                    }
                }
                for t in 0..T {
                    let q = a[t].as_ptr().add(codes).cast::<i32>().add(i).read_unaligned();
                    let q = _mm512_set1_epi32(q);
                    for p in 0..P {
                        for half in 0..2 {
                            sums[t][p][half] = _mm512_dpbusd_epi32(sums[t][p][half], w[p][half], q);
                        }
                    }
                }
            }
        }
        for t in 0..T {
            for p in 0..P {
                for half in 0..2 {
                    let out = dots[p][t].as_mut_ptr().add(16 * half).cast();
                    _mm512_storeu_si512(out, sums[t][p][half]);
                }
            }
        }
    }
}

/// Interleaves the bytes of four registers: lane l of part k holds the bytes 4 k to 4 k + 3 of their 128-bit lanes l.
///
/// # Safety
/// Needs AVX-512BW.
#[inline(always)]
unsafe fn interleave([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    // SAFETY: the caller has AVX-512BW; no memory is touched.
    unsafe {
        let (ab, ab2) = (_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b));
        let (cd, cd2) = (_mm512_unpacklo_epi8(c, d), _mm512_unpackhi_epi8(c, d));
        [
            _mm512_unpacklo_epi16(ab, cd),
            _mm512_unpackhi_epi16(ab, cd),
            _mm512_unpacklo_epi16(ab2, cd2),
            _mm512_unpackhi_epi16(ab2, cd2),
        ]
    }
}

/// The interleaved bytes of columns `4 quad..4 quad + 4` in `chunk`, and their four factors in every lane.
///
/// # Safety
/// Needs AVX-512 F and BW, and more than `chunk` chunks in each column.
#[inline(always)]
unsafe fn column_quad<I: Isa>(
    isa: I,
    columns: [&[u8]; GROUP],
    ahead: [[*const u8; GROUP]; 2],
    q: [i8; GROUP],
    quad: usize,
    chunk: usize,
) -> ([__m512i; 4], __m512i) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut v = [_mm512_setzero_si512(); 4];
        for i in 0..4 {
            v[i] = _mm512_loadu_si512(columns[4 * quad + i].as_ptr().add(64 * chunk).cast());
            isa.prefetch(ahead[1][4 * quad + i].wrapping_add(64 * chunk));
            isa.prefetch_again(ahead[0][4 * quad + i].wrapping_add(64 * chunk));
        }
        let factors = i32::from_le_bytes([
            q[4 * quad] as u8,
            q[4 * quad + 1] as u8,
            q[4 * quad + 2] as u8,
            q[4 * quad + 3] as u8,
        ]);
        (interleave(v), _mm512_set1_epi32(factors))
    }
}

/// # Safety
/// Needs AVX-512 F, BW and VNNI, `chunks` chunks in each column and 256 `chunks` sums.
#[inline(always)]
unsafe fn columns_vnni<I: Isa>(
    isa: I,
    columns: [&[u8]; GROUP],
    ahead: [[*const u8; GROUP]; 2],
    q: [i8; GROUP],
    chunks: usize,
    sums: &mut [i32],
) {
    // SAFETY: chunk c < chunks reads bytes below 64 c + 64 of a column and sums below 256 c + 256.
    unsafe {
        // A column's fields are all multiplied with one code, so what later ones add can be taken off at the end: the first needs no mask.
        let fields = if I::COLUMN_NESTED { [0xffu8, 0x3f, 0x0f, 0x03] } else { [0xc0, 0x30, 0x0c, 0x03] };
        let mut masks = [_mm512_setzero_si512(); 4];
        for f in 0..4 {
            masks[f] = _mm512_set1_epi8(fields[f] as i8);
        }
        for c in 0..chunks {
            let (v, q0) = column_quad(isa, columns, ahead, q, 0, c);
            let (u, q1) = column_quad(isa, columns, ahead, q, 1, c);
            for field in 0..4 {
                for k in 0..4 {
                    let out = sums.as_mut_ptr().add(256 * c + 64 * field + 16 * k).cast();
                    let sum = _mm512_loadu_si512(out);
                    let sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(v[k], masks[field]), q0);
                    let sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(u[k], masks[field]), q1);
                    _mm512_storeu_si512(out, sum);
                }
            }
        }
    }
}

/// # Safety
/// Needs AVX-512 F and BW, `chunks` chunks in each column and 256 `chunks` sums.
#[inline(always)]
unsafe fn columns_maddubs<I: Isa>(
    isa: I,
    columns: [&[u8]; GROUP],
    ahead: [[*const u8; GROUP]; 2],
    q: [i8; GROUP],
    chunks: usize,
    sums: &mut [i32],
) {
    // SAFETY: chunk c < chunks reads bytes below 64 c + 64 of a column and sums below 256 c + 256.
    unsafe {
        let three = _mm512_set1_epi8(3);
        let scales =
            [_mm512_set1_epi16(64), _mm512_set1_epi16(16), _mm512_set1_epi16(4), _mm512_set1_epi16(1)];
        for c in 0..chunks {
            let (mut v, q0) = column_quad(isa, columns, ahead, q, 0, c);
            let (mut u, q1) = column_quad(isa, columns, ahead, q, 1, c);
            for field in (0..4).rev() {
                for k in 0..4 {
                    // At most 2 * 512.
                    let pairs = _mm512_add_epi16(
                        _mm512_maddubs_epi16(_mm512_and_si512(v[k], three), q0),
                        _mm512_maddubs_epi16(_mm512_and_si512(u[k], three), q1),
                    );
                    let out = sums.as_mut_ptr().add(256 * c + 64 * field + 16 * k).cast();
                    let sum = _mm512_madd_epi16(pairs, scales[field]);
                    _mm512_storeu_si512(out, _mm512_add_epi32(_mm512_loadu_si512(out), sum));
                    v[k] = _mm512_srli_epi16::<2>(v[k]);
                    u[k] = _mm512_srli_epi16::<2>(u[k]);
                }
            }
        }
    }
}

/// # Safety
/// Needs AVX-512 F, BW and VNNI, 64 `chunks` bytes in `w` and 256 `chunks` codes in `a`.
#[inline(always)]
unsafe fn dot_vnni<I: Isa>(isa: I, w: &[u8], ahead: *const u8, a: &[i8], chunks: usize) -> __m512i {
    // SAFETY: chunk c < chunks reads weights below 64 c + 64 and codes below 256 c + 256.
    unsafe {
        // The fields are multiplied where they stand in the byte (as 1, 4, 16 or 64 times the code), each into an
        // accumulator of its own, and only the accumulators are shifted. A field's sum is at most 64 * 2 * 128 * 4 a
        // step, so int32 holds more than 2^15 chunks: rows of eight million weights.
        let masks = [
            _mm512_set1_epi8(0xc0u8 as i8),
            _mm512_set1_epi8(0x30),
            _mm512_set1_epi8(0x0c),
            _mm512_set1_epi8(0x03),
        ];
        let mut fields = [_mm512_setzero_si512(); 4];
        for c in 0..chunks {
            let v = _mm512_loadu_si512(w.as_ptr().add(64 * c).cast());
            isa.prefetch(ahead.wrapping_add(64 * c));
            for field in 0..4 {
                let q = _mm512_loadu_si512(a.as_ptr().add(256 * c + 64 * field).cast());
                fields[field] = _mm512_dpbusd_epi32(fields[field], _mm512_and_si512(v, masks[field]), q);
            }
        }
        let [f0, f1, f2, f3] = fields;
        let high = _mm512_add_epi32(_mm512_srai_epi32::<6>(f0), _mm512_srai_epi32::<4>(f1));
        _mm512_add_epi32(high, _mm512_add_epi32(_mm512_srai_epi32::<2>(f2), f3))
    }
}

/// # Safety
/// Needs AVX-512 F and BW, 64 `chunks` bytes in `w` and 256 `chunks` codes in `a`.
#[inline(always)]
unsafe fn dot_maddubs<I: Isa>(isa: I, w: &[u8], ahead: *const u8, a: &[i8], chunks: usize) -> __m512i {
    // SAFETY: chunk c < chunks reads weights below 64 c + 64 and codes below 256 c + 256.
    unsafe {
        let three = _mm512_set1_epi8(3);
        let ones = _mm512_set1_epi16(1);
        let mut wide = _mm512_setzero_si512();
        let mut start = 0;
        while start < chunks {
            // One product pair is at most 2 * 2 * 128 = 512 and a chunk adds two of them to a lane, so thirty chunks stay
            // below 2^15.
            let end = (start + 30).min(chunks);
            let mut narrow = [_mm512_setzero_si512(); 2];
            for c in start..end {
                let mut v = _mm512_loadu_si512(w.as_ptr().add(64 * c).cast());
                isa.prefetch(ahead.wrapping_add(64 * c));
                for field in (0..4).rev() {
                    let q = _mm512_loadu_si512(a.as_ptr().add(256 * c + 64 * field).cast());
                    let pairs = _mm512_maddubs_epi16(_mm512_and_si512(v, three), q);
                    narrow[field % 2] = _mm512_add_epi16(narrow[field % 2], pairs);
                    v = _mm512_srli_epi16::<2>(v);
                }
            }
            for narrow in narrow {
                wide = _mm512_add_epi32(wide, _mm512_madd_epi16(narrow, ones));
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
pub(super) unsafe fn sum_lanes<const T: usize>(v: [__m512i; T]) -> [i32; T] {
    // SAFETY: the caller has AVX-512F; the stores are of four sums.
    unsafe {
        let mut out = [0; T];
        let mut t = 0;
        while t + 4 <= T {
            let four = sum_four([v[t], v[t + 1], v[t + 2], v[t + 3]]);
            _mm_storeu_si128(out[t..t + 4].as_mut_ptr().cast(), four);
            t += 4;
        }
        while t < T {
            out[t] = _mm512_reduce_add_epi32(v[t]);
            t += 1;
        }
        out
    }
}

/// The sums of the lanes of four registers.
///
/// # Safety
/// Needs AVX-512F.
#[inline(always)]
pub(super) unsafe fn sum_four(v: [__m512i; 4]) -> __m128i {
    // SAFETY: the caller has AVX-512F; no memory is touched.
    unsafe {
        let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
        let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
        let quads = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        let half = _mm256_add_epi32(_mm512_castsi512_si256(quads), _mm512_extracti64x4_epi64::<1>(quads));
        _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half))
    }
}
