//! The key/value cache: its types, its layout, and the two phases of a forward pass that touch it.

use crate::attention::{Codes, Segment, quads};
use crate::compute::{Compute, Rows};
use crate::half::f32_to_f16;
use crate::isa;
use crate::memory::{Aligned, Counted, HugeBuffer, MemoryPart, cast_mut, taken};
use crate::ops::PAGE;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// How the cache stores a number. Each type is a definition of its own, the same bits on every machine.
///
/// KL divergence from the reference in float64, over that of the reference in float32, on the five golden models
/// (`tests/goldens.rs`; the first is a trained one): f32 1.0, 1.1, 0.8, 0.6, 0.7; f16 1.4, 1.8, 1.9, 2.8, 2.1;
/// q8 2.3, 4.1, 3.1, 7.1, 4.1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvType {
    /// IEEE single precision: what the model computed.
    #[default]
    F32,
    /// IEEE half precision, rounded to nearest, halves to even.
    F16,
    /// Eight bits: round(x * (127 / m)) with m = max|x| over one position of one head, and m / 127 as its float32 scale.
    Q8,
}

impl KvType {
    /// All of them; the order, as the numbers, is part of saved caches.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Q8];

    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        ["f32", "f16", "q8"][self as usize]
    }
}

/// The shape of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// How it stores a number.
    pub ty: KvType,
    /// Layers of the model.
    pub layers: usize,
    /// Key/value heads.
    pub heads: usize,
    /// Query heads, a multiple of them.
    pub query_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl KvShape {
    /// Bytes that PAGE positions take: keys and values of all layers, and the room in which attention over a long context
    /// is summed in parallel. None where that overflows.
    pub fn page_bytes(&self) -> Option<usize> {
        let data = self.head_bytes()?.checked_mul(self.layers)?.checked_mul(self.heads)?;
        data.checked_add(self.part_floats()?.checked_mul(4 * self.heads)?)
    }

    /// Bytes of the keys and values of PAGE positions, as [`KvStore::page`] has them; 0 for a shape that overflows.
    pub fn data_bytes(&self) -> usize {
        self.head_bytes()
            .and_then(|bytes| bytes.checked_mul(self.layers)?.checked_mul(self.heads))
            .unwrap_or(0)
    }

    /// Bytes that attention takes for each row of a step.
    pub fn row_bytes(&self) -> usize {
        let coded = if self.ty == KvType::Q8 { 8 * quads(self.head_dim) + 12 } else { 0 };
        self.query_heads * (8 + coded) + (self.heads + 1) * size_of::<AtomicUsize>()
    }

    /// Bytes of one page of one head of one layer:
    ///
    /// - floats: keys `[PAGE / 32][head_dim][32]`, two registers of positions side by side; values
    ///   `[head_dim / 32][PAGE][32]`, two registers of dimensions.
    /// - q8: codes plus 128, keys `[PAGE / 16][head_dim / 4][16][4]`, values `[head_dim / 16][PAGE / 4][16][4]`: what an
    ///   integer dot product of four takes. Then the scales of the keys and of the values, `[PAGE]` each.
    fn head_bytes(&self) -> Option<usize> {
        let values = self.head_dim.checked_next_multiple_of(if self.ty == KvType::Q8 { 16 } else { 32 })?;
        match self.ty {
            KvType::F32 => self.head_dim.checked_add(values)?.checked_mul(4 * PAGE),
            KvType::F16 => self.head_dim.checked_add(values)?.checked_mul(2 * PAGE),
            KvType::Q8 => {
                quads(self.head_dim).checked_mul(4)?.checked_add(values)?.checked_add(8)?.checked_mul(PAGE)
            }
        }
    }

    /// Floats that one segment of one key/value head gives: see [`crate::attention::join`].
    fn part_floats(&self) -> Option<usize> {
        (self.query_heads / self.heads.max(1))
            .checked_mul(self.head_dim.checked_add(2)?)?
            .checked_next_multiple_of(16)
    }
}

/// The keys and values of all layers, in pages of [`PAGE`] positions, and the workspace of attention. Which page belongs
/// to which sequence is the caller's affair.
pub struct KvStore {
    shape: KvShape,
    head_bytes: usize,
    /// `[pages][layers][heads][head_bytes]`.
    data: HugeBuffer,
    pages: usize,
    /// `[segments][heads][part_floats]`, for as many segments as there are pages.
    parts: HugeBuffer,
    part_floats: usize,
    /// `[rows][query_heads][2]`: see [`crate::attention::attend`].
    states: Vec<f32>,
    /// `[rows][heads]`: how many segments are joined to the state.
    joined: Vec<AtomicUsize>,
    /// `[rows]`: segments of a row and those before it.
    ends: Vec<usize>,
    queries: Queries,
    _counted: Counted,
}

/// The queries of a step as integers: see [`Codes`]. Empty but for q8.
struct Queries {
    parts: Aligned<i8>,
    scales: Vec<f32>,
    starts: Vec<[i32; 2]>,
}

impl KvStore {
    /// Room for `pages` pages, and for steps of up to `rows` rows; None where the system refuses it. Memory is taken as it
    /// is first written.
    pub fn new(shape: KvShape, pages: usize, rows: usize) -> Option<Self> {
        shape.page_bytes()?.checked_mul(pages)?;
        let (head_bytes, part_floats) = (shape.head_bytes()?, shape.part_floats()?);
        let queries = rows.checked_mul(shape.query_heads)?;
        let coded = if shape.ty == KvType::Q8 { queries } else { 0 };
        let states = vec![0.0; 2 * queries];
        let joined: Vec<_> = (0..rows.checked_mul(shape.heads)?).map(|_| AtomicUsize::new(0)).collect();
        let queries = Queries {
            parts: Aligned::zeroed(coded.checked_mul(8 * quads(shape.head_dim))?),
            scales: vec![0.0; coded],
            starts: vec![[0; 2]; coded],
        };
        let ends = vec![0; rows];
        let coded = taken(&queries.scales) + taken(&queries.starts);
        let lists = taken(&states) + taken(&joined) + taken(&ends) + coded;
        Some(Self {
            shape,
            head_bytes,
            data: HugeBuffer::new(MemoryPart::Cache, head_bytes * shape.heads * shape.layers * pages)?,
            pages,
            parts: HugeBuffer::new(MemoryPart::Cache, 4 * part_floats * shape.heads * pages)?,
            part_floats,
            states,
            joined,
            ends,
            queries,
            _counted: Counted::new(MemoryPart::Scratch, lists),
        })
    }

    /// The keys and values of a page, of all layers and heads; the same on every machine. Bytes of positions that were never
    /// written are of no account.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn page(&self, page: u32) -> &[u8] {
        let len = self.shape.data_bytes();
        &self.data[page as usize * len..][..len]
    }

    /// As [`Self::page`]. Any bytes are valid, though they may be numbers that are not finite.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn page_mut(&mut self, page: u32) -> &mut [u8] {
        let len = self.shape.data_bytes();
        &mut self.data[page as usize * len..][..len]
    }

    /// The shape it was made with.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Copies page `from` to page `to`.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn copy_page(&mut self, from: u32, to: u32) {
        let bytes = self.shape.data_bytes();
        let start = from as usize * bytes;
        self.data.copy_within(start..start + bytes, to as usize * bytes);
    }
}

/// Writes one position of one head.
fn store(shape: &KvShape, page: &mut [u8], slot: usize, keys: &[f32], values: &[f32]) {
    match shape.ty {
        KvType::F32 => store_floats(cast_mut(page), slot, keys, values, |x| x),
        KvType::F16 => store_floats(cast_mut(page), slot, keys, values, f32_to_f16),
        KvType::Q8 => {
            let n = quads(shape.head_dim) * 4;
            let (codes, scales) = page.split_at_mut(page.len() - 8 * PAGE);
            let (k_codes, v_codes) = codes.split_at_mut(n * PAGE);
            let scales: &mut [f32] = cast_mut(scales);
            let (scale, inverse) = scale_of(keys);
            scales[slot] = scale;
            let block = &mut k_codes[slot / 16 * 16 * n..][..16 * n];
            ask(block, 4 * (slot % 16), 64);
            for (quad, x) in block.as_chunks_mut::<64>().0.iter_mut().zip(keys.chunks(4)) {
                for (i, &x) in x.iter().enumerate() {
                    quad[slot % 16 * 4 + i] = code(x, inverse);
                }
            }
            let (scale, inverse) = scale_of(values);
            scales[PAGE + slot] = scale;
            for (block, x) in v_codes.as_chunks_mut::<{ 16 * PAGE }>().0.iter_mut().zip(values.chunks(16)) {
                let quad = &mut block.as_chunks_mut::<64>().0[slot / 4];
                for (i, &x) in x.iter().enumerate() {
                    quad[i * 4 + slot % 4] = code(x, inverse);
                }
            }
        }
    }
}

fn store_floats<T: Copy>(page: &mut [T], slot: usize, keys: &[f32], values: &[f32], to: impl Fn(f32) -> T) {
    let (k_page, v_page) = page.split_at_mut(keys.len() * PAGE);
    let block = &mut k_page[slot / 32 * 32 * keys.len()..][..32 * keys.len()];
    ask(block, slot % 32, 32);
    for (lanes, &x) in block.as_chunks_mut::<32>().0.iter_mut().zip(keys) {
        lanes[slot % 32] = to(x);
    }
    for (block, x) in v_page.as_chunks_mut::<{ 32 * PAGE }>().0.iter_mut().zip(values.chunks(32)) {
        for (lane, &x) in block[32 * slot..].iter_mut().zip(x) {
            *lane = to(x);
        }
    }
}

/// Asks for every `step`-th element from `first` on: each is on a line of its own, and writes wait for theirs in turn.
fn ask<T>(x: &[T], first: usize, step: usize) {
    x[first..].iter().step_by(step).for_each(|x| isa::prefetch_soon(std::ptr::from_ref(x).cast()));
}

/// The scale of a position's codes, and the factor that makes them.
fn scale_of(x: &[f32]) -> (f32, f32) {
    let top = x.iter().fold(1e-30f32, |top, x| if x.abs() > top { x.abs() } else { top });
    (top / 127.0, 127.0 / top)
}

/// The code of x, plus 128. NaN is -127.
fn code(x: f32, inverse: f32) -> u8 {
    let x = x * inverse;
    let x = if x > -127.0 { x } else { -127.0 };
    let x = if x < 127.0 { x } else { 127.0 };
    // Adding 1.5 * 2^23 rounds to an integer, halves to even, and leaves it in the last bits.
    ((x + 12_582_912.0).to_bits() as u8).wrapping_add(128)
}

/// Stores a head's part of `token`'s key and value, each `[tokens][heads * head_dim]`.
///
/// # Safety
/// Nobody else may use the head's area of the page meanwhile.
unsafe fn store_head(
    shape: &KvShape,
    areas: &Rows<'_, u8>,
    layer: usize,
    head: usize,
    both: [&[f32]; 2],
    token: usize,
    (pages, len): (&[u32], usize),
) {
    let at = (token * shape.heads + head) * shape.head_dim;
    let [keys, values] = both.map(|x| &x[at..][..shape.head_dim]);
    let page = pages[(len - 1) / PAGE] as usize;
    // SAFETY: the caller's contract.
    let area = unsafe { areas.row((page * shape.layers + layer) * shape.heads + head) };
    store(shape, area, (len - 1) % PAGE, keys, values);
}

/// Bytes of the cache that a thread takes at a time where a token's past is split.
const PART_BYTES: usize = 64 << 10;

/// Most tokens that pass over a page together.
const TILE: usize = 16;

impl Compute {
    /// Writes the keys and values (`[tokens][heads * head_dim]` each) of a step's tokens into the cache. For a token,
    /// `sequence` gives the pages of its sequence and its position plus one.
    ///
    /// # Panics
    /// If the pages do not reach the position or name a page outside of the store.
    pub fn store<'a>(
        &self,
        kv: &mut KvStore,
        layer: usize,
        keys: &[f32],
        values: &[f32],
        sequence: impl Fn(usize) -> (&'a [u32], usize) + Sync,
    ) {
        let shape = kv.shape;
        let width = shape.heads * shape.head_dim;
        assert!(layer < shape.layers && keys.len() == values.len());
        let areas = Rows::new(&mut kv.data, kv.head_bytes);
        self.pool().run(shape.heads, |head, _| {
            for token in 0..keys.len() / width {
                // SAFETY: each head is one task.
                unsafe { store_head(&shape, &areas, layer, head, [keys, values], token, sequence(token)) };
            }
        });
    }

    /// Causal attention with grouped queries. `q`, `out`: `[tokens][query_heads * head_dim]`. For a token, `sequence` gives
    /// the pages of its sequence and the number of positions it sees, itself included. With `new`, their keys and values, it is as
    /// if [`Self::store`] were called first.
    ///
    /// # Panics
    /// If there are more tokens than the store's rows, or pages do not reach the positions.
    pub fn attention<'a>(
        &self,
        kv: &mut KvStore,
        layer: usize,
        q: &[f32],
        new: Option<[&[f32]; 2]>,
        sequence: impl Fn(usize) -> (&'a [u32], usize) + Sync,
        out: &mut [f32],
    ) {
        let shape = kv.shape;
        let KvShape { ty, layers, heads, query_heads, head_dim } = shape;
        let (tokens, group) = (q.len() / (query_heads * head_dim), query_heads / heads);
        assert!(layer < layers && out.len() == q.len() && kv.states.len() >= 2 * tokens * query_heads);
        // Where no token sees the key of another, the task that comes to its last page of a head stores its key and value.
        let alone = |token: usize| {
            let (pages, len) = sequence(token);
            let own = pages[(len - 1) / PAGE];
            let sees = |(pages, len): (&[u32], usize)| pages[..len.div_ceil(PAGE)].contains(&own);
            (0..tokens).all(|other| other == token || !sees(sequence(other)))
        };
        let own = new.filter(|_| tokens <= TILE && (0..tokens).all(alone));
        if let (Some([keys, values]), None) = (new, own) {
            self.store(kv, layer, keys, values, &sequence);
        }
        let (kernels, threads, n) = (self.kernels(), self.pool().threads(), 8 * quads(head_dim));
        let queries = &mut kv.queries;
        if ty == KvType::Q8 {
            let parts = Rows::new(&mut queries.parts, query_heads * n);
            let scales = Rows::new(&mut queries.scales, query_heads);
            let starts = Rows::new(&mut queries.starts, query_heads);
            self.pool().run(tokens, |token, _| {
                // SAFETY: each token is one task.
                let (parts, scales, starts) =
                    unsafe { (parts.row(token), scales.row(token), starts.row(token)) };
                let row = &q[token * query_heads * head_dim..][..query_heads * head_dim];
                kernels.code_queries(row, head_dim, parts, scales, starts);
            });
        }
        let (head_bytes, queries, areas) =
            (kv.head_bytes, &kv.queries, Rows::new(&mut kv.data, kv.head_bytes));
        let area = move |pages: &[u32], segment: usize, head: usize| {
            (pages[segment] as usize * layers + layer) * heads + head
        };
        let store_own = |token: usize, head: usize| {
            if let Some(both) = own {
                // SAFETY: only the task that comes to a token's last page of a head calls this, before it reads the page, and no
                // other token has that page.
                unsafe { store_head(&shape, &areas, layer, head, both, token, sequence(token)) };
            }
        };
        // The segment of `head` that begins at position `segment * PAGE`, for a token that sees `len` positions.
        let look = |token: usize, head: usize, pages: &[u32], segment: usize, len: usize| {
            let row = token * heads + head;
            // SAFETY: what was to be stored in this page is.
            let page = unsafe { areas.shared(area(pages, segment, head)) };
            let codes = match ty {
                KvType::Q8 => Codes {
                    parts: &queries.parts[row * group * n..][..group * n],
                    scales: &queries.scales[row * group..][..group],
                    starts: &queries.starts[row * group..][..group],
                },
                _ => Codes::default(),
            };
            Segment {
                ty,
                head_dim,
                scale: 1.0 / (head_dim as f32).sqrt(),
                page,
                next: page.as_ptr(),
                count: (len - segment * PAGE).min(PAGE),
                first: segment == 0,
                q: &q[row * group * head_dim..][..group * head_dim],
                codes,
            }
        };
        let outs = Rows::new(out, group * head_dim);
        let states = Rows::new(&mut kv.states, 2 * group);
        let finish = |state: &[f32], out: &mut [f32]| {
            for (head, total) in out.chunks_exact_mut(head_dim).zip(&state[group..]) {
                head.iter_mut().for_each(|x| *x /= total);
            }
        };

        // Asked for once, as parts that no two tasks share follow from it.
        let mut all = 0;
        for (token, end) in kv.ends[..tokens].iter_mut().enumerate() {
            all += sequence(token).1.div_ceil(PAGE);
            *end = all;
        }
        let before = |token: usize| token.checked_sub(1).map_or(0, |last| kv.ends[last]);
        let segments = |token: usize| kv.ends[token] - before(token);
        let longest = (0..tokens).map(segments).max().unwrap_or(0);
        if threads > 1 && tokens * heads < 8 * threads && longest >= 4 && all <= kv.pages {
            // A few tokens with a long past. A thread goes along the segments of a head, and joins them on the way if it has those from
            // the first on. The others are computed on their own and joined, in order, at the end.
            let parts = Rows::new(cast_mut(&mut kv.parts), kv.part_floats);
            let joined = &kv.joined[..tokens * heads];
            joined.iter().for_each(|joined| joined.store(0, Relaxed));
            let all = longest * heads;
            let part = (PART_BYTES / head_bytes).max(1);
            self.pool().run_ranges(tokens * all, part, part, |range, _| {
                for item in range {
                    let (token, head, segment) = (item / all, item % all / longest, item % longest);
                    let ((pages, len), segments) = (sequence(token), segments(token));
                    if segment >= segments {
                        continue;
                    }
                    if segment + 1 == segments {
                        store_own(token, head);
                    }
                    let mut look = look(token, head, pages, segment, len);
                    match segment + 1 < segments {
                        true => look.next = areas.place(area(pages, segment + 1, head)),
                        false if head + 1 < heads => look.next = areas.place(area(pages, 0, head + 1)),
                        false => (),
                    }
                    let row = token * heads + head;
                    if joined[row].load(Acquire) == segment {
                        // SAFETY: this segment is part of one task, and whoever joined those before has done with them.
                        let (state, out) = unsafe { (states.row(row), outs.row(row)) };
                        kernels.attend(&look, state, out);
                        joined[row].store(segment + 1, Release);
                        continue;
                    }
                    look.first = true;
                    // SAFETY: each segment of each head of each token is part of one task.
                    let part = unsafe { parts.row((before(token) + segment) * heads + head) };
                    let (out, state) = part.split_at_mut(group * head_dim);
                    kernels.attend(&look, &mut state[..2 * group], out);
                }
            });
            self.pool().run(tokens * heads, |task, _| {
                let (token, head) = (task / heads, task % heads);
                // SAFETY: each head of each token is one task.
                let (state, out) = unsafe { (states.row(task), outs.row(task)) };
                for segment in joined[task].load(Acquire)..segments(token) {
                    // SAFETY: as above.
                    let part = unsafe { parts.row((before(token) + segment) * heads + head) };
                    kernels.join(part, segment == 0, state, out);
                }
                finish(state, out);
            });
            return;
        }
        // Neighbouring tokens pass over a page of a head together, while it is in the cache of the core.
        let tile = (tokens * heads / (8 * threads)).clamp(1, TILE);
        let tiles = tokens.div_ceil(tile);
        self.pool().run(tiles * heads, |task, _| {
            let head = task / tiles;
            let end = (task % tiles * tile + tile).min(tokens);
            let mut first = task % tiles * tile;
            (first..end).for_each(|token| store_own(token, head));
            while first < end {
                let pages = sequence(first).0;
                let same = |&token: &usize| std::ptr::eq(sequence(token).0, pages);
                let run = first..(first + 1..end).find(|token| !same(token)).unwrap_or(end);
                for segment in 0..run.clone().map(segments).max().unwrap_or(0) {
                    for token in run.clone().filter(|&token| segment < segments(token)) {
                        let mut look = look(token, head, pages, segment, sequence(token).1);
                        if token + 1 == run.end && segment + 1 < segments(token) {
                            look.next = areas.place(area(pages, segment + 1, head));
                        }
                        // SAFETY: each head of each token is part of one task.
                        let (state, out) =
                            unsafe { (states.row(token * heads + head), outs.row(token * heads + head)) };
                        kernels.attend(&look, state, out);
                    }
                }
                for token in run.clone() {
                    // SAFETY: as above.
                    let (state, out) =
                        unsafe { (states.row(token * heads + head), outs.row(token * heads + head)) };
                    finish(state, out);
                }
                first = run.end;
            }
        });
    }
}
