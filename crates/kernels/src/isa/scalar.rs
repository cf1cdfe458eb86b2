//! The specification: plain Rust, one lane after the other.

use super::{Isa, lanes};
use crate::half::{bf16_to_f32, f16_to_f32};
use std::ops::{Add, Div, Mul, Sub};

/// Plain Rust; any CPU.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

impl Scalar {
    /// # Safety
    /// None; it is that of the others.
    pub(crate) unsafe fn assume() -> Self {
        Self
    }
}

macro_rules! each {
    ($op:expr, $($x:expr),+) => {
        std::array::from_fn(|i| ($op)($($x[i]),+))
    };
}

impl Isa for Scalar {
    type F = [f32; 16];
    const PANEL_TOKENS: usize = 1;

    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 16] {
        [x; 16]
    }
    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> [f32; 16] {
        *x
    }
    #[inline(always)]
    fn store(self, v: [f32; 16], out: &mut [f32; 16]) {
        *out = v;
    }
    lanes! { each:
        add(a, b) = Add::add;
        sub(a, b) = Sub::sub;
        mul(a, b) = Mul::mul;
        div(a, b) = Div::div;
        max(a, b) = |a: f32, b: f32| if a > b { a } else { b };
        abs(a) = f32::abs;
        round(a) = f32::round_ties_even;
    }
    #[inline(always)]
    fn pow2(self, n: [f32; 16]) -> [f32; 16] {
        n.map(|n| f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn f16_lanes(self, x: &[u16; 16]) -> [f32; 16] {
        x.map(f16_to_f32)
    }
    #[inline(always)]
    fn bf16_lanes(self, x: &[u16; 16]) -> [f32; 16] {
        x.map(bf16_to_f32)
    }
    #[inline(always)]
    fn to_i8(self, v: [f32; 16], out: &mut [i8; 16]) {
        // A NaN fails both comparisons of `clamp` and would pass through, so it is caught by name.
        *out = v.map(|x| if x.is_nan() { -128 } else { x.round_ties_even().clamp(-128.0, 127.0) as i8 });
    }
    #[inline(always)]
    fn dot_rows<const R: usize>(self, w: [&[u8]; R], _: [*const u8; R], a: &[i8]) -> [i32; R] {
        w.map(|w| {
            let mut sum = 0;
            for (bytes, codes) in w.as_chunks::<64>().0.iter().zip(a.as_chunks::<256>().0) {
                for field in 0..4 {
                    for j in 0..64 {
                        let code = i32::from(bytes[j] >> (6 - 2 * field) & 3);
                        sum += code * i32::from(codes[64 * field + j]);
                    }
                }
            }
            sum
        })
    }
    #[inline(always)]
    fn dot_split<const Q: usize, const P: usize>(
        self,
        codes: [&[[u8; 64]]; P],
        rows: [[&[i8]; 2]; Q],
        start: [[i32; 2]; Q],
        _: [*const u8; P],
    ) -> [[[f32; 16]; Q]; P] {
        let mut out = [[[0.0; 16]; Q]; P];
        for (codes, out) in codes.iter().zip(&mut out) {
            for q in 0..Q {
                for j in 0..16 {
                    let mut sums = start[q];
                    for (part, sum) in rows[q].iter().zip(&mut sums) {
                        for (codes, part) in codes.iter().zip(part.as_chunks::<4>().0) {
                            for i in 0..4 {
                                *sum = sum.wrapping_add(i32::from(codes[4 * j + i]) * i32::from(part[i]));
                            }
                        }
                    }
                    out[q][j] = sums[0] as f32 * 128.0 + sums[1] as f32;
                }
            }
        }
        out
    }
}
