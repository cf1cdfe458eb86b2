//! Conversion between the types of ternary matrices and heads, and from packed checkpoints.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use bitnet::EngineOptions;
use bitnet::convert::{HeadType, Options, TernaryType, Trits, convert};
use bitnet::gguf::{Gguf, TensorInfo, TensorType, Writer};
use bitnet::kernels::half::f32_to_f16;
use bitnet::kernels::ternary::Layout;
use bitnet::kernels::ternary::pack::{tail, unpack_i2s};
use bitnet::kernels::{Compute, best};
use bitnet::model::{Model, Strategy};
use common::checkpoint::{config, folder, layer, tensors, to};
use common::{OPTIONS, build, demo, feed, random, rewritten};
use serde_json::json;
use std::fs;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A model of one layer with rows of 512 and 256 weights, in one matrix all of them zero.
fn model(path: &Path) {
    model_of(path, 256, false);
}

/// Of a width, with or without the names and the order of rows of `llama`. A row of zeros is in every matrix.
fn model_of(path: &Path, hidden: u64, llama: bool) {
    let (mut config, mut tensors) = (config(hidden, 1, 40), tensors(hidden, 1, 40));
    for (name, (_, shape, values)) in tensors.iter_mut().filter(|(name, _)| name.contains("_proj")) {
        let zeros = if name.contains("k_proj") { values.len() } else { shape[1] as usize };
        values[..zeros].fill(0.0);
    }
    // More digits than bfloat16 has.
    let (dtype, _, values) = tensors.get_mut("model.embed_tokens.weight").unwrap();
    *dtype = "F16";
    values.iter_mut().for_each(|x| *x *= 15.9);
    if llama {
        (config["model_type"], config["hidden_act"]) = ("llama".into(), "silu".into());
        tensors.retain(|name, _| !name.contains("sub_norm"));
    }
    to(folder(&config, &tensors).path(), path, TernaryType::I2_S, HeadType::Auto).unwrap();
    // Without a weight a scale means nothing, and not every type keeps it.
    let edit = |t: &TensorInfo, bytes: &mut Vec<u8>| {
        if t.name.contains("attn_k") {
            set_scale(bytes, 1.0);
        }
    };
    fs::write(path, rewritten(&Gguf::open(path).unwrap(), edit, &[])).unwrap();
}

fn set_scale(bytes: &mut [u8], scale: f32) {
    let at = bytes.len() - 32;
    bytes[at..at + 4].copy_from_slice(&scale.to_le_bytes());
}

/// Where a file has a tensor.
fn place(path: &Path, name: &str) -> Range<usize> {
    let range = Gguf::open(path).unwrap().tensor(name).unwrap().range();
    range.start as usize..range.end as usize
}

/// Names of files in a folder of their own.
fn files() -> impl Fn(&str) -> PathBuf {
    let folder = tempfile::tempdir().unwrap();
    move |name| folder.path().join(name)
}

/// The scale of a tensor in I2_S.
fn scale(gguf: &Gguf, name: &str) -> f32 {
    let tensor = gguf.tensor(name).unwrap();
    let tail = &gguf.tensor_bytes(tensor)[tensor.n_elements() as usize / 4..];
    f32::from_le_bytes(tail[..4].try_into().unwrap())
}

#[test]
fn every_type_holds_the_same_weights_and_leads_back() {
    let path = files();
    model(&path("in.gguf"));
    let original = fs::read(path("in.gguf")).unwrap();
    let trits = Trits::read(&Gguf::open(&path("in.gguf")).unwrap()).unwrap().hash;
    for first in TernaryType::ALL {
        let report = to(&path("in.gguf"), &path("first.gguf"), first, HeadType::Auto).unwrap();
        assert_eq!(report.trits, trits);
        assert_eq!(report.ternary_weights, 256 * (2 * 256 + 2 * 128 + 3 * 512));
        let gguf = Gguf::open(&path("first.gguf")).unwrap();
        assert_eq!(Trits::read(&gguf).unwrap().hash, trits);
        assert_eq!(gguf.tensor("blk.0.ffn_up.weight").unwrap().ty, first.tensor_type());
        assert_eq!(gguf.tensor("token_embd.weight").unwrap().ty, TensorType::F16);
        drop(gguf);
        for second in TernaryType::ALL {
            let report = to(&path("first.gguf"), &path("second.gguf"), second, HeadType::Auto).unwrap();
            assert_eq!(report.trits, trits, "{first:?} {second:?}");
            to(&path("second.gguf"), &path("back.gguf"), TernaryType::I2_S, HeadType::Auto).unwrap();
            // Weights and scales to the last bit, whatever lay between.
            assert!(fs::read(path("back.gguf")).unwrap() == original, "{first:?} {second:?}");
        }
    }
}

#[test]
fn a_scale_that_another_program_changed_counts() {
    let path = files();
    model(&path("in.gguf"));
    to(&path("in.gguf"), &path("tq2.gguf"), TernaryType::TQ2_0, HeadType::Auto).unwrap();
    // The scale of every block of the first tensor becomes 2.
    let Range { start, end } = place(&path("tq2.gguf"), "blk.0.ffn_up.weight");
    let mut bytes = fs::read(path("tq2.gguf")).unwrap();
    for block in bytes[start..end].chunks_exact_mut(66) {
        block[64..].copy_from_slice(&f32_to_f16(2.0).to_le_bytes());
    }
    fs::write(path("tq2.gguf"), &bytes).unwrap();
    to(&path("tq2.gguf"), &path("back.gguf"), TernaryType::I2_S, HeadType::Auto).unwrap();
    let (before, after) = (Gguf::open(&path("in.gguf")).unwrap(), Gguf::open(&path("back.gguf")).unwrap());
    assert_eq!(scale(&after, "blk.0.ffn_up.weight"), 2.0);
    assert_eq!(scale(&after, "blk.0.attn_q.weight"), scale(&before, "blk.0.attn_q.weight"));

    // Blocks of different scales are no BitNet's.
    bytes[end - 2..end].copy_from_slice(&f32_to_f16(3.0).to_le_bytes());
    fs::write(path("tq2.gguf"), &bytes).unwrap();
    let error =
        to(&path("tq2.gguf"), &path("no.gguf"), TernaryType::I2_S, HeadType::Auto).unwrap_err().to_string();
    assert!(error.contains("blk.0.ffn_up.weight") && error.contains("row 511: its scale"), "{error}");
    assert!(!path("no.gguf").exists());
}

#[test]
fn heads_come_in_every_type() {
    let path = files();
    model(&path("in.gguf"));
    let values = |name: &str| {
        to(&path(name), &path("f32.gguf"), TernaryType::I2_S, HeadType::F32).unwrap();
        let gguf = Gguf::open(&path("f32.gguf")).unwrap();
        let bytes = gguf.tensor_bytes(gguf.tensor("token_embd.weight").unwrap()).to_vec();
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>()
    };
    let exact = values("in.gguf");
    for (head, ty, bound) in [
        (HeadType::F16, TensorType::F16, 0.0),
        (HeadType::F32, TensorType::F32, 0.0),
        (HeadType::Bf16, TensorType::BF16, 0.004),
        (HeadType::Q8_0, TensorType::Q8_0, 0.005),
        (HeadType::Q6_K, TensorType::Q6_K, 0.04),
    ] {
        let report = to(&path("in.gguf"), &path("out.gguf"), TernaryType::I2_S, head).unwrap();
        assert_eq!(report.embedding, ty);
        let worst = values("out.gguf").iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= bound, "{head:?} {worst}");
        // Types change in one step or in two.
        to(&path("out.gguf"), &path("again.gguf"), TernaryType::TQ1_0, HeadType::Auto).unwrap();
        assert_eq!(Gguf::open(&path("again.gguf")).unwrap().tensor("token_embd.weight").unwrap().ty, ty);
    }
}

#[test]
fn files_that_cannot_be_converted_are_refused() {
    let path = files();
    let one = |ty, dims: &[u64], bytes: &[u8]| {
        let mut writer = Writer::new(&path("one.gguf"));
        writer.tensor("x", dims, ty).unwrap();
        let mut data = writer.create().unwrap();
        data.tensor("x", bytes).unwrap();
        data.finish().unwrap();
    };
    let refusal = |ternary| {
        let error = to(&path("one.gguf"), &path("no.gguf"), ternary, HeadType::Auto).unwrap_err().to_string();
        assert_eq!(fs::read_dir(path("")).unwrap().count(), 1, "something was left behind");
        error
    };
    one(TensorType::F32, &[4], &[0; 16]);
    assert!(refusal(TernaryType::I2_S).contains("none is ternary"));
    one(TensorType::I2S, &[64, 2], &[&[0x55; 32][..], &tail(1.0)].concat());
    assert!(refusal(TernaryType::TQ1_0).contains("do not fill the blocks of 256 of TQ1_0"));
    one(TensorType::I2S, &[128], &[&[0xff; 32][..], &tail(1.0)].concat());
    assert!(refusal(TernaryType::IQ2_BN).contains("weight 0 has code 3"));
    one(TensorType::IQ1BN, &[128], &[&[0x00, 0x3c][..], &[1; 26]].concat());
    assert!(refusal(TernaryType::I2_S).contains("is in a byte that no weights lead to"));
    let tiny = [&[0u8; 32][..], &1e-20f32.to_le_bytes(), &[0; 28]].concat();
    one(TensorType::I2S, &[128], &tiny);
    assert!(refusal(TernaryType::IQ1_BN).contains("cannot be stored"));
}

#[test]
fn damaged_files_do_not_panic() {
    let path = files();
    model(&path("in.gguf"));
    let mut state = 5;
    for ternary in TernaryType::ALL {
        to(&path("in.gguf"), &path("good.gguf"), ternary, HeadType::Q6_K).unwrap();
        let good = fs::read(path("good.gguf")).unwrap();
        for _ in 0..60 {
            let mut bytes = good.clone();
            for _ in 0..1 + random(&mut state) % 3 {
                let at = random(&mut state) as usize % bytes.len();
                bytes[at] = random(&mut state) as u8;
            }
            fs::write(path("bad.gguf"), bytes).unwrap();
            let _ = convert(
                &path("bad.gguf"),
                &path("out.gguf"),
                Options { ternary: TernaryType::I2_S, head: HeadType::F16 },
                &mut |_| ControlFlow::Continue(()),
            );
        }
    }
}

#[test]
fn packed_checkpoints_keep_their_weights_and_scales() {
    const HIDDEN: u64 = 128;
    for (class, scale, expected) in [
        (Some("autobitlinear"), 0.75f32, 0.75f32),
        (Some("bitlinear"), 2.5, 1.0 / 2.5),
        (None, 2.5, 1.0 / 2.5),
    ] {
        let (mut config, mut tensors) = (config(HIDDEN, 1, 8), tensors(HIDDEN, 1, 8));
        config["quantization_config"] = json!({"quant_method": "bitnet", "modules_to_not_convert": null});
        if let Some(class) = class {
            config["quantization_config"]["linear_class"] = class.into();
            config["quantization_config"]["quantization_mode"] = "offline".into();
        }
        let (mut state, mut trits_by_name) = (3, Vec::new());
        for (ours, hf, shape, _) in layer(HIDDEN) {
            let [rows, columns] = shape[..] else { continue };
            let [quarter, all] = [rows / 4 * columns, rows * columns].map(|n| n as usize);
            let trits: Vec<i8> = (0..all).map(|_| (random(&mut state) % 3) as i8 - 1).collect();
            let byte = |k| (0..4).fold(0, |byte, i| byte | ((trits[i * quarter + k] + 1) as u8) << (2 * i));
            let packed = (0..quarter).map(|k| f32::from(byte(k))).collect();
            let name = format!("model.layers.0.{hf}.weight");
            tensors.insert(format!("{name}_scale"), ("BF16", vec![1], vec![scale]));
            tensors.insert(name, ("U8", vec![rows / 4, columns], packed));
            trits_by_name.push((format!("blk.0.{ours}.weight"), trits));
        }
        let dir = folder(&config, &tensors);
        let out = dir.path().join("out.gguf");
        let report = to(dir.path(), &out, TernaryType::I2_S, HeadType::Auto).unwrap();
        let gguf = Gguf::open(&out).unwrap();
        assert_eq!(Trits::read(&gguf).unwrap().hash, report.trits);
        for (name, trits) in trits_by_name {
            let (codes, tail) = gguf.tensor_bytes(gguf.tensor(&name).unwrap()).split_at(trits.len() / 4);
            assert_eq!(unpack_i2s(codes, trits.len()).unwrap(), trits, "{name}");
            assert_eq!(f32::from_le_bytes(tail[..4].try_into().unwrap()), expected);
        }
    }
}

/// The logits of a few tokens.
fn logits(path: &Path) -> Vec<u32> {
    logits_as(path, Strategy::default())
}

fn logits_as(path: &Path, strategy: Strategy) -> Vec<u32> {
    let options = EngineOptions { context: 64, max_rows: 64, ..OPTIONS };
    let mut engine = build(&Arc::new(Gguf::open(path).unwrap()), strategy, best(), 2, options);
    let sequence = engine.open();
    feed(&mut engine, sequence, &[1, 5, 9, 33, 7])
}

#[test]
fn a_model_gives_the_same_bits_in_every_type() {
    let path = files();
    model(&path("in.gguf"));
    let expected = logits(&path("in.gguf"));
    for ternary in TernaryType::ALL {
        to(&path("in.gguf"), &path("out.gguf"), ternary, HeadType::Auto).unwrap();
        assert!(logits(&path("out.gguf")) == expected, "{ternary:?}");
    }
    for head in [HeadType::Q8_0, HeadType::Q6_K] {
        to(&path("in.gguf"), &path("out.gguf"), TernaryType::I2_S, head).unwrap();
        // In memory such a head is F16: the same as if the file had been made so.
        to(&path("out.gguf"), &path("f16.gguf"), TernaryType::TQ1_0, HeadType::F16).unwrap();
        assert!(logits(&path("out.gguf")) == logits(&path("f16.gguf")), "{head:?}");
        assert!(logits(&path("out.gguf")) != expected, "{head:?}");
    }
    // Rows in another order on the way to memory.
    model_of(&path("llama.gguf"), 256, true);
    for other in [demo(), path("llama.gguf")] {
        let expected = logits(&other);
        for ternary in TernaryType::ALL {
            to(&other, &path("out.gguf"), ternary, HeadType::Auto).unwrap();
            assert!(logits(&path("out.gguf")) == expected, "{} {ternary:?}", other.display());
        }
    }
}

#[test]
fn rows_in_base_3_give_the_same_bits() {
    let path = files();
    let base3 = [true, false].map(|sparse| Strategy { sparse, rows: Layout::Base3 });
    // A block and a chunk; the second architecture has its rows in another order.
    for llama in [false, true] {
        model_of(&path("in.gguf"), 1536, llama);
        to(&path("in.gguf"), &path("tq1_0.gguf"), TernaryType::TQ1_0, HeadType::Auto).unwrap();
        let expected = logits(&path("in.gguf"));
        for (file, strategy) in ["in.gguf", "tq1_0.gguf"].into_iter().flat_map(|f| base3.map(|s| (f, s))) {
            assert!(logits_as(&path(file), strategy) == expected, "llama: {llama}, {file} {strategy:?}");
        }
    }
    let mut bytes = fs::read(path("in.gguf")).unwrap();
    bytes[place(&path("in.gguf"), "blk.0.ffn_up.weight").start + 2000] = 0x1b;
    let gguf = Arc::new(Gguf::from_vec("damaged", bytes).unwrap());
    let error = Model::load(&gguf, &Compute::new(best(), 2), base3[0]).err().unwrap().to_string();
    assert!(error.contains("ffn_up.weight") && error.contains("code 3 near stored byte 2000"), "{error}");
}

#[test]
fn a_scale_beside_the_weights_is_multiplied() {
    let path = files();
    model(&path("plain.gguf"));
    let quarter = 0.25f32.to_le_bytes();
    let matrices = layer(256).into_iter().filter(|(_, _, shape, _)| shape.len() == 2);
    let scales =
        matrices.map(|(name, ..)| (format!("blk.0.{name}.scale"), TensorType::F32, &[1][..], &quarter[..]));
    let plain = Gguf::open(&path("plain.gguf")).unwrap();
    let edit = |t: &TensorInfo, bytes: &mut Vec<u8>| {
        if t.ty == TensorType::I2S {
            set_scale(bytes, scale(&plain, &t.name) * 4.0);
        }
    };
    fs::write(path("scaled.gguf"), rewritten(&plain, edit, &scales.collect::<Vec<_>>())).unwrap();
    assert!(logits(&path("scaled.gguf")) == logits(&path("plain.gguf")));
    to(&path("scaled.gguf"), &path("out.gguf"), TernaryType::IQ1_BN, HeadType::Auto).unwrap();
    assert!(logits(&path("out.gguf")) == logits(&path("plain.gguf")));
}

#[test]
fn floats_that_are_no_ternary_weights_are_refused() {
    let path = files();
    model(&path("in.gguf"));
    to(&path("in.gguf"), &path("f16.gguf"), TernaryType::F16, HeadType::Auto).unwrap();
    let Range { start, .. } = place(&path("f16.gguf"), "blk.0.ffn_up.weight");
    let mut bytes = fs::read(path("f16.gguf")).unwrap();
    let at = (start + 2 * 256..).step_by(2).find(|&at| bytes[at..at + 2] != [0, 0]).unwrap();
    bytes[at] ^= 1;
    fs::write(path("f16.gguf"), bytes).unwrap();
    let compute = Compute::new(best(), 1);
    let gguf = Arc::new(Gguf::open(&path("f16.gguf")).unwrap());
    let error = Model::load(&gguf, &compute, Strategy::default()).err().unwrap().to_string();
    assert!(error.contains("ffn_up.weight") && error.contains("this is no"), "{error}");
    let error =
        to(&path("f16.gguf"), &path("out.gguf"), TernaryType::I2_S, HeadType::Auto).unwrap_err().to_string();
    assert!(error.contains("ffn_up.weight") && error.contains("this is no"), "{error}");
}
