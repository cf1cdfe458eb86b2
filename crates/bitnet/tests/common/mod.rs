//! The golden models: reference fixtures written by `tools/make_goldens.py`, and the GGUF files made from their checkpoints.
#![allow(clippy::unwrap_used)]
#![allow(dead_code)] // each test binary uses a part

pub(crate) mod checkpoint;
pub(crate) mod masked;

use bitnet::convert::{Options, convert};
use bitnet::gguf::Gguf;
use bitnet::kernels::{Compute, Kernels, KvType};
use bitnet::model::{Model, Strategy};
use bitnet::{Engine, EngineOptions};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Every golden model.
pub(crate) const MODELS: [&str; 7] = ["demo", "gqa", "silu", "mha", "ragged", "llama", "falcon"];

pub(crate) fn fixture(model: &str, file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(model).join(file)
}

/// 640 tokens, one sequence, steps of 512 rows, an exact cache.
pub(crate) const OPTIONS: EngineOptions =
    EngineOptions { context: 640, sequences: 1, max_rows: 512, cache_type: KvType::F32, logits: 1 };

/// The GGUF of a golden model: the shipped one, or converted from the checkpoint beside the fixture.
pub(crate) fn gguf(model: &str) -> Arc<Gguf> {
    if model == "demo" {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo.gguf");
        return Arc::new(Gguf::open(&path).unwrap());
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model.gguf");
    convert(&fixture(model, ""), &out, Options::default(), &mut |_| ControlFlow::Continue(())).unwrap();
    Arc::new(Gguf::from_vec(model, std::fs::read(out).unwrap()).unwrap())
}

pub(crate) fn engine(
    gguf: &Arc<Gguf>,
    kernels: &'static Kernels,
    threads: usize,
    max_rows: usize,
    sequences: usize,
) -> Engine {
    engine_as(gguf, Strategy::SPARSE, kernels, threads, max_rows, sequences)
}

pub(crate) fn engine_as(
    gguf: &Arc<Gguf>,
    strategy: Strategy,
    kernels: &'static Kernels,
    threads: usize,
    max_rows: usize,
    sequences: usize,
) -> Engine {
    build(gguf, strategy, kernels, threads, EngineOptions { max_rows, sequences, ..OPTIONS })
}

pub(crate) fn engine_with(
    gguf: &Arc<Gguf>,
    kernels: &'static Kernels,
    threads: usize,
    max_rows: usize,
    sequences: usize,
    cache_type: KvType,
) -> Engine {
    build(
        gguf,
        Strategy::SPARSE,
        kernels,
        threads,
        EngineOptions { max_rows, sequences, cache_type, ..OPTIONS },
    )
}

pub(crate) fn build(
    gguf: &Arc<Gguf>,
    strategy: Strategy,
    kernels: &'static Kernels,
    threads: usize,
    options: EngineOptions,
) -> Engine {
    let compute = Compute::new(kernels, threads);
    Engine::new(Model::load(gguf, &compute, strategy).unwrap(), compute, options).unwrap()
}

/// The tensors of a safetensors file.
pub(crate) struct Tensors(HashMap<String, (String, Vec<usize>, Vec<u8>)>);

impl Tensors {
    pub(crate) fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header_len]).unwrap();
        let data = &bytes[8 + header_len..];
        let entries = header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__");
        Self(
            entries
                .map(|(name, info)| {
                    let number = |v: &serde_json::Value| v.as_u64().unwrap() as usize;
                    let shape = info["shape"].as_array().unwrap().iter().map(number).collect();
                    let range = number(&info["data_offsets"][0])..number(&info["data_offsets"][1]);
                    (name.clone(), (info["dtype"].as_str().unwrap().to_owned(), shape, data[range].to_vec()))
                })
                .collect(),
        )
    }
    fn get(&self, name: &str) -> &(String, Vec<usize>, Vec<u8>) {
        self.0.get(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
    pub(crate) fn rows(&self, name: &str) -> usize {
        self.get(name).1[0]
    }
    /// F32 or BF16, as float32.
    pub(crate) fn floats(&self, name: &str) -> Vec<f32> {
        let (dtype, _, bytes) = self.get(name);
        match dtype.as_str() {
            "F32" => bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            "BF16" => bytes
                .chunks(2)
                .map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16))
                .collect(),
            other => panic!("{name} is {other}"),
        }
    }
    pub(crate) fn ints(&self, name: &str) -> Vec<i32> {
        let (dtype, _, bytes) = self.get(name);
        assert_eq!(dtype, "I32");
        bytes.chunks(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect()
    }
    pub(crate) fn codes(&self, name: &str) -> Vec<i8> {
        let (dtype, _, bytes) = self.get(name);
        assert_eq!(dtype, "I8");
        bytes.iter().map(|&b| b as i8).collect()
    }
}

/// Token ids of a golden model.
pub(crate) fn ids(golden: &Tensors) -> Vec<u32> {
    golden.ints("ids").into_iter().map(|id| id as u32).collect()
}
