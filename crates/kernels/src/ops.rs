//! Float operations, each written once over the sixteen lanes of an [`Isa`].
//!
//! Reductions follow the definition in ARCHITECTURE.md: element i goes to lane i mod 16; a row that ends inside a
//! register is padded with zeros; lanes are folded 8, 4, 2, 1.

use crate::isa::{Isa, SHORTLY};
use crate::ternary::Layout;

/// Positions in a key/value page, and in a segment of the attention sum.
pub const PAGE: usize = 64;

/// The folded sum of sixteen lanes.
#[inline(always)]
pub(crate) fn fold<I: Isa>(isa: I, v: I::F) -> f32 {
    let mut lanes = [0.0; 16];
    isa.store(v, &mut lanes);
    let mut width = 8;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The largest lane.
#[inline(always)]
pub(crate) fn fold_max<I: Isa>(isa: I, top: I::F) -> f32 {
    let mut lanes = [0.0; 16];
    isa.store(top, &mut lanes);
    let mut width = 8;
    while width > 0 {
        for i in 0..width {
            lanes[i] = if lanes[i + width] > lanes[i] { lanes[i + width] } else { lanes[i] };
        }
        width /= 2;
    }
    lanes[0]
}

/// The last, incomplete register or registers of a row, filled up with zeros.
#[inline(always)]
pub(crate) fn padded<T: Copy + Default, const N: usize>(tail: &[T]) -> [T; N] {
    let mut full = [T::default(); N];
    full[..tail.len()].copy_from_slice(tail);
    full
}

/// out = f(inputs), register by register. Returns what `gather` makes of them, one after the other, beginning with zeros.
#[inline(always)]
fn map<I: Isa, const N: usize>(
    isa: I,
    inputs: [&[f32]; N],
    out: &mut [f32],
    f: impl Fn([I::F; N]) -> I::F,
    gather: impl Fn(I::F, I::F) -> I::F,
) -> I::F {
    let mut gathered = isa.splat(0.0);
    // Loops and not array::map: a closure that is not inlined would be compiled without the instruction set.
    let whole = out.len() / 16;
    let (blocks, tail) = out.as_chunks_mut::<16>();
    for (i, block) in blocks.iter_mut().enumerate() {
        let mut v = [isa.splat(0.0); N];
        for k in 0..N {
            v[k] = isa.load(&inputs[k].as_chunks::<16>().0[i]);
        }
        let v = f(v);
        gathered = gather(gathered, v);
        isa.store(v, block);
    }
    if !tail.is_empty() {
        let mut v = [isa.splat(0.0); N];
        for k in 0..N {
            v[k] = isa.load(&padded(&inputs[k][16 * whole..][..tail.len()]));
        }
        let v = f(v);
        gathered = gather(gathered, v);
        let mut full = [0.0; 16];
        isa.store(v, &mut full);
        tail.copy_from_slice(&full[..tail.len()]);
    }
    gathered
}

/// The sum so far and one more square, lane by lane.
#[inline(always)]
fn add_square<I: Isa>(isa: I, sum: I::F, x: I::F) -> I::F {
    isa.add(sum, isa.mul(x, x))
}

/// The sum of the squares.
#[inline(always)]
pub(crate) fn squares<I: Isa>(isa: I, x: &[f32]) -> f32 {
    let (blocks, tail) = x.as_chunks::<16>();
    let mut sum = isa.splat(0.0);
    for block in blocks {
        sum = add_square(isa, sum, isa.load(block));
    }
    if !tail.is_empty() {
        sum = add_square(isa, sum, isa.load(&padded(tail)));
    }
    fold(isa, sum)
}

/// out = x * w / sqrt(squares / n + eps), computed as (x * r) * w with r = 1 / sqrt(...), where `squares` is the sum of the squares of x.
/// Returns the greatest of its absolute values.
#[inline(always)]
pub(crate) fn rmsnorm<I: Isa>(
    isa: I,
    x: &[f32],
    squares: f32,
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) -> f32 {
    let r = isa.splat(1.0 / (squares / x.len() as f32 + eps).sqrt());
    let top = map(
        isa,
        [x, weight],
        out,
        #[inline(always)]
        |[x, w]| isa.mul(isa.mul(x, r), w),
        #[inline(always)]
        |top, y| isa.max(isa.abs(y), top),
    );
    fold_max(isa, top)
}

/// The greatest of the absolute values.
#[inline(always)]
pub(crate) fn greatest<I: Isa>(isa: I, x: &[f32]) -> f32 {
    let (blocks, tail) = x.as_chunks::<16>();
    let mut top = isa.splat(0.0);
    for block in blocks {
        top = isa.max(isa.abs(isa.load(block)), top);
    }
    fold_max(isa, isa.max(isa.abs(isa.load(&padded(tail))), top))
}

/// Quantises a row to int8 with absmax scaling: q = round_half_even(x * s), s = (1 / max(max|x|, 1e-5)) * 127, where `top` is max|x|.
/// The codes are written in the order that a matrix of this layout takes, the padding with zeros. Returns s and the sum of the codes.
#[inline(always)]
pub(crate) fn quantize<I: Isa>(isa: I, x: &[f32], top: f32, layout: Layout, codes: &mut [i8]) -> (f32, i32) {
    let (blocks, tail) = x.as_chunks::<16>();
    // A reciprocal and a product, as the reference computes it: two roundings.
    let scale = 1.0 / (if top > 1e-5 { top } else { 1e-5 }) * 127.0;
    let s = isa.splat(scale);
    for chunk in 0..codes.len() / 256 {
        let out = &mut codes.as_chunks_mut::<256>().0[chunk];
        for half_run in 0..16 {
            let i = 256 * chunk + 16 * half_run;
            let at = match layout {
                Layout::Columns => 16 * half_run,
                _ => crate::ternary::position(16 * half_run),
            };
            let out = &mut out[at..].as_chunks_mut::<16>().0[0];
            match x.len().saturating_sub(i) {
                0 => *out = [0; 16],
                left => {
                    let v = if left >= 16 { isa.load(&blocks[i / 16]) } else { isa.load(&padded(tail)) };
                    isa.to_i8(isa.mul(v, s), out);
                }
            }
        }
    }
    (scale, codes.iter().map(|&q| i32::from(q)).sum())
}

/// Floats that [`list_within`] asks for ahead of those it compares.
const AHEAD: usize = 512;

/// Appends `first` + i to `list`, in order, for every x that is at least `from` and not at least `below`, which may be NaN: then nothing
/// is.
#[inline(always)]
pub(crate) fn list_within<I: Isa>(
    isa: I,
    x: &[f32],
    [from, below]: [f32; 2],
    first: u32,
    list: &mut Vec<u32>,
) {
    let (from, below) = (isa.splat(from), isa.splat(below));
    list_lanes(isa, x.len(), first, list, |at| match x[at..].first_chunk() {
        Some(block) => bits_within(isa, block, from, below),
        None => bits_within(isa, &padded(&x[at..]), from, below),
    });
}

/// A bit for each that is at least `from` and not at least `below`.
#[inline(always)]
fn bits_within<I: Isa>(isa: I, block: &[f32; 64], from: I::F, below: I::F) -> u64 {
    let mut bits = 0;
    for (part, line) in block.as_chunks::<16>().0.iter().enumerate() {
        isa.prefetch(line.as_ptr().wrapping_add(AHEAD).cast());
        let v = isa.load(line);
        bits |= u64::from(isa.at_least(v, from) & !isa.at_least(v, below)) << (16 * part);
    }
    bits
}

/// Sets bit i mod 8 of byte i / 8 for every positive x.
#[inline(always)]
pub(crate) fn mark_positive<I: Isa>(isa: I, x: &[f32], bits: &mut [u8]) {
    let least = isa.splat(f32::from_bits(1));
    for (x, bits) in x.chunks(16).zip(bits.chunks_mut(2)) {
        let v = match x.first_chunk() {
            Some(block) => isa.load(block),
            None => isa.load(&padded(x)),
        };
        bits.iter_mut().zip(isa.at_least(v, least).to_le_bytes()).for_each(|(byte, set)| *byte |= set);
    }
}

/// Appends the places of the bits that are set to `list`, in order.
#[inline(always)]
pub(crate) fn list_bits<I: Isa>(isa: I, bits: &[u8], list: &mut Vec<u32>) {
    list_lanes(isa, 8 * bits.len(), 0, list, |at| {
        let bits = &bits[at / 8..];
        u64::from_le_bytes(match bits.first_chunk() {
            Some(eight) => *eight,
            None => padded(bits),
        })
    });
}

/// Codes of which [`list_nonzero`] takes a multiple.
pub(crate) const LISTED: usize = 64;

/// How many codes are not 0.
#[inline(always)]
pub(crate) fn count_nonzero<I: Isa>(isa: I, codes: &[i8]) -> u32 {
    codes.as_chunks().0.iter().map(|codes| isa.nonzero(codes).count_ones()).sum()
}

/// Makes `list` the places of the codes that are not 0, of a multiple of [`LISTED`], and `packed` those codes.
#[inline(always)]
pub(crate) fn list_nonzero<I: Isa>(isa: I, codes: &[i8], list: &mut Vec<u32>, packed: &mut Vec<i8>) {
    list.clear();
    packed.clear();
    list_lanes(isa, codes.len(), 0, list, |at| {
        let four = codes[at..].as_chunks().0;
        (0..4).fold(0, |mask, part| mask | u64::from(isa.nonzero(&four[part])) << (16 * part))
    });
    packed.extend(list.iter().map(|&i| codes[i as usize]));
}

/// Appends `first` + i to `list` for every i below `n` whose bit `mask` sets, which is asked for 64 of them at a time.
#[inline(always)]
fn list_lanes<I: Isa>(isa: I, n: usize, first: u32, list: &mut Vec<u32>, mask: impl Fn(usize) -> u64) {
    list.reserve(n.next_multiple_of(64));
    let (begun, out) = (list.len(), list.spare_capacity_mut());
    let mut count = 0;
    for at in (0..n).step_by(64) {
        let mask = mask(at) & u64::MAX >> (64 - (n - at).min(64));
        count += isa.places(mask, first + at as u32, &mut out[count..].as_chunks_mut().0[0]);
    }
    // SAFETY: there is room for all, and so many were written.
    unsafe { list.set_len(begun + count) }
}

/// x += y.
#[inline(always)]
pub(crate) fn add<I: Isa>(isa: I, x: &mut [f32], y: &[f32]) {
    let y = &y[..x.len()];
    let (blocks, tail) = x.as_chunks_mut::<16>();
    let (y_blocks, y_tail) = y.as_chunks::<16>();
    for (x, y) in blocks.iter_mut().zip(y_blocks) {
        isa.store(isa.add(isa.load(x), isa.load(y)), x);
    }
    for (x, y) in tail.iter_mut().zip(y_tail) {
        *x += y;
    }
}

/// out = max(gate, 0)^2 * up. Returns the sum of the squares.
#[inline(always)]
pub(crate) fn relu2_mul<I: Isa>(isa: I, gate: &[f32], up: &[f32], out: &mut [f32]) -> f32 {
    let squares = map(
        isa,
        [gate, up],
        out,
        #[inline(always)]
        |[gate, up]| {
            let relu = isa.max(gate, isa.splat(0.0));
            isa.mul(isa.mul(relu, relu), up)
        },
        #[inline(always)]
        |sum, x| add_square(isa, sum, x),
    );
    fold(isa, squares)
}

/// out = gate / (1 + exp(-gate)) * up. Returns the sum of the squares.
#[inline(always)]
pub(crate) fn silu_mul<I: Isa>(isa: I, gate: &[f32], up: &[f32], out: &mut [f32]) -> f32 {
    let squares = map(
        isa,
        [gate, up],
        out,
        #[inline(always)]
        |[gate, up]| {
            let e = exp(isa, isa.sub(isa.splat(0.0), gate));
            isa.mul(isa.div(gate, isa.add(isa.splat(1.0), e)), up)
        },
        #[inline(always)]
        |sum, x| add_square(isa, sum, x),
    );
    fold(isa, squares)
}

/// e^x within a few ulp for -87 <= x <= 88, to which x is clamped. exp(0) is exactly 1.
///
/// x = n ln 2 + r with ln 2 in two parts (the first of 10 bits, so that n times it is exact), and the Taylor polynomial of
/// degree 7 for |r| <= 0.35.
#[inline(always)]
pub(crate) fn exp<I: Isa>(isa: I, x: I::F) -> I::F {
    let zero = isa.splat(0.0);
    let x = isa.max(x, isa.splat(-87.0));
    // min(x, 88) by the only comparison there is.
    let x = isa.sub(zero, isa.max(isa.sub(zero, x), isa.splat(-88.0)));
    let n = isa.round(isa.mul(x, isa.splat(std::f32::consts::LOG2_E)));
    let r = isa.sub(x, isa.mul(n, isa.splat(0.693_359_4)));
    let r = isa.sub(r, isa.mul(n, isa.splat(-2.121_944_4e-4)));
    let mut p = isa.splat(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = isa.add(isa.mul(p, r), isa.splat(c));
    }
    isa.mul(p, isa.pow2(n))
}

/// Rotates one head in place. `cos`, `sin`: half the rotated width each. Pairs are (i, i + half), as in
/// GPT-NeoX; elements past the rotated width stay.
#[inline(always)]
pub(crate) fn rope<I: Isa>(isa: I, head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    let (a, b) = head[..2 * half].split_at_mut(half);
    let whole = half / 16;
    for i in 0..whole {
        let (x, y) = (&mut a.as_chunks_mut::<16>().0[i], &mut b.as_chunks_mut::<16>().0[i]);
        let (c, s) = (isa.load(&cos.as_chunks::<16>().0[i]), isa.load(&sin.as_chunks::<16>().0[i]));
        let (vx, vy) = (isa.load(x), isa.load(y));
        isa.store(isa.sub(isa.mul(vx, c), isa.mul(vy, s)), x);
        isa.store(isa.add(isa.mul(vy, c), isa.mul(vx, s)), y);
    }
    for i in 16 * whole..half {
        let (x, y) = (a[i], b[i]);
        a[i] = x * cos[i] - y * sin[i];
        b[i] = y * cos[i] + x * sin[i];
    }
}

/// The encoding of the embedding and the output head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FloatType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
}

impl FloatType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

/// Sixteen stored little-endian elements as lanes; a shorter slice is filled up with zeros.
#[inline(always)]
fn decode<I: Isa>(isa: I, ty: FloatType, bytes: &[u8]) -> I::F {
    #[inline(always)]
    fn words(bytes: &[u8]) -> [u16; 16] {
        let mut words = [0; 16];
        match <&[u8; 32]>::try_from(bytes) {
            // SAFETY: any bits are a u16. Byte by byte, the compiler would not see the plain load that this is on the
            // little-endian machines for which alone this crate compiles.
            Ok(full) => words = unsafe { std::mem::transmute::<[u8; 32], [u16; 16]>(*full) },
            Err(_) => {
                for (word, b) in words.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *word = u16::from_le_bytes(*b);
                }
            }
        }
        words
    }
    match ty {
        FloatType::F16 => isa.f16_lanes(&words(bytes)),
        FloatType::BF16 => isa.bf16_lanes(&words(bytes)),
        FloatType::F32 => {
            let mut floats = [0.0; 16];
            for (float, b) in floats.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *float = f32::from_le_bytes(*b);
            }
            isa.load(&floats)
        }
    }
}

/// Decodes a stored row to float32. Returns whether every element is finite.
#[inline(always)]
pub(crate) fn decode_row<I: Isa>(isa: I, ty: FloatType, row: &[u8], out: &mut [f32]) -> bool {
    let mut stored = row.chunks(16 * ty.size());
    let (blocks, tail) = out.as_chunks_mut::<16>();
    for (out, bytes) in blocks.iter_mut().zip(&mut stored) {
        isa.store(decode(isa, ty, bytes), out);
    }
    if let Some(bytes) = stored.next() {
        let mut full = [0.0; 16];
        isa.store(decode(isa, ty, bytes), &mut full);
        tail.copy_from_slice(&full[..tail.len()]);
    }
    // The greatest exponent without a sign is that of what is not finite. A loop that does not end early takes whole registers.
    out.iter().fold(0, |top, x| top.max(x.to_bits() & 0x7fff_ffff)) < f32::INFINITY.to_bits()
}

/// Dot products of the stored float rows `w` with each token of `x` (`[tokens][columns]`), to `out` at
/// (t, first_row + r).
///
/// # Safety
/// `out` must have room for all those elements, and nobody else may touch them meanwhile.
#[inline(always)]
pub(crate) unsafe fn head_rows<I: Isa>(
    isa: I,
    ty: FloatType,
    w: &[u8],
    x: &[f32],
    columns: usize,
    first_row: usize,
    out: crate::ternary::OutPtr,
) {
    // SAFETY: the caller's contract, handed on.
    unsafe {
        match ty {
            FloatType::F16 => head_typed(isa, FloatType::F16, w, x, columns, first_row, out),
            FloatType::BF16 => head_typed(isa, FloatType::BF16, w, x, columns, first_row, out),
            FloatType::F32 => head_typed(isa, FloatType::F32, w, x, columns, first_row, out),
        }
    }
}

/// # Safety
/// As [`head_rows`].
#[inline(always)]
unsafe fn head_typed<I: Isa>(
    isa: I,
    ty: FloatType,
    w: &[u8],
    x: &[f32],
    columns: usize,
    first_row: usize,
    out: crate::ternary::OutPtr,
) {
    let row_bytes = columns * ty.size();
    let (rows, tokens) = (w.len() / row_bytes, x.len() / columns);
    let mut t = 0;
    while t < tokens {
        let step = if tokens - t >= 4 { 4 } else { 1 };
        let x = &x[t * columns..][..step * columns];
        let mut r = 0;
        while r < rows {
            let left = rows - r;
            // One token takes two rows at a time, so that an addition need not wait for the one before.
            let step_rows = match step {
                4 if left >= 4 => I::HEAD_ROWS,
                1 if left >= 2 => 2,
                _ => 1,
            };
            let w = &w[r * row_bytes..][..step_rows * row_bytes];
            let at = first_row + r;
            // SAFETY: the caller's contract, handed on.
            unsafe {
                match (step_rows, step) {
                    (4, 4) => head_tile::<I, 4, 4>(isa, ty, w, x, columns, t, at, out),
                    (2, 1) => head_tile::<I, 2, 1>(isa, ty, w, x, columns, t, at, out),
                    (_, 4) => head_tile::<I, 1, 4>(isa, ty, w, x, columns, t, at, out),
                    _ => head_tile::<I, 1, 1>(isa, ty, w, x, columns, t, at, out),
                }
            }
            r += step_rows;
        }
        t += step;
    }
}

/// Logits of single rows of the head `w`, one for each of `list`, to `out`.
#[inline(always)]
pub(crate) fn head_listed<I: Isa>(isa: I, ty: FloatType, w: &[u8], x: &[f32], list: &[u32], out: &mut [f32]) {
    let row_bytes = x.len() * ty.size();
    for (i, (&row, out)) in list.iter().zip(out).enumerate() {
        // The next row is anywhere: ask for it while this one is multiplied.
        if let Some(&next) = list.get(i + 1) {
            let at = w.as_ptr().wrapping_add(next as usize * row_bytes);
            let mut line = 0;
            while line < row_bytes {
                isa.prefetch(at.wrapping_add(line));
                line += 64;
            }
        }
        let w = &w[row as usize * row_bytes..][..row_bytes];
        let out = crate::ternary::OutPtr { ptr: out, stride: 0 };
        // SAFETY: one row and one token give one element, which `out` is.
        unsafe { head_rows(isa, ty, w, x, x.len(), 0, out) }
    }
}

/// R rows against T tokens.
///
/// # Safety
/// As [`head_rows`].
#[inline(always)]
unsafe fn head_tile<I: Isa, const R: usize, const T: usize>(
    isa: I,
    ty: FloatType,
    w: &[u8],
    x: &[f32],
    columns: usize,
    t0: usize,
    first_row: usize,
    out: crate::ternary::OutPtr,
) {
    let size = ty.size();
    let row: [&[u8]; R] = std::array::from_fn(|r| &w[r * columns * size..][..columns * size]);
    let token: [&[f32]; T] = std::array::from_fn(|t| &x[t * columns..][..columns]);
    let mut sums = [[isa.splat(0.0); T]; R];
    let whole = columns / 16;
    for i in 0..whole {
        let mut x = [isa.splat(0.0); T];
        for t in 0..T {
            x[t] = isa.load(&token[t].as_chunks::<16>().0[i]);
        }
        for r in 0..R {
            let w = &row[r][16 * size * i..][..16 * size];
            if T == 1 && (16 * size * i).is_multiple_of(64) {
                isa.prefetch(w.as_ptr().wrapping_add(8192));
                isa.prefetch_again(w.as_ptr().wrapping_add(SHORTLY));
            }
            let w = decode(isa, ty, w);
            for t in 0..T {
                sums[r][t] = isa.add(sums[r][t], isa.mul(w, x[t]));
            }
        }
    }
    if !columns.is_multiple_of(16) {
        let mut x = [isa.splat(0.0); T];
        for t in 0..T {
            x[t] = isa.load(&padded(&token[t][16 * whole..]));
        }
        for r in 0..R {
            let w = decode(isa, ty, &row[r][16 * size * whole..]);
            for t in 0..T {
                sums[r][t] = isa.add(sums[r][t], isa.mul(w, x[t]));
            }
        }
    }
    for r in 0..R {
        for t in 0..T {
            // SAFETY: the caller's contract: (t0 + t, first_row + r) is ours and in bounds.
            unsafe { out.write(t0 + t, first_row + r, fold(isa, sums[r][t])) }
        }
    }
}

/// The greatest of all bytes taken as floats, which matters to nobody: reads memory as fast as it comes.
#[inline(always)]
pub(crate) fn stream_read<I: Isa>(isa: I, floats: &[f32]) -> f32 {
    let mut top = [isa.splat(0.0); 4];
    for block in floats.as_chunks::<64>().0 {
        isa.prefetch(block.as_ptr().wrapping_add(1024).cast());
        isa.prefetch(block.as_ptr().wrapping_add(1024 + 16).cast());
        isa.prefetch(block.as_ptr().wrapping_add(1024 + 32).cast());
        isa.prefetch(block.as_ptr().wrapping_add(1024 + 48).cast());
        let block = block.as_chunks::<16>().0;
        for i in 0..4 {
            top[i] = isa.max(isa.load(&block[i]), top[i]);
        }
    }
    fold(isa, isa.max(isa.max(top[0], top[1]), isa.max(top[2], top[3])))
}
