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
//! [-1/2, 1/2], independent of the row and of the other e_j (subtractive dither; Schuchman 1964). A uniform variable of
//! width 1 is sub-Gaussian with variance 1/12, so the logit's error `step Σ e_i h_i` exceeds `step z |h| / √12` with
//! probability at most `2 exp(-z² / 2)`. What is left, e_i + 1/2, is stored in the same way in steps of 1 / [`FINE`], with
//! another dither. With z = 9.2, all 128,256 rows of a step together stay within both bounds except with probability
//! 2.2e-13. What else is inexact has bounds that never fail, and they are added: the rounding of h to 16 bits and of the
//! codes, and the rounding of the exact logit itself.
//!
//! The dither is a fixed sequence, so that results are the same everywhere; it knows nothing of any model.
//!
//! # Layout
//!
//! Parts of [`Screen::PART`] rows, the last one shorter: the codes of all rows of the part, then the finer codes of all,
//! then least weight and step of each row, two float32, a step of infinity where the row is not finite.

use crate::isa::Isa;
use crate::memory::{Aligned, Bytes};

/// Weights in a chunk of 64 bytes: byte b holds weight b in its low half, weight 64 + b in its high one.
const CHUNK: usize = 128;

/// See the module.
const Z: f64 = 9.2;

/// Steps that a step is divided into: a little less than 15, so that no rounding leads past code 15.
const FINE: f64 = 14.999;

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
        rows * (2 * Self::row_bytes(columns) + SCALE_BYTES)
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
        (self.rows * (row + SCALE_BYTES), row)
    }
    fn place(&self, row: usize) -> Place {
        let (part, bytes) = (row / Self::PART, Self::row_bytes(self.columns));
        let (start, count) = (part * Self::PART, Self::PART.min(self.rows - part * Self::PART));
        let coarse = Self::bytes(start, self.columns);
        let (fine, scales) = (coarse + count * bytes, coarse + 2 * count * bytes);
        let at = row - start;
        Place { coarse: coarse + at * bytes, fine: fine + at * bytes, scales: scales + at * SCALE_BYTES }
    }
    /// Codes of `count` rows of one part.
    fn coarse(&self, row: usize, count: usize) -> &[u8] {
        &self.bytes[self.place(row).coarse..][..count * Self::row_bytes(self.columns)]
    }
    fn fine(&self, row: usize) -> &[u8] {
        &self.bytes[self.place(row).fine..][..Self::row_bytes(self.columns)]
    }
    fn scales(&self, row: usize) -> (f32, f32) {
        let bytes = self.bytes[self.place(row).scales..].first_chunk();
        let [a, b, c, d, e, f, g, h] = *bytes.unwrap_or(&[0; SCALE_BYTES]);
        (f32::from_le_bytes([a, b, c, d]), f32::from_le_bytes([e, f, g, h]))
    }
}

/// Least weight and step of a row.
const SCALE_BYTES: usize = 8;

/// Makes the copy of some rows, `part` being as long as their number asks for. `decode` writes the i-th of them to a row of
/// floats, or says that it is not finite.
pub(crate) fn fill_part(
    columns: usize,
    part: &mut [u8],
    mut decode: impl FnMut(usize, &mut [f32]) -> bool,
    screen_row: impl Fn(&[f32], &Dither, &mut [u8], &mut [u8]) -> (f32, f32),
) {
    let rows = part.len() / Screen::bytes(1, columns);
    let (dither, mut row) = (Dither::new(columns), vec![0.0; columns]);
    let bytes = Screen::row_bytes(columns);
    let (coarse, rest) = part.split_at_mut(rows * bytes);
    let (fine, scales) = rest.split_at_mut(rows * bytes);
    let codes = coarse.chunks_exact_mut(bytes).zip(fine.chunks_exact_mut(bytes));
    for (i, ((coarse, fine), scale)) in codes.zip(scales.as_chunks_mut::<SCALE_BYTES>().0).enumerate() {
        let (min, step) = match decode(i, &mut row) {
            true => screen_row(&row, &dither, coarse, fine),
            false => (0.0, f32::INFINITY),
        };
        scale[..4].copy_from_slice(&min.to_le_bytes());
        scale[4..].copy_from_slice(&step.to_le_bytes());
    }
}

/// The dither of each column, for the codes and for the finer ones.
pub(crate) struct Dither {
    coarse: Vec<f32>,
    fine: Vec<f32>,
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
        Self { coarse: (0..columns).map(&mut next).collect(), fine: (0..columns).map(next).collect() }
    }
}

/// A hidden state in 16 bits, h ≈ scale (256 high + low), and what the bounds need to know of it.
pub(crate) struct Probe {
    high: Aligned<i8>,
    low: Aligned<i8>,
    scale: f64,
    /// Σ h of the rounded h, and Σ u h with either dither.
    sum: f64,
    dithered: [f64; 2],
    /// What a row's step, before and after the finer codes, and its greatest weight are multiplied with in the bound.
    by_step: [f64; 2],
    by_weight: f64,
}

impl Probe {
    pub(crate) fn new(columns: usize) -> Self {
        let width = columns.next_multiple_of(CHUNK);
        let (high, low) = (Aligned::zeroed(width), Aligned::zeroed(width));
        Self { high, low, scale: 0.0, sum: 0.0, dithered: [0.0; 2], by_step: [0.0; 2], by_weight: 0.0 }
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
        let (mut sum, mut dithered, mut square, mut size, mut lost) = (0.0, [0.0; 2], 0.0, 0.0, 0.0);
        for (i, &h) in h.iter().enumerate() {
            let h = f64::from(h);
            let code = ((h * inverse).round() as i32).clamp(-TOP as i32, TOP as i32);
            let high = (code + 128) >> 8;
            self.high[i] = high as i8;
            self.low[i] = (code - 256 * high) as i8;
            let rounded = self.scale * f64::from(code);
            sum += rounded;
            dithered[0] += rounded * f64::from(screen.dither.coarse[i]);
            dithered[1] += rounded * f64::from(screen.dither.fine[i]);
            square += rounded * rounded;
            size += h.abs();
            lost += (h - rounded).abs();
        }
        (self.sum, self.dithered) = (sum, dithered);
        // A code is computed in float32 from numbers up to 16: its error stays below 2^-18.
        let (spread, inexact) = (Z * (square / 12.0).sqrt(), size / f64::from(1 << 17));
        self.by_step = [spread + inexact, spread / FINE + inexact];
        // A float32 sum in sixteen lanes: each term is rounded fewer than n / 16 + 8 times, by 2^-24 each; twice that.
        let roundings = (h.len() / 16 + 8) as f64 / f64::from(1 << 23);
        self.by_weight = lost + size * roundings;
        true
    }

    /// How far the logit of a row is off at most, by its codes (0) and by both kinds (1), but for the rounding of the logit.
    #[inline(always)]
    fn bound(&self, min: f64, step: f64, kind: usize) -> f64 {
        step * self.by_step[kind] + min.abs().max((min + 15.0 * step).abs()) * self.by_weight
    }

    /// The logits of rows by their sums of codes times high and low parts, and how far at most the exact ones are from them.
    #[inline(always)]
    fn logits(&self, rows: &BlockRows, logits: &mut [f32; BLOCK], bounds: &mut [f32; BLOCK]) {
        for i in 0..BLOCK {
            let (min, step) = (f64::from(rows.min[i]), f64::from(rows.step[i]));
            // Both sums are below 2^31, so this is exact.
            let dot = self.scale * (256.0 * f64::from(rows.high[i]) + f64::from(rows.low[i]));
            let logit = min * self.sum + step * (dot - self.dithered[0]);
            let bound = self.bound(min, step, 0) + logit.abs() / f64::from(1 << 21);
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

/// Stores a row of weights, all finite, as codes of both kinds. Returns least weight and step.
#[inline(always)]
pub(crate) fn screen_row<I: Isa>(
    isa: I,
    row: &[f32],
    dither: &Dither,
    coarse: &mut [u8],
    fine: &mut [u8],
) -> (f32, f32) {
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
    let (half, steps) = (isa.splat(0.5), isa.splat(FINE as f32));
    let mut codes = [[0i8; CHUNK]; 2];
    let out = coarse.as_chunks_mut::<{ CHUNK / 2 }>().0.iter_mut();
    for (c, out) in out.zip(fine.as_chunks_mut::<{ CHUNK / 2 }>().0.iter_mut()).enumerate() {
        for i in 0..CHUNK / 16 {
            let at = CHUNK * c + 16 * i;
            let (mut w, mut u, mut v) = ([min; 16], [0.0; 16], [0.0; 16]);
            let (w, u, v) = match blocks.get(at / 16) {
                Some(block) => {
                    let load = |d: &[f32]| isa.load(&d.as_chunks::<16>().0[at / 16]);
                    (isa.load(block), load(&dither.coarse), load(&dither.fine))
                }
                None => {
                    let n = row.len().saturating_sub(at);
                    w[..n].copy_from_slice(&row[row.len() - n..]);
                    u[..n].copy_from_slice(&dither.coarse[row.len() - n..]);
                    v[..n].copy_from_slice(&dither.fine[row.len() - n..]);
                    (isa.load(&w), isa.load(&u), isa.load(&v))
                }
            };
            let place = |codes: &'_ mut [i8; CHUNK], v| isa.to_i8(v, &mut codes.as_chunks_mut::<16>().0[i]);
            // Codes are 0 to 15: the step is a little wide, and the dither less than a half.
            let exact = isa.add(isa.mul(isa.sub(w, least), inverse), u);
            let code = isa.round(exact);
            place(&mut codes[0], code);
            let left = isa.mul(isa.add(isa.sub(exact, code), half), steps);
            place(&mut codes[1], isa.add(left, v));
        }
        for (codes, out) in codes.iter().zip([out.0, out.1]) {
            for b in 0..CHUNK / 2 {
                out[b] = (codes[b] as u8 & 15) | (codes[b + 64] as u8) << 4;
            }
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
    let codes = screen.coarse(first, count);
    let row = |i: usize| &codes[i * bytes..][..bytes];
    let ahead = |row: &[u8]| row.as_ptr().wrapping_add(isa.ahead() / 2);
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
    // The logit as it was stored has lost a rounding more.
    let bound = probe.bound(f64::from(min), f64::from(step), 0) + f64::from(logit.abs()) / f64::from(1 << 21);
    logit + bound as f32
}

/// Least and greatest values that the logits of the rows `list` can have, by the logits that [`screen_logits`] gave.
#[inline(always)]
pub(crate) fn narrow<I: Isa>(
    isa: I,
    screen: &Screen,
    probe: &Probe,
    list: &[u32],
    logits: &[f32],
    ranges: &mut [[f32; 2]],
) {
    for (i, (&row, range)) in list.iter().zip(ranges).enumerate() {
        // These rows are anywhere.
        let ahead = list.get(i + 2).map_or(std::ptr::null(), |&row| screen.fine(row as usize).as_ptr());
        let [[high, low]] = isa.nibble_dots([screen.fine(row as usize)], [ahead], &probe.high, &probe.low);
        let (min, step) = screen.scales(row as usize);
        if step == f32::INFINITY {
            *range = [f32::NEG_INFINITY, f32::INFINITY];
            continue;
        }
        let (coarse, step) = (f64::from(logits[row as usize]), f64::from(step));
        let dot = probe.scale * (256.0 * f64::from(high) + f64::from(low));
        let logit = coarse + step * ((dot - probe.dithered[1]) / FINE - 0.5 * probe.sum);
        let rounding = (coarse.abs() + logit.abs()) / f64::from(1 << 21);
        let bound = probe.bound(f64::from(min), step, 1) + rounding;
        *range = [(logit - bound) as f32, (logit + bound) as f32];
    }
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
