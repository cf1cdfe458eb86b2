//! Byte-level BPE, and SentencePiece's BPE.
//!
//! SentencePiece itself cuts no text into pieces: with a space before it, it is one. Its tokens have scores; of two neighbours that
//! together are a token, those that give the highest score are merged first. So each way to make a token of two others is a
//! merge, ordered by the score of the result, unless the vocabulary lists its merges. Characters that are no token become bytes.

use std::borrow::Cow;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use bitnet_kernels::{Counted, MemoryPart};

use super::bpe::{Merge, Merger, Merges};
use super::split::{Prefix, SPACE_MARK, Split};
use super::words::{Kind, Texts, Words, same_as, wrong_merge};

/// What a tokenizer is made of, in the form of GGUF's `tokenizer.ggml` arrays.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Vocab<S> {
    /// Token texts by id: in GPT-2's byte alphabet for normal tokens, as they are for all others.
    pub tokens: Vec<S>,
    /// One per token: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 a byte of SentencePiece's (`<0x0A>`).
    pub token_types: Vec<i32>,
    /// `left right` in the byte alphabet; a merge's rank is its index.
    pub merges: Vec<S>,
    /// Whether a piece that is a token is that token, even where the merges would not lead to it.
    pub ignore_merges: bool,
    /// SentencePiece's scores, one a token, with which `merges` may be left out; none for byte-level BPE.
    pub scores: Vec<f32>,
    /// How a text is cut.
    pub split: Split,
}

impl<S: AsRef<str>> Vocab<S> {
    /// Bytes that the tables of the tokenizer take.
    pub fn table_bytes(&self) -> usize {
        let (tokens, merges) = (self.tokens.len(), self.most_merges());
        // A hash table has a power of two of places, at most seven eighths of them taken, and a byte for each.
        let table = |n: usize| (n * 8 / 7 + 1).next_power_of_two() * (size_of::<u32>() + 1) + 64;
        let token = size_of::<u32>() + size_of::<Kind>();
        let tables = tokens * token + table(tokens) + merges * size_of::<Merge>() + table(merges);
        size_of::<Words>() + self.text_bytes() + tables
    }

    /// Merges that there may be: made of scores, each cuts a token in two.
    pub(super) fn most_merges(&self) -> usize {
        let scored = matches!(self.split, Split::Sentence { .. }) && self.merges.is_empty();
        let cuts = |token: &S| token.as_ref().chars().count().saturating_sub(1);
        if scored { self.tokens.iter().map(cuts).sum() } else { self.merges.len() }
    }

    pub(super) fn text_bytes(&self) -> usize {
        self.tokens.iter().map(|token| token.as_ref().len()).sum()
    }
}

/// Whether control tokens such as `<|eot_id|>` are recognised in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Specials {
    /// They are text like any other: for all text that is not our own.
    AsText,
    /// They become the control token.
    Parse,
}

/// Why a vocabulary or a token id was refused. A `rank` is the index of a merge; long texts are cut.
#[allow(missing_docs)] // the names and messages of the fields say it all
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("the vocabulary has {tokens} tokens but {types} token types or scores")]
    Lengths { tokens: usize, types: usize },
    #[error("the vocabulary is too large")]
    TooLarge,
    /// A token of a type that byte-level BPE has no use for, without text, with a character that stands for no byte, or with
    /// the text of another.
    #[error("token {id} {problem}")]
    Token { id: usize, problem: String },
    #[error("no token stands for the byte {byte:#04x}")]
    MissingByte { byte: u8 },
    /// A merge that is not two non-empty texts with one space between them, that needs what is no normal token, or that is
    /// twice in the list.
    #[error("merge {rank} ({text:?}) {problem}")]
    Merge { rank: usize, text: String, problem: String },
    #[error("token id {id} is not in the vocabulary of {n_vocab}")]
    UnknownId { id: u32, n_vocab: usize },
    /// A `tokenizer.json` that is not JSON of the expected form.
    #[error("tokenizer.json: {0}")]
    Json(#[from] serde_json::Error),
    /// A `tokenizer.json` that asks for another algorithm.
    #[error(
        "tokenizer.json: {what} is {found}; only byte-level BPE with the splits of LLaMA-3 and Falcon, and SentencePiece's BPE as of LLaMA-2 are supported"
    )]
    Unsupported { what: &'static str, found: String },
    /// A `tokenizer.json` with an id that is missing, too large or given twice.
    #[error(
        "tokenizer.json: the ids of its {count} tokens do not run from 0 without holes: {id} is out of place"
    )]
    Ids { id: u32, count: usize },
}

/// Text to token ids and back.
pub struct Tokenizer {
    words: Arc<Words>,
    merges: Merges,
    ignore_merges: bool,
    split: Split,
    user_defined: SpecialSet,
    /// Control and user-defined tokens.
    specials: SpecialSet,
    _counted: Counted,
}

/// A tokenizer that several threads may build.
pub(crate) struct Building<'a, S> {
    vocab: &'a Vocab<S>,
    /// None where they are wrong.
    words: OnceLock<Option<Arc<Words>>>,
    /// The next part of the merges that nobody has taken, and what is known of each; None where something is wrong.
    next: AtomicUsize,
    parts: Vec<OnceLock<Option<Vec<Merge>>>>,
}

impl<'a, S: AsRef<str>> Building<'a, S> {
    /// Merges of a part.
    const PART: usize = 1 << 10;

    pub(crate) fn new(vocab: &'a Vocab<S>) -> Self {
        let parts = vocab.merges.chunks(Self::PART).map(|_| OnceLock::new()).collect();
        Self { vocab, words: OnceLock::new(), next: AtomicUsize::new(0), parts }
    }

    /// Takes part in what [`Building::build`] does on another thread, as far as it can be done by now, or with `wait` as soon as it can.
    pub(crate) fn help(&self, wait: bool) {
        let words = if wait { Some(self.words.wait()) } else { self.words.get() };
        let Some(Some(words)) = words else { return };
        loop {
            let next = self.next.fetch_add(1, Relaxed);
            let Some(part) = self.parts.get(next) else { return };
            let _ = part.set(self.resolve(words, next).ok());
        }
    }

    fn resolve(&self, words: &Words, part: usize) -> Result<Vec<Merge>, TokenizerError> {
        let first = part * Self::PART;
        let end = (first + Self::PART).min(self.vocab.merges.len());
        words.resolve(&self.vocab.merges[first..end], first)
    }

    /// Builds it, on one thread.
    pub(crate) fn build(&self) -> Result<Tokenizer, TokenizerError> {
        let vocab = self.vocab;
        let words = Words::new(vocab).map(Arc::new).inspect_err(|_| _ = self.words.set(None))?;
        let _ = self.words.set(Some(words.clone()));
        let mut merges = Merges::with_capacity(vocab.most_merges());
        self.help(false);
        for (i, part) in self.parts.iter().enumerate() {
            let Some(part) = part.wait() else {
                self.resolve(&words, i)?;
                unreachable!("a part that was wrong is right");
            };
            for (rank, &merge) in (i * Self::PART..).zip(part) {
                let same = |first| {
                    let problem = format!("is the same as merge {first}");
                    wrong_merge(rank, vocab.merges[rank].as_ref(), &problem)
                };
                merges.push(merge).map_err(same)?;
            }
        }
        let specials = |kinds: &[Kind]| SpecialSet::new(&words.texts, &words.kinds, kinds);
        let mut tokenizer = Tokenizer {
            _counted: Counted::new(
                MemoryPart::Vocabulary,
                words.allocation_size() + merges.allocation_size(),
            ),
            user_defined: specials(&[Kind::UserDefined])?,
            specials: specials(&[Kind::UserDefined, Kind::Control])?,
            words,
            merges,
            ignore_merges: vocab.ignore_merges,
            split: vocab.split,
        };
        if tokenizer.words.is_sentence() && vocab.merges.is_empty() {
            tokenizer.push_scored(&vocab.scores);
        }
        Ok(tokenizer)
    }
}

impl Tokenizer {
    /// Builds a tokenizer. Nothing in `vocab` is trusted.
    pub fn new<S: AsRef<str>>(vocab: &Vocab<S>) -> Result<Self, TokenizerError> {
        Building::new(vocab).build()
    }

    /// Makes each way to put a normal token together a merge, of the order of its score.
    fn push_scored(&mut self, scores: &[f32]) {
        // Far more than any has; of longer ones there might be more ways than time.
        const LONGEST: usize = 1024;
        let usable = |&id: &u32| {
            self.words.kinds[id as usize] == Kind::Normal && self.words.texts.get(id).len() <= LONGEST
        };
        let mut tokens: Vec<u32> = (0..self.n_vocab() as u32).filter(usable).collect();
        tokens.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]));
        let (mut order, mut last) = (0, None);
        for merged in tokens {
            let score = scores[merged as usize].to_bits();
            order += u32::from(last.replace(score).is_some_and(|last| last != score));
            let text = self.words.texts.get(merged);
            let ways = (1..text.len()).filter_map(|at| {
                let left = self.words.normal_id(&text[..at])?;
                Some(Merge { left, right: self.words.normal_id(&text[at..])?, merged, order })
            });
            for merge in ways.collect::<Vec<_>>() {
                // No other token has this text, so no other way these two parts.
                let _ = self.merges.push(merge);
            }
        }
    }

    /// The tokens of a part of a text without special ones; the text may begin with it.
    fn encode_plain(&self, plain: &str, begins: bool, merger: &mut Merger, ids: &mut Vec<u32>) {
        let mut text = Cow::Borrowed(plain);
        if let Split::Sentence { prefix, .. } = self.split {
            let space = if prefix.adds(plain, begins) { " " } else { "" };
            text = Cow::Owned(format!("{space}{}", plain.replace(SPACE_MARK, " ")));
        }
        let byte_id = |&byte: &u8| self.words.byte_ids[usize::from(byte)];
        self.split.pieces(&text, |piece| {
            let whole = if self.ignore_merges { self.words.normal_id(piece) } else { None };
            if let Some(id) = whole {
                ids.push(id);
            } else if self.words.is_sentence() {
                let chars = piece.utf8_chunks().flat_map(|chunk| chunk.valid().split_inclusive(|_| true));
                let symbols = chars.flat_map(|c| {
                    let whole = self.words.normal_id(c.as_bytes());
                    let bytes = if whole.is_some() { &[] } else { c.as_bytes() };
                    whole.into_iter().chain(bytes.iter().map(byte_id))
                });
                merger.encode(&self.merges, symbols, ids);
            } else {
                merger.encode(&self.merges, piece.iter().map(byte_id), ids);
            }
        });
    }

    /// The tokens of a text. Adds no begin-of-text token. User-defined tokens are always recognised.
    pub fn encode(&self, text: &str, specials: Specials) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 4);
        self.encode_after(&mut ids, text, specials);
        ids
    }

    /// Appends the tokens of a text to those of what it goes on after, if there are any.
    pub(super) fn encode_after(&self, ids: &mut Vec<u32>, text: &str, specials: Specials) {
        let set = match specials {
            Specials::AsText => &self.user_defined,
            Specials::Parse => &self.specials,
        };
        let mut merger = Merger::default();
        let mut rest = text;
        loop {
            let special = set.find(&self.words.texts, rest.as_bytes());
            let plain = &rest[..special.map_or(rest.len(), |(at, _)| at)];
            self.encode_plain(plain, ids.is_empty(), &mut merger, ids);
            let Some((at, id)) = special else { return };
            ids.push(id);
            rest = &rest[at + self.words.texts.get(id).len()..];
        }
    }

    /// The bytes of tokens one after the other; control tokens are left out unless `specials`, and so is the space that
    /// SentencePiece puts before a text.
    /// The bytes need not be UTF-8, since tokens may be parts of a character.
    pub fn decode(&self, ids: &[u32], specials: bool) -> Result<Vec<u8>, TokenizerError> {
        let mut bytes = Vec::new();
        for &id in ids {
            let unknown = TokenizerError::UnknownId { id, n_vocab: self.n_vocab() };
            let token = self.token_bytes(id).ok_or(unknown)?;
            if specials || !self.is_control(id) {
                bytes.extend(token);
            }
        }
        let prefix = matches!(self.split, Split::Sentence { prefix, .. } if prefix != Prefix::Never);
        if prefix && bytes.first() == Some(&b' ') {
            bytes.remove(0);
        }
        Ok(bytes)
    }

    /// The bytes of a token, which may be part of a character; a control token gives its text.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        ((id as usize) < self.n_vocab()).then(|| self.words.texts.get(id))
    }

    /// Whether a token is no text: a control token or an unused one.
    pub fn is_control(&self, id: u32) -> bool {
        matches!(self.words.kinds.get(id as usize), Some(Kind::Control | Kind::Unused))
    }

    /// The token with this text, such as `<|eot_id|>` or ` the` (with a plain space).
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.specials.id(&self.words.texts, text.as_bytes()).or_else(|| self.words.normal_id(text.as_bytes()))
    }

    /// The leftmost control or user-defined token in a text, the longest of those that start there: (where, id).
    pub fn find_special(&self, text: &str) -> Option<(usize, u32)> {
        self.specials.find(&self.words.texts, text.as_bytes())
    }

    /// The texts of all control tokens.
    pub fn control_tokens(&self) -> impl Iterator<Item = &[u8]> {
        self.specials.sorted.iter().filter(|&&id| self.is_control(id)).map(|&id| self.words.texts.get(id))
    }

    /// Number of token ids.
    pub fn n_vocab(&self) -> usize {
        self.words.kinds.len()
    }
}

/// Tokens that are looked for in raw text.
struct SpecialSet {
    /// In order of their bytes.
    sorted: Vec<u32>,
    first_bytes: [bool; 256],
}

impl SpecialSet {
    fn new(texts: &Texts, all: &[Kind], kinds: &[Kind]) -> Result<Self, TokenizerError> {
        let mut sorted: Vec<u32> =
            (0..).zip(all).filter(|(_, k)| kinds.contains(k)).map(|(id, _)| id).collect();
        sorted.sort_by_key(|&id| texts.get(id));
        if let Some(pair) = sorted.windows(2).find(|pair| texts.get(pair[0]) == texts.get(pair[1])) {
            return Err(same_as(pair[0], pair[1] as usize));
        }
        let mut first_bytes = [false; 256];
        sorted.iter().for_each(|&id| first_bytes[usize::from(texts.get(id)[0])] = true);
        Ok(Self { sorted, first_bytes })
    }

    /// The leftmost token of the set in a text, the longest of those that start there: (where, id).
    fn find(&self, texts: &Texts, text: &[u8]) -> Option<(usize, u32)> {
        if self.sorted.is_empty() {
            return None;
        }
        let starts = text.iter().enumerate().filter(|&(_, &byte)| self.first_bytes[usize::from(byte)]);
        starts.filter_map(|(at, _)| Some((at, self.longest(texts, &text[at..])?))).next()
    }

    /// The longest token that `text` starts with.
    fn longest(&self, texts: &Texts, mut text: &[u8]) -> Option<u32> {
        loop {
            // A token that `text` starts with is not above `text`, and no other such token is above the longest.
            let above = self.sorted.partition_point(|&id| texts.get(id) <= text);
            let id = self.sorted[above.checked_sub(1)?];
            let token = texts.get(id);
            let common = token.iter().zip(text).take_while(|(a, b)| a == b).count();
            if common == token.len() {
                return Some(id);
            }
            text = &text[..common]; // whatever else it starts with is in what the two share
        }
    }

    fn id(&self, texts: &Texts, text: &[u8]) -> Option<u32> {
        self.sorted.binary_search_by_key(&text, |&id| texts.get(id)).ok().map(|at| self.sorted[at])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::HfVocab;

    fn built_by_three(vocab: &HfVocab) -> Result<Tokenizer, TokenizerError> {
        let building = Building::new(vocab);
        std::thread::scope(|scope| {
            (0..2).for_each(|_| _ = scope.spawn(|| building.help(true)));
            building.build()
        })
    }

    #[test]
    fn several_threads_build_what_one_does() {
        let json = include_bytes!("../../tests/fixtures/tokenizer/demo-tokenizer.json");
        let mut vocab = HfVocab::parse(json).unwrap();
        assert!(vocab.merges.len() > 3 * Building::<String>::PART);
        let text = "Once upon a time there was a tokenizer, built by several threads: äöü 12345";
        let [one, three] = [Tokenizer::new(&vocab), built_by_three(&vocab)].map(Result::unwrap);
        assert_eq!(one.encode(text, Specials::AsText), three.encode(text, Specials::AsText));
        assert!(one.encode(text, Specials::AsText).len() < text.len());
        for (rank, problem) in [(3000, "is the same as merge 7"), (2, "is not of the form")] {
            vocab.merges[rank] = if rank == 2 { String::new() } else { vocab.merges[7].clone() };
            for error in [Tokenizer::new(&vocab).err(), built_by_three(&vocab).err()] {
                let error = error.unwrap().to_string();
                assert!(error.contains(&format!("merge {rank} ")) && error.contains(problem), "{error}");
            }
        }
        vocab.tokens[300].clear();
        assert!(matches!(built_by_three(&vocab), Err(TokenizerError::Token { id: 300, .. })));
    }
}
