use super::constraint::Masks;
use super::speculate::Speculator;
use super::stop::Output;
use super::{FinishReason, MOST_PROPOSED, Sampler, StopConditions};
use crate::{Engine, Error, Feed, SequenceId, Wanted};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// What [`generate`] did.
#[derive(Clone, Debug)]
pub struct Generated {
    /// Why it ended.
    pub finish: FinishReason,
    /// The generated tokens, a stop token included.
    pub tokens: Vec<u32>,
    /// Time for the prompt, up to the logits of its last token.
    pub prompt_time: Duration,
    /// Time from there on.
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
    let mut history = engine.tokens(sequence).to_vec();
    history.extend(prompt);
    let generated = decode(engine, sequence, prompt, &mut history, sampler, stop, emit);
    // What was proposed and did not come.
    engine.truncate(sequence, history.len() - 1);
    generated
}

/// [`generate`], after `history`, which ends with the prompt; the sequence may be left with more than it.
fn decode(
    engine: &mut Engine,
    sequence: SequenceId,
    prompt: &[u32],
    history: &mut Vec<u32>,
    sampler: &mut Sampler,
    stop: &StopConditions,
    emit: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generated, Error> {
    let context = engine.options().context;
    let start = Instant::now();
    let first = history.len();
    // The length at which it ends.
    let end = first.saturating_add(stop.max_tokens.unwrap_or(usize::MAX)).min(context);
    history.reserve(end.saturating_sub(first).min(stop.max_tokens.unwrap_or(0)));
    let mut masks = match &stop.constraint {
        Some(constraint) => {
            let text = &history[first - stop.begun.min(first)..];
            let vocab_size = engine.model().config().vocab_size;
            Some(Masks::new(&**constraint, text, &stop.ids, vocab_size)?)
        }
        None => None,
    };
    let mut speculator = Speculator::new(stop.speculation, history, end);
    let mut writer = Writer { text: Output::new(&stop.strings), stop, first, emit };
    let mut prompt_time = None;
    let (mut proposed, mut accepted) = (0, 0);
    // What is fed: the prompt, later the last token and those that the constraint forced after it; and `guesses` more that
    // may follow.
    let (mut next, mut guesses) = (prompt.to_vec(), 0);
    next.reserve(1 + MOST_PROPOSED);
    let finish = 'steps: loop {
        if stop.max_tokens == Some(0) {
            break FinishReason::Length;
        }
        if let Some(masks) = &mut masks {
            loop {
                if !masks.find(0)? {
                    break 'steps FinishReason::Complete;
                }
                let Some(id) = masks.forced().filter(|&id| sampler.force(id)) else { break };
                history.push(id);
                next.push(id);
                masks.push(id)?;
                speculator.push(history);
                if let Some(finish) = writer.take(engine, history)? {
                    break 'steps finish;
                }
            }
        }
        if prompt_time.is_some() {
            // Each step gives one token more than were guessed.
            let room = (end - history.len()).min(engine.options().max_rows) - 1;
            guesses = speculator.propose(history, room, &mut next);
        }
        let step = Instant::now();
        let sure = next.len() - guesses;
        if let Some(masks) = &mut masks {
            guesses = masks.look_ahead(&next[sure..])?;
            next.truncate(sure + guesses);
        }
        let guessed = &next[sure..];
        let logits = sampler.wanted_while(history, guessed);
        let mut each = [logits; 1 + MOST_PROPOSED];
        if let Some(masks) = &masks {
            each.iter_mut().enumerate().take(1 + guesses).for_each(|(row, l)| *l = masks.wanted(row, *l));
        }
        match engine.feed(&[Feed { sequence, tokens: &next, wanted: Wanted::Tail(&each[..1 + guesses]) }]) {
            Err(Error::Cancelled) => break FinishReason::Cancelled,
            // Without the guesses it may fit.
            Err(Error::CacheFull { .. }) if guesses > 0 => {
                next.truncate(sure);
                guesses = 0;
                let wanted = Wanted::Tail(&each[..1]);
                let _ = engine.feed(&[Feed { sequence, tokens: &next, wanted }])?;
            }
            logits => drop(logits?),
        }
        if prompt_time.is_none() {
            prompt_time = Some(start.elapsed());
        } else if sure == 1 {
            speculator.took(1 + guesses, step.elapsed());
        }
        proposed += guesses;
        for row in 0..=guesses {
            let allowed = masks.as_ref().map(|masks| masks.bits(row));
            let id = sampler.sample_among(engine.logits(row), history, allowed)?;
            history.push(id);
            let guess = next[sure..].get(row);
            let right = guess == Some(&id);
            accepted += usize::from(right);
            if let Some(masks) = masks.as_mut().filter(|_| !stop.ids.contains(&id)) {
                masks.push(id)?;
            }
            if let Some(finish) = writer.take(engine, history)? {
                break 'steps finish;
            }
            speculator.push(history);
            if !right {
                break;
            }
        }
        engine.truncate(sequence, history.len() - 1);
        next.clear();
        next.extend(history.last());
    };
    let finish = writer.finish(finish);
    let complete = match (&finish, &mut masks) {
        (_, None) | (FinishReason::StopToken(_) | FinishReason::Complete, _) => true,
        (_, Some(masks)) => masks.may_end()?,
    };
    let prompt_time = prompt_time.unwrap_or_default();
    Ok(Generated {
        finish,
        tokens: history[first..].to_vec(),
        prompt_time,
        decode_time: start.elapsed().saturating_sub(prompt_time),
        proposed,
        accepted,
        complete,
    })
}

/// Where the text goes.
struct Writer<'a> {
    text: Output,
    stop: &'a StopConditions,
    /// Where the text begins in the history.
    first: usize,
    emit: &'a mut dyn FnMut(&str) -> ControlFlow<()>,
}

impl Writer<'_> {
    /// Writes the text of the last token of `history`. Why the generation ends with it, if it does.
    fn take(&mut self, engine: &Engine, history: &[u32]) -> Result<Option<FinishReason>, Error> {
        let Some(&id) = history.last() else { return Ok(None) };
        let ended = self.stop.check(id, history.len() - self.first);
        if !matches!(ended, Some(FinishReason::StopToken(_))) {
            let bytes = engine.model().tokenizer()?.token_bytes(id).unwrap_or_default();
            let (part, matched) = self.text.push(bytes);
            let cancelled = (self.emit)(part).is_break();
            if let Some(index) = matched {
                return Ok(Some(FinishReason::StopString(self.stop.strings[index].clone())));
            }
            if cancelled {
                return Ok(Some(FinishReason::Cancelled));
            }
        }
        let full = history.len() >= engine.options().context;
        Ok(ended.or(full.then_some(FinishReason::ContextFull)))
    }

    /// Writes what was held back: the start of a stop string that did not come, an unfinished character.
    fn finish(mut self, finish: FinishReason) -> FinishReason {
        if matches!(finish, FinishReason::StopString(_)) {
            return finish;
        }
        let (tail, matched) = self.text.finish();
        if !tail.is_empty() {
            let _ = (self.emit)(&tail);
        }
        matched.map_or(finish, |index| FinishReason::StopString(self.stop.strings[index].clone()))
    }
}
