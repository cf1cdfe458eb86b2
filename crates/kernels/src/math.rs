//! Elementary functions in float64 with the same bits on every machine.
//!
//! Only rounded additions, multiplications, divisions and exact scaling are used, so no platform's libm can
//! leak in. They serve tables and sampling, where a few nanoseconds do not matter; the float32 exponential of
//! the attention kernels is in `ops`.

use std::f64::consts::{FRAC_2_PI, LN_2, LOG2_E};

/// 2^k for -1022 <= k <= 1023.
fn pow2(k: i64) -> f64 {
    f64::from_bits(((1023 + k) as u64) << 52)
}

/// e^x, within a few ulp. 0 below -708, infinity above 709, NaN for NaN.
pub fn exp64(x: f64) -> f64 {
    if x.is_nan() {
        return x;
    }
    if x < -708.0 {
        return 0.0;
    }
    if x > 709.0 {
        return f64::INFINITY;
    }
    // ln 2 in two parts; the first ends in 21 zero bits, so that k times it is exact.
    const LN2_HI: f64 = 0.693_147_180_369_123_8;
    const LN2_LO: f64 = 1.908_214_929_270_587_7e-10;
    let k = (x * LOG2_E).round_ties_even();
    let r = (x - k * LN2_HI) - k * LN2_LO;
    let mut sum = 1.0;
    for n in (1..=14).rev() {
        sum = 1.0 + sum * r / f64::from(n);
    }
    // Two steps: k = 1024 would overflow the exponent of a single factor.
    let half = k as i64 / 2;
    sum * pow2(half) * pow2(k as i64 - half)
}

/// Natural logarithm of a positive, finite, normal number, within a few ulp.
pub fn ln64(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut k = ((bits >> 52) & 0x7ff) as i64 - 1023;
    let mut m = f64::from_bits((bits & 0x000f_ffff_ffff_ffff) | (1023 << 52));
    if m > std::f64::consts::SQRT_2 {
        m *= 0.5;
        k += 1;
    }
    // ln m = 2 atanh(z) with z = (m - 1) / (m + 1), |z| < 0.172.
    let z = (m - 1.0) / (m + 1.0);
    let z2 = z * z;
    let mut sum = 0.0;
    for n in (1..=25).rev().step_by(2) {
        sum = sum * z2 + 1.0 / f64::from(n);
    }
    2.0 * z * sum + k as f64 * LN_2
}

/// (sin x, cos x) for |x| < 1.6e6, within 1e-15.
pub fn sin_cos64(x: f64) -> (f64, f64) {
    // pi/2 in three parts; the first two end in 20 zero bits, so that k times them is exact.
    const P1: f64 = 1.570_796_326_734_125_6;
    const P2: f64 = 6.077_100_506_303_966e-11;
    const P3: f64 = 2.022_266_248_795_950_6e-21;
    let k = (x * FRAC_2_PI).round_ties_even();
    let r = ((x - k * P1) - k * P2) - k * P3;
    let r2 = r * r;
    let (mut s, mut c) = (1.0, 1.0);
    for n in (1..=9).rev() {
        let n = f64::from(n);
        s = 1.0 - s * r2 / ((2.0 * n) * (2.0 * n + 1.0));
        c = 1.0 - c * r2 / ((2.0 * n - 1.0) * (2.0 * n));
    }
    s *= r;
    match (k as i64).rem_euclid(4) {
        0 => (s, c),
        1 => (c, -s),
        2 => (-s, -c),
        _ => (-c, s),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_platform_within_a_few_ulp() {
        for i in -7000..7000 {
            let x = f64::from(i) * 0.1 + 0.037;
            let (e, want) = (exp64(x), x.exp());
            assert!((e - want).abs() <= want * 2e-15, "exp {x}: {e} {want}");
        }
        for i in 1..5000 {
            let x = f64::from(i) * f64::from(i) * 0.37;
            assert!((ln64(x) - x.ln()).abs() <= x.ln().abs() * 4e-16 + 2e-16, "ln {x}");
        }
        for i in -40000..40000 {
            let x = f64::from(i) * 3.7;
            let (s, c) = sin_cos64(x);
            assert!((s - x.sin()).abs() < 1e-15 && (c - x.cos()).abs() < 1e-15, "sin cos {x}");
        }
        assert_eq!(exp64(0.0), 1.0);
        assert_eq!(exp64(-1e9), 0.0);
        assert_eq!(exp64(1e9), f64::INFINITY);
        assert!(exp64(708.9).is_finite());
    }
}
