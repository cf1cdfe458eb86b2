//! One text that grows: what [`generate`](super::generate) does for its one and [`Batch`](super::Batch) for each of its.

use super::constraint::Masks;
use super::speculate::Speculator;
use super::stop::Output;
use super::{FinishReason, MOST_PROPOSED, Sampler, StopConditions};
use crate::text::Tokenizer;
use crate::{Engine, Error, SequenceId};
use bitnet_kernels::Logits;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

/// Takes text; it may end the generation.
pub(super) type Emit<'a> = dyn FnMut(&str) -> ControlFlow<()> + 'a;

/// A text between two steps of the engine: [`Self::prepare`], a feed of what its sequence has not yet of `tokens`, which
/// wants [`Self::wanted`], and [`Self::take`].
pub(super) struct Generation {
    pub(super) sequence: SequenceId,
    /// Prompt, generated tokens and, at the end, guesses.
    pub(super) tokens: Vec<u32>,
    /// Tokens at the end that the next step checks.
    pub(super) guesses: usize,
    /// Tokens of the prompt.
    pub(super) first: usize,
    pub(super) stop: StopConditions,
    pub(super) proposed: usize,
    pub(super) accepted: usize,
    /// The length at which it ends.
    end: usize,
    context: usize,
    max_rows: usize,
    vocab_size: usize,
    tokenizer: Arc<Tokenizer>,
    text: Output,
    masks: Option<Masks>,
    /// Whether `masks` are those of the next token.
    masked: bool,
    speculator: Speculator,
    /// Whether the prompt is computed.
    begun: bool,
}

impl Generation {
    /// After `prompt`, of which `sequence` may have a part.
    pub(super) fn new(
        engine: &Engine,
        sequence: SequenceId,
        prompt: Vec<u32>,
        stop: StopConditions,
    ) -> Result<Self, Error> {
        let first = prompt.len();
        let context = engine.options().context;
        let end = first.saturating_add(stop.max_tokens.unwrap_or(usize::MAX)).min(context);
        let tokenizer = engine.model().tokenizer()?.clone();
        let mut text = Output::new(&stop.strings);
        for &id in &prompt[first - stop.begun.min(first)..] {
            text.push(tokenizer.token_bytes(id).unwrap_or_default());
        }
        let mut tokens = prompt;
        tokens.reserve(MOST_PROPOSED + end.saturating_sub(first).min(stop.max_tokens.unwrap_or(0)));
        let mut new = Self {
            sequence,
            guesses: 0,
            first,
            proposed: 0,
            accepted: 0,
            end,
            context,
            max_rows: engine.options().max_rows,
            vocab_size: engine.model().config().vocab_size,
            tokenizer,
            text,
            masks: None,
            masked: false,
            speculator: Speculator::new(stop.speculation, &tokens, end),
            begun: false,
            tokens,
            stop,
        };
        new.start_masks()?;
        Ok(new)
    }

    /// Tells the constraint of the text so far.
    fn start_masks(&mut self) -> Result<(), Error> {
        let text = &self.tokens[self.first - self.stop.begun.min(self.first)..self.len()];
        let Some(constraint) = &self.stop.constraint else { return Ok(()) };
        self.masks = Some(Masks::new(&**constraint, text, &self.stop.ids, self.vocab_size)?);
        Ok(())
    }

    /// Tokens without the guesses.
    pub(super) fn len(&self) -> usize {
        self.tokens.len() - self.guesses
    }

    pub(super) fn drop_guesses(&mut self) {
        self.tokens.truncate(self.len());
        self.guesses = 0;
    }

    /// Adds the tokens that the constraint leaves no choice of, and guesses where they are wanted. May be repeated. Why the
    /// text ends, if it does.
    pub(super) fn prepare(
        &mut self,
        sampler: &mut Sampler,
        guess: bool,
        emit: &mut Emit<'_>,
    ) -> Result<Option<FinishReason>, Error> {
        if self.stop.max_tokens == Some(0) {
            return Ok(Some(FinishReason::Length));
        }
        self.drop_guesses();
        while let Some(masks) = self.masks.as_mut().filter(|_| !self.masked) {
            if !masks.find(0)? {
                return Ok(Some(FinishReason::Complete));
            }
            let Some(id) = masks.forced().filter(|&id| sampler.force(id)) else {
                self.masked = true;
                break;
            };
            if let Some(finish) = self.push(id, emit)? {
                return Ok(Some(finish));
            }
        }
        if guess && self.begun {
            // Each step gives one token more than were guessed.
            let len = self.len();
            let room = (self.end - len).min(self.max_rows) - 1;
            self.guesses = self.speculator.propose(room, &mut self.tokens);
            if let Some(masks) = &mut self.masks {
                let guesses = masks.look_ahead(&self.tokens[len..]);
                self.guesses = *guesses.as_ref().unwrap_or(&0);
                self.tokens.truncate(len + self.guesses);
                if guesses.is_err() {
                    // A guess was too much for it, and may have left it broken.
                    self.start_masks()?;
                    self.masks.as_mut().map_or(Ok(true), |masks| masks.find(0))?;
                }
            }
        }
        Ok(None)
    }

    /// The logits that the choice after the last sure token, and after each guess, looks at: `1 + guesses`, and others that
    /// mean nothing.
    pub(super) fn wanted<'a>(&'a self, sampler: &'a mut Sampler) -> [Logits<'a>; 1 + MOST_PROPOSED] {
        let (sure, guesses) = self.tokens.split_at(self.len());
        let logits = sampler.wanted_while(sure, guesses);
        let mut each = [logits; 1 + MOST_PROPOSED];
        if let Some(masks) = &self.masks {
            each.iter_mut().enumerate().take(1 + self.guesses).for_each(|(i, l)| *l = masks.wanted(i, *l));
        }
        each
    }

    /// Takes note that a step for `fed` tokens of this text alone took so long.
    pub(super) fn took(&mut self, fed: usize, time: Duration) {
        if self.begun && fed == 1 + self.guesses {
            self.speculator.took(fed, time);
        }
    }

    /// Chooses tokens by the logits that were wanted, of which the engine has the first in `row`. Why the text ends, if it
    /// does.
    pub(super) fn take(
        &mut self,
        engine: &Engine,
        row: usize,
        sampler: &mut Sampler,
        emit: &mut Emit<'_>,
    ) -> Result<Option<FinishReason>, Error> {
        (self.begun, self.masked) = (true, false);
        self.proposed += self.guesses;
        for i in 0..=self.guesses {
            let allowed = self.masks.as_ref().map(|masks| masks.bits(i));
            let (sure, guesses) = self.tokens.split_at(self.len());
            let id = sampler.sample_among(engine.logits(row + i), sure, allowed)?;
            let right = guesses.first() == Some(&id);
            self.accepted += usize::from(right);
            if let Some(finish) = self.push(id, emit)? {
                return Ok(Some(finish));
            }
            if !right {
                break;
            }
        }
        Ok(None)
    }

    /// Adds a token and writes its text. Why the text ends with it, if it does.
    fn push(&mut self, id: u32, emit: &mut Emit<'_>) -> Result<Option<FinishReason>, Error> {
        if self.tokens.get(self.len()) == Some(&id) {
            self.guesses -= 1;
        } else {
            self.drop_guesses();
            self.tokens.push(id);
        }
        let len = self.len();
        if let Some(masks) = self.masks.as_mut().filter(|_| !self.stop.ids.contains(&id)) {
            masks.push(id)?;
        }
        self.speculator.push(&self.tokens[..len]);
        let ended = self.stop.check(id, len - self.first);
        if !matches!(ended, Some(FinishReason::StopToken(_))) {
            let (part, matched) = self.text.push(self.tokenizer.token_bytes(id).unwrap_or_default());
            let cancelled = emit(part).is_break();
            if let Some(index) = matched {
                return Ok(Some(self.stop_string(index)));
            }
            if cancelled {
                return Ok(Some(FinishReason::Cancelled));
            }
        }
        Ok(ended.or((len >= self.context).then_some(FinishReason::ContextFull)))
    }

    /// Writes what was held back: the start of a stop string that did not come, an unfinished character. Why the text ended
    /// at last, and whether it has the form of its constraint.
    pub(super) fn finish(
        &mut self,
        finish: FinishReason,
        emit: &mut Emit<'_>,
    ) -> Result<(FinishReason, bool), Error> {
        self.drop_guesses();
        let mut finish = finish;
        if !matches!(finish, FinishReason::StopString(_)) {
            let (tail, matched) = self.text.finish();
            if !tail.is_empty() {
                let _ = emit(&tail);
            }
            finish = matched.map_or(finish, |index| self.stop_string(index));
        }
        let complete = match (&finish, &mut self.masks) {
            (_, None) | (FinishReason::StopToken(_) | FinishReason::Complete, _) => true,
            (_, Some(masks)) => masks.may_end()?,
        };
        Ok((finish, complete))
    }

    fn stop_string(&self, index: usize) -> FinishReason {
        FinishReason::StopString(self.stop.strings[index].clone())
    }
}
