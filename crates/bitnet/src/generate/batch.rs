//! Many generations at once: in each step every running one gets a token, and new prompts fill the rows that are left.
//!
//! A request joins as soon as the cache has room for all it may need, so none is ever thrown out again. What its prompt has
//! in common with a sequence that is there, running or ended, is taken over from it; where one that runs will soon have
//! more of it, the request waits for that.

use super::stop::Output;
use super::{ConstraintError, FinishReason, Sampler, StopConditions};
use crate::{Engine, Error, Feed, SequenceId, Wanted};
use bitnet_kernels::PAGE;
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

/// Tokens in common that are worth being taken over or waited for.
const WORTH_SHARING: usize = 8;

/// A prompt to continue.
pub struct Request {
    /// Its tokens.
    pub prompt: Vec<u32>,
    /// What chooses the tokens after it.
    pub sampler: Sampler,
    /// What ends it. There is no speculation in a batch, and no constraint.
    pub stop: StopConditions,
}

/// A request of a batch; later ones are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

/// What became of a request.
#[derive(Debug)]
pub struct Ended {
    /// Why it ended.
    pub finish: FinishReason,
    /// The generated tokens, a stop token included.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt, and how many of them had been computed for others.
    pub prompt_tokens: usize,
    /// See above.
    pub shared_tokens: usize,
}

/// News of a request.
#[derive(Debug)]
pub enum Event<'a> {
    /// More text, in whole characters and never the start of a stop string.
    Text(&'a str),
    /// The request has ended; the last of it.
    Ended(Result<Ended, Error>),
}

/// Counts over all requests of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchCounts {
    /// Prompt tokens that were computed.
    pub prompt_tokens: usize,
    /// Prompt tokens that had been computed for others.
    pub shared_tokens: usize,
    /// Tokens that were generated.
    pub generated_tokens: usize,
    /// Steps of the engine.
    pub steps: usize,
}

/// An engine that continues many prompts together. The text of each is that of [`generate`](super::generate) alone.
pub struct Batch {
    engine: Engine,
    width: usize,
    queue: VecDeque<(RequestId, Request)>,
    running: Vec<Running>,
    /// Sequences of requests that have ended, the one last used last.
    kept: Vec<SequenceId>,
    next: u64,
    counts: BatchCounts,
}

struct Running {
    id: RequestId,
    sequence: SequenceId,
    /// Prompt and generated tokens.
    tokens: Vec<u32>,
    prompt: usize,
    shared: usize,
    /// Pages that it may come to hold.
    pages: usize,
    sampler: Sampler,
    stop: StopConditions,
    text: Output,
    sampled: Option<Result<u32, Error>>,
}

impl Batch {
    /// Of up to `width` requests at once, as far as the engine's cache goes.
    pub fn new(engine: Engine, width: usize) -> Self {
        Self {
            engine,
            width: width.max(1),
            queue: VecDeque::new(),
            running: Vec::new(),
            kept: Vec::new(),
            next: 0,
            counts: BatchCounts::default(),
        }
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }
    /// What was done so far.
    pub fn counts(&self) -> BatchCounts {
        self.counts
    }
    /// Requests that wait for their turn.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }
    /// Whether no request is left.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.running.is_empty()
    }

    /// Adds a request, which begins with a later [`Self::step`].
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::ContextFull`], [`Error::Constraint`] for any constraint, and [`Error::TokenOutOfRange`] for a token of the prompt or of a bias.
    pub fn push(&mut self, request: Request) -> Result<RequestId, Error> {
        let (needed, context) = (request.prompt.len(), self.engine.options().context);
        let vocab_size = self.engine.model().config().vocab_size;
        if needed == 0 {
            return Err(Error::EmptyPrompt);
        }
        if request.stop.constraint.is_some() {
            return Err(ConstraintError("no constraint is possible in a batch".to_owned()).into());
        }
        if needed > context {
            return Err(Error::ContextFull { needed, context });
        }
        let biases = request.sampler.config().logit_bias.iter().map(|(id, _)| id);
        for (index, &id) in request.prompt.iter().enumerate().chain(biases.enumerate()) {
            if id as usize >= vocab_size {
                return Err(Error::TokenOutOfRange { index, id, vocab_size });
            }
        }
        let id = RequestId(self.next);
        self.next += 1;
        self.queue.push_back((id, request));
        Ok(id)
    }

    /// Forgets a request; nothing more comes of it.
    pub fn cancel(&mut self, id: RequestId) {
        self.queue.retain(|(queued, _)| *queued != id);
        if let Some(at) = self.running.iter().position(|running| running.id == id) {
            self.end(at);
        }
    }

    /// One step: a token for every request whose prompt is computed, and as much of the other prompts as fits in the
    /// engine's rows. Tells `news` what came of it.
    ///
    /// # Errors
    /// [`Error::Cancelled`] by the engine's flag; the requests are then as they were. What is wrong with one request is
    /// told to `news`.
    pub fn step(&mut self, news: &mut dyn FnMut(RequestId, Event<'_>)) -> Result<(), Error> {
        self.admit(news);
        let sampled = loop {
            match self.feed() {
                // What has ended makes room for what runs.
                Err(Error::CacheFull { .. }) if !self.kept.is_empty() => {
                    self.engine.close(self.kept.remove(0));
                }
                Err(error @ (Error::Cancelled | Error::CacheFull { .. })) => return Err(error),
                Err(error) => return self.find_culprits(error, news),
                Ok(sampled) => break sampled,
            }
        };
        self.counts.steps += usize::from(!self.running.is_empty());
        self.counts.generated_tokens += sampled;
        let mut at = 0;
        while at < self.running.len() {
            match self.running[at].take_sampled(&self.engine, news) {
                Some(result) => {
                    let id = self.end(at);
                    news(id, Event::Ended(result));
                }
                None => at += 1,
            }
        }
        Ok(())
    }

    /// Lets requests in while there is room for them.
    fn admit(&mut self, news: &mut dyn FnMut(RequestId, Event<'_>)) {
        while self.running.len() < self.width
            && let Some((id, request)) = self.queue.front()
        {
            let (id, Request { prompt, stop, .. }) = (*id, request);
            if stop.max_tokens == Some(0) {
                let nothing = Ended {
                    finish: FinishReason::Length,
                    tokens: Vec::new(),
                    prompt_tokens: prompt.len(),
                    shared_tokens: 0,
                };
                self.queue.pop_front();
                news(id, Event::Ended(Ok(nothing)));
                continue;
            }
            let longest = prompt.len().saturating_add(stop.max_tokens.unwrap_or(usize::MAX));
            let pages = longest.min(self.engine.options().context).div_ceil(PAGE);
            let taken: usize = self.running.iter().map(|running| running.pages).sum();
            if taken + pages > self.engine.pages() {
                break;
            }
            // The last token is computed anew, for its logits.
            let most = prompt.len() - 1;
            let common =
                |tokens: &[u32]| prompt[..most].iter().zip(tokens).take_while(|(a, b)| a == b).count();
            let sequences =
                self.running.iter().map(|running| running.sequence).chain(self.kept.iter().copied());
            let computed = sequences.map(|sequence| (common(self.engine.tokens(sequence)), sequence));
            let best = computed.max_by_key(|(common, _)| *common);
            let shared = best.map_or(0, |(common, _)| common);
            let coming = self.running.iter().map(|running| common(&running.tokens[..running.prompt])).max();
            if coming.unwrap_or(0) >= shared + WORTH_SHARING {
                break;
            }
            let (sequence, shared) = match best {
                Some((common, from)) if common >= WORTH_SHARING => {
                    if let Some(at) = self.kept.iter().position(|kept| *kept == from) {
                        self.kept[at..].rotate_left(1);
                    }
                    (self.engine.fork(from, common), common)
                }
                _ => (self.engine.open(), 0),
            };
            let Some((id, Request { prompt, sampler, stop })) = self.queue.pop_front() else { break };
            self.counts.shared_tokens += shared;
            self.counts.prompt_tokens += prompt.len() - shared;
            let text = Output::new(&stop.strings);
            let (tokens, prompt) = (prompt.clone(), prompt.len());
            self.running.push(Running {
                id,
                sequence,
                tokens,
                prompt,
                shared,
                pages,
                sampler,
                stop,
                text,
                sampled: None,
            });
        }
    }

    /// Computes a step and chooses tokens; how many.
    fn feed(&mut self) -> Result<usize, Error> {
        let Self { engine, running, .. } = self;
        let todo: Vec<usize> = running
            .iter()
            .map(|running| running.tokens.len() - engine.tokens(running.sequence).len())
            .collect();
        let decoding = todo.iter().filter(|&&todo| todo == 1).count();
        let mut rows = engine.options().max_rows.saturating_sub(decoding);
        let mut feeds = Vec::with_capacity(todo.len());
        let mut wanting = Vec::with_capacity(todo.len());
        for (at, (running, &todo)) in running.iter_mut().zip(&todo).enumerate() {
            let take = if todo == 1 { 1 } else { todo.min(rows) };
            if take == 0 {
                continue;
            }
            rows -= if todo == 1 { 0 } else { take };
            let Running { sequence, tokens, sampler, .. } = running;
            let from = tokens.len() - todo;
            let wanted = if take == todo { Wanted::Last(sampler.wanted(tokens)) } else { Wanted::Nothing };
            if take == todo {
                wanting.push(at);
            }
            feeds.push(Feed { sequence: *sequence, tokens: &tokens[from..from + take], wanted });
        }
        engine.feed(&feeds)?;
        // Each on a thread of its own: with many sequences the choice would be a part of the time worth speaking of.
        let rows = wanting.len();
        let mut chosen = wanting.into_iter().peekable();
        let running = running.iter_mut().enumerate().filter(|(at, _)| chosen.next_if_eq(at).is_some());
        let tasks: Vec<_> = running
            .enumerate()
            .map(|(row, (_, running))| Mutex::new((running, engine.logits(row))))
            .collect();
        engine.compute().pool().run(tasks.len(), |task, _| {
            let mut task = tasks[task].lock().unwrap_or_else(PoisonError::into_inner);
            let (running, logits) = &mut *task;
            running.sampled = Some(running.sampler.sample(logits, &running.tokens).map_err(Error::from));
        });
        Ok(rows)
    }

    /// After a step that failed: ends the requests that cannot be computed on their own either.
    fn find_culprits(
        &mut self,
        error: Error,
        news: &mut dyn FnMut(RequestId, Event<'_>),
    ) -> Result<(), Error> {
        for sequence in self.kept.drain(..) {
            self.engine.close(sequence);
        }
        let before = self.running.len();
        let mut at = 0;
        while at < self.running.len() {
            let Running { sequence, tokens, .. } = &self.running[at];
            let (sequence, computed) = (*sequence, self.engine.tokens(*sequence).len());
            let alone = Feed { sequence, tokens: &tokens[computed..], wanted: Wanted::Nothing };
            match self.engine.feed(&[alone]).map(drop) {
                Ok(()) => {
                    self.engine.truncate(sequence, computed);
                    at += 1;
                }
                Err(error @ (Error::Cancelled | Error::CacheFull { .. })) => return Err(error),
                Err(error) => {
                    let id = self.end(at);
                    news(id, Event::Ended(Err(error)));
                }
            }
        }
        if self.running.len() < before { Ok(()) } else { Err(error) }
    }

    /// Removes a running request and keeps its sequence for others.
    fn end(&mut self, at: usize) -> RequestId {
        let ended = self.running.remove(at);
        self.kept.push(ended.sequence);
        if self.kept.len() > self.width {
            self.engine.close(self.kept.remove(0));
        }
        ended.id
    }
}

impl Running {
    /// Adds the token that was chosen, if one was. What became of the request, if that ended it.
    fn take_sampled(
        &mut self,
        engine: &Engine,
        news: &mut dyn FnMut(RequestId, Event<'_>),
    ) -> Option<Result<Ended, Error>> {
        let id = match self.sampled.take()? {
            Ok(id) => id,
            Err(error) => return Some(Err(error)),
        };
        self.tokens.push(id);
        let ended = self.stop.check(id, self.tokens.len() - self.prompt);
        let mut matched = None;
        if !matches!(ended, Some(FinishReason::StopToken(_))) {
            let tokenizer = match engine.model().tokenizer() {
                Ok(tokenizer) => tokenizer,
                Err(error) => return Some(Err(error)),
            };
            let (text, stop) = self.text.push(tokenizer.token_bytes(id).unwrap_or_default());
            matched = stop;
            if !text.is_empty() {
                news(self.id, Event::Text(text));
            }
        }
        let full = self.tokens.len() >= engine.options().context;
        let finish = match (matched, ended) {
            (Some(_), _) => None,
            (None, Some(finish)) => Some(finish),
            (None, None) if full => Some(FinishReason::ContextFull),
            (None, None) => return None,
        };
        if finish.is_some() {
            let (tail, stop) = self.text.finish();
            matched = stop;
            if !tail.is_empty() {
                news(self.id, Event::Text(&tail));
            }
        }
        let finish = match (matched, finish) {
            (None, Some(finish)) => finish,
            (matched, _) => FinishReason::StopString(self.stop.strings[matched.unwrap_or(0)].clone()),
        };
        Some(Ok(Ended {
            finish,
            tokens: self.tokens.split_off(self.prompt),
            prompt_tokens: self.prompt,
            shared_tokens: self.shared,
        }))
    }
}
