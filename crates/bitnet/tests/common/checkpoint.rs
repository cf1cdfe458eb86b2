//! Checkpoints that tests write.

use bitnet::kernels::half::{f32_to_bf16, f32_to_f16};
use serde_json::{Value, json};
use std::collections::BTreeMap;
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
