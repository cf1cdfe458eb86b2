//! Byte-pair encoding of one piece by merges in order of rank.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::hash::BuildHasher;

use hashbrown::hash_table::Entry;
use hashbrown::{DefaultHashBuilder, HashTable};

/// No rank, no symbol.
const NONE: u32 = u32::MAX;

/// Bytes of a piece that are encoded at once; no piece is longer except in a text of gigabytes.
const MAX_PIECE: usize = u32::MAX as usize;

/// One merge: the tokens `left` and `right` side by side become `merged`.
#[derive(Clone, Copy)]
pub(super) struct Merge {
    pub(super) left: u32,
    pub(super) right: u32,
    pub(super) merged: u32,
    /// Merges of a lower order go first, those of one order from left to right.
    pub(super) order: u32,
}

/// All merges, by rank and by pair.
pub(super) struct Merges {
    by_rank: Vec<Merge>,
    ranks: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

impl Merges {
    pub(super) fn with_capacity(n: usize) -> Self {
        Self {
            by_rank: Vec::with_capacity(n),
            ranks: HashTable::with_capacity(n),
            hasher: DefaultHashBuilder::default(),
        }
    }

    pub(super) fn allocation_size(&self) -> usize {
        self.by_rank.capacity() * size_of::<Merge>() + self.ranks.allocation_size()
    }

    /// Appends the merge of the next rank, or returns the rank that the pair has already.
    pub(super) fn push(&mut self, merge: Merge) -> Result<(), u32> {
        let Self { by_rank, ranks, hasher } = self;
        let pair = |&rank: &u32| (by_rank[rank as usize].left, by_rank[rank as usize].right);
        let new = (merge.left, merge.right);
        match ranks.entry(hash(hasher, new), |rank| pair(rank) == new, |rank| hash(hasher, pair(rank))) {
            Entry::Occupied(rank) => return Err(*rank.get()),
            Entry::Vacant(slot) => slot.insert(by_rank.len() as u32),
        };
        by_rank.push(merge);
        Ok(())
    }

    fn rank(&self, left: u32, right: u32) -> Option<u32> {
        let same = |&rank: &u32| {
            let merge = self.by_rank[rank as usize];
            merge.left == left && merge.right == right
        };
        self.ranks.find(hash(&self.hasher, (left, right)), same).copied()
    }
}

fn hash(hasher: &DefaultHashBuilder, (left, right): (u32, u32)) -> u64 {
    hasher.hash_one(u64::from(left) << 32 | u64::from(right))
}

/// Memory that [`Merger::encode`] reuses from piece to piece.
#[derive(Default)]
pub(super) struct Merger {
    symbols: Vec<Symbol>,
    heap: BinaryHeap<Reverse<u64>>,
}

/// A token in the list of those that make up a piece.
struct Symbol {
    id: u32,
    /// Rank of the merge with the symbol after this one, or `NONE`.
    rank: u32,
    prev: u32,
    next: u32,
}

impl Merger {
    /// Appends the tokens that a piece of these tokens, bytes or characters, is merged to: while a merge applies, the one of
    /// the lowest order, the leftmost first. Time is n log n in the length of the piece.
    pub(super) fn encode(
        &mut self,
        merges: &Merges,
        mut piece: impl Iterator<Item = u32>,
        ids: &mut Vec<u32>,
    ) {
        loop {
            self.symbols.clear();
            self.symbols.extend(piece.by_ref().take(MAX_PIECE).map(|id| Symbol {
                id,
                rank: NONE,
                prev: NONE,
                next: NONE,
            }));
            if self.symbols.is_empty() {
                return;
            }
            self.encode_part(merges, ids);
        }
    }

    fn encode_part(&mut self, merges: &Merges, ids: &mut Vec<u32>) {
        let count = self.symbols.len();
        let mut entries = std::mem::take(&mut self.heap).into_vec();
        entries.clear();
        for at in 0..count {
            let right = self.symbols.get(at + 1).map(|right| right.id);
            let rank = right.and_then(|right| merges.rank(self.symbols[at].id, right));
            entries.extend(rank.map(|rank| entry(merges, rank, at as u32)));
            let symbol = &mut self.symbols[at];
            symbol.rank = rank.unwrap_or(NONE);
            symbol.prev = (at as u32).wrapping_sub(1); // NONE at 0
            symbol.next = if at + 1 < count { at as u32 + 1 } else { NONE };
        }
        self.heap = BinaryHeap::from(entries);

        while let Some(Reverse(entry)) = self.heap.pop() {
            let (order, at) = ((entry >> 32) as u32, entry as u32);
            let symbol = &mut self.symbols[at as usize];
            let Some(merge) = merges.by_rank.get(symbol.rank as usize).filter(|merge| merge.order == order)
            else {
                continue; // one of the two has been merged since
            };
            symbol.id = merge.merged;
            let (prev, merged) = (symbol.prev, symbol.next as usize);
            let next = self.symbols[merged].next;
            self.symbols[merged].rank = NONE;
            self.symbols[at as usize].next = next;
            if next != NONE {
                self.symbols[next as usize].prev = at;
            }
            self.rank_again(merges, at);
            if prev != NONE {
                self.rank_again(merges, prev);
            }
        }

        let mut at = 0;
        while let Some(symbol) = self.symbols.get(at as usize) {
            ids.push(symbol.id);
            at = symbol.next;
        }
    }

    /// Looks up the merge of the symbol at `at` with its neighbour on the right.
    fn rank_again(&mut self, merges: &Merges, at: u32) {
        let Symbol { id, next, .. } = self.symbols[at as usize];
        let right = self.symbols.get(next as usize);
        let rank = right.and_then(|right| merges.rank(id, right.id));
        self.symbols[at as usize].rank = rank.unwrap_or(NONE);
        self.heap.extend(rank.map(|rank| entry(merges, rank, at)));
    }
}

/// Sorts by order, then by position.
fn entry(merges: &Merges, rank: u32, at: u32) -> Reverse<u64> {
    Reverse(u64::from(merges.by_rank[rank as usize].order) << 32 | u64::from(at))
}
