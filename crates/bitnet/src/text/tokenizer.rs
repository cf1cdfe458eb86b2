//! Byte-level BPE, and SentencePiece's BPE.
//!
//! SentencePiece itself cuts no text into pieces: with a space before it, it is one. Its tokens have scores; of two neighbours that
//! together are a token, those that give the highest score are merged first. So each way to make a token of two others is a
//! merge, ordered by the score of the result, unless the vocabulary lists its merges. Characters that are no token become bytes.

use std::borrow::Cow;
use std::hash::BuildHasher;

use bitnet_kernels::{Counted, MemoryPart};
use hashbrown::hash_table::Entry;
use hashbrown::{DefaultHashBuilder, HashTable};

use super::bpe::{Merge, Merger, Merges};
use super::split::{Prefix, SPACE_MARK, Split};

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
        self.text_bytes() + tokens * token + table(tokens) + merges * size_of::<Merge>() + table(merges)
    }

    /// Merges that there may be: made of scores, each cuts a token in two.
    fn most_merges(&self) -> usize {
        let scored = matches!(self.split, Split::Sentence { .. }) && self.merges.is_empty();
        let cuts = |token: &S| token.as_ref().chars().count().saturating_sub(1);
        if scored { self.tokens.iter().map(cuts).sum() } else { self.merges.len() }
    }

    fn text_bytes(&self) -> usize {
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
    texts: Texts,
    kinds: Vec<Kind>,
    /// Normal tokens by their bytes.
    index: HashTable<u32>,
    hasher: DefaultHashBuilder,
    /// Tokens of one byte; `u32::MAX` for bytes that have none.
    byte_ids: [u32; 256],
    merges: Merges,
    ignore_merges: bool,
    split: Split,
    user_defined: SpecialSet,
    /// Control and user-defined tokens.
    specials: SpecialSet,
    _counted: Counted,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Control,
    UserDefined,
    Unused,
    /// A byte of a character that is no token.
    Byte,
}

/// The byte that a token such as `<0x0A>` stands for.
pub(super) fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(digits, 16).ok().filter(|_| digits.len() == 2)
}

impl Tokenizer {
    /// Builds a tokenizer. Nothing in `vocab` is trusted.
    pub fn new<S: AsRef<str>>(vocab: &Vocab<S>) -> Result<Self, TokenizerError> {
        let n_vocab = vocab.tokens.len();
        let sentence = matches!(vocab.split, Split::Sentence { .. });
        if let Some(types) = [vocab.token_types.len(), if sentence { vocab.scores.len() } else { n_vocab }]
            .into_iter()
            .find(|n| *n != n_vocab)
        {
            return Err(TokenizerError::Lengths { tokens: n_vocab, types });
        }
        let n_bytes = vocab.text_bytes();
        let most_merges = vocab.most_merges();
        if n_vocab.max(n_bytes).max(most_merges) >= u32::MAX as usize {
            return Err(TokenizerError::TooLarge);
        }

        let hasher = DefaultHashBuilder::default();
        let mut texts = Texts { bytes: Vec::with_capacity(n_bytes), ends: Vec::with_capacity(n_vocab) };
        let mut kinds = Vec::with_capacity(n_vocab);
        let mut index = HashTable::with_capacity(n_vocab);
        let mut byte_ids = [u32::MAX; 256];
        for (id, (token, &token_type)) in vocab.tokens.iter().zip(&vocab.token_types).enumerate() {
            let token = token.as_ref();
            let kind = match token_type {
                1 => Kind::Normal,
                2 | 3 => Kind::Control,
                // What templates write to mark turns: a message must not make it, whatever type it has.
                4 if token.starts_with("<|") && token.ends_with("|>") => Kind::Control,
                4 => Kind::UserDefined,
                5 => Kind::Unused,
                6 if sentence && byte_of(token).is_some() => Kind::Byte,
                other => {
                    let problem =
                        format!("is of type {other}; expected 1 to 5, or 6 for a byte of SentencePiece's");
                    return Err(TokenizerError::Token { id, problem });
                }
            };
            if token.is_empty() && kind != Kind::Unused {
                return Err(TokenizerError::Token { id, problem: "is empty".into() });
            }
            kinds.push(kind);
            if let Some(byte) = byte_of(token).filter(|_| kind == Kind::Byte) {
                texts.bytes.push(byte);
                byte_ids[usize::from(byte)] = id as u32;
            } else if sentence {
                texts.bytes.extend(token.replace(SPACE_MARK, " ").as_bytes());
            } else if kind == Kind::Normal {
                push_decoded(token, &mut texts.bytes).map_err(|found| {
                    let problem =
                        format!("has the character {found:?}, which is not in GPT-2's byte alphabet");
                    TokenizerError::Token { id, problem }
                })?;
            } else {
                texts.bytes.extend(token.as_bytes());
            }
            texts.ends.push(texts.bytes.len() as u32);
            if kind == Kind::Normal {
                let bytes = texts.get(id as u32);
                let same = |&other: &u32| texts.get(other) == bytes;
                match index.entry(hasher.hash_one(bytes), same, |&other| hasher.hash_one(texts.get(other))) {
                    Entry::Occupied(first) => return Err(same_as(*first.get(), id)),
                    Entry::Vacant(slot) => slot.insert(id as u32),
                };
                if let (&[byte], false) = (bytes, sentence) {
                    byte_ids[usize::from(byte)] = id as u32;
                }
            }
        }
        // Other bytes never occur in UTF-8.
        let mut bytes_of_text = (0..=0xf4).filter(|byte| !matches!(byte, 0xc0 | 0xc1));
        if let Some(byte) = bytes_of_text.find(|&byte| byte_ids[usize::from(byte)] == u32::MAX) {
            return Err(TokenizerError::MissingByte { byte });
        }

        let merges = Merges::with_capacity(most_merges);
        let lists = texts.bytes.capacity() + 4 * texts.ends.capacity() + kinds.capacity();
        let tables = lists + index.allocation_size() + merges.allocation_size();
        let mut tokenizer = Self {
            _counted: Counted::new(MemoryPart::Vocabulary, tables),
            user_defined: SpecialSet::new(&texts, &kinds, &[Kind::UserDefined])?,
            specials: SpecialSet::new(&texts, &kinds, &[Kind::UserDefined, Kind::Control])?,
            texts,
            kinds,
            index,
            hasher,
            byte_ids,
            merges,
            ignore_merges: vocab.ignore_merges,
            split: vocab.split,
        };
        if sentence && vocab.merges.is_empty() {
            tokenizer.push_scored(&vocab.scores)?;
        } else {
            tokenizer.push_merges(&vocab.merges)?;
        }
        Ok(tokenizer)
    }

    fn push_merges<S: AsRef<str>>(&mut self, merges: &[S]) -> Result<(), TokenizerError> {
        let mut pair = Vec::new();
        let mut previous = None;
        for (rank, merge) in merges.iter().enumerate() {
            let text = merge.as_ref();
            let wrong = |problem: &str| {
                let problem = problem.to_owned();
                TokenizerError::Merge { rank, text: shortened(text), problem }
            };
            let form = || wrong("is not of the form \"left right\" in GPT-2's byte alphabet");
            let (left, right) = text.split_once(' ').ok_or_else(form)?;
            pair.clear();
            let decode = |part: &str, pair: &mut Vec<u8>| {
                if self.is_sentence() {
                    pair.extend(part.replace(SPACE_MARK, " ").as_bytes());
                    return Ok(());
                }
                push_decoded(part, pair).map_err(|_| form())
            };
            decode(left, &mut pair)?;
            let middle = pair.len();
            decode(right, &mut pair)?;
            if left.is_empty() || right.is_empty() {
                return Err(form());
            }
            let token = |bytes: &[u8], part| {
                let lacks = || wrong(&format!("needs a token that the vocabulary lacks: its {part}"));
                self.normal_id(bytes).ok_or_else(lacks)
            };
            let left = token(&pair[..middle], "left part")?;
            let right = token(&pair[middle..], "right part")?;
            // Lists often hold all the ways to one token in a row.
            let merged = match previous.filter(|&id| self.texts.get(id) == pair) {
                Some(id) => id,
                None => token(&pair, "result")?,
            };
            previous = Some(merged);
            let merge = Merge { left, right, merged, order: rank as u32 };
            self.merges.push(merge).map_err(|first| wrong(&format!("is the same as merge {first}")))?;
        }
        Ok(())
    }

    /// Makes each way to put a normal token together a merge, of the order of its score.
    fn push_scored(&mut self, scores: &[f32]) -> Result<(), TokenizerError> {
        // Far more than any has; of longer ones there might be more ways than time.
        const LONGEST: usize = 1024;
        let usable =
            |&id: &u32| self.kinds[id as usize] == Kind::Normal && self.texts.get(id).len() <= LONGEST;
        let mut tokens: Vec<u32> = (0..self.n_vocab() as u32).filter(usable).collect();
        tokens.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]));
        let (mut order, mut last) = (0, None);
        for merged in tokens {
            let score = scores[merged as usize].to_bits();
            order += u32::from(last.replace(score).is_some_and(|last| last != score));
            let text = self.texts.get(merged);
            let ways = (1..text.len()).filter_map(|at| {
                let left = self.normal_id(&text[..at])?;
                Some(Merge { left, right: self.normal_id(&text[at..])?, merged, order })
            });
            for merge in ways.collect::<Vec<_>>() {
                // No other token has this text, so no other way these two parts.
                let _ = self.merges.push(merge);
            }
        }
        Ok(())
    }

    /// The tokens of a part of a text without special ones; the text may begin with it.
    fn encode_plain(&self, plain: &str, begins: bool, merger: &mut Merger, ids: &mut Vec<u32>) {
        let mut text = Cow::Borrowed(plain);
        if let Split::Sentence { prefix, .. } = self.split {
            let space = if prefix.adds(plain, begins) { " " } else { "" };
            text = Cow::Owned(format!("{space}{}", plain.replace(SPACE_MARK, " ")));
        }
        let byte_id = |&byte: &u8| self.byte_ids[usize::from(byte)];
        self.split.pieces(&text, |piece| {
            let whole = if self.ignore_merges { self.normal_id(piece) } else { None };
            if let Some(id) = whole {
                ids.push(id);
            } else if self.is_sentence() {
                let chars = piece.utf8_chunks().flat_map(|chunk| chunk.valid().split_inclusive(|_| true));
                let symbols = chars.flat_map(|c| {
                    let whole = self.normal_id(c.as_bytes());
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
            let special = set.find(&self.texts, rest.as_bytes());
            let plain = &rest[..special.map_or(rest.len(), |(at, _)| at)];
            self.encode_plain(plain, ids.is_empty(), &mut merger, ids);
            let Some((at, id)) = special else { return };
            ids.push(id);
            rest = &rest[at + self.texts.get(id).len()..];
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
        ((id as usize) < self.n_vocab()).then(|| self.texts.get(id))
    }

    /// Whether a token is no text: a control token or an unused one.
    pub fn is_control(&self, id: u32) -> bool {
        matches!(self.kinds.get(id as usize), Some(Kind::Control | Kind::Unused))
    }

    /// The token with this text, such as `<|eot_id|>` or ` the` (with a plain space).
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.specials.id(&self.texts, text.as_bytes()).or_else(|| self.normal_id(text.as_bytes()))
    }

    /// The leftmost control or user-defined token in a text, the longest of those that start there: (where, id).
    pub fn find_special(&self, text: &str) -> Option<(usize, u32)> {
        self.specials.find(&self.texts, text.as_bytes())
    }

    /// The texts of all control tokens.
    pub fn control_tokens(&self) -> impl Iterator<Item = &[u8]> {
        self.specials.sorted.iter().filter(|&&id| self.is_control(id)).map(|&id| self.texts.get(id))
    }

    /// Number of token ids.
    pub fn n_vocab(&self) -> usize {
        self.kinds.len()
    }

    fn is_sentence(&self) -> bool {
        matches!(self.split, Split::Sentence { .. })
    }

    fn normal_id(&self, bytes: &[u8]) -> Option<u32> {
        if let (&[byte], false) = (bytes, self.is_sentence()) {
            return Some(self.byte_ids[usize::from(byte)]).filter(|&id| id != u32::MAX);
        }
        self.index.find(self.hasher.hash_one(bytes), |&id| self.texts.get(id) == bytes).copied()
    }
}

fn same_as(first: u32, id: usize) -> TokenizerError {
    TokenizerError::Token { id, problem: format!("is the same as token {first}") }
}

/// The bytes of all tokens in one block.
struct Texts {
    bytes: Vec<u8>,
    /// Where each token ends in `bytes`.
    ends: Vec<u32>,
}

impl Texts {
    fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..self.ends[id] as usize]
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

/// The start of a text, for a message: a hostile file's texts may be long.
pub(super) fn shortened(text: &str) -> String {
    text.chars().take(400).collect()
}

/// Appends the bytes that a text in GPT-2's byte alphabet stands for, or returns its first other character.
fn push_decoded(text: &str, bytes: &mut Vec<u8>) -> Result<(), char> {
    for c in text.chars() {
        match ALPHABET.get(c as usize) {
            Some(&Some(byte)) => bytes.push(byte),
            _ => return Err(c),
        }
    }
    Ok(())
}

/// Character to byte: printable Latin-1 characters stand for themselves, those from U+0100 on for the other bytes in order.
const ALPHABET: [Option<u8>; 0x144] = {
    let mut table = [None; 0x144];
    let mut others = 0x100;
    let mut byte = 0;
    while byte < 256 {
        if matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) {
            table[byte] = Some(byte as u8);
        } else {
            table[others] = Some(byte as u8);
            others += 1;
        }
        byte += 1;
    }
    table
};
