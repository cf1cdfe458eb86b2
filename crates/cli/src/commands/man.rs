use crate::{Cli, output};
use anyhow::Context;
use clap::CommandFactory;
use std::path::PathBuf;

/// Print the manual page of bitnet or of one of its commands, or write all of them to a folder.
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
        return clap_mangen::generate_to(cli, folder).with_context(failed);
    }
    cli.build();
    let page = match &args.command {
        None => cli,
        Some(name) => cli
            .find_subcommand(name)
            .cloned()
            .with_context(|| format!("there is no command {name}; `bitnet --help` lists them"))?,
    };
    let mut text = Vec::new();
    clap_mangen::Man::new(page).render(&mut text)?;
    output::print(&text)
}
