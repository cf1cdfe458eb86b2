//! Conversion of models to GGUF files, tensor by tensor: [`convert`].
//!
//! From a Hugging Face checkpoint the seven projections of each layer become ternary as in transformers' `WeightQuant`
//! (`integrations/bitnet.py`): with m = mean |W|, at least 1e-5, and s = 1 / m, a weight is clamp(round_half_even(W s), -1, 1),
//! and the scale in the file is 1 / s, what HF multiplies the weights with. All in float32, but the mean is summed in
//! float64. Packed checkpoints keep their weights and their scale, or its inverse where `BitLinear` divides by it. The
//! norms become float32. The checkpoints are those of `BitNetForCausalLM`, of `LlamaForCausalLM` with BitNet's quantisation, and of
//! the `BitnetForCausalLM` of 1bitLLM, which is the former with other names for the sub-norms. From a GGUF file everything but the types that were asked for is copied.
//!
//! Nothing is held in memory but a piece of one tensor and the vocabulary, and the same input gives the same bytes. The
//! file is read again before it gets its name: its weights and everything else must be those that were to be written.

mod checkpoint;
mod config;
mod gguf;
mod hf;
mod output;
mod vocab;

use std::io;
use std::ops::ControlFlow;
use std::path::Path;

use bitnet_gguf::TensorType;

use crate::text::TokenizerError;

pub use output::Trits;

/// How ternary matrices are stored.
#[allow(non_camel_case_types)] // the names are ggml's
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TernaryType {
    /// 2 bits a weight and one float32 scale a matrix: bitnet.cpp's.
    #[default]
    I2_S,
    /// 1.69 bits a weight: llama.cpp's.
    TQ1_0,
    /// 2.06 bits a weight: llama.cpp's.
    TQ2_0,
    /// 1.63 bits a weight: ik_llama.cpp's.
    IQ1_BN,
    /// 2 bits a weight: ik_llama.cpp's.
    IQ2_BN,
    /// Each weight times the scale in half precision, for programs without ternary types.
    F16,
    /// The same in bfloat16.
    BF16,
}

impl TernaryType {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::I2_S, Self::TQ1_0, Self::TQ2_0, Self::IQ1_BN, Self::IQ2_BN, Self::F16, Self::BF16];

    /// The name in lower case, the type in the file, and `general.file_type` of a model of this type, as the programs that
    /// the types come from number them.
    fn row(self) -> (&'static str, TensorType, u32) {
        match self {
            Self::I2_S => ("i2_s", TensorType::I2S, 40),
            Self::TQ1_0 => ("tq1_0", TensorType::TQ1_0, 36),
            Self::TQ2_0 => ("tq2_0", TensorType::TQ2_0, 37),
            Self::IQ1_BN => ("iq1_bn", TensorType::IQ1BN, 136),
            Self::IQ2_BN => ("iq2_bn", TensorType::IQ2BN, 137),
            Self::F16 => ("f16", TensorType::F16, 1),
            Self::BF16 => ("bf16", TensorType::BF16, 32),
        }
    }

    /// ggml's name in lower case.
    pub fn name(self) -> &'static str {
        self.row().0
    }

    /// The type in the file.
    pub fn tensor_type(self) -> TensorType {
        self.row().1
    }
}

/// How the embedding, and the head where it has weights of its own, is stored.
#[allow(non_camel_case_types)] // the names are ggml's
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HeadType {
    /// As it is in a GGUF file; of a checkpoint the first of F16, BF16 and F32 that holds every value exactly.
    #[default]
    Auto,
    /// IEEE half precision, rounded to nearest even.
    F16,
    /// bfloat16, rounded to nearest even.
    Bf16,
    /// Single precision.
    F32,
    /// 8.5 bits a value.
    Q8_0,
    /// 6.6 bits a value.
    Q6_K,
}

impl HeadType {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Auto, Self::F16, Self::Bf16, Self::F32, Self::Q8_0, Self::Q6_K];

    /// `auto`, or ggml's name in lower case.
    pub fn name(self) -> &'static str {
        ["auto", "f16", "bf16", "f32", "q8_0", "q6_k"][self as usize]
    }

    /// The type in the file; None for [`Auto`](Self::Auto).
    fn tensor_type(self) -> Option<TensorType> {
        use TensorType::{BF16, F16, F32, Q6_K, Q8_0};
        [None, Some(F16), Some(BF16), Some(F32), Some(Q8_0), Some(Q6_K)][self as usize]
    }
}

/// What a conversion makes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// How ternary matrices are stored.
    pub ternary: TernaryType,
    /// How embedding and head are stored.
    pub head: HeadType,
}

/// How far a conversion is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The tensor being read, as the input names it.
    pub tensor: &'a str,
    /// Bytes read so far. Most tensors are read twice, and then once more to verify them.
    pub done: u64,
    /// Bytes to be read in all.
    pub total: u64,
}

/// What a conversion made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// `general.architecture` of the file.
    pub architecture: String,
    /// Number of tensors.
    pub tensors: usize,
    /// Number of ternary weights.
    pub ternary_weights: u64,
    /// How many of them are zero.
    pub zero_weights: u64,
    /// How the embedding is stored.
    pub embedding: TensorType,
    /// Hash of all ternary weights, whatever their type: see [`Trits`]. The input and the file that was written have
    /// the same.
    pub trits: String,
    /// What a person should know, a line each: something left out or rounded.
    pub notices: Vec<String>,
}

/// Why a model was not converted. Every message is one line.
#[allow(missing_docs)] // the names and messages of the fields say it all
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The system refused something.
    #[error("{file}: cannot {action}: {error}")]
    Io { file: String, action: &'static str, error: io::Error },
    /// The input is broken, or not one that can be converted; the fault is in the file.
    #[error("{file}: {thing}: {problem}")]
    Checkpoint { file: String, thing: String, problem: String },
    /// The vocabulary is broken, or needs another tokenizer.
    #[error("{file}: {error}")]
    Tokenizer { file: String, error: TokenizerError },
    /// The caller's `progress` ended it.
    #[error("cancelled")]
    Cancelled,
    /// The GGUF file cannot be read or written.
    #[error(transparent)]
    Gguf(#[from] bitnet_gguf::Error),
    /// What was written does not read as it should; the fault is the disk's or the program's.
    #[error("{file}: tensor {tensor:?} does not read as it was written; the file was thrown away")]
    Verify { file: String, tensor: String },
}

impl ConvertError {
    fn io(path: &Path, action: &'static str, error: io::Error) -> Self {
        Self::Io { file: path.display().to_string(), action, error }
    }

    fn checkpoint(path: &Path, thing: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Checkpoint { file: path.display().to_string(), thing: thing.into(), problem: problem.into() }
    }
}

/// Converts a GGUF file, or the checkpoint in a folder (config.json, model.safetensors or its shards with
/// model.safetensors.index.json, and optionally tokenizer.json and tokenizer_config.json), to the file `out`, which appears
/// only when it is complete and verified.
///
/// `progress` is called after each piece of a tensor and may end the conversion.
///
/// # Errors
/// The first thing that is wrong, with file, key or tensor, and what was expected, or [`ConvertError::Cancelled`]; then nothing
/// is left behind.
pub fn convert(
    input: &Path,
    out: &Path,
    options: Options,
    progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
) -> Result<Report, ConvertError> {
    if input.is_dir() {
        hf::to_gguf(input, out, options, progress)
    } else {
        gguf::to_gguf(input, out, options, progress)
    }
}

type Result<T, E = ConvertError> = std::result::Result<T, E>;

/// Is told how far a conversion is, and may end it.
type Tell<'a> = dyn FnMut(Progress<'_>) -> ControlFlow<()> + 'a;

/// Counts the bytes that are read, and tells; the answer may end the conversion.
struct Meter<'a> {
    progress: &'a mut Tell<'a>,
    done: u64,
    total: u64,
}

impl Meter<'_> {
    fn read(&mut self, tensor: &str, bytes: u64) -> Result<()> {
        self.done += bytes;
        match (self.progress)(Progress { tensor, done: self.done, total: self.total }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(ConvertError::Cancelled),
        }
    }
}
