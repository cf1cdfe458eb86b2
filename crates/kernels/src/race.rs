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
    /// Bytes of rows that one run reads, so many that they come from memory.
    const RUN: usize = 8 << 20;
    const ROUNDS: usize = 3;
    const LAYOUTS: [Layout; 2] = [Layout::Rows, Layout::Base3];
    /// Bytes of all runs.
    pub const BYTES: usize = Self::ROUNDS * Self::LAYOUTS.len() * 2 * Self::RUN;

    /// No race.
    pub const NONE: Self = Self { layout: Layout::Rows, times: Vec::new() };
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
    /// tens of milliseconds where more than one could. The rows are [`RowRace::BYTES`] of `memory`, where any bytes are weights; or
    /// it takes memory of its own, which may take the system long.
    ///
    /// # Panics
    /// If `memory` is shorter.
    pub fn race_rows(&self, memory: Option<Bytes>) -> RowRace {
        // Rows of a common width, and for each run others.
        const RUN: usize = RowRace::RUN;
        const COLUMNS: usize = RowRace::COLUMNS;
        let mut race = RowRace::NONE;
        if !self.kernels.fast_base3() {
            return race;
        }
        let memory = match memory {
            Some(memory) => memory,
            None => match HugeBuffer::new(MemoryPart::Scratch, RowRace::BYTES) {
                Some(mut own) => {
                    let parts = Rows::new(&mut own, RUN / 16);
                    // SAFETY: each part is one task.
                    self.pool.run(RowRace::BYTES / RUN * 16, |part, _| unsafe { parts.row(part) }.fill(1));
                    Bytes::new(Arc::new(own), 0..RowRace::BYTES)
                }
                None => return race,
            },
        };
        // What is mapped is there before the time counts.
        self.pool.run(RowRace::BYTES >> 20, |part, _| {
            for page in memory[part << 20..][..1 << 20].chunks(1 << 12) {
                std::hint::black_box(page[0]);
            }
        });
        let (mut work, mut q) =
            (Workspace::new(COLUMNS, self.pool.threads()), QuantizedRows::new(1, COLUMNS));
        self.quantize(&[1.0; COLUMNS], COLUMNS, Layout::Rows, &mut work, &mut q);
        let mut out = vec![0.0; RUN / base3::row_bytes(COLUMNS)];
        race.times = RowRace::LAYOUTS.map(|layout| (layout, f64::INFINITY, f64::INFINITY)).to_vec();
        // Every other row, but not in step: by the uppermost bit of multiples of the golden ratio.
        let half: Vec<u32> =
            (0..out.len() as u32).filter(|r| r.wrapping_mul(0x9e37_79b9) >> 31 == 1).collect();
        let mut begin = 0;
        for _ in 0..RowRace::ROUNDS {
            for (layout, all, listed) in &mut race.times {
                let rows = RUN / layout.bytes(1, COLUMNS);
                for (best, list) in
                    [(all, None), (listed, Some(&half[..half.partition_point(|&r| (r as usize) < rows)]))]
                {
                    let bytes = memory.part(begin..begin + layout.bytes(rows, COLUMNS));
                    begin += RUN;
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
