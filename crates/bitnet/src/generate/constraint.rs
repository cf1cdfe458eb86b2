//! Texts of a given form: only tokens that the form allows are chosen.
//!
//! What is chosen is what masking every logit would give. But where few tokens are allowed, only their rows of the head are
//! computed; where one is, it needs no step of the model at all.

use super::MOST_PROPOSED;
use crate::Error;
use bitnet_kernels::Logits;
use std::fmt::Debug;

/// A form that texts must have, such as [`Grammar`](crate::grammar::Grammar)'s.
pub trait Constraint: Debug + Send + Sync {
    /// For the beginning of a text.
    fn start(&self) -> Box<dyn Guide>;
}

/// Which tokens may follow in a text that grows.
pub trait Guide: Send {
    /// Replaces `mask` by the tokens that may follow, a bit for each, 32 a word; true if the text may also end here.
    ///
    /// # Errors
    /// Where that takes too much time or memory to find out.
    fn mask(&mut self, mask: &mut [u32]) -> Result<bool, ConstraintError>;
    /// Takes in a token that may follow.
    fn push(&mut self, token: u32) -> Result<(), ConstraintError>;
    /// Takes the last `count` tokens back.
    fn pop(&mut self, count: usize) -> Result<(), ConstraintError>;
}

/// What is wrong with a grammar, or with a text that should follow it. One line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConstraintError(pub String);

const NO_TOKEN: &str = "no token of the model can follow the text";

/// What a [`Guide`] says about the next tokens of a step.
pub(crate) struct Masks {
    guide: Box<dyn Guide>,
    /// Tokens that end a text.
    stop: Vec<u32>,
    rows: Vec<Mask>,
    /// Most tokens of which only the rows are computed.
    few: usize,
}

struct Mask {
    bits: Vec<u32>,
    /// The allowed tokens if they are few.
    list: Vec<u32>,
    count: usize,
    may_end: bool,
}

impl Masks {
    /// For a text that begins with `text` and ends with a token of `stop`.
    pub(crate) fn new(
        constraint: &dyn Constraint,
        text: &[u32],
        stop: &[u32],
        vocab_size: usize,
    ) -> Result<Self, Error> {
        let mut guide = constraint.start();
        text.iter().try_for_each(|&id| guide.push(id))?;
        let mut stop: Vec<u32> = stop.iter().copied().filter(|&id| (id as usize) < vocab_size).collect();
        stop.sort_unstable();
        stop.dedup();
        let few = (vocab_size / 64).max(1);
        let mask = || Mask {
            bits: vec![0; vocab_size.div_ceil(32)],
            list: Vec::with_capacity(few),
            count: 0,
            may_end: false,
        };
        Ok(Self { guide, stop, rows: (0..=MOST_PROPOSED).map(|_| mask()).collect(), few })
    }

    /// Finds what may come next, as the mask of row `row`. False if nothing may: the text is complete.
    pub(crate) fn find(&mut self, row: usize) -> Result<bool, Error> {
        let Mask { bits, list, count, may_end } = &mut self.rows[row];
        *may_end = self.guide.mask(bits)?;
        self.stop.iter().for_each(|&id| bits[id as usize / 32] &= !(1 << (id % 32)));
        *count = bits.iter().map(|word| word.count_ones() as usize).sum();
        if *count == 0 {
            // The model need not be asked how to end what has ended.
            return if *may_end { Ok(false) } else { Err(ConstraintError(NO_TOKEN.into()).into()) };
        }
        if *may_end {
            self.stop.iter().for_each(|&id| bits[id as usize / 32] |= 1 << (id % 32));
            *count += self.stop.len();
        }
        list.clear();
        if *count <= self.few {
            for (word, &bits) in (0..).zip(&*bits) {
                list.extend((0..32).filter(|bit| bits >> bit & 1 == 1).map(|bit| 32 * word + bit));
            }
        }
        Ok(true)
    }

    /// The only token that may come next.
    pub(crate) fn forced(&self) -> Option<u32> {
        (self.rows[0].count == 1).then(|| self.rows[0].list[0])
    }

    /// Whether the text may end after the tokens taken in.
    pub(crate) fn may_end(&mut self) -> Result<bool, Error> {
        self.find(0)?;
        Ok(self.rows[0].may_end)
    }

    /// Takes in the token that was chosen.
    pub(crate) fn push(&mut self, id: u32) -> Result<(), Error> {
        Ok(self.guide.push(id)?)
    }

    /// Finds the masks of the rows after the first: of what may follow each token of `proposed`. How many of these could be
    /// right.
    pub(crate) fn look_ahead(&mut self, proposed: &[u32]) -> Result<usize, Error> {
        let mut count = 0;
        for &id in proposed {
            if !self.allows(count, id) || self.stop.contains(&id) {
                break;
            }
            self.push(id)?;
            count += 1;
            // What ends the text, or leads nowhere, is better not proposed.
            if !self.find(count).unwrap_or(false) {
                self.guide.pop(1)?;
                count -= 1;
                break;
            }
        }
        self.guide.pop(count)?;
        Ok(count)
    }

    fn allows(&self, row: usize, id: u32) -> bool {
        self.rows[row].bits[id as usize / 32] >> (id % 32) & 1 == 1
    }

    /// The tokens that are allowed in a row.
    pub(crate) fn bits(&self, row: usize) -> &[u32] {
        &self.rows[row].bits
    }

    /// What must be computed in a row of what a sampler wants.
    pub(crate) fn wanted<'a>(&'a self, row: usize, logits: Logits<'a>) -> Logits<'a> {
        let Mask { bits, list, count, .. } = &self.rows[row];
        match logits {
            _ if *count <= self.few => Logits::Listed(list),
            Logits::Best { top, also, .. } => Logits::Best { top, also, among: Some(bits) },
            logits => logits,
        }
    }
}
