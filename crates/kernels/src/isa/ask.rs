//! Asking for memory ahead on x86-64.
//!
//! Cores of AMD (Zen 4, measured) get twice as many bytes a second where lines are asked for into the second-level cache, a longer
//! way ahead; those of Intel (Sapphire Rapids) where they are asked for into the first.

use std::arch::x86_64::{__cpuid, _MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
use std::sync::atomic::{AtomicBool, Ordering};

/// Where this CPU has lines brought. Like the standard library's record of CPU features, it is asked only once, since that may
/// take a virtual machine long.
static FAR: AtomicBool = AtomicBool::new(false);

/// Into which cache, and how far ahead.
#[derive(Clone, Copy)]
pub(crate) struct Ask {
    far: bool,
}

impl Ask {
    /// Looks at the CPU.
    pub(super) fn detect() -> Self {
        let vendor = __cpuid(0);
        FAR.store(
            [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() == b"AuthenticAMD",
            Ordering::Relaxed,
        );
        Self::known()
    }
    /// What [`Self::detect`] found.
    #[inline(always)]
    pub(super) fn known() -> Self {
        Self { far: FAR.load(Ordering::Relaxed) }
    }
    /// Asks for the line at `p`, which need not be readable.
    #[inline(always)]
    pub(super) fn line(self, p: *const u8) {
        // SAFETY: a prefetch reads nothing and never faults.
        unsafe {
            if self.far {
                _mm_prefetch::<_MM_HINT_T1>(p.cast());
            } else {
                _mm_prefetch::<_MM_HINT_T0>(p.cast());
            }
        }
    }
    /// Bytes of a stream that are asked for ahead of those that are read.
    #[inline(always)]
    pub(super) fn ahead(self) -> usize {
        if self.far { 10 << 10 } else { 5 << 10 }
    }
}
