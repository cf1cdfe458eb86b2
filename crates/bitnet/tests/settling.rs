//! A model computes the same bits while its weights are still read where they lie in the file, while they are on their way into the
//! engine's layout, and after that.
#![allow(clippy::unwrap_used)]

mod common;

use bitnet::kernels::ternary::Layout;
use bitnet::kernels::{Compute, Logits, best};
use bitnet::model::{Model, Strategy};
use bitnet::{Engine, Feed, Wanted};
use common::{OPTIONS, bits, build, gguf};
use std::cell::Cell;

/// Of a prompt and of a single token: all logits, and the best.
const PROMPTS: [&[u32]; 2] = [&[1, 300, 5, 77, 1000], &[9]];

fn logits(engine: &mut Engine, tokens: &[u32], wanted: Logits<'_>) -> Vec<u32> {
    let sequence = engine.open();
    let logits = bits(engine.feed(&[Feed { sequence, tokens, wanted: Wanted::Last(wanted) }]).unwrap());
    engine.close(sequence);
    logits
}

fn unsettled(strategy: Strategy) -> Engine {
    let compute = Compute::new(best(), 2);
    let model = Model::load(&gguf("demo"), &compute, strategy).unwrap();
    Engine::new(model, compute, OPTIONS).unwrap()
}

#[test]
fn every_stage_gives_the_same_bits() {
    const TOP: usize = 3;
    for rows in [Layout::Rows, Layout::Base3] {
        let strategy = Strategy { rows, ..Strategy::SPARSE };
        let mut settled = build(&gguf("demo"), strategy, best(), 2, OPTIONS);
        assert!(settled.is_settled());
        let expected = PROMPTS.map(|prompt| logits(&mut settled, prompt, Logits::Every));
        let mut stages = 0;
        loop {
            let mut last = false;
            for (prompt, expected) in PROMPTS.iter().zip(&expected) {
                for wanted in [Logits::Every, Logits::Best { top: TOP, also: &[], among: None }] {
                    // The first feed of an engine settles nothing.
                    let mut engine = unsettled(strategy);
                    let looks = Cell::new(0);
                    engine.settle(|| looks.replace(looks.get() + 1) == stages);
                    last = engine.is_settled();
                    let got = logits(&mut engine, prompt, wanted);
                    assert_eq!(engine.is_settled(), last);
                    let value = |&x: &u32| f32::from_bits(x);
                    let mut order: Vec<f32> = expected.iter().map(value).collect();
                    order.sort_by(|a, b| b.total_cmp(a));
                    for (got, expected) in got.iter().zip(expected) {
                        let left_out = wanted != Logits::Every
                            && value(got) == f32::NEG_INFINITY
                            && value(expected) < order[TOP - 1];
                        assert!(got == expected || left_out, "{rows:?}, {stages} stages, {wanted:?}");
                    }
                }
            }
            stages += 1;
            if last {
                break;
            }
        }
        // The head, and each layer.
        let layers = settled.model().weights().layers.len();
        assert!(stages > 1 + layers, "{stages} stages of {layers} layers");
    }
}

#[test]
fn feeds_settle_what_loading_left() {
    let mut engine = unsettled(Strategy::SPARSE);
    let layout = |engine: &Engine| engine.model().weights().layers[0].ffn_down.layout();
    assert!(!engine.is_settled() && layout(&engine) == Layout::Rows);
    logits(&mut engine, PROMPTS[0], Logits::Every);
    assert!(!engine.is_settled() && engine.settling().is_zero());
    let settled = (0..1000).any(|_| {
        logits(&mut engine, PROMPTS[1], Logits::Every);
        engine.is_settled()
    });
    assert!(settled && !engine.settling().is_zero() && layout(&engine) == Layout::Columns);
    assert!(engine.model().weights().head.screen.is_some());
    let before = engine.settling();
    logits(&mut engine, PROMPTS[1], Logits::Every);
    assert_eq!(engine.settling(), before, "nothing is left to do");
}
