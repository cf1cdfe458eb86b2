//! What a model is, read from the metadata of its file.

use super::stored::floats;
use crate::Error;
use bitnet_gguf::{Gguf, TensorInfo, TensorType};
use bitnet_kernels::{Activation, KvShape, KvType, TernaryMatrix};

/// The shape and the constants of a model. An existing `Config` is consistent: the forward pass checks nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `general.architecture`: `bitnet-b1.58`, `bitnet-25`, `bitnet` or `llama`.
    pub architecture: String,
    /// `general.name`, if there is one.
    pub name: Option<String>,
    /// Tokens in the vocabulary: rows of the embedding.
    pub vocab_size: usize,
    /// Tokens the model was trained to see.
    pub context_length: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Transformer blocks.
    pub n_layers: usize,
    /// Width of the feed-forward block.
    pub intermediate_size: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Elements of a head that RoPE rotates, even and at most `head_dim`.
    pub rope_dim: usize,
    /// Base of the RoPE frequencies.
    pub rope_theta: f32,
    /// Divisors of the RoPE frequencies, `rope_dim / 2`, where they are scaled as in Llama 3.1; else none.
    pub rope_factors: Vec<f32>,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f32,
    /// Activation between gate and up.
    pub activation: Activation,
    /// Whether a norm precedes the output and the down projections.
    pub sub_norms: bool,
}

/// Ternary models of the shape of Llama: Llama3-8B-1.58, Falcon3-1.58bit, Falcon-E.
pub(crate) const LLAMA: &str = "llama";

/// Something the file says wrongly or not at all, and what was done about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repair {
    /// Stable name: `activation`, `pre_tokenizer`, `chat_template`, `end_of_turn`.
    pub name: &'static str,
    /// One line for a person.
    pub message: String,
}

/// An error of a tensor of a file.
pub(crate) fn bad_tensor(gguf: &Gguf, tensor: &TensorInfo, problem: impl Into<String>) -> Error {
    let thing = format!("tensor {:?} at byte {}", tensor.name, tensor.offset);
    Error::Model { file: gguf.name().to_owned(), thing, problem: problem.into() }
}

/// Reads keys and words errors for one file.
pub(crate) struct Keys<'a> {
    pub(crate) gguf: &'a Gguf,
    pub(crate) arch: String,
}

impl Keys<'_> {
    pub(crate) fn error(&self, thing: impl Into<String>, problem: impl Into<String>) -> Error {
        Error::Model { file: self.gguf.name().to_owned(), thing: thing.into(), problem: problem.into() }
    }

    fn key(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.arch)
    }

    /// An error of a key of the architecture.
    fn bad(&self, suffix: &str, problem: impl Into<String>) -> Error {
        self.error(format!("key {:?}", self.key(suffix)), problem)
    }

    fn optional(&self, suffix: &str, range: std::ops::RangeInclusive<u64>) -> Result<Option<usize>, Error> {
        match self.gguf.get_u64(&self.key(suffix))? {
            Some(n) if range.contains(&n) => Ok(Some(n as usize)),
            Some(n) => {
                Err(self.bad(suffix, format!("expected {} to {}, found {n}", range.start(), range.end())))
            }
            None => Ok(None),
        }
    }

    fn required(&self, suffix: &str, range: std::ops::RangeInclusive<u64>) -> Result<usize, Error> {
        let missing = || self.bad(suffix, "missing: the file does not say how to run it");
        self.optional(suffix, range)?.ok_or_else(missing)
    }

    fn float(&self, suffix: &str, ok: impl Fn(f32) -> bool) -> Result<Option<f32>, Error> {
        match self.gguf.get_f32(&self.key(suffix))? {
            Some(x) if x.is_finite() && ok(x) => Ok(Some(x)),
            Some(x) => Err(self.bad(suffix, format!("{x} is out of range"))),
            None => Ok(None),
        }
    }
}

/// The tensor `name`, or the error that says it is missing.
pub(crate) fn require<'a>(keys: &Keys<'a>, name: &str) -> Result<&'a TensorInfo, Error> {
    let missing = || format!("missing (the file lists {})", keys.gguf.tensors().len());
    keys.gguf.tensor(name).ok_or_else(|| keys.error(format!("tensor {name:?}"), missing()))
}

/// The tensor that llama.cpp keeps the divisors of Llama 3.1 in, times the one factor of linear scaling.
fn rope_factors(keys: &Keys<'_>, rope_dim: usize) -> Result<Vec<f32>, Error> {
    let kind = keys.gguf.get_str(&keys.key("rope.scaling.type"))?.unwrap_or("linear");
    if !["none", "linear"].contains(&kind) {
        let problem = format!("expected \"none\" or \"linear\", found {kind:?}");
        return Err(keys.bad("rope.scaling.type", problem));
    }
    let factor = keys.float("rope.scaling.factor", |x| x > 0.0)?.filter(|_| kind == "linear").unwrap_or(1.0);
    let Some(tensor) = keys.gguf.tensor("rope_freqs.weight") else {
        return Ok(if factor == 1.0 { Vec::new() } else { vec![factor; rope_dim / 2] });
    };
    let factors: Vec<f32> = floats(keys.gguf, tensor).map(|x| x * factor).collect();
    let good = factors.iter().all(|x| x.is_finite() && *x > 0.0);
    if tensor.ty == TensorType::F32 && factors.len() == rope_dim / 2 && good {
        return Ok(factors);
    }
    Err(bad_tensor(keys.gguf, tensor, format!("expected {} factors above 0 in F32", rope_dim / 2)))
}

impl Config {
    /// Reads the configuration. What the file leaves out and the architecture determines is filled in and noted in
    /// `repairs`.
    ///
    /// # Errors
    /// [`Error::Model`] names the key that is missing, out of range or at odds with another.
    pub fn from_gguf(gguf: &Gguf, repairs: &mut Vec<Repair>) -> Result<Self, Error> {
        let arch = gguf.get_str("general.architecture")?.unwrap_or_default().to_owned();
        let keys = Keys { gguf, arch: arch.clone() };
        let by_arch = match arch.as_str() {
            "bitnet-b1.58" | "bitnet-25" => Activation::Relu2,
            "bitnet" | LLAMA => Activation::Silu,
            other => {
                let problem = format!(
                    "expected \"bitnet-b1.58\", \"bitnet-25\", \"bitnet\" or \"llama\", found {other:?}"
                );
                return Err(keys.error("key \"general.architecture\"", problem));
            }
        };
        const WIDTH: std::ops::RangeInclusive<u64> = 1..=TernaryMatrix::MAX_COLUMNS as u64;
        let hidden_size = keys.required("embedding_length", WIDTH)?;
        let n_heads = keys.required("attention.head_count", 1..=1 << 16)?;
        let n_kv_heads = keys.optional("attention.head_count_kv", 1..=1 << 16)?.unwrap_or(n_heads);
        let head_dim = match keys.optional("attention.key_length", 2..=1 << 16)? {
            Some(n) => n,
            None if hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
            None => {
                let problem = format!("{n_heads} heads do not divide a width of {hidden_size}");
                return Err(keys.bad("attention.head_count", problem));
            }
        };
        if !n_heads.is_multiple_of(n_kv_heads) {
            let problem = format!("{n_kv_heads} key/value heads do not divide {n_heads} heads");
            return Err(keys.bad("attention.head_count_kv", problem));
        }
        if keys.optional("attention.value_length", 2..=1 << 16)?.is_some_and(|n| n != head_dim) {
            return Err(keys.bad("attention.value_length", format!("expected the key length {head_dim}")));
        }
        if head_dim * n_heads > TernaryMatrix::MAX_COLUMNS {
            let problem =
                format!("{n_heads} heads of {head_dim} are wider than {}", TernaryMatrix::MAX_COLUMNS);
            return Err(keys.bad("attention.key_length", problem));
        }
        let rope_dim = keys.optional("rope.dimension_count", 2..=head_dim as u64)?.unwrap_or(head_dim);
        if !rope_dim.is_multiple_of(2) {
            return Err(keys.bad("rope.dimension_count", format!("expected even, found {rope_dim}")));
        }
        let embedding = require(&keys, "token_embd.weight")?;
        let rows = embedding.dims.get(1).copied().unwrap_or(0);
        let vocab_size = match keys.optional("vocab_size", 1..=1 << 24)? {
            Some(n) => n,
            None if (1..=1 << 24).contains(&rows) => rows as usize,
            None => return Err(bad_tensor(keys.gguf, embedding, format!("{rows} rows are no vocabulary"))),
        };
        let activation = match gguf.get_str(&keys.key("hidden_act"))? {
            Some("relu2") => Activation::Relu2,
            Some("silu") => Activation::Silu,
            Some(other) => {
                let problem = format!("expected \"relu2\" or \"silu\", found {other:?}");
                return Err(keys.bad("hidden_act", problem));
            }
            None if arch == LLAMA => by_arch,
            None => {
                let name = if by_arch == Activation::Relu2 { "squared ReLU" } else { "SiLU" };
                let message = format!("no activation in the metadata: {name}, as architecture {arch} has it");
                repairs.push(Repair { name: "activation", message });
                by_arch
            }
        };
        Ok(Self {
            name: gguf.get_str("general.name")?.map(str::to_owned),
            vocab_size,
            context_length: keys.required("context_length", 1..=1 << 24)?,
            hidden_size,
            n_layers: keys.required("block_count", 1..=1 << 12)?,
            intermediate_size: keys.required("feed_forward_length", WIDTH)?,
            n_heads,
            n_kv_heads,
            head_dim,
            rope_dim,
            rope_factors: rope_factors(&keys, rope_dim)?,
            rope_theta: keys.float("rope.freq_base", |x| x >= 1.0)?.unwrap_or(10_000.0),
            rms_norm_eps: keys
                .float("attention.layer_norm_rms_epsilon", |x| x > 0.0 && x < 1.0)?
                .ok_or_else(|| keys.bad("attention.layer_norm_rms_epsilon", "missing"))?,
            activation,
            sub_norms: arch != LLAMA,
            architecture: arch,
        })
    }

    /// The shape of `microsoft/bitnet-b1.58-2B-4T`.
    pub fn bitnet_2b_4t() -> Self {
        Self {
            architecture: "bitnet-b1.58".into(),
            name: Some("2b-4t".into()),
            vocab_size: 128_256,
            context_length: 4096,
            hidden_size: 2560,
            n_layers: 30,
            intermediate_size: 6912,
            n_heads: 20,
            n_kv_heads: 5,
            head_dim: 128,
            rope_dim: 128,
            rope_theta: 500_000.0,
            rope_factors: Vec::new(),
            rms_norm_eps: 1e-5,
            activation: Activation::Relu2,
            sub_norms: true,
        }
    }

    /// Width of all query heads together.
    pub fn q_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_width(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// The shape of the model's cache.
    pub fn kv_shape(&self, ty: KvType) -> KvShape {
        KvShape {
            ty,
            layers: self.n_layers,
            heads: self.n_kv_heads,
            query_heads: self.n_heads,
            head_dim: self.head_dim,
        }
    }
}
