//! A sequence in a file: its tokens with their keys and values, to go on from in another process.
//!
//! The layout, all numbers little-endian:
//!
//! - 8 bytes `BITNETKV`, u32 format, u32 [`DEFINITION`], 32 bytes [`Model::identity`](crate::model::Model::identity), u32
//!   cache type, u32 number of tokens;
//! - for every page of the cache: its tokens (u32, zeros behind the last one), its keys and values as the cache holds them,
//!   and the SHA-256 of what the last digest was (of the header, at first) followed by these tokens, keys and values.
//!
//! So a page is read only where its tokens are wanted, and proves its place in the file. The digests find damage; against
//! somebody who writes such files nothing helps but that any keys and values are harmless.

use super::{Engine, SequenceId};
use bitnet_kernels::{KvType, PAGE};
use sha2::{Digest, Sha256};
use std::io::{self, Read, Write};

/// Version of the arithmetic that keys and values come from (ARCHITECTURE.md) and of the pages' layout. Whoever changes the
/// bits of either raises it.
pub const DEFINITION: u32 = 1;

const MAGIC: &[u8; 8] = b"BITNETKV";
const FORMAT: u32 = 2;
const HEADER: usize = 56;
/// No sequence is longer.
const MAX_TOKENS: u32 = 1 << 24;

/// Why a saved sequence was refused.
#[allow(missing_docs)] // the messages say it all
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("not a prompt cache: it does not begin with BITNETKV")]
    NotOne,
    #[error(
        "written by another version of this program (format {format}, definition {definition}): remove it"
    )]
    Version { format: u32, definition: u32 },
    #[error("made with another model; its keys and values mean nothing to this one: name another file")]
    OtherModel,
    #[error(
        "holds keys and values of another type: take --cache-type {}, or name another file",
        found.map_or("?", KvType::name)
    )]
    CacheType { found: Option<KvType> },
    #[error("damaged: {found} bytes long, {tokens} tokens take {expected}: remove it")]
    Length { found: u64, tokens: u32, expected: u64 },
    #[error("damaged: page {page} is not what was written: remove it")]
    Damaged { page: usize },
    #[error("a model of random weights has no identity")]
    NoIdentity,
}

impl Engine {
    fn header(&self, tokens: u32) -> Result<[u8; HEADER], SavedError> {
        let identity = self.model.identity(&self.compute).ok_or(SavedError::NoIdentity)?;
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        header[12..16].copy_from_slice(&DEFINITION.to_le_bytes());
        header[16..48].copy_from_slice(&identity);
        header[48..52].copy_from_slice(&(self.options.cache_type as u32).to_le_bytes());
        header[52..].copy_from_slice(&tokens.to_le_bytes());
        Ok(header)
    }

    /// Writes the first `len` tokens of a sequence with their keys and values. Before each page it asks `go_on`.
    ///
    /// # Errors
    /// [`SavedError::Io`], of kind [`Interrupted`](io::ErrorKind::Interrupted) where `go_on` said no, and
    /// [`SavedError::NoIdentity`].
    pub fn save(
        &self,
        sequence: SequenceId,
        len: usize,
        out: &mut dyn Write,
        go_on: impl Fn() -> bool,
    ) -> Result<(), SavedError> {
        let sequence = &self.sequences[sequence.0];
        let all = &sequence.tokens[..len.min(sequence.tokens.len())];
        let header = self.header(all.len() as u32)?;
        out.write_all(&header)?;
        let mut digest = Sha256::digest(header);
        for (tokens, &page) in all.chunks(PAGE).zip(&sequence.pages) {
            if !go_on() {
                return Err(io::Error::from(io::ErrorKind::Interrupted).into());
            }
            let (ids, data) = (page_ids(tokens), self.kv.page(page));
            digest = page_digest(&digest, &ids, data);
            out.write_all(&ids)?;
            out.write_all(data)?;
            out.write_all(&digest)?;
        }
        Ok(())
    }

    /// Reads a saved sequence of `len` bytes into an empty one, as far as its tokens are those of `wanted`, or all that have
    /// room. What is read of it is checked first: nothing is read or allocated on the word of the file alone.
    ///
    /// # Errors
    /// All of [`SavedError`]; the sequence then stays empty.
    ///
    /// # Panics
    /// If the sequence is not empty.
    pub fn restore(
        &mut self,
        sequence: SequenceId,
        file: &mut dyn Read,
        len: u64,
        wanted: Option<&[u32]>,
    ) -> Result<(), SavedError> {
        assert!(self.tokens(sequence).is_empty(), "a sequence to read into is empty");
        self.read_pages(sequence, file, len, wanted).inspect_err(|_| self.truncate(sequence, 0))
    }

    fn read_pages(
        &mut self,
        sequence: SequenceId,
        file: &mut dyn Read,
        len: u64,
        wanted: Option<&[u32]>,
    ) -> Result<(), SavedError> {
        let mut header = [0; HEADER];
        let there = len.min(HEADER as u64) as usize;
        file.read_exact(&mut header[..there])?;
        if !header.starts_with(MAGIC) {
            return Err(SavedError::NotOne);
        }
        if there < HEADER {
            return Err(SavedError::Length { found: len, tokens: 0, expected: HEADER as u64 });
        }
        let number =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let tokens = number(52);
        let own = self.header(tokens)?;
        if header[8..16] != own[8..16] {
            return Err(SavedError::Version { format: number(8), definition: number(12) });
        }
        if header[16..48] != own[16..48] {
            return Err(SavedError::OtherModel);
        }
        if header[48..52] != own[48..52] {
            let found = KvType::ALL.into_iter().find(|ty| *ty as u32 == number(48));
            return Err(SavedError::CacheType { found });
        }
        let pages = u64::from(tokens).div_ceil(PAGE as u64);
        let page_bytes = self.kv.shape().data_bytes();
        let expected =
            pages.saturating_mul((4 * PAGE + page_bytes + 32) as u64).saturating_add(HEADER as u64);
        if tokens > MAX_TOKENS || expected != len {
            return Err(SavedError::Length { found: len, tokens, expected });
        }
        let room = self.options.context.min(self.free.len() * PAGE);
        let limit = wanted.map_or(room, |wanted| wanted.len().min(room)).min(tokens as usize);
        let mut digest = Sha256::digest(header);
        for index in 0..limit.div_ceil(PAGE) {
            let mut ids = [0; 4 * PAGE];
            file.read_exact(&mut ids)?;
            let first = index * PAGE;
            let words = ids.as_chunks::<4>().0.iter().map(|id| u32::from_le_bytes(*id)).take(limit - first);
            let is_wanted = |(at, id): &(usize, u32)| wanted.is_none_or(|wanted| wanted[first + at] == *id);
            let common: Vec<u32> = words.enumerate().take_while(is_wanted).map(|(_, id)| id).collect();
            if common.is_empty() {
                break;
            }
            let Some(page) = self.free.pop() else { break };
            self.owners[page as usize] = 1;
            self.sequences[sequence.0].pages.push(page);
            self.touched = self.touched.max(self.pages() - self.free.len());
            let data = self.kv.page_mut(page);
            file.read_exact(data)?;
            let mut found = [0; 32];
            file.read_exact(&mut found)?;
            digest = page_digest(&digest, &ids, data);
            let vocab_size = self.model.config().vocab_size;
            if digest[..] != found || common.iter().any(|&id| id as usize >= vocab_size) {
                return Err(SavedError::Damaged { page: index });
            }
            self.sequences[sequence.0].tokens.extend(&common);
            if common.len() < PAGE {
                break;
            }
        }
        Ok(())
    }
}

/// The ids of up to a page of tokens, zeros behind them.
fn page_ids(tokens: &[u32]) -> [u8; 4 * PAGE] {
    let mut ids = [0; 4 * PAGE];
    for (place, id) in ids.as_chunks_mut::<4>().0.iter_mut().zip(tokens) {
        *place = id.to_le_bytes();
    }
    ids
}

fn page_digest(last: &[u8], ids: &[u8], data: &[u8]) -> sha2::digest::Output<Sha256> {
    Sha256::new().chain_update(last).chain_update(ids).chain_update(data).finalize()
}
