//! Every kernel of every instruction set this CPU has, on one thread, at the shapes of bitnet-b1.58-2B-4T: multiplications and
//! additions a second for what is bound by arithmetic (an item is one of both), bytes a second for what is bound by memory.
//!
//! `cargo bench -p bitnet-kernels`, and the name of a benchmark behind `--` for that one alone.

use bitnet_kernels::ternary::{CHUNK, Layout};
use bitnet_kernels::{
    Activation, Bytes, Compute, FloatMatrix, FloatType, Head, HeadScratch, KvShape, KvStore, KvType, Logits,
    PAGE, QuantizedRows, Screen, TernaryMatrix, Workspace, supported,
};
use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use std::sync::Arc;

const HIDDEN: usize = 2560;
const INNER: usize = 6912;
const TOKENS: usize = 128;

fn main() {
    divan::main();
}

fn names() -> Vec<&'static str> {
    supported().iter().map(|kernels| kernels.name()).collect()
}

/// On one thread, so that a figure is one core's.
fn compute(name: &str) -> Compute {
    let kernels = supported().into_iter().find(|kernels| kernels.name() == name);
    Compute::new(kernels.unwrap_or_else(bitnet_kernels::best), 1)
}

/// The same numbers each time, from 0 to 1.
fn numbers(n: usize) -> impl Iterator<Item = f32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32)
}

fn floats(n: usize) -> Vec<f32> {
    numbers(n).map(|x| x - 0.5).collect()
}

/// On a cache line, as models have them.
fn bytes(mut v: Vec<u8>) -> Bytes {
    let n = v.len();
    v.reserve_exact(64);
    let skip = v.as_ptr().align_offset(64);
    v.resize(n + skip, 0);
    v.rotate_right(skip);
    Bytes::new(Arc::new(v), skip..n + skip)
}

fn matrix(layout: Layout, rows: usize, columns: usize) -> TernaryMatrix {
    let digit = |x: f32| (x * 3.0) as u8;
    let stored = numbers(layout.bytes(rows, columns)).map(|x| {
        let (high, low) = (x * 9.0, x * 729.0);
        digit(x) << 6 | digit(high % 3.0 / 3.0) << 4 | digit(low % 9.0 / 9.0) << 2 | digit(low % 3.0 / 3.0)
    });
    TernaryMatrix::new(bytes(stored.collect()), layout, rows, columns, 1.0)
}

/// Activations, of which so many percent are not zero.
fn codes(
    compute: &Compute,
    layout: Layout,
    columns: usize,
    tokens: usize,
    live: usize,
    work: &mut Workspace,
) -> QuantizedRows {
    let mut q = QuantizedRows::new(tokens, columns);
    let mut x = floats(tokens * columns);
    x.iter_mut().enumerate().filter(|(i, _)| i * 37 % 100 >= live).for_each(|(_, x)| *x = 0.0);
    compute.norm_quantize(&x, &vec![1.0; columns], 1e-5, layout, work, &mut q);
    q
}

fn product(
    bencher: Bencher<'_, '_>,
    name: &str,
    layout: Layout,
    rows: usize,
    columns: usize,
    tokens: usize,
    live: usize,
) {
    let (compute, matrix) = (compute(name), matrix(layout, rows, columns));
    let mut work = Workspace::new(columns, 1);
    let q = codes(&compute, layout, columns, tokens, live, &mut work);
    let mut out = vec![0.0; tokens * rows];
    let bencher = match tokens {
        1 => bencher.counter(BytesCount::new(matrix.byte_len() * live / 100)),
        _ => bencher.counter(ItemsCount::new(rows * columns * tokens)),
    };
    bencher.bench_local(|| compute.linear(&q, &mut work, [(&matrix, black_box(&mut out[..]))]));
}

/// One token, rows: what decoding does most.
#[divan::bench(args = names(), max_time = 0.5)]
fn gemv_rows(bencher: Bencher<'_, '_>, name: &str) {
    product(bencher, name, Layout::Rows, INNER, HIDDEN, 1, 100);
}

/// One token, rows of which every second is needed.
#[divan::bench(args = names(), max_time = 0.5)]
fn gemv_listed(bencher: Bencher<'_, '_>, name: &str) {
    let (compute, matrix) = (compute(name), matrix(Layout::Rows, INNER, HIDDEN));
    let mut work = Workspace::new(HIDDEN, 1);
    let q = codes(&compute, Layout::Rows, HIDDEN, 1, 100, &mut work);
    let list: Vec<u32> = (0..INNER as u32).step_by(2).collect();
    let mut out = vec![0.0; INNER];
    let bencher = bencher.counter(BytesCount::new(matrix.byte_len() / 2));
    bencher.bench_local(|| compute.linear_listed(&q, &mut work, &matrix, &list, black_box(&mut out)));
}

/// One token, columns of which a third is needed.
#[divan::bench(args = names(), max_time = 0.5)]
fn gemv_columns(bencher: Bencher<'_, '_>, name: &str) {
    product(bencher, name, Layout::Columns, HIDDEN, INNER, 1, 33);
}

/// Eight tokens that share each row.
#[divan::bench(args = names(), max_time = 0.5)]
fn gemv_rows_8_tokens(bencher: Bencher<'_, '_>, name: &str) {
    product(bencher, name, Layout::Rows, INNER, HIDDEN, 8, 100);
}

/// Many tokens and rows.
#[divan::bench(args = names(), max_time = 1)]
fn gemm_rows(bencher: Bencher<'_, '_>, name: &str) {
    product(bencher, name, Layout::Rows, HIDDEN, HIDDEN, TOKENS, 100);
}

/// Many tokens and columns.
#[divan::bench(args = names(), max_time = 1)]
fn gemm_columns(bencher: Bencher<'_, '_>, name: &str) {
    product(bencher, name, Layout::Columns, HIDDEN, INNER, TOKENS, 33);
}

fn head(bencher: Bencher<'_, '_>, name: &str, screened: bool) {
    const ROWS: usize = 8192;
    let compute = compute(name);
    // Halves from 2^-14 to 2, of both signs.
    let stored = numbers(ROWS * HIDDEN).flat_map(|x| ((x * 65535.0) as u16 & 0xbfff).to_le_bytes());
    let matrix = FloatMatrix::new(bytes(stored.collect()), FloatType::F16, ROWS, HIDDEN);
    let mut copy = vec![0; Screen::bytes(ROWS, HIDDEN)];
    for (part, out) in copy.chunks_mut(Screen::bytes(Screen::PART, HIDDEN)).enumerate() {
        compute.screen_part(&matrix, part, out);
    }
    let screen = Screen::new(bytes(copy), ROWS, HIDDEN);
    let (read, wanted) = match screened {
        true => (screen.pass_bytes().0, Logits::Best { top: 1, also: &[], among: None }),
        false => (matrix.byte_len(), Logits::Every),
    };
    let head = Head { matrix, screen: screened.then_some(screen) };
    let (mut scratch, mut out) = (HeadScratch::new(ROWS, HIDDEN, 1), vec![0.0; ROWS]);
    let x = floats(HIDDEN);
    let bencher = bencher.counter(BytesCount::new(read));
    bencher.bench_local(|| compute.head(&head, &x, |_| wanted, &mut scratch, black_box(&mut out)));
}

/// All rows of the head.
#[divan::bench(args = names(), max_time = 0.5)]
fn head_exact(bencher: Bencher<'_, '_>, name: &str) {
    head(bencher, name, false);
}

/// The four-bit copy, and the rows that it leaves.
#[divan::bench(args = names(), max_time = 0.5)]
fn head_screened(bencher: Bencher<'_, '_>, name: &str) {
    head(bencher, name, true);
}

fn attention(bencher: Bencher<'_, '_>, name: &str, ty: KvType, positions: usize, tokens: usize) {
    let compute = compute(name);
    let shape = KvShape { ty, layers: 1, heads: 5, query_heads: 20, head_dim: 128 };
    let pages: Vec<u32> = (0..positions.div_ceil(PAGE) as u32).collect();
    let mut kv = KvStore::new(shape, pages.len(), positions).expect("memory");
    let cached = floats(positions * 5 * 128);
    compute.store(&mut kv, 0, &cached, &cached, |row| (&pages, row + 1));
    let (q, mut out) = (floats(tokens * HIDDEN), vec![0.0; tokens * HIDDEN]);
    let sees = |row: usize| (&pages[..], positions - tokens + row + 1);
    let products: usize = (0..tokens).map(|row| 2 * HIDDEN * sees(row).1).sum();
    bencher
        .counter(ItemsCount::new(products))
        .bench_local(|| compute.attention(&mut kv, 0, &q, None, sees, black_box(&mut out)));
}

/// One token that sees 2048 positions.
#[divan::bench(args = names(), consts = [0, 1, 2], max_time = 0.3)]
fn attention_decode<const TYPE: usize>(bencher: Bencher<'_, '_>, name: &str) {
    attention(bencher, name, [KvType::F32, KvType::F16, KvType::Q8][TYPE], 2048, 1);
}

/// A prompt of 256 tokens.
#[divan::bench(args = names(), consts = [0, 1, 2], max_time = 0.3)]
fn attention_prompt<const TYPE: usize>(bencher: Bencher<'_, '_>, name: &str) {
    attention(bencher, name, [KvType::F32, KvType::F16, KvType::Q8][TYPE], 256, 256);
}

/// Root mean square norm and quantisation.
#[divan::bench(args = names(), max_time = 0.2)]
fn norm_quantize(bencher: Bencher<'_, '_>, name: &str) {
    let (compute, mut work) = (compute(name), Workspace::new(HIDDEN, 1));
    let (mut q, x, weight) = (QuantizedRows::new(16, HIDDEN), floats(16 * HIDDEN), floats(HIDDEN));
    bencher
        .counter(BytesCount::of_many::<f32>(x.len()))
        .bench_local(|| compute.norm_quantize(&x, &weight, 1e-5, Layout::Rows, &mut work, black_box(&mut q)));
}

/// What stands between gate, up and down.
#[divan::bench(args = names(), max_time = 0.2)]
fn activate_quantize(bencher: Bencher<'_, '_>, name: &str) {
    const WIDTH: usize = INNER / CHUNK * CHUNK;
    let (compute, mut work) = (compute(name), Workspace::new(WIDTH, 1));
    let (mut q, x, weight) = (QuantizedRows::new(16, WIDTH), floats(16 * WIDTH), floats(WIDTH));
    let (relu, norm) = (Activation::Relu2, Some((&weight[..], 1e-5)));
    bencher.counter(BytesCount::of_many::<f32>(2 * x.len())).bench_local(|| {
        compute.activate_quantize(relu, &x, &x, WIDTH, norm, Layout::Columns, &mut work, black_box(&mut q));
    });
}

/// The rotation of queries and keys.
#[divan::bench(args = names(), max_time = 0.2)]
fn rope(bencher: Bencher<'_, '_>, name: &str) {
    let (compute, mut x, angles) = (compute(name), floats(16 * HIDDEN), floats(16 * 64));
    bencher
        .counter(BytesCount::of_many::<f32>(x.len()))
        .bench_local(|| compute.rope(black_box(&mut x), 128, &angles, &angles, 16));
}
