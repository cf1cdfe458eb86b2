//! The golden models: reference fixtures written by `tools/make_goldens.py`, and the GGUF files made from their checkpoints.
#![allow(clippy::unwrap_used)]
#![allow(dead_code)] // each test binary uses a part

pub(crate) mod checkpoint;
pub(crate) mod masked;

use bitnet::convert::{Options, convert};
use bitnet::generate::{Generated, Sampler, SamplerConfig, StopConditions, generate};
use bitnet::gguf::{Gguf, TensorInfo, TensorType, Value as GgufValue, ValueType, Writer};
use bitnet::kernels::half::bf16_to_f32;
use bitnet::kernels::{Compute, Kernels, KvType, Logits};
use bitnet::model::{Model, Strategy};
use bitnet::{Engine, EngineOptions, Error, Feed, SequenceId, Wanted};
use sha2::{Digest, Sha256};
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

pub(crate) fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo.gguf")
}

/// The GGUF of a golden model: the shipped one, or converted from the checkpoint beside the fixture.
pub(crate) fn gguf(model: &str) -> Arc<Gguf> {
    if model == "demo" {
        return Arc::new(Gguf::open(&demo()).unwrap());
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
    engine_with(gguf, kernels, threads, max_rows, sequences, KvType::F32)
}

pub(crate) fn engine_with(
    gguf: &Arc<Gguf>,
    kernels: &'static Kernels,
    threads: usize,
    max_rows: usize,
    sequences: usize,
    cache_type: KvType,
) -> Engine {
    let options = EngineOptions { max_rows, sequences, cache_type, ..OPTIONS };
    build(gguf, Strategy::SPARSE, kernels, threads, options)
}

pub(crate) fn build(
    gguf: &Arc<Gguf>,
    strategy: Strategy,
    kernels: &'static Kernels,
    threads: usize,
    options: EngineOptions,
) -> Engine {
    let compute = Compute::new(kernels, threads);
    let mut engine = Engine::new(Model::load(gguf, &compute, strategy).unwrap(), compute, options).unwrap();
    engine.settle(|| false);
    engine
}

/// The bits of all logits of tokens that continue a sequence.
pub(crate) fn feed(engine: &mut Engine, sequence: SequenceId, tokens: &[u32]) -> Vec<u32> {
    let feed = Feed { sequence, tokens, wanted: Wanted::All(Logits::Every) };
    bits(engine.feed(&[feed]).unwrap())
}

/// Those of the last one.
pub(crate) fn last(engine: &mut Engine, sequence: SequenceId, tokens: &[u32]) -> Result<Vec<u32>, Error> {
    engine.feed(&[Feed { sequence, tokens, wanted: Wanted::Last(Logits::Every) }]).map(bits)
}

pub(crate) fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// What [`generate`] makes of a prompt in a sequence of its own, and the text.
pub(crate) fn generated(
    engine: &mut Engine,
    prompt: &[u32],
    config: &SamplerConfig,
    stop: &StopConditions,
) -> Result<(Generated, String), Error> {
    let sequence = engine.open();
    let mut sampler = Sampler::new(config.clone()).unwrap();
    let mut text = String::new();
    let generated = generate(engine, sequence, prompt, &mut sampler, stop, &mut writing(&mut text));
    engine.close(sequence);
    Ok((generated?, text))
}

/// Takes a text as it comes.
pub(crate) fn writing(text: &mut String) -> impl FnMut(&str) -> ControlFlow<()> {
    |part| {
        text.push_str(part);
        ControlFlow::Continue(())
    }
}

pub(crate) fn random(state: &mut u64) -> u32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) as u32
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// A file with `edit`ed tensors, `more` tensors of a type, and one more key, an array.
pub(crate) fn rewritten(
    gguf: &Gguf,
    edit: impl Fn(&TensorInfo, &mut Vec<u8>),
    more: &[(String, TensorType, &[u64], &[u8])],
) -> Vec<u8> {
    let mut writer = Writer::new("rewritten".as_ref());
    for (key, value) in gguf.metadata() {
        writer.meta(key, value).unwrap();
    }
    if gguf.get("list").is_none() {
        writer.meta_array("list", ValueType::U32, [1, 2].map(GgufValue::U32)).unwrap();
    }
    for t in gguf.tensors() {
        writer.tensor(&t.name, &t.dims, t.ty).unwrap();
    }
    for (name, ty, dims, _) in more {
        writer.tensor(name, dims, *ty).unwrap();
    }
    let mut data = writer.write_to(Vec::new()).unwrap();
    for t in gguf.tensors() {
        let mut bytes = gguf.tensor_bytes(t).to_vec();
        edit(t, &mut bytes);
        data.tensor(&t.name, &bytes).unwrap();
    }
    for (name, .., bytes) in more {
        data.tensor(name, bytes).unwrap();
    }
    data.end().unwrap()
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
    pub(crate) fn rows(&self, name: &str) -> usize {
        self.get(name).1[0]
    }
    /// F32 or BF16, as float32.
    pub(crate) fn floats(&self, name: &str) -> Vec<f32> {
        let (dtype, _, bytes) = self.get(name);
        match dtype.as_str() {
            "F32" => bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            "BF16" => bytes.chunks(2).map(|b| bf16_to_f32(u16::from_le_bytes([b[0], b[1]]))).collect(),
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
