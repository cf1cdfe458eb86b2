//! SentencePiece's `tokenizer.model`.
//!
//! A protocol buffer (sentencepiece_model.proto): field 1 of the model, repeated, is a piece with the fields 1 text, 2 score
//! (float32) and 3 type, whose numbers are those of GGUF, 1 where it is left out.

use super::hf::HfVocab;
use super::split::{Prefix, Split};

impl HfVocab {
    /// Reads the pieces of a `tokenizer.model`; None where it is none, of another algorithm than BPE, or where that is not all
    /// that is done to a text.
    pub fn parse_sentencepiece(model: &[u8]) -> Option<Self> {
        const BPE: u64 = 2;
        let split = Split::Sentence { prefix: Prefix::Each, at_spaces: false };
        let mut vocab = Self { split, ..Self::default() };
        let (mut algorithm, mut table, mut spaces) = (0, false, [true; 3]);
        fields(model, |number, value| match (number, value) {
            (1, Field::Bytes(piece)) => {
                let (mut text, mut score, mut kind) = (None, 0.0, 1);
                fields(piece, |number, value| {
                    match (number, value) {
                        (1, Field::Bytes(bytes)) => text = Some(str::from_utf8(bytes).ok()?.to_owned()),
                        (2, Field::Four(bits)) => score = f32::from_bits(bits),
                        (3, Field::Int(n)) => kind = i32::try_from(n).ok()?,
                        _ => {}
                    }
                    Some(())
                })?;
                vocab.tokens.push(text?);
                vocab.token_types.push(kind);
                vocab.scores.push(score);
                Some(())
            }
            // What the model was trained with: field 3 is the algorithm.
            (2, Field::Bytes(trainer)) => fields(trainer, |number, value| {
                if let (3, Field::Int(n)) = (number, value) {
                    algorithm = n;
                }
                Some(())
            }),
            // What is done to a text first: a table of characters, then whether a space comes before it, spaces that say
            // nothing are removed, and the others become visible.
            (3, Field::Bytes(normalizer)) => fields(normalizer, |number, value| {
                match (number, value) {
                    (2, Field::Bytes(bytes)) => table = !bytes.is_empty(),
                    (3..=5, Field::Int(n)) => spaces[number as usize - 3] = n != 0,
                    _ => {}
                }
                Some(())
            }),
            _ => Some(()),
        })?;
        let [prefix, removes, escapes] = spaces;
        if !prefix {
            vocab.split = Split::Sentence { prefix: Prefix::Never, at_spaces: false };
        }
        (algorithm == BPE && !table && !removes && escapes && !vocab.tokens.is_empty()).then_some(vocab)
    }
}

enum Field<'a> {
    Int(u64),
    Four(u32),
    Bytes(&'a [u8]),
}

/// Hands over the fields of a message with their numbers. None where it is broken, or `take` finds it so.
fn fields<'a>(mut bytes: &'a [u8], mut take: impl FnMut(u64, Field<'a>) -> Option<()>) -> Option<()> {
    while !bytes.is_empty() {
        let key = varint(&mut bytes)?;
        let field = match key & 7 {
            0 => Field::Int(varint(&mut bytes)?),
            1 => {
                bytes.split_off(..8)?;
                continue;
            }
            2 => {
                let len = usize::try_from(varint(&mut bytes)?).ok()?;
                Field::Bytes(bytes.split_off(..len)?)
            }
            5 => Field::Four(u32::from_le_bytes(*bytes.split_off(..4)?.first_chunk()?)),
            _ => return None,
        };
        take(key >> 3, field)?;
    }
    Some(())
}

/// Seven bits a byte, the lowest first.
fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.split_off_first()?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}
