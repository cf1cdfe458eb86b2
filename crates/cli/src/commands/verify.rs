use crate::output::{self, say};
use crate::source::{self, ModelArgs, Wish};
use anyhow::{Context, bail, ensure};
use bitnet::convert::Trits;
use bitnet::gguf::{self, Gguf};
use bitnet::kernels::Logits;
use bitnet::model::{ModelInfo, Strategy};
use bitnet::text::Specials;
use bitnet::{Engine, Feed, Wanted};
use sha2::{Digest, Sha256};
use std::fmt::Write;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

/// Tokens that are generated to see that the model runs.
const TOKENS: usize = 16;

/// Check a model file from end to end
///
/// Says in plain words what it found: structure, checksum, every ternary weight, scales, and a few generated tokens.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  bitnet verify model.gguf
  bitnet verify 2b-4t")]
pub struct Args {
    #[command(flatten)]
    model: source::NamedModelArgs,
}

pub fn run(mut args: Args) -> anyhow::Result<()> {
    let model = args.model.named();
    let result = match model.file.open() {
        Ok(gguf) => check(model, &Arc::new(gguf)),
        Err(error) if matches!(error.downcast_ref(), Some(gguf::Error::Malformed { .. })) => Err(error),
        // There is no file.
        Err(error) => return Err(error),
    };
    if result.as_ref().is_err_and(|error| !output::is_final(error)) {
        say("verdict", "the model did not pass: the error says why")?;
    }
    result
}

/// A scale, with an exponent where it is none that models have.
fn scale(x: f32) -> String {
    if (1e-4..1e4).contains(&x) { format!("{x:.6}") } else { format!("{x:.6e}") }
}

fn check(args: &ModelArgs, gguf: &Arc<Gguf>) -> anyhow::Result<()> {
    say("file", gguf.name())?;
    let info = ModelInfo::new(gguf, Strategy::default())?;
    let (size, tensors) = (output::bytes(gguf.byte_len()), gguf.tensors().len());
    say("structure", format!("sound: GGUF version {}, {tensors} tensors, {size}", gguf.version()))?;
    for repair in &info.repairs {
        say("repaired", &repair.message)?;
    }
    let sum = checksum(gguf)?;
    let reference = !matches!(sum, Some((_, None)));
    match sum {
        Some((found, None)) => say("sha-256", &found)?,
        Some((found, Some(expected))) => {
            ensure!(
                found == expected,
                "{}: its SHA-256 is {found}, the hub has {expected}: `bitnet rm` it and `bitnet pull` it again",
                gguf.name()
            );
            say("sha-256", format!("{found}, as on the hub"))?;
        }
        None => {}
    }
    let trits = Trits::read(gguf)?;
    let all: u64 = trits.counts.iter().sum();
    let [minus, zero, plus] = trits.counts.map(|count| 100.0 * count as f64 / all.max(1) as f64);
    say(
        "weights",
        format!(
            "{all} in {} matrices, each -1, 0 or +1: {minus:.1} %, {zero:.1} %, {plus:.1} %",
            trits.tensors
        ),
    )?;
    if !(5.0..=95.0).contains(&zero) || (minus - plus).abs() > 20.0 {
        args.file
            .note("trained models have some 30 to 60 % zeros and as many -1 as +1: is this one damaged?");
    }
    let (low, high) = trits.scales;
    say("scales", format!("{} to {}", scale(low), scale(high)))?;
    for name in &trits.zero {
        args.file.note(format_args!("tensor {name:?}: all weights are zero"));
    }
    say("trits", &trits.hash)?;

    let compute = args.compute()?;
    let context = Some(64.min(info.config.context_length as u32));
    let (model, options) = args.load_file(gguf, &compute, &Wish { context, ..Wish::default() }, |_| ())?;
    let kernels = compute.kernels().name();
    let prompt = match model.tokenizer() {
        Ok(_) => model.prompt("Once upon a time", Specials::AsText)?,
        Err(_) => vec![0],
    };
    let mut engine = Engine::new(model, compute, options)?;
    engine.settle(|| false);
    let sequence = engine.open();
    let (mut next, mut ids) = (prompt.clone(), Vec::new());
    while ids.len() < TOKENS && prompt.len() + ids.len() < options.context {
        let logits = engine.feed(&[Feed { sequence, tokens: &next, wanted: Wanted::Last(Logits::Every) }])?;
        if let Some(bad) = logits.iter().position(|x| !x.is_finite()) {
            let name = gguf.name();
            bail!("{name}: the logit of token {bad} is {}: the model computes nonsense", logits[bad]);
        }
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0);
        ids.push(best as u32);
        next = vec![best as u32];
    }
    let text = engine.model().tokenizer().map(|tokenizer| tokenizer.decode(&ids, true));
    let mut found = format!("{} tokens with {kernels}, all logits finite", ids.len());
    if let Ok(Ok(text)) = text {
        let _ = write!(found, ": \"Once upon a time\" goes on {:?}", String::from_utf8_lossy(&text));
    }
    say("generation", &found)?;
    args.tell_memory(&engine);
    let verdict = match reference {
        true => "the model is sound",
        false => {
            "the model is sound as far as it shows: there is no checksum to compare that of the file with"
        }
    };
    say("verdict", verdict)
}

/// The SHA-256 of a file, and what it must be where the file lies in the hub's cache, whose files are called by theirs.
fn checksum(gguf: &Gguf) -> anyhow::Result<Option<(String, Option<String>)>> {
    let path = Path::new(gguf.name());
    let Ok(mut file) = std::fs::File::open(path) else { return Ok(None) }; // the demo
    let mut hash = Sha256::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut piece).with_context(|| format!("{}: cannot read", path.display()))?;
        if n == 0 {
            break;
        }
        hash.update(&piece[..n]);
    }
    let found = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    let name = path.canonicalize().ok().and_then(|path| Some(path.file_name()?.to_str()?.to_owned()));
    let is_hash = |name: &String| name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit());
    Ok(Some((found, name.filter(is_hash))))
}
