//! A constraint gives the tokens that masking every logit gives, however few of them are computed.
#![allow(clippy::unwrap_used)]

mod common;

use bitnet::Error;
use bitnet::generate::{
    Constraint, ConstraintError, FinishReason, Guide, Sampler, SamplerConfig, Speculation, StopConditions,
    generate,
};
use bitnet::kernels::best;
use bitnet::text::Specials;
use common::generated;
use common::masked::{Chance, same_as_masked};
use std::ops::ControlFlow;
use std::sync::Arc;

fn configs() -> Vec<SamplerConfig> {
    let mut all = vec![SamplerConfig::greedy()];
    for seed in 0..2 {
        let penalties = SamplerConfig { seed, repeat_penalty: 1.2, top_k: 3, ..SamplerConfig::default() };
        all.push(SamplerConfig { temperature: 1.3, top_k: 4, ..penalties.clone() });
        all.push(SamplerConfig { temperature: 0.0, repeat_last_n: 8, ..penalties });
        all.push(SamplerConfig { seed, ..SamplerConfig::default() });
        all.push(SamplerConfig {
            seed,
            top_k: 0,
            logit_bias: vec![(40, 3.0), (41, -5.0)],
            ..SamplerConfig::default()
        });
    }
    all
}

#[test]
fn any_mask_is_exact() {
    let mut engine = common::engine(&common::gguf("demo"), best(), 1, 512, 1);
    let vocab = engine.model().config().vocab_size;
    let mut ends = Vec::new();
    for share in [0, 60, 900, 9_000, 40_000, 65_536] {
        for forced in [2, 50] {
            let constraint: Arc<dyn Constraint> = Arc::new(Chance { share, forced, text: Vec::new(), vocab });
            for config in configs() {
                ends.push(same_as_masked(&mut engine, &constraint, &config, 24, "One day the cat the cat").1);
            }
        }
    }
    assert!(ends.contains(&FinishReason::Length));
    assert!(ends.iter().any(|end| matches!(end, FinishReason::StopToken(_))));
}

#[test]
fn a_text_goes_on_where_it_was() {
    let mut engine = common::engine(&common::gguf("demo"), best(), 2, 512, 1);
    let vocab = engine.model().config().vocab_size;
    let constraint: Arc<dyn Constraint> = Arc::new(Chance { share: 300, forced: 4, text: Vec::new(), vocab });
    let mut run = |prompt: &[u32], begun, max| {
        let stop = StopConditions {
            max_tokens: Some(max),
            constraint: Some(constraint.clone()),
            begun,
            ..StopConditions::default()
        };
        generated(&mut engine, prompt, &SamplerConfig::greedy(), &stop).unwrap().0.tokens
    };
    let whole = run(&[5, 6], 0, 40);
    for cut in [1, 13, 39] {
        let rest = run(&[&[5, 6], &whole[..cut]].concat(), cut, 40 - cut);
        assert_eq!(rest, whole[cut..]);
    }
}

/// Fails, or allows nothing, after `good` tokens.
#[derive(Clone, Debug)]
struct Breaks {
    good: usize,
    fails: bool,
}

impl Constraint for Breaks {
    fn start(&self) -> Box<dyn Guide> {
        Box::new(self.clone())
    }
}

impl Guide for Breaks {
    fn mask(&mut self, mask: &mut [u32]) -> Result<bool, ConstraintError> {
        mask.fill(if self.good > 0 { u32::MAX } else { 0 });
        if self.good == 0 && self.fails { Err(ConstraintError("too much".into())) } else { Ok(false) }
    }
    fn push(&mut self, _: u32) -> Result<(), ConstraintError> {
        self.good = self.good.saturating_sub(1);
        Ok(())
    }
    fn pop(&mut self, count: usize) -> Result<(), ConstraintError> {
        self.good += count;
        Ok(())
    }
}

/// Allows everything, but breaks for good when asked about another text than this.
#[derive(Clone, Debug)]
struct Frail {
    good: Vec<u32>,
    text: Vec<u32>,
    broken: bool,
}

impl Constraint for Frail {
    fn start(&self) -> Box<dyn Guide> {
        Box::new(self.clone())
    }
}

impl Frail {
    fn sound(&mut self) -> Result<(), ConstraintError> {
        self.broken |= !self.good.starts_with(&self.text);
        if self.broken { Err(ConstraintError("broken".into())) } else { Ok(()) }
    }
}

impl Guide for Frail {
    fn mask(&mut self, mask: &mut [u32]) -> Result<bool, ConstraintError> {
        mask.fill(u32::MAX);
        self.sound().map(|()| false)
    }
    fn push(&mut self, token: u32) -> Result<(), ConstraintError> {
        self.text.push(token);
        if self.broken { self.sound() } else { Ok(()) }
    }
    fn pop(&mut self, count: usize) -> Result<(), ConstraintError> {
        self.text.truncate(self.text.len() - count);
        if self.broken { self.sound() } else { Ok(()) }
    }
}

#[test]
fn a_guess_that_breaks_the_guide_is_not_the_end() {
    let mut engine = common::engine(&common::gguf("demo"), best(), 2, 512, 1);
    let prompt = engine.model().prompt("The cat sat on the mat. The cat sat on", Specials::AsText).unwrap();
    let mut run = |speculation, constraint| {
        let stop =
            StopConditions { speculation, constraint, max_tokens: Some(40), ..StopConditions::default() };
        generated(&mut engine, &prompt, &SamplerConfig::greedy(), &stop).unwrap().0
    };
    let good = run(Speculation::Off, None).tokens;
    let frail = Frail { good: good.clone(), text: Vec::new(), broken: false };
    assert_eq!(run(Speculation::Always, Some(Arc::new(frail))).tokens, good);
}

#[test]
fn a_dead_end_is_an_error() {
    let mut engine = common::engine(&common::gguf("demo"), best(), 1, 512, 1);
    for (good, fails, expected) in [(0, false, "no token"), (3, false, "no token"), (3, true, "too much")] {
        let stop = StopConditions {
            constraint: Some(Arc::new(Breaks { good, fails })),
            ..StopConditions::default()
        };
        let sequence = engine.open();
        let mut sampler = Sampler::new(SamplerConfig::greedy()).unwrap();
        let mut parts = 0;
        let emit = &mut |_: &str| {
            parts += 1;
            ControlFlow::Continue(())
        };
        let error = generate(&mut engine, sequence, &[1, 2], &mut sampler, &stop, emit).unwrap_err();
        assert!(matches!(&error, Error::Constraint(why) if why.0.contains(expected)), "{error}");
        assert_eq!(parts, good);
        engine.close(sequence);
    }
}
