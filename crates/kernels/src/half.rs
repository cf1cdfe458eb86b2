//! Half-precision and bfloat16 numbers, one at a time.

/// IEEE half precision to single, exactly.
pub fn f16_to_f32(h: u16) -> f32 {
    let sign = u32::from(h & 0x8000) << 16;
    let magnitude = u32::from(h & 0x7fff);
    match magnitude >> 10 {
        // Zero and subnormals: an integer times 2^-24.
        0 => f32::from_bits(sign | (magnitude as f32 * (1.0 / 16_777_216.0)).to_bits()),
        31 => {
            let nan = magnitude & 0x3ff;
            // A signalling NaN becomes quiet, as the hardware conversions make it.
            f32::from_bits(sign | 0x7f80_0000 | nan << 13 | if nan != 0 { 0x40_0000 } else { 0 })
        }
        _ => f32::from_bits(sign | ((magnitude << 13) + ((127 - 15) << 23))),
    }
}

/// bfloat16 to single, exactly.
pub fn bf16_to_f32(h: u16) -> f32 {
    f32::from_bits(u32::from(h) << 16)
}

/// Single precision, no NaN, to bfloat16, rounded to nearest, halves to even.
pub fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// Single precision to IEEE half, rounded to nearest, halves to even. What is too large becomes infinite, NaN stays NaN.
pub fn f32_to_f16(x: f32) -> u16 {
    let sign = (x.to_bits() >> 16 & 0x8000) as u16;
    let bits = x.to_bits() & 0x7fff_ffff;
    // Below 2^-14 a half is a multiple of 2^-24, the last place of 1/2: adding that rounds.
    let small = (f32::from_bits(bits) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    // Above, thirteen bits less: a half of the last place less one, and one more where that is odd.
    let normal = bits.wrapping_add(0xfff + (bits >> 13 & 1)).wrapping_sub((127 - 15) << 23) >> 13;
    let finite = if bits < 113 << 23 { small } else { normal.min(0x7c00) };
    sign | if bits > 255 << 23 { 0x7e00 } else { finite as u16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_halves() {
        for (h, f) in [
            (0x0000, 0.0),
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65504.0),
            (0x0001, 5.960_464_5e-8),
            (0x03ff, 6.097_555e-5),
            (0x0400, 6.103_515_6e-5),
            (0x7c00, f32::INFINITY),
        ] {
            assert_eq!(f16_to_f32(h), f, "{h:#06x}");
        }
        assert!(f16_to_f32(0x7c01).is_nan());
        assert_eq!(bf16_to_f32(0x3f80), 1.0);
    }

    #[test]
    fn rounds_to_the_nearest_half() {
        // Every half is itself; what lies between two goes to the nearer, from the middle to the even one.
        for h in 0..0x7c00u16 {
            let (low, high) = (f16_to_f32(h), f16_to_f32(h + 1));
            // The step after the last half is where rounding becomes infinite.
            let high = if high.is_finite() { high } else { 65536.0 };
            let middle = low + (high - low) / 2.0;
            for (x, want) in [
                (low, h),
                (middle.next_down(), h),
                (middle, if h % 2 == 0 { h } else { h + 1 }),
                (middle.next_up(), h + 1),
            ] {
                assert_eq!(f32_to_f16(x), want, "{x}");
                assert_eq!(f32_to_f16(-x), want | 0x8000, "-{x}");
            }
        }
        for (x, h) in [(65520.0, 0x7c00), (f32::MAX, 0x7c00), (f32::INFINITY, 0x7c00), (f32::NAN, 0x7e00)] {
            assert_eq!(f32_to_f16(x) & 0x7fff, h);
        }
        assert_eq!(f32_to_f16(f32::from_bits(1)), 0);
    }
}
