//! The output head: all logits, or only those that can still be chosen.

use crate::compute::{Compute, FloatMatrix, Rows};
use crate::isa;
use crate::memory::{Counted, MemoryPart, taken};
use crate::pool::Pool;
use crate::screen::{BLOCK, GROUP, Probe, Screen};
use crate::ternary::OutPtr;
use std::ops::Range;

/// The output head of a model.
pub struct Head {
    /// The weights, `[vocabulary][columns]`.
    pub matrix: FloatMatrix,
    /// Their small copy, where one was made.
    pub screen: Option<Screen>,
}

/// Which logits of a token its caller will look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits<'a> {
    /// All.
    Every,
    /// The `top` greatest, with all that equal the last of them, and those of the tokens `also`. Others may be given as
    /// negative infinity; those that are not are exact.
    Best {
        /// How many, at least 1.
        top: usize,
        /// Tokens below the vocabulary size.
        also: &'a [u32],
        /// Where only some tokens may be chosen: a bit for each, 32 a word, and the greatest are sought among them.
        among: Option<&'a [u32]>,
    },
    /// Those of these tokens, all below the vocabulary size; the others are negative infinity.
    Listed(&'a [u32]),
}

/// Buffers of [`Compute::head`].
pub struct HeadScratch {
    probes: Vec<Probe>,
    /// The most that a logit of each block of rows can be, `[GROUP][blocks]`.
    tops: Vec<f32>,
    /// For each thread.
    desks: Vec<Desk>,
    /// A stored row for each thread.
    rows: Vec<u8>,
    counts: HeadCounts,
    counted: Counted,
}

/// What the search for the best logits of a token takes.
struct Desk {
    /// A copy to select from.
    select: Vec<f32>,
    list: Vec<u32>,
    /// Least and greatest values of the logits of `list`.
    ranges: Vec<[f32; 2]>,
    exact: Vec<f32>,
}

/// What was computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeadCounts {
    /// Tokens whose head was screened.
    pub tokens: u64,
    /// Rows that its coarse codes left open, in all.
    pub open: u64,
    /// Tokens of which only listed rows were computed.
    pub listed: u64,
    /// Rows that were computed exactly, in all.
    pub exact: u64,
}

/// How many times as many rows as are wanted are computed first, to know how great the last wanted one must be.
const FIRST: usize = 4;

/// The most rows that are worth narrowing: of more, all logits are computed.
const fn most_open(rows: usize) -> usize {
    rows / 4
}

/// The most that are wanted, by the same token, with those that are wanted in any case.
const fn most_wanted(rows: usize) -> usize {
    rows.div_ceil(BLOCK) / 4
}

impl HeadScratch {
    /// For a head of this shape on `threads` threads.
    pub fn new(rows: usize, columns: usize, threads: usize) -> Self {
        let room = Self::room(rows);
        let desk = |_| Desk {
            select: Vec::with_capacity(room),
            list: Vec::with_capacity(room),
            ranges: Vec::with_capacity(room),
            exact: Vec::with_capacity(room),
        };
        let mut scratch = Self {
            probes: (0..GROUP).map(|_| Probe::new(columns)).collect(),
            tops: vec![0.0; GROUP * rows.div_ceil(BLOCK)],
            desks: (0..threads).map(desk).collect(),
            rows: vec![0; threads * columns * size_of::<f32>()],
            counts: HeadCounts::default(),
            counted: Counted::default(),
        };
        let of =
            |desk: &Desk| taken(&desk.select) + taken(&desk.list) + taken(&desk.ranges) + taken(&desk.exact);
        let desks: usize = scratch.desks.iter().map(of).sum();
        let lists = taken(&scratch.tops) + desks + taken(&scratch.rows);
        scratch.counted = Counted::new(MemoryPart::Scratch, lists);
        scratch
    }
    /// Its size in bytes, but for the probes' alignment.
    pub const fn bytes(rows: usize, columns: usize, threads: usize) -> usize {
        let probes = GROUP * Probe::bytes(columns);
        probes + 4 * GROUP * rows.div_ceil(BLOCK) + threads * (20 * Self::room(rows) + 4 * columns)
    }
    /// Rows that a desk has room for: those that are open, a block more, and those that are wanted in any case.
    const fn room(rows: usize) -> usize {
        most_open(rows) + BLOCK + most_wanted(rows)
    }

    /// What was done since the last call.
    pub fn take_counts(&mut self) -> HeadCounts {
        std::mem::take(&mut self.counts)
    }
}

impl HeadCounts {
    /// Adds what else was done.
    pub fn add(&mut self, other: Self) {
        self.tokens += other.tokens;
        self.open += other.open;
        self.listed += other.listed;
        self.exact += other.exact;
    }
}

/// Who works at a token: all threads, or one of them.
#[derive(Clone, Copy)]
enum Team<'a> {
    All(&'a Pool),
    One(usize),
}

impl Team<'_> {
    /// As [`Pool::run_ranges`].
    fn run_ranges(self, items: usize, grain: usize, f: impl Fn(Range<usize>, usize) + Sync) {
        match self {
            Self::All(pool) => pool.run_ranges(items, grain, grain, f),
            Self::One(worker) => f(0..items, worker),
        }
    }
}

/// Makes what is known of a block negative infinity where tokens are not `allowed`, and `top` the greatest that is left.
fn leave_out(allowed: &[u32], block: usize, uppers: &mut [f32], top: &mut f32) {
    const WORDS: usize = BLOCK / 32;
    let words: [u32; WORDS] = std::array::from_fn(|w| allowed.get(block * WORDS + w).copied().unwrap_or(0));
    if words == [u32::MAX; WORDS] {
        return;
    }
    *top = f32::NEG_INFINITY;
    for (i, upper) in uppers.iter_mut().enumerate() {
        *upper = if words[i / 32] >> (i % 32) & 1 == 1 { *upper } else { f32::NEG_INFINITY };
        *top = if *upper > *top { *upper } else { *top };
    }
}

/// Makes `out` these logits of the listed rows, and negative infinity elsewhere.
fn put(list: &[u32], exact: &[f32], out: &mut [f32]) {
    out.fill(f32::NEG_INFINITY);
    for (&row, &logit) in list.iter().zip(exact) {
        out[row as usize] = logit;
    }
}

impl Compute {
    /// Tells that [`Compute::head`] will be called, so that threads without work ask for what it reads first.
    pub fn head_soon(&self, head: &Head) {
        if let Some(screen) = &head.screen {
            self.pool
                .soon(screen.rows().div_ceil(BLOCK), 1, |block| screen.coarse(block * BLOCK, 1).as_ptr());
        }
    }

    /// Logits: out (`[tokens][vocabulary]`) = x (`[tokens][columns]`) · matrixᵀ, those that `wanted` asks for of each token.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn head<'a>(
        &self,
        head: &Head,
        x: &[f32],
        wanted: impl Fn(usize) -> Logits<'a>,
        scratch: &mut HeadScratch,
        out: &mut [f32],
    ) {
        let (rows, columns) = (head.matrix.rows, head.matrix.columns);
        let tokens = x.len() / columns;
        assert_eq!(out.len(), tokens * rows);
        let screens = |t: usize| head.screen.is_some() && matches!(wanted(t), Logits::Best { .. });
        // Tokens that want the same share one pass over the weights.
        let mut t = 0;
        while t < tokens {
            if let Logits::Listed(list) = wanted(t) {
                let (x, out) = (&x[t * columns..][..columns], &mut out[t * rows..][..rows]);
                let HeadScratch { desks, rows: stored, counts, .. } = &mut *scratch;
                let (exact, stored) = (&mut desks[0].exact, Rows::new(stored, columns * size_of::<f32>()));
                self.exact_logits(Team::All(&self.pool), &head.matrix, x, list, &stored, exact);
                put(list, exact, out);
                counts.add(HeadCounts { listed: 1, exact: list.len() as u64, ..HeadCounts::default() });
                t += 1;
                continue;
            }
            let screened = screens(t);
            let most = if screened { GROUP } else { tokens };
            let same = |&t: &usize| screens(t) == screened && !matches!(wanted(t), Logits::Listed(_));
            let run = (t..tokens).take_while(same).take(most).count();
            let (x, out) = (&x[t * columns..][..run * columns], &mut out[t * rows..][..run * rows]);
            let mut choices = [Logits::Every; GROUP];
            choices.iter_mut().zip(t..t + run).for_each(|(choice, t)| *choice = wanted(t));
            let choices = &choices[..run.min(GROUP)];
            match &head.screen {
                Some(screen) if screened && self.screen_pass(screen, x, choices, scratch, out) => {
                    self.best_of_each(&head.matrix, screen, x, choices, scratch, out);
                }
                _ => self.all_logits(&head.matrix, x, out),
            }
            t += run;
        }
    }

    fn all_logits(&self, matrix: &FloatMatrix, x: &[f32], out: &mut [f32]) {
        let out = OutPtr { ptr: out.as_mut_ptr(), stride: matrix.rows };
        let row_bytes = matrix.columns * matrix.ty.size();
        let grain = ((64 << 10) / row_bytes).clamp(4, 1024) & !3;
        self.pool.run_ranges(matrix.rows, grain, 4, |range, _| {
            let w = &matrix.bytes[range.start * row_bytes..range.end * row_bytes];
            // SAFETY: these rows of every token are this task's alone and lie in the output, which the caller sized.
            unsafe { self.kernels.head_rows(matrix.ty, w, x, matrix.columns, range.start, out) }
        });
    }

    /// Brings the most that the logits of up to [`GROUP`] tokens can be to `out`, negative infinity where `choices` leaves one out.
    /// False where the screen cannot help.
    fn screen_pass(
        &self,
        screen: &Screen,
        x: &[f32],
        choices: &[Logits<'_>],
        scratch: &mut HeadScratch,
        out: &mut [f32],
    ) -> bool {
        let rows = screen.rows();
        let (tokens, blocks) = (out.len() / rows, rows.div_ceil(BLOCK));
        let (probes, columns) = (&mut scratch.probes[..tokens], x.len() / tokens);
        let mut finite = [false; GROUP];
        {
            let (probes, finite) = (Rows::new(probes, 1), Rows::new(&mut finite, 1));
            self.pool.run(tokens, |t, _| {
                // SAFETY: each token is one task.
                let (probe, finite) = unsafe { (probes.row(t), finite.row(t)) };
                finite[0] = probe[0].set(screen, &x[t * columns..][..columns]);
            });
        }
        if finite[..tokens].contains(&false) {
            return false;
        }
        let (out, tops) = (Rows::new(out, 1), Rows::new(&mut scratch.tops, 1));
        self.pool.run_ranges(blocks, 1, 1, |range, _| {
            let block = range.start;
            let (first, count) = (block * BLOCK, BLOCK.min(rows - block * BLOCK));
            let (mut uppers, mut all) = ([[0.0; BLOCK]; GROUP], [0.0; GROUP]);
            for t in 0..tokens {
                // SAFETY: each block is one task.
                let out = unsafe { out.rows(t * rows + first, count) };
                // Where they go was last touched a token ago.
                out.chunks(16).for_each(|line| isa::prefetch_soon(line.as_ptr().cast()));
            }
            self.kernels.screen_block(screen, probes, first, &mut uppers, &mut all);
            for t in 0..tokens {
                // SAFETY: each block is one task.
                let (out, top) = unsafe { (out.rows(t * rows + first, count), tops.row(t * blocks + block)) };
                if let Logits::Best { among: Some(allowed), .. } = choices[t] {
                    leave_out(allowed, block, &mut uppers[t][..count], &mut all[t]);
                }
                out.copy_from_slice(&uppers[t][..count]);
                top[0] = all[t];
            }
        });
        true
    }

    /// Makes of the most that the logits of some tokens can be those that `choices` asks for.
    fn best_of_each(
        &self,
        matrix: &FloatMatrix,
        screen: &Screen,
        x: &[f32],
        choices: &[Logits<'_>],
        scratch: &mut HeadScratch,
        out: &mut [f32],
    ) {
        let HeadScratch { probes, tops, desks, rows: stored, counts, .. } = scratch;
        let stored = Rows::new(stored, matrix.columns * size_of::<f32>());
        let mut settled = [None; GROUP];
        {
            let (tops, outs) = (Rows::new(tops, matrix.rows.div_ceil(BLOCK)), Rows::new(out, matrix.rows));
            let (desks, settled) = (Rows::new(desks, 1), Rows::new(&mut settled, 1));
            let one = |t: usize, worker: usize, team: Team<'_>| {
                let x = &x[t * matrix.columns..][..matrix.columns];
                // SAFETY: each token is one task, and each worker runs one task at a time.
                let (tops, desk, out, settled) =
                    unsafe { (tops.row(t), &mut desks.row(worker)[0], outs.row(t), settled.row(t)) };
                let (probe, choice) = (&probes[t], choices[t]);
                settled[0] =
                    self.best_logits(team, matrix, screen, x, probe, choice, tops, desk, &stored, out);
            };
            match choices.len() {
                1 => one(0, 0, Team::All(&self.pool)),
                tokens => self.pool.run(tokens, |t, worker| one(t, worker, Team::One(worker))),
            }
        }
        let tokens = x.chunks(matrix.columns).zip(out.chunks_mut(matrix.rows));
        for ((x, out), settled) in tokens.zip(settled) {
            match settled {
                Some(more) => counts.add(more),
                None => self.all_logits(matrix, x, out),
            }
        }
    }

    /// Of the most that the logits of a token can be, replaces those that `choice` asks for by the exact logits, and all others by
    /// negative infinity. None where that would be too many.
    fn best_logits(
        &self,
        team: Team<'_>,
        matrix: &FloatMatrix,
        screen: &Screen,
        x: &[f32],
        probe: &Probe,
        choice: Logits<'_>,
        tops: &[f32],
        desk: &mut Desk,
        stored: &Rows<'_, u8>,
        out: &mut [f32],
    ) -> Option<HeadCounts> {
        let Logits::Best { top, also, among } = choice else {
            return None;
        };
        // A caller may lower the logits in `also`, and then others take their places.
        let top = top.saturating_add(also.len());
        if top > most_wanted(matrix.rows) {
            return None;
        }
        // Rows that were left out are not listed, whatever the floor.
        let least = if among.is_some() { f32::MIN } else { f32::NEG_INFINITY };
        let Desk { select, list, ranges, exact } = desk;
        let most = most_open(matrix.rows);
        // Rows that are likely to be among the greatest, at least `top`.
        select.clear();
        select.extend(tops);
        let first_floor = kth_greatest(select, FIRST * top);
        let of_first = [first_floor.max(least), f32::NAN];
        list.clear();
        ranges.clear();
        self.list_rows(most, out, tops, of_first, list)?;
        self.narrow(team, screen, probe, list, None, ranges);
        // `top` of them are not below this one, so nothing that cannot reach it matters.
        let floor = floor_of(ranges, top, select);
        let begun = list.len();
        self.list_rows(most, out, tops, [floor.max(least), first_floor], list)?;
        let open = list.len() as u64;
        self.narrow(team, screen, probe, list, Some(out), ranges);
        retain_from(list, begun, |i| ranges[i][1] >= floor);
        ranges.truncate(begun);
        self.narrow(team, screen, probe, list, None, ranges);
        let floor = floor_of(ranges, top, select);
        retain_from(list, 0, |i| ranges[i][1] >= floor);
        list.extend_from_slice(also);
        if list.len() > most / 2 {
            return None;
        }
        self.exact_logits(team, matrix, x, list, stored, exact);
        put(list, exact, out);
        Some(HeadCounts { tokens: 1, open, listed: 0, exact: list.len() as u64 })
    }

    /// Appends the rows for which `uppers` is within these bounds. None where `list` gets more than `most`.
    fn list_rows(
        &self,
        most: usize,
        uppers: &[f32],
        tops: &[f32],
        within: [f32; 2],
        list: &mut Vec<u32>,
    ) -> Option<()> {
        for (block, _) in tops.iter().enumerate().filter(|(_, top)| **top >= within[0]) {
            if list.len() > most {
                return None;
            }
            let first = block * BLOCK;
            let uppers = &uppers[first..uppers.len().min(first + BLOCK)];
            self.kernels.list_within(uppers, within, first as u32, list);
        }
        Some(())
    }

    /// Appends the ranges of the logits of the rows of `list` that have none yet.
    fn narrow(
        &self,
        team: Team<'_>,
        screen: &Screen,
        probe: &Probe,
        list: &[u32],
        uppers: Option<&[f32]>,
        ranges: &mut Vec<[f32; 2]>,
    ) {
        let begun = ranges.len();
        ranges.resize(list.len(), [0.0; 2]);
        let (list, out) = (&list[begun..], Rows::new(&mut ranges[begun..], 1));
        team.run_ranges(list.len(), 32, |range, _| {
            // SAFETY: each range is one task.
            let out = unsafe { out.rows(range.start, range.len()) };
            // The kernel stops with `out`; rows after that are only asked for.
            self.kernels.narrow(screen, probe, &list[range.start..], uppers, out);
        });
    }

    /// The exact logits of the rows `list`; NaN where a row could not be read.
    fn exact_logits(
        &self,
        team: Team<'_>,
        matrix: &FloatMatrix,
        x: &[f32],
        list: &[u32],
        stored: &Rows<'_, u8>,
        exact: &mut Vec<f32>,
    ) {
        exact.resize(list.len(), 0.0);
        let out = Rows::new(exact, 1);
        let row_bytes = matrix.columns * matrix.ty.size();
        team.run_ranges(list.len(), 8, |range, worker| {
            // SAFETY: each range is one task, and each worker runs one task at a time.
            let (out, stored) = unsafe { (out.rows(range.start, range.len()), stored.row(worker)) };
            let Some(read) = &matrix.reader else {
                return self.kernels.head_listed(matrix.ty, &matrix.bytes, x, &list[range], out);
            };
            let stored = &mut stored[..row_bytes];
            for (&row, out) in list[range].iter().zip(out) {
                *out = f32::NAN;
                if read(row as usize * row_bytes, stored) {
                    self.kernels.head_listed(matrix.ty, stored, x, &[0], std::slice::from_mut(out));
                }
            }
        });
    }
}

/// Of the rows from `begun` on leaves those that `keep` wants, which is given their places.
fn retain_from(list: &mut Vec<u32>, begun: usize, keep: impl Fn(usize) -> bool) {
    let mut kept = begun;
    for i in begun..list.len() {
        list[kept] = list[i];
        kept += usize::from(keep(i));
    }
    list.truncate(kept);
}

/// What at least `k` of the logits of these ranges are not below.
fn floor_of(ranges: &[[f32; 2]], k: usize, select: &mut Vec<f32>) -> f32 {
    select.clear();
    select.extend(ranges.iter().map(|range| range[0]));
    // Fewer than k are no reason to leave any out.
    if select.len() < k { f32::NEG_INFINITY } else { kth_greatest(select, k) }
}

/// The k-th greatest, or the least where there are fewer. A NaN counts as greater than all.
fn kth_greatest(values: &mut [f32], k: usize) -> f32 {
    let k = k.clamp(1, values.len());
    *values
        .select_nth_unstable_by(k - 1, |a, b| b.abs().is_nan().cmp(&a.abs().is_nan()).then(b.total_cmp(a)))
        .1
}
