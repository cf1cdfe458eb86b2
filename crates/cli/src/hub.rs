//! The Hugging Face hub as the command sees it: settings from the environment, and a bar while a file comes.

use crate::output::{self, note, notice};
use anyhow::{Context, bail, ensure};
use bitnet::hub::{Content, Hub, HubError, KNOWN, ModelName, Pulled};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

/// The settings that Hugging Face's programs have in this environment.
pub fn settings() -> anyhow::Result<Hub> {
    Hub::from_env(|name| std::env::var(name).ok())
        .context("no place for the model cache: set HF_HOME to a folder")
}

/// A name on the hub; anything else is an error that says what would be one.
pub fn name(text: &str) -> anyhow::Result<ModelName> {
    ensure!(!text.is_empty(), "the name of the model is empty");
    ModelName::parse(text)?.with_context(|| {
        let plain = |name: &str| name.to_lowercase().replace(['-', '_', ' '], "");
        let meant = KNOWN.iter().find(|known| plain(known.short) == plain(text));
        let short = KNOWN.map(|known| known.short).join(", ");
        let hint = meant
            .map_or(format!("expected OWNER/REPO, hf:OWNER/REPO:FILE or one of {short}"), |known| {
                format!("did you mean {}?", known.short)
            });
        format!("{text}: not the name of a model on the hub: {hint}")
    })
}

/// The name on the hub that is meant where a file or a folder could be; None where it is one of these. A word that is
/// neither is taken for a wrong name.
pub fn name_unless_path(text: &str) -> anyhow::Result<Option<ModelName>> {
    if Path::new(text).exists() {
        return Ok(None);
    }
    match ModelName::parse(text)? {
        None if !text.contains(['/', '\\', '.']) => name(text).context("no such file").map(Some),
        name => Ok(name),
    }
}

/// The file that a hub name means: from the cache without network, else downloaded with a notice.
pub fn model_file(name: &ModelName, quiet: bool) -> anyhow::Result<PathBuf> {
    let hub = settings()?;
    match hub.find(name, true)? {
        Some(path) if path.is_dir() => bail!(
            "{name}: the cache has a checkpoint of it: `bitnet convert {name} OUT.gguf` makes a model of it"
        ),
        Some(path) => return Ok(path),
        None => note(quiet || hub.offline, format_args!("{name} is not here yet; downloading it (once)")),
    }
    Ok(pull(name, false, quiet)?.path)
}

/// A bar that is drawn only where stderr is a terminal.
pub fn bar(quiet: bool) -> ProgressBar {
    let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    ProgressBar::with_draw_target(None, target)
}

/// Downloads what is missing, with a bar where stderr is a terminal.
pub fn pull(name: &ModelName, checkpoints: bool, quiet: bool) -> anyhow::Result<Pulled> {
    let hub = settings()?;
    let bar = bar(quiet);
    bar.set_style(ProgressStyle::with_template(
        "{msg:20!} {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
    )?);
    let waiting = AtomicBool::new(false);
    let (answers, answered) = mpsc::channel();
    let host = hub.endpoint.rsplit('/').next().unwrap_or_default().to_owned();
    thread::spawn(move || {
        if answered.recv_timeout(Duration::from_secs(3)) == Err(RecvTimeoutError::Timeout) && !quiet {
            notice(format_args!("asking {host} ..."));
        }
    });
    let pulled = hub.pull(name, checkpoints, &|progress| {
        let _ = answers.send(()); // only the first is waited for
        if progress.waiting && !waiting.swap(true, Ordering::Relaxed) {
            note(quiet, format_args!("{}: another process downloads it; waiting", progress.file));
        }
        if bar.length() != Some(progress.total) || bar.message() != progress.file {
            bar.set_length(progress.total);
            bar.set_message(progress.file.to_owned());
            // What was there before is no speed.
            bar.set_position(progress.done);
            bar.reset_eta();
        }
        bar.set_position(progress.done);
    });
    drop(answers);
    bar.finish_and_clear();
    match pulled {
        Ok(pulled) => {
            if !quiet && !pulled.cached {
                notice(format_args!("{name}: {} downloaded and verified", output::bytes(pulled.size)));
            }
            Ok(pulled)
        }
        // What is here can be used without a network; whether the hub has something newer is not known.
        Err(error @ (HubError::Unreachable { .. } | HubError::Offline(_))) => {
            if let Some(path) = hub.find(name, checkpoints)? {
                note(
                    quiet,
                    format_args!("{name}: the hub could not be asked ({error}); this is what the cache has"),
                );
                let mut files = vec![path.clone()];
                if let Ok(entries) = path.read_dir() {
                    files = entries.flatten().map(|entry| entry.path()).collect();
                }
                let size = files.iter().filter_map(|file| Some(file.metadata().ok()?.len())).sum();
                return Ok(Pulled { path, size, cached: true });
            }
            // A person needs to know what to do by hand.
            let cache = hub.cache.display().to_string();
            let page = hub.page(name);
            let there = match partial(&hub, name) {
                0 => format!("not in the cache {cache}"),
                size => {
                    format!("only {} of it are here, which `bitnet pull` goes on from", output::bytes(size))
                }
            };
            Err(anyhow::Error::new(error).context(format!(
                "{name}: {there}, and it cannot be downloaded; \
                 fetch the GGUF file from {page} in another way and give its path (-m PATH)"
            )))
        }
        Err(error) => {
            let kept = partial(&hub, name);
            let here = output::bytes(kept);
            note(quiet || kept == 0, format_args!("{here} are here; `bitnet pull` goes on from there"));
            Err(error.into())
        }
    }
}

/// Bytes that a download which broke off has left.
fn partial(hub: &Hub, name: &ModelName) -> u64 {
    let parts = hub.list().into_iter();
    parts.filter(|it| it.content == Content::Partial && it.repo == name.repo).map(|it| it.size).sum()
}
