//! Memory is planned: model and engine take what they say, it is accounted, and decoding allocates nothing.
#![allow(clippy::unwrap_used)]

mod common;

use bitnet::kernels::{Compute, KvType, Logits, MemoryPart, best, memory_use};
use bitnet::model::{Model, ModelInfo, Strategy};
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

fn takes_what_was_planned(
    model: &str,
    strategy: Strategy,
    threads: usize,
    cache_type: KvType,
    max_rows: usize,
) {
    let gguf = common::gguf(model);
    let info = ModelInfo::new(&gguf, strategy).unwrap();
    let options = EngineOptions { cache_type, max_rows, ..EngineOptions::for_model(&info.config) };
    let plan = info.memory(&options, threads);
    let compute = Compute::new(best(), threads);
    let engine = Engine::new(info.load_with(&gguf, &compute, |_| ()).unwrap(), compute, options).unwrap();
    let (used, peak) = memory_use();
    for part in MemoryPart::ALL {
        let (planned, used) = (plan.of(part), used[part as usize]);
        let slack = planned / 50 + 4096;
        let what = format!("{model} {strategy:?} {cache_type:?} {max_rows}: {part:?}");
        assert!(used <= planned && planned - used < slack, "{what}: planned {planned}, used {used}");
    }
    assert!(peak >= used.iter().sum());
    drop(engine);
}

// One test, for other threads would be counted too.
#[test]
fn an_engine_takes_what_it_says_and_a_decoded_token_nothing() {
    let threads = 2;
    for cache_type in [KvType::Q8, KvType::F16, KvType::F32] {
        for strategy in [Strategy::DENSE, Strategy::SPARSE] {
            for (model, max_rows) in [("demo", 512), ("gqa", 7), ("ragged", 128)] {
                takes_what_was_planned(model, strategy, threads, cache_type, max_rows);
            }
        }
    }
    assert_eq!(memory_use().0, [0; 5], "all was given back");

    let compute = Compute::new(best(), threads);
    let gguf = common::gguf("demo");
    let model = Model::load(&gguf, &compute, Strategy::SPARSE).unwrap();
    let options = EngineOptions { context: 640, ..EngineOptions::for_model(model.config()) };
    let planned = options.bytes(model.config(), threads)[MemoryPart::Scratch as usize];
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
