use crate::{hub, output};
use anyhow::{Context, ensure};

/// Remove downloaded models
#[derive(clap::Args)]
#[command(after_help = "Example:
  bitnet rm 2b-4t hf:OWNER/REPO:model.gguf")]
pub struct Args {
    /// OWNER/REPO for all that is there of it, hf:OWNER/REPO:FILE for one file, or a short name
    #[arg(required = true)]
    names: Vec<String>,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let hub = hub::settings()?;
    let remove = |text: &String| {
        let name = hub::name(text)?;
        let freed = hub.remove(&name)?.with_context(|| {
            format!("{name}: not in {}; `bitnet list` shows what is", hub.cache.display())
        })?;
        output::notice(format_args!("{name}: removed, {} freed", output::bytes(freed)));
        anyhow::Ok(())
    };
    let errors = args.names.iter().filter_map(|name| Some(format!("{:#}", remove(name).err()?)));
    let errors: Vec<_> = errors.collect();
    ensure!(errors.is_empty(), "{}", errors.join("; "));
    Ok(())
}
