//! A small copy of the output head that tells which rows can matter.
//!
//! The head is more than half of what a decoded token reads, and almost all of its logits are thrown away. So it is kept a
//! second time in four bits, and that copy gives every logit within a known bound; only rows whose upper bound reaches
//! the k-th greatest exact logit are then computed from the original. The caller sees exact values or none.
//!
//! # The bound
//!
//! With dither u_i, uniform in [-1/2, 1/2), the same for column i of every row, a row is stored as
//! `c_i = round((w_i - min) / step + u_i)`, and `w_i = min + step (c_i - u_i + e_i)`, where every e_i is uniform in
//! [-1/2, 1/2], independent of the row and of the other e_j (subtractive dither; Schuchman 1964). A uniform variable of
//! width 1 is sub-Gaussian with variance 1/12, so the logit's error `step Σ e_i h_i` exceeds `step z |h| / √12` with
//! probability at most `2 exp(-z² / 2)`. With z = 9.2, all 128,256 rows of a step together stay within it except with
//! probability 1.1e-13. What else is inexact has bounds that never fail, and they are added: the rounding of h to 16 bits
//! and of the codes, and the rounding of the exact logit itself.
//!
//! The dither is a fixed sequence, so that results are the same everywhere; it knows nothing of any model.

use crate::isa::Isa;
use crate::memory::{Aligned, Bytes};

/// Weights in a chunk of 64 bytes: byte b holds weight b in its low half, weight 64 + b in its high one.
const CHUNK: usize = 128;

/// Bytes that are asked for ahead of those that are multiplied.
const AHEAD: usize = 5 << 10;

/// See the module.
const Z: f64 = 9.2;

/// The four-bit copy of a float matrix.
pub struct Screen {
    codes: Bytes,
    /// Least weight and step of each row, two float32; a step of infinity where the row is not finite.
    scales: Bytes,
    rows: usize,
    columns: usize,
    dither: Vec<f32>,
}

impl Screen {
    /// Bytes of a row's codes.
    pub const fn row_bytes(columns: usize) -> usize {
        columns.div_ceil(CHUNK) * (CHUNK / 2)
    }
    /// Bytes of a row's scales.
    pub const SCALE_BYTES: usize = 8;

    /// A copy that [`crate::Compute::screen_rows`] made.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn new(codes: Bytes, scales: Bytes, rows: usize, columns: usize) -> Self {
        assert_eq!(codes.len(), rows * Self::row_bytes(columns));
        assert_eq!(scales.len(), rows * Self::SCALE_BYTES);
        Self { codes, scales, rows, columns, dither: dither(columns) }
    }
    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Stored bytes.
    pub fn byte_len(&self) -> usize {
        self.codes.len() + self.scales.len()
    }
    pub(crate) fn codes(&self, row: usize, count: usize) -> &[u8] {
        let bytes = Self::row_bytes(self.columns);
        &self.codes[row * bytes..][..count * bytes]
    }
    pub(crate) fn scales(&self, row: usize) -> (f32, f32) {
        let [a, b, c, d, e, f, g, h] = self.scales.as_chunks::<8>().0[row];
        (f32::from_le_bytes([a, b, c, d]), f32::from_le_bytes([e, f, g, h]))
    }
}

/// The dither of each column.
pub(crate) fn dither(columns: usize) -> Vec<f32> {
    let mut state = 0u64;
    let next = |_| {
        // SplitMix64; the middle of one of 2^24 intervals.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let bits = (z ^ (z >> 31)) >> 40;
        ((bits as f64 + 0.5) / f64::from(1 << 24) - 0.5) as f32
    };
    (0..columns).map(next).collect()
}

/// A hidden state in 16 bits, h ≈ scale (256 high + low), and what the bounds need to know of it.
pub(crate) struct Probe {
    high: Aligned<i8>,
    low: Aligned<i8>,
    scale: f64,
    /// Σ h and Σ u h of the rounded h.
    sum: f64,
    dithered: f64,
    /// What a row's step and its greatest weight are multiplied with in the bound.
    by_step: f64,
    by_weight: f64,
}

impl Probe {
    pub(crate) fn new(columns: usize) -> Self {
        let width = columns.next_multiple_of(CHUNK);
        let (high, low) = (Aligned::zeroed(width), Aligned::zeroed(width));
        Self { high, low, scale: 0.0, sum: 0.0, dithered: 0.0, by_step: 0.0, by_weight: 0.0 }
    }

    /// Takes in `h`; false where it is not finite.
    pub(crate) fn set(&mut self, screen: &Screen, h: &[f32]) -> bool {
        const TOP: f64 = 32_639.0; // 127 * 256 + 127
        let top = h.iter().fold(0.0f32, |top, h| if h.abs() > top { h.abs() } else { top });
        if !h.iter().all(|h| h.is_finite()) {
            return false;
        }
        self.scale = f64::from(top) / TOP;
        let inverse = if top > 0.0 { 1.0 / self.scale } else { 0.0 };
        let (mut sum, mut dithered, mut square, mut size, mut lost) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for (i, &h) in h.iter().enumerate() {
            let h = f64::from(h);
            let code = ((h * inverse).round() as i32).clamp(-TOP as i32, TOP as i32);
            let high = (code + 128) >> 8;
            self.high[i] = high as i8;
            self.low[i] = (code - 256 * high) as i8;
            let rounded = self.scale * f64::from(code);
            sum += rounded;
            dithered += rounded * f64::from(screen.dither[i]);
            square += rounded * rounded;
            size += h.abs();
            lost += (h - rounded).abs();
        }
        (self.sum, self.dithered) = (sum, dithered);
        // A code is computed in float32 from numbers up to 16: its error stays below 2^-18.
        self.by_step = Z * (square / 12.0).sqrt() + size / f64::from(1 << 17);
        // A float32 sum in sixteen lanes: each term is rounded fewer than n / 16 + 8 times, by 2^-24 each; twice that.
        let roundings = (h.len() / 16 + 8) as f64 / f64::from(1 << 23);
        self.by_weight = lost + size * roundings;
        true
    }

    /// The logits of rows by their sums of codes times high and low parts, and how far at most the exact ones are from them.
    #[inline(always)]
    fn logits(&self, rows: &BlockRows, logits: &mut [f32; BLOCK], bounds: &mut [f32; BLOCK]) {
        for i in 0..BLOCK {
            let (min, step) = (f64::from(rows.min[i]), f64::from(rows.step[i]));
            // Both sums are below 2^31, so this is exact.
            let dot = self.scale * (256.0 * f64::from(rows.high[i]) + f64::from(rows.low[i]));
            let logit = min * self.sum + step * (dot - self.dithered);
            let weight = min.abs().max((min + 15.0 * step).abs());
            let bound = step * self.by_step + weight * self.by_weight + logit.abs() / f64::from(1 << 21);
            (logits[i], bounds[i]) = (logit as f32, bound as f32);
        }
        // A row that is not finite is always computed.
        for i in 0..BLOCK {
            if rows.step[i] == f32::INFINITY {
                (logits[i], bounds[i]) = (f32::INFINITY, 0.0);
            }
        }
    }
}

/// Rows of a block of the screen.
pub(crate) const BLOCK: usize = 64;

/// What is known of the rows of a block.
struct BlockRows {
    min: [f32; BLOCK],
    step: [f32; BLOCK],
    high: [i32; BLOCK],
    low: [i32; BLOCK],
}

/// Stores a row of weights, all finite, as codes. Returns least weight and step.
#[inline(always)]
pub(crate) fn screen_row<I: Isa>(isa: I, row: &[f32], dither: &[f32], codes: &mut [u8]) -> (f32, f32) {
    let (blocks, tail) = row.as_chunks::<16>();
    let (mut tops, mut bottoms) = (isa.splat(f32::NEG_INFINITY), isa.splat(f32::NEG_INFINITY));
    for block in blocks {
        let w = isa.load(block);
        (tops, bottoms) = (isa.max(w, tops), isa.max(isa.sub(isa.splat(0.0), w), bottoms));
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
    let mut chunk_codes = [0i8; CHUNK];
    for (c, out) in codes.as_chunks_mut::<{ CHUNK / 2 }>().0.iter_mut().enumerate() {
        for i in 0..CHUNK / 16 {
            let at = CHUNK * c + 16 * i;
            let place = &mut chunk_codes.as_chunks_mut::<16>().0[i];
            let (mut w, mut u) = ([min; 16], [0.0; 16]);
            let (w, u) = match blocks.get(at / 16) {
                Some(block) => (block, &dither.as_chunks::<16>().0[at / 16]),
                None => {
                    let n = row.len().saturating_sub(at);
                    w[..n].copy_from_slice(&row[row.len() - n..]);
                    u[..n].copy_from_slice(&dither[row.len() - n..]);
                    (&w, &u)
                }
            };
            let scaled = isa.mul(isa.sub(isa.load(w), least), inverse);
            isa.to_i8(isa.add(scaled, isa.load(u)), place);
        }
        for b in 0..CHUNK / 2 {
            // Codes are 0 to 15: the step is a little wide, and the dither less than a half.
            out[b] = (chunk_codes[b] as u8 & 15) | (chunk_codes[b + 64] as u8) << 4;
        }
    }
    (min, step)
}

/// The logits of as many rows as `logits` has, at most [`BLOCK`], from `first` on, and the greatest logit and the
/// greatest bound among them.
#[inline(always)]
pub(crate) fn screen_logits<I: Isa>(
    isa: I,
    screen: &Screen,
    probe: &Probe,
    first: usize,
    logits: &mut [f32],
) -> (f32, f32) {
    let bytes = Screen::row_bytes(screen.columns);
    let count = logits.len();
    let codes = screen.codes(first, count);
    let row = |i: usize| &codes[i * bytes..][..bytes];
    let ahead = |row: &[u8]| row.as_ptr().wrapping_add(AHEAD);
    let mut rows = BlockRows { min: [0.0; BLOCK], step: [0.0; BLOCK], high: [0; BLOCK], low: [0; BLOCK] };
    let mut i = 0;
    while i + 4 <= count {
        let four = [row(i), row(i + 1), row(i + 2), row(i + 3)];
        let next = [ahead(four[0]), ahead(four[1]), ahead(four[2]), ahead(four[3])];
        let dots = isa.nibble_dots(four, next, &probe.high, &probe.low);
        for k in 0..4 {
            [rows.high[i + k], rows.low[i + k]] = dots[k];
        }
        i += 4;
    }
    while i < count {
        [[rows.high[i], rows.low[i]]] = isa.nibble_dots([row(i)], [ahead(row(i))], &probe.high, &probe.low);
        i += 1;
    }
    for i in 0..count {
        (rows.min[i], rows.step[i]) = screen.scales(first + i);
    }
    let (mut all, mut bounds) = ([0.0; BLOCK], [0.0; BLOCK]);
    probe.logits(&rows, &mut all, &mut bounds);
    logits.copy_from_slice(&all[..count]);
    let (mut top, mut widest) = (f32::NEG_INFINITY, 0.0);
    for i in 0..count {
        top = if all[i] > top { all[i] } else { top };
        widest = if bounds[i] > widest { bounds[i] } else { widest };
    }
    (top, widest)
}

/// The upper bound of a row's logit.
pub(crate) fn upper_bound(screen: &Screen, probe: &Probe, row: usize, logit: f32) -> f32 {
    let (min, step) = screen.scales(row);
    if step == f32::INFINITY {
        return f32::INFINITY;
    }
    let weight = f64::from(min).abs().max((f64::from(min) + 15.0 * f64::from(step)).abs());
    let bound = f64::from(step) * probe.by_step + weight * probe.by_weight;
    // The logit as it was stored has lost a rounding more.
    logit + (bound + f64::from(logit.abs()) / f64::from(1 << 21)) as f32
}

/// The definition of [`Isa::nibble_dots`].
#[inline(always)]
pub(crate) fn nibble_dots<const R: usize>(w: [&[u8]; R], high: &[i8], low: &[i8]) -> [[i32; 2]; R] {
    w.map(|w| {
        [high, low].map(|q| {
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
