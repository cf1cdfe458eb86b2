//! Memory is planned: model and engine take what they say, it is accounted, decoding allocates nothing, and a conversion takes
//! no more for more tensors.
#![allow(clippy::unwrap_used)]

mod common;

use bitnet::convert::{HeadType, TernaryType};
use bitnet::kernels::{Compute, KvType, Logits, MemoryPart, best, memory_use};
use bitnet::model::{Model, ModelInfo, Strategy};
use bitnet::text::{HfVocab, Tokenizer};
use bitnet::{Engine, EngineOptions, Feed, Wanted};
use common::checkpoint;
use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;
static COUNT: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is handed to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
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

/// Most bytes that were taken at a time while a checkpoint of so many layers became a GGUF file, and that another.
fn conversion_peaks(layers: u64) -> [usize; 2] {
    let folder =
        checkpoint::folder(&checkpoint::config(512, layers, 3000), &checkpoint::tensors(512, layers, 3000));
    let peak = |from: &Path, name: &str, ternary, head| {
        let before = LIVE.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        checkpoint::to(from, &folder.path().join(name), ternary, head).unwrap();
        PEAK.load(Ordering::Relaxed) - before
    };
    let first = peak(folder.path(), "one.gguf", TernaryType::I2_S, HeadType::F16);
    [first, peak(&folder.path().join("one.gguf"), "other.gguf", TernaryType::TQ1_0, HeadType::Q6_K)]
}

fn a_conversion_streams() {
    let (few, many) = (conversion_peaks(1), conversion_peaks(5));
    for (few, many) in few.into_iter().zip(many) {
        // A layer has 4.7 MB in 16 bits and 9.4 MB in 32; what there is of each tensor for all the time is its name and place.
        assert!(many < few + (1 << 20) && few < 8 << 20, "{few} bytes with one layer, {many} with five");
    }
}

/// How often 300 tokens of a new engine allocate after the first.
fn allocations_of_decoding(threads: usize) -> usize {
    let compute = Compute::new(best(), threads);
    let gguf = common::gguf("demo");
    let model = Model::load(&gguf, &compute, Strategy::SPARSE).unwrap();
    let options = EngineOptions { context: 640, ..EngineOptions::for_model(model.config()) };
    let planned = options.bytes(model.config(), threads)[MemoryPart::Scratch as usize];
    let before = BYTES.load(Ordering::Relaxed);
    let mut engine = Engine::new(model, compute, options).unwrap();
    let taken = BYTES.load(Ordering::Relaxed) - before;
    engine.settle(|| false);
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
    COUNT.load(Ordering::Relaxed) - before
}

/// Its merges are made of scores.
fn a_tokenizer_takes_what_was_planned() {
    let vocab = include_bytes!("fixtures/tokenizer/sentencepiece.model");
    let vocab = HfVocab::parse_sentencepiece(vocab).unwrap();
    let before = LIVE.load(Ordering::Relaxed);
    let tokenizer = Tokenizer::new(&vocab).unwrap();
    let taken = LIVE.load(Ordering::Relaxed) - before;
    assert!(taken < vocab.table_bytes() + 1000, "{taken} bytes, planned {}", vocab.table_bytes());
    drop(tokenizer);
}

// One test, for other threads would be counted too.
#[test]
fn an_engine_takes_what_it_says_a_decoded_token_nothing_and_a_conversion_little() {
    let threads = 2;
    for cache_type in [KvType::Q8, KvType::F16, KvType::F32] {
        for strategy in [Strategy::DENSE, Strategy::SPARSE] {
            for (model, max_rows) in [("demo", 512), ("gqa", 7), ("ragged", 128)] {
                takes_what_was_planned(model, strategy, threads, cache_type, max_rows);
            }
        }
    }
    assert_eq!(memory_use().0, [0; 5], "all was given back");

    // The harness allocates when it says, once, that a test takes long: what the engine allocates is there another time.
    assert!((0..2).any(|_| allocations_of_decoding(threads) == 0));
    a_conversion_streams();
    a_tokenizer_takes_what_was_planned();
}
