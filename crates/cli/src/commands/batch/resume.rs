//! The output of a batch, from which a later run goes on.
//!
//! Rows are appended in the order of the input, each with one write, and each with a key: a hash of its input row, the
//! settings and the model. So the file itself tells how far a run came, and whether it was this one. A run that was killed
//! leaves at most the beginning of a row behind the last newline.

use crate::source::FileArgs;
use anyhow::{Context, bail, ensure};
use bitnet::gguf::AtomicFile;
use serde::{Deserialize, Serialize};
use std::fs::{File, TryLockError};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// What a row of the output begins with.
const START: &[u8] = b"{\"id\":";
/// No row is longer.
const LONGEST: u64 = 256 << 20;
/// After a crash of the machine at most this much has to be computed again.
const SYNC_EVERY: Duration = Duration::from_secs(5);

/// The file of this run, locked against others.
pub struct Output {
    name: String,
    file: File,
    synced: Instant,
}

/// What is there before this run begins: it stays as it is until then.
pub struct Before<'a> {
    path: &'a Path,
    file: Option<File>,
    /// Bytes of rows that stay.
    end: u64,
}

/// What a run reads of a row that is there.
#[derive(Deserialize)]
pub struct Kept {
    /// The key that it was written with.
    pub key: String,
    /// What was wrong with its input.
    pub error: Option<String>,
}

impl<'a> Before<'a> {
    /// Hands the rows in `path` to `check`, which refuses those that do not belong to this run, unless `overwrite` is set.
    ///
    /// # Errors
    /// Where the file cannot be used or holds something else.
    pub fn read(
        path: &'a Path,
        overwrite: bool,
        notes: &FileArgs,
        check: &mut dyn FnMut(Kept) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let name = path.display().to_string();
        let file = match File::options().read(true).write(true).open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                // Known before anything is computed.
                AtomicFile::possible(path).with_context(|| format!("{name}: cannot open"))?;
                None
            }
            file => Some(locked(&name, file, notes)?),
        };
        let end = match &file {
            Some(file) if !overwrite => read(&name, file, check)?,
            _ => 0,
        };
        Ok(Self { path, file, end })
    }

    /// Makes the file where there is none, and cuts off what does not stay, such as the rest of a row that was not finished.
    pub fn begin(self, notes: &FileArgs) -> anyhow::Result<Output> {
        let name = self.path.display().to_string();
        let mut file = match self.file {
            Some(file) => file,
            None => locked(&name, File::create_new(self.path), notes)?,
        };
        let cut = file.set_len(self.end).and_then(|()| file.seek(SeekFrom::Start(self.end)));
        cut.with_context(|| format!("{name}: cannot write"))?;
        Ok(Output { name, file, synced: Instant::now() })
    }
}

/// A regular file that nobody else writes.
fn locked(name: &str, file: io::Result<File>, notes: &FileArgs) -> anyhow::Result<File> {
    let failed = || format!("{name}: cannot open");
    let file = file.with_context(failed)?;
    ensure!(file.metadata().with_context(failed)?.is_file(), "{name}: not a regular file");
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => bail!("{name}: another batch is writing it"),
        // Some network file systems have no locks.
        Err(TryLockError::Error(error)) => notes.note(format_args!("{name}: cannot be locked: {error}")),
    }
    Ok(file)
}

impl Output {
    /// Appends a row.
    pub fn write(&mut self, row: &impl Serialize) -> anyhow::Result<()> {
        let mut bytes = serde_json::to_vec(row)?;
        bytes.push(b'\n');
        self.file.write_all(&bytes).with_context(|| format!("{}: cannot write", self.name))?;
        if self.synced.elapsed() > SYNC_EVERY { self.sync() } else { Ok(()) }
    }

    /// Waits until all rows are on the disk.
    pub fn sync(&mut self) -> anyhow::Result<()> {
        self.file.sync_data().with_context(|| format!("{}: cannot write", self.name))?;
        self.synced = Instant::now();
        Ok(())
    }
}

/// Checks all rows; the length of the file up to the end of the last whole one.
fn read(name: &str, file: &File, check: &mut dyn FnMut(Kept) -> anyhow::Result<()>) -> anyhow::Result<u64> {
    let mut reader = BufReader::new(file);
    let (mut line, mut end) = (Vec::new(), 0);
    for number in 1.. {
        line.clear();
        let part = reader.by_ref().take(LONGEST).read_until(b'\n', &mut line);
        let read = part.with_context(|| format!("{name}: cannot read"))? as u64;
        let foreign = || format!("{name}:{number}: not a row of a batch; --overwrite would start anew");
        if line.last() != Some(&b'\n') {
            ensure!(read < LONGEST && (line.starts_with(START) || START.starts_with(&line)), foreign());
            break;
        }
        let kept: Kept = serde_json::from_slice(&line).with_context(foreign)?;
        check(kept).with_context(|| {
            format!("{name}:{number}: not made by this run; --overwrite would start anew")
        })?;
        end += read;
    }
    Ok(end)
}
