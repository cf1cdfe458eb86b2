//! A Hugging Face checkpoint as a GGUF file.

use std::path::Path;

use bitnet_gguf::{TensorType, Value, Writer};
use bitnet_kernels::half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};

use super::checkpoint::{Checkpoint, Tensor};
use super::config::{Family, HfConfig, ScaleDirection};
use super::gguf::{fits, write_scales};
use super::output::{Output, decode, encode};
use super::vocab::HfTokenizer;
use super::{ConvertError, HeadType, Meter, Options, Report, Result, Tell};
use crate::model::stored::{Pairs, misfit};

pub(super) fn to_gguf(dir: &Path, out: &Path, options: Options, progress: &mut Tell<'_>) -> Result<Report> {
    if !dir.join("config.json").exists() {
        let expected =
            "expected config.json, model.safetensors (or its parts and their index) and tokenizer.json";
        return Err(ConvertError::checkpoint(dir, "no model in this folder", expected));
    }
    let config = HfConfig::read(&dir.join("config.json"))?;
    let tokenizer = HfTokenizer::read(dir, &config)?;
    let checkpoint = Checkpoint::open(dir)?;
    let mut notices = Vec::new();
    if tokenizer.is_none() {
        notices.push("no tokenizer: the file will have no vocabulary".to_owned());
    }
    let mut parts = parts(dir, &config, &checkpoint, &mut notices)?;
    let ternary = options.ternary.tensor_type();

    // The type of an embedding, and so the length of the file, may depend on its values.
    let passes = |part: &Part<'_>| match part.kind {
        Kind::Norm => 1,
        Kind::Embedding if options.head == HeadType::Auto => 2,
        Kind::Embedding => 1,
        Kind::Master { .. } => 2,
        Kind::Packed { .. } => 4,
    };
    let total = parts.iter().map(|part| part.tensor.byte_len * passes(part)).sum();
    let mut run = Run { meter: Meter { progress, done: 0, total }, notices };
    for part in &mut parts {
        part.ty = match &mut part.kind {
            Kind::Norm => TensorType::F32,
            Kind::Embedding => run.embedding_type(&part.tensor, options.head)?,
            Kind::Master { inverse } => {
                *inverse = run.inverse_scale(&part.tensor)?;
                ternary
            }
            Kind::Packed { .. } => ternary,
        };
        // Verifying reads what is written.
        run.meter.total += part.ty.byte_len(&part.dims()).unwrap_or(0);
    }

    let mut writer = Writer::new(out);
    let name = std::path::absolute(dir).map_err(|e| ConvertError::io(dir, "open", e))?;
    // In the hub's cache a folder is called by its commit; the one of the repository is models--OWNER--NAME.
    let cached = name
        .iter()
        .rev()
        .nth(2)
        .and_then(|folder| folder.to_str()?.strip_prefix("models--")?.split_once("--"));
    let folder = name.file_name().map(|name| name.to_string_lossy().into_owned());
    let name = cached.map(|(_, name)| name.to_owned()).or(folder);
    config.write(&mut writer, name.as_deref(), options.ternary.row().2)?;
    if let Some(tokenizer) = &tokenizer {
        tokenizer.write(&mut writer)?;
    }
    writer.meta("general.quantization_version", Value::U32(2))?;
    let scales: Vec<f32> = parts.iter().filter_map(Part::scale).collect();
    write_scales(dir, &mut writer, ternary, &scales)?;
    for part in &parts {
        if part.scale().is_some()
            && let Some(problem) = misfit(&part.dims(), part.ty)
        {
            return Err(part.tensor.error(problem));
        }
        writer.tensor(&part.name, &part.dims(), part.ty)?;
    }
    let rope_factors = config.rope_factors();
    if let Some(factors) = &rope_factors {
        writer.tensor(ROPE_FREQS, &[factors.len() as u64], TensorType::F32)?;
    }

    let mut output = Output::new(writer, out, config.architecture(), parts[0].ty)?;
    for part in &parts {
        match part.scale() {
            None => output.bytes(&part.name, |take| run.floats(&part.tensor, part.ty, take))?,
            Some(scale) => output.ternary(&part.name, part.ty, part.columns(), scale, |take| {
                part.in_order(take, |take| run.trits(part, take))
            })?,
        }
    }
    if let Some(factors) = &rope_factors {
        let bytes: Vec<u8> = factors.iter().flat_map(|factor| factor.to_le_bytes()).collect();
        output.bytes(ROPE_FREQS, |take| take(&bytes))?;
        run.meter.total += bytes.len() as u64;
    }
    output.finish(&mut run.meter, run.notices)
}

/// llama.cpp's name for the divisors of the RoPE frequencies.
const ROPE_FREQS: &str = "rope_freqs.weight";

/// A tensor of the file to be.
struct Part<'a> {
    /// Its name there.
    name: String,
    tensor: Tensor<'a>,
    kind: Kind,
    /// Its type there.
    ty: TensorType,
    /// The order of its rows there.
    pairs: Option<Pairs>,
}

/// Takes the next trits of a tensor.
type Take<'a> = dyn FnMut(&[i8]) -> Result<()> + 'a;

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Norm,
    Embedding,
    /// Master weights, to be multiplied with this and rounded.
    Master {
        inverse: f32,
    },
    /// Ternary weights, four a byte.
    Packed {
        scale: f32,
    },
}

impl Part<'_> {
    /// Fastest dimension first.
    fn dims(&self) -> Vec<u64> {
        let mut dims: Vec<u64> = self.tensor.shape.iter().rev().copied().collect();
        if let (Kind::Packed { .. }, [_, rows]) = (self.kind, &mut dims[..]) {
            *rows *= 4;
        }
        dims
    }

    /// The scale of a ternary matrix.
    fn scale(&self) -> Option<f32> {
        match self.kind {
            Kind::Norm | Kind::Embedding => None,
            Kind::Master { inverse } => Some(1.0 / inverse),
            Kind::Packed { scale } => Some(scale),
        }
    }

    fn columns(&self) -> usize {
        self.tensor.shape.last().map_or(1, |&n| n as usize)
    }

    /// Hands the trits that `read` gives to `take`, in the order of the file.
    fn in_order(&self, take: &mut Take<'_>, read: impl FnOnce(&mut Take<'_>) -> Result<()>) -> Result<()> {
        let Some(pairs) = self.pairs else { return read(take) };
        let mut all = Vec::new();
        read(&mut |trits| {
            all.extend_from_slice(trits);
            Ok(())
        })?;
        let mut ordered = vec![0; all.len()];
        for (r, row) in all.chunks(self.columns()).enumerate() {
            ordered[pairs.row(r) * row.len()..][..row.len()].copy_from_slice(row);
        }
        ordered.chunks(1 << 18).try_for_each(take)
    }
}

/// All tensors in the order of the file, the embedding first; refuses a checkpoint that has fewer or more.
fn parts<'a>(
    dir: &Path,
    config: &HfConfig,
    checkpoint: &'a Checkpoint,
    notices: &mut Vec<String>,
) -> Result<Vec<Part<'a>>> {
    use Kind::{Embedding, Norm, Packed};
    const MASTER: Kind = Kind::Master { inverse: 1.0 };
    let (hidden, ff) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
    let (attn_sub_norm, ffn_sub_norm) = match config.family {
        Family::OneBitLlm => ("self_attn.inner_attn_ln", "mlp.ffn_layernorm"),
        _ => ("self_attn.attn_sub_norm", "mlp.ffn_sub_norm"),
    };
    let layer = [
        ("attn_norm", "input_layernorm", vec![hidden], Norm),
        ("attn_q", "self_attn.q_proj", vec![q, hidden], MASTER),
        ("attn_k", "self_attn.k_proj", vec![kv, hidden], MASTER),
        ("attn_v", "self_attn.v_proj", vec![kv, hidden], MASTER),
        ("attn_sub_norm", attn_sub_norm, vec![q], Norm),
        ("attn_output", "self_attn.o_proj", vec![hidden, q], MASTER),
        ("ffn_norm", "post_attention_layernorm", vec![hidden], Norm),
        ("ffn_gate", "mlp.gate_proj", vec![ff, hidden], MASTER),
        ("ffn_up", "mlp.up_proj", vec![ff, hidden], MASTER),
        ("ffn_sub_norm", ffn_sub_norm, vec![ff], Norm),
        ("ffn_down", "mlp.down_proj", vec![hidden, ff], MASTER),
    ];
    let mut parts = Vec::new();
    let mut scale_names = Vec::new();
    let sub_norms = config.family != Family::Llama;
    let mut add = |name: String, hf: &str, shape: &[u64], kind| {
        let (tensor, kind) = match (kind, config.packed) {
            (Kind::Master { .. }, Some(direction)) => {
                let [rows, columns] = *shape else { unreachable!("matrices have two dimensions") };
                let scale_name = format!("{hf}_scale");
                let scale = checkpoint.scalar(&scale_name)?;
                scale_names.push(scale_name);
                let scale = if direction == ScaleDirection::Divide { 1.0 / scale } else { scale };
                if !rows.is_multiple_of(4) {
                    return Err(ConvertError::checkpoint(
                        dir,
                        format!("tensor {hf:?}"),
                        format!("{rows} rows are not packed by four"),
                    ));
                }
                (checkpoint.tensor(hf, &[rows / 4, columns], true)?, Packed { scale })
            }
            _ => (checkpoint.tensor(hf, shape, false)?, kind),
        };
        let pairs = config.pairs().filter(|_| name.contains("attn_q") || name.contains("attn_k"));
        parts.push(Part { name, tensor, kind, ty: TensorType::F32, pairs });
        Ok(())
    };
    add("token_embd.weight".into(), "model.embed_tokens.weight", &[config.vocab_size, hidden], Embedding)?;
    for i in 0..config.n_layers {
        for (name, hf, shape, kind) in
            layer.iter().filter(|(name, ..)| sub_norms || !name.contains("sub_norm"))
        {
            add(format!("blk.{i}.{name}.weight"), &format!("model.layers.{i}.{hf}.weight"), shape, *kind)?;
        }
    }
    add("output_norm.weight".into(), "model.norm.weight", &[hidden], Norm)?;
    if !config.tied {
        add("output.weight".into(), "lm_head.weight", &[config.vocab_size, hidden], Embedding)?;
    }
    for (path, name) in checkpoint.names() {
        if parts.iter().any(|part| part.tensor.name == name) || scale_names.iter().any(|scale| scale == name)
        {
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
    meter: Meter<'a>,
    notices: Vec<String>,
}

impl Run<'_> {
    /// Hands over all values of a tensor, which are finite, in pieces of a multiple of 256 until the last.
    fn read(&mut self, tensor: &Tensor<'_>, mut take: impl FnMut(&[f32]) -> Result<()>) -> Result<()> {
        tensor.read(|piece, bytes| {
            take(piece)?;
            self.meter.read(tensor.name, bytes)
        })
    }

    fn embedding_type(&mut self, tensor: &Tensor<'_>, head: HeadType) -> Result<TensorType> {
        if let Some(ty) = head.tensor_type() {
            return Ok(ty);
        }
        let (mut f16, mut bf16) = (true, true);
        self.read(tensor, |piece| {
            f16 &= piece.iter().all(|&x| f16_to_f32(f32_to_f16(x)) == x);
            bf16 &= piece.iter().all(|&x| bf16_to_f32(f32_to_bf16(x)) == x);
            Ok(())
        })?;
        Ok(match (f16, bf16) {
            (true, _) => TensorType::F16,
            (_, true) => TensorType::BF16,
            _ => TensorType::F32,
        })
    }

    fn floats(
        &mut self,
        tensor: &Tensor<'_>,
        ty: TensorType,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let (mut index, mut rounded) = (0, 0u64);
        let (mut bytes, mut stored) = (Vec::new(), Vec::new());
        self.read(tensor, |piece| {
            if let Some(bad) = piece.iter().position(|&x| !fits(x, ty)) {
                return Err(
                    tensor.error_at(index + bad as u64, format!("{} is too large for {ty}", piece[bad]))
                );
            }
            bytes.clear();
            encode(ty, piece, &mut bytes);
            decode(ty, &bytes, &mut stored);
            rounded += piece.iter().zip(&stored).filter(|(x, stored)| x != stored).count() as u64;
            index += piece.len() as u64;
            take(&bytes)
        })?;
        if rounded > 0 {
            let of = tensor.elements();
            self.notices.push(format!("{}: {rounded} of {of} values were rounded to {ty}", tensor.name));
        }
        Ok(())
    }

    /// What the master weights are multiplied with to be rounded.
    fn inverse_scale(&mut self, tensor: &Tensor<'_>) -> Result<f32> {
        let mut sum = 0.0;
        self.read(tensor, |piece| {
            sum = piece.iter().fold(sum, |sum, &w| sum + f64::from(w.abs()));
            Ok(())
        })?;
        let mean = ((sum / tensor.elements() as f64) as f32).max(1e-5);
        Ok(1.0 / mean)
    }

    fn trits(&mut self, part: &Part<'_>, take: &mut Take<'_>) -> Result<()> {
        match part.kind {
            Kind::Master { inverse } => self.quantize(&part.tensor, inverse, take),
            _ => self.unpack(&part.tensor, take),
        }
    }

    /// Master weights as trits.
    fn quantize(&mut self, tensor: &Tensor<'_>, inverse: f32, take: &mut Take<'_>) -> Result<()> {
        let mut trits = Vec::new();
        self.read(tensor, |piece| {
            trits.clear();
            // Rounding half to even and clamping leaves ±1 exactly where a half is exceeded.
            trits.extend(piece.iter().map(|&w| i8::from(w * inverse > 0.5) - i8::from(w * inverse < -0.5)));
            take(&trits)
        })
    }

    /// Packed weights, whose four quarters lie in the bits of the same bytes.
    fn unpack(&mut self, tensor: &Tensor<'_>, take: &mut Take<'_>) -> Result<()> {
        let mut trits = Vec::new();
        for quarter in 0..4 {
            let mut index = 0;
            self.read(tensor, |piece| {
                trits.clear();
                trits.extend(piece.iter().map(|&byte| (byte as u8 >> (2 * quarter) & 3) as i8 - 1));
                if let Some(bad) = trits.iter().position(|&trit| trit == 2) {
                    let problem = format!("expected the codes 0, 1 and 2, found 3 in bits {}", 2 * quarter);
                    return Err(tensor.error_at(index + bad as u64, problem));
                }
                index += piece.len() as u64;
                take(&trits)
            })?;
        }
        Ok(())
    }
}
