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
}
