//! The kernels of one instruction set as a plain struct of functions, chosen once.

use crate::attention::{self, Segment};
use crate::isa::Isa;
#[cfg(target_arch = "aarch64")]
use crate::isa::neon::{BASE, DOTPROD, I8MM, Neon};
use crate::isa::scalar::Scalar;
#[cfg(target_arch = "x86_64")]
use crate::isa::{avx2::Avx2, avx512::Avx512};
use crate::ops::{self, FloatType};
use crate::screen::{self, BLOCK, Dither, GROUP, Probe, RowScales, Screen};
use crate::ternary::panel::Part;
use crate::ternary::{self, Activations, Layout, OutPtr, StoredRows, Which, base3, columns, tiles};
use std::ops::Range;

/// All kernels: name, arguments, result, and what is compiled for each instruction set, which it is given first. Hands
/// the list to the macro `$then`, with whatever follows that name in front.
macro_rules! kernels {
    ($then:ident $($with:tt)*) => { $then! { [$($with)*]
        squares: fn(x: &[f32]) -> f32 = ops::squares;
        rmsnorm: fn(x: &[f32], squares: f32, weight: &[f32], eps: f32, out: &mut [f32]) -> f32 = ops::rmsnorm;
        greatest: fn(x: &[f32]) -> f32 = ops::greatest;
        quantize: fn(x: &[f32], top: f32, layout: Layout, codes: &mut [i8]) -> (f32, i32) = ops::quantize;
        list_within: fn(x: &[f32], within: [f32; 2], first: u32, list: &mut Vec<u32>) = ops::list_within;
        mark_positive: fn(x: &[f32], bits: &mut [u8]) = ops::mark_positive;
        list_bits: fn(bits: &[u8], list: &mut Vec<u32>) = ops::list_bits;
        count_nonzero: fn(codes: &[i8]) -> u32 = ops::count_nonzero;
        list_nonzero: fn(codes: &[i8], list: &mut Vec<u32>, packed: &mut Vec<i8>) = ops::list_nonzero;
        add: fn(x: &mut [f32], y: &[f32]) = ops::add;
        relu2_mul: fn(gate: &[f32], up: &[f32], out: &mut [f32]) -> f32 = ops::relu2_mul;
        silu_mul: fn(gate: &[f32], up: &[f32], out: &mut [f32]) -> f32 = ops::silu_mul;
        rope: fn(head: &mut [f32], cos: &[f32], sin: &[f32]) = ops::rope;
        attend: fn(segment: &Segment<'_>, state: &mut [f32], out: &mut [f32]) = attention::attend;
        join: fn(part: &[f32], first: bool, state: &mut [f32], out: &mut [f32]) = attention::join;
        code_queries: fn(
            q: &[f32], head_dim: usize, parts: &mut [i8], scales: &mut [f32], starts: &mut [[i32; 2]]
        ) = attention::code_queries;
        decode_row: fn(ty: FloatType, row: &[u8], out: &mut [f32]) -> bool = ops::decode_row;
        /// # Safety
        /// As [`ternary::gemv_rows`].
        gemv_rows: unsafe fn(
            w: StoredRows<'_>, which: Which<'_>, weight_scale: f32, a: Activations<'_>, plain: &mut [u8], out: OutPtr
        ) = ternary::gemv_rows;
        pack_base3: fn(row: &[u8], out: &mut [u8]) = base3::pack_row;
        unpack_base3: fn(w: &[u8], row_bytes: usize, columns: usize, out: &mut [u8]) = base3::unpack_rows;
        fast_base3: fn() -> bool = Isa::fast_base3;
        /// # Safety
        /// As [`ternary::matmul`].
        matmul: unsafe fn(parts: &[Part<'_>], a: Activations<'_>, t0: usize, scratch: &mut [u8]) = ternary::matmul;
        looks_up: fn() -> bool = ternary::looks_up;
        has_tiles: fn() -> bool = ternary::has_tiles;
        tile_codes: fn(rows: &[&[i8]], tiles: &mut [i8]) = Isa::tile_codes;
        /// # Safety
        /// As [`tiles::matmul`].
        tile_rows: unsafe fn(
            w: &[u8], row_bytes: usize, first: usize, weight_scale: f32, a: Activations<'_>, tiles: &[i8], out: OutPtr
        ) = tiles::matmul;
        tile_columns: fn(
            w: &[u8], column_bytes: usize, range: Range<usize>, codes: &[i8], tokens: usize, sums: &mut [i32]
        ) = Isa::tile_columns;
        add_columns: fn(w: &[u8], column_bytes: usize, list: &[u32], q: &[i8], sums: &mut [i32]) = columns::add_columns;
        finish_columns: fn(sums: &[i32], stride: usize, bias: i32, factor: f32, out: &mut [f32]) = columns::finish;
        /// # Safety
        /// As [`ops::head_rows`].
        head_rows: unsafe fn(
            ty: FloatType, w: &[u8], x: &[f32], columns: usize, first_row: usize, out: OutPtr
        ) = ops::head_rows;
        head_listed: fn(ty: FloatType, w: &[u8], x: &[f32], list: &[u32], out: &mut [f32]) = ops::head_listed;
        screen_row: fn(row: &[f32], dither: &Dither, coarse: &mut [u8], fine: &mut [u8]) -> RowScales = screen::screen_row;
        screen_block: fn(
            screen: &Screen, probes: &[Probe], first: usize, uppers: &mut [[f32; BLOCK]; GROUP], tops: &mut [f32; GROUP]
        ) = screen::screen_block;
        narrow: fn(
            screen: &Screen, probe: &Probe, list: &[u32], uppers: Option<&[f32]>, ranges: &mut [[f32; 2]]
        ) = screen::narrow;
        stream_read: fn(floats: &[f32]) -> f32 = ops::stream_read;
    } };
}

macro_rules! define {
    ([] $($(#[$doc:meta])* $name:ident: $($kind:ident)+($($arg:ident: $ty:ty),*) $(-> $ret:ty)? = $body:path;)+) => {
        /// The kernels of one instruction set. One is only to be had where the CPU can run it: [`supported`], [`best`].
        pub struct Kernels {
            name: &'static str,
            $($name: unsafe fn($($ty),*) $(-> $ret)?,)+
        }

        impl Kernels {
            $(
                $(#[$doc])*
                pub(crate) $($kind)+ $name(&self, $($arg: $ty),*) $(-> $ret)? {
                    // SAFETY: `self` exists only where its features were detected; the rest is the caller's contract.
                    unsafe { (self.$name)($($arg),*) }
                }
            )+
        }
    };
}
kernels! { define }

/// Compiles every body for one instruction set. The functions are unsafe because of their target features: whoever calls
/// them must know that the CPU has these, and `Kernels` is only handed out after detection.
macro_rules! compile {
    (
        [$module:ident, $isa:ty, $features:meta]
        $($(#[$doc:meta])* $name:ident: $($kind:ident)+($($arg:ident: $ty:ty),*) $(-> $ret:ty)? = $body:path;)+
    ) => {
        mod $module {
            use super::*;
            pub(super) static KERNELS: Kernels = Kernels { name: stringify!($module), $($name),+ };
            $(
                #[$features]
                unsafe fn $name($($arg: $ty),*) $(-> $ret)? {
                    // SAFETY: the functions of this table are only called where `supported` detected these features; the
                    // rest is the caller's contract, handed on.
                    unsafe { $body(<$isa>::assume(), $($arg),*) }
                }
            )+
        }
    };
}

kernels! { compile scalar, Scalar, inline(never) }
#[cfg(target_arch = "x86_64")]
kernels! { compile avx2, Avx2<false>, target_feature(enable = "avx2,f16c") }
#[cfg(target_arch = "x86_64")]
kernels! { compile avxvnni, Avx2<true>, target_feature(enable = "avx2,f16c,avxvnni") }
#[cfg(target_arch = "x86_64")]
kernels! { compile avx512, Avx512<false>, target_feature(enable = "avx512f,avx512bw,popcnt") }
#[cfg(target_arch = "x86_64")]
kernels! { compile avx512vnni, Avx512<true>, target_feature(enable = "avx512f,avx512bw,popcnt,avx512vnni") }
#[cfg(target_arch = "x86_64")]
kernels! { compile amx, Avx512<true, true>, target_feature(enable = "avx512f,avx512bw,popcnt,avx512vnni") }
#[cfg(target_arch = "aarch64")]
kernels! { compile neon, Neon<BASE>, target_feature(enable = "neon") }
#[cfg(target_arch = "aarch64")]
kernels! { compile neondotprod, Neon<DOTPROD>, target_feature(enable = "neon,dotprod") }
#[cfg(target_arch = "aarch64")]
kernels! { compile neoni8mm, Neon<I8MM>, target_feature(enable = "neon,dotprod,i8mm") }

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
}
