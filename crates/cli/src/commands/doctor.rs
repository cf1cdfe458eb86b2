use super::bench::{bytes_per_step, stream};
use crate::output::{self, say};
use crate::source::{self, ModelArgs, Wish};
use crate::{hub, machine, selftest};
use anyhow::ensure;
use bitnet::gguf::Gguf;
use bitnet::kernels::ternary::Layout;
use bitnet::kernels::{Compute, KvType, Logits, RowRace, supported};
use bitnet::model::{Config, Model, Strategy};
use bitnet::{Engine, EngineOptions, Feed, Wanted};
use indicatif::ProgressStyle;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// Tokens of the arithmetic test.
const ROWS: usize = 64;

/// Show what this machine can do and what limits it
///
/// CPU, cores and memory that may be used, how fast they are, which kernels run, what speed to expect, what limits it, and
/// whether all kernels compute the same bits.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  bitnet doctor
  bitnet doctor model.gguf")]
pub struct Args {
    #[command(flatten)]
    model: source::NamedModelArgs,
}

pub fn run(mut args: Args) -> anyhow::Result<()> {
    let args = args.model.named();
    // What is wrong with the file is known before anything is measured.
    let gguf = Arc::new(args.file.open()?);
    let compute = args.compute()?;
    let (threads, kernels) = (compute.pool().threads(), compute.kernels().name());
    let mut advice = Vec::new();

    say("cpu", format!("{} ({})", machine::cpu(), std::env::consts::ARCH))?;
    let (has, lacks) = machine::features();
    let lacking = if lacks.is_empty() { String::new() } else { format!("; not {}", lacks.join(", ")) };
    say(
        "features",
        format!("{}{lacking}", if has.is_empty() { "none that matter".into() } else { has.join(", ") }),
    )?;
    let logical = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let affinity = machine::affinity().map_or(String::new(), |cpus| format!("; affinity allows CPUs {cpus}"));
    let quota = match machine::cgroup_cpus(Path::new("/")) {
        Some(cpus) => {
            if cpus < threads as f64 {
                advice.push(format!(
                    "the control group gives {cpus:.1} CPUs of time for {}: they will wait for each other",
                    output::threads(threads)
                ));
            }
            format!("; the control group {cpus:.1}")
        }
        None => "; no limit by a control group".to_owned(),
    };
    say(
        "cores",
        format!(
            "{} for {logical} logical CPUs, one a physical core{affinity}{quota}",
            output::threads(threads)
        ),
    )?;
    if let Some((total, available, _)) = machine::memory() {
        let limit = machine::cgroup_memory(Path::new("/")).map_or(String::new(), |group| {
            let [limit, available] = [group.limit, group.available].map(output::bytes);
            format!("; the control group allows {limit}, {available} of them available")
        });
        say("memory", format!("{}, {} available{limit}", output::bytes(total), output::bytes(available)))?;
    }
    if let Some(pages) = machine::huge_pages() {
        if pages == "never" {
            advice.push("huge pages are off: `echo madvise > /sys/kernel/mm/transparent_hugepage/enabled` as root gives some percent".into());
        }
        say("huge pages", pages)?;
    }

    if let Some(load) = machine::load().filter(|load| *load > 0.5) {
        advice.push(format!(
            "other programs keep {load:.1} CPUs busy: the figures are lower than on an idle machine"
        ));
    }
    let mut streams = stream(&compute, 256 << 20, 5)?;
    streams.sort_by(f64::total_cmp);
    let stream = streams[2];
    say("bandwidth", format!("{:.1} GB/s, read by {}", stream / 1e9, output::threads(threads)))?;
    let products = products(args, Compute::new(compute.kernels(), threads))?;
    say(
        "arithmetic",
        format!("{:.0} billion products of a weight and an activation a second", products / 1e9),
    )?;

    let all: Vec<_> = supported().iter().map(|kernels| kernels.name()).collect();
    let why = match all.last() == Some(&kernels) {
        true => "the best that this CPU can run",
        false if args.kernels.is_some() => "as asked for",
        false => "the best of those that compute right results here",
    };
    say("kernel", format!("{kernels}: {why} (of {})", all.join(", ")))?;
    if kernels == "scalar" {
        advice.push("the scalar kernels are slow: they are a definition, not made for speed".into());
    }

    say("rows", compute.race_rows(None))?;
    let wish = Wish { context: Some(16), max_rows: 16, ..Wish::default() };
    let (model, options) = args.load_file(&gguf, &compute, &wish, |_| ())?;
    args.file.note_repairs(model.repairs());
    let mut engine = Engine::new(model, compute, options)?;
    engine.settle(|| false);
    args.tell_memory(&engine);
    let (model, shape) = (engine.model(), Config::bitnet_2b_4t());
    let file = model.config().name.clone().unwrap_or_else(|| model.file().to_owned());
    let (name, bytes, weights) = match &args.file.model {
        Some(_) => (&*file, bytes_per_step(model) as f64, weights(model.config())),
        None => {
            let bytes = weights(&shape) / 4.0 + 2.0 * (shape.vocab_size * shape.hidden_size) as f64;
            ("bitnet-b1.58-2B-4T", bytes, weights(&shape))
        }
    };
    drop(engine);
    let (by_memory, by_products) = (stream / bytes, products / weights);
    say(
        "speed",
        format!(
            "{name}: {:.1} tokens/s generated with every weight read (more where zeros are skipped), {by_products:.0} of a prompt",
            by_memory.min(by_products)
        ),
    )?;
    let limit = if by_memory < by_products {
        format!("memory: a token reads up to {} of weights", output::bytes(bytes as u64))
    } else {
        format!("arithmetic: each token takes {:.2} billion products", weights / 1e9)
    };
    say("limit", limit)?;

    for line in &advice {
        say("advice", line)?;
    }
    let equal = prove(&gguf, threads, args.file.quiet)?;
    say(
        "proof",
        match equal.len() {
            0 => "only the scalar kernels run here, and they are the definition".to_owned(),
            _ => format!("{} compute the bits of scalar with all weights of {file}", equal.join(", ")),
        },
    )
}

/// Products a second, of two layers of a known shape that process a prompt.
fn products(args: &ModelArgs, compute: Compute) -> anyhow::Result<f64> {
    let config = Config { n_layers: 2, vocab_size: 256, ..Config::bitnet_2b_4t() };
    let done = weights(&config) * ROWS as f64;
    let model = Model::random(config, &compute, args.strategy(1, || RowRace::NONE))?;
    let options = EngineOptions { context: ROWS, ..EngineOptions::for_model(model.config()) };
    let mut engine = Engine::new(model, compute, options)?;
    let tokens: Vec<u32> = (0..ROWS as u32).collect();
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let sequence = engine.open();
        let start = Instant::now();
        engine.feed(&[Feed { sequence, tokens: &tokens, wanted: Wanted::Last(Logits::Every) }])?;
        best = best.min(start.elapsed().as_secs_f64());
        engine.close(sequence);
    }
    Ok(done / best)
}

/// Ternary weights of a shape.
fn weights(c: &Config) -> f64 {
    let (hidden, q, kv, ff) = (c.hidden_size, c.q_width(), c.kv_width(), c.intermediate_size);
    (c.n_layers * (hidden * (2 * q + 2 * kv) + 3 * hidden * ff)) as f64
}

/// Runs the model with all kernels; an error where one differs from scalar in a single bit. Returns those that do not.
fn prove(gguf: &Arc<Gguf>, threads: usize, quiet: bool) -> anyhow::Result<Vec<&'static str>> {
    // The self-test of every start has looked at the third cache.
    let cases = [(Layout::Rows, KvType::F32), (Layout::Base3, KvType::F16)];
    let bar = hub::bar(quiet);
    bar.set_style(ProgressStyle::with_template("{wide_bar} proving {msg}, {eta} left")?);
    bar.set_length((supported().len() * cases.len()) as u64);
    let mut expected = None;
    let (mut equal, mut different) = (Vec::new(), Vec::new());
    for kernels in supported() {
        let mut found = Vec::new();
        bar.set_message(kernels.name());
        for (rows, cache_type) in cases {
            let compute = Compute::new(kernels, threads);
            let model = Model::load(gguf, &compute, Strategy { rows, ..Strategy::default() })?;
            found.push(selftest::bits(model, compute, cache_type)?);
            bar.inc(1);
        }
        match &expected {
            None => expected = Some(found),
            Some(expected) if *expected == found && selftest::passes(kernels) => equal.push(kernels.name()),
            Some(_) => different.push(kernels.name()),
        }
    }
    bar.finish_and_clear();
    ensure!(
        different.is_empty(),
        "the kernels {} differ from scalar: run with --kernels {}, and report this machine",
        different.join(", "),
        equal.last().unwrap_or(&"scalar")
    );
    Ok(equal)
}
