//! The kernels of one instruction set as a plain struct of functions, chosen once.

use crate::attention::{self, Segment};
use crate::isa::Isa;
#[cfg(target_arch = "aarch64")]
use crate::isa::neon::{BASE, DOTPROD, I8MM, Neon};
use crate::isa::scalar::Scalar;
#[cfg(target_arch = "x86_64")]
use crate::isa::{avx2::Avx2, avx512::Avx512};
use crate::ops::{self, FloatType};
use crate::screen::{self, Dither, Probe, Screen};
use crate::ternary::panel::Part;
use crate::ternary::{self, Activations, Layout, OutPtr, Which, columns, tiles};
use std::ops::Range;

/// The kernels of one instruction set. One is only to be had where the CPU can run it: [`supported`], [`best`].
pub struct Kernels {
    name: &'static str,
    rmsnorm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    quantize: unsafe fn(&[f32], Layout, &mut [i8]) -> (f32, i32),
    add: unsafe fn(&mut [f32], &[f32]),
    relu2_mul: unsafe fn(&[f32], &[f32], &mut [f32]),
    silu_mul: unsafe fn(&[f32], &[f32], &mut [f32]),
    rope: unsafe fn(&mut [f32], &[f32], &[f32]),
    attend: unsafe fn(&Segment<'_>, &mut [f32], &mut [f32]),
    join: unsafe fn(&[f32], bool, &mut [f32], &mut [f32]),
    code_queries: unsafe fn(&[f32], usize, &mut [i8], &mut [f32], &mut [[i32; 2]]),
    decode_row: unsafe fn(FloatType, &[u8], &mut [f32]) -> bool,
    gemv_rows: unsafe fn(&[u8], usize, Which<'_>, f32, Activations<'_>, OutPtr),
    matmul: unsafe fn(&[Part<'_>], Activations<'_>, usize, &mut [u8]),
    looks_up: unsafe fn() -> bool,
    has_tiles: unsafe fn() -> bool,
    tile_codes: unsafe fn(&[&[i8]], &mut [i8]),
    tile_rows: unsafe fn(&[u8], usize, usize, f32, Activations<'_>, &[i8], OutPtr),
    tile_columns: unsafe fn(&[u8], usize, Range<usize>, &[i8], usize, &mut [i32]),
    add_columns: unsafe fn(&[u8], usize, &[u32], &[i8], &mut [i32]),
    finish_columns: unsafe fn(&[i32], usize, i32, f32, &mut [f32]),
    head_rows: unsafe fn(FloatType, &[u8], &[f32], usize, usize, OutPtr),
    head_listed: unsafe fn(FloatType, &[u8], &[f32], &[u32], &mut [f32]),
    screen_row: unsafe fn(&[f32], &Dither, &mut [u8], &mut [u8]) -> (f32, f32),
    screen_logits: unsafe fn(&Screen, &Probe, usize, &mut [f32]) -> (f32, f32),
    narrow: unsafe fn(&Screen, &Probe, &[u32], &[f32], &mut [[f32; 2]]),
    stream_read: unsafe fn(&[f32]) -> f32,
}

/// Compiles every body for one instruction set. The functions are unsafe because of their target features: whoever calls
/// them must know that the CPU has these, and `Kernels` is only handed out after detection.
macro_rules! kernels {
    ($module:ident, $name:literal, $isa:expr $(, $features:literal)?) => {
        mod $module {
            use super::*;
            pub(super) static KERNELS: Kernels = Kernels {
                name: $name, rmsnorm, quantize, add, relu2_mul, silu_mul, rope, attend, join, code_queries, decode_row,
                gemv_rows, matmul, looks_up, has_tiles, tile_codes, tile_rows, tile_columns, add_columns, finish_columns, head_rows,
                head_listed, screen_row, screen_logits, narrow, stream_read,
            };
            $(#[target_feature(enable = $features)])?
            unsafe fn rmsnorm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
                ops::rmsnorm($isa, x, weight, eps, out);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn quantize(x: &[f32], layout: Layout, codes: &mut [i8]) -> (f32, i32) {
                ops::quantize($isa, x, layout, codes)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn add(x: &mut [f32], y: &[f32]) {
                ops::add($isa, x, y);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn relu2_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
                ops::relu2_mul($isa, gate, up, out);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
                ops::silu_mul($isa, gate, up, out);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn rope(head: &mut [f32], cos: &[f32], sin: &[f32]) {
                ops::rope($isa, head, cos, sin);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn attend(segment: &Segment<'_>, state: &mut [f32], out: &mut [f32]) {
                attention::attend($isa, segment, state, out);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn join(part: &[f32], first: bool, state: &mut [f32], out: &mut [f32]) {
                attention::join($isa, part, first, state, out);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn code_queries(
                q: &[f32], head_dim: usize, parts: &mut [i8], scales: &mut [f32], starts: &mut [[i32; 2]],
            ) {
                attention::code_queries($isa, q, head_dim, parts, scales, starts);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn decode_row(ty: FloatType, row: &[u8], out: &mut [f32]) -> bool {
                ops::decode_row($isa, ty, row, out)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn gemv_rows(
                w: &[u8], row_bytes: usize, which: Which<'_>, weight_scale: f32, a: Activations<'_>, out: OutPtr,
            ) {
                let isa = $isa;
                // SAFETY: the caller's contract, handed on.
                unsafe { ternary::gemv_rows(isa, w, row_bytes, which, weight_scale, a, out) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn matmul(parts: &[Part<'_>], a: Activations<'_>, t0: usize, scratch: &mut [u8]) {
                let isa = $isa;
                // SAFETY: the caller's contract, handed on.
                unsafe { ternary::matmul(isa, parts, a, t0, scratch) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn looks_up() -> bool {
                ternary::looks_up($isa)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn has_tiles() -> bool {
                ternary::has_tiles($isa)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn tile_codes(rows: &[&[i8]], tiles: &mut [i8]) {
                $isa.tile_codes(rows, tiles);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn tile_rows(
                w: &[u8], row_bytes: usize, first: usize, weight_scale: f32, a: Activations<'_>, tiles: &[i8], out: OutPtr,
            ) {
                let isa = $isa;
                // SAFETY: the caller's contract, handed on.
                unsafe { tiles::matmul(isa, w, row_bytes, first, weight_scale, a, tiles, out) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn tile_columns(
                w: &[u8], column_bytes: usize, range: Range<usize>, codes: &[i8], tokens: usize, sums: &mut [i32],
            ) {
                $isa.tile_columns(w, column_bytes, range, codes, tokens, sums);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn add_columns(w: &[u8], column_bytes: usize, list: &[u32], q: &[i8], sums: &mut [i32]) {
                columns::add_columns($isa, w, column_bytes, list, q, sums);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn finish_columns(sums: &[i32], stride: usize, bias: i32, factor: f32, out: &mut [f32]) {
                columns::finish($isa, sums, stride, bias, factor, out);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn head_rows(
                ty: FloatType, w: &[u8], x: &[f32], columns: usize, first_row: usize, out: OutPtr,
            ) {
                let isa = $isa;
                // SAFETY: the caller's contract, handed on.
                unsafe { ops::head_rows(isa, ty, w, x, columns, first_row, out) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn head_listed(ty: FloatType, w: &[u8], x: &[f32], list: &[u32], out: &mut [f32]) {
                ops::head_listed($isa, ty, w, x, list, out);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn screen_row(
                row: &[f32], dither: &Dither, coarse: &mut [u8], fine: &mut [u8],
            ) -> (f32, f32) {
                screen::screen_row($isa, row, dither, coarse, fine)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn screen_logits(
                screen: &Screen, probe: &Probe, first: usize, logits: &mut [f32],
            ) -> (f32, f32) {
                screen::screen_logits($isa, screen, probe, first, logits)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn narrow(
                screen: &Screen, probe: &Probe, list: &[u32], logits: &[f32], ranges: &mut [[f32; 2]],
            ) {
                screen::narrow($isa, screen, probe, list, logits, ranges);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn stream_read(floats: &[f32]) -> f32 {
                ops::stream_read($isa, floats)
            }
        }
    };
}

kernels!(scalar, "scalar", Scalar);
#[cfg(target_arch = "x86_64")]
kernels!(
    avx2,
    "avx2",
    // SAFETY: the functions of this table are only called where `supported` detected these features.
    unsafe { Avx2::<false>::assume() },
    "avx2,f16c"
);
#[cfg(target_arch = "x86_64")]
kernels!(
    avxvnni,
    "avxvnni",
    // SAFETY: as above.
    unsafe { Avx2::<true>::assume() },
    "avx2,f16c,avxvnni"
);
#[cfg(target_arch = "x86_64")]
kernels!(
    avx512,
    "avx512",
    // SAFETY: as above.
    unsafe { Avx512::<false>::assume() },
    "avx512f,avx512bw"
);
#[cfg(target_arch = "x86_64")]
kernels!(
    avx512vnni,
    "avx512vnni",
    // SAFETY: as above.
    unsafe { Avx512::<true>::assume() },
    "avx512f,avx512bw,avx512vnni"
);
#[cfg(target_arch = "aarch64")]
kernels!(
    neon,
    "neon",
    // SAFETY: as above.
    unsafe { Neon::<BASE>::assume() },
    "neon"
);
#[cfg(target_arch = "aarch64")]
kernels!(
    neondotprod,
    "neondotprod",
    // SAFETY: as above.
    unsafe { Neon::<DOTPROD>::assume() },
    "neon,dotprod"
);
#[cfg(target_arch = "aarch64")]
kernels!(
    neoni8mm,
    "neoni8mm",
    // SAFETY: as above.
    unsafe { Neon::<I8MM>::assume() },
    "neon,dotprod,i8mm"
);

#[cfg(target_arch = "x86_64")]
kernels!(
    amx,
    "amx",
    // SAFETY: as above.
    unsafe { Avx512::<true, true>::assume() },
    "avx512f,avx512bw,avx512vnni"
);

/// All kernels this CPU can run, the best last.
pub fn supported() -> Vec<&'static Kernels> {
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(unused_mut))]
    let mut list = vec![&scalar::KERNELS];
    #[cfg(target_arch = "x86_64")]
    {
        list.extend(Avx2::<false>::detect().map(|_| &avx2::KERNELS));
        list.extend(Avx2::<true>::detect().map(|_| &avxvnni::KERNELS));
        list.extend(Avx512::<false>::detect().map(|_| &avx512::KERNELS));
        list.extend(Avx512::<true>::detect().map(|_| &avx512vnni::KERNELS));
        list.extend(Avx512::<true, true>::detect().map(|_| &amx::KERNELS));
    }
    #[cfg(target_arch = "aarch64")]
    {
        list.extend(Neon::<BASE>::detect().map(|_| &neon::KERNELS));
        list.extend(Neon::<DOTPROD>::detect().map(|_| &neondotprod::KERNELS));
        list.extend(Neon::<I8MM>::detect().map(|_| &neoni8mm::KERNELS));
    }
    list
}

/// The best kernels this CPU can run.
pub fn best() -> &'static Kernels {
    supported().pop().unwrap_or(&scalar::KERNELS)
}

impl Kernels {
    /// The instruction set: `scalar`; `avx2`, `avxvnni`, `avx512`, `avx512vnni`, `amx`; `neon`, `neondotprod` or `neoni8mm`.
    pub fn name(&self) -> &'static str {
        self.name
    }
    pub(crate) fn rmsnorm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        // SAFETY: `self` exists only where its features were detected.
        unsafe { (self.rmsnorm)(x, weight, eps, out) }
    }
    pub(crate) fn quantize(&self, x: &[f32], layout: Layout, codes: &mut [i8]) -> (f32, i32) {
        // SAFETY: as above.
        unsafe { (self.quantize)(x, layout, codes) }
    }
    pub(crate) fn add(&self, x: &mut [f32], y: &[f32]) {
        // SAFETY: as above.
        unsafe { (self.add)(x, y) }
    }
    pub(crate) fn relu2_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { (self.relu2_mul)(gate, up, out) }
    }
    pub(crate) fn silu_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { (self.silu_mul)(gate, up, out) }
    }
    pub(crate) fn rope(&self, head: &mut [f32], cos: &[f32], sin: &[f32]) {
        // SAFETY: as above.
        unsafe { (self.rope)(head, cos, sin) }
    }
    pub(crate) fn attend(&self, segment: &Segment<'_>, state: &mut [f32], out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { (self.attend)(segment, state, out) }
    }
    pub(crate) fn join(&self, part: &[f32], first: bool, state: &mut [f32], out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { (self.join)(part, first, state, out) }
    }
    pub(crate) fn code_queries(
        &self,
        q: &[f32],
        head_dim: usize,
        parts: &mut [i8],
        scales: &mut [f32],
        starts: &mut [[i32; 2]],
    ) {
        // SAFETY: as above.
        unsafe { (self.code_queries)(q, head_dim, parts, scales, starts) }
    }
    pub(crate) fn decode_row(&self, ty: FloatType, row: &[u8], out: &mut [f32]) -> bool {
        // SAFETY: as above.
        unsafe { (self.decode_row)(ty, row, out) }
    }
    /// # Safety
    /// As [`ternary::gemv_rows`].
    pub(crate) unsafe fn gemv_rows(
        &self,
        w: &[u8],
        row_bytes: usize,
        which: Which<'_>,
        weight_scale: f32,
        a: Activations<'_>,
        out: OutPtr,
    ) {
        // SAFETY: as above, and the caller's contract.
        unsafe { (self.gemv_rows)(w, row_bytes, which, weight_scale, a, out) }
    }
    /// # Safety
    /// As [`ternary::matmul`].
    pub(crate) unsafe fn matmul(
        &self,
        parts: &[Part<'_>],
        a: Activations<'_>,
        t0: usize,
        scratch: &mut [u8],
    ) {
        // SAFETY: as above, and the caller's contract.
        unsafe { (self.matmul)(parts, a, t0, scratch) }
    }
    pub(crate) fn looks_up(&self) -> bool {
        // SAFETY: as above.
        unsafe { (self.looks_up)() }
    }
    /// Whether there are kernels for tiles, without which none of the next three may be called.
    pub(crate) fn has_tiles(&self) -> bool {
        // SAFETY: as above.
        unsafe { (self.has_tiles)() }
    }
    pub(crate) fn tile_codes(&self, rows: &[&[i8]], tiles: &mut [i8]) {
        // SAFETY: as above.
        unsafe { (self.tile_codes)(rows, tiles) }
    }
    /// # Safety
    /// As [`tiles::matmul`].
    pub(crate) unsafe fn tile_rows(
        &self,
        w: &[u8],
        row_bytes: usize,
        first: usize,
        weight_scale: f32,
        a: Activations<'_>,
        tiles: &[i8],
        out: OutPtr,
    ) {
        // SAFETY: as above, and the caller's contract.
        unsafe { (self.tile_rows)(w, row_bytes, first, weight_scale, a, tiles, out) }
    }
    pub(crate) fn tile_columns(
        &self,
        w: &[u8],
        column_bytes: usize,
        range: Range<usize>,
        codes: &[i8],
        tokens: usize,
        sums: &mut [i32],
    ) {
        // SAFETY: as above.
        unsafe { (self.tile_columns)(w, column_bytes, range, codes, tokens, sums) }
    }
    pub(crate) fn add_columns(
        &self,
        w: &[u8],
        column_bytes: usize,
        list: &[u32],
        q: &[i8],
        sums: &mut [i32],
    ) {
        // SAFETY: as above.
        unsafe { (self.add_columns)(w, column_bytes, list, q, sums) }
    }
    pub(crate) fn finish_columns(
        &self,
        sums: &[i32],
        stride: usize,
        bias: i32,
        factor: f32,
        out: &mut [f32],
    ) {
        // SAFETY: as above.
        unsafe { (self.finish_columns)(sums, stride, bias, factor, out) }
    }
    /// # Safety
    /// As [`ops::head_rows`].
    pub(crate) unsafe fn head_rows(
        &self,
        ty: FloatType,
        w: &[u8],
        x: &[f32],
        columns: usize,
        first_row: usize,
        out: OutPtr,
    ) {
        // SAFETY: as above, and the caller's contract.
        unsafe { (self.head_rows)(ty, w, x, columns, first_row, out) }
    }
    pub(crate) fn head_listed(&self, ty: FloatType, w: &[u8], x: &[f32], list: &[u32], out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { (self.head_listed)(ty, w, x, list, out) }
    }
    pub(crate) fn screen_row(
        &self,
        row: &[f32],
        dither: &Dither,
        coarse: &mut [u8],
        fine: &mut [u8],
    ) -> (f32, f32) {
        // SAFETY: as above.
        unsafe { (self.screen_row)(row, dither, coarse, fine) }
    }
    pub(crate) fn screen_logits(
        &self,
        screen: &Screen,
        probe: &Probe,
        first: usize,
        logits: &mut [f32],
    ) -> (f32, f32) {
        // SAFETY: as above.
        unsafe { (self.screen_logits)(screen, probe, first, logits) }
    }
    pub(crate) fn narrow(
        &self,
        screen: &Screen,
        probe: &Probe,
        list: &[u32],
        logits: &[f32],
        ranges: &mut [[f32; 2]],
    ) {
        // SAFETY: as above.
        unsafe { (self.narrow)(screen, probe, list, logits, ranges) }
    }
    pub(crate) fn stream_read(&self, floats: &[f32]) -> f32 {
        // SAFETY: as above.
        unsafe { (self.stream_read)(floats) }
    }
}
