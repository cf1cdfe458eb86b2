//! The engine: one model, its threads, its cache, and the sequences that share them.

mod saved;

pub use saved::{DEFINITION, SavedError};

use crate::Error;
use crate::generate::MOST_PROPOSED;
use crate::model::{Config, Model, Profile, Row, Scratch, Unfinished};
use bitnet_kernels::{Compute, Counted, KvStore, KvType, Logits, MemoryPart, PAGE, PartBytes};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// Sizes that an engine is built with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Tokens a sequence may have; at most what the model was trained with, unless the caller knows better.
    pub context: usize,
    /// Sequences that may be alive at once. The cache holds this many full contexts; memory is taken as it is used.
    pub sequences: usize,
    /// Rows of a step: longer prompts are cut into steps of this size.
    pub max_rows: usize,
    /// How the cache stores keys and values. Each type gives logits of its own; see [`KvType`].
    pub cache_type: KvType,
    /// Tokens of which a feed wants all logits: room is kept for so many, and for what
    /// [`generate`](crate::generate::generate) wants; more is taken when it is asked for.
    pub logits: usize,
}

impl EngineOptions {
    /// One sequence over the model's own context (at most 4096 tokens), steps of up to 512 rows, an exact cache.
    pub fn for_model(config: &Config) -> Self {
        let context = config.context_length.min(4096);
        Self { context, sequences: 1, max_rows: 512, cache_type: KvType::F32, logits: 1 }
    }

    /// The memory that an engine of these sizes takes for a model of the shape of `config`, without its weights.
    pub fn bytes(&self, config: &Config, threads: usize) -> PartBytes {
        let mut bytes = PartBytes::default();
        let logits = self.logits(config).saturating_mul(size_of::<f32>());
        let rows = config.kv_shape(self.cache_type).row_bytes() * self.rows();
        bytes[MemoryPart::Cache as usize] = self.kv_bytes(config);
        bytes[MemoryPart::Scratch as usize] =
            (Scratch::bytes(config, self.rows(), threads) + rows).saturating_add(logits);
        bytes
    }

    fn pages(&self) -> usize {
        self.context.div_ceil(PAGE).saturating_mul(self.sequences)
    }

    fn kv_bytes(&self, config: &Config) -> usize {
        let page = config.kv_shape(self.cache_type).page_bytes();
        page.unwrap_or(usize::MAX).saturating_mul(self.pages())
    }

    /// Logits that are kept room for.
    fn logits(&self, config: &Config) -> usize {
        let generating = (1 + MOST_PROPOSED).min(self.rows());
        config.vocab_size.saturating_mul(self.logits.max(self.sequences).max(generating))
    }

    /// A step has no more rows than the context.
    fn rows(&self) -> usize {
        self.max_rows.clamp(1, self.context.max(1))
    }
}

/// A sequence of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceId(usize);

/// Which logits a caller wants of the tokens it feeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted<'a> {
    /// None.
    Nothing,
    /// Those of the last token.
    Last(Logits<'a>),
    /// Those of every token.
    All(Logits<'a>),
    /// Those of as many tokens at the end as there are choices, at most all; each has its own.
    Tail(&'a [Logits<'a>]),
}

/// Tokens that continue a sequence.
#[derive(Clone, Copy, Debug)]
pub struct Feed<'a> {
    /// The sequence.
    pub sequence: SequenceId,
    /// What follows in it.
    pub tokens: &'a [u32],
    /// Which logits come back.
    pub wanted: Wanted<'a>,
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
    /// For each page, how many sequences have it.
    owners: Vec<u32>,
    sequences: Vec<Sequence>,
    scratch: Scratch,
    rows: Vec<Row>,
    logits: Vec<f32>,
    /// Most pages that were in use at once.
    touched: usize,
    counted: Counted,
    cancel: Arc<AtomicBool>,
    /// Whether anything was fed.
    fed: bool,
    settling: Duration,
}

impl Engine {
    /// For how long a feed brings weights into their layout before it begins.
    const SLICE: Duration = Duration::from_millis(200);

    /// Reserves cache and buffers for `model`.
    ///
    /// # Errors
    /// [`Error::NoMemory`] where the system refuses them.
    pub fn new(model: Model, compute: Compute, options: EngineOptions) -> Result<Self, Error> {
        let config = model.config();
        let options = EngineOptions { max_rows: options.rows(), ..options };
        let pages = options.pages();
        let bytes = options.kv_bytes(config);
        let kv = KvStore::new(config.kv_shape(options.cache_type), pages, options.max_rows)
            .filter(|_| u32::try_from(pages).is_ok())
            .ok_or(Error::NoMemory { what: "the key/value cache", bytes })?;
        let logits = vec![0.0; options.logits(config)];
        Ok(Self {
            scratch: Scratch::new(&model, &compute, options.max_rows),
            kv,
            free: (0..pages as u32).rev().collect(),
            owners: vec![0; pages],
            sequences: Vec::new(),
            rows: Vec::with_capacity(options.max_rows),
            touched: 0,
            counted: Counted::new(MemoryPart::Scratch, size_of_val(&logits[..])),
            logits,
            cancel: Arc::default(),
            fed: false,
            settling: Duration::ZERO,
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

    /// Bytes of the cache that were ever in use: it takes memory as it is written to.
    pub fn cache_touched(&self) -> usize {
        self.touched * self.kv.shape().page_bytes().unwrap_or(0)
    }

    /// While `flag` is up, [`Engine::feed`] gives [`Error::Cancelled`]; a feed in progress ends before the model's next
    /// block.
    pub fn cancel_by(&mut self, flag: Arc<AtomicBool>) {
        self.cancel = flag;
    }

    /// Finishes what loading left undone, until `enough` says that it may wait. The first tokens are computed from the weights as the
    /// file has them, which is slower; without this call each feed but the first settles some, for a fifth of a second.
    pub fn settle(&mut self, enough: impl Fn() -> bool) {
        if self.is_settled() {
            return;
        }
        let start = Instant::now();
        self.model.settle(&self.compute, enough);
        self.settling += start.elapsed();
    }

    /// Whether nothing is left to [settle](Self::settle).
    pub fn is_settled(&self) -> bool {
        self.model.weights().is_settled()
    }

    /// How long settling has taken, within feeds and without.
    pub fn settling(&self) -> Duration {
        self.settling
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

    /// A new sequence that begins with the first `len` tokens of another, or as many as it has. What was computed of them is
    /// shared, in memory too, until one of the two writes behind them.
    pub fn fork(&mut self, from: SequenceId, len: usize) -> SequenceId {
        let id = self.open();
        if let Ok([from, new]) = self.sequences.get_disjoint_mut([from.0, id.0]) {
            new.tokens.extend(from.tokens.iter().take(len));
            new.pages.extend(&from.pages[..new.tokens.len().div_ceil(PAGE)]);
            for &page in &new.pages {
                self.owners[page as usize] += 1;
            }
        }
        id
    }

    /// Pages of the cache, of [`PAGE`] tokens each.
    pub fn pages(&self) -> usize {
        self.owners.len()
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
        for page in sequence.pages.drain(keep..).rev() {
            self.owners[page as usize] -= 1;
            if self.owners[page as usize] == 0 {
                self.free.push(page);
            }
        }
    }

    /// Continues sequences with the tokens of `feeds`, all in the same steps, and returns the wanted logits,
    /// `[wanted][vocab_size]`, in the order of the feeds and their tokens. A sequence may stand in one feed only.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`], [`Error::ContextFull`] and [`Error::CacheFull`] before anything is computed,
    /// [`Error::BadEmbedding`], and [`Error::Cancelled`]. After an error the sequences are as
    /// they were.
    pub fn feed(&mut self, feeds: &[Feed<'_>]) -> Result<&[f32], Error> {
        self.reserve(feeds)?;
        if std::mem::replace(&mut self.fed, true) {
            let start = Instant::now();
            self.settle(|| start.elapsed() > Self::SLICE);
        }
        let vocab = self.model.config().vocab_size;
        let total: usize = feeds.iter().map(|feed| feed.wanted.count(feed.tokens.len())).sum();
        if let Some(more) = (total * vocab).checked_sub(self.logits.len()) {
            self.logits.reserve_exact(more);
            self.logits.resize(total * vocab, 0.0);
            self.counted.add(MemoryPart::Scratch, more * size_of::<f32>());
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

    /// The logits of the `index`-th wanted token of the last [`Engine::feed`] again.
    pub(crate) fn logits(&self, index: usize) -> &[f32] {
        let vocab = self.model.config().vocab_size;
        &self.logits[index * vocab..][..vocab]
    }

    /// Checks that all tokens exist and fit, and gives the sequences the pages they need.
    fn reserve(&mut self, feeds: &[Feed<'_>]) -> Result<(), Error> {
        let vocab_size = self.model.config().vocab_size;
        for feed in feeds {
            if let Some(index) = feed.tokens.iter().position(|&id| id as usize >= vocab_size) {
                return Err(Error::TokenOutOfRange { index, id: feed.tokens[index], vocab_size });
            }
            for choice in feed.wanted.choices() {
                if let Logits::Best { also: ids, .. } | Logits::Listed(ids) = choice
                    && let Some(index) = ids.iter().position(|&id| id as usize >= vocab_size)
                {
                    return Err(Error::TokenOutOfRange { index, id: ids[index], vocab_size });
                }
            }
            let sequence = &self.sequences[feed.sequence.0];
            let len = sequence.tokens.len() + feed.tokens.len();
            if len > self.options.context {
                return Err(Error::ContextFull { needed: len, context: self.options.context });
            }
        }
        for (i, feed) in feeds.iter().enumerate() {
            if self.take_pages(feed).is_none() {
                for feed in &feeds[..=i] {
                    self.truncate(feed.sequence, self.sequences[feed.sequence.0].before);
                }
                return Err(Error::CacheFull { pages: self.pages(), page_tokens: PAGE });
            }
        }
        self.touched = self.touched.max(self.pages() - self.free.len());
        Ok(())
    }

    /// Gives a sequence the pages for a feed, and its last one to itself. None where not enough are free.
    fn take_pages(&mut self, feed: &Feed<'_>) -> Option<()> {
        let sequence = &mut self.sequences[feed.sequence.0];
        let before = sequence.tokens.len();
        sequence.before = before;
        if !before.is_multiple_of(PAGE)
            && !feed.tokens.is_empty()
            && let Some(last) = sequence.pages.last_mut()
            && self.owners[*last as usize] > 1
        {
            let page = self.free.pop()?;
            self.kv.copy_page(*last, page);
            self.owners[*last as usize] -= 1;
            self.owners[page as usize] = 1;
            *last = page;
        }
        while sequence.pages.len() < (before + feed.tokens.len()).div_ceil(PAGE) {
            let page = self.free.pop()?;
            self.owners[page as usize] = 1;
            sequence.pages.push(page);
        }
        Some(())
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
                let held = &mut self.sequences[sequence.0].tokens;
                let position = held.len() as u32;
                held.push(token);
                let wants_logits = next + wanted.count(tokens.len()) >= tokens.len();
                let (sequence, tag) = (sequence.0 as u32, feed as u32);
                self.rows.push(Row { token, sequence, position, wants_logits, tag });
                next += 1;
            }
            if self.rows.is_empty() {
                break;
            }
            let Self { model, compute, kv, rows, scratch, cancel, sequences, .. } = self;
            let pages = |sequence: u32| &sequences[sequence as usize].pages[..];
            let choice = |row: &Row| {
                let Feed { sequence, tokens, wanted } = feeds[row.tag as usize];
                let end = sequences[sequence.0].before + tokens.len();
                match wanted {
                    Wanted::Nothing => Logits::Every,
                    Wanted::Last(logits) | Wanted::All(logits) => logits,
                    Wanted::Tail(each) => each[row.position as usize + each.len() - end],
                }
            };
            let logits = &mut self.logits[written * vocab..];
            model.step(compute, kv, rows, pages, choice, scratch, logits, cancel).map_err(
                |why| match why {
                    Unfinished::Cancelled => Error::Cancelled,
                    Unfinished::BadEmbedding(row) => {
                        Error::BadEmbedding { file: model.file().to_owned(), token: rows[row].token }
                    }
                },
            )?;
            written += self.rows.iter().filter(|row| row.wants_logits).count();
        }
        Ok(())
    }
}

impl Wanted<'_> {
    fn count(self, tokens: usize) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Last(_) => tokens.min(1),
            Self::All(_) => tokens,
            Self::Tail(each) => tokens.min(each.len()),
        }
    }

    fn choices(&self) -> &[Logits<'_>] {
        match self {
            Self::Nothing => &[],
            Self::Last(logits) | Self::All(logits) => std::slice::from_ref(logits),
            Self::Tail(each) => each,
        }
    }
}
