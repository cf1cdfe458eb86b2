//! The logits of whole models have the same bits for every instruction set, number of threads, chunking of the prompt and
//! company in the batch.
#![allow(clippy::unwrap_used)]

mod common;

use bitnet::gguf::Gguf;
use bitnet::kernels::{Kernels, KvType, Logits, best, supported};
use bitnet::model::Strategy;
use bitnet::{Error, Feed, SequenceId, Wanted};
use common::{MODELS, OPTIONS, Tensors, bits, build, engine, engine_with, feed, fixture, gguf, ids, last};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

fn alone(
    gguf: &Arc<Gguf>,
    tokens: &[u32],
    kernels: &'static Kernels,
    threads: usize,
    chunk: usize,
) -> Vec<u32> {
    let mut engine = engine(gguf, kernels, threads, 512, 1);
    let sequence = engine.open();
    tokens.chunks(chunk).flat_map(|tokens| feed(&mut engine, sequence, tokens)).collect()
}

/// A model and a text that takes three segments of attention; two for the demo, which is much larger than the others.
fn model(name: &str) -> (Arc<Gguf>, Vec<u32>) {
    let golden = Tensors::read(&fixture(name, "golden.safetensors"));
    (gguf(name), ids(&golden)[..if name == "demo" { 70 } else { 150 }].to_vec())
}

#[test]
fn instruction_sets_and_threads() {
    for (m, name) in MODELS.into_iter().enumerate() {
        let (gguf, tokens) = model(name);
        let reference = alone(&gguf, &tokens, supported()[0], 1, 512);
        assert!(reference.iter().all(|&x| f32::from_bits(x).is_finite()));
        // Every kernel set meets every number of threads in two of the models.
        for (k, kernels) in supported().into_iter().enumerate() {
            let threads = 1 + (m + k) % 3;
            let got = alone(&gguf, &tokens, kernels, threads, 512);
            assert!(got == reference, "{name}: {} on {threads} threads", kernels.name());
        }
    }
}

#[test]
fn sparse_and_dense() {
    for name in MODELS {
        let (gguf, tokens) = model(name);
        // Enough for every way in which a matrix is multiplied.
        let tokens = &tokens[..24];
        let reference = {
            let mut engine = build(&gguf, Strategy::DENSE, supported()[0], 1, OPTIONS);
            let sequence = engine.open();
            feed(&mut engine, sequence, tokens)
        };
        let vocab = reference.len() / tokens.len();
        let (top, also) = (5, [1, 7]);
        let floor = |logits: &[u32]| {
            let mut ranked: Vec<f32> = logits.iter().map(|&x| f32::from_bits(x)).collect();
            ranked.sort_by(|a, b| b.total_cmp(a));
            ranked[top + also.len() - 1]
        };
        let floors: Vec<f32> = reference.chunks(vocab).map(floor).collect();
        for kernels in supported() {
            for strategy in [Strategy::SPARSE, Strategy::DENSE] {
                let mut engine = build(&gguf, strategy, kernels, 2, OPTIONS);
                let sequence = engine.open();
                for chunk in [1, 3, 512] {
                    engine.truncate(sequence, 0);
                    let got: Vec<u32> =
                        tokens.chunks(chunk).flat_map(|tokens| feed(&mut engine, sequence, tokens)).collect();
                    assert!(got == reference, "{name}: {strategy:?} {} in chunks of {chunk}", kernels.name());
                    // Of the best, those that are given are exact, and none that belongs to them is missing.
                    engine.truncate(sequence, 0);
                    for (i, tokens) in tokens.chunks(chunk).enumerate() {
                        let wanted = Wanted::All(Logits::Best { top, also: &also, among: None });
                        let best = engine.feed(&[Feed { sequence, tokens, wanted }]).unwrap();
                        for (t, best) in best.chunks(vocab).enumerate() {
                            let at = i * chunk + t;
                            let all = &reference[at * vocab..][..vocab];
                            for (id, logit) in best.iter().enumerate() {
                                let needed =
                                    f32::from_bits(all[id]) >= floors[at] || also.contains(&(id as u32));
                                assert!(logit.to_bits() == all[id] || *logit == f32::NEG_INFINITY && !needed);
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn chunks_of_the_prompt() {
    for (m, name) in MODELS.into_iter().enumerate() {
        let (gguf, tokens) = model(name);
        let reference = alone(&gguf, &tokens, best(), 2, 512);
        // Every kernel set meets every chunk in two of the models.
        for (k, kernels) in supported().into_iter().enumerate() {
            let chunk = [1, 7, 64][(m + k) % 3];
            let got = alone(&gguf, &tokens, kernels, 2, chunk);
            assert!(got == reference, "{name}: {} in chunks of {chunk}", kernels.name());
        }
        // The engine's own cut of a long prompt.
        let mut engine = engine(&gguf, best(), 2, 33, 1);
        let sequence = engine.open();
        assert!(feed(&mut engine, sequence, &tokens) == reference, "{name}: steps of 33");
    }
}

#[test]
fn company_in_the_batch() {
    for name in MODELS {
        let (gguf, tokens) = model(name);
        // Five sequences of different lengths and contents, fed together piece by piece in steps that mix them.
        let part = |at: usize| at * tokens.len() / 150;
        let prompts: Vec<&[u32]> =
            [(0, 40), (3, 101), (50, 53), (90, 150), (20, 75)].map(|(a, b)| &tokens[part(a)..part(b)]).into();
        let references: Vec<_> = prompts.iter().map(|prompt| alone(&gguf, prompt, best(), 1, 512)).collect();
        for kernels in supported() {
            let mut engine = engine(&gguf, kernels, 3, 13, 6);
            let sequences: Vec<SequenceId> = prompts.iter().map(|_| engine.open()).collect();
            let mut got = vec![Vec::new(); 5];
            let vocab = engine.model().config().vocab_size;
            for piece in 0..3 {
                let parts: Vec<&[u32]> =
                    prompts.iter().map(|p| &p[p.len() * piece / 3..p.len() * (piece + 1) / 3]).collect();
                let feeds: Vec<Feed<'_>> = sequences
                    .iter()
                    .zip(&parts)
                    .map(|(&sequence, tokens)| Feed { sequence, tokens, wanted: Wanted::All(Logits::Every) })
                    .collect();
                let mut logits = engine.feed(&feeds).unwrap();
                for (got, part) in got.iter_mut().zip(&parts) {
                    let (own, rest) = logits.split_at(part.len() * vocab);
                    got.extend(bits(own));
                    logits = rest;
                }
            }
            for ((prompt, got), reference) in prompts.iter().zip(got).zip(&references) {
                assert!(got == *reference, "{name}: {}, prompt of {}", kernels.name(), prompt.len());
            }
        }
    }
}

#[test]
fn every_cache_type() {
    let (gguf, tokens) = model("gqa");
    let plain = alone(&gguf, &tokens, best(), 1, 512);
    for ty in [KvType::F16, KvType::Q8] {
        let logits = |kernels, threads, chunk| {
            let mut engine = engine_with(&gguf, kernels, threads, 64, 2, ty);
            // In pages that another sequence has left behind.
            let before = engine.open();
            last(&mut engine, before, &tokens[40..]).unwrap();
            engine.close(before);
            let sequence = engine.open();
            tokens.chunks(chunk).flat_map(|tokens| feed(&mut engine, sequence, tokens)).collect::<Vec<_>>()
        };
        let reference = logits(supported()[0], 1, 512);
        assert!(reference != plain, "{ty:?} is a definition of its own");
        for kernels in supported() {
            for (threads, chunk) in [(1, 1), (2, 7), (3, 64), (2, 512)] {
                assert!(logits(kernels, threads, chunk) == reference, "{ty:?}: {}", kernels.name());
            }
        }
    }
}

#[test]
fn truncated_and_reused_sequences() {
    let (gguf, tokens) = model("gqa");
    let mut engine = engine(&gguf, best(), 2, 512, 2);
    let reference = alone(&gguf, &tokens, best(), 2, 512);
    let vocab = engine.model().config().vocab_size;
    let (first, second) = (engine.open(), engine.open());
    feed(&mut engine, first, &tokens[40..]);
    feed(&mut engine, second, &tokens);
    engine.close(first);
    engine.truncate(second, 70);
    assert_eq!(engine.tokens(second), &tokens[..70]);
    assert!(feed(&mut engine, second, &tokens[70..]) == reference[70 * vocab..]);
    let third = engine.open();
    assert!(engine.tokens(third).is_empty());
    assert!(feed(&mut engine, third, &tokens) == reference);
}

#[test]
fn a_refused_feed_changes_nothing() {
    let (gguf, tokens) = model("gqa");
    let mut engine = engine(&gguf, best(), 2, 512, 1);
    let sequence = engine.open();
    let reference = feed(&mut engine, sequence, &tokens);
    engine.truncate(sequence, 10);
    let vocab = engine.model().config().vocab_size;
    for (bad, message) in [
        (
            vec![1, 2, vocab as u32],
            format!("token 2 of the input is {vocab}, the vocabulary ends at {}", vocab - 1),
        ),
        (vec![1; 631], "641 tokens do not fit in the context of 640 tokens".to_owned()),
    ] {
        assert_eq!(last(&mut engine, sequence, &bad).unwrap_err().to_string(), message);
        assert_eq!(engine.tokens(sequence), &tokens[..10]);
    }
    let other = engine.open();
    let error = last(&mut engine, other, &[1; 600]).unwrap_err();
    assert_eq!(error.to_string(), "the key/value cache is full: 10 pages of 64 tokens are in use");
    assert!(feed(&mut engine, sequence, &tokens[10..]) == reference[10 * vocab..]);
}

#[test]
fn a_cancelled_feed_leaves_no_trace() {
    let (gguf, tokens) = model("demo");
    let reference = alone(&gguf, &tokens, best(), 2, 40);
    let mut engine = engine(&gguf, best(), 2, 512, 1);
    let sequence = engine.open();
    let flag = Arc::new(AtomicBool::new(false));
    engine.cancel_by(flag.clone());
    let first = feed(&mut engine, sequence, &tokens[..40]);
    flag.store(true, Relaxed);
    assert!(matches!(last(&mut engine, sequence, &[7, 8, 9]), Err(Error::Cancelled)));
    flag.store(false, Relaxed);
    assert!([first, feed(&mut engine, sequence, &tokens[40..])].concat() == reference);
}
