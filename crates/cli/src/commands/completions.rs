use crate::{Cli, output};
use clap::CommandFactory;
use clap_complete::Shell;

/// Print the completions of a shell
///
/// They are how it fills in commands and options when Tab is pressed.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  bash:        bitnet completions bash > ~/.local/share/bash-completion/completions/bitnet
  zsh:         bitnet completions zsh > ~/.zfunc/_bitnet      (with fpath+=~/.zfunc before compinit in ~/.zshrc)
  fish:        bitnet completions fish > ~/.config/fish/completions/bitnet.fish
  PowerShell:  bitnet completions powershell >> $PROFILE")]
pub struct Args {
    /// The shell
    shell: Shell,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "bitnet", &mut script);
    output::print(&script)
}
