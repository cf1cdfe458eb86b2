//! From a Hugging Face checkpoint with master weights to a GGUF file with I2_S weights.
//!
//! The seven projections of each layer become ternary as in transformers' `WeightQuant` (`integrations/bitnet.py`):
//! with m = mean |W|, at least 1e-5, and s = 1 / m, a weight is clamp(round_half_even(W s), -1, 1), and the scale in the
//! file is 1 / s, what HF multiplies the weights with. All in float32, but the mean is summed in float64. The norms become
//! float32; embedding and head keep their values. Nothing is held in memory but a piece of one tensor and the vocabulary,
//! and the same checkpoint gives the same bytes.

mod checkpoint;
mod config;
mod vocab;

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::Path;

use bitnet_gguf::{AtomicFile, TensorType, TensorWriter, Value, Writer};
use bitnet_kernels::ternary::pack;

use crate::text::TokenizerError;
use checkpoint::{Checkpoint, Tensor};
use config::HfConfig;
use vocab::HfTokenizer;

/// How the embedding, and the head where it has weights of its own, is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HeadType {
    /// The first of F16, BF16 and F32 that holds every value exactly.
    #[default]
    Auto,
    /// IEEE half precision, rounded to nearest even.
    F16,
    /// bfloat16, rounded to nearest even.
    Bf16,
    /// Single precision.
    F32,
}

/// How far a conversion is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The tensor being read, as the checkpoint names it.
    pub tensor: &'a str,
    /// Bytes read so far. Most tensors are read twice.
    pub done: u64,
    /// Bytes to be read in all.
    pub total: u64,
}

/// What a conversion made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// `general.architecture` of the file.
    pub architecture: &'static str,
    /// Number of tensors.
    pub tensors: usize,
    /// Number of ternary weights.
    pub ternary_weights: u64,
    /// How many of them are zero.
    pub zero_weights: u64,
    /// How the embedding is stored.
    pub embedding: TensorType,
    /// What a person should know, a line each: something left out or rounded.
    pub notices: Vec<String>,
}

/// Why a checkpoint was not converted. Every message is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The system refused something.
    #[error("{file}: cannot {action}: {error}")]
    Io {
        /// The file.
        file: String,
        /// "open", "read" or "write".
        action: &'static str,
        /// The system's reason.
        error: io::Error,
    },
    /// The checkpoint is broken, or not one that can be converted; the fault is in the file.
    #[error("{file}: {thing}: {problem}")]
    Checkpoint {
        /// The file.
        file: String,
        /// The key or tensor.
        thing: String,
        /// What was found, and what was expected.
        problem: String,
    },
    /// The vocabulary is broken, or needs another tokenizer.
    #[error("{file}: {error}")]
    Tokenizer {
        /// The file.
        file: String,
        /// What is wrong with it.
        error: TokenizerError,
    },
    /// The caller's `progress` ended it.
    #[error("cancelled")]
    Cancelled,
    /// The GGUF file cannot be written.
    #[error(transparent)]
    Gguf(#[from] bitnet_gguf::Error),
}

impl ConvertError {
    fn io(path: &Path, action: &'static str, error: io::Error) -> Self {
        Self::Io { file: path.display().to_string(), action, error }
    }

    fn checkpoint(path: &Path, thing: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Checkpoint { file: path.display().to_string(), thing: thing.into(), problem: problem.into() }
    }
}

/// Converts the checkpoint in `dir` (config.json, model.safetensors or its shards with model.safetensors.index.json, and
/// optionally tokenizer.json and tokenizer_config.json) to the file `out`, which appears only when it is complete.
///
/// `progress` is called after each piece of a tensor and may end the conversion.
///
/// # Errors
/// The first thing that is wrong, with file, key or tensor, and what was expected, or [`ConvertError::Cancelled`]; then nothing
/// is left behind.
pub fn hf_to_gguf(
    dir: &Path,
    out: &Path,
    head: HeadType,
    progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
) -> Result<Report, ConvertError> {
    let config = HfConfig::read(&dir.join("config.json"))?;
    let tokenizer = HfTokenizer::read(dir, &config)?;
    let checkpoint = Checkpoint::open(dir)?;
    let mut notices = Vec::new();
    if tokenizer.is_none() {
        notices.push("no tokenizer.json: the file will have no vocabulary".to_owned());
    }
    let parts = parts(&config, &checkpoint, &mut notices)?;

    let passes = |part: &Part<'_>| match part.kind {
        Kind::Norm => 1,
        Kind::Embedding if head == HeadType::Auto => 2,
        Kind::Embedding => 1,
        Kind::Ternary => 2,
    };
    let total = parts.iter().map(|part| part.tensor.byte_len * passes(part)).sum();
    let mut run = Run { progress, done: 0, total, notices };

    let mut writer = Writer::new(out);
    let name = std::path::absolute(dir).map_err(|e| ConvertError::io(dir, "open", e))?;
    let name = name.file_name().map(|name| name.to_string_lossy().into_owned());
    config.write(&mut writer, name.as_deref())?;
    if let Some(tokenizer) = &tokenizer {
        tokenizer.write(&mut writer)?;
    }
    writer.meta("general.quantization_version", Value::U32(2))?;
    let mut types = Vec::new();
    for part in &parts {
        let ty = match part.kind {
            Kind::Norm => TensorType::F32,
            Kind::Ternary => TensorType::I2S,
            Kind::Embedding => run.embedding_type(&part.tensor, head)?,
        };
        let dims: Vec<u64> = part.tensor.shape.iter().rev().copied().collect();
        writer.tensor(&part.name, &dims, ty)?;
        types.push(ty);
    }

    let mut report = Report {
        architecture: config.architecture(),
        tensors: parts.len(),
        ternary_weights: 0,
        zero_weights: 0,
        embedding: types[0],
        notices: Vec::new(),
    };
    let mut data = writer.create()?;
    for (part, ty) in parts.iter().zip(types) {
        data.start(&part.name)?;
        let mut sink = Sink { data: &mut data, out };
        if part.kind == Kind::Ternary {
            report.ternary_weights += part.tensor.elements();
            report.zero_weights += run.write_ternary(&part.tensor, &mut sink)?;
        } else {
            run.write_floats(&part.tensor, ty, &mut sink)?;
        }
    }
    data.finish()?;
    report.notices = run.notices;
    Ok(report)
}

/// A tensor of the file to be.
struct Part<'a> {
    /// Its name there.
    name: String,
    tensor: Tensor<'a>,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Norm,
    Embedding,
    Ternary,
}

/// All tensors in the order of the file, the embedding first; refuses a checkpoint that has fewer or more.
fn parts<'a>(
    config: &HfConfig,
    checkpoint: &'a Checkpoint,
    notices: &mut Vec<String>,
) -> Result<Vec<Part<'a>>, ConvertError> {
    use Kind::*;
    let (hidden, ff) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
    let layer = [
        ("attn_norm", "input_layernorm", vec![hidden], Norm),
        ("attn_q", "self_attn.q_proj", vec![q, hidden], Ternary),
        ("attn_k", "self_attn.k_proj", vec![kv, hidden], Ternary),
        ("attn_v", "self_attn.v_proj", vec![kv, hidden], Ternary),
        ("attn_sub_norm", "self_attn.attn_sub_norm", vec![q], Norm),
        ("attn_output", "self_attn.o_proj", vec![hidden, q], Ternary),
        ("ffn_norm", "post_attention_layernorm", vec![hidden], Norm),
        ("ffn_gate", "mlp.gate_proj", vec![ff, hidden], Ternary),
        ("ffn_up", "mlp.up_proj", vec![ff, hidden], Ternary),
        ("ffn_sub_norm", "mlp.ffn_sub_norm", vec![ff], Norm),
        ("ffn_down", "mlp.down_proj", vec![hidden, ff], Ternary),
    ];
    if let Some((path, name)) = checkpoint.find_suffix(".weight_scale") {
        let problem = "packed ternary weights are not supported yet; convert the checkpoint with the bf16 master weights";
        return Err(ConvertError::checkpoint(path, format!("tensor {name:?}"), problem));
    }
    let mut parts = Vec::new();
    let mut add = |name: String, hf: &str, shape: &[u64], kind| {
        let tensor = checkpoint.tensor(hf, shape)?;
        if kind == Ternary && !tensor.elements().is_multiple_of(pack::BLOCK as u64) {
            let problem = format!("{} weights do not fill the blocks of 128 of I2_S", tensor.elements());
            return Err(ConvertError::checkpoint(tensor.path, format!("tensor {hf:?}"), problem));
        }
        parts.push(Part { name, tensor, kind });
        Ok(())
    };
    add("token_embd.weight".into(), "model.embed_tokens.weight", &[config.vocab_size, hidden], Embedding)?;
    for i in 0..config.n_layers {
        for (name, hf, shape, kind) in &layer {
            add(format!("blk.{i}.{name}.weight"), &format!("model.layers.{i}.{hf}.weight"), shape, *kind)?;
        }
    }
    add("output_norm.weight".into(), "model.norm.weight", &[hidden], Norm)?;
    if !config.tied {
        add("output.weight".into(), "lm_head.weight", &[config.vocab_size, hidden], Embedding)?;
    }
    for (path, name) in checkpoint.names() {
        if parts.iter().any(|part| part.tensor.name == name) {
            continue;
        }
        if name == "lm_head.weight" {
            notices.push(
                "lm_head.weight is left out: the configuration ties the head to the embedding".to_owned(),
            );
        } else if !name.ends_with(".rotary_emb.inv_freq") {
            let problem = "not expected in a BitNet of this configuration";
            return Err(ConvertError::checkpoint(path, format!("tensor {name:?}"), problem));
        }
    }
    Ok(parts)
}

/// One conversion at work.
struct Run<'a> {
    progress: &'a mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
    done: u64,
    total: u64,
    notices: Vec<String>,
}

impl Run<'_> {
    /// Hands over all values of a tensor, which are finite, in pieces of a multiple of 128 until the last.
    fn read(
        &mut self,
        tensor: &Tensor<'_>,
        mut take: impl FnMut(&[f32]) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        tensor.read(|piece, bytes| {
            take(piece)?;
            self.done += bytes;
            match (self.progress)(Progress { tensor: tensor.name, done: self.done, total: self.total }) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(ConvertError::Cancelled),
            }
        })
    }

    fn embedding_type(&mut self, tensor: &Tensor<'_>, head: HeadType) -> Result<TensorType, ConvertError> {
        Ok(match head {
            HeadType::F16 => TensorType::F16,
            HeadType::Bf16 => TensorType::BF16,
            HeadType::F32 => TensorType::F32,
            HeadType::Auto => {
                let (mut f16, mut bf16) = (true, true);
                self.read(tensor, |piece| {
                    f16 &= piece.iter().all(|&x| half::f16::from_f32(x).to_f32() == x);
                    bf16 &= piece.iter().all(|&x| half::bf16::from_f32(x).to_f32() == x);
                    Ok(())
                })?;
                match (f16, bf16) {
                    (true, _) => TensorType::F16,
                    (_, true) => TensorType::BF16,
                    _ => TensorType::F32,
                }
            }
        })
    }

    fn write_floats(
        &mut self,
        tensor: &Tensor<'_>,
        ty: TensorType,
        sink: &mut Sink<'_>,
    ) -> Result<(), ConvertError> {
        let (mut index, mut rounded) = (0, 0u64);
        self.read(tensor, |piece| {
            let mut bytes = Vec::with_capacity(4 * piece.len());
            for &x in piece {
                let stored = match ty {
                    TensorType::F16 => {
                        let stored = half::f16::from_f32(x);
                        bytes.extend(stored.to_le_bytes());
                        stored.to_f32()
                    }
                    TensorType::BF16 => {
                        let stored = half::bf16::from_f32(x);
                        bytes.extend(stored.to_le_bytes());
                        stored.to_f32()
                    }
                    _ => {
                        bytes.extend(x.to_le_bytes());
                        x
                    }
                };
                if stored.is_infinite() {
                    return Err(tensor.error_at(index, format!("{x} is too large for {ty}")));
                }
                rounded += u64::from(stored != x);
                index += 1;
            }
            sink.write(&bytes)
        })?;
        if rounded > 0 {
            let of = tensor.elements();
            self.notices.push(format!("{}: {rounded} of {of} values were rounded to {ty}", tensor.name));
        }
        Ok(())
    }

    /// Returns the number of zeros.
    fn write_ternary(&mut self, tensor: &Tensor<'_>, sink: &mut Sink<'_>) -> Result<u64, ConvertError> {
        let mut sum = 0.0;
        self.read(tensor, |piece| {
            sum = piece.iter().fold(sum, |sum, &w| sum + f64::from(w.abs()));
            Ok(())
        })?;
        let mean = ((sum / tensor.elements() as f64) as f32).max(1e-5);
        let scale = 1.0 / mean;
        let mut zeros = 0;
        self.read(tensor, |piece| {
            // Rounding half to even and clamping leaves ±1 exactly where a half is exceeded.
            let trits: Vec<i8> =
                piece.iter().map(|&w| i8::from(w * scale > 0.5) - i8::from(w * scale < -0.5)).collect();
            zeros += trits.iter().filter(|&&trit| trit == 0).count() as u64;
            let codes = pack::pack_i2s(&trits).map_err(|e| tensor.error(e.to_string()))?;
            sink.write(&codes)
        })?;
        sink.write(&pack::tail(1.0 / scale))?;
        Ok(zeros)
    }
}

/// The data of the file to be.
struct Sink<'a> {
    data: &'a mut TensorWriter<AtomicFile>,
    out: &'a Path,
}

impl Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), ConvertError> {
        self.data.write_all(bytes).map_err(|e| ConvertError::io(self.out, "write", e))
    }
}
