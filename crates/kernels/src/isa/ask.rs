//! Asking for memory ahead on x86-64.
//!
//! Zen 4 gets almost twice as many bytes a second where lines are asked for into the second-level cache, a longer way ahead, and to
//! Zen 3 it is all the same. On Zen 5 they go to the first, a tenth faster so. Intel's Sapphire Rapids takes them into the second
//! and a second time into the first, shortly before they are read.

use std::arch::x86_64::{__cpuid, _MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
use std::sync::LazyLock;

/// What suits this CPU. Like the standard library's record of CPU features, it is asked only once, since that may take a virtual
/// machine long.
static ASK: LazyLock<Ask> = LazyLock::new(|| {
    const ZEN_5: u32 = 0x1a;
    let (vendor, version) = (__cpuid(0), __cpuid(1).eax);
    let family = (version >> 8 & 0xf) + (version >> 20 & 0xff);
    let amd = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() == b"AuthenticAMD";
    let pairs = amd && family >= ZEN_5;
    Ask { far: !pairs, twice: !amd, pairs, in_cache: if amd { 22 << 10 } else { 32 << 10 } }
});

/// Into which cache, and how far ahead.
#[derive(Clone, Copy)]
pub(crate) struct Ask {
    /// Whether lines go to the second-level cache.
    pub(super) far: bool,
    /// Whether lines are asked for once more, into the first, shortly before they are read.
    pub(super) twice: bool,
    /// Whether listed rows come faster two side by side, each of whose lines are asked for at once.
    pub(super) pairs: bool,
    /// Bytes of a page of the cache that are asked for ahead of those that are read.
    pub(super) in_cache: usize,
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
    /// Asks once more for the line at `p`, where that helps.
    #[inline(always)]
    pub(super) fn again(self, p: *const u8) {
        if self.twice {
            Self::line_of::<false>(p);
        }
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
    /// Bytes of a stream that are asked for ahead of those that are read.
    #[inline(always)]
    pub(super) fn ahead(self) -> usize {
        if self.far { 10 << 10 } else { 5 << 10 }
    }
}
