//! The parallel phases of a forward pass: kernels run over all threads of a pool.
//!
//! Every function checks its lengths once, splits its output into disjoint parts and returns when all are written. The
//! result never depends on the number of threads: each element is computed whole by one task.

use crate::memory::{Aligned, Bytes};
use crate::ops::FloatType;
use crate::pool::Pool;
use crate::table::Kernels;
use crate::ternary::{self, Activations, OutPtr};
use std::marker::PhantomData;

/// A ternary matrix `[rows][columns]` in the layout of [`crate::ternary`], with one scale.
pub struct TernaryMatrix {
    bytes: Bytes,
    rows: usize,
    columns: usize,
    scale: f32,
}

impl TernaryMatrix {
    /// Widest row: keeps every intermediate sum of every kernel inside 32 bits, with room.
    pub const MAX_COLUMNS: usize = 1 << 20;

    /// A matrix over `rows` stored rows of [`ternary::row_bytes`]`(columns)` bytes.
    ///
    /// # Panics
    /// If the bytes are not exactly that many, or a row is empty or wider than [`Self::MAX_COLUMNS`].
    pub fn new(bytes: Bytes, rows: usize, columns: usize, scale: f32) -> Self {
        assert!((1..=Self::MAX_COLUMNS).contains(&columns), "{columns} columns");
        assert_eq!(bytes.len(), rows * ternary::row_bytes(columns), "stored bytes");
        Self { bytes, rows, columns, scale }
    }
    /// Output width.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Input width.
    pub fn columns(&self) -> usize {
        self.columns
    }
    /// Stored bytes, all of which a decoded token reads.
    pub fn byte_len(&self) -> usize {
        self.bytes.len()
    }
}

/// A float matrix `[rows][columns]`, stored little-endian: embedding and output head.
#[derive(Clone)]
pub struct FloatMatrix {
    bytes: Bytes,
    ty: FloatType,
    rows: usize,
    columns: usize,
}

impl FloatMatrix {
    /// A matrix over `rows * columns` stored elements.
    ///
    /// # Panics
    /// If the bytes are not exactly that many.
    pub fn new(bytes: Bytes, ty: FloatType, rows: usize, columns: usize) -> Self {
        assert_eq!(bytes.len(), rows * columns * ty.size(), "stored bytes");
        Self { bytes, ty, rows, columns }
    }
    /// Rows: the vocabulary.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Stored bytes.
    pub fn byte_len(&self) -> usize {
        self.bytes.len()
    }
    /// Encoding of the elements.
    pub fn float_type(&self) -> FloatType {
        self.ty
    }
}

/// Int8 activations of up to a fixed number of tokens, as [`Compute::norm_quantize`] leaves them.
pub struct QuantizedRows {
    codes: Aligned<i8>,
    scales: Vec<f32>,
    sums: Vec<i32>,
    tokens: usize,
    columns: usize,
}

impl QuantizedRows {
    /// Room for `tokens` rows of at most `columns`.
    pub fn new(tokens: usize, columns: usize) -> Self {
        let width = ternary::row_bytes(columns) * 4;
        Self {
            codes: Aligned::zeroed(tokens * width),
            scales: vec![1.0; tokens],
            sums: vec![0; tokens],
            tokens: 0,
            columns: 0,
        }
    }
    /// The codes of one token in natural order, and the scale s = 127 / max|x| they were made with.
    pub fn row(&self, token: usize) -> (Vec<i8>, f32) {
        let width = ternary::row_bytes(self.columns) * 4;
        let codes = &self.codes[token * width..][..width];
        ((0..self.columns).map(|i| codes[ternary::position(i)]).collect(), self.scales[token])
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

/// What stands between the two matrices of the feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Squared ReLU.
    Relu2,
    /// SiLU (swish).
    Silu,
}

/// Kernels and the threads that run them.
pub struct Compute {
    kernels: &'static Kernels,
    pool: Pool,
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
        assert!((i + 1) * self.width <= self.len);
        // SAFETY: in bounds as just checked; exclusive by the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(i * self.width), self.width) }
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

    /// Makes `q` the int8 codes of rmsnorm(x), for every row of x (`[tokens][columns]`).
    pub fn norm_quantize(
        &self,
        x: &[f32],
        weight: &[f32],
        eps: f32,
        scratch: &mut [f32],
        q: &mut QuantizedRows,
    ) {
        self.fill_quantized(weight.len(), x.len() / weight.len(), scratch, q, |token, row, _| {
            self.kernels.rmsnorm(&x[token * weight.len()..][..weight.len()], weight, eps, row);
        });
    }

    /// Makes `q` the int8 codes of rmsnorm(activation(gate) * up), row by row (`[tokens][columns]` each). Without a norm
    /// weight the product is quantised as it is.
    pub fn activate_quantize(
        &self,
        activation: Activation,
        gate: &[f32],
        up: &[f32],
        columns: usize,
        norm: Option<(&[f32], f32)>,
        scratch: &mut [f32],
        q: &mut QuantizedRows,
    ) {
        self.fill_quantized(columns, gate.len() / columns, scratch, q, |token, row, spare| {
            let (gate, up) = (&gate[token * columns..][..columns], &up[token * columns..][..columns]);
            let product: &mut [f32] = if norm.is_some() { &mut *spare } else { &mut *row };
            match activation {
                Activation::Relu2 => self.kernels.relu2_mul(gate, up, product),
                Activation::Silu => self.kernels.silu_mul(gate, up, product),
            }
            if let Some((weight, eps)) = norm {
                self.kernels.rmsnorm(spare, weight, eps, row);
            }
        });
    }

    /// Floats of scratch that the quantising phases need for rows of at most `columns`.
    pub fn scratch_floats(&self, columns: usize) -> usize {
        2 * columns * self.pool.threads()
    }

    fn fill_quantized(
        &self,
        columns: usize,
        tokens: usize,
        scratch: &mut [f32],
        q: &mut QuantizedRows,
        fill: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
    ) {
        let width = ternary::row_bytes(columns) * 4;
        (q.tokens, q.columns) = (tokens, columns);
        let codes = Rows::new(&mut q.codes[..tokens * width], width);
        let scales = Rows::new(&mut q.scales[..tokens], 1);
        let sums = Rows::new(&mut q.sums[..tokens], 1);
        let scratch = Rows::new(scratch, 2 * columns);
        self.pool.run(tokens, |token, worker| {
            // SAFETY: each token is one task, each worker runs one task at a time.
            let (codes, scale, sum, scratch) =
                unsafe { (codes.row(token), scales.row(token), sums.row(token), scratch.row(worker)) };
            let (row, spare) = scratch.split_at_mut(columns);
            fill(token, row, spare);
            (scale[0], sum[0]) = self.kernels.quantize(row, codes);
        });
    }

    /// BitLinear: out (`[tokens][rows]`) = q · matrixᵀ, for several matrices that share their input, in one region.
    ///
    /// # Panics
    /// If a matrix is not as wide as `q`, or an output has the wrong length.
    pub fn linear<const N: usize>(&self, q: &QuantizedRows, jobs: [(&TernaryMatrix, &mut [f32]); N]) {
        let mut tiles = 0;
        let plan = jobs.map(|(matrix, out)| {
            assert_eq!(matrix.columns, q.columns, "width of the activations");
            assert_eq!(out.len(), matrix.rows * q.tokens, "length of the output");
            // With several tokens, tiles of some 48 KiB stay in the second-level cache while every token passes over them.
            // With one, the weights are a stream from memory, the less interrupted the better.
            let row_bytes = ternary::row_bytes(matrix.columns);
            let tile = match q.tokens {
                1 => (matrix.byte_len() / (8 * self.pool.threads())).clamp(48 << 10, 512 << 10),
                _ => 48 << 10,
            };
            let tile_rows = (tile / row_bytes).max(4) & !3;
            let first = tiles;
            tiles += matrix.rows.div_ceil(tile_rows);
            (matrix, OutPtr { ptr: out.as_mut_ptr(), stride: matrix.rows }, first, tile_rows, row_bytes)
        });
        self.pool.run(tiles, |task, _| {
            let index = plan.iter().rposition(|job| job.2 <= task).unwrap_or(0);
            let (matrix, out, first, tile_rows, row_bytes) = plan[index];
            let begin = (task - first) * tile_rows;
            let end = (begin + tile_rows).min(matrix.rows);
            let w = &matrix.bytes[begin * row_bytes..end * row_bytes];
            // SAFETY: rows begin..end of every token are this task's alone and lie in the output, whose length was checked.
            unsafe { self.kernels.matmul_rows(w, row_bytes, matrix.scale, q.view(), begin, out) }
        });
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
            self.kernels.rmsnorm(x, weight, eps, out);
        }
    }

    /// Logits: out (`[tokens][vocabulary]`) = x (`[tokens][columns]`) · matrixᵀ.
    pub fn head(&self, matrix: &FloatMatrix, x: &[f32], out: &mut [f32]) {
        let tokens = x.len() / matrix.columns;
        assert_eq!(out.len(), tokens * matrix.rows);
        let out = OutPtr { ptr: out.as_mut_ptr(), stride: matrix.rows };
        let row_bytes = matrix.columns * matrix.ty.size();
        let tile_rows = ((256 << 10) / row_bytes).clamp(4, 1024) & !3;
        self.pool.run(matrix.rows.div_ceil(tile_rows), |task, _| {
            let begin = task * tile_rows;
            let end = (begin + tile_rows).min(matrix.rows);
            let w = &matrix.bytes[begin * row_bytes..end * row_bytes];
            // SAFETY: rows begin..end of every token are this task's alone and lie in the output, whose length was checked.
            unsafe { self.kernels.head_rows(matrix.ty, w, x, matrix.columns, begin, out) }
        });
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
