//! Every instruction set and every number of threads computes what the scalar kernels compute on one thread, to the bit,
//! and those compute the formulas.

use bitnet_kernels::ternary::{Layout, base3, columns, row_bytes};
use bitnet_kernels::{
    Activation, Bytes, Compute, FloatMatrix, FloatType, Head, HeadScratch, Kernels, KvShape, KvStore, KvType,
    Logits, QuantizedRows, Screen, TernaryMatrix, Workspace, supported,
};
use std::sync::Arc;

/// splitmix64.
struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float() * 3.0).collect()
    }
    fn trits(&mut self, n: usize) -> Vec<i8> {
        (0..n).map(|_| (self.next() % 3) as i8 - 1).collect()
    }
}

fn rows_of(trits: &[i8], columns: usize) -> Vec<u8> {
    let rows = trits.len() / columns;
    let mut bytes = vec![0x55u8; rows * row_bytes(columns)];
    for (row, stored) in trits.chunks(columns).zip(bytes.chunks_mut(row_bytes(columns))) {
        for (i, trit) in row.iter().enumerate() {
            let (byte, shift) = (i / 128 * 32 + i % 32, 6 - 2 * (i % 128 / 32));
            stored[byte] = stored[byte] & !(3 << shift) | ((trit + 1) as u8) << shift;
        }
    }
    bytes
}

fn shared(bytes: Vec<u8>) -> Bytes {
    let n = bytes.len();
    Bytes::new(Arc::new(bytes), 0..n)
}

fn matrix(trits: &[i8], columns: usize, scale: f32) -> TernaryMatrix {
    let bytes = shared(rows_of(trits, columns));
    TernaryMatrix::new(bytes, Layout::Rows, trits.len() / columns, columns, scale)
}

/// The same in base 3, packed by `compute`.
fn packed(trits: &[i8], columns: usize, scale: f32, compute: &Compute) -> TernaryMatrix {
    let (rows, stored) = (trits.len() / columns, rows_of(trits, columns));
    let mut bytes = vec![0; Layout::Base3.bytes(rows, columns)];
    let packed = bytes.chunks_mut(base3::row_bytes(columns));
    stored.chunks(row_bytes(columns)).zip(packed).for_each(|(row, packed)| compute.pack_base3(row, packed));
    TernaryMatrix::new(shared(bytes), Layout::Base3, rows, columns, scale)
}

fn by_columns(trits: &[i8], columns: usize, scale: f32) -> TernaryMatrix {
    let (rows, stored) = (trits.len() / columns, rows_of(trits, columns));
    let mut bytes = vec![0; Layout::Columns.bytes(rows, columns)];
    for (chunk, out) in bytes.chunks_mut(256 * columns::column_bytes(rows)).enumerate() {
        let strip: Vec<u8> =
            stored.chunks(row_bytes(columns)).flat_map(|row| row[64 * chunk..][..64].to_vec()).collect();
        columns::transpose(&strip, out);
    }
    TernaryMatrix::new(shared(bytes), Layout::Columns, rows, columns, scale)
}

/// What `f` gives for each kernel set and thread count; all must be equal, and one of them is returned.
fn everywhere<T: PartialEq + std::fmt::Debug>(f: impl Fn(&Compute) -> T) -> T {
    let run = |kernels: &'static Kernels, threads| f(&Compute::new(kernels, threads));
    let reference = run(supported()[0], 1);
    for kernels in supported() {
        for threads in [1, 3, 4] {
            let got = run(kernels, threads);
            assert!(got == reference, "{} on {threads} threads differs from scalar", kernels.name());
        }
    }
    reference
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn linear_is_exact_everywhere() {
    let mut random = Random(1);
    for (tokens, columns, rows) in [
        (1, 256, 64),
        (2, 1290, 9),
        (1, 2560, 129),
        (2, 192, 33),
        (3, 640, 7),
        (5, 1000, 50),
        (8, 8640, 11),
        (13, 256, 300),
        (70, 512, 100),
        (9, 6912, 5),
        (9, 256, 3300),
    ] {
        let (trits, other) = (random.trits(rows * columns), random.trits(3 * columns));
        let (w, v) = (matrix(&trits, columns, 0.37), matrix(&other, columns, 1.5));
        let x = random.floats(tokens * columns);
        let norm = random.floats(columns);
        let (codes, out) = everywhere(|compute| {
            let mut q = QuantizedRows::new(tokens, columns);
            let mut work = Workspace::new(columns, compute.pool().threads());
            compute.norm_quantize(&x, &norm, 1e-5, Layout::Rows, &mut work, &mut q);
            let (mut out, mut out2) = (vec![f32::NAN; tokens * rows], vec![f32::NAN; tokens * 3]);
            compute.linear(&q, &mut work, [(&w, &mut out), (&v, &mut out2)]);
            let (w, v) = (packed(&trits, columns, 0.37, compute), packed(&other, columns, 1.5, compute));
            let (mut out3, mut out4) = (vec![f32::NAN; tokens * rows], vec![f32::NAN; tokens * 3]);
            compute.linear(&q, &mut work, [(&w, &mut out3), (&v, &mut out4)]);
            assert!((bits(&out), bits(&out2)) == (bits(&out3), bits(&out4)), "base 3");
            out.extend(out2);
            let codes: Vec<_> = (0..tokens).map(|t| (q.row(t).0, q.row(t).1.to_bits())).collect();
            (codes, bits(&out))
        });
        for t in 0..tokens {
            let x = &x[t * columns..][..columns];
            let mean = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / columns as f64;
            let r = 1.0 / (mean + 1e-5).sqrt();
            let h: Vec<f64> = x.iter().zip(&norm).map(|(&x, &w)| f64::from(x) * r * f64::from(w)).collect();
            let amax = h.iter().fold(0.0f64, |a, b| a.max(b.abs()));
            let (q, s) = (&codes[t].0, f32::from_bits(codes[t].1));
            assert!((f64::from(s) * amax / 127.0 - 1.0).abs() < 1e-6);
            for (q, h) in q.iter().zip(&h) {
                assert!((f64::from(*q) - h * 127.0 / amax).abs() <= 0.501);
            }
            for r in 0..rows {
                let dot: i32 = trits[r * columns..][..columns]
                    .iter()
                    .zip(q)
                    .map(|(&w, &q)| i32::from(w) * i32::from(q))
                    .sum();
                assert_eq!(out[t * rows + r], (dot as f32 * (0.37 / s)).to_bits());
            }
        }
    }
}

#[test]
fn columns_and_listed_rows_equal_rows() {
    let mut random = Random(7);
    for (tokens, columns, rows, live) in [
        (1, 256, 64, 1.0),
        (1, 2560, 129, 0.3),
        (1, 100, 700, 0.02),
        (1, 333, 1000, 0.0),
        (2, 192, 33, 0.5),
        (5, 1000, 300, 0.1),
        (8, 640, 257, 0.7),
        (9, 640, 257, 0.1),
        (31, 700, 70, 1.0),
        (37, 1000, 300, 0.2),
        (50, 256, 70, 0.0),
    ] {
        let trits = random.trits(rows * columns);
        let (by_rows, by_columns) = (matrix(&trits, columns, 0.7), by_columns(&trits, columns, 0.7));
        let mut x = random.floats(tokens * columns);
        for x in &mut x {
            if f64::from(random.float()) > 2.0 * live - 1.0 {
                *x = 0.0;
            }
        }
        let list: Vec<u32> = (0..rows as u32).filter(|_| random.next() & 1 == 0).collect();
        everywhere(|compute| {
            let mut q = QuantizedRows::new(tokens, columns);
            let mut work = Workspace::new(columns.max(rows), compute.pool().threads());
            let (mut out, mut out2) = (vec![f32::NAN; tokens * rows], vec![f32::NAN; tokens * rows]);
            let norm = vec![1.0; columns];
            compute.norm_quantize(&x, &norm, 1e-5, Layout::Rows, &mut work, &mut q);
            compute.linear(&q, &mut work, [(&by_rows, &mut out)]);
            if tokens <= 16 {
                compute.linear_listed(&q, &mut work, &by_rows, &list, &mut out2);
                let mut out3 = vec![f32::NAN; tokens * rows];
                let packed = packed(&trits, columns, 0.7, compute);
                compute.linear_listed(&q, &mut work, &packed, &list, &mut out3);
                assert!(bits(&out2) == bits(&out3), "base 3");
                for (i, (got, all)) in out2.iter().zip(&out).enumerate() {
                    let wanted = list.contains(&((i % rows) as u32));
                    assert_eq!(got.to_bits(), if wanted { *all } else { f32::NAN }.to_bits());
                }
            }
            let codes: Vec<_> = (0..tokens).map(|t| q.row(t).0).collect();
            for _ in 0..2 {
                compute.norm_quantize(&x, &norm, 1e-5, Layout::Columns, &mut work, &mut q);
            }
            assert_eq!((0..tokens).map(|t| q.row(t).0).collect::<Vec<_>>(), codes);
            let live = codes.iter().flatten().filter(|&&code| code != 0).count();
            assert_eq!(q.live_codes(), live);
            compute.linear(&q, &mut work, [(&by_columns, &mut out2)]);
            assert_eq!(bits(&out), bits(&out2));
            assert_eq!(q.reads_all_columns(), tokens > 16);
            if q.reads_all_columns() {
                q.leave_out_zeros();
                assert!(q.leaves_out_zeros());
                out2.fill(f32::NAN);
                compute.linear(&q, &mut work, [(&by_columns, &mut out2)]);
                assert_eq!(bits(&out), bits(&out2), "without the zeros");
            }
            bits(&out)
        });
    }
}

#[test]
fn extreme_codes_do_not_overflow() {
    // All weights +1 and all activations equal: every partial sum is as large as it can be.
    for columns in [256 * 40, 256 * 41 + 128] {
        let ones = vec![1; 2 * columns];
        let (w, v) = (matrix(&ones, columns, 1.0), by_columns(&ones, columns, 1.0));
        let norm = vec![1.0; columns];
        for sign in [1.0, -1.0] {
            let x = vec![sign; 49 * columns];
            let out = everywhere(|compute| {
                let mut work = Workspace::new(columns, compute.pool().threads());
                let mut product = |tokens, layout, matrix: &TernaryMatrix| {
                    let mut q = QuantizedRows::new(tokens, columns);
                    compute.norm_quantize(&x[..tokens * columns], &norm, 1e-5, layout, &mut work, &mut q);
                    let mut out = vec![0.0; 2 * tokens];
                    compute.linear(&q, &mut work, [(matrix, &mut out)]);
                    bits(&out)
                };
                // So many that they are multiplied by rows, by columns, or with weights unpacked.
                let out = product(49, Layout::Rows, &w);
                let packed = packed(&ones, columns, 1.0, compute);
                for tokens in [1, 9, 17, 49] {
                    assert_eq!(out[..2 * tokens], product(tokens, Layout::Rows, &w));
                    assert_eq!(out[..2 * tokens], product(tokens, Layout::Rows, &packed), "base 3");
                    assert_eq!(out[..2 * tokens], product(tokens, Layout::Columns, &v));
                }
                out
            });
            assert!(out.iter().all(|&y| (f32::from_bits(y) - sign * columns as f32).abs() < 0.1));
        }
    }
}

#[test]
fn activations_are_the_same_everywhere() {
    let mut random = Random(2);
    for columns in [16, 100, 768, 2563] {
        let mut gate = random.floats(3 * columns);
        for (i, x) in [0.0, -0.0, 1e-30, 90.0, -90.0, 40.0, -40.0].into_iter().enumerate() {
            gate[i] = x;
        }
        let (mut up, norm) = (random.floats(3 * columns), random.floats(columns));
        // The last of a row is the greatest.
        (gate[2 * columns - 1], up[2 * columns - 1]) = (3.0, -9.0);
        for activation in [Activation::Relu2, Activation::Silu] {
            for (norm, layout) in [(None, Layout::Rows), (Some((&norm[..], 1e-5)), Layout::Columns)] {
                let rows = everywhere(|compute| {
                    let mut q = QuantizedRows::new(3, columns);
                    let mut work = Workspace::new(columns, compute.pool().threads());
                    compute
                        .activate_quantize(activation, &gate, &up, columns, norm, layout, &mut work, &mut q);
                    (0..3).map(|t| (q.row(t).0, q.row(t).1.to_bits())).collect::<Vec<_>>()
                });
                if norm.is_none() {
                    for t in 0..3 {
                        let f: Vec<f64> = (0..columns)
                            .map(|i| {
                                let (g, u) =
                                    (f64::from(gate[t * columns + i]), f64::from(up[t * columns + i]));
                                match activation {
                                    Activation::Relu2 => g.max(0.0).powi(2) * u,
                                    Activation::Silu => g / (1.0 + (-g).exp()) * u,
                                }
                            })
                            .collect();
                        let top = f.iter().fold(0.0f64, |a, b| a.max(b.abs()));
                        for (q, f) in rows[t].0.iter().zip(f) {
                            assert!((f64::from(*q) - f * 127.0 / top).abs() < 0.501);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn attention_is_the_same_everywhere_and_right() {
    let mut random = Random(3);
    for (head_dim, kv_heads, group, positions) in
        [(128, 2, 4, 330), (64, 2, 2, 65), (48, 1, 5, 64), (20, 3, 1, 130), (6, 1, 9, 80)]
    {
        let (layers, width, kv_width) = (2, head_dim * kv_heads * group, head_dim * kv_heads);
        let pages: Vec<u32> = (0..6).map(|p| 5 - p).collect();
        let (k, v) = (random.floats(positions * kv_width), random.floats(positions * kv_width));
        let q = random.floats(positions * width);
        for (ty, tolerance) in [(KvType::F32, 2e-5), (KvType::F16, 3e-3), (KvType::Q8, 6e-2)] {
            let shape = KvShape { ty, layers, heads: kv_heads, query_heads: kv_heads * group, head_dim };
            let filled = |compute: &Compute, count: usize| {
                // Room for the segments of two tokens.
                let mut kv = KvStore::new(shape, 12, positions).unwrap();
                let [k, v] = [&k, &v].map(|x| &x[..count * kv_width]);
                compute.store(&mut kv, 1, k, v, |t| (&pages, t + 1));
                kv
            };
            let out = everywhere(|compute| {
                let mut out = vec![f32::NAN; q.len()];
                compute.attention(
                    &mut filled(compute, positions),
                    1,
                    &q,
                    None,
                    |t| (&pages, t + 1),
                    &mut out,
                );
                bits(&out)
            });
            // One token alone, whose past is split among the threads where it is long; and two that follow each other.
            for range in
                [70.min(positions - 1)..71.min(positions), positions - 1..positions, positions - 2..positions]
            {
                let new = [&k, &v].map(|x| &x[range.start * kv_width..range.end * kv_width]);
                let some = everywhere(|compute| {
                    let mut out = vec![f32::NAN; range.len() * width];
                    let q = &q[range.start * width..range.end * width];
                    let sees = |t| (&pages[..], range.start + t + 1);
                    compute.attention(&mut filled(compute, range.start), 1, q, Some(new), sees, &mut out);
                    bits(&out)
                });
                assert!(some == out[range.start * width..range.end * width], "{shape:?} {range:?}");
            }
            let mut error = 0.0f64;
            for t in [0, 1, positions / 2, positions - 1] {
                for h in 0..kv_heads * group {
                    let q = &q[t * width + h * head_dim..][..head_dim];
                    let at = |p: usize| p * kv_width + h / group * head_dim;
                    let dot = |p| {
                        q.iter().zip(&k[at(p)..]).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>()
                    };
                    let scores: Vec<f64> = (0..=t).map(|p| dot(p) / (head_dim as f64).sqrt()).collect();
                    let top = scores.iter().copied().fold(f64::MIN, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    for d in 0..head_dim {
                        let want: f64 =
                            (0..=t).map(|p| weights[p] * f64::from(v[at(p) + d])).sum::<f64>() / total;
                        let got = f32::from_bits(out[t * width + h * head_dim + d]);
                        error = error.max((f64::from(got) - want).abs());
                    }
                }
            }
            assert!(error < tolerance, "{shape:?}: {error}");
            println!("{shape:?}: {error}");
        }
    }
}

#[test]
fn tokens_of_several_sequences_attend_as_if_alone() {
    const SHAPE: KvShape = KvShape { ty: KvType::F32, layers: 1, heads: 5, query_heads: 10, head_dim: 20 };
    let (kv_width, width) = (SHAPE.heads * SHAPE.head_dim, SHAPE.query_heads * SHAPE.head_dim);
    let mut random = Random(17);
    let past = random.floats(256 * kv_width);
    for (sequences, least, spread) in [(2, 193, 60), (2, 190, 7), (7, 1, 40), (9, 1, 150), (16, 1, 64)] {
        let lens: Vec<usize> = (0..sequences).map(|s| least + s * 37 % spread).collect();
        // Every third sequence begins as the one before it does, where both have a full page.
        let shares = |s: usize| s % 3 == 2 && lens[s].min(lens[s - 1]) > 64;
        let page = |s: usize, p: usize| (4 * s + p) as u32;
        let pages: Vec<Vec<u32>> = (0..sequences)
            .map(|s| (0..4).map(|p| page(s - usize::from(p == 0 && shares(s)), p)).collect())
            .collect();
        let [q, k, v] = [width, kv_width, kv_width].map(|width| random.floats(sequences * width));
        for ty in [KvType::F32, KvType::F16, KvType::Q8] {
            everywhere(|compute| {
                let mut kv = KvStore::new(KvShape { ty, ..SHAPE }, 4 * sequences, 200).unwrap();
                for (pages, len) in pages.iter().zip(&lens) {
                    let past = &past[..(len - 1) * kv_width];
                    compute.store(&mut kv, 0, past, past, |t| (pages, t + 1));
                }
                // The first of two tokens may even see the page of the second.
                let sees = |s: usize| match (sequences, s) {
                    (2, 1) if least == 190 => (&pages[0][..], 10),
                    _ => (&pages[s][..], lens[s]),
                };
                let mut together = vec![f32::NAN; sequences * width];
                compute.attention(&mut kv, 0, &q, Some([&k, &v]), sees, &mut together);
                let mut alone = vec![f32::NAN; width];
                compute.store(&mut kv, 0, &k, &v, sees);
                for s in 0..sequences {
                    let q = &q[s * width..][..width];
                    compute.attention(&mut kv, 0, q, None, |_| sees(s), &mut alone);
                    assert_eq!(
                        bits(&together[s * width..][..width]),
                        bits(&alone),
                        "{s} of {sequences}, {ty:?}"
                    );
                }
                bits(&together)
            });
        }
    }
}

#[test]
fn head_embedding_rope_and_sums_are_the_same_everywhere() {
    let mut random = Random(4);
    for (columns, rows, tokens) in [(256, 41, 1), (100, 7, 6), (2560, 9, 7), (24, 130, 5)] {
        let x = random.floats(tokens * columns);
        for ty in [FloatType::F16, FloatType::BF16, FloatType::F32] {
            // Any finite bit pattern may be stored, subnormal halves included.
            let bytes: Vec<u8> = match ty {
                FloatType::F32 => {
                    random.floats(rows * columns).iter().flat_map(|x| x.to_le_bytes()).collect()
                }
                FloatType::F16 | FloatType::BF16 => (0..rows * columns)
                    .flat_map(|_| ((random.next() & 0xbbff) as u16).to_le_bytes())
                    .collect(),
            };
            let w = FloatMatrix::new(shared(bytes), ty, rows, columns);
            let (embedded, logits) = everywhere(|compute| {
                let mut embedded = vec![f32::NAN; rows * columns];
                compute.embed(&w, &(0..rows as u32).collect::<Vec<_>>(), &mut embedded).unwrap();
                let mut logits = vec![f32::NAN; tokens * rows];
                let head = Head { matrix: w.clone(), screen: None };
                let mut scratch = HeadScratch::new(rows, columns, compute.pool().threads());
                compute.head(&head, &x, |_| Logits::Every, &mut scratch, &mut logits);
                (bits(&embedded), bits(&logits))
            });
            for t in 0..tokens {
                for r in 0..rows {
                    let row =
                        embedded[r * columns..][..columns].iter().map(|&w| f64::from(f32::from_bits(w)));
                    let (mut want, mut size) = (0.0, 0.0);
                    for (w, &x) in row.zip(&x[t * columns..]) {
                        want += w * f64::from(x);
                        size += (w * f64::from(x)).abs();
                    }
                    let got = f64::from(f32::from_bits(logits[t * rows + r]));
                    assert!((got - want).abs() <= size * 1e-5, "{got} {want}");
                }
            }
        }
        let (half, head_dim) = (columns / 8, columns / 2);
        let (cos, sin) = (random.floats(tokens * half), random.floats(tokens * half));
        let y = random.floats(tokens * columns);
        let (rotated, sums, _) = everywhere(|compute| {
            let mut x = x.clone();
            compute.rope(&mut x, head_dim, &cos, &sin, tokens);
            let rotated = bits(&x);
            compute.add(&mut x, &y);
            let mut normed = vec![0.0; x.len()];
            compute.rmsnorm(&x, &y[..columns], 1e-6, &mut normed);
            (rotated, bits(&x), bits(&normed))
        });
        for (i, (&got, &sum)) in rotated.iter().zip(&sums).enumerate() {
            let (t, d) = (i / columns, i % columns % head_dim);
            // An element is rotated with the one half a rotation away; those past two halves stay.
            let turn = |with: usize, sign: f32| {
                let at = t * half + d % half;
                f64::from(x[i]) * f64::from(cos[at]) + f64::from(sign * x[with]) * f64::from(sin[at])
            };
            let want = match d / half {
                0 => turn(i + half, -1.0),
                1 => turn(i - half, 1.0),
                _ => f64::from(x[i]),
            };
            assert!((f64::from(f32::from_bits(got)) - want).abs() < 1e-5, "{i}: {want}");
            assert_eq!(f32::from_bits(sum), f32::from_bits(got) + y[i]);
        }
    }
}

#[test]
fn positive_outputs_are_found() {
    const COLUMNS: usize = 300;
    let mut random = Random(12);
    for (tokens, rows) in [(1, 1), (1, 7), (1, 8), (2, 37), (3, 256), (1, 1009)] {
        let (x, trits) = (random.floats(tokens * COLUMNS), random.trits(rows * COLUMNS));
        everywhere(|compute| {
            let (mut work, mut q) =
                (Workspace::new(2048, compute.pool().threads()), QuantizedRows::new(3, COLUMNS));
            let (mut out, mut list) = (vec![0.0; tokens * rows], vec![7; 3]);
            let mut found = Vec::new();
            for scale in [1.0, -1.0, 0.0, f32::NAN, f32::INFINITY] {
                for matrix in [matrix(&trits, COLUMNS, scale), packed(&trits, COLUMNS, scale, compute)] {
                    compute.quantize(&x, COLUMNS, matrix.layout(), &mut work, &mut q);
                    let mut plain = out.clone();
                    compute.linear(&q, &mut work, [(&matrix, &mut plain)]);
                    compute.linear_positive(&q, &mut work, &matrix, &mut out, &mut list);
                    assert_eq!(bits(&out), bits(&plain));
                    let any = |row: &u32| (0..tokens).any(|t| out[t * rows + *row as usize] > 0.0);
                    let expected: Vec<u32> = (0..rows as u32).filter(any).collect();
                    assert_eq!(list, expected, "{tokens}, {rows}, {scale}");
                    found.push(list.clone());
                }
            }
            found
        });
    }
}

/// Rows like Gaussians, some with a weight far outside and one all the same, and their screen.
fn screened_head(random: &mut Random, rows: usize, columns: usize, compute: &Compute) -> Head {
    let mut weights: Vec<f32> =
        (0..rows * columns).map(|_| (0..6).map(|_| random.float()).sum::<f32>()).collect();
    (0..rows).step_by(97).for_each(|r| weights[r * columns + r % columns] *= 20.0);
    weights[..columns].fill(0.25);
    screened(&weights, columns, compute)
}

fn screened(weights: &[f32], columns: usize, compute: &Compute) -> Head {
    let rows = weights.len() / columns;
    let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
    let matrix = FloatMatrix::new(shared(bytes), FloatType::F32, rows, columns);
    let mut copy = vec![0; Screen::bytes(rows, columns)];
    for (part, out) in copy.chunks_mut(Screen::bytes(Screen::PART, columns)).enumerate() {
        compute.screen_part(&matrix, part, out);
    }
    Head { matrix, screen: Some(Screen::new(shared(copy), rows, columns)) }
}

#[test]
fn rows_that_codes_hardly_tell_are_found() {
    let mut random = Random(13);
    let (rows, columns) = (2048, 128);
    // All others are far below a row whose steps are too small for a float32, and below one with an infinity; they are less than one
    // of its steps below a third, whose codes must have no bias.
    for (others, rest, odd, end) in [
        (-3.0, 0.0, [1e-39, 0.0], 1e-39),
        (-3.0, 0.0, [f32::INFINITY, 0.0], f32::INFINITY),
        (0.0, 0.5, [1e3, -1e3], 63.0),
    ] {
        let mut weights: Vec<f32> = random.floats(rows * columns).into_iter().map(|w| w + others).collect();
        weights[1000 * columns..][..columns].fill(rest);
        weights[1000 * columns + 5..][..2].copy_from_slice(&odd);
        let x = vec![1.0; columns];
        everywhere(|compute| {
            let head = screened(&weights, columns, compute);
            let mut scratch = HeadScratch::new(rows, columns, compute.pool().threads());
            let mut out = vec![f32::NAN; rows];
            let wanted = |_| Logits::Best { top: 1, also: &[], among: None };
            compute.head(&head, &x, wanted, &mut scratch, &mut out);
            assert!(scratch.take_counts().tokens == 1 && out[1000] == end, "{end}: {}", out[1000]);
        });
    }
}

#[test]
fn the_screen_never_loses_a_row() {
    let mut random = Random(8);
    for (columns, rows, tokens) in [(256, 3000usize, 3), (100, 2002, 9), (2560, 1024, 1)] {
        let mut x = random.floats(tokens * columns);
        x[1] = 40.0; // a channel that stands out, as trained models have them
        let also = [3, 1999 % rows as u32];
        // Blocks of which all, some and no tokens are allowed.
        let allowed = |r: usize| r % 512 < 256 || r % 512 < 400 && r % 3 != 1;
        let mut mask = vec![0u32; rows.div_ceil(32)];
        (0..rows).filter(|&r| allowed(r)).for_each(|r| mask[r / 32] |= 1 << (r % 32));
        let list: Vec<u32> = (0..rows as u32).step_by(97).collect();
        let (all, best, among, listed) = everywhere(|compute| {
            let head = screened_head(&mut Random(9), rows, columns, compute);
            let mut scratch = HeadScratch::new(rows, columns, compute.pool().threads());
            let logits = || vec![f32::NAN; tokens * rows];
            let (mut all, mut best) = (logits(), logits());
            compute.head(&head, &x, |_| Logits::Every, &mut scratch, &mut all);
            let wanted = |t| Logits::Best { top: 1 + t, also: &also, among: None };
            compute.head(&head, &x, wanted, &mut scratch, &mut best);
            // Of heads so small the screen may leave too much; then all logits are computed.
            let counts = scratch.take_counts();
            // The finer codes must settle most of what the coarse ones leave open.
            assert!(counts.tokens > 0 && 4 * counts.exact < counts.open, "{counts:?}");
            let (mut among, mut listed) = (logits(), logits());
            let wanted = |t| Logits::Best { top: 1 + t, also: &also, among: Some(&mask) };
            compute.head(&head, &x, wanted, &mut scratch, &mut among);
            let counts = scratch.take_counts();
            // The finer codes must settle most of what the coarse ones leave open.
            assert!(counts.tokens > 0 && 4 * counts.exact < counts.open, "{counts:?}");
            // Fewer blocks than are looked at first, and all that is left out stays so.
            let wanted = |_| Logits::Best { top: 2, also: &[], among: Some(&mask[..4]) };
            let mut few = logits();
            compute.head(&head, &x, wanted, &mut scratch, &mut few);
            assert_eq!(scratch.take_counts().tokens, tokens as u64);
            for few in few.chunks(rows) {
                assert!(few[..128].iter().filter(|x| x.is_finite()).count() >= 2);
                assert!(few[128..].iter().all(|x| *x == f32::NEG_INFINITY));
            }
            // The second token wants others than the first.
            let wanted = |t| if t == 1 { Logits::Every } else { Logits::Listed(&list) };
            compute.head(&head, &x, wanted, &mut scratch, &mut listed);
            (bits(&all), bits(&best), bits(&among), bits(&listed))
        });
        let minus_infinity = f32::NEG_INFINITY.to_bits();
        for t in 0..tokens {
            let of = |all: &[u32]| all[t * rows..][..rows].to_vec();
            let (all, best, among, listed) = (of(&all), of(&best), of(&among), of(&listed));
            let value = |r: usize| f32::from_bits(all[r]);
            for (best, allowed) in [(best, &(|_| true) as &dyn Fn(usize) -> bool), (among, &allowed)] {
                let mut ranked: Vec<usize> = (0..rows).filter(|&r| allowed(r)).collect();
                ranked.sort_by(|&a, &b| value(b).total_cmp(&value(a)));
                let floor = value(ranked[1 + t + also.len() - 1]);
                for r in 0..rows {
                    let needed = value(r) >= floor && allowed(r) || also.contains(&(r as u32));
                    assert!(best[r] == all[r] || best[r] == minus_infinity && !needed);
                }
            }
            for r in 0..rows {
                let given = t == 1 || list.contains(&(r as u32));
                assert_eq!(listed[r], if given { all[r] } else { minus_infinity });
            }
        }
    }
}
