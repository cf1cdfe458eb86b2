//! AVX-512 VBMI, which permutes bytes: rows of [`base3`] on their way through the registers; and GFNI, which came with it and moves
//! bits within bytes: rows in two bits with several tokens.

use super::ask::Ask;
use super::avx512::sum_four;
use crate::ternary::base3::{FIFTH, FOUR, HIGH, PLAIN, STORED};
use crate::ternary::{OutPtr, STEP, StoredRows};
use std::arch::x86_64::*;

/// Whether the CPU has it, VL, VNNI and GFNI.
#[inline]
pub(super) fn detect() -> bool {
    is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("gfni")
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
    /// The bytes of a chunk in two bits, and with the fifth code in their uppermost bits and nothing in the others.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn codes(&self, line: __m512i) -> (__m512i, __m512i) {
        let top = _mm512_and_si512(line, self.high);
        // Not by `>=`, of which the compiler makes `<`, the wrong way round for the masks.
        let high = _mm512_cmpeq_epi8_mask(top, self.high);
        let four = _mm512_permutexvar_epi8(line, self.four[0]);
        let four = _mm512_mask_permutexvar_epi8(four, high, line, self.four[1]);
        (four, _mm512_mask_permutexvar_epi8(top, high, line, self.fifth))
    }
}

/// [`super::Isa::base3_dots`], as suits the CPU that `ask` is of.
///
/// # Safety
/// The CPU must have what [`detect`] looks for; `out` as in [`crate::ternary::gemv_rows`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
pub(super) unsafe fn dots(
    ask: Ask,
    w: StoredRows<'_>,
    count: usize,
    row: impl Fn(usize) -> usize,
    listed: bool,
    a: &[i8],
    bias: i32,
    factor: f32,
    out: OutPtr,
) {
    let ahead = ask.ahead().div_ceil(w.row_bytes).max(2);
    // SAFETY: the caller's contract, handed on.
    unsafe {
        match ask {
            Ask { pairs: true, .. } if listed => dots_by::<PAIRS>(w, count, row, ahead, a, bias, factor, out),
            Ask { twice: true, .. } => dots_by::<TWICE>(w, count, row, ahead, a, bias, factor, out),
            Ask { far: true, .. } => dots_by::<FAR>(w, count, row, ahead, a, bias, factor, out),
            _ => dots_by::<NEAR>(w, count, row, ahead, a, bias, factor, out),
        }
    }
}

/// How rows that come later are asked for: to the first-level cache; to the second; to the second, and to the first when
/// they are [`SHORTLY`] rows away; or two at a time, all lines at once.
const NEAR: u8 = 0;
const FAR: u8 = 1;
const TWICE: u8 = 2;
const PAIRS: u8 = 3;

/// The rows of the next step.
const SHORTLY: usize = STEP;

/// The same, asking in the way of `HOW` for rows that come `ahead` later. The loop over the rows is in here, for a call costs as
/// much as a row.
///
/// # Safety
/// As there.
#[inline(never)] // several of them in one function are slower
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
unsafe fn dots_by<const HOW: u8>(
    w: StoredRows<'_>,
    count: usize,
    row: impl Fn(usize) -> usize,
    ahead: usize,
    a: &[i8],
    bias: i32,
    factor: f32,
    out: OutPtr,
) {
    let (blocks, tail) = (a.len() / (4 * PLAIN), a.len() % (4 * PLAIN) / 256);
    assert_eq!(w.row_bytes, STORED * blocks + 64 * tail);
    let at = |row: usize| row * w.row_bytes;
    let tables = Tables::load();
    let masks = [
        _mm512_set1_epi8(0xc0u8 as i8),
        _mm512_set1_epi8(0x30),
        _mm512_set1_epi8(0x0c),
        _mm512_set1_epi8(0x03),
    ];
    let mut i = 0;
    while i < count {
        let mut rows = [w.bytes.as_ptr(); STEP];
        let (mut nexts, mut shortly) = (rows, rows);
        for r in 0..STEP {
            // A short last step has its last row several times.
            rows[r] = w.bytes[at(row((i + r).min(count - 1)))..][..w.row_bytes].as_ptr();
            nexts[r] = w.bytes.as_ptr().wrapping_add(at(row(i + r + ahead)));
            if HOW == TWICE {
                shortly[r] = w.bytes.as_ptr().wrapping_add(at(row(i + r + SHORTLY)));
            }
        }
        // The lanes of the products of `$w` rows from the `$r`-th on, side by side. A function would not be inlined each time.
        macro_rules! lanes {
            ($r:expr, $w:expr) => {{
                // Fields are multiplied where they stand in the byte, as with rows in two bits: a row has at most 2^12 chunks,
                // and each adds less than 2^16 to a lane.
                let mut fields = [[_mm512_setzero_si512(); 5]; $w];
                // SAFETY: a row has `blocks` blocks of 256 bytes and 1280 codes, and `tail` chunks after them of 64 and 256.
                unsafe {
                    let q = |at: usize| _mm512_loadu_si512(a.as_ptr().add(at).cast());
                    for b in 0..blocks {
                        for v in 0..4 {
                            let (at, codes) = (STORED * b + 64 * v, 4 * PLAIN * b);
                            let mut both = [(masks[0], masks[0]); $w];
                            for k in 0..$w {
                                let line = _mm512_loadu_si512(rows[$r + k].add(at).cast());
                                ask_line::<HOW>(nexts[$r + k], shortly[$r + k], at);
                                both[k] = tables.codes(line);
                            }
                            for f in 0..4 {
                                let q = q(codes + 256 * v + 64 * f);
                                for k in 0..$w {
                                    let code = _mm512_and_si512(both[k].0, masks[f]);
                                    fields[k][f] = _mm512_dpbusd_epi32(fields[k][f], code, q);
                                }
                            }
                            let q = q(codes + 1024 + 64 * v);
                            for k in 0..$w {
                                fields[k][4] = _mm512_dpbusd_epi32(fields[k][4], both[k].1, q);
                            }
                        }
                    }
                    for c in 0..tail {
                        let (at, codes) = (STORED * blocks + 64 * c, 4 * PLAIN * blocks + 256 * c);
                        for k in 0..$w {
                            let chunk = _mm512_loadu_si512(rows[$r + k].add(at).cast());
                            ask_line::<HOW>(nexts[$r + k], shortly[$r + k], at);
                            for f in 0..4 {
                                let code = _mm512_and_si512(chunk, masks[f]);
                                fields[k][f] = _mm512_dpbusd_epi32(fields[k][f], code, q(codes + 64 * f));
                            }
                        }
                    }
                }
                let mut sums = [_mm512_setzero_si512(); $w];
                for k in 0..$w {
                    let [f0, f1, f2, f3, f4] = fields[k];
                    let high = _mm512_srai_epi32::<6>(_mm512_add_epi32(f0, f4));
                    let high = _mm512_add_epi32(high, _mm512_srai_epi32::<4>(f1));
                    sums[k] = _mm512_add_epi32(high, _mm512_add_epi32(_mm512_srai_epi32::<2>(f2), f3));
                }
                sums
            }};
        }
        let sums = if HOW == PAIRS {
            let [ask, ask2] = [[nexts[0], nexts[1]], [nexts[2], nexts[3]]];
            all_lines(ask, w.row_bytes);
            let [s0, s1] = lanes!(0, 2);
            all_lines(ask2, w.row_bytes);
            let [s2, s3] = lanes!(2, 2);
            [s0, s1, s2, s3]
        } else {
            let [s0] = lanes!(0, 1);
            let [s1] = lanes!(1, 1);
            let [s2] = lanes!(2, 1);
            let [s3] = lanes!(3, 1);
            [s0, s1, s2, s3]
        };
        // SAFETY: AVX-512F is there; `values` takes four floats; and the caller's contract.
        unsafe {
            let dots = _mm_sub_epi32(sum_four(sums), _mm_set1_epi32(bias));
            let mut values = [0.0; STEP];
            _mm_storeu_ps(values.as_mut_ptr(), _mm_mul_ps(_mm_cvtepi32_ps(dots), _mm_set1_ps(factor)));
            for r in 0..STEP {
                if i + r < count {
                    out.write(0, row(i + r), values[r]);
                }
            }
        }
        i += STEP;
    }
}

/// Asks for a line of a row that comes later and of one that comes shortly, as `HOW` says, unless it asks for whole rows.
#[inline(always)]
fn ask_line<const HOW: u8>(next: *const u8, shortly: *const u8, at: usize) {
    match HOW {
        NEAR => Ask::line_of::<false>(next.wrapping_add(at)),
        FAR | TWICE => Ask::line_of::<true>(next.wrapping_add(at)),
        _ => (),
    }
    if HOW == TWICE {
        Ask::line_of::<false>(shortly.wrapping_add(at));
    }
}

/// Asks for all lines of two rows at once.
#[inline(always)]
fn all_lines(rows: [*const u8; 2], row_bytes: usize) {
    for row in rows {
        for line in 0..row_bytes / 64 {
            Ask::line_of::<false>(row.wrapping_add(64 * line));
        }
    }
}

/// [`super::Isa::row_tiles`].
///
/// # Safety
/// The CPU must have what [`detect`] looks for; `out` as in [`crate::ternary::gemv_rows`].
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,gfni")]
pub(super) unsafe fn tiles<const T: usize>(
    ask: Ask,
    w: StoredRows<'_>,
    count: usize,
    row: impl Fn(usize) -> usize,
    codes: [&[i8]; T],
    biases: &[i32],
    factors: [f32; T],
    plain: &mut [u8],
    out: OutPtr,
) {
    let chunks = codes[0].len() / 256;
    for a in codes {
        assert_eq!(a.len(), 256 * chunks);
    }
    assert!(w.base3 || w.row_bytes == 64 * chunks);
    let plain = &mut plain[..STEP * 64 * chunks];
    let ahead = ask.ahead().div_ceil(w.row_bytes).max(2);
    let codes = codes.map(<[i8]>::as_ptr);
    let (mut bias, mut factor) = ([0; 8], [0.0; 8]);
    bias[..T].copy_from_slice(&biases[..T]);
    factor[..T].copy_from_slice(&factors);
    // SAFETY: eight numbers each.
    let (bias, factor) =
        unsafe { (_mm256_loadu_si256(bias.as_ptr().cast()), _mm256_loadu_ps(factor.as_ptr())) };
    // Bits 0 and 1 of a byte become those from `bit` on, the others 0: row i of such a matrix, in byte 7 - i, tells which bits add
    // up to bit i.
    let field = |bit: u32| _mm512_set1_epi64((1 << 56 | 2 << 48) << bit);
    let (fields, lowest) = ([field(6), field(4), field(2)], _mm512_set1_epi8(3));
    let mut i = 0;
    while i < count {
        let mut rows = [w.bytes.as_ptr(); STEP];
        let mut nexts = rows;
        for r in 0..STEP {
            // A short last step has its last row several times.
            let stored = &w.bytes[row((i + r).min(count - 1)) * w.row_bytes..][..w.row_bytes];
            rows[r] = stored.as_ptr();
            nexts[r] = w.bytes.as_ptr().wrapping_add(row(i + r + ahead) * w.row_bytes);
            if w.base3 {
                // Several tokens share what is unpacked once.
                for line in 0..w.row_bytes / 64 {
                    ask.line(nexts[r].wrapping_add(64 * line));
                }
                let plain = &mut plain[r * 64 * chunks..][..64 * chunks];
                // SAFETY: the CPU has what it needs.
                unsafe { unpack(stored, plain) }
                (rows[r], nexts[r]) = (plain.as_ptr(), plain.as_ptr());
            }
        }
        // The numbers of two rows, token by token. A function would not be inlined each time.
        macro_rules! pair {
            ($r:expr) => {{
                let (mut s0, mut s1) = ([_mm512_setzero_si512(); 8], [_mm512_setzero_si512(); 8]);
                // SAFETY: chunk c < chunks reads weights below 64 c + 64 and codes below 256 c + 256.
                unsafe {
                    for c in 0..chunks {
                        let v0 = _mm512_loadu_si512(rows[$r].add(64 * c).cast());
                        let v1 = _mm512_loadu_si512(rows[$r + 1].add(64 * c).cast());
                        ask.line(nexts[$r].wrapping_add(64 * c));
                        ask.line(nexts[$r + 1].wrapping_add(64 * c));
                        for f in 0..4 {
                            let (c0, c1) = if f == 3 {
                                (_mm512_and_si512(v0, lowest), _mm512_and_si512(v1, lowest))
                            } else {
                                (
                                    _mm512_gf2p8affine_epi64_epi8::<0>(v0, fields[f]),
                                    _mm512_gf2p8affine_epi64_epi8::<0>(v1, fields[f]),
                                )
                            };
                            for t in 0..T {
                                let q = _mm512_loadu_si512(codes[t].add(256 * c + 64 * f).cast());
                                s0[t] = _mm512_dpbusd_epi32(s0[t], c0, q);
                                s1[t] = _mm512_dpbusd_epi32(s1[t], c1, q);
                            }
                        }
                    }
                    [numbers(s0, bias, factor), numbers(s1, bias, factor)]
                }
            }};
        }
        let [[v0, v1], [v2, v3]] = [pair!(0), pair!(2)];
        let mut values = [[0.0f32; 8]; STEP];
        // SAFETY: eight floats each; the caller's contract.
        unsafe {
            _mm256_storeu_ps(values[0].as_mut_ptr(), v0);
            _mm256_storeu_ps(values[1].as_mut_ptr(), v1);
            _mm256_storeu_ps(values[2].as_mut_ptr(), v2);
            _mm256_storeu_ps(values[3].as_mut_ptr(), v3);
            for r in 0..STEP.min(count - i) {
                let row = row(i + r);
                for t in 0..T {
                    out.write(t, row, values[r][t]);
                }
            }
        }
        i += STEP;
    }
}

/// `(sum of the lanes - bias) * factor` of eight registers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn numbers(s: [__m512i; 8], bias: __m256i, factor: __m256) -> __m256 {
    // SAFETY: AVX-512F is there.
    let (low, high) = unsafe { (sum_four([s[0], s[1], s[2], s[3]]), sum_four([s[4], s[5], s[6], s[7]])) };
    let dots = _mm256_sub_epi32(_mm256_set_m128i(high, low), bias);
    _mm256_mul_ps(_mm256_cvtepi32_ps(dots), factor)
}

/// [`super::Isa::base3_unpack`].
///
/// # Safety
/// The CPU must have what [`detect`] looks for.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
pub(super) unsafe fn unpack(row: &[u8], out: &mut [u8]) {
    let (blocks, rest) = out.as_chunks_mut::<PLAIN>();
    let (stored, tail) = row.split_at(blocks.len() * STORED);
    let tables = Tables::load();
    for (stored, block) in stored.as_chunks::<STORED>().0.iter().zip(blocks) {
        // SAFETY: a block has four lines, and five chunks when unpacked.
        unsafe {
            let line = |v: usize| _mm512_loadu_si512(stored.as_ptr().add(64 * v).cast());
            let mut put = |v: usize, x| _mm512_storeu_si512(block.as_mut_ptr().add(64 * v).cast(), x);
            let mut codes = |v: usize| {
                let (four, fifth) = tables.codes(line(v));
                put(v, four);
                fifth
            };
            let (a, b, c, d) = (codes(0), codes(1), codes(2), codes(3));
            let ab = _mm512_or_si512(a, _mm512_srli_epi16::<2>(b));
            let cd = _mm512_or_si512(_mm512_srli_epi16::<4>(c), _mm512_srli_epi16::<6>(d));
            put(4, _mm512_or_si512(ab, cd));
        }
    }
    rest.copy_from_slice(tail);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which of them a CPU takes by itself depends on the CPU.
    #[test]
    fn rows_are_the_same_however_they_are_asked_for() {
        if !detect() {
            return;
        }
        // Two blocks and a chunk; the codes of a byte are base 3 in blocks, two bits in chunks.
        let (rows, row_bytes) = (11, 2 * STORED + 64);
        let byte = |i: usize| (i * 37 % 243) as u8 & if i % row_bytes < 2 * STORED { 0xff } else { 0x55 };
        let bytes: Vec<u8> = (0..rows * row_bytes).map(byte).collect();
        let a: Vec<i8> = (0..8 * PLAIN + 256).map(|i| (i * 91 % 251) as i8).collect();
        let w = StoredRows { bytes: &bytes, row_bytes, base3: true };
        for count in 1..=rows {
            let mut all = [[0.0f32; 11]; 4];
            let [near, far, twice, pairs] =
                all.each_mut().map(|out| OutPtr { ptr: out.as_mut_ptr(), stride: rows });
            let row = |i: usize| rows - 1 - i.min(rows - 1);
            // SAFETY: the CPU has the instructions; each output has room for all rows.
            unsafe {
                dots_by::<NEAR>(w, count, row, 2, &a, 3, 0.5, near);
                dots_by::<FAR>(w, count, row, 2, &a, 3, 0.5, far);
                dots_by::<TWICE>(w, count, row, 2, &a, 3, 0.5, twice);
                dots_by::<PAIRS>(w, count, row, 2, &a, 3, 0.5, pairs);
            }
            assert_eq!(all[0].iter().filter(|x| **x != 0.0).count(), count);
            assert!(all.iter().all(|some| *some == all[0]), "{count} rows");
        }
    }
}
