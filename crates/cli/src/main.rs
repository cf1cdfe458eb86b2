//! The `bitnet` command: parse, call, print.

// A binary has no users of its items.
#![allow(unreachable_pub)]

mod commands;
mod constraint;
mod editor;
mod hub;
mod machine;
mod memory;
mod output;
mod prompt_cache;
mod sampling;
mod selftest;
mod source;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, CommandFactory, FromArgMatches, Parser, Subcommand};
use std::error::Error;
use std::fmt::Display;
use std::process::ExitCode;

/// Run BitNet b1.58 models.
///
/// MODEL is the path of a GGUF file, or the name of a model on the Hugging Face hub, which is downloaded once; without
/// one the small demo model that is built into the program is used.
#[derive(Parser)]
#[command(name = "bitnet", version, arg_required_else_help = true, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  bitnet run -p \"Once upon a time\"                 the built-in demo tells a fairy tale
  bitnet run -m model.gguf -f prompt.txt -n 200     continue a text with a model of your own
  bitnet chat -m model.gguf                         talk with it
  bitnet bench -m model.gguf                        how fast is it here?
  bitnet COMMAND --help                             options and examples of a command";

#[derive(Subcommand)]
enum Command {
    // A doc comment here would hide that of the arguments.
    Run(commands::run::Args),
    Chat(commands::chat::Args),
    Batch(commands::batch::Args),
    Tokenize(commands::tokenize::Args),
    Detokenize(commands::detokenize::Args),
    Logits(commands::logits::Args),
    Perplexity(commands::perplexity::Args),
    Inspect(commands::inspect::Args),
    Pull(commands::pull::Args),
    List(commands::list::Args),
    Rm(commands::rm::Args),
    Convert(commands::convert::Args),
    Verify(commands::verify::Args),
    Doctor(commands::doctor::Args),
    Bench(commands::bench::Args),
    Completions(commands::completions::Args),
    Man(commands::man::Args),
}

/// Ends the program as a wrong option of its command does.
fn usage_error(kind: ErrorKind, message: impl Display) -> ! {
    let mut command = Cli::command();
    command.build();
    let name = std::env::args_os().nth(1).unwrap_or_default();
    let error = match command.find_subcommand_mut(&name) {
        Some(command) => command.error(kind, message),
        None => command.error(kind, message),
    };
    error.exit()
}

/// Reads the command line; what is wrong with it ends the program.
fn parse() -> Cli {
    // A negative number is a value, right or wrong, and no option.
    let value = |arg: Arg| {
        let takes = arg.get_action().takes_values();
        if takes { arg.allow_negative_numbers(true) } else { arg }
    };
    let mut command = Cli::command().mut_subcommands(|command| command.mut_args(value));
    let matches = command.try_get_matches_from_mut(std::env::args_os());
    matches
        .and_then(|matches| Cli::from_arg_matches(&matches))
        .unwrap_or_else(|error| explained(error).exit())
}

/// Says in an error of the command line what was expected.
fn explained(mut error: clap::Error) -> clap::Error {
    let text = |kind| error.get(kind).map(ToString::to_string).unwrap_or_default();
    let (arg, value) = (text(ContextKind::InvalidArg), text(ContextKind::InvalidValue));
    let expected = match error.source().map(ToString::to_string).as_deref() {
        Some("invalid float literal" | "cannot parse float from empty string") => "expected a number",
        Some("invalid digit found in string") if value.starts_with('-') => {
            "expected a number that is not negative"
        }
        Some("invalid digit found in string" | "cannot parse integer from empty string") => {
            "expected a whole number"
        }
        Some("number too large to fit in target type") => "expected a smaller number",
        _ => "",
    };
    let command = std::env::args_os().nth(1).unwrap_or_default();
    let command = command.to_string_lossy();
    if !expected.is_empty() {
        usage_error(error.kind(), format_args!("invalid value '{value}' for '{arg}': {expected}"));
    }
    let tip = match error.kind() {
        ErrorKind::UnknownArgument if ["run", "chat"].contains(&&*command) && !arg.starts_with('-') => {
            let is_model = command == "chat" || arg.ends_with(".gguf");
            let (what, option) = if is_model { ("model", "-m") } else { ("prompt", "-p") };
            format!("the {what} is given with {option} \"{arg}\"")
        }
        ErrorKind::InvalidSubcommand if error.get(ContextKind::SuggestedSubcommand).is_none() => {
            // Letters that changed places are not alike enough for clap.
            let letters = |word: &str| {
                let mut letters: Vec<_> = word.chars().collect();
                letters.sort_unstable();
                letters
            };
            let all = Cli::command();
            let mut names = all.get_subcommands().map(clap::Command::get_name);
            let Some(name) = names.find(|name| letters(name) == letters(&command)) else { return error };
            format!("did you mean {name}?")
        }
        _ => return error,
    };
    error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    error
}

fn main() -> ExitCode {
    // That a file may not grow any more is an error like any other.
    #[cfg(unix)]
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, std::sync::Arc::default());
    let result = match parse().command {
        Command::Run(args) => commands::run::run(&args),
        Command::Chat(args) => commands::chat::run(&args),
        Command::Batch(args) => commands::batch::run(&args),
        Command::Tokenize(args) => commands::tokenize::run(&args),
        Command::Detokenize(args) => commands::detokenize::run(&args),
        Command::Logits(args) => commands::logits::run(&args),
        Command::Perplexity(args) => commands::perplexity::run(&args),
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Pull(args) => commands::pull::run(&args),
        Command::List(args) => commands::list::run(&args),
        Command::Rm(args) => commands::rm::run(&args),
        Command::Convert(args) => commands::convert::run(&args),
        Command::Verify(args) => commands::verify::run(args),
        Command::Doctor(args) => commands::doctor::run(args),
        Command::Bench(args) => commands::bench::run(args),
        Command::Completions(args) => commands::completions::run(&args),
        Command::Man(args) => commands::man::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => output::report(&error),
    }
}
