//! Speculation changes the time a text takes, never the text.
#![allow(clippy::unwrap_used)]

mod common;

use bitnet::generate::{
    FinishReason, Generated, Sampler, SamplerConfig, Speculation, StopConditions, generate,
};
use bitnet::kernels::best;
use bitnet::model::Strategy;
use bitnet::text::Specials;
use bitnet::{Engine, EngineOptions};
use common::{OPTIONS, build, last};
use std::ops::ControlFlow;

const REPETITIVE: &str =
    "The cat sat on the mat. The dog sat on the log. The cat sat on the mat. The dog sat on";
const PLAIN: &str = "Once upon a time";

fn engine(context: usize, max_rows: usize) -> Engine {
    let options = EngineOptions { context, max_rows, ..OPTIONS };
    build(&common::gguf("demo"), Strategy::SPARSE, best(), 1, options)
}

/// All that a caller can see: the pieces of text, how it ended, the cache, and what the sampler would draw next. `pieces` is
/// how many calls of `emit` there are until it ends the generation.
fn seen(
    engine: &mut Engine,
    config: &SamplerConfig,
    stop: &StopConditions,
    prompt: &str,
    pieces: usize,
) -> (Generated, Vec<String>, Vec<u32>, Vec<u32>) {
    let prompt = engine.model().prompt(prompt, Specials::AsText).unwrap();
    let sequence = engine.open();
    let mut sampler = Sampler::new(config.clone()).unwrap();
    let mut texts = Vec::new();
    let mut emit = |text: &str| {
        texts.push(text.to_owned());
        if texts.len() == pieces { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let generated = generate(engine, sequence, &prompt, &mut sampler, stop, &mut emit).unwrap();
    let cached = engine.tokens(sequence).to_vec();
    let flat = vec![0.0; engine.model().config().vocab_size];
    let draws = (0..4).map(|_| sampler.sample(&flat, &[]).unwrap()).collect();
    // What the cache holds is what these tokens give.
    if cached.len() < engine.options().context {
        let kept = last(engine, sequence, &[7]).unwrap();
        engine.truncate(sequence, 0);
        assert!(kept == last(engine, sequence, &[&cached[..], &[7]].concat()).unwrap());
    }
    engine.close(sequence);
    (generated, texts, cached, draws)
}

/// Compares the three modes; the finish, and the share of right ones where all are proposed.
fn same(
    engine: &mut Engine,
    config: &SamplerConfig,
    stop: &StopConditions,
    prompt: &str,
    pieces: usize,
) -> (FinishReason, f64) {
    let [off, adaptive, always] =
        [Speculation::Off, Speculation::Adaptive, Speculation::Always].map(|speculation| {
            seen(engine, config, &StopConditions { speculation, ..stop.clone() }, prompt, pieces)
        });
    assert_eq!((off.0.proposed, off.0.accepted), (0, 0));
    for other in [adaptive, always.clone()] {
        assert_eq!(off.0.tokens, other.0.tokens, "{config:?} {stop:?}");
        assert_eq!(off.0.finish, other.0.finish, "{config:?} {stop:?}");
        assert_eq!((&off.1, &off.2, &off.3), (&other.1, &other.2, &other.3), "{config:?} {stop:?}");
        assert!(other.0.accepted <= other.0.proposed);
    }
    (off.0.finish, always.0.accepted as f64 / always.0.proposed as f64)
}

fn tokens(count: usize) -> StopConditions {
    StopConditions { max_tokens: Some(count), ..StopConditions::default() }
}

fn configs() -> Vec<SamplerConfig> {
    let mut all = vec![SamplerConfig::greedy()];
    for (seed, temperature) in [(0, 0.3), (1, 0.8), (2, 1.5)] {
        all.push(SamplerConfig { seed, temperature, ..SamplerConfig::default() });
    }
    let penalties =
        SamplerConfig { repeat_penalty: 1.1, frequency_penalty: 0.02, ..SamplerConfig::default() };
    for temperature in [0.0, 0.7] {
        for repeat_last_n in [3, 20, 1000] {
            all.push(SamplerConfig { temperature, repeat_last_n, top_k: 5, ..penalties.clone() });
            all.push(SamplerConfig {
                temperature,
                repeat_last_n,
                top_k: 0,
                presence_penalty: -0.3,
                ..penalties.clone()
            });
        }
        let logit_bias = vec![(20, 1.0), (30, f32::NEG_INFINITY)];
        all.push(SamplerConfig { temperature, logit_bias, ..SamplerConfig::default() });
    }
    all
}

#[test]
fn every_sampler_draws_the_same() {
    let mut engine = engine(640, 512);
    for prompt in [REPETITIVE, PLAIN] {
        for config in configs() {
            same(&mut engine, &config, &tokens(32), prompt, usize::MAX);
        }
    }
    let (_, right) = same(&mut engine, &SamplerConfig::greedy(), &tokens(200), REPETITIVE, usize::MAX);
    assert!(right > 0.5, "only {right} of the proposals were right");
}

#[test]
fn every_end_is_the_same() {
    let greedy = SamplerConfig::greedy();
    let sampled = SamplerConfig { temperature: 0.5, ..SamplerConfig::default() };
    for (max_rows, configs) in [(5, vec![&greedy]), (512, vec![&greedy, &sampled])] {
        let mut engine = engine(150, max_rows);
        for config in configs {
            for count in (0..40).step_by(9) {
                let (finish, _) = same(&mut engine, config, &tokens(count), REPETITIVE, usize::MAX);
                assert_eq!(finish, FinishReason::Length);
                let (finish, _) = same(&mut engine, config, &tokens(40), REPETITIVE, count + 1);
                assert!(count >= 39 || finish == FinishReason::Cancelled);
            }
            let (finish, _) = same(&mut engine, config, &StopConditions::default(), REPETITIVE, usize::MAX);
            assert_eq!(finish, FinishReason::ContextFull);

            // Stop strings and tokens out of the text itself, some of which end it in the middle of proposals.
            let (plain, texts, ..) = seen(&mut engine, config, &tokens(50), REPETITIVE, usize::MAX);
            let text = texts.concat();
            for (at, _) in text.char_indices().step_by(23) {
                let string: String = text[at..].chars().take(6).collect();
                let stop = StopConditions { strings: vec![string], ..tokens(50) };
                let (finish, _) = same(&mut engine, config, &stop, REPETITIVE, usize::MAX);
                assert!(matches!(finish, FinishReason::StopString(_)) || at + 6 > text.len());
            }
            for &id in plain.tokens.iter().step_by(13) {
                let stop = StopConditions { ids: vec![id], ..tokens(50) };
                let (finish, _) = same(&mut engine, config, &stop, REPETITIVE, usize::MAX);
                assert_eq!(finish, FinishReason::StopToken(id));
            }
        }
    }
}

#[test]
fn other_sequences_may_leave_no_room_for_proposals() {
    let mut engine = engine(256, 512);
    let other = engine.open();
    last(&mut engine, other, &[1; 130]).unwrap();
    // One page is left to the sequence, whose caller ends it exactly with that; proposals reach beyond.
    let prompt = engine.model().prompt(REPETITIVE, Specials::AsText).unwrap();
    let sequence = engine.open();
    let mut texts = Vec::new();
    for speculation in [Speculation::Off, Speculation::Always] {
        let stop = StopConditions { speculation, ..tokens(150) };
        let mut pieces = 0;
        let mut sampler = Sampler::new(SamplerConfig::greedy()).unwrap();
        let mut emit = |_: &str| {
            pieces += 1;
            if pieces == 65 - prompt.len() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        texts.push(generate(&mut engine, sequence, &prompt, &mut sampler, &stop, &mut emit).unwrap().tokens);
        engine.truncate(sequence, 0);
    }
    assert_eq!(texts[0], texts[1]);
}
