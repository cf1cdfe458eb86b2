//! AVX2 with F16C: sixteen lanes as two registers of eight.
//!
//! Every intrinsic below needs only AVX2 or F16C, which the existence of an [`Avx2`] value proves.

use super::ask::Ask;
use super::{GROUP, Isa, LANES, SHORTLY, check_split, column_chunks, lanes, nibble_chunks, row_chunks};
use crate::attention::FETCH;
use crate::ternary::lookup::{self, GROUPS, Places, Quads};
use crate::ternary::{OutPtr, StoredRows};
use std::arch::x86_64::*;

/// Proof that the CPU has AVX2 and F16C, and AVX-VNNI where `VNNI` is true.
#[derive(Clone, Copy)]
pub(crate) struct Avx2<const VNNI: bool>(Ask);

impl<const VNNI: bool> Avx2<VNNI> {
    pub(crate) fn detect() -> Option<Self> {
        let base = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c");
        (base && (!VNNI || is_x86_feature_detected!("avxvnni"))).then(|| Self(Ask::new()))
    }
    /// # Safety
    /// The CPU must have AVX2 and F16C, and AVX-VNNI where `VNNI` is true.
    pub(crate) unsafe fn assume() -> Self {
        Self(Ask::new())
    }
}

/// Applies an intrinsic to both halves.
macro_rules! both {
    ($op:expr, $($x:expr),+) => {{
        // SAFETY: `self` proves AVX2; the operation touches no memory.
        unsafe { [$op($($x[0]),+), $op($($x[1]),+)] }
    }};
}

/// Methods of [`Isa`] that are the same with AVX-512, which comes with AVX2.
macro_rules! with_avx2 {
    () => {
        #[inline(always)]
        fn prefetch(self, p: *const u8) {
            self.0.line(p);
        }
        #[inline(always)]
        fn prefetch_again(self, p: *const u8) {
            self.0.again(p);
        }
        #[inline(always)]
        fn ahead(self) -> usize {
            self.0.ahead()
        }
        #[inline(always)]
        fn ahead_in_cache(self) -> usize {
            self.0.in_cache
        }
        #[inline(always)]
        fn nonzero(self, codes: &[i8; 16]) -> u16 {
            super::avx2::nonzero(codes)
        }
        #[inline(always)]
        fn transpose(self, rows: &[[i8; LANES]; LANES], out: &mut [[i8; LANES]; LANES]) {
            // SAFETY: `self` proves AVX2.
            unsafe { super::avx2::transpose(rows, out) }
        }
        #[inline(always)]
        fn fill_tables(self, quads: Quads<'_>, tables: &mut [[i16; LANES]]) {
            // SAFETY: `self` proves AVX2.
            unsafe { super::avx2::fill_tables(quads, tables) }
        }
        #[inline(always)]
        unsafe fn add_looked_up(self, tables: &[[i16; LANES]], places: &[Places], sums: &mut [[i16; LANES]]) {
            // SAFETY: `self` proves AVX2; the rest is the caller's contract.
            unsafe { super::avx2::add_looked_up(tables, places, sums) }
        }
    };
}
pub(super) use with_avx2;

impl<const VNNI: bool> Isa for Avx2<VNNI> {
    type F = [__m256; 2];
    const PANEL_TOKENS: usize = 1;
    const LOOKS_UP: bool = true;

    with_avx2!();
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
    lanes! { both:
        add(a, b) = _mm256_add_ps;
        sub(a, b) = _mm256_sub_ps;
        mul(a, b) = _mm256_mul_ps;
        div(a, b) = _mm256_div_ps;
        max(a, b) = _mm256_max_ps;
        round(a) = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>;
    }
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        let sign = self.splat(-0.0);
        both!(_mm256_andnot_ps, sign, a)
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
    fn at_least(self, a: Self::F, b: Self::F) -> u16 {
        let [lo, hi] = both!(_mm256_cmp_ps::<_CMP_GE_OQ>, a, b);
        // SAFETY: `self` proves AVX2.
        unsafe { (_mm256_movemask_ps(lo) | _mm256_movemask_ps(hi) << 8) as u16 }
    }
    #[inline(always)]
    fn dot_rows<const R: usize>(self, w: [&[u8]; R], ahead: [*const u8; R], a: &[i8]) -> [i32; R] {
        let chunks = row_chunks(w, a);
        // SAFETY: `self` proves AVX2, and AVX-VNNI where it is used; chunk c < chunks reads weights below 64 c + 64 and codes
        // below 256 c + 256, the lengths checked above.
        unsafe {
            let three = _mm256_set1_epi8(3);
            let ones = _mm256_set1_epi16(1);
            let mut dots = [0; R];
            // Row after row, so that memory is read as one stream.
            for r in 0..R {
                let mut wide = [_mm256_setzero_si256(); 2];
                let mut start = 0;
                while start < chunks {
                    // One product pair is at most 2 * 2 * 128 = 512 and a chunk adds four of them to a lane, so fifteen
                    // chunks stay below 2^15.
                    let end = (start + 15).min(chunks);
                    let mut narrow = [_mm256_setzero_si256(); 2];
                    for c in start..end {
                        self.prefetch(ahead[r].wrapping_add(64 * c));
                        for block in 0..2 {
                            let mut v = _mm256_loadu_si256(w[r].as_ptr().add(64 * c + 32 * block).cast());
                            for field in (0..4).rev() {
                                let codes = _mm256_and_si256(v, three);
                                v = _mm256_srli_epi16::<2>(v);
                                let at = 256 * c + 64 * field + 32 * block;
                                let q = _mm256_loadu_si256(a.as_ptr().add(at).cast());
                                if VNNI {
                                    wide[block] = _mm256_dpbusd_avx_epi32(wide[block], codes, q);
                                } else {
                                    let pairs = _mm256_maddubs_epi16(codes, q);
                                    narrow[block] = _mm256_add_epi16(narrow[block], pairs);
                                }
                            }
                        }
                    }
                    if !VNNI {
                        for block in 0..2 {
                            let pairs = _mm256_madd_epi16(narrow[block], ones);
                            wide[block] = _mm256_add_epi32(wide[block], pairs);
                        }
                    }
                    start = end;
                }
                dots[r] = sum_lanes(_mm256_add_epi32(wide[0], wide[1]));
            }
            dots
        }
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
        const ROWS: usize = 8;
        let chunks = a[0].len() / 256;
        for a in a {
            assert_eq!(a.len(), 256 * chunks);
        }
        assert!(w.base3 || w.row_bytes == 64 * chunks);
        let ahead = self.ahead().div_ceil(w.row_bytes).max(2);
        let codes = a.map(<[i8]>::as_ptr);
        for first in (0..count).step_by(ROWS) {
            let some = ROWS.min(count - first);
            // SAFETY: `self` proves AVX2, and AVX-VNNI where it is used; a row has 64 bytes for each 256 codes.
            unsafe {
                let mut sums = [[_mm256_setzero_si256(); ROWS]; T];
                for r in 0..some {
                    let mut stored = &w.bytes[row(first + r) * w.row_bytes..][..w.row_bytes];
                    let mut next = w.bytes.as_ptr().wrapping_add(row(first + r + ahead) * w.row_bytes);
                    if w.base3 {
                        // Several tokens share what is unpacked once.
                        for line in 0..w.row_bytes / 64 {
                            self.prefetch(next.wrapping_add(64 * line));
                        }
                        self.base3_unpack(stored, &mut plain[..64 * chunks]);
                        (stored, next) = (&plain[..64 * chunks], plain.as_ptr());
                    }
                    let lanes = row_sums::<Self, VNNI, T>(self, stored.as_ptr(), next, codes, chunks);
                    for t in 0..T {
                        sums[t][r] = lanes[t];
                    }
                }
                for t in 0..T {
                    let dots = _mm256_sub_epi32(sum_eight(sums[t]), _mm256_set1_epi32(biases[t]));
                    let mut values = [0.0; ROWS];
                    let y = _mm256_mul_ps(_mm256_cvtepi32_ps(dots), _mm256_set1_ps(factors[t]));
                    _mm256_storeu_ps(values.as_mut_ptr(), y);
                    for r in 0..some {
                        out.write(t, row(first + r), values[r]);
                    }
                }
            }
        }
        true
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
            for q in 0..Q {
                let far = (q == 0).then_some(far[p]);
                // SAFETY: `self` proves AVX2; the lengths were just checked.
                out[p][q] = unsafe { split(self, codes, rows[q], start[q], far) };
            }
        }
        out
    }
    #[inline(always)]
    fn add_columns(
        self,
        columns: [&[u8]; GROUP],
        [next, ahead]: [[*const u8; GROUP]; 2],
        q: [i8; GROUP],
        sums: &mut [i32],
    ) {
        let chunks = column_chunks(columns, sums);
        // SAFETY: `self` proves AVX2; chunk c < chunks reads bytes below 64 c + 64 of a column and sums below 256 c + 256.
        unsafe {
            // Codes are multiplied where they stand in the byte, the uppermost two bits further down, where products fit 16 bits.
            let upper = _mm256_set1_epi8(0x30);
            let masks = [upper, upper, _mm256_set1_epi8(0x0c), _mm256_set1_epi8(0x03)];
            let one = _mm256_set1_epi16(1);
            let scales = [_mm256_set1_epi16(4), one, one, one];
            let factor = |i: usize| {
                _mm256_set1_epi32(i32::from_le_bytes([
                    q[i] as u8,
                    q[i + 1] as u8,
                    q[i + 2] as u8,
                    q[i + 3] as u8,
                ]))
            };
            let (q0, q1) = (factor(0), factor(4));
            for half in 0..2 * chunks {
                let mut v = [_mm256_setzero_si256(); 4];
                let mut u = [_mm256_setzero_si256(); 4];
                for i in 0..4 {
                    v[i] = _mm256_loadu_si256(columns[i].as_ptr().add(32 * half).cast());
                    u[i] = _mm256_loadu_si256(columns[i + 4].as_ptr().add(32 * half).cast());
                }
                if half % 2 == 0 {
                    for i in 0..GROUP {
                        self.prefetch(ahead[i].wrapping_add(32 * half));
                        self.prefetch_again(next[i].wrapping_add(32 * half));
                    }
                }
                let (v, u) = (interleave(v), interleave(u));
                for field in 0..4 {
                    let codes = |v| {
                        let v = if field == 0 { _mm256_srli_epi16::<2>(v) } else { v };
                        _mm256_and_si256(v, masks[field])
                    };
                    for k in 0..4 {
                        // At most 4 * 48 * 128.
                        let pairs = _mm256_add_epi16(
                            _mm256_maddubs_epi16(codes(v[k]), q0),
                            _mm256_maddubs_epi16(codes(u[k]), q1),
                        );
                        let at = 256 * (half / 2) + 64 * field + 16 * k + 8 * (half % 2);
                        let out = sums.as_mut_ptr().add(at).cast();
                        let sum = _mm256_madd_epi16(pairs, scales[field]);
                        _mm256_storeu_si256(out, _mm256_add_epi32(_mm256_loadu_si256(out), sum));
                    }
                }
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
        // SAFETY: the CPU has the instructions, as `self` proves; chunk c < chunks reads weights below 64 c + 64 and codes
        // below 128 c + 128, the lengths checked above.
        unsafe {
            let (mask, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
            let mut dots = [[0; R]; T];
            for r in 0..R {
                let mut sums = [_mm256_setzero_si256(); T];
                for c in 0..chunks {
                    self.prefetch(ahead[r].wrapping_add(64 * c));
                    // Such rows follow each other; single ones of which more is asked are anywhere.
                    if R > 1 || T == 1 {
                        self.prefetch_again(w[r].as_ptr().wrapping_add(64 * c + SHORTLY));
                    }
                    let (mut codes, zero) = ([mask; 4], _mm256_setzero_si256());
                    for block in 0..2 {
                        let v = _mm256_loadu_si256(w[r].as_ptr().add(64 * c + 32 * block).cast());
                        codes[block] = _mm256_and_si256(v, mask);
                        codes[2 + block] = _mm256_and_si256(_mm256_srli_epi16::<4>(v), mask);
                    }
                    for t in 0..T {
                        let mut parts = [zero; 4];
                        for i in 0..4 {
                            let q = _mm256_loadu_si256(q[t].as_ptr().add(128 * c + 32 * i).cast());
                            parts[i] = match VNNI {
                                true => _mm256_dpbusd_avx_epi32(zero, codes[i], q),
                                false => _mm256_maddubs_epi16(codes[i], q),
                            };
                        }
                        let [a, b, c, d] = parts;
                        let sum = if VNNI {
                            _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d))
                        } else {
                            // A pair is at most 2 * 15 * 128 = 3840, four of them below 2^15.
                            let pairs = _mm256_add_epi16(_mm256_add_epi16(a, b), _mm256_add_epi16(c, d));
                            _mm256_madd_epi16(pairs, ones)
                        };
                        sums[t] = _mm256_add_epi32(sums[t], sum);
                    }
                }
                for t in 0..T {
                    dots[t][r] = sum_lanes(sums[t]);
                }
            }
            dots
        }
    }
}

/// `Σ code · q` of a row in two bits with the codes of T tokens, in eight lanes each; as many bytes as the row has are asked for at
/// `next`.
///
/// # Safety
/// Needs AVX2, and AVX-VNNI where `VNNI` is true; 64 bytes of the row and 256 codes of each token for a chunk.
#[inline(always)]
unsafe fn row_sums<I: Isa, const VNNI: bool, const T: usize>(
    isa: I,
    row: *const u8,
    next: *const u8,
    codes: [*const i8; T],
    chunks: usize,
) -> [__m256i; T] {
    // SAFETY: chunk c < chunks reads weights below 64 c + 64 and codes below 256 c + 256.
    unsafe {
        let (zero, three, ones) = (_mm256_setzero_si256(), _mm256_set1_epi8(3), _mm256_set1_epi16(1));
        let mut wide = [zero; T];
        let mut start = 0;
        while start < chunks {
            // A product pair is at most 2 * 2 * 128 = 512 and a chunk adds eight of them to a lane: seven chunks stay below 2^15.
            let end = (start + 7).min(chunks);
            let mut sums = if VNNI { wide } else { [zero; T] };
            for c in start..end {
                isa.prefetch(next.wrapping_add(64 * c));
                for block in 0..2 {
                    let v = _mm256_loadu_si256(row.add(64 * c + 32 * block).cast());
                    let fields = [
                        _mm256_and_si256(_mm256_srli_epi16::<6>(v), three),
                        _mm256_and_si256(_mm256_srli_epi16::<4>(v), three),
                        _mm256_and_si256(_mm256_srli_epi16::<2>(v), three),
                        _mm256_and_si256(v, three),
                    ];
                    for t in 0..T {
                        let mut sum = sums[t];
                        for f in 0..4 {
                            let q = _mm256_loadu_si256(codes[t].add(256 * c + 64 * f + 32 * block).cast());
                            sum = match VNNI {
                                true => _mm256_dpbusd_avx_epi32(sum, fields[f], q),
                                false => _mm256_add_epi16(sum, _mm256_maddubs_epi16(fields[f], q)),
                            };
                        }
                        sums[t] = sum;
                    }
                }
            }
            for t in 0..T {
                wide[t] = match VNNI {
                    true => sums[t],
                    false => _mm256_add_epi32(wide[t], _mm256_madd_epi16(sums[t], ones)),
                };
            }
            start = end;
        }
        wide
    }
}

/// One row and one run of [`Isa::dot_split`], asking for the bytes from `far` on meanwhile.
///
/// # Safety
/// Needs AVX2, and four numbers of each part for a block of codes.
#[inline(always)]
unsafe fn split<I: Isa>(
    isa: I,
    codes: &[[u8; 64]],
    parts: [&[i8]; 2],
    start: [i32; 2],
    far: Option<*const u8>,
) -> [__m256; 2] {
    // SAFETY: block c reads its 64 codes and the parts below 4 c + 4, which exist; AVX2 is the caller's.
    unsafe {
        let mut sums = [[_mm256_set1_epi32(start[0]); 2], [_mm256_set1_epi32(start[1]); 2]];
        let bytes = _mm256_set1_epi16(0xff);
        for c in 0..codes.len() {
            if let Some(far) = far {
                isa.prefetch(far.wrapping_add(FETCH * c));
            }
            for half in 0..2 {
                let v = _mm256_loadu_si256(codes[c].as_ptr().add(32 * half).cast());
                let (even, odd) = (_mm256_and_si256(v, bytes), _mm256_srli_epi16::<8>(v));
                for part in 0..2 {
                    let four = parts[part].as_ptr().add(4 * c).cast::<i32>().read_unaligned();
                    let four = _mm256_set1_epi32(four);
                    let b_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(four));
                    let b_odd = _mm256_srai_epi16::<8>(four);
                    let products =
                        _mm256_add_epi32(_mm256_madd_epi16(even, b_even), _mm256_madd_epi16(odd, b_odd));
                    sums[part][half] = _mm256_add_epi32(sums[part][half], products);
                }
            }
        }
        let mut out = [_mm256_setzero_ps(); 2];
        for half in 0..2 {
            let high = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[0][half]), _mm256_set1_ps(128.0));
            out[half] = _mm256_add_ps(high, _mm256_cvtepi32_ps(sums[1][half]));
        }
        out
    }
}

/// As [`Isa::nonzero`].
#[inline(always)]
pub(super) fn nonzero(codes: &[i8; 16]) -> u16 {
    // SAFETY: every x86-64 CPU has SSE2; the load is the sixteen bytes.
    unsafe {
        let zero = _mm_cmpeq_epi8(_mm_loadu_si128(codes.as_ptr().cast()), _mm_setzero_si128());
        !_mm_movemask_epi8(zero) as u16
    }
}

/// As [`Isa::transpose`].
///
/// # Safety
/// Needs AVX2.
#[inline(always)]
pub(super) unsafe fn transpose(rows: &[[i8; LANES]; LANES], out: &mut [[i8; LANES]; LANES]) {
    // SAFETY: the caller has AVX2; rows are loaded and stored whole.
    unsafe {
        // Bytes are interleaved with those of the row 8, 4, 2, 1 further on.
        let mut v = [_mm_setzero_si128(); LANES];
        for t in 0..LANES {
            v[t] = _mm_loadu_si128(rows[t].as_ptr().cast());
        }
        for _ in 0..4 {
            let u = v;
            for i in 0..LANES / 2 {
                v[2 * i] = _mm_unpacklo_epi8(u[i], u[i + LANES / 2]);
                v[2 * i + 1] = _mm_unpackhi_epi8(u[i], u[i + LANES / 2]);
            }
        }
        for i in 0..LANES {
            _mm_storeu_si128(out[i].as_mut_ptr().cast(), v[i]);
        }
    }
}

/// As [`Isa::fill_tables`].
///
/// # Safety
/// Needs AVX2.
#[inline(always)]
pub(super) unsafe fn fill_tables(quads: Quads<'_>, tables: &mut [[i16; LANES]]) {
    assert_eq!(tables.len(), lookup::ROWS);
    // SAFETY: the caller has AVX2. Group g < GROUPS writes the 81 rows from 81 g on.
    unsafe {
        for g in 0..GROUPS {
            let zero = _mm256_setzero_si256();
            let mut weighed = [[zero; 3]; 4];
            for i in 0..4 {
                let input = _mm256_cvtepi8_epi16(_mm_loadu_si128(quads[i][g].as_ptr().cast()));
                weighed[i] = [_mm256_sub_epi16(zero, input), zero, input];
            }
            let mut low = [zero; 9];
            for i in 0..9 {
                low[i] = _mm256_add_epi16(weighed[0][i % 3], weighed[1][i / 3]);
            }
            for h in 0..9 {
                let high = _mm256_add_epi16(weighed[2][h % 3], weighed[3][h / 3]);
                for i in 0..9 {
                    let row = tables.as_mut_ptr().add(lookup::SUMS * g + 9 * h + i);
                    _mm256_storeu_si256(row.cast(), _mm256_add_epi16(low[i], high));
                }
            }
        }
    }
}

/// As [`Isa::add_looked_up`].
///
/// # Safety
/// Needs AVX2, and what is asked for there.
#[inline(always)]
pub(super) unsafe fn add_looked_up(tables: &[[i16; LANES]], places: &[Places], sums: &mut [[i16; LANES]]) {
    assert_eq!(tables.len(), lookup::ROWS);
    let tables = tables.as_ptr().cast::<u8>();
    for (places, sum) in places.iter().zip(sums) {
        // SAFETY: the caller has AVX2. Each row lies in the tables, as the places say.
        unsafe {
            let mut total = _mm256_loadu_si256(sum.as_ptr().cast());
            for half in 0..GROUPS / 4 {
                // Four places are taken out of one register: loads are what limits.
                let mut left = places.as_ptr().add(4 * half).cast::<u64>().read_unaligned();
                for g in 4 * half..4 * half + 4 {
                    let row = tables.add(lookup::ROW_BYTES * lookup::SUMS * g + usize::from(left as u16));
                    total = _mm256_add_epi16(total, _mm256_loadu_si256(row.cast()));
                    left >>= 16;
                }
            }
            _mm256_storeu_si256(sum.as_mut_ptr().cast(), total);
        }
    }
}

/// Interleaves the bytes of four registers: lane l of part k holds the bytes 4 k to 4 k + 3 of their 128-bit lanes l.
///
/// # Safety
/// Needs AVX2.
#[inline(always)]
unsafe fn interleave([a, b, c, d]: [__m256i; 4]) -> [__m256i; 4] {
    // SAFETY: the caller has AVX2; no memory is touched.
    unsafe {
        let (ab, ab2) = (_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b));
        let (cd, cd2) = (_mm256_unpacklo_epi8(c, d), _mm256_unpackhi_epi8(c, d));
        [
            _mm256_unpacklo_epi16(ab, cd),
            _mm256_unpackhi_epi16(ab, cd),
            _mm256_unpacklo_epi16(ab2, cd2),
            _mm256_unpackhi_epi16(ab2, cd2),
        ]
    }
}

/// The sums of the int32 lanes of eight registers.
///
/// # Safety
/// Needs AVX2.
#[inline(always)]
unsafe fn sum_eight(v: [__m256i; 8]) -> __m256i {
    // SAFETY: the caller has AVX2.
    unsafe {
        let x = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
        let y = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
        _mm256_add_epi32(_mm256_permute2x128_si256::<0x20>(x, y), _mm256_permute2x128_si256::<0x31>(x, y))
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
