//! The output head: all logits, or only those that can still be chosen.

use crate::compute::{Compute, FloatMatrix, Rows};
use crate::memory::{Counted, MemoryPart, taken};
use crate::screen::{BLOCK, Probe, Screen, fill_part, upper_bound};
use crate::ternary::OutPtr;

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
    /// The greatest logit and the widest bound of each block of rows, `[GROUP][blocks]`, and a copy to select from.
    tops: Vec<f32>,
    widest: Vec<f32>,
    select: Vec<f32>,
    list: Vec<u32>,
    /// Least and greatest values of the logits of `list`.
    ranges: Vec<[f32; 2]>,
    exact: Vec<f32>,
    /// A stored row for each thread.
    rows: Vec<u8>,
    counts: HeadCounts,
    counted: Counted,
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

/// Tokens that share a pass over the screen.
const GROUP: usize = 8;

impl HeadScratch {
    /// For a head of this shape on `threads` threads.
    pub fn new(rows: usize, columns: usize, threads: usize) -> Self {
        let blocks = rows.div_ceil(BLOCK);
        let mut scratch = Self {
            probes: (0..GROUP).map(|_| Probe::new(columns)).collect(),
            tops: vec![0.0; GROUP * blocks],
            widest: vec![0.0; GROUP * blocks],
            select: Vec::with_capacity(rows),
            list: Vec::with_capacity(rows + BLOCK),
            ranges: Vec::with_capacity(rows),
            exact: Vec::with_capacity(rows),
            rows: vec![0; threads * columns * size_of::<f32>()],
            counts: HeadCounts::default(),
            counted: Counted::default(),
        };
        let Self { tops, widest, select, list, ranges, exact, rows, .. } = &scratch;
        let floats = taken(tops) + taken(widest) + taken(select) + taken(ranges) + taken(exact);
        scratch.counted = Counted::new(MemoryPart::Scratch, floats + taken(list) + taken(rows));
        scratch
    }
    /// Its size in bytes, but for the probes' alignment.
    pub const fn bytes(rows: usize, columns: usize, threads: usize) -> usize {
        let probes = 2 * GROUP * columns.next_multiple_of(128);
        probes + 8 * GROUP * rows.div_ceil(BLOCK) + 4 * (5 * rows + BLOCK) + 4 * threads * columns
    }
    /// In the screen's logits of the `token`-th of a pass, makes those of tokens that are not `allowed` negative infinity.
    fn leave_out(&mut self, token: usize, allowed: &[u32], out: &mut [f32]) {
        const WORDS: usize = BLOCK / 32;
        let blocks = out.len().div_ceil(BLOCK);
        let tops = &mut self.tops[token * blocks..][..blocks];
        for (b, (logits, top)) in out.chunks_mut(BLOCK).zip(tops).enumerate() {
            let words: [u32; WORDS] =
                std::array::from_fn(|w| allowed.get(b * WORDS + w).copied().unwrap_or(0));
            if words == [u32::MAX; WORDS] {
                continue;
            }
            *top = f32::NEG_INFINITY;
            for (i, logit) in logits.iter_mut().enumerate() {
                *logit = if words[i / 32] >> (i % 32) & 1 == 1 { *logit } else { f32::NEG_INFINITY };
                *top = if *logit > *top { *logit } else { *top };
            }
        }
    }

    /// Makes `out` the exact logits of the listed rows, and negative infinity elsewhere.
    fn put(&mut self, out: &mut [f32]) {
        out.fill(f32::NEG_INFINITY);
        for (&row, &logit) in self.list.iter().zip(&self.exact) {
            out[row as usize] = logit;
        }
        self.counts.exact += self.list.len() as u64;
    }

    /// What was done since the last call.
    pub fn take_counts(&mut self) -> HeadCounts {
        std::mem::take(&mut self.counts)
    }
}

impl Compute {
    /// Makes the `part`-th part of the small copy of `matrix`, which has [`Screen::PART`] rows, or what is left of them.
    ///
    /// # Panics
    /// If the matrix has no such part.
    pub fn screen_part(&self, matrix: &FloatMatrix, part: usize, out: &mut [u8]) {
        let row_bytes = matrix.columns * matrix.ty.size();
        let stored = &matrix.bytes[part * Screen::PART * row_bytes..];
        let decode = |i: usize, row: &mut [f32]| {
            self.kernels.decode_row(matrix.ty, &stored[i * row_bytes..][..row_bytes], row)
        };
        let screen_row = |row: &[f32], dither: &_, coarse: &mut [u8], fine: &mut [u8]| {
            self.kernels.screen_row(row, dither, coarse, fine)
        };
        fill_part(matrix.columns, out, decode, screen_row);
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
        let best = |t: usize| match wanted(t) {
            Logits::Best { top, also, among } if head.screen.is_some() => Some((top, also, among)),
            _ => None,
        };
        let listed = |t: usize| matches!(wanted(t), Logits::Listed(_));
        // Tokens that want the same share one pass over the weights.
        let mut t = 0;
        while t < tokens {
            if let Logits::Listed(list) = wanted(t) {
                let (x, out) = (&x[t * columns..][..columns], &mut out[t * rows..][..rows]);
                scratch.list.clear();
                scratch.list.extend_from_slice(list);
                let HeadScratch { list, exact, rows, .. } = &mut *scratch;
                self.exact_logits(&head.matrix, x, list, rows, exact);
                scratch.put(out);
                scratch.counts.listed += 1;
                t += 1;
                continue;
            }
            let screens = best(t).is_some();
            let most = if screens { GROUP } else { tokens };
            let same = |&t: &usize| best(t).is_some() == screens && !listed(t);
            let run = (t..tokens).take_while(same).take(most).count();
            let (x, out) = (&x[t * columns..][..run * columns], &mut out[t * rows..][..run * rows]);
            let screened = match &head.screen {
                Some(screen) if screens => self.screen_pass(screen, x, scratch, out),
                _ => false,
            };
            if screened {
                for (i, (x, out)) in x.chunks(columns).zip(out.chunks_mut(rows)).enumerate() {
                    let (Some(screen), Some((top, also, among))) = (&head.screen, best(t + i)) else {
                        continue;
                    };
                    if let Some(allowed) = among {
                        scratch.leave_out(i, allowed, out);
                    }
                    if !self.best_logits(&head.matrix, screen, x, i, top, also, scratch, out) {
                        self.all_logits(&head.matrix, x, out);
                    }
                }
            } else {
                self.all_logits(&head.matrix, x, out);
            }
            t += run;
        }
    }

    fn all_logits(&self, matrix: &FloatMatrix, x: &[f32], out: &mut [f32]) {
        let out = OutPtr { ptr: out.as_mut_ptr(), stride: matrix.rows };
        let row_bytes = matrix.columns * matrix.ty.size();
        let grain = ((32 << 10) / row_bytes).clamp(4, 1024) & !3;
        self.pool.run_ranges(matrix.rows, grain, |range, _| {
            let w = &matrix.bytes[range.start * row_bytes..range.end * row_bytes];
            // SAFETY: these rows of every token are this task's alone and lie in the output, which the caller sized.
            unsafe { self.kernels.head_rows(matrix.ty, w, x, matrix.columns, range.start, out) }
        });
    }

    /// Brings the screen's logits of up to [`GROUP`] tokens to `out`. False where it cannot help.
    fn screen_pass(&self, screen: &Screen, x: &[f32], scratch: &mut HeadScratch, out: &mut [f32]) -> bool {
        let rows = screen.rows();
        let (tokens, blocks) = (out.len() / rows, rows.div_ceil(BLOCK));
        let HeadScratch { probes, tops, widest, .. } = scratch;
        for (probe, x) in probes.iter_mut().zip(x.chunks_exact(x.len() / tokens)) {
            if !probe.set(screen, x) {
                return false;
            }
        }
        let (out, tops, widest) = (Rows::new(out, 1), Rows::new(tops, 1), Rows::new(widest, 1));
        self.pool.run_ranges(blocks, 1, |range, _| {
            let block = range.start;
            let (first, count) = (block * BLOCK, BLOCK.min(rows - block * BLOCK));
            for (t, probe) in probes[..tokens].iter().enumerate() {
                let at = t * blocks + block;
                // SAFETY: each block is one task.
                let (out, top, bound) =
                    unsafe { (out.rows(t * rows + first, count), tops.row(at), widest.row(at)) };
                (top[0], bound[0]) = self.kernels.screen_logits(screen, probe, first, out);
            }
        });
        true
    }

    /// Of the screen's logits of the `token`-th of a pass, replaces those that may be among the `top` greatest, and those of
    /// `also`, by the exact ones, and all others by negative infinity. False where that would be too many.
    fn best_logits(
        &self,
        matrix: &FloatMatrix,
        screen: &Screen,
        x: &[f32],
        token: usize,
        top: usize,
        also: &[u32],
        scratch: &mut HeadScratch,
        out: &mut [f32],
    ) -> bool {
        let HeadScratch { probes, tops, widest, select, list, ranges, exact, rows, .. } = scratch;
        let blocks = matrix.rows.div_ceil(BLOCK);
        let (probe, tops) = (&probes[token], &tops[token * blocks..][..blocks]);
        let widest = &widest[token * blocks..][..blocks];
        // A caller may lower the logits in `also`, and then others take their places.
        let top = top.saturating_add(also.len());
        if top > blocks / 4 {
            return false;
        }
        // At least `top` rows are in blocks whose greatest logit is not below this one.
        select.clear();
        select.extend_from_slice(tops);
        let first_floor = kth_greatest(select, FIRST * top);
        list.clear();
        for (block, _) in tops.iter().enumerate().filter(|(_, top)| **top >= first_floor) {
            push_rows(list, out, block, |logit| logit >= first_floor);
        }
        let limit = matrix.rows / 4;
        if list.len() > limit {
            return false;
        }
        self.narrow(screen, probe, list, 0, out, ranges);
        // `top` of them are not below this one, so nothing below it matters.
        let floor = floor_of(ranges, top, select);
        let begun = list.len();
        for (block, (top, widest)) in tops.iter().zip(widest).enumerate() {
            // Every logit and its own bound follow only where the block's widest bound does not already tell.
            if top + widest < floor {
                continue;
            }
            let near = floor - widest;
            push_rows(list, out, block, |logit| logit >= near && logit < first_floor);
        }
        let mut i = 0;
        list.retain(|&row| {
            i += 1;
            i <= begun || upper_bound(screen, probe, row as usize, out[row as usize]) >= floor
        });
        if list.len() > limit {
            return false;
        }
        self.narrow(screen, probe, list, begun, out, ranges);
        let floor = floor_of(ranges, top, select);
        let open = list.len();
        let mut i = 0;
        list.retain(|_| {
            i += 1;
            ranges[i - 1][1] >= floor
        });
        list.extend_from_slice(also);
        if list.len() > limit / 2 {
            return false;
        }
        self.exact_logits(matrix, x, list, rows, exact);
        scratch.put(out);
        scratch.counts.tokens += 1;
        scratch.counts.open += open as u64;
        true
    }

    /// Appends the ranges of the logits of the rows `list[begun..]`.
    fn narrow(
        &self,
        screen: &Screen,
        probe: &Probe,
        list: &[u32],
        begun: usize,
        logits: &[f32],
        ranges: &mut Vec<[f32; 2]>,
    ) {
        ranges.resize(list.len(), [0.0; 2]);
        let (list, out) = (&list[begun..], Rows::new(&mut ranges[begun..], 1));
        self.pool.run_ranges(list.len(), 32, |range, _| {
            // SAFETY: each range is one task.
            let out = unsafe { out.rows(range.start, range.len()) };
            self.kernels.narrow(screen, probe, &list[range], logits, out);
        });
    }

    /// The exact logits of the rows `list`; NaN where a row could not be read.
    fn exact_logits(
        &self,
        matrix: &FloatMatrix,
        x: &[f32],
        list: &[u32],
        rows: &mut [u8],
        exact: &mut Vec<f32>,
    ) {
        exact.resize(list.len(), 0.0);
        let out = Rows::new(exact, 1);
        let row_bytes = matrix.columns * matrix.ty.size();
        let rows = Rows::new(rows, matrix.columns * size_of::<f32>());
        self.pool.run_ranges(list.len(), 8, |range, worker| {
            // SAFETY: each range is one task, and each worker runs one task at a time.
            let (out, stored) = unsafe { (out.rows(range.start, range.len()), rows.row(worker)) };
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

/// Appends the rows of a block whose logits are `wanted`.
#[inline]
fn push_rows(list: &mut Vec<u32>, logits: &[f32], block: usize, wanted: impl Fn(f32) -> bool) {
    let first = block * BLOCK;
    let logits = &logits[first..logits.len().min(first + BLOCK)];
    let mut count = list.len();
    list.resize(count + BLOCK, 0);
    // Every row is written and stays if it is wanted: a branch would be guessed wrong too often.
    for (i, &logit) in logits.iter().enumerate() {
        list[count] = (first + i) as u32;
        count += usize::from(wanted(logit));
    }
    list.truncate(count);
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
