//! I2_S, the ternary encoding of bitnet.cpp: packing, unpacking, and telling its two layouts apart.
//!
//! A tensor of n weights takes n / 4 + 32 bytes: first the codes, then its scale as a little-endian f32 and 28 unused
//! bytes. The codes are flat over the tensor, without regard to its rows, in blocks of 128 weights and 32 bytes:
//! weight j of a block is in byte j mod 32 at bit 6 - 2 (j / 32), as -1, 0, +1 -> 0, 1, 2; code 3 is never written.
//! bitnet.cpp's quantizer writes whole blocks only, and its reader runs into the scale behind a partial one, so a
//! tensor that does not fill its blocks has no meaning and is refused here.
//!
//! The same program built for ARM writes blocks of 64 weights and 16 bytes (byte j mod 16, bit 6 - 2 (j / 16)) under
//! the same type number. Only the order of the weights in each 128 differs, so every byte is valid in both layouts;
//! see [`layout_z`] for how they can be told apart.

/// Weights in a block.
pub const BLOCK: usize = 128;
/// Bytes in a block.
pub const BLOCK_BYTES: usize = 32;
/// Bytes after the codes.
pub const TAIL_BYTES: usize = 32;

/// Why codes cannot be packed or unpacked.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PackError {
    /// Weights that do not fill the last block.
    #[error("{n} weights do not fill blocks of {block}")]
    PartialBlock {
        /// Number of weights.
        n: usize,
        /// Weights in a block.
        block: usize,
    },
    /// A wrong number of bytes for the weights.
    #[error("expected {expected} bytes, found {found}")]
    Length {
        /// What the weights take.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// A weight to be packed that is not ternary.
    #[error("weight {index} is {found}; expected -1, 0 or 1")]
    Trit {
        /// The weight's place in the tensor.
        index: usize,
        /// Its value.
        found: i8,
    },
    /// A code that stands for no weight.
    #[error("weight {index} has code 3, or is in a byte that no weights lead to")]
    Code {
        /// The weight's place in what was to be unpacked.
        index: usize,
    },
    /// Weights that are ternary only part by part.
    #[error("one part has the scale {first}, another {second}: this is no ternary matrix")]
    Scales {
        /// The scale of a part.
        first: f32,
        /// That of a later one.
        second: f32,
    },
}

/// The codes of `trits`, a quarter as many bytes. As blocks are independent, a tensor may be packed in parts that
/// are multiples of [`BLOCK`]; [`tail`] follows the last.
pub fn pack_i2s(trits: &[i8]) -> Result<Vec<u8>, PackError> {
    if !trits.len().is_multiple_of(BLOCK) {
        return Err(PackError::PartialBlock { n: trits.len(), block: BLOCK });
    }
    if let Some(index) = trits.iter().position(|t| !(-1..=1).contains(t)) {
        return Err(PackError::Trit { index, found: trits[index] });
    }
    let mut bytes = vec![0; trits.len() / 4];
    for (block, out) in trits.chunks_exact(BLOCK).zip(bytes.chunks_exact_mut(BLOCK_BYTES)) {
        for (j, &trit) in block.iter().enumerate() {
            out[j % 32] |= ((trit + 1) as u8) << (6 - 2 * (j / 32));
        }
    }
    Ok(bytes)
}

/// What follows the codes of a tensor.
pub fn tail(scale: f32) -> [u8; TAIL_BYTES] {
    let mut tail = [0; TAIL_BYTES];
    tail[..4].copy_from_slice(&scale.to_le_bytes());
    tail
}

/// The `n` weights of `codes` (without the tail).
pub fn unpack_i2s(codes: &[u8], n: usize) -> Result<Vec<i8>, PackError> {
    if !n.is_multiple_of(BLOCK) {
        return Err(PackError::PartialBlock { n, block: BLOCK });
    }
    if codes.len() != n / 4 {
        return Err(PackError::Length { expected: n / 4, found: codes.len() });
    }
    let mut trits = Vec::with_capacity(n);
    for block in codes.chunks_exact(BLOCK_BYTES) {
        for shift in [6, 4, 2, 0] {
            trits.extend(block.iter().map(|byte| (byte >> shift & 3) as i8 - 1));
        }
    }
    match trits.iter().position(|&trit| trit == 2) {
        Some(index) => Err(PackError::Code { index }),
        None => Ok(trits),
    }
}

/// The share of zeros in each row of `codes`, rows of `columns` weights, a multiple of [`BLOCK`]. The same in both
/// layouts.
pub fn zero_rows(codes: &[u8], columns: usize) -> Result<Vec<f32>, PackError> {
    let zeros = |bytes: &[u8; 8]| {
        let codes = u64::from_le_bytes(*bytes);
        (codes & !(codes >> 1) & 0x5555_5555_5555_5555).count_ones()
    };
    let rows = rows(codes, columns)?;
    Ok(rows.map(|row| row.as_chunks().0.iter().map(zeros).sum::<u32>() as f32 / columns as f32).collect())
}

/// The share of zeros in each column of `codes`, read in blocks of 128: any whole rows of `columns` weights, a
/// multiple of [`BLOCK`]; a few hundred rows suffice for [`layout_z`].
pub fn zero_columns(codes: &[u8], columns: usize) -> Result<Vec<f32>, PackError> {
    let mut counts = vec![0u32; columns];
    let rows = rows(codes, columns)?;
    let n = rows.len();
    for row in rows {
        for (counts, bytes) in
            counts.as_chunks_mut::<BLOCK>().0.iter_mut().zip(row.as_chunks::<BLOCK_BYTES>().0)
        {
            for (counts, shift) in counts.as_chunks_mut::<32>().0.iter_mut().zip([6, 4, 2, 0]) {
                for (count, byte) in counts.iter_mut().zip(bytes) {
                    *count += u32::from(byte >> shift & 3 == 1);
                }
            }
        }
    }
    Ok(counts.into_iter().map(|count| count as f32 / n as f32).collect())
}

fn rows(codes: &[u8], columns: usize) -> Result<std::slice::ChunksExact<'_, u8>, PackError> {
    if columns == 0 || !columns.is_multiple_of(BLOCK) {
        return Err(PackError::PartialBlock { n: columns, block: BLOCK });
    }
    let rows = codes.chunks_exact(columns / 4);
    match rows.remainder().len() {
        0 => Ok(rows),
        left => Err(PackError::Length { expected: codes.len() - left, found: codes.len() }),
    }
}

/// Below this value of [`layout_z`] a file is not in the layout of 128.
pub const ARM_LAYOUT_Z: f64 = -8.0;

/// How much better the columns of a model's tensors fit what else is known of the same channels in blocks of 128 than
/// in ARM's blocks of 64. Positive values speak for 128; without evidence it scatters around 0 with deviation 1.
///
/// Each pair is one channel axis of width n, a multiple of [`BLOCK`], seen from two sides:
/// - a reference `[n]` whose order does not depend on the layout: the magnitudes of the norm weights before a
///   projection, or [`zero_rows`] of the tensor that produces the channels;
/// - [`zero_columns`] `[n]` of the tensor that consumes them.
///
/// Training couples the two (a channel scaled up or dead is one on either side), with a sign that differs from pair to
/// pair. So the statistic sums the differences of the squared rank correlations under the two layouts,
/// `Σ n (r128² - r64²)`, over its deviation for independent columns: the layouts share a quarter of the places,
/// so that a pair has variance 4 (1 - 1/16). Pairs without variation, or of other widths, say nothing and are left out.
///
/// For each of a few layers use (attn_norm, attn_q), (attn_sub_norm, attn_output), (ffn_norm, ffn_gate),
/// (ffn_sub_norm, ffn_down) and (rows of ffn_gate, ffn_down): the last are dead neurons, the strongest evidence.
pub fn layout_z(pairs: &[(&[f32], &[f32])]) -> f64 {
    let (mut sum, mut count) = (0.0, 0.0);
    for &(reference, columns) in pairs {
        let n = columns.len();
        if n == 0 || reference.len() != n || !n.is_multiple_of(BLOCK) {
            continue;
        }
        let (Some(a), Some(b)) = (standard_ranks(reference), standard_ranks(columns)) else { continue };
        let (mut r128, mut r64) = (0.0, 0.0);
        for i in 0..n {
            r128 += a[i] * b[i];
            r64 += a[arm_place(i)] * b[i];
        }
        sum += n as f64 * (r128 * r128 - r64 * r64);
        count += 1.0;
    }
    if count == 0.0 { 0.0 } else { sum / (count * 4.0 * (1.0 - 1.0 / 16.0f64)).sqrt() }
}

/// Which weight ARM's layout has where the layout of 128 has weight `i`.
fn arm_place(i: usize) -> usize {
    let (block, field, byte) = (i / BLOCK, i % BLOCK / 32, i % 32);
    BLOCK * block + 64 * (byte / 16) + 16 * field + byte % 16
}

/// Ranks, the mean rank for equal values, shifted and scaled to sum 0 and sum of squares 1. None if all are equal.
fn standard_ranks(values: &[f32]) -> Option<Vec<f64>> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_unstable_by(|&a, &b| values[a].total_cmp(&values[b]));
    let middle = (values.len() as f64 - 1.0) / 2.0;
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    for ties in order.chunk_by(|&a, &b| values[a] == values[b]) {
        let rank = start as f64 + (ties.len() as f64 - 1.0) / 2.0 - middle;
        for &i in ties {
            ranks[i] = rank;
        }
        start += ties.len();
    }
    let norm = ranks.iter().map(|r| r * r).sum::<f64>().sqrt();
    if norm == 0.0 {
        return None;
    }
    for rank in &mut ranks {
        *rank /= norm;
    }
    Some(ranks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_layout_is_that_of_the_format() {
        let mut trits = vec![0i8; 256];
        for (j, trit) in [(0, 1), (31, -1), (32, 1), (127, -1), (128 + 64, -1), (128 + 37, 1)] {
            trits[j] = trit;
        }
        let codes = pack_i2s(&trits).unwrap();
        let zeros = 0b01_01_01_01;
        let mut want = [zeros; 64];
        want[0] = 0b10_10_01_01;
        want[31] = 0b00_01_01_00;
        want[32] = 0b01_01_00_01;
        want[32 + 5] = 0b01_10_01_01;
        assert_eq!(codes, want);
        assert_eq!(tail(1.5)[..5], [0, 0, 0xc0, 0x3f, 0]);
    }

    #[test]
    fn wrong_weights_codes_and_lengths_are_named() {
        assert_eq!(pack_i2s(&[0; 130]), Err(PackError::PartialBlock { n: 130, block: 128 }));
        let mut trits = [0; 256];
        trits[200] = -2;
        assert_eq!(pack_i2s(&trits), Err(PackError::Trit { index: 200, found: -2 }));
        assert_eq!(unpack_i2s(&[0; 25], 100), Err(PackError::PartialBlock { n: 100, block: 128 }));
        assert_eq!(unpack_i2s(&[0; 64], 128), Err(PackError::Length { expected: 32, found: 64 }));
        let mut codes = [0; 64];
        codes[32 + 3] = 0b00_00_11_00;
        assert_eq!(unpack_i2s(&codes, 256), Err(PackError::Code { index: 128 + 64 + 3 }));
        assert_eq!(zero_rows(&codes, 100), Err(PackError::PartialBlock { n: 100, block: 128 }));
        assert_eq!(zero_columns(&codes[..50], 128), Err(PackError::Length { expected: 32, found: 50 }));
    }

    proptest! {
        #[test]
        fn unpacking_inverts_packing(
            blocks in 0usize..5,
            trits in proptest::collection::vec(-1i8..=1, 5 * BLOCK),
        ) {
            let trits = &trits[..blocks * BLOCK];
            let codes = pack_i2s(trits).unwrap();
            prop_assert_eq!(unpack_i2s(&codes, trits.len()).unwrap(), trits);
        }

        #[test]
        fn densities_count_zeros(rows in 1usize..9, trits in proptest::collection::vec(-1i8..=1, 9 * 256)) {
            let trits = &trits[..rows * 256];
            let codes = pack_i2s(trits).unwrap();
            let zeros = |n: usize, of: &dyn Fn(usize) -> usize, len: usize| {
                (0..len).filter(|&k| trits[n + of(k)] == 0).count() as f32 / len as f32
            };
            let by_row: Vec<f32> = (0..rows).map(|r| zeros(r * 256, &|k| k, 256)).collect();
            let by_column: Vec<f32> = (0..256).map(|c| zeros(c, &|k| k * 256, rows)).collect();
            prop_assert_eq!(zero_rows(&codes, 256).unwrap(), by_row);
            prop_assert_eq!(zero_columns(&codes, 256).unwrap(), by_column);
        }
    }

    /// Packs as bitnet.cpp does on ARM.
    fn pack_arm(trits: &[i8]) -> Vec<u8> {
        let mut bytes = vec![0; trits.len() / 4];
        for (i, &trit) in trits.iter().enumerate() {
            bytes[i / 64 * 16 + i % 16] |= ((trit + 1) as u8) << (6 - 2 * (i % 64 / 16));
        }
        bytes
    }

    /// Uniform in [0, 1).
    fn uniform(state: &mut u64) -> f32 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 40) as f32 / (1u64 << 24) as f32
    }

    /// 300 rows whose column c is zero with probability `0.42 + strength * (channel[c] - 0.5)`.
    fn matrix(channel: &[f32], strength: f32, state: &mut u64) -> Vec<i8> {
        let mut trits = Vec::new();
        for _ in 0..300 {
            for &c in channel {
                let zero = uniform(state) < 0.42 + strength * (c - 0.5);
                let sign = if uniform(state) < 0.5 { -1 } else { 1 };
                trits.push(if zero { 0 } else { sign });
            }
        }
        trits
    }

    #[test]
    fn the_layouts_differ_where_channels_have_structure() {
        let mut state = 1;
        let reference: Vec<f32> = (0..2560).map(|_| uniform(&mut state)).collect();
        // The weakest structure varies the densities as much as chance does in 300 rows.
        for strength in [0.8, 0.1, -0.1] {
            let trits = matrix(&reference, strength, &mut state);
            let z = |codes: &[u8]| layout_z(&[(&reference, &zero_columns(codes, 2560).unwrap())]);
            let (x86, arm) = (z(&pack_i2s(&trits).unwrap()), z(&pack_arm(&trits)));
            assert!(x86 > 20.0 && arm < -20.0, "strength {strength}: {x86} {arm}");
        }
    }

    #[test]
    fn without_structure_the_statistic_is_standard() {
        let mut state = 7;
        let (mut sum, mut squares) = (0.0, 0.0);
        let trials = 400;
        for _ in 0..trials {
            let axes: Vec<Vec<f32>> =
                (0..8).map(|_| (0..384).map(|_| uniform(&mut state)).collect()).collect();
            let pairs: Vec<(&[f32], &[f32])> =
                axes.chunks_exact(2).map(|p| (p[0].as_slice(), p[1].as_slice())).collect();
            let z = layout_z(&pairs);
            sum += z;
            squares += z * z;
        }
        let (mean, deviation) = (sum / f64::from(trials), (squares / f64::from(trials)).sqrt());
        assert!(mean.abs() < 0.2 && (0.8..1.2).contains(&deviation), "{mean} {deviation}");

        let (flat, other) = (vec![1.0; 256], vec![0.5; 128]);
        assert_eq!(layout_z(&[(&flat, &flat), (&flat, &other), (&[], &[])]), 0.0);
    }
}
