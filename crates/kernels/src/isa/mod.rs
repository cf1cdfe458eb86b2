//! Instruction sets: one file each, all computing the same sixteen-lane definition.
//!
//! An [`Isa`] value is proof that the CPU has the instructions: it is made only after detection, or inside a
//! function compiled for them. Bodies in `ops` and `ternary` are written once, generic over `Isa`, and compiled
//! once for each set by the wrappers in `table`. Every method must be `#[inline(always)]`, so that it takes on the
//! features of the wrapper it is inlined into.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod scalar;

/// Primitives over sixteen float32 lanes, and the exact integer dot product.
///
/// Float operations are IEEE-754 single, each rounded once (no fused multiply-add). `max` is `if a > b { a } else
/// { b }`, lane by lane, so that a NaN in `a` gives `b` everywhere.
pub(crate) trait Isa: Copy {
    /// Sixteen float32 lanes.
    type F: Copy;
    /// Most tokens of an integer tile whose sums fit the registers.
    const TILE_TOKENS: usize;

    /// Asks for the cache line at `p`, which need not be readable.
    fn prefetch(self, p: *const u8);
    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; 16]) -> Self::F;
    fn store(self, v: Self::F, out: &mut [f32; 16]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    fn abs(self, a: Self::F) -> Self::F;
    /// To the nearest integer, halves to even.
    fn round(self, a: Self::F) -> Self::F;
    /// 2^n for integral lanes -126 <= n <= 127.
    fn pow2(self, n: Self::F) -> Self::F;
    /// IEEE half precision to single, exactly.
    fn f16_lanes(self, x: &[u16; 16]) -> Self::F;
    /// bfloat16 to single, exactly.
    fn bf16_lanes(self, x: &[u16; 16]) -> Self::F;
    /// Rounds to the nearest integer, halves to even, and clamps to int8. NaN becomes -128.
    fn to_i8(self, v: Self::F, out: &mut [i8; 16]);
    /// Exact dot products of R ternary rows with T rows of int8 codes: `Σ code · q` with the codes 0, 1, 2 as
    /// stored (not yet less one). Every weight row has the same multiple of 64 bytes, every activation row four
    /// times as many codes in the order of [`crate::ternary::position`].
    fn dot_tile<const R: usize, const T: usize>(self, w: [&[u8]; R], a: [&[i8]; T]) -> [[i32; T]; R];
    /// Integer dot products of stored bytes, unsigned, with Q rows of numbers that have a high and a low part, every row
    /// having four of each for a block of 64 bytes. With H and L the sum over blocks c and i < 4 of `codes[c][4 j + i]`
    /// times the part at `4 c + i`, begun with `start`, lane j is 128 · H + L: H and L exact in 32 bits (which must hold
    /// them), then made float32 and summed, each step rounded.
    /// Meanwhile it asks for as many bytes as it reads codes, at `far`, which need not be readable.
    fn dot_split<const Q: usize>(
        self,
        codes: &[[u8; 64]],
        rows: [[&[i8]; 2]; Q],
        start: [[i32; 2]; Q],
        far: *const u8,
    ) -> [Self::F; Q];
}

/// Checks the lengths that [`Isa::dot_tile`] relies on. Returns the number of 64-byte chunks of a weight row.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn tile_chunks<const R: usize, const T: usize>(w: [&[u8]; R], a: [&[i8]; T]) -> usize {
    let bytes = w[0].len();
    for w in w {
        assert_eq!(w.len(), bytes);
    }
    for a in a {
        assert_eq!(a.len(), bytes * 4);
    }
    assert_eq!(bytes % 64, 0);
    bytes / 64
}

/// Checks the lengths that [`Isa::dot_split`] relies on.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn check_split<const Q: usize>(codes: &[[u8; 64]], rows: [[&[i8]; 2]; Q]) {
    for [high, low] in rows {
        assert!(high.len() == 4 * codes.len() && low.len() == 4 * codes.len());
    }
}
