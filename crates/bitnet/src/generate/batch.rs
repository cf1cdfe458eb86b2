//! Many generations at once: in each step every running one gets a token, and new prompts fill the rows that are left.
//!
//! A request joins as soon as the cache has room for all it may need, so none is ever thrown out again. What its prompt has
//! in common with a sequence that is there, running or ended, is taken over from it; where one that runs will soon have
//! more of it, the request waits for that.

use super::generation::Generation;
use super::run::Watch;
use super::{FinishReason, Sampler, StopConditions};
use crate::{Engine, Error, Feed, SequenceId, Wanted};
use bitnet_kernels::PAGE;
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::{Mutex, PoisonError};

/// Tokens in common that are worth being taken over or waited for.
const WORTH_SHARING: usize = 8;

/// A prompt to continue.
pub struct Request {
    /// Its tokens.
    pub prompt: Vec<u32>,
    /// What chooses the tokens after it.
    pub sampler: Sampler,
    /// What ends it, and what form it has. Speculation is only tried while it runs alone.
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
    /// False where the text ended before it had the form of [`StopConditions::constraint`].
    pub complete: bool,
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
    text: Generation,
    sampler: Sampler,
    shared: usize,
    /// Pages that it may come to hold.
    pages: usize,
    /// Where the engine has its logits, if the last step gave some.
    row: Option<usize>,
    /// Text that was not told yet.
    untold: String,
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
    /// [`Error::EmptyPrompt`], [`Error::ContextFull`], and [`Error::TokenOutOfRange`] for a token of the prompt or of a bias.
    pub fn push(&mut self, request: Request) -> Result<RequestId, Error> {
        let (needed, context) = (request.prompt.len(), self.engine.options().context);
        let vocab_size = self.engine.model().config().vocab_size;
        if needed == 0 {
            return Err(Error::EmptyPrompt);
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
        // Many rows in a step are fast enough, and guesses would make the others wait.
        let alone = self.running.len() == 1;
        self.each(news, |_, Running { text, sampler, untold, .. }| {
            text.prepare(sampler, alone, &mut |part| write(untold, part))
        });
        if self.running.is_empty() {
            return Ok(());
        }
        loop {
            match self.feed() {
                // What has ended makes room for what runs.
                Err(Error::CacheFull { .. }) if !self.kept.is_empty() => {
                    self.engine.close(self.kept.remove(0));
                }
                Err(Error::BadEmbedding { file, token }) => {
                    while let Some(at) = self.running.iter().position(|Running { text, .. }| {
                        text.tokens[self.engine.tokens(text.sequence).len()..].contains(&token)
                    }) {
                        let id = self.end(at);
                        news(id, Event::Ended(Err(Error::BadEmbedding { file: file.clone(), token })));
                    }
                    return Ok(());
                }
                fed => {
                    fed?;
                    break;
                }
            }
        }
        self.counts.steps += 1;
        self.each(news, |engine, Running { text, sampler, untold, row, .. }| match row.take() {
            Some(row) => text.take(engine, row, sampler, &mut |part| write(untold, part)),
            None => Ok(None),
        });
        Ok(())
    }

    /// Lets every running request do its part, each on a thread of its own, for with many the choice of tokens would be a
    /// part of the time worth speaking of. Tells `news` what came of it.
    fn each(
        &mut self,
        news: &mut dyn FnMut(RequestId, Event<'_>),
        part: impl Fn(&Engine, &mut Running) -> Result<Option<FinishReason>, Error> + Sync,
    ) {
        let engine = &self.engine;
        let tasks: Vec<_> =
            self.running.iter_mut().map(|running| Mutex::new((running, Ok(None), 0))).collect();
        engine.compute().pool().run(tasks.len(), |task, _| {
            let mut task = tasks[task].lock().unwrap_or_else(PoisonError::into_inner);
            let (running, result, more) = &mut *task;
            let before = running.text.len();
            *result = part(engine, running).and_then(|finish| running.finish(finish));
            *more = running.text.len() - before;
        });
        let results: Vec<_> = tasks
            .into_iter()
            .map(|task| {
                let (_, result, more) = task.into_inner().unwrap_or_else(PoisonError::into_inner);
                self.counts.generated_tokens += more;
                result
            })
            .collect();
        let mut at = 0;
        for result in results {
            let Running { id, text, untold, .. } = &mut self.running[at];
            let (id, sequence) = (*id, text.sequence);
            // What was guessed and did not come.
            self.engine.truncate(sequence, text.len() - 1);
            if !untold.is_empty() {
                news(id, Event::Text(untold));
                untold.clear();
            }
            match result.transpose() {
                Some(result) => {
                    self.end(at);
                    news(id, Event::Ended(result));
                }
                None => at += 1,
            }
        }
    }

    /// Lets requests in while there is room for them.
    fn admit(&mut self, news: &mut dyn FnMut(RequestId, Event<'_>)) {
        while self.running.len() < self.width
            && let Some((_, Request { prompt, stop, .. })) = self.queue.front()
        {
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
                self.running.iter().map(|running| running.text.sequence).chain(self.kept.iter().copied());
            let computed = sequences.map(|sequence| (common(self.engine.tokens(sequence)), sequence));
            let best = computed.max_by_key(|(common, _)| *common);
            let shared = best.map_or(0, |(common, _)| common);
            let prompts = self.running.iter().map(|Running { text, .. }| &text.tokens[..text.first]);
            if prompts.map(common).max().unwrap_or(0) >= shared + WORTH_SHARING {
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
            // A text of no tokens does not need its prompt.
            let computed = if stop.max_tokens == Some(0) { 0 } else { prompt.len() - shared };
            match Generation::new(&self.engine, sequence, prompt, stop) {
                Ok(text) => {
                    self.counts.shared_tokens += shared;
                    self.counts.prompt_tokens += computed;
                    let untold = String::new();
                    self.running.push(Running { id, text, sampler, shared, pages, row: None, untold });
                }
                Err(error) => {
                    self.engine.close(sequence);
                    news(id, Event::Ended(Err(error)));
                }
            }
        }
    }

    /// Computes a step.
    fn feed(&mut self) -> Result<(), Error> {
        let Self { engine, running, .. } = self;
        let alone = running.len() == 1;
        // Tokens of a text, and how many of them the next step must compute.
        let todo = |text: &Generation| text.len() - engine.tokens(text.sequence).len();
        let decoding = running.iter().filter(|running| todo(&running.text) == 1).count();
        let mut rows = engine.options().max_rows.saturating_sub(decoding);
        let mut next = 0;
        let mut parts = Vec::with_capacity(running.len());
        for Running { text, sampler, row, .. } in running.iter_mut() {
            let todo = todo(text);
            let (take, whole) = if todo == 1 { (1, true) } else { (todo.min(rows), todo <= rows) };
            rows -= if todo == 1 { 0 } else { take };
            let guesses = if whole { text.guesses } else { 0 };
            *row = whole.then_some(next);
            next += if whole { 1 + guesses } else { 0 };
            let text = &*text;
            let from = text.len() - todo;
            let tokens = &text.tokens[from..from + take + guesses];
            parts.push((text.sequence, tokens, whole.then(|| (text.wanted(sampler), guesses))));
        }
        let feeds = parts.iter().filter(|(_, tokens, _)| !tokens.is_empty());
        let feeds: Vec<_> = feeds
            .map(|(sequence, tokens, wanted)| {
                let wanted = wanted.as_ref().map(|(each, guesses)| Wanted::Tail(&each[..=*guesses]));
                Feed { sequence: *sequence, tokens, wanted: wanted.unwrap_or(Wanted::Nothing) }
            })
            .collect();
        let watch = Watch::start(engine);
        engine.feed(&feeds)?;
        let fed = feeds[0].tokens.len();
        if alone && engine.is_settled() {
            running[0].text.took(fed, watch.elapsed(engine));
        }
        Ok(())
    }

    /// Removes a running request and keeps its sequence for others.
    fn end(&mut self, at: usize) -> RequestId {
        let ended = self.running.remove(at);
        self.kept.push(ended.text.sequence);
        if self.kept.len() > self.width {
            self.engine.close(self.kept.remove(0));
        }
        ended.id
    }
}

impl Running {
    /// What became of the request, if it has finished.
    fn finish(&mut self, finish: Option<FinishReason>) -> Result<Option<Ended>, Error> {
        let Self { text, untold, .. } = self;
        let Some(finish) = finish else { return Ok(None) };
        let (finish, complete) = text.finish(finish, &mut |part| write(untold, part))?;
        Ok(Some(Ended {
            finish,
            tokens: text.tokens[text.first..].to_vec(),
            prompt_tokens: text.first,
            shared_tokens: self.shared,
            complete,
        }))
    }
}

fn write(text: &mut String, part: &str) -> ControlFlow<()> {
    text.push_str(part);
    ControlFlow::Continue(())
}
