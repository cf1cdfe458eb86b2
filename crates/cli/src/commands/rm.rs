use crate::{hub, output};
use anyhow::bail;

/// Removes a model from the cache of the Hugging Face hub.
#[derive(clap::Args)]
pub struct Args {
    /// OWNER/REPO for all that is there of it, hf:OWNER/REPO:FILE for one file, or a short name
    #[arg(required = true)]
    names: Vec<String>,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let hub = hub::settings()?;
    for text in &args.names {
        let name = hub::name(text)?;
        match hub.remove(&name)? {
            Some(freed) => {
                output::notice(format_args!("{name}: removed, {} freed", output::bytes(freed)));
            }
            None => bail!("{name}: not in {}; `bitnet list` shows what is", hub.cache.display()),
        }
    }
    Ok(())
}
