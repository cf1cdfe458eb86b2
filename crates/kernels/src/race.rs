//! Which layout of rows is the faster on this machine.

use crate::compute::{Compute, QuantizedRows, Rows, TernaryMatrix, Workspace};
use crate::memory::{Bytes, HugeBuffer, MemoryPart};
use crate::ternary::{Layout, base3};
use std::sync::Arc;
use std::time::Instant;

/// What [`Compute::race_rows`] found.
pub struct RowRace {
    /// The layout in which rows take less time.
    pub layout: Layout,
    /// Of each layout the time of all rows and of a half of them listed, in nanoseconds for each row there is. Empty where only
    /// one can be the fastest.
    pub times: Vec<(Layout, f64, f64)>,
}

impl RowRace {
    /// Weights of a row that was timed.
    pub const COLUMNS: usize = 2560;
}

impl std::fmt::Display for RowRace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.layout.name().fmt(f)?;
        if !self.times.is_empty() {
            write!(f, "; of {} weights", Self::COLUMNS)?;
        }
        for (layout, all, half) in &self.times {
            write!(f, ", {all:.1} ns in {} and {half:.1} without every other", layout.name())?;
        }
        Ok(())
    }
}

impl Compute {
    /// Times how rows are multiplied with one token on this machine, now, in each layout that could be the fastest. That takes
    /// tens of milliseconds where more than one could.
    pub fn race_rows(&self) -> RowRace {
        // Rows of a common width, 8 MiB in a run, and for each run others, so that they come from memory.
        const BYTES: usize = 8 << 20;
        const COLUMNS: usize = RowRace::COLUMNS;
        const ROUNDS: usize = 3;
        let mut race = RowRace { layout: Layout::Rows, times: Vec::new() };
        if !self.kernels.fast_base3() {
            return race;
        }
        let layouts = [Layout::Rows, Layout::Base3];
        let runs = ROUNDS * layouts.len() * 2;
        let Some(mut buffer) = HugeBuffer::new(MemoryPart::Scratch, runs * BYTES) else { return race };
        let parts = Rows::new(&mut buffer, BYTES / 16);
        // SAFETY: each part is one task. Any bytes are weights here.
        self.pool.run(runs * 16, |part, _| unsafe { parts.row(part) }.fill(1));
        let buffer = Arc::new(buffer);
        let (mut work, mut q) =
            (Workspace::new(COLUMNS, self.pool.threads()), QuantizedRows::new(1, COLUMNS));
        self.quantize(&[1.0; COLUMNS], COLUMNS, Layout::Rows, &mut work, &mut q);
        let mut out = vec![0.0; BYTES / base3::row_bytes(COLUMNS)];
        race.times = layouts.map(|layout| (layout, f64::INFINITY, f64::INFINITY)).to_vec();
        // Every other row, but not in step: by the uppermost bit of multiples of the golden ratio.
        let half: Vec<u32> =
            (0..out.len() as u32).filter(|r| r.wrapping_mul(0x9e37_79b9) >> 31 == 1).collect();
        let mut begin = 0;
        for _ in 0..ROUNDS {
            for (layout, all, listed) in &mut race.times {
                let rows = BYTES / layout.bytes(1, COLUMNS);
                for (best, list) in
                    [(all, None), (listed, Some(&half[..half.partition_point(|&r| (r as usize) < rows)]))]
                {
                    let bytes = Bytes::new(buffer.clone(), begin..begin + layout.bytes(rows, COLUMNS));
                    begin += BYTES;
                    let (matrix, out) =
                        (TernaryMatrix::new(bytes, *layout, rows, COLUMNS, 1.0), &mut out[..rows]);
                    let start = Instant::now();
                    match list {
                        None => self.linear(&q, &mut work, [(&matrix, out)]),
                        Some(list) => self.linear_listed(&q, &mut work, &matrix, list, out),
                    }
                    *best = best.min(start.elapsed().as_secs_f64() * 1e9 / rows as f64);
                }
            }
        }
        // Of what a token reads by rows, two thirds are whole matrices; of the others half are needed, and all are read where that
        // is faster. A machine shared with others gives more to a short run than to a long one: fewer bytes win a near tie.
        let cost = |&(layout, all, half): &(Layout, f64, f64)| {
            (2.0 * all + half.min(all)) * if layout == Layout::Base3 { 0.85 } else { 1.0 }
        };
        if let Some(best) = race.times.iter().min_by(|a, b| cost(a).total_cmp(&cost(b))) {
            race.layout = best.0;
        }
        race
    }
}
