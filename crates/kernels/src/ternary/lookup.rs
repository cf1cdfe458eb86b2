//! The product with several tokens where nothing multiplies bytes and adds in 32 bits at once: sums are looked up.
//!
//! Four activations have 81 signed sums `Σ w q`. A table of them for each of sixteen tokens side by side, made with 81 additions, serves
//! every output: four weights cost one addition of sixteen lanes, a lane being a token, and no multiplication. (The idea is the
//! method of four Russians.) The tables of a step, 32 inputs, stay in the first-level cache while all outputs pass over them.

use super::panel::{BLOCK, Part, Source};
use super::{Activations, CHUNK, columns::COLUMN_ORDER};
use crate::isa::Isa;
use crate::memory::cast_mut;

/// Tokens side by side.
pub(crate) const LANES: usize = 16;

/// Most outputs of a task: making the tables costs as much as some hundred of them.
pub(crate) const OUTPUTS: usize = 36 * BLOCK;

/// Groups of four inputs in a step.
pub(crate) const GROUPS: usize = 8;

/// Steps in a chunk.
const STEPS: usize = CHUNK / (4 * GROUPS);

/// Sums of four inputs with weights of -1, 0, 1.
pub(crate) const SUMS: usize = 81;

/// Rows of the tables of a step: a group's number is read as one below 128.
pub(crate) const ROWS: usize = SUMS * (GROUPS - 1) + 128;

/// Bytes of scratch of a task.
pub(crate) const SCRATCH: usize = ROWS * 2 * LANES + OUTPUTS * (2 * LANES + 4 * LANES + 8 * STEPS);

/// Multiplies the outputs of `parts`, at most [`OUTPUTS`] when each part is filled up to whole blocks, with the [`LANES`] tokens from
/// `t0` on, as [`super::panel::matmul`] does. `scratch`: [`SCRATCH`] bytes.
///
/// # Safety
/// As there.
#[inline(always)]
pub(crate) unsafe fn matmul<I: Isa>(
    isa: I,
    parts: &[Part<'_>],
    a: Activations<'_>,
    t0: usize,
    scratch: &mut [u8],
) {
    let width = a.codes.len() / a.scales.len();
    let tokens = (a.scales.len() - t0).min(LANES);
    let outputs = parts.iter().map(|part| part.count.next_multiple_of(BLOCK)).sum::<usize>();
    let (tables, rest) = scratch.split_at_mut(ROWS * 2 * LANES);
    let (narrow, rest) = rest.split_at_mut(outputs * 2 * LANES);
    let (wide, rest) = rest.split_at_mut(outputs * 4 * LANES);
    let tables = cast_mut::<i16>(tables).as_chunks_mut::<LANES>().0;
    let narrow = cast_mut::<i16>(narrow).as_chunks_mut::<LANES>().0;
    let wide = cast_mut::<i32>(wide).as_chunks_mut::<LANES>().0;
    let numbers = &mut cast_mut::<u64>(rest)[..outputs * STEPS];
    narrow.fill([0; LANES]);
    wide.fill([0; LANES]);
    // Of each token, what the sums in 16 bits may have reached at most.
    let mut reach = [0; LANES];
    for chunk in 0..width / CHUNK {
        let mut base = 0;
        for part in parts {
            for first in (0..part.count).step_by(BLOCK) {
                number(part, first, chunk, &mut numbers[base..], outputs);
                base += BLOCK;
            }
        }
        for step in 0..STEPS {
            let mut q = [[0i16; LANES]; 4 * GROUPS];
            for t in 0..tokens {
                let codes = &a.codes[(t0 + t) * width + chunk * CHUNK..][..CHUNK];
                for g in 0..GROUPS {
                    for i in 0..4 {
                        let at = match parts[0].source {
                            Source::Rows { .. } => CHUNK / 4 * i + GROUPS * step + g,
                            Source::Columns { .. } => 4 * (GROUPS * step + g) + i,
                        };
                        q[4 * g + i][t] = i16::from(codes[at]);
                    }
                }
            }
            let mut reaches = [0; LANES];
            for q in &q {
                for t in 0..LANES {
                    reaches[t] += i32::from(q[t]).abs();
                }
            }
            let (mut any, mut full) = (0, false);
            for t in 0..LANES {
                any |= reaches[t];
                reach[t] += reaches[t];
                full |= reach[t] > i32::from(i16::MAX);
            }
            if any == 0 {
                continue;
            }
            if full {
                widen(narrow, wide);
                reach = reaches;
            }
            for g in 0..GROUPS {
                table(&q[4 * g..][..4], &mut tables[SUMS * g..][..SUMS]);
            }
            isa.add_looked_up(tables, &numbers[step * outputs..][..outputs], narrow);
        }
    }
    widen(narrow, wide);
    let mut base = 0;
    for part in parts {
        for first in (0..part.count).step_by(BLOCK) {
            let sums = &wide[base..][..BLOCK];
            for t in 0..tokens {
                let factor = part.weight_scale / a.scales[t0 + t];
                let mut y = [0.0; BLOCK];
                for o in 0..BLOCK {
                    let at = match part.source {
                        Source::Rows { .. } => o,
                        Source::Columns { .. } => COLUMN_ORDER[o] as usize,
                    };
                    y[o] = sums[at][t] as f32 * factor;
                }
                let count = (part.count - first).min(BLOCK);
                // SAFETY: the caller's contract: these outputs are ours and in bounds.
                unsafe { part.out.write_all(t0 + t, part.first + first, &y[..count]) }
            }
            base += BLOCK;
        }
    }
}

/// Adds the sums in 16 bits to those in 32 and clears them.
#[inline(always)]
fn widen(narrow: &mut [[i16; LANES]], wide: &mut [[i32; LANES]]) {
    for (narrow, wide) in narrow.iter_mut().zip(wide) {
        for t in 0..LANES {
            wide[t] += i32::from(narrow[t]);
        }
        *narrow = [0; LANES];
    }
}

/// The 81 sums of four inputs: that of the digits d, each a weight and 1, at d0 + 3 d1 + 9 d2 + 27 d3.
#[inline(always)]
fn table(q: &[[i16; LANES]], table: &mut [[i16; LANES]]) {
    let (mut low, mut high) = ([[0; LANES]; 9], [[0; LANES]; 9]);
    for i in 0..9 {
        let (a, b) = (i as i16 % 3 - 1, i as i16 / 3 - 1);
        for t in 0..LANES {
            low[i][t] = a * q[0][t] + b * q[1][t];
            high[i][t] = a * q[2][t] + b * q[3][t];
        }
    }
    for (i, rows) in table.as_chunks_mut::<9>().0.iter_mut().enumerate() {
        for (row, low) in rows.iter_mut().zip(&low) {
            for t in 0..LANES {
                row[t] = low[t] + high[i][t];
            }
        }
    }
}

/// The numbers in the tables of a block's outputs from `first` of the part on: those of a step's groups in a word, the words of step s
/// from `numbers[s * stride]` on.
#[inline(always)]
fn number(part: &Part<'_>, first: usize, chunk: usize, numbers: &mut [u64], stride: usize) {
    match part.source {
        Source::Rows { w, row_bytes } => {
            for r in 0..BLOCK {
                // Outputs past the last are computed as the last, and not written.
                let row = (first + r).min(part.count - 1);
                let words = w[row * row_bytes + 64 * chunk..][..64].as_chunks::<8>().0;
                for s in 0..STEPS {
                    let word = u64::from_le_bytes(words[s]);
                    numbers[s * stride + r] = digits([word >> 6, word >> 4, word >> 2, word]);
                }
            }
        }
        Source::Columns { w, column_bytes } => {
            let columns = w.len() / column_bytes;
            let output = part.first + first;
            let (at, shift) = (output / CHUNK * 64, 6 - 2 * (output % CHUNK / 64));
            for s in 0..STEPS {
                let mut groups = [[0u8; 64]; GROUPS];
                for g in 0..GROUPS {
                    let mut lines = [[0u64; 8]; 4];
                    for i in 0..4 {
                        // Past the last column the activations are zero.
                        let column = (CHUNK * chunk + 4 * (GROUPS * s + g) + i).min(columns - 1);
                        let line = w[column * column_bytes + at..][..64].as_chunks::<8>().0;
                        for k in 0..8 {
                            lines[i][k] = u64::from_le_bytes(line[k]) >> shift;
                        }
                    }
                    for k in 0..8 {
                        let word = digits([lines[0][k], lines[1][k], lines[2][k], lines[3][k]]);
                        groups[g][8 * k..][..8].copy_from_slice(&word.to_le_bytes());
                    }
                }
                for o in 0..BLOCK {
                    let mut word = 0;
                    for g in 0..GROUPS {
                        word |= u64::from(groups[g][o]) << (8 * g);
                    }
                    numbers[s * stride + o] = word;
                }
            }
        }
    }
}

/// d0 + 3 d1 + 9 d2 + 27 d3 in each byte, of the lowest two bits of the bytes d.
#[inline(always)]
fn digits(d: [u64; 4]) -> u64 {
    let digit = |i: usize| d[i] & 0x0303_0303_0303_0303;
    let mut number = digit(3);
    for i in [2, 1, 0] {
        number = number + (number << 1) + digit(i);
    }
    number
}

/// The definition of [`Isa::add_looked_up`].
#[inline(always)]
pub(crate) fn add_looked_up(tables: &[[i16; LANES]], numbers: &[u64], sums: &mut [[i16; LANES]]) {
    for (number, sum) in numbers.iter().zip(sums) {
        let mut total = *sum;
        for g in 0..GROUPS {
            let row = tables[SUMS * g + (number >> (8 * g)) as usize % 128];
            for t in 0..LANES {
                total[t] = total[t].wrapping_add(row[t]);
            }
        }
        *sum = total;
    }
}
