//! Rows with five weights in a byte, 1.6 bits each (3^5 = 243): five chunks of 256 weights take four times 64 bytes.
//!
//! Byte b of line v of a block, v in 0..4, holds the four weights of byte b of chunk v and, fifth, the weight in field v of byte b
//! of chunk 4. So activations keep the order of [`super::position`]. Chunks after the last whole block stay in two bits.
//!
//! Four codes are a number n < 81. With the fifth code f a byte is `64 f + n` where n < 64, else `192 + 17 f + (n - 64)`: the low six
//! bits find everything in tables of 64 entries, which is what one byte permutation of AVX-512 VBMI looks up.

use super::CHUNK;
use crate::isa::Isa;

/// Bytes of a chunk in two bits, and of a line.
const LINE: usize = CHUNK / 4;
/// Bytes of a block in two bits, and stored.
pub(crate) const PLAIN: usize = 5 * LINE;
pub(crate) const STORED: usize = 4 * LINE;

/// Numbers from here on are those of four codes with n >= 64.
pub(crate) const HIGH: u8 = 192;

/// Four codes as a byte in two bits has them, by the low six bits of a number below [`HIGH`] and from it on.
pub(crate) static FOUR: [[u8; 64]; 2] = {
    let mut four = [[0; 64]; 2];
    let mut i = 0;
    while i < 64 {
        four[0][i] = two_bits(i as u8);
        four[1][i] = two_bits(64 + (i % 17) as u8);
        i += 1;
    }
    four
};

/// The fifth code in the uppermost bits, by the low six bits of a number from [`HIGH`] on.
pub(crate) static FIFTH: [u8; 64] = {
    let mut fifth = [0; 64];
    let mut i = 0;
    while i < 51 {
        fifth[i] = ((i / 17) as u8) << 6;
        i += 1;
    }
    fifth
};

const fn two_bits(n: u8) -> u8 {
    (n / 27) << 6 | (n / 9 % 3) << 4 | (n / 3 % 3) << 2 | (n % 3)
}

/// Bytes of a stored row of `columns` weights.
pub const fn row_bytes(columns: usize) -> usize {
    let chunks = columns.div_ceil(CHUNK);
    chunks / 5 * STORED + chunks % 5 * LINE
}

/// Stores a row in two bits, none of whose codes is 3, in this layout.
#[inline(always)]
pub(crate) fn pack_row<I: Isa>(_: I, row: &[u8], out: &mut [u8]) {
    let (blocks, tail) = row.as_chunks::<PLAIN>();
    let (stored, rest) = out.split_at_mut(blocks.len() * STORED);
    for (block, stored) in blocks.iter().zip(stored.as_chunks_mut::<STORED>().0) {
        let lines = block.as_chunks::<LINE>().0;
        for (v, stored) in stored.as_chunks_mut::<LINE>().0.iter_mut().enumerate() {
            // Copies of known length: the loop then takes whole registers.
            let (fours, fifths, mut line) = (lines[v], lines[4], [0; LINE]);
            for b in 0..LINE {
                let (four, fifth) = (fours[b], fifths[b] >> (6 - 2 * v) & 3);
                // Three times by additions, which vectors of bytes have.
                let three = |x: u8| x.wrapping_add(x).wrapping_add(x);
                let n = three(four >> 6).wrapping_add(four >> 4 & 3);
                let n = three(three(n).wrapping_add(four >> 2 & 3)).wrapping_add(four & 3);
                let high = (fifth << 4).wrapping_add(fifth).wrapping_add(n).wrapping_add(HIGH - 64);
                line[b] = if n < 64 { n | fifth << 6 } else { high };
            }
            *stored = line;
        }
    }
    rest.copy_from_slice(tail);
}

/// The definition of [`Isa::base3_unpack`].
#[inline(never)]
pub(crate) fn unpack(row: &[u8], out: &mut [u8]) {
    let (blocks, rest) = out.as_chunks_mut::<PLAIN>();
    let (stored, tail) = row.split_at(blocks.len() * STORED);
    for (stored, block) in stored.as_chunks::<STORED>().0.iter().zip(blocks) {
        let (chunks, last) = block.split_at_mut(STORED);
        last.fill(0);
        for (i, (&x, four)) in stored.iter().zip(chunks).enumerate() {
            let (at, high) = (usize::from(x % 64), x >= HIGH);
            *four = FOUR[usize::from(high)][at];
            last[i % LINE] |= (if high { FIFTH[at] } else { x & 0xc0 }) >> (2 * (i / LINE));
        }
    }
    rest.copy_from_slice(tail);
}

/// Unpacks rows of `row_bytes` to rows of `out`, as many as `w` has.
#[inline(always)]
pub(crate) fn unpack_rows<I: Isa>(isa: I, w: &[u8], row_bytes: usize, columns: usize, out: &mut [u8]) {
    for (row, out) in w.chunks_exact(row_bytes).zip(out.chunks_exact_mut(super::row_bytes(columns))) {
        isa.base3_unpack(row, out);
    }
}
