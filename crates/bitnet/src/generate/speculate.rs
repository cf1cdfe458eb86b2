//! Speculation by prompt lookup (the idea is Apoorv Saxena's, "Prompt lookup decoding", 2023): where the last tokens
//! occurred before, what followed them there is proposed, and one step of the model checks all that is proposed.
//!
//! A token's logits have the same bits in every step, and the sampler draws each token from its own logits as it would
//! without proposals. So speculation changes how long a text takes, never the text.

use std::time::Duration;

/// Whether [`generate`](super::generate) lets one step check tokens that may come next. The text is the same either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Speculation {
    /// Where it is expected to save time, from what the steps took and how many proposals were right so far.
    #[default]
    Adaptive,
    /// Never.
    Off,
    /// As many tokens as possible wherever there is something to propose, even if that takes longer. For measurements.
    Always,
}

/// Most tokens that are proposed at once.
pub(crate) const MOST: usize = 15;

/// The last 1, 2, 4 and 8 tokens are looked up.
const TABLES: usize = 4;

/// Matches are told apart by the logarithm of their length, up to this many tokens: the longer, the better they predict.
const LONGEST: usize = 16;
const CLASSES: usize = LONGEST.ilog2() as usize + 1;

/// Gain below which proposals are not worth the risk of a wrong estimate.
const MARGIN: f64 = 1.05;

/// What happened before, and what may come next.
pub(super) struct Speculator {
    mode: Speculation,
    /// For each length that is looked up, where a group of tokens with this hash ended last; 0: nowhere.
    ends: Vec<u32>,
    bits: u32,
    /// Where the last tokens ended before, and how many of them are the same there.
    found: Option<(usize, usize)>,
    /// How often the token after a match of each class was the right one.
    hits: [f64; CLASSES],
    costs: Costs,
}

impl Speculator {
    /// After the tokens of `history`, which may grow to `len`.
    pub(super) fn new(mode: Speculation, history: &[u32], len: usize) -> Self {
        let bits = (2 * len).next_power_of_two().clamp(1 << 6, 1 << 18).ilog2();
        let ends = if mode == Speculation::Off { Vec::new() } else { vec![0; TABLES << bits] };
        let hits = std::array::from_fn(|class| 0.3 + 0.15 * class as f64);
        let mut new = Self { mode, ends, bits, found: None, hits, costs: Costs::default() };
        for end in 1..=history.len() {
            new.look_up(&history[..end]);
        }
        new
    }

    /// Takes note of the last token of `history`, which is a new one. What would have been proposed in its place is
    /// judged by it, proposed or not: so being wrong costs nothing where proposals do not pay.
    pub(super) fn push(&mut self, history: &[u32]) {
        if let Some((end, len)) = self.found {
            let hit = f64::from(u8::from(history.last() == Some(&history[end])));
            let hits = &mut self.hits[class(len)];
            *hits += (hit - *hits) / 16.0;
        }
        self.look_up(history);
    }

    /// Finds where the last tokens occurred before, the most of them first, and notes that they occurred here.
    fn look_up(&mut self, history: &[u32]) {
        if self.mode == Speculation::Off {
            return;
        }
        let (mut hash, mut found) = (0u64, 0);
        for (n, token) in (1..=1 << (TABLES - 1)).zip(history.iter().rev()) {
            hash = (hash.rotate_left(29) ^ u64::from(*token)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let n: usize = n;
            if n.is_power_of_two() {
                let slot = (n.ilog2() as usize) << self.bits | (hash >> (64 - self.bits)) as usize;
                let end = std::mem::replace(&mut self.ends[slot], history.len() as u32) as usize;
                if history[..end].ends_with(&history[history.len() - n..]) {
                    found = end;
                }
            }
        }
        let pairs = history.iter().rev().zip(history[..found].iter().rev());
        let same = pairs.take(LONGEST).take_while(|(a, b)| a == b).count();
        self.found = (same > 0).then_some((found, same));
    }

    /// Adds to `tokens`, which are the history, what may follow them, at most `room` tokens, and says how many.
    pub(super) fn propose(&mut self, room: usize, tokens: &mut Vec<u32>) -> usize {
        let Some((end, len)) = self.found else { return 0 };
        let most = room.min(MOST);
        let count = if self.mode == Speculation::Always { most } else { self.worthwhile(len, most) };
        // Where the proposal reaches the end of the history, it goes on with itself.
        (end..end + count).for_each(|at| tokens.push(tokens[at]));
        count
    }

    /// How many tokens after a match of `len` tokens give the most for their time.
    fn worthwhile(&mut self, len: usize, most: usize) -> usize {
        let (mut best, mut gain) = (0, MARGIN);
        let (mut chance, mut expected) = (1.0, 1.0);
        for count in 1..=most {
            chance *= self.hits[class(len + count - 1)];
            expected += chance;
            let this = expected / self.costs.of(count + 1);
            if this > gain {
                (best, gain) = (count, this);
            }
        }
        if best == 0 {
            self.costs.forget();
        }
        best
    }

    /// Takes note that a step of so many rows took so long.
    pub(super) fn took(&mut self, rows: usize, time: Duration) {
        self.costs.add(rows, time.as_secs_f64());
    }
}

fn class(len: usize) -> usize {
    len.min(LONGEST).ilog2() as usize
}

/// What a step of several rows costs, in steps of one row.
#[derive(Default)]
struct Costs {
    /// Seconds of a step of one row, and how many there were.
    one: f64,
    ones: f64,
    /// By rows: the logarithm of measured over presumed cost.
    factor: [f64; MOST + 2],
}

impl Costs {
    /// Steps of one row that must have been seen: the first ones are slower.
    const FIRST: f64 = 4.0;

    fn of(&self, rows: usize) -> f64 {
        if self.ones < Self::FIRST {
            return f64::INFINITY;
        }
        // However much was forgotten, a row is never free.
        (Self::presumed(rows) * self.factor[rows].exp()).max(1.0 + 0.05 * (rows - 1) as f64)
    }

    /// Before anything was measured: between a machine that waits for its memory and one that computes all the time.
    fn presumed(rows: usize) -> f64 {
        1.0 + 0.35 * rows as f64
    }

    fn add(&mut self, rows: usize, seconds: f64) {
        if rows == 1 {
            // A step that was interrupted says little.
            let seconds = if self.ones < Self::FIRST { seconds } else { seconds.min(2.0 * self.one) };
            self.ones += 1.0;
            self.one += (seconds - self.one) / self.ones.min(16.0);
        } else if self.ones >= Self::FIRST {
            let measured = (seconds / self.one / Self::presumed(rows)).ln();
            for (other, factor) in self.factor.iter_mut().enumerate() {
                // Other numbers of rows will be off by a similar factor.
                let change = (measured - *factor).clamp(-1.0, 1.0);
                *factor += change / (2.0 + 0.25 * other.abs_diff(rows) as f64);
            }
        }
    }

    /// What was measured when the machine was busy must not hold for ever: what is not tried gets cheaper, slowly.
    fn forget(&mut self) {
        for factor in &mut self.factor {
            *factor -= 0.0005;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proposal(speculator: &mut Speculator, history: &[u32], room: usize) -> Vec<u32> {
        let mut tokens = history.to_vec();
        let count = speculator.propose(room, &mut tokens);
        assert_eq!(count, tokens.len() - history.len());
        tokens.split_off(history.len())
    }

    #[test]
    fn what_followed_the_longest_match_is_proposed() {
        // 3 occurred last before 9, but 1 2 3 before 4.
        let history = [1, 2, 3, 4, 5, 3, 9, 1, 2, 3];
        let mut always = Speculator::new(Speculation::Always, &history, 20);
        assert_eq!(proposal(&mut always, &history, 3), [4, 5, 3]);
        assert!(proposal(&mut always, &history, 0).is_empty());
        assert_eq!(proposal(&mut always, &history, 100).len(), MOST);
        // A repetition goes on.
        let history = [7, 1, 2, 1, 2];
        let mut always = Speculator::new(Speculation::Always, &history, 20);
        assert_eq!(proposal(&mut always, &history, 5), [1, 2, 1, 2, 1]);
        // The index follows new tokens.
        let history = [7, 1, 2, 1, 2, 7];
        always.push(&history);
        assert_eq!(proposal(&mut always, &history, 2), [1, 2]);
        let history = [7, 1, 2, 1, 2, 7, 8];
        always.push(&history);
        assert!(proposal(&mut always, &history, 2).is_empty());
        let mut off = Speculator::new(Speculation::Off, &[5, 5, 5], 20);
        assert!(proposal(&mut off, &[5, 5, 5], 5).is_empty());
    }

    /// Seconds for a token, and tokens proposed in a step, when a step of so many rows takes `cost` seconds and each
    /// proposal is right with `chance`.
    fn simulate(cost: impl Fn(usize) -> f64, chance: f64, steps: usize) -> (f64, f64) {
        let history: Vec<u32> = [1, 2, 3].repeat(8);
        let mut adaptive = Speculator::new(Speculation::Adaptive, &history, 4096);
        let found = adaptive.found;
        let (mut seconds, mut tokens, mut proposed, mut state) = (0.0, 0.0, 0.0, 1u32);
        for _ in 0..steps {
            let count = adaptive.propose(100, &mut history.clone());
            adaptive.took(1 + count, Duration::from_secs_f64(cost(1 + count)));
            seconds += cost(1 + count);
            proposed += count as f64;
            for _ in 0..=count {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let hit = f64::from(state >> 8) < chance * f64::from(1 << 24);
                let next = if hit { history[found.unwrap().0] } else { u32::MAX };
                adaptive.push(&[&history[..], &[next]].concat());
                // Every token stands after a long match.
                adaptive.found = found;
                tokens += 1.0;
                if !hit {
                    break;
                }
            }
        }
        (seconds / tokens, proposed / steps as f64)
    }

    #[test]
    fn only_what_pays_is_proposed() {
        let cheap = |rows: usize| 1.0 + 0.05 * (rows - 1) as f64;
        let steep = |rows: usize| if rows == 1 { 1.0 } else { 2.5 + 0.35 * rows as f64 };
        let dear = |rows: usize| 1.1 * rows as f64 - 0.1;
        for (cost, chance, at_most) in [
            (&cheap as &dyn Fn(usize) -> f64, 1.0, 0.15),
            (&cheap, 0.7, 0.5),
            (&cheap, 0.0, 1.01),
            (&steep, 1.0, 0.6),
            (&steep, 0.5, 1.03),
            (&steep, 0.0, 1.01),
            (&dear, 1.0, 1.03),
            (&dear, 0.5, 1.03),
        ] {
            let (seconds, proposed) = simulate(cost, chance, 3000);
            assert!(seconds < at_most, "{seconds} with {proposed} proposals a step, a chance of {chance}");
        }
    }
}
