//! AMX: eight tiles of sixteen rows of 64 bytes, and a product of two tiles in sixteen cycles. Only for many tokens at once.
//!
//! A panel is already stored as the second operand wants it: sixteen quads of inputs, each with four bytes for each of
//! sixteen outputs. Rows of activations are the first operand as they are.

use super::PANEL;
use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

/// Tokens of a tile's product.
pub(super) const TOKENS: usize = 32;

/// Whether the CPU has AMX for int8 and the system lets this process use it, which is asked for here.
pub(super) fn enable() -> bool {
    static ENABLED: OnceLock<bool> = OnceLock::new();
    *ENABLED.get_or_init(|| {
        const TILE: u32 = 1 << 24;
        const INT8: u32 = 1 << 25;
        let leaf = __cpuid_count(0, 0).eax;
        leaf >= 7 && __cpuid_count(7, 0).edx & (TILE | INT8) == TILE | INT8 && request()
    })
}

/// Linux gives the tiles, eight kilobytes of state, only to who asks.
#[cfg(target_os = "linux")]
fn request() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and changes only what state the kernel saves for this process.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn request() -> bool {
    false
}

/// Sixteen rows of 64 bytes for each of the eight tiles: palette 1, then row lengths, then numbers of rows.
#[repr(C, align(64))]
struct Config([u8; 64]);

static CONFIG: Config = {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        bytes[16 + 2 * tile] = 64;
        bytes[48 + tile] = 16;
        tile += 1;
    }
    Config(bytes)
};

/// Writes the dot products of a panel with [`TOKENS`] rows of codes to `dots` (`[TOKENS][PANEL]`).
///
/// # Safety
/// Needs AMX for int8, allowed to the process, `quads` quads in the panel, a multiple of sixteen, and 4 `quads` codes in
/// each of the `TOKENS` rows of `a`.
#[inline(always)]
pub(super) unsafe fn panel_tile(panel: &[u8], a: &[&[i8]], quads: usize, dots: &mut [i32]) {
    assert!(a.len() == TOKENS && dots.len() == TOKENS * PANEL && quads >= 16);
    let stride = a[1].as_ptr() as usize - a[0].as_ptr() as usize;
    for i in 0..TOKENS {
        assert_eq!(a[i].as_ptr() as usize, a[0].as_ptr() as usize + i * stride, "rows at one distance");
    }
    // SAFETY: a step loads sixteen quads of both halves of the panel and 64 codes of each row; there are quads / 16 steps.
    // The stores are 32 rows of 128 bytes, which `dots` has. The tiles are released before anything else can run.
    unsafe {
        asm!(
            "ldtilecfg [{config}]",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{a} + {stride}]",
            "tileloadd tmm6, [{w} + {row}]",
            "tileloadd tmm7, [{w} + {row} + 64]",
            "tdpbsud tmm0, tmm4, tmm6",
            "tdpbsud tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{b} + {stride}]",
            "tdpbsud tmm2, tmm5, tmm6",
            "tdpbsud tmm3, tmm5, tmm7",
            "add {a}, 64",
            "add {b}, 64",
            "add {w}, 2048",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{out} + {row}], tmm0",
            "tilestored [{out} + {row} + 64], tmm1",
            "tilestored [{out} + {row} + 2048], tmm2",
            "tilestored [{out} + {row} + 2112], tmm3",
            "tilerelease",
            config = in(reg) CONFIG.0.as_ptr(),
            a = inout(reg) a[0].as_ptr() => _,
            b = inout(reg) a[16].as_ptr() => _,
            w = inout(reg) panel.as_ptr() => _,
            stride = in(reg) stride,
            row = in(reg) 4 * PANEL,
            steps = inout(reg) quads / 16 => _,
            out = in(reg) dots.as_mut_ptr(),
            options(nostack),
        );
    }
}
