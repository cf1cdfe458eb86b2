use crate::memory::{self, MemoryArgs};
use crate::{output, source};
use bitnet::gguf::{Gguf, Value};
use bitnet::kernels::ternary::Layout;
use bitnet::kernels::{MemoryPart, allowed_threads};
use bitnet::model::{ModelInfo, Strategy};
use bitnet::{EngineOptions, MemoryPlan};
use serde_json::{Map, json};
use std::fmt::Write;

/// Show what a model file holds and the memory it takes
///
/// Its weights are not read. A file that cannot be run is shown as far as it can be read.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  bitnet inspect model.gguf
  bitnet inspect model.gguf --json")]
pub struct Args {
    /// Path of a GGUF file or a name on the hub [default: the built-in demo]
    #[arg(value_name = "MODEL")]
    name: Option<String>,
    /// The same
    #[arg(short = 'm', long, value_name = "MODEL", conflicts_with = "name")]
    model: Option<String>,
    /// Tokens of context to plan the memory for; 0: as many as the model was trained with
    /// [default: the same, at most 4096]
    #[arg(short = 'c', long, value_name = "CTX", value_parser = source::context_range())]
    ctx_size: Option<u32>,
    #[command(flatten)]
    memory: MemoryArgs,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let gguf = source::open(args.name.as_deref().or(args.model.as_deref()), false)?;
    let info = ModelInfo::new(&gguf, Strategy::default());
    if args.json {
        output::print_json(&as_json(args, &gguf, info.as_ref()))?;
    } else {
        output::print(as_text(args, &gguf, info.as_ref().ok()).as_bytes())?;
    }
    info.map(|_| ()).map_err(Into::into)
}

/// What `bitnet run` takes, and what gave way to the budget; or why it does not run.
fn plan(
    info: &ModelInfo<'_>,
    args: &Args,
    file: &str,
) -> anyhow::Result<(EngineOptions, MemoryPlan, Option<String>)> {
    let context = source::context(args.ctx_size, &info.config);
    let options = EngineOptions {
        context,
        cache_type: args.memory.cache_type(),
        ..EngineOptions::for_model(&info.config)
    };
    let plan = |options: &EngineOptions| info.memory(options, allowed_threads());
    let (options, shrunk) = args.memory.fit(file, options, args.ctx_size.is_none(), plan)?;
    Ok((options, plan(&options), shrunk))
}

/// Tensor type, number of tensors, bytes; in the order of their first use.
fn by_type(gguf: &Gguf) -> Vec<(&'static str, usize, u64)> {
    let mut types: Vec<(&'static str, usize, u64)> = Vec::new();
    for tensor in gguf.tensors() {
        let name = tensor.ty.name();
        let at = types.iter().position(|row| row.0 == name).unwrap_or_else(|| {
            types.push((name, 0, 0));
            types.len() - 1
        });
        types[at].1 += 1;
        types[at].2 += tensor.byte_len;
    }
    types
}

fn as_text(args: &Args, gguf: &Gguf, info: Option<&ModelInfo<'_>>) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "{name:<14} {value}");
    };
    line("file", gguf.name());
    let (version, size) = (gguf.version(), output::bytes(gguf.byte_len()));
    line("format", &format!("GGUF version {version}, {size}, {} keys", gguf.metadata().count()));
    for (name, count, bytes) in by_type(gguf) {
        line("tensors", &format!("{count} {name}, {}", output::bytes(bytes)));
    }
    match info {
        Some(info) => {
            let c = &info.config;
            line("architecture", &c.architecture);
            if let Some(name) = &c.name {
                line("name", &name.escape_debug().to_string());
            }
            line("layers", &c.n_layers.to_string());
            line(
                "width",
                &format!("{}, feed-forward {} ({:?})", c.hidden_size, c.intermediate_size, c.activation),
            );
            line("heads", &format!("{} of {}, key/value {}", c.n_heads, c.head_dim, c.n_kv_heads));
            line("rope", &format!("{} dimensions, base {}", c.rope_dim, c.rope_theta));
            line("vocabulary", &format!("{} tokens", c.vocab_size));
            line("context", &format!("{} tokens in training", c.context_length));
            let token = |id: u32| match token_text(gguf, id) {
                Some(text) => format!("{id} {text:?}"),
                None => id.to_string(),
            };
            if let Some(bos) = info.special.bos {
                let added = if info.special.add_bos { "begins every prompt" } else { "not added to prompts" };
                line("begin of text", &format!("{}, {added}", token(bos)));
            }
            for &id in &info.special.stop {
                line("end of text", &token(id));
            }
            for repair in &info.repairs {
                line("repair", &format!("{}: {}", repair.name, repair.message));
            }
            match plan(info, args, gguf.name()) {
                Ok((options, plan, shrunk)) => {
                    line("memory", &memory::sum(&plan, &options));
                    if let Some(shrunk) = shrunk {
                        line("budget", &shrunk);
                    }
                    // Which layout is faster is only measured where a model is loaded.
                    let base3 = Strategy { rows: Layout::Base3, ..Strategy::default() };
                    if gguf.byte_len() >= source::LARGE_FILE
                        && let Ok(info) = ModelInfo::new(gguf, base3)
                    {
                        let packed = info.memory(&options, allowed_threads());
                        let less = output::bytes(plan.total().saturating_sub(packed.total()) as u64);
                        line(
                            "layout",
                            &format!("{less} less with five weights in a byte, if that is faster here"),
                        );
                    }
                }
                Err(error) => line("memory", &error.to_string()),
            }
        }
        None => {
            for (key, value) in gguf.metadata() {
                line("key", &format!("{}: {}", key.escape_debug(), value_text(&value)));
            }
        }
    }
    for tensor in gguf.tensors().iter().filter(|_| args.tensors) {
        let (name, dims, ty) = (tensor.name.escape_debug(), &tensor.dims, tensor.ty);
        line("tensor", &format!("{name} {dims:?} {ty} at byte {}, {} bytes", tensor.offset, tensor.byte_len));
    }
    text
}

fn as_json(args: &Args, gguf: &Gguf, info: Result<&ModelInfo<'_>, &bitnet::Error>) -> serde_json::Value {
    let metadata: Map<_, _> =
        gguf.metadata().map(|(key, value)| (key.to_owned(), value_json(&value))).collect();
    let types = by_type(gguf);
    let types =
        types.iter().map(|(ty, count, bytes)| json!({ "type": ty, "tensors": count, "bytes": bytes }));
    let tensors = gguf.tensors().iter().map(|t| {
        json!({ "name": t.name, "shape": t.dims, "type": t.ty.name(), "offset": t.offset, "bytes": t.byte_len })
    });
    let mut all = json!({
        "file": gguf.name(),
        "bytes": gguf.byte_len(),
        "gguf_version": gguf.version(),
        "metadata": metadata,
        "tensor_types": types.collect::<Vec<_>>(),
        "tensors": tensors.collect::<Vec<_>>(),
    });
    let info = match info {
        Ok(info) => info,
        Err(error) => {
            all["error"] = json!(error.to_string());
            return all;
        }
    };
    let c = &info.config;
    all["config"] = json!({
        "architecture": c.architecture,
        "name": c.name,
        "vocab_size": c.vocab_size,
        "context_length": c.context_length,
        "hidden_size": c.hidden_size,
        "n_layers": c.n_layers,
        "intermediate_size": c.intermediate_size,
        "n_heads": c.n_heads,
        "n_kv_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "rope_dim": c.rope_dim,
        "rope_theta": c.rope_theta,
        "rms_norm_eps": c.rms_norm_eps,
        "activation": format!("{:?}", c.activation).to_lowercase(),
    });
    let special = &info.special;
    all["special_tokens"] = json!({ "bos": special.bos, "add_bos": special.add_bos, "stop": special.stop });
    let repairs = info.repairs.iter().map(|r| json!({ "name": r.name, "message": r.message }));
    all["repairs"] = repairs.collect();
    all["memory"] = match plan(info, args, gguf.name()) {
        Ok((options, plan, _)) => json!({
            "context": options.context,
            "cache_type": options.cache_type.name(),
            "weights_bytes": plan.of(MemoryPart::Weights),
            "head_copy_bytes": plan.of(MemoryPart::HeadCopy),
            "kv_cache_bytes": plan.of(MemoryPart::Cache),
            "scratch_bytes": plan.of(MemoryPart::Scratch),
            "vocabulary_bytes": plan.of(MemoryPart::Vocabulary),
            "total_bytes": plan.total(),
        }),
        Err(error) => json!({ "error": error.to_string() }),
    };
    all
}

fn token_text(gguf: &Gguf, id: u32) -> Option<&str> {
    gguf.get("tokenizer.ggml.tokens")?.as_array()?.strs()?.nth(id as usize)
}

/// A value on one line, cut.
fn value_text(value: &Value<'_>) -> String {
    match (value.as_array(), value.as_str()) {
        (Some(array), _) => format!("{} values of type {}", array.len(), array.element_type()),
        (_, Some(text)) if text.chars().count() > 80 => {
            format!("{:?}...", text.chars().take(80).collect::<String>())
        }
        (_, Some(text)) => format!("{text:?}"),
        _ => value_json(value).to_string(),
    }
}

/// A value; of an array only type and length.
fn value_json(value: &Value<'_>) -> serde_json::Value {
    if let Some(array) = value.as_array() {
        return json!({ "array_of": array.element_type().name(), "len": array.len() });
    }
    if let Some(n) = value.as_int() {
        return u64::try_from(n).map_or_else(|_| json!(n as i64), |n| json!(n));
    }
    match (value.as_str(), value.as_bool(), value.as_f32()) {
        (Some(text), _, _) => json!(text),
        (_, Some(flag), _) => json!(flag),
        (_, _, number) => json!(number),
    }
}
