use crate::output::{self, Interrupted, notice};
use crate::source;
use anyhow::{bail, ensure};
use bitnet::generate::{
    FinishReason, Generated, Sampler, SamplerConfig, Speculation, StopConditions, generate,
};
use bitnet::model::Model;
use bitnet::text::Specials;
use bitnet::{Engine, EngineOptions};
use clap::CommandFactory;
use std::hash::{BuildHasher, RandomState};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Continues a text. The continuation goes to stdout, everything else to stderr.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: source::ModelArgs,
    /// The prompt [default: stdin, without a newline at its end]
    #[arg(short = 'p', long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with = "file")]
    prompt: Option<String>,
    /// File with the prompt, UTF-8; a newline at its end is left out
    #[arg(short = 'f', long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Most tokens to generate; -1: until the model ends the text or the context is full
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128, allow_negative_numbers = true,
          value_parser = clap::value_parser!(i64).range(-1..))]
    n_predict: i64,
    /// Tokens of context; 0: as many as the model was trained with [default: the same, at most 4096]
    #[arg(short = 'c', long, value_name = "CTX", value_parser = source::context_range())]
    ctx_size: Option<u32>,
    /// End at this text, which is not printed; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true,
          value_parser = clap::builder::NonEmptyStringValueParser::new())]
    stop: Vec<String>,
    /// Go on where the model ends the text
    #[arg(long)]
    ignore_eos: bool,
    /// Recognise control tokens such as <|eot_id|> in the prompt
    #[arg(long)]
    special: bool,
    /// Do not let a step check tokens that may come next because they came before; the text is the same
    #[arg(long)]
    no_speculation: bool,
    /// Print one JSON object with text, tokens and statistics at the end
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Sampling")]
struct SamplingArgs {
    /// 0: always the most probable token
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    temp: f32,
    /// Only the K most probable tokens; 0: all
    #[arg(long, value_name = "K", default_value_t = 40)]
    top_k: u32,
    /// Only the most probable tokens that together have probability P; 1: all
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,
    /// Only tokens with at least P times the probability of the most probable; 0: all
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    min_p: f32,
    /// Factor against tokens that occurred; 1: none
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    repeat_penalty: f32,
    /// How many of the last tokens the penalties look at
    #[arg(long, value_name = "N", default_value_t = 64)]
    repeat_last_n: u32,
    /// Taken off a token's logit for each time it occurred
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// Taken off a token's logit if it occurred
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    presence_penalty: f32,
    /// Added to a token's logit; -inf forbids it; may be given several times
    #[arg(long, value_name = "ID=BIAS", value_parser = parse_bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Start of the random numbers, 64 bits [default: 32 random ones, told with the statistics]
    #[arg(short = 's', long, value_name = "S")]
    seed: Option<u64>,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut sampler = args.sampling.sampler();
    let text = match &args.prompt {
        Some(text) => text.clone(),
        None => source::read_prompt(args.file.as_deref())?,
    };
    let start = Instant::now();
    let compute = args.model.compute()?;
    let model = args.model.load(&compute)?;
    let specials = if args.special { Specials::Parse } else { Specials::AsText };
    let prompt = model.prompt(&text, specials)?;
    let context = args.model.context(args.ctx_size, model.config());
    let found = prompt.len();
    ensure!(found > 0, "the prompt is empty");
    ensure!(found <= context, "the prompt has {found} tokens, the context {context} (-c sets it)");
    args.sampling.check_biases(&model)?;
    let stop = StopConditions {
        ids: if args.ignore_eos { Vec::new() } else { model.special().stop.clone() },
        strings: args.stop.clone(),
        max_tokens: usize::try_from(args.n_predict).ok(),
        speculation: if args.no_speculation { Speculation::Off } else { Speculation::Adaptive },
    };
    let options = EngineOptions { context, ..EngineOptions::for_model(model.config()) };
    let mut engine = Engine::new(model, compute, options)?;
    let sequence = engine.open();
    let load_time = start.elapsed();

    engine.cancel_by(output::interrupt_flag()?);
    let start = Instant::now();
    let (mut text, mut first_token, mut failure) = (String::new(), None, None);
    let mut emit = |part: &str| {
        first_token.get_or_insert_with(|| start.elapsed());
        text.push_str(part);
        if !args.json && !part.is_empty() {
            failure = output::print(part.as_bytes()).err();
        }
        if failure.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let generated = generate(&mut engine, sequence, &prompt, &mut sampler, &stop, &mut emit);
    if let Some(error) = failure {
        return Err(error);
    }
    // A run that ended before its first word leaves stdout empty.
    let ended = !matches!(&generated, Err(_) | Ok(Generated { finish: FinishReason::Cancelled, .. }));
    if !args.json && !text.ends_with('\n') && (ended || !text.is_empty()) {
        output::print(b"\n")?;
    }
    let statistics = Statistics {
        generated: generated?,
        prompt_tokens: prompt.len(),
        load_time,
        first_token: first_token.unwrap_or_default(),
        seed: sampler.config().seed,
        kernel: engine.compute().kernels().name(),
        threads: engine.compute().pool().threads(),
    };
    if args.json {
        output::print_json(&statistics.json(&text))?;
    } else if !args.model.file.quiet {
        statistics.print();
    }
    if statistics.generated.finish == FinishReason::Cancelled {
        bail!(Interrupted);
    }
    Ok(())
}

impl SamplingArgs {
    /// The sampler; a setting out of range is a usage error.
    fn sampler(&self) -> Sampler {
        let config = SamplerConfig {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            repeat_last_n: self.repeat_last_n,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed.unwrap_or_else(|| RandomState::new().hash_one(0) >> 32),
        };
        Sampler::new(config).unwrap_or_else(|error| {
            crate::Cli::command().error(clap::error::ErrorKind::ValueValidation, error).exit()
        })
    }

    fn check_biases(&self, model: &Model) -> anyhow::Result<()> {
        let vocab = model.config().vocab_size;
        match self.logit_bias.iter().find(|(id, _)| *id as usize >= vocab) {
            Some((id, _)) => bail!("--logit-bias has token {id}, the vocabulary ends at {}", vocab - 1),
            None => Ok(()),
        }
    }
}

struct Statistics {
    generated: Generated,
    prompt_tokens: usize,
    load_time: Duration,
    first_token: Duration,
    seed: u64,
    kernel: &'static str,
    threads: usize,
}

impl Statistics {
    fn prompt_rate(&self) -> f64 {
        rate(self.prompt_tokens, self.generated.prompt_time)
    }

    /// The first token comes with the prompt.
    fn decode_rate(&self) -> f64 {
        rate(self.generated.tokens.len().saturating_sub(1), self.generated.decode_time)
    }

    fn finish(&self) -> &'static str {
        match self.generated.finish {
            FinishReason::StopToken(_) => "stop_token",
            FinishReason::StopString(_) => "stop_string",
            FinishReason::Length => "length",
            FinishReason::ContextFull => "context_full",
            FinishReason::Cancelled => "cancelled",
        }
    }

    fn print(&self) {
        notice(format_args!(
            "\nprompt     {:>6} tokens  {:>8.2} tokens/s\ngenerated  {:>6} tokens  {:>8.2} tokens/s  (ended: {}; \
             speculation: {} of {} accepted)\nload {:.2} s, first token after {:.3} s, seed {}, {}, {} threads",
            self.prompt_tokens,
            self.prompt_rate(),
            self.generated.tokens.len(),
            self.decode_rate(),
            self.finish().replace('_', " "),
            self.generated.accepted,
            self.generated.proposed,
            self.load_time.as_secs_f64(),
            self.first_token.as_secs_f64(),
            self.seed,
            self.kernel,
            self.threads,
        ));
    }

    fn json(&self, text: &str) -> serde_json::Value {
        serde_json::json!({
            "text": text,
            "tokens": self.generated.tokens,
            "finish": self.finish(),
            "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_per_second": self.prompt_rate(),
            "generated_tokens_per_second": self.decode_rate(),
            "proposed_tokens": self.generated.proposed,
            "accepted_tokens": self.generated.accepted,
            "load_seconds": self.load_time.as_secs_f64(),
            "first_token_seconds": self.first_token.as_secs_f64(),
            "seed": self.seed,
            "kernel": self.kernel,
            "n_threads": self.threads,
        })
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { tokens as f64 / time.as_secs_f64() }
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let parsed = text.split_once('=').and_then(|(id, bias)| Some((id.parse().ok()?, bias.parse().ok()?)));
    parsed.ok_or_else(|| "expected ID=BIAS, such as 15043=-1.5".to_owned())
}
