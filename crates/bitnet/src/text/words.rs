//! The tokens of a vocabulary and their texts, and what its list of merges says of them.

use std::hash::BuildHasher;

use hashbrown::hash_table::Entry;
use hashbrown::{DefaultHashBuilder, HashTable};

use super::bpe::Merge;
use super::split::{SPACE_MARK, Split};
use super::tokenizer::{TokenizerError, Vocab};

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
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

/// All tokens, to be found by their texts.
pub(super) struct Words {
    pub(super) texts: Texts,
    pub(super) kinds: Vec<Kind>,
    /// Normal tokens by their bytes.
    index: HashTable<u32>,
    hasher: DefaultHashBuilder,
    /// Tokens of one byte; `u32::MAX` for bytes that have none.
    pub(super) byte_ids: [u32; 256],
    sentence: bool,
}

impl Words {
    /// Nothing in `vocab` is trusted.
    pub(super) fn new<S: AsRef<str>>(vocab: &Vocab<S>) -> Result<Self, TokenizerError> {
        let n_vocab = vocab.tokens.len();
        let sentence = matches!(vocab.split, Split::Sentence { .. });
        if let Some(types) = [vocab.token_types.len(), if sentence { vocab.scores.len() } else { n_vocab }]
            .into_iter()
            .find(|n| *n != n_vocab)
        {
            return Err(TokenizerError::Lengths { tokens: n_vocab, types });
        }
        let n_bytes = vocab.text_bytes();
        if n_vocab.max(n_bytes).max(vocab.most_merges()) >= u32::MAX as usize {
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
        Ok(Self { texts, kinds, index, hasher, byte_ids, sentence })
    }

    /// Bytes that they take.
    pub(super) fn allocation_size(&self) -> usize {
        let Texts { bytes, ends } = &self.texts;
        let lists = bytes.capacity() + 4 * ends.capacity() + self.kinds.capacity();
        size_of::<Self>() + lists + self.index.allocation_size()
    }

    /// The merges of a part of the list whose first has the rank `first`.
    pub(super) fn resolve<S: AsRef<str>>(
        &self,
        merges: &[S],
        first: usize,
    ) -> Result<Vec<Merge>, TokenizerError> {
        let mut resolved = Vec::with_capacity(merges.len());
        let mut pair = Vec::new();
        let mut previous = None;
        for (rank, merge) in (first..).zip(merges) {
            let text = merge.as_ref();
            let wrong = |problem: &str| wrong_merge(rank, text, problem);
            let form = || wrong("is not of the form \"left right\" in GPT-2's byte alphabet");
            let space = text.bytes().position(|byte| byte == b' ').ok_or_else(form)?;
            let (left, right) = (&text[..space], &text[space + 1..]);
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
            resolved.push(Merge { left, right, merged, order: rank as u32 });
        }
        Ok(resolved)
    }

    /// Whether they are SentencePiece's.
    pub(super) fn is_sentence(&self) -> bool {
        self.sentence
    }

    pub(super) fn normal_id(&self, bytes: &[u8]) -> Option<u32> {
        if let (&[byte], false) = (bytes, self.is_sentence()) {
            return Some(self.byte_ids[usize::from(byte)]).filter(|&id| id != u32::MAX);
        }
        self.index.find(self.hasher.hash_one(bytes), |&id| self.texts.get(id) == bytes).copied()
    }
}

pub(super) fn wrong_merge(rank: usize, text: &str, problem: &str) -> TokenizerError {
    TokenizerError::Merge { rank, text: shortened(text), problem: problem.to_owned() }
}

pub(super) fn same_as(first: u32, id: usize) -> TokenizerError {
    TokenizerError::Token { id, problem: format!("is the same as token {first}") }
}

/// The bytes of all tokens in one block.
pub(super) struct Texts {
    bytes: Vec<u8>,
    /// Where each token ends in `bytes`.
    ends: Vec<u32>,
}

impl Texts {
    pub(super) fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..self.ends[id] as usize]
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
