//! Many prompts in one run that can be killed and goes on.

mod resume;
mod rows;

use crate::constraint::Forms;
use crate::hub;
use crate::output::{self, Interrupted, note, notice, rate};
use crate::sampling::{GenerateArgs, check_biases};
use crate::source::{self, Wish};
use crate::usage_error;
use anyhow::{Context, bail, ensure};
use bitnet::generate::{Batch, Ended, Event, FinishReason, Request, RequestId};
use bitnet::gguf::Gguf;
use bitnet::model::{Model, ModelInfo, identity};
use bitnet::text::{ChatTemplate, Message, Role, Specials};
use bitnet::{Engine, EngineOptions};
use clap::error::ErrorKind;
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use resume::{Before, Kept, Output};
use rows::{Defaults, Prompt, Row, Rows};
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// Continue or answer many prompts, from files of JSON lines or of text
///
/// A row of input is a line of JSON such as {"id": 7, "prompt": "Once upon"} or {"messages": [{"role": "user", "content":
/// "Hi"}], "max_tokens": 50}, in a file named .jsonl or .ndjson or from stdin (-), or a whole file of any other name. Options
/// of a row: max_tokens, temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, frequency_penalty,
/// presence_penalty, logit_bias ({"ID": BIAS}), seed, stop, ignore_eos, and json_schema (an object), grammar or regex.
/// A line without an id has its number as one, counted over all inputs.
///
/// The output has a line of JSON for each row, in the same order. Run again after it was killed, the command goes on where
/// it was, so that every row is there once; rows that were added to the input are added to the output. What is wrong with a
/// row is told in its place; the exit code is then 1, after all others are written.
#[derive(clap::Args)]
#[command(mut_arg("seed", |seed| seed.help("Seed of the first row; each next one has the next [default: 0]")))]
#[command(mut_arg("max_memory", |memory| memory.help(
    "Take no more memory than this, such as 1.5G or 800M: fewer texts run at a time, and a context that does not fit is refused \
     [default: what the machine or the control group has available]")))]
#[command(after_help = "Examples:
  bitnet batch -m model.gguf prompts.jsonl -o answers.jsonl
  bitnet batch -m model.gguf --chat --system \"Sum up.\" texts/ -o sums.jsonl -n 200
  echo '{\"prompt\": \"Once upon a time\"}' | bitnet batch - -o tale.jsonl")]
pub struct Args {
    #[command(flatten)]
    model: source::ModelArgs,
    /// Files and folders; - is stdin
    #[arg(required = true, value_name = "INPUT")]
    inputs: Vec<PathBuf>,
    /// Where the rows go; what is there already is kept
    #[arg(short = 'o', long, value_name = "FILE")]
    output: PathBuf,
    /// Forget what the output holds
    #[arg(long)]
    overwrite: bool,
    /// Rows that are computed together at most; the result does not depend on it
    #[arg(short = 'b', long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    batch_size: u16,
    /// A prompt or a file of text is a message to answer, not a text to continue
    #[arg(long)]
    chat: bool,
    /// With --chat: what the model should know or be
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, requires = "chat")]
    system: Option<String>,
    /// How messages become a prompt: bitnet, llama3, falcon3, chatml or a file with Jinja [default: as the model says]
    #[arg(long, value_name = "NAME|FILE")]
    chat_template: Option<String>,
    /// Go on where the model ends the text
    #[arg(long)]
    ignore_eos: bool,
    #[command(flatten)]
    generate: GenerateArgs,
}

/// A row of the output.
#[derive(Serialize)]
struct Written {
    id: Value,
    #[serde(flatten)]
    result: Outcome,
    key: String,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Outcome {
    Done {
        text: String,
        finish_reason: &'static str,
        prompt_tokens: usize,
        completion_tokens: usize,
        seed: u64,
        /// Only where it is false: the text ended before it had its form.
        #[serde(skip_serializing_if = "Option::is_none")]
        complete: Option<bool>,
    },
    Failed {
        error: String,
    },
}

/// Rows of the output, and how many of them tell an error.
#[derive(Clone, Copy, Default)]
struct Count {
    rows: u64,
    errors: u64,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let GenerateArgs { constraint, sampling, .. } = &args.generate;
    if constraint.reads_stdin() && args.inputs.iter().any(|input| input.as_os_str() == "-") {
        usage_error(ErrorKind::ArgumentConflict, "the rows and the schema are both read from stdin");
    }
    if args.output.as_os_str() == "-" {
        usage_error(ErrorKind::InvalidValue, "-o -: a later run goes on from the output, so it is a file");
    }
    let defaults = Defaults {
        sampler: sampling.sampler(0).config().clone(),
        stop: args.generate.stop(),
        ignore_eos: args.ignore_eos,
        form: constraint.form()?,
    };
    let template = args.chat_template.as_deref().map(source::template).transpose()?;
    let inputs = rows::inputs(&args.inputs, &args.output)?;
    let shown = !args.model.file.quiet && io::stderr().is_terminal();
    let total = if shown { Rows::count(&inputs) } else { None };
    let mut rows = Rows::new(inputs);
    let gguf = Arc::new(args.model.file.open()?);
    let compute = args.model.compute()?;
    let width = usize::from(args.batch_size);
    let info = ModelInfo::new(&gguf, args.model.strategy_for(&gguf, &compute, width))?;
    let options = plan(args, &gguf, &info, compute.pool().threads())?;
    // All that the text of a row depends on besides the row itself.
    let Defaults { sampler, stop, ignore_eos, form } = &defaults;
    let stop = (stop.max_tokens, &stop.strings, ignore_eos, form);
    let chat = (args.chat, &args.system, &template);
    let settings = format!("{:?}", (sampler, stop, chat, options.context, options.cache_type));
    let keys = Sha256::new()
        .chain_update(b"bitnet batch 3")
        .chain_update(identity(&gguf, &compute))
        .chain_update(settings);
    let mut before = Count::default();
    let file = &args.model.file;
    let output = Before::read(&args.output, args.overwrite, file, &mut |kept: Kept| {
        let row = rows.next()?.context("there are more rows than in the input")?;
        ensure!(
            key(&keys, &row) == kept.key,
            "the input, the settings or the model changed since ({})",
            row.place
        );
        before.rows += 1;
        before.errors += u64::from(kept.error.is_some());
        Ok(())
    })?;
    let Some(first) = rows.next()? else {
        output.begin(file)?;
        match before.rows {
            0 => file.note("there are no rows"),
            rows => file.note(format_args!("all rows are there: {rows}{}", errors(before.errors))),
        }
        return failed(args, before.errors);
    };
    // Rows may come from somebody who takes time; those that are there must not wait for them.
    let (sender, input) = mpsc::sync_channel(width);
    thread::spawn(move || while sender.send(rows.next()).is_ok() {});

    let forms = Forms::default();
    let prepare = |tokenizer: &_| forms.prepare(defaults.form.as_ref(), tokenizer);
    let model = info.load_with(&gguf, &compute, prepare)?;
    file.note_repairs(model.repairs());
    model.tokenizer()?;
    check_biases(&defaults.sampler, &model)?;
    let prompts = Prompts::new(args, &model, template.as_deref())?;
    let engine = Engine::new(model, compute, options)?;
    let interrupted = output::interrupt_flag()?;
    let mut run = Run {
        batch: Batch::new(engine, width),
        width,
        prompts,
        forms,
        defaults,
        keys,
        active: HashMap::new(),
        finished: BTreeMap::new(),
        next: first.index,
        new: Count::default(),
    };
    let mut output = output.begin(file)?;
    let progress = Progress::new(file.quiet, total, before)?;

    run.start(first);
    let mut open = true;
    let mut failure = None;
    let mut stopping = false;
    loop {
        if interrupted.load(Ordering::Relaxed) && !stopping {
            (stopping, open) = (true, false);
            let left = run.stop();
            let rows = if left == 1 { "row is" } else { "rows are" };
            let why = "computed to the end, for later ones wait for it; Ctrl-C again leaves at once";
            progress.bar.suspend(|| note(file.quiet || left == 0, format_args!("{left} {rows} {why}")));
        }
        while open && run.has_room() {
            let wait = Duration::from_millis(if run.batch.is_idle() { 50 } else { 0 });
            match input.recv_timeout(wait) {
                Ok(Ok(Some(row))) => run.start(row),
                Ok(Err(error)) => (failure, open) = (Some(error), false),
                Ok(Ok(None)) | Err(RecvTimeoutError::Disconnected) => open = false,
                Err(RecvTimeoutError::Timeout) => break,
            }
        }
        if !run.batch.is_idle() {
            run.step()?;
        } else if !open && run.finished.is_empty() {
            break;
        }
        run.write(&mut output)?;
        progress.show(&run);
    }
    output.sync()?;
    progress.bar.finish_and_clear();
    if !file.quiet {
        run.report(before, progress.start);
    }
    args.model.tell_memory(run.batch.engine());
    match failure {
        _ if stopping => bail!(Interrupted),
        Some(error) => Err(error),
        None => failed(args, before.errors + run.new.errors),
    }
}

/// An error where rows of the output tell one.
fn failed(args: &Args, errors: u64) -> anyhow::Result<()> {
    let rows = if errors == 1 { "row has" } else { "rows have" };
    ensure!(errors == 0, "{errors} {rows} an error, see {}", args.output.display());
    Ok(())
}

/// An engine for as many full contexts as the memory allows; rows that need less than that run together all the same. The
/// context itself does not give way, for then the text might depend on the memory.
fn plan(args: &Args, gguf: &Gguf, info: &ModelInfo<'_>, threads: usize) -> anyhow::Result<EngineOptions> {
    let context = u32::try_from(source::context(args.generate.ctx_size, &info.config)).ok();
    let logits = usize::from(args.batch_size);
    let mut sequences = logits;
    loop {
        let wish = Wish { context, sequences, logits, ..Wish::default() };
        let plan = args.model.plan(gguf.name(), &info.config, &wish, |options| info.memory(options, threads));
        if plan.is_ok() || sequences == 1 {
            return plan;
        }
        sequences /= 2;
    }
}

/// What tells a row of this run from all others.
fn key(keys: &Sha256, row: &Row) -> String {
    let id = row.id.to_string();
    let hash = keys.clone().chain_update(id).chain_update([0]).chain_update(&row.raw).finalize();
    hash[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn errors(count: u64) -> String {
    if count == 0 { String::new() } else { format!(", {count} of them with an error") }
}

/// Makes tokens of what rows ask for.
struct Prompts {
    template: Result<ChatTemplate, bitnet::Error>,
    chat: bool,
    system: Option<String>,
}

impl Prompts {
    fn new(args: &Args, model: &Model, template: Option<&str>) -> anyhow::Result<Self> {
        let template = match model.chat_template(template) {
            // Else only rows with messages need it.
            Err(error) if args.chat || args.chat_template.is_some() => return Err(error.into()),
            template => template,
        };
        Ok(Self { template, chat: args.chat, system: args.system.clone() })
    }

    /// The tokens, and one that ends an answer.
    fn tokens(&self, model: &Model, prompt: Prompt) -> anyhow::Result<(Vec<u32>, Option<u32>)> {
        let messages = match prompt {
            Prompt::Text(text) if !self.chat => return Ok((model.prompt(&text, Specials::AsText)?, None)),
            Prompt::Text(text) => {
                let system = self.system.iter().map(|system| Message::new(Role::System, system));
                system.chain([Message::new(Role::User, text)]).collect()
            }
            Prompt::Messages(messages) => messages,
        };
        let template = self.template.as_ref().map_err(|error| anyhow::anyhow!("{error}"))?;
        Ok((template.encode(model.tokenizer()?, &messages, true)?, template.end_of_turn()))
    }
}

struct Run {
    batch: Batch,
    width: usize,
    prompts: Prompts,
    forms: Forms,
    defaults: Defaults,
    keys: Sha256,
    active: HashMap<RequestId, Active>,
    /// By index, those that wait for one before them.
    finished: BTreeMap<u64, Written>,
    /// Index of the row to be written next.
    next: u64,
    /// What was written.
    new: Count,
}

/// A row that is computed.
struct Active {
    row: u64,
    id: Value,
    key: String,
    seed: u64,
    text: String,
}

impl Run {
    /// Whether another row may begin. What is finished and waits is lost when the run is killed, so it may not be too much.
    fn has_room(&self) -> bool {
        self.batch.waiting() < self.width && self.active.len() + self.finished.len() < 64 * self.width
    }

    /// Takes a row in; one that asks for nothing that can be done is finished at once.
    fn start(&mut self, mut row: Row) {
        let key = key(&self.keys, &row);
        let index = row.index;
        match self.push(&mut row) {
            Ok((request, seed)) => {
                self.active
                    .insert(request, Active { row: index, id: row.id, key, seed, text: String::new() });
            }
            Err(error) => {
                let result = Outcome::Failed { error: format!("{error:#}") };
                self.finished.insert(index, Written { id: row.id, result, key });
            }
        }
    }

    fn push(&mut self, row: &mut Row) -> anyhow::Result<(RequestId, u64)> {
        let rows::Request { prompt, sampler, mut stop, ignore_eos, form } = row.request(&self.defaults)?;
        let model = self.batch.engine().model();
        check_biases(sampler.config(), model)?;
        let (prompt, end_of_turn) = self.prompts.tokens(model, prompt)?;
        if !ignore_eos {
            stop.ids.clone_from(&model.special().stop);
            stop.ids.extend(end_of_turn);
        }
        stop.constraint = self.forms.constraint(form.as_ref(), model)?;
        let seed = sampler.config().seed;
        Ok((self.batch.push(Request { prompt, sampler, stop })?, seed))
    }

    fn step(&mut self) -> anyhow::Result<()> {
        let Self { batch, active, finished, .. } = self;
        batch.step(&mut |request, event| match event {
            Event::Text(part) => {
                if let Some(row) = active.get_mut(&request) {
                    row.text.push_str(part);
                }
            }
            Event::Ended(result) => {
                if let Some(Active { row, id, key, seed, text }) = active.remove(&request) {
                    let result = match result {
                        Ok(ended) => done(&ended, text, seed),
                        Err(error) => Outcome::Failed { error: error.to_string() },
                    };
                    finished.insert(row, Written { id, result, key });
                }
            }
        })?;
        Ok(())
    }

    /// Writes what is finished, up to the first row that is not.
    fn write(&mut self, output: &mut Output) -> anyhow::Result<()> {
        while let Some(row) = self.finished.remove(&self.next) {
            output.write(&row)?;
            self.next += 1;
            self.new.rows += 1;
            self.new.errors += u64::from(matches!(row.result, Outcome::Failed { .. }));
        }
        Ok(())
    }

    /// Gives up all rows but those that are needed before finished ones can be written; how many these are.
    fn stop(&mut self) -> usize {
        let computed = |row: &Written| matches!(row.result, Outcome::Done { .. });
        let last = self.finished.iter().rev().find(|(_, row)| computed(row)).map_or(0, |(index, _)| *index);
        self.finished.retain(|index, _| *index <= last);
        let Self { active, batch, .. } = self;
        active.retain(|request, active| {
            let needed = active.row < last;
            if !needed {
                batch.cancel(*request);
            }
            needed
        });
        active.len()
    }

    fn report(&self, before: Count, start: Instant) {
        let counts = self.batch.counts();
        let time = start.elapsed();
        let had =
            if before.rows == 0 { String::new() } else { format!(" after {} that were there", before.rows) };
        notice(format_args!(
            "{} row{}{had}{}\nprompts    {:>6} tokens computed, {} shared\ngenerated  {:>6} tokens in {} steps, {:.2} tokens/s in all",
            self.new.rows,
            if self.new.rows == 1 { "" } else { "s" },
            errors(before.errors + self.new.errors),
            counts.prompt_tokens,
            counts.shared_tokens,
            counts.generated_tokens,
            counts.steps,
            rate(counts.prompt_tokens + counts.generated_tokens, time),
        ));
    }
}

fn done(ended: &Ended, text: String, seed: u64) -> Outcome {
    let finish_reason = match ended.finish {
        FinishReason::StopToken(_) | FinishReason::StopString(_) | FinishReason::Complete => "stop",
        FinishReason::Length => "length",
        FinishReason::ContextFull => "context_full",
        FinishReason::Cancelled => "cancelled",
    };
    let (prompt_tokens, completion_tokens) = (ended.prompt_tokens, ended.tokens.len());
    let complete = (!ended.complete).then_some(false);
    Outcome::Done { text, finish_reason, prompt_tokens, completion_tokens, seed, complete }
}

/// The bar on a terminal.
struct Progress {
    bar: ProgressBar,
    start: Instant,
}

impl Progress {
    fn new(quiet: bool, total: Option<u64>, before: Count) -> anyhow::Result<Self> {
        let bar = hub::bar(quiet);
        if let Some(total) = total {
            bar.set_length(total);
        }
        bar.set_style(ProgressStyle::with_template(match total {
            Some(_) => "{wide_bar} {pos} of {len} rows{msg}",
            None => "{spinner} {pos} rows{msg}",
        })?);
        // What was there before is no speed.
        bar.set_position(before.rows);
        bar.reset_eta();
        Ok(Self { bar, start: Instant::now() })
    }

    fn show(&self, run: &Run) {
        if !self.bar.is_hidden() {
            let counts = run.batch.counts();
            let tokens = counts.prompt_tokens + counts.generated_tokens;
            self.bar.set_position(run.next);
            let mut message = format!(", {:.1} tokens/s", rate(tokens, self.start.elapsed()));
            if run.new.rows > 0 && self.bar.length().is_some() {
                let _ = write!(message, ", {} left", HumanDuration(self.bar.eta()));
            }
            self.bar.set_message(message);
        }
    }
}
