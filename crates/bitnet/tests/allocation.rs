//! Decoding allocates nothing: the sizes were planned before.
#![allow(clippy::unwrap_used)]

mod common;

use bitnet::kernels::Logits;
use bitnet::kernels::best;
use bitnet::{Feed, Wanted};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;
static COUNT: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is handed to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_decoded_token_allocates_nothing() {
    let mut engine = common::engine(&common::gguf("demo"), best(), 2, 64, 1);
    let sequence = engine.open();
    let mut step = |token: u32| {
        engine
            .feed(&[Feed {
                sequence,
                tokens: &[token],
                wanted: Wanted::Last(Logits::Best { top: 40, also: &[] }),
            }])
            .unwrap();
    };
    step(1);
    let before = COUNT.load(Ordering::Relaxed);
    (0..300).for_each(step);
    assert_eq!(COUNT.load(Ordering::Relaxed) - before, 0);
}
