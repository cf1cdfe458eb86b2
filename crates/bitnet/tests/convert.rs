//! Conversion of checkpoints that the tests write themselves.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::ops::ControlFlow;
use std::path::Path;

use bitnet::convert::{
    ConvertError, HeadType, Options, Progress, Report, TernaryType, convert as convert_to,
};
use bitnet::gguf::{Gguf, TensorType};
use bitnet::kernels::half::{bf16_to_f32, f32_to_bf16, f32_to_f16};
use bitnet::kernels::ternary::pack::unpack_i2s;
use bitnet::model::{ModelInfo, Strategy};
use bitnet::text::{HfVocab, Specials, Tokenizer};
use common::checkpoint::{self, Tensors, folder, layer, safetensors, to};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

const HIDDEN: u64 = 32;
const FF: u64 = 64;
const VOCAB: u64 = 20;

fn config() -> Value {
    checkpoint::config(HIDDEN, 2, VOCAB)
}

fn tensors() -> Tensors {
    checkpoint::tensors(HIDDEN, 2, VOCAB)
}

fn convert(dir: &TempDir, head: HeadType) -> Result<(Report, Gguf), ConvertError> {
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("out.gguf");
    match to(dir.path(), &path, TernaryType::I2_S, head) {
        Ok(report) => Ok((report, Gguf::from_vec("out.gguf", std::fs::read(path).unwrap()).unwrap())),
        Err(error) => {
            assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0, "something was left behind");
            Err(error)
        }
    }
}

/// The message with which a checkpoint is refused.
fn refusal(dir: &TempDir) -> String {
    convert(dir, HeadType::Auto).expect_err("a refusal").to_string()
}

fn floats(gguf: &Gguf, name: &str) -> Vec<f32> {
    let tensor = gguf.tensor(name).unwrap();
    assert_eq!(tensor.ty, TensorType::F32);
    gguf.tensor_bytes(tensor).as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Every tensor of the file against the definition.
fn check(gguf: &Gguf, tensors: &Tensors) {
    for i in 0..2 {
        for (ours, theirs, ..) in layer(HIDDEN) {
            let name = format!("blk.{i}.{ours}.weight");
            let (_, shape, values) = &tensors[&format!("model.layers.{i}.{theirs}.weight")];
            if shape.len() == 1 {
                assert_eq!(&floats(gguf, &name), values);
                continue;
            }
            let tensor = gguf.tensor(&name).unwrap();
            assert_eq!(tensor.ty, TensorType::I2S);
            assert_eq!(tensor.dims, [shape[1], shape[0]]);
            let (codes, tail) = gguf.tensor_bytes(tensor).split_at(values.len() / 4);
            let mean = (values.iter().map(|w| f64::from(w.abs())).sum::<f64>() / values.len() as f64) as f32;
            let scale = 1.0 / mean.max(1e-5);
            let trits: Vec<i8> =
                values.iter().map(|w| (w * scale).round_ties_even().clamp(-1.0, 1.0) as i8).collect();
            assert_eq!(unpack_i2s(codes, values.len()).unwrap(), trits);
            assert_eq!(tail[..4], (1.0 / scale).to_le_bytes());
            assert_eq!(tail[4..], [0; 28]);
        }
    }
    assert_eq!(floats(gguf, "output_norm.weight"), tensors["model.norm.weight"].2);
}

#[test]
fn a_checkpoint_becomes_a_file() {
    let tensors = tensors();
    let dir = folder(&config(), &tensors);
    let (report, gguf) = convert(&dir, HeadType::Auto).unwrap();
    check(&gguf, &tensors);
    let embedding = gguf.tensor("token_embd.weight").unwrap();
    assert_eq!((embedding.ty, &embedding.dims[..]), (TensorType::F16, &[HIDDEN, VOCAB][..]));
    let halves: Vec<u8> =
        tensors["model.embed_tokens.weight"].2.iter().flat_map(|&x| f32_to_f16(x).to_le_bytes()).collect();
    assert_eq!(gguf.tensor_bytes(embedding), halves);

    assert_eq!(report.architecture, "bitnet-b1.58");
    assert_eq!(report.tensors, gguf.tensors().len());
    assert_eq!(report.tensors, 2 * 11 + 2);
    assert_eq!(report.ternary_weights, 2 * (3 * HIDDEN * HIDDEN + 3 * FF * HIDDEN));
    assert!(report.zero_weights > 0 && report.zero_weights < report.ternary_weights);
    assert_eq!(report.notices, ["no tokenizer: the file will have no vocabulary"]);

    for (key, value) in [
        ("bitnet-b1.58.vocab_size", VOCAB),
        ("bitnet-b1.58.context_length", 128),
        ("bitnet-b1.58.embedding_length", HIDDEN),
        ("bitnet-b1.58.block_count", 2),
        ("bitnet-b1.58.feed_forward_length", FF),
        ("bitnet-b1.58.attention.head_count", 4),
        ("bitnet-b1.58.attention.head_count_kv", 2),
        ("bitnet-b1.58.rope.dimension_count", 8),
        ("general.file_type", 40),
        ("general.quantization_version", 2),
        ("tokenizer.ggml.bos_token_id", 1),
        ("tokenizer.ggml.eos_token_id", 2),
    ] {
        assert_eq!(gguf.get_u64(key).unwrap(), Some(value), "{key}");
    }
    assert_eq!(gguf.get_f32("bitnet-b1.58.rope.freq_base").unwrap(), Some(10_000.0));
    assert_eq!(gguf.get_f32("bitnet-b1.58.attention.layer_norm_rms_epsilon").unwrap(), Some(1e-5));
    assert_eq!(gguf.get_str("bitnet-b1.58.hidden_act").unwrap(), Some("relu2"));
    assert!(gguf.get("bitnet-b1.58.attention.key_length").is_none());
    assert!(gguf.get("tokenizer.ggml.tokens").is_none());

    // In the hub's cache.
    let snapshot = dir.path().join("models--owner--some-name/snapshots/0123");
    std::fs::create_dir_all(&snapshot).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::rename(dir.path().join(file), snapshot.join(file)).unwrap();
    }
    let path = dir.path().join("out.gguf");
    to(&snapshot, &path, TernaryType::I2_S, HeadType::Auto).unwrap();
    assert_eq!(Gguf::open(&path).unwrap().get_str("general.name").unwrap(), Some("some-name"));
}

#[test]
fn variants_of_the_configuration() {
    let mut config = config();
    config["hidden_act"] = "silu".into();
    config["tie_word_embeddings"] = false.into();
    config["head_dim"] = 16.into();
    config["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 500000.0});
    let mut tensors = tensors();
    for i in 0..2 {
        for (part, shape) in [
            ("q_proj", [64, HIDDEN]),
            ("k_proj", [32, HIDDEN]),
            ("v_proj", [32, HIDDEN]),
            ("o_proj", [HIDDEN, 64]),
        ] {
            let values = (0..shape[0] * shape[1]).map(|j| (j % 11) as f32 - 5.0).collect();
            tensors.insert(
                format!("model.layers.{i}.self_attn.{part}.weight"),
                ("BF16", shape.to_vec(), values),
            );
        }
        let name = format!("model.layers.{i}.self_attn.attn_sub_norm.weight");
        tensors.insert(name, ("F32", vec![64], vec![1.0; 64]));
    }
    // Exact in bf16 and not in f16.
    let head = vec![1e-7; (VOCAB * HIDDEN) as usize].into_iter().map(|x| bf16_to_f32(f32_to_bf16(x)));
    tensors.insert("lm_head.weight".into(), ("BF16", vec![VOCAB, HIDDEN], head.collect()));
    let (_, gguf) = convert(&folder(&config, &tensors), HeadType::Auto).unwrap();
    check(&gguf, &tensors);
    assert_eq!(gguf.tensor("output.weight").unwrap().ty, TensorType::BF16);
    assert_eq!(gguf.tensor("token_embd.weight").unwrap().ty, TensorType::F16);
    assert_eq!(gguf.get_str("general.architecture").unwrap(), Some("bitnet"));
    assert_eq!(gguf.get_str("bitnet.hidden_act").unwrap(), Some("silu"));
    assert_eq!(gguf.get_u32("bitnet.attention.key_length").unwrap(), Some(16));
    assert_eq!(gguf.get_u32("bitnet.attention.value_length").unwrap(), Some(16));
    assert_eq!(gguf.get_f32("bitnet.rope.freq_base").unwrap(), Some(500_000.0));
}

#[test]
fn the_checkpoints_of_1bitllm_have_names_of_their_own() {
    let mut hf = config();
    hf["hidden_act"] = "silu".into();
    let (expected, _) = convert(&folder(&hf, &tensors()), HeadType::Auto).unwrap();
    let mut config = hf.clone();
    config["architectures"] = json!(["BitnetForCausalLM"]);
    config["model_type"] = "llama".into();
    config["input_bits"] = 8.into();
    config["weight_bits"] = 1.into();
    config.as_object_mut().unwrap().remove("quantization_config");
    let rename = |name: String| {
        name.replace("self_attn.attn_sub_norm", "self_attn.inner_attn_ln")
            .replace("mlp.ffn_sub_norm", "mlp.ffn_layernorm")
    };
    let renamed: Tensors = tensors().into_iter().map(|(name, tensor)| (rename(name), tensor)).collect();
    let dir = folder(&config, &renamed);
    std::fs::write(
        dir.path().join("tokenizer.model"),
        include_bytes!("fixtures/tokenizer/sentencepiece.model"),
    )
    .unwrap();
    // Their own code reads this one; Hugging Face's the other, where both are there.
    let json = dir.path().join("tokenizer.json");
    std::fs::write(&json, "{").unwrap();
    assert!(refusal(&dir).contains("600 tokens, config.json has a vocab_size of 20"), "{}", refusal(&dir));
    std::fs::remove_file(dir.path().join("tokenizer.model")).unwrap();
    assert!(refusal(&dir).contains("tokenizer.json"), "{}", refusal(&dir));
    std::fs::remove_file(json).unwrap();
    let (report, gguf) = convert(&dir, HeadType::Auto).unwrap();
    assert_eq!((&report.trits, &report.architecture[..]), (&expected.trits, "bitnet"));
    check(&gguf, &tensors());
    assert_eq!(gguf.get_f32("bitnet.rope.freq_base").unwrap(), Some(10_000.0));
    config["input_bits"] = 4.into();
    assert!(refusal(&folder(&config, &renamed)).contains("input_bits"));
}

#[test]
fn head_types() {
    let mut tensors = tensors();
    let (_, _, values) = tensors.get_mut("model.embed_tokens.weight").unwrap();
    values[5] = 1e-7;
    let types = |tensors: &Tensors, head| {
        let (report, gguf) = convert(&folder(&config(), tensors), head).unwrap();
        assert_eq!(gguf.tensor("token_embd.weight").unwrap().ty, report.embedding);
        (report.embedding, report.notices.len() - 1)
    };
    assert_eq!(types(&tensors, HeadType::Auto), (TensorType::BF16, 0));
    assert_eq!(types(&tensors, HeadType::F16), (TensorType::F16, 1));
    assert_eq!(types(&tensors, HeadType::F32), (TensorType::F32, 0));
    let (dtype, _, values) = tensors.get_mut("model.embed_tokens.weight").unwrap();
    *dtype = "F32";
    values[6] = 0.1;
    assert_eq!(types(&tensors, HeadType::Auto), (TensorType::F32, 0));
    assert_eq!(types(&tensors, HeadType::Bf16), (TensorType::BF16, 1));
    tensors.get_mut("model.embed_tokens.weight").unwrap().2[40] = 1e6;
    let error = convert(&folder(&config(), &tensors), HeadType::F16).err().unwrap().to_string();
    assert!(error.contains("\"model.embed_tokens.weight\", element [1, 8] at byte"), "{error}");
    assert!(error.contains("1000000 is too large for F16"), "{error}");
}

#[test]
fn a_dead_tensor_is_all_zeros() {
    let mut tensors = tensors();
    tensors.get_mut("model.layers.0.mlp.up_proj.weight").unwrap().2.fill(0.0);
    let (_, gguf) = convert(&folder(&config(), &tensors), HeadType::Auto).unwrap();
    check(&gguf, &tensors);
}

#[test]
fn shards_give_the_same_file() {
    let tensors = tensors();
    let dir = folder(&config(), &tensors);
    let sharded = tempfile::Builder::new().tempdir().unwrap();
    let sharded_dir = sharded.path().join(dir.path().file_name().unwrap());
    std::fs::create_dir(&sharded_dir).unwrap();
    std::fs::copy(dir.path().join("config.json"), sharded_dir.join("config.json")).unwrap();
    let mut shards = [Tensors::new(), Tensors::new(), Tensors::new()];
    let mut map = serde_json::Map::new();
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        shards[i % 3].insert(name.clone(), tensor.clone());
        map.insert(name.clone(), format!("part-{}.safetensors", i % 3).into());
    }
    for (i, shard) in shards.iter().enumerate() {
        std::fs::write(sharded_dir.join(format!("part-{i}.safetensors")), safetensors(shard)).unwrap();
    }
    let index = sharded_dir.join("model.safetensors.index.json");
    let write_index = |map: &Value| std::fs::write(&index, json!({"weight_map": map}).to_string()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let convert = |dir: &Path, name: &str| {
        let path = out.path().join(name);
        let progress = &mut |_: Progress<'_>| ControlFlow::Continue(());
        convert_to(dir, &path, Options::default(), progress).map(|_| std::fs::read(path).unwrap())
    };
    let map = Value::from(map);
    write_index(&map);
    let one = convert(dir.path(), "one").unwrap();
    assert!(one == convert(&sharded_dir, "sharded").unwrap());
    assert!(one == convert(dir.path(), "one").unwrap());

    let refusal = || convert(&sharded_dir, "refused").unwrap_err().to_string();
    for (name, file, expected) in [
        ("model.norm.weight", Some("../part-0.safetensors"), "name of a file in the same folder"),
        ("model.extra.weight", Some("part-1.safetensors"), "tensor \"model.extra.weight\": expected here by"),
        ("model.norm.weight", None, "tensor \"model.norm.weight\": not listed in"),
    ] {
        let mut wrong = map.clone();
        match file {
            Some(file) => wrong[name] = file.into(),
            None => drop(wrong.as_object_mut().unwrap().remove(name)),
        }
        write_index(&wrong);
        assert!(refusal().contains(expected), "{}", refusal());
    }
    write_index(&map);
    std::fs::remove_file(sharded_dir.join("part-2.safetensors")).unwrap();
    assert!(refusal().contains("part-2.safetensors: cannot open"), "{}", refusal());
}

#[test]
fn configurations_are_refused() {
    for (key, value, expected) in [
        ("model_type", json!("gemma"), "expected \"bitnet\" or \"llama\", found \"gemma\""),
        ("model_type", json!("llama"), "expected [\"silu\"], found \"relu2\""),
        ("quantization_config", json!(null), "quant_method\": expected \"bitnet\", found nothing"),
        ("quantization_config/quantization_mode", json!("offline"), "q_proj.weight_scale\": missing"),
        ("quantization_config/quantization_mode", json!("both"), "\"offline\", found \"both\""),
        ("quantization_config/linear_class", json!("bitlinear"), "expected \"autobitlinear\""),
        ("hidden_act", json!("gelu"), "expected [\"relu2\",\"silu\"], found \"gelu\""),
        ("hidden_size", json!(-3), "expected an integer from 1 to 16777216, found -3"),
        ("num_hidden_layers", json!(u64::MAX), "expected an integer from 1"),
        ("num_hidden_layers", json!(3), "tensor \"model.layers.2.input_layernorm.weight\": missing"),
        ("num_attention_heads", json!(6), "expected a divisor of hidden_size 32"),
        ("num_key_value_heads", json!(3), "expected a divisor of 4 heads, found 3"),
        ("intermediate_size", json!(68), "expected shape [68, 32] from config.json, found [64, 32]"),
        ("vocab_size", json!(21), "expected shape [21, 32] from config.json, found [20, 32]"),
        ("vocab_size", json!("20"), "key \"vocab_size\""),
        ("rms_norm_eps", json!(0), "key \"rms_norm_eps\""),
        ("rope_theta", json!("x"), "key \"rope_theta\""),
        ("eos_token_id", json!(20), "expected a token id below 20, found 20"),
        ("tie_word_embeddings", json!(false), "tensor \"lm_head.weight\": missing"),
        ("max_position_embeddings", json!(1.5), "key \"max_position_embeddings\""),
        ("attention_bias", json!(true), "\"attention_bias\": expected [false], found true"),
        ("rope_scaling", json!({"type": "linear"}), "\"rope_scaling.factor\": expected a number from"),
        ("rope_parameters", json!({"rope_type": "yarn"}), "\"rope_parameters.rope_type\": expected"),
        ("head_dim", json!(7), "expected an even number for RoPE, found 7"),
    ] {
        let mut config = config();
        *key.split('/').fold(&mut config, |json, key| &mut json[key]) = value;
        let error = refusal(&folder(&config, &tensors()));
        assert!(error.contains("config.json") || error.contains("tensor"), "{error}");
        assert!(error.contains(expected), "{error}");
    }
    let dir = folder(&config(), &tensors());
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    assert!(refusal(&dir).contains("config.json: JSON: EOF"));
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    assert!(refusal(&dir).contains("no model in this folder: expected config.json"));
}

#[test]
fn tensors_are_refused() {
    let edited = |edit: &dyn Fn(&mut Tensors)| {
        let mut tensors = tensors();
        edit(&mut tensors);
        refusal(&folder(&config(), &tensors))
    };
    let name = "model.layers.1.mlp.down_proj.weight";
    for (bad, text) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf")] {
        let error = edited(&|t| t.get_mut(name).unwrap().2[130] = bad);
        assert!(error.contains("down_proj.weight\", element [2, 2] at byte"), "{error}");
        assert!(error.contains(&format!("expected a finite number, found {text}")), "{error}");
    }
    let scale = name.replace("weight", "weight_scale");
    let refusals: [(&dyn Fn(&mut Tensors), &str); 8] = [
        (&|t| t.get_mut("model.norm.weight").unwrap().2[7] = f32::INFINITY, "element [7] at byte"),
        (&|t| drop(t.remove(name)), "down_proj.weight\": missing among 23 tensors"),
        (
            &|t| t.get_mut(name).unwrap().1 = vec![FF, HIDDEN],
            "expected shape [32, 64] from config.json, found [64, 32]",
        ),
        (&|t| t.get_mut(name).unwrap().0 = "U8", "type U8: packed weights"),
        (&|t| t.get_mut(name).unwrap().0 = "I8", "expected type F32, F16 or BF16, found I8"),
        (&|t| drop(t.insert(scale.clone(), ("BF16", vec![1], vec![1.0]))), "weight_scale\": not expected"),
        (
            &|t| drop(t.insert(name.replace("weight", "bias"), ("BF16", vec![1], vec![1.0]))),
            "down_proj.bias\": not expected",
        ),
        (&|t| t.get_mut(name).unwrap().2.truncate(2047), "does not fill the 4094 bytes"),
    ];
    for (edit, expected) in refusals {
        let error = edited(edit);
        assert!(error.contains(expected), "{error}");
    }

    // A head that HF ignores.
    let mut tensors = tensors();
    tensors.insert("lm_head.weight".into(), tensors["model.embed_tokens.weight"].clone());
    let (report, gguf) = convert(&folder(&config(), &tensors), HeadType::Auto).unwrap();
    assert!(report.notices[1].contains("lm_head.weight is left out"));
    assert!(gguf.tensor("output.weight").is_none());
}

#[test]
fn weights_must_fill_their_blocks() {
    let mut config = config();
    config["num_key_value_heads"] = 1.into();
    config["num_attention_heads"] = 16.into();
    let mut tensors = tensors();
    for i in 0..2 {
        for part in ["k", "v"] {
            let name = format!("model.layers.{i}.self_attn.{part}_proj.weight");
            tensors.insert(name, ("BF16", vec![2, HIDDEN], vec![0.5; 2 * HIDDEN as usize]));
        }
    }
    let error = refusal(&folder(&config, &tensors));
    assert!(error.contains("k_proj.weight\": 64 weights do not fill the blocks of 128"), "{error}");
}

#[test]
fn broken_headers_are_refused() {
    let dir = folder(&config(), &tensors());
    let path = dir.path().join("model.safetensors");
    let good = std::fs::read(&path).unwrap();
    let with = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        refusal(&dir)
    };
    assert!(with(&good[..5]).contains("header: expected its length in the first 8 bytes, the file has 5"));
    let most = good.len() - 8;
    for len in [u64::MAX, most as u64 + 1] {
        let error = with(&[&len.to_le_bytes(), &good[8..]].concat());
        assert!(error.contains(&format!("at most {most} bytes at byte 0, found {len}")), "{error}");
    }
    let error = with(&good[..good.len() - 1]);
    assert!(error.contains("expected offsets in the") && error.contains("tensor \""), "{error}");
    let mut bad = good.clone();
    bad[8] = b'[';
    assert!(with(&bad).contains("header: "));
    std::fs::remove_file(&path).unwrap();
    assert!(refusal(&dir).contains("model.safetensors: cannot open"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any bytes in the header end in a file or an error.
    #[test]
    fn altered_headers_do_not_panic(
        edits in proptest::collection::vec((0usize..3000, prop_oneof![any::<u8>(), b'0'..=b'9']), 1..4),
    ) {
        let dir = folder(&config(), &tensors());
        let path = dir.path().join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        for (at, byte) in edits {
            bytes[at] = byte;
        }
        std::fs::write(&path, bytes).unwrap();
        drop(convert(&dir, HeadType::Auto));
    }
}

#[test]
fn an_older_file_survives_a_refusal() {
    let mut tensors = tensors();
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("out.gguf");
    std::fs::write(&path, "older").unwrap();
    let refused = |dir: TempDir, progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>| {
        let error = convert_to(dir.path(), &path, Options::default(), progress).unwrap_err();
        assert_eq!(std::fs::read(&path).unwrap(), b"older");
        assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 1);
        error
    };
    let last = &mut |p: Progress<'_>| {
        if p.done < p.total { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    };
    assert!(matches!(refused(folder(&config(), &tensors), last), ConvertError::Cancelled));
    tensors.get_mut("model.layers.1.mlp.up_proj.weight").unwrap().2[0] = f32::NAN;
    refused(folder(&config(), &tensors), &mut |_| ControlFlow::Continue(()));
}

fn fixture(name: &str) -> Value {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer");
    serde_json::from_slice(&std::fs::read(dir.join(name)).unwrap()).unwrap()
}

/// A model of so many tokens.
fn folder_of(mut config: Value, vocab: u64) -> TempDir {
    config["vocab_size"] = vocab.into();
    let mut tensors = tensors();
    let embedding = ("BF16", vec![vocab, HIDDEN], vec![0.5; (vocab * HIDDEN) as usize]);
    tensors.insert("model.embed_tokens.weight".into(), embedding);
    folder(&config, &tensors)
}

#[test]
fn tokenizers_of_other_families_come_along() {
    let mut demo = fixture("demo-tokenizer.json");
    demo["model"]["ignore_merges"] = false.into();
    let mut sentence = fixture("sentencepiece-tokenizer.json");
    let mut files = vec![(sentence.clone(), 600, "llama", "default")];
    sentence["normalizer"] = Value::Null;
    for variant in fixture("metaspace-cases.json").as_array().unwrap() {
        sentence["pre_tokenizer"] = variant["pre_tokenizer"].clone();
        files.push((sentence.clone(), 600, "llama", "default"));
    }
    let variants = fixture("falcon-cases.json");
    for (variant, pre) in variants.as_array().unwrap().iter().zip(["falcon", "falcon3", "falcon3", "falcon"])
    {
        demo["pre_tokenizer"] = variant["pre_tokenizer"].clone();
        files.push((demo.clone(), 4096, "gpt2", pre));
    }
    for (file, vocab, model, pre) in files {
        let dir = folder_of(config(), vocab);
        std::fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
        let (_, gguf) = convert(&dir, HeadType::Auto).unwrap();
        let name = |key| gguf.get_str(key).unwrap();
        assert_eq!((name("tokenizer.ggml.model"), name("tokenizer.ggml.pre")), (Some(model), Some(pre)));
        assert_eq!(gguf.get_bool("tokenizer.ggml.add_bos_token").unwrap(), Some(model == "llama"));
        let loaded = ModelInfo::new(&gguf, Strategy::SPARSE).unwrap().tokenizer().unwrap();
        let direct = Tokenizer::new(&HfVocab::parse(file.to_string().as_bytes()).unwrap()).unwrap();
        for text in ["a </s> b", " a", "  a   b"] {
            assert_eq!(loaded.encode(text, Specials::Parse), direct.encode(text, Specials::Parse), "{text}");
        }
        let text = "  It's 12345 für <b>\u{e9}\u{4f60}\u{1f44b}</b>,\n\tHe SAID: \"x-1.5\"...  ";
        assert_eq!(loaded.encode(text, Specials::AsText), direct.encode(text, Specials::AsText), "{pre}");
        if pre != "falcon3" {
            continue;
        }
        let mut merged = file.clone();
        merged["model"]["ignore_merges"] = true.into();
        std::fs::write(dir.path().join("tokenizer.json"), merged.to_string()).unwrap();
        assert!(refusal(&dir).contains("\"model.ignore_merges\": expected false"), "{}", refusal(&dir));
        std::fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
        // A file of another program has no more than the name: a token of several digits tells what it means.
        let path = dir.path().join("out.gguf");
        convert_to(dir.path(), &path, Options::default(), &mut |_| ControlFlow::Continue(())).unwrap();
        let mut bytes = std::fs::read(path).unwrap();
        let mut patch = |from: &[u8], to: &[u8]| {
            let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
            bytes[at..at + to.len()].copy_from_slice(to);
        };
        patch(b"tokenizer.numerals", b"tokenizer.anything");
        patch(b"\x02\0\0\0\0\0\0\x0018", b"\x02\0\0\0\0\0\0\x0010");
        patch(b"\x03\0\0\0\0\0\0\x001 8", b"\x03\0\0\0\0\0\0\x001 0");
        let other = Gguf::from_vec("other", bytes).unwrap();
        let other = ModelInfo::new(&other, Strategy::SPARSE).unwrap().tokenizer().unwrap();
        assert_eq!(other.encode("10", Specials::AsText).len(), 1);
        assert_eq!(loaded.encode("18", Specials::AsText).len(), 2);
    }
}

#[test]
fn the_tokenizer_comes_along() {
    let (mut config, tokenizer) = (config(), fixture("demo-tokenizer.json"));
    config["bos_token_id"] = 4088.into();
    config["eos_token_id"] = 4089.into();
    config["pad_token_id"] = 4089.into();
    let dir = folder_of(config.clone(), 4098);
    let write = |name: &str, json: &Value| std::fs::write(dir.path().join(name), json.to_string()).unwrap();
    write("tokenizer.json", &tokenizer);
    write("tokenizer.model", &json!("not read where tokenizer.json is there"));
    let (report, gguf) = convert(&dir, HeadType::Auto).unwrap();
    assert_eq!(report.notices, [""; 0]);
    let array = |key| gguf.get_array(key).unwrap().unwrap();
    let tokens: Vec<_> = array("tokenizer.ggml.tokens").strs().unwrap().collect();
    assert_eq!((tokens.len(), tokens[4092]), (4098, "<|eot_id|>"));
    assert_eq!(tokens[4096..], ["[PAD4096]", "[PAD4097]"]);
    let merges = tokenizer["model"]["merges"].as_array().unwrap();
    let pair = |pair: &Value| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
    assert!(array("tokenizer.ggml.merges").strs().unwrap().eq(merges.iter().map(pair)));
    let types: Vec<i128> = array("tokenizer.ggml.token_type").ints().unwrap().collect();
    assert_eq!(types[4087..], [1, 3, 3, 3, 3, 3, 3, 3, 3, 5, 5]);
    for (key, id) in [("bos", 4088), ("eos", 4089), ("padding", 4089), ("eot", 4092)] {
        assert_eq!(gguf.get_u32(&format!("tokenizer.ggml.{key}_token_id")).unwrap(), Some(id), "{key}");
    }
    assert_eq!(gguf.get_str("tokenizer.ggml.model").unwrap(), Some("gpt2"));
    assert_eq!(gguf.get_str("tokenizer.ggml.pre").unwrap(), Some("llama-bpe"));
    assert_eq!(gguf.get_bool("tokenizer.ggml.add_bos_token").unwrap(), Some(true));
    assert_eq!(gguf.get_str("tokenizer.chat_template").unwrap(), None);

    let template = |gguf: &Gguf| gguf.get_str("tokenizer.chat_template").unwrap().map(str::to_owned);
    write("tokenizer_config.json", &json!({"add_bos_token": false, "chat_template": "{{ messages }}"}));
    let (_, gguf) = convert(&dir, HeadType::Auto).unwrap();
    assert_eq!(gguf.get_bool("tokenizer.ggml.add_bos_token").unwrap(), Some(false));
    assert_eq!(template(&gguf).as_deref(), Some("{{ messages }}"));
    let named = json!([{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]);
    write("tokenizer_config.json", &json!({"chat_template": named}));
    assert_eq!(template(&convert(&dir, HeadType::Auto).unwrap().1).as_deref(), Some("b"));
    std::fs::write(dir.path().join("chat_template.jinja"), "c").unwrap();
    assert_eq!(template(&convert(&dir, HeadType::Auto).unwrap().1).as_deref(), Some("c"));

    for (key, value, expected) in [
        ("ignore_merges", json!(false), "tokenizer.json: key \"model.ignore_merges\": expected true"),
        ("merges", json!([["t", "<|eot_id|>"]]), "merge 0"),
    ] {
        let mut wrong = tokenizer.clone();
        wrong["model"][key] = value;
        write("tokenizer.json", &wrong);
        assert!(refusal(&dir).contains(expected), "{}", refusal(&dir));
    }
    write("tokenizer.json", &tokenizer);
    config["vocab_size"] = 4095.into();
    write("config.json", &config);
    assert!(refusal(&dir).contains("4096 tokens, config.json has a vocab_size of 4095"));
}
