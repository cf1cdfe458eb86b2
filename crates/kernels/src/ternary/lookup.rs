//! The product with several tokens where nothing multiplies bytes and adds in 32 bits at once: sums are looked up.
//!
//! Four activations have 81 signed sums `Σ w q`. A table of them for each of sixteen tokens side by side, made with 81 additions, serves
//! every output: four weights cost one addition of sixteen lanes, a lane being a token, and no multiplication. (The idea is the
//! method of four Russians.) The tables of a step, 32 inputs, take 22 KB of a first-level cache
//! and stay there while all outputs pass over them.

use super::panel::{BLOCK, Part, Source};
use super::{Activations, CHUNK, columns::COLUMN_ORDER};
use crate::isa::Isa;
use crate::memory::cast_mut;

/// Tokens from which on looking up beats going row by row with eight at a time: of fewer too many lanes of the last table are idle.
pub(crate) const FEWEST: usize = 49;

/// Tokens side by side.
pub(crate) const LANES: usize = 16;

/// Most tokens of a task: the numbers of the weights in the tables are worked out once for all of them.
pub(crate) const TOKENS: usize = 4 * LANES;

/// Most outputs of a task, for all of which a table is made once.
pub(crate) const OUTPUTS: usize = 24 * BLOCK;

/// Groups of four inputs in a step.
pub(crate) const GROUPS: usize = 8;

/// Steps in a chunk.
const STEPS: usize = CHUNK / (4 * GROUPS);

/// Sums of four inputs with weights of -1, 0, 1.
pub(crate) const SUMS: usize = 81;

/// Rows of the tables of a step: a group's number is read as one below 128.
pub(crate) const ROWS: usize = (SUMS * (GROUPS - 1) + 128).next_multiple_of(2);

/// Of an output, where the rows of a step's groups begin in the tables of each, in bytes.
pub(crate) type Places = [u16; GROUPS];

/// Bytes of a row.
pub(crate) const ROW_BYTES: usize = 2 * LANES;

/// Bytes of scratch of a task.
pub(crate) const SCRATCH: usize =
    ROWS * ROW_BYTES + OUTPUTS * TOKENS * (2 + 4) + STEPS * stride(OUTPUTS) * size_of::<Places>();

/// Places from one step to the next. They are written step by step, and would compete for the same lines of a cache at powers of two.
const fn stride(outputs: usize) -> usize {
    outputs + 64 / size_of::<Places>()
}

/// Multiplies the outputs of `parts`, at most [`OUTPUTS`] when each part is filled up to whole blocks, with the tokens from `t0` on, at
/// most [`TOKENS`], as [`super::panel::matmul`] does. `scratch`: [`SCRATCH`] bytes.
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
    let tiles = (a.scales.len() - t0).min(TOKENS).div_ceil(LANES);
    let outputs = parts.iter().map(|part| part.count.next_multiple_of(BLOCK)).sum::<usize>();
    let stride = stride(outputs);
    let (tables, rest) = scratch.split_at_mut(ROWS * ROW_BYTES);
    let (narrow, rest) = rest.split_at_mut(tiles * outputs * 2 * LANES);
    let (wide, rest) = rest.split_at_mut(tiles * outputs * 4 * LANES);
    let tables = cast_mut::<i16>(tables).as_chunks_mut::<LANES>().0;
    let narrow = cast_mut::<i16>(narrow).as_chunks_mut::<LANES>().0;
    let wide = cast_mut::<i32>(wide).as_chunks_mut::<LANES>().0;
    let places = &mut cast_mut::<u16>(rest).as_chunks_mut::<GROUPS>().0[..STEPS * stride];
    narrow.fill([0; LANES]);
    wide.fill([0; LANES]);
    let rows = matches!(parts[0].source, Source::Rows { .. });
    // Of each token, what the sums in 16 bits may have reached at most.
    let mut reach = [[0; LANES]; TOKENS / LANES];
    for chunk in 0..width / CHUNK {
        let mut base = 0;
        for part in parts {
            for first in (0..part.count).step_by(BLOCK) {
                place(isa, part, first, chunk, &mut places[base..], stride);
                base += BLOCK;
            }
        }
        for tile in 0..tiles {
            let t0 = t0 + tile * LANES;
            let tokens = (a.scales.len() - t0).min(LANES);
            let (narrow, wide) =
                (&mut narrow[tile * outputs..][..outputs], &mut wide[tile * outputs..][..outputs]);
            let reach = &mut reach[tile];
            // Tokens become lanes.
            let mut inputs = [[0; LANES]; CHUNK];
            let mut reaches = [0; LANES];
            for (first, inputs) in inputs.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                let mut block = [[0; LANES]; LANES];
                for t in 0..tokens {
                    let at = (t0 + t) * width + chunk * CHUNK + first * LANES;
                    block[t].copy_from_slice(&a.codes[at..][..LANES]);
                }
                for t in 0..tokens {
                    reaches[t] += block[t].iter().map(|&q| u32::from(q.unsigned_abs())).sum::<u32>();
                }
                isa.transpose(&block, inputs);
            }
            if reaches == [0; LANES] {
                continue;
            }
            const MOST: u32 = i16::MAX as u32;
            if (0..LANES).any(|t| reach[t] + reaches[t] > MOST) {
                widen(narrow, wide);
                *reach = [0; LANES];
            }
            // Only 256 times -128 is too much for a chunk.
            let halves = reaches.iter().any(|&reach| reach > MOST);
            for t in 0..LANES {
                reach[t] += reaches[t];
            }
            for step in 0..STEPS {
                if halves && step == STEPS / 2 {
                    widen(narrow, wide);
                }
                // The inputs of group g are 4 i + g of the step.
                let at =
                    |i: usize| if rows { CHUNK / 4 * i + GROUPS * step } else { GROUPS * (4 * step + i) };
                let quads = [0, 1, 2, 3].map(|i| &inputs[at(i)..][..GROUPS].as_chunks::<GROUPS>().0[0]);
                isa.fill_tables(quads, tables);
                // SAFETY: a number of four digits of two bits is at most 120.
                unsafe { isa.add_looked_up(tables, &places[step * stride..][..outputs], narrow) }
            }
        }
    }
    widen(narrow, wide);
    let mut base = 0;
    for part in parts {
        for first in (0..part.count).step_by(BLOCK) {
            for t in t0..(t0 + TOKENS).min(a.scales.len()) {
                let sums = &wide[(t - t0) / LANES * outputs + base..][..BLOCK];
                let factor = part.weight_scale / a.scales[t];
                let mut y = [0.0; BLOCK];
                for o in 0..BLOCK {
                    let at = if rows { o } else { COLUMN_ORDER[o] as usize };
                    y[o] = sums[at][(t - t0) % LANES] as f32 * factor;
                }
                let count = (part.count - first).min(BLOCK);
                // SAFETY: the caller's contract: these outputs are ours and in bounds.
                unsafe { part.out.write_all(t, part.first + first, &y[..count]) }
            }
            base += BLOCK;
        }
    }
}

/// Adds the sums in 16 bits to those in 32 and clears them.
#[inline(always)]
fn widen(narrow: &mut [[i16; LANES]], wide: &mut [[i32; LANES]]) {
    for (narrow, wide) in narrow.iter_mut().zip(wide) {
        // In copies, which the compiler knows to lie apart.
        let (from, mut to) = (*narrow, *wide);
        for t in 0..LANES {
            to[t] += i32::from(from[t]);
        }
        (*narrow, *wide) = ([0; LANES], to);
    }
}

/// Four times the inputs of all groups, a lane being a token.
pub(crate) type Quads<'a> = [&'a [[i8; LANES]; GROUPS]; 4];

/// The definition of [`Isa::fill_tables`].
#[inline(always)]
pub(crate) fn fill_tables(quads: Quads<'_>, tables: &mut [[i16; LANES]]) {
    for g in 0..GROUPS {
        for (number, row) in tables[SUMS * g..][..SUMS].iter_mut().enumerate() {
            for t in 0..LANES {
                let digit = |i: usize| (number / [1, 3, 9, 27][i] % 3) as i16 - 1;
                row[t] = (0..4).map(|i| digit(i) * i16::from(quads[i][g][t])).sum();
            }
        }
    }
}

/// Works out the places of a block's outputs, from `first` of the part on, those of step s from `places[s * stride]` on.
#[inline(always)]
fn place<I: Isa>(isa: I, part: &Part<'_>, first: usize, chunk: usize, places: &mut [Places], stride: usize) {
    match part.source {
        Source::Rows { w, row_bytes } => {
            for r in 0..BLOCK {
                // Outputs past the last are computed as the last, and not written.
                let row = (first + r).min(part.count - 1);
                let line = &w[row * row_bytes + 64 * chunk..][..64].as_chunks::<64>().0[0];
                isa.prefetch(line.as_ptr().wrapping_add(64));
                let mut number = [0; 64];
                for i in 0..64 {
                    number[i] = digits([line[i] >> 6, line[i] >> 4, line[i] >> 2, line[i]]);
                }
                for s in 0..STEPS {
                    for g in 0..GROUPS {
                        places[s * stride + r][g] = u16::from(number[GROUPS * s + g]) * ROW_BYTES as u16;
                    }
                }
            }
        }
        Source::Columns { w, column_bytes } => {
            let columns = w.len() / column_bytes;
            let output = part.first + first;
            let (at, shift) = (output / CHUNK * 64, 6 - 2 * (output % CHUNK / 64));
            for s in 0..STEPS {
                let mut numbers = [[0; 64]; GROUPS];
                for g in 0..GROUPS {
                    // Past the last column the activations are zero.
                    let column = |i: usize| (CHUNK * chunk + GROUPS * (4 * s + i) + g).min(columns - 1);
                    let line = |i: usize| &w[column(i) * column_bytes + at..][..64].as_chunks::<64>().0[0];
                    let lines = [line(0), line(1), line(2), line(3)];
                    for o in 0..64 {
                        let d = [lines[0][o], lines[1][o], lines[2][o], lines[3][o]];
                        numbers[g][o] = digits([d[0] >> shift, d[1] >> shift, d[2] >> shift, d[3] >> shift]);
                    }
                }
                let places = &mut places[s * stride..][..BLOCK];
                for o in 0..BLOCK {
                    for g in 0..GROUPS {
                        places[o][g] = u16::from(numbers[g][o]) * ROW_BYTES as u16;
                    }
                }
            }
        }
    }
}

/// d0 + 3 d1 + 9 d2 + 27 d3, of the lowest two bits of each d.
#[inline(always)]
fn digits(d: [u8; 4]) -> u8 {
    let mut number = d[3] & 3;
    for i in [2, 1, 0] {
        number = number + number + number + (d[i] & 3);
    }
    number
}

/// The definition of [`Isa::add_looked_up`].
#[inline(always)]
pub(crate) fn add_looked_up(tables: &[[i16; LANES]], places: &[Places], sums: &mut [[i16; LANES]]) {
    for (places, sum) in places.iter().zip(sums) {
        for g in 0..GROUPS {
            let row = tables[SUMS * g + places[g] as usize / ROW_BYTES % 128];
            for t in 0..LANES {
                sum[t] = sum[t].wrapping_add(row[t]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{OutPtr, columns, panel, row_bytes};
    use super::*;
    use crate::isa::scalar::Scalar;
    use crate::memory::Aligned;

    /// What is looked up is what is multiplied, by the definitions of both; of stored bytes that are no weights, nothing goes
    /// out of bounds.
    #[test]
    fn sums_looked_up_equal_products() {
        let byte = |i: usize| (i.wrapping_mul(2_654_435_761) >> 7) as u8;
        // Without the digit 3.
        let weights = |i: usize| byte(i) & !((byte(i) & 0xaa) >> 1);
        for (tokens, inputs, rows) in [(9, 512, 100), (70, 300, 64), (17, 256, 321)] {
            let width = 4 * row_bytes(inputs);
            let mut codes: Vec<i8> = (0..tokens * width).map(|i| byte(i + 7) as i8).collect();
            // Runs of the largest codes, and a step of zeros.
            codes[..width].fill(-128);
            codes.chunks_mut(width).for_each(|codes| codes[64..96].fill(0));
            let sums: Vec<i32> = codes.chunks(width).map(|q| q.iter().map(|&q| i32::from(q)).sum()).collect();
            let a = Activations { codes: &codes, scales: &vec![1.0; tokens], sums: &sums };
            let column_bytes = columns::column_bytes(rows);
            let run = |stored: &dyn Fn(usize) -> u8, by_columns: bool, looked_up: bool| {
                let mut out = vec![f32::NAN; tokens * rows];
                let ptr = OutPtr { ptr: out.as_mut_ptr(), stride: rows };
                let bytes = if by_columns { inputs * column_bytes } else { rows * width / 4 };
                let w: Vec<u8> = (0..bytes).map(stored).collect();
                let part = |first: usize, count: usize| {
                    let source = match by_columns {
                        true => Source::Columns { w: &w, column_bytes },
                        false => Source::Rows {
                            w: &w[first * width / 4..][..count * width / 4],
                            row_bytes: width / 4,
                        },
                    };
                    Part { source, weight_scale: 1.0, first, count, out: ptr }
                };
                let mut scratch = Aligned::<u8>::zeroed(SCRATCH.max(BLOCK * width));
                // SAFETY: the output has room for all tokens and rows.
                unsafe {
                    if looked_up {
                        let parts = [part(0, BLOCK), part(BLOCK, rows - BLOCK)];
                        (0..tokens)
                            .step_by(TOKENS)
                            .for_each(|t0| matmul(Scalar, &parts, a, t0, &mut scratch));
                    } else {
                        for first in (0..rows).step_by(BLOCK) {
                            panel::matmul(Scalar, &part(first, (rows - first).min(BLOCK)), a, &mut scratch);
                        }
                    }
                }
                out
            };
            for by_columns in [false, true] {
                // The second: all weights are -1, so that 256 codes of -128 reach 2^15.
                for stored in [&weights as &dyn Fn(usize) -> u8, &|_| 0] {
                    assert_eq!(run(stored, by_columns, true), run(stored, by_columns, false));
                }
                run(&byte, by_columns, true);
            }
        }
    }
}
