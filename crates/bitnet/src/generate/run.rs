use super::{FinishReason, Sampler, StopConditions};
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
}

/// Continues `sequence` with `prompt` and then with sampled tokens until something ends it. Text is handed to `emit` in
/// whole characters as soon as no stop string can begin in it. `emit` is called after every token, perhaps with nothing,
/// and may end the generation.
///
/// The engine's sequence afterwards holds the prompt and all generated tokens but the last.
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
    let context = engine.options().context;
    let start = Instant::now();
    let mut history = engine.tokens(sequence).to_vec();
    history.extend(prompt);
    history.reserve(stop.max_tokens.unwrap_or(0).min(context));
    let first = history.len();
    let (mut text, mut stops) = (TextStream::default(), StopStrings::new(&stop.strings));
    let mut prompt_time = Duration::ZERO;
    let done = |finish, history: &[u32], prompt_time| Generated {
        finish,
        tokens: history[first..].to_vec(),
        prompt_time,
        decode_time: start.elapsed().saturating_sub(prompt_time),
    };
    if stop.max_tokens == Some(0) {
        return Ok(done(FinishReason::Length, &history, prompt_time));
    }
    let mut next = prompt.to_vec();
    let finish = loop {
        let feed = Feed { sequence, tokens: &next, wanted: Wanted::Last(sampler.wanted(&history)) };
        let logits = engine.feed(&[feed])?;
        let id = sampler.sample(logits, &history)?;
        if history.len() == first {
            prompt_time = start.elapsed();
        }
        history.push(id);
        let ended = stop.check(id, history.len() - first);
        if !matches!(ended, Some(FinishReason::StopToken(_))) {
            let bytes = engine.model().tokenizer()?.token_bytes(id).unwrap_or_default();
            let out = stops.push(text.push(bytes));
            let matched = out.stop;
            let cancelled = emit(out.text).is_break();
            if let Some(index) = matched {
                return Ok(done(
                    FinishReason::StopString(stop.strings[index].clone()),
                    &history,
                    prompt_time,
                ));
            }
            if cancelled {
                break FinishReason::Cancelled;
            }
        }
        if let Some(finish) = ended {
            break finish;
        }
        if history.len() >= context {
            break FinishReason::ContextFull;
        }
        next.clear();
        next.push(id);
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
    Ok(done(finish, &history, prompt_time))
}
