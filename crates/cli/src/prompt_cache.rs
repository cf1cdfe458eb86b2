//! `--prompt-cache`: keys and values of a prompt that outlive the process.

use crate::output::{self, Interrupted};
use anyhow::{Context, bail, ensure};
use bitnet::gguf::AtomicFile;
use bitnet::{Engine, SavedError, SequenceId};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(clap::Args)]
pub struct PromptCacheArgs {
    /// Keep what was computed of the prompt in FILE, and take from it what a later prompt has in common; the text is the
    /// same. Bound to the model and the cache type
    #[arg(long, value_name = "FILE")]
    prompt_cache: Option<PathBuf>,
    /// Take from the file of --prompt-cache, but leave it as it is
    #[arg(long, requires = "prompt_cache")]
    prompt_cache_ro: bool,
}

impl PromptCacheArgs {
    /// Fills an empty sequence from the file: the tokens of `wanted` that it begins with, or all. A file that does not exist
    /// or is empty has none.
    pub fn restore(
        &self,
        engine: &mut Engine,
        sequence: SequenceId,
        wanted: Option<&[u32]>,
    ) -> anyhow::Result<()> {
        let Some(path) = &self.prompt_cache else { return Ok(()) };
        let name = path.display();
        let meta = match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !self.prompt_cache_ro => {
                let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty());
                ensure!(folder.is_none_or(Path::is_dir), "{name}: there is no such folder");
                // Known before anything is computed.
                AtomicFile::possible(path).with_context(|| format!("{name}: cannot write"))?;
                return Ok(());
            }
            meta => meta.with_context(|| format!("{name}: cannot read"))?,
        };
        ensure!(meta.is_file(), "{name}: not a regular file");
        if meta.len() == 0 {
            return Ok(());
        }
        let mut file = File::open(path).with_context(|| format!("{name}: cannot read"))?;
        engine.restore(sequence, &mut file, meta.len(), wanted).with_context(|| name.to_string())
    }

    /// Writes the first `len` tokens of a sequence to the file; it appears when it is complete, or not at all. `stop` ends
    /// the writing.
    pub fn save(
        &self,
        engine: &Engine,
        sequence: SequenceId,
        len: usize,
        stop: &AtomicBool,
    ) -> anyhow::Result<()> {
        let Some(path) = self.prompt_cache.as_ref().filter(|_| !self.prompt_cache_ro) else { return Ok(()) };
        output::write_file(path, |out| {
            match engine.save(sequence, len, out, || !stop.load(Ordering::Relaxed)) {
                Err(SavedError::Io(error)) if error.kind() == io::ErrorKind::Interrupted => {
                    bail!(Interrupted)
                }
                Err(SavedError::Io(error)) => Err(error.into()),
                result => Ok(result?),
            }
        })
    }
}
