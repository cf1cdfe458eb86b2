use crate::constraint::{Forms, INCOMPLETE};
use crate::output::{self, Interrupted, notice, rate};
use crate::prompt_cache::PromptCacheArgs;
use crate::sampling::{GenerateArgs, check_biases, random_seed};
use crate::source::{self, Wish};
use crate::usage_error;
use anyhow::ensure;
use bitnet::Engine;
use bitnet::generate::{FinishReason, Generated, StopConditions, generate};
use bitnet::text::Specials;
use clap::error::ErrorKind;
use serde::Serialize;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Continue a text
///
/// The continuation goes to stdout, everything else to stderr.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  bitnet run -p \"Once upon a time\"
  bitnet run -m model.gguf -f prompt.txt -n 200 --temp 0
  echo \"The capital of France is\" | bitnet run -m model.gguf -q
  bitnet run -p \"A colour: \" --regex \"red|green|blue\"
  bitnet run -f letter.txt --json-schema schema.json -n -1")]
pub struct Args {
    #[command(flatten)]
    model: source::ModelArgs,
    /// The prompt [default: stdin, without a newline at its end]
    #[arg(short = 'p', long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with = "file")]
    prompt: Option<String>,
    /// File with the prompt, UTF-8; a newline at its end is left out
    #[arg(short = 'f', long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Go on where the model ends the text
    #[arg(long)]
    ignore_eos: bool,
    /// Recognise control tokens such as <|eot_id|> in the prompt
    #[arg(long)]
    special: bool,
    /// Print one JSON object with text, tokens and statistics at the end
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    prompt_cache: PromptCacheArgs,
    #[command(flatten)]
    generate: GenerateArgs,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let GenerateArgs { constraint, sampling, ctx_size, .. } = &args.generate;
    let mut sampler = sampling.sampler(random_seed());
    if constraint.reads_stdin() && args.prompt.is_none() && args.file.is_none() {
        usage_error(ErrorKind::ArgumentConflict, "the prompt and the schema are both read from stdin");
    }
    let form = constraint.form()?;
    args.model.file.check()?;
    let text = match &args.prompt {
        Some(text) => text.clone(),
        None => source::read_prompt(args.file.as_deref())?,
    };
    let start = Instant::now();
    let compute = args.model.compute()?;
    let wish = Wish { context: *ctx_size, ..Wish::default() };
    let mut forms = Forms::default();
    let prepare = |tokenizer: &_| forms.prepare(form.as_ref(), tokenizer);
    let (model, options) = args.model.load(&compute, &wish, prepare)?;
    let specials = if args.special { Specials::Parse } else { Specials::AsText };
    let prompt = model.prompt(&text, specials)?;
    let (context, found) = (options.context, prompt.len());
    ensure!(found > 0, "the prompt is empty");
    ensure!(found <= context, "the prompt has {found} tokens, the context {context} (-c sets it)");
    check_biases(sampler.config(), &model)?;
    let stop = StopConditions {
        ids: if args.ignore_eos { Vec::new() } else { model.special().stop.clone() },
        constraint: forms.constraint(form.as_ref(), &model)?,
        ..args.generate.stop()
    };
    let mut engine = Engine::new(model, compute, options)?;
    let sequence = engine.open();
    args.prompt_cache.restore(&mut engine, sequence, Some(&prompt))?;
    let held = engine.tokens(sequence).len();
    // The logits of the last token are wanted, so that one is computed anew.
    let cached = held.min(prompt.len() - 1);
    engine.truncate(sequence, cached);
    let load_time = start.elapsed();

    let interrupted = output::interrupt_flag()?;
    engine.cancel_by(interrupted.clone());
    let start = Instant::now();
    let (mut text, mut first_token, mut failure) = (String::new(), None, None);
    let mut emit = |part: &str| {
        first_token.get_or_insert_with(|| start.elapsed());
        text.push_str(part);
        if !args.json && !part.is_empty() {
            failure = output::print_text(part).err();
        }
        if failure.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let generated = generate(&mut engine, sequence, &prompt[cached..], &mut sampler, &stop, &mut emit);
    if let Some(error) = failure {
        return Err(error);
    }
    // A run that ended before its first word leaves stdout empty.
    let ended = !matches!(&generated, Err(_) | Ok(Generated { finish: FinishReason::Cancelled, .. }));
    if !args.json && !text.ends_with('\n') && (ended || !text.is_empty()) {
        output::print(b"\n")?;
    }
    let generated = generated?;
    if !generated.complete && generated.finish != FinishReason::Cancelled {
        args.model.file.note(INCOMPLETE);
    }
    let n = generated.tokens.len();
    let statistics = Statistics {
        text: &text,
        prompt_tokens: prompt.len(),
        cached_tokens: cached,
        prompt_tokens_per_second: rate(prompt.len() - cached, generated.prompt_time),
        // The first token comes with the prompt.
        generated_tokens_per_second: rate(n.saturating_sub(1), generated.decode_time),
        finish: match generated.finish {
            FinishReason::StopToken(_) => "stop_token",
            FinishReason::StopString(_) => "stop_string",
            FinishReason::Length => "length",
            FinishReason::ContextFull => "context_full",
            FinishReason::Complete => "complete",
            FinishReason::Cancelled => "cancelled",
        },
        complete: generated.complete,
        proposed_tokens: generated.proposed,
        accepted_tokens: generated.accepted,
        tokens: generated.tokens,
        load_seconds: load_time.as_secs_f64(),
        settling_seconds: engine.settling().as_secs_f64(),
        first_token_seconds: first_token.unwrap_or_default().as_secs_f64(),
        seed: sampler.config().seed,
        kernel: engine.compute().kernels().name(),
        n_threads: engine.compute().pool().threads(),
    };
    if args.json {
        output::print_json(&serde_json::to_value(&statistics)?)?;
    } else if !args.model.file.quiet {
        statistics.print();
    }
    if held < prompt.len() && engine.tokens(sequence).len() >= prompt.len() {
        // Another signal ends the writing too.
        interrupted.store(false, Ordering::Relaxed);
        args.prompt_cache.save(&engine, sequence, prompt.len(), &interrupted)?;
    }
    args.model.tell_memory(&engine);
    ensure!(generated.finish != FinishReason::Cancelled, Interrupted);
    Ok(())
}

#[derive(Serialize)]
struct Statistics<'a> {
    text: &'a str,
    tokens: Vec<u32>,
    finish: &'static str,
    complete: bool,
    prompt_tokens: usize,
    cached_tokens: usize,
    prompt_tokens_per_second: f64,
    generated_tokens_per_second: f64,
    proposed_tokens: usize,
    accepted_tokens: usize,
    load_seconds: f64,
    /// What was left of loading, between tokens.
    settling_seconds: f64,
    first_token_seconds: f64,
    seed: u64,
    kernel: &'static str,
    n_threads: usize,
}

impl Statistics<'_> {
    fn print(&self) {
        let cached = match self.cached_tokens {
            0 => String::new(),
            count => format!("  ({count} of them from the prompt cache)"),
        };
        let settling = match self.settling_seconds {
            seconds if seconds > 0.0 => format!(" and {seconds:.2} s between tokens"),
            _ => String::new(),
        };
        notice(format_args!(
            "\nprompt     {:>6} tokens  {:>8.2} tokens/s{cached}\ngenerated  {:>6} tokens  {:>8.2} tokens/s  (ended: {}; \
             speculation: {} of {} accepted)\nload {:.2} s{settling}, first token after {:.3} s, seed {}, {}, {}",
            self.prompt_tokens,
            self.prompt_tokens_per_second,
            self.tokens.len(),
            self.generated_tokens_per_second,
            self.finish.replace('_', " "),
            self.accepted_tokens,
            self.proposed_tokens,
            self.load_seconds,
            self.first_token_seconds,
            self.seed,
            self.kernel,
            output::threads(self.n_threads),
        ));
    }
}
