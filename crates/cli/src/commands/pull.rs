use crate::{hub, output};
use bitnet::hub::KNOWN;
use serde_json::json;
use std::io::{self, IsTerminal};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

/// Downloads a model from the Hugging Face hub into its cache, or goes on with a download that broke off.
///
/// Prints the path of the model. HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are those of
/// Hugging Face's own programs, which share the cache.
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
    let lines = KNOWN.map(|known| format!("  {:<11} {} ({})", known.short, known.repo, known.about));
    format!(
        "Short names:\n{}\n\nThe cache and the settings are those of Hugging Face's own programs: HF_HOME, HF_HUB_CACHE, HF_TOKEN, \
         HF_ENDPOINT, HF_HUB_OFFLINE. A download that broke off goes on where it was.",
        lines.join("\n")
    )
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
    if pulled.path.is_dir() && !args.quiet {
        let path = pulled.path.display();
        output::notice(format_args!(
            "note: a checkpoint; `bitnet convert {path} OUT.gguf` makes a model of it"
        ));
    }
    if args.json {
        return output::print_json(&json!({
            "path": pulled.path, "size": pulled.size, "cached": pulled.cached,
        }));
    }
    output::print(format!("{}\n", pulled.path.display()).as_bytes())
}
