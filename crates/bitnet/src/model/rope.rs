//! Frequencies of the rotary position embedding.

use super::Config;
use bitnet_kernels::math::{exp64, ln64};

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
