use crate::constraint::{Forms, INCOMPLETE};
use crate::editor::{Input, Lines, history_file};
use crate::output::{self, Interrupted, hint, note, notice, rate};
use crate::prompt_cache::PromptCacheArgs;
use crate::sampling::{GenerateArgs, check_biases, random_seed};
use crate::source::{self, Wish};
use crate::usage_error;
use anyhow::{Context, bail, ensure};
use bitnet::generate::{Answer, Chat, FinishReason, Sampler, SamplerConfig, StopConditions};
use bitnet::text::{Message, Role};
use bitnet::{Engine, Error};
use clap::error::ErrorKind;
use serde::{Deserialize, Serialize};
use std::io::{self, IsTerminal};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Talk with a model
///
/// In a terminal: type a message, Enter sends it. /help lists the commands. Ctrl-C stops an answer, Ctrl-D ends the chat.
/// From a pipe: each line is a message, and stdout has the answers and nothing else.
#[derive(clap::Args)]
#[command(mut_arg("n_predict", |n| n.default_value("-1")))]
#[command(after_help = "Examples:
  bitnet chat -m model.gguf                             talk in the terminal
  bitnet chat -m model.gguf --system \"Answer in French.\"
  printf 'Hi\\nAnd you?\\n' | bitnet chat -m model.gguf -q   two questions from a script")]
pub struct Args {
    #[command(flatten)]
    model: source::ModelArgs,
    /// System prompt: what the model should know or be before the first message
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    /// Go on with a conversation that /save wrote
    #[arg(long, value_name = "FILE")]
    load: Option<PathBuf>,
    /// How messages become a prompt: bitnet, llama3, falcon3, chatml or a file with Jinja [default: as the model says]
    #[arg(long, value_name = "NAME|FILE")]
    chat_template: Option<String>,
    /// Do not keep what is typed for the arrow keys of the next chat
    #[arg(long)]
    no_history: bool,
    #[command(flatten)]
    prompt_cache: PromptCacheArgs,
    #[command(flatten)]
    generate: GenerateArgs,
}

const HELP: &str = "\
/system [TEXT]      show the system prompt, or set it; /system - removes it
/clear              forget the conversation, but not the system prompt
/retry              another answer to the last question
/save FILE          write the conversation to a file
/load FILE          go on with a conversation from a file
/set [NAME VALUE]   show the settings, or change one, such as /set temp 0.5
/stats              what this chat took so far
/help               this list
/exit               end, as does Ctrl-D
Ctrl-C stops an answer. A backslash at the end of a line, Alt-Enter, or \"\"\" before and after: a message of several lines.
A message that begins with a slash: type it twice.";
const COMMANDS: [&str; 9] =
    ["/system ", "/clear", "/retry", "/save ", "/load ", "/set ", "/stats", "/help", "/exit"];
/// No conversation is longer.
const MAX_FILE: u64 = 64 << 20;

/// What `/save` writes.
#[derive(Serialize, Deserialize)]
struct Saved {
    messages: Vec<Message>,
}

struct Session {
    engine: Engine,
    chat: Chat,
    sampler: Sampler,
    stop: StopConditions,
    /// Ctrl-C raises it; without a terminal that ends the program, and so does a request to end.
    interrupted: Arc<AtomicBool>,
    quiet: bool,
    /// Lines are edited on a terminal.
    edited: bool,
    /// A person types them, there or where only stdout is a pipe or a file.
    person: bool,
    totals: Totals,
}

#[derive(Default)]
struct Totals {
    answers: usize,
    prompt_tokens: usize,
    cached_tokens: usize,
    generated: usize,
    prompt_time: Duration,
    decode_time: Duration,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let GenerateArgs { constraint, sampling, ctx_size, .. } = &args.generate;
    let sampler = sampling.sampler(random_seed());
    if constraint.reads_stdin() {
        usage_error(ErrorKind::ArgumentConflict, "--json-schema -: in a chat, stdin has the messages");
    }
    let form = constraint.form()?;
    let loaded = args.load.as_deref().map(load).transpose()?;
    let template = args.chat_template.as_deref().map(source::template).transpose()?;
    let compute = args.model.compute()?;
    let wish = Wish { context: *ctx_size, ..Wish::default() };
    let mut forms = Forms::default();
    let prepare = |tokenizer: &_| forms.prepare(form.as_ref(), tokenizer);
    let (model, options) = args.model.load(&compute, &wish, prepare)?;
    check_biases(sampler.config(), &model)?;
    let context = options.context;
    let template = model.chat_template(template.as_deref())?;
    let stop = StopConditions {
        ids: model.special().stop.clone(),
        constraint: forms.constraint(form.as_ref(), &model)?,
        ..args.generate.stop()
    };
    let name = model.file().to_owned();
    let mut engine = Engine::new(model, compute, options)?;
    let mut chat = Chat::new(&mut engine, template);
    chat.set_messages(loaded.unwrap_or_default());
    if let Some(system) = &args.system {
        chat.set_system(system);
    }
    args.prompt_cache.restore(&mut engine, chat.sequence(), None)?;
    let held = engine.tokens(chat.sequence()).to_vec();
    let mut lines = Lines::new(&COMMANDS, history_file().filter(|_| !args.no_history))?;
    let (edited, person) = (lines.are_edited(), io::stdin().is_terminal());
    let interrupted = if edited { output::ctrl_c_flag() } else { output::interrupt_flag() }?;
    engine.cancel_by(interrupted.clone());
    let mut session = Session {
        engine,
        chat,
        sampler,
        stop,
        interrupted,
        quiet: args.model.file.quiet,
        edited,
        person,
        totals: Totals::default(),
    };
    if person && !session.quiet {
        let template = session.chat.template().name();
        hint(format_args!("{name}, context of {context} tokens, chat template: {template}"));
        hint("/help lists the commands, Ctrl-D ends the chat");
    }
    let result = session.talk(&mut lines);
    drop(lines);
    let (engine, sequence) = (&session.engine, session.chat.sequence());
    args.model.tell_memory(engine);
    if held.starts_with(engine.tokens(sequence)) {
        return result;
    }
    // A signal ends the writing, not the program in the middle of it.
    session.interrupted.store(false, Ordering::Relaxed);
    let stop = output::interrupt_flag()?;
    let saved = args.prompt_cache.save(engine, sequence, usize::MAX, &stop);
    if let (Err(error), true) = (&saved, result.is_err()) {
        notice(format_args!("note: {error:#}"));
    }
    result.and(saved)
}

/// Waits for `next` and lets another thread finish meanwhile what loading left.
fn while_settling<T>(engine: &mut Engine, next: impl FnOnce() -> T) -> T {
    if engine.is_settled() {
        return next();
    }
    let here = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| engine.settle(|| here.load(Ordering::Relaxed)));
        let next = next();
        here.store(true, Ordering::Relaxed);
        next
    })
}

impl Session {
    fn talk(&mut self, lines: &mut Lines) -> anyhow::Result<()> {
        let person = self.person;
        loop {
            let next = while_settling(&mut self.engine, || lines.next(">>> ", &self.interrupted));
            let text = match next? {
                Input::Text(text) => text,
                Input::Cleared => {
                    hint("Ctrl-D or /exit ends the chat");
                    continue;
                }
                Input::End => break,
            };
            // Text from a pipe is never a command: it may be anybody's.
            let command = text.strip_prefix('/').filter(|rest| person && !rest.starts_with('/'));
            let result = match command {
                _ if text.trim().is_empty() => continue,
                Some("exit" | "quit" | "bye") => break,
                Some(command) => self.command(command),
                None => self.ask(if person { text.strip_prefix('/').unwrap_or(&text) } else { &text }),
            };
            match result {
                // What a person does wrong can be done again; a script has to know.
                Err(error) if person && !output::is_final(&error) => {
                    notice(format_args!("error: {error:#}"));
                }
                result => result?,
            }
        }
        Ok(())
    }

    fn ask(&mut self, text: &str) -> anyhow::Result<()> {
        self.chat.ask(text);
        self.answer()
    }

    fn answer(&mut self) -> anyhow::Result<()> {
        // A terminal hands Ctrl-C over as a key while a line is edited.
        if self.edited {
            self.interrupted.store(false, Ordering::Relaxed);
        }
        let start = Instant::now();
        let (mut first_token, mut failure, mut ends_line) = (None, None, true);
        let mut emit = |part: &str| {
            if !part.is_empty() {
                first_token.get_or_insert_with(|| start.elapsed());
                ends_line = part.ends_with('\n');
                failure = output::print_text(part).err();
            }
            if failure.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let answer = self.chat.answer(&mut self.engine, &mut self.sampler, &self.stop, &mut emit);
        if let Some(error) = failure {
            return Err(error);
        }
        if first_token.is_none() && answer.is_ok() || !ends_line {
            output::print(b"\n")?;
        }
        let answer = answer.map_err(advice)?;
        self.totals.add(&answer);
        let (dropped, cancelled) = (answer.dropped, answer.generated.finish == FinishReason::Cancelled);
        let full = format_args!("the context was full: the oldest {dropped} messages were left out");
        note(self.quiet || dropped == 0, full);
        note(self.quiet || cancelled || answer.generated.complete, INCOMPLETE);
        if !self.quiet {
            self.print_statistics(&answer, first_token);
        }
        ensure!(!cancelled || self.edited, Interrupted);
        Ok(())
    }

    fn print_statistics(&self, answer: &Answer, first_token: Option<Duration>) {
        let tokens = answer.generated.tokens.len();
        let read = answer.prompt_tokens - answer.cached_tokens;
        if tokens == 0 && answer.generated.finish == FinishReason::Cancelled {
            hint(format_args!("[stopped while it read {read} tokens]"));
            return;
        }
        let speed = rate(tokens.saturating_sub(1), answer.generated.decode_time);
        let first = first_token.unwrap_or(answer.generated.prompt_time).as_secs_f64();
        let (used, context) = (self.chat.cached_tokens(&self.engine), self.engine.options().context);
        let ended = match answer.generated.finish {
            FinishReason::StopToken(_) | FinishReason::StopString(_) | FinishReason::Complete => "",
            FinishReason::Length => ", ended by -n",
            FinishReason::ContextFull => ", ended: the context is full",
            FinishReason::Cancelled => ", stopped",
        };
        hint(format_args!(
            "[{tokens} tokens, {speed:.1} tokens/s, first after {first:.2} s ({read} read), context {used} of {context}{ended}]"
        ));
    }

    fn command(&mut self, command: &str) -> anyhow::Result<()> {
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        match (name, rest) {
            ("help" | "?", _) => notice(HELP),
            ("system", "") => notice(self.chat.system().unwrap_or("no system prompt")),
            ("system", text) => {
                self.chat.set_system(if text == "-" { "" } else { text });
                hint(if text == "-" { "no system prompt from now on" } else { "system prompt set" });
            }
            ("clear" | "retry" | "stats", argument) if !argument.is_empty() => {
                bail!("/{name} takes no argument")
            }
            ("clear", _) => {
                self.chat.clear();
                hint("conversation forgotten");
            }
            ("retry", _) => {
                ensure!(self.chat.retry(), "there is no question to answer again");
                self.answer()?;
            }
            ("save" | "load", "") => bail!("/{name} needs the name of a file"),
            ("save", file) => {
                save(&at_home(file), self.chat.messages())?;
                hint(format_args!("{} messages saved to {file}", self.chat.messages().len()));
            }
            ("load", file) => {
                let messages = load(&at_home(file))?;
                hint(format_args!("{} messages loaded from {file}", messages.len()));
                self.chat.set_messages(messages);
            }
            ("set", "") => self.print_settings(),
            ("set", setting) => self.set(setting)?,
            ("stats", _) => self.print_totals(),
            _ => bail!("there is no command /{name}; /help lists them"),
        }
        Ok(())
    }

    fn set(&mut self, setting: &str) -> anyhow::Result<()> {
        let parts = setting.split_once(|c: char| c.is_whitespace() || c == '=');
        let (name, value) = parts.with_context(|| format!("/set {setting} VALUE: what value?"))?;
        let value = value.trim();
        let number = || value.parse::<f32>().ok().with_context(|| format!("{value:?} is no number"));
        let count = || value.parse::<u32>().ok().with_context(|| format!("{value:?} is no whole number"));
        let mut config = self.sampler.config().clone();
        let option = name.trim_start_matches("--").replace('_', "-");
        match option.as_str() {
            "temp" | "temperature" => config.temperature = number()?,
            "top-k" => config.top_k = count()?,
            "top-p" => config.top_p = number()?,
            "min-p" => config.min_p = number()?,
            "repeat-penalty" => config.repeat_penalty = number()?,
            "repeat-last-n" => config.repeat_last_n = count()?,
            "frequency-penalty" => config.frequency_penalty = number()?,
            "presence-penalty" => config.presence_penalty = number()?,
            "seed" => config.seed = value.parse().ok().with_context(|| format!("{value:?} is no seed"))?,
            "n" | "n-predict" => {
                let most = value.parse::<i64>().ok().filter(|most| *most >= -1);
                let most =
                    most.with_context(|| format!("{value:?} is no number of tokens; -1 is no limit"))?;
                self.stop.max_tokens = usize::try_from(most).ok();
            }
            _ => bail!("there is no setting {name}; /set alone lists them"),
        }
        match option.as_str() {
            "seed" => self.sampler = Sampler::new(config)?,
            _ => self.sampler.configure(config)?,
        }
        hint(format_args!("{name} is {value} now"));
        Ok(())
    }

    fn print_settings(&self) {
        let most = self.stop.max_tokens.map_or(-1, |most| most as i64);
        let SamplerConfig { temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, .. } =
            self.sampler.config();
        let SamplerConfig { frequency_penalty, presence_penalty, seed, .. } = self.sampler.config();
        notice(format_args!(
            "temp {temperature}\ntop-k {top_k}\ntop-p {top_p}\nmin-p {min_p}\nrepeat-penalty {repeat_penalty}\n\
             repeat-last-n {repeat_last_n}\nfrequency-penalty {frequency_penalty}\npresence-penalty {presence_penalty}\n\
             seed {seed}\nn {most}"
        ));
    }

    fn print_totals(&self) {
        let Totals { answers, prompt_tokens, cached_tokens, generated, prompt_time, decode_time } =
            self.totals;
        // What /clear leaves in the cache is no context.
        let empty = self.chat.messages().iter().all(|message| message.role == Role::System);
        let used = if empty { 0 } else { self.chat.cached_tokens(&self.engine) };
        let context = self.engine.options().context;
        let compute = self.engine.compute();
        notice(format_args!(
            "answers    {answers:>7}\nread       {:>7} tokens  {:>8.2} tokens/s  ({cached_tokens} more were in the cache)\n\
             generated  {generated:>7} tokens  {:>8.2} tokens/s\ncontext    {used:>7} of {context} tokens\n{}, {}",
            prompt_tokens - cached_tokens,
            rate(prompt_tokens - cached_tokens, prompt_time),
            rate(generated.saturating_sub(answers), decode_time),
            compute.kernels().name(),
            output::threads(compute.pool().threads()),
        ));
    }
}

impl Totals {
    fn add(&mut self, answer: &Answer) {
        if answer.generated.tokens.is_empty() {
            return; // it ended before its prompt was read
        }
        self.answers += 1;
        self.prompt_tokens += answer.prompt_tokens;
        self.cached_tokens += answer.cached_tokens;
        self.generated += answer.generated.tokens.len();
        self.prompt_time += answer.generated.prompt_time;
        self.decode_time += answer.generated.decode_time;
    }
}

/// A path in which ~ is the user's folder, as a shell has it.
fn at_home(file: &str) -> PathBuf {
    match (file.strip_prefix("~/"), std::env::home_dir()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => file.into(),
    }
}

/// Says what to do about an error.
fn advice(error: Error) -> anyhow::Error {
    match error {
        Error::ContextFull { needed, context } => anyhow::anyhow!(
            "system prompt and message take {needed} tokens, the context has {context}; -c sets it, or say less"
        ),
        error => error.into(),
    }
}

fn load(path: &Path) -> anyhow::Result<Vec<Message>> {
    let name = path.display();
    let len = path.metadata().with_context(|| format!("{name}: cannot read"))?.len();
    ensure!(len <= MAX_FILE, "{name}: {len} bytes are no conversation");
    let saved: Saved = serde_json::from_str(&source::read_text(Some(path))?)
        .with_context(|| format!("{name}: not a conversation that /save wrote"))?;
    let later = saved.messages.iter().skip(1).any(|message| message.role == Role::System);
    ensure!(!later, "{name}: a system prompt that is not the first message");
    Ok(saved.messages)
}

fn save(path: &Path, messages: &[Message]) -> anyhow::Result<()> {
    ensure!(
        !path.exists() || load(path).is_ok(),
        "{}: exists and is no conversation; it was left alone",
        path.display()
    );
    output::write_file(path, |file| {
        serde_json::to_writer_pretty(&mut *file, &Saved { messages: messages.to_vec() })?;
        Ok(file.write_all(b"\n")?)
    })
}
