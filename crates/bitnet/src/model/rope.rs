//! Angles of the rotary position embedding.

use super::Config;
use bitnet_kernels::math::{exp64, ln64, sin_cos64};

/// The inverse frequencies of half the rotated width, as the reference computes them: float32 at every step, each
/// rounded once.
pub(crate) fn inverse_frequencies(config: &Config) -> Vec<f32> {
    let (rope_dim, ln_theta) = (config.rope_dim, ln64(f64::from(config.rope_theta)));
    (0..rope_dim / 2)
        .map(|i| {
            let exponent = (2 * i) as f32 / rope_dim as f32;
            let frequency = 1.0 / (exp64(f64::from(exponent) * ln_theta) as f32);
            frequency / config.rope_factors.get(i).copied().unwrap_or(1.0)
        })
        .collect()
}

/// Writes cosines and sines of one position. The angle is rounded to float32 before its cosine is taken, as in the
/// reference; at large positions that matters.
pub(crate) fn angles(inverse_frequencies: &[f32], position: usize, cos: &mut [f32], sin: &mut [f32]) {
    for (i, f) in inverse_frequencies.iter().enumerate() {
        let (s, c) = sin_cos64(f64::from(position as f32 * f));
        (cos[i], sin[i]) = (c as f32, s as f32);
    }
}
