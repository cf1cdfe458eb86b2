//! What a constraint is defined as.

use bitnet::generate::{
    Constraint, ConstraintError, FinishReason, Guide, Sampler, SamplerConfig, Speculation, StopConditions,
    generate,
};
use bitnet::kernels::Logits;
use bitnet::text::Specials;
use bitnet::{Engine, Feed, Wanted};
use std::sync::Arc;

/// Allows tokens that follow from those before: `share` of 65,536 of them, or one of `forced` times.
#[derive(Clone, Debug)]
pub(crate) struct Chance {
    pub(crate) share: u64,
    pub(crate) forced: u64,
    pub(crate) text: Vec<u32>,
    pub(crate) vocab: usize,
}

fn hash(x: u64) -> u64 {
    let x = (x ^ (x >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ (x >> 32)
}

impl Constraint for Chance {
    fn start(&self) -> Box<dyn Guide> {
        Box::new(self.clone())
    }
}

impl Guide for Chance {
    fn mask(&mut self, mask: &mut [u32]) -> Result<bool, ConstraintError> {
        let state = self.text.iter().fold(self.text.len() as u64, |state, &id| hash(state ^ u64::from(id)));
        mask.fill(0);
        let mut allow = |id: usize| mask[id / 32] |= 1 << (id % 32);
        if state.is_multiple_of(self.forced) {
            allow(hash(state) as usize % self.vocab);
            return Ok(false);
        }
        // In runs, as grammars have them.
        (0..self.vocab)
            .filter(|&id| hash(state ^ (id / 8) as u64) % 65_536 < self.share)
            .for_each(&mut allow);
        allow(7);
        Ok(state % 16 == 1)
    }
    fn push(&mut self, token: u32) -> Result<(), ConstraintError> {
        self.text.push(token);
        Ok(())
    }
    fn pop(&mut self, count: usize) -> Result<(), ConstraintError> {
        self.text.truncate(self.text.len() - count);
        Ok(())
    }
}

/// The definition: every logit, those of tokens that may not follow replaced by negative infinity.
fn masked(
    engine: &mut Engine,
    constraint: &dyn Constraint,
    config: &SamplerConfig,
    stop: &StopConditions,
    prompt: &[u32],
) -> (Vec<u32>, FinishReason) {
    let sequence = engine.open();
    let mut guide = constraint.start();
    let mut sampler = Sampler::new(config.clone()).unwrap();
    let (mut history, mut next) = (prompt.to_vec(), prompt.to_vec());
    let mut mask = vec![0u32; engine.model().config().vocab_size.div_ceil(32)];
    let finish = loop {
        let may_end = guide.mask(&mut mask).unwrap();
        let logits =
            engine.feed(&[Feed { sequence, tokens: &next, wanted: Wanted::Last(Logits::Every) }]).unwrap();
        let allowed = |id: u32| {
            if stop.ids.contains(&id) { may_end } else { mask[id as usize / 32] >> (id % 32) & 1 == 1 }
        };
        let masked: Vec<f32> = (0..)
            .zip(logits)
            .map(|(id, &logit)| if allowed(id) { logit } else { f32::NEG_INFINITY })
            .collect();
        if (0..masked.len() as u32).all(|id| stop.ids.contains(&id) || !allowed(id)) {
            break FinishReason::Complete;
        }
        let id = sampler.sample(&masked, &history).unwrap();
        history.push(id);
        if let Some(finish) = stop.check(id, history.len() - prompt.len()) {
            break finish;
        }
        guide.push(id).unwrap();
        next = vec![id];
    };
    engine.close(sequence);
    (history[prompt.len()..].to_vec(), finish)
}

/// Compares [`generate`] with that definition, in every mode of speculation. The text, and how it ended.
pub(crate) fn same_as_masked(
    engine: &mut Engine,
    constraint: &Arc<dyn Constraint>,
    config: &SamplerConfig,
    max: usize,
    prompt: &str,
) -> (String, FinishReason) {
    let prompt = engine.model().prompt(prompt, Specials::AsText).unwrap();
    let stop = StopConditions {
        ids: engine.model().special().stop.clone(),
        max_tokens: Some(max),
        constraint: Some(constraint.clone()),
        ..StopConditions::default()
    };
    let (tokens, finish) = masked(engine, &**constraint, config, &stop, &prompt);
    let mut text = String::new();
    for speculation in [Speculation::Off, Speculation::Adaptive, Speculation::Always] {
        let sequence = engine.open();
        let stop = StopConditions { speculation, ..stop.clone() };
        let mut sampler = Sampler::new(config.clone()).unwrap();
        text.clear();
        let emit = &mut super::writing(&mut text);
        let generated = generate(engine, sequence, &prompt, &mut sampler, &stop, emit).unwrap();
        assert_eq!((&generated.tokens, &generated.finish), (&tokens, &finish), "{config:?} {speculation:?}");
        // What is in the cache is a beginning of it.
        assert!([&prompt[..], &tokens].concat().starts_with(engine.tokens(sequence)));
        engine.close(sequence);
    }
    (text, finish)
}
