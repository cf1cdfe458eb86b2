use crate::{hub, output};
use bitnet::gguf::Gguf;
use bitnet::hub::Cached;
use serde_json::json;

/// Lists the GGUF models in the cache of the Hugging Face hub. Each name is one that `-m` takes.
#[derive(clap::Args)]
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
                "name": name(cached), "size": cached.size, "path": cached.path, "complete": cached.file.is_some(),
                "architecture": architecture(cached),
            })
        });
        return output::print_json(&rows.collect());
    }
    if list.is_empty() {
        output::notice(format_args!(
            "note: no models in {}; `bitnet pull 2b-4t` downloads one",
            hub.cache.display()
        ));
    }
    let width = list.iter().map(|cached| name(cached).len()).max().unwrap_or(0);
    for cached in &list {
        let about = match (&cached.file, architecture(cached)) {
            (None, _) => "not complete; `bitnet pull` goes on".to_owned(),
            (_, Some(architecture)) => architecture,
            (_, None) => "not a GGUF file that can be read".to_owned(),
        };
        let line = format!("{:<width$}  {:>10}  {about}\n", name(cached), output::bytes(cached.size));
        output::print(line.as_bytes())?;
    }
    Ok(())
}

fn name(cached: &Cached) -> String {
    match &cached.file {
        Some(file) => format!("hf:{}:{}", cached.repo, file.escape_debug()),
        None => cached.repo.clone(),
    }
}

fn architecture(cached: &Cached) -> Option<String> {
    let gguf = Gguf::open(&cached.path).ok().filter(|_| cached.file.is_some())?;
    let architecture = gguf.get_str("general.architecture").ok()??;
    Some(architecture.chars().take(40).collect::<String>().escape_debug().to_string())
}
