//! `bitnet bench`: tokens per second, beside what the machine's memory allows.

use crate::output::{self, notice};
use crate::source::{self, Wish};
use crate::usage_error;
use anyhow::{Context, Result};
use bitnet::generate::{Sampler, SamplerConfig};
use bitnet::kernels::{Compute, HugeBuffer, MemoryPart, TernaryMatrix};
use bitnet::model::{Config, Layer, Model, Phase};
use bitnet::{Engine, EngineOptions, Feed, MemoryPlan, SequenceId, Wanted};
use clap::builder::TypedValueParser;
use clap::error::ErrorKind;
use serde::Serialize;
use std::fmt::Write;
use std::time::Instant;

/// Measure the speed of prompt processing and generation
#[derive(clap::Args)]
#[command(after_help = "Examples:
  bitnet bench -m model.gguf
  bitnet bench --synthetic 2b-4t -p 512 -n 64 -o json

Up and down are the shares of the rows and columns of these projections that are not left out as zeros; head are the rows of the output
head that its small copy leaves open, and those that are computed exactly, for each token.")]
pub struct Args {
    #[command(flatten)]
    model: source::NamedModelArgs,
    /// Random weights of a known shape instead of a file
    #[arg(long, value_name = "SHAPE", conflicts_with_all = ["model", "name"], value_parser = ["2b-4t"])]
    synthetic: Option<String>,
    /// Prompt tokens to process (0: no such test)
    #[arg(short = 'p', long, default_value_t = 512, value_parser = count())]
    n_prompt: usize,
    /// Tokens to generate (0: no such test)
    #[arg(short = 'n', long, default_value_t = 128, value_parser = count())]
    n_gen: usize,
    /// Tokens that are in the cache before each test begins
    #[arg(short = 'd', long, default_value_t = 0, value_parser = count())]
    n_depth: usize,
    /// Sequences that are decoded together
    #[arg(short = 'b', long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=512))]
    batch: u32,
    /// Times each test is repeated
    #[arg(short = 'r', long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    reps: u32,
    /// Print where the time goes, phase by phase, to stderr
    #[arg(long)]
    profile: bool,
    /// How the result is printed
    #[arg(short = 'o', long, default_value = "md")]
    output: Format,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Format {
    /// A Markdown table
    Md,
    /// An array of objects
    Json,
    /// Comma-separated values with a header line
    Csv,
}

#[derive(Serialize)]
struct Measurement {
    model: String,
    test: String,
    n_threads: usize,
    n_batch: u32,
    reps: u32,
    tokens_per_second_mean: f64,
    tokens_per_second_stddev: f64,
    /// What one decoded step reads: all weights once. The cache is not counted.
    bytes_per_step: usize,
    stream_read_gb_per_s: f64,
    /// Of a decode test: bytes read a second over what a plain read of memory gives.
    roofline_share: Option<f64>,
    kernel: &'static str,
    /// How rows of weights are kept.
    layout: &'static str,
    #[serde(flatten)]
    read: Read,
}

/// What of the weights was read, on average.
#[derive(Serialize)]
struct Read {
    /// Of a decode test: the share of the up projection's rows, where those whose gate is not positive were left out.
    live_up_rows: Option<f64>,
    /// Of a decode test: the share of the down projection's columns.
    live_down_columns: Option<f64>,
    /// Of a token whose head was screened: rows that its coarse copy left open, and those that were computed exactly.
    open_head_rows: Option<f64>,
    exact_head_rows: Option<f64>,
}

impl Read {
    /// Over so many steps, 0 for those of a prompt.
    fn new(engine: &mut Engine, steps: usize) -> Self {
        let layers = &engine.model().weights().layers;
        let bytes = |matrix: fn(&Layer) -> &TernaryMatrix| layers.iter().map(|l| matrix(l).byte_len()).sum();
        let (up, down): (usize, usize) = (bytes(|layer| &layer.ffn_up), bytes(|layer| &layer.ffn_down));
        let profile = engine.profile();
        let share = |phase, all: usize| {
            let read = profile.get(phase).1;
            (steps > 0 && read > 0).then(|| read as f64 / (all * steps) as f64)
        };
        let head = profile.head();
        let rows = |rows: u64| (head.tokens > 0).then(|| rows as f64 / head.tokens as f64);
        Self {
            live_up_rows: share(Phase::Up, up),
            live_down_columns: share(Phase::Down, down),
            open_head_rows: rows(head.open),
            exact_head_rows: rows(head.exact),
        }
    }
}

pub fn run(mut args: Args) -> Result<()> {
    args.model.named();
    let (args, model_args) = (&args, &args.model.model);
    if args.n_prompt == 0 && args.n_gen == 0 {
        usage_error(ErrorKind::ArgumentConflict, "-p 0 and -n 0 leave nothing to measure");
    }
    let compute = model_args.compute()?;
    let batch = args.batch as usize;
    // A step has no more rows than the context.
    let context = (args.n_depth + args.n_prompt.max(args.n_gen + 1)).max(batch);
    let wish = Wish {
        context: Some(u32::try_from(context).unwrap_or(u32::MAX)),
        sequences: batch,
        beside: STREAM,
        ..Wish::default()
    };
    let (mut model, options) = match args.synthetic {
        Some(_) => {
            let (config, strategy) =
                (Config::bitnet_2b_4t(), model_args.strategy(batch, || compute.race_rows(None)));
            let threads = compute.pool().threads();
            let plan = |options: &EngineOptions| MemoryPlan::random(&config, strategy, options, threads);
            let options = model_args.plan("random weights", &config, &wish, plan)?;
            (Model::random(config, &compute, strategy)?, options)
        }
        None => model_args.load(&compute, &wish, |_| ())?,
    };
    model.settle(&compute, || false);
    let name = model.config().name.clone().unwrap_or_else(|| model.file().to_owned());
    let bytes_per_step = bytes_per_step(&model);
    let mut engine = Engine::new(model, compute, options)?;
    let sequences: Vec<SequenceId> = (0..batch).map(|_| engine.open()).collect();

    // The machine's speed drifts, so its bandwidth is read before, between and after the tests.
    let mut streams = stream(engine.compute(), STREAM, 3)?;
    let mut tests = Vec::new();
    let at = if args.n_depth > 0 { format!(" @ d{}", args.n_depth) } else { String::new() };
    fill(&mut engine, &sequences, args)?;
    if args.n_prompt > 0 {
        let rates = prefill(&mut engine, sequences[0], args)?;
        tests.push((format!("pp{}{at}", args.n_prompt), 1, rates, Read::new(&mut engine, 0)));
        profile(&mut engine, args, args.n_prompt * args.reps as usize);
        streams.extend(stream(engine.compute(), STREAM, 3)?);
    }
    if args.n_gen > 0 {
        let rates = decode(&mut engine, &sequences, args)?;
        let read = Read::new(&mut engine, args.n_gen * args.reps as usize);
        tests.push((format!("tg{}{at}", args.n_gen), args.batch, rates, read));
        profile(&mut engine, args, args.n_gen * batch * args.reps as usize);
        streams.extend(stream(engine.compute(), STREAM, 3)?);
    }
    model_args.tell_memory(&engine);
    streams.sort_by(f64::total_cmp);
    let stream = streams[streams.len() / 2];
    let rows = tests.into_iter().map(|(test, n_batch, rates, read)| {
        let mean = rates.iter().sum::<f64>() / rates.len() as f64;
        let variance =
            rates.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / (rates.len() as f64 - 1.0).max(1.0);
        let decode = test.starts_with("tg");
        let steps_per_second = mean / f64::from(n_batch);
        Measurement {
            model: name.clone(),
            test,
            n_threads: engine.compute().pool().threads(),
            n_batch,
            reps: args.reps,
            tokens_per_second_mean: mean,
            tokens_per_second_stddev: variance.sqrt(),
            bytes_per_step,
            stream_read_gb_per_s: stream / 1e9,
            roofline_share: decode.then_some(steps_per_second * bytes_per_step as f64 / stream),
            kernel: engine.compute().kernels().name(),
            layout: engine.model().weights().layers[0].attn_q.layout().name(),
            read,
        }
    });
    print(args.output, &rows.collect::<Vec<_>>())
}

/// Prints the time and bytes of each phase, for each of `tokens` tokens.
fn profile(engine: &mut Engine, args: &Args, tokens: usize) {
    if !args.profile {
        return;
    }
    notice(format_args!("{:<10} {:>10} {:>10} {:>8}", "phase", "ms/token", "MB/token", "GB/s"));
    let (mut time, mut bytes) = (0.0, 0.0);
    let line = |name: &str, s: f64, b: f64| {
        let (ms, mb) = (s * 1e3 / tokens as f64, b / 1e6 / tokens as f64);
        let speed = if s > 0.0 { b / s / 1e9 } else { 0.0 };
        notice(format_args!("{name:<10} {ms:>10.3} {mb:>10.2} {speed:>8.1}"));
    };
    for phase in Phase::ALL {
        let (t, b) = engine.profile().get(phase);
        line(&format!("{phase:?}").to_lowercase(), t.as_secs_f64(), b as f64);
        time += t.as_secs_f64();
        bytes += b as f64;
    }
    line("sum", time, bytes);
}

/// Bytes of weights that one decoded step reads where nothing is skipped: every ternary matrix and the head.
pub fn bytes_per_step(model: &Model) -> usize {
    let weights = model.weights();
    let ternary = weights.layers.iter().flat_map(Layer::matrices).map(TernaryMatrix::byte_len);
    weights.head.matrix.byte_len() + ternary.sum::<usize>()
}

/// Bytes of the buffer that is read to measure the memory.
const STREAM: usize = 512 << 20;

/// The rates, in bytes a second, of so many plain reads of `bytes` bytes by all threads.
pub fn stream(compute: &Compute, bytes: usize, reads: usize) -> Result<Vec<f64>> {
    let mut buffer =
        HugeBuffer::new(MemoryPart::Scratch, bytes).context("no memory for the bandwidth test")?;
    buffer.fill(1);
    let rate = |_| {
        let start = Instant::now();
        compute.stream_read(buffer.floats());
        buffer.len() as f64 / start.elapsed().as_secs_f64()
    };
    Ok((0..reads).map(rate).collect())
}

/// Tokens that look like text to the caches: all over the vocabulary, the same each time.
fn token(engine: &Engine, i: usize) -> u32 {
    (i.wrapping_mul(2_654_435_761) % engine.model().config().vocab_size) as u32
}

/// Puts the tokens of `-d` into the cache of every sequence.
fn fill(engine: &mut Engine, sequences: &[SequenceId], args: &Args) -> Result<()> {
    let tokens: Vec<u32> = (0..args.n_depth).map(|i| token(engine, i)).collect();
    for &sequence in sequences {
        engine.feed(&[Feed { sequence, tokens: &tokens, wanted: Wanted::Nothing }])?;
    }
    Ok(())
}

fn prefill(engine: &mut Engine, sequence: SequenceId, args: &Args) -> Result<Vec<f64>> {
    let tokens: Vec<u32> = (0..args.n_prompt).map(|i| token(engine, i)).collect();
    let mut sampler = Sampler::new(SamplerConfig::default())?;
    let mut rates = Vec::new();
    for rep in 0..=args.reps {
        engine.truncate(sequence, args.n_depth);
        if rep == 1 {
            engine.profile().clear();
        }
        let start = Instant::now();
        engine.feed(&[Feed { sequence, tokens: &tokens, wanted: Wanted::Last(sampler.wanted(&[])) }])?;
        // The first round takes the memory from the system.
        if rep > 0 {
            rates.push(tokens.len() as f64 / start.elapsed().as_secs_f64());
        }
    }
    engine.truncate(sequence, args.n_depth);
    Ok(rates)
}

fn decode(engine: &mut Engine, sequences: &[SequenceId], args: &Args) -> Result<Vec<f64>> {
    // With the sampling that `run` has by default; which token is drawn does not matter to the speed.
    let sampler = || Sampler::new(SamplerConfig::default());
    let mut samplers = sequences.iter().map(|_| sampler()).collect::<Result<Vec<_>, _>>()?;
    let vocab = engine.model().config().vocab_size;
    let mut rates = Vec::new();
    for rep in 0..=args.reps {
        for sequence in sequences {
            engine.truncate(*sequence, args.n_depth);
        }
        if rep == 1 {
            engine.profile().clear();
        }
        let steps = if rep == 0 { args.n_gen.min(4) } else { args.n_gen };
        let start = Instant::now();
        for step in 0..steps {
            let tokens: Vec<u32> = (0..sequences.len()).map(|s| token(engine, step * 512 + s)).collect();
            let feeds: Vec<Feed<'_>> = sequences
                .iter()
                .zip(tokens.chunks(1))
                .zip(&mut samplers)
                .map(|((&sequence, tokens), sampler)| Feed {
                    sequence,
                    tokens,
                    wanted: Wanted::Last(sampler.wanted(&[])),
                })
                .collect();
            let logits = engine.feed(&feeds)?;
            for (sampler, logits) in samplers.iter_mut().zip(logits.chunks(vocab)) {
                sampler.sample(logits, &[])?;
            }
        }
        if rep > 0 {
            rates.push((steps * sequences.len()) as f64 / start.elapsed().as_secs_f64());
        }
    }
    Ok(rates)
}

/// A number of tokens.
fn count() -> impl TypedValueParser<Value = usize> {
    source::context_range().map(|n| n as usize)
}

fn print(format: Format, rows: &[Measurement]) -> Result<()> {
    let mut out = String::from(match format {
        Format::Json => {
            return output::print(format!("{}\n", serde_json::to_string_pretty(rows)?).as_bytes());
        }
        Format::Csv => {
            "model,test,n_threads,n_batch,reps,tokens_per_second_mean,tokens_per_second_stddev,bytes_per_step,\
             stream_read_gb_per_s,roofline_share,kernel,layout,live_up_rows,live_down_columns,open_head_rows,exact_head_rows\n"
        }
        Format::Md => {
            "| model | test | threads | batch | kernel | layout | tokens/s | stream read GB/s | roofline | up | down | head |\n\
             | --- | --- | ---: | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        }
    });
    for row in rows {
        let Measurement { test, n_threads, n_batch, reps, bytes_per_step, kernel, layout, .. } = row;
        let model = output::one_line(&row.model);
        let (mean, deviation) = (row.tokens_per_second_mean, row.tokens_per_second_stddev);
        let (stream, share, read) = (row.stream_read_gb_per_s, row.roofline_share, &row.read);
        let number = |x: Option<f64>, digits: usize| x.map(|x| format!("{x:.digits$}")).unwrap_or_default();
        let percent = |x: Option<f64>| x.map(|x| format!("{:.0} %", 100.0 * x)).unwrap_or_default();
        if matches!(format, Format::Csv) {
            let model = model.replace('"', "\"\"");
            write!(out, "\"{model}\",{test},{n_threads},{n_batch},{reps},{mean:.3},{deviation:.3},")?;
            write!(out, "{bytes_per_step},{stream:.2},{},{kernel},{layout},", number(share, 3))?;
            write!(out, "{},{},", number(read.live_up_rows, 3), number(read.live_down_columns, 3))?;
            writeln!(out, "{},{}", number(read.open_head_rows, 0), number(read.exact_head_rows, 0))?;
        } else {
            let model = model.replace('|', "\\|");
            write!(
                out,
                "| {model} | {test} | {n_threads} | {n_batch} | {kernel} | {layout} | {mean:.1} ± {deviation:.1} "
            )?;
            write!(out, "| {stream:.1} | {} | {} ", percent(share), percent(read.live_up_rows))?;
            let (open, exact) = (number(read.open_head_rows, 0), number(read.exact_head_rows, 0));
            let rows = if open.is_empty() { open } else { format!("{open} / {exact}") };
            writeln!(out, "| {} | {rows} |", percent(read.live_down_columns))?;
        }
    }
    output::print(out.as_bytes())
}
