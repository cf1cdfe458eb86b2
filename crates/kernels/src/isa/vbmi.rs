//! AVX-512 VBMI, which permutes bytes: rows of [`base3`] on their way through the registers.

use super::Isa;
use super::avx512::sum_lanes;
use crate::ternary::StoredRows;
use crate::ternary::base3::{FIFTH, FOUR, HIGH, PLAIN, STORED};
use std::arch::x86_64::*;

/// Whether the CPU has it, and VNNI.
#[inline]
pub(super) fn detect() -> bool {
    is_x86_feature_detected!("avx512vbmi") && is_x86_feature_detected!("avx512vnni")
}

/// What looks up the codes of a line: the tables, and where the second ones begin.
struct Tables {
    four: [__m512i; 2],
    fifth: __m512i,
    high: __m512i,
}

impl Tables {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn load() -> Self {
        // SAFETY: each table is 64 bytes.
        let load = |table: &[u8; 64]| unsafe { _mm512_loadu_si512(table.as_ptr().cast()) };
        Self {
            four: [load(&FOUR[0]), load(&FOUR[1])],
            fifth: load(&FIFTH),
            high: _mm512_set1_epi8(HIGH as i8),
        }
    }
    /// The bytes of a chunk in two bits, and with the fifth code in their uppermost bits, whatever is in the others.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn codes(&self, line: __m512i) -> (__m512i, __m512i) {
        let high = _mm512_cmpge_epu8_mask(line, self.high);
        let four = _mm512_permutexvar_epi8(line, self.four[0]);
        let four = _mm512_mask_permutexvar_epi8(four, high, line, self.four[1]);
        (four, _mm512_mask_permutexvar_epi8(line, high, line, self.fifth))
    }
}

/// [`super::Isa::base3_dots`]. The loop over the rows is in here, for a call costs as much as a row.
///
/// # Safety
/// The CPU must have what [`detect`] looks for.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
pub(super) unsafe fn dots<I: Isa>(
    isa: I,
    w: StoredRows<'_>,
    count: usize,
    row: impl Fn(usize) -> usize,
    a: &[i8],
    mut put: impl FnMut(usize, i32),
) {
    const R: usize = 4;
    let (blocks, tail) = (a.len() / (4 * PLAIN), a.len() % (4 * PLAIN) / 256);
    assert_eq!(w.row_bytes, STORED * blocks + 64 * tail);
    let ahead = isa.ahead().div_ceil(w.row_bytes).max(2);
    let at = |row: usize| row * w.row_bytes;
    let tables = Tables::load();
    let mut i = 0;
    while i < count {
        let some = R.min(count - i);
        let mut sums = [_mm512_setzero_si512(); R];
        for r in 0..some {
            let (begin, next) = (at(row(i + r)), w.bytes.as_ptr().wrapping_add(at(row(i + r + ahead))));
            // SAFETY: a row has as many blocks and chunks, which was checked above.
            sums[r] = unsafe { dot(isa, &tables, &w.bytes[begin..][..w.row_bytes], next, a, blocks, tail) };
        }
        // SAFETY: AVX-512F is there.
        let dots = unsafe { sum_lanes(sums) };
        for r in 0..some {
            put(i + r, dots[r]);
        }
        i += R;
    }
}

/// The lanes of a row's dot product.
///
/// # Safety
/// The row has `blocks` blocks of 256 bytes and 1280 codes, and `tail` chunks after them of 64 and 256.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
unsafe fn dot<I: Isa>(
    isa: I,
    tables: &Tables,
    w: &[u8],
    ahead: *const u8,
    a: &[i8],
    blocks: usize,
    tail: usize,
) -> __m512i {
    let masks = [
        _mm512_set1_epi8(0xc0u8 as i8),
        _mm512_set1_epi8(0x30),
        _mm512_set1_epi8(0x0c),
        _mm512_set1_epi8(0x03),
    ];
    // Fields are multiplied where they stand in the byte, as with rows in two bits: a row has at most 2^12 chunks, and each
    // adds less than 2^16 to a lane twice.
    let mut fields = [_mm512_setzero_si512(); 4];
    // SAFETY: the caller's contract.
    unsafe {
        let q = |at: usize| _mm512_loadu_si512(a.as_ptr().add(at).cast());
        for b in 0..blocks {
            for v in 0..4 {
                let at = STORED * b + 64 * v;
                let line = _mm512_loadu_si512(w.as_ptr().add(at).cast());
                isa.prefetch(ahead.wrapping_add(at));
                let (four, fifth) = tables.codes(line);
                let codes = 4 * PLAIN * b;
                for f in 0..4 {
                    let code = _mm512_and_si512(four, masks[f]);
                    fields[f] = _mm512_dpbusd_epi32(fields[f], code, q(codes + 256 * v + 64 * f));
                }
                let code = _mm512_and_si512(fifth, masks[0]);
                fields[0] = _mm512_dpbusd_epi32(fields[0], code, q(codes + 1024 + 64 * v));
            }
        }
        for c in 0..tail {
            let at = STORED * blocks + 64 * c;
            let chunk = _mm512_loadu_si512(w.as_ptr().add(at).cast());
            isa.prefetch(ahead.wrapping_add(at));
            for f in 0..4 {
                let code = _mm512_and_si512(chunk, masks[f]);
                let codes = 4 * PLAIN * blocks + 256 * c + 64 * f;
                fields[f] = _mm512_dpbusd_epi32(fields[f], code, q(codes));
            }
        }
    }
    let [f0, f1, f2, f3] = fields;
    let high = _mm512_add_epi32(_mm512_srai_epi32::<6>(f0), _mm512_srai_epi32::<4>(f1));
    _mm512_add_epi32(high, _mm512_add_epi32(_mm512_srai_epi32::<2>(f2), f3))
}

/// [`super::Isa::base3_unpack`].
///
/// # Safety
/// The CPU must have what [`detect`] looks for.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
pub(super) unsafe fn unpack(row: &[u8], out: &mut [u8]) {
    let (blocks, rest) = out.as_chunks_mut::<PLAIN>();
    let (stored, tail) = row.split_at(blocks.len() * STORED);
    let (tables, top) = (Tables::load(), _mm512_set1_epi8(0xc0u8 as i8));
    for (stored, block) in stored.as_chunks::<STORED>().0.iter().zip(blocks) {
        // SAFETY: a block has four lines, and five chunks when unpacked.
        unsafe {
            let line = |v: usize| _mm512_loadu_si512(stored.as_ptr().add(64 * v).cast());
            let mut put = |v: usize, x| _mm512_storeu_si512(block.as_mut_ptr().add(64 * v).cast(), x);
            let mut codes = |v: usize| {
                let (four, fifth) = tables.codes(line(v));
                put(v, four);
                _mm512_and_si512(fifth, top)
            };
            let (a, b, c, d) = (codes(0), codes(1), codes(2), codes(3));
            let ab = _mm512_or_si512(a, _mm512_srli_epi16::<2>(b));
            let cd = _mm512_or_si512(_mm512_srli_epi16::<4>(c), _mm512_srli_epi16::<6>(d));
            put(4, _mm512_or_si512(ab, cd));
        }
    }
    rest.copy_from_slice(tail);
}
