//! The cache folder: one folder a repository, with `blobs`, `refs` and `snapshots`.

use super::HubError;
use bitnet_gguf::AtomicFile;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// A model in the cache, or what has arrived of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cached {
    /// `owner/name`.
    pub repo: String,
    /// What it is.
    pub content: Content,
    /// Bytes that are here.
    pub size: u64,
    /// Where they are.
    pub path: PathBuf,
}

/// What the cache may hold of a repository.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Content {
    /// A part of a file.
    Partial,
    /// The folder of a BitNet's checkpoint.
    Checkpoint,
    /// A GGUF file, by its path in the repository.
    Gguf(String),
}

/// The folder of one repository.
pub(super) struct Repo {
    folder: PathBuf,
    locks: PathBuf,
}

impl Repo {
    pub(super) fn new(cache: &Path, repo: &str) -> Self {
        let name = format!("models--{}", repo.replace('/', "--"));
        Self { folder: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    pub(super) fn blob(&self, digest: &str) -> PathBuf {
        self.folder.join("blobs").join(digest)
    }

    pub(super) fn partial(&self, digest: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{digest}.incomplete"))
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// The snapshot that the revision means.
    pub(super) fn current(&self, revision: &str) -> PathBuf {
        let commit = fs::read_to_string(self.folder.join("refs").join(revision)).unwrap_or_default();
        self.snapshot(commit.trim())
    }

    /// The snapshots, that of the revision first.
    pub(super) fn snapshots(&self, revision: &str) -> Vec<PathBuf> {
        let first = self.current(revision);
        let mut all = entries(&self.folder.join("snapshots"));
        all.sort_by_key(|path| *path != first);
        all
    }

    /// Makes this process the only one that writes a blob, waiting for another where there is one.
    pub(super) fn lock(&self, digest: &str, waiting: impl FnOnce()) -> Result<File, HubError> {
        let path = self.locks.join(format!("{digest}.lock"));
        fs::create_dir_all(&self.locks).map_err(HubError::io(&self.locks, "create"))?;
        let blobs = self.folder.join("blobs");
        fs::create_dir_all(&blobs).map_err(HubError::io(&blobs, "create"))?;
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(HubError::io(&path, "open"))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                waiting();
                file.lock().map_err(HubError::io(&path, "lock"))?;
            }
            Err(TryLockError::Error(error)) => return Err(HubError::io(&path, "lock")(error)),
        }
        Ok(file)
    }

    /// Makes a blob appear in a snapshot: a relative link, so that the cache can be moved.
    pub(super) fn link(&self, commit: &str, file: &str, digest: &str) -> Result<(), HubError> {
        let path = self.snapshot(commit).join(file);
        let folder = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder).map_err(HubError::io(folder, "create"))?;
        let depth = 2 + file.matches('/').count();
        let target = format!("{}blobs/{digest}", "../".repeat(depth));
        if fs::read_link(&path).is_ok_and(|found| found == Path::new(&target)) {
            return Ok(());
        }
        let temporary = folder.join(format!(".{digest}.{}.tmp", std::process::id()));
        let _ = fs::remove_file(&temporary); // of a killed process with the same id
        let made = link(Path::new(&target), &self.blob(digest), &temporary);
        made.and_then(|()| fs::rename(&temporary, &path)).map_err(HubError::io(&path, "link"))
    }

    /// Lets a revision mean a commit.
    pub(super) fn write_ref(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        let path = self.folder.join("refs").join(revision);
        let write = || {
            fs::create_dir_all(self.folder.join("refs"))?;
            let mut file = AtomicFile::create(&path)?;
            file.write_all(commit.as_bytes())?;
            file.commit()
        };
        write().map_err(HubError::io(&path, "write"))
    }

    /// Removes the repository or one file of it: the bytes freed, None if it is not there.
    pub(super) fn remove(&self, file: Option<&str>) -> Result<Option<u64>, HubError> {
        if !self.folder.is_dir() {
            return Ok(None);
        }
        for lock in entries(&self.locks) {
            let held = File::open(&lock).is_ok_and(|f| matches!(f.try_lock(), Err(TryLockError::WouldBlock)));
            if held {
                let busy = io::Error::new(io::ErrorKind::ResourceBusy, "another process is downloading it");
                return Err(HubError::io(&self.folder, "remove")(busy));
            }
        }
        let Some(file) = file else {
            let size = entries(&self.folder.join("blobs")).iter().map(|path| size(path)).sum();
            fs::remove_dir_all(&self.folder).map_err(HubError::io(&self.folder, "remove"))?;
            let _ = fs::remove_dir_all(&self.locks);
            return Ok(Some(size));
        };
        let mut blobs = Vec::new();
        for snapshot in entries(&self.folder.join("snapshots")) {
            let path = snapshot.join(file);
            if path.symlink_metadata().is_ok() {
                blobs.extend(path.canonicalize().ok());
                fs::remove_file(&path).map_err(HubError::io(&path, "remove"))?;
                let _ = fs::remove_dir(&snapshot); // where it was the last
            }
        }
        if blobs.is_empty() {
            return Ok(None);
        }
        // A blob goes with its last link, and only if it is one of this repository.
        let used: Vec<_> = entries(&self.folder.join("snapshots"))
            .iter()
            .flat_map(|snapshot| files_below(snapshot).into_iter().map(|f| snapshot.join(f)))
            .filter_map(|path| path.canonicalize().ok())
            .collect();
        blobs.sort_unstable();
        blobs.dedup();
        let own = self.folder.join("blobs").canonicalize().unwrap_or_default();
        blobs.retain(|blob| !used.contains(blob) && blob.parent() == Some(&own));
        let mut freed = 0;
        for blob in blobs {
            freed += size(&blob);
            fs::remove_file(&blob).map_err(HubError::io(&blob, "remove"))?;
        }
        Ok(Some(freed))
    }
}

/// All GGUF files and checkpoints of the cache, and all unfinished downloads.
pub(super) fn list(cache: &Path) -> Vec<Cached> {
    let mut all = Vec::new();
    for folder in entries(cache) {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(repo) = name.strip_prefix("models--").map(|name| name.replacen("--", "/", 1)) else {
            continue;
        };
        let mut push = |content, size, path| all.push(Cached { repo: repo.clone(), content, size, path });
        let current = Repo::new(cache, &repo).current(super::REVISION);
        for snapshot in entries(&folder.join("snapshots")) {
            let files = files_below(&snapshot);
            if snapshot == current
                && files.iter().any(|file| file.ends_with(".safetensors"))
                && is_bitnet(&snapshot)
            {
                let size = files.iter().map(|file| size(&snapshot.join(file))).sum();
                push(Content::Checkpoint, size, snapshot.clone());
            }
            for file in files {
                let path = snapshot.join(&file);
                if file.to_lowercase().ends_with(".gguf") && path.is_file() {
                    push(Content::Gguf(file), size(&path), path);
                }
            }
        }
        for path in entries(&folder.join("blobs")) {
            if path.extension().is_some_and(|e| e == "incomplete") {
                push(Content::Partial, size(&path), path);
            }
        }
    }
    all.sort_by(|a, b| (&a.repo, &a.content).cmp(&(&b.repo, &b.content)));
    all
}

/// Whether the configuration of a checkpoint speaks of BitNet: the cache has other programs' models too.
fn is_bitnet(snapshot: &Path) -> bool {
    let mut config = String::new();
    let file = File::open(snapshot.join("config.json"));
    file.and_then(|file| file.take(1 << 20).read_to_string(&mut config)).is_ok()
        && config.to_lowercase().contains("bitnet")
}

/// The files below a folder, a few levels deep, as paths with slashes; sorted.
pub(super) fn files_below(folder: &Path) -> Vec<String> {
    fn walk(folder: &Path, prefix: &str, depth: usize, files: &mut Vec<String>) {
        for path in entries(folder) {
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            let name = format!("{prefix}{name}");
            if path.is_dir() {
                if depth > 0 {
                    walk(&path, &format!("{name}/"), depth - 1, files);
                }
            } else {
                files.push(name);
            }
        }
    }
    let mut files = Vec::new();
    walk(folder, "", 4, &mut files);
    files.sort_unstable();
    files
}

/// What is in a folder; nothing if it is none.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort_unstable();
    paths
}

fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |m| m.len())
}

#[cfg(unix)]
fn link(target: &Path, _: &Path, path: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

/// Links need a privilege on Windows; there the file gets a second name.
#[cfg(not(unix))]
fn link(_: &Path, blob: &Path, path: &Path) -> io::Result<()> {
    fs::hard_link(blob, path)
}
