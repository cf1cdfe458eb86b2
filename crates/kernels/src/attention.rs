//! Attention over the cache, written once over the sixteen lanes of an [`Isa`] and for every type of cache.
//!
//! The unit of work is a [`Segment`]: the queries of one token that share a key/value head, and one page of that head.
//! Per segment: scores `(q · k) * scale`; m = their maximum; weights e = exp(score - m); l = the folded sum of e;
//! o = Σ e v. Segments are joined in order, rescaled by exp(m - max), and the result is o / l. Where the running sums
//! are kept, and who computes which segment, does not matter.
//!
//! - f32 and f16: `q · k` is summed in order of the dimension, `Σ e v` in order of the position; halves are widened first.
//! - q8: both sums are exact in integers. A query is rounded to fifteen bits (see [`split`]) of its own largest
//!   element, the weights of a segment, each times the scale of its value, to as many of the largest of them.

use crate::isa::Isa;
use crate::kv::KvType;
use crate::memory::{Plain, cast};
use crate::ops::{PAGE, exp, fold, fold_max, padded};

/// The queries of one token that share a key/value head, and one page of that head.
#[derive(Clone, Copy)]
pub(crate) struct Segment<'a> {
    pub(crate) ty: KvType,
    pub(crate) head_dim: usize,
    pub(crate) scale: f32,
    /// As [`crate::KvStore`] lays it out.
    pub(crate) page: &'a [u8],
    /// The page that the caller will want next: it is fetched meanwhile.
    pub(crate) next: *const u8,
    /// Positions of the page that the queries see, at least one.
    pub(crate) count: usize,
    /// Whether this is the first segment: what `state` and `out` held before does not count.
    pub(crate) first: bool,
    /// `[heads][head_dim]`.
    pub(crate) q: &'a [f32],
    /// The same as integers, for q8.
    pub(crate) codes: Codes<'a>,
}

/// Queries as [`code_queries`] leaves them.
#[derive(Clone, Copy, Default)]
pub(crate) struct Codes<'a> {
    /// `[heads][2][quads(head_dim) * 4]`: the high and the low parts.
    pub(crate) parts: &'a [i8],
    /// `[heads]`.
    pub(crate) scales: &'a [f32],
    /// `[heads]`: what the sums of codes begin with.
    pub(crate) starts: &'a [[i32; 2]],
}

/// Groups of four dimensions: what the integer dot product takes at a time.
pub(crate) const fn quads(head_dim: usize) -> usize {
    head_dim.div_ceil(4)
}

/// Joins a segment to the running `state` (`[2][heads]`: maxima and sums) and `out` (`[heads][head_dim]`).
#[inline(always)]
pub(crate) fn attend<I: Isa>(isa: I, s: &Segment<'_>, state: &mut [f32], out: &mut [f32]) {
    let heads = state.len() / 2;
    let mut h = 0;
    while h < heads {
        // Four heads share each load of the cache.
        let step = if heads - h >= 4 { 4 } else { 1 };
        match (s.ty, step) {
            (KvType::F32, 4) => segment::<I, Floats<f32>, 4>(isa, s, h, state, out),
            (KvType::F32, _) => segment::<I, Floats<f32>, 1>(isa, s, h, state, out),
            (KvType::F16, 4) => segment::<I, Floats<u16>, 4>(isa, s, h, state, out),
            (KvType::F16, _) => segment::<I, Floats<u16>, 1>(isa, s, h, state, out),
            (KvType::Q8, 4) => segment::<I, Bytes8, 4>(isa, s, h, state, out),
            (KvType::Q8, _) => segment::<I, Bytes8, 1>(isa, s, h, state, out),
        }
        h += step;
    }
}

/// Joins what a segment gave on its own, `part` (`[heads][head_dim]`, then `[2][heads]`), to `state` and `out`.
#[inline(always)]
pub(crate) fn join<I: Isa>(isa: I, part: &[f32], first: bool, state: &mut [f32], out: &mut [f32]) {
    let (heads, head_dim) = (state.len() / 2, out.len() * 2 / state.len());
    let (part, rest) = part.split_at(out.len());
    for (h, (part, out)) in part.chunks(head_dim).zip(out.chunks_mut(head_dim)).enumerate() {
        let ([own], [old]) = factors(isa, first, [rest[h]], [rest[heads + h]], h, state);
        let (blocks, tail) = part.as_chunks::<16>();
        for (block, out) in blocks.iter().zip(out.chunks_mut(16)) {
            join_lanes(isa, isa.load(block), own, old, first, out);
        }
        if !tail.is_empty() {
            join_lanes(isa, isa.load(&padded(tail)), own, old, first, &mut out[16 * blocks.len()..]);
        }
    }
}

/// How the two sums of a segment are computed for Q heads from `h` on.
trait Cache {
    /// Scores of the positions the queries see; the others, up to a multiple of sixteen, get any value.
    fn scores<I: Isa, const Q: usize>(isa: I, s: &Segment<'_>, h: usize, weights: &mut [[f32; PAGE]; Q]);
    /// out = out * old + Σ weight * value * own. Weights of positions past `count` are 0.
    fn values<I: Isa, const Q: usize>(
        isa: I,
        s: &Segment<'_>,
        weights: &mut [[f32; PAGE]; Q],
        own: [f32; Q],
        old: [f32; Q],
        out: &mut [f32],
    );
}

#[inline(always)]
fn segment<I: Isa, C: Cache, const Q: usize>(
    isa: I,
    s: &Segment<'_>,
    h: usize,
    state: &mut [f32],
    out: &mut [f32],
) {
    let mut weights = [[0.0f32; PAGE]; Q];
    C::scores(isa, s, h, &mut weights);
    let (tops, sums) = softmax(isa, s, &mut weights);
    let (own, old) = factors(isa, s.first, tops, sums, h, state);
    C::values(isa, s, &mut weights, own, old, &mut out[h * s.head_dim..][..Q * s.head_dim]);
}

/// Makes weights exp(score - m) of the scores that the queries see and 0 of the others. Returns each m and each folded sum. Meanwhile
/// it asks for what is left between keys and values.
#[inline(always)]
fn softmax<I: Isa, const Q: usize>(
    isa: I,
    s: &Segment<'_>,
    scores: &mut [[f32; PAGE]; Q],
) -> ([f32; Q], [f32; Q]) {
    // Step by step for all heads, for each step of one waits for the one before.
    let mut lanes = [isa.splat(f32::NEG_INFINITY); Q];
    for h in 0..Q {
        scores[h][s.count..].fill(f32::NEG_INFINITY);
    }
    for i in 0..PAGE / 16 {
        for h in 0..Q {
            lanes[h] = isa.max(isa.load(&scores[h].as_chunks::<16>().0[i]), lanes[h]);
        }
    }
    let mut tops = [0.0; Q];
    for h in 0..Q {
        tops[h] = fold_max(isa, lanes[h]);
        lanes[h] = isa.splat(0.0);
    }
    let between = s.page.len() / 64 * (64 - FETCH) / (PAGE / 16);
    for i in 0..PAGE / 16 {
        fetch(isa, ahead(isa, s, s.page.len() / 2, i * between), 0, between);
        for h in 0..Q {
            let block = &mut scores[h].as_chunks_mut::<16>().0[i];
            let weights = exp(isa, isa.sub(isa.load(block), isa.splat(tops[h])));
            lanes[h] = isa.add(lanes[h], keep(isa, weights, block, s.count, i));
        }
    }
    let mut sums = [0.0; Q];
    for h in 0..Q {
        sums[h] = fold(isa, lanes[h]);
    }
    (tops, sums)
}

/// Stores lanes of a page, the i-th sixteen, with 0 for positions from `count` on. Returns what it stored.
#[inline(always)]
fn keep<I: Isa>(isa: I, lanes: I::F, out: &mut [f32; 16], count: usize, i: usize) -> I::F {
    isa.store(lanes, out);
    if count >= 16 * (i + 1) {
        return lanes;
    }
    out[count.saturating_sub(16 * i)..].fill(0.0);
    isa.load(out)
}

/// The factors that join a segment of maxima `tops` and sums `sums` (`own`) to what came before (`old`), which `state`
/// keeps account of.
#[inline(always)]
fn factors<I: Isa, const Q: usize>(
    isa: I,
    first: bool,
    tops: [f32; Q],
    sums: [f32; Q],
    h: usize,
    state: &mut [f32],
) -> ([f32; Q], [f32; Q]) {
    let (state_tops, state_sums) = state.split_at_mut(state.len() / 2);
    let (state_tops, state_sums) = (&mut state_tops[h..h + Q], &mut state_sums[h..h + Q]);
    if first {
        state_tops.copy_from_slice(&tops);
        state_sums.copy_from_slice(&sums);
        return ([1.0; Q], [0.0; Q]);
    }
    let mut lanes = [0.0; 16];
    for h in 0..Q {
        let top = if tops[h] > state_tops[h] { tops[h] } else { state_tops[h] };
        (lanes[h], lanes[8 + h]) = (tops[h] - top, state_tops[h] - top);
        state_tops[h] = top;
    }
    isa.store(exp(isa, isa.load(&lanes)), &mut lanes);
    let (mut own, mut old) = ([0.0; Q], [0.0; Q]);
    for h in 0..Q {
        (own[h], old[h]) = (lanes[h], lanes[8 + h]);
        state_sums[h] = state_sums[h] * old[h] + sums[h] * own[h];
    }
    (own, old)
}

/// out = out * old + sums * own, up to sixteen of them.
#[inline(always)]
fn join_lanes<I: Isa>(isa: I, sums: I::F, own: f32, old: f32, first: bool, out: &mut [f32]) {
    let mut joined = isa.mul(sums, isa.splat(own));
    if let Ok(out) = <&mut [f32; 16]>::try_from(&mut *out) {
        if !first {
            joined = isa.add(isa.mul(isa.load(out), isa.splat(old)), joined);
        }
        return isa.store(joined, out);
    }
    if !first {
        joined = isa.add(isa.mul(isa.load(&padded(out)), isa.splat(old)), joined);
    }
    let mut full = [0.0; 16];
    isa.store(joined, &mut full);
    out.copy_from_slice(&full[..out.len()]);
}

/// For 64 bytes read, so many are fetched: the rest is fetched between keys and values, while nothing is read, so that
/// memory is never idle.
pub(crate) const FETCH: usize = 56;

/// Where fetching stands when `at` bytes of the page are read and `between` more were fetched: never past the next page.
#[inline(always)]
fn ahead<I: Isa>(isa: I, s: &Segment<'_>, at: usize, between: usize) -> *const u8 {
    let at = isa.ahead_in_cache().min(s.page.len()) + at / 64 * FETCH + between;
    match at.checked_sub(s.page.len()) {
        None => s.page.as_ptr().wrapping_add(at),
        Some(at) => s.next.wrapping_add(at),
    }
}

/// Asks for `len` bytes.
#[inline(always)]
fn fetch<I: Isa>(isa: I, from: *const u8, at: usize, len: usize) {
    let mut line = 0;
    while line < len {
        isa.prefetch(from.wrapping_add(at + line));
        line += 64;
    }
}

/// Calls `Self::$body::<I, Q, P>` with $i = 0, P, 2 P … up to $count, P being 2 where the registers hold the sums and else 1.
macro_rules! two_at_a_time {
    ($i:ident in $count:expr => $body:ident($($arg:expr),*)) => {{
        let (count, mut $i) = ($count, 0);
        while $i < count {
            if I::SUMS >= 16 && $i + 1 < count {
                Self::$body::<I, Q, 2>($($arg),*);
                $i += 2;
            } else {
                Self::$body::<I, Q, 1>($($arg),*);
                $i += 1;
            }
        }
    }};
}

/// Stored floats.
trait Element: Plain {
    fn lanes<I: Isa>(isa: I, x: &[Self; 16]) -> I::F;
}
impl Element for f32 {
    #[inline(always)]
    fn lanes<I: Isa>(isa: I, x: &[f32; 16]) -> I::F {
        isa.load(x)
    }
}
impl Element for u16 {
    #[inline(always)]
    fn lanes<I: Isa>(isa: I, x: &[u16; 16]) -> I::F {
        isa.f16_lanes(x)
    }
}

struct Floats<T>(std::marker::PhantomData<T>);

impl<T: Element> Cache for Floats<T> {
    #[inline(always)]
    fn scores<I: Isa, const Q: usize>(isa: I, s: &Segment<'_>, h: usize, weights: &mut [[f32; PAGE]; Q]) {
        two_at_a_time!(pair in s.count.div_ceil(32) => score_pairs(isa, s, h, pair, weights));
    }

    #[inline(always)]
    fn values<I: Isa, const Q: usize>(
        isa: I,
        s: &Segment<'_>,
        weights: &mut [[f32; PAGE]; Q],
        own: [f32; Q],
        old: [f32; Q],
        out: &mut [f32],
    ) {
        two_at_a_time!(pair in s.head_dim.div_ceil(32) => value_pairs(isa, s, pair, weights, own, old, out));
    }
}

impl<T: Element> Floats<T> {
    /// Bytes of two registers.
    const PAIR: usize = size_of::<[T; 32]>();

    /// For P runs of two registers, all of one length, and Q rows of as many factors the sums of the registers times the factors,
    /// in order. Meanwhile what lies `far` ahead of each run is asked for.
    #[inline(always)]
    fn sums<I: Isa, const Q: usize, const P: usize>(
        isa: I,
        runs: [&[[T; 32]]; P],
        factors: [&[f32]; Q],
        far: [*const u8; P],
    ) -> [[[I::F; 2]; Q]; P] {
        if 2 * P * Q <= I::SUMS {
            return Self::sums_from::<I, Q, P, 2>(isa, runs, factors, Some(far), 0);
        }
        let first = Self::sums_from::<I, Q, P, 1>(isa, runs, factors, Some(far), 0);
        let second = Self::sums_from::<I, Q, P, 1>(isa, runs, factors, None, 1);
        let mut sums = [[[isa.splat(0.0); 2]; Q]; P];
        for p in 0..P {
            for h in 0..Q {
                sums[p][h] = [first[p][h][0], second[p][h][0]];
            }
        }
        sums
    }

    /// [`Self::sums`] of B of the two registers, from `begin` on.
    #[inline(always)]
    fn sums_from<I: Isa, const Q: usize, const P: usize, const B: usize>(
        isa: I,
        runs: [&[[T; 32]]; P],
        factors: [&[f32]; Q],
        far: Option<[*const u8; P]>,
        begin: usize,
    ) -> [[[I::F; B]; Q]; P] {
        let mut sums = [[[isa.splat(0.0); B]; Q]; P];
        for i in 0..runs[0].len() {
            let mut x = [[isa.splat(0.0); B]; P];
            for p in 0..P {
                if let Some(far) = far {
                    fetch(isa, far[p], i * Self::PAIR / 64 * FETCH, Self::PAIR);
                }
                let two = runs[p][i].as_chunks::<16>().0;
                for b in 0..B {
                    x[p][b] = T::lanes(isa, &two[begin + b]);
                }
            }
            for h in 0..Q {
                let factor = isa.splat(factors[h][i]);
                for p in 0..P {
                    for b in 0..B {
                        sums[p][h][b] = isa.add(sums[p][h][b], isa.mul(x[p][b], factor));
                    }
                }
            }
        }
        sums
    }

    /// [`Cache::scores`] of P times 32 positions.
    #[inline(always)]
    fn score_pairs<I: Isa, const Q: usize, const P: usize>(
        isa: I,
        s: &Segment<'_>,
        h: usize,
        pair: usize,
        weights: &mut [[f32; PAGE]; Q],
    ) {
        let n = s.head_dim;
        let all = &cast::<T>(s.page).as_chunks::<32>().0[..PAGE / 32 * n];
        let queries = &s.q[h * n..][..Q * n];
        let (mut q, mut keys, mut far) = ([&queries[..0]; Q], [&all[..0]; P], [std::ptr::null(); P]);
        for h in 0..Q {
            q[h] = &queries[h * n..][..n];
        }
        for p in 0..P {
            keys[p] = &all[(pair + p) * n..][..n];
            far[p] = ahead(isa, s, (pair + p) * n * Self::PAIR, 0);
        }
        let sums = Self::sums(isa, keys, q, far);
        for p in 0..P {
            for h in 0..Q {
                for b in 0..2 {
                    let out = &mut weights[h].as_chunks_mut::<16>().0[2 * (pair + p) + b];
                    isa.store(isa.mul(sums[p][h][b], isa.splat(s.scale)), out);
                }
            }
        }
    }

    /// [`Cache::values`] of P times 32 dimensions.
    #[inline(always)]
    fn value_pairs<I: Isa, const Q: usize, const P: usize>(
        isa: I,
        s: &Segment<'_>,
        pair: usize,
        weights: &[[f32; PAGE]; Q],
        own: [f32; Q],
        old: [f32; Q],
        out: &mut [f32],
    ) {
        let before = PAGE / 32 * s.head_dim;
        let all = &cast::<T>(s.page).as_chunks::<32>().0[before..];
        let count = s.count.min(PAGE);
        let (mut own_weights, mut values, mut far) =
            ([&weights[0][..0]; Q], [&all[..0]; P], [std::ptr::null(); P]);
        for h in 0..Q {
            own_weights[h] = &weights[h][..count];
        }
        for p in 0..P {
            values[p] = &all[(pair + p) * PAGE..][..count];
            let at = (before + (pair + p) * PAGE) * Self::PAIR;
            far[p] = ahead(isa, s, at, s.page.len() / 64 * (64 - FETCH));
        }
        let sums = Self::sums(isa, values, own_weights, far);
        for p in 0..P {
            for b in 0..2 {
                let d = 32 * (pair + p) + 16 * b;
                for h in 0..Q {
                    let n = s.head_dim.saturating_sub(d).min(16);
                    let out = &mut out[h * s.head_dim..][..s.head_dim];
                    if n > 0 {
                        join_lanes(isa, sums[p][h][b], own[h], old[h], s.first, &mut out[d..d + n]);
                    }
                }
            }
        }
    }
}

/// The largest integer that [`split`] takes: a high part of 127 and a low part of 0.
const LARGEST: f32 = 127.0 * 128.0;

/// Splits lanes of at most ±[`LARGEST`] into integers: x ≈ 128 * high + low, the low part at most ±64. Adds the parts to
/// `sums`.
#[inline(always)]
fn split<I: Isa>(isa: I, x: I::F, parts: [&mut [i8; 16]; 2], sums: &mut [I::F; 2]) {
    let high = isa.round(isa.mul(x, isa.splat(1.0 / 128.0)));
    let low = isa.round(isa.sub(x, isa.mul(high, isa.splat(128.0))));
    let [highs, lows] = parts;
    isa.to_i8(high, highs);
    isa.to_i8(low, lows);
    *sums = [isa.add(sums[0], high), isa.add(sums[1], low)];
}

/// The largest of non-negative lanes, at least 1e-30.
#[inline(always)]
fn largest<I: Isa>(isa: I, top: I::F) -> f32 {
    fold_max(isa, isa.max(top, isa.splat(1e-30)))
}

/// What the sums of products with stored codes begin with: a code is the integer plus 128. `sums` are those of the
/// parts, which float32 holds exactly.
#[inline(always)]
fn starts<I: Isa>(isa: I, sums: [I::F; 2]) -> [i32; 2] {
    // Of a cache that somebody forged the sums may be anything.
    let start = |sum: f32| (sum as i32).wrapping_mul(-128);
    [start(fold(isa, sums[0])), start(fold(isa, sums[1]))]
}

/// Makes queries (`[heads][head_dim]`) integers, as [`Codes`] has them: q ≈ (128 * high + low) * scale, the parts filled
/// up with zeros.
#[inline(always)]
pub(crate) fn code_queries<I: Isa>(
    isa: I,
    q: &[f32],
    head_dim: usize,
    parts: &mut [i8],
    scales: &mut [f32],
    starts: &mut [[i32; 2]],
) {
    let width = 4 * quads(head_dim);
    for (h, q) in q.chunks_exact(head_dim).enumerate() {
        let mut top = isa.splat(0.0);
        for block in q.chunks(16) {
            top = isa.max(isa.abs(isa.load(&padded(block))), top);
        }
        let top = largest(isa, top);
        let inverse = isa.splat(LARGEST / top);
        let mut sums = [isa.splat(0.0); 2];
        let (highs, lows) = parts[h * 2 * width..][..2 * width].split_at_mut(width);
        for ((block, high), low) in q.chunks(16).zip(highs.chunks_mut(16)).zip(lows.chunks_mut(16)) {
            let (mut h, mut l) = ([0; 16], [0; 16]);
            split(isa, isa.mul(isa.load(&padded(block)), inverse), [&mut h, &mut l], &mut sums);
            high.copy_from_slice(&h[..high.len()]);
            low.copy_from_slice(&l[..low.len()]);
        }
        scales[h] = top / LARGEST;
        starts[h] = self::starts(isa, sums);
    }
}

/// Codes of eight bits with a scale a position.
struct Bytes8;

impl Bytes8 {
    /// Bytes before the values, and before the scales.
    #[inline(always)]
    fn offsets(head_dim: usize) -> (usize, usize) {
        let keys = quads(head_dim) * 4 * PAGE;
        (keys, keys + head_dim.next_multiple_of(16) * PAGE)
    }

    /// [`Cache::scores`] of P times 16 positions.
    #[inline(always)]
    fn score_blocks<I: Isa, const Q: usize, const P: usize>(
        isa: I,
        s: &Segment<'_>,
        h: usize,
        block: usize,
        parts: [[&[i8]; 2]; Q],
        starts: [[i32; 2]; Q],
        weights: &mut [[f32; PAGE]; Q],
    ) {
        let n = quads(s.head_dim);
        let (value_bytes, scale_bytes) = Self::offsets(s.head_dim);
        let all = s.page[..value_bytes].as_chunks::<64>().0;
        let scales = cast::<f32>(&s.page[scale_bytes..]).as_chunks::<16>().0;
        let (mut keys, mut far) = ([&all[..0]; P], [std::ptr::null(); P]);
        for p in 0..P {
            keys[p] = &all[(block + p) * n..][..n];
            far[p] = ahead(isa, s, (block + p) * n * 64, 0);
        }
        let sums = isa.dot_split(keys, parts, starts, far);
        for p in 0..P {
            let position_scales = isa.load(&scales[block + p]);
            for i in 0..Q {
                let factor = isa.splat(s.codes.scales[h + i] * s.scale);
                let out = &mut weights[i].as_chunks_mut::<16>().0[block + p];
                isa.store(isa.mul(isa.mul(sums[p][i], position_scales), factor), out);
            }
        }
    }

    /// [`Cache::values`] of P times 16 dimensions, the weights as integers times `factors`.
    #[inline(always)]
    fn value_blocks<I: Isa, const Q: usize, const P: usize>(
        isa: I,
        s: &Segment<'_>,
        block: usize,
        parts: [[&[i8]; 2]; Q],
        starts: [[i32; 2]; Q],
        factors: [f32; Q],
        own: [f32; Q],
        old: [f32; Q],
        out: &mut [f32],
    ) {
        let (value_bytes, scale_bytes) = Self::offsets(s.head_dim);
        let all = s.page[value_bytes..scale_bytes].as_chunks::<64>().0;
        let (mut values, mut far) = ([&all[..0]; P], [std::ptr::null(); P]);
        for p in 0..P {
            values[p] = &all[(block + p) * (PAGE / 4)..][..s.count.div_ceil(4)];
            let at = value_bytes + (block + p) * PAGE * 16;
            far[p] = ahead(isa, s, at, s.page.len() / 64 * (64 - FETCH));
        }
        let sums = isa.dot_split(values, parts, starts, far);
        for p in 0..P {
            let d = 16 * (block + p);
            let n = (s.head_dim - d).min(16);
            for h in 0..Q {
                let out = &mut out[h * s.head_dim + d..][..n];
                join_lanes(isa, isa.mul(sums[p][h], isa.splat(factors[h])), own[h], old[h], s.first, out);
            }
        }
    }
}

impl Cache for Bytes8 {
    #[inline(always)]
    fn scores<I: Isa, const Q: usize>(isa: I, s: &Segment<'_>, h: usize, weights: &mut [[f32; PAGE]; Q]) {
        let n = quads(s.head_dim);
        let (mut parts, mut starts) = ([[&s.codes.parts[..0]; 2]; Q], [[0; 2]; Q]);
        for i in 0..Q {
            let both = &s.codes.parts[(h + i) * 8 * n..][..8 * n];
            parts[i] = [&both[..4 * n], &both[4 * n..]];
            starts[i] = s.codes.starts[h + i];
        }
        two_at_a_time!(block in s.count.div_ceil(16) => score_blocks(isa, s, h, block, parts, starts, weights));
    }

    #[inline(always)]
    fn values<I: Isa, const Q: usize>(
        isa: I,
        s: &Segment<'_>,
        weights: &mut [[f32; PAGE]; Q],
        own: [f32; Q],
        old: [f32; Q],
        out: &mut [f32],
    ) {
        let (_, scale_bytes) = Self::offsets(s.head_dim);
        let scales = cast::<f32>(&s.page[scale_bytes..][4 * PAGE..]).as_chunks::<16>().0;
        // In four bytes each: positions that a quad of the dot product begins with.
        let quads = s.count.div_ceil(4);
        let (mut codes, mut starts, mut factors) = ([[[0i8; PAGE]; 2]; Q], [[0; 2]; Q], [0.0; Q]);
        let (mut tops, mut inverses) = ([isa.splat(0.0); Q], [isa.splat(0.0); Q]);
        for i in 0..PAGE / 16 {
            for h in 0..Q {
                // What is past `count` may be of another sequence.
                let block = &mut weights[h].as_chunks_mut::<16>().0[i];
                let scaled = isa.mul(isa.load(block), isa.load(&scales[i]));
                tops[h] = isa.max(keep(isa, scaled, block, s.count, i), tops[h]);
            }
        }
        for h in 0..Q {
            let top = largest(isa, tops[h]);
            (inverses[h], factors[h]) = (isa.splat(LARGEST / top), top / LARGEST);
        }
        let mut sums = [[isa.splat(0.0); 2]; Q];
        for i in 0..PAGE / 16 {
            for h in 0..Q {
                let [high, low] = &mut codes[h];
                let parts = [&mut high.as_chunks_mut::<16>().0[i], &mut low.as_chunks_mut::<16>().0[i]];
                let block = isa.load(&weights[h].as_chunks::<16>().0[i]);
                split(isa, isa.mul(block, inverses[h]), parts, &mut sums[h]);
            }
        }
        for h in 0..Q {
            starts[h] = self::starts(isa, sums[h]);
        }
        let mut parts = [[&codes[0][0][..0]; 2]; Q];
        for h in 0..Q {
            parts[h] = [&codes[h][0][..4 * quads], &codes[h][1][..4 * quads]];
        }
        two_at_a_time!(block in s.head_dim.div_ceil(16) => value_blocks(isa, s, block, parts, starts, factors, own, old, out));
    }
}
