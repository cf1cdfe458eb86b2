use crate::{Cli, output};
use anyhow::Context;
use clap::{Command, CommandFactory};
use clap_mangen::Man;
use std::path::PathBuf;

/// Print a manual page, or write all of them to a folder
#[derive(clap::Args)]
#[command(after_help = "Examples:
  bitnet man run | man -l -                      read the page of `bitnet run`
  bitnet man -o ~/.local/share/man/man1          install all pages")]
pub struct Args {
    /// The command [default: bitnet itself]
    #[arg(value_name = "COMMAND")]
    command: Option<String>,
    /// Write bitnet.1, bitnet-run.1 and so on to this folder
    #[arg(short = 'o', long, value_name = "DIR", conflicts_with = "command")]
    out: Option<PathBuf>,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut cli = Cli::command().disable_help_subcommand(true);
    if let Some(folder) = &args.out {
        let failed = || format!("{}: cannot write", folder.display());
        std::fs::create_dir_all(folder).with_context(failed)?;
        cli.build();
        for command in cli.get_subcommands().chain([&cli]) {
            let (name, text) = page(command)?;
            std::fs::write(folder.join(name), text).with_context(failed)?;
        }
        return Ok(());
    }
    cli.build();
    let command = match &args.command {
        None => &cli,
        Some(name) => cli
            .find_subcommand(name)
            .with_context(|| format!("there is no command {name}; `bitnet --help` lists them"))?,
    };
    output::print(page(command)?.1.as_bytes())
}

/// The page of a command: the name of its file, and the text.
fn page(command: &Command) -> anyhow::Result<(String, String)> {
    let name = command.get_display_name().unwrap_or("bitnet");
    let man = Man::new(command.clone()).source(format!("{name} {}", env!("CARGO_PKG_VERSION")));
    let mut text = Vec::new();
    man.render(&mut text)?;
    let text = String::from_utf8(text)?.replace(".SH EXTRA\nExamples:\n", ".SH EXAMPLES\n");
    Ok((man.get_filename(), text.replace(".SH EXTRA\n", ".SH NOTES\n")))
}
