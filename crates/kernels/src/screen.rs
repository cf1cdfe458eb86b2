//! A small copy of the output head that tells which rows can matter.
//!
//! The head is more than half of what a decoded token reads, and almost all of its logits are thrown away. So it is kept a
//! second time in four bits, and that copy gives every logit within a known bound. What those codes leave of each weight
//! is kept in four more bits, which narrow the bound of the few rows that are still open; only rows whose upper bound
//! then reaches the k-th greatest lower one are computed from the original. The caller sees exact values or none.
//!
//! # The bound
//!
//! With dither u_i, uniform in [-1/2, 1/2), the same for column i of every row, a row is stored as
//! `c_i = round((w_i - min) / step + u_i)`, and `w_i = min + step (c_i - u_i + e_i)`, where every e_i is uniform in
//! [-1/2, 1/2], independent of the row and of the other e_j (subtractive dither; Schuchman 1964). The hidden state is
//! rounded in the same way, with a dither d_i of its own, to `h_i = unit (q_i - d_i + f_i)` with q_i in eight bits. What
//! the codes give, `Σ (w_i - step e_i) (h_i - unit f_i)`, is off by `Σ x_i` with `x_i = step e_i h_i + (w_i - step e_i) unit f_i`.
//!
//! A uniform variable of width 1 is sub-Gaussian with variance 1/12. With e_i fixed, the second term is so with variance
//! `unit² (w_i - step e_i)² / 12`, at most `unit² (|w_i| + step / 2)² / 12` whatever e_i is; so the expectation of
//! `exp(λ x_i)` is at most that of `exp(λ step e_i h_i)` times a constant, and x_i is sub-Gaussian with variance
//! `(step² h_i² + unit² (|w_i| + step / 2)²) / 12`. All of them are independent, and by Minkowski's inequality the
//! logit's error exceeds `z √((step² |h|² + unit² (|w| + step √n / 2)²) / 12)` with probability at most `2 exp(-z² / 2)`.
//! The second term is small even where some |h_i| is 20 times the mean. For all rows at once the root of a² + b² is taken as
//! a + b² / 2a, which is greater.
//!
//! The four bits that follow say in which of [`PARTS`] equal parts of its range e_i is. In it e_i is uniform again, so that they divide
//! the first variance by `PARTS²`. They are multiplied with h in 16 bits; for the few rows that are open even then the
//! codes are multiplied again, with h in 16 bits, which leaves nothing of the second. With z = 9.2, all 128,256 rows of
//! a step together stay within all three bounds except with probability 3.3e-13. What else is inexact has bounds that
//! never fail, and they are added: the rounding of h to 16 bits, of the codes and of sums in float32, and that of the
//! exact logit itself.
//!
//! The dither is a fixed sequence, so that results are the same everywhere; it knows nothing of any model.
//!
//! # Layout
//!
//! Parts of [`Screen::PART`] rows, the last one shorter: the codes of all rows of the part, then the finer codes of all,
//! then what else is known of each row, the four float32 of [`RowScales`]: for each [`BLOCK`] of rows all the first ones, then all
//! the second and so on. The step is infinity where the codes tell nothing of the row.

use crate::compute::{Compute, FloatMatrix};
use crate::isa::Isa;
use crate::memory::{Aligned, Bytes};
use crate::ops::{fold, fold_max};

/// Weights in a chunk of 64 bytes: byte b holds weight b in its low half, weight 64 + b in its high one.
const CHUNK: usize = 128;

/// See the module.
const Z: f64 = 9.2;

/// Parts that a step is divided into.
const PARTS: f64 = 16.0;

/// The copy of a float matrix in four and four bits.
pub struct Screen {
    bytes: Bytes,
    rows: usize,
    columns: usize,
    dither: Dither,
}

/// Where a row's codes and its scales are.
struct Place {
    coarse: usize,
    fine: usize,
    scales: usize,
}

impl Screen {
    /// Rows that are stored together.
    pub const PART: usize = 1024;

    /// Bytes of a copy of `rows` rows.
    pub const fn bytes(rows: usize, columns: usize) -> usize {
        rows * (2 * Self::row_bytes(columns) + RowScales::BYTES)
    }
    /// Bytes of a row's codes.
    const fn row_bytes(columns: usize) -> usize {
        columns.div_ceil(CHUNK) * (CHUNK / 2)
    }

    /// A copy whose parts [`crate::Compute::screen_part`] made.
    ///
    /// # Panics
    /// If the length does not fit.
    pub fn new(bytes: Bytes, rows: usize, columns: usize) -> Self {
        assert_eq!(bytes.len(), Self::bytes(rows, columns));
        Self { bytes, rows, columns, dither: Dither::new(columns) }
    }
    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Bytes that a pass over all rows reads, and those of another row whose bound is narrowed.
    pub fn pass_bytes(&self) -> (usize, usize) {
        let row = Self::row_bytes(self.columns);
        (self.rows * (row + RowScales::BYTES), row)
    }
    #[inline(always)]
    fn place(&self, row: usize) -> Place {
        let (part, bytes) = (row / Self::PART, Self::row_bytes(self.columns));
        let (start, count) = (part * Self::PART, Self::PART.min(self.rows - part * Self::PART));
        let coarse = Self::bytes(start, self.columns);
        let (fine, scales) = (coarse + count * bytes, coarse + 2 * count * bytes);
        let at = row - start;
        Place { coarse: coarse + at * bytes, fine: fine + at * bytes, scales: scales + RowScales::place(at) }
    }
    /// Rows of the block that `row` is in.
    #[inline(always)]
    fn block_rows(&self, row: usize) -> usize {
        BLOCK.min(self.rows - row / BLOCK * BLOCK)
    }
    /// Codes of `count` rows of one part.
    pub(crate) fn coarse(&self, row: usize, count: usize) -> &[u8] {
        &self.bytes[self.place(row).coarse..][..count * Self::row_bytes(self.columns)]
    }
    fn fine(&self, row: usize) -> &[u8] {
        &self.bytes[self.place(row).fine..][..Self::row_bytes(self.columns)]
    }
    /// The `kind`-th number of [`RowScales`] of `count` rows of one block.
    #[inline(always)]
    fn scales(&self, row: usize, count: usize, kind: usize) -> &[[u8; 4]] {
        let at = self.place(row).scales + 4 * kind * self.block_rows(row);
        self.bytes[at..][..4 * count].as_chunks().0
    }
    /// What else is known of a row.
    #[inline(always)]
    fn row_scales(&self, row: usize) -> RowScales {
        let number = |kind| f32::from_le_bytes(self.scales(row, 1, kind)[0]);
        RowScales { min: number(0), step: number(1), spread: number(2), dithered: number(3) }
    }
}

/// What is known of a row beside its codes.
#[derive(Clone, Copy)]
pub(crate) struct RowScales {
    /// Least weight.
    min: f32,
    step: f32,
    /// At least norm² / step, norm being |w| + step √n / 2, or [`STEEPEST`] √n norm where that is less.
    spread: f32,
    /// Σ c d, with the dither of the hidden state.
    dithered: f32,
}

/// A little more than twice the most that |h| / (unit √n) can be.
const STEEPEST: f64 = 253.0;

impl RowScales {
    const BYTES: usize = 16;
    const UNKNOWN: Self = Self { min: 0.0, step: f32::INFINITY, spread: 0.0, dithered: 0.0 };

    /// Where the first number of a row of a part is.
    const fn place(row: usize) -> usize {
        row / BLOCK * BLOCK * Self::BYTES + 4 * (row % BLOCK)
    }
    /// At least |w| + step √n / 2, of `columns` weights.
    #[inline(always)]
    fn norm(&self, columns: usize) -> f64 {
        let (step, spread) = (f64::from(self.step), f64::from(self.spread));
        (spread * step).sqrt().max(spread / (STEEPEST * (columns as f64).sqrt()))
    }
}

/// The greatest weight, of either sign, of a row with these codes.
#[inline(always)]
fn greatest(min: f64, step: f64) -> f64 {
    let (low, high) = (min.abs(), (min + 15.0 * step).abs());
    if low > high { low } else { high }
}

impl Compute {
    /// Makes the `part`-th part of the small copy of `matrix`, which has [`Screen::PART`] rows, or what is left of them.
    ///
    /// # Panics
    /// If the matrix has no such part.
    pub fn screen_part(&self, matrix: &FloatMatrix, part: usize, out: &mut [u8]) {
        let (columns, bytes) = (matrix.columns, Screen::row_bytes(matrix.columns));
        let (rows, row_bytes) = (out.len() / Screen::bytes(1, columns), columns * matrix.ty.size());
        let stored = &matrix.bytes[part * Screen::PART * row_bytes..][..rows * row_bytes];
        let (dither, mut row) = (Dither::new(columns), vec![0.0; columns]);
        let (coarse, rest) = out.split_at_mut(rows * bytes);
        let (fine, scales) = rest.split_at_mut(rows * bytes);
        let codes = coarse.chunks_exact_mut(bytes).zip(fine.chunks_exact_mut(bytes));
        for (i, (stored, (coarse, fine))) in stored.chunks_exact(row_bytes).zip(codes).enumerate() {
            let RowScales { min, step, spread, dithered } =
                match self.kernels.decode_row(matrix.ty, stored, &mut row) {
                    true => self.kernels.screen_row(&row, &dither, coarse, fine),
                    false => RowScales::UNKNOWN,
                };
            let (at, block) = (RowScales::place(i), BLOCK.min(rows - i / BLOCK * BLOCK));
            for (kind, value) in [min, step, spread, dithered].into_iter().enumerate() {
                scales[at + 4 * kind * block..][..4].copy_from_slice(&value.to_le_bytes());
            }
        }
    }
}

/// The dither of each column, for the codes and for the hidden state.
pub(crate) struct Dither {
    codes: Vec<f32>,
    hidden: Vec<f32>,
}

impl Dither {
    fn new(columns: usize) -> Self {
        let mut state = 0u64;
        let mut next = |_| {
            // SplitMix64; the middle of one of 2^24 intervals.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let bits = (z ^ (z >> 31)) >> 40;
            ((bits as f64 + 0.5) / f64::from(1 << 24) - 0.5) as f32
        };
        let [codes, hidden] = [(); 2].map(|()| (0..columns).map(&mut next).collect());
        Self { codes, hidden }
    }
}

/// A hidden state in eight and in 16 bits, and what the bounds need to know of it.
pub(crate) struct Probe {
    /// h ≈ unit (codes - d).
    codes: Aligned<i8>,
    unit: f64,
    /// h ≈ scale (256 high + low).
    high: Aligned<i8>,
    low: Aligned<i8>,
    scale: f64,
    /// Of h in eight and in 16 bits the sum, and that times the dither of the codes.
    sums: [f64; 2],
    dithered: [f64; 2],
    /// What step and norm are multiplied with in the part of the bound that is rarely exceeded, the root of both squares.
    by_step: f64,
    by_norm: f64,
    /// What the spread is multiplied with instead of root and norm.
    by_spread: f64,
    /// What step and greatest weight are multiplied with in the part that never is.
    inexact: f64,
    by_weight: f64,
}

impl Probe {
    pub(crate) fn new(columns: usize) -> Self {
        let codes = || Aligned::zeroed(columns.next_multiple_of(CHUNK));
        Self {
            codes: codes(),
            unit: 0.0,
            high: codes(),
            low: codes(),
            scale: 0.0,
            sums: [0.0; 2],
            dithered: [0.0; 2],
            by_step: 0.0,
            by_norm: 0.0,
            by_spread: 0.0,
            inexact: 0.0,
            by_weight: 0.0,
        }
    }
    /// Bytes of the codes.
    pub(crate) const fn bytes(columns: usize) -> usize {
        3 * columns.next_multiple_of(CHUNK)
    }

    /// Takes in `h`; false where it is not finite.
    pub(crate) fn set(&mut self, screen: &Screen, h: &[f32]) -> bool {
        const TOP: f64 = 32_639.0; // 127 * 256 + 127
        // A little less than 126.5, so that no dither leads past 127.
        const COARSE_TOP: f64 = 126.499;
        let top = h.iter().fold(0.0f32, |top, h| if h.abs() > top { h.abs() } else { top });
        if !h.iter().all(|h| h.is_finite()) {
            return false;
        }
        let top = f64::from(top);
        (self.unit, self.scale) = (top / COARSE_TOP, top / TOP);
        let inverses = if top > 0.0 { [1.0 / self.unit, 1.0 / self.scale] } else { [0.0; 2] };
        (self.sums, self.dithered) = ([0.0; 2], [0.0; 2]);
        let (mut square, mut size, mut lost) = (0.0, 0.0, 0.0);
        let dither = &screen.dither;
        for (i, &h) in h.iter().enumerate() {
            let (u, d) = (f64::from(dither.codes[i]), f64::from(dither.hidden[i]));
            let h = f64::from(h);
            let code = nearest(h * inverses[0] + d);
            self.codes[i] = code as i8;
            let coarse = self.unit * (code - d);
            let code = nearest(h * inverses[1]) as i32;
            let high = (code + 128) >> 8;
            self.high[i] = high as i8;
            self.low[i] = (code - 256 * high) as i8;
            let rounded = self.scale * f64::from(code);
            for (kind, h) in [coarse, rounded].into_iter().enumerate() {
                self.sums[kind] += h;
                self.dithered[kind] += h * u;
            }
            square += h * h;
            size += h.abs();
            lost += (h - rounded).abs();
        }
        let n = h.len() as f64;
        // A float32 sum in sixteen lanes: each term is rounded fewer than n / 16 + 8 times, by 2^-24 each; twice that, and as
        // much again as the logit is rounded where it is kept in float32.
        let roundings = (n / 16.0 + 16.0) / f64::from(1 << 23);
        let z = Z / 12.0f64.sqrt();
        (self.by_step, self.by_norm) = (z * square.sqrt(), z * self.unit);
        self.by_spread =
            if self.by_step > 0.0 { self.by_norm * self.by_norm / (2.0 * self.by_step) } else { 0.0 };
        // A code is computed in float32 from numbers up to 16: its error stays below 2^-18. Σ c d is a sum in float32.
        // Weights as they are stored may lie half a step outside.
        self.inexact = lost + size / f64::from(1 << 17) + self.unit * 7.5 * n * roundings;
        self.by_weight = lost + size * roundings;
        true
    }

    /// How far the logit of a row is off at most, with what else is inexact; `rare`: its part that is rarely exceeded.
    #[inline(always)]
    fn bound(&self, rare: f64, min: f64, step: f64) -> f64 {
        // A little more, as what is rounded to float32 may be mostly error, and √n times this one.
        (rare + step * self.inexact + greatest(min, step) * self.by_weight) * (1.0 + 1e-4)
    }
    /// The bound of what the codes of four bits give.
    #[inline(always)]
    fn coarse_bound(&self, min: f64, step: f64, spread: f64) -> f64 {
        self.bound(step * self.by_step + spread * self.by_spread, min, step)
    }

    /// The most that the logits of as many rows as there are can be, by their sums of codes.
    #[inline(always)]
    fn uppers(&self, rows: &BlockRows, dots: &[i32; BLOCK], uppers: &mut [f32; BLOCK]) {
        let [mins, steps, spreads, dithered] = rows;
        for i in 0..BLOCK {
            let (min, step) = (f64::from(mins[i]), f64::from(steps[i]));
            let dot = self.unit * (f64::from(dots[i]) - f64::from(dithered[i]));
            let logit = min * self.sums[0] + step * (dot - self.dithered[0]);
            uppers[i] = (logit + self.coarse_bound(min, step, f64::from(spreads[i]))) as f32;
        }
        // A row of which nothing is known is always computed.
        for i in 0..BLOCK {
            uppers[i] = if steps[i] == f32::INFINITY { f32::INFINITY } else { uppers[i] };
        }
    }
}

/// Rounds a number below 2^50 to the nearest integer.
#[inline(always)]
fn nearest(x: f64) -> f64 {
    // Such a number added leaves no place for a fraction.
    const LARGE: f64 = (3u64 << 51) as f64;
    (x + LARGE) - LARGE
}

/// Rows of a block of the screen.
pub(crate) const BLOCK: usize = 64;

/// Tokens that share a pass over the screen.
pub(crate) const GROUP: usize = 8;

/// [`RowScales`] of the rows of a block, number by number.
type BlockRows = [[f32; BLOCK]; 4];

/// The `i`-th sixteen of `x`, `fill` past its end.
#[inline(always)]
fn lanes_of<I: Isa>(isa: I, x: &[f32], i: usize, fill: f32) -> I::F {
    let (blocks, tail) = x.as_chunks::<16>();
    if let Some(block) = blocks.get(i) {
        return isa.load(block);
    }
    let mut full = [fill; 16];
    if i == blocks.len() {
        full[..tail.len()].copy_from_slice(tail);
    }
    isa.load(&full)
}

/// Stores a row of weights, all finite, as codes of both kinds.
#[inline(always)]
pub(crate) fn screen_row<I: Isa>(
    isa: I,
    row: &[f32],
    dither: &Dither,
    coarse: &mut [u8],
    fine: &mut [u8],
) -> RowScales {
    let (blocks, tail) = row.as_chunks::<16>();
    let (mut tops, mut bottoms) = (isa.splat(f32::NEG_INFINITY), isa.splat(f32::NEG_INFINITY));
    // Squares of float32 may be too large or too small for it.
    let mut squares = [0.0f64; 16];
    for block in blocks {
        let w = isa.load(block);
        (tops, bottoms) = (isa.max(w, tops), isa.max(isa.sub(isa.splat(0.0), w), bottoms));
        for i in 0..16 {
            squares[i] += f64::from(block[i]) * f64::from(block[i]);
        }
    }
    for (i, &w) in tail.iter().enumerate() {
        squares[i] += f64::from(w) * f64::from(w);
    }
    let (mut high, mut low) = ([0.0; 16], [0.0; 16]);
    isa.store(tops, &mut high);
    isa.store(bottoms, &mut low);
    let (mut min, mut max) = (f32::INFINITY, f32::NEG_INFINITY);
    for w in low.into_iter().map(|w| -w).chain(high).chain(tail.iter().copied()) {
        min = if w < min { w } else { min };
        max = if w > max { w } else { max };
    }
    // A little wider than needed, so that no rounding leads past code 15.
    let step = (max - min) / 15.0 * (1.0 + 1e-6);
    let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
    let (least, inverse) = (isa.splat(min), isa.splat(inverse));
    let (half, parts) = (isa.splat(0.5), isa.splat(PARTS as f32));
    let mut dithered = isa.splat(0.0);
    let mut codes = [[0i8; CHUNK]; 2];
    let out = coarse.as_chunks_mut::<{ CHUNK / 2 }>().0.iter_mut();
    for (c, out) in out.zip(fine.as_chunks_mut::<{ CHUNK / 2 }>().0.iter_mut()).enumerate() {
        for i in 0..CHUNK / 16 {
            let at = CHUNK * c + 16 * i;
            let lanes = at / 16;
            let (w, u) = (lanes_of(isa, row, lanes, min), lanes_of(isa, &dither.codes, lanes, 0.0));
            let d = lanes_of(isa, &dither.hidden, lanes, 0.0);
            // Codes are 0 to 15: the step is a little wide, and the dither less than a half.
            let exact = isa.add(isa.mul(isa.sub(w, least), inverse), u);
            let code = isa.round(exact);
            dithered = isa.add(dithered, isa.mul(code, d));
            // No closure for both: one that is not inlined would be compiled without the instruction set.
            isa.to_i8(code, &mut codes[0].as_chunks_mut::<16>().0[i]);
            let left = isa.mul(isa.add(isa.sub(exact, code), half), parts);
            isa.to_i8(isa.sub(left, half), &mut codes[1].as_chunks_mut::<16>().0[i]);
        }
        // The very end of the last part rounds to the next.
        codes[1].iter_mut().for_each(|part| *part = if *part < 15 { *part } else { 15 });
        for (codes, out) in codes.iter().zip([out.0, out.1]) {
            for b in 0..CHUNK / 2 {
                out[b] = (codes[b] as u8 & 15) | (codes[b + 64] as u8) << 4;
            }
        }
    }
    let (root, wide) = ((row.len() as f64).sqrt(), f64::from(step));
    let norm = squares.iter().sum::<f64>().sqrt() + wide * 0.5 * root;
    let (spread, steepest) = (norm * norm / wide, STEEPEST * root * norm);
    let spread = if spread < steepest { spread } else { steepest };
    let spread = (spread * (1.0 + 1e-6)) as f32 + f32::MIN_POSITIVE;
    // The inverse of a step so small that it has fewer bits is no longer exact, or infinite.
    if spread.is_finite() && (step >= f32::MIN_POSITIVE || min == max) {
        RowScales { min, step, spread, dithered: fold(isa, dithered) }
    } else {
        RowScales::UNKNOWN
    }
}

/// For each of up to [`GROUP`] probes the most that the logits of the rows from `first` on, at most [`BLOCK`], can be, and
/// the greatest of that.
#[inline(always)]
pub(crate) fn screen_block<I: Isa>(
    isa: I,
    screen: &Screen,
    probes: &[Probe],
    first: usize,
    uppers: &mut [[f32; BLOCK]; GROUP],
    tops: &mut [f32; GROUP],
) {
    let bytes = Screen::row_bytes(screen.columns);
    let count = BLOCK.min(screen.rows - first);
    let codes = screen.coarse(first, count);
    let row = |i: usize| &codes[i * bytes..][..bytes];
    for kind in 0..4 {
        for line in screen.scales(first, count, kind).chunks(16) {
            isa.prefetch(line.as_ptr().cast());
        }
    }
    let mut dots = [[0; BLOCK]; GROUP];
    let mut i = 0;
    while i + 4 <= count {
        multiply::<I, 4>(isa, [row(i), row(i + 1), row(i + 2), row(i + 3)], probes, i, &mut dots);
        i += 4;
    }
    while i < count {
        multiply::<I, 1>(isa, [row(i)], probes, i, &mut dots);
        i += 1;
    }
    let mut rows: BlockRows = [[0.0; BLOCK]; 4];
    for (kind, rows) in rows.iter_mut().enumerate() {
        for (out, bytes) in rows.iter_mut().zip(screen.scales(first, count, kind)) {
            *out = f32::from_le_bytes(*bytes);
        }
    }
    for (t, probe) in probes.iter().enumerate() {
        probe.uppers(&rows, &dots[t], &mut uppers[t]);
        uppers[t][count..].fill(f32::NEG_INFINITY);
        let mut lanes = isa.splat(f32::NEG_INFINITY);
        for upper in uppers[t].as_chunks().0 {
            lanes = isa.max(isa.load(upper), lanes);
        }
        tops[t] = fold_max(isa, lanes);
    }
}

/// Sums of codes of the rows from `i` on of a block with those of every probe.
#[inline(always)]
fn multiply<I: Isa, const R: usize>(
    isa: I,
    rows: [&[u8]; R],
    probes: &[Probe],
    i: usize,
    dots: &mut [[i32; BLOCK]; GROUP],
) {
    let mut t = 0;
    while t < probes.len() {
        let (probes, dots) = (&probes[t..], &mut dots[t..]);
        t += match probes.len() {
            4.. => tile::<I, R, 4>(isa, rows, probes, i, dots),
            2.. => tile::<I, R, 2>(isa, rows, probes, i, dots),
            _ => tile::<I, R, 1>(isa, rows, probes, i, dots),
        };
    }
}

/// The same for the first T probes. Returns T.
#[inline(always)]
fn tile<I: Isa, const R: usize, const T: usize>(
    isa: I,
    rows: [&[u8]; R],
    probes: &[Probe],
    i: usize,
    dots: &mut [[i32; BLOCK]],
) -> usize {
    let mut codes = [&probes[0].codes[..]; T];
    for t in 1..T {
        codes[t] = &probes[t].codes;
    }
    let mut ahead = [std::ptr::null(); R];
    for r in 0..R {
        ahead[r] = rows[r].as_ptr().wrapping_add(isa.ahead());
    }
    let sums = isa.nibble_dots::<R, T>(rows, ahead, codes);
    for t in 0..T {
        dots[t][i..i + R].copy_from_slice(&sums[t]);
    }
    T
}

/// Least and greatest values that the logits of the rows `list` can have. With `uppers`, those that [`screen_block`]
/// gave, only the finer codes are read, and h stays rounded to eight bits where it meets the others.
#[inline(always)]
pub(crate) fn narrow<I: Isa>(
    isa: I,
    screen: &Screen,
    probe: &Probe,
    list: &[u32],
    uppers: Option<&[f32]>,
    ranges: &mut [[f32; 2]],
) {
    let ahead = isa.ahead().div_ceil(Screen::row_bytes(screen.columns)).max(2);
    for (i, (&row, range)) in list.iter().zip(ranges).enumerate() {
        // These rows are anywhere: the codes are asked for by those that are before them, what else is known earlier.
        let later = |n: usize| list.get(i + n).map_or(row, |&row| row) as usize;
        for kind in 0..3 {
            isa.prefetch(screen.scales(later(2 * ahead), 1, kind).as_ptr().cast());
        }
        let (row, next) = (row as usize, later(ahead));
        let scales = screen.row_scales(row);
        let upper = uppers.map_or(0.0, |uppers| uppers[row]);
        if scales.step == f32::INFINITY || upper == f32::INFINITY {
            *range = [f32::NEG_INFINITY, f32::INFINITY];
            continue;
        }
        let (min, step) = (f64::from(scales.min), f64::from(scales.step));
        // The middles of the parts, from the middle of the range on.
        let fine = sum(isa, screen.fine(row), screen.fine(next), probe) + 0.5 * probe.sums[1];
        let fine = step * (fine / PARTS - 0.5 * probe.sums[1]);
        let (coarse, norm) = if uppers.is_some() {
            let bound = probe.coarse_bound(min, step, f64::from(scales.spread));
            (f64::from(upper) - bound, scales.norm(screen.columns))
        } else {
            let sum = sum(isa, screen.coarse(row, 1), screen.coarse(next, 1), probe);
            (min * probe.sums[1] + step * (sum - probe.dithered[1]), 0.0)
        };
        let (by_step, by_norm) = (step / PARTS * probe.by_step, norm * probe.by_norm);
        let bound = probe.bound((by_step * by_step + by_norm * by_norm).sqrt(), min, step);
        *range = [(coarse + fine - bound) as f32, (coarse + fine + bound) as f32];
    }
}

/// The sum of a row's codes, each times its element of the hidden state in 16 bits.
#[inline(always)]
fn sum<I: Isa>(isa: I, codes: &[u8], ahead: &[u8], probe: &Probe) -> f64 {
    let [[high], [low]] = isa.nibble_dots([codes], [ahead.as_ptr()], [&probe.high[..], &probe.low]);
    probe.scale * (256.0 * f64::from(high) + f64::from(low))
}

/// The definition of [`Isa::nibble_dots`].
#[inline(always)]
pub(crate) fn nibble_dots<const R: usize, const T: usize>(w: [&[u8]; R], q: [&[i8]; T]) -> [[i32; R]; T] {
    q.map(|q| {
        w.map(|w| {
            let mut sum = 0;
            for (bytes, q) in w.as_chunks::<64>().0.iter().zip(q.as_chunks::<CHUNK>().0) {
                for b in 0..64 {
                    sum += i32::from(bytes[b] & 15) * i32::from(q[b]);
                    sum += i32::from(bytes[b] >> 4) * i32::from(q[64 + b]);
                }
            }
            sum
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::scalar::Scalar;

    #[test]
    fn the_bound_of_all_rows_is_no_less_than_the_root() {
        const COLUMNS: usize = 200;
        let wave = |i: usize| (i * 37 % 101) as f32 / 50.0 - 1.0;
        // Ordinary, all the same, nearly so, and with one weight far outside.
        let rows: [fn(f32, usize) -> f32; 5] =
            [|x, _| x, |_, _| 0.0, |_, _| 0.7, |x, _| 0.7 + 1e-6 * x, |x, i| if i == 9 { 50.0 } else { x }];
        let dither = Dither::new(COLUMNS);
        let bytes = Bytes::new(
            std::sync::Arc::new(vec![0u8; Screen::bytes(1, COLUMNS)]),
            0..Screen::bytes(1, COLUMNS),
        );
        let screen = Screen::new(bytes, 1, COLUMNS);
        let mut probe = Probe::new(COLUMNS);
        for outside in [0.0, 1.0, 40.0] {
            let mut h: Vec<f32> = (0..COLUMNS).map(|i| outside * wave(i + 5)).collect();
            h[7] *= outside;
            assert!(probe.set(&screen, &h));
            for row in rows {
                let row: Vec<f32> = (0..COLUMNS).map(|i| row(wave(i), i)).collect();
                let (mut coarse, mut fine) = ([0; 128], [0; 128]);
                let scales = screen_row(Scalar, &row, &dither, &mut coarse, &mut fine);
                let (min, step) = (f64::from(scales.min), f64::from(scales.step));
                let size = row.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt();
                let norm = size + step * (COLUMNS as f64).sqrt() / 2.0;
                assert!(scales.norm(COLUMNS) >= norm && scales.norm(COLUMNS) <= 1.00001 * norm + 1e-18);
                let root = (step * probe.by_step).hypot(norm * probe.by_norm);
                assert!(
                    probe.coarse_bound(min, step, f64::from(scales.spread)) >= probe.bound(root, min, step)
                );
            }
        }
    }
}
