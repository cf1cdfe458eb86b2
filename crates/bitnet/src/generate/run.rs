use super::generation::{Emit, Generation};
use super::{FinishReason, Sampler, StopConditions};
use crate::{Engine, Error, Feed, SequenceId, Wanted};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// Tells how long something took, without what the engine [settled](Engine::settle) meanwhile.
pub(super) struct Watch(Instant, Duration);

impl Watch {
    pub(super) fn start(engine: &Engine) -> Self {
        Self(Instant::now(), engine.settling())
    }
    pub(super) fn elapsed(&self, engine: &Engine) -> Duration {
        self.0.elapsed().saturating_sub(engine.settling() - self.1)
    }
}

/// What [`generate`] did.
#[derive(Clone, Debug)]
pub struct Generated {
    /// Why it ended.
    pub finish: FinishReason,
    /// The generated tokens, a stop token included.
    pub tokens: Vec<u32>,
    /// Time for the prompt, up to the logits of its last token.
    pub prompt_time: Duration,
    /// Time from there on, without what the engine settled: see [`Engine::settling`].
    pub decode_time: Duration,
    /// Tokens that [`Speculation`](super::Speculation) proposed.
    pub proposed: usize,
    /// How many of them were the right ones.
    pub accepted: usize,
    /// False where the text ended before it had the form of [`StopConditions::constraint`].
    pub complete: bool,
}

/// Continues `sequence` with `prompt` and then with sampled tokens until something ends it. Text is handed to `emit` in
/// whole characters as soon as no stop string can begin in it. `emit` is called after every token, perhaps with nothing,
/// and may end the generation.
///
/// The engine's sequence afterwards holds the prompt and all generated tokens but the last; without the prompt if
/// [`Engine::cancel_by`] ended it there, and without the last tokens where the constraint left no choice of them.
///
/// # Errors
/// As [`Engine::feed`], [`Error::Sample`] where the logits allow no choice, [`Error::Constraint`], and
/// [`Error::NoTokenizer`].
pub fn generate(
    engine: &mut Engine,
    sequence: SequenceId,
    prompt: &[u32],
    sampler: &mut Sampler,
    stop: &StopConditions,
    emit: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generated, Error> {
    if prompt.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    let watch = Watch::start(engine);
    let whole = [engine.tokens(sequence), prompt].concat();
    let mut text = Generation::new(engine, sequence, whole, stop.clone())?;
    let generated = decode(engine, &mut text, sampler, emit, &watch);
    // What was proposed and did not come.
    engine.truncate(sequence, text.len() - 1);
    generated
}

fn decode(
    engine: &mut Engine,
    text: &mut Generation,
    sampler: &mut Sampler,
    emit: &mut Emit<'_>,
    watch: &Watch,
) -> Result<Generated, Error> {
    let mut prompt_time = None;
    let finish = loop {
        if let Some(finish) = text.prepare(sampler, true, emit)? {
            break finish;
        }
        let (sequence, step) = (text.sequence, Watch::start(engine));
        let computed = engine.tokens(sequence).len();
        let mut feed = |text: &Generation, sampler: &mut Sampler| {
            let wanted = &text.wanted(sampler)[..=text.guesses];
            let feed = Feed { sequence, tokens: &text.tokens[computed..], wanted: Wanted::Tail(wanted) };
            engine.feed(&[feed]).map(drop)
        };
        match feed(text, sampler) {
            Err(Error::Cancelled) => break FinishReason::Cancelled,
            // Without the guesses it may fit.
            Err(Error::CacheFull { .. }) if text.guesses > 0 => {
                text.drop_guesses();
                feed(text, sampler)?;
            }
            fed => fed?,
        }
        prompt_time.get_or_insert_with(|| watch.elapsed(engine));
        // Steps are slower before, and say nothing of those to come.
        if engine.is_settled() {
            text.took(text.tokens.len() - computed, step.elapsed(engine));
        }
        if let Some(finish) = text.take(engine, 0, sampler, emit)? {
            break finish;
        }
        engine.truncate(sequence, text.len() - 1);
    };
    let (finish, complete) = text.finish(finish, emit)?;
    let prompt_time = prompt_time.unwrap_or_default();
    Ok(Generated {
        finish,
        tokens: text.tokens[text.first..].to_vec(),
        prompt_time,
        decode_time: watch.elapsed(engine).saturating_sub(prompt_time),
        proposed: text.proposed,
        accepted: text.accepted,
        complete,
    })
}
