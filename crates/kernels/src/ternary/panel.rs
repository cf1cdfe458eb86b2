//! The product with several tokens: weights are unpacked once, for all of them, into panels of byte codes.
//!
//! A panel holds [`PANEL`] outputs: byte `(k / 4 * PANEL + output) * 4 + k % 4` is the code of input k. So four inputs of
//! sixteen outputs are one 64-byte register, a token's four activations are one broadcast word, and each lane of an
//! accumulator is an output of its own: nothing is ever summed across lanes.

use super::{Activations, CHUNK, OutPtr, columns::COLUMN_ORDER};
use crate::isa::Isa;

/// Outputs of a panel.
pub(crate) const PANEL: usize = 32;

/// Outputs that a task unpacks and multiplies.
pub(crate) const BLOCK: usize = 2 * PANEL;

/// Where the weights of some outputs are.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// In their rows alone, each `row_bytes` long.
    Rows { w: &'a [u8], row_bytes: usize },
    /// In a matrix stored by columns of `column_bytes`.
    Columns { w: &'a [u8], column_bytes: usize },
}

/// Some outputs of a matrix: `count` from `first` on, which is a multiple of [`BLOCK`]. That of token t and output o goes to
/// `out` at (t, o), as `(Σ w q) * (weight_scale / s)`.
#[derive(Clone, Copy)]
pub(crate) struct Part<'a> {
    pub(crate) source: Source<'a>,
    pub(crate) weight_scale: f32,
    pub(crate) first: usize,
    pub(crate) count: usize,
    pub(crate) out: OutPtr,
}

/// Multiplies the outputs of `part`, at most [`BLOCK`], with every token of `a`. `panels` is scratch of [`BLOCK`] bytes for
/// each input.
///
/// # Safety
/// The part's `out` must have room for all its elements, and nobody else may touch them meanwhile.
#[inline(always)]
pub(crate) unsafe fn matmul<I: Isa>(isa: I, part: &Part<'_>, a: Activations<'_>, panels: &mut [u8]) {
    let Part { source, weight_scale, first, count, out } = *part;
    let width = a.codes.len() / a.scales.len();
    let parts = count.div_ceil(PANEL);
    for part in 0..parts {
        let skip = PANEL * part;
        let panel = &mut panels[part * width * PANEL..][..width * PANEL];
        unpack(isa, source, panel, first, skip, PANEL.min(count - skip));
    }
    let mut t = 0;
    let tokens = a.scales.len();
    let mut dots = [[0; PANEL]; 32];
    while t < tokens {
        if I::PANEL_PAIRS && parts == 2 {
            // SAFETY: the caller's contract, handed on.
            t += unsafe {
                match tokens - t {
                    6.. => tile::<I, 6, 2>(isa, panels, weight_scale, a, t, first, count, &mut dots, out),
                    4.. => tile::<I, 4, 2>(isa, panels, weight_scale, a, t, first, count, &mut dots, out),
                    2.. => tile::<I, 2, 2>(isa, panels, weight_scale, a, t, first, count, &mut dots, out),
                    _ => tile::<I, 1, 2>(isa, panels, weight_scale, a, t, first, count, &mut dots, out),
                }
            };
            continue;
        }
        // The activations of a tile stay in the first-level cache for all panels.
        let left = (tokens - t).min(I::PANEL_TOKENS);
        let mut step = 0;
        for part in 0..parts {
            let panel = &panels[part * width * PANEL..][..width * PANEL];
            let (first, count) = (first + PANEL * part, PANEL.min(count - PANEL * part));
            // SAFETY: the caller's contract, handed on.
            step = unsafe {
                match left {
                    32.. => tile::<I, 32, 1>(isa, panel, weight_scale, a, t, first, count, &mut dots, out),
                    8.. => tile::<I, 8, 1>(isa, panel, weight_scale, a, t, first, count, &mut dots, out),
                    6.. => tile::<I, 6, 1>(isa, panel, weight_scale, a, t, first, count, &mut dots, out),
                    4.. => tile::<I, 4, 1>(isa, panel, weight_scale, a, t, first, count, &mut dots, out),
                    2.. => tile::<I, 2, 1>(isa, panel, weight_scale, a, t, first, count, &mut dots, out),
                    _ => tile::<I, 1, 1>(isa, panel, weight_scale, a, t, first, count, &mut dots, out),
                }
            };
        }
        t += step;
    }
}

/// Unpacks `count` outputs, the first being `first + skip` and row `skip` of the source.
#[inline(always)]
fn unpack<I: Isa>(isa: I, source: Source<'_>, panel: &mut [u8], first: usize, skip: usize, count: usize) {
    match source {
        Source::Rows { w, row_bytes } => {
            for half in 0..PANEL / 16 {
                let mut rows: [&[u8]; 16] = [&w[..row_bytes]; 16];
                for r in 0..16 {
                    // Outputs past the last are computed as the first, and not written.
                    if 16 * half + r < count {
                        rows[r] = &w[(skip + 16 * half + r) * row_bytes..][..row_bytes];
                    }
                }
                isa.panel_rows(rows, panel, half);
            }
        }
        Source::Columns { w, column_bytes } => {
            let columns = w.len() / column_bytes;
            let at = (first + skip) / CHUNK * 64;
            for (quad, codes) in panel.as_chunks_mut::<{ PANEL * 4 }>().0.iter_mut().enumerate() {
                let mut lines = [&w[at..][..64].as_chunks::<64>().0[0]; 4];
                for i in 0..4 {
                    // Past the last column the activations are zero.
                    let column = (4 * quad + i).min(columns - 1);
                    lines[i] = &w[column * column_bytes + at..][..64].as_chunks::<64>().0[0];
                }
                isa.panel_columns(lines, (first + skip) % CHUNK / PANEL, codes);
            }
        }
    }
}

/// P panels against T tokens from `t0`. `dots` is scratch. Returns T.
///
/// # Safety
/// As [`matmul`].
#[inline(always)]
unsafe fn tile<I: Isa, const T: usize, const P: usize>(
    isa: I,
    panels: &[u8],
    weight_scale: f32,
    a: Activations<'_>,
    t0: usize,
    first: usize,
    count: usize,
    dots: &mut [[i32; PANEL]; 32],
    out: OutPtr,
) -> usize {
    let width = a.codes.len() / a.scales.len();
    let mut parts = [panels; P];
    for p in 0..P {
        parts[p] = &panels[p * width * PANEL..][..width * PANEL];
    }
    let mut codes = [&a.codes[..width]; T];
    for t in 0..T {
        codes[t] = &a.codes[(t0 + t) * width..][..width];
    }
    let dots = &mut dots.as_chunks_mut::<T>().0.as_chunks_mut::<P>().0[0];
    isa.panel_tile(parts, codes, dots);
    for t in 0..T {
        let (sum, factor) = (a.sums[t0 + t], weight_scale / a.scales[t0 + t]);
        let mut y = [[0.0; PANEL]; P];
        for p in 0..P {
            for r in 0..PANEL {
                y[p][r] = (dots[p][t][r] - sum) as f32 * factor;
            }
        }
        let y = y.as_flattened();
        // SAFETY: the caller's contract: (t0 + t, first..first + count) is ours and in bounds. Whole panels are written
        // without a loop.
        unsafe {
            if count == P * PANEL {
                out.write_all(t0 + t, first, &y[..P * PANEL]);
            } else {
                out.write_all(t0 + t, first, &y[..count]);
            }
        }
    }
    T
}

/// The definition of [`Isa::panel_rows`].
#[inline(always)]
pub(crate) fn panel_rows(rows: [&[u8]; 16], panel: &mut [u8], half: usize) {
    for (r, row) in rows.into_iter().enumerate() {
        for (i, byte) in row.iter().enumerate() {
            for field in 0..4 {
                let k = i / 64 * CHUNK + 64 * field + i % 64;
                panel[(k / 4 * PANEL + 16 * half + r) * 4 + k % 4] = byte >> (6 - 2 * field) & 3;
            }
        }
    }
}

/// The definition of [`Isa::panel_columns`].
#[inline(always)]
pub(crate) fn panel_columns(columns: [&[u8; 64]; 4], part: usize, codes: &mut [u8]) {
    let (field, first) = (part / 2, part % 2 * PANEL);
    for r in 0..PANEL {
        for k in 0..4 {
            codes[4 * r + k] = columns[k][COLUMN_ORDER[first + r] as usize] >> (6 - 2 * field) & 3;
        }
    }
}

/// The definition of [`Isa::panel_tile`].
#[inline(always)]
pub(crate) fn panel_tile<const T: usize>(panel: &[u8], a: [&[i8]; T], dots: &mut [[i32; PANEL]; T]) {
    for t in 0..T {
        dots[t] = [0; PANEL];
        for (quad, q) in panel.as_chunks::<{ PANEL * 4 }>().0.iter().zip(a[t].as_chunks::<4>().0) {
            for r in 0..PANEL {
                for k in 0..4 {
                    dots[t][r] += i32::from(quad[4 * r + k]) * i32::from(q[k]);
                }
            }
        }
    }
}
