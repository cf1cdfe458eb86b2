//! The parallel phases of a forward pass: kernels run over all threads of a pool.
//!
//! Every function checks its lengths once, splits its output into disjoint parts and returns when all are written. The
//! result never depends on the number of threads: each element is computed whole by one task.

use crate::memory::{Aligned, Bytes, Counted, MemoryPart, taken};
use crate::ops::{FloatType, LISTED};
use crate::pool::Pool;
use crate::table::Kernels;
use crate::ternary::columns::GROUP;
use crate::ternary::lookup;
use crate::ternary::panel::{BLOCK, Part, Source};
use crate::ternary::{
    self, Activations, Layout, OutPtr, ROW_TOKENS, STEP, StoredRows, Which, columns, tiles,
};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

/// A ternary matrix `[rows][columns]` in one of the layouts of [`crate::ternary`], with one scale.
pub struct TernaryMatrix {
    bytes: Bytes,
    layout: Layout,
    rows: usize,
    columns: usize,
    scale: f32,
}

impl TernaryMatrix {
    /// Widest row: keeps every intermediate sum of every kernel inside 32 bits, with room.
    pub const MAX_COLUMNS: usize = 1 << 20;

    /// A matrix stored in [`Layout::bytes`].
    ///
    /// # Panics
    /// If the bytes are not exactly that many, or a row is empty or wider than [`Self::MAX_COLUMNS`], or than
    /// [`columns::MAX_COLUMNS`] where it is stored by columns.
    pub fn new(bytes: Bytes, layout: Layout, rows: usize, columns: usize, scale: f32) -> Self {
        let widest = match layout {
            Layout::Rows | Layout::Base3 => Self::MAX_COLUMNS,
            Layout::Columns => columns::MAX_COLUMNS,
        };
        assert!((1..=widest).contains(&columns), "{columns} columns");
        assert_eq!(bytes.len(), layout.bytes(rows, columns), "stored bytes");
        Self { bytes, layout, rows, columns, scale }
    }
    /// Output width.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Input width.
    pub fn columns(&self) -> usize {
        self.columns
    }
    /// Of one stored by rows.
    fn stored_rows(&self) -> StoredRows<'_> {
        let base3 = self.layout == Layout::Base3;
        StoredRows { bytes: &self.bytes, row_bytes: self.bytes.len() / self.rows, base3 }
    }
    /// How it is stored.
    pub fn layout(&self) -> Layout {
        self.layout
    }
    /// Stored bytes.
    pub fn byte_len(&self) -> usize {
        self.bytes.len()
    }
}

/// A float matrix `[rows][columns]`, stored little-endian: embedding and output head.
#[derive(Clone)]
pub struct FloatMatrix {
    pub(crate) bytes: Bytes,
    pub(crate) ty: FloatType,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) reader: Option<Reader>,
}

/// Copies stored bytes from an offset on; false where that fails.
pub type Reader = Arc<dyn Fn(usize, &mut [u8]) -> bool + Send + Sync>;

impl FloatMatrix {
    /// A matrix over `rows * columns` stored elements.
    ///
    /// # Panics
    /// If the bytes are not exactly that many.
    pub fn new(bytes: Bytes, ty: FloatType, rows: usize, columns: usize) -> Self {
        assert_eq!(bytes.len(), rows * columns * ty.size(), "stored bytes");
        Self { bytes, ty, rows, columns, reader: None }
    }
    /// Reads single rows of the head through `reader`, so that of a mapped file they do not become memory of this process.
    #[must_use]
    pub fn with_reader(self, reader: Reader) -> Self {
        Self { reader: Some(reader), ..self }
    }
    /// Rows: the vocabulary.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Stored bytes.
    pub fn byte_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Least rows of a task with few tokens, whole steps.
const FEWEST_ROWS: usize = 2 * STEP;

/// How a product is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Row by row, each with all tokens.
    Rows,
    /// Column by column, without those whose codes are zero.
    LiveColumns,
    /// By [`tiles`].
    Tiles,
    /// With weights unpacked, or sums looked up, for many tokens.
    Many,
}

/// Columns and their codes.
type Lists = (Vec<u32>, Vec<i8>);

/// Room for so many columns, and its bytes.
fn lists(columns: usize) -> (Lists, usize) {
    let lists = (Vec::with_capacity(columns), Vec::with_capacity(columns));
    let bytes = taken(&lists.0) + taken(&lists.1);
    (lists, bytes)
}

/// Int8 activations of up to a fixed number of tokens, as [`Compute::norm_quantize`] leaves them.
pub struct QuantizedRows {
    codes: Aligned<i8>,
    /// The codes of several tokens once more, where tiles of them are multiplied.
    tiles: Aligned<i8>,
    way: Way,
    scales: Vec<f32>,
    sums: Vec<i32>,
    tokens: usize,
    columns: usize,
    layout: Layout,
    /// For a matrix stored by columns: of each token how many codes are not 0.
    counts: Vec<u32>,
    /// Of a single token for such a matrix: the columns whose code is not 0, and those codes.
    live: Lists,
    _counted: Counted,
}

impl QuantizedRows {
    /// Room for `tokens` rows of at most `columns`.
    pub fn new(tokens: usize, columns: usize) -> Self {
        let width = ternary::row_bytes(columns) * 4;
        let (scales, sums, counts) = (vec![1.0; tokens], vec![0; tokens], vec![0; tokens]);
        let (live, live_bytes) = lists(width);
        let lists = taken(&scales) + taken(&sums) + taken(&counts) + live_bytes;
        Self {
            codes: Aligned::zeroed(tokens * width),
            tiles: Aligned::zeroed(Self::tiled(tokens) * width),
            way: Way::Rows,
            scales,
            sums,
            tokens: 0,
            columns: 0,
            layout: Layout::Rows,
            counts,
            live,
            _counted: Counted::new(MemoryPart::Scratch, lists),
        }
    }
    /// Its size in bytes.
    pub const fn bytes(tokens: usize, columns: usize) -> usize {
        let width = ternary::row_bytes(columns) * 4;
        tokens * (width + 12) + (4 + 1) * width + Self::tiled(tokens) * width
    }
    /// Tokens in whole tiles, where there can be enough for them.
    const fn tiled(tokens: usize) -> usize {
        if tokens < tiles::FEWEST { 0 } else { tokens.next_multiple_of(tiles::SIDE) }
    }
    /// The codes of one token in natural order, and the scale s = 127 / max|x| they were made with.
    pub fn row(&self, token: usize) -> (Vec<i8>, f32) {
        let width = ternary::row_bytes(self.columns) * 4;
        let codes = &self.codes[token * width..][..width];
        let at = |i| if self.layout.by_columns() { i } else { ternary::position(i) };
        ((0..self.columns).map(|i| codes[at(i)]).collect(), self.scales[token])
    }
    /// For a matrix stored by columns: how many codes of all tokens are not 0.
    pub fn live_codes(&self) -> usize {
        assert!(self.layout.by_columns());
        self.counts[..self.tokens].iter().map(|&count| count as usize).sum()
    }
    /// Whether a product reads for each token only the columns whose code is not 0.
    pub fn leaves_out_zeros(&self) -> bool {
        self.way == Way::LiveColumns
    }
    /// Whether a product with many tokens reads all columns of a matrix stored so, unless told to leave out those of zeros.
    pub fn reads_all_columns(&self) -> bool {
        self.layout.by_columns() && self.way == Way::Many
    }
    /// Such a product shall read for each token only the columns whose code is not 0.
    pub fn leave_out_zeros(&mut self) {
        assert!(self.layout.by_columns());
        self.way = Way::LiveColumns;
    }
    fn view(&self) -> Activations<'_> {
        let width = ternary::row_bytes(self.columns) * 4;
        Activations {
            codes: &self.codes[..self.tokens * width],
            scales: &self.scales[..self.tokens],
            sums: &self.sums[..self.tokens],
        }
    }
}

/// What the threads need beside inputs and outputs.
pub struct Workspace {
    columns: usize,
    /// Two rows of floats for each thread.
    floats: Aligned<f32>,
    /// Scratch of a product with several tokens for each thread: a block of unpacked weights, or tables and sums.
    scratch: Aligned<u8>,
    /// Sums of a product by columns, for each thread and token, and which threads have begun theirs.
    sums: Aligned<i32>,
    begun: Vec<bool>,
    /// Live columns of a token within a part of them, for each thread.
    lists: Vec<Lists>,
    /// Rows in two bits for each thread, where they are stored in fewer.
    plain: Aligned<u8>,
    /// A bit for each output.
    marks: Aligned<u8>,
    _counted: Counted,
}

impl Workspace {
    /// For rows of at most `columns` on `threads` threads.
    pub fn new(columns: usize, threads: usize) -> Self {
        let width = ternary::row_bytes(columns) * 4;
        let (lists, bytes): (_, Vec<_>) = (0..threads).map(|_| lists(width)).unzip();
        Self {
            columns: width,
            floats: Aligned::zeroed(threads * 2 * width),
            scratch: Aligned::zeroed(threads * Self::scratch(width)),
            sums: Aligned::zeroed(threads * ROW_TOKENS * width),
            begun: vec![false; threads],
            lists,
            _counted: Counted::new(MemoryPart::Scratch, bytes.into_iter().sum()),
            plain: Aligned::zeroed(threads * BLOCK * width / 4),
            marks: Aligned::zeroed(width / 8),
        }
    }
    /// Its size in bytes.
    pub const fn bytes(columns: usize, threads: usize) -> usize {
        let width = ternary::row_bytes(columns) * 4;
        let sums_and_lists = 4 * ROW_TOKENS + (4 + 1);
        threads * (width * (2 * 4 + sums_and_lists) + Self::scratch(width) + BLOCK * width / 4) + width / 8
    }
    const fn scratch(width: usize) -> usize {
        if BLOCK * width > lookup::SCRATCH { BLOCK * width } else { lookup::SCRATCH }
    }
}

/// What stands between the two matrices of the feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Squared ReLU.
    Relu2,
    /// SiLU (swish).
    Silu,
}

/// The first row and the number of rows of a matrix whose `rows` rows are the items from `begin` on that lie in `range`.
fn part_of(range: &Range<usize>, begin: usize, rows: usize) -> (usize, usize) {
    let row = |item: usize| item.saturating_sub(begin).min(rows);
    (row(range.start), row(range.end) - row(range.start))
}

fn check(matrix: &TernaryMatrix, q: &QuantizedRows, out: &[f32]) {
    let by_columns = matrix.layout.by_columns();
    assert_eq!(
        (matrix.columns, by_columns),
        (q.columns, q.layout.by_columns()),
        "width and layout of the activations"
    );
    assert_eq!(out.len(), matrix.rows * q.tokens, "length of the output");
}

/// Kernels and the threads that run them.
pub struct Compute {
    pub(crate) kernels: &'static Kernels,
    pub(crate) pool: Pool,
}

/// A slice handed out in disjoint rows.
pub(crate) struct Rows<'a, T> {
    ptr: *mut T,
    len: usize,
    width: usize,
    life: PhantomData<&'a mut [T]>,
}
// SAFETY: rows are handed out as exclusive borrows of elements that are Send.
unsafe impl<T: Send> Sync for Rows<'_, T> {}

impl<'a, T> Rows<'a, T> {
    pub(crate) fn new(slice: &'a mut [T], width: usize) -> Self {
        Self { ptr: slice.as_mut_ptr(), len: slice.len(), width, life: PhantomData }
    }
    /// # Safety
    /// Nobody else may hold row `i` while the result lives.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn row(&self, i: usize) -> &mut [T] {
        // SAFETY: the caller's contract.
        unsafe { self.rows(i, 1) }
    }
    /// Where row `i` begins.
    pub(crate) fn place(&self, i: usize) -> *const T {
        self.ptr.wrapping_add(i * self.width)
    }
    /// # Safety
    /// Nobody may write row `i` while the result lives.
    pub(crate) unsafe fn shared(&self, i: usize) -> &[T] {
        assert!((i + 1) * self.width <= self.len);
        // SAFETY: in bounds as just checked; not written by the caller's contract.
        unsafe { std::slice::from_raw_parts(self.place(i), self.width) }
    }
    /// # Safety
    /// Nobody else may hold any of the `count` rows from `first` on while the result lives.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn rows(&self, first: usize, count: usize) -> &mut [T] {
        assert!((first + count) * self.width <= self.len);
        // SAFETY: in bounds as just checked; exclusive by the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(first * self.width), count * self.width) }
    }
}

impl Compute {
    /// Kernels on `threads` threads, the caller counted.
    pub fn new(kernels: &'static Kernels, threads: usize) -> Self {
        Self { kernels, pool: Pool::new(threads) }
    }
    /// The kernels in use.
    pub fn kernels(&self) -> &'static Kernels {
        self.kernels
    }
    /// The threads in use.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Decodes the rows `ids` of `matrix` to `out` (`[ids][columns]`). Err(i) where row `ids[i]` holds a NaN or infinity.
    ///
    /// # Panics
    /// If an id is not below the number of rows.
    pub fn embed(&self, matrix: &FloatMatrix, ids: &[u32], out: &mut [f32]) -> Result<(), usize> {
        let row_bytes = matrix.columns * matrix.ty.size();
        for (i, (id, out)) in ids.iter().zip(out.chunks_exact_mut(matrix.columns)).enumerate() {
            let row = &matrix.bytes[*id as usize * row_bytes..][..row_bytes];
            if !self.kernels.decode_row(matrix.ty, row, out) {
                return Err(i);
            }
        }
        Ok(())
    }

    /// Makes `q` the int8 codes of rmsnorm(x), for every row of x (`[tokens][columns]`), for a matrix of `layout`.
    pub fn norm_quantize(
        &self,
        x: &[f32],
        weight: &[f32],
        eps: f32,
        layout: Layout,
        work: &mut Workspace,
        q: &mut QuantizedRows,
    ) {
        self.fill_quantized(weight.len(), x.len() / weight.len(), layout, work, q, |token, row, _| {
            let x = &x[token * weight.len()..][..weight.len()];
            self.kernels.rmsnorm(x, self.kernels.squares(x), weight, eps, row)
        });
    }

    /// Makes `q` the int8 codes of every row of x (`[tokens][columns]`), for a matrix of `layout`.
    pub fn quantize(
        &self,
        x: &[f32],
        columns: usize,
        layout: Layout,
        work: &mut Workspace,
        q: &mut QuantizedRows,
    ) {
        self.fill_quantized(columns, x.len() / columns, layout, work, q, |token, row, _| {
            row.copy_from_slice(&x[token * columns..][..columns]);
            self.kernels.greatest(row)
        });
    }

    /// Makes `q` the int8 codes of rmsnorm(activation(gate) * up), row by row (`[tokens][columns]` each), for a matrix of
    /// `layout`. Without a norm weight the product is quantised as it is.
    pub fn activate_quantize(
        &self,
        activation: Activation,
        gate: &[f32],
        up: &[f32],
        columns: usize,
        norm: Option<(&[f32], f32)>,
        layout: Layout,
        work: &mut Workspace,
        q: &mut QuantizedRows,
    ) {
        self.fill_quantized(columns, gate.len() / columns, layout, work, q, |token, row, spare| {
            let (gate, up) = (&gate[token * columns..][..columns], &up[token * columns..][..columns]);
            let product: &mut [f32] = if norm.is_some() { &mut *spare } else { &mut *row };
            let squares = match activation {
                Activation::Relu2 => self.kernels.relu2_mul(gate, up, product),
                Activation::Silu => self.kernels.silu_mul(gate, up, product),
            };
            match norm {
                Some((weight, eps)) => self.kernels.rmsnorm(spare, squares, weight, eps, row),
                None => self.kernels.greatest(row),
            }
        });
    }

    /// `fill` writes a token's row, with another to spare, and returns the greatest of its absolute values.
    fn fill_quantized(
        &self,
        columns: usize,
        tokens: usize,
        layout: Layout,
        work: &mut Workspace,
        q: &mut QuantizedRows,
        fill: impl Fn(usize, &mut [f32], &mut [f32]) -> f32 + Sync,
    ) {
        let width = ternary::row_bytes(columns) * 4;
        (q.tokens, q.columns, q.layout) = (tokens, columns, layout);
        let tiles = self.kernels.has_tiles() && tokens >= tiles::FEWEST;
        let fewest = if self.kernels.looks_up() { lookup::FEWEST } else { ROW_TOKENS + 1 };
        q.way = match layout.by_columns() {
            false if tiles => Way::Tiles,
            true if tiles && tokens <= tiles::COLUMN_TOKENS => Way::Tiles,
            false if tokens < fewest => Way::Rows,
            true if tokens <= ROW_TOKENS => Way::LiveColumns,
            _ => Way::Many,
        };
        {
            let codes = Rows::new(&mut q.codes[..tokens * width], width);
            let scales = Rows::new(&mut q.scales[..tokens], 1);
            let sums = Rows::new(&mut q.sums[..tokens], 1);
            let scratch = Rows::new(&mut work.floats, 2 * work.columns);
            let counts = Rows::new(&mut q.counts[..tokens], 1);
            self.pool.run(tokens, |token, worker| {
                // SAFETY: each token is one task, each worker runs one task at a time.
                let (codes, scale, sum, count, scratch) = unsafe {
                    let (codes, scale, sum) = (codes.row(token), scales.row(token), sums.row(token));
                    (codes, scale, sum, counts.row(token), scratch.row(worker))
                };
                let (row, spare) = scratch.split_at_mut(work.columns);
                let (row, spare) = (&mut row[..columns], &mut spare[..columns]);
                let top = fill(token, row, spare);
                (scale[0], sum[0]) = self.kernels.quantize(row, top, layout, codes);
                if layout.by_columns() && tokens > 1 {
                    count[0] = self.kernels.count_nonzero(codes);
                }
            });
        }
        if q.way == Way::LiveColumns && tokens == 1 {
            self.kernels.list_nonzero(&q.codes[..width], &mut q.live.0, &mut q.live.1);
            q.counts[0] = q.live.0.len() as u32;
        }
        if q.way == Way::Tiles && !layout.by_columns() {
            let codes = &q.codes[..tokens * width];
            let to = Rows::new(&mut q.tiles, tiles::SIDE * width);
            self.pool.run(tokens.div_ceil(tiles::SIDE), |some, _| {
                // SAFETY: each sixteen tokens are one task.
                let to = unsafe { to.row(some) };
                let codes = &codes[some * tiles::SIDE * width..];
                let mut rows = [&codes[..width]; tiles::SIDE];
                let count = rows.iter_mut().zip(codes.chunks(width)).map(|(row, codes)| *row = codes).count();
                self.kernels.tile_codes(&rows[..count], to);
            });
        }
    }

    /// Tells that [`Compute::linear`] will be called with these matrices by rows, so that threads without work ask for them.
    pub fn soon<const N: usize>(&self, matrices: [&TernaryMatrix; N]) {
        let items = matrices.iter().map(|matrix| matrix.rows.next_multiple_of(FEWEST_ROWS)).sum();
        self.pool.soon(items, FEWEST_ROWS, |mut item| {
            for matrix in matrices {
                if item < matrix.rows {
                    let rows = matrix.stored_rows();
                    return rows.bytes[item * rows.row_bytes..].as_ptr();
                }
                item = item.saturating_sub(matrix.rows.next_multiple_of(FEWEST_ROWS));
            }
            std::ptr::null()
        });
    }

    /// Most items of a task with few tokens: 64 KiB, as each task is a break in the stream of what is read.
    fn most_items(item_bytes: usize, least: usize) -> usize {
        ((64 << 10) / item_bytes).max(least) / least * least
    }

    /// BitLinear: out (`[tokens][rows]`) = q · matrixᵀ, for several matrices that share their input, in one region.
    ///
    /// # Panics
    /// If a matrix has not the width and layout of `q`, or an output has the wrong length.
    pub fn linear<const N: usize>(
        &self,
        q: &QuantizedRows,
        work: &mut Workspace,
        jobs: [(&TernaryMatrix, &mut [f32]); N],
    ) {
        if q.layout == Layout::Columns && q.way != Way::Many {
            jobs.into_iter().for_each(|(matrix, out)| self.by_live_columns(q, work, matrix, out));
            return;
        }
        let row_bytes = ternary::row_bytes(q.columns);
        let base3 = jobs.iter().any(|(matrix, _)| matrix.layout == Layout::Base3);
        let (most, grain) = match q.way {
            Way::Rows => (Self::most_items(row_bytes, FEWEST_ROWS), FEWEST_ROWS),
            Way::Tiles if !base3 => (2 * BLOCK, 2 * BLOCK),
            _ => (BLOCK, BLOCK),
        };
        let mut end = 0;
        let plan = jobs.map(|(matrix, out)| {
            check(matrix, q, out);
            let first = end;
            end += matrix.rows.next_multiple_of(grain);
            (matrix, OutPtr { ptr: out.as_mut_ptr(), stride: matrix.rows }, first)
        });
        let plain = Rows::new(&mut work.plain, BLOCK * work.columns / 4);
        if q.way != Way::Many {
            let tiles = &q.tiles[..QuantizedRows::tiled(q.tokens) * 4 * row_bytes];
            self.pool.run_ranges(end, most, grain, |range, worker| {
                for (matrix, out, begin) in plan {
                    let (first, count) = part_of(&range, begin, matrix.rows);
                    if count == 0 {
                        continue;
                    }
                    // SAFETY: each worker runs one task at a time; these rows are this task's alone and lie in the output, whose
                    // length was checked.
                    unsafe {
                        let plain = plain.row(worker);
                        if q.way == Way::Tiles {
                            let w = self.plain_rows(matrix, first, count, plain);
                            self.kernels.tile_rows(w, row_bytes, first, matrix.scale, q.view(), tiles, out);
                        } else {
                            let (w, which) = (matrix.stored_rows(), Which::All { first, count });
                            self.kernels.gemv_rows(w, which, matrix.scale, q.view(), plain, out);
                        }
                    }
                }
            });
            return;
        }
        // Tables are made for some tokens and serve as many outputs as there can be, panels for some outputs and serve all tokens.
        let (mut tiles, mut grain) = (1, BLOCK);
        if self.kernels.looks_up() {
            tiles = q.tokens.div_ceil(lookup::TOKENS);
            let ranges = (2 * self.pool.threads()).div_ceil(tiles).max(end.div_ceil(lookup::OUTPUTS));
            // Rows that are unpacked first have room for a block.
            grain = if base3 { BLOCK } else { end.div_ceil(ranges).next_multiple_of(BLOCK) };
        }
        let scratch = Workspace::scratch(work.columns);
        let scratch = Rows::new(&mut work.scratch, scratch);
        self.pool.run(end.div_ceil(grain) * tiles, |task, worker| {
            let range = task / tiles * grain..(task / tiles * grain + grain).min(end);
            // SAFETY: each worker runs one task at a time.
            let mut plain = unsafe { plain.row(worker) };
            let parts = plan.map(|(matrix, out, begin)| {
                let (first, count) = part_of(&range, begin, matrix.rows);
                let w = &matrix.bytes[..];
                let source = match matrix.layout {
                    Layout::Columns => {
                        Source::Columns { w, column_bytes: columns::column_bytes(matrix.rows) }
                    }
                    _ => {
                        let bytes = if base3 { count * row_bytes } else { 0 };
                        let (own, rest) = std::mem::take(&mut plain).split_at_mut(bytes);
                        plain = rest;
                        Source::Rows { w: self.plain_rows(matrix, first, count, own), row_bytes }
                    }
                };
                Part { source, weight_scale: matrix.scale, first, count, out }
            });
            // SAFETY: each worker runs one task at a time; these rows of these tokens are this task's alone and lie in the
            // output, whose length was checked.
            unsafe {
                self.kernels.matmul(&parts, q.view(), task % tiles * lookup::TOKENS, scratch.row(worker));
            }
        });
    }

    /// As [`Compute::linear`] with up to three tokens and a matrix stored by rows; `positive` becomes the rows of which any token's
    /// output is greater than 0, in order.
    ///
    /// # Panics
    /// As there, and for more tokens, or for more outputs than `work` is wide.
    pub fn linear_positive(
        &self,
        q: &QuantizedRows,
        work: &mut Workspace,
        matrix: &TernaryMatrix,
        out: &mut [f32],
        positive: &mut Vec<u32>,
    ) {
        check(matrix, q, out);
        assert!(q.way == Way::Rows && matrix.rows <= work.columns);
        let most = Self::most_items(ternary::row_bytes(q.columns), FEWEST_ROWS);
        let bytes = matrix.rows.div_ceil(8);
        {
            let out = OutPtr { ptr: out.as_mut_ptr(), stride: matrix.rows };
            let plain = Rows::new(&mut work.plain, BLOCK * work.columns / 4);
            let marks = Rows::new(&mut work.marks[..bytes], 1);
            self.pool.run_ranges(matrix.rows, most, FEWEST_ROWS, |range, worker| {
                let which = Which::All { first: range.start, count: range.len() };
                // SAFETY: each worker runs one task at a time; these rows are this task's alone and lie in the output, whose length was
                // checked, and so are their marks, as ranges begin at multiples of eight.
                unsafe {
                    let w = matrix.stored_rows();
                    self.kernels.gemv_rows(w, which, matrix.scale, q.view(), plain.row(worker), out);
                    let marks = marks.rows(range.start / 8, range.len().div_ceil(8));
                    marks.fill(0);
                    for token in 0..q.tokens {
                        self.kernels.mark_positive(out.values(token, range.start, range.len()), marks);
                    }
                }
            });
        }
        positive.clear();
        self.kernels.list_bits(&work.marks[..bytes], positive);
    }

    /// As [`Compute::linear`] with up to 16 tokens, for the rows `list`, in order, of a matrix stored by rows.
    /// Other outputs are left alone.
    ///
    /// # Panics
    /// As there, and if a row is not in the matrix.
    pub fn linear_listed(
        &self,
        q: &QuantizedRows,
        work: &mut Workspace,
        matrix: &TernaryMatrix,
        list: &[u32],
        out: &mut [f32],
    ) {
        check(matrix, q, out);
        assert!(!q.layout.by_columns() && q.tokens <= ROW_TOKENS);
        assert!(list.last().is_none_or(|&r| (r as usize) < matrix.rows) && list.is_sorted_by(|a, b| a < b));
        let row_bytes = ternary::row_bytes(q.columns);
        let out = OutPtr { ptr: out.as_mut_ptr(), stride: matrix.rows };
        let plain = Rows::new(&mut work.plain, BLOCK * work.columns / 4);
        let most = Self::most_items(row_bytes, FEWEST_ROWS);
        self.pool.run_ranges(list.len(), most, FEWEST_ROWS, |range, worker| {
            let which = Which::Listed { list: &list[range.start..], count: range.len() };
            let w = matrix.stored_rows();
            // SAFETY: each worker runs one task at a time; the rows were checked; no row is listed twice, so nobody else
            // writes its output.
            unsafe { self.kernels.gemv_rows(w, which, matrix.scale, q.view(), plain.row(worker), out) }
        });
    }

    /// Rows of a matrix in two bits, in `plain` where they are stored in fewer.
    fn plain_rows<'a>(
        &self,
        matrix: &'a TernaryMatrix,
        first: usize,
        count: usize,
        plain: &'a mut [u8],
    ) -> &'a [u8] {
        let StoredRows { bytes, row_bytes, base3 } = matrix.stored_rows();
        let rows = &bytes[first * row_bytes..][..count * row_bytes];
        if !base3 {
            return rows;
        }
        self.kernels.unpack_base3(rows, row_bytes, matrix.columns, plain);
        &plain[..count * ternary::row_bytes(matrix.columns)]
    }

    /// Stores a row in two bits, none of whose codes is 3, in the layout of [`ternary::base3`].
    pub fn pack_base3(&self, row: &[u8], out: &mut [u8]) {
        self.kernels.pack_base3(row, out);
    }

    /// Tokens times a matrix stored by columns, up to [`ROW_TOKENS`] at a time: each thread adds up some of the columns, for each
    /// token those it needs, while they are in the cache.
    fn by_live_columns(
        &self,
        q: &QuantizedRows,
        work: &mut Workspace,
        matrix: &TernaryMatrix,
        out: &mut [f32],
    ) {
        check(matrix, q, out);
        let column_bytes = columns::column_bytes(matrix.rows);
        let (width, inputs) = (column_bytes * 4, ternary::row_bytes(matrix.columns) * 4);
        // Several tokens share up to 256 KiB, in as many parts for each thread.
        let parts = (matrix.columns * column_bytes).div_ceil(256 << 10);
        let several =
            matrix.columns.div_ceil(parts.next_multiple_of(self.pool.threads())).next_multiple_of(LISTED);
        let out = Rows::new(out, matrix.rows);
        for first in (0..q.tokens).step_by(ROW_TOKENS) {
            let tokens = ROW_TOKENS.min(q.tokens - first);
            let sums = &mut work.sums[..self.pool.threads() * tokens * width];
            work.begun.fill(false);
            let (parts, begun) = (Rows::new(sums, width), Rows::new(&mut work.begun, 1));
            let lists = Rows::new(&mut work.lists, 1);
            // Each thread clears its own sums, which are in its cache.
            let own = |worker: usize| {
                // SAFETY: each worker runs one task at a time.
                let (own, begun) = unsafe { (parts.rows(worker * tokens, tokens), begun.row(worker)) };
                if !std::mem::replace(&mut begun[0], true) {
                    own.fill(0);
                }
                own
            };
            // One token takes whole groups.
            let (items, most, least) = match q.way {
                Way::Tiles => (matrix.columns, ternary::CHUNK, ternary::CHUNK),
                _ if q.tokens == 1 => (q.live.0.len(), Self::most_items(column_bytes, GROUP), GROUP),
                _ => (matrix.columns, several, several),
            };
            self.pool.run_ranges(items, most, least, |range, worker| {
                let (own, w) = (own(worker), &matrix.bytes[..]);
                if q.way == Way::Tiles {
                    self.kernels.tile_columns(w, column_bytes, range, q.view().codes, tokens, own);
                    return;
                }
                if q.tokens == 1 {
                    let (list, codes) = (&q.live.0[range.start..], &q.live.1[range]);
                    self.kernels.add_columns(w, column_bytes, list, codes, own);
                    return;
                }
                // SAFETY: each worker runs one task at a time.
                let (list, packed) = unsafe { &mut lists.row(worker)[0] };
                let w = &w[range.start * column_bytes..];
                let range = range.start..range.end.next_multiple_of(LISTED);
                for (token, sums) in own.chunks_exact_mut(width).enumerate() {
                    let codes = &q.codes[(first + token) * inputs..][range.clone()];
                    self.kernels.list_nonzero(codes, list, packed);
                    self.kernels.add_columns(w, column_bytes, list, packed, sums);
                }
            });
            (0..self.pool.threads()).filter(|&worker| !work.begun[worker]).for_each(|worker| {
                work.sums[worker * tokens * width..][..tokens * width].fill(0);
            });
            self.pool.run(tokens, |token, _| {
                let sums = &work.sums[token * width..self.pool.threads() * tokens * width];
                let token = first + token;
                let factor = matrix.scale / q.scales[token];
                // SAFETY: each token is one task.
                let out = unsafe { out.row(token) };
                self.kernels.finish_columns(sums, tokens * width, q.sums[token], factor, out);
            });
        }
    }

    /// Rotates every head of every row of x (`[tokens][heads * head_dim]`). `cos`, `sin`: `[tokens][half]`.
    pub fn rope(&self, x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], tokens: usize) {
        let (width, half) = (x.len() / tokens, cos.len() / tokens);
        let rows = Rows::new(x, width);
        self.pool.run(tokens, |token, _| {
            // SAFETY: each token is one task.
            let row = unsafe { rows.row(token) };
            for head in row.chunks_exact_mut(head_dim) {
                self.kernels.rope(head, &cos[token * half..][..half], &sin[token * half..][..half]);
            }
        });
    }

    /// x += y.
    pub fn add(&self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len());
        const PART: usize = 1 << 13;
        let parts = x.len().div_ceil(PART);
        if parts <= 2 {
            return self.kernels.add(x, y);
        }
        let (whole, rest) = x.split_at_mut(x.len() / PART * PART);
        self.kernels.add(rest, &y[whole.len()..]);
        let rows = Rows::new(whole, PART);
        self.pool.run(rows.len / PART, |part, _| {
            // SAFETY: each part is one task.
            self.kernels.add(unsafe { rows.row(part) }, &y[part * PART..][..PART]);
        });
    }

    /// rmsnorm of every row of x (`[tokens][columns]`).
    pub fn rmsnorm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
            self.kernels.rmsnorm(x, self.kernels.squares(x), weight, eps, out);
        }
    }

    /// Reads `floats` once with all threads, as fast as memory gives them.
    pub fn stream_read(&self, floats: &[f32]) {
        const PART: usize = 64 << 10;
        self.pool.run(floats.len().div_ceil(PART), |part, _| {
            let end = (part * PART + PART).min(floats.len());
            std::hint::black_box(self.kernels.stream_read(&floats[part * PART..end]));
        });
    }
}
