//! Whether the rows of the up projection that are needed, or columns of the down projection, are read one by one, or all of them.

use std::time::Duration;

/// What a row, or a column with a token, costs in either way, as far as it is known: it is measured in use, and now and then the
/// way that seems the dearer is taken to look again. The outputs that are needed are the same.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SparseCost {
    /// Nanoseconds a row, read with all others and one by one.
    all: Option<f32>,
    listed: Option<f32>,
    /// Choices since the dearer way was taken.
    turn: u32,
}

impl SparseCost {
    /// How many choices lead to one that looks at the other way.
    const LOOK: u32 = 61;
    /// Fewer rows tell nothing about one.
    const FEWEST: usize = 64;

    /// Whether to read the `live` rows of `rows` one by one.
    pub(super) fn lists(&mut self, live: usize, rows: usize) -> bool {
        let (Some(all), Some(listed)) = (self.all, self.listed) else {
            return live < Self::FEWEST || self.all.is_some();
        };
        self.turn = (self.turn + 1) % Self::LOOK;
        let cheaper = live as f32 * listed <= rows as f32 * all;
        cheaper != (self.turn == 0)
    }

    /// Takes in what so many rows took.
    pub(super) fn learn(&mut self, listed: bool, rows: usize, time: Duration) {
        if rows < Self::FEWEST {
            return;
        }
        let cost = if listed { &mut self.listed } else { &mut self.all };
        let seen = time.as_nanos() as f32 / rows as f32;
        // Something else may have had the CPU meanwhile: one time moves what is known only a little, a rare look more.
        let share = if self.turn == 0 { 0.5 } else { 0.1 };
        *cost = Some(cost.map_or(seen, |cost| cost + share * (seen.min(3.0 * cost) - cost)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of 100 choices those that listed, where a row takes so many nanoseconds in either way.
    fn listed(cost: &mut SparseCost, live: usize, [all, listed]: [u64; 2]) -> usize {
        let mut count = 0;
        for _ in 0..100 {
            let one_by_one = cost.lists(live, 1000);
            let (rows, time) = if one_by_one { (live, listed) } else { (1000, all) };
            cost.learn(one_by_one, rows, Duration::from_nanos(rows as u64 * time));
            count += usize::from(one_by_one);
        }
        count
    }

    #[test]
    fn the_cheaper_way_is_taken_and_found_again_when_the_machine_changes() {
        let mut cost = SparseCost::default();
        assert!(listed(&mut cost, 400, [10, 15]) >= 97);
        assert!(listed(&mut cost, 800, [10, 15]) <= 3);
        for _ in 0..30 {
            listed(&mut cost, 800, [20, 15]);
        }
        assert!(listed(&mut cost, 800, [20, 15]) >= 97);
    }
}
