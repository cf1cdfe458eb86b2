//! Agreement with Hugging Face's `BitNetForCausalLM` and `LlamaForCausalLM`, end to end and layer by layer.
//!
//! Rounding alone moves the logits: an activation on x.5 flips an int8 code. So the whole is judged against the float noise
//! of the reference itself (`floor` in golden.json, see tools/make_goldens.py), and the parts with the reference's own inputs.
#![allow(clippy::unwrap_used)]

mod common;

use bitnet::kernels::ternary::{Layout, pack};
use bitnet::kernels::{
    Compute, HeadScratch, KvStore, KvType, Logits, PAGE, QuantizedRows, TernaryMatrix, Workspace, best,
};
use bitnet::model::Model;
use bitnet::{Feed, Wanted};
use common::checkpoint::layer;
use common::{MODELS, Tensors, engine, engine_with, fixture, gguf, ids, sha256};
use std::cell::RefCell;

fn golden(model: &str) -> (Tensors, serde_json::Value) {
    let json = std::fs::read(fixture(model, "golden.json")).unwrap();
    (Tensors::read(&fixture(model, "golden.safetensors")), serde_json::from_slice(&json).unwrap())
}

#[test]
fn weights_are_the_references_trits() {
    for model in MODELS {
        let (_, json) = golden(model);
        let gguf = gguf(model);
        let mut seen = 0;
        for (name, expected) in json["weights"].as_object().unwrap() {
            let parts: Vec<&str> = name.split('.').collect();
            let (ours, ..) = layer(0).into_iter().find(|(_, hf, ..)| hf.ends_with(parts[4])).unwrap();
            let tensor = gguf.tensor(&format!("blk.{}.{ours}.weight", parts[2])).unwrap();
            let (bytes, n) = (gguf.tensor_bytes(tensor), tensor.n_elements() as usize);
            let mut trits = pack::unpack_i2s(&bytes[..n / 4], n).unwrap();
            let llama = gguf.get_str("general.architecture").unwrap() == Some("llama");
            if llama && ["q_proj", "k_proj"].contains(&parts[4]) {
                // Rows 2i and 2i + 1 of a head in the file are i and i + half of it in the checkpoint.
                let (columns, head_dim) = (tensor.dims[0] as usize, 16);
                let of_head = |head: &[i8]| {
                    let rows = head.chunks(columns);
                    let (even, odd) = (rows.clone().step_by(2), rows.skip(1).step_by(2));
                    even.chain(odd).collect::<Vec<_>>().concat()
                };
                trits = trits.chunks(head_dim * columns).flat_map(of_head).collect();
            }
            let bytes_of_trits: Vec<u8> = trits.iter().map(|&t| t as u8).collect();
            assert_eq!(sha256(&bytes_of_trits), expected["sha256"], "{model} {name}");
            let scale = f32::from_le_bytes(bytes[n / 4..][..4].try_into().unwrap());
            let want = expected["scale"].as_f64().unwrap() as f32;
            // The reference's own order of summation leaves its mean an ulp or two from the exact one.
            assert!((scale / want - 1.0).abs() < 4e-7, "{model} {name}: scale {scale} {want}");
            seen += 1;
        }
        assert!(seen >= 21 && seen % 7 == 0);
    }
}

fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let top = logits.iter().copied().fold(f64::MIN, f64::max);
    let total = top + logits.iter().map(|x| (x - top).exp()).sum::<f64>().ln();
    logits.iter().map(|x| x - total).collect()
}

/// The head in float64 from the same stored values: the embedding, or a head of its own.
fn head(model: &Model, vocab: usize, hidden: usize, compute: &Compute) -> Vec<f64> {
    let mut rows = vec![0.0; vocab * hidden];
    compute.embed(&model.weights().head.matrix, &(0..vocab as u32).collect::<Vec<_>>(), &mut rows).unwrap();
    rows.into_iter().map(f64::from).collect()
}

#[test]
fn logits_agree_within_the_references_own_noise() {
    // A smaller cache is less exact than the reference's noise: here it is only kept from growing worse.
    let types = [(KvType::F32, 2.0, 96), (KvType::F16, 5.0, 94), (KvType::Q8, 12.0, 94)];
    for name in MODELS {
        let (golden, json) = golden(name);
        let gguf = gguf(name);
        let ids = ids(&golden);
        assert!(ids.len() >= 512);
        let mut engines = types.map(|(ty, ..)| engine_with(&gguf, best(), 2, 512, 1, ty));
        let model = engines[0].model();
        let (vocab, hidden) = (model.config().vocab_size, model.config().hidden_size);
        let head = head(model, vocab, hidden, engines[0].compute());
        let ours = engines.each_mut().map(|engine| {
            let sequence = engine.open();
            engine.feed(&[Feed { sequence, tokens: &ids, wanted: Wanted::All(Logits::Every) }]).unwrap()
        });
        let hidden64 = golden.floats("hidden64");
        let (check, positions) = (golden.floats("check.logits64"), golden.ints("check.positions"));
        let mut totals = [(0.0, 0); 3];
        for t in 0..ids.len() {
            let h = &hidden64[t * hidden..][..hidden];
            let reference: Vec<f64> = head
                .chunks(hidden)
                .map(|row| row.iter().zip(h).map(|(w, &h)| w * f64::from(h)).sum())
                .collect();
            if let Some(c) = positions.iter().position(|&p| p as usize == t) {
                for (a, b) in reference.iter().zip(&check[c * vocab..]) {
                    assert!((a - f64::from(*b)).abs() < 1e-5, "the fixture contradicts itself");
                }
            }
            let best = |x: &[f64]| x.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
            let p = log_softmax(&reference);
            for (ours, (total, same)) in ours.iter().zip(&mut totals) {
                let ours: Vec<f64> = ours[t * vocab..][..vocab].iter().copied().map(f64::from).collect();
                *same += usize::from(best(&reference) == best(&ours));
                *total += p.iter().zip(log_softmax(&ours)).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
            }
        }
        for ((ty, limit, least), (total, same)) in types.into_iter().zip(totals) {
            let (kl, floor) = (total / ids.len() as f64, json["floor"].as_f64().unwrap());
            println!(
                "{name} {ty:?}: KL {kl:.3e}, floor {floor:.3e}, ratio {:.2}, top-1 {same}/{}",
                kl / floor,
                ids.len()
            );
            assert!(kl <= limit * floor, "{name} {ty:?}: KL {kl:.3e} is more than {limit} times {floor:.3e}");
            assert!(same * 100 >= ids.len() * least, "{name}: top-1 {same}");
        }
    }
}

/// Counts codes that differ, over all models.
#[derive(Default)]
struct Codes {
    all: usize,
    differ: usize,
}

impl Codes {
    /// Compares all rows; says for each whether its codes are the reference's.
    fn compare(&mut self, what: &str, ours: &QuantizedRows, golden: &Tensors, name: &str) -> Vec<bool> {
        let (codes, scales) =
            (golden.codes(&format!("{name}.codes")), golden.floats(&format!("{name}.scale")));
        let width = codes.len() / scales.len();
        let mut equal = Vec::new();
        for (t, want) in codes.chunks(width).enumerate() {
            let (got, scale) = ours.row(t);
            assert!((scale / scales[t] - 1.0).abs() < 1e-5, "{what} {name}: scale");
            let differ = got.iter().zip(want).filter(|(a, b)| a != b).count();
            assert!(
                got.iter().zip(want).all(|(a, b)| a.abs_diff(*b) <= 1),
                "{what} {name}: off by more than 1"
            );
            self.all += width;
            self.differ += differ;
            equal.push(differ == 0);
        }
        equal
    }
}

/// Every row within 1e-5 of the largest element, where `rows` says that it counts.
fn close(what: &str, ours: &[f32], want: &[f32], rows: &[bool]) {
    assert_eq!(ours.len(), want.len(), "{what}");
    let width = want.len() / rows.len();
    for (t, (a, b)) in ours.chunks(width).zip(want.chunks(width)).enumerate().filter(|(t, _)| rows[*t]) {
        let size = b.iter().fold(1e-20f32, |m, x| m.max(x.abs()));
        for (a, b) in a.iter().zip(b) {
            assert!((a - b).abs() <= 1e-5 * size, "{what}, row {t}: {a} {b} (largest {size})");
        }
    }
}

#[test]
fn every_layer_agrees_on_the_references_own_inputs() {
    let mut codes = Codes::default();
    for name in MODELS {
        let (golden, _) = golden(name);
        let engine = engine(&gguf(name), best(), 2, 512, 1);
        let (model, compute) = (engine.model(), engine.compute());
        let config = model.config();
        let eps = config.rms_norm_eps;
        let positions: Vec<usize> = golden.ints("trace.positions").iter().map(|&p| p as usize).collect();
        let n = positions.len();
        let all = vec![true; n];
        let half = config.rope_dim / 2;
        let (mut cos, mut sin) = (vec![0.0; half], vec![0.0; half]);
        for (i, &p) in golden.ints("rope.positions").iter().enumerate() {
            model.rope_angles(p as usize, &mut cos, &mut sin);
            // The reference's scaled frequencies are within a unit in the last place, and so are its angles.
            let limit = if config.rope_factors.is_empty() { 1e-6 } else { 1e-6 + 1.2e-7 * p as f32 };
            for (ours, want) in [(&cos, "rope.cos"), (&sin, "rope.sin")] {
                for (a, b) in ours.iter().zip(&golden.floats(want)[i * half..]) {
                    assert!((a - b).abs() < limit, "{name}: {want} at {p}: {a} {b}");
                }
            }
        }
        let widest = config.hidden_size.max(config.q_width()).max(config.intermediate_size);
        let work = RefCell::new(Workspace::new(widest, compute.pool().threads()));
        let mut q = QuantizedRows::new(n, widest);
        for l in golden.ints("trace.layers") {
            let layer = &model.weights().layers[l as usize];
            let get = |part: &str| golden.floats(&format!("L{l}.{part}"));
            let part = |part: &str| format!("L{l}.{part}");
            let what = format!("{name} layer {l}");
            let norm = |input: &str, weight: &[f32], output: &str| {
                let (x, want) = (get(input), get(output));
                let mut out = vec![0.0; x.len()];
                compute.rmsnorm(&x, weight, eps, &mut out);
                close(&format!("{what} {output}"), &out, &want, &all);
            };
            let quantize = |input: &str, weight: &[f32], q: &mut QuantizedRows| {
                compute.norm_quantize(&get(input), weight, eps, Layout::Rows, &mut work.borrow_mut(), q);
            };
            let linear =
                |q: &QuantizedRows, equal: &[bool], matrix: &TernaryMatrix, output: &str, rows: &[usize]| {
                    let mut out = vec![0.0; n * matrix.rows()];
                    compute.linear(q, &mut work.borrow_mut(), [(matrix, &mut out)]);
                    let want = get(output);
                    let picked: Vec<f32> = rows
                        .iter()
                        .flat_map(|&r| want[r * matrix.rows()..][..matrix.rows()].to_vec())
                        .collect();
                    close(&format!("{what} {output}"), &out, &picked, equal);
                };
            let rows: Vec<usize> = (0..n).collect();

            norm("x", &layer.attn_norm, "attn_norm");
            quantize("x", &layer.attn_norm, &mut q);
            let equal = codes.compare(&what, &q, &golden, &part("attn_norm"));
            linear(&q, &equal, &layer.attn_q, "q", &rows);
            linear(&q, &equal, &layer.attn_k, "k", &positions);
            linear(&q, &equal, &layer.attn_v, "v", &positions);

            let rotate = |x: &mut [f32], positions: &[usize]| {
                let (mut cos, mut sin) =
                    (vec![0.0; positions.len() * half], vec![0.0; positions.len() * half]);
                for (i, &p) in positions.iter().enumerate() {
                    let range = i * half..(i + 1) * half;
                    model.rope_angles(p, &mut cos[range.clone()], &mut sin[range]);
                }
                compute.rope(x, config.head_dim, &cos, &sin, positions.len());
            };
            let mut rotated = get("q");
            rotate(&mut rotated, &positions);
            close(&format!("{what} q_rope"), &rotated, &get("q_rope"), &all);
            let (mut k, v) = (get("k"), get("v"));
            let seen = golden.rows(&part("k"));
            rotate(&mut k, &(0..seen).collect::<Vec<_>>());
            let kv_width = config.kv_width();
            let k_at: Vec<f32> =
                positions.iter().flat_map(|&p| k[p * kv_width..][..kv_width].to_vec()).collect();
            close(&format!("{what} k_rope"), &k_at, &get("k_rope"), &all);

            let pages: Vec<u32> = (0..seen.div_ceil(PAGE) as u32).rev().collect();
            let shape = config.kv_shape(KvType::F32);
            let mut kv = KvStore::new(shape, pages.len(), n).unwrap();
            compute.store(&mut kv, 0, &k, &v, |t| (&pages, t + 1));
            let mut attended = vec![0.0; n * config.q_width()];
            let sees = |t: usize| (&pages[..], positions[t] + 1);
            compute.attention(&mut kv, 0, &get("q_rope"), None, sees, &mut attended);
            close(&format!("{what} attn"), &attended, &get("attn"), &all);

            let quantized = if let Some(sub_norm) = &layer.attn_sub_norm {
                norm("attn", sub_norm, "attn_sub_norm");
                quantize("attn", sub_norm, &mut q);
                "attn_sub_norm"
            } else {
                let width = config.q_width();
                compute.quantize(&get("attn"), width, Layout::Rows, &mut work.borrow_mut(), &mut q);
                "attn"
            };
            let equal = codes.compare(&what, &q, &golden, &part(quantized));
            linear(&q, &equal, &layer.attn_output, "o", &rows);
            let mut x = get("x");
            compute.add(&mut x, &get("o"));
            close(&format!("{what} x_mid"), &x, &get("x_mid"), &all);

            norm("x_mid", &layer.ffn_norm, "ffn_norm");
            quantize("x_mid", &layer.ffn_norm, &mut q);
            let equal = codes.compare(&what, &q, &golden, &part("ffn_norm"));
            linear(&q, &equal, &layer.ffn_gate, "gate", &rows);
            linear(&q, &equal, &layer.ffn_up, "up", &rows);

            let sub_norm = layer.ffn_sub_norm.as_deref().map(|weight| (weight, eps));
            if let Some((weight, _)) = sub_norm {
                norm("act", weight, "ffn_sub_norm");
            }
            let width = config.intermediate_size;
            compute.activate_quantize(
                config.activation,
                &get("gate"),
                &get("up"),
                width,
                sub_norm,
                layer.ffn_down.layout(),
                &mut work.borrow_mut(),
                &mut q,
            );
            let quantized = if sub_norm.is_some() { "ffn_sub_norm" } else { "act" };
            let equal = codes.compare(&what, &q, &golden, &part(quantized));
            linear(&q, &equal, &layer.ffn_down, "down", &rows);
        }
        let x = golden.floats("final.x");
        let mut normed = vec![0.0; x.len()];
        compute.rmsnorm(&x, &model.weights().output_norm, eps, &mut normed);
        close(&format!("{name} final norm"), &normed, &golden.floats("final.norm"), &all);
        let logits = golden.floats("final.logits");
        let kept = golden.rows("final.logits");
        let mut ours = vec![0.0; logits.len()];
        compute.head(
            &model.weights().head,
            &golden.floats("final.norm")[..kept * config.hidden_size],
            |_| Logits::Every,
            &mut HeadScratch::new(config.vocab_size, config.hidden_size, compute.pool().threads()),
            &mut ours,
        );
        close(&format!("{name} logits"), &ours, &logits, &all[..kept]);
    }
    println!("{} of {} codes differ", codes.differ, codes.all);
    assert!(codes.all > 20_000 && codes.differ * 1000 <= codes.all, "{} of {}", codes.differ, codes.all);
}
