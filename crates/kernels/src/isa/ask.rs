//! Asking for memory ahead on x86-64.
//!
//! Zen 4 gets almost twice as many bytes a second where lines are asked for into the second-level cache, a longer way ahead, and to
//! Zen 3 it is all the same. On others they go to the first, as suits Zen 5 (a tenth faster so) and Intel's Sapphire Rapids.

use std::arch::x86_64::{__cpuid, _MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
use std::sync::LazyLock;

/// What suits this CPU. Like the standard library's record of CPU features, it is asked only once, since that may take a virtual
/// machine long.
static ASK: LazyLock<Ask> = LazyLock::new(|| {
    const ZEN_5: u32 = 0x1a;
    let (vendor, version) = (__cpuid(0), __cpuid(1).eax);
    let family = (version >> 8 & 0xf) + (version >> 20 & 0xff);
    let amd = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() == b"AuthenticAMD";
    Ask { far: amd && family < ZEN_5, far_in_cache: amd, pairs: amd && family >= ZEN_5 }
});

/// Into which cache, and how far ahead.
#[derive(Clone, Copy)]
pub(crate) struct Ask {
    far: bool,
    far_in_cache: bool,
    pairs: bool,
}

impl Ask {
    /// As suits this CPU.
    #[inline(always)]
    pub(super) fn new() -> Self {
        *ASK
    }
    /// Asks for the line at `p`, which need not be readable.
    #[inline(always)]
    pub(super) fn line(self, p: *const u8) {
        if self.far { Self::line_of::<true>(p) } else { Self::line_of::<false>(p) }
    }
    /// The same where it is known whether lines go to the second-level cache.
    #[inline(always)]
    pub(super) fn line_of<const FAR: bool>(p: *const u8) {
        // SAFETY: a prefetch reads nothing and never faults.
        unsafe {
            if FAR {
                _mm_prefetch::<_MM_HINT_T1>(p.cast());
            } else {
                _mm_prefetch::<_MM_HINT_T0>(p.cast());
            }
        }
    }
    /// Whether lines go to the second-level cache.
    #[inline(always)]
    pub(super) fn far(self) -> bool {
        self.far
    }
    /// Bytes of a stream that are asked for ahead of those that are read.
    #[inline(always)]
    pub(super) fn ahead(self) -> usize {
        if self.far { 10 << 10 } else { 5 << 10 }
    }
    /// The same for pages of the cache.
    #[inline(always)]
    pub(super) fn ahead_in_cache(self) -> usize {
        if self.far_in_cache { 22 << 10 } else { 4 << 10 }
    }
    /// Whether listed rows come faster two side by side, each of whose lines are asked for at once.
    #[inline(always)]
    pub(super) fn pairs(self) -> bool {
        self.pairs
    }
}
