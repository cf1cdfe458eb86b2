//! The engine: one model, its threads, its cache, and the sequences that share them.

use crate::Error;
use crate::model::{Config, Model, Profile, Row, Scratch};
use bitnet_kernels::{Compute, KvStore, KvType, PAGE};

/// Sizes that an engine is built with.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Tokens a sequence may have; at most what the model was trained with, unless the caller knows better.
    pub context: usize,
    /// Sequences that may be alive at once. The cache holds this many full contexts; memory is taken as it is used.
    pub sequences: usize,
    /// Rows of a step: longer prompts are cut into steps of this size.
    pub max_rows: usize,
    /// How the cache stores keys and values. Each type gives logits of its own; see [`KvType`].
    pub cache_type: KvType,
}

impl EngineOptions {
    /// One sequence over the model's own context (at most 4096 tokens), steps of up to 512 rows, an exact cache.
    pub fn for_model(config: &Config) -> Self {
        let context = config.context_length.min(4096);
        Self { context, sequences: 1, max_rows: 512, cache_type: KvType::F32 }
    }
}

/// A sequence of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceId(usize);

/// Which logits a caller wants of the tokens it feeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// None.
    Nothing,
    /// Those of the last token.
    Last,
    /// Those of every token.
    All,
}

/// Tokens that continue a sequence.
#[derive(Clone, Copy, Debug)]
pub struct Feed<'a> {
    /// The sequence.
    pub sequence: SequenceId,
    /// What follows in it.
    pub tokens: &'a [u32],
    /// Which logits come back.
    pub wanted: Wanted,
}

#[derive(Default)]
struct Sequence {
    pages: Vec<u32>,
    tokens: Vec<u32>,
    /// Tokens there were before the feed in progress, to go back to if it fails.
    before: usize,
    alive: bool,
}

/// One model, its threads, its key/value cache and its sequences.
pub struct Engine {
    model: Model,
    compute: Compute,
    options: EngineOptions,
    kv: KvStore,
    free: Vec<u32>,
    pages: usize,
    sequences: Vec<Sequence>,
    scratch: Scratch,
    rows: Vec<Row>,
    logits: Vec<f32>,
}

impl Engine {
    /// Reserves cache and buffers for `model`.
    ///
    /// # Errors
    /// [`Error::NoMemory`] where the system refuses them.
    pub fn new(model: Model, compute: Compute, options: EngineOptions) -> Result<Self, Error> {
        let config = model.config();
        let options =
            EngineOptions { max_rows: options.max_rows.clamp(1, options.context.max(1)), ..options };
        let pages = options.context.div_ceil(PAGE).saturating_mul(options.sequences);
        let shape = config.kv_shape(options.cache_type);
        let bytes = shape.page_bytes().unwrap_or(usize::MAX).saturating_mul(pages);
        let kv = KvStore::new(shape, pages, options.max_rows)
            .filter(|_| u32::try_from(pages).is_ok())
            .ok_or(Error::NoMemory { what: "the key/value cache", bytes })?;
        Ok(Self {
            scratch: Scratch::new(&model, &compute, options.max_rows),
            kv,
            free: (0..pages as u32).rev().collect(),
            pages,
            sequences: Vec::new(),
            rows: Vec::with_capacity(options.max_rows),
            logits: vec![0.0; config.vocab_size],
            options,
            model,
            compute,
        })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }
    /// Where the time of the steps went.
    pub fn profile(&mut self) -> &mut Profile {
        self.scratch.profile()
    }
    /// The kernels and threads.
    pub fn compute(&self) -> &Compute {
        &self.compute
    }
    /// The sizes the engine was built with.
    pub fn options(&self) -> EngineOptions {
        self.options
    }

    /// A new, empty sequence.
    pub fn open(&mut self) -> SequenceId {
        let index = self.sequences.iter().position(|s| !s.alive).unwrap_or_else(|| {
            self.sequences.push(Sequence::default());
            self.sequences.len() - 1
        });
        let sequence = &mut self.sequences[index];
        sequence.alive = true;
        // All that it may ever hold, so that nothing is allocated while it grows.
        sequence.tokens.reserve(self.options.context);
        sequence.pages.reserve(self.options.context.div_ceil(PAGE));
        SequenceId(index)
    }

    /// Ends a sequence and frees its pages.
    pub fn close(&mut self, id: SequenceId) {
        self.truncate(id, 0);
        self.sequences[id.0].alive = false;
    }

    /// The tokens of a sequence so far.
    pub fn tokens(&self, id: SequenceId) -> &[u32] {
        &self.sequences[id.0].tokens
    }

    /// Forgets all but the first `len` tokens of a sequence.
    pub fn truncate(&mut self, id: SequenceId, len: usize) {
        let sequence = &mut self.sequences[id.0];
        sequence.tokens.truncate(len);
        let keep = sequence.tokens.len().div_ceil(PAGE);
        self.free.extend(sequence.pages.drain(keep..).rev());
    }

    /// Continues sequences with the tokens of `feeds`, all in the same steps, and returns the wanted logits,
    /// `[wanted][vocab_size]`, in the order of the feeds and their tokens. A sequence may stand in one feed only.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`], [`Error::ContextFull`] and [`Error::CacheFull`] before anything is computed, and
    /// [`Error::Model`] where an embedding is not finite. After an error the sequences are as they were.
    pub fn feed(&mut self, feeds: &[Feed<'_>]) -> Result<&[f32], Error> {
        self.reserve(feeds)?;
        let vocab = self.model.config().vocab_size;
        let total: usize = feeds.iter().map(|feed| feed.wanted.count(feed.tokens.len())).sum();
        if self.logits.len() < total * vocab {
            self.logits.resize(total * vocab, 0.0);
        }
        match self.run_steps(feeds) {
            Ok(()) => Ok(&self.logits[..total * vocab]),
            Err(error) => {
                for feed in feeds {
                    self.truncate(feed.sequence, self.sequences[feed.sequence.0].before);
                }
                Err(error)
            }
        }
    }

    /// Checks that all tokens exist and fit, and gives the sequences the pages they need.
    fn reserve(&mut self, feeds: &[Feed<'_>]) -> Result<(), Error> {
        let vocab_size = self.model.config().vocab_size;
        let mut needed = 0;
        for feed in feeds {
            if let Some(index) = feed.tokens.iter().position(|&id| id as usize >= vocab_size) {
                return Err(Error::TokenOutOfRange { index, id: feed.tokens[index], vocab_size });
            }
            let sequence = &self.sequences[feed.sequence.0];
            let len = sequence.tokens.len() + feed.tokens.len();
            if len > self.options.context {
                return Err(Error::ContextFull { needed: len, context: self.options.context });
            }
            needed += len.div_ceil(PAGE) - sequence.pages.len();
        }
        if needed > self.free.len() {
            return Err(Error::CacheFull { pages: self.pages, page_tokens: PAGE });
        }
        for feed in feeds {
            let sequence = &mut self.sequences[feed.sequence.0];
            sequence.before = sequence.tokens.len();
            let pages = (sequence.tokens.len() + feed.tokens.len()).div_ceil(PAGE) - sequence.pages.len();
            let from = self.free.len() - pages;
            sequence.pages.extend(self.free.drain(from..).rev());
        }
        Ok(())
    }

    fn run_steps(&mut self, feeds: &[Feed<'_>]) -> Result<(), Error> {
        let vocab = self.model.config().vocab_size;
        let mut written = 0;
        let (mut feed, mut next) = (0, 0);
        while feed < feeds.len() {
            self.rows.clear();
            while feed < feeds.len() && self.rows.len() < self.options.max_rows {
                let Feed { sequence, tokens, wanted } = feeds[feed];
                let Some(&token) = tokens.get(next) else {
                    (feed, next) = (feed + 1, 0);
                    continue;
                };
                let last = next + 1 == tokens.len();
                let held = &mut self.sequences[sequence.0].tokens;
                let position = held.len() as u32;
                held.push(token);
                let wants_logits = wanted == Wanted::All || wanted == Wanted::Last && last;
                self.rows.push(Row { token, sequence: sequence.0 as u32, position, wants_logits });
                next += 1;
            }
            if self.rows.is_empty() {
                break;
            }
            let sequences = &self.sequences;
            let pages = |sequence: u32| &sequences[sequence as usize].pages[..];
            let logits = &mut self.logits[written * vocab..];
            let result =
                self.model.step(&self.compute, &mut self.kv, &self.rows, pages, &mut self.scratch, logits);
            if let Err(row) = result {
                return Err(Error::Model {
                    file: self.model.file().to_owned(),
                    thing: "tensor \"token_embd.weight\"".into(),
                    problem: format!("row {} holds a NaN or an infinity", self.rows[row].token),
                });
            }
            written += self.rows.iter().filter(|row| row.wants_logits).count();
        }
        Ok(())
    }
}

impl Wanted {
    fn count(self, tokens: usize) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Last => tokens.min(1),
            Self::All => tokens,
        }
    }
}
