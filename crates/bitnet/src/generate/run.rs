use super::speculate::Speculator;
use super::{FinishReason, MOST_PROPOSED, Sampler, StopConditions};
use crate::text::{StopStrings, TextStream};
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
}

/// Continues `sequence` with `prompt` and then with sampled tokens until something ends it. Text is handed to `emit` in
/// whole characters as soon as no stop string can begin in it. `emit` is called after every token, perhaps with nothing,
/// and may end the generation.
///
/// The engine's sequence afterwards holds the prompt and all generated tokens but the last; without the prompt if
/// [`Engine::cancel_by`] ended it there.
///
/// # Errors
/// As [`Engine::feed`], [`Error::Sample`] where the logits allow no choice, and [`Error::NoTokenizer`].
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
    let (mut text, mut stops) = (TextStream::default(), StopStrings::new(&stop.strings));
    let mut prompt_time = Duration::ZERO;
    let (mut proposed, mut accepted) = (0, 0);
    let done = |finish, history: &[u32], prompt_time, proposed, accepted| Generated {
        finish,
        tokens: history[first..].to_vec(),
        prompt_time,
        decode_time: start.elapsed().saturating_sub(prompt_time),
        proposed,
        accepted,
    };
    if stop.max_tokens == Some(0) {
        return Ok(done(FinishReason::Length, history, prompt_time, 0, 0));
    }
    let mut speculator = Speculator::new(stop.speculation, history, end);
    // What is fed: the prompt, later the last token and `guesses` more that may follow it.
    let (mut next, mut guesses) = (prompt.to_vec(), 0);
    next.reserve(1 + MOST_PROPOSED);
    let finish = 'steps: loop {
        let guessed = &next[next.len() - guesses..];
        let logits = sampler.wanted_while(history, guessed);
        let wanted = if guesses > 0 { Wanted::All(logits) } else { Wanted::Last(logits) };
        let step = Instant::now();
        match engine.feed(&[Feed { sequence, tokens: &next, wanted }]) {
            Err(Error::Cancelled) => break FinishReason::Cancelled,
            // Without the guesses it may fit.
            Err(Error::CacheFull { .. }) if guesses > 0 => {
                next.truncate(1);
                guesses = 0;
                continue;
            }
            logits => drop(logits?),
        }
        if history.len() == first {
            prompt_time = start.elapsed();
        } else {
            speculator.took(1 + guesses, step.elapsed());
        }
        proposed += guesses;
        for row in 0..=guesses {
            let id = sampler.sample(engine.logits(row), history)?;
            history.push(id);
            let guess = next[next.len() - guesses..].get(row);
            let right = guess == Some(&id);
            accepted += usize::from(right);
            let ended = stop.check(id, history.len() - first);
            if !matches!(ended, Some(FinishReason::StopToken(_))) {
                let bytes = engine.model().tokenizer()?.token_bytes(id).unwrap_or_default();
                let out = stops.push(text.push(bytes));
                let matched = out.stop;
                let cancelled = emit(out.text).is_break();
                if let Some(index) = matched {
                    let finish = FinishReason::StopString(stop.strings[index].clone());
                    return Ok(done(finish, history, prompt_time, proposed, accepted));
                }
                if cancelled {
                    break 'steps FinishReason::Cancelled;
                }
            }
            if let Some(finish) = ended {
                break 'steps finish;
            }
            if history.len() >= context {
                break 'steps FinishReason::ContextFull;
            }
            speculator.push(history);
            if !right {
                break;
            }
        }
        engine.truncate(sequence, history.len() - 1);
        next.clear();
        next.extend(history.last());
        // Each step gives one token more than were guessed.
        let room = (end - history.len()).min(engine.options().max_rows) - 1;
        guesses = speculator.propose(history, room, &mut next);
    };
    // What was held back: the start of a stop string that did not come, an unfinished character.
    let rest = text.finish().to_owned();
    let out = stops.push(&rest);
    let (mut tail, matched) = (out.text.to_owned(), out.stop);
    let finish = match matched {
        Some(index) => FinishReason::StopString(stop.strings[index].clone()),
        None => {
            tail.push_str(&stops.finish());
            finish
        }
    };
    if !tail.is_empty() {
        let _ = emit(&tail);
    }
    Ok(done(finish, history, prompt_time, proposed, accepted))
}
