//! The ternary encodings that go row by row: TQ1_0 and TQ2_0 of llama.cpp, IQ1_BN and IQ2_BN of ik_llama.cpp, and plain floats.
//!
//! Trits are stored as digits 0, 1, 2 for -1, 0, +1. Two of the types put five digits in a byte: with x the number whose
//! base-3 digits they are, the byte is ceil(256 x / 243), so that multiplying by 3 shifts the next digit, counted from the
//! most significant one, above bit 7. The others have two bits a weight, the first weights lowest (I2_S has them highest).
//!
//! - TQ1_0, 256 weights in 54 bytes. Byte m of the first 32 has the weights m, m + 32, ..., m + 128, byte m of the next
//!   16 the weights 160 + m, 160 + m + 16, ..., byte m of the next 4 the four weights 240 + m, 240 + m + 4, ... (as
//!   the four most significant of five digits); each time the first weight is the most significant digit. Then the f16
//!   scale of the block.
//! - TQ2_0, 256 weights in 66 bytes. In each half of 128 weights and 32 bytes, byte m has the weights m, m + 32, m + 64,
//!   m + 96. Then the f16 scale of the block.
//! - IQ1_BN, 64 weights in 13 bytes behind the f16 scale of the row. Byte m of the first 12 has five of the 16 weights
//!   from 16 (m / 3) on, its first weight the least significant digit; the 16th weights of the four groups are in byte 12.
//! - IQ2_BN, 64 weights in 16 bytes behind the f32 scale of the row. Byte m has the weights m, m + 16, m + 32, m + 48.
//! - F32, F16, BF16: each weight times the scale. Floats are ternary where all but the zeros have one magnitude.
//!
//! A scale of a block or row without a nonzero weight means nothing: other programs write 0 there.

use super::pack::PackError;
use crate::half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};

/// One of the encodings.
#[allow(missing_docs, non_camel_case_types)] // the names are ggml's
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowFormat {
    TQ1_0,
    TQ2_0,
    IQ1_BN,
    IQ2_BN,
    F32,
    F16,
    BF16,
}

/// Powers of three, by which a digit is shifted to the top.
const POWERS: [u8; 5] = [1, 3, 9, 27, 81];

impl RowFormat {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::TQ1_0, Self::TQ2_0, Self::IQ1_BN, Self::IQ2_BN, Self::F32, Self::F16, Self::BF16];

    /// Weights in a block; a row is a multiple of it.
    pub fn block(self) -> usize {
        match self {
            Self::TQ1_0 | Self::TQ2_0 => 256,
            Self::IQ1_BN | Self::IQ2_BN => 64,
            Self::F32 | Self::F16 | Self::BF16 => 1,
        }
    }

    /// Bytes before the blocks of a row, and bytes of a block.
    fn sizes(self) -> (usize, usize) {
        match self {
            Self::TQ1_0 => (0, 54),
            Self::TQ2_0 => (0, 66),
            Self::IQ1_BN => (2, 13),
            Self::IQ2_BN => (4, 16),
            Self::F32 => (0, 4),
            Self::F16 | Self::BF16 => (0, 2),
        }
    }

    /// Bytes of a row of `columns` weights, a multiple of [`block`](Self::block).
    pub fn row_bytes(self, columns: usize) -> usize {
        let (prefix, bytes) = self.sizes();
        prefix + columns / self.block() * bytes
    }

    /// `scale` as this encoding keeps it: rounded to f16 or bf16 in all but IQ2_BN and F32.
    pub fn stored_scale(self, scale: f32) -> f32 {
        match self {
            Self::IQ2_BN | Self::F32 => scale,
            Self::BF16 => bf16_to_f32(f32_to_bf16(scale)),
            _ => f16_to_f32(f32_to_f16(scale)),
        }
    }

    /// Whether the weights are plain floats.
    pub fn is_float(self) -> bool {
        self.block() == 1
    }

    /// Appends a row of trits.
    ///
    /// # Errors
    /// [`PackError::PartialBlock`] and [`PackError::Trit`]; nothing is appended then.
    pub fn pack_row(self, trits: &[i8], scale: f32, out: &mut Vec<u8>) -> Result<(), PackError> {
        if !trits.len().is_multiple_of(self.block()) {
            return Err(PackError::PartialBlock { n: trits.len(), block: self.block() });
        }
        if let Some(index) = trits.iter().position(|t| !(-1..=1).contains(t)) {
            return Err(PackError::Trit { index, found: trits[index] });
        }
        let half = f32_to_f16(scale).to_le_bytes();
        let products = trits.iter().map(|&trit| f32::from(trit) * scale);
        match self {
            Self::IQ1_BN => out.extend(half),
            Self::IQ2_BN => out.extend(scale.to_le_bytes()),
            Self::TQ1_0 | Self::TQ2_0 => {}
            Self::F32 => out.extend(products.flat_map(f32::to_le_bytes)),
            Self::F16 => out.extend(products.flat_map(|x| f32_to_f16(x).to_le_bytes())),
            Self::BF16 => out.extend(products.flat_map(|x| f32_to_bf16(x).to_le_bytes())),
        }
        if self.is_float() {
            return Ok(());
        }
        for block in trits.chunks_exact(self.block()) {
            let digit = |i: usize| (block[i] + 1) as u8;
            match self {
                Self::TQ1_0 => {
                    for (first, bytes, digits) in TQ1_PARTS {
                        let byte = |m| five((0..digits).map(|n| (digit(first + m + bytes * n), 4 - n)));
                        out.extend((0..bytes).map(byte));
                    }
                    out.extend(half);
                }
                Self::TQ2_0 => {
                    for base in [0, 128] {
                        out.extend(
                            (0..32).map(|m| (0..4).fold(0, |b, n| b | digit(base + m + 32 * n) << (2 * n))),
                        );
                    }
                    out.extend(half);
                }
                Self::IQ1_BN => {
                    out.extend((0..12).map(|m| five((0..5).map(|j| (digit(iq1_place(m, j)), j)))));
                    out.push(five((0..4).map(|g| (digit(16 * g + 15), g))));
                }
                Self::IQ2_BN => {
                    out.extend((0..16).map(|m| (0..4).fold(0, |b, n| b | digit(m + 16 * n) << (2 * n))));
                }
                Self::F32 | Self::F16 | Self::BF16 => {}
            }
        }
        Ok(())
    }

    /// Reads a row into `trits` and returns its scale: None where it has no weight but zero.
    ///
    /// # Errors
    /// [`PackError::PartialBlock`], [`PackError::Length`], [`PackError::Code`] for a byte that no trits lead to, and
    /// [`PackError::Scales`] where blocks differ in theirs: the row is not ternary then.
    pub fn unpack_row(self, bytes: &[u8], trits: &mut [i8]) -> Result<Option<f32>, PackError> {
        let (prefix, block_bytes) = self.sizes();
        if !trits.len().is_multiple_of(self.block()) {
            return Err(PackError::PartialBlock { n: trits.len(), block: self.block() });
        }
        if bytes.len() != self.row_bytes(trits.len()) {
            return Err(PackError::Length { expected: self.row_bytes(trits.len()), found: bytes.len() });
        }
        match self {
            Self::F32 => return unpack_floats(bytes, trits, f32::from_le_bytes),
            Self::F16 => return unpack_floats(bytes, trits, |b| f16_to_f32(u16::from_le_bytes(b))),
            Self::BF16 => return unpack_floats(bytes, trits, |b| bf16_to_f32(u16::from_le_bytes(b))),
            _ => {}
        }
        let (head, blocks) = bytes.split_at(prefix);
        let half = |bytes: &[u8]| f16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]]));
        let mut scale: Option<f32> = None;
        let row_scale = match self {
            Self::IQ1_BN => Some(half(head)),
            Self::IQ2_BN => Some(f32::from_le_bytes([head[0], head[1], head[2], head[3]])),
            _ => None,
        };
        for (b, (bytes, block)) in
            blocks.chunks_exact(block_bytes).zip(trits.chunks_exact_mut(self.block())).enumerate()
        {
            let mut good = true;
            // Digit `n` of a byte, the most significant first.
            let mut five = |byte: u8, n: usize| {
                good &= FIVE_DIGITS[byte as usize];
                ((u16::from(byte.wrapping_mul(POWERS[n])) * 3) >> 8) as i8 - 1
            };
            match self {
                Self::TQ1_0 => {
                    let mut at = 0;
                    for (first, bytes_here, digits) in TQ1_PARTS {
                        for m in 0..bytes_here {
                            for n in 0..digits {
                                block[first + m + bytes_here * n] = five(bytes[at + m], n);
                            }
                        }
                        at += bytes_here;
                    }
                }
                Self::IQ1_BN => {
                    for m in 0..12 {
                        for j in 0..5 {
                            block[iq1_place(m, j)] = five(bytes[m], 4 - j);
                        }
                    }
                    for g in 0..4 {
                        block[16 * g + 15] = five(bytes[12], 4 - g);
                    }
                }
                Self::TQ2_0 | Self::IQ2_BN => {
                    let width = if self == Self::TQ2_0 { 32 } else { 16 };
                    for (part, bytes) in block.chunks_mut(4 * width).zip(bytes.chunks_exact(width)) {
                        for (i, trit) in part.iter_mut().enumerate() {
                            *trit = (bytes[i % width] >> (2 * (i / width)) & 3) as i8 - 1;
                        }
                    }
                }
                Self::F32 | Self::F16 | Self::BF16 => {}
            }
            if !good || block.contains(&2) {
                let index = b * self.block() + block.iter().position(|&t| t == 2).unwrap_or(0);
                return Err(PackError::Code { index });
            }
            if block.iter().any(|&trit| trit != 0) {
                let found = row_scale.unwrap_or_else(|| half(&bytes[block_bytes - 2..]));
                match scale {
                    Some(scale) if scale.to_bits() != found.to_bits() => {
                        return Err(PackError::Scales { first: scale, second: found });
                    }
                    _ => scale = Some(found),
                }
            }
        }
        Ok(scale)
    }
}

/// Signs and the one magnitude of a row of floats.
fn unpack_floats<const N: usize>(
    bytes: &[u8],
    trits: &mut [i8],
    decode: impl Fn([u8; N]) -> f32,
) -> Result<Option<f32>, PackError> {
    let mut scale = None;
    for (bytes, trit) in bytes.as_chunks().0.iter().zip(trits) {
        let value = decode(*bytes);
        *trit = i8::from(value > 0.0) - i8::from(value < 0.0);
        if value != 0.0 {
            let (first, second) = (*scale.get_or_insert(value.abs()), value.abs());
            if first.to_bits() != second.to_bits() {
                return Err(PackError::Scales { first, second });
            }
        }
    }
    Ok(scale)
}

/// First weight, bytes and digits a byte of the three parts of a TQ1_0 block.
const TQ1_PARTS: [(usize, usize, usize); 3] = [(0, 32, 5), (160, 16, 5), (240, 4, 4)];

/// The weight that is digit `j` of byte `m` of an IQ1_BN block.
fn iq1_place(m: usize, j: usize) -> usize {
    16 * (m / 3) + 5 * (m % 3) + j
}

/// The byte of up to five digits with their powers of three.
fn five(digits: impl Iterator<Item = (u8, usize)>) -> u8 {
    let x: u16 = digits.map(|(digit, power)| u16::from(digit) * u16::from(POWERS[power])).sum();
    (x * 256).div_ceil(243) as u8
}

/// Whether a byte is one that five digits make: 243 of 256 are.
const FIVE_DIGITS: [bool; 256] = {
    let mut made = [false; 256];
    let mut x = 0;
    while x < 243 {
        made[(x as usize * 256).div_ceil(243)] = true;
        x += 1;
    }
    made
};

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One +1 in a block of zeros shows where each weight lies.
    #[test]
    fn the_layouts_are_those_of_the_formats() {
        let place = |format: RowFormat, i: usize| {
            let (mut zero, mut one) = (Vec::new(), Vec::new());
            let mut trits = vec![0; format.block()];
            format.pack_row(&trits, 1.0, &mut zero).unwrap();
            trits[i] = 1;
            format.pack_row(&trits, 1.0, &mut one).unwrap();
            let differ: Vec<_> = (0..zero.len()).filter(|&b| zero[b] != one[b]).collect();
            assert_eq!(differ.len(), 1);
            (differ[0], one[differ[0]])
        };
        let five = |power: u16| ((121 + power) * 256).div_ceil(243) as u8;
        assert_eq!(place(RowFormat::TQ1_0, 0), (0, five(81)));
        assert_eq!(place(RowFormat::TQ1_0, 33), (1, five(27)));
        assert_eq!(place(RowFormat::TQ1_0, 159), (31, five(1)));
        assert_eq!(place(RowFormat::TQ1_0, 160 + 17), (33, five(27)));
        assert_eq!(place(RowFormat::TQ1_0, 255).0, 51);
        assert_eq!(place(RowFormat::TQ2_0, 0), (0, 0b01_01_01_10));
        assert_eq!(place(RowFormat::TQ2_0, 128 + 97), (33, 0b10_01_01_01));
        assert_eq!(place(RowFormat::IQ1_BN, 0), (2, five(1)));
        assert_eq!(place(RowFormat::IQ1_BN, 16 + 5 + 4), (2 + 4, five(81)));
        assert_eq!(place(RowFormat::IQ1_BN, 63).0, 2 + 12);
        assert_eq!(place(RowFormat::IQ2_BN, 1), (4 + 1, 0b01_01_01_10));
        assert_eq!(place(RowFormat::IQ2_BN, 63), (4 + 15, 0b10_01_01_01));
    }

    #[test]
    fn what_is_not_ternary_is_refused() {
        let mut trits = vec![1i8; 512];
        for format in RowFormat::ALL {
            if format.is_float() {
                let mut bytes = Vec::new();
                format.pack_row(&trits, 1.5, &mut bytes).unwrap();
                let last = bytes.len() - 1;
                bytes[last] ^= 1;
                assert!(matches!(
                    format.unpack_row(&bytes, &mut trits.clone()),
                    Err(PackError::Scales { .. })
                ));
                continue;
            }
            assert!(matches!(
                format.pack_row(&[0; 100], 1.0, &mut Vec::new()),
                Err(PackError::PartialBlock { .. })
            ));
            assert!(matches!(format.pack_row(&[2; 256], 1.0, &mut Vec::new()), Err(PackError::Trit { .. })));
            let mut bytes = Vec::new();
            format.pack_row(&trits, 1.5, &mut bytes).unwrap();
            assert!(matches!(format.unpack_row(&bytes[1..], &mut trits), Err(PackError::Length { .. })));
            let at = format.sizes().0 + 3;
            bytes[at] = match format {
                RowFormat::TQ1_0 | RowFormat::IQ1_BN => {
                    (0..=255).find(|&b| !FIVE_DIGITS[usize::from(b)]).unwrap()
                }
                _ => 3,
            };
            assert!(matches!(format.unpack_row(&bytes, &mut trits.clone()), Err(PackError::Code { .. })));
        }
        assert_eq!(FIVE_DIGITS.iter().filter(|&&made| made).count(), 243);
        // Two blocks of different scale; a block of zeros has none.
        let mut bytes = Vec::new();
        RowFormat::TQ2_0.pack_row(&[1; 256], 1.0, &mut bytes).unwrap();
        RowFormat::TQ2_0.pack_row(&[0; 256], 2.0, &mut bytes).unwrap();
        assert_eq!(RowFormat::TQ2_0.unpack_row(&bytes, &mut trits), Ok(Some(1.0)));
        bytes.truncate(66);
        RowFormat::TQ2_0.pack_row(&[-1; 256], 2.0, &mut bytes).unwrap();
        assert_eq!(
            RowFormat::TQ2_0.unpack_row(&bytes, &mut trits),
            Err(PackError::Scales { first: 1.0, second: 2.0 })
        );
    }

    proptest! {
        #[test]
        fn unpacking_inverts_packing(
            blocks in 1usize..4,
            trits in proptest::collection::vec(-1i8..=1, 3 * 256),
            scale in 1e-4f32..100.0,
        ) {
            for format in RowFormat::ALL {
                let trits = &trits[..blocks * format.block()];
                let mut bytes = Vec::new();
                format.pack_row(trits, scale, &mut bytes).unwrap();
                prop_assert_eq!(bytes.len(), format.row_bytes(trits.len()));
                let mut found = vec![7; trits.len()];
                let stored = format.unpack_row(&bytes, &mut found).unwrap();
                prop_assert_eq!(&found, trits);
                if trits.iter().any(|&t| t != 0) {
                    prop_assert_eq!(stored, Some(format.stored_scale(scale)));
                    prop_assert!((format.stored_scale(scale) / scale - 1.0).abs() < 4e-3);
                }
            }
        }

        /// Any bytes are read or refused.
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), columns in 0usize..600) {
            for format in RowFormat::ALL {
                let _ = format.unpack_row(&bytes, &mut vec![0; columns]);
            }
        }
    }
}
