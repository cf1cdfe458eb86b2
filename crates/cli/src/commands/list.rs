use crate::{hub, output};
use bitnet::gguf::Gguf;
use bitnet::hub::{Cached, Content};
use serde_json::json;

/// List the downloaded models
///
/// Those in the cache of the Hugging Face hub: GGUF files, with names that -m takes, and checkpoints.
#[derive(clap::Args)]
#[command(after_help = "Example:
  bitnet list --json | jq -r '.[] | select(.complete) | .path'")]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let hub = hub::settings()?;
    let list = hub.list();
    if args.json {
        let rows = list.iter().map(|cached| {
            json!({
                "name": name(cached), "size": cached.size, "path": cached.path, "complete": cached.content != Content::Partial,
                "architecture": architecture(cached),
            })
        });
        return output::print_json(&rows.collect());
    }
    let cache = hub.cache.display();
    output::note(!list.is_empty(), format_args!("no models in {cache}; `bitnet pull 2b-4t` downloads one"));
    let width = list.iter().map(|cached| name(cached).len()).max().unwrap_or(0);
    for cached in &list {
        let about = match &cached.content {
            Content::Partial => "not complete; `bitnet pull` goes on".to_owned(),
            Content::Checkpoint => "a checkpoint; `bitnet convert` makes a model of it".to_owned(),
            Content::Gguf(_) => {
                architecture(cached).unwrap_or_else(|| "not a GGUF file that can be read".to_owned())
            }
        };
        let line = format!("{:<width$}  {:>10}  {about}\n", name(cached), output::bytes(cached.size));
        output::print(line.as_bytes())?;
    }
    Ok(())
}

fn name(cached: &Cached) -> String {
    match &cached.content {
        Content::Gguf(file) => format!("hf:{}:{}", cached.repo, file.escape_debug()),
        Content::Partial | Content::Checkpoint => cached.repo.clone(),
    }
}

fn architecture(cached: &Cached) -> Option<String> {
    let gguf = Gguf::open(&cached.path).ok().filter(|_| matches!(cached.content, Content::Gguf(_)))?;
    let architecture = gguf.get_str("general.architecture").ok()??;
    Some(architecture.chars().take(40).collect::<String>().escape_debug().to_string())
}
