//! Q8_0 and Q6_K, the encodings with which llama.cpp makes embeddings and heads smaller.
//!
//! - Q8_0, 32 values in 34 bytes: an f16 scale d, then signed bytes q; a value is d q.
//! - Q6_K, 256 values in 210 bytes: 128 bytes with the low four bits, 64 with the high two, 16 signed scales s of 16 values
//!   each, an f16 scale d; a value is (d s) q with q from -32 to 31. In each half of 128 values (64, 32 bytes), value 32 n + l
//!   has its low bits in byte 32 (n mod 2) + l, at bit 4 (n / 2), and its high bits in byte l at bit 2 n.

use crate::half::{f16_to_f32, f32_to_f16};

/// One of the encodings.
#[allow(missing_docs, non_camel_case_types)] // the names are ggml's
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockFormat {
    Q8_0,
    Q6_K,
}

impl BlockFormat {
    /// Values in a block, and its bytes.
    pub const fn sizes(self) -> (usize, usize) {
        match self {
            Self::Q8_0 => (32, 34),
            Self::Q6_K => (256, 210),
        }
    }

    /// The values of whole blocks.
    ///
    /// # Panics
    /// If the lengths are not those of the same number of whole blocks.
    pub fn decode(self, bytes: &[u8], values: &mut [f32]) {
        let (block, block_bytes) = self.sizes();
        assert!(values.len().is_multiple_of(block) && bytes.len() == values.len() / block * block_bytes);
        for (values, bytes) in values.chunks_exact_mut(block).zip(bytes.chunks_exact(block_bytes)) {
            match self {
                Self::Q8_0 => {
                    let d = half(&bytes[..2]);
                    for (value, &q) in values.iter_mut().zip(&bytes[2..]) {
                        *value = d * f32::from(q as i8);
                    }
                }
                Self::Q6_K => {
                    let d = half(&bytes[208..]);
                    for (i, value) in values.iter_mut().enumerate() {
                        let (low, shift, high) = q6_place(i);
                        let q = bytes[low] >> shift & 15 | (bytes[high] >> (2 * (i % 128 / 32)) & 3) << 4;
                        *value = d * f32::from(bytes[192 + i / 16] as i8) * f32::from(q as i8 - 32);
                    }
                }
            }
        }
    }

    /// Appends the blocks of finite `values`, whole blocks of them. Q8_0 comes out as from llama.cpp.
    ///
    /// # Panics
    /// If the values do not fill their blocks.
    pub fn encode(self, values: &[f32], out: &mut Vec<u8>) {
        let (block, _) = self.sizes();
        assert!(values.len().is_multiple_of(block));
        for values in values.chunks_exact(block) {
            match self {
                Self::Q8_0 => {
                    let d = values.iter().fold(0f32, |max, x| max.max(x.abs())) / 127.0;
                    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
                    out.extend(f32_to_f16(d).to_le_bytes());
                    out.extend(values.iter().map(|x| (x * inverse).round() as i8 as u8));
                }
                Self::Q6_K => encode_q6(values, out),
            }
        }
    }
}

fn half(bytes: &[u8]) -> f32 {
    f16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]]))
}

/// The byte and the bit of the low part of value `i` of a Q6_K block, and the byte of its high part.
fn q6_place(i: usize) -> (usize, usize, usize) {
    let (half, n, l) = (i / 128, i % 128 / 32, i % 32);
    (64 * half + 32 * (n % 2) + l, 4 * (n / 2), 128 + 32 * half + l)
}

fn encode_q6(values: &[f32], out: &mut Vec<u8>) {
    let mut best = [0f32; 16];
    for (scale, values) in best.iter_mut().zip(values.chunks_exact(16)) {
        *scale = q6_scale(values);
    }
    // The largest of the 16 scales becomes -128, which has one step more than 127.
    let largest = best.iter().copied().fold(0f32, |a, b| if b.abs() > a.abs() { b } else { a });
    let d = f16_to_f32(f32_to_f16(largest / -128.0));
    let start = out.len();
    out.resize(start + 210, 0);
    let block = &mut out[start..];
    if d == 0.0 || !d.is_finite() {
        return; // scales of 0: all values are 0
    }
    block[208..].copy_from_slice(&f32_to_f16(d).to_le_bytes());
    for (s, values) in values.chunks_exact(16).enumerate() {
        let scale = (best[s] / d).round_ties_even().clamp(-128.0, 127.0);
        block[192 + s] = scale as i8 as u8;
        let step = d * scale;
        for (k, &x) in values.iter().enumerate() {
            let q = if step == 0.0 { 0.0 } else { (x / step).round_ties_even().clamp(-32.0, 31.0) };
            let (low, shift, high) = q6_place(16 * s + k);
            let q = (q as i8 + 32) as u8;
            block[low] |= (q & 15) << shift;
            block[high] |= (q >> 4) << (2 * ((16 * s + k) % 128 / 32));
        }
    }
}

/// The step with which codes from -32 to 31 come closest to 16 values, large ones weighing more (as their squares). The
/// best of a few codes for the largest value, each improved by least squares.
fn q6_scale(values: &[f32]) -> f32 {
    let largest = values.iter().copied().fold(0f32, |a, b| if b.abs() > a.abs() { b } else { a });
    if largest.abs() < 1e-30 {
        return 0.0;
    }
    let (mut best, mut most) = (largest / -32.0, f32::MIN);
    for tenth in -9..=9 {
        let inverse = -(32.0 + 0.1 * tenth as f32) / largest;
        let (mut xq, mut qq) = (0.0, 0.0);
        for &x in values {
            let q = (x * inverse).round_ties_even().clamp(-32.0, 31.0);
            let weight = (x / largest) * (x / largest);
            xq += weight * x * q;
            qq += weight * q * q;
        }
        // The part of the values' square that the codes explain.
        if qq > 0.0 && xq * xq / qq > most {
            (best, most) = (xq / qq, xq * xq / qq);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_layouts_are_those_of_the_formats() {
        let mut block = vec![0; 34];
        block[..2].copy_from_slice(&f32_to_f16(0.5).to_le_bytes());
        (block[2], block[33]) = (3, 0x80);
        let mut values = [0.0; 32];
        BlockFormat::Q8_0.decode(&block, &mut values);
        assert_eq!((values[0], values[31]), (1.5, -64.0));

        let mut block = vec![0; 210];
        block[208..].copy_from_slice(&f32_to_f16(0.5).to_le_bytes());
        block[192..208].fill(2);
        // Value 128 + 70: the second half, n = 2, l = 6.
        (block[64 + 6], block[128 + 32 + 6]) = (0xa0, 0b11 << 4);
        let mut values = [0.0; 256];
        BlockFormat::Q6_K.decode(&block, &mut values);
        assert_eq!((values[198], values[0]), (f32::from(0xa_i8 + 48 - 32), -32.0));
    }

    proptest! {
        #[test]
        fn what_is_read_is_near_what_was_written(
            values in proptest::collection::vec(-1f32..1.0, 512),
            // Below, the f16 scale of Q6_K loses digits.
            magnitude in -3i32..8,
        ) {
            let values: Vec<f32> = values.iter().map(|x| x * 2f32.powi(magnitude)).collect();
            for (format, bound) in [(BlockFormat::Q8_0, 1.0 / 220.0), (BlockFormat::Q6_K, 1.0 / 18.0)] {
                let mut bytes = Vec::new();
                format.encode(&values, &mut bytes);
                let (block, block_bytes) = format.sizes();
                prop_assert_eq!(bytes.len(), 512 / block * block_bytes);
                let mut found = vec![0.0; 512];
                format.decode(&bytes, &mut found);
                let part = if format == BlockFormat::Q8_0 { 32 } else { 16 };
                for (found, values) in found.chunks_exact(part).zip(values.chunks_exact(part)) {
                    let max = values.iter().fold(2f32.powi(magnitude) * 0.3, |m: f32, x| m.max(x.abs()));
                    for (a, b) in found.iter().zip(values) {
                        prop_assert!((a - b).abs() <= bound * max, "{} {} {:?}", a, b, format);
                    }
                }
                // What has been through it once goes through it unchanged, or nearly so.
                if format == BlockFormat::Q8_0 {
                    let mut again = Vec::new();
                    format.encode(&found, &mut again);
                    let mut second = vec![0.0; 512];
                    format.decode(&again, &mut second);
                    for (a, b) in found.iter().zip(&second) {
                        prop_assert!((a - b).abs() <= a.abs() * 2e-3 + 1e-12);
                    }
                }
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        for format in [BlockFormat::Q8_0, BlockFormat::Q6_K] {
            let mut bytes = Vec::new();
            format.encode(&[0.0; 256], &mut bytes);
            let mut values = [1.0; 256];
            format.decode(&bytes, &mut values);
            assert!(values.iter().all(|&x| x == 0.0));
        }
    }
}
