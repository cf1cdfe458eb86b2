//! What a constraint is defined as.

use bitnet::generate::{
    Constraint, FinishReason, Sampler, SamplerConfig, Speculation, StopConditions, generate,
};
use bitnet::kernels::Logits;
use bitnet::text::Specials;
use bitnet::{Engine, Feed, Wanted};
use std::ops::ControlFlow;
use std::sync::Arc;

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
        let mut emit = |part: &str| {
            text.push_str(part);
            ControlFlow::Continue(())
        };
        let generated = generate(engine, sequence, &prompt, &mut sampler, &stop, &mut emit).unwrap();
        assert_eq!((&generated.tokens, &generated.finish), (&tokens, &finish), "{config:?} {speculation:?}");
        // What is in the cache is a beginning of it.
        assert!([&prompt[..], &tokens].concat().starts_with(engine.tokens(sequence)));
        engine.close(sequence);
    }
    (text, finish)
}
