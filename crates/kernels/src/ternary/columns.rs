//! The layout by columns and the product with one token, which reads only the columns whose activation is not zero.
//!
//! A column holds the weights of all outputs for one input, 256 in each 64-byte chunk: output o of a chunk in field
//! o / 64 (the bits that field has in a row) of byte `COLUMN_ORDER[o % 64]`. That order is the one in which interleaving
//! the bytes of four columns within 16-byte lanes leaves the outputs of a register in a line, for registers of 16, 32
//! and 64 bytes alike.

use super::CHUNK;
use crate::isa::Isa;

/// The byte of a chunk that holds output o, for o in 0..64.
pub(crate) const COLUMN_ORDER: [u8; 64] = {
    let mut order = [0; 64];
    let mut o = 0;
    while o < 64 {
        order[o] = (16 * (o / 4 % 4) + 4 * (o / 16) + o % 4) as u8;
        o += 1;
    }
    order
};

/// Columns that are added at a time.
pub(crate) const GROUP: usize = 8;

/// Most inputs of a matrix stored by columns: keeps 85 times a sum of products in 32 bits.
pub const MAX_COLUMNS: usize = 1 << 16;

/// Bytes of a stored column of `rows` weights.
pub const fn column_bytes(rows: usize) -> usize {
    rows.div_ceil(CHUNK) * (CHUNK / 4)
}

/// Adds the first columns of `list` in `w`, each times its code in `q`, to `sums`, one for each stored output; columns without a
/// code are only asked for. The sums of a field are too large by [`Isa::COLUMN_SHIFTS`], or hold those of later fields too, as
/// [`Isa::COLUMN_NESTED`] says: [`finish`] sees to that.
#[inline(always)]
pub(crate) fn add_columns<I: Isa>(
    isa: I,
    w: &[u8],
    column_bytes: usize,
    list: &[u32],
    q: &[i8],
    sums: &mut [i32],
) {
    let column = |c: u32| &w[c as usize * column_bytes..][..column_bytes];
    // The columns of the next groups are anywhere: they are asked for while these are added.
    let ahead_of = (isa.ahead() / (GROUP * column_bytes)).max(1) * GROUP;
    let later = |i: usize| w.as_ptr().wrapping_add(list.get(i).map_or(0, |&c| c as usize * column_bytes));
    for (g, (group, codes)) in list[..q.len()].chunks(GROUP).zip(q.chunks(GROUP)).enumerate() {
        // A short last group is filled up with a column times zero.
        let mut columns = [column(group[0]); GROUP];
        let mut factors = [0; GROUP];
        for i in 0..group.len() {
            columns[i] = column(group[i]);
            factors[i] = codes[i];
        }
        let mut ahead = [[w.as_ptr(); GROUP]; 2];
        for i in 0..GROUP {
            let at = g * GROUP + i;
            (ahead[0][i], ahead[1][i]) = (later(at + GROUP), later(at + ahead_of));
        }
        isa.add_columns(columns, ahead, factors, sums);
    }
}

/// out = (sum / 2^shift - bias) * factor, where each thread's sums are at the front of a piece of `stride` sums.
#[inline(always)]
pub(crate) fn finish<I: Isa>(_: I, sums: &[i32], stride: usize, bias: i32, factor: f32, out: &mut [f32]) {
    for (chunk, out) in out.chunks_mut(CHUNK).enumerate() {
        let mut totals = [[0; 64]; 4];
        for part in sums.chunks(stride) {
            let part = part[CHUNK * chunk..][..CHUNK].as_chunks::<64>().0;
            for f in 0..4 {
                for i in 0..64 {
                    totals[f][i] += part[f][i];
                }
            }
        }
        let mut values = [[0.0; 64]; 4];
        for f in 0..4 {
            let later = if I::COLUMN_NESTED && f < 3 { totals[f + 1] } else { [0; 64] };
            for i in 0..64 {
                let sum = (totals[f][i] - later[i]) >> I::COLUMN_SHIFTS[f];
                values[f][i] = (sum - bias) as f32 * factor;
            }
        }
        out.copy_from_slice(&values.as_flattened()[..out.len()]);
    }
}

/// The definition of [`Isa::add_columns`].
#[inline(always)]
pub(crate) fn add_group(columns: [&[u8]; GROUP], q: [i8; GROUP], sums: &mut [i32]) {
    for (chunk, sums) in sums.as_chunks_mut::<CHUNK>().0.iter_mut().enumerate() {
        for (o, sum) in sums.iter_mut().enumerate() {
            let shift = 6 - 2 * (o / 64);
            for (column, q) in columns.iter().zip(q) {
                let code = column[64 * chunk + COLUMN_ORDER[o % 64] as usize] >> shift & 3;
                *sum += (i32::from(code) * i32::from(q)) << shift;
            }
        }
    }
}

/// Turns chunk c of every row of a matrix, 64 bytes each, into the columns 256 c and following of the layout by columns,
/// as many as `out` has room for. Outputs past the last get weight zero.
///
/// # Panics
/// If the strip is not whole lines or `out` not at most 256 whole columns.
pub fn transpose(strip: &[u8], out: &mut [u8]) {
    const ZERO: u8 = 0x55;
    let rows = strip.as_chunks::<64>().0;
    let column_bytes = column_bytes(rows.len());
    assert!(strip.len().is_multiple_of(64) && out.len().is_multiple_of(column_bytes));
    let columns = out.len() / column_bytes;
    assert!(columns <= CHUNK);
    let mut bytes = [[[ZERO; 64]; 4]; 64];
    for (chunk, rows) in rows.chunks(CHUNK).enumerate() {
        // bytes[b][f]: byte b of rows 64 f to 64 f + 63, in the order of a stored chunk.
        for (r, row) in rows.iter().enumerate() {
            for b in 0..64 {
                bytes[b][r / 64][COLUMN_ORDER[r % 64] as usize] = row[b];
            }
        }
        for r in rows.len()..CHUNK {
            bytes.iter_mut().for_each(|b| b[r / 64][COLUMN_ORDER[r % 64] as usize] = ZERO);
        }
        for c in 0..columns {
            // The 256 columns stand in a row's chunk as their activations do.
            let at = super::position(c);
            let (fields, shift) = (&bytes[at % 64], 6 - 2 * (at / 64));
            let line = &mut out[c * column_bytes + 64 * chunk..][..64];
            for (i, line) in line.iter_mut().enumerate() {
                let code = |f: usize| (fields[f][i] >> shift & 3) << (6 - 2 * f);
                *line = code(0) | code(1) | code(2) | code(3);
            }
        }
    }
}
