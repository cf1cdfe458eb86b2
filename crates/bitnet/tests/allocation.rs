//! Memory is planned: an engine takes what it says, and decoding allocates nothing.
#![allow(clippy::unwrap_used)]

mod common;

use bitnet::kernels::{Compute, Logits, best};
use bitnet::model::{Model, Strategy};
use bitnet::{Engine, EngineOptions, Feed, Wanted};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;
static COUNT: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is handed to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
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

// One test, for other threads would be counted too.
#[test]
fn an_engine_takes_what_it_says_and_a_decoded_token_nothing() {
    let threads = 2;
    let compute = Compute::new(best(), threads);
    let model = Model::load(&common::gguf("demo"), &compute, Strategy::Sparse).unwrap();
    let options = EngineOptions { context: 640, ..EngineOptions::for_model(model.config()) };
    let planned = options.bytes(model.config(), threads).buffers;
    let before = BYTES.load(Ordering::Relaxed);
    let mut engine = Engine::new(model, compute, options).unwrap();
    let taken = BYTES.load(Ordering::Relaxed) - before;
    assert!(taken.abs_diff(planned) < planned / 50, "planned {planned}, taken {taken}");

    let sequence = engine.open();
    let mut step = |token: u32| {
        engine
            .feed(&[Feed {
                sequence,
                tokens: &[token],
                wanted: Wanted::Last(Logits::Best { top: 40, also: &[], among: None }),
            }])
            .unwrap();
    };
    step(1);
    let before = COUNT.load(Ordering::Relaxed);
    (0..300).for_each(step);
    assert_eq!(COUNT.load(Ordering::Relaxed) - before, 0);
}
