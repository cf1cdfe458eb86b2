use crate::{hub, output};
use bitnet::hub::KNOWN;
use serde_json::json;
use std::io::{self, IsTerminal};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

/// Download a model
///
/// It goes from the Hugging Face hub into its cache, and its path is printed; a download that broke off goes on where it
/// was. HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are those of Hugging Face's own programs, which
/// share the cache.
#[derive(clap::Args)]
#[command(after_help = known())]
pub struct Args {
    /// OWNER/REPO, hf:OWNER/REPO:FILE, or a short name
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// No progress and notices on stderr
    #[arg(short = 'q', long)]
    quiet: bool,
}

fn known() -> String {
    let lines = KNOWN.map(|known| format!("\n  {:<11} {} ({})", known.short, known.repo, known.about));
    format!("Short names:{}", lines.concat())
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let name = hub::name(&args.name)?;
    let (interrupted, quiet) = (output::interrupt_flag()?, args.quiet);
    thread::spawn(move || {
        while !interrupted.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(50));
        }
        if !quiet {
            // A terminal shows ^C, or the bar, on this line.
            let line = if io::stderr().is_terminal() { "\n" } else { "" };
            output::notice(format_args!(
                "{line}interrupted: what has arrived is kept; the same command goes on from there"
            ));
        }
        std::process::exit(output::interrupted_code().into());
    });
    let pulled = hub::pull(&name, true, args.quiet)?;
    let path = pulled.path.display();
    let quiet = args.quiet || !pulled.path.is_dir();
    output::note(quiet, format_args!("a checkpoint; `bitnet convert {path} OUT.gguf` makes a model of it"));
    if args.json {
        return output::print_json(&json!({
            "path": pulled.path, "size": pulled.size, "cached": pulled.cached,
        }));
    }
    output::print(format!("{path}\n").as_bytes())
}
