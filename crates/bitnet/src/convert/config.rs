//! config.json of a ternary model in Hugging Face's format, as GGUF metadata.

use std::ops::RangeInclusive;
use std::path::Path;

use bitnet_gguf::{Value, Writer};
use bitnet_kernels::math::{exp64, ln64};
use serde_json::Value as Json;

use super::checkpoint::read_json;
use super::{ConvertError, Result};
use crate::model::config::LLAMA;
use crate::model::stored::Pairs;

/// The shape and the constants of the model, within the range of GGUF's u32 keys and consistent.
pub(super) struct HfConfig {
    pub(super) family: Family,
    /// What a packed checkpoint's scales mean; None for master weights.
    pub(super) packed: Option<ScaleDirection>,
    relu2: bool,
    pub(super) vocab_size: u64,
    context_length: u64,
    pub(super) hidden_size: u64,
    pub(super) n_layers: u64,
    pub(super) intermediate_size: u64,
    pub(super) n_heads: u64,
    pub(super) n_kv_heads: u64,
    pub(super) head_dim: u64,
    rms_norm_eps: f32,
    rope_theta: f32,
    rope_scaling: RopeScaling,
    /// Whether the head is the embedding.
    pub(super) tied: bool,
    bos: Option<u32>,
    eos: Option<u32>,
    padding: Option<u32>,
}

/// The class that a checkpoint is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// `BitNetForCausalLM` of transformers.
    BitNet,
    /// `BitnetForCausalLM` of 1bitLLM/bitnet_b1_58-3B, modeling_bitnet.py: the same with SiLU and other names.
    OneBitLlm,
    /// `LlamaForCausalLM`: no sub-norms.
    Llama,
}

enum RopeScaling {
    None,
    Linear(f32),
    Llama3 { factor: f64, low: f64, high: f64, original: f64 },
}

/// What is done with `weight_scale`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ScaleDirection {
    /// The product is multiplied by it: `AutoBitLinear`.
    Multiply,
    /// The product is divided by it: `BitLinear`.
    Divide,
}

const SIZE: RangeInclusive<u64> = 1..=1 << 24;

/// Reads and words errors for one file.
struct Keys<'a> {
    path: &'a Path,
    json: Json,
}

impl Keys<'_> {
    /// The value at a path of keys joined by dots; null if absent.
    fn get(&self, key: &str) -> &Json {
        key.split('.').fold(&self.json, |json, part| &json[part])
    }

    fn error(&self, key: &str, expected: impl std::fmt::Display) -> ConvertError {
        let found = match self.get(key) {
            Json::Null => "nothing".to_owned(),
            json => json.to_string(),
        };
        let problem = format!("expected {expected}, found {found}");
        ConvertError::checkpoint(self.path, format!("key {key:?}"), problem)
    }

    /// Fails unless the value is null or one of these.
    fn only(&self, key: &str, allowed: &[Json]) -> Result<()> {
        match self.get(key) {
            Json::Null => Ok(()),
            json if allowed.contains(json) => Ok(()),
            _ => Err(self.error(key, Json::from(allowed))),
        }
    }

    fn size(&self, key: &str) -> Result<u64> {
        let size = self.get(key).as_u64().filter(|n| SIZE.contains(n));
        size.ok_or_else(|| {
            self.error(key, format_args!("an integer from {} to {}", SIZE.start(), SIZE.end()))
        })
    }

    fn float(&self, key: &str, range: RangeInclusive<f64>) -> Result<f32> {
        let float = self.get(key).as_f64().filter(|x| range.contains(x)).map(|x| x as f32);
        float.ok_or_else(|| {
            self.error(key, format_args!("a number from {} to {}", range.start(), range.end()))
        })
    }

    /// A token id, or the first of a list of them.
    fn token(&self, key: &str, vocab_size: u64) -> Result<Option<u32>> {
        let json = match self.get(key) {
            Json::Null => return Ok(None),
            Json::Array(ids) => ids.first().unwrap_or(&Json::Null),
            json => json,
        };
        let id = json.as_u64().filter(|&id| id < vocab_size).map(|id| id as u32);
        id.map(Some).ok_or_else(|| self.error(key, format_args!("a token id below {vocab_size}")))
    }
}

/// `rope_scaling`, which is part of `rope_parameters` since transformers 5.
fn rope_scaling(keys: &Keys<'_>) -> Result<RopeScaling> {
    let part = if keys.get("rope_parameters").is_null() { "rope_scaling" } else { "rope_parameters" };
    let key = |name: &str| format!("{part}.{name}");
    let number = |name: &str| keys.float(&key(name), 1e-6..=1e12);
    let kind = ["rope_type", "type"].map(key).into_iter().find(|key| !keys.get(key).is_null());
    let Some(kind) = kind else { return Ok(RopeScaling::None) };
    match keys.get(&kind).as_str() {
        Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear(number("factor")?)),
        Some("llama3") => {
            let [factor, low, high, original] =
                ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
                    .map(|name| number(name).map(f64::from));
            let (factor, low, high, original) = (factor?, low?, high?, original?);
            if high <= low {
                return Err(keys.error(&key("high_freq_factor"), format_args!("more than {low}")));
            }
            Ok(RopeScaling::Llama3 { factor, low, high, original })
        }
        _ => Err(keys.error(&kind, "\"default\", \"linear\" or \"llama3\"")),
    }
}

impl HfConfig {
    /// Reads the file; refuses what is not a BitNet, what is not to be quantised on load, and what HF computes and this
    /// engine does not.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let keys = Keys { path, json: read_json(path)? };
        let family = match keys.get("model_type").as_str() {
            _ if keys.get("architectures") == &Json::from(["BitnetForCausalLM"]) => Family::OneBitLlm,
            Some("bitnet") => Family::BitNet,
            Some("llama") => Family::Llama,
            _ => return Err(keys.error("model_type", "\"bitnet\" or \"llama\"")),
        };
        if family == Family::OneBitLlm {
            keys.only("weight_bits", &[1.into()])?;
            keys.only("input_bits", &[8.into()])?;
        } else if keys.get("quantization_config.quant_method") != "bitnet" {
            return Err(keys.error("quantization_config.quant_method", "\"bitnet\""));
        }
        // What transformers takes where the keys are absent: packed weights and a scale to divide by.
        const MODE: &str = "quantization_config.quantization_mode";
        const CLASS: &str = "quantization_config.linear_class";
        let mode = keys.get(MODE).as_str().unwrap_or("offline");
        let packed = match (mode, keys.get(CLASS).as_str().unwrap_or("bitlinear")) {
            _ if family == Family::OneBitLlm => None,
            ("online", "autobitlinear") => None,
            ("offline", "autobitlinear") => Some(ScaleDirection::Multiply),
            ("offline", "bitlinear") => Some(ScaleDirection::Divide),
            ("online", _) => return Err(keys.error(CLASS, "\"autobitlinear\"")),
            ("offline", _) => return Err(keys.error(CLASS, "\"autobitlinear\" or \"bitlinear\"")),
            _ => return Err(keys.error(MODE, "\"online\" or \"offline\"")),
        };
        keys.only("quantization_config.use_rms_norm", &[false.into()])?;
        // The head is never converted.
        let unconverted = [Json::from(["lm_head"]), Json::Array(Vec::new())];
        keys.only("quantization_config.modules_to_not_convert", &unconverted)?;
        keys.only("attention_bias", &[false.into()])?;
        keys.only("mlp_bias", &[false.into()])?;
        keys.only("rope_parameters.partial_rotary_factor", &[1.into(), 1.0.into()])?;
        keys.only("tie_word_embeddings", &[true.into(), false.into()])?;
        let activations: &[Json] = match family {
            Family::BitNet => &["relu2".into(), "silu".into()],
            _ => &["silu".into()],
        };
        keys.only("hidden_act", activations)?;

        let (hidden_size, n_heads) = (keys.size("hidden_size")?, keys.size("num_attention_heads")?);
        let n_kv_heads = match keys.get("num_key_value_heads") {
            Json::Null => n_heads,
            _ => keys.size("num_key_value_heads")?,
        };
        if !n_heads.is_multiple_of(n_kv_heads) {
            return Err(keys.error("num_key_value_heads", format_args!("a divisor of {n_heads} heads")));
        }
        let head_dim = match keys.get("head_dim") {
            Json::Null if hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
            Json::Null => {
                let expected = format_args!("a divisor of hidden_size {hidden_size}");
                return Err(keys.error("num_attention_heads", expected));
            }
            _ => keys.size("head_dim")?,
        };
        if !head_dim.is_multiple_of(2) {
            let problem = format!("expected an even number for RoPE, found {head_dim}");
            return Err(ConvertError::checkpoint(path, "head dimension", problem));
        }
        // The place changed with transformers 5.
        let theta =
            ["rope_parameters.rope_theta", "rope_theta"].into_iter().find(|key| !keys.get(key).is_null());
        let vocab_size = keys.size("vocab_size")?;
        Ok(Self {
            family,
            packed,
            relu2: family == Family::BitNet && keys.get("hidden_act") != "silu",
            vocab_size,
            context_length: keys.size("max_position_embeddings")?,
            hidden_size,
            n_layers: keys.size("num_hidden_layers")?,
            intermediate_size: keys.size("intermediate_size")?,
            n_heads,
            n_kv_heads,
            head_dim,
            rms_norm_eps: keys.float("rms_norm_eps", 1e-12..=0.1)?,
            rope_theta: match theta {
                Some(key) => keys.float(key, 1.0..=1e12)?,
                None if family == Family::BitNet => 500_000.0,
                None => 10_000.0,
            },
            rope_scaling: rope_scaling(&keys)?,
            tied: keys.get("tie_word_embeddings") == true,
            bos: keys.token("bos_token_id", vocab_size)?,
            eos: keys.token("eos_token_id", vocab_size)?,
            padding: keys.token("pad_token_id", vocab_size)?,
        })
    }

    /// The name of the architecture, which tells other programs the activation.
    pub(super) fn architecture(&self) -> &'static str {
        match self.family {
            Family::Llama => LLAMA,
            _ if self.relu2 => "bitnet-b1.58",
            _ => "bitnet",
        }
    }

    /// The order of the rows of the query and key projections in the file, where it is another than the checkpoint's.
    pub(super) fn pairs(&self) -> Option<Pairs> {
        let head_dim = self.head_dim as usize;
        (self.family == Family::Llama).then_some(Pairs { head_dim, rope_dim: head_dim })
    }

    /// The divisors of the RoPE frequencies, as llama.cpp keeps them: the frequencies of transformers'
    /// `_compute_llama3_parameters` (modeling_rope_utils.py) divide the unscaled ones by them.
    pub(super) fn rope_factors(&self) -> Option<Vec<f32>> {
        let RopeScaling::Llama3 { factor, low, high, original } = self.rope_scaling else { return None };
        let ln_theta = ln64(f64::from(self.rope_theta));
        let factors = (0..self.head_dim / 2).map(|i| {
            let wavelength = std::f64::consts::TAU * exp64(ln_theta * (2 * i) as f64 / self.head_dim as f64);
            // How often the wave fits in the context of the first training.
            let turns = original / wavelength;
            let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
        });
        Some(factors.collect())
    }

    pub(super) fn write(&self, writer: &mut Writer, name: Option<&str>, file_type: u32) -> Result<()> {
        let arch = self.architecture();
        writer.meta("general.architecture", Value::Str(arch))?;
        if let Some(name) = name {
            writer.meta("general.name", Value::Str(name))?;
        }
        writer.meta("general.file_type", Value::U32(file_type))?;
        let mut key = |suffix: &str, value| writer.meta(&format!("{arch}.{suffix}"), value);
        // Every size was checked to fit.
        let int = |n: u64| Value::U32(n as u32);
        key("vocab_size", int(self.vocab_size))?;
        key("context_length", int(self.context_length))?;
        key("embedding_length", int(self.hidden_size))?;
        key("block_count", int(self.n_layers))?;
        key("feed_forward_length", int(self.intermediate_size))?;
        key("attention.head_count", int(self.n_heads))?;
        key("attention.head_count_kv", int(self.n_kv_heads))?;
        if self.head_dim * self.n_heads != self.hidden_size {
            key("attention.key_length", int(self.head_dim))?;
            key("attention.value_length", int(self.head_dim))?;
        }
        key("attention.layer_norm_rms_epsilon", Value::F32(self.rms_norm_eps))?;
        key("rope.dimension_count", int(self.head_dim))?;
        key("rope.freq_base", Value::F32(self.rope_theta))?;
        if let RopeScaling::Linear(factor) = self.rope_scaling {
            key("rope.scaling.type", Value::Str("linear"))?;
            key("rope.scaling.factor", Value::F32(factor))?;
        }
        key("hidden_act", Value::Str(if self.relu2 { "relu2" } else { "silu" }))?;
        for (which, id) in [("bos", self.bos), ("eos", self.eos), ("padding", self.padding)] {
            if let Some(id) = id {
                writer.meta(&format!("tokenizer.ggml.{which}_token_id"), Value::U32(id))?;
            }
        }
        Ok(())
    }
}
