//! Checkpoints that tests write and convert.

use bitnet::convert::{ConvertError, HeadType, Options, Report, TernaryType, convert};
use bitnet::kernels::half::{f32_to_bf16, f32_to_f16};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use tempfile::TempDir;

/// Tensors by name: type, shape, values, which for `U8` are bytes.
pub(crate) type Tensors = BTreeMap<String, (&'static str, Vec<u64>, Vec<f32>)>;

pub(crate) fn safetensors(tensors: &Tensors) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut data = Vec::new();
    for (name, (dtype, shape, values)) in tensors {
        let start = data.len();
        for &x in values {
            match *dtype {
                "F32" => data.extend(x.to_le_bytes()),
                "F16" => data.extend(f32_to_f16(x).to_le_bytes()),
                "BF16" => data.extend(f32_to_bf16(x).to_le_bytes()),
                _ => data.push(x as u8),
            }
        }
        header.insert(
            name.clone(),
            json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]}),
        );
    }
    let header = Value::from(header).to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

/// A folder of config.json and model.safetensors.
pub(crate) fn folder(config: &Value, tensors: &Tensors) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), safetensors(tensors)).unwrap();
    dir
}

/// A BitNet whose feed-forward block is twice as wide as its residual stream.
pub(crate) fn config(hidden: u64, layers: u64, vocab: u64) -> Value {
    json!({
        "model_type": "bitnet", "hidden_act": "relu2", "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": vocab,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "bos_token_id": 1, "eos_token_id": [2, 3],
        "quantization_config": {
            "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online",
        },
    })
}

/// The tensors of one of its layers: name in GGUF and in the checkpoint, shape, type.
pub(crate) fn layer(hidden: u64) -> [(&'static str, &'static str, Vec<u64>, &'static str); 11] {
    let (kv, ff) = (hidden / 2, 2 * hidden);
    [
        ("attn_norm", "input_layernorm", vec![hidden], "BF16"),
        ("ffn_norm", "post_attention_layernorm", vec![hidden], "F16"),
        ("attn_q", "self_attn.q_proj", vec![hidden, hidden], "BF16"),
        ("attn_k", "self_attn.k_proj", vec![kv, hidden], "F16"),
        ("attn_v", "self_attn.v_proj", vec![kv, hidden], "F32"),
        ("attn_output", "self_attn.o_proj", vec![hidden, hidden], "BF16"),
        ("attn_sub_norm", "self_attn.attn_sub_norm", vec![hidden], "BF16"),
        ("ffn_gate", "mlp.gate_proj", vec![ff, hidden], "BF16"),
        ("ffn_up", "mlp.up_proj", vec![ff, hidden], "BF16"),
        ("ffn_down", "mlp.down_proj", vec![hidden, ff], "BF16"),
        ("ffn_sub_norm", "mlp.ffn_sub_norm", vec![ff], "BF16"),
    ]
}

/// Its weights, in 7 bits: exact in every type.
pub(crate) fn tensors(hidden: u64, layers: u64, vocab: u64) -> Tensors {
    let mut tensors = Tensors::new();
    let mut state = 1u32;
    let mut add = |name: String, shape: Vec<u64>, dtype| {
        let values = (0..shape.iter().product::<u64>()).map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 25) as f32 - 64.0) / 1024.0
        });
        tensors.insert(name, (dtype, shape, values.collect()));
    };
    add("model.embed_tokens.weight".into(), vec![vocab, hidden], "BF16");
    add("model.norm.weight".into(), vec![hidden], "F32");
    for i in 0..layers {
        for (_, part, shape, dtype) in layer(hidden) {
            add(format!("model.layers.{i}.{part}.weight"), shape, dtype);
        }
    }
    tensors
}

/// Converts with an eye on the progress that is told.
pub(crate) fn to(
    from: &Path,
    path: &Path,
    ternary: TernaryType,
    head: HeadType,
) -> Result<Report, ConvertError> {
    let (mut last, mut total) = (0, 0);
    let report = convert(from, path, Options { ternary, head }, &mut |progress| {
        assert!(progress.done > last && progress.done <= progress.total, "{progress:?}");
        (last, total) = (progress.done, progress.total);
        ControlFlow::Continue(())
    })?;
    assert_eq!(last, total);
    Ok(report)
}
