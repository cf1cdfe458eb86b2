//! Where models, threads and texts come from.

use crate::hub;
use crate::memory::{self, MemoryArgs};
use crate::output::{self, notice};
use crate::selftest;
use anyhow::{Context, anyhow, bail, ensure};
use bitnet::gguf::Gguf;
use bitnet::hub::ModelName;
use bitnet::kernels::ternary::Layout;
use bitnet::kernels::{
    Bytes, Compute, Kernels, MemoryPart, PartBytes, RowRace, allowed_threads, best, supported,
};
use bitnet::model::{Config, Model, ModelInfo, Repair, Strategy};
use bitnet::text::{ChatTemplate, Tokenizer};
use bitnet::{Engine, EngineOptions, Error, MemoryPlan};
use std::fmt::Display;
use std::io::{IsTerminal, Read};
use std::path::Path;
use std::sync::Arc;

/// The model of a command.
#[derive(clap::Args)]
pub struct FileArgs {
    /// Path of a GGUF file, or a name on the hub such as 2b-4t or OWNER/REPO [default: the built-in demo]
    #[arg(short = 'm', long, value_name = "MODEL")]
    pub model: Option<String>,
    /// No notices and statistics on stderr
    #[arg(short = 'q', long)]
    pub quiet: bool,
}

/// From so many bytes on the layout of rows is chosen: caches hold what is smaller, and there fewer bits gain nothing.
pub const LARGE_FILE: u64 = 256 << 20;

/// The model of a command, and what it runs on.
#[derive(clap::Args)]
pub struct ModelArgs {
    #[command(flatten)]
    pub file: FileArgs,
    /// Threads [default: one for each physical core that this process may use]
    #[arg(short = 't', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Kernels: scalar; avx2, avxvnni, avx512, avx512vnni, amx; neon, neondotprod or neoni8mm [default: the best for this CPU]
    #[arg(long, value_name = "ISA", value_parser = parse_kernels)]
    pub kernels: Option<&'static Kernels>,
    #[command(flatten)]
    memory: MemoryArgs,
    /// Read every weight for every token, instead of only those that can matter; the result is the same
    #[arg(long)]
    dense: bool,
    /// How rows of weights are kept in memory; the result is the same [auto: what a measurement at the start finds faster, 2bit where several texts share a step]
    #[arg(long, value_name = "LAYOUT", default_value = "auto", hide_default_value = true)]
    layout: RowLayout,
    /// Tell what memory is taken for
    #[arg(long, conflicts_with = "quiet")]
    verbose: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum RowLayout {
    /// Measure
    Auto,
    /// Two bits a weight
    #[value(name = "2bit")]
    TwoBits,
    /// Five weights in a byte
    Base3,
}

/// The model of a command that takes it without -m too.
#[derive(clap::Args)]
pub struct NamedModelArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The same as -m
    #[arg(value_name = "MODEL", conflicts_with = "model")]
    name: Option<String>,
}

impl NamedModelArgs {
    pub fn named(&mut self) -> &ModelArgs {
        self.model.file.model = self.name.take().or(self.model.file.model.take());
        &self.model
    }
}

/// What a command needs of its engine.
pub struct Wish {
    /// Tokens of context that were asked for; 0: all the model was trained with; None: the engine's default, or fewer.
    pub context: Option<u32>,
    pub sequences: usize,
    pub max_rows: usize,
    /// Tokens whose logits are wanted at once.
    pub logits: usize,
    /// Bytes that the command takes beside model and engine.
    pub beside: usize,
}

impl Default for Wish {
    fn default() -> Self {
        Self { context: None, sequences: 1, max_rows: 512, logits: 1, beside: 0 }
    }
}

/// What `-c` may be.
pub fn context_range() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(0..=1 << 24)
}

/// Opens a model file, by its path or its name on the hub, or the built-in demo.
pub fn open(model: Option<&str>, quiet: bool) -> anyhow::Result<Gguf> {
    let Some(name) = model else {
        return Ok(Gguf::from_static("built-in demo", include_bytes!("../../../models/demo.gguf"))?);
    };
    match on_hub(name)? {
        Some(name) => Ok(Gguf::open(&hub::model_file(&name, quiet)?)?),
        None => Ok(Gguf::open(Path::new(name))?),
    }
}

/// The name on the hub that `model` is, or None where it is the path of a file.
fn on_hub(model: &str) -> anyhow::Result<Option<ModelName>> {
    let path = Path::new(model);
    if path.is_dir() {
        if path.join("config.json").exists() {
            bail!("{model}: this is a folder; `bitnet convert {model} OUT.gguf` makes a model file of it");
        }
        bail!("{model}: this is a folder; a model is a GGUF file");
    }
    let name = hub::name_unless_path(model)?;
    if name.is_none() && !path.exists() {
        bail!(
            "{model}: no such file; `bitnet list` shows what was downloaded, `bitnet pull --help` what can be"
        );
    }
    Ok(name)
}

impl FileArgs {
    /// Whether there may be such a model, before anything is read for it.
    pub fn check(&self) -> anyhow::Result<()> {
        self.model.as_deref().map_or(Ok(None), on_hub).map(drop)
    }

    pub fn open(&self) -> anyhow::Result<Gguf> {
        open(self.model.as_deref(), self.quiet)
    }

    /// Tells what was repaired, a line each.
    pub fn note_repairs(&self, repairs: &[Repair]) {
        for repair in repairs {
            self.note(&repair.message);
        }
    }

    /// One line on stderr, unless the user wants none.
    pub fn note(&self, line: impl Display) {
        output::note(self.quiet, line);
    }
}

impl ModelArgs {
    /// Kernels and threads, never more than the process may use.
    pub fn compute(&self) -> anyhow::Result<Compute> {
        let allowed = allowed_threads();
        let asked = self.threads.map_or(allowed, usize::from);
        if asked > allowed {
            self.file
                .note(format_args!("{asked} threads are more than this process may use; {allowed} it is"));
        }
        let wanted = self.kernels.unwrap_or_else(best);
        let kernels = selftest::sound(wanted, selftest::passes);
        if kernels.name() != wanted.name() {
            let [wrong, right] = [wanted, kernels].map(Kernels::name);
            self.file.note(format_args!(
                "the kernels {wrong} compute wrong results on this machine; {right} is used"
            ));
        }
        Ok(Compute::new(kernels, asked.min(allowed)))
    }

    /// How the weights are kept and what a decoded token reads of them. The `race` is held where its result counts.
    pub fn strategy(&self, sequences: usize, race: impl FnOnce() -> RowRace) -> Strategy {
        let rows = match self.layout {
            RowLayout::Base3 => Layout::Base3,
            // Several tokens share what is read of a row, and two bits take less arithmetic.
            RowLayout::Auto if sequences == 1 => {
                let race = race();
                if self.verbose {
                    notice(format_args!("layout of rows: {race}"));
                }
                race.layout
            }
            RowLayout::Auto | RowLayout::TwoBits => Layout::Rows,
        };
        Strategy { sparse: !self.dense, rows }
    }

    /// The strategy for a file.
    pub fn strategy_for(&self, gguf: &Arc<Gguf>, compute: &Compute, sequences: usize) -> Strategy {
        self.strategy(sequences, || {
            if gguf.byte_len() < LARGE_FILE {
                return RowRace::NONE;
            }
            // The middle of the file: weights, or an embedding. It begins with a page.
            let start = ((gguf.byte_len() as usize - RowRace::BYTES) / 2) & !0xffff;
            compute.race_rows(Some(Bytes::new(gguf.clone(), start..start + RowRace::BYTES)))
        })
    }

    /// Plans the memory and then loads the model; tells what was repaired and what gave way. `beside` gets the tokenizer while
    /// the weights are read.
    pub fn load(
        &self,
        compute: &Compute,
        wish: &Wish,
        beside: impl Fn(&Arc<Tokenizer>) + Sync,
    ) -> anyhow::Result<(Model, EngineOptions)> {
        let (model, options) = self.load_file(&Arc::new(self.file.open()?), compute, wish, beside)?;
        self.file.note_repairs(model.repairs());
        Ok((model, options))
    }

    /// As [`Self::load`], of a file that is open and without a word about repairs.
    pub fn load_file(
        &self,
        gguf: &Arc<Gguf>,
        compute: &Compute,
        wish: &Wish,
        beside: impl Fn(&Arc<Tokenizer>) + Sync,
    ) -> anyhow::Result<(Model, EngineOptions)> {
        let info = ModelInfo::new(gguf, self.strategy_for(gguf, compute, wish.sequences))?;
        let threads = compute.pool().threads();
        let options = self.plan(gguf.name(), &info.config, wish, |options| info.memory(options, threads))?;
        Ok((info.load_with(gguf, compute, beside)?, options))
    }

    /// Options that fulfil `wish` and fit in the memory there is.
    pub fn plan(
        &self,
        model: &str,
        config: &Config,
        wish: &Wish,
        plan: impl Fn(&EngineOptions) -> MemoryPlan,
    ) -> anyhow::Result<EngineOptions> {
        let options = EngineOptions {
            context: context(wish.context, config),
            sequences: wish.sequences,
            max_rows: wish.max_rows,
            cache_type: self.memory.cache_type(),
            logits: wish.logits,
        };
        let mut beside = PartBytes::default();
        beside[MemoryPart::Scratch as usize] = wish.beside;
        let plan = |options: &EngineOptions| plan(options).and(beside);
        let (options, shrunk) = self.memory.fit(model, options, wish.context.is_none(), plan)?;
        let (context, trained) = (options.context, config.context_length);
        if context > trained {
            self.file
                .note(format_args!("a context of {context} tokens; the model was trained with {trained}"));
        }
        if let Some(shrunk) = shrunk {
            self.file.note(shrunk);
        }
        if self.verbose {
            notice(format_args!("memory planned: {}", memory::sum(&plan(&options), &options)));
        }
        Ok(options)
    }

    /// With `--verbose`: the memory that was taken.
    pub fn tell_memory(&self, engine: &Engine) {
        if self.verbose {
            memory::tell(engine);
        }
    }
}

/// Tokens of context: `asked` (0: all the model was trained with), or the engine's default.
pub fn context(asked: Option<u32>, config: &Config) -> usize {
    match asked {
        None => EngineOptions::for_model(config).context,
        Some(0) => config.context_length,
        Some(n) => n as usize,
    }
}

/// Reads a text from a file, or from stdin where there is none. Neither is trusted to be UTF-8.
pub fn read_text(file: Option<&Path>) -> anyhow::Result<String> {
    let (name, bytes) = match file {
        Some(path) => {
            let name = path.display().to_string();
            let bytes = std::fs::read(path).with_context(|| format!("{name}: cannot read"))?;
            (name, bytes)
        }
        None => {
            let mut bytes = Vec::new();
            let mut stdin = std::io::stdin().lock();
            if stdin.is_terminal() {
                let end = if cfg!(windows) { "Ctrl-Z and Enter end" } else { "Ctrl-D ends" };
                notice(format_args!("note: reading the text from the terminal; {end} it"));
            }
            stdin.read_to_end(&mut bytes).context("stdin: cannot read")?;
            ("stdin".to_owned(), bytes)
        }
    };
    utf8(bytes).context(name)
}

/// The text that `bytes` are.
pub fn utf8(bytes: Vec<u8>) -> anyhow::Result<String> {
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        anyhow!("not UTF-8: byte {:#04x} at offset {at}", error.as_bytes()[at])
    })
}

/// Reads a prompt: as [`read_text`], without one newline at the end, which editors and `echo` add.
pub fn read_prompt(file: Option<&Path>) -> anyhow::Result<String> {
    let mut text = read_text(file)?;
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

/// The name of a built-in template, or what is in a file.
pub fn template(choice: &str) -> anyhow::Result<String> {
    let path = choice.contains(['/', '\\', '.']) || Path::new(choice).exists();
    if !path || ChatTemplate::is_built_in(choice) {
        return Ok(choice.to_owned());
    }
    let text = read_text(Some(Path::new(choice)))?;
    ensure!(text.contains('{'), "{choice}: not a chat template: no Jinja in it");
    Ok(text)
}

/// Token ids.
pub type Ids = Vec<u32>;

/// Token ids with spaces, commas or newlines between them.
pub fn parse_ids(text: &str) -> Result<Ids, String> {
    let words = text.split(|c: char| c.is_whitespace() || c == ',').filter(|word| !word.is_empty());
    let wrong = |word: &str| format!("{:?} is no token id", word.chars().take(40).collect::<String>());
    words.map(|word| word.parse().map_err(|_| wrong(word))).collect()
}

/// Checks that the model has all of `ids`.
pub fn check_ids(ids: &[u32], config: &Config) -> Result<(), Error> {
    let vocab_size = config.vocab_size;
    match ids.iter().position(|&id| id as usize >= vocab_size) {
        Some(index) => Err(Error::TokenOutOfRange { index, id: ids[index], vocab_size }),
        None => Ok(()),
    }
}

fn parse_kernels(name: &str) -> Result<&'static Kernels, String> {
    let all = supported();
    all.iter().copied().find(|kernels| kernels.name() == name).ok_or_else(|| {
        let names: Vec<_> = all.iter().map(|kernels| kernels.name()).collect();
        format!("this CPU can run {}", names.join(", "))
    })
}
