//! Conversion between the types of ternary matrices and heads, and from packed checkpoints.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use bitnet::convert::{ConvertError, HeadType, Options, Report, TernaryType, Trits, convert};
use bitnet::gguf::{Gguf, TensorType, Value, ValueType, Writer};
use bitnet::kernels::half::f32_to_f16;
use bitnet::kernels::ternary::Layout;
use bitnet::kernels::ternary::pack::{pack_i2s, tail, unpack_i2s};
use bitnet::kernels::{Compute, Logits, best};
use bitnet::model::{Model, Strategy};
use bitnet::{EngineOptions, Feed, Wanted};
use common::checkpoint::{Tensors, folder};
use common::{OPTIONS, build};
use serde_json::json;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

fn random(state: &mut u64) -> u32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) as u32
}

/// A model of one layer with rows of 512 and 256 weights, in one matrix all of them zero.
fn model(path: &Path) {
    model_of(path, "bitnet-b1.58", None, 256);
}

/// Of an architecture and a width. With a `factor` the scales are so much smaller, and tensors beside the weights make up for it.
fn model_of(path: &Path, architecture: &str, factor: Option<f32>, hidden: u64) {
    let mut state = 1;
    let mut writer = Writer::new(path);
    writer.meta("general.architecture", Value::Str(architecture)).unwrap();
    writer.meta("general.file_type", Value::U32(40)).unwrap();
    writer.meta("general.name", Value::Str("types")).unwrap();
    writer.meta_array("list", ValueType::U32, [1, 2].map(Value::U32)).unwrap();
    for (key, value) in [
        ("context_length", 64),
        ("embedding_length", hidden as u32),
        ("block_count", 1),
        ("feed_forward_length", 2 * hidden as u32),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
    ] {
        writer.meta(&format!("{architecture}.{key}"), Value::U32(value)).unwrap();
    }
    writer.meta(&format!("{architecture}.attention.layer_norm_rms_epsilon"), Value::F32(1e-5)).unwrap();
    let ternary = [
        ("attn_q", hidden, hidden),
        ("attn_k", hidden, hidden / 2),
        ("attn_v", hidden, hidden / 2),
        ("attn_output", hidden, hidden),
        ("ffn_gate", hidden, 2 * hidden),
        ("ffn_up", hidden, 2 * hidden),
        ("ffn_down", 2 * hidden, hidden),
    ];
    let mut norms = vec![
        ("attn_norm", hidden),
        ("attn_sub_norm", hidden),
        ("ffn_norm", hidden),
        ("ffn_sub_norm", 2 * hidden),
    ];
    norms.retain(|(norm, _)| architecture != "llama" || !norm.contains("sub"));
    let name = |part: &str| format!("blk.0.{part}.weight");
    writer.tensor("token_embd.weight", &[hidden, 40], TensorType::F16).unwrap();
    for (part, columns, rows) in ternary {
        writer.tensor(&name(part), &[columns, rows], TensorType::I2S).unwrap();
    }
    for (part, ..) in ternary.iter().filter(|_| factor.is_some()) {
        writer.tensor(&format!("blk.0.{part}.scale"), &[1], TensorType::F32).unwrap();
    }
    for &(part, width) in &norms {
        writer.tensor(&name(part), &[width], TensorType::F32).unwrap();
    }
    writer.tensor("output_norm.weight", &[hidden], TensorType::F32).unwrap();
    let mut data = writer.create().unwrap();
    let head = (0..hidden * 40)
        .flat_map(|_| f32_to_f16((random(&mut state) % 2001) as f32 / 1000.0 - 1.0).to_le_bytes());
    data.tensor("token_embd.weight", &head.collect::<Vec<u8>>()).unwrap();
    for (i, (part, columns, rows)) in ternary.into_iter().enumerate() {
        let zero = part == "attn_k";
        // Without a weight a scale means nothing, and not every type keeps it.
        let scale = if zero { 1.0 } else { 0.1 + i as f32 / 3.0 };
        // A row of zeros is in every matrix.
        let trit = |k| if zero || k < columns { 0 } else { (random(&mut state) % 3) as i8 - 1 };
        let trits: Vec<i8> = (0..columns * rows).map(trit).collect();
        data.tensor(
            &name(part),
            &[pack_i2s(&trits).unwrap(), tail(scale / factor.unwrap_or(1.0)).to_vec()].concat(),
        )
        .unwrap();
    }
    for (part, ..) in ternary.iter().filter(|_| factor.is_some()) {
        data.tensor(&format!("blk.0.{part}.scale"), &factor.unwrap().to_le_bytes()).unwrap();
    }
    let ones = |n: u64| (0..n).flat_map(|_| 1f32.to_le_bytes()).collect::<Vec<u8>>();
    for (part, width) in norms {
        data.tensor(&name(part), &ones(width)).unwrap();
    }
    data.tensor("output_norm.weight", &ones(hidden)).unwrap();
    data.finish().unwrap();
}

fn to(from: &Path, path: &Path, ternary: TernaryType, head: HeadType) -> Result<Report, ConvertError> {
    let (mut last, mut total) = (0, 0);
    let report = convert(from, path, Options { ternary, head }, &mut |progress| {
        assert!(progress.done > last && progress.done <= progress.total, "{progress:?}");
        (last, total) = (progress.done, progress.total);
        ControlFlow::Continue(())
    })?;
    assert_eq!(last, total);
    Ok(report)
}

#[test]
fn every_type_holds_the_same_weights_and_leads_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
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
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    model(&path("in.gguf"));
    to(&path("in.gguf"), &path("tq2.gguf"), TernaryType::TQ2_0, HeadType::Auto).unwrap();
    // The scale of every block of the first tensor becomes 2.
    let gguf = Gguf::open(&path("tq2.gguf")).unwrap();
    let tensor = gguf.tensor("blk.0.ffn_up.weight").unwrap();
    let (start, end) = (tensor.offset as usize, (tensor.offset + tensor.byte_len) as usize);
    drop(gguf);
    let mut bytes = fs::read(path("tq2.gguf")).unwrap();
    for block in bytes[start..end].chunks_exact_mut(66) {
        block[64..].copy_from_slice(&f32_to_f16(2.0).to_le_bytes());
    }
    fs::write(path("tq2.gguf"), &bytes).unwrap();
    to(&path("tq2.gguf"), &path("back.gguf"), TernaryType::I2_S, HeadType::Auto).unwrap();
    let scale = |name: &str| {
        let gguf = Gguf::open(&path("back.gguf")).unwrap();
        let tensor = gguf.tensor(name).unwrap();
        let tail = &gguf.tensor_bytes(tensor)[tensor.n_elements() as usize / 4..];
        f32::from_le_bytes(tail[..4].try_into().unwrap())
    };
    assert_eq!((scale("blk.0.ffn_up.weight"), scale("blk.0.attn_q.weight")), (2.0, 0.1));

    // Blocks of different scales are no BitNet's.
    bytes[end - 2..end].copy_from_slice(&f32_to_f16(3.0).to_le_bytes());
    fs::write(path("tq2.gguf"), &bytes).unwrap();
    let error =
        to(&path("tq2.gguf"), &path("no.gguf"), TernaryType::I2_S, HeadType::Auto).unwrap_err().to_string();
    assert!(
        error.contains("blk.0.ffn_up.weight") && error.contains("row 5") && error.contains("scale"),
        "{error}"
    );
    assert!(!path("no.gguf").exists());
}

#[test]
fn heads_come_in_every_type() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
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
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let one = |ty, dims: &[u64], bytes: &[u8]| {
        let mut writer = Writer::new(&path("one.gguf"));
        writer.tensor("x", dims, ty).unwrap();
        let mut data = writer.create().unwrap();
        data.tensor("x", bytes).unwrap();
        data.finish().unwrap();
    };
    let refusal = |ternary| {
        let error = to(&path("one.gguf"), &path("no.gguf"), ternary, HeadType::Auto).unwrap_err().to_string();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "something was left behind");
        error
    };
    one(TensorType::F32, &[4], &[0; 16]);
    assert!(refusal(TernaryType::I2_S).contains("none is ternary"));
    one(TensorType::I2S, &[64, 2], &[&[0x55; 32][..], &tail(1.0)].concat());
    assert!(refusal(TernaryType::TQ1_0).contains("do not fill the blocks of 256 of TQ1_0"));
    one(TensorType::I2S, &[128], &[&[0xff; 32][..], &tail(1.0)].concat());
    assert!(refusal(TernaryType::IQ2_BN).contains("weight 0 has code 3"));
    one(TensorType::IQ1BN, &[64], &[&[0x00, 0x3c][..], &[255; 13]].concat());
    assert!(!refusal(TernaryType::I2_S).is_empty());
    let tiny = [&[0u8; 32][..], &1e-20f32.to_le_bytes(), &[0; 28]].concat();
    one(TensorType::I2S, &[128], &tiny);
    assert!(refusal(TernaryType::IQ1_BN).contains("cannot be stored"));
}

#[test]
fn damaged_files_do_not_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
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
    const HIDDEN: usize = 128;
    for (class, scale, expected) in [
        (Some("autobitlinear"), 0.75f32, 0.75f32),
        (Some("bitlinear"), 2.5, 1.0 / 2.5),
        (None, 2.5, 1.0 / 2.5),
    ] {
        let mut state = 3;
        let mut config = json!({
            "model_type": "bitnet", "hidden_act": "relu2", "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8,
            "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
            "quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": null},
        });
        if let Some(class) = class {
            config["quantization_config"]["linear_class"] = class.into();
            config["quantization_config"]["quantization_mode"] = "offline".into();
        }
        let mut tensors = Tensors::new();
        let mut add = |name: String, dtype: &'static str, shape: &[usize], values: Vec<f32>| {
            let shape = shape.iter().map(|&dim| dim as u64).collect();
            tensors.insert(name, (dtype, shape, values));
        };
        let mut trits_by_name = Vec::new();
        add("model.embed_tokens.weight".into(), "BF16", &[8, HIDDEN], vec![0.0; 8 * HIDDEN]);
        add("model.norm.weight".into(), "F32", &[HIDDEN], vec![0.0; HIDDEN]);
        for (name, width) in [
            ("input_layernorm", HIDDEN),
            ("post_attention_layernorm", HIDDEN),
            ("self_attn.attn_sub_norm", HIDDEN),
            ("mlp.ffn_sub_norm", 2 * HIDDEN),
        ] {
            add(format!("model.layers.0.{name}.weight"), "F32", &[width], vec![0.0; width]);
        }
        for (hf, ours, rows, columns) in [
            ("self_attn.q_proj", "attn_q", HIDDEN, HIDDEN),
            ("self_attn.k_proj", "attn_k", HIDDEN / 2, HIDDEN),
            ("self_attn.v_proj", "attn_v", HIDDEN / 2, HIDDEN),
            ("self_attn.o_proj", "attn_output", HIDDEN, HIDDEN),
            ("mlp.gate_proj", "ffn_gate", 2 * HIDDEN, HIDDEN),
            ("mlp.up_proj", "ffn_up", 2 * HIDDEN, HIDDEN),
            ("mlp.down_proj", "ffn_down", HIDDEN, 2 * HIDDEN),
        ] {
            let trits: Vec<i8> = (0..rows * columns).map(|_| (random(&mut state) % 3) as i8 - 1).collect();
            let quarter = rows / 4 * columns;
            let byte = |k| (0..4).fold(0, |byte, i| byte | ((trits[i * quarter + k] + 1) as u8) << (2 * i));
            let packed = (0..quarter).map(|k| f32::from(byte(k))).collect();
            add(format!("model.layers.0.{hf}.weight"), "U8", &[rows / 4, columns], packed);
            add(format!("model.layers.0.{hf}.weight_scale"), "BF16", &[1], vec![scale]);
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
    let feed =
        Feed { sequence: engine.open(), tokens: &[1, 5, 9, 33, 7], wanted: Wanted::All(Logits::Every) };
    engine.feed(&[feed]).unwrap().iter().map(|x| x.to_bits()).collect()
}

#[test]
fn a_model_gives_the_same_bits_in_every_type() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
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
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo.gguf");
    for ternary in TernaryType::ALL {
        to(&demo, &path("out.gguf"), ternary, HeadType::Auto).unwrap();
        assert!(logits(&path("out.gguf")) == logits(&demo), "{ternary:?}");
    }
    // Rows in another order on the way to memory.
    model_of(&path("llama.gguf"), "llama", None, 256);
    let llama = logits(&path("llama.gguf"));
    for ternary in TernaryType::ALL {
        to(&path("llama.gguf"), &path("out.gguf"), ternary, HeadType::Auto).unwrap();
        assert!(logits(&path("out.gguf")) == llama, "{ternary:?}");
    }
}

#[test]
fn rows_in_base_3_give_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let base3 = [true, false].map(|sparse| Strategy { sparse, rows: Layout::Base3 });
    // A block and a chunk; the second architecture has its rows in another order.
    for architecture in ["bitnet-b1.58", "llama"] {
        model_of(&path("in.gguf"), architecture, None, 1536);
        to(&path("in.gguf"), &path("tq1_0.gguf"), TernaryType::TQ1_0, HeadType::Auto).unwrap();
        let expected = logits(&path("in.gguf"));
        for (file, strategy) in ["in.gguf", "tq1_0.gguf"].into_iter().flat_map(|f| base3.map(|s| (f, s))) {
            assert!(logits_as(&path(file), strategy) == expected, "{architecture} {file} {strategy:?}");
        }
    }
    let gguf = Gguf::open(&path("in.gguf")).unwrap();
    let at = gguf.tensor("blk.0.ffn_up.weight").unwrap().offset as usize + 2000;
    drop(gguf);
    let mut bytes = fs::read(path("in.gguf")).unwrap();
    bytes[at] = 0x1b;
    let gguf = Arc::new(Gguf::from_vec("damaged", bytes).unwrap());
    let error = Model::load(&gguf, &Compute::new(best(), 2), base3[0]).err().unwrap().to_string();
    assert!(error.contains("ffn_up.weight") && error.contains("code 3 near stored byte 2000"), "{error}");
}

#[test]
fn a_scale_beside_the_weights_is_multiplied() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    model_of(&path("plain.gguf"), "bitnet", None, 256);
    model_of(&path("scaled.gguf"), "bitnet", Some(0.25), 256);
    assert!(logits(&path("scaled.gguf")) == logits(&path("plain.gguf")));
    to(&path("scaled.gguf"), &path("out.gguf"), TernaryType::IQ1_BN, HeadType::Auto).unwrap();
    assert!(logits(&path("out.gguf")) == logits(&path("plain.gguf")));
}

#[test]
fn floats_that_are_no_ternary_weights_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    model(&path("in.gguf"));
    to(&path("in.gguf"), &path("f16.gguf"), TernaryType::F16, HeadType::Auto).unwrap();
    let gguf = Gguf::open(&path("f16.gguf")).unwrap();
    let start = gguf.tensor("blk.0.ffn_up.weight").unwrap().offset as usize;
    drop(gguf);
    let mut bytes = fs::read(path("f16.gguf")).unwrap();
    let at = (start + 2 * 256..).step_by(2).find(|&at| bytes[at] != 0).unwrap();
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
