//! Models from the Hugging Face hub, in the cache that Hugging Face's own programs share.
//!
//! The layout is that of `huggingface_hub` (<https://huggingface.co/docs/huggingface_hub/guides/manage-cache>): a file is
//! stored once, under its checksum, and a snapshot of a revision is a folder of links to such files. A file gets its
//! name only when it is complete and its checksum is right; what has arrived before stays beside it as `.incomplete`
//! and the next download, ours or theirs, goes on from there.
//!
//! The server is not trusted: names, sizes, redirects and bytes are checked, and the token goes to the hub alone.
//! Proxies are those that the environment names (`HTTPS_PROXY`, `NO_PROXY`), as the HTTP client reads them.

mod cache;
mod client;
mod download;
mod name;

pub use cache::{Cached, Content};
pub use name::{KNOWN, Known, ModelName};

use cache::Repo;
use client::{Client, FileMeta};
use serde::Deserialize;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where models come from and where they are kept.
#[derive(Clone, Debug)]
pub struct Hub {
    /// The cache folder, which holds one folder a repository.
    pub cache: PathBuf,
    /// The server, without a slash at its end.
    pub endpoint: String,
    /// Sent to the server, and to no other.
    pub token: Option<String>,
    /// Never use the network.
    pub offline: bool,
    /// How long a connection may be silent.
    pub timeout: Duration,
    /// First pause before a failed request is tried again; each further one is twice as long.
    pub pause: Duration,
    /// Bytes that one request asks for. Several requests run at a time.
    pub range: u64,
}

/// How far a download is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The file, as the repository names it.
    pub file: &'a str,
    /// Bytes that are here.
    pub done: u64,
    /// Its size.
    pub total: u64,
    /// Another process is downloading it, and this one waits.
    pub waiting: bool,
}

/// What a download brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pulled {
    /// The GGUF file, or the folder of a checkpoint.
    pub path: PathBuf,
    /// Bytes of its files.
    pub size: u64,
    /// Whether all of it was in the cache already.
    pub cached: bool,
}

/// Why a model was not found or downloaded. Every message is one line.
#[allow(missing_docs)] // the names and messages of the fields say it all
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// The caller's name is none.
    #[error("{name}: {problem}")]
    Name { name: String, problem: String },
    /// The repository does not hold what was asked for, or more than one of it.
    #[error("{repo}: {problem}")]
    Repo { repo: String, problem: String },
    /// No answer came: no network, or the server is down.
    #[error("{url}: no connection: {cause}")]
    Unreachable { url: String, cause: String },
    /// The server refused.
    #[error("{url}: HTTP status {status}: {problem}")]
    Status { url: String, status: u16, problem: String },
    /// The server's answer makes no sense; nothing of it was kept.
    #[error("{url}: {problem}")]
    Server { url: String, problem: String },
    /// The bytes are not those that the repository has; they were thrown away.
    #[error("{file}: the checksum is {found}, expected {expected}; the download was thrown away")]
    Checksum { file: String, expected: String, found: String },
    /// The network is needed and not to be used.
    #[error("{0}: HF_HUB_OFFLINE forbids the network")]
    Offline(String),
    /// The system refused something.
    #[error("{path}: cannot {action}: {error}")]
    Io { path: String, action: &'static str, error: io::Error },
}

impl HubError {
    fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.display().to_string();
        move |error| Self::Io { path, action, error }
    }

    fn server(url: &str, problem: impl Into<String>) -> Self {
        Self::Server { url: client::shown(url), problem: problem.into() }
    }

    fn repo(name: &ModelName, problem: impl Into<String>) -> Self {
        Self::Repo { repo: name.repo.clone(), problem: problem.into() }
    }
}

/// What the hub says about a revision.
#[derive(Deserialize)]
struct Revision {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// The revision that names without one mean.
const REVISION: &str = "main";

impl Hub {
    /// The settings of Hugging Face's programs, from the environment variables that `var` gives: `HF_HUB_CACHE`, `HF_HOME`,
    /// `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE` and the older names of some; and the token that
    /// `hf auth login` stored. None where nothing tells a home folder.
    pub fn from_env(var: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let var =
            |name: &str| var(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let user_home = || var("HOME").or_else(|| var("USERPROFILE")).map(PathBuf::from);
        let home = var("HF_HOME")
            .map(PathBuf::from)
            .or_else(|| var("XDG_CACHE_HOME").map(|path| Path::new(&path).join("huggingface")))
            .or_else(|| Some(user_home()?.join(".cache").join("huggingface")));
        let expand = |path: PathBuf| match (path.strip_prefix("~"), user_home()) {
            (Ok(rest), Some(home)) => home.join(rest),
            _ => path,
        };
        let home = home.map(expand);
        let cache =
            var("HF_HUB_CACHE").or_else(|| var("HUGGINGFACE_HUB_CACHE")).map(|path| expand(path.into()));
        let token_file =
            var("HF_TOKEN_PATH").map(|path| expand(path.into())).or(Some(home.clone()?.join("token")));
        let stored = || fs::read_to_string(token_file?).ok();
        let token = var("HF_TOKEN").or_else(|| var("HUGGING_FACE_HUB_TOKEN")).or_else(stored);
        let on =
            |name| var(name).is_some_and(|v| ["1", "on", "yes", "true"].contains(&v.to_lowercase().as_str()));
        Some(Self {
            cache: cache.or(home.map(|home| home.join("hub")))?,
            endpoint: var("HF_ENDPOINT")
                .map_or("https://huggingface.co".into(), |url| url.trim_end_matches('/').to_owned()),
            token: token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()),
            offline: on("HF_HUB_OFFLINE") || on("TRANSFORMERS_OFFLINE"),
            timeout: Duration::from_secs(30),
            pause: Duration::from_millis(500),
            range: 8 << 20,
        })
    }

    /// The file (or with `checkpoints` the folder of a checkpoint) that the cache has under a name, without network.
    ///
    /// # Errors
    /// [`HubError::Repo`] where the name means several cached files.
    pub fn find(&self, name: &ModelName, checkpoints: bool) -> Result<Option<PathBuf>, HubError> {
        let repo = Repo::new(&self.cache, &name.repo);
        for snapshot in repo.snapshots(REVISION) {
            if let Some(file) = &name.file {
                let path = snapshot.join(file);
                if path.is_file() {
                    return Ok(Some(path));
                }
                continue;
            }
            let files = cache::files_below(&snapshot);
            if let Some(file) = choose_gguf(name, files.iter().map(String::as_str))? {
                return Ok(Some(snapshot.join(file)));
            }
            // A download links one file after the other, and then lets the revision mean their commit.
            let whole = || snapshot == repo.current(REVISION);
            if checkpoints
                && whole()
                && files.iter().any(|file| is_checkpoint(file) && file.ends_with(".safetensors"))
            {
                return Ok(Some(snapshot));
            }
        }
        Ok(None)
    }

    /// Downloads what is missing of a model: the file that the name says, else the repository's GGUF file, else (with
    /// `checkpoints`) the files of its checkpoint. `progress` is called from several threads.
    ///
    /// # Errors
    /// What failed, after the retries that make sense. A download that broke off is resumed by the next call.
    pub fn pull(
        &self,
        name: &ModelName,
        checkpoints: bool,
        progress: &(dyn Fn(Progress<'_>) + Sync),
    ) -> Result<Pulled, HubError> {
        if self.offline {
            return Err(HubError::Offline(name.to_string()));
        }
        let client = Client::new(self)?;
        let (mut revision, files, folder) = match &name.file {
            Some(file) => (REVISION.to_owned(), vec![file.clone()], false),
            None => wanted(client.revision(&name.repo, REVISION)?, name, checkpoints)?,
        };
        let repo = Repo::new(&self.cache, &name.repo);
        let mut pulled = Pulled { path: PathBuf::new(), size: 0, cached: true };
        for file in &files {
            let meta = client.file(&name.repo, &revision, file)?;
            // All files are of one commit, whatever is pushed meanwhile.
            revision.clone_from(&meta.commit);
            pulled.cached &= Self::bring(&client, &repo, name, file, &meta, progress)?;
            pulled.size += meta.size;
        }
        let snapshot = repo.snapshot(&revision);
        // The name moves to the new commit when that is here.
        repo.write_ref(REVISION, &revision)?;
        pulled.path = if folder { snapshot } else { snapshot.join(&files[0]) };
        Ok(pulled)
    }

    /// Brings one file into the cache; true if it was there.
    fn bring(
        client: &Client<'_>,
        repo: &Repo,
        name: &ModelName,
        file: &str,
        meta: &FileMeta,
        progress: &(dyn Fn(Progress<'_>) + Sync),
    ) -> Result<bool, HubError> {
        let blob = repo.blob(&meta.digest);
        let state = Progress { file, done: 0, total: meta.size, waiting: false };
        let here = || fs::metadata(&blob).is_ok_and(|m| m.is_file() && m.len() == meta.size);
        let mut cached = here();
        if !cached {
            let _lock = repo.lock(&meta.digest, || progress(Progress { waiting: true, ..state }))?;
            // Another process may have brought it while this one waited.
            cached = here();
            if !cached {
                let partial = repo.partial(&meta.digest);
                let missing = meta.size - fs::metadata(&partial).map_or(0, |m| m.len().min(meta.size));
                if let Some(free) = free_space(&partial).filter(|free| *free < missing) {
                    let full = format!("{missing} bytes are missing, the disk has {free} left");
                    let full = io::Error::new(io::ErrorKind::StorageFull, full);
                    return Err(HubError::io(&partial, "download")(full));
                }
                let url = client.resolve_url(&name.repo, &meta.commit, file);
                download::download(client, &url, meta, &partial, &|done| {
                    progress(Progress { done, ..state });
                })?;
                fs::rename(&partial, &blob).map_err(HubError::io(&blob, "put into place"))?;
            }
        }
        repo.link(&meta.commit, file, &meta.digest)?;
        Ok(cached)
    }

    /// The GGUF files and the checkpoints of BitNets in the cache, and what downloads left unfinished.
    pub fn list(&self) -> Vec<Cached> {
        cache::list(&self.cache)
    }

    /// Removes a repository from the cache, or one file of it where the name has one. Returns the bytes that it freed, None
    /// if it is not there.
    ///
    /// # Errors
    /// [`HubError::Io`], also while another process downloads it.
    pub fn remove(&self, name: &ModelName) -> Result<Option<u64>, HubError> {
        Repo::new(&self.cache, &name.repo).remove(name.file.as_deref())
    }

    /// Where a person finds the files of a repository.
    pub fn page(&self, name: &ModelName) -> String {
        format!("{}/{}/tree/{REVISION}", self.endpoint, name.repo)
    }
}

/// Bytes that are free on the disk where `file` is to be; None where the system does not tell.
#[cfg(unix)]
fn free_space(file: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(file.parent()?).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}

#[cfg(not(unix))]
fn free_space(_: &Path) -> Option<u64> {
    None
}

/// The commit of a revision, the files of it to bring, and whether they are a checkpoint.
fn wanted(
    Revision { sha, siblings }: Revision,
    name: &ModelName,
    checkpoints: bool,
) -> Result<(String, Vec<String>, bool), HubError> {
    // A name that leads out of the folder is not the name of a file.
    let all = siblings.into_iter().map(|s| s.rfilename).filter(|f| name::check_file(f).is_ok());
    let all: Vec<_> = all.collect();
    if let Some(file) = choose_gguf(name, all.iter().map(String::as_str))? {
        return Ok((sha, vec![file.to_owned()], false));
    }
    let parts: Vec<_> = all.into_iter().filter(|file| is_checkpoint(file)).collect();
    let problem = match (parts.iter().any(|file| file.ends_with(".safetensors")), checkpoints) {
        (true, true) => return Ok((sha, parts, true)),
        (true, false) => {
            format!("no GGUF file but a checkpoint: `bitnet convert {name} OUT.gguf` makes a model of it")
        }
        _ => "the repository has no GGUF file and no checkpoint".to_owned(),
    };
    Err(HubError::repo(name, problem))
}

/// The GGUF file to take: the only one, or the only one whose name says I2_S.
fn choose_gguf<'a>(
    name: &ModelName,
    files: impl Iterator<Item = &'a str>,
) -> Result<Option<&'a str>, HubError> {
    let mut files: Vec<_> = files.filter(|file| file.to_lowercase().ends_with(".gguf")).collect();
    files.sort_unstable();
    let i2s: Vec<_> = files.iter().filter(|file| file.to_lowercase().contains("i2_s")).copied().collect();
    match (&files[..], &i2s[..]) {
        ([], _) => Ok(None),
        ([one], _) | (_, [one]) => Ok(Some(one)),
        _ => {
            let problem = format!("several GGUF files; name one, such as hf:{}:{}", name.repo, files[0]);
            Err(HubError::repo(name, format!("{problem} ({})", files.join(", "))))
        }
    }
}

/// Whether `bitnet convert` reads a file of this name.
fn is_checkpoint(file: &str) -> bool {
    const NAMES: [&str; 6] = [
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
    ];
    NAMES.contains(&file)
        || file.starts_with("model") && file.ends_with(".safetensors") && !file.contains('/')
}
